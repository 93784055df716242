"""Reductions and scans along axes, as products of steps that are smooth everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cvxpy as cp
import torch
from numpy.lib.array_utils import normalize_axis_tuple
from torch import Tensor

from declarative_cvx.nonconvex.translation.rule import Function, Operand, Rule

# Of a tensor (..., n), over its last dimension.
Kernel = Callable[[Tensor], Tensor]


def over_axes(kernel: Kernel) -> Rule:
    """Rule of an atom that reduces its `axis`, several axes, or all of them."""

    def rule(atom: cp.Expression) -> tuple[Function, Sequence[Operand]]:
        return reduction(atom, kernel), atom.args

    return rule


def reduction(atom: cp.Expression, kernel: Kernel) -> Callable[[Tensor], Tensor]:
    """Reduce the axes of an atom, whose entries come in CVXPY's (Fortran) order."""
    rank, shape = atom.args[0].ndim, atom.shape
    every = atom.axis is None or rank == 0
    axes = tuple(range(rank)) if every else normalize_axis_tuple(atom.axis, rank)
    kept = [axis for axis in range(rank) if axis not in axes]
    order = (*kept, *reversed(axes))

    def reduce(x: Tensor) -> Tensor:
        x = x.permute(order)
        return kernel(x.reshape(*x.shape[: len(kept)], -1)).reshape(shape)

    return reduce


def product(x: Tensor) -> Tensor:
    """Product over the last dimension, halved again and again.

    Unlike torch.prod it has derivatives of every order where entries are zero.
    """
    if x.shape[-1] == 0:
        return x.new_ones(x.shape[:-1])
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        x = x[..., ::2] * x[..., 1::2]
    return x[..., 0]


def running(x: Tensor, step: Callable[[Tensor, Tensor], Tensor], neutral: float) -> Tensor:
    """Running totals over the last dimension of an associative operation, in log2(n) steps."""
    n, shift = x.shape[-1], 1
    while shift < n:
        earlier = torch.nn.functional.pad(x[..., :-shift], (shift, 0), value=neutral)
        x = step(x, earlier)
        shift *= 2
    return x


def running_along(step: Callable[[Tensor, Tensor], Tensor], neutral: float) -> Rule:
    """Rule of an atom with running totals along its axis; of all entries if that is None."""

    def rule(atom: cp.Expression) -> tuple[Function, Sequence[Operand]]:
        shape = atom.shape
        if atom.axis is None or atom.args[0].ndim == 0:
            return lambda x: running(x.reshape(-1), step, neutral).reshape(shape), atom.args
        axis = int(atom.axis)
        return lambda x: running(x.movedim(axis, -1), step, neutral).movedim(-1, axis), atom.args

    return rule
