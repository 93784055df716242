"""Activations: potentials, conjugates, Fenchel divergences, norms of non-expansiveness."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import (
    ACTIVATIONS,
    Activation,
    Blocks,
    Componentwise,
    Identity,
    LayerNormalisation,
    LeakyReLU,
    MaxPool,
    Normalisation,
    ReLU,
    Sigmoid,
    Softmax,
    Sort,
    Tanh,
    activation_named,
    as_activation,
)
from declarative_cvx.nonconvex.implicit.divergence import fenchel_divergence

FLOAT = torch.float64
SCALAR = [ReLU(), LeakyReLU(0.1), LeakyReLU(), Tanh(), Sigmoid(), Identity()]
WHOLE = [Softmax(), Normalisation(0.7), LayerNormalisation(), LayerNormalisation(0.1)]
WHOLE += [Sort(), Sort(3), MaxPool(), MaxPool(2)]
MIXED = Blocks([("relu", 2), ("tanh", 3), (LeakyReLU(0.2), 1), ("sigmoid", 2)])
GROUPED = Blocks([("sort", 4), ("softmax", 4)])


def inside(phi: Activation, *shape: int) -> Tensor:
    """Points within the domain that are no value of any z drawn."""
    lower, upper = phi.bounds(torch.empty(shape[-1], dtype=FLOAT))
    drawn = torch.rand(*shape, dtype=FLOAT) * 0.9 + 0.05
    finite = lower.clamp(-3, 3) + drawn * (upper.clamp(-3, 3) - lower.clamp(-3, 3))
    return finite


@pytest.mark.parametrize("phi", [*SCALAR, MIXED], ids=str)
def test_derivative_of_the_potential_is_the_activation(phi: Activation) -> None:
    torch.manual_seed(0)
    z = (4 * torch.randn(50, 8, dtype=FLOAT)).requires_grad_()
    (found,) = torch.autograd.grad(phi.potential(z).sum(), z)
    torch.testing.assert_close(found, phi(z), rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(phi(z).sum(), z)
    torch.testing.assert_close(phi.slope(z), found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("phi", [LeakyReLU(0.1), ReLU(), Tanh(), Sigmoid(), MIXED], ids=str)
def test_conjugate_is_the_supremum_on_a_grid(phi: Activation) -> None:
    torch.manual_seed(1)
    x = inside(phi, 8)
    z = torch.linspace(-60, 60, 240001, dtype=FLOAT)[:, None].expand(-1, 8)
    best = (x * z - phi.potential(z)).amax(0)
    conjugate = phi.conjugate(x)
    assert (best <= conjugate + 1e-12).all()
    # The grid's step is 5e-4 and the curvature of the potentials at most 1.
    assert (conjugate - best <= 5e-4**2).all()


@pytest.mark.parametrize("phi", SCALAR, ids=str)
def test_conjugate_is_infinite_exactly_outside_the_domain(phi: Activation) -> None:
    lower, upper = phi.domain
    ends = torch.tensor([end for end in (lower, upper) if math.isfinite(end)], dtype=FLOAT)
    assert phi.conjugate(ends).isfinite().all()
    beyond = torch.tensor(
        [end + step for end, step in ((lower, -1e-9), (upper, 1e-9)) if math.isfinite(end)],
        dtype=FLOAT,
    )
    assert (phi.conjugate(beyond) == math.inf).all()
    assert (fenchel_divergence(phi, beyond, torch.zeros_like(beyond)) == math.inf).all()
    assert phi.inverse(beyond).isnan().all()


@pytest.mark.parametrize("phi", [*SCALAR, MIXED], ids=str)
def test_divergence_is_its_definition(phi: Activation) -> None:
    torch.manual_seed(2)
    x, z = inside(phi, 200, 8), 3 * torch.randn(200, 8, dtype=FLOAT)
    expected = phi.conjugate(x) + phi.potential(z) - x * z
    torch.testing.assert_close(fenchel_divergence(phi, x, z), expected, rtol=1e-12, atol=2e-14)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT])
@pytest.mark.parametrize("phi", [*SCALAR, MIXED], ids=str)
def test_divergence_is_nonnegative_and_zero_at_the_activation(
    phi: Activation, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    z = (10 ** torch.empty(3000, 8, dtype=dtype).uniform_(-6, 4)) * torch.randn(3000, 8).sign()
    x = inside(phi, 3000, 8).to(dtype)
    assert (fenchel_divergence(phi, x, z) >= 0).all()
    at = fenchel_divergence(phi, phi(z), z)
    # x = phi(z) is rounded: F is at most that error times the slope of F, or the error of log 2.
    assert (at >= 0).all()
    assert (at <= 8 * torch.finfo(dtype).eps * (1 + z.abs().clamp(max=100))).all()


@pytest.mark.parametrize("phi", [*SCALAR, MIXED], ids=str)
def test_divergence_is_positive_away_from_the_activation(phi: Activation) -> None:
    torch.manual_seed(4)
    z = 2 * torch.randn(1000, 8, dtype=FLOAT)
    x = inside(phi, 1000, 8)
    # 1-strong convexity of Psi* in x for slopes of at most 1.
    lower = (x - phi(z)).square() / 2
    assert (fenchel_divergence(phi, x, z) >= lower * (1 - 1e-9) - 1e-14).all()


def test_divergence_of_tanh_in_high_precision() -> None:
    """IDL eq. 8, its misprint corrected, with 40 digits."""
    z = torch.tensor([1e-9, 1e-3, 0.4, 5.0, 30.0, 800.0], dtype=FLOAT)
    for x in (-1.0, -0.999999, -0.3, 1e-8, 0.7, 1.0):
        found = fenchel_divergence("tanh", torch.full_like(z, x), z)
        with mpmath.workdps(40):
            for value, at in zip(found.tolist(), z.tolist(), strict=True):
                X, Z = mpmath.mpf(x), mpmath.mpf(at)
                parts = [(1 + s * X) * mpmath.log(1 + s * X) if 1 + s * X else 0 for s in (1, -1)]
                expected = sum(parts) / 2 + mpmath.log(mpmath.cosh(Z)) - X * Z
                assert abs(value - expected) <= 4e-16 * (1 + abs(expected))


def test_potentials_do_not_overflow() -> None:
    z = torch.tensor([-1e3, 1e3], dtype=FLOAT)
    exact = torch.tensor([1e3 - math.log(2)] * 2, dtype=FLOAT)
    torch.testing.assert_close(Tanh().potential(z), exact)
    torch.testing.assert_close(Sigmoid().potential(z), torch.tensor([0.0, 1e3], dtype=FLOAT))
    small = torch.tensor([1e-9], dtype=FLOAT)
    torch.testing.assert_close(Tanh().potential(small), small**2 / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(Tanh().conjugate(small), small**2 / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("phi", [*SCALAR, MIXED], ids=str)
def test_derivatives_of_the_divergence(phi: Activation) -> None:
    torch.manual_seed(5)
    x = inside(phi, 3, 8).requires_grad_()
    z = torch.randn(3, 8, dtype=FLOAT, requires_grad=True)

    def divergence(x: Tensor, z: Tensor) -> Tensor:
        return fenchel_divergence(phi, x, z)

    assert gradcheck(divergence, (x, z), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(divergence, (x, z))
    (by_z,) = torch.autograd.grad(divergence(x, z).sum(), z)
    torch.testing.assert_close(by_z, phi(z) - x)
    # Where F is lost to rounding, its derivative is not.
    near = (phi(z) + 1e-12).detach()
    (by_z,) = torch.autograd.grad(divergence(near, z).sum(), z)
    torch.testing.assert_close(by_z, phi(z) - near, rtol=1e-9, atol=0)


def test_divergence_broadcasts_and_refuses() -> None:
    x, z = torch.rand(4, 1), torch.randn(3, requires_grad=True)
    value = fenchel_divergence("relu", x, z)
    assert value.shape == (4, 3)
    (grad,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(grad, (torch.relu(z) - x).sum(0))
    with pytest.raises(ParameterError, match=r"shape \(2,\)"):
        fenchel_divergence("relu", torch.zeros(2), torch.zeros(3))
    with pytest.raises(ParameterError, match="float64"):
        fenchel_divergence("relu", torch.zeros(3), torch.zeros(3, dtype=FLOAT))
    with pytest.raises(SpecificationError, match="softmax has no elementwise potential"):
        fenchel_divergence("softmax", torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("phi", [*SCALAR, *WHOLE, MIXED, GROUPED], ids=str)
def test_lipschitz_constants_hold_and_are_tight(phi: Activation) -> None:
    torch.manual_seed(6)
    n = 8 if isinstance(phi, Blocks) else 6
    z = 2 * torch.randn(4000, n, dtype=FLOAT)
    # Pairs far from each other, near, and differing in one entry or a pair of entries.
    steps = torch.randn_like(z) * 10 ** torch.empty(4000, 1, dtype=FLOAT).uniform_(-3, 1)
    steps[::3] *= torch.eye(n, dtype=FLOAT)[torch.randint(n, (1334,))]
    steps[1::3] *= torch.eye(n, dtype=FLOAT)[torch.randint(n, (1333,))] * 1e-2
    z[::5] *= 0.05
    change = phi(z + steps) - phi(z)
    worst = []
    for p in phi.norms:
        ratio = change.norm(p=p, dim=-1) / steps.norm(p=p, dim=-1)
        worst.append(float(ratio.max()))
        assert worst[-1] <= phi.lipschitz * (1 + 1e-9)
    assert max(worst) >= 0.8 * phi.lipschitz


@pytest.mark.parametrize("phi", [Normalisation(), LayerNormalisation()], ids=str)
def test_normalisations_expand_in_other_norms(phi: Activation) -> None:
    """Their Jacobians I - v v', v = 1 / sqrt(n), have absolute row sums 2 - 2 / n."""
    n = 5
    size = 1.0 if phi == Normalisation() else 0.0
    z = torch.full((n,), size * (1 + 1e-9) / n**0.5, dtype=FLOAT)
    jacobian = torch.autograd.functional.jacobian(phi, z)
    for p in (1, math.inf):
        assert torch.linalg.matrix_norm(jacobian, p) == pytest.approx(2 - 2 / n)
    assert phi.norms == (2,)


