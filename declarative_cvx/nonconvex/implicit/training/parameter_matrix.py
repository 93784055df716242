"""The parameters of an implicit model, as one matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError

# The blocks that together make up a rectangle of the matrix.
REGIONS = ("A", "B", "C", "D", "AB", "CD", "AC", "BD", "ABCD")


@dataclass(frozen=True, eq=False)
class ParameterMatrix:
    """(A B b; C D c), the matrix M of IDL Sec. 6 with a column of biases.

    Attributes
    ----------
    matrix : Tensor, shape (n + q, n + p) or, with biases, (n + q, n + p + 1)
    states : int
        n
    inputs : int
        p
    """

    matrix: Tensor
    states: int
    inputs: int

    @classmethod
    def of(
        cls,
        A: Tensor,  # (n, n)
        B: Tensor,  # (n, p)
        C: Tensor,  # (q, n)
        D: Tensor,  # (q, p)
        b: Tensor | None = None,  # (n,)
        c: Tensor | None = None,  # (q,)
    ) -> ParameterMatrix:
        """From its blocks; one missing bias of two is zero."""
        matrix = torch.cat([torch.cat([A, B], 1), torch.cat([C, D], 1)])
        if b is not None or c is not None:
            top = A.new_zeros(len(A)) if b is None else b
            bottom = A.new_zeros(len(C)) if c is None else c
            matrix = torch.cat([matrix, torch.cat([top, bottom])[:, None]], 1)
        return cls(matrix, len(A), B.shape[1])

    @property
    def bias(self) -> bool:
        return self.matrix.shape[1] > self.states + self.inputs

    @property
    def outputs(self) -> int:
        return len(self.matrix) - self.states

    @property
    def A(self) -> Tensor:
        return self.block("A")

    @property
    def B(self) -> Tensor:
        return self.block("B")

    @property
    def C(self) -> Tensor:
        return self.block("C")

    @property
    def D(self) -> Tensor:
        return self.block("D")

    @property
    def b(self) -> Tensor | None:
        return self.matrix[: self.states, -1] if self.bias else None

    @property
    def c(self) -> Tensor | None:
        return self.matrix[self.states :, -1] if self.bias else None

    @property
    def top(self) -> Tensor:
        """(A, B, b)"""
        return self.matrix[: self.states]

    @property
    def bottom(self) -> Tensor:
        """(C, D, c)"""
        return self.matrix[self.states :]

    def block(self, on: str) -> Tensor:
        """A view of a region, such as "A" or "CD"."""
        return self.matrix[region(on, self)]

    def with_top(self, top: Tensor) -> ParameterMatrix:
        return replace(self, matrix=torch.cat([top, self.bottom]))

    def with_bottom(self, bottom: Tensor) -> ParameterMatrix:
        return replace(self, matrix=torch.cat([self.top, bottom]))

    def with_matrix(self, matrix: Tensor) -> ParameterMatrix:
        return replace(self, matrix=matrix)

    def regressors(self, x: Tensor, u: Tensor) -> Tensor:
        """(x, u, 1): what the matrix is multiplied by, shape (batch, columns)."""
        columns = [x, u, x.new_ones(len(x), 1)] if self.bias else [x, u]
        return torch.cat(columns, 1)

    def outputs_of(self, x: Tensor, u: Tensor) -> Tensor:
        """X C' + u D' + c"""
        return self.regressors(x, u) @ self.bottom.T

    def offsets(self, u: Tensor) -> Tensor:
        """U B' + b"""
        return _affine(u, self.B, self.b)

    def output_offsets(self, u: Tensor) -> Tensor:
        """U D' + c"""
        return _affine(u, self.D, self.c)


def region(on: str, weights: ParameterMatrix) -> tuple[slice, slice]:
    """Rows and columns of a region."""
    n, p = weights.states, weights.inputs
    rows = slice(0 if set(on) & set("AB") else n, None if set(on) & set("CD") else n)
    columns = slice(0 if set(on) & set("AC") else n, n + p if set(on) & set("BD") else n)
    return rows, columns


def check_region(on: str) -> None:
    """Refuse what is not a rectangle of blocks."""
    if on not in REGIONS:
        raise SpecificationError(
            f"`on` is {on!r}; expected a rectangle of the matrix (A, B; C, D): one of "
            f"{', '.join(REGIONS)}. Use several terms for other sets of blocks."
        )


def _affine(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return u @ weight.T if bias is None else torch.addmm(bias, u, weight.T)
