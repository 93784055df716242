"""Quadratic objectives for solvers that take linear ones only.

With P = F'F the objective 1/2 x'P x + q'x becomes t + q'x with the second-order cone constraint
(t + 1, t - 1, sqrt(2) F x), that is 1/2 ||F x||^2 <= t. The other rows keep their duals, so the
solution (x, y, s) of the quadratic program is read off directly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import scipy.sparse as sp

from declarative_cvx.host import Element

# Eigenvalues of P below this multiple of the largest are rounding, not curvature.
RANK_TOLERANCE = 1e-14


@dataclass(frozen=True)
class Epigraph:
    """A quadratic program, its linear form, and how to go between their solutions.

    Attributes
    ----------
    element : Element
        The linear form: variables (x, t), the new cone after the other second-order cones.
    factor : csr_matrix, shape (rank, n)
        F with F'F = P.
    at : int
        First row of the new cone.
    """

    element: Element
    factor: sp.csr_matrix
    at: int

    @classmethod
    def of(cls, element: Element) -> Epigraph:
        """Rewrite a program with a quadratic objective."""
        factor = _factor(element.P)
        at = element.cone.slice_of("soc").stop
        rank, n = factor.shape
        t = sp.csc_matrix(([-1.0, -1.0], ([0, 1], [0, 0])), shape=(rank + 2, 1))
        x = sp.vstack([sp.csc_matrix((2, n)), -np.sqrt(2.0) * factor])
        A = sp.vstack(
            [
                sp.hstack([element.A[:at], sp.csc_matrix((at, 1))]),
                sp.hstack([x, t]),
                sp.hstack([element.A[at:], sp.csc_matrix((element.A.shape[0] - at, 1))]),
            ],
            format="csc",
        )
        linear = Element(
            P=sp.csc_matrix((n + 1, n + 1)),
            q=np.append(element.q, 1.0),
            A=sp.csc_matrix(A),
            b=np.insert(element.b, at, [1.0, -1.0] + [0.0] * rank),
            cone=replace(element.cone, soc=(*element.cone.soc, rank + 2)),
        )
        return cls(linear, sp.csr_matrix(factor), at)

    def extend(
        self, x: np.ndarray, y: np.ndarray, s: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A solution of the quadratic program as one of the linear form."""
        Fx = self.factor @ x
        t = Fx @ Fx / 2
        new_s = np.concatenate([[t + 1, t - 1], np.sqrt(2.0) * Fx])
        new_y = new_s * np.where(np.arange(new_s.size) == 0, 0.5, -0.5)
        return np.append(x, t), np.insert(y, self.at, new_y), np.insert(s, self.at, new_s)

    def drop_rows(self, v: np.ndarray) -> np.ndarray:
        """A vector over the rows of the linear form without the new cone."""
        return np.delete(v, np.s_[self.at : self.at + self.factor.shape[0] + 2])


def _factor(P: sp.csc_matrix) -> sp.csc_matrix:
    """F with F'F = P, for the upper triangle of a positive semidefinite matrix.

    Each block of variables that P couples is factorised by its eigenvalues, so that diagonal and
    block-diagonal matrices keep sparse factors.
    """
    full = sp.csr_matrix(P + sp.triu(P, k=1).T)
    count, label = sp.csgraph.connected_components(full, directed=False)
    order = np.argsort(label, kind="stable")
    blocks = np.split(order, np.searchsorted(label[order], np.arange(1, count)))
    alone = np.array([block[0] for block in blocks if block.size == 1], dtype=np.int64)
    diagonal = full.diagonal()[alone]
    alone, diagonal = alone[diagonal > 0], diagonal[diagonal > 0]
    shape = (alone.size, P.shape[0])
    pieces = [sp.coo_matrix((np.sqrt(diagonal), (np.arange(alone.size), alone)), shape=shape)]
    pieces += [_factor_block(full, block) for block in blocks if block.size > 1]
    return sp.csc_matrix(sp.vstack(pieces))


def _factor_block(full: sp.csr_matrix, block: np.ndarray) -> sp.coo_matrix:
    values, vectors = scipy.linalg.eigh(full[block][:, block].toarray())
    keep = values > RANK_TOLERANCE * max(values[-1], 0.0)
    piece = np.sqrt(values[keep])[:, None] * vectors[:, keep].T
    row, col = np.nonzero(piece)
    shape = (int(keep.sum()), full.shape[0])
    return sp.coo_matrix((piece[row, col], (row, block[col])), shape=shape)
