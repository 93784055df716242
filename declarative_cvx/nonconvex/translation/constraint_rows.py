"""CVXPY's constraints as smooth rows, and their dual variables from the rows' multipliers.

Dual variables have CVXPY's signs. With f the objective to be minimised (minus the problem's, if
that is maximised), its Lagrangian is f + sum of u (lhs - rhs) over equalities and inequalities,
minus the sum of <u, argument> over `NonNeg` and the cones.

Second-order cones are written ``sum(x**2) / t <= t``, which is convex, and regular also at the
apex; t is a variable of its own with the bound t >= 0. Exponential cones are ``y exp(x / y) <= z``
with such a y, power cones ``abs(z) <= x**a y**(1 - a)`` with such x and y. A positive semidefinite
matrix is X = L L' with a lower triangular variable L: where strict complementarity holds and the
constraint is nondegenerate, the solution is regular in (X, L); the multiplier of the equation is
minus the dual matrix, which is positive semidefinite by the second-order condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from cvxpy.constraints import (
    PSD,
    SOC,
    Equality,
    ExpCone,
    Inequality,
    NonNeg,
    NonPos,
    PowCone3D,
    PowConeND,
    Zero,
)
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.translation.domains import POSITIVE, interior
from declarative_cvx.nonconvex.translation.rows import Row
from declarative_cvx.nonconvex.translation.smoothing import Smoother


@dataclass(frozen=True, eq=False)
class Answer:
    """What dual variables are computed from, for a batch.

    Attributes
    ----------
    multiplier : callable
        From a row to its multipliers, (batch, *shape of the row's expression).
    value : callable
        From an expression to its values, (batch, *shape).
    """

    multiplier: Callable[[Row], Tensor]
    value: Callable[[cp.Expression], Tensor]


# The values of a constraint's dual variables, in their order.
Duals = Callable[[Answer], Sequence[Tensor]]


def rows_of(smoother: Smoother, constraint: cp.Constraint) -> Duals:
    """Add the rows of a constraint.

    Returns
    -------
    callable
        The constraint's dual variables, from the multipliers of its rows.

    Raises
    ------
    SpecificationError
        If there is no smooth form of such constraints.
    """
    for kind, rule in _RULES.items():
        if isinstance(constraint, kind):
            return rule(smoother, constraint)
    raise SpecificationError(
        f"{smoother.where} is of the kind {type(constraint).__name__}, for which no smooth form is "
        f"known. Known: {', '.join(kind.__name__ for kind in _RULES)}."
    )


def _equality(smoother: Smoother, constraint: cp.Constraint) -> Duals:
    row = smoother.zero(smoother.smooth(constraint.expr))
    return lambda answer: [answer.multiplier(row)]


def _inequality(smoother: Smoother, constraint: cp.Constraint) -> Duals:
    row = smoother.nonpositive(smoother.smooth(constraint.expr))
    return lambda answer: [answer.multiplier(row)]


def _nonnegative(smoother: Smoother, constraint: cp.Constraint) -> Duals:
    row = smoother.nonpositive(-smoother.smooth(constraint.expr))
    return lambda answer: [answer.multiplier(row)]


def _second_order(smoother: Smoother, constraint: SOC) -> Duals:
    t, x = (smoother.smooth(argument) for argument in constraint.args)
    t, link = smoother.separate(t, POSITIVE)
    axis = constraint.axis if x.ndim == 2 else None
    squares = cp.reshape(cp.sum(cp.square(x), axis=axis), t.shape, order="F")
    row = smoother.nonpositive(squares / t - t)

    def duals(answer: Answer) -> Sequence[Tensor]:
        weight, tip, vector = answer.multiplier(row), answer.value(t), answer.value(x)
        if link is not None:
            by_t = answer.multiplier(link)
        else:
            by_t = weight * (answer.value(squares) / tip**2 + 1)
        ratio = (weight / tip).reshape(len(tip), *_aligned(x.shape, constraint.axis))
        return by_t, -2 * ratio * vector

    return duals


def _aligned(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Shape of one number per cone that broadcasts against the cones' vectors."""
    if len(shape) < 2:
        return (1,) * len(shape)
    return (1, shape[1]) if axis == 0 else (shape[0], 1)


def _semidefinite(smoother: Smoother, constraint: PSD) -> Duals:
    X = smoother.smooth(constraint.args[0])
    if X.shape[-1] == 1:
        single = smoother.nonpositive(-X)
        return lambda answer: [answer.multiplier(single)]
    X = (X + cp.swapaxes(X, -2, -1)) / 2
    triangle = np.nonzero(np.broadcast_to(np.tri(X.shape[-1], dtype=bool), X.shape))
    L = smoother.introduce(X, _factor, cp.Variable(X.shape, sparsity=triangle), _exact_factor)
    row = smoother.zero(X - L @ cp.swapaxes(L, -2, -1))
    return lambda answer: [-answer.multiplier(row)]


def _factor(X: Tensor) -> Tensor:
    """The triangular factor of a matrix near X that is well within the cone."""
    return torch.linalg.cholesky_ex(interior(torch.nan_to_num(X))).L


def _exact_factor(X: Tensor) -> Tensor:
    """The triangular factor, with a nonnegative diagonal, of the nearest semidefinite matrix."""
    values, vectors = torch.linalg.eigh(torch.nan_to_num(X))
    root = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    R = torch.linalg.qr(root.mT).R
    return (R * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., :, None]).mT


