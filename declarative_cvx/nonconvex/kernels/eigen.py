"""Symmetric and generalised eigenvalue problems, differentiable where eigenvalues repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.kernels.arguments import BatchFunction, align, prepare, require
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.status import Status

# Asymmetry of an input, relative to its largest entry, that is taken for rounding.
SYMMETRY_TOLERANCE = 1e-5
# Eigenvalues count as equal if they differ by less than this many units of rounding, times the
# order, of the one of largest magnitude.
EQUAL = 10.0
# Residual, in the same units, up to which an answer counts as solved.
SOLVED = 100.0


@dataclass(frozen=True, eq=False, repr=False)
class EigenSolution(KernelSolution):
    """Report on an eigenvalue problem.

    Attributes
    ----------
    value : Tensor, shape (..., n, k)
        Eigenvectors.
    eigenvalues : Tensor, shape (..., k)
    """

    eigenvalues: Tensor


@torch.compiler.disable  # looks at values
def symmetric_eigen(
    A: Tensor, count: int | None = None, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and orthonormal eigenvectors of a symmetric matrix: A V = V diag(l).

    The derivative holds also where eigenvalues repeat, for losses that take an eigenspace as a
    whole: functions of the projector V V' onto it and of the sum of its eigenvalues, or of both.
    Pairs of eigenvalues that differ by less than ``10 n eps max|l|`` count as equal, and their part
    of the derivative, 1 / (l_j - l_i), which such a loss multiplies by zero, is replaced by zero.
    Other losses have no derivative there that the outputs could carry: of a matrix function
    V f(diag(l)) V', what is inside the eigenspace and off the diagonal would be missing. Second
    derivatives are those of distinct eigenvalues only.

    Parameters
    ----------
    A : Tensor, shape (..., n, n)
        Leading dimensions are batch dimensions. Its symmetric part is what counts, and what
        receives the gradient.
    count : int, optional
        How many eigenvalues to return; all if not given.
    largest : bool, optional
        With `count`: those at the upper end of the spectrum, or at the lower end.

    Returns
    -------
    eigenvalues : Tensor, shape (..., count)
        In ascending order.
    eigenvectors : Tensor, shape (..., n, count)
        As columns. Of each, the component of largest magnitude is positive (the first one, where
        several are the same up to rounding).

    Raises
    ------
    ParameterError, SpecificationError
    """
    return _select(_Eigen.apply(_checked("A", A)), _window(A, count, largest))


