"""Minimisation of a smooth function of the parameters plus a penalty that has a prox."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.training.composite import Minimum
from declarative_cvx.nonconvex.implicit.training.line_search import downhill
from declarative_cvx.nonconvex.implicit.training.row_functions import Curvature, RowFunction
from declarative_cvx.nonconvex.minimization.conjugate_gradients import conjugate_gradients

Prox = Callable[[Tensor, Tensor], Tensor]

_HALVINGS = 40
# Iterations on one quadratic model, and how much of the residual they have to remove.
_INNER, _SHARE = 2000, 0.05
# Iterations between two looks at the active set, and Newton steps at each.
_LOOK, _FINISH = 25, 8


@dataclass(frozen=True, eq=False)
class Penalised:
    """f(V) + P(V) for a matrix V (rows, k).

    Attributes
    ----------
    smooth : RowFunction
    penalty : callable
        P(V): of each row if `by_row`, shape (rows,), else of all, (1,).
    prox : callable
        (V, step (rows, 1)) -> the prox of step * P at V.
    by_row : bool
        Whether rows may have step sizes of their own.
    jacobian : callable or None
        (V, step) -> the derivative of the prox, one matrix for each row, where that is how it is.
    """

    smooth: RowFunction
    penalty: Callable[[Tensor], Tensor]
    prox: Prox
    by_row: bool
    jacobian: Callable[[Tensor, Tensor], Tensor] | None = None

    def objective(self, V: Tensor) -> Tensor:
        """Of each row if rows are independent, shape (rows,), else of all, (1,)."""
        smooth, penalty = self.smooth.values(V), self.penalty(V)
        return _matched(smooth, penalty) + _matched(penalty, smooth)

    def step_size(self, bound: Tensor) -> Tensor:
        """1 / bound, the same for all rows unless they are independent. (rows, 1)"""
        return 1 / (bound if self.by_row else bound.max().expand_as(bound))

    def residual(self, V: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        """The change of a proximal gradient step, relative to the gradient's terms. (rows,)"""
        change = (V - self.prox(V - step * gradient, step)) / step
        return change.abs().amax(1) / self.smooth.scale(V)[:, 0]


def proximal_newton(
    problem: Penalised, start: Tensor, tol: float = 1e-9, max_iters: int = 50
) -> Minimum:
    """Quadratic models of f, each minimised by accelerated proximal gradients.

    Source: Lee, Sun and Saunders 2014. The start has to satisfy the constraints.
    """
    V, residual = start, start.new_full((len(start),), torch.inf)
    for iteration in range(max_iters + 1):
        gradient = problem.smooth.gradient(V)
        curvature = problem.smooth.curvature(V)
        step = problem.step_size(curvature.bound)
        found = problem.residual(V, gradient, step)
        stalled = iteration > 0 and not bool((found < 0.9 * residual)[residual > tol].any())
        residual = found
        if iteration == max_iters or bool(residual.max() <= tol) or stalled:
            break
        aim = torch.maximum(_SHARE * residual.max(), residual.new_tensor(0.3 * tol))
        model = _Model(problem, V, gradient, curvature, step)
        target = _minimise_model(model, aim * problem.smooth.scale(V)[:, 0])
        V = _descend(problem, V, target - V, gradient)
    return Minimum(V, residual, iteration)


@dataclass(frozen=True, eq=False)
class _Model:
    """<g, S> + <S, H S> / 2 + P(V + S) as a function of V + S, and its proximal gradient steps."""

    problem: Penalised
    center: Tensor  # V
    gradient: Tensor  # g
    curvature: Curvature
    step: Tensor

    def moved(self, at: Tensor) -> Tensor:
        """Where the prox is taken."""
        slope = self.gradient + self.curvature.product(at - self.center)
        return at - self.step * slope

    def next(self, at: Tensor) -> Tensor:
        return self.problem.prox(self.moved(at), self.step)

    def errors(self, at: Tensor) -> Tensor:
        """Change of a step, as a gradient; (rows,)"""
        return ((at - self.next(at)) / self.step).abs().amax(1)


