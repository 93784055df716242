"""Solutions without a derivative are reported, and only those."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from declarative_cvx import DeclarativeLayer, IrregularError, IrregularWarning

CLOSE = 1e-6
WEAKLY_ACTIVE, NOT_UNIQUE = "zero multiplier", "not unique"
Matrix = np.ndarray


def tensor(value: Any) -> Tensor:
    return torch.tensor(np.asarray(value, dtype=float))


def between(low: Matrix, high: Matrix) -> Callable[[Matrix], None]:
    """Whether a symmetric Jacobian lies between two ordered ones."""

    def check(found: Matrix) -> None:
        assert_allclose(found, found.T, atol=CLOSE)
        assert np.linalg.eigvalsh(found - low)[0] >= -CLOSE
        assert np.linalg.eigvalsh(high - found)[0] >= -CLOSE

    return check


@dataclass(frozen=True)
class Kink:
    """A problem whose solution map has a kink.

    Attributes
    ----------
    name : str
    build : callable
        Returns (problem, parameter, variable).
    at, regular : array_like
        A parameter on the kink, and one where the map is smooth.
    jacobian : callable
        Checks the Jacobian that is returned on the kink.
    reason : str
        Part of the report's wording.
    """

    name: str
    build: Callable[[], tuple[cp.Problem, cp.Parameter, cp.Variable]]
    at: Any
    regular: Any
    jacobian: Callable[[Matrix], None]
    reason: str = WEAKLY_ACTIVE

    def layer(self, **options: Any) -> DeclarativeLayer:
        problem, parameter, variable = self.build()
        return DeclarativeLayer(problem, [parameter], [variable], **options)

    def __str__(self) -> str:
        return self.name


def _nearest(constrain: Callable[[Any], list], penalty: Callable[[Any], Any] | None = None) -> Any:
    """The point nearest to v under constraints or with a penalty."""

    def build() -> tuple[cp.Problem, cp.Parameter, cp.Variable]:
        x, v = cp.Variable(3), cp.Parameter(3)
        loss = cp.sum_squares(x - v) / 2
        loss = loss if penalty is None else loss + penalty(x)
        return cp.Problem(cp.Minimize(loss), constrain(x)), v, x

    return build


def _nearest_psd() -> tuple[cp.Problem, cp.Parameter, cp.Variable]:
    X, C = cp.Variable((2, 2), symmetric=True), cp.Parameter((2, 2), symmetric=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C) / 2), [X >> 0]), C, X


def _at_a_zero_eigenvalue(found: Matrix) -> None:
    """C = 2 uu' + 0 ww': only along ww' do the derivatives on the two sides differ."""
    found = found.reshape(4, 4)
    u, w = np.array([0.6, 0.8]), np.array([0.8, -0.6])
    for fixed in (np.outer(u, u), np.outer(u, w) + np.outer(w, u)):
        assert_allclose(found @ fixed.ravel(), fixed.ravel(), atol=CLOSE)
    moved = (found @ np.outer(w, w).ravel()).reshape(2, 2)
    share = w @ moved @ w
    assert_allclose(moved, share * np.outer(w, w), atol=CLOSE)
    assert -CLOSE <= share <= 1 + CLOSE


def _linear_program() -> tuple[cp.Problem, cp.Parameter, cp.Variable]:
    x, c = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0]), c, x


_UNIT = np.array([2.0, -1.0, 2.0]) / 3
_EYE, _ALONG = np.eye(3), np.outer(_UNIT, _UNIT)
KINKS = [
    Kink(
        "weakly_active_inequality",
        _nearest(lambda x: [x >= 0]),
        [0.0, 1.0, -1.0],
        [0.5, 1.0, -1.0],
        between(np.diag([0.0, 1.0, 0.0]), np.diag([1.0, 1.0, 0.0])),
    ),
    Kink(
        "absolute_value",
        _nearest(lambda x: [], lambda x: 0.5 * cp.norm1(x)),
        [0.5, 2.0, 0.1],
        [0.7, 2.0, 0.1],
        between(np.diag([0.0, 1.0, 0.0]), np.diag([1.0, 1.0, 0.0])),
    ),
    Kink(
        "boundary_of_a_ball",
        _nearest(lambda x: [cp.norm(x) <= 3]),
        3 * _UNIT,
        4 * _UNIT,
        between(_EYE - _ALONG, _EYE),
    ),
    Kink(
        "norm",
        _nearest(lambda x: [], lambda x: 3 * cp.norm(x)),
        3 * _UNIT,
        4 * _UNIT,
        between(0 * _EYE, _ALONG),
    ),
    Kink(
        "zero_eigenvalue",
        _nearest_psd,
        2 * np.outer([0.6, 0.8], [0.6, 0.8]),
        [[1.0, 2.0], [2.0, 0.5]],
        _at_a_zero_eigenvalue,
    ),
    Kink(
        "solution_not_unique",
        _linear_program,
        [1.0, 1.0, 2.0],
        [1.0, 1.5, 2.0],
        lambda found: assert_allclose(np.isfinite(found), True),
        NOT_UNIQUE,
    ),
]


