"""Programs whose numbers are hard to trust: right, or marked; never wrong without a word."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from declarative_cvx import Clarabel, DeclarativeLayer, Moreau, Status
from declarative_cvx.cones import Cone
from declarative_cvx.program import ConeProgram, Point, Sparsity, Structure
from declarative_cvx.residuals import own_violation
from declarative_cvx.scaling import Scaling

RIGHT = 1e-6
Arrays = tuple[np.ndarray, ...]


def stacked(elements: list[Arrays]) -> list[Tensor]:
    return [torch.tensor(np.stack(column)) for column in zip(*elements, strict=True)]


# Minimisers that are nearly not unique


@pytest.mark.parametrize("order", range(1, 14))
def test_nearly_flat_minimum_is_right_or_irregular(order: int) -> None:
    """Min c x0 + |x0| + |x1| over [[1, x0], [x0, x1]] >> 0 is at zero, as long as c < 1."""
    x, c = cp.Variable(2), cp.Parameter()
    objective = c * x[0] + cp.abs(x[0]) + cp.abs(x[1])
    psd = cp.bmat([[1, x[0]], [x[0], x[1]]]) >> 0
    layer = DeclarativeLayer(cp.Problem(cp.Minimize(objective), [psd]), [c], [x], on_failure="nan")
    solution = layer.solve(torch.tensor(1 - 10.0**-order, dtype=torch.float64))
    if not solution.status[0].solved:
        return
    error = float(solution.variables[0].abs().max())
    assert error <= RIGHT
    assert error <= 1e-10 or not bool(solution.derivative.regular)


# Data of widely mixed sizes


def _exponential(solver: str) -> DeclarativeLayer:
    """Min sum exp(x) - c'x is at x = log(c)."""
    x, c = cp.Variable(3), cp.Parameter(3, pos=True)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.exp(x)) - c @ x))
    return DeclarativeLayer(problem, [c], [x], solver, on_failure="nan")


def _costs() -> Tensor:
    """From 1 to 1e20, alike and beside a cost of 1."""
    alike = torch.logspace(0, 20, 21, dtype=torch.float64)[:, None].repeat(1, 3)
    mixed = alike.clone()
    mixed[:, 1] = 1.0
    return torch.cat([alike, mixed])


@pytest.mark.parametrize("solver", ["Moreau", "Clarabel"])
def test_large_costs_of_exponentials_are_met_or_not_solved(solver: str) -> None:
    costs = _costs()
    solution = _exponential(solver).solve(costs)
    assert not {Status.INFEASIBLE, Status.UNBOUNDED} & set(solution.status)
    solved = [status.solved for status in solution.status]
    assert all(solved[:5])
    error = (solution.variables[0] - costs.log())[solved].abs().amax(1)
    assert float((error / costs.log()[solved].abs().amax(1).clamp(min=1)).max()) <= RIGHT


def test_auto_meets_costs_of_exponentials_up_to_a_million() -> None:
    costs = _costs()[[0, 3, 6, 24, 27]]
    (x,) = _exponential("auto")(costs)
    assert float((x - costs.log()).abs().max()) <= RIGHT


def _vertex(rng: np.random.Generator, big: float, columns: bool) -> Arrays:
    """A linear program with a known vertex, of which two entries are large."""
    x = rng.standard_normal(4) * [big, big, 1, 1]
    G = rng.standard_normal((8, 4)) / ([big, big, 1, 1] if columns else [1] * 4)
    active = rng.permutation(8)[:4]
    slack = np.abs(rng.standard_normal(8))
    slack[active] = 0
    multipliers = np.zeros(8)
    multipliers[active] = rng.random(4) + 0.1
    return -G.T @ multipliers, G, G @ x + slack, x


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("order", [4, 7, 9, 10, 12])
def test_large_vertices_are_found_or_not_solved(order: int, columns: bool) -> None:
    rng = np.random.default_rng(order)
    q, G, h, expected = stacked([_vertex(rng, 10.0**order, columns) for _ in range(16)])
    x, parameters = cp.Variable(4), (cp.Parameter(4), cp.Parameter((8, 4)), cp.Parameter(8))
    problem = cp.Problem(cp.Minimize(parameters[0] @ x), [parameters[1] @ x <= parameters[2]])
    layer = DeclarativeLayer(problem, parameters, [x], on_failure="nan")
    solution = layer.solve(q, G, h)
    assert not {Status.INFEASIBLE, Status.UNBOUNDED} & set(solution.status)
    solved = torch.tensor([status.solved for status in solution.status])
    assert order > 8 or bool(solved.all())
    error = (solution.variables[0] - expected).abs().amax(1) / expected.abs().amax(1)
    assert bool((error[solved] <= 1e-5).all())


