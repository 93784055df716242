"""Newton steps on the optimality conditions: from near a solution to rounding level.

The programs are made around their solutions: for given x and z, with s = Π(z) and y = s - z, the
data q = -P x - A'y and b = A x + s make (x, y, s) optimal.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from declarative_cvx.cones import Cone
from declarative_cvx.program import ConeProgram, Sparsity, Structure
from declarative_cvx.refinement import refine
from declarative_cvx.residuals import residuals

BATCH, VARIABLES = 4, 40
CONES = {
    "polyhedral": Cone(zero=2, nonneg=6),
    "second order": Cone(zero=2, nonneg=2, soc=(3, 6, 3, 1)),
    "semidefinite": Cone(zero=2, psd=(3, 2)),
    "exponential": Cone(zero=2, exp=4),
    "power": Cone(zero=2, power=(0.3, 0.6)),
    "every": Cone(zero=2, nonneg=2, soc=(3, 4), psd=(2,), exp=2, power=(0.3,)),
}
Case = tuple[ConeProgram, Tensor, Tensor]


def case_of(cone: Cone, seed: int) -> Case:
    """A batch, its x and its z; in the third element the two equalities are the same."""
    rng = np.random.default_rng(seed)
    n, m = VARIABLES, cone.rows
    structure = Structure(*(Sparsity(s, *np.nonzero(np.ones(s))) for s in ((n, n), (m, n))), cone)
    root = rng.standard_normal((BATCH, n, n)) / np.sqrt(n)
    A = rng.standard_normal((BATCH, m, n))
    A[2, 1] = A[2, 0]
    P, A = torch.as_tensor(root @ root.swapaxes(1, 2) + np.eye(n)), torch.as_tensor(A)
    x, z = (torch.as_tensor(rng.standard_normal((BATCH, size))) for size in (n, m))
    s = cone.project(z)
    q = -(P @ x[:, :, None] + A.mT @ (s - z)[:, :, None])[:, :, 0]
    b = (A @ x[:, :, None])[:, :, 0] + s
    return ConeProgram(structure, P.flatten(1), q, A.flatten(1), b), x, z


def refined(case: Case, distance: float, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Some elements, from points so far from their solutions."""
    program, x, z = case
    rng = np.random.default_rng(1)
    x, z = (v + distance * torch.as_tensor(rng.standard_normal(v.shape)) for v in (x, z))
    s = program.structure.cone.project(z)
    part, index = program.select(torch.tensor(at)), torch.tensor(at)
    scale = torch.ones((len(at), x.shape[1] + z.shape[1]), dtype=torch.float64)
    return refine(part, x[index], (s - z)[index], s[index], scale)


@pytest.mark.parametrize("name", list(CONES))
@pytest.mark.parametrize("distance", [1e-8, 1e-4])
@pytest.mark.parametrize("at", [[0, 1, 3], [0, 1, 2, 3]], ids=["regular", "one singular"])
def test_solutions_are_reached(name: str, distance: float, at: list[int]) -> None:
    case = case_of(CONES[name], seed=3)
    program, x, z = case
    s = program.structure.cone.project(z)
    found = refined(case, distance, at)
    worst = residuals(program.select(torch.tensor(at)), *found).worst
    assert float(worst.max()) <= 1e-12
    assert_allclose(found[0], x[at], atol=1e-11)
    assert_allclose(found[2], s[at], atol=1e-11)
    error = found[1] - (s - z)[at]
    if 2 in at:
        error[2, :2] = error[2, :2].sum()  # of the same equality twice, only the sum counts
    assert_allclose(error, 0 * error, atol=1e-11)


@pytest.mark.parametrize("name", list(CONES))
def test_elements_do_not_depend_on_their_batch(name: str) -> None:
    case = case_of(CONES[name], seed=4)
    together = refined(case, 1e-4, [0, 1, 2, 3])
    for i in range(BATCH):
        for whole, alone in zip(together, refined(case, 1e-4, [i]), strict=True):
            assert_allclose(whole[i], alone[0], atol=1e-11)


@pytest.mark.parametrize("name", list(CONES))
def test_a_solution_stays_where_it_is(name: str) -> None:
    case = case_of(CONES[name], seed=5)
    _, x, z = case
    found = refined(case, 0.0, [0, 1, 2, 3])
    assert_allclose(found[0], x, atol=1e-13)
    assert_allclose(found[2] - found[1], z, atol=1e-13)
