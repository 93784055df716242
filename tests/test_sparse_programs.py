"""Nonlinear programs with sparse derivatives are solved and differentiated as with full ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import declarative_cvx as dcx
from declarative_cvx.nonconvex.minimization import active_set, sparsity_rule
from declarative_cvx.nonconvex.minimization.active_set import ActiveSet, solve_symmetric
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation
from declarative_cvx.nonconvex.minimization.saddle_point import SaddlePoint
from declarative_cvx.nonconvex.minimization.sparse.matrix import SparseMatrix
from declarative_cvx.nonconvex.minimization.sparse.pattern import Pattern
from declarative_cvx.nonconvex.minimization.sparse.plan import Plan

double = torch.float64
Built = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]


def swing_up(steps: int = 12) -> Built:
    """Least effort that lifts a pendulum: a chain of equalities, and limits."""
    angle = cp.Variable(steps + 1, value=np.linspace(0, 1.5, steps + 1))
    rate, torque = (cp.Variable(m, value=np.zeros(m)) for m in (steps + 1, steps))
    pull, limit, h = cp.Parameter(value=3.0), cp.Parameter(nonneg=True, value=3.5), 2.0 / steps
    rows = [angle[0] == 0, rate[0] == 0, angle[-1] == 1.5, rate[-1] == 0]
    rows += [angle[1:] - angle[:-1] == h * (rate[1:] + rate[:-1]) / 2]
    rows += [rate[1:] - rate[:-1] == h * (torque - pull * cp.nlp.sin(angle[1:]))]
    rows += [torque <= limit, torque >= -limit]
    cost = h * cp.sum_squares(torque)
    return cp.Problem(cp.Minimize(cost), rows), [pull, limit], [angle, rate, torque]


def path(count: int = 14) -> Built:
    """Way points around a circle."""
    line = np.linspace([-2, 0.3], [2, 0.3], count + 2)[1:-1]
    start = line + np.sin(np.linspace(0, np.pi, count))[:, None] * [0, 1.0]
    at, r = cp.Variable((count, 2), value=start), cp.Parameter(nonneg=True, value=0.8)
    loss = cp.sum_squares(at[1:] - at[:-1]) + cp.sum_squares(at[0] - line[0])
    loss += cp.sum_squares(at[-1] - line[-1])
    return cp.Problem(cp.Minimize(loss), [cp.sum(at**2, axis=1) >= r**2]), [r], [at]


def ellipsoid(n: int = 30) -> Built:
    """One row with every variable."""
    point = np.random.default_rng(6).standard_normal(n) + 1
    u, x = cp.Variable(n, value=np.full(n, 0.3)), cp.Parameter(n, value=point)
    row = np.linspace(0.5, 2, n) @ u**2 == 1
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x) / 2), [row]), [x], [u]


def chain(n: int = 30) -> Built:
    """Bounds, of which some hold, and no rows."""
    x, bend = cp.Variable(n, bounds=[-2, 0.95], value=np.full(n, 0.5)), cp.Parameter(n - 1)
    bend.value = np.linspace(0.8, 1.2, n - 1)
    loss = 10 * cp.sum((x[1:] - cp.multiply(bend, x[:-1] ** 2)) ** 2)
    rows = [x[0] + x[n // 2] <= 1.7]
    return cp.Problem(cp.Minimize(loss + cp.sum_squares(1 - x[:-1])), rows), [bend], [x]


def twice(count: int = 14) -> Built:
    """Every row in the problem twice: multipliers are not unique, the solution is."""
    problem, parameters, variables = path(count)
    rows = [*problem.constraints, *problem.constraints]
    return cp.Problem(problem.objective, rows), parameters, variables


PROBLEMS = {f.__name__: f for f in (swing_up, path, ellipsoid, chain)}


def data_of(built: Built, batch: int = 3) -> list[Tensor]:
    rng = np.random.default_rng(0)
    values = [np.asarray(p.value, dtype=float) for p in built[1]]
    return [
        torch.tensor(np.stack([v + 0.02 * rng.uniform(-1, 1, v.shape) for _ in range(batch)]))
        for v in values
    ]


@pytest.fixture
def road(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes all matrices sparse, or all full."""

    def choose(sparse: bool) -> None:
        limit = -float("inf") if sparse else float("inf")
        monkeypatch.setattr(sparsity_rule, "_WORTHWHILE", limit)

    return choose