@pytest.mark.parametrize("order", [5, 8, 9])
@pytest.mark.parametrize("solver", ["auto", "SCS"])
def test_large_semidefinite_solutions_are_not_called_infeasible(solver: str, order: int) -> None:
    """Min w0 over [[w0, 1], [1, w1]] >> 0, w1 <= p is 1 / p."""
    w, p = cp.Variable(2), cp.Parameter(pos=True)
    psd = cp.bmat([[w[0], 1], [1, w[1]]]) >> 0
    problem = cp.Problem(cp.Minimize(w[0]), [psd, w[1] <= p])
    layer = DeclarativeLayer(problem, [p], [w], solver, on_failure="nan")
    solution = layer.solve(torch.tensor(10.0**-order, dtype=torch.float64))
    status = solution.status[0]
    assert status not in (Status.INFEASIBLE, Status.UNBOUNDED)
    if status.solved:
        assert float(solution.variables[0][0]) == pytest.approx(10.0**order, rel=1e-5)


# Bounds that stand for none


def test_bounds_that_mean_none_change_nothing() -> None:
    rng = np.random.default_rng(0)
    x, q, high = cp.Variable(6), cp.Parameter(6), cp.Parameter(6)
    F = rng.standard_normal((4, 6))
    objective = cp.sum_squares(F @ x) / 2 + q @ x
    budget = [cp.sum(x) == 1, x >= 0]
    bounded = DeclarativeLayer(
        cp.Problem(cp.Minimize(objective), [*budget, x <= high]), [q, high], [x]
    )
    free = DeclarativeLayer(cp.Problem(cp.Minimize(objective), budget), [q], [x])
    costs = torch.tensor(rng.standard_normal((8, 6)))
    gradients, answers = [], []
    for layer, rest in ((bounded, [torch.full((6,), 9.9e19, dtype=torch.float64)]), (free, [])):
        leaf = costs.clone().requires_grad_()
        (answer,) = layer(leaf, *rest)
        (answer * torch.arange(6)).sum().backward()
        answers.append(answer.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*answers, rtol=0, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_infeasible_beside_a_bound_that_means_none() -> None:
    x, low = cp.Variable(2), cp.Parameter(2)
    constraints = [x <= np.array([1.0, 1e20]), x >= low, cp.norm(x) <= 2]
    layer = DeclarativeLayer(
        cp.Problem(cp.Minimize(cp.sum(x)), constraints), [low], [x], on_failure="nan"
    )
    solution = layer.solve(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]], dtype=torch.float64))
    assert solution.status == (Status.OPTIMAL, Status.INFEASIBLE, Status.INFEASIBLE)


# Zeros that an earlier computation left as rounding


