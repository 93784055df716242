"""Batches of sparse matrices with one pattern: entries, blocks, dense forms and products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.transforms import outside_transforms

# Matrices with at most this many places for each stored entry, or in all, are multiplied as dense
# ones.
DENSE_SHARE = 8
DENSE_SIZE = 4096
# Matrices with at most so many places are multiplied whole, even where blocks of them are zero.
TINY = 1024


def columns(v: Tensor, index: Tensor) -> Tensor:
    """``v[:, index]`` for v of shape (batch, entries, ...), several times faster on a CPU."""
    shape = (v.shape[0], len(index), *v.shape[2:])
    return v.gather(1, index.reshape(1, -1, *(1 for _ in v.shape[2:])).expand(shape))


def complement(numbers: np.ndarray, size: int) -> np.ndarray:
    """The numbers below `size` that are not among some, sorted."""
    left = np.ones(size, dtype=bool)
    left[numbers] = False
    return np.flatnonzero(left)


def image(matrix: Tensor, v: Tensor) -> Tensor:
    """``matrix @ v`` for matrices (batch or 1, rows, cols) and v (batch, cols).

    As products of rows, which take half the time of those of columns.
    """
    if matrix.shape[0] == 1:
        return v @ matrix[0].mT
    return torch.bmm(v.unsqueeze(1), matrix.mT).squeeze(1)


def product(matrix: Tensor, v: Tensor) -> Tensor:
    """``matrix @ v`` for matrices (batch or 1, rows, cols) and v (batch, cols, columns)."""
    if matrix.shape[0] == v.shape[0]:
        return torch.bmm(v.mT, matrix.mT).mT if v.shape[2] == 1 else torch.bmm(matrix, v)
    if matrix.shape[0] == v.shape[2] == 1:
        return (v[:, :, 0] @ matrix[0].mT)[:, :, None]
    return matrix @ v


@dataclass(frozen=True, eq=False)
class Places:
    """Some entries of a vector, by their numbers: a view of them where they follow each other."""

    numbers: np.ndarray

    @cached_property
    def _range(self) -> tuple[int, int] | None:
        """First and number of the entries; None if they do not follow each other."""
        first = int(self.numbers[0]) if self.numbers.size else 0
        in_order = np.array_equal(self.numbers, first + np.arange(self.numbers.size))
        return (first, self.numbers.size) if in_order else None

    def take(self, v: Tensor) -> Tensor:
        """The entries of v, shape (batch, entries, ...)."""
        if self._range is None:
            return columns(v, self.on(v.device))
        return v if self._range == (0, v.shape[1]) else v.narrow(1, *self._range)

    def on(self, device: torch.device) -> Tensor:
        """The numbers as a tensor."""
        cache = self.__dict__.setdefault("_tensors", {})
        if device not in cache:
            with outside_transforms():
                cache[device] = torch.as_tensor(self.numbers, device=device)
        return cache[device]

    def __getstate__(self) -> dict:
        return {"numbers": self.numbers}


@dataclass(frozen=True, eq=False)
class Block:
    """Entries of a matrix by their places among the stored values; -1 where none is stored."""

    places: np.ndarray
    length: int  # number of stored values
    takes_all: bool = False  # whether every one of them is read

    def read(self, values: Tensor) -> Tensor:
        """The entries, shape (batch, *places.shape), of values (batch, nnz).

        A view of the values where they stand in a regular grid.
        """
        if self._grid is not None:
            start, rows, stride, offset, width = self._grid
            lines = values.narrow(1, start, rows * stride)
            if (stride, offset) != (width, 0) or self.places.ndim > 1:
                lines = lines.view(values.shape[0], rows, stride)
                lines = lines if width == stride else lines.narrow(2, offset, width)
            return lines if self.places.ndim > 1 else lines.flatten(1)
        source, target = self._index(values.device)
        batch, size = values.shape[0], self.places.size
        stored = values if source is None else columns(values, source)
        if target is not None:
            index = target.expand(batch, -1)
            stored = values.new_zeros((batch, size)).scatter(1, index, stored)
        return stored.reshape(batch, *self.places.shape)

    @cached_property
    def _grid(self) -> tuple[int, int, int, int, int] | None:
        """Start of lines, their number and length, offset and width of what is read of each.

        None if the entries do not stand in such lines.
        """
        places = self.places
        if not places.size or places.min() < 0:
            return None
        if places.ndim == 1:
            together = bool((np.diff(places) == 1).all())
            places = places[None] if together else places[:, None]
        rows, width = places.shape
        stride = int(places[1, 0] - places[0, 0]) if rows > 1 else width
        regular = places[0, 0] + stride * np.arange(rows)[:, None] + np.arange(width)
        if stride < width or not np.array_equal(places, regular):
            return None
        # The last line has to end with the values: the lines may begin before the first entry.
        first = int(places[0, 0])
        start = max(0, min(first, self.length - rows * stride))
        offset = first - start
        inside = offset + width <= stride and start + rows * stride <= self.length
        return (start, rows, stride, offset, width) if inside else None

    @cached_property
    def stored(self) -> int:
        """How many of the entries are stored."""
        return int((self.places >= 0).sum())

    def _index(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Which values to take (None: all, in order), and where they go (None: one by one)."""
        cache = self.__dict__.setdefault("_cache", {})
        if device not in cache:
            flat = self.places.ravel()
            target = np.flatnonzero(flat >= 0)
            source = flat[target]
            in_order = self.takes_all and np.array_equal(source, np.arange(source.size))
            with outside_transforms():
                cache[device] = (
                    None if in_order else torch.as_tensor(source, device=device),
                    None if target.size == flat.size else torch.as_tensor(target, device=device),
                )
        return cache[device]

    def __getstate__(self) -> dict:
        return {"places": self.places, "length": self.length, "takes_all": self.takes_all}