@pytest.mark.parametrize("phi", [*SCALAR, *WHOLE, MIXED], ids=str)
def test_flags_say_what_is_true(phi: Activation) -> None:
    torch.manual_seed(8)
    n = 8 if phi is MIXED else 6
    z = torch.arange(n, dtype=FLOAT) / 2 - 0.8
    jacobian = torch.autograd.functional.jacobian(phi, z)
    assert bool((jacobian == torch.diag(jacobian.diagonal())).all()) == phi.componentwise
    homogeneous = torch.allclose(phi(3 * z), 3 * phi(z), rtol=1e-12)
    assert homogeneous == phi.positively_homogeneous
    moved = torch.autograd.functional.jacobian(phi, z + 1e-9 * torch.randn(n, dtype=FLOAT))
    assert torch.equal(jacobian, moved) == phi.piecewise_linear
    lower, upper = phi.bounds(z)
    assert ((phi(50 * z) >= lower) & (phi(50 * z) <= upper)).all()
    assert phi.groups(n) == (1,) * n if phi.componentwise else sum(phi.groups(n)) == n


def test_kinks_have_the_derivative_of_torch() -> None:
    for phi in (ReLU(), LeakyReLU(0.1)):
        z = torch.zeros(1, requires_grad=True)
        (expected,) = torch.autograd.grad(phi(z).sum(), z)
        assert torch.equal(phi.slope(z), expected)


