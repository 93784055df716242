"""Weights kept in sets of well-posed matrices: projections and their derivatives."""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import DerivativeModeError, ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import (
    Blocks,
    Normalisation,
)
from declarative_cvx.nonconvex.implicit.parametrizations import (
    InfinityNorm,
    LowRank,
    OneNorm,
    PerronFrobenius,
    SpectralNorm,
    StrictlyTriangular,
    TriangularReLU,
    Unconstrained,
)
from declarative_cvx.nonconvex.implicit.perron_frobenius import (
    perron_scaling,
    project_onto_weighted_l1_ball,
)
from declarative_cvx.nonconvex.implicit.spectral_ball import project_onto_spectral_ball
from declarative_cvx.nonconvex.implicit.well_posed_set import WellPosed
from declarative_cvx.nonconvex.implicit.well_posedness import is_well_posed

FLOAT = torch.float64
GIVEN = (0.5, 3.0, 1.0, 0.2, 2.0)

BOUNDED: list[WellPosed] = [
    InfinityNorm(0.9),
    OneNorm(0.9),
    SpectralNorm(0.9),
    PerronFrobenius(0.9, GIVEN),
    PerronFrobenius(0.9),
    LowRank(2, 0.9),
]
SETS: list[WellPosed] = [
    *BOUNDED,
    StrictlyTriangular(),
    StrictlyTriangular((2, 3), upper=False),
    TriangularReLU(0.1),
    TriangularReLU(0.1, upper=False),
    Unconstrained(),
]


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=FLOAT)).Q


def spectral_radius(A: Tensor) -> float:
    return float(torch.linalg.eigvals(A).abs().max())


def constraint(kind: WellPosed, A: cp.Variable) -> list[cp.Constraint]:
    if isinstance(kind, InfinityNorm):
        return [cp.norm1(row) <= kind.kappa for row in A]
    if isinstance(kind, OneNorm):
        return [cp.norm1(column) <= kind.kappa for column in A.T]
    if isinstance(kind, SpectralNorm):
        return [cp.sigma_max(A) <= kind.kappa]
    if isinstance(kind, PerronFrobenius):
        d = np.array(kind.scaling)
        return [cp.norm1(cp.multiply(A[i], d[i] / d)) <= kind.kappa for i in range(len(d))]
    assert isinstance(kind, TriangularReLU)
    i, j = np.tril_indices(A.shape[0], -1)
    return [cp.diag(A) <= 1 - kind.margin, (A if kind.upper else A.T)[i, j] == 0]


@pytest.mark.parametrize("kind", [*BOUNDED[:4], *SETS[8:10]], ids=str)
def test_projection_agrees_with_cvxpy(kind: WellPosed) -> None:
    torch.manual_seed(5)
    raw = torch.randn(5, 5, dtype=FLOAT)
    A = cp.Variable((5, 5))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A - raw.numpy())), constraint(kind, A))
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)
    problem.solve(solver=cp.CLARABEL, **tight)
    torch.testing.assert_close(kind.project(raw), torch.from_numpy(A.value), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.2, 5.0])
@pytest.mark.parametrize("kind", SETS, ids=str)
def test_derivatives_of_the_projection(kind: WellPosed, scale: float) -> None:
    torch.manual_seed(6)
    raw = (scale * torch.randn(kind.initial(5).shape, dtype=FLOAT)).requires_grad_()
    assert gradcheck(kind.matrix, (raw,))
    assert gradgradcheck(kind.matrix, (raw,), atol=1e-4)


@pytest.mark.parametrize(
    "values", [(3, 3, 3, 0.5), (3, 3, 0.5, 0.5), (2, 2, 0, 0), (2, 2, 2, 2), (0.5,) * 4, (0,) * 4]
)
@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (4, 6)])
def test_spectral_projection_at_repeated_singular_values(
    values: tuple[float, ...], shape: tuple[int, int]
) -> None:
    torch.manual_seed(7)
    m, n = shape
    A = (orthogonal(m)[:, :4] * torch.tensor(values, dtype=FLOAT)) @ orthogonal(n)[:4]
    A.requires_grad_()

    def clipped(A: Tensor) -> Tensor:
        return project_onto_spectral_ball(A, 1.0)

    assert gradcheck(clipped, (A,), check_forward_ad=True)
    assert gradgradcheck(clipped, (A,))


def test_spectral_projection_over_a_batch_with_transforms() -> None:
    torch.manual_seed(8)
    A = torch.randn(3, 4, 4, dtype=FLOAT)
    together = project_onto_spectral_ball(A, 1.0)
    alone = torch.stack([project_onto_spectral_ball(element, 1.0) for element in A])
    torch.testing.assert_close(together, alone)
    values = torch.linalg.svdvals(together)
    torch.testing.assert_close(values, torch.linalg.svdvals(A).clamp(max=1.0))

    def loss(A: Tensor) -> Tensor:
        return project_onto_spectral_ball(A, 1.0).pow(3).sum()

    B = A.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(B), B)
    torch.testing.assert_close(torch.func.grad(loss)(A), expected)


