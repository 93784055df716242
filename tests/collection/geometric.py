"""Geometric programs, whose optimality conditions are written in logarithms."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from collection.exponential import smooth
from collection.oracles import closed
from collection.problem import Built, Collector

PROBLEMS = Collector()


def _can(volume: Tensor, lid: Tensor) -> tuple[Tensor, Tensor]:
    # least lid 2 pi r^2 + 2 pi r h with pi r^2 h = volume
    r = (volume / (2 * torch.pi * lid)) ** (1 / 3)
    return r, volume / (torch.pi * r**2)


@PROBLEMS.add("GP", (3.0, 1.4), closed(_can), gp=True)
def _can_of_given_volume() -> Built:
    r, h = cp.Variable(pos=True), cp.Variable(pos=True)
    volume, lid = cp.Parameter(pos=True), cp.Parameter(pos=True)
    loss = lid * (2 * np.pi) * r**2 + 2 * np.pi * r * h
    return cp.Problem(cp.Minimize(loss), [np.pi * r**2 * h >= volume]), [volume, lid], [r, h]


def _box_equations(z: Tensor, wall: Tensor, floor: Tensor, ratio: Tensor) -> Tensor:
    # log h, log w, log d and two multipliers; the aspect ratio w <= ratio d is not reached
    h, w, d = torch.exp(z[:3])
    total = 2 * h * (w + d)
    return torch.stack(
        [
            -1 + z[3],
            -1 + z[3] * 2 * h * w / total + z[4],
            -1 + z[3] * 2 * h * d / total + z[4],
            total / wall - 1,
            w * d / floor - 1,
        ]
    )


@smooth(
    "GP",
    (20.0, 3.0, 2.0),
    _box_equations,
    lambda h, w, d: np.concatenate([np.log([h, w, d]), [1.0, 0.5]]),
    lambda z, *_: tuple(torch.exp(z[:3])),
    gp=True,
    into=PROBLEMS,
    positive=slice(3, 5),
)
def _box_within_wall_and_floor() -> Built:
    h, w, d = (cp.Variable(pos=True) for _ in range(3))
    wall, floor, ratio = (cp.Parameter(pos=True) for _ in range(3))
    rows = [2 * h * w + 2 * h * d <= wall, w * d <= floor, w <= ratio * d]
    return cp.Problem(cp.Maximize(h * w * d), rows), [wall, floor, ratio], [h, w, d]


def _delay_equations(z: Tensor, load: Tensor, area: Tensor) -> Tensor:
    sizes = torch.exp(z[:3])
    following = torch.cat([sizes[1:], load[None]])
    delays = following / sizes
    pull = -delays + torch.cat([torch.zeros(1, dtype=z.dtype), delays[:-1]])
    return torch.cat([pull / delays.sum() + z[3] * sizes / area, sizes.sum()[None] / area - 1])


@smooth(
    "GP",
    (8.0, 6.0),
    _delay_equations,
    lambda x: np.append(np.log(x), 0.5),
    lambda z, *_: (torch.exp(z[:3]),),
    gp=True,
    into=PROBLEMS,
    positive=slice(3, 4),
)
def _gate_sizes_of_least_delay() -> Built:
    x, load, area = cp.Variable(3, pos=True), cp.Parameter(pos=True), cp.Parameter(pos=True)
    delay = x[1] / x[0] + x[2] / x[1] + load / x[2]
    return cp.Problem(cp.Minimize(delay), [cp.sum(x) <= area]), [load, area], [x]
