"""Bounds of linear functions of states and inputs, by linear programming duality.

For all states x = phi(z), z = A x + B u + b, in a box on which phi lies between lines (IDL 5.2,
with the same on the other side), any multipliers v give the bound ::

    c x + d u <= max over the box of (c - v + A' w) x + (d + B' w) u
                 + w b + v+ upper_offset - v- lower_offset,   w = upper_slope v+ - lower_slope v-

as v+ multiplies ``phi <= upper line`` and v- ``phi >= lower line``. The best ones nearly solve
``v = c + A' w(v)``, the adjoint equation of the model; but every v is sound, converged or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.enclosure import StateMap
from declarative_cvx.nonconvex.implicit.intervals import Box, applied, rounding
from declarative_cvx.nonconvex.implicit.relaxation import Lines, lines, tightest_slopes

_ROOM = 2**23  # numbers in one tensor of multipliers
_ITERATIONS = 300
_CHECK = 10  # iterations between tests for convergence
_ACCURACY = 1e-7
_GAIN = 0.05  # a round that narrows the boxes by less, relatively, is the last


@dataclass(frozen=True)
class Rows:
    """Linear functions ``c x + d u + e``, the same for all elements of the batch.

    Attributes
    ----------
    c : Tensor, shape (m, n)
    d : Tensor, shape (m, p)
    e : Tensor, shape (m,)
    """

    c: Tensor
    d: Tensor
    e: Tensor

    def both_ways(self) -> Rows:
        """The functions and their negatives."""
        return Rows(*(torch.cat([part, -part]) for part in (self.c, self.d, self.e)))

    def split(self, size: int) -> Iterator[Rows]:
        pieces = (part.split(size) for part in (self.c, self.d, self.e))
        return (Rows(*piece) for piece in zip(*pieces, strict=True))


@dataclass(frozen=True)
class Enclosure:
    """What is known of the states.

    Attributes
    ----------
    state_map : StateMap
    x, z : Box
        Of the states and of the arguments of phi, shape (batch, n).
    """

    state_map: StateMap
    x: Box
    z: Box

    def bounds(self, rows: Rows, steps: int = 0) -> Box:
        """Intervals that hold the functions' values, shape (batch, m).

        Parameters
        ----------
        rows : Rows
        steps : int
            Gradient steps by which the slopes of the lines are fitted to each function.
        """
        batch, n = self.x.lower.shape
        size = max(1, _ROOM // max(1, batch * n))
        upper = torch.cat([self._upper(part, steps) for part in rows.both_ways().split(size)], 1)
        above, below = upper.chunk(2, dim=1)
        return Box(-below, above)

    def _upper(self, rows: Rows, steps: int) -> Tensor:
        below, above = tightest_slopes(self.state_map.weights.activation, self.z)
        slopes = below[:, None], above[:, None]  # the same for all functions
        first = self._evaluate(rows, *slopes)
        if not steps or not rows.c.shape[1]:
            return first
        return torch.minimum(first, self._evaluate(rows, *self._fitted(rows, slopes, steps)))

    def _fitted(self, rows: Rows, slopes: tuple[Tensor, ...], steps: int) -> tuple[Tensor, ...]:
        """Slopes for each function by itself, by projected gradient steps (Adam's)."""
        shape = (len(self.x.lower), len(rows.c), self.x.lower.shape[1])
        most = self.state_map.weights.activation.lipschitz_constants(self.x.lower)
        fitted = [slope.detach().expand(shape).clone().requires_grad_() for slope in slopes]
        optimiser = torch.optim.Adam(fitted, lr=0.1)
        best = [slope.detach().clone() for slope in fitted]
        least = torch.full(shape[:2], torch.inf, dtype=most.dtype, device=most.device)
        with torch.enable_grad():
            frozen = _detached(self)
            for _ in range(steps):
                value = frozen._evaluate(_detached_rows(rows), *fitted)
                better = value.detach() < least
                least = torch.where(better, value.detach(), least)
                best = [
                    torch.where(better[..., None], new.detach(), old)
                    for new, old in zip(fitted, best, strict=True)
                ]
                optimiser.zero_grad()
                value.sum().backward(inputs=fitted)
                optimiser.step()
                with torch.no_grad():
                    for slope in fitted:
                        slope.clamp_(min=torch.zeros_like(most), max=most)
        return tuple(best)

    def _evaluate(self, rows: Rows, lower_slope: Tensor, upper_slope: Tensor) -> Tensor:
        """Upper bounds of the functions, shape (batch, m), for lines of these slopes."""
        z = Box(self.z.lower[:, None], self.z.upper[:, None])
        around = lines(self.state_map.weights.activation, z, lower_slope, upper_slope)
        return self._dual_value(rows, around, self._multipliers(rows, around))

    def _multipliers(self, rows: Rows, around: Lines) -> Tensor:
        """Multipliers v with ``v = c + A' w(v)``, nearly, shape (batch, m, n)."""
        A = self.state_map.weights.A
        radius = self.x.radius[:, None]
        v = best = rows.c.expand(len(self.x.lower), *rows.c.shape)
        least = torch.full_like(v[..., :1], torch.inf)
        done = torch.zeros_like(least, dtype=torch.bool)  # each by itself, whatever the others need
        for number in range(_ITERATIONS):
            following = rows.c + _times(_weighted(v, around), A)
            remainder = ((following - v).abs() * radius).sum(-1, keepdim=True).detach()
            best = torch.where((remainder < least) & ~done, v, best)
            least = torch.where(done, least, torch.minimum(remainder, least))
            v = following
            if number % _CHECK == _CHECK - 1:
                size = (v.detach().abs() * radius).sum(-1, keepdim=True)
                done |= (least <= _ACCURACY * size) | (remainder > 1e3 * least)
                if bool(done.all()):
                    break
        return best

    def _dual_value(self, rows: Rows, around: Lines, v: Tensor) -> Tensor:
        weights, inputs = self.state_map.weights, self.state_map.inputs
        w = _weighted(v, around)
        above, below = v.clamp(min=0), (-v).clamp(min=0)
        on_states = rows.c - v + _times(w, weights.A)
        on_inputs = rows.d + _times(w, weights.B)
        value = _largest(on_states, self.x) + _largest(on_inputs, inputs) + rows.e
        value = value + (w * weights.b + above * around.upper_offset).sum(-1)
        value = value - (below * around.lower_offset).sum(-1)
        terms = (
            ((rows.c.abs() + v.abs() + _times(w.abs(), weights.A.abs())), self.x.magnitude),
            ((rows.d.abs() + _times(w.abs(), weights.B.abs())), inputs.magnitude),
        )
        sizes = sum((factor * size[:, None]).sum(-1) for factor, size in terms)
        offsets = above * around.upper_offset.abs() + below * around.lower_offset.abs()
        sizes = sizes + (w.abs() * weights.b.abs() + offsets).sum(-1) + rows.e.abs()
        return value + rounding(2 * sum(self.state_map.matrix.shape)) * sizes


def refined(known: Enclosure, rounds: int) -> Enclosure:
    """The enclosure after so many rounds of `_refined`, each element's until it narrows little."""
    going = torch.ones_like(known.x.lower[:, :1], dtype=torch.bool)
    for _ in range(rounds):
        width = known.x.radius.detach().sum(1, keepdim=True)
        known = _refined(known, going)
        going = going & (known.x.radius.detach().sum(1, keepdim=True) < (1 - _GAIN) * width)
        if not bool(going.any()):
            break
    return known


def _refined(known: Enclosure, going: Tensor) -> Enclosure:
    """Bounds of z by duality, where phi is not almost linear on its box, and of x by them.

    Of the elements that go on only, (batch, 1).
    """
    weights = known.state_map.weights
    bent = _bent(known) & going
    going = bent.any(1, keepdim=True)
    chosen = torch.nonzero(bent.any(0)).flatten()
    if not len(chosen):
        return known
    pick = [weights.A, weights.B, weights.b]
    pick = [value.index_select(0, chosen) for value in pick]
    pick = [value.to_dense() if value.is_sparse else value for value in pick]
    found = known.bounds(Rows(*pick))
    lower, upper = (
        torch.where(bent, end.index_copy(1, chosen, value), end)
        for end, value in ((known.z.lower, found.lower), (known.z.upper, found.upper))
    )
    new = settled(known.state_map, known.x, known.z.intersect(Box(lower, upper)))
    return replace(new, x=new.x.where(going, known.x), z=new.z.where(going, known.z))


def settled(state_map: StateMap, x: Box, z: Box | None = None) -> Enclosure:
    """The enclosure from boxes of x and z, each narrowed by the other."""
    again = state_map.arguments(x)
    z = again if z is None else z.intersect(again)
    return Enclosure(state_map, x.intersect(applied(state_map.weights.activation, z)), z)


def _bent(known: Enclosure) -> Tensor:
    """The states on whose box the lines are apart, bool, (batch, n)."""
    activation = known.state_map.weights.activation
    around = lines(activation, known.z, *tightest_slopes(activation, known.z))
    slopes = around.upper_slope - around.lower_slope
    apart = slopes * known.z.center + around.upper_offset - around.lower_offset
    return apart > 1e-6 * known.x.radius.amax(1, keepdim=True)


def _weighted(v: Tensor, around: Lines) -> Tensor:
    """w(v): each multiplier times the slope of its line."""
    return around.upper_slope * v.clamp(min=0) - around.lower_slope * (-v).clamp(min=0)


def _largest(factor: Tensor, box: Box) -> Tensor:
    """The largest ``factor @ point`` over the points of the box, shape (batch, m)."""
    center, radius = box.center[:, None], box.radius[:, None]
    return (factor * center + factor.abs() * radius).sum(-1)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix`` for rows of shape (batch, m, n), where the matrix may be sparse."""
    if not matrix.is_sparse:
        return rows @ matrix
    return (matrix.t() @ rows.flatten(0, 1).t()).t().unflatten(0, rows.shape[:2])


def _detached(known: Enclosure) -> Enclosure:
    free = StateMap.of(known.state_map.weights.detach(), _detached_box(known.state_map.inputs))
    return Enclosure(free, _detached_box(known.x), _detached_box(known.z))


def _detached_rows(rows: Rows) -> Rows:
    return Rows(rows.c.detach(), rows.d.detach(), rows.e.detach())


def _detached_box(box: Box) -> Box:
    return Box(box.lower.detach(), box.upper.detach())
