"""Tridiagonal systems: any nonsingular matrix, accurate answers, honest reports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.kernels.tridiagonal import (
    TridiagonalSolve,
    cyclic_reduction,
    pivoted_elimination,
    tridiagonal_solve,
)
from declarative_cvx.status import Status

FLOAT = torch.float64


def dense(lower: Tensor, diagonal: Tensor, upper: Tensor) -> Tensor:
    return (
        torch.diag_embed(diagonal) + torch.diag_embed(lower, -1) + torch.diag_embed(upper, 1)
    ).double()


def draw(*batch: int, n: int, dtype: torch.dtype = FLOAT, dominant: bool = False) -> list[Tensor]:
    bands = [torch.randn(*batch, size, dtype=dtype) for size in (n - 1, n, n - 1)]
    if dominant:
        bands[1] = bands[1].sign() * (4 + bands[1].abs())
    return [*bands, torch.randn(*batch, n, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 33, 500])
def test_dominant_systems_to_rounding(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    *bands, rhs = draw(3, n=n, dtype=dtype, dominant=True)
    report = TridiagonalSolve().solve(*bands, rhs)
    expected = torch.linalg.solve(dense(*bands), rhs.double())
    assert report.value.dtype == dtype
    error = (report.value.double() - expected).abs().amax() / expected.abs().amax()
    assert error < 8 * torch.finfo(dtype).eps
    assert report.solved.all()
    assert report.regular.all()
    assert report.residual.max() < 8 * torch.finfo(dtype).eps


def test_shooting_matrix_that_needs_pivoting() -> None:
    """Zero diagonal: reduction without pivoting divides by zero at once."""
    n = 100
    torch.manual_seed(0)
    lower, diagonal, upper, rhs = draw(5, n=n)
    diagonal = torch.zeros_like(diagonal)
    lower, upper = 1 + lower.abs(), 1 + upper.abs()
    assert not cyclic_reduction(
        torch.nn.functional.pad(lower, (1, 0)), diagonal,
        torch.nn.functional.pad(upper, (0, 1)), rhs,
    ).isfinite().all()  # fmt: skip
    x = tridiagonal_solve(lower, diagonal, upper, rhs)
    misfit = (dense(lower, diagonal, upper) @ x[..., None])[..., 0] - rhs
    assert misfit.abs().max() < 1e-12 * x.abs().max()


def test_one_poor_system_changes_no_other() -> None:
    torch.manual_seed(1)
    *bands, rhs = draw(3, n=20, dominant=True)
    alone = tridiagonal_solve(*bands, rhs)
    bands[1][1, 0] = 0.0
    together = tridiagonal_solve(*bands, rhs)
    assert torch.equal(together[[0, 2]], alone[[0, 2]])
    expected = torch.linalg.solve(dense(*bands), rhs)
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-10)


def test_elimination_agrees_with_dense() -> None:
    torch.manual_seed(2)
    *bands, rhs = draw(50, n=30)
    expected = torch.linalg.solve(dense(*bands), rhs)
    found = pivoted_elimination(*bands, rhs)
    error = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < 1e-9


@given(
    n=st.integers(1, 40),
    shapes=st.sampled_from(
        [((), (), ()), ((3,), (), (3,)), ((2, 1), (3,), (1, 3)), ((), (), (4,))]
    ),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_batch_dimensions_broadcast(n: int, shapes: tuple, seed: int) -> None:
    torch.manual_seed(seed)
    off, main, right = shapes
    lower, upper = torch.randn(*off, n - 1, dtype=FLOAT), torch.randn(*off, n - 1, dtype=FLOAT)
    diagonal, rhs = torch.randn(*main, n, dtype=FLOAT), torch.randn(*right, n, dtype=FLOAT)
    x = tridiagonal_solve(lower, diagonal, upper, rhs)
    batch = torch.broadcast_shapes(*shapes)
    assert x.shape == (*batch, n)
    matrix = dense(lower, diagonal.expand(*batch, n), upper)
    misfit = (matrix @ x[..., None])[..., 0] - rhs
    assert misfit.abs().max() < 1e-9 * (1 + x.abs().max())


def test_derivatives() -> None:
    torch.manual_seed(3)
    lower, diagonal, upper, rhs = draw(2, n=6, dominant=True)
    diagonal[0] = torch.randn(6, dtype=FLOAT)
    inputs = [lower[0], diagonal, upper, rhs[:1]]
    for tensor in inputs:
        tensor.requires_grad_()
    assert gradcheck(tridiagonal_solve, inputs)
    assert gradgradcheck(tridiagonal_solve, inputs)


def test_derivative_matches_dense_autograd_in_both_precisions() -> None:
    torch.manual_seed(4)
    inputs = draw(4, n=50, dominant=True)
    weight = torch.randn(4, 50, dtype=FLOAT)

    def reference(*tensors: Tensor) -> Tensor:
        return torch.linalg.solve(dense(*tensors[:3]), tensors[3])

    expected = torch.func.grad(lambda *t: (reference(*t) * weight).sum(), (0, 1, 2, 3))(*inputs)
    for dtype in (torch.float32, torch.float64):
        cast = [t.to(dtype).requires_grad_() for t in inputs]
        found = torch.autograd.grad((tridiagonal_solve(*cast) * weight.to(dtype)).sum(), cast)
        for one, other in zip(found, expected, strict=True):
            error = (one.double() - other).norm() / other.norm()
            assert error < 50 * torch.finfo(dtype).eps


def test_singular_matrix_is_reported() -> None:
    diagonal = torch.tensor([[2.0, 3.0, 2.0], [1.0, 2.0, 1.0]], dtype=FLOAT)
    off, rhs = torch.ones(2, dtype=FLOAT), torch.tensor([1.0, 2.0, 4.0], dtype=FLOAT)
    report = TridiagonalSolve().solve(off, diagonal, off, rhs)
    assert report.status[0] == Status.OPTIMAL
    assert report.regular.tolist() == [True, False]


def test_exactly_singular_matrix_has_no_answer() -> None:
    zero = torch.zeros(2, dtype=FLOAT)
    report = TridiagonalSolve().solve(
        zero, torch.tensor([1.0, 0.0, 1.0], dtype=FLOAT), zero, torch.ones(3, dtype=FLOAT)
    )
    assert report.status == Status.NUMERICAL_ERROR
    assert not report.regular


def test_badly_scaled_rows_are_solved_to_rounding() -> None:
    torch.manual_seed(5)
    lower, diagonal, upper, rhs = draw(3, n=40, dominant=True)
    scale = torch.logspace(-150, 150, 40, dtype=FLOAT)
    scaled = lower * scale[1:], diagonal * scale, upper * scale[:-1], rhs * scale
    expected = tridiagonal_solve(lower, diagonal, upper, rhs)
    torch.testing.assert_close(tridiagonal_solve(*scaled), expected, rtol=1e-13, atol=0)


def test_under_vmap() -> None:
    torch.manual_seed(6)
    lower, diagonal, upper, rhs = draw(4, n=9)
    expected = tridiagonal_solve(lower, diagonal, upper[0], rhs)
    mapped = torch.func.vmap(tridiagonal_solve, in_dims=(0, 0, None, 0))
    assert torch.equal(mapped(lower, diagonal, upper[0], rhs), expected)
    hessian = torch.func.vmap(
        torch.func.jacrev(
            torch.func.grad(lambda d, r: (tridiagonal_solve(lower[0], d, upper[0], r) ** 3).sum())
        )
    )(diagonal, rhs)
    torch.testing.assert_close(hessian, hessian.mT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rhs": torch.ones(4, dtype=FLOAT)}, r"rhs has shape \(4,\); expected \(\.\.\., 3\)"),
        ({"lower": torch.ones(3, dtype=FLOAT)}, r"lower has shape \(3,\); expected \(\.\.\., 2\)"),
        ({"upper": torch.tensor([1.0, torch.nan])}, r"upper\[1\] is nan; it must be a finite"),
        ({"diagonal": torch.ones(3, dtype=torch.int64)}, "diagonal has type torch.int64"),
        ({"diagonal": torch.ones(0)}, r"diagonal has shape \(0,\)"),
        ({"lower": 1.0}, r"lower has shape \(\)"),
        ({"diagonal": [1.0, 2.0, 3.0]}, "diagonal is a list; expected a torch tensor"),
        ({"rhs": torch.ones(2, 3), "diagonal": torch.ones(4, 3)}, "rhs do not broadcast"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    given = {
        "lower": torch.ones(2, dtype=FLOAT),
        "diagonal": 4 * torch.ones(3, dtype=FLOAT),
        "upper": torch.ones(2, dtype=FLOAT),
        "rhs": torch.ones(3, dtype=FLOAT),
    }
    with pytest.raises(ParameterError, match=message):
        tridiagonal_solve(**(given | change))