@torch.compiler.disable  # looks at values
def generalised_eigen(
    A: Tensor, B: Tensor, count: int | None = None, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """Solve A V = B V diag(l) for symmetric A and symmetric positive definite B, V' B V = I.

    By the Cholesky factor of B, which makes it an ordinary problem; all else is as in
    `symmetric_eigen`.

    Parameters
    ----------
    A, B : Tensor, shape (..., n, n)
        Leading dimensions are batch dimensions and broadcast.
    count : int, optional
    largest : bool, optional

    Returns
    -------
    eigenvalues : Tensor, shape (..., count)
    eigenvectors : Tensor, shape (..., n, count)
        As columns, orthonormal in the inner product of B.

    Raises
    ------
    ParameterError
        Also if B is not positive definite.
    SpecificationError
    """
    return _select(_generalised(*_checked_pair(A, B)), _window(A, count, largest))


class SymmetricEigen(nn.Module):
    """`symmetric_eigen` as a module.

    Parameters
    ----------
    count : int, optional
    largest : bool, optional
    """

    def __init__(self, count: int | None = None, largest: bool = True) -> None:
        super().__init__()
        self.count, self.largest = count, largest

    def forward(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors; see `symmetric_eigen`."""
        return symmetric_eigen(A, self.count, self.largest)

    def solve(self, A: Tensor) -> EigenSolution:
        """Eigenvalues, eigenvectors and a report.

        The objective is the sum of the eigenvalues returned, the extreme value of trace(V' A V)
        over all V with orthonormal columns. The residual is that of A V = V diag(l), relative to
        the norm of A. A matrix is not `regular` if one of the eigenvalues returned is repeated.
        """
        A = _checked("A", A)
        values, vectors = _Eigen.apply(A)
        return _report(A, None, values, vectors, _window(A, self.count, self.largest))

    def extra_repr(self) -> str:
        return f"count={self.count}, largest={self.largest}"


class GeneralisedEigen(SymmetricEigen):
    """`generalised_eigen` as a module.

    Parameters
    ----------
    count : int, optional
    largest : bool, optional
    """

    def forward(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Eigenvalues and eigenvectors; see `generalised_eigen`."""
        return generalised_eigen(A, B, self.count, self.largest)

    def solve(self, A: Tensor, B: Tensor) -> EigenSolution:  # type: ignore[override]
        """Eigenvalues, eigenvectors and a report, as `SymmetricEigen.solve` gives it."""
        A, B = _checked_pair(A, B)
        return _report(A, B, *_generalised(A, B), _window(A, self.count, self.largest))


def _checked(name: str, A: Tensor) -> Tensor:
    """The symmetric part of a matrix that is symmetric up to rounding."""
    (A,) = prepare({name: A})
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise ParameterError(f"{name} has shape {tuple(A.shape)}; expected (..., n, n), n >= 1.")
    require(name, A)
    require(name, A, _symmetric, f"equal to its transposed entry; pass ({name} + {name}.mT) / 2")
    return (A + A.mT) / 2


def _symmetric(A: Tensor) -> Tensor:
    scale = A.abs().amax((-2, -1), keepdim=True)
    return (A - A.mT).abs() <= SYMMETRY_TOLERANCE * scale


def _checked_pair(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    A, B = prepare({"A": A, "B": B})
    A, B = _checked("A", A), _checked("B", B)
    A, B = align({"A": (A, tuple(A.shape[-2:])), "B": (B, tuple(A.shape[-2:]))})
    require("B", B, _positive_definite, "positive definite")
    return A, B


def _positive_definite(B: Tensor) -> Tensor:
    return torch.linalg.cholesky_ex(B).info == 0


def _window(A: Tensor, count: int | None, largest: bool) -> slice:
    n = A.shape[-1]
    if count is None:
        return slice(None)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= n:
        raise SpecificationError(
            f"count is {count!r}; it must be an integer from 1 to {n}, the order of A."
        )
    return slice(n - count, n) if largest else slice(0, count)


def _select(pairs: tuple[Tensor, Tensor], window: slice) -> tuple[Tensor, Tensor]:
    values, vectors = pairs
    return values[..., window], vectors[..., window]


class _Eigen(BatchFunction):
    """All eigenvalues and eigenvectors of a symmetric matrix."""

    @staticmethod
    def forward(A: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(A)
        return values, vectors * _signs(vectors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, V = ctx.saved_tensors
        inner = _inverse_gaps(values) * (V.mT @ grad_vectors)
        inner = (inner + inner.mT) / 2 + torch.diag_embed(grad_values)
        return V @ inner @ V.mT

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _Eigen.over_batch(in_dims, args)


def _generalised(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    L = torch.linalg.cholesky(B)
    half = torch.linalg.solve_triangular(L, A, upper=False)
    C = torch.linalg.solve_triangular(L, half.mT, upper=False)
    values, vectors = _Eigen.apply((C + C.mT) / 2)
    vectors = torch.linalg.solve_triangular(L.mT, vectors, upper=True)
    return values, vectors * _signs(vectors.detach())


def _signs(vectors: Tensor) -> Tensor:
    """Factors, 1 or -1, that make the first of each column's largest components positive."""
    size = vectors.abs()
    largest = size >= size.amax(-2, keepdim=True) * (1 - torch.finfo(size.dtype).eps ** 0.5)
    first = largest.to(torch.int8).argmax(-2, keepdim=True)
    return torch.where(vectors.gather(-2, first) < 0, -1.0, 1.0).to(vectors.dtype)


def _gaps(values: Tensor) -> tuple[Tensor, Tensor]:
    """Differences l_j - l_i, and which of them count as zero."""
    gaps = values[..., None, :] - values[..., :, None]
    n = values.shape[-1]
    equal = EQUAL * n * torch.finfo(values.dtype).eps * values.detach().abs().amax(-1)
    return gaps, gaps.detach().abs() <= equal[..., None, None]


def _inverse_gaps(values: Tensor) -> Tensor:
    gaps, zero = _gaps(values)
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, gaps))


def _report(
    A: Tensor, B: Tensor | None, values: Tensor, vectors: Tensor, window: slice
) -> EigenSolution:
    values, all_values = values[..., window], values.detach()
    vectors = vectors[..., window]
    with torch.no_grad():
        n = A.shape[-1]
        right = vectors if B is None else B @ vectors
        size = _norm(A) + (0.0 if B is None else _norm(B) * values.abs().amax(-1))
        misfit = _norm(A @ vectors - right * values[..., None, :])
        residual = torch.where(misfit == 0, 0.0, misfit / (size * _norm(vectors)))
        good = residual <= SOLVED * n * torch.finfo(A.dtype).eps
        equal = _gaps(all_values)[1] & ~torch.eye(n, dtype=torch.bool, device=A.device)
    return EigenSolution(
        value=vectors,
        eigenvalues=values,
        objective=values.sum(-1),
        status=torch.where(good, int(Status.OPTIMAL), int(Status.INACCURATE)),
        residual=residual,
        gap=torch.zeros_like(residual),
        regular=~equal[..., window].any(-1).any(-1),
    )


def _norm(A: Tensor) -> Tensor:
    return torch.linalg.norm(A, dim=(-2, -1))
