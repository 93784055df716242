"""Where the entries of CVXPY's variables stand in one flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from declarative_cvx.transforms import outside_transforms


class Layout:
    """Free entries of variables, one variable after the other, each in C order.

    A symmetric variable has its upper triangle in the vector, a diagonal one its diagonal, one
    with declared sparsity the entries that it lists. The matrix is then a gather of the vector.

    Parameters
    ----------
    variables : sequence of cvxpy.Variable

    Attributes
    ----------
    size : int
    slices : dict of int to slice
        By variable id: the variable's part of the vector.
    places : dict of int to ndarray
        By variable id: for each entry in C order its place in the vector, or `size` if the entry
        is always zero.
    """

    def __init__(self, variables: Sequence[cp.Variable]) -> None:
        self.variables = tuple(variables)
        self.size = 0
        self.slices: dict[int, slice] = {}
        self._first: dict[int, np.ndarray] = {}
        free = {}
        for variable in variables:
            entries = _free_entries(variable)
            numbers, first = np.unique(entries, return_index=True)
            self._first[variable.id] = first[numbers >= 0]
            end = self.size + self._first[variable.id].size
            self.slices[variable.id] = slice(self.size, end)
            free[variable.id] = np.where(entries < 0, -1, entries + self.size)
            self.size = end
        self.places = {key: np.where(at < 0, self.size, at) for key, at in free.items()}
        self._kept: dict[torch.device, dict[int, Tensor]] = {}

    def values(self, x: Tensor) -> dict[int, Tensor]:
        """The variables' values, each of its shape, for one vector of shape (n,)."""
        padded = torch.nn.functional.pad(x, (0, 1))
        places = self._on(x.device)
        return {v.id: padded[places[v.id]].reshape(v.shape) for v in self.variables}

    def recover(self, variable: cp.Variable, x: Tensor) -> Tensor:
        """The values of one variable, (batch, *shape), for vectors x of shape (batch, n)."""
        padded = torch.nn.functional.pad(x, (0, 1))
        return padded[:, self._on(x.device)[variable.id]].reshape(-1, *variable.shape)

    def reduce(self, variable: cp.Variable, value: Tensor) -> Tensor:
        """The free entries of one value of a variable; of unequal halves the mean."""
        if _is_symmetric(variable):
            value = (value + value.mT) / 2
        return value.reshape(-1)[torch.as_tensor(self._first[variable.id], device=value.device)]

    def _on(self, device: torch.device) -> dict[int, Tensor]:
        if device not in self._kept:
            with outside_transforms():
                self._kept[device] = {
                    key: torch.as_tensor(at, device=device) for key, at in self.places.items()
                }
        return self._kept[device]


def _is_symmetric(variable: cp.Variable) -> bool:
    return any(variable.attributes[name] for name in ("symmetric", "PSD", "NSD"))


def _free_entries(variable: cp.Variable) -> np.ndarray:
    """Numbers of the free entries, in C order; -1 for entries that are always zero."""
    shape = variable.shape
    if _is_symmetric(variable):
        rows, columns = np.triu_indices(shape[-1])
        triangle = np.zeros(shape[-2:], dtype=np.int64)
        triangle[rows, columns] = triangle[columns, rows] = np.arange(rows.size)
        batch = np.arange(int(np.prod(shape[:-2]))).reshape(*shape[:-2], 1, 1)
        return (batch * rows.size + triangle).ravel()
    support = np.ones(shape, dtype=bool)
    if variable.attributes["diag"]:
        support[...] = np.eye(shape[-1], dtype=bool)
    elif variable.sparse_idx is not None:
        support[...] = False
        support[tuple(variable.sparse_idx)] = True
    return np.where(support, np.cumsum(support).reshape(shape) - 1, -1).ravel().astype(np.int64)
