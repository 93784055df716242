"""The linear systems of large, sparse programs: one sparse factorisation for each element.

The factorisations run on the CPU (SuperLU); tensors may be anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

from declarative_cvx.cones import ConeDerivative
from declarative_cvx.program import ConeProgram
from declarative_cvx.sparsity import Sparsity

# Multiple of the identity, relative to the largest entry, that is added to J, and corrections of
# the solutions for it. With it J is regular: DΠ is symmetric with eigenvalues between 0 and 1, so
# that (J + r I)(u, v) = 0 implies u'P u + r |u|^2 + v'(I - DΠ)(DΠ + r I)v = 0. SuperLU must not be
# given singular matrices: it goes on, and writes where it should not
# (https://github.com/xiaoyeli/superlu/issues/46).
PROXIMAL = 1e-12
PROXIMAL_CORRECTIONS = 3
# Tikhonov parameter r, relative to the largest entry, and number of corrections of a least-squares
# solution: an error along the singular value s shrinks by r^2 / (s^2 + r^2) each time.
REGULARISATION = 1e-6
CORRECTIONS = 20
# Corrections stop once they are this small relative to the solution.
SETTLED = 1e-15
# Error of a known solution, found again, from which on a matrix may be singular but for rounding.
DOUBTFUL = 1e-4


def sparse_solve(
    program: ConeProgram, projection: ConeDerivative, transpose: bool, rhs: Tensor
) -> tuple[Tensor, Tensor]:
    """Solutions of J w = v (or J'w = v) by sparse LU; where there are many, a short one.

    Parameters
    ----------
    program : ConeProgram
    projection : ConeDerivative
    transpose : bool
    rhs : Tensor, shape (batch, n + m, columns)

    Returns
    -------
    solution : Tensor, shape (batch, n + m, columns)
        Not one where the system has none.
    doubtful : Tensor of bool, shape (batch,)
        Where a matrix may be singular but for rounding.
    """
    known = np.random.default_rng(0).uniform(0.5, 1.5, (rhs.shape[1], 1))

    def solve(matrix: sp.csc_array, v: np.ndarray) -> np.ndarray:
        factors = _factor(_shifted(matrix))
        if factors is None:
            return np.full((len(v), v.shape[1] + 1), np.nan)
        wanted = np.concatenate([v, matrix @ known], 1)
        w = factors.solve(wanted)
        for _ in range(PROXIMAL_CORRECTIONS):
            w += factors.solve(wanted - matrix @ w)
        return w

    found = _each(solve, program, projection, transpose, rhs)
    again = torch.as_tensor(known[:, 0], device=rhs.device)
    doubtful = ~((found[:, :, -1] - again).abs().amax(1) < DOUBTFUL)
    return found[:, :, :-1], doubtful


def sparse_least_norm(
    program: ConeProgram, projection: ConeDerivative, transpose: bool, rhs: Tensor
) -> Tensor:
    """Least-squares solutions of least norm; same shapes as `sparse_solve`."""
    return _each(_least_norm, program, projection, transpose, rhs)


def _least_norm(matrix: sp.csc_array, v: np.ndarray) -> np.ndarray:
    """Tikhonov's solution, corrected until it is that without regularisation.

    The corrections stay in the range of the transposed matrix, so the limit has least norm.
    """
    size = matrix.shape[0]
    delta = (REGULARISATION * abs(matrix).max()) ** 2
    eye = sp.eye_array(size, format="csc")
    factors = _factor(sp.block_array([[eye, matrix], [matrix.T, -delta * eye]], format="csc"))
    if factors is None:
        return np.full_like(v, np.nan)
    w = np.zeros_like(v)
    for _ in range(CORRECTIONS):
        error = np.concatenate([v - matrix @ w, np.zeros_like(v)])
        step = factors.solve(error)[size:]
        w += step
        if np.abs(step).max() <= SETTLED * np.abs(w).max():
            break
    return w


def _shifted(matrix: sp.csc_array) -> sp.csc_array:
    shift = PROXIMAL * abs(matrix).max()
    return sp.csc_array(matrix + shift * sp.eye_array(matrix.shape[0], format="csc"))


def _factor(matrix: sp.csc_array) -> SuperLU | None:
    if not np.isfinite(matrix.data).all():
        return None
    try:
        return splu(matrix)
    except RuntimeError:  # singular for rounding
        return None


def _each(
    method: Callable[[sp.csc_array, np.ndarray], np.ndarray],
    program: ConeProgram,
    projection: ConeDerivative,
    transpose: bool,
    rhs: Tensor,
) -> Tensor:
    matrices = _matrices(program, projection)
    values = rhs.detach().cpu().numpy()
    out = [
        method(sp.csc_array(matrix.T) if transpose else matrix, v)
        for matrix, v in zip(matrices, values, strict=True)
    ]
    return torch.as_tensor(np.stack(out), dtype=rhs.dtype, device=rhs.device)


def _matrices(program: ConeProgram, projection: ConeDerivative) -> Iterator[sp.csc_array]:
    """J of every element."""
    structure = program.structure
    P, A = (v.detach().cpu().numpy() for v in (program.P, program.A))
    diagonal = projection.diagonal.detach().cpu().numpy()
    blocks = [(i.cpu().numpy(), b.detach().cpu().numpy()) for i, b in projection.blocks]
    eye = sp.eye_array(structure.rows, format="csr")
    for i in range(len(diagonal)):
        P_i = _matrix(P[0 if len(P) == 1 else i], structure.P)
        A_i = _matrix(A[0 if len(A) == 1 else i], structure.A)
        D_i = _projection(diagonal[i], [(index, block[i]) for index, block in blocks])
        yield sp.block_array([[P_i, A_i.T @ (D_i - eye)], [A_i, D_i]], format="csc")


def _matrix(values: np.ndarray, sparsity: Sparsity) -> sp.csr_array:
    return sp.csr_array((values, (sparsity.rows, sparsity.cols)), shape=sparsity.shape)


def _projection(diagonal: np.ndarray, blocks: list[tuple[np.ndarray, np.ndarray]]) -> sp.csr_array:
    """DΠ of one element from its diagonal and its blocks (cones, dim, dim)."""
    size = diagonal.size
    total = sp.csr_array(sp.diags_array(diagonal))
    for index, block in blocks:
        rows = np.broadcast_to(index[:, :, None], block.shape).ravel()
        cols = np.broadcast_to(index[:, None, :], block.shape).ravel()
        total = total + sp.csr_array((block.ravel(), (rows, cols)), shape=(size, size))
    return total
