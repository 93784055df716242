"""Bounds on entries of variables: declared, implied by domains, or written as constraints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from cvxpy.constraints import Inequality, NonNeg, NonPos
from torch import Tensor

from declarative_cvx.nonconvex.translation.domains import DEFINITE, NONZERO, POSITIVE
from declarative_cvx.nonconvex.translation.expression import Values, translate_expressions
from declarative_cvx.nonconvex.translation.layout import Layout
from declarative_cvx.nonconvex.translation.smoothing import Restriction, restriction_of


@dataclass(frozen=True, eq=False)
class Bound:
    """Bounds on some entries of a variable.

    Attributes
    ----------
    variable : cvxpy.Variable
    entries : ndarray
        Different ones, in C order.
    value : cvxpy.Expression
        Free of variables, of a shape that broadcasts to `shape`.
    shape : tuple of int
        Of the constraint that says so; it has as many entries.
    upper : bool
    """

    variable: cp.Variable
    entries: np.ndarray
    value: cp.Expression
    shape: tuple[int, ...]
    upper: bool


def declared(variable: cp.Variable) -> Iterator[Bound]:
    """The bounds that a variable's attributes state."""
    attributes = variable.attributes
    lower, upper = variable.bounds if variable.bounds is not None else (-np.inf, np.inf)
    if attributes["nonneg"] or attributes["pos"]:
        yield _whole(variable, 0.0, upper=False)
    if attributes["nonpos"] or attributes["neg"]:
        yield _whole(variable, 0.0, upper=True)
    for value, side in ((lower, False), (upper, True)):
        if isinstance(value, cp.Expression) or not np.all(np.isinf(_dense(value))):
            yield _whole(variable, value, side)


def implied(restriction: Restriction) -> Iterator[Bound]:
    """The bounds that keep entries of a variable within a domain."""
    if restriction.domain in (NONZERO, DEFINITE):
        return
    entries = np.unique(restriction.entries)
    for value, side in ((restriction.domain.lower, False), (restriction.domain.upper, True)):
        if math.isfinite(value):
            bound = cp.Constant(value)
            yield Bound(restriction.variable, entries, bound, entries.shape, side)


def written(constraint: cp.Constraint) -> Bound | None:
    """The bound that a constraint is, if it only compares entries of a variable with data."""
    for argument, value, upper in _sides(constraint):
        if argument.is_constant() or value.variables():
            continue
        restriction = restriction_of(argument, POSITIVE)
        if restriction is None:
            continue
        variable, entries = restriction.variable, restriction.entries
        distinct = len(np.unique(entries)) == len(entries) == constraint.size
        if distinct and not variable.attributes["diag"] and variable.sparse_idx is None:
            return Bound(variable, entries, value, constraint.shape, upper)
    return None


def _sides(constraint: cp.Constraint) -> list[tuple[cp.Expression, cp.Expression, bool]]:
    zero = cp.Constant(0.0)
    if isinstance(constraint, Inequality):
        left, right = constraint.args
        return [(left, right, True), (right, left, False)]
    if isinstance(constraint, NonNeg | NonPos):
        return [(constraint.args[0], zero, isinstance(constraint, NonPos))]
    return []


def _whole(variable: cp.Variable, value: Any, upper: bool) -> Bound:
    value = value if isinstance(value, cp.Expression) else cp.Constant(_dense(value))
    return Bound(variable, np.arange(variable.size), value, variable.shape, upper)


def _dense(value: Any) -> np.ndarray:
    return np.asarray(value.toarray() if sp.issparse(value) else value, dtype=float)


class Bounds:
    """All bounds on the vector that a layout describes.

    Parameters
    ----------
    bounds : sequence of Bound
    layout : Layout

    Attributes
    ----------
    all : tuple of Bound
    parametric : bool
        Whether bounds depend on parameters.
    """

    def __init__(self, bounds: Sequence[Bound], layout: Layout) -> None:
        self.all = tuple(bounds)
        self._size = layout.size
        self._places = {b: layout.places[b.variable.id][b.entries] for b in bounds}
        self._gathers = [_first_and_last(at, layout.size) for at in self._places.values()]
        self.parametric = any(bound.value.parameters() for bound in bounds)
        self._values = translate_expressions(
            [bound.value for bound in bounds], [f"a bound of `{b.variable}`" for b in bounds]
        )

    def of_one(self, values: Values, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of one element, each (n,), infinite where there are none."""
        lower = torch.full((self._size,), -math.inf, dtype=torch.float64, device=device)
        upper = -lower
        for bound, value, gathers in zip(
            self.all, self._full(values, device), self._gathers, strict=True
        ):
            for gather in gathers:
                if bound.upper:
                    upper = torch.minimum(upper, _placed(value, gather, math.inf))
                else:
                    lower = torch.maximum(lower, _placed(value, gather, -math.inf))
        return lower, upper

    def shares_of_one(self, values: Values, lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
        """Each bound's part in the multipliers at its places: bounds that tie share evenly."""
        ties = []
        for bound, value in zip(self.all, self._full(values, lower.device), strict=True):
            ties.append((value == self.at(bound, upper if bound.upper else lower)).to(lower))
        counts = {side: lower.new_zeros(self._size + 1) for side in (True, False)}
        for bound, tie in zip(self.all, ties, strict=True):
            places = torch.as_tensor(self._places[bound], device=lower.device)
            counts[bound.upper] = counts[bound.upper].index_add(0, places, tie)
        return tuple(
            tie / self.at(bound, counts[bound.upper]).clamp(min=1)
            for bound, tie in zip(self.all, ties, strict=True)
        )

    def at(self, bound: Bound, x: Tensor) -> Tensor:
        """The entries of a bound in vectors (..., n)."""
        padded = torch.nn.functional.pad(x, (0, 1))
        return padded[..., torch.as_tensor(self._places[bound], device=x.device)]

    def _full(self, values: Values, device: torch.device) -> Iterator[Tensor]:
        """Values of all bounds, one number per entry."""
        for bound, value in zip(self.all, self._values(values), strict=True):
            yield value.to(device).expand(bound.shape).reshape(-1)


def _first_and_last(places: np.ndarray, size: int) -> list[np.ndarray]:
    """For each place in the vector the first and the last of a bound's entries that is there.

    (Of a symmetric variable two entries may be at one place.) The number of entries where none is.
    """
    found: list[np.ndarray] = []
    for order in (slice(None, None, -1), slice(None)):
        gather = np.full(size + 1, len(places))
        gather[places[order]] = np.arange(len(places))[order]
        if not found or not np.array_equal(gather[:-1], found[0]):
            found.append(gather[:-1])
    return found


def _placed(value: Tensor, gather: np.ndarray, absent: float) -> Tensor:
    padded = torch.nn.functional.pad(value, (0, 1), value=absent)
    return padded[torch.as_tensor(gather, device=value.device)]
