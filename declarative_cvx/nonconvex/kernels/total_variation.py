"""Total-variation denoising of sequences, batched, exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.kernels.arguments import BatchFunction, align, prepare, require
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.status import Status

# Distances, in units of rounding, that count as zero in the search and in the report.
TOUCHING = 8.0
SOLVED = 1e3


@torch.compiler.disable  # looks at values
def total_variation_1d(
    y: Tensor, strength: Tensor | float, weights: Tensor | None = None
) -> Tensor:
    """Minimise ``sum_i w_i (x_i - y_i)^2 / 2 + sum_i lambda_i |x_{i+1} - x_i|``.

    The running sum of x is a taut string: the shortest curve through a tube of half-width lambda
    around the running sum of y (Davies and Kovac 2001). A pass over the data finds its contacts
    with the tube where x crosses its mean; between these it is a string again, with a mean of its
    own. All pieces of all elements take part in a pass, in some ten vectorised steps; some
    log2 n passes are needed.

    x is constant between contacts, so its derivative averages over such segments.

    Parameters
    ----------
    y : Tensor, shape (..., n)
        Leading dimensions are batch dimensions and broadcast.
    strength : float or Tensor
        lambda, nonnegative; any shape that broadcasts with (..., n - 1), that is, one for each
        difference, or (..., 1) for one per sequence.
    weights : Tensor, shape (..., n), optional
        Positive; ones if not given.

    Returns
    -------
    Tensor, shape (..., n)
        Twice differentiable for all tensors.

    Raises
    ------
    ParameterError
    """
    y, strength, weights = _checked(y, strength, weights)
    return _denoise(y, strength, weights)[0].to(y.dtype)


class TotalVariation1d(nn.Module):
    """`total_variation_1d` as a module.

    Parameters
    ----------
    strength : float or Tensor
        A `torch.nn.Parameter` is learned.
    """

    def __init__(self, strength: Tensor | float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The minimiser; see `total_variation_1d`."""
        return total_variation_1d(y, self.strength, weights)

    def solve(self, y: Tensor, weights: Tensor | None = None) -> KernelSolution:
        """The minimiser and a report.

        The residual is the largest violation of the optimality conditions by the dual variables
        z_i = sum_{j <= i} w_j (x_j - y_j), which are lambda_i sign(x_{i+1} - x_i) at jumps and
        between -lambda_i and lambda_i elsewhere, relative to the largest running sum of w_i y_i
        about the mean. A problem is not `regular` if z_i touches a bound where x does not jump.
        """
        y, strength, weights = _checked(y, self.strength, weights)
        x, pieces = _denoise(y, strength, weights)
        return _report(y, strength, weights, x, pieces)

    def extra_repr(self) -> str:
        return f"strength={self.strength}"


