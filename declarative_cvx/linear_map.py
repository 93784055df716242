"""A fixed sparse matrix applied to batches of vectors, differentiable any number of times."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from declarative_cvx.transforms import apply_function, outside_transforms


class SparseMap:
    """The linear map x -> M x of a fixed sparse matrix M, on any device.

    Parameters
    ----------
    matrix : scipy sparse array, shape (rows, cols)
    """

    def __init__(self, matrix: sp.sparray) -> None:
        self.matrix = sp.csr_array(matrix)
        self.matrix.sum_duplicates()
        self.shape: tuple[int, int] = self.matrix.shape
        self._tensors: dict[tuple[torch.device, bool], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """M @ x for x of shape (cols, batch), float64; the result has shape (rows, batch)."""
        return apply_function(_Apply, x, self, False)

    def transposed(self, x: Tensor) -> Tensor:
        """M' @ x for x of shape (rows, batch); the result has shape (cols, batch)."""
        return apply_function(_Apply, x, self, True)

    def columns(self) -> np.ndarray:
        """Which columns have any entry, bool, shape (cols,)."""
        used = np.zeros(self.shape[1], dtype=bool)
        used[self.matrix.indices] = True
        return used

    def constants(self) -> np.ndarray:
        """Values of the rows that read the last column only, NaN for the others; (rows,)."""
        out = np.full(self.shape[0], np.nan)
        first = self.matrix.indptr[:-1][np.diff(self.matrix.indptr) == 1]
        single = np.flatnonzero(np.diff(self.matrix.indptr) == 1)
        last = self.matrix.indices[first] == self.shape[1] - 1
        out[single[last]] = self.matrix.data[first[last]]
        return out

    def tensor(self, device: torch.device, transpose: bool) -> Tensor:
        """The matrix, or its transpose, as a CSR tensor (built once per device)."""
        key = (device, transpose)
        if key not in self._tensors:
            matrix = sp.csr_array(self.matrix.T) if transpose else self.matrix
            with warnings.catch_warnings(), outside_transforms():
                warnings.simplefilter("ignore")  # "CSR tensors are in beta", at every first use
                self._tensors[key] = torch.sparse_csr_tensor(
                    torch.as_tensor(matrix.indptr, dtype=torch.int64, device=device),
                    torch.as_tensor(matrix.indices, dtype=torch.int64, device=device),
                    torch.as_tensor(matrix.data, dtype=torch.float64, device=device),
                    size=matrix.shape,
                    device=device,
                    check_invariants=False,
                )
        return self._tensors[key]

    def __getstate__(self) -> dict:
        return {"matrix": self.matrix, "shape": self.shape, "_tensors": {}}


class _Apply(torch.autograd.Function):
    """M x or M'x; the derivative of the one is the other."""

    @staticmethod
    def forward(x: Tensor, sparse_map: SparseMap, transpose: bool) -> Tensor:
        matrix = sparse_map.tensor(x.device, transpose)
        return matrix @ x.contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, ctx.sparse_map, ctx.transpose = inputs

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        return apply_function(_Apply, grad, ctx.sparse_map, not ctx.transpose), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def,override]
        return apply_function(_Apply, tangent, ctx.sparse_map, ctx.transpose)

    @staticmethod
    def vmap(info, in_dims, x, sparse_map, transpose):  # type: ignore[no-untyped-def,override]
        columns = x.movedim(in_dims[0], -1)  # (cols, batch, vmapped)
        flat = apply_function(_Apply, columns.flatten(1), sparse_map, transpose)
        return flat.unflatten(1, columns.shape[1:]), 2