def _exponential(smoother: Smoother, constraint: ExpCone) -> Duals:
    x, y, z = (smoother.smooth(argument) for argument in constraint.args)
    y, link = smoother.separate(y, POSITIVE)
    growth = cp.exp(x / y)
    row = smoother.nonpositive(cp.multiply(y, growth) - z)

    def duals(answer: Answer) -> Sequence[Tensor]:
        weight, factor = answer.multiplier(row), answer.value(growth)
        if link is not None:
            by_y = answer.multiplier(link)
        else:
            by_y = -weight * factor * (1 - answer.value(x / y))
        return -weight * factor, by_y, weight

    return duals


def _power3(smoother: Smoother, constraint: PowCone3D) -> Duals:
    x, y, z = (smoother.smooth(argument) for argument in constraint.args)
    alpha = cp.reshape(constraint.alpha, x.shape, order="F")
    (x, link_x), (y, link_y) = (smoother.separate(factor, POSITIVE) for factor in (x, y))
    mean = cp.exp(cp.multiply(alpha, cp.log(x)) + cp.multiply(1 - alpha, cp.log(y)))
    above, below = smoother.nonpositive(z - mean), smoother.nonpositive(-z - mean)

    def duals(answer: Answer) -> Sequence[Tensor]:
        up, down = answer.multiplier(above), answer.multiplier(below)
        scale, weight = (up + down) * answer.value(mean), answer.value(alpha)

        def by_factor(factor: cp.Expression, link: Row | None, share: Tensor) -> Tensor:
            return share * scale / answer.value(factor) if link is None else answer.multiplier(link)

        return by_factor(x, link_x, weight), by_factor(y, link_y, 1 - weight), down - up

    return duals


def _power(smoother: Smoother, constraint: PowConeND) -> Duals:
    W, z = (smoother.smooth(argument) for argument in constraint.args)
    W, link = smoother.separate(W, POSITIVE)
    axis = constraint.axis if W.ndim == 2 else None
    logarithm = cp.sum(cp.multiply(constraint.alpha, cp.log(W)), axis=axis)
    mean = cp.exp(cp.reshape(logarithm, z.shape, order="F"))
    above, below = smoother.nonpositive(z - mean), smoother.nonpositive(-z - mean)

    def duals(answer: Answer) -> Sequence[Tensor]:
        up, down = answer.multiplier(above), answer.multiplier(below)
        if link is not None:
            return answer.multiplier(link), down - up
        scale = (up + down) * answer.value(mean)
        scale = scale.reshape(len(scale), *_aligned(W.shape, constraint.axis))
        return answer.value(constraint.alpha) * scale / answer.value(W), down - up

    return duals


_RULES: dict[type, Callable[[Smoother, cp.Constraint], Duals]] = {
    Equality: _equality,
    Zero: _equality,
    Inequality: _inequality,
    NonPos: _inequality,
    NonNeg: _nonnegative,
    SOC: _second_order,
    PSD: _semidefinite,
    ExpCone: _exponential,
    PowCone3D: _power3,
    PowConeND: _power,
}


def violation(constraint: cp.Constraint) -> cp.Expression:
    """How far a constraint is from holding: an expression, at most zero where it holds."""
    for kind, rule in _VIOLATIONS.items():
        if isinstance(constraint, kind):
            return cp.max(rule(constraint))
    raise SpecificationError(
        f"`{constraint}` is of the kind {type(constraint).__name__}, which cannot be checked. "
        f"Known: {', '.join(kind.__name__ for kind in _VIOLATIONS)}."
    )


def _beyond_cone(constraint: SOC) -> cp.Expression:
    t, x = constraint.args
    return (cp.norm(x, 2, axis=constraint.axis) if x.ndim == 2 else cp.pnorm(x, 2)) - t


def _beyond_exponential(constraint: ExpCone) -> cp.Expression:
    x, y, z = constraint.args
    return cp.maximum(cp.multiply(y, cp.exp(x / y)) - z, -y)


def _beyond_power3(constraint: PowCone3D) -> cp.Expression:
    x, y, z = constraint.args
    alpha = cp.reshape(constraint.alpha, x.shape, order="F")
    return cp.abs(z) - cp.exp(cp.multiply(alpha, cp.log(x)) + cp.multiply(1 - alpha, cp.log(y)))


def _beyond_power(constraint: PowConeND) -> cp.Expression:
    W, z = constraint.args
    axis = constraint.axis if W.ndim == 2 else None
    return cp.abs(z) - cp.exp(cp.sum(cp.multiply(constraint.alpha, cp.log(W)), axis=axis))


_VIOLATIONS: dict[type, Callable[[cp.Constraint], cp.Expression]] = {
    Equality: lambda constraint: cp.abs(constraint.expr),
    Zero: lambda constraint: cp.abs(constraint.expr),
    Inequality: lambda constraint: constraint.expr,
    NonPos: lambda constraint: constraint.expr,
    NonNeg: lambda constraint: -constraint.args[0],
    SOC: _beyond_cone,
    PSD: lambda constraint: -cp.lambda_min(constraint.args[0]),
    ExpCone: _beyond_exponential,
    PowCone3D: _beyond_power3,
    PowConeND: _beyond_power,
}
