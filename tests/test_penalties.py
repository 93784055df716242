"""Penalties against their formulas in 60 digits, at ordinary and at extreme arguments."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from declarative_cvx.errors import SpecificationError
from declarative_cvx.penalties import PENALTIES, Huber, Penalty, Quadratic, penalty_named

mp.dps = 60
DTYPES = (torch.float64, torch.float32)
POINTS = (1e-6, 0.02, 0.3, 0.577, 0.8, 0.999, 1.001, 1.7, 4.0, 6.0)
SCALES = (0.3, 1.0, 25.0)
EVERY = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())

Formula = Callable[[mpf, mpf], mpf]

# phi(z; alpha) for z >= 0, as in DDN Table 2 and the literature on robust statistics.
FORMULAS: dict[str, Formula] = {
    "quadratic": lambda z, a: z**2 / 2,
    "pseudo_huber": lambda z, a: a**2 * (mp.sqrt(1 + (z / a) ** 2) - 1),
    "huber": lambda z, a: z**2 / 2 if z <= a else a * (z - a / 2),
    "welsch": lambda z, a: 1 - mp.exp(-(z**2) / (2 * a**2)),
    "truncated_quadratic": lambda z, a: z**2 / 2 if z <= a else a**2 / 2,
    "cauchy": lambda z, a: a**2 / 2 * mp.log(1 + (z / a) ** 2),
    "geman_mcclure": lambda z, a: z**2 / (2 * (1 + (z / a) ** 2)),
    "tukey": lambda z, a: a**2 / 6 * (1 - (1 - (z / a) ** 2) ** 3) if z <= a else a**2 / 6,
}


class Logcosh(Penalty):
    """log(cosh(r)), given by `rho` alone: what a user would write."""

    name = "logcosh"
    convex = True

    def rho(self, r: torch.Tensor) -> torch.Tensor:
        return r.abs() + torch.nn.functional.softplus(-2 * r.abs()) - math.log(2)


class Power(Penalty):
    """A penalty with a number of its own."""

    name = "power"

    def __init__(self, exponent: float) -> None:
        self.exponent = exponent

    def rho(self, r: torch.Tensor) -> torch.Tensor:
        return r.abs() ** self.exponent


def exact(penalty: Penalty, order: int) -> Formula:
    """Derivative of the formula in z, of some order, in 60 digits."""
    formula = FORMULAS[penalty.name]
    return lambda z, a: mpmath.diff(lambda t: formula(t, a), z, order) if order else formula(z, a)


def grid(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals and scales, shape (scales, points), exactly representable."""
    alpha = torch.tensor(SCALES, dtype=dtype)[:, None]
    return alpha * torch.tensor(POINTS, dtype=dtype), alpha


