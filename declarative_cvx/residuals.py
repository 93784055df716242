"""How well a point satisfies the optimality conditions of a cone program.

The quality of every answer is computed here from the program and the answer alone, whoever
found it and whatever they said of it. All measures are relative to the size of the terms they
are made of, so that they mean the same in any units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from declarative_cvx.program import ConeProgram

# Conditions whose terms are all (nearly) zero have no scale of their own: terms smaller than this
# are measured absolutely, in units of it. (Programs come in units of size one.)
SMALLEST_SCALE = 1e-3
SMALLEST_SHARE = 1e-4


@dataclass(frozen=True)
class Residuals:
    """Relative violations of the optimality conditions, one number per element.

    Attributes
    ----------
    primal : Tensor, shape (batch,)
        A x + s - b, every row in units of its own largest term; the worst row.
    dual : Tensor, shape (batch,)
        P x + q + A'y likewise.
    gap : Tensor, shape (batch,)
        The larger of ``|x'P x + q'x + b'y|`` and ``|s'y|``, in units of the objective's terms.
    cone : Tensor, shape (batch,)
        Distance of s from K and of y from K*, the larger one.
    """

    primal: Tensor
    dual: Tensor
    gap: Tensor
    cone: Tensor

    @cached_property
    def worst(self) -> Tensor:
        """The largest of the four, shape (batch,); NaN where any is NaN."""
        return torch.stack([self.primal, self.dual, self.gap, self.cone]).amax(0)

    def where(self, chosen: Tensor, other: Residuals) -> Residuals:
        """These residuals where `chosen` (bool) says so, those of `other` elsewhere."""
        return Residuals(
            *(torch.where(chosen, getattr(self, name), getattr(other, name)) for name in _NAMES)
        )

    def select(self, index: Tensor) -> Residuals:
        """The residuals of the elements named by an index or mask."""
        return Residuals(*(getattr(self, name)[index] for name in _NAMES))

    def merge(self, other: Residuals, index: Tensor) -> Residuals:
        """These residuals with the elements named by `index` replaced by those of `other`."""
        return Residuals(
            *(getattr(self, name).index_copy(0, index, getattr(other, name)) for name in _NAMES)
        )


_NAMES = ("primal", "dual", "gap", "cone")


def _norm(v: Tensor) -> Tensor:
    """Largest absolute entry of each row; 0 for rows without entries."""
    if v.shape[-1] == 0:
        return v.new_zeros(v.shape[:-1])
    return v.abs().amax(-1)


def scales(program: ConeProgram, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes of the terms of every optimality condition.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)

    Returns
    -------
    dual : Tensor, shape (batch, n)
        Of P x + q + A'y: the larger of |P| |x|, |q| and |A|'|y|, entry by entry, so that an
        entry of 1e10 in one place makes nothing elsewhere look small.
    primal : Tensor, shape (batch, m)
        Of A x + s - b likewise.
    """
    sizes = program.absolute
    # An entry of x (or y) that is zero at the solution is known to a share of the largest one.
    x = x.abs() + SMALLEST_SHARE * _norm(x)[:, None]
    y = y.abs() + SMALLEST_SHARE * _norm(y)[:, None]
    dual = torch.maximum(sizes.P_times(x), sizes.At_times(y))
    primal = torch.maximum(sizes.A_times(x), s.abs())
    return (
        torch.maximum(dual, sizes.q).clamp(min=SMALLEST_SCALE),
        torch.maximum(primal, sizes.b).clamp(min=SMALLEST_SCALE),
    )