def _minimise_model(model: _Model, allowed: Tensor) -> Tensor:
    """FISTA, with momentum restarted when it points uphill. From time to time it is asked whether
    the active set is the right one: then one Newton step leads to the minimum.
    """
    at = ahead = model.center
    momentum = torch.ones_like(model.step)
    by_row = model.problem.by_row
    for iteration in range(1, _INNER + 1):
        new = model.next(ahead)
        change = ahead - new
        if iteration % _LOOK == 0:
            new = _newton_steps(model, new, allowed)
            if bool((model.errors(new) <= allowed).all()):
                return new
        uphill = (change * (new - at)).sum(1, keepdim=True)
        uphill = uphill if by_row else uphill.sum().expand_as(uphill)
        momentum = torch.where(uphill > 0, 1.0, momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = new + (momentum - 1) / following * (new - at)
        at, momentum = new, following
    return at


def _newton_steps(model: _Model, at: Tensor, allowed: Tensor) -> Tensor:
    """Semismooth Newton steps on V - prox(V - step * slope(V)) = 0, taken by the rows for which
    they bring this nearer to zero.
    """
    jacobian, H = model.problem.jacobian, model.curvature.matrices
    if jacobian is None or H is None:
        return at
    errors = model.errors(at)
    open_rows = (errors > allowed).nonzero()[:, 0]
    for _ in range(_FINISH):
        if not len(open_rows):
            break
        J = jacobian(model.moved(at), model.step)[open_rows]
        eye = torch.eye(at.shape[1], dtype=at.dtype, device=at.device)
        system = eye - J + model.step[open_rows, :, None] * (J @ H[open_rows])
        rest = (at - model.next(at))[open_rows, :, None]
        step, _ = torch.linalg.solve_ex(system, rest)
        tried = at.index_add(0, open_rows, -step[:, :, 0])
        tried = model.next(torch.where(torch.isfinite(tried), tried, at))
        found = model.errors(tried)
        better = found < errors
        at = torch.where(better[:, None], tried, at)
        errors = torch.where(better, found, errors)
        open_rows = (better & (errors > allowed)).nonzero()[:, 0]
    return at


def _descend(problem: Penalised, V: Tensor, move: Tensor, gradient: Tensor) -> Tensor:
    """Along a direction of descent, halved until the objective falls enough (or by rounding)."""
    before = problem.objective(V)
    slope = _matched((gradient * move).sum(1), before)
    change = problem.penalty(V + move) - problem.penalty(V)
    promised = slope + _matched(change, before)
    noise = 1e-14 * (1 + before.abs())
    t = torch.ones_like(before)
    for _ in range(_HALVINGS):
        enough = before + 1e-4 * t * promised + noise
        rises = ~(problem.objective(V + t[:, None] * move) <= enough)
        if not bool(rises.any()):
            break
        t = torch.where(rises, t / 2, t)
    return V + torch.where(rises, 0.0, t)[:, None] * move


def _matched(values: Tensor, like: Tensor) -> Tensor:
    """Row by row, or summed where only the sum is known."""
    return values if len(values) == len(like) else values.sum()[None]


def proximal_gradient(problem: Penalised, start: Tensor, steps: int) -> Minimum:
    """A number of proximal (projected) gradient steps, which IDL Sec. 4.2 allows for instead of
    minimising; the step size is tried at 1 / L and halved until it keeps the objective from rising.
    """
    V = start
    step = problem.step_size(problem.smooth.curvature(V).bound)
    for _ in range(steps):
        gradient, value = problem.smooth.gradient(V), problem.smooth.values(V)
        for _ in range(_HALVINGS):
            new = problem.prox(V - step * gradient, step)
            change = new - V
            model = (gradient * change + change.square() / step / 2).sum(1)
            bound = value + _matched(model, value) + 1e-14 * (1 + value.abs())
            above = problem.smooth.values(new) > bound
            if not bool(above.any()):
                break
            by_row = problem.by_row and len(value) == len(V)
            step = torch.where(above[:, None] if by_row else above.any(), step / 2, step)
        V = new
    return Minimum(V, problem.residual(V, problem.smooth.gradient(V), step), steps)


def conditional_gradient(
    problem: RowFunction,
    vertex: Callable[[Tensor], Tensor],
    start: Tensor,
    tol: float = 1e-6,
    max_iters: int = 500,
) -> Minimum:
    """Frank and Wolfe's method on a bounded convex set, with exact line searches.

    The residual is the duality gap, a bound on how far f is above its minimum, relative to |f|.
    """
    V = start
    for iteration in range(max_iters + 1):
        gradient = problem.gradient(V)
        move = vertex(gradient) - V
        gap = -(gradient * move).sum()
        residual = gap / (1 + problem.values(V).sum().abs())
        if iteration == max_iters or bool(residual <= tol):
            break
        slope = _slope_along(problem, V, move)
        V = V + downhill(slope, gap[None]) * move
    return Minimum(V, residual.clamp(min=0).expand(len(V)), iteration)


def newton_cg(
    problem: RowFunction, start: Tensor, tol: float = 1e-9, max_iters: int = 50
) -> Minimum:
    """Newton's method without a penalty, its systems solved by conjugate gradients."""
    V = start
    for iteration in range(max_iters + 1):
        gradient = problem.gradient(V)
        residual = gradient.abs().amax(1) / problem.scale(V)[:, 0]
        if iteration == max_iters or bool(residual.max() <= tol):
            break
        move = _newton_direction(problem, V, gradient)
        slope = _slope_along(problem, V, move)
        V = V + downhill(slope, gradient.new_zeros(1)) * move
    return Minimum(V, residual, iteration)


def _newton_direction(problem: RowFunction, V: Tensor, gradient: Tensor) -> Tensor:
    """-H^-1 g, roughly, by conjugate gradients on all entries at once."""
    H, rhs = problem.curvature(V).product, -gradient.reshape(1, -1)

    def product(s: Tensor) -> Tensor:
        return H(s.view_as(V)).reshape(1, -1)

    found = conjugate_gradients(product, rhs, torch.ones_like(rhs), tol=1e-4)
    return found.solution.view_as(V)


def _slope_along(problem: RowFunction, V: Tensor, move: Tensor) -> Callable[[Tensor], Tensor]:
    """Slope at V + t move, for t of shape (1,)."""

    def slope(t: Tensor) -> Tensor:
        return (problem.gradient(V + t * move) * move).sum()[None]

    return slope