def test_third_derivative_is_refused() -> None:
    A = (3 * torch.randn(3, 3, dtype=FLOAT)).requires_grad_()
    value = project_onto_spectral_ball(A, 1.0).pow(3).sum()
    (first,) = torch.autograd.grad(value, A, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), A, create_graph=True)
    with pytest.raises(DerivativeModeError, match="twice"):
        torch.autograd.grad(second.sum(), A)


def test_weighted_projection_differentiates_in_the_weights() -> None:
    torch.manual_seed(9)
    r = (2 * torch.randn(3, 5, dtype=FLOAT)).requires_grad_()
    weight = (torch.rand(3, 5, dtype=FLOAT) + 0.2).requires_grad_()
    assert gradcheck(project_onto_weighted_l1_ball, (r, weight, 1.0))
    assert gradgradcheck(project_onto_weighted_l1_ball, (r, weight, 1.0))


def violation(kind: WellPosed, raw: Tensor) -> float:
    """How far the constraint is from holding, relative to its bound."""
    A = kind.matrix(raw).detach()
    if isinstance(kind, PerronFrobenius):
        d = kind.log_scaling(raw.detach()).exp()
        return float(torch.linalg.matrix_norm(d[:, None] * A / d, math.inf)) / kind.kappa - 1
    if isinstance(kind, InfinityNorm | OneNorm | SpectralNorm | LowRank):
        return float(torch.linalg.matrix_norm(A, kind.p)) / kind.kappa - 1
    if isinstance(kind, TriangularReLU):
        return float(A.diagonal().max()) - (1 - kind.margin)
    return 0.0 if is_well_posed(A).certificate == kind.certificate() else math.inf


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT])
@pytest.mark.parametrize("kind", SETS[:-1], ids=str)
def test_constraint_holds_after_huge_steps(kind: WellPosed, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(10)
    raw = kind.initial(5, dtype=dtype, generator=generator).requires_grad_()
    assert torch.equal(kind.project(raw), raw)
    optimiser = torch.optim.SGD([raw], lr=1e4)
    target = torch.randn(5, 5, generator=generator).to(dtype)
    for _ in range(4):
        optimiser.zero_grad()
        (kind.matrix(raw) * target).sum().add(kind.matrix(raw).pow(2).sum()).backward()
        optimiser.step()
        A = kind.matrix(raw)
        assert A.dtype == dtype
        assert A.isfinite().all()
        assert violation(kind, raw) <= 40 * torch.finfo(dtype).eps
    assert raw.detach().abs().max() > 100
    assert is_well_posed(kind.matrix(raw))


@pytest.mark.parametrize("kind", BOUNDED, ids=str)
def test_projection_is_nearest_and_idempotent(kind: WellPosed) -> None:
    torch.manual_seed(11)
    raw = 3 * torch.randn(kind.initial(5).shape, dtype=FLOAT)
    found = kind.project(raw)
    assert torch.equal(kind.project(found), found)
    others = kind.project(torch.randn(50, *raw.shape, dtype=FLOAT))
    if kind == PerronFrobenius(0.9):  # A is projected for the scaling that there is
        others = kind.project(torch.cat([others[:, :-1], found[-1:].expand(50, 1, 5)], 1))
        found, others, raw = found[:-1], others[:, :-1], raw[:-1]
    # The angle of raw - found with every direction into a convex set is obtuse.
    assert (((raw - found) * (others - found)).flatten(1).sum(1) <= 1e-12).all()


@pytest.mark.parametrize("kind", SETS, ids=str)
def test_known_matrices_are_loaded_exactly(kind: WellPosed) -> None:
    generator = torch.Generator().manual_seed(12)
    A = kind.matrix(kind.initial(5, dtype=FLOAT, generator=generator))
    loaded = kind.right_inverse(A)
    torch.testing.assert_close(kind.matrix(loaded), A, rtol=1e-13, atol=1e-14)
    loaded.add_(1.0)
    if kind != Unconstrained():
        outside = torch.full((5, 5), 3.0, dtype=FLOAT)
        with pytest.raises(ParameterError, match="not in the set"):
            kind.right_inverse(outside)


@pytest.mark.parametrize("kind", [*BOUNDED[:4]], ids=str)
def test_gradient_on_the_boundary_is_that_from_inside(kind: WellPosed) -> None:
    torch.manual_seed(13)
    on_boundary = kind.project(3 * torch.randn(5, 5, dtype=FLOAT)).requires_grad_()
    weights = torch.randn(5, 5, dtype=FLOAT)
    (grad,) = torch.autograd.grad((kind.matrix(on_boundary) * weights).sum(), on_boundary)
    torch.testing.assert_close(grad, weights)


def test_learned_scaling_has_a_gradient() -> None:
    kind = PerronFrobenius(0.9)
    torch.manual_seed(14)
    raw = (2 * torch.randn(6, 5, dtype=FLOAT)).requires_grad_()
    (grad,) = torch.autograd.grad(kind.matrix(raw).pow(3).sum(), raw)
    assert grad[-1].abs().max() > 1e-3
    assert spectral_radius(kind.matrix(raw).detach().abs()) <= 0.9 * (1 + 1e-14)
    wild = torch.cat([raw.detach()[:-1], torch.tensor([[1e5, -1e5, 0, 1, 2]], dtype=FLOAT)])
    assert kind.matrix(wild).isfinite().all()


def test_perron_scaling_comes_near_the_spectral_radius() -> None:
    torch.manual_seed(15)
    A = torch.rand(8, 8, dtype=FLOAT)
    A = A / (1.2 * spectral_radius(A))
    A[0] *= 30
    A[:, 0] /= 30
    d = perron_scaling(A)
    assert d is not None
    norm = float(torch.linalg.matrix_norm(d[:, None] * A / d, math.inf))
    rho = spectral_radius(A)
    assert rho <= norm <= rho + 0.1 * (1 - rho) + 1e-12
    assert perron_scaling(A, rho * 0.999) is None


def test_low_rank_factors() -> None:
    torch.manual_seed(16)
    kind = LowRank(2, 0.9)
    raw = kind.initial(7, dtype=FLOAT)
    L, R = kind.factors(raw)
    assert L.shape == R.shape == (7, 2)
    torch.testing.assert_close(L @ R.T, kind.matrix(raw))
    # Every matrix of that rank and norm is reached.
    A = 0.9 * orthogonal(7)[:, :2] @ orthogonal(7)[:2]
    torch.testing.assert_close(kind.matrix(kind.right_inverse(A)), A)


def test_initial_weights_are_reproducible() -> None:
    for kind in SETS:
        first, second = (
            kind.initial(5, dtype=FLOAT, generator=torch.Generator().manual_seed(3))
            for _ in range(2)
        )
        assert torch.equal(first, second)
        assert first.dtype == FLOAT


def test_activations_that_a_set_cannot_vouch_for_are_refused() -> None:
    InfinityNorm(3.9).check("sigmoid")
    SpectralNorm(0.9).check(Normalisation())
    TriangularReLU().check("leaky_relu")
    StrictlyTriangular().check("tanh")
    StrictlyTriangular((3, 2)).check(Blocks([("softmax", 3), ("relu", 2)]))
    Unconstrained().check("softmax")
    refused: list[tuple[WellPosed, object, str]] = [
        (InfinityNorm(1.0), "relu", "kappa must be below 1"),
        (InfinityNorm(4.0), "sigmoid", "kappa must be below 4"),
        (InfinityNorm(0.9), Normalisation(), "norms"),
        (PerronFrobenius(0.9), "sort", "componentwise"),
        (TriangularReLU(), "tanh", "homogeneous"),
        (StrictlyTriangular(), "softmax", "together"),
        (StrictlyTriangular((2, 3)), Blocks([("softmax", 3), ("relu", 2)]), "together"),
    ]
    for kind, activation, message in refused:
        with pytest.raises(SpecificationError, match=message):
            kind.check(activation)  # type: ignore[arg-type]


def test_bad_sets_and_weights_are_refused() -> None:
    for build, message in (
        (lambda: InfinityNorm(0.0), "kappa"),
        (lambda: LowRank(0), "rank"),
        (lambda: PerronFrobenius(0.9, [1.0, -1.0]), r"scaling\[1\]"),
        (lambda: StrictlyTriangular([2, 0]), r"blocks\[1\]"),
        (lambda: TriangularReLU(0.0), "margin"),
    ):
        with pytest.raises(SpecificationError, match=message):
            build()
    nan = torch.zeros(3, 3)
    nan[1, 2] = math.nan
    for kind in (InfinityNorm(), OneNorm(), SpectralNorm(), StrictlyTriangular()):
        with pytest.raises(ParameterError, match=r"weight\[1, 2\] is nan"):
            kind.project(nan)
        with pytest.raises(ParameterError, match=r"\(2, 3\)"):
            kind.project(torch.zeros(2, 3))
    with pytest.raises(ParameterError, match="do not make up 4 states"):
        StrictlyTriangular((2, 3)).project(torch.zeros(4, 4))
    with pytest.raises(ParameterError, match="scaling has 2 entries"):
        PerronFrobenius(0.9, (1, 2)).initial(3)
    with pytest.raises(ParameterError, match="no rank of 4"):
        LowRank(4).initial(3)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT], ids=str)
def test_matrices_on_the_boundary_are_loaded_without_their_scaling(dtype: torch.dtype) -> None:
    kind = PerronFrobenius(0.9)
    torch.manual_seed(21)
    raw = 9 * torch.randn(9, 8, dtype=dtype)
    raw[3, 4:] = raw[0, 1:] = 0.0  # one state by itself, another that half of them do not reach
    reducible = torch.tensor([[0.9, 0.0], [0.3, 0.2]], dtype=dtype)
    for A in (kind.matrix(raw), reducible):
        again = kind.matrix(kind.right_inverse(A))
        torch.testing.assert_close(again, A, rtol=0, atol=64 * torch.finfo(dtype).eps * A.max())
    for outside in ([[0.0, 9.01], [0.09, 0.0]], [[0.9, 5.0], [0.0, 0.9]]):
        with pytest.raises(ParameterError, match="not in the set"):
            kind.right_inverse(torch.tensor(outside, dtype=dtype))