def _checked(
    y: Tensor, strength: Tensor | float, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    given = {"y": y, "strength": strength, "weights": 1.0 if weights is None else weights}
    y, strength, weights = prepare(given)
    if y.ndim == 0 or y.shape[-1] == 0:
        raise ParameterError(f"y has shape {tuple(y.shape)}; expected (..., n) with n >= 1.")
    n = y.shape[-1]
    weights = weights.expand(n) if weights.ndim == 0 else weights
    if strength.ndim == 0 or strength.shape[-1] == 1:
        strength = strength.expand(*strength.shape[:-1], n - 1)
    require("y", y)
    require("strength", strength, lambda v: v.isfinite() & (v >= 0), "a finite nonnegative number")
    require("weights", weights, lambda v: v.isfinite() & (v > 0), "a finite positive number")
    operands = {"y": (y, (n,)), "strength": (strength, (n - 1,)), "weights": (weights, (n,))}
    y, strength, weights = align(operands)
    return y, strength, weights


class _Pieces(NamedTuple):
    """Where the minimiser jumps."""

    label: Tensor  # (..., n), the number of the segment that an entry belongs to
    jump: Tensor  # (..., n - 1), sign of x_{i+1} - x_i, and 0 inside segments


def _denoise(y: Tensor, strength: Tensor, weights: Tensor) -> tuple[Tensor, _Pieces]:
    """The minimiser in float64, by the closed form that holds as long as its jumps stay."""
    y, strength, weights = (t.double() for t in (y, strength, weights))
    detached = (t.detach() for t in (y, strength, weights))
    pieces = _Pieces(*_Search.apply(*detached))
    pull = strength * pieces.jump
    total = _segment_sums(weights * y + pad(pull, (0, 1)) - pad(pull, (1, 0)), pieces.label)
    return total / _segment_sums(weights, pieces.label), pieces


def _segment_sums(values: Tensor, label: Tensor) -> Tensor:
    """For each entry, the sum over its segment."""
    values = values.expand(label.shape)
    return torch.zeros_like(values).scatter_add(-1, label, values).gather(-1, label)


class _Search(BatchFunction):
    """`_Pieces` of the minimiser; piecewise constant, so not differentiated."""

    @staticmethod
    def forward(y: Tensor, strength: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        n = y.shape[-1]
        batch = torch.broadcast_shapes(y.shape[:-1], strength.shape[:-1], weights.shape[:-1])
        tube = _Tube.around(y.expand(*batch, n), strength.expand(*batch, n - 1), weights)
        contact = _contacts(tube).reshape(*batch, n + 1)[..., 1:-1]
        return pad(contact.ne(0).cumsum(-1), (1, 0)), contact.to(y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _Search.over_batch(in_dims, args)


class _Tube(NamedTuple):
    """What the strings have to pass through: all points of all sequences, one after another.

    A known contact is a point where the tube has no width, as are both ends of a sequence.
    """

    position: Tensor  # running sum of the weights
    lower: Tensor
    upper: Tensor
    tolerance: Tensor  # of the heights, for rounding
    known: Tensor  # bool
    origin: Tensor  # int64, which of all points this is

    @classmethod
    def around(cls, y: Tensor, strength: Tensor, weights: Tensor) -> _Tube:
        weights = weights.expand(y.shape)
        mean = (weights * y).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        centre = pad((weights * (y - mean)).cumsum(-1)[..., :-1], (1, 1))
        width = pad(strength, (1, 1))
        size = (centre.abs() + width).amax(-1, keepdim=True)
        known = torch.zeros_like(centre, dtype=torch.bool)
        known[..., 0] = known[..., -1] = True
        return cls(
            pad(weights.cumsum(-1), (1, 0)).flatten(),
            (centre - width).flatten(),
            (centre + width).flatten(),
            (TOUCHING * torch.finfo(y.dtype).eps * size).expand(centre.shape).flatten(),
            known.flatten(),
            torch.arange(centre.numel(), device=y.device),
        )

    def chords(self) -> tuple[Tensor, Tensor]:
        """Straight lines between successive known points: for each point, number and height."""
        line = self.known.cumsum(0) - 1
        position, height = self.position[self.known], self.lower[self.known]
        run, rise = position.diff(append=position[-1:]), height.diff(append=height[-1:])
        # From the end of one sequence to the start of the next there are no points.
        slope = rise / torch.where(run > 0, run, 1.0)
        return line, height[line] + slope[line] * (self.position - position[line])

    def touched(self, points: Tensor, side: Tensor) -> _Tube:
        """With contacts at some points, on the upper side (1) or the lower (-1)."""
        height = torch.where(side > 0, self.upper[points], self.lower[points])
        lower, upper = self.lower.clone(), self.upper.clone()
        lower[points] = upper[points] = height
        known = self.known.clone()
        known[points] = True
        return self._replace(lower=lower, upper=upper, known=known)

    def within(self, lines: Tensor, line: Tensor) -> _Tube:
        """The points of some of the lines, which are given by number, and the lines' ends."""
        chosen = torch.zeros(len(line) + 1, dtype=torch.bool, device=line.device)
        chosen[lines] = True
        kept = chosen[line] | (self.known & chosen[line - 1])
        return _Tube(*(part[kept] for part in self))


def _contacts(tube: _Tube) -> Tensor:
    """1 where a string touches the upper side, -1 where it touches the lower, else 0."""
    result = torch.zeros_like(tube.known, dtype=torch.int8)
    while len(tube.known):
        line, chord = tube.chords()
        points, side = _turns(tube, chord)
        result[tube.origin[points]] = side
        # Lines without turns lie in the tube: these pieces of string are found.
        tube = tube.touched(points, side).within(line[points], line)
    return result


def _turns(tube: _Tube, chord: Tensor) -> tuple[Tensor, Tensor]:
    """Where, and on which side, strings touch as they turn from one side of a chord's direction.

    Of all curves in the tube, a string has the least total variation about any slope. So has the
    curve that moves, relative to the chord, only as far as the tube forces it to; and two such
    curves share their turning points.
    """
    slack = torch.where(tube.known, 0.0, tube.tolerance)
    curve = _play(tube.lower - chord - slack, tube.upper - chord + slack)
    step = curve.diff(prepend=curve[:1])
    moved = step.nonzero()[:, 0]
    up = step[moved] > 0
    turned = (up[:-1] != up[1:]) & ~tube.known[moved[:-1]]
    side = torch.where(up[:-1][turned], -1, 1).to(torch.int8)
    return moved[:-1][turned], side


def _play(lower: Tensor, upper: Tensor) -> Tensor:
    """The sequence q_i = clamp(q_{i-1}, lower_i, upper_i), where lower_0 = upper_0.

    In linear work and log n steps: two clamps in succession are one clamp.
    """
    n = len(lower)
    if n <= 1:
        return lower
    (low0, high0), (low1, high1) = ((lower[k::2], upper[k::2]) for k in (0, 1))
    half = n // 2
    odd = _play(low0[:half].clamp(low1, high1), high0[:half].clamp(low1, high1))
    curve = torch.empty_like(lower)
    curve[0], curve[1::2] = lower[0], odd
    curve[2::2] = odd[: len(low0) - 1].clamp(low0[1:], high0[1:])
    return curve


def _report(
    y: Tensor, strength: Tensor, weights: Tensor, x: Tensor, pieces: _Pieces
) -> KernelSolution:
    rise = x.diff(dim=-1)
    objective = (weights * (x - y) ** 2).sum(-1) / 2 + (strength * rise.abs()).sum(-1)
    with torch.no_grad():
        z = (weights * (x - y)).cumsum(-1)[..., :-1]
        inside = pieces.jump == 0
        violation = torch.where(inside, z.abs() - strength, (z - strength * pieces.jump).abs())
        slack = _largest(violation.clamp(min=0)) / _scale(_largest((weights * y).cumsum(-1).abs()))
        backward = torch.where(inside, 0.0, -rise * pieces.jump)
        wrong = _largest(backward.clamp(min=0)) / _scale(_largest(y.abs()))
        residual = torch.maximum(slack, wrong).to(y.dtype)
        noise = TOUCHING * torch.finfo(torch.float64).eps
        free = torch.where(inside, violation < -noise * strength, backward < 0).all(-1)
        good = residual <= SOLVED * noise
    return KernelSolution(
        value=x.to(y.dtype),
        objective=objective.to(y.dtype),
        status=torch.where(good, int(Status.OPTIMAL), int(Status.INACCURATE)),
        residual=residual,
        gap=torch.zeros_like(residual),
        regular=free,
    )


def _largest(values: Tensor) -> Tensor:
    return pad(values, (1, 0)).amax(-1)


def _scale(size: Tensor) -> Tensor:
    """A divisor: 1 where there is nothing to compare with."""
    return torch.where(size > 0, size, 1.0)