def conditions(program: ConeProgram, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """What the optimality conditions equate with zero: P x + q + A'y and A x + s - b.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)

    Returns
    -------
    dual : Tensor, shape (batch, n)
    primal : Tensor, shape (batch, m)
    """
    dual = program.P_times(x) + program.q + program.At_times(y)
    return dual, program.A_times(x) + s - program.b


def residuals(
    program: ConeProgram,
    x: Tensor,
    y: Tensor,
    s: Tensor,
    sizes: tuple[Tensor, Tensor] | None = None,
    violations: tuple[Tensor, Tensor] | None = None,
) -> Residuals:
    """Residuals of a batch of points.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)
    sizes : (Tensor, Tensor), optional
        The `scales` of these points, if they are known.
    violations : (Tensor, Tensor), optional
        Their `conditions`, likewise.

    Returns
    -------
    Residuals
        NaN for points that are not finite.
    """
    finite = None
    if not math.isfinite(torch.cat([x, y, s], 1).sum()):
        finite = torch.isfinite(torch.cat([x, y, s], 1)).all(1)
        x, y, s = (torch.where(finite[:, None], v, 0.0) for v in (x, y, s))
        violations = None
    cone = program.structure.cone
    dual, primal = conditions(program, x, y, s) if violations is None else violations
    dual_scale, primal_scale = scales(program, x, y, s) if sizes is None else sizes
    nearest, opposite = cone.project(torch.cat([s, -y])).chunk(2)
    rows = torch.stack([primal, s - nearest], 1) / primal_scale[:, None]
    primal_worst, outside = _norm(rows).unbind(1)
    y_scale = _norm(y).clamp(min=SMALLEST_SCALE)
    qx, by, sy = (x * program.q).sum(1), (y * program.b).sum(1), (s * y).sum(1)
    difference = (x * dual).sum(1) - (y * primal).sum(1) + sy  # x'P x + q'x + b'y
    value_scale = torch.stack([difference - qx - by, qx, by]).abs().amax(0)
    gap = torch.maximum(difference.abs(), sy.abs())
    found = Residuals(
        primal_worst,
        _norm(dual / dual_scale),
        gap / value_scale.clamp(min=SMALLEST_SCALE),
        torch.maximum(outside, _norm(opposite) / y_scale),
    )
    return found if finite is None else found.where(finite, _nothing(found))


def _nothing(like: Residuals) -> Residuals:
    """The residuals of points that are not finite."""
    return Residuals(*(torch.full_like(getattr(like, name), torch.nan) for name in _NAMES))


def infeasibility(program: ConeProgram, y: Tensor) -> Tensor:
    """How far y is from proving that no x is feasible: A'y = 0, y in K*, b'y < 0.

    Parameters
    ----------
    program : ConeProgram
    y : Tensor, shape (batch, m)

    Returns
    -------
    Tensor, shape (batch,)
        Violation relative to -b'y, in the units of A and b; infinite where b'y >= 0. A value
        of 1e-6 shows that a feasible x, if there were one, would be larger than 1e6.
    """
    y = torch.where(torch.isfinite(y).all(1, keepdim=True), y, 0.0)  # no certificate
    gain = -(y * program.b).sum(1) / _norm(program.b).clamp(min=torch.finfo(y.dtype).tiny)
    dual_cone = program.structure.cone.project_dual(y)
    return _certificate(gain, _norm(program.At_times(y)) / _size(program.A), _norm(y - dual_cone))


def unboundedness(program: ConeProgram, x: Tensor) -> Tensor:
    """How far x is from proving unboundedness below: P x = 0, -A x in K, q'x < 0.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)

    Returns
    -------
    Tensor, shape (batch,)
        Violation relative to -q'x, in the units of P, A and q; infinite where q'x >= 0.
    """
    x = torch.where(torch.isfinite(x).all(1, keepdim=True), x, 0.0)  # no certificate
    gain = -(x * program.q).sum(1) / _norm(program.q).clamp(min=torch.finfo(x.dtype).tiny)
    slack = -program.A_times(x)
    slack_error = _norm(slack - program.structure.cone.project(slack)) / _size(program.A)
    return _certificate(gain, _norm(program.P_times(x)) / _size(program.P), slack_error)


def _size(values: Tensor) -> Tensor:
    size = _norm(values)
    return torch.where(size > 0, size, 1.0)


def _certificate(gain: Tensor, *errors: Tensor) -> Tensor:
    worst = torch.stack(torch.broadcast_tensors(*errors)).amax(0)
    return torch.where(gain > 0, worst / torch.where(gain > 0, gain, 1.0), torch.inf)
