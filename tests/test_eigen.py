"""Eigenvalue problems: derivatives at repeated eigenvalues, signs, reports."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.kernels.eigen import (
    GeneralisedEigen,
    SymmetricEigen,
    generalised_eigen,
    symmetric_eigen,
)

FLOAT = torch.float64


def symmetric(A: Tensor) -> Tensor:
    return (A + A.mT) / 2


def draw(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return symmetric(torch.randn(*shape, shape[-1], dtype=dtype))


def with_eigenvalues(values: Tensor) -> Tensor:
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=FLOAT)).Q
    return symmetric((Q * values) @ Q.mT)


def positive(*shape: int) -> Tensor:
    C = torch.randn(*shape, shape[-1], dtype=FLOAT)
    return C @ C.mT + torch.eye(shape[-1], dtype=FLOAT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_definition_holds(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    A, B = draw(3, n, dtype=dtype), positive(n).to(dtype)
    eps = torch.finfo(dtype).eps
    for values, V, M in (
        (*symmetric_eigen(A), torch.eye(n, dtype=dtype)),
        (*generalised_eigen(A, B), B),
    ):
        assert V.dtype == values.dtype == dtype
        assert (values.diff() >= 0).all()
        scale = A.norm() * V.norm() + M.norm() * V.norm() * values.abs().max()
        assert (A @ V - M @ V * values[:, None, :]).norm() < 50 * eps * scale
        assert (V.mT @ M @ V - torch.eye(n, dtype=dtype)).norm() < 50 * n * eps * M.norm()


def test_two_by_two_closed_form() -> None:
    angle = 0.3
    c, s = math.cos(angle), math.sin(angle)
    V = torch.tensor([[-s, c], [c, s]], dtype=FLOAT)
    values, vectors = symmetric_eigen((V * torch.tensor([-1.0, 2.0], dtype=FLOAT)) @ V.mT)
    torch.testing.assert_close(values, torch.tensor([-1.0, 2.0], dtype=FLOAT))
    torch.testing.assert_close(vectors, V)


@pytest.mark.parametrize(("count", "largest"), [(None, True), (2, True), (1, False)])
def test_derivatives(count: int | None, largest: bool) -> None:
    torch.manual_seed(0)
    A, C = (torch.randn(2, 4, 4, dtype=FLOAT, requires_grad=True) for _ in range(2))

    def ordinary(A: Tensor) -> tuple[Tensor, Tensor]:
        return symmetric_eigen(symmetric(A), count, largest)

    def generalised(A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        B = C @ C.mT + torch.eye(4, dtype=FLOAT)
        return generalised_eigen(symmetric(A), B, count, largest)

    assert gradcheck(ordinary, (A,))
    assert gradgradcheck(ordinary, (A,))
    assert gradcheck(generalised, (A, C))
    assert gradgradcheck(generalised, (A, C))


def projector_loss(A: Tensor, weight: Tensor) -> Tensor:
    """Depends on the space of the two largest eigenvalues, not on a basis of it."""
    values, V = symmetric_eigen(A, 2)
    return (weight * (V @ V.mT)).sum() + (values**3).sum()


def test_invariant_loss_at_a_repeated_eigenvalue() -> None:
    torch.manual_seed(1)
    A = with_eigenvalues(torch.tensor([-1.0, 0.5, 0.5, 3.0, 3.0], dtype=FLOAT))
    weight, direction = draw(5), draw(5)
    (grad,) = torch.autograd.grad(projector_loss(A.requires_grad_(), weight), A)
    step = 1e-5
    with torch.no_grad():
        rise = projector_loss(A + step * direction, weight) - projector_loss(
            A - step * direction, weight
        )
    assert float((grad * direction).sum()) == pytest.approx(float(rise / (2 * step)), rel=1e-7)


def test_multiples_of_the_identity() -> None:
    """A sum over all eigenvalues is differentiable there; torch's own eigh gives NaN with V."""
    c = 0.7
    A = (c * torch.eye(4, dtype=FLOAT)).requires_grad_()
    values, V = symmetric_eigen(A)
    weight = draw(4)
    loss = values.exp().sum() + (weight * (V @ V.mT)).sum()
    torch.testing.assert_close(
        torch.autograd.grad(loss, A)[0], math.exp(c) * torch.eye(4, dtype=FLOAT)
    )
    values, V = torch.linalg.eigh(A)
    assert not torch.autograd.grad((weight * (V @ V.mT)).sum(), A)[0].isfinite().all()


