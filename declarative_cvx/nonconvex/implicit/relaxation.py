"""Straight lines below and above an activation, for bounds by linear programming duality.

For every slope a, phi(z) - a z takes its extremes over an interval at an end of the interval or
where phi'(z) = a. So for every slope there is a best line on each side, and any slope may be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.activations import (
    Activation,
    Blocks,
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Tanh,
)
from declarative_cvx.nonconvex.implicit.intervals import Box, rounding

_HALVINGS = 30


@dataclass(frozen=True)
class Lines:
    """``lower_slope z + lower_offset <= phi(z) <= upper_slope z + upper_offset`` on a box.

    Attributes
    ----------
    lower_slope, lower_offset, upper_slope, upper_offset : Tensor, shape (..., n)
    """

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


def lines(activation: Activation, box: Box, lower_slope: Tensor, upper_slope: Tensor) -> Lines:
    """The best lines of the given slopes.

    Parameters
    ----------
    activation : Activation
        Componentwise and nondecreasing.
    box : Box
        Of z, shape (..., n).
    lower_slope, upper_slope : Tensor, shape (..., n)
        Between 0 and the Lipschitz constant.
    """
    low, _ = _offsets(activation, box, lower_slope)
    _, high = _offsets(activation, box, upper_slope)
    return Lines(lower_slope, low, upper_slope, high)


def tightest_slopes(activation: Activation, box: Box) -> tuple[Tensor, Tensor]:
    """Slopes of the lower and the upper line that are closest together at the interval's middle.

    Parameters
    ----------
    activation : Activation
        Componentwise and nondecreasing.
    box : Box
        Of z, shape (..., n).

    Returns
    -------
    lower_slope, upper_slope : Tensor, shape (..., n)
    """
    pieces = [_slopes(phi, part) for phi, part in _parts(activation, box)]
    return _joined(pieces)


def _slopes(activation: Activation, box: Box) -> tuple[Tensor, Tensor]:
    if type(activation) in _BENT:  # convex: a tangent below, the chord above
        width = box.upper - box.lower
        rise = activation(box.upper) - activation(box.lower)
        chord = torch.where(width > 0, rise / torch.where(width > 0, width, 1), 0)
        return activation.slope(box.center), chord.clamp(0, activation.lipschitz)
    if type(activation) not in _TURNS:
        return torch.zeros_like(box.lower), torch.zeros_like(box.lower)
    with torch.no_grad():
        return _halved(activation, box, upper=False), _halved(activation, box, upper=True)


def _halved(activation: Activation, box: Box, *, upper: bool) -> Tensor:
    """The slope for which the line touches phi at the middle, by bisection."""
    low = torch.zeros_like(box.lower)
    high = torch.full_like(box.lower, activation.lipschitz)
    sign = 1 if upper else -1
    for _ in range(_HALVINGS):
        slope = (low + high) / 2
        points = _points(activation, box, slope)
        touching = (sign * (activation(points) - slope * points)).argmax(0, keepdim=True)
        steeper = sign * (points.gather(0, touching)[0] - box.center) > 0
        low, high = torch.where(steeper, slope, low), torch.where(steeper, high, slope)
    return (low + high) / 2


def _offsets(activation: Activation, box: Box, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest phi(z) - slope z."""
    shape = torch.broadcast_shapes(box.lower.shape, slope.shape)
    full = Box(box.lower.expand(shape), box.upper.expand(shape))
    slopes = slope.expand(shape).split(_sizes(activation, full), -1)
    pairs = zip(_parts(activation, full), slopes, strict=True)
    pieces = [_part_offsets(phi, part, slope) for (phi, part), slope in pairs]
    return _joined(pieces)


def _joined(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*pieces, strict=True)
    return torch.cat(first, dim=-1), torch.cat(second, dim=-1)


def _part_offsets(activation: Activation, box: Box, slope: Tensor) -> tuple[Tensor, Tensor]:
    if type(activation) not in _TURNS:  # nondecreasing is all that is known
        least, most = activation(box.lower), activation(box.upper)
        error = rounding(4) * (least.abs() + most.abs() + slope * box.magnitude)
        return least - slope * box.upper - error, most - slope * box.lower + error
    points = _points(activation, box, slope)
    value, line = activation(points), slope * points
    error = rounding(4) * (value.abs() + line.abs())
    return (value - line - error).amin(0), (value - line + error).amax(0)


def _points(activation: Activation, box: Box, slope: Tensor) -> Tensor:
    """Where phi(z) - slope z may have its extremes, shape (4, ..., n)."""
    turn = _TURNS[type(activation)](slope.detach())
    middle = [torch.clamp(point, box.lower, box.upper) for point in (turn, -turn)]
    return torch.stack([box.lower, *middle, box.upper])


def _tanh_turn(slope: Tensor) -> Tensor:
    """The z >= 0 with 1 / cosh(z)^2 = slope; 0 if there is none."""
    return torch.asinh(torch.sqrt(((1 - slope) / slope).clamp(min=0)))


def _sigmoid_turn(slope: Tensor) -> Tensor:
    return 2 * _tanh_turn(4 * slope)


# Piecewise linear and convex, with the kink at 0. Of others no turning point is known.
_BENT = (ReLU, LeakyReLU, Identity)
_TURNS: dict[type[Activation], Callable[[Tensor], Tensor]] = {
    Tanh: _tanh_turn,
    Sigmoid: _sigmoid_turn,
} | dict.fromkeys(_BENT, torch.zeros_like)


def _sizes(activation: Activation, box: Box) -> tuple[int, ...]:
    return activation.sizes if isinstance(activation, Blocks) else (box.lower.shape[-1],)


def _parts(activation: Activation, box: Box) -> list[tuple[Activation, Box]]:
    sizes = _sizes(activation, box)
    kinds = activation.activations if isinstance(activation, Blocks) else (activation,)
    ends = zip(box.lower.split(sizes, -1), box.upper.split(sizes, -1), strict=True)
    return [(phi, Box(*pair)) for phi, pair in zip(kinds, ends, strict=True)]