def jacobian(layer: DeclarativeLayer, *values: Tensor, wrt: int = 0) -> Matrix:
    """Jacobian of the first output, by reverse mode."""
    values = tuple(v.clone().requires_grad_() for v in values)
    out = layer(*values)[0]
    rows = []
    for entry in out.reshape(-1):
        (grad,) = torch.autograd.grad(entry, values[wrt], retain_graph=True)
        rows.append(grad.reshape(-1))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("kink", KINKS, ids=str)
def test_report_without_and_after_a_backward_pass(kink: Kink) -> None:
    layer = kink.layer(on_irregular="ignore")
    batch = torch.stack([tensor(kink.regular), tensor(kink.at)]).requires_grad_()
    weights = torch.linspace(1, 2, batch[0].numel(), dtype=torch.float64).reshape(batch[0].shape)
    solution = layer.solve(batch)
    for _ in range(2):
        report = solution.derivative
        assert report.regular.tolist() == [True, False]
        assert report.reason[0] == ""
        assert kink.reason in report.reason[1]
        assert report.weakly_active.tolist() == [False, kink.reason == WEAKLY_ACTIVE]
        assert float(report.residual[0]) <= 1e-9
        if kink.reason == NOT_UNIQUE:
            assert float(report.residual[1]) > 1e-3
        (weights * solution.variables[0]).sum().backward(retain_graph=True)


@pytest.mark.parametrize("kink", KINKS, ids=str)
def test_gradient_on_a_kink_is_that_of_a_side_or_between(kink: Kink) -> None:
    kink.jacobian(jacobian(kink.layer(on_irregular="ignore"), tensor(kink.at)))


@pytest.mark.parametrize("kink", KINKS, ids=str)
def test_what_happens_is_what_was_asked_for(kink: Kink) -> None:
    values = [kink.regular, kink.at, kink.regular, kink.at]
    batch = torch.stack([tensor(v) for v in values]).requires_grad_()
    weights = torch.linspace(1, 2, batch[0].numel(), dtype=torch.float64).reshape(batch[0].shape)

    def gradient(on_irregular: str, part: Tensor) -> Tensor:
        (out,) = kink.layer(on_irregular=on_irregular)(part)
        return torch.autograd.grad((weights * out).sum(), part)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = gradient("ignore", batch)
        gradient("warn", batch[::2].detach().requires_grad_())
        gradient("raise", batch[::2].detach().requires_grad_())
    with pytest.warns(IrregularWarning, match=rf"2 element.*\(1, 3\).*{kink.reason}"):
        warned = gradient("warn", batch)
    assert_allclose(warned, silent, atol=1e-12)
    with pytest.raises(IrregularError, match=rf"2 element.*\(1, 3\).*{kink.reason}"):
        gradient("raise", batch)


@pytest.mark.parametrize("kink", KINKS, ids=str)
def test_irregular_elements_do_not_disturb_the_others(kink: Kink) -> None:
    layer = kink.layer(on_irregular="ignore")
    batch = torch.stack([tensor(kink.at), tensor(kink.regular)])
    weights = torch.linspace(1, 2, batch[0].numel(), dtype=torch.float64).reshape(batch[0].shape)

    def gradient(part: Tensor) -> Tensor:
        part = part.clone().requires_grad_()
        return torch.autograd.grad((weights * layer(part)[0]).sum(), part)[0]

    assert_allclose(gradient(batch)[1:], gradient(batch[1:]), atol=1e-9)


