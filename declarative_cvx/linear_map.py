"""A fixed affine map applied to batches of vectors, differentiable any number of times."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

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

    Both x and the result come as blocks of successive entries.

    Parameters
    ----------
    matrix : scipy sparse array, shape (rows, cols + 1)
        (M, k).
    heights, widths : sequence of int
        Sizes of the blocks of the result and of x.
    """

    def __init__(self, matrix: sp.sparray, heights: Sequence[int], widths: Sequence[int]) -> None:
        matrix = sp.csr_array(matrix)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        self.whole = matrix
        self.matrix, self.constant = _split(matrix)
        self.shape: tuple[int, int] = self.matrix.shape
        self.heights, self.widths = tuple(heights), tuple(widths)
        self._tensors: dict[tuple[torch.device, str], tuple[Tensor, ...]] = {}
        self._parts: dict[tuple[tuple[int, ...], tuple[int, ...]], AffineMap] = {}

    def __call__(self, device: torch.device, *x: Tensor) -> tuple[Tensor, ...]:
        """Blocks of M x + k, each (batch, height), for those of x, each (batch, width), float64.

        A map that does not depend on x has one row for the whole batch.
        """
        if not self.matrix.nnz:
            return self._on(device, "constant")[0].split(self.heights, 1)
        if self.pieces is not None:
            return tuple(self._joined(device, pieces, x) for pieces in self.pieces)
        return apply_function(_Apply, self, "affine", *x)

    def transposed(self, *y: Tensor) -> tuple[Tensor, ...]:
        """Blocks of M'y, each (batch, width), for those of y, each (batch, height)."""
        return apply_function(_Apply, self, "transposed", *y)

    def part(self, rows: Sequence[int], cols: Sequence[int]) -> AffineMap:
        """The map from some blocks, by their numbers, to some, made once."""
        key = (tuple(rows), tuple(cols))
        if key == (tuple(range(len(self.heights))), tuple(range(len(self.widths)))):
            return self
        if key not in self._parts:
            taken = self.whole[_entries(self.heights, rows)]
            taken = taken[:, np.append(_entries(self.widths, cols), self.shape[1])]
            heights, widths = [self.heights[i] for i in rows], [self.widths[j] for j in cols]
            self._parts[key] = AffineMap(taken, heights, widths)
        return self._parts[key]

    @cached_property
    def dependence(self) -> np.ndarray:
        """Whether each block of the result depends on each block of x, bool."""
        row, col = self.matrix.nonzero()
        depends = np.zeros((len(self.heights), len(self.widths)), dtype=bool)
        depends[_owners(self.heights)[row], _owners(self.widths)[col]] = True
        return depends

    def constants(self) -> np.ndarray:
        """Values of the entries that do not depend on x, NaN for the others; (rows,)."""
        fixed = (np.diff(self.matrix.indptr) == 0) & (self.constant != 0)
        return np.where(fixed, self.constant, np.nan)

    def apply(self, x: Sequence[Tensor], kind: str) -> tuple[Tensor, ...]:
        """M x + k ("affine"), M x ("linear") or M'x ("transposed"), not differentiable."""
        if self.grids is not None:
            return self._copy(x, self.grids, kind)
        joined = x[0] if len(x) == 1 else torch.cat([*x], 1)
        out = self._product(joined, kind)
        return out.split(self.widths if kind == "transposed" else self.heights, 1)

    def _product(self, x: Tensor, kind: str) -> Tensor:
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
        origin = np.full(self.shape[0], -1)  # block of x
        origin[taken] = _owners(self.widths)[self.matrix.indices]
        return _grids(source, factor, origin, self.heights, self.widths)

    @cached_property
    def pieces(self) -> list[list[_Grid]] | None:
        """For each block of the result the lines that follow each other in it.

        None if entries are copied in another way than line by line.
        """
        if self.grids is None or any(grid.lines > 1 for grid in self.grids):
            return None
        lines = sorted(self.grids, key=lambda grid: grid.target)
        return [[g for g in lines if g.row_block == block] for block in range(len(self.heights))]

    def _joined(self, device: torch.device, pieces: list[_Grid], x: Sequence[Tensor]) -> Tensor:
        """A block of M x + k, put together from its lines."""
        if not pieces:
            return x[0].new_zeros((x[0].shape[0], 0))
        found = [self._line(device, piece, x) for piece in pieces]
        return found[0].clone() if len(found) == 1 else torch.cat(found, 1)

    def _line(self, device: torch.device, piece: _Grid, x: Sequence[Tensor]) -> Tensor:
        if piece.block < 0:
            first = sum(self.heights[: piece.row_block]) + piece.target
            (constant,) = self._on(device, "constant")
            return constant.narrow(1, first, piece.width).expand(x[0].shape[0], -1)
        whole = x[piece.block]
        v = whole if piece.width == whole.shape[1] else whole.narrow(1, piece.source, piece.width)
        return v if piece.factor == 1.0 else v * piece.factor

    def _copy(self, x: Sequence[Tensor], grids: list[_Grid], kind: str) -> tuple[Tensor, ...]:
        batch = x[0].shape[0]
        if kind == "transposed":
            is_full = self.matrix.nnz == self.shape[1]
            new = x[0].new_empty if is_full else x[0].new_zeros
            out = [new((batch, width)) for width in self.widths]
            for grid in grids:
                if grid.block >= 0:
                    _scale(grid.read(x), grid.factor, grid.source_of(out))
            return tuple(out)
        out = [x[0].new_empty((batch, height)) for height in self.heights]
        for grid in grids:
            if grid.block >= 0:
                _scale(grid.source_of(x), grid.factor, grid.read(out))
            else:
                grid.read(out).fill_(grid.factor if kind == "affine" else 0.0)
        return tuple(out)

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
        kept = ("whole", "matrix", "constant", "shape", "heights", "widths")
        return {name: self.__dict__[name] for name in kept} | {"_tensors": {}, "_parts": {}}