@dataclass(frozen=True, eq=False)
class Sparsity:
    """Positions of the stored entries of a matrix.

    Those that solvers see are sorted by row, then column (CSR order).

    Attributes
    ----------
    shape : (int, int)
    rows, cols : ndarray of int64, shape (nnz,)
    """

    shape: tuple[int, int]
    rows: np.ndarray
    cols: np.ndarray

    @property
    def nnz(self) -> int:
        return len(self.rows)

    @cached_property
    def row_offsets(self) -> np.ndarray:
        """CSR row pointers, shape (rows + 1,)."""
        return np.searchsorted(self.rows, np.arange(self.shape[0] + 1))

    @cached_property
    def csc_order(self) -> np.ndarray:
        """Permutation that takes the stored entries to CSC order."""
        return np.lexsort((self.rows, self.cols))

    @cached_property
    def upper_csc_order(self) -> np.ndarray:
        """As `csc_order`, entries of the upper triangle only."""
        order = self.csc_order
        return order[self.rows[order] <= self.cols[order]]

    @cached_property
    def transposed_order(self) -> np.ndarray:
        """For a symmetric pattern: where entry (j, i) stands, for every entry (i, j)."""
        return np.lexsort((self.rows, self.cols))

    @cached_property
    def is_dense(self) -> bool:
        """Whether products are faster with dense matrices than entry by entry."""
        size = self.shape[0] * self.shape[1]
        return self.nnz > 0 and size <= max(DENSE_SIZE, DENSE_SHARE * self.nnz)

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns as tensors on a device."""
        cache = self.__dict__.setdefault("_index", {})
        if device not in cache:
            with outside_transforms():
                cache[device] = (
                    torch.as_tensor(self.rows, device=device),
                    torch.as_tensor(self.cols, device=device),
                )
        return cache[device]

    @cached_property
    def places(self) -> Places:
        """Places of the stored entries in a dense matrix, row by row."""
        return Places(self.rows * self.shape[1] + self.cols)

    def permuted(self, rows: np.ndarray, cols: np.ndarray) -> tuple[Sparsity, np.ndarray]:
        """The pattern with rows and columns in a new order, and that of the stored entries."""
        row, col = np.argsort(rows)[self.rows], np.argsort(cols)[self.cols]
        order = np.argsort(row * self.shape[1] + col, kind="stable")
        return Sparsity(self.shape, row[order], col[order]), order

    def part(self, rows: np.ndarray, cols: np.ndarray) -> tuple[Sparsity, np.ndarray]:
        """The pattern in some rows and columns, numbered anew, and which entries it consists of.

        Rows and columns are sorted.
        """
        row, col = np.full(self.shape[0], -1), np.full(self.shape[1], -1)
        row[rows], col[cols] = np.arange(rows.size), np.arange(cols.size)
        row, col = row[self.rows], col[self.cols]
        kept = np.flatnonzero((row >= 0) & (col >= 0))
        return Sparsity((rows.size, cols.size), row[kept], col[kept]), kept

    def block(self, rows: np.ndarray, cols: np.ndarray) -> Block:
        """The submatrix of these rows and columns, to be read off stored values."""
        places = np.full(self.shape, -1, dtype=np.int64)
        places[self.rows, self.cols] = np.arange(self.nnz)
        return Block(places[np.ix_(rows, cols)], self.nnz)

    @cached_property
    def whole(self) -> Block:
        """The matrix itself, to be read off stored values."""
        block = self.block(np.arange(self.shape[0]), np.arange(self.shape[1]))
        return replace(block, takes_all=True)

    def __getstate__(self) -> dict:
        return {"shape": self.shape, "rows": self.rows, "cols": self.cols}


def to_dense(values: Tensor, sparsity: Sparsity) -> Tensor:
    """Stored entries (batch, nnz) to matrices (batch, rows, cols)."""
    return sparsity.whole.read(values)


def matmul(values: Tensor, sparsity: Sparsity, v: Tensor, transpose: bool = False) -> Tensor:
    """Products of a batch of sparse matrices with several vectors each.

    Parameters
    ----------
    values : Tensor, shape (batch or 1, nnz)
    sparsity : Sparsity
    v : Tensor, shape (batch, cols, columns), or (batch, rows, columns) with `transpose`
    transpose : bool
        Multiply by the transposed matrices.

    Returns
    -------
    Tensor, shape (batch, rows, columns), or (batch, cols, columns) with `transpose`
    """
    rows, cols = sparsity.index(v.device)
    size = sparsity.shape[0]
    if transpose:
        rows, cols, size = cols, rows, sparsity.shape[1]
    if not sparsity.nnz:
        return v.new_zeros((v.shape[0], size, v.shape[2]))
    products = values[:, :, None] * columns(v, cols)
    return v.new_zeros((v.shape[0], size, v.shape[2])).index_add(1, rows, products)


def matvec(values: Tensor, sparsity: Sparsity, v: Tensor, transpose: bool = False) -> Tensor:
    """As `matmul` for one vector each: v of shape (batch, cols or rows)."""
    return matmul(values, sparsity, v[:, :, None], transpose)[:, :, 0]
