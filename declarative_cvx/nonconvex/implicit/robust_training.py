"""Robust training: models and states in turn, each by a convex problem (IDL 5.3, 5.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError, SpecificationError, nearest
from declarative_cvx.nonconvex.implicit.activations import ReLU
from declarative_cvx.nonconvex.implicit.equilibrium import solve_equilibrium
from declarative_cvx.nonconvex.implicit.parametrizations import InfinityNorm
from declarative_cvx.nonconvex.implicit.robust_counterpart import (
    LOSSES,
    HeadStep,
    RelaxedStates,
    RobustObjective,
    RowStep,
    StateStep,
)
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

# Of Adam, for the start.
_STEPS, _RATE = 150, 0.03


@dataclass(frozen=True, eq=False)
class RobustFit:
    """A robustly trained model.

    Attributes
    ----------
    weights : ImplicitWeights
        With ReLU and D = 0.
    states : RelaxedStates
        That go with it in the objective; the model itself computes states of its own.
    objective : RobustObjective
    history : tuple of float
        The objective's value at the start and after each sweep. It never rises.
    unsolved : tuple of int
        For each sweep, how many rows, heads and data points were left as they were because their
        problem was not solved.
    refitted : bool
        Whether (C, c) were fitted once more at the end: asked for, and that problem solved.
    """

    weights: ImplicitWeights
    states: RelaxedStates
    objective: RobustObjective
    history: tuple[float, ...]
    unsolved: tuple[int, ...]
    refitted: bool


@torch.no_grad()
def fit_robust(
    U: Tensor,
    Y: Tensor,
    sigma: Tensor | float,
    state_features: int,
    *,
    recourse: bool = True,
    loss: str = "cross_entropy",
    gap: float = 0.1,
    ridge: float = 1e-3,
    kappa: float = 0.9,
    sweeps: int = 10,
    refit: bool = True,
    start: ImplicitWeights | None = None,
    generator: torch.Generator | None = None,
) -> RobustFit:
    """Train a ReLU model against inputs that are off by up to `sigma` (IDL 5.3, 5.4).

    Each sweep solves for (A, B, b), one batch of rows, for (C, c), and for the states, one batch
    of data points: convex problems written in CVXPY and solved by `DeclarativeLayer`. For small
    models and some hundred data points.

    Parameters
    ----------
    U : Tensor, shape (m, p)
    Y : Tensor, shape (m, q)
        Probabilities of the classes (one-hot), or values for the squared loss.
    sigma : float or Tensor, shape (p,)
        Not negative. With 0 and no recourse this is the relaxation (17).
    state_features : int
    recourse : bool, optional
        States depend on the uncertain input, linearly; without, the same states must do for all
        inputs within sigma.
    loss : {"cross_entropy", "squared"}, optional
    gap, ridge, kappa : float, optional
        See `RobustObjective`.
    sweeps : int, optional
    refit : bool, optional
        At the end fit (C, c) once more, to the states that the model itself computes, with their
        derivatives by the input as recourse: relaxed states are not quite what it computes.
    start : ImplicitWeights, optional
        A ReLU model to start from, with D = 0 and ||A||_inf <= kappa. The alternation stays near
        it; unless given, it is trained as usual, by gradients of the objective without
        uncertainty.
    generator : torch.Generator, optional
        For the weights from which that starts.

    Returns
    -------
    RobustFit

    Raises
    ------
    ParameterError, SpecificationError
        If arguments are wrong.
    SolveError
        If the start has no states.
    """
    objective = _objective(U, Y, sigma, loss, gap, ridge, kappa)
    weights = _start(objective, state_features, generator) if start is None else start
    _check_start(objective, weights, state_features)
    row_step = RowStep(objective, state_features, recourse)
    head_step = HeadStep(objective, state_features, recourse)
    state_step = StateStep(objective, state_features, recourse)
    states = _first_states(objective, weights)
    history, unsolved = [float(objective(weights, states))], []
    for _ in range(sweeps):
        rows, head = row_step(states), head_step(states)
        weights, missing = _updated(weights, rows, head)
        active = objective.activity(weights, states.s)
        states, more = _kept(replace(states, active=active), state_step(weights, active))
        unsolved.append(missing + more)
        history.append(float(objective(weights, states)))
    last = _proper_head(objective, weights) if refit else None
    if last is not None:
        weights = replace(weights, C=last[0], c=last[1])
    return RobustFit(
        weights, states, objective, tuple(history), tuple(unsolved), refitted=last is not None
    )


def _updated(
    weights: ImplicitWeights, rows: tuple[Tensor, Tensor, Tensor], head: tuple[Tensor, Tensor]
) -> tuple[ImplicitWeights, int]:
    """The new rows of (A, B, b) and head (C, c), where solved; how many were not."""
    (A, B, b), (C, c) = rows, head
    kept, same = b.isnan(), c.isnan().any()
    A = torch.where(kept[:, None], weights.A, A)
    B = torch.where(kept[:, None], weights.B, B)
    C, c = torch.where(same, weights.C, C), torch.where(same, weights.c, c)
    b = torch.where(kept, weights.b, b)
    return replace(weights, A=A, B=B, C=C, b=b, c=c), int(kept.sum() + same)


def _kept(before: RelaxedStates, after: RelaxedStates) -> tuple[RelaxedStates, int]:
    """The new states where solved, those before elsewhere, which are feasible; how many."""
    kept = after.s.isnan().any(1)
    s = torch.where(kept[:, None], before.s, after.s)
    R = torch.where(kept[:, None, None], before.R, after.R)
    return RelaxedStates(s, R, before.active), int(kept.sum())


def _proper_head(
    objective: RobustObjective, weights: ImplicitWeights
) -> tuple[Tensor, Tensor] | None:
    """(C, c) for the states proper, with their derivatives by the input as recourse, if solved."""
    x = _solved_states(weights, objective.U @ weights.B.t() + weights.b)
    slope = weights.activation.slope(objective.arguments(weights, x))[:, :, None]
    eye = torch.eye(len(weights.A), dtype=x.dtype, device=x.device)
    R = torch.linalg.solve(eye - slope * weights.A, slope * weights.B)
    proper = RelaxedStates(x, R, x > 0)
    C, c = HeadStep(objective, len(weights.A), recourse=True)(proper)
    return None if bool(c.isnan().any()) else (C, c)


def _objective(
    U: Tensor, Y: Tensor, sigma: Tensor | float, loss: str, gap: float, ridge: float, kappa: float
) -> RobustObjective:
    if loss not in LOSSES:
        raise SpecificationError(f"Unknown loss {loss!r}. {nearest(loss, LOSSES)}")
    if U.ndim != 2 or Y.ndim != 2 or len(U) != len(Y) or not len(U):
        raise ParameterError(
            "U and Y must be matrices with one row for each data point, got shapes "
            f"{tuple(U.shape)} and {tuple(Y.shape)}."
        )
    for name, value in (("U", U), ("Y", Y)):
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ParameterError(f"{name} must be floating and finite; one-hot labels as floats.")
    if loss == "cross_entropy" and (bool((Y < 0).any()) or not _sum_to_one(Y)):
        raise ParameterError("Each row of Y must be probabilities: not negative, with sum 1.")
    size = torch.as_tensor(sigma, dtype=U.dtype, device=U.device)
    if size.shape not in ((), U.shape[1:]) or not bool((size >= 0).all() & size.isfinite().all()):
        raise ParameterError(
            f"sigma must be a number or have shape ({U.shape[1]},), finite and not negative, "
            f"got {sigma!r}."
        )
    if gap < 0 or ridge < 0 or not 0 <= kappa < 1:
        raise ParameterError(
            "gap and ridge must not be negative and kappa from 0 to below 1, "
            f"got {gap}, {ridge}, {kappa}."
        )
    return RobustObjective(U, Y, size.expand(U.shape[1]), loss, gap, ridge, kappa)


def _sum_to_one(Y: Tensor) -> bool:
    return bool(((Y.sum(1) - 1).abs() <= 1e-5).all())


def _start(
    objective: RobustObjective, n: int, generator: torch.Generator | None
) -> ImplicitWeights:
    """A model trained as usual, by the objective without uncertainty, from a random one."""
    U, q = objective.U, objective.Y.shape[1]

    def draw(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=U.dtype)
        return (drawn / columns**0.5).to(U.device)

    first = [draw(n, n), draw(n, U.shape[1]), draw(q, n), U.new_zeros(n), U.new_zeros(q)]
    free = [value.requires_grad_() for value in first]
    optimiser = torch.optim.Adam(free, lr=_RATE)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        with torch.enable_grad():
            _nominal(objective, _projected(free, objective.kappa)).backward()
        optimiser.step()
    return _projected(free, objective.kappa).detach()


def _projected(free: list[Tensor], kappa: float) -> ImplicitWeights:
    """Weights whose A is the nearest one with ||A||_inf <= kappa."""
    A, B, C, b, c = free
    A = InfinityNorm(kappa).matrix(A) if kappa else 0 * A
    return ImplicitWeights(A, B, C, B.new_zeros(len(C), B.shape[1]), b, c, ReLU())


def _nominal(objective: RobustObjective, weights: ImplicitWeights) -> Tensor:
    """The objective for certain inputs and the states proper."""
    drive = objective.U @ weights.B.t() + weights.b
    x = solve_equilibrium(weights.A, drive, weights.activation, on_irregular="ignore").x
    certain = replace(objective, sigma=torch.zeros_like(objective.sigma))
    none = weights.B.new_zeros(len(x), *weights.B.shape)
    return certain(weights, RelaxedStates(x, none, x > 0))


def _check_start(objective: RobustObjective, weights: ImplicitWeights, n: int) -> None:
    p, q = objective.U.shape[1], objective.Y.shape[1]
    found = (weights.state_features, weights.in_features, weights.out_features)
    if found != (n, p, q) or weights.activation.name != "relu" or bool(weights.D.to_dense().any()):
        raise ParameterError(
            f"The start must be a ReLU model with {n} states, {p} inputs, {q} outputs and D = 0, "
            f"got {found} and {weights.activation.name}."
        )
    norm = float(weights.A.to_dense().abs().sum(1).max())
    if norm > objective.kappa * (1 + 1e-6):
        raise ParameterError(f"The start has ||A||_inf = {norm:.6g}, above kappa.")


def _first_states(objective: RobustObjective, weights: ImplicitWeights) -> RelaxedStates:
    """States without recourse that satisfy all conditions: ``S = relu(A S + B u + b + margin)``."""
    R = torch.zeros_like(weights.B).expand(len(objective.U), *weights.B.shape)
    drive = objective.U @ weights.B.t() + weights.b + weights.B.abs() @ objective.sigma
    s = _solved_states(weights, drive)
    return RelaxedStates(s, R, objective.activity(weights, s))


def _solved_states(weights: ImplicitWeights, drive: Tensor) -> Tensor:
    solution = solve_equilibrium(weights.A, drive, weights.activation)
    solution.require_solved()
    return solution.x
