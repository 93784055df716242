"""Tensors that belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Record:
    """Tensors that belong together, the batch the first dimension of each.

    What is neither a tensor nor a record is the same for all elements.
    """

    def select(self, index: Tensor) -> Self:
        """The elements named by an index tensor."""
        return self._map(lambda value: value[index])

    def put(self, index: Tensor, part: Self) -> Self:
        """This record with the elements named by an index tensor taken from another one."""
        return self._map(lambda value, new: value.index_copy(0, index, new), part)

    def where(self, mask: Tensor, other: Self) -> Self:
        """This record where mask, of shape (batch,), holds; the other one elsewhere."""
        if mask.device.type == "cpu" and bool(mask.all()):
            return self

        def choose(mine: Tensor, others: Tensor) -> Tensor:
            if mine is others:
                return mine
            return torch.where(mask.view(-1, *[1] * (mine.dim() - 1)), mine, others)

        return self._map(choose, other)

    def joined(self, others: Sequence[Self]) -> Self:
        """This record's elements, then those of others."""
        return self._map(lambda *values: torch.cat(values), *others)

    def _map(self, function: Callable[..., Tensor], *others: Self) -> Self:
        """Apply a function field by field, also to the records among the fields."""
        found: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), [getattr(other, name) for other in others]
            if isinstance(mine, Record):
                found[name] = mine._map(function, *theirs)
            else:
                found[name] = function(mine, *theirs) if isinstance(mine, Tensor) else mine
        return replace(self, **found)