def test_multiplier_that_is_not_unique_is_irregular_only_where_it_is_asked_for() -> None:
    x, v = cp.Variable(), cp.Parameter()
    first, second = x >= v, 2 * x >= 2 * v
    problem = cp.Problem(cp.Minimize(cp.square(x) / 2), [first, second])
    at = tensor(1.5).requires_grad_()
    only_x = DeclarativeLayer(problem, [v], [x], on_irregular="raise")
    assert only_x.solve(at).derivative.regular.tolist() == [True]
    assert_allclose(jacobian(only_x, at), [[1.0]], atol=CLOSE)
    dual = DeclarativeLayer(problem, [v], [first.dual_variables[0]])
    report = dual.solve(at).derivative
    assert report.regular.tolist() == [False]
    assert NOT_UNIQUE in report.reason[0] or WEAKLY_ACTIVE in report.reason[0]
    with pytest.warns(IrregularWarning, match=r"1 element.*\(0\)"):
        dual(at)[0].backward()


# Singular Jacobians of regular solutions


def _singular(name: str) -> tuple[cp.Problem, list[cp.Parameter], cp.Variable]:
    x, v = cp.Variable(2), cp.Parameter(2)
    loss = cp.sum_squares(x - v) / 2
    constraints = {
        "duplicate_inequality": lambda: [x[0] <= 1, 3 * x[0] <= 3],
        "dependent_equalities": lambda: [cp.sum(x) == 1, 2 * cp.sum(x) == 2],
        "epigraph_of_an_inactive_norm": lambda: [cp.norm(x) <= 50],
        "epigraph_of_an_inactive_exponential": lambda: [cp.sum(cp.exp(x)) <= 1e4],
        "redundant_inequality": lambda: [x[0] <= 1, x[0] <= 1.5, x[0] + x[1] <= 40],
        "implied_inequality": lambda: [x[0] <= 1, x[1] <= 3, x[0] + x[1] <= 4],
        "duplicate_cone": lambda: [cp.norm(x) <= 1, cp.norm(2 * x) <= 2],
        "equality_as_two_inequalities": lambda: [cp.sum(x) <= 1, cp.sum(x) >= 1],
    }[name]()
    return cp.Problem(cp.Minimize(loss), constraints), [v], x


_HALF = np.array([[1.0, -1.0], [-1.0, 1.0]]) / 2
_SPHERE = (np.eye(2) - np.outer([0.6, 0.8], [0.6, 0.8])) / 5


@pytest.mark.parametrize(
    ("name", "at", "expected"),
    [
        ("duplicate_inequality", [2.0, 0.5], np.diag([0.0, 1.0])),
        ("dependent_equalities", [2.0, 0.5], _HALF),
        ("epigraph_of_an_inactive_norm", [2.0, 0.5], np.eye(2)),
        ("epigraph_of_an_inactive_exponential", [2.0, 0.5], np.eye(2)),
        ("redundant_inequality", [2.0, 0.5], np.diag([0.0, 1.0])),
        ("implied_inequality", [2.0, 5.0], np.zeros((2, 2))),
        ("duplicate_cone", [3.0, 4.0], _SPHERE),
        ("equality_as_two_inequalities", [2.0, 0.5], _HALF),
    ],
)
@pytest.mark.parametrize("solver", ["auto", "Clarabel"])
def test_regular_although_the_jacobian_is_singular(
    name: str, at: list[float], expected: Matrix, solver: str
) -> None:
    problem, parameters, x = _singular(name)
    layer = DeclarativeLayer(problem, parameters, [x], solver, on_irregular="raise")
    report = layer.solve(tensor(at)).derivative
    assert report.regular.tolist() == [True]
    assert report.reason == ("",)
    assert_allclose(jacobian(layer, tensor(at)), expected, atol=CLOSE)
    forward = torch.func.jacfwd(layer)(tensor(at))[0]
    assert_allclose(forward, expected, atol=CLOSE)


