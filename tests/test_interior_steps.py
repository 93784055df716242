"""Interior-point steps: from near a face of solutions to rounding level.

The programs are made around strictly complementary solutions that are not unique: P has a small
rank, few inequalities are active, and one equality is there twice. For given x, s and y the data
q = -P x - A'y and b = A x + s make them optimal.
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from declarative_cvx import Clarabel, DeclarativeLayer, Moreau
from declarative_cvx.backends import Backend
from declarative_cvx.cones import Cone
from declarative_cvx.interior_steps import interior_steps
from declarative_cvx.program import ConeProgram, Point, Sparsity, Structure
from declarative_cvx.residuals import residuals

BATCH, VARIABLES, ACTIVE = 3, 30, 10
CONE = Cone(zero=6, nonneg=40)


def case_of(
    seed: int, units: float = 1.0, rank: int = 3, bounds: int = 0
) -> tuple[ConeProgram, Point]:
    """A batch and solutions; objectives and multipliers are in the units given.

    So many inequalities are bounds.
    """
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((BATCH, VARIABLES, rank))
    P = torch.as_tensor(units * root @ root.swapaxes(1, 2))
    A = rng.standard_normal((BATCH, CONE.rows, VARIABLES))
    A[:, 1] = A[:, 0]
    A[:, CONE.zero : CONE.zero + bounds] = np.eye(VARIABLES)[:bounds]
    x = torch.as_tensor(rng.standard_normal((BATCH, VARIABLES)))
    s, y = np.zeros((2, BATCH, CONE.rows))
    first = CONE.zero + ACTIVE
    y[:, : CONE.zero] = rng.standard_normal((BATCH, CONE.zero))
    y[:, CONE.zero : first] = 10 ** rng.uniform(-3, 0, (BATCH, ACTIVE))
    s[:, first:] = 10 ** rng.uniform(-3, 0, (BATCH, CONE.rows - first))
    pattern = Sparsity(A[0].shape, *np.nonzero(A[0]))
    structure = Structure(Sparsity(P[0].shape, *np.nonzero(np.ones(P[0].shape))), pattern, CONE)
    A, s, y = (torch.as_tensor(v) for v in (A, s, units * y))
    q = -torch.einsum("bij,bj->bi", P, x) - torch.einsum("bij,bi->bj", A, y)
    b = torch.einsum("bij,bj->bi", A, x) + s
    entries = A[:, pattern.rows, pattern.cols]
    return ConeProgram(structure, P.flatten(1), q, entries, b), (x, y, s)


def moved(point: Point, distance: float, units: float) -> Point:
    """A point so far from a solution, inside the cones."""
    rng = np.random.default_rng(1)
    x, y, s = (distance * torch.as_tensor(rng.standard_normal(v.shape)) for v in point)
    rows = CONE.zero
    y = units * torch.cat([y[:, :rows], y[:, rows:].abs()], 1)
    s = torch.cat([0 * s[:, :rows], s[:, rows:].abs()], 1)
    return point[0] + x, point[1] + y, point[2] + s


def values(program: ConeProgram, x: Tensor) -> Tensor:
    return (x * (program.P_times(x) / 2 + program.q)).sum(1)


@pytest.mark.parametrize("units", [1.0, 1e-7])
@pytest.mark.parametrize("distance", [1e-8, 1e-5])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bounds", [0, 20])
def test_a_solution_is_reached_and_its_active_rows_are_found(
    units: float, distance: float, rank: int, bounds: int
) -> None:
    program, solution = case_of(2, units, rank, bounds)
    (x, y, s), found = interior_steps(program, moved(solution, distance, units))
    assert float(found.worst.max()) <= 1e-12
    assert torch.equal(s > 0, solution[2] > 0)
    assert torch.equal(y[:, CONE.zero :] > 0, solution[1][:, CONE.zero :] > 0)
    best = values(program, solution[0])
    assert float(((values(program, x) - best) / units).abs().max()) <= 1e-11


@pytest.mark.parametrize("distance", [1e-2, 1.0, 1e3])
def test_no_point_gets_worse(distance: float) -> None:
    program, solution = case_of(3)
    start = moved(solution, distance, 1.0)
    (x, y, s), found = interior_steps(program, start)
    assert bool((found.worst <= residuals(program, *start).worst).all())
    assert torch.equal(found.worst, residuals(program, x, y, s).worst)


def test_elements_do_not_depend_on_their_batch() -> None:
    program, solution = case_of(4)
    start = moved(solution, 1e-5, 1.0)
    together, _ = interior_steps(program, start)
    for i in range(BATCH):
        x, y, s = (v[[i]] for v in start)
        alone, _ = interior_steps(program.select(torch.tensor([i])), (x, y, s))
        for whole, one in zip(together, alone, strict=True):
            error = whole[i] - one[0]
            error[:2] = error[:2].sum()  # of the same equality twice, only the sum counts
            assert float(error.abs().max()) <= 1e-6  # along the face rounding moves a little


def test_a_solution_stays_where_it_is() -> None:
    program, solution = case_of(5)
    (x, _, s), found = interior_steps(program, solution)
    assert float(found.worst.max()) <= 1e-14
    assert float((x - solution[0]).abs().max()) <= 1e-9
    assert float((s - solution[2]).abs().max()) <= 1e-9


@pytest.mark.parametrize("units", [1.0, 1e-7])
@pytest.mark.parametrize("solver", [Moreau(tol=1e-5, method="interior_point"), Clarabel(tol=1e-5)])
def test_loose_answers_to_programs_without_unique_solutions_end_exact(
    solver: Backend, units: float
) -> None:
    program, solution = case_of(3, units)
    x, q, b = cp.Variable(VARIABLES), cp.Parameter(VARIABLES), cp.Parameter(CONE.rows)
    P, A = program.dense_P[0].numpy(), program.dense_A[0].numpy()
    rows = CONE.zero
    problem = cp.Problem(
        cp.Minimize(cp.quad_form(x, cp.psd_wrap(P)) / 2 + q @ x),
        [A[:rows] @ x == b[:rows], A[rows:] @ x <= b[rows:]],
    )
    found = DeclarativeLayer(problem, [q, b], [x], solver).solve(program.q[0], program.b[0])
    assert float(found.cone.residuals.worst.max()) <= 1e-10
    first = program.select(torch.tensor([0]))
    error = values(first, found.variables[0][None]) - values(first, solution[0][:1])
    assert abs(float(error)) <= 1e-10 * units
