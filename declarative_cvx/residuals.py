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
from torch.linalg import vecdot

from declarative_cvx.cones import Cone
from declarative_cvx.program import ConeProgram
from declarative_cvx.scaling import INFINITE

# Conditions whose terms are all (nearly) zero have no scale of their own: terms smaller than this
# are measured absolutely, in units of it. (Programs come in units of size one.)
SMALLEST_SCALE = 1e-3
SMALLEST_SHARE = 1e-4
# Where every condition is measured by its own terms: size of entries, in units of the largest or of
# one, up to which they count as that; the share of the largest that may be rounding; and the share
# of the largest terms that is nothing, such as zeros that come out of a computation as 1e-17.
ORDINARY_SCALE = 1e-1
ROUNDING_SHARE = 1e-8
NOTHING = 1e-10
# Distances from cones up to this are little more than rounding.
ROUNDING = 1e-12


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
        The larger of ``|x'P x + q'x + b'y|`` and ``|s'y|``, in units of the larger of ``|q'x|``
        and ``|b'y|``.
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
    dual, primal = program.terms(x, y, s, _sizes)
    return dual.clamp(min=SMALLEST_SCALE), primal.clamp(min=SMALLEST_SCALE)


def _sizes(v: Tensor) -> Tensor:
    """Of entries, (batch, k): one that is zero is known to a share of the largest one."""
    sizes = v.abs()
    if not v.shape[1]:
        return sizes
    return torch.add(sizes, sizes.amax(1, keepdim=True), alpha=SMALLEST_SHARE)


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
    return program.conditions(x, y, s)


def own_violation(program: ConeProgram, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Largest violation of an optimality condition, each of them in units of its own terms.

    On cones that are not polyhedral, at the nearest point with s'y = 0 (Moreau): an s'y that is
    small says little there, because errors count in it by their squares.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)

    Returns
    -------
    Tensor, shape (batch,)
    """
    cone, sizes = program.structure.cone, program.absolute
    s, y = _complementary(cone, s, y)
    rows = cone.zero + cone.nonneg
    # Rows of the other cones are known to a share of the whole cone's.
    slack = torch.cat([s[:, :rows].abs(), _with_least(s)[:, rows:]], 1)
    primal = torch.maximum(sizes.A_times(_with_least(x)), slack)
    dual = torch.maximum(sizes.P_times(_with_least(x)), sizes.At_times(_with_least(y)))
    terms = _not_nothing(torch.maximum(dual, sizes.q)), _not_nothing(torch.maximum(primal, sizes.b))
    both = _part(s, terms[1]) * _part(y, torch.ones_like(y))
    shares = [both[:, cone.slice_of("nonneg")]]
    for violation, own in zip(conditions(program, x, y, s), terms, strict=True):
        shares.append(violation.abs() / own)
    return _norm(torch.cat(shares, 1))


def _not_nothing(terms: Tensor) -> Tensor:
    """Sizes of terms, of those that are nothing beside the largest what is not."""
    largest = _norm(terms.masked_fill(terms >= INFINITE, 0.0)).clamp(min=SMALLEST_SCALE)
    return torch.maximum(terms, NOTHING * largest[:, None])


def _with_least(v: Tensor) -> Tensor:
    """Sizes of entries, of small ones not less than to what the largest let them be known."""
    largest = _norm(v)
    least = torch.maximum(ORDINARY_SCALE * largest.clamp(max=1.0), ROUNDING_SHARE * largest)
    return torch.maximum(v.abs(), least[:, None])


def _part(v: Tensor, unit: Tensor) -> Tensor:
    """Sizes of entries: small ones in parts of a unit, large ones 1."""
    return v.abs() / (v.abs() + ORDINARY_SCALE * unit).clamp(min=torch.finfo(v.dtype).tiny)


def _complementary(cone: Cone, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (s, y), by Moreau's decomposition of s - y where cones are not polyhedral."""
    z, rows = s - y, cone.zero + cone.nonneg
    nearest = cone.project(z)
    s = torch.cat([s[:, :rows], nearest[:, rows:]], 1)
    return s, torch.cat([y[:, :rows], (nearest - z)[:, rows:]], 1)


