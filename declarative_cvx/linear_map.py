"""A fixed sparse matrix applied to batches of vectors, differentiable any number of times."""

from __future__ import annotations

import warnings
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from declarative_cvx.sparsity import columns
from declarative_cvx.transforms import apply_function, outside_transforms


class SparseMap:
    """The linear map x -> M x of a fixed sparse matrix M, on any device.

    Parameters
    ----------
    matrix : scipy sparse array, shape (rows, cols)
        The last column, that of the constants, may be used by many rows.
    """

    def __init__(self, matrix: sp.sparray) -> None:
        self.matrix = sp.csr_array(matrix)
        self.matrix.sum_duplicates()
        self.matrix.eliminate_zeros()
        self.shape: tuple[int, int] = self.matrix.shape
        self._tensors: dict[tuple[torch.device, bool], tuple[Tensor, ...]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """M x for x of shape (batch, cols), float64; the result has shape (batch, rows)."""
        return apply_function(_Apply, x, self, False)

    def transposed(self, x: Tensor) -> Tensor:
        """M'x for x of shape (batch, rows); the result has shape (batch, cols)."""
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

    def apply(self, x: Tensor, transpose: bool) -> Tensor:
        """M x or M'x, not differentiable."""
        if not self.shape[0]:  # no rows: nothing to copy
            return x.new_zeros((len(x), self.shape[1] if transpose else 0))
        tensors = self.tensors(x.device, transpose)
        if not self.is_selection:
            return (tensors[0] @ x.T.contiguous()).T
        index, factor, rows, weights = tensors
        out = columns(x, index) * factor
        if transpose and len(rows):
            out[:, -1] = columns(x, rows) @ weights
        return out

    @cached_property
    def is_selection(self) -> bool:
        """Whether rows copy entries of x, each copied by one row at most, or are constants."""
        uses = np.bincount(self.matrix.indices, minlength=self.shape[1])[:-1]
        return bool((np.diff(self.matrix.indptr) <= 1).all() and (uses <= 1).all())

    def tensors(self, device: torch.device, transpose: bool) -> tuple[Tensor, ...]:
        """What `apply` needs, built once per device."""
        key = (device, transpose)
        if key not in self._tensors:
            with outside_transforms():
                self._tensors[key] = self._build(device, transpose)
        return self._tensors[key]

    def _build(self, device: torch.device, transpose: bool) -> tuple[Tensor, ...]:
        if not self.is_selection:
            return (_csr(self.matrix.T if transpose else self.matrix, device),)
        return tuple(torch.as_tensor(v, device=device) for v in self._selection(transpose))

    def _selection(self, transpose: bool) -> tuple[np.ndarray, ...]:
        """Places and factors of what is copied, then rows and factors of the constants."""
        matrix = sp.coo_array(self.matrix)
        rows, cols, values = matrix.row, matrix.col, matrix.data
        constant = cols == self.shape[1] - 1
        taken = ~constant if transpose else np.ones_like(constant)
        target, source = (cols, rows) if transpose else (rows, cols)
        size = self.shape[1] if transpose else self.shape[0]
        index, factor = np.zeros(size, dtype=np.int64), np.zeros(size)
        index[target[taken]], factor[target[taken]] = source[taken], values[taken]
        return index, factor, rows[constant].astype(np.int64), values[constant]

    def __getstate__(self) -> dict:
        return {"matrix": self.matrix, "shape": self.shape, "_tensors": {}}


def _csr(matrix: sp.sparray, device: torch.device) -> Tensor:
    matrix = sp.csr_array(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "CSR tensors are in beta", at every first use
        return torch.sparse_csr_tensor(
            torch.as_tensor(matrix.indptr, dtype=torch.int64, device=device),
            torch.as_tensor(matrix.indices, dtype=torch.int64, device=device),
            torch.as_tensor(matrix.data, dtype=torch.float64, device=device),
            size=matrix.shape,
            device=device,
            check_invariants=False,
        )


class _Apply(torch.autograd.Function):
    """M x or M'x; the derivative of the one is the other."""

    @staticmethod
    def forward(x: Tensor, sparse_map: SparseMap, transpose: bool) -> Tensor:
        return sparse_map.apply(x, transpose)

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
        rows = x.movedim(in_dims[0], 0)  # (vmapped, batch, cols)
        flat = apply_function(_Apply, rows.flatten(0, 1), sparse_map, transpose)
        return flat.unflatten(0, rows.shape[:2]), 0