def test_pooling_agrees_with_torch() -> None:
    torch.manual_seed(9)
    z = torch.randn(5, 12)
    expected = nn.functional.max_pool1d(z[:, None], 3)[:, 0]
    for phi in (MaxPool(3), Sort(3)):
        torch.testing.assert_close(phi(z)[:, ::3], expected)
    assert (MaxPool(3)(z).unflatten(-1, (4, 3))[..., 1:] == 0).all()
    with pytest.raises(ParameterError, match="13 states"):
        MaxPool(3)(torch.zeros(13))


def test_blocks_act_on_their_states() -> None:
    z = torch.randn(4, 8, dtype=FLOAT)
    expected = [z[:, :2].relu(), z[:, 2:5].tanh(), nn.functional.leaky_relu(z[:, 5:6], 0.2)]
    torch.testing.assert_close(MIXED(z), torch.cat([*expected, z[:, 6:].sigmoid()], -1))
    constants = torch.tensor([1.0] * 6 + [0.25] * 2, dtype=FLOAT)
    assert torch.equal(MIXED.lipschitz_constants(z), constants)
    assert MIXED.lipschitz == 1.0
    assert MIXED.monotone
    assert not MIXED.piecewise_linear
    assert Blocks([("sort", 2), (Normalisation(), 3)]).norms == (2,)
    assert MIXED.domain == (-math.inf, math.inf)
    clamped = MIXED.clamp(torch.full((8,), -2.0))
    assert clamped.tolist() == [0, 0, -1, -1, -1, -2, 0, 0]
    with pytest.raises(ParameterError, match="blocks of"):
        MIXED(torch.zeros(7))