def residuals(
    program: ConeProgram,
    x: Tensor,
    y: Tensor,
    s: Tensor,
    sizes: tuple[Tensor, Tensor] | None = None,
    violations: tuple[Tensor, Tensor] | None = None,
    nearest: Tensor | None = None,
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
    nearest : Tensor, shape (batch, m), optional
        The projections of s - y on K, likewise: neither s is farther from K than from there, nor y
        from K*, so that others need not be computed where these distances are nothing.

    Returns
    -------
    Residuals
        NaN for points that are not finite.
    """
    cone, finite = program.structure.cone, None
    if cone.kinds - {"zero", "nonneg"} and not math.isfinite(torch.cat([x, y, s], 1).sum()):
        finite = torch.isfinite(torch.cat([x, y, s], 1)).all(1)  # what projections ask for
        x, y, s = (torch.where(finite[:, None], v, 0.0) for v in (x, y, s))
        violations = nearest = None
    dual, primal = conditions(program, x, y, s) if violations is None else violations
    dual_scale, primal_scale = scales(program, x, y, s) if sizes is None else sizes
    outside = _outside(cone, (s, y), primal_scale, nearest)
    qx, by, sy = vecdot(x, program.q), vecdot(y, program.b), vecdot(s, y)
    difference = vecdot(x, dual) - vecdot(y, primal) + sy  # x'P x + q'x + b'y
    value_scale = torch.maximum(qx.abs(), by.abs())  # at least half of |x'P x| without a gap
    gap = torch.maximum(difference.abs(), sy.abs())
    found = Residuals(
        _norm(primal / primal_scale),
        _norm(dual / dual_scale),
        gap / value_scale.clamp(min=SMALLEST_SCALE),
        outside,
    )
    return found if finite is None else found.where(finite, _nothing(found))


def _outside(
    cone: Cone, pair: tuple[Tensor, Tensor], s_scale: Tensor, nearest: Tensor | None
) -> Tensor:
    """Distances of s from K, row by row in units (batch, m), and of y from K*, the larger ones.

    That of both from the nearest complementary pair, if it is given and no more than rounding.
    """
    (s, y), y_scale = pair, _norm(pair[1]).clamp(min=SMALLEST_SCALE)
    if nearest is not None:
        away = s - nearest
        outside = torch.maximum(_norm(away / s_scale), _norm(away) / y_scale)
        if bool((outside <= ROUNDING).all()):
            return outside
    inside, opposite = cone.project(torch.cat([s, -y])).chunk(2)
    return torch.maximum(_norm((s - inside) / s_scale), _norm(opposite) / y_scale)


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
        Violation relative to -b'y, in the units of b and of each column of A; infinite where
        b'y >= 0. A value of 1e-9 shows that a feasible x, if there were one, would be larger than
        1e9.
    """
    y = torch.where(torch.isfinite(y).all(1, keepdim=True), y, 0.0)  # no certificate
    size = _norm(program.b.masked_fill(program.b >= INFINITE, 0.0))
    gain = -(y * program.b).sum(1) / size.clamp(min=torch.finfo(y.dtype).tiny)
    columns = _sums(program.absolute.At_times(torch.ones_like(y)))
    outside = y - program.structure.cone.project_dual(y)
    return _certificate(gain, program.At_times(y) / columns, outside)


def unboundedness(program: ConeProgram, x: Tensor) -> Tensor:
    """How far x is from proving unboundedness below: P x = 0, -A x in K, q'x < 0.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)

    Returns
    -------
    Tensor, shape (batch,)
        Violation relative to -q'x, in the units of q and of each row of P and A; infinite where
        q'x >= 0.
    """
    x = torch.where(torch.isfinite(x).all(1, keepdim=True), x, 0.0)  # no certificate
    gain = -(x * program.q).sum(1) / _norm(program.q).clamp(min=torch.finfo(x.dtype).tiny)
    slack, one = -program.A_times(x), torch.ones_like(x)
    outside = slack - program.structure.cone.project(slack)
    curvature = program.P_times(x) / _sums(program.absolute.P_times(one))
    return _certificate(gain, curvature, outside / _sums(program.absolute.A_times(one)))


def _sums(sums: Tensor) -> Tensor:
    """Sizes of rows or columns: sums of their entries, of at least what is not nothing."""
    least = (NOTHING * _norm(sums)).clamp(min=torch.finfo(sums.dtype).tiny)
    return torch.maximum(sums, least[:, None])


def _certificate(gain: Tensor, *errors: Tensor) -> Tensor:
    worst = _norm(torch.cat(errors, 1))
    return torch.where(gain > 0, worst / torch.where(gain > 0, gain, 1.0), torch.inf)
