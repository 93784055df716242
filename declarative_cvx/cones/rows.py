"""The rows of a product cone: polyhedral ones first, then those of other cones by kind and size.

Those groups of cones are handed around as (cones, dim) tensors of row numbers; `order` says where
each row stands when the groups follow each other, and is None if they do anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from declarative_cvx.sparsity import columns


def polyhedral(size: int, groups: Iterable[Tensor]) -> int:
    """Number of rows, out of so many, that are in no group."""
    return size - sum(index.numel() for index in groups)


def split(v: Tensor, groups: Sequence[Tensor], order: Tensor | None) -> list[Tensor]:
    """The rows of each group, shape (batch, cones dim, ...), of v of shape (batch, m, ...)."""
    if order is not None:
        return [columns(v, index.flatten()) for index in groups]
    pieces, start = [], polyhedral(v.shape[1], groups)
    for index in groups:
        pieces.append(v.narrow(1, start, index.numel()))
        start += index.numel()
    return pieces


def join(first: Tensor, pieces: Iterable[Tensor], order: Tensor | None) -> Tensor:
    """The polyhedral rows and those of each group in their places, shape (batch, m, ...)."""
    out = torch.cat([first, *pieces], 1)
    return out if order is None else columns(out, order)
