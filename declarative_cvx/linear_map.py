"""A fixed affine map applied to batches of vectors, differentiable any number of times."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from declarative_cvx.sparsity import columns
from declarative_cvx.transforms import apply_function, outside_transforms

# Maps that copy so many grids of entries do it grid by grid, others entry by entry.
MOST_GRIDS = 16


class AffineMap:
    """The map x -> M x + k of a fixed sparse matrix M and a vector k, on any device.

    Parameters
    ----------
    matrix : scipy sparse array, shape (rows, cols + 1)
        (M, k).
    """

    def __init__(self, matrix: sp.sparray) -> None:
        matrix = sp.csr_array(matrix)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        self.whole = matrix
        self.matrix = sp.csr_array(matrix[:, :-1])
        self.constant = matrix[:, [-1]].toarray()[:, 0]
        self.shape: tuple[int, int] = self.matrix.shape
        self._tensors: dict[tuple[torch.device, str], tuple[Tensor, ...]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """M x + k for x of shape (batch, cols), float64; the result has shape (batch, rows).

        A map that does not depend on x has one row for the whole batch.
        """
        if not self.matrix.nnz:
            return self._on(x.device, "constant")[0]
        return apply_function(_Apply, x, self, "affine")

    def transposed(self, x: Tensor) -> Tensor:
        """M'x for x of shape (batch, rows); the result has shape (batch, cols)."""
        return apply_function(_Apply, x, self, "transposed")

    def columns(self) -> np.ndarray:
        """Which entries of x count, bool, shape (cols,)."""
        used = np.zeros(self.shape[1], dtype=bool)
        used[self.matrix.indices] = True
        return used

    def constants(self) -> np.ndarray:
        """Values of the entries that do not depend on x, NaN for the others; (rows,)."""
        fixed = (np.diff(self.matrix.indptr) == 0) & (self.constant != 0)
        return np.where(fixed, self.constant, np.nan)

    def apply(self, x: Tensor, kind: str) -> Tensor:
        """M x + k ("affine"), M x ("linear") or M'x ("transposed"), not differentiable."""
        if self.grids is not None:
            return self._copy(x, self.grids, kind)
        if not self.shape[0]:  # no rows: nothing to copy
            return x.new_zeros((len(x), self.shape[1] if kind == "transposed" else 0))
        if self.is_selection:
            index, factor = self._on(x.device, "to" if kind == "transposed" else "from")
            out = columns(x, index) * factor
        else:
            (matrix,) = self._on(x.device, "adjoint" if kind == "transposed" else "matrix")
            out = (matrix @ x.T.contiguous()).T
        return out + self._on(x.device, "constant")[0] if kind == "affine" else out

    @cached_property
    def is_selection(self) -> bool:
        """Whether entries are copies of entries of x, each copied once at most, or constant."""
        uses = np.bincount(self.matrix.indices, minlength=self.shape[1])
        return bool((np.diff(self.whole.indptr) <= 1).all() and (uses <= 1).all())

    @cached_property
    def grids(self) -> list[_Grid] | None:
        """The map as grids of copied or constant entries; None if they are too many."""
        if not self.is_selection or not self.shape[0]:
            return None
        source, factor = np.arange(self.shape[0]), self.constant.copy()
        taken = np.flatnonzero(np.diff(self.matrix.indptr))
        source[taken], factor[taken] = self.matrix.indices, self.matrix.data
        copied = np.zeros(self.shape[0], dtype=bool)
        copied[taken] = True
        return _grids(source, factor, copied)

    def _copy(self, x: Tensor, grids: list[_Grid], kind: str) -> Tensor:
        rows, cols = self.shape
        if kind == "transposed":
            out = (x.new_empty if self.matrix.nnz == cols else x.new_zeros)((len(x), cols))
            for grid in grids:
                if grid.copied:
                    _scale(grid.of(x, True), grid.factor, grid.of(out, False))
            return out
        out = x.new_empty((len(x), rows))
        for grid in grids:
            if grid.copied:
                _scale(grid.of(x, False), grid.factor, grid.of(out, True))
            else:
                grid.of(out, True).fill_(grid.factor if kind == "affine" else 0.0)
        return out

    def _on(self, device: torch.device, name: str) -> tuple[Tensor, ...]:
        """What a kind of product needs, built once per device."""
        key = (device, name)
        if key not in self._tensors:
            with outside_transforms():
                self._tensors[key] = self._build(device, name)
        return self._tensors[key]

    def _build(self, device: torch.device, name: str) -> tuple[Tensor, ...]:
        if name == "constant":
            return (torch.as_tensor(self.constant[None], device=device),)
        if name in ("matrix", "adjoint"):
            return (_csr(self.matrix if name == "matrix" else self.matrix.T, device),)
        matrix = sp.coo_array(self.matrix)
        target, source, size = matrix.row, matrix.col, self.shape[0]
        if name == "to":
            target, source, size = source, target, self.shape[1]
        index, factor = np.zeros(size, dtype=np.int64), np.zeros(size)
        index[target], factor[target] = source, matrix.data
        return torch.as_tensor(index, device=device), torch.as_tensor(factor, device=device)

    def __getstate__(self) -> dict:
        kept = ("whole", "matrix", "constant", "shape")
        return {name: self.__dict__[name] for name in kept} | {"_tensors": {}}