def tabulate(function: Formula, z: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    pairs = zip(z.flatten().tolist(), alpha.expand_as(z).flatten().tolist(), strict=True)
    values = [float(function(mpf(point), mpf(scale))) for point, scale in pairs]
    return torch.tensor(values, dtype=torch.float64).reshape(z.shape)


def assert_accurate(found: torch.Tensor, formula: Formula, change: Formula, units: float) -> None:
    """The error is that of rounding z, alpha and the result by a few units in the last place.

    `change` is the derivative of `formula` in z: near a zero of `formula` that error is large
    relative to the value, whatever the algorithm.
    """
    z, alpha = grid(found.dtype)
    expected = tabulate(formula, z, alpha)
    size = expected.abs() + z.double() * tabulate(change, z, alpha).abs()
    error = (found.double() - expected).abs()
    assert (error <= units * torch.finfo(found.dtype).eps * size).all()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_derivatives_are_those_of_the_formulas(penalty, dtype):
    z, alpha = grid(dtype)
    for order, method in enumerate((penalty.value, penalty.slope, penalty.curvature)):
        found = method(z, alpha)
        assert found.dtype == dtype
        assert_accurate(found, exact(penalty, order), exact(penalty, order + 1), units=8)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_is_the_slope_over_the_residual(penalty, dtype):
    slope, curvature = exact(penalty, 1), exact(penalty, 2)
    assert_accurate(
        penalty.weight(*grid(dtype)),
        lambda z, a: slope(z, a) / z,
        lambda z, a: curvature(z, a) / z - slope(z, a) / z**2,
        units=8,
    )
    zero = torch.zeros((), dtype=dtype)
    torch.testing.assert_close(penalty.weight(zero, 0.5), penalty.curvature(zero, 0.5))


@EVERY
def test_the_slope_changes_with_alpha_as_its_formula_does(penalty):
    formula = FORMULAS[penalty.name]
    z, alpha = grid(torch.float64)
    expected = tabulate(lambda t, a: mpmath.diff(formula, (t, a), (1, 1)), z, alpha)
    # A difference of terms that may cancel: to rounding of the terms.
    size = (penalty.slope(z, alpha) / alpha).abs() + (penalty.curvature(z, alpha) * z / alpha).abs()
    error = (penalty.slope_by_alpha(z, alpha) - expected).abs()
    assert (error <= 2e-15 * (size + alpha ** (penalty.power - 2))).all()
    step = 1e-6 * alpha
    central = (penalty.slope(z, alpha + step) - penalty.slope(z, alpha - step)) / (2 * step)
    torch.testing.assert_close(penalty.slope_by_alpha(z, alpha), central, rtol=1e-6, atol=1e-7)


@EVERY
def test_derivatives_by_hand_are_those_of_automatic_differentiation(penalty):
    torch.manual_seed(0)
    r = 3 * torch.randn(200, dtype=torch.float64)
    torch.testing.assert_close(penalty.rho_slope(r), Penalty.rho_slope(penalty, r))
    torch.testing.assert_close(penalty.rho_curvature(r), Penalty.rho_curvature(penalty, r))
    torch.testing.assert_close(penalty.rho_weight(r), Penalty.rho_weight(penalty, r))


@EVERY
def test_value_and_slope_are_differentiable_twice(penalty):
    torch.manual_seed(1)
    z = torch.randn(12, dtype=torch.float64).mul(2).requires_grad_()
    alpha = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).requires_grad_()
    for method in (penalty.value, penalty.slope):
        assert torch.autograd.gradcheck(method, (z, alpha))
        assert torch.autograd.gradgradcheck(method, (z, alpha))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_argument_gives_a_number(penalty, dtype):
    r = torch.tensor([0.0, 1e-300, 1e-160, 1e-30, 1e18, 1e30, 1e160, 1e300], dtype=torch.float64)
    r = r.to(dtype)
    r = torch.cat([r, -r])[r.isfinite().repeat(2)]
    methods = (penalty.rho, penalty.rho_slope, penalty.rho_curvature, penalty.rho_weight)
    for method in methods[penalty == Quadratic() :]:  # the value of a quadratic may overflow
        assert method(r).isfinite().all(), method.__name__


@EVERY
def test_gradients_at_extreme_arguments_are_finite(penalty):
    r = torch.tensor([0.0, 1e-160, 1e-30, 1e30], dtype=torch.float64, requires_grad=True)
    for method in (penalty.rho, penalty.rho_slope):
        (gradient,) = torch.autograd.grad(method(r).sum(), r)
        assert gradient.isfinite().all()


@EVERY
@given(r=st.floats(0, 1e6), step=st.floats(0, 1e3))
@settings(deadline=None, max_examples=40)
def test_even_and_nondecreasing_away_from_zero(penalty, r, step):
    low, high = torch.tensor([[r], [r + step]], dtype=torch.float64)
    assert torch.equal(penalty.rho(low), penalty.rho(-low))
    assert torch.equal(penalty.rho_slope(low), -penalty.rho_slope(-low))
    torch.testing.assert_close(penalty.rho_curvature(low), penalty.rho_curvature(-low))
    assert torch.equal(penalty.rho_weight(low), penalty.rho_weight(-low))
    assert penalty.rho(torch.zeros(1)).item() == 0
    assert penalty.rho(high) >= penalty.rho(low) * (1 - 1e-15)
    assert penalty.rho_weight(low) >= 0


