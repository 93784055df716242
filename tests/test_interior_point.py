"""The interior-point method's parts, and how much work whole problems are for it."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import declarative_cvx as dcx
from declarative_cvx.nonconvex.minimization import local_minimum
from declarative_cvx.nonconvex.minimization.active_set import ActiveSet, solve_symmetric
from declarative_cvx.nonconvex.minimization.condensed import squares
from declarative_cvx.nonconvex.minimization.evaluation import Evaluation, evaluate
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.scalars.separated import Separable
from declarative_cvx.nonconvex.minimization.sides import Sides
from declarative_cvx.nonconvex.minimization.solve import solve_nonlinear

double = torch.float64


def path(count: int) -> dcx.DeclarativeLayer:
    """Way points around a circle: every one of many slides along it."""
    line = np.linspace([-2, 0.3], [2, 0.3], count + 2)[1:-1]
    start = line + np.sin(np.linspace(0, np.pi, count))[:, None] * [0, 1.0]
    at, r = cp.Variable((count, 2), value=start), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(at[1:] - at[:-1]) + cp.sum_squares(at[0] - line[0])
    loss += cp.sum_squares(at[-1] - line[-1])
    problem = cp.Problem(cp.Minimize(loss), [cp.sum(at**2, axis=1) >= r**2])
    return dcx.DeclarativeLayer(problem, [r], [at])


def test_curved_constraints_do_not_make_steps_short() -> None:
    solution = path(60).solve(torch.tensor([0.8, 0.9], dtype=double))
    assert bool(solution.solved.all())
    assert max(solution.iterations) <= 40


def test_elements_are_solved_alike_in_parts_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, r = path(6), torch.linspace(0.6, 1.0, 9, dtype=double, requires_grad=True)
    together = layer.solve(r)
    (gradient,) = torch.autograd.grad(together.value.sum(), r)
    monkeypatch.setattr(local_minimum, "_AT_ONCE", 800)
    apart = layer.solve(r)
    torch.testing.assert_close(apart.variables[0], together.variables[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(apart.value.sum(), r)[0], gradient)
    assert apart.status == together.status


def bounded(lower: Tensor | None, upper: Tensor | None, n: int) -> NonlinearProgram:
    return NonlinearProgram(n, lambda x, p: (x * x).sum(), None, None, lower, upper, (), 2)


def test_sides_are_the_finite_bounds() -> None:
    inf = torch.inf
    lower = torch.tensor([[0.0, -inf, -1.0], [-inf, -inf, -1.0]], dtype=double)
    upper = torch.tensor([[inf, inf, 2.0]], dtype=double)
    x = torch.tensor([[1.0, 5.0, 0.5], [3.0, -5.0, 1.0]], dtype=double)
    sides = Sides.of(bounded(lower, upper, 3), x)
    assert sides.count == 3
    gaps = sides.gaps(x)
    torch.testing.assert_close(gaps[0], torch.tensor([1.0, 1.5, 1.5], dtype=double))
    assert float(gaps[1, 0]) > 1e19
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=double)
    low, high = sides.split(values)
    assert low.tolist() == [[1, 0, 2], [4, 0, 5]]
    assert high.tolist() == [[0, 0, 3], [0, 0, 6]]
    assert sides.pull(values).tolist() == [[1, 0, -1], [4, 0, -1]]
    assert sides.spread(values).tolist() == [[1, 0, 5], [4, 0, 11]]


def test_no_bounds_have_no_sides() -> None:
    assert Sides.of(bounded(None, None, 3), torch.zeros(2, 3, dtype=double)).count == 0


def test_sparse_rows_are_squared_entry_by_entry() -> None:
    n = 30

    def chain(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
        return x[1:] * x[:-1] + p[0]

    functions = [lambda x, p: (x**2).sum(), chain]
    parameters = (torch.ones(3, n - 1, dtype=double),)
    program = NonlinearProgram(
        n, functions[0], chain, None, None, None, parameters, 3,
        separable=Separable(functions, n, [(n - 1,)]),
    )  # fmt: skip
    assert program.separated is not None
    assert program.separated.squares is not None
    torch.manual_seed(0)
    rows = evaluate(program, torch.rand(3, n, dtype=double)).rows
    weights = torch.rand(3, n - 1, dtype=double)
    dense = rows.mT @ torch.diag_embed(weights) @ rows
    torch.testing.assert_close(squares(program, rows, weights), dense)


def test_what_is_inactive_is_left_out_of_systems() -> None:
    torch.manual_seed(0)
    batch, n, r = 4, 5, 12
    H, A = torch.randn(batch, n, n, dtype=double), torch.randn(batch, r, n, dtype=double)
    at = Evaluation(
        torch.zeros(batch, 1 + r, dtype=double),
        torch.cat([torch.zeros(batch, 1, n, dtype=double), A], 1),
        H + H.mT,
    )
    lower = torch.rand(batch, n) < 0.2
    active = ActiveSet(torch.rand(batch, r) < 0.15, lower, torch.zeros_like(lower))
    kept = torch.cat([active.free, active.rows], 1)
    rhs = torch.randn(batch, n + r, 2, dtype=double) * kept[:, :, None]
    expected = solve_symmetric(active.matrix(at), rhs)
    found = active.solve(at, rhs)
    assert kept.sum(1).max() <= 0.8 * (n + r)
    torch.testing.assert_close(found[0], expected[0])
    assert found[2].tolist() == expected[2].tolist()


@pytest.mark.parametrize("start", [1e-1, 1e-2, 1e-3, 1e-5])
def test_a_unit_quaternion_from_a_short_one(start: float) -> None:
    """Its length has hardly a slope there; the turn is the singular value decomposition's."""
    generator = torch.Generator().manual_seed(0)
    here, there = torch.randn(2, 32, 3, 5, generator=generator, dtype=double)
    first = start * torch.tensor([1.0, 0.5, -0.5, 0.2], dtype=double)
    program = NonlinearProgram(
        4, lambda q, p: -(turned(q, p[0]) * p[1]).sum(), lambda q, p: (q @ q - 1)[None],
        None, None, None, (here, there), 32,
    )  # fmt: skip
    solution = solve_nonlinear(program, first[None])
    assert bool(solution.solved.all())
    assert int(solution.iterations.max()) <= 40
    U, sizes, Vt = torch.linalg.svd(there @ here.mT)
    sizes[:, 2] *= torch.linalg.det(U @ Vt).sign()
    torch.testing.assert_close(-solution.value, sizes.sum(1))


def turned(q: Tensor, points: Tensor) -> Tensor:
    """By a quaternion (w, v), unnormalised: |q|^2 times the points, if they are turned."""
    w, v = q[:1], q[1:]
    cross = torch.linalg.cross(v[:, None].expand_as(points), points, dim=0)
    return (w * w - v @ v) * points + 2 * torch.outer(v, v @ points) + 2 * w * cross