@pytest.mark.parametrize("gap", [1e-15, 1e-10, 1e-6])
def test_invariant_loss_near_a_repeated_eigenvalue(gap: float) -> None:
    torch.manual_seed(2)
    exact = torch.tensor([-1.0, 0.5, 2.0, 2.0], dtype=FLOAT)
    near = exact + torch.tensor([0.0, 0.0, 0.0, gap], dtype=FLOAT)
    weight = draw(4)
    grads = []
    for values in (exact, near):
        torch.manual_seed(3)
        A = with_eigenvalues(values).requires_grad_()
        grads += torch.autograd.grad(projector_loss(A, weight), A)
    # Rounding of V over the gap, where that is not below the threshold; else the gap itself.
    limit = 1e-10 if gap < 1e-14 else 1e-14 / gap + 100 * gap
    assert (grads[0] - grads[1]).norm() < limit


def test_generalised_with_repeated_eigenvalues() -> None:
    """A = 2 B: the projector onto all of the space is the inverse of B whatever the basis."""
    torch.manual_seed(4)
    B = positive(3).requires_grad_()
    _, V = generalised_eigen(2 * B, B)
    weight = draw(3)
    (grad,) = torch.autograd.grad((weight * (V @ V.mT)).sum(), B)
    (expected,) = torch.autograd.grad((weight * torch.linalg.inv(B)).sum(), B)
    torch.testing.assert_close(grad, symmetric(expected))


def test_sign_is_that_of_the_largest_component() -> None:
    torch.manual_seed(5)
    _, V = symmetric_eigen(draw(20, 6))
    largest = V.gather(-2, V.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    _, V = symmetric_eigen(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=FLOAT))
    half = math.sqrt(0.5)
    torch.testing.assert_close(V, torch.tensor([[half, half], [-half, half]], dtype=FLOAT))


def test_report() -> None:
    torch.manual_seed(6)
    A = torch.stack([draw(3), with_eigenvalues(torch.tensor([0.0, 1.0, 1.0], dtype=FLOAT))])
    report = SymmetricEigen(1).solve(A)
    assert report.value.shape == (2, 3, 1)
    assert report.regular.tolist() == [True, False]
    assert report.solved.all()
    assert report.residual.max() < 1e-15
    torch.testing.assert_close(report.objective, torch.linalg.eigvalsh(A)[:, -1])
    assert SymmetricEigen(1, largest=False).solve(A).regular.all()
    report = GeneralisedEigen().solve(A, positive(3))
    assert report.eigenvalues.shape == (2, 3)
    assert report.solved.all()
    assert report.regular.all()


def test_broadcast_and_vmap() -> None:
    torch.manual_seed(7)
    A, B = draw(3, 1, 4), positive(2, 4)
    values, V = generalised_eigen(A, B)
    assert values.shape == (3, 2, 4)
    mapped = torch.func.vmap(lambda A: generalised_eigen(A, B))(A)
    assert torch.equal(mapped[1], V)
    grads = torch.func.vmap(torch.func.grad(lambda A: symmetric_eigen(A)[1].sum()))(A[:, 0])
    inputs = A[:, 0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(symmetric_eigen(inputs)[1].sum(), inputs)
    torch.testing.assert_close(grads, expected)


def test_bad_input_is_refused() -> None:
    good = torch.eye(2)
    with pytest.raises(ParameterError, match=r"A\[0, 1\] is 1; it must be equal to its transposed"):
        symmetric_eigen(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ParameterError, match=r"B\[1, 0\] is 5; |B\[0, 1\] is 0; "):
        generalised_eigen(good, torch.tensor([[1.0, 0.0], [5.0, 1.0]]))
    with pytest.raises(ParameterError, match=r"B\[1\] must be positive definite"):
        generalised_eigen(good, torch.stack([good, -good]))
    with pytest.raises(ParameterError, match=r"A has shape \(2, 3\)"):
        symmetric_eigen(torch.ones(2, 3))
    with pytest.raises(ParameterError, match=r"A\[0, 0\] is nan"):
        symmetric_eigen(good * torch.nan)
    with pytest.raises(ParameterError, match=r"B has shape \(3, 3\); expected \(\.\.\., 2, 2\)"):
        generalised_eigen(good, torch.eye(3))
    for count in (0, 3, 1.5, True):
        with pytest.raises(SpecificationError, match=r"count is .*an integer from 1 to 2"):
            symmetric_eigen(good, count)
