"""Robust training by the relaxation (17), its robust counterpart (18) and affine recourse (IDL 5).

The states of data point j are replaced by ``s_j + R_j (u - u_j)``: nominal states s_j and recourse
R_j, that satisfy ``x >= 0`` and ``x >= A x + B u + b`` for every u within sigma of u_j, that is ::

    s_j >= |R_j| sigma,   s_j >= A s_j + B u_j + b + |A R_j - R_j + B| sigma,

and the worst loss over these u is bounded. Without recourse R_j = 0 (18); with sigma = 0 as well
this is (17). (The paper has one R for all data points. As each is off independently of the others,
one for each is less conservative, and every data point becomes a problem of its own.) In (A, B, b),
row by row, in (C, c), and in (s, R), point by point, the problem is convex.

As it stands the relaxation says nothing of the model: with A = B = 0 any s >= 0 is allowed, such
as one with which C s fits the data. So the distance of s from the states proper,
``|s - relu(A s + B u + b)|``, is added to the objective with a weight. On the feasible set it is
``min(s - (A s + B u + b), s)``: linear once it is said for each entry which of the two counts,
which is a block of the alternation too, minimised exactly by comparing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from declarative_cvx.backends import Clarabel
from declarative_cvx.layer import DeclarativeLayer
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

# Below that, relative to the largest entry, what a solver returns is rounding. As data of the next
# problem such entries are no use, and spoil its units.
_NOISE = 1e-9

# Worst cases have many kinks, among which refinement starts near enough only from here.
_TOLERANCE = 1e-12

LOSSES = ("cross_entropy", "squared")


@dataclass(frozen=True)
class RelaxedStates:
    """States of each data point j as affine functions of its input, ``s_j + R_j (u - u_j)``.

    Attributes
    ----------
    s : Tensor, shape (m, n)
    R : Tensor, shape (m, n, p)
        0 without recourse.
    active : Tensor of bool, shape (m, n)
        Where the distance from the states proper is counted as ``s - (A s + B u + b)``, elsewhere
        as ``s``.
    """

    s: Tensor
    R: Tensor
    active: Tensor


@dataclass(frozen=True)
class RobustObjective:
    """What robust training minimises, and under which conditions.

    Attributes
    ----------
    U : Tensor, shape (m, p)
    Y : Tensor, shape (m, q)
        Probabilities of the classes, or values.
    sigma : Tensor, shape (p,)
        How far each input may be off.
    loss : {"cross_entropy", "squared"}
        Averaged over the data.
    gap : float
        Weight of the distance of s from the states proper, averaged over the data.
    ridge : float
        Weight of the sum of squares of A, B and C, and of s and R, averaged over the data.
    kappa : float
        Bound of the infinity norm of A.
    """

    U: Tensor
    Y: Tensor
    sigma: Tensor
    loss: str
    gap: float
    ridge: float
    kappa: float

    def __call__(self, weights: ImplicitWeights, states: RelaxedStates) -> Tensor:
        """The objective's value."""
        s = states.s
        distance = torch.where(states.active, s - self.arguments(weights, s), s).sum()
        squares = sum(M.square().sum() for M in (weights.A, weights.B, weights.C))
        squares = squares + (s.square().sum() + states.R.square().sum()) / len(self.U)
        worst = self.worst_loss(weights, states).mean()
        return worst + self.gap * distance / len(self.U) + self.ridge * squares

    def worst_loss(self, weights: ImplicitWeights, states: RelaxedStates) -> Tensor:
        """A bound of each data point's loss over all inputs within sigma (IDL 5.4), shape (m,)."""
        logits = states.s @ weights.C.t() + weights.c
        H = weights.C @ states.R  # (m, q, p)
        spread = H.abs() @ self.sigma
        if self.loss == "squared":
            return ((logits - self.Y).abs() + spread).square().sum(1)
        of_label = (self.Y[:, None] @ H)[:, 0].abs() @ self.sigma
        return torch.logsumexp(logits + spread, 1) - (logits * self.Y).sum(1) + of_label

    def arguments(self, weights: ImplicitWeights, s: Tensor) -> Tensor:
        """Arguments z = A s + B u + b at the data, shape (m, n)."""
        return s @ weights.A.t() + self.U @ weights.B.t() + weights.b

    def margin(self, weights: ImplicitWeights, states: RelaxedStates) -> Tensor:
        """``|A R - R + B|`` sigma, shape (m, n): what the second condition asks for beyond z."""
        return (weights.A @ states.R - states.R + weights.B).abs() @ self.sigma

    def violation(self, weights: ImplicitWeights, states: RelaxedStates) -> Tensor:
        """The largest violation of a condition on the states or on A."""
        below = self.arguments(weights, states.s) + self.margin(weights, states) - states.s
        negative = states.R.abs() @ self.sigma - states.s
        norm = weights.A.abs().sum(1).max() - self.kappa
        return torch.stack([below.max(), negative.max(), norm]).max().clamp(min=0)

    def activity(self, weights: ImplicitWeights, s: Tensor) -> Tensor:
        """The choice of `RelaxedStates.active` that makes the distance least."""
        return self.arguments(weights, s) > 0