def _with_rounding(rounding: float) -> tuple[ConeProgram, Point]:
    """Min x0 + x1 s.t. x0 + x1 >= 1, x0 - x1 = r, 0 = r, 0 <= r, x >= 0, and its solution."""
    A = np.array([[1.0, -1.0], [0.0, 0.0], [-1.0, -1.0], [0.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    rows, cols = np.nonzero(np.ones(A.shape))
    shapes = Sparsity((2, 2), *np.zeros((2, 0), dtype=int)), Sparsity(A.shape, rows, cols)
    structure = Structure(*shapes, Cone(zero=2, nonneg=4))
    b = [rounding, rounding, -1.0, rounding, 0.0, 0.0]
    data = ([[]], [[1.0, 1.0]], [A.ravel()], [b])
    program = ConeProgram(
        structure, *(torch.tensor(np.array(v), dtype=torch.float64) for v in data)
    )
    multiplier = 0.6  # of 0 <= r, as good as any
    y, s = [0.0, 0.0, 1.0, multiplier, 0.0, 0.0], [0.0, 0.0, 0.0, rounding, 0.5, 0.5]
    x, y, s = (torch.tensor([v], dtype=torch.float64) for v in ([0.5, 0.5], y, s))
    return program, (x, y, s)


def test_zeros_that_were_computed_set_no_units() -> None:
    rounded, exact = (Scaling.of(_with_rounding(r)[0]) for r in (4e-16, 0.0))
    for name in ("primal", "slack", "objective"):
        assert torch.equal(getattr(rounded, name), getattr(exact, name))


@pytest.mark.parametrize(("rounding", "small"), [(1e-17, True), (1e-3, False)])
def test_a_multiplier_beside_a_slack_that_is_rounding_violates_nothing(
    rounding: float, small: bool
) -> None:
    program, point = _with_rounding(rounding)
    assert (float(own_violation(program, *point)) <= 1e-6) is small


# Degenerate quadratic programs


def _degenerate(rng: np.random.Generator, n: int, m: int, kind: int) -> Arrays:
    """With a known solution: rank and curvature vary, half of the rows depend on the others."""
    F = rng.standard_normal((n, n)) * (np.arange(n) < rng.integers(0, n + 1))[:, None]
    F *= 10.0 ** rng.uniform(-6, 1)
    x = rng.standard_normal(n) * 10.0 ** rng.uniform(-2, 2, n if kind % 2 else 1)
    G = rng.standard_normal((m, n)) * (rng.random((m, n)) < rng.choice([0.3, 1.0]))
    G *= 10.0 ** rng.uniform(-2, 2, (m, 1)) if kind % 3 == 2 else 1.0
    half = m // 2
    if kind % 5:
        G[half:] = rng.integers(-1, 2, (m - half, half)) @ G[:half]
    slack = np.where(rng.random(m) < 0.6, 0.0, rng.random(m) * 10.0 ** rng.uniform(-6, 0, m))
    binding = (slack == 0) & (rng.random(m) < rng.choice([0.2, 0.5, 1.0]))
    multipliers = np.where(binding, rng.random(m), 0.0) * 10.0 ** rng.uniform(-4, 1, m)
    return F, -(F.T @ F @ x + G.T @ multipliers), G, G @ x + slack, x


@pytest.mark.parametrize(("n", "m", "seed"), [(10, 20, 0), (10, 20, 1), (10, 20, 2), (15, 30, 0)])
def test_degenerate_quadratic_programs_are_solved(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    F, q, G, h, expected = stacked([_degenerate(rng, n, m, kind) for kind in range(32)])
    layer = _quadratic_layer(n, m)
    (x,) = layer(F, q, G, h)

    def value(x: Tensor) -> tuple[Tensor, Tensor]:
        curved = (F @ x[:, :, None]).square().sum((1, 2)) / 2
        return curved + (q * x).sum(1), curved + (q * x).abs().sum(1)

    (found, _), (best, size) = value(x), value(expected)
    assert bool(((found - best).abs() <= 1e-8 * size + 1e-14).all())
    outside = ((G @ x[:, :, None])[:, :, 0] - h).amax(1)
    assert bool((outside <= 1e-8 * (1 + h.abs().amax(1))).all())


def _quadratic_layer(n: int, m: int, solver: str = "auto") -> DeclarativeLayer:
    x, F, q = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    G, h = cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x) / 2 + q @ x), [G @ x <= h])
    how = {"on_failure": "nan", "on_irregular": "ignore", "solver": solver}
    return DeclarativeLayer(problem, [F, q, G, h], [x], **how)


# Verdicts


def _crowded(rng: np.random.Generator, n: int, m: int) -> Arrays:
    """All m > n constraints meet at the solution, all with multipliers: it has no derivative."""
    F, G, x = rng.standard_normal((1, n)), rng.standard_normal((m, n)), rng.standard_normal(n)
    F = np.concatenate([F, np.zeros((n - 1, n))])
    return F, -(F.T @ F @ x + G.T @ rng.random(m)), G, G @ x


@pytest.mark.parametrize(("n", "m"), [(3, 5), (4, 8), (6, 10)])
def test_vertex_of_too_many_constraints_is_irregular_alone_and_in_a_batch(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    values = stacked([_crowded(rng, n, m) for _ in range(24)])
    layer = _quadratic_layer(n, m)

    def verdicts(values: list[Tensor]) -> list[bool]:
        leaves = [value.clone().requires_grad_() for value in values]
        solution = layer.solve(*leaves)
        assert all(status.solved for status in solution.status)
        solution.variables[0].sum().backward()
        return solution.derivative.regular.tolist()

    assert not any(verdicts(values))
    alone = [verdicts([value[i : i + 1] for value in values])[0] for i in range(24)]
    assert not any(alone)


def test_gradient_where_too_many_constraints_meet_is_that_of_least_norm() -> None:
    """Not one of the many that differ by what rounding makes of a singular system."""
    rng = np.random.default_rng(1)
    F, q, G, h = stacked([_crowded(rng, 4, 8) for _ in range(8)])
    # An interior-point method finds multipliers in the middle of all that there are.
    leaf, layer = h.clone().requires_grad_(), _quadratic_layer(4, 8, solver="Clarabel")
    solution = layer.solve(F, q, G, leaf)
    solution.variables[0].sum().backward()
    every = (solution.cone.y[:, -8:] > 1e-9).all(1)  # whose multipliers all count
    assert int(every.sum()) >= 2
    # x moves by what G x = h has as its least-squares solution.
    expected = torch.linalg.pinv(G).sum(1)
    torch.testing.assert_close(leaf.grad[every], expected[every], rtol=0, atol=1e-7)


# Turns


def test_a_single_solver_has_its_own_turn_only() -> None:
    rng = np.random.default_rng(0)
    F, q, G, h, _ = stacked([_degenerate(rng, 10, 20, kind) for kind in range(8)])
    x = cp.Variable(10)
    parameters = cp.Parameter((10, 10)), cp.Parameter(10), cp.Parameter((20, 10)), cp.Parameter(20)
    objective = cp.sum_squares(parameters[0] @ x) / 2 + parameters[1] @ x
    problem = cp.Problem(cp.Minimize(objective), [parameters[2] @ x <= parameters[3]])
    layer = DeclarativeLayer(problem, parameters, [x], Clarabel(), on_failure="nan")
    assert [a.backend for a in layer.solve(F, q, G, h).cone.attempts] == ["Clarabel"]


def test_sharpened_solvers_never_ask_for_less() -> None:
    assert Clarabel(tol=1e-14).sharpened().tol == 1e-14
    assert Clarabel(tol=1e-4, max_iters=7).sharpened() == Clarabel(tol=1e-12, max_iters=7)
    assert Moreau(method="active_set").sharpened() is None


# Solutions that are not unique


@pytest.mark.parametrize("solver", ["auto", "Moreau", "Clarabel"])
@pytest.mark.parametrize(
    ("cost", "row"),
    [
        ([0.0, 0.0], [1.0, 0.0]),  # no cost at all
        ([-0.5, 0.0], [1.0, 0.0]),  # none of the second variable
        ([-0.5, -0.5], [1.0, 1.0]),  # along an edge, to which the loss is parallel, or not
        ([-0.5, -1.0], [1.0, 2.0]),
    ],
)
def test_edge_of_solutions_is_irregular(solver: str, cost: list, row: list) -> None:
    """Whichever of its points is found, one on a kink of |x| (a vertex of its epigraph) as well."""
    x, q, a = cp.Variable(2), cp.Parameter(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(q @ x), [a @ x <= 0.3, cp.abs(x) <= 3])
    how = {"solver": solver, "on_failure": "nan", "on_irregular": "ignore"}
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (cost, row)]
    solution = DeclarativeLayer(problem, [q, a], [x], **how).solve(*leaves)
    assert bool(solution.solved.all())
    solution.variables[0].sum().backward()
    assert not bool(solution.derivative.regular.any())
