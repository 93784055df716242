"""How well a point satisfies the optimality conditions of a nonlinear program."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.evaluation import Evaluation
from declarative_cvx.nonconvex.minimization.matrices import (
    column_largest,
    mix,
    row_largest,
    scale,
)
from declarative_cvx.nonconvex.minimization.records import Record

# Multipliers that are rounding, whatever the units: where the objective is constant all are.
_NO_MULTIPLIER = 1e-15
# Share of the steepest variable's terms that those of the others are taken for, at least.
_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class KKTPoint(Record):
    """A point and multipliers of L = f + y'c - lower'(x - l) - upper'(u - x), c = (h, g).

    Attributes
    ----------
    x : Tensor, shape (batch, n)
    y : Tensor, shape (batch, k + l)
        Of the equalities, then of the inequalities (>= 0).
    lower, upper : Tensor, shape (batch, n)
        Of the bounds, >= 0.
    """

    x: Tensor
    y: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, eq=False)
class KKTResiduals(Record):
    """Violations, each relative to the size of the terms it is the sum of, shape (batch,).

    Attributes
    ----------
    primal : Tensor
        Of constraints and bounds, in units of what a relative change of x by one changes.
    dual : Tensor
        Of stationarity and of the signs of the multipliers.
    complementarity : Tensor
        The smaller of slack and multiplier, the largest of all inequalities and bounds.
    """

    primal: Tensor
    dual: Tensor
    complementarity: Tensor

    @property
    def worst(self) -> Tensor:
        """The largest of the three; NaN counts as infinite."""
        columns = torch.stack([self.primal, self.dual, self.complementarity])
        return torch.nan_to_num(columns, nan=torch.inf).amax(0)


@dataclass(frozen=True, eq=False)
class Violations(Record):
    """Conditions one by one, relative to their own scales.

    Attributes
    ----------
    equality : Tensor, shape (batch, k)
    stationarity : Tensor, shape (batch, n)
    slack, multiplier : Tensor, shape (batch, l + 2n) or (batch, l) where there are no bounds
        Of the inequalities, lower and upper bounds (infinite slack where there are none);
        negative ones are violations.
    """

    equality: Tensor
    stationarity: Tensor
    slack: Tensor
    multiplier: Tensor

    @property
    def active(self) -> Tensor:
        """Which inequalities and bounds hold with equality: those with multiplier above slack.

        At a solution one of the two is zero and the other in general is not; how small a solver
        has made the smaller one does not matter.
        """
        return self.multiplier > self.slack

    @property
    def residuals(self) -> KKTResiduals:
        smaller = torch.minimum(self.slack, self.multiplier).abs()
        return KKTResiduals(
            torch.maximum(_largest(self.equality.abs()), _largest((-self.slack).clamp(min=0.0))),
            torch.maximum(_largest(self.stationarity.abs()), _largest(-self.multiplier)),
            _largest(smaller),
        )


def violations(
    at: Evaluation,
    point: KKTPoint,
    lower: Tensor | None,  # (batch, n)
    upper: Tensor | None,
    equalities: int,
    bend: Tensor | None = None,
) -> Violations:
    """Each condition, relative to the size of its terms.

    Stationarity in a variable is measured against the largest of: the slopes of objective and
    constraints in it, and the change of slope when x changes by its own size (or by one). So the
    numbers do not depend on the units of objective and constraints. Where the Hessian is not
    formed, `bend` (batch, n) stands for the last of these.
    """
    size = 1 + point.x.abs()
    rows, row_size = at.rows, at.constraints
    if rows.shape[1]:
        row_size = row_largest(scale(rows, columns=size)) + _tiny(size)
    gradient = stationarity(at, point)
    slope = slopes(at, point, bend)
    relative = at.constraints / row_size
    g, z = relative[:, equalities:], point.y[:, equalities:]
    pull = row_largest(scale(rows, columns=1 / slope))[:, equalities:] if z.shape[1] else z
    slack, multiplier = [-g], [z * pull]
    if lower is not None and upper is not None:
        slack += [(point.x - lower) / size, (upper - point.x) / size]
        multiplier += [point.lower / slope, point.upper / slope]
    return Violations(
        relative[:, :equalities], gradient / slope, torch.cat(slack, 1), torch.cat(multiplier, 1)
    )


def stationarity(at: Evaluation, point: KKTPoint) -> Tensor:
    """Gradient of the Lagrangian, shape (batch, n)."""
    return at.gradient + mix(point.y, at.rows) - point.lower + point.upper


def slopes(at: Evaluation, point: KKTPoint, bend: Tensor | None = None) -> Tensor:
    """`slope_terms`, positive."""
    terms = slope_terms(at, point, bend)
    return terms + _tiny(terms)


def slope_terms(
    at: Evaluation, point: KKTPoint, bend: Tensor | None = None, floor: float = _FLOOR
) -> Tensor:
    """Size of the terms of the Lagrangian's gradient, or a share of the largest, (batch, n)."""
    size = 1 + point.x.abs()
    terms = [at.gradient.abs(), point.lower, point.upper]
    if bend is not None:
        terms.append(bend)
    if at.hessian.shape[1]:
        terms.append(row_largest(scale(at.hessian, columns=size)))
    if at.rows.shape[1]:
        terms.append(column_largest(scale(at.rows, point.y.abs() + _NO_MULTIPLIER)))
    largest = torch.stack(terms).amax(0)
    return torch.maximum(largest, floor * largest.amax(1, keepdim=True))


def _largest(values: Tensor) -> Tensor:
    """Largest entry of each row, at least zero, also of rows without entries."""
    if not values.shape[1]:
        return values.new_zeros(len(values))
    return values.amax(1).clamp(min=0.0)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny ** 0.5