def _split(whole: sp.csr_array) -> tuple[sp.csr_array, np.ndarray]:
    """A matrix without its last column, and this one."""
    rows, cols = whole.shape
    last = whole.indices == cols - 1
    before = np.append(0, np.cumsum(last))[whole.indptr]  # entries of the last column
    constant = np.zeros(rows)
    constant[np.diff(before) > 0] = whole.data[last]
    parts = (whole.data[~last], whole.indices[~last], whole.indptr - before)
    return sp.csr_array(parts, shape=(rows, cols - 1)), constant


def _owners(sizes: Sequence[int]) -> np.ndarray:
    """The block of every entry, from the sizes of the blocks."""
    return np.repeat(np.arange(len(sizes)), sizes)


def _entries(sizes: Sequence[int], blocks: Sequence[int]) -> np.ndarray:
    """The entries of some blocks."""
    ends = np.cumsum(sizes)
    return np.concatenate(
        [np.zeros(0, dtype=int), *(np.arange(ends[i] - sizes[i], ends[i]) for i in blocks)]
    )


class _Grid(NamedTuple):
    """Lines of successive entries, in regular distances in the result and in x.

    `factor` is what copied entries are multiplied by, and the value of constant ones, whose block
    of x is -1. First entries are counted from the beginnings of the blocks.
    """

    factor: float
    lines: int
    width: int
    row_block: int
    target: int
    target_stride: int
    block: int
    source: int
    source_stride: int

    def read(self, blocks: Sequence[Tensor]) -> Tensor:
        """The entries of a result as a view, shape (batch, lines, width)."""
        return self._view(blocks[self.row_block], self.target, self.target_stride)

    def source_of(self, blocks: Sequence[Tensor]) -> Tensor:
        """Likewise those of x."""
        return self._view(blocks[self.block], self.source, self.source_stride)

    def _view(self, v: Tensor, first: int, stride: int) -> Tensor:
        batch, step = v.stride()
        return v.as_strided(
            (v.shape[0], self.lines, self.width),
            (batch, stride * step, step),
            v.storage_offset() + first * step,
        )


