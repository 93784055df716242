"""Weighted least squares: accurate at bad condition, of least norm where not unique."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.kernels.weighted_least_squares import (
    WeightedLeastSquares,
    weighted_least_squares,
)
from declarative_cvx.status import Status

FLOAT = torch.float64


def conditioned(m: int, n: int, exponent: float) -> Tensor:
    """A matrix with singular values from 1 down to 10**-exponent."""
    U, V = (torch.linalg.qr(torch.randn(k, n, dtype=FLOAT)).Q for k in (m, n))
    return (U * torch.logspace(0, -exponent, n, dtype=FLOAT)) @ V.mT


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("intercept", [False, True])
def test_agrees_with_cvxpy(intercept: bool) -> None:
    torch.manual_seed(0)
    A, b, w = torch.randn(7, 3, dtype=FLOAT), torch.randn(7, dtype=FLOAT), torch.rand(7)
    x, c = cp.Variable(3), cp.Variable()
    misfit = A.numpy() @ x - b.numpy() + (c if intercept else 0)
    objective = w.double().numpy() @ cp.square(misfit) / 2 + 0.35 * cp.sum_squares(x)
    optimum = cp.Problem(cp.Minimize(objective)).solve(solver="CLARABEL")
    report = WeightedLeastSquares(0.7, intercept).solve(A, b, w)
    expected = torch.as_tensor(np.append(x.value, c.value) if intercept else x.value)
    torch.testing.assert_close(report.value, expected, rtol=1e-6, atol=1e-6)
    assert float(report.objective) == pytest.approx(optimum, rel=1e-7)
    assert report.solved
    assert report.regular


@pytest.mark.parametrize("exponent", [3, 6])
@pytest.mark.parametrize("misfit", [0.0, 1.0])
def test_accurate_at_bad_condition(exponent: float, misfit: float) -> None:
    """Against 50 digits; normal equations would lose all digits at condition 1e6 and double."""
    torch.manual_seed(1)
    A = conditioned(30, 6, exponent).requires_grad_()
    b = (
        A.detach() @ torch.randn(6, dtype=FLOAT) + misfit * torch.randn(30, dtype=FLOAT)
    ).requires_grad_()
    g = torch.randn(6, dtype=FLOAT)
    x = weighted_least_squares(A, b)
    grad_A, grad_b = torch.autograd.grad(x @ g, (A, b))
    with mp.workdps(50):
        M, c, v = (mp.matrix(t.tolist()) for t in (A.detach(), b.detach(), g))
        H = M.T * M
        y, u = mp.lu_solve(H, M.T * c), mp.lu_solve(H, v)
        exact = [y, (c - M * y) * u.T - (M * u) * y.T, M * u]
        exact_x, exact_A, exact_b = (torch.tensor(e.tolist(), dtype=FLOAT) for e in exact)
    eps = torch.finfo(FLOAT).eps
    limit = 20 * eps * 10**exponent
    # Where there is a misfit, the condition of the problem itself is the square of the matrix's.
    assert relative(x.detach(), exact_x[:, 0]) < (limit if misfit == 0 else limit * 10**exponent)
    assert relative(x.detach(), exact_x[:, 0]) < 1e-8
    assert relative(grad_A, exact_A) < 1e-8
    assert relative(grad_b, exact_b[:, 0]) < 1e-8


def test_float32_is_as_good_as_lapack() -> None:
    torch.manual_seed(2)
    A = conditioned(40, 8, 3)
    b = A @ torch.randn(8, dtype=FLOAT) + 0.01 * torch.randn(40, dtype=FLOAT)
    expected = weighted_least_squares(A, b)
    found = weighted_least_squares(A.float(), b.float())
    lapack = torch.linalg.lstsq(A.float(), b.float()[:, None], driver="gels").solution[:, 0]
    assert found.dtype == torch.float32
    assert relative(found, expected) < 3 * relative(lapack, expected) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_of_the_unknowns_do_not_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(12)
    A, b = torch.randn(50, 5, dtype=dtype), torch.randn(50, dtype=dtype)
    units = 10.0 ** torch.tensor([-12, -6, 0, 6, 12], dtype=dtype)
    expected = weighted_least_squares(A, b)
    report = WeightedLeastSquares().solve(A * units, b)
    assert report.regular
    torch.testing.assert_close(report.value * units, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("m", "n"), [(6, 3), (3, 5)])
@pytest.mark.parametrize("regularised", [False, True])
def test_derivatives(m: int, n: int, intercept: bool, regularised: bool) -> None:
    torch.manual_seed(3)
    A = torch.randn(2, m, n, dtype=FLOAT, requires_grad=True)
    b = torch.randn(m, dtype=FLOAT, requires_grad=True)
    w = (0.5 + torch.rand(2, m, dtype=FLOAT)).requires_grad_()
    strength = torch.tensor([0.3, 2.0], dtype=FLOAT, requires_grad=True) if regularised else 0.0

    def solve(A: Tensor, b: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        return weighted_least_squares(A, b, w, *(rest or (0.0,)), intercept=intercept)

    inputs = (A, b, w, strength) if isinstance(strength, Tensor) else (A, b, w)
    assert gradcheck(solve, inputs)
    assert gradgradcheck(solve, inputs)


def test_derivative_at_zero_weight_and_zero_regularisation() -> None:
    """The square roots in the factorisation have none there, the solution has."""
    torch.manual_seed(4)
    A, b = torch.randn(6, 3, dtype=FLOAT), torch.randn(6, dtype=FLOAT)
    w, s = torch.ones(6, dtype=FLOAT), torch.zeros((), dtype=FLOAT)
    w[2] = 0.0
    step = 1e-6
    jacobians = torch.autograd.functional.jacobian(
        lambda w, s: weighted_least_squares(A, b, w, s), (w, s)
    )
    base = weighted_least_squares(A, b, w, s)
    moved = w.clone()
    moved[2] = step
    one_sided = (weighted_least_squares(A, b, moved, s) - base) / step
    torch.testing.assert_close(jacobians[0][:, 2], one_sided, rtol=1e-4, atol=1e-5)
    one_sided = (weighted_least_squares(A, b, w, s + step) - base) / step
    torch.testing.assert_close(jacobians[1], one_sided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_rank_deficient_gives_least_norm_and_says_so(batch: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    A, b = torch.randn(*batch, 8, 4, dtype=FLOAT), torch.randn(*batch, 8, dtype=FLOAT)
    lowered = A if not batch else A[1]
    lowered[:, 3] = 2 * lowered[:, 0] - lowered[:, 1]
    report = WeightedLeastSquares().solve(A, b)
    expected = (torch.linalg.pinv(A) @ b[..., None])[..., 0]
    torch.testing.assert_close(report.value, expected, rtol=1e-10, atol=1e-10)
    assert report.regular.tolist() == ([True, False, True] if batch else False)
    assert report.solved.all()


def test_more_unknowns_than_data_is_regular() -> None:
    torch.manual_seed(6)
    A, b = torch.randn(2, 3, 6, dtype=FLOAT), torch.randn(2, 3, dtype=FLOAT)
    A[1, 2] = A[1, 1]
    report = WeightedLeastSquares().solve(A, b)
    assert report.regular.tolist() == [True, False]
    expected = (torch.linalg.pinv(A) @ b[..., None])[..., 0]
    torch.testing.assert_close(report.value, expected, rtol=1e-10, atol=1e-10)


def test_no_weight_at_all() -> None:
    A, b = torch.ones(4, 2, dtype=FLOAT), torch.ones(4, dtype=FLOAT)
    report = WeightedLeastSquares().solve(A, b, torch.zeros(4, dtype=FLOAT))
    assert torch.equal(report.value, torch.zeros(2, dtype=FLOAT))
    assert not report.regular


@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    shapes=st.sampled_from(
        [((), (), ()), ((2,), (), (2,)), ((), (5, 1), (3,)), ((4,), (3, 4), ())]
    ),
    intercept=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_batch_dimensions_broadcast(
    m: int, n: int, shapes: tuple, intercept: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    batch_A, batch_b, batch_s = shapes
    A, b = torch.randn(*batch_A, m, n, dtype=FLOAT), torch.randn(*batch_b, m, dtype=FLOAT)
    w, s = torch.rand(m, dtype=FLOAT), 0.1 + torch.rand(batch_s, dtype=FLOAT)
    x = weighted_least_squares(A, b, w, s, intercept)
    assert x.shape == (*torch.broadcast_shapes(*shapes), n + intercept)
    if intercept:
        A = torch.nn.functional.pad(A, (0, 1), value=1.0)
    ridge = torch.ones(n + intercept, dtype=FLOAT)
    ridge[n:] = 0.0
    slope = A.mT @ (w[:, None] * (A @ x[..., None] - b[..., None]))
    slope = slope[..., 0] + s[..., None] * ridge * x
    assert slope.abs().max() < 1e-12 * (1 + A.abs().max() ** 2) * (1 + x.abs().max()) * 10


def test_one_element_does_not_change_another() -> None:
    torch.manual_seed(7)
    A, b = torch.randn(3, 6, 2, dtype=FLOAT), torch.randn(3, 6, dtype=FLOAT)
    alone = weighted_least_squares(A, b)
    A[1] *= 1e200
    b[2] = 0.0
    together = weighted_least_squares(A, b)
    assert torch.equal(together[0], alone[0])
    torch.testing.assert_close(together[1], alone[1] / 1e200, rtol=1e-10, atol=0)


def test_overflow_is_reported() -> None:
    report = WeightedLeastSquares().solve(1e-30 * torch.eye(3), torch.full((3,), 1e30))
    assert report.status == Status.NUMERICAL_ERROR


def test_under_vmap() -> None:
    torch.manual_seed(8)
    A, b, w = (torch.randn(4, *s, dtype=FLOAT) for s in ((5, 3), (5,), (5,)))
    A[2, :, 0] = A[2, :, 1]
    w = w.abs()
    expected = weighted_least_squares(A, b, w)
    assert torch.equal(torch.func.vmap(weighted_least_squares)(A, b, w), expected)
    per_sample = torch.func.vmap(torch.func.grad(lambda *t: weighted_least_squares(*t).sum()))
    inputs = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(weighted_least_squares(inputs, b, w).sum(), inputs)
    torch.testing.assert_close(per_sample(A, b, w), grad)


def test_learned_regularisation() -> None:
    strength = torch.nn.Parameter(torch.tensor(0.5))
    module = WeightedLeastSquares(strength)
    module(torch.eye(3), torch.ones(3)).sum().backward()
    assert list(module.parameters()) == [strength]
    assert float(strength.grad) == pytest.approx(-3 / 1.5**2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(3)}, r"A has shape \(3,\)"),
        ({"b": torch.ones(4)}, r"b has shape \(4,\); expected \(\.\.\., 3\)"),
        (
            {"weights": torch.tensor([1.0, -1.0, 1.0])},
            r"weights\[1\] is -1; it must be a finite non",
        ),
        ({"weights": torch.ones(2)}, r"weights has shape \(2,\)"),
        ({"regularisation": -0.5}, "regularisation is -0.5; it must be"),
        ({"regularisation": "big"}, "regularisation is a str"),
        ({"A": torch.tensor([[1.0], [torch.inf], [0.0]])}, r"A\[1, 0\] is inf"),
        ({"A": torch.ones(3, 2, dtype=torch.float16)}, "A has type torch.float16"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        weighted_least_squares(**({"A": torch.ones(3, 2), "b": torch.ones(3)} | change))