class RowStep:
    """(A, B, b) for given states: one convex problem for each row, one batch for all.

    A problem that is not solved is NaN, here and in the other steps.

    Parameters
    ----------
    objective : RobustObjective
    state_features : int
    recourse : bool
        False where R = 0.
    """

    def __init__(self, objective: RobustObjective, state_features: int, recourse: bool) -> None:
        (m, p), n = objective.U.shape, state_features
        U, sigma = _array(objective.U), _array(objective.sigma)
        a, beta, b, slack = cp.Variable(n), cp.Variable(p), cp.Variable(), cp.Variable(m)
        S, own, active = cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter(m, nonneg=True)
        R, own_R = cp.Parameter((m * p, n)), cp.Parameter((m, p))
        margin = cp.abs(beta) @ sigma * np.ones(m)
        if recourse:
            change = cp.reshape(R @ a, (m, p), order="C") - own_R
            margin = cp.abs(change + _rows(beta, m)) @ sigma
        squares = m * objective.ridge * (cp.sum_squares(a) + cp.sum_squares(beta))
        problem = cp.Problem(
            cp.Minimize(objective.gap * (active @ slack) + squares),
            [
                slack == own - S @ a - U @ beta - b,
                slack >= margin,
                cp.norm1(a) <= objective.kappa,
            ],
        )
        parameters = [S, own, active, *((R, own_R) if recourse else ())]
        self._recourse = recourse
        self._layer = _layer(problem, parameters, [a, beta, b])

    def __call__(self, states: RelaxedStates) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and b."""
        values = [states.s, states.s.t(), states.active.to(states.s.dtype).t()]
        if self._recourse:
            values += [states.R.mT.flatten(0, 1), states.R.transpose(0, 1)]
        A, B, b = self._layer(*values)
        return _clean(A), _clean(B), _clean(b)


class HeadStep:
    """(C, c) for given states: a convex problem.

    Parameters
    ----------
    objective : RobustObjective
    state_features : int
    recourse : bool
        False where R = 0.
    """

    def __init__(self, objective: RobustObjective, state_features: int, recourse: bool) -> None:
        (m, p), q, n = objective.U.shape, objective.Y.shape[1], state_features
        C, c = cp.Variable((q, n)), cp.Variable(q)
        S, R = cp.Parameter((m, n)), cp.Parameter((n, m * p))
        Y, sigma = _array(objective.Y), _array(objective.sigma)
        spread: cp.Expression = cp.Constant(np.zeros((m, q)))
        of_labels: cp.Expression = cp.Constant(0)
        if recourse:
            H = C @ R  # (q, m p): those of all data points side by side
            total = np.kron(np.eye(m), sigma[:, None])
            spread = (cp.abs(H) @ total).T
            labels = np.repeat(Y, p, axis=0).T
            of_labels = cp.sum(cp.abs(cp.sum(cp.multiply(labels, H), axis=0)) @ total)
        worst = _worst_loss(objective.loss, S @ C.T + _rows(c, m), Y, spread, of_labels)
        problem = cp.Problem(cp.Minimize(worst + m * objective.ridge * cp.sum_squares(C)))
        self._recourse = recourse
        self._layer = _layer(problem, [S, R] if recourse else [S], [C, c])

    def __call__(self, states: RelaxedStates) -> tuple[Tensor, Tensor]:
        """C and c."""
        values = [states.s]
        if self._recourse:
            values.append(states.R.transpose(0, 1).flatten(1))
        C, c = self._layer(*values)
        return _clean(C), _clean(c)


class StateStep:
    """(s, R) for a given model: one convex problem for each data point, one batch for all.

    Parameters
    ----------
    objective : RobustObjective
    state_features : int
    recourse : bool
        False keeps R = 0.
    """

    def __init__(self, objective: RobustObjective, state_features: int, recourse: bool) -> None:
        p, q, n = objective.U.shape[1], objective.Y.shape[1], state_features
        sigma = _array(objective.sigma)
        s, slack, logits = cp.Variable(n), cp.Variable(n), cp.Variable(q)
        A, B, C, c = (cp.Parameter(k) for k in ((n, n), (n, p), (q, n), q))
        drive, y, active = cp.Parameter(n), cp.Parameter(q), cp.Parameter(n, nonneg=True)
        variables, parameters = [s], [A, C, c, drive, y, active]
        margin, least = cp.Parameter(n, nonneg=True), cp.Constant(np.zeros(n))
        spread, of_label = cp.Constant(np.zeros(q)), cp.Constant(0)
        squares, linked = objective.ridge * cp.sum_squares(s), []
        if recourse:
            R, H = cp.Variable((n, p)), cp.Variable((q, p))
            margin, least = cp.abs(A @ R - R + B) @ sigma, cp.abs(R) @ sigma
            spread, of_label = cp.abs(H) @ sigma, cp.abs(y @ H) @ sigma
            squares, linked = squares + objective.ridge * cp.sum_squares(R), [H == C @ R]
            variables.append(R)
        parameters.append(B if recourse else margin)
        worst = _worst_loss(objective.loss, logits[None, :], y, spread[None, :], of_label)
        distance = active @ slack + (1 - active) @ s
        problem = cp.Problem(
            cp.Minimize(worst + objective.gap * distance + squares),
            [slack == s - A @ s - drive, slack >= margin, s >= least, logits == C @ s + c, *linked],
        )
        self._objective, self._recourse = objective, recourse
        self._layer = _layer(problem, parameters, variables)

    def __call__(self, weights: ImplicitWeights, active: Tensor) -> RelaxedStates:
        """The best states for this model."""
        drive = self._objective.U @ weights.B.t() + weights.b
        last = weights.B if self._recourse else weights.B.abs() @ self._objective.sigma
        found = self._layer(
            *(weights.A, weights.C, weights.c),
            *(drive, self._objective.Y, active.to(drive.dtype), last),
        )
        none = weights.B.new_zeros(1, 1, 1).expand(len(drive), *weights.B.shape)
        R = _clean(found[1]) if self._recourse else none
        return RelaxedStates(_clean(found[0]), R, active)


def _worst_loss(
    loss: str,
    logits: cp.Expression,  # (m, q)
    Y: np.ndarray | cp.Parameter,  # (m, q); (q,) for one data point
    spread: cp.Expression,  # (m, q)
    of_labels: cp.Expression,
) -> cp.Expression:
    """`RobustObjective.worst_loss`, summed: averages would make multipliers needlessly small."""
    if loss == "squared":
        return cp.sum_squares(cp.abs(logits - Y) + spread)
    linear = cp.sum(cp.multiply(Y, logits)) if Y.ndim == 2 else Y @ logits[0]
    return cp.sum(cp.log_sum_exp(logits + spread, axis=1)) - linear + of_labels


def _layer(
    problem: cp.Problem, parameters: Sequence[cp.Parameter], variables: Sequence[cp.Variable]
) -> DeclarativeLayer:
    solver = Clarabel(tol=_TOLERANCE)
    return DeclarativeLayer(problem, parameters, variables, solver=solver, on_failure="nan")


def _clean(value: Tensor) -> Tensor:
    """Zero where there is nothing but rounding."""
    size = value.abs()
    return torch.where(size <= _NOISE * size.nan_to_num().max(), 0, value)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().double().numpy()


def _rows(vector: cp.Expression, m: int) -> cp.Expression:
    """The vector as each of m rows."""
    return np.ones((m, 1)) @ cp.reshape(vector, (1, vector.size), order="C")