@EVERY
def test_convexity_and_support_are_as_declared(penalty):
    r = torch.linspace(0, 8, 4001, dtype=torch.float64)
    assert bool((penalty.rho_curvature(r) >= 0).all() and penalty.rho_slope(r[-1:]) > 0) == (
        penalty.convex
    )
    beyond = r[r > penalty.support]
    assert (penalty.rho_slope(beyond) == 0).all()
    assert (penalty.rho_weight(beyond) == 0).all()
    assert torch.equal(penalty.rho(beyond), penalty.rho(beyond.clamp(max=penalty.support)))


@EVERY
def test_breakpoints_are_where_derivatives_jump_and_nowhere_else(penalty):
    """A jump is a change over 2e-7 that no slope accounts for; at it the inner side counts."""
    r = torch.arange(1, 40, dtype=torch.float64) / 10
    inner, outer = r - 1e-7, r + 1e-7
    jumps = {"slope": penalty.rho_slope, "curvature": penalty.rho_curvature}
    found = {
        name: tuple(r[(method(outer) - method(inner)).abs() > 1e-4].tolist())
        for name, method in jumps.items()
    }
    assert tuple(sorted({*found["slope"], *found["curvature"]})) == penalty.breakpoints
    assert penalty.smooth == (not found["slope"])
    if penalty.breakpoints:
        edge = torch.tensor(penalty.breakpoints, dtype=torch.float64)
        for method in (penalty.rho_slope, penalty.rho_curvature, penalty.rho_weight):
            torch.testing.assert_close(method(edge), method(edge - 1e-9))
            torch.testing.assert_close(method(-edge), method(-edge + 1e-9))


def test_far_outliers_cost_what_they_should():
    far = torch.tensor(1e30, dtype=torch.float32)
    assert PENALTIES["pseudo_huber"].value(far, 1.0).item() == pytest.approx(1e30)
    assert PENALTIES["cauchy"].value(far, 1.0).item() == pytest.approx(30 * math.log(10))
    assert PENALTIES["geman_mcclure"].value(far, 2.0).item() == pytest.approx(2.0)
    assert PENALTIES["tukey"].value(far, 3.0).item() == pytest.approx(1.5)
    assert PENALTIES["welsch"].value(far, 3.0).item() == 1.0
    assert PENALTIES["truncated_quadratic"].value(far, 3.0).item() == 4.5


def test_a_penalty_of_the_users_own_needs_only_rho():
    penalty = Logcosh()
    z = torch.linspace(-5, 5, 40, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    r = z.detach() / 0.7
    torch.testing.assert_close(penalty.slope(z, alpha).detach(), 0.7 * r.tanh())
    torch.testing.assert_close(penalty.curvature(z, alpha).detach(), 1 / r.cosh() ** 2)
    torch.testing.assert_close(penalty.weight(z, alpha).detach(), r.tanh() / r)
    expected = r.tanh() - r / r.cosh() ** 2
    torch.testing.assert_close(penalty.slope_by_alpha(z, alpha).detach(), expected)
    assert torch.autograd.gradcheck(penalty.value, (z, alpha))
    assert torch.autograd.gradcheck(penalty.slope, (z, alpha))
    assert torch.autograd.gradgradcheck(penalty.slope, (z, alpha))


@EVERY
def test_maps_over_a_batch(penalty):
    torch.manual_seed(2)
    z = torch.randn(5, 3, dtype=torch.float64)
    alpha = torch.rand(5, dtype=torch.float64) + 0.5
    for method in (penalty.value, penalty.slope, penalty.curvature, penalty.weight):
        mapped = torch.func.vmap(method)(z, alpha)
        torch.testing.assert_close(mapped, method(z, alpha[:, None]))


def test_penalties_compare_by_what_they_are():
    assert Huber() == Huber()
    assert hash(Huber()) == hash(Huber())
    assert Huber() != Quadratic()
    assert Power(1.5) == Power(1.5) != Power(1.2)
    assert pickle.loads(pickle.dumps(PENALTIES["welsch"])) == PENALTIES["welsch"]
    assert repr(Huber()) == "Huber()"


def test_a_penalty_is_found_by_its_name():
    assert penalty_named("huber") == Huber()
    own = Logcosh()
    assert penalty_named(own) is own
    with pytest.raises(SpecificationError, match="Did you mean 'welsch'"):
        penalty_named("welch")
    with pytest.raises(SpecificationError, match="a name or a Penalty object, got 3"):
        penalty_named(3)
