"""Solids as triangles, each the surface that an outline sweeps when it turns about an axis.

A few sides make prisms and pyramids, many make round bodies. Two solids of one class differ in
their proportions and in how they are turned; ellipsoid and sphere are therefore one class, and so
are box and cube.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Outline = list[tuple[float, float]]  # (distance from the axis, height), in order

ROUND = 24  # sides of a body that passes for round
STRETCH = 0.8, 1.25  # range of the factor for each axis
TILT = math.pi / 18  # largest angle between the axis and the vertical


def _arc(center: tuple[float, float], radius: float, start: float, stop: float) -> Outline:
    """Points of a circle between two angles in degrees, 0 pointing away from the axis."""
    angles = torch.linspace(math.radians(start), math.radians(stop), ROUND // 2 + 1).tolist()
    r, z = center
    return [(r + radius * math.cos(a), z + radius * math.sin(a)) for a in angles]


_COLUMN: Outline = [(0, -1), (1, -1), (1, 1), (0, 1)]
_PEAK: Outline = [(0, -1), (1, -1), (0, 1)]
_TWO_PEAKS: Outline = [(0, -1), (1, 0), (0, 1)]

SOLIDS: dict[str, tuple[Outline, int]] = {
    "ellipsoid": (_arc((0, 0), 1, -90, 90), ROUND),
    "box": (_COLUMN, 4),
    "cylinder": (_COLUMN, ROUND),
    "cone": (_PEAK, ROUND),
    "torus": (_arc((0.7, 0), 0.3, 0, 360), ROUND),
    "pyramid": (_PEAK, 4),
    "capsule": (_arc((0, -0.5), 0.6, -90, 0) + _arc((0, 0.5), 0.6, 0, 90), ROUND),
    "prism": (_COLUMN, 3),
    "hexagonal prism": (_COLUMN, 6),
    "ring": ([(0.45, -0.3), (1, -0.3), (1, 0.3), (0.45, 0.3), (0.45, -0.3)], ROUND),
    "frustum": ([(0, -1), (1, -1), (0.5, 1), (0, 1)], ROUND),
    "dome": ([(0, 0), *_arc((0, 0), 1, 0, 90)], ROUND),
    "double cone": (_TWO_PEAKS, ROUND),
    "octahedron": (_TWO_PEAKS, 4),
    "hourglass": ([(0, -1), (1, -1), (0.25, 0), (1, 1), (0, 1)], ROUND),
}


def swept(outline: Outline, sides: int) -> Tensor:  # -> (triangles, 3 corners, 3)
    """Triangles of the surface that an outline sweeps in a full turn of so many steps.

    Where the outline goes up, the corners are counterclockwise as seen from outside.
    """
    r, z = torch.tensor(outline).T[..., None]
    turn = torch.arange(sides + 1) * (2 * math.pi / sides)
    corners = torch.stack([r * turn.cos(), r * turn.sin(), z.expand(-1, sides + 1)], -1)
    a, b = corners[:-1, :-1], corners[1:, :-1]
    c, d = corners[1:, 1:], corners[:-1, 1:]
    halves = torch.stack([torch.stack([a, c, b], 2), torch.stack([a, d, c], 2)])
    return halves.reshape(-1, 3, 3)


def posed(triangles: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Copies of a solid (triangles, 3, 3), stretched and turned: (count, triangles, 3, 3)."""
    low, high = STRETCH
    stretch = low * (high / low) ** torch.rand(count, 3, generator=generator)
    about, towards, tilt = torch.rand(3, count, generator=generator) * 2 * math.pi
    tilt = tilt * (TILT / (2 * math.pi))
    turn = _rotation(towards, 2) @ _rotation(tilt, 0) @ _rotation(about, 2)
    return triangles @ (turn * stretch[:, None]).mT[:, None]


def _rotation(angle: Tensor, axis: int) -> Tensor:  # (count,) -> (count, 3, 3)
    """Rotation about one of the three axes."""
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    rows = [[one, zero, zero], [zero, angle.cos(), -angle.sin()], [zero, angle.sin(), angle.cos()]]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return matrix.roll((axis, axis), (-2, -1))