class _Grid(NamedTuple):
    """Lines of successive entries, in regular distances in the result and in x.

    `factor` is what copied entries are multiplied by, and the value of constant ones.
    """

    copied: bool
    factor: float
    lines: int
    width: int
    target: int
    target_stride: int
    source: int
    source_stride: int

    def of(self, v: Tensor, target: bool) -> Tensor:
        """The entries of a result, or of x, as a view, shape (batch, lines, width)."""
        first, stride = (
            (self.target, self.target_stride) if target else (self.source, self.source_stride)
        )
        batch, step = v.stride()
        return v.as_strided(
            (len(v), self.lines, self.width),
            (batch, stride * step, step),
            v.storage_offset() + first * step,
        )


def _scale(source: Tensor, factor: float, out: Tensor) -> None:
    if factor == 1.0:
        out.copy_(source)
    else:
        torch.mul(source, factor, out=out)


def _grids(source: np.ndarray, factor: np.ndarray, copied: np.ndarray) -> list[_Grid] | None:
    """All entries of a result, given where each is read and how, as few grids."""
    follows = (np.diff(source) == 1) & (np.diff(factor) == 0) & (copied[1:] == copied[:-1])
    target = np.flatnonzero(np.append(True, ~follows))  # where lines begin
    width = np.diff(np.append(target, source.size))
    kinds = (copied[target], factor[target], width)
    order = np.lexsort((target, *kinds))
    target, width = target[order], width[order]
    alike = np.all([kind[order][1:] == kind[order][:-1] for kind in kinds], axis=0)
    steps = np.stack([np.diff(target), np.diff(source[target])])
    alike &= steps[1] > 0  # torch has no views that go backwards
    grids: list[_Grid] = []
    start = 0
    while start < target.size:
        if len(grids) == MOST_GRIDS:
            return None
        count, strides = 1, np.ones(2, dtype=np.int64)
        if start < alike.size and alike[start]:
            strides = steps[:, start]
            regular = alike[start:] & (steps[:, start:] == strides[:, None]).all(0)
            count += int(np.argmin(np.append(regular, False)))
        first = target[start]
        lines = (count, width[start], first, strides[0], source[first], strides[1])
        grids.append(_Grid(bool(copied[first]), float(factor[first]), *map(int, lines)))
        start += count
    return grids


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
    """M x + k, M x or M'x; the derivative of the last two is the other."""

    @staticmethod
    def forward(x: Tensor, affine_map: AffineMap, kind: str) -> Tensor:
        return affine_map.apply(x, kind)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, ctx.affine_map, ctx.kind = inputs

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        kind = "linear" if ctx.kind == "transposed" else "transposed"
        return apply_function(_Apply, grad, ctx.affine_map, kind), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def,override]
        kind = "transposed" if ctx.kind == "transposed" else "linear"
        return apply_function(_Apply, tangent, ctx.affine_map, kind)

    @staticmethod
    def vmap(info, in_dims, x, affine_map, kind):  # type: ignore[no-untyped-def,override]
        rows = x.movedim(in_dims[0], 0)  # (vmapped, batch, cols)
        flat = apply_function(_Apply, rows.flatten(0, 1), affine_map, kind)
        return flat.unflatten(0, rows.shape[:2]), 0