def _scale(source: Tensor, factor: float, out: Tensor) -> None:
    if factor == 1.0:
        out.copy_(source)
    else:
        torch.mul(source, factor, out=out)


def _grids(
    source: np.ndarray,
    factor: np.ndarray,
    origin: np.ndarray,
    heights: Sequence[int],
    widths: Sequence[int],
) -> list[_Grid] | None:
    """All entries of a result, given where each is read and how, as few grids."""
    owner = _owners(heights)
    kinds: list[np.ndarray] = [owner, origin, factor]
    follows = np.diff(source) == 1
    for kind in kinds:
        follows &= np.diff(kind) == 0
    target = np.flatnonzero(np.append(True, ~follows))  # where lines begin
    width = np.diff(np.append(target, source.size))
    kinds = [*(kind[target] for kind in kinds), width]
    order = np.lexsort((target, *kinds))
    target, width = target[order], width[order]
    alike = np.all([kind[order][1:] == kind[order][:-1] for kind in kinds], axis=0)
    steps = np.stack([np.diff(target), np.diff(source[target])])
    alike &= steps[1] > 0  # torch has no views that go backwards
    starts = [np.cumsum(sizes) - sizes for sizes in (heights, [*widths, 0])]
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
        row, col = owner[first], origin[first]
        read = (row, first - starts[0][row], strides[0])
        came = (col, source[first] - starts[1][col], strides[1])
        grids.append(_Grid(float(factor[first]), *map(int, (count, width[start], *read, *came))))
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
    def forward(affine_map: AffineMap, kind: str, *x: Tensor) -> tuple[Tensor, ...]:
        return affine_map.apply(x, kind)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.affine_map, ctx.kind = inputs[:2]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def,override]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        there = [i for i, grad in enumerate(grads) if grad is not None]
        if not there:
            return (None,) * len(ctx.needs_input_grad)
        found = iter(_between(ctx, there, wanted, [grads[i] for i in there], transpose=True))
        return None, None, *(next(found) if i in wanted else None for i in _numbers(ctx, True))

    @staticmethod
    def jvp(ctx, *tangents):  # type: ignore[no-untyped-def,override]
        there = [i for i, tangent in enumerate(tangents[2:]) if tangent is not None]
        given = [tangents[2 + i] for i in there]
        return _between(ctx, there, list(_numbers(ctx, False)), given, transpose=False)

    @staticmethod
    def vmap(info, in_dims, affine_map, kind, *x):  # type: ignore[no-untyped-def,override]
        rows = [
            v.expand(info.batch_size, *v.shape) if dim is None else v.movedim(dim, 0)
            for v, dim in zip(x, in_dims[2:], strict=True)
        ]  # (vmapped, batch, cols)
        flat = apply_function(_Apply, affine_map, kind, *(v.flatten(0, 1) for v in rows))
        shape = rows[0].shape[:2]
        return tuple(v.unflatten(0, shape) for v in flat), (0,) * len(flat)


def _numbers(ctx: Any, inputs: bool) -> range:
    """Numbers of the blocks that a node in the graph takes, or returns."""
    sizes = (ctx.affine_map.heights, ctx.affine_map.widths)
    return range(len(sizes[inputs != (ctx.kind == "transposed")]))


def _between(
    ctx: Any, there: list[int], wanted: list[int], values: list[Tensor], transpose: bool
) -> tuple[Tensor, ...]:
    """The linear map of a node, or its adjoint, between some blocks only."""
    forwards = transpose == (ctx.kind == "transposed")
    part = ctx.affine_map.part(*((wanted, there) if forwards else (there, wanted)))
    return apply_function(_Apply, part, "linear" if forwards else "transposed", *values)