@pytest.mark.parametrize("solver", ["auto", "Clarabel", "SCS"])
def test_dependent_rows_that_move_apart_are_irregular(solver: str) -> None:
    """That x = max(u, v) has no derivative at u = v shows in no single multiplier.

    Both can be positive; the adjoint system then has several solutions, whose gradients differ.
    """
    x, u, v = cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x) / 2), [x >= u, x >= v])
    layer = DeclarativeLayer(problem, [u, v], [x], solver, on_irregular="ignore")
    same = torch.ones(3, dtype=torch.float64)
    other = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    assert layer.solve(same, other).derivative.regular.tolist() == [True, False, True]
    slopes = [jacobian(layer, same[:1], other[1:2], wrt=k).item() for k in range(2)]
    assert sum(slopes) == pytest.approx(1.0, abs=CLOSE)
    assert min(slopes) >= -CLOSE


def test_value_of_a_linear_program_is_differentiable_with_respect_to_its_constraints() -> None:
    """Not unique is the solution only; the value's gradient with respect to b is the dual."""
    x, b = cp.Variable(2), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum(x)), [cp.sum(x) == b, x >= 0])
    layer = DeclarativeLayer(problem, [b], [x], optimal_value=True, on_irregular="raise")
    at = tensor(2.0).requires_grad_()
    _, value = layer(at)
    value.backward()
    assert float(at.grad) == pytest.approx(1.0, abs=1e-9)


def test_elements_that_failed_are_reported_as_such() -> None:
    x, v = cp.Variable(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x - v)), [x >= v, x <= 1])
    layer = DeclarativeLayer(problem, [v], [x], on_failure="nan", on_irregular="raise")
    report = layer.solve(torch.tensor([0.0, 2.0], dtype=torch.float64)).derivative
    assert not bool(report.regular[1])
    assert report.reason[1] == "not solved"
    assert bool(torch.isnan(report.residual[1]))


def test_only_parameters_with_a_gradient_count() -> None:
    """A lasso without its penalty has a derivative for the data, but none for the weight 0."""
    x, b = cp.Variable(2), cp.Parameter(2)
    weight = cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b) + weight * cp.norm1(x)))
    layer = DeclarativeLayer(problem, [b, weight], [x], on_irregular="ignore")
    data, zero = tensor([1.0, -2.0]), tensor(0.0)
    found = layer.solve(data.clone().requires_grad_(), zero)
    assert found.derivative.regular.tolist() == [True]
    found.variables[0].sum().backward()
    assert found.derivative.regular.tolist() == [True]
    assert layer.solve(data, zero.clone().requires_grad_()).derivative.regular.tolist() == [False]
    assert layer.solve(data, zero).derivative.regular.tolist() == [False]


def test_minima_that_form_a_surface_have_no_derivative() -> None:
    """The objective leaves three variables to a constraint whose multiplier is zero."""
    x = cp.Variable(5, bounds=[np.full(5, -1.5), np.full(5, 2.0)])
    x.value = np.array([0.1, -0.3, 0.2, -0.1, 0.05])
    p, q = cp.Parameter(2), cp.Parameter(5)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x[:2] - p)), [cp.sum(cp.multiply(q, x**2)) == 1]
    )
    layer = DeclarativeLayer(problem, [p, q], [x], on_irregular="ignore")
    random = np.random.default_rng(0)
    values = (torch.tensor(random.uniform(*v)) for v in ((-0.3, 0.3, (8, 2)), (0.5, 1.5, (8, 5))))
    solution = layer.solve(*(value.requires_grad_() for value in values))
    (solution.variables[0] * torch.sin(1.0 + torch.arange(5))).sum().backward()
    assert bool(solution.solved.all())
    assert not bool(solution.derivative.regular.any())


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_kink_with_a_multiplier_that_is_not_unique(slope: float) -> None:
    # min c x0 + |x0| + |x1| with x1 >= x0^2 has x0 = 0 for |c| <= 1, and (1 - c) / 2 for c > 1; any
    # multiplier of the cone's corner from 0 to 1 will do, and the Jacobian is singular with it.
    x, c = cp.Variable(2), cp.Parameter()
    cone = cp.bmat([[1, x[0]], [x[0], x[1]]]) >> 0
    problem = cp.Problem(cp.Minimize(c * x[0] + cp.norm1(x)), [cone])
    layer = DeclarativeLayer(problem, [c], [x], on_irregular="ignore")
    report = layer.solve(tensor([slope, 1.5 * slope])).derivative
    assert report.regular.tolist() == [False, True]
