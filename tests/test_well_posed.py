"""Certificates of well-posedness."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.implicit import diagonal_lmi, well_posedness
from declarative_cvx.nonconvex.implicit.activations import (
    Blocks,
    LayerNormalisation,
    Normalisation,
    Sort,
)
from declarative_cvx.nonconvex.implicit.certificate import Certificate
from declarative_cvx.nonconvex.implicit.well_posedness import is_well_posed

FLOAT = torch.float64


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=FLOAT)).Q


def scaled(A: Tensor, spread: float = 1.0) -> Tensor:
    d = 10 ** (spread * torch.randn(len(A), dtype=FLOAT))
    return d[:, None] * A / d


def spectral_radius(A: Tensor) -> float:
    return float(torch.linalg.eigvals(A).abs().max())


def norms(A: Tensor) -> list[float]:
    return [float(torch.linalg.matrix_norm(A, p)) for p in (math.inf, 1, 2)]


def is_p_matrix(M: Tensor) -> bool:
    """Whether all principal minors are positive: with M = I - A, the exact condition for A to be
    well-posed for ReLU, because x = max(A x + b, 0) is a linear complementarity problem.
    """
    n = len(M)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(n), k) for k in range(1, n + 1)
    )
    return all(float(torch.linalg.det(M[list(s)][:, list(s)])) > 0 for s in subsets)


def column(n: int) -> Tensor:
    A = 0.01 * torch.rand(n, n, dtype=FLOAT)
    A[:, 0] = 0.9
    return A


def nonnegative(n: int) -> Tensor:
    A = torch.rand(n, n, dtype=FLOAT)
    return scaled(A / (1.2 * spectral_radius(A)))


def skew(n: int) -> Tensor:
    A = 3 * torch.randn(n, n, dtype=FLOAT)
    return scaled(A - A.T + 0.3 * torch.eye(n, dtype=FLOAT))


def triangular(n: int) -> Tensor:
    A = 3 * torch.randn(n, n, dtype=FLOAT).triu()
    A.diagonal().copy_(torch.linspace(-5, 0.9, n))
    return A


EXAMPLES: dict[Certificate, Callable[[int], Tensor]] = {
    Certificate.STRICTLY_TRIANGULAR: lambda n: 5 * torch.randn(n, n, dtype=FLOAT).tril(-1),
    Certificate.INFINITY_NORM: column,
    Certificate.ONE_NORM: lambda n: column(n).T,
    Certificate.SPECTRAL_NORM: lambda n: 0.95 * orthogonal(n),
    Certificate.PERRON_FROBENIUS: nonnegative,
    Certificate.TRIANGULAR: triangular,
    Certificate.DIAGONAL_LYAPUNOV: lambda n: scaled(0.9 * orthogonal(n)),
    Certificate.MONOTONE: skew,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", EXAMPLES)
def test_certificate_is_found(kind: Certificate, seed: int) -> None:
    torch.manual_seed(seed)
    A = EXAMPLES[kind](6)
    report = is_well_posed(A, "tanh")
    assert report
    assert report.certificate == kind
    assert kind.condition in report.detail
    assert report.value < 1
    # What comes before it in the order of tries does not hold.
    order = list(EXAMPLES)
    failing = {
        Certificate.STRICTLY_TRIANGULAR: bool((A != 0).all(0).any() | A.diagonal().any()),
        **dict(zip(order[1:4], [norm >= 1 for norm in norms(A)], strict=True)),
        Certificate.PERRON_FROBENIUS: spectral_radius(A.abs()) >= 1,
        Certificate.TRIANGULAR: bool((A != 0).all()),
        Certificate.DIAGONAL_LYAPUNOV: spectral_radius(A) >= 1,
        Certificate.MONOTONE: True,
    }
    assert all(failing[earlier] for earlier in order[: order.index(kind)])
    # Exact for ReLU, and every condition that holds for tanh holds for ReLU.
    assert is_p_matrix(torch.eye(6, dtype=FLOAT) - A)


@pytest.mark.parametrize(
    "kind", [Certificate.PERRON_FROBENIUS, Certificate.DIAGONAL_LYAPUNOV, Certificate.MONOTONE]
)
def test_scaling_proves_the_certificate(kind: Certificate) -> None:
    torch.manual_seed(0)
    A = EXAMPLES[kind](6)
    report = is_well_posed(A)
    d = report.scaling
    assert d is not None
    assert (d > 0).all()
    S, eye = torch.diag(d * d), torch.eye(6, dtype=FLOAT)
    if kind == Certificate.PERRON_FROBENIUS:
        norm = torch.linalg.matrix_norm(d[:, None] * A / d, math.inf)
        assert norm < 1
        assert report.value == pytest.approx(float(norm))
        assert norm >= spectral_radius(A.abs()) * (1 - 1e-12)
    elif kind == Certificate.DIAGONAL_LYAPUNOV:
        assert torch.linalg.eigvalsh(S - A.T @ S @ A).min() > 0
    else:
        assert torch.linalg.eigvalsh(S @ (eye - A) + (eye - A).T @ S).min() > 0


def test_inequality_that_no_balancing_solves() -> None:
    """Only the monotone condition: s_2 > 84 s_1 and s_2 < 4.75 s_1 would be needed for Lyapunov."""
    A = torch.tensor([[0.9, -4.0], [0.2, -0.9]], dtype=FLOAT)
    assert is_well_posed(A).certificate == Certificate.MONOTONE
    assert is_p_matrix(torch.eye(2, dtype=FLOAT) - A)


@pytest.mark.parametrize("small", [0, 6])
def test_solvers_for_small_and_for_large_inequalities(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagonal_lmi, "SMALL", small)
    torch.manual_seed(0)
    for kind in (Certificate.DIAGONAL_LYAPUNOV, Certificate.MONOTONE):
        A = EXAMPLES[kind](6)
        # Balancing alone, which is tried first, is not enough for these.
        balanced = torch.from_numpy(scipy.linalg.matrix_balance(A.numpy(), permute=False)[0])
        assert torch.linalg.eigvalsh(balanced @ balanced.T).max() > 1
        assert torch.linalg.eigvalsh(balanced + balanced.T).max() > 2 or kind != "monotone"
        assert is_well_posed(A).certificate == kind


def test_solver_that_gives_up_is_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    def fails(*_: object, **__: object) -> None:
        raise cp.error.SolverError("no")

    monkeypatch.setattr(cp.Problem, "solve", fails)
    report = is_well_posed(scaled(0.9 * orthogonal(6)))
    assert not report
    assert "no diagonal S was found" in report.detail


def test_solver_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    A = scaled(0.9 * orthogonal(6))
    wrong = np.ones(6)
    monkeypatch.setattr(well_posedness, "lyapunov_scaling", lambda M: wrong)
    monkeypatch.setattr(well_posedness, "monotone_scaling", lambda M: wrong)
    assert is_well_posed(A).certificate is None


@pytest.mark.parametrize("seed", range(40))
def test_no_certificate_for_an_ill_posed_matrix(seed: int) -> None:
    """Sound: whatever is certified for ReLU has I - A a P-matrix."""
    torch.manual_seed(seed)
    A = torch.randn(5, 5, dtype=FLOAT) * torch.empty(1, dtype=FLOAT).uniform_(0.1, 1.0)
    A = torch.where(torch.rand(5, 5) < 0.4, 0.0, A)
    if is_well_posed(A):
        assert is_p_matrix(torch.eye(5, dtype=FLOAT) - A)
    else:
        assert max(norms(A)) >= 1


def test_ill_posed_for_relu() -> None:
    two = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    b = torch.tensor([-1.0, -1.0])
    for x in (torch.zeros(2), torch.ones(2)):  # two fixed points
        assert torch.equal(torch.relu(two @ x + b), x)
    report = is_well_posed(two)
    assert not report
    assert report.certificate is None
    assert "||l A||_inf = 2" in report.detail
    assert math.isnan(report.value)
    assert not is_well_posed(torch.tensor([[1.0]]))
    certain = is_well_posed(torch.tensor([[-1.0, 0.0], [3.0, 1.5]]))
    assert not certain
    assert "States 1" in certain.detail
    assert "certainly ill-posed" in certain.detail


def test_boundary_is_not_certified() -> None:
    for n in (2, 7):
        shift = torch.roll(torch.eye(n, dtype=FLOAT), 1, 0)
        assert not is_well_posed(shift)
        assert is_well_posed(shift * (1 - 1e-9))


def test_block_triangular_form_is_found() -> None:
    torch.manual_seed(1)
    sizes, n = (3, 1, 2, 4), 10
    A = torch.zeros(n, n, dtype=FLOAT)
    ends = list(itertools.accumulate(sizes))
    for size, end in zip(sizes, ends, strict=True):
        states = slice(end - size, end)
        A[states, states] = 0.9 * orthogonal(size) if size > 1 else -4.0
        A[states, : end - size] = 9 * torch.randn(size, end - size, dtype=FLOAT)
    shuffle = torch.randperm(n)
    hidden = A[shuffle][:, shuffle]
    report = is_well_posed(hidden)
    assert report.certificate == Certificate.BLOCK_TRIANGULAR
    assert report.blocks == sizes
    assert report.permutation is not None
    order = report.permutation
    found = hidden[order][:, order]
    for size, end in zip(report.blocks, ends, strict=True):
        assert (found[end - size : end, end:] == 0).all()
    assert {str(part.certificate) for part in report.parts} == {"2-norm", "triangular"}
    hidden[shuffle == 3, shuffle == 3] = 1.5
    worse = is_well_posed(hidden)
    assert not worse
    assert f"States {int((shuffle == 3).nonzero())}:" in worse.detail


@pytest.mark.parametrize("sparse", [False, True])
def test_strictly_triangular_after_a_permutation(sparse: bool) -> None:
    torch.manual_seed(2)
    shuffle = torch.randperm(30)
    A = torch.randn(30, 30, dtype=FLOAT).triu(1)[shuffle][:, shuffle]
    report = is_well_posed(A.to_sparse() if sparse else A)
    assert report.certificate == Certificate.STRICTLY_TRIANGULAR
    order = report.permutation
    assert order is not None
    assert (A[order][:, order].triu() == 0).all()


def test_lipschitz_constants_scale_the_conditions() -> None:
    torch.manual_seed(3)
    A = torch.rand(4, 4, dtype=FLOAT)
    A *= 3.9 / A.sum(-1, keepdim=True)
    assert is_well_posed(A, "sigmoid").certificate == Certificate.INFINITY_NORM
    assert not is_well_posed(A, "relu")
    mixed = Blocks([("sigmoid", 2), ("relu", 2)])
    assert not is_well_posed(A, mixed)
    A[2:] *= 0.2
    report = is_well_posed(A, mixed)
    assert report.certificate == Certificate.INFINITY_NORM
    assert report.value == pytest.approx(0.975)
    assert not is_well_posed(A, Blocks([("relu", 2), ("sigmoid", 2)]))
    assert is_well_posed(torch.tensor([[3.0]]), "sigmoid").certificate == Certificate.TRIANGULAR


def test_maps_of_the_whole_vector_need_their_norm() -> None:
    torch.manual_seed(4)
    A = column(5) * 0.99
    assert is_well_posed(A, "sort").certificate == Certificate.INFINITY_NORM
    assert is_well_posed(1.9 * A, "softmax").certificate == Certificate.INFINITY_NORM
    assert not is_well_posed(A, Normalisation())
    assert is_well_posed(0.9 * orthogonal(5), Normalisation()).certificate == "2-norm"
    assert not is_well_posed(0.9 * orthogonal(5), LayerNormalisation(0.5))
    # Scaling and diagonal entries prove nothing for them.
    assert not is_well_posed(scaled(0.9 * orthogonal(5)), "sort")
    assert not is_well_posed(-2 * torch.eye(5, dtype=FLOAT), "sort")
    # Strictly triangular within the states that are sorted together: a cycle through the map.
    strict = 9 * torch.randn(6, 6, dtype=FLOAT).tril(-1)
    assert not is_well_posed(strict, "sort")
    strict[:3, :3] = strict[3:, 3:] = 0
    report = is_well_posed(strict, Sort(3))
    assert report.certificate == Certificate.STRICTLY_TRIANGULAR
    assert report.blocks == (3, 3)
    strict[3:, 3:] = 0.3 * torch.eye(3, dtype=FLOAT)
    assert is_well_posed(strict, Sort(3)).certificate == Certificate.BLOCK_TRIANGULAR


def test_report_has_the_type_of_the_matrix() -> None:
    torch.manual_seed(0)
    report = is_well_posed(nonnegative(4).float())
    assert report.scaling is not None
    assert report.scaling.dtype == torch.float32
    assert is_well_posed(torch.zeros(0, 0))


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"\(2, 3\)"):
        is_well_posed(torch.zeros(2, 3))
    with pytest.raises(ParameterError, match=r"A\[1, 0\] is nan"):
        is_well_posed(torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))
    with pytest.raises(ParameterError, match="3 states"):
        is_well_posed(torch.zeros(3, 3), Blocks([("relu", 2)]))