def solved(build: Callable[[], Built], orders: int = 1) -> tuple[dcx.Solution, list[Tensor]]:
    """Solution, and derivatives of a fixed loss in the parameters, of one order after the other."""
    built = build()
    leaves = [v.requires_grad_() for v in data_of(built)]
    solution = dcx.DeclarativeLayer(*built).solve(*leaves)
    flat = torch.cat([v.reshape(3, -1) for v in solution.variables], 1)
    loss = (flat * torch.sin(1.0 + torch.arange(flat.shape[1], dtype=double))).sum()
    found: list[Tensor] = []
    for order in range(orders):
        last = order == orders - 1
        grads = torch.autograd.grad(loss, leaves, create_graph=not last, materialize_grads=True)
        found += [g.detach() for g in grads]
        loss = sum((g**2).sum() for g in grads)
    return solution, found


@pytest.mark.parametrize("name", PROBLEMS)
def test_both_roads_lead_to_the_same_answers(name: str, road: Callable[[bool], None]) -> None:
    road(True)
    sparse, grads = solved(PROBLEMS[name], orders=2)
    road(False)
    full, expected = solved(PROBLEMS[name], orders=2)
    assert bool(sparse.solved.all())
    assert bool(full.solved.all())
    torch.testing.assert_close(sparse.value, full.value, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(sparse.variables, full.variables, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_are_those_of_differences(name: str, road: Callable[[bool], None]) -> None:
    road(True)
    built = PROBLEMS[name]()
    layer, data = dcx.DeclarativeLayer(*built), data_of(built, 1)
    torch.manual_seed(0)
    ways = [torch.randn_like(v) for v in data]

    def moved(t: Tensor) -> Tensor:
        answers = layer(*(v + t * way for v, way in zip(data, ways, strict=True)))
        flat = torch.cat([v.reshape(-1) for v in answers])
        return (flat * torch.cos(torch.arange(len(flat), dtype=double))).sum()

    t = torch.zeros((), dtype=double, requires_grad=True)
    (slope,) = torch.autograd.grad(moved(t), t)
    step = 1e-5
    expected = (moved(torch.tensor(step)) - moved(torch.tensor(-step))) / (2 * step)
    assert float(slope - expected).__abs__() <= 1e-6 * (1 + float(expected.abs()))


def test_many_gradients_at_once(road: Callable[[bool], None]) -> None:
    road(True)
    built = swing_up()
    leaves = [v.requires_grad_() for v in data_of(built)]
    angle, *_ = dcx.DeclarativeLayer(*built)(*leaves)
    ways = torch.randn(4, *angle.shape, generator=torch.Generator().manual_seed(0), dtype=double)
    pull = partial(torch.autograd.grad, angle, leaves, retain_graph=True)
    together = pull(ways, is_grads_batched=True)
    for number, way in enumerate(ways):
        for mine, theirs in zip(together, pull(way), strict=True):
            torch.testing.assert_close(mine[number], theirs, rtol=1e-10, atol=1e-12)


def test_sparse_matrices_are_used_where_they_save_work(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    factors = Plan.factors

    def counted(plan: Plan, table: Tensor) -> object:
        used.append(table.shape[1])
        return factors(plan, table)

    monkeypatch.setattr(Plan, "factors", counted)
    built = path(60)
    layer = dcx.DeclarativeLayer(*built)
    assert bool(layer.solve(*data_of(built, 1)).solved.all())
    assert not used
    assert bool(layer.solve(*data_of(built, 20)).solved.all())
    assert 20 in used


def test_dependent_rows_are_left_to_full_matrices(
    road: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    solve = solve_symmetric

    def counted(matrix: Tensor, rhs: Tensor, longest: float) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(len(matrix))
        return solve(matrix, rhs, longest)

    road(False)
    full, expected = solved(twice)
    monkeypatch.setattr(active_set, "solve_symmetric", counted)
    road(True)
    sparse, grads = solved(twice)
    assert asked
    assert bool(sparse.solved.all())
    torch.testing.assert_close(sparse.variables[0], full.variables[0], rtol=1e-8, atol=1e-8)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


# --- systems -------------------------------------------------------------------------------------


def evaluation(batch: int) -> Evaluation:
    """A chain with a positive definite Hessian, and rows of neighbours."""
    n = 30
    places = [(i, j) for i in range(n) for j in (i - 1, i, i + 1) if 0 <= j < n]
    full = torch.randn(batch, n, n, dtype=double)
    full = full + full.mT + 8 * torch.eye(n, dtype=double)
    hessian = SparseMatrix(
        torch.stack([full[:, i, j] for i, j in places], 1), Pattern(places, (n, n))
    )
    lines = [(i, j) for i in range(11) for j in range(n) if i == 0 or j in (2 * i, 2 * i + 1)]
    jacobian = SparseMatrix(torch.randn(batch, len(lines), dtype=double), Pattern(lines, (11, n)))
    plan = Plan.of(hessian.pattern, jacobian.pattern.rest)
    return Evaluation(torch.zeros(batch, 11, dtype=double), jacobian, hessian, plan)


def some_active(batch: int) -> ActiveSet:
    lower = torch.rand(batch, 30) < 0.2
    return ActiveSet(torch.rand(batch, 10) < 0.6, lower, torch.zeros_like(lower))


def test_systems_of_free_variables_and_active_rows() -> None:
    torch.manual_seed(0)
    at, active = evaluation(6), some_active(6)
    active.rows[:, 4] &= active.free[:, 10] | active.free[:, 11]
    kept = torch.cat([active.free, active.rows], 1)
    rhs = torch.randn(6, 40, 2, dtype=double) * kept[:, :, None]
    found, residual, singular = active.solve(at, rhs)
    matrix = active.matrix(at)
    alone = torch.linalg.matrix_rank(matrix) == 40
    assert torch.equal(singular, ~alone)
    assert int(alone.sum()) >= 3
    expected = torch.linalg.solve(matrix[alone], rhs[alone])
    torch.testing.assert_close(found[alone], expected, rtol=1e-9, atol=1e-9)
    assert float(residual[alone].max()) <= 1e-11


def test_singular_systems_are_found_whatever_the_right_hand_side() -> None:
    torch.manual_seed(0)
    at, active = evaluation(4), some_active(4)
    active = ActiveSet(torch.ones_like(active.rows), torch.zeros_like(active.lower), active.upper)
    values = at.jacobian.values.clone()
    values[2, -2:] = 0.0  # the last row
    values[3, -2:] *= 1e-13  # which is regular in its own units
    at = Evaluation(at.values, SparseMatrix(values, at.jacobian.pattern), at.hessian, at.plan)
    rhs = torch.randn(4, 40, 1, dtype=double)
    rhs[2:, -1] = 0.0
    found, _, singular = active.solve(at, rhs)
    assert singular.tolist()[:3] == [False, False, True]
    expected = solve_symmetric(active.matrix(at), rhs)[0]
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-8, atol=1e-8)


def test_the_norm_of_the_inverse_shows_dependent_rows() -> None:
    torch.manual_seed(0)
    at = evaluation(3)
    values = at.jacobian.values.clone()
    pattern = Pattern([*at.jacobian.pattern.places, (11, 20), (11, 21)], (12, 30))
    copies = values[:, -2:] * torch.tensor([[1.0], [-2.0], [1.0]])
    copies[2, 0] *= 1.5
    rows = SparseMatrix(torch.cat([values, copies], 1), pattern).rest()
    plan = Plan.of(at.hessian.pattern, rows.pattern)
    assert plan is not None
    free, active = torch.ones(3, 30), torch.ones(3, 11)
    norm = SaddlePoint.of(plan, at.hessian, rows, free, active).inverse_norm()
    assert norm[0] > 0.5
    assert norm[1] > 0.5
    assert norm[2] < 1e-6
