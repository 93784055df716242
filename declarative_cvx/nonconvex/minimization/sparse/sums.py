"""Sums of rows of a table with a row for each number and a column for each element of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from declarative_cvx.transforms import outside_transforms

Made = TypeVar("Made")


class OnDevices:
    """What is made once for every device it is needed on."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, torch.device], object] = {}

    def get(self, key: object, device: torch.device, make: Callable[[], Made]) -> Made:
        """What `make` makes for a device, remembered."""
        if (key, device) not in self._made:
            with outside_transforms(), torch.inference_mode(False), torch.no_grad():
                self._made[key, device] = make()
        return self._made[key, device]  # type: ignore[return-value]


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def summing(targets: Tensor, count: int) -> Tensor:
    """The sparse matrix that adds row i of a table to row targets[i] of the result.

    Shape (count, targets); products with it are the fastest segmented sums that torch has.
    """
    order = targets.argsort(stable=True)
    ends = torch.zeros(count + 1, dtype=torch.int64, device=targets.device)
    ends[1:] = torch.bincount(targets, minlength=count).cumsum(0)
    ones = torch.ones(len(targets), dtype=torch.float64, device=targets.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the layout is young
        return torch.sparse_csr_tensor(ends, order, ones, size=(count, len(targets)))
