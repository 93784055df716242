"""Batches of square linear systems, by factorisation or, where they are singular, least squares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

# Residual, relative to the right-hand side, up to which a factorisation's answer is taken.
FACTORED = 1e-9
# Its answers that are larger than this, in the same units, may come from a singular matrix.
INFLATED = 1e8
# Singular values below this multiple of the largest count as zero.
RANK_TOLERANCE = 1e-11
# Pivots below this multiple of the largest may be nothing but rounding.
DOUBTFUL = 1e-12
# Order from which systems on the CPU are factorised one at a time.
LARGE = 128
# Order from which a single system is worth several threads.
MANY_THREADS = 500


@dataclass(frozen=True)
class Factors:
    """LU factors of a batch of matrices, shape (batch, k, k).

    On the CPU large ones are treated one at a time, which keeps all cores busy as well: batched,
    LAPACK runs from several threads at once, which some builds of MKL do not survive (orders from
    about 200 on).
    """

    factors: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Factors:
        """Factorise, perhaps in place; singular matrices give factors that solve nothing."""
        if not _is_large(matrix):
            return cls(*torch.linalg.lu_factor_ex(matrix)[:2])
        pivots = []
        for element in matrix:
            factors, pivot, _ = torch.linalg.lu_factor_ex(element)
            element.copy_(factors)
            pivots.append(pivot)
        return cls(matrix, torch.stack(pivots))

    @cached_property
    def doubtful(self) -> Tensor:
        """Which matrices may be singular but for rounding, bool, shape (batch,)."""
        pivots = self.factors.diagonal(dim1=1, dim2=2).abs()
        if not pivots.shape[1]:
            return pivots.new_zeros(len(pivots), dtype=torch.bool)
        least, largest = pivots.aminmax(dim=1)
        return least < DOUBTFUL * largest

    def solve(self, rhs: Tensor, transpose: bool = False) -> Tensor:
        """Solutions for rhs (batch, k, columns); NaN or meaningless for singular matrices."""
        if not _is_large(self.factors):
            return torch.linalg.lu_solve(self.factors, self.pivots, rhs, adjoint=transpose)
        triples = zip(self.factors, self.pivots, rhs, strict=True)
        return torch.stack([torch.linalg.lu_solve(*v, adjoint=transpose) for v in triples])


def _is_large(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.shape[1] >= LARGE and len(matrix) > 1


def least_norm(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Least-squares solutions of least norm.

    Parameters
    ----------
    matrix : Tensor, shape (batch, k, k)
    rhs : Tensor, shape (batch, k, columns)
    """
    if matrix.device.type == "cpu":
        pairs = zip(matrix, rhs, strict=True)
        with _openblas().limit(limits=1 if matrix.shape[1] < MANY_THREADS else None):
            return torch.stack([_complete_orthogonal(m, v) for m, v in pairs])
    return torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE) @ rhs


@cache
def _openblas() -> ThreadpoolController:
    """SciPy's BLAS: its waiting threads and those of torch's would keep each other from working."""
    return ThreadpoolController().select(internal_api="openblas")


def _complete_orthogonal(matrix: Tensor, rhs: Tensor) -> Tensor:
    """By QR with column pivoting, then QR of what is left: a tenth of the cost of an SVD.

    SciPy's, because torch's ``lstsq(driver="gelsy")`` hands LAPACK the pivots of the element before
    (https://github.com/pytorch/pytorch/issues/187411).
    """
    if not bool(torch.isfinite(matrix).all() & torch.isfinite(rhs).all()):
        return torch.full_like(rhs, torch.nan)
    found = scipy.linalg.lstsq(
        matrix.numpy(), rhs.numpy(), RANK_TOLERANCE, check_finite=False, lapack_driver="gelsy"
    )
    return torch.from_numpy(found[0])