def test_permuted_blocks() -> None:
    torch.manual_seed(10)
    z, order = torch.randn(8, dtype=FLOAT), torch.randperm(8)
    torch.testing.assert_close(MIXED.take(order.tolist())(z[order]), MIXED(z)[order])
    assert Blocks([("relu", 2), ("relu", 3)]).take(range(5)) == ReLU()
    assert MIXED.take([0, 2, 3, 4]) == Blocks([("relu", 1), ("tanh", 3)])
    partly = Blocks([("relu", 2), ("softmax", 2), ("tanh", 1)])
    taken = partly.take([4, 2, 3, 1, 0])
    assert taken == Blocks([("tanh", 1), ("softmax", 2), ("relu", 2)])
    for wrong in ([3, 2, 0, 1, 4], [2, 0, 3], [2]):
        with pytest.raises(SpecificationError, match="together"):
            partly.take(wrong)
    with pytest.raises(SpecificationError, match="together"):
        Softmax().take([1, 0])
    for phi in (Softmax(), Sort(2)):  # of how many states?
        with pytest.raises(SpecificationError, match="together"):
            phi.take([0, 1, 2])


def test_names_and_modules() -> None:
    for name, kind in ACTIVATIONS.items():
        assert activation_named(name) == kind()
        assert activation_named(name).name == name
    assert as_activation(nn.LeakyReLU(0.3)) == LeakyReLU(0.3)
    assert as_activation(nn.Tanh()) == Tanh()
    assert as_activation([("relu", 3)]) == Blocks([(ReLU(), 3)])
    phi = Tanh()
    assert as_activation(phi) is phi
    with pytest.raises(SpecificationError, match="Did you mean 'sigmoid'"):
        as_activation("sigmod")
    with pytest.raises(SpecificationError, match="GELU"):
        as_activation(nn.GELU())
    with pytest.raises(SpecificationError, match="expected a name"):
        as_activation(3)  # type: ignore[arg-type]
    with pytest.raises(SpecificationError, match="leak"):
        LeakyReLU(1.0)
    with pytest.raises(SpecificationError, match="positive"):
        LayerNormalisation(0.0)
    with pytest.raises(SpecificationError, match="size 0"):
        Blocks([("relu", 0)])


@dataclass(frozen=True)
class Softplus(Componentwise):
    """An activation of a user's own."""

    name = "softplus"
    monotone = True

    def __call__(self, z: Tensor) -> Tensor:
        return nn.functional.softplus(z)


def test_activation_of_ones_own() -> None:
    phi = Softplus()
    assert phi.lipschitz == 1
    assert phi.componentwise
    assert not phi.piecewise_linear
    assert as_activation(phi) is phi
    z = torch.randn(5)
    torch.testing.assert_close(
        Blocks([(phi, 2), ("relu", 3)])(z)[:2], nn.functional.softplus(z[:2])
    )
    with pytest.raises(SpecificationError, match="softplus has no elementwise potential"):
        fenchel_divergence(phi, z, z)
