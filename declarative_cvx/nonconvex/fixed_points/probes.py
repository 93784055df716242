"""What a user's function is found to be by its derivatives at a fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# How near a kink has to be, at least, in units of rounding, and how much farther it is looked for:
# there a smooth function's derivatives differ by as many times as much.
_NEAR, _FARTHER = 16, 8


def mixed(function: Callable[..., Tensor], x: Tensor, arguments: Sequence[Tensor]) -> bool:
    """Whether elements of the batch depend on each other.

    Derivatives of every other element by those between them have to be zero.

    Parameters
    ----------
    function : callable
        Of x and the arguments.
    x : Tensor, shape (batch, ...)
    arguments : sequence of Tensor
        Each (batch, ...).
    """
    if len(x) < 2:
        return False
    pull = torch.func.vjp(function, x, *arguments)[1]
    rest = torch.arange(len(x), device=x.device) % 2 == 1
    weights = _random(x).index_fill(0, torch.nonzero(rest)[:, 0], 0.0)
    found = [grad[rest].nan_to_num(posinf=0.0, neginf=0.0) for grad in pull(weights)]
    return any(bool((grad != 0).any()) for grad in found)


def kinked(
    function: Callable[..., Tensor], x: Tensor, arguments: Sequence[Tensor], tol: float
) -> Tensor:
    """Elements at which the function's derivatives jump, to a tolerance, bool, (batch,).

    They are compared, in one direction, at points on both sides in x and in those arguments that
    have a batch dimension; where they differ, once more nearer by: of smooth functions less.
    """
    eps = torch.finfo(x.dtype).eps
    near = max(_NEAR * eps, tol)
    jump, size = _jumps(function, x, arguments, _FARTHER * near)
    suspect = jump > eps**0.5 * size
    if not bool(suspect.any()):
        return suspect
    return suspect & (_jumps(function, x, arguments, near)[0] > jump / 2)


def _jumps(
    function: Callable[..., Tensor], x: Tensor, arguments: Sequence[Tensor], reach: float
) -> tuple[Tensor, Tensor]:
    """By how much derivatives on both sides differ, and how large they are, each (batch,)."""
    points, weights = [x, *arguments], _random(x)
    own = [value.ndim > 0 and len(value) == len(x) for value in points]
    sides = []
    for sign in (reach, -reach):
        steps = (sign * _step(v) if each else 0.0 for v, each in zip(points, own, strict=True))
        moved = [value + step for value, step in zip(points, steps, strict=True)]
        grads = zip(torch.func.vjp(function, *moved)[1](weights), own, strict=True)
        sides.append(torch.cat([grad.flatten(1) for grad, each in grads if each], 1))
    above, below = sides
    return (above - below).abs().sum(1), (above.abs() + below.abs()).sum(1)


def _step(value: Tensor) -> Tensor:
    """Up to the size of each element's largest entry, or 1 if that is 0."""
    rows = value.detach().flatten(1)
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_ones(len(rows))
    largest = torch.where(largest > 0, largest, 1.0)
    return largest.reshape(-1, *[1] * (value.ndim - 1)) * _random(value)


def _random(value: Tensor) -> Tensor:
    """Numbers from 1/2 to 3/2, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(value.shape, generator=generator, dtype=value.dtype, device="cpu")
    return 0.5 + drawn.to(value.device)
