"""Compiled projections and cone systems, against torch's and against the matrices themselves."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from declarative_cvx import DeclarativeLayer, compiled_cone_systems
from declarative_cvx.compiled_cone_systems import COLUMNS, CompiledConeSystems
from declarative_cvx.condensed import Condensed, condense
from declarative_cvx.cones import Cone, compiled, exponential, second_order, semidefinite
from declarative_cvx.kkt import System
from declarative_cvx.program import ConeProgram, Sparsity, Structure

pytestmark = pytest.mark.skipif(
    not (compiled.is_available() and compiled_cone_systems.is_available()), reason="not compiled"
)
EPS = 1e-14
DIMENSIONS = [1, 2, 3, 7, 32]
CONES = {
    "second order": Cone(zero=1, nonneg=3, soc=(4, 1, 4, 2)),
    "semidefinite": Cone(nonneg=2, psd=(3, 2, 3)),
    "exponential": Cone(zero=2, exp=3),
    "every": Cone(zero=1, nonneg=2, soc=(3, 5, 3), psd=(2, 3), exp=2, power=(0.3, 0.6)),
}
VARIABLES, BATCH = 30, 3


def same(v: Tensor, expected: tuple, found: tuple) -> None:
    (point, spectrum), (known, reference) = found, expected
    size = v.abs().amax(-1).clamp(min=1e-300)
    assert_allclose((point - known) / size[..., None], 0 * v, atol=EPS)
    assert_allclose(spectrum.matrices, reference.matrices, atol=10 * EPS)
    assert_allclose(spectrum.values, reference.values, atol=10 * EPS)
    assert_allclose(spectrum.kink / size, reference.kink / size, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-150, 1e-3, 1.0, 1e8, 1e150])
def test_exponential_cones(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    v = size * torch.randn(20, 50, 3, dtype=torch.float64, generator=generator)
    same(v, exponential.decompose(v), compiled.exponential(v))


def test_exponential_cones_of_points_in_mixed_units() -> None:
    rng = np.random.default_rng(1)
    v = torch.as_tensor(rng.standard_normal((20, 50, 3)) * 10 ** rng.uniform(-12, 12, (20, 50, 3)))
    same(v, exponential.decompose(v), compiled.exponential(v))


def test_exponential_cones_on_their_faces_and_edges() -> None:
    ends = torch.tensor([-2.0, -1.0, -1e-17, -0.0, 0.0, 1e-300, 1.0, 2.0], dtype=torch.float64)
    v = torch.cartesian_prod(ends, ends, ends)[None]
    same(v, exponential.decompose(v), compiled.exponential(v))


def test_points_on_the_curved_boundary_are_their_own_projections() -> None:
    rho = torch.linspace(-30, 30, 200, dtype=torch.float64)
    v = torch.stack([rho, torch.ones_like(rho), rho.exp()], -1)[None]
    size = v.abs().amax(-1, keepdim=True)
    assert_allclose(compiled.exponential(v)[0] / size, v / size, atol=EPS)


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_second_order_cones(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    v = torch.randn(12, 5, dim, dtype=torch.float64, generator=generator)
    v[0] = 0.0  # the apex
    v[1, :, 1:] = 0.0  # the axis
    v[2, :, 0] = 10.0
    v[3, :, 0] = -10.0
    same(v, second_order.decompose(v), compiled.second_order(v))


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_semidefinite_cones(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    generator = torch.Generator().manual_seed(order)
    v = torch.randn(6, 4, order * (order + 1) // 2, dtype=torch.float64, generator=generator)
    v[0] = 0.0
    found = semidefinite.decompose(v)
    assert bool((found[1].matrices >= -1).all())  # computed now
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    same(v, semidefinite.decompose(v), found)


def test_nothing_of_the_callers_is_modified_and_strides_do_not_count() -> None:
    v = torch.randn(3, 4, 5, dtype=torch.float64).mT[:, :3]  # (3, 3, 4), not contiguous
    before = v.clone()
    same(v, second_order.decompose(v), compiled.second_order(v))
    assert torch.equal(v, before)


def test_wide_cones_and_other_precisions_are_left_to_torch() -> None:
    assert compiled.suits(torch.zeros(1, 1, 3, dtype=torch.float64))
    assert not compiled.suits(torch.zeros(1, 1, 3, dtype=torch.float32))
    assert not compiled.suits(torch.zeros(1, 1, 100, dtype=torch.float64))


def program_of(cone: Cone, shared: bool, seed: int) -> tuple[ConeProgram, Tensor]:
    """A batch with a sparse A in which variable 3 does not occur, and its z."""
    rng = np.random.default_rng(seed)
    n, m = VARIABLES, cone.rows
    structure = Structure(*(Sparsity(s, *np.nonzero(np.ones(s))) for s in ((n, n), (m, n))), cone)
    count = 1 if shared else BATCH
    A = rng.standard_normal((count, m, n)) * (rng.uniform(size=(count, m, n)) < 0.6)
    root = rng.standard_normal((count, n, n))
    P = root @ root.swapaxes(1, 2)
    P[:, 3], P[:, :, 3], A[:, :, 3] = 0.0, 0.0, 0.0
    z = rng.standard_normal((BATCH, m))
    values = (torch.as_tensor(v.reshape(len(v), -1)) for v in (P, np.zeros((BATCH, n)), A))
    return ConeProgram(structure, *values, torch.zeros(BATCH, m, dtype=torch.float64)), (
        torch.as_tensor(z)
    )


def compiled_for(program: ConeProgram, z: Tensor) -> CompiledConeSystems:
    projection = program.structure.cone.derivative(z)
    found = condense(program.dense_P, program.dense_A, projection)
    assert isinstance(found, CompiledConeSystems)
    return found


@pytest.mark.parametrize("name", list(CONES))
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("columns", [1, 3, COLUMNS + 1])
def test_systems_are_solved(name: str, shared: bool, transpose: bool, columns: int) -> None:
    program, z = program_of(CONES[name], shared, seed=2)
    systems, rng = compiled_for(program, z), np.random.default_rng(3)
    rhs = torch.as_tensor(rng.standard_normal((BATCH, VARIABLES + z.shape[1], columns)))
    rhs[:, 3] = 0.0
    w = systems.solve(rhs, transpose)
    matrix = System(program, systems.projection, transpose).matrix()
    assert_allclose(matrix @ w, rhs, atol=1e-10 * float(w.abs().max()))
    assert not w[:, 3].any()
    assert systems.free.sum(0).tolist() == [BATCH if i == 3 else 0 for i in range(VARIABLES)]
    assert not systems.doubtful.any()
    reference = Condensed.of(program.dense_P, program.dense_A, systems.projection)
    assert_allclose(w, reference.solve(rhs, transpose), rtol=1e-8, atol=1e-9)


def test_what_is_known_of_a_matrix_needs_no_solve_before() -> None:
    program, z = program_of(CONES["every"], True, seed=4)
    assert compiled_for(program, z).free[:, 3].all()
    assert not compiled_for(program, z).doubtful.any()


def test_dependent_equalities_are_doubtful() -> None:
    program, z = program_of(Cone(zero=2, exp=2), False, seed=5)
    A = program.A.clone().unflatten(1, (-1, VARIABLES))
    A[1, 1] = 3 * A[1, 0]
    program = ConeProgram(program.structure, program.P, program.q, A.flatten(1), program.b)
    assert compiled_for(program, z).doubtful.tolist() == [False, True, False]


def test_large_systems_are_left_to_lapack() -> None:
    P, A = torch.eye(100, dtype=torch.float64)[None], torch.ones(1, 6, 100, dtype=torch.float64)
    projection = Cone(exp=2).derivative(torch.randn(1, 6, dtype=torch.float64))
    assert isinstance(condense(P, A, projection), Condensed)


def test_arrays_that_do_not_fit_are_refused() -> None:
    from declarative_cvx.compiled import _projections
    from declarative_cvx.compiled._cone_systems import solve

    v, small = np.zeros((2, 3)), np.zeros(1)
    with pytest.raises(ValueError, match="do not fit"):
        _projections.exponential(3, 1, v, v.copy(), np.zeros((2, 3, 3)), v.copy(), small)
    with pytest.raises(ValueError, match="do not fit"):
        _projections.exponential(2, 1, v, v.copy(), np.zeros((3, 2, 2)), v.copy(), np.zeros(3))
    with pytest.raises(ValueError, match="do not fit"):
        _projections.semidefinite(2, 1, v, np.zeros((2, 2, 2)), np.zeros((2, 3, 3)), v.copy())
    matrix, rhs, flags = np.eye(2), np.zeros((1, 5, 1)), np.zeros(2, dtype=bool)
    rows = np.array([[0, 1, 2]])
    for wrong in (rows + 1, rows[:, :2]):
        part = (wrong, np.eye(3)[None, None], np.ones((1, 1, 3)))
        data = (matrix, np.zeros((3, 2)), np.zeros((1, 3)), (part,), rhs, rhs.copy())
        with pytest.raises(ValueError, match="do not fit"):
            solve(1, 2, 3, 1, False, 1, *data, flags, flags[:1].copy())


@pytest.mark.parametrize("backward", ["first", "second"])
def test_layers_are_the_same_without_compiled_code(
    monkeypatch: pytest.MonkeyPatch, backward: str
) -> None:
    x, c, r = cp.Variable(5), cp.Parameter(5), cp.Parameter(nonneg=True)
    objective = cp.Minimize(c @ x - cp.sum(cp.entr(x)))
    problem = cp.Problem(objective, [cp.sum(x) == 1, cp.norm(x - 0.2) <= r])
    values = [
        torch.linspace(-1, 1, 5, dtype=torch.float64).repeat(3, 1),
        torch.tensor(0.3).double(),
    ]
    values[0][1:] *= torch.tensor([[2.0], [0.1]], dtype=torch.float64)

    def gradients() -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in values]
        (out,) = DeclarativeLayer(problem, [c, r], [x])(*leaves)
        found = torch.autograd.grad((out**3).sum(), leaves, create_graph=backward == "second")
        if backward == "second":
            found = torch.autograd.grad(sum((g**2).sum() for g in found), leaves)
        return [out.detach(), *found]

    here = gradients()
    for module in (compiled, compiled_cone_systems):
        monkeypatch.setattr(module, "is_available", lambda: False)
    for found, expected in zip(gradients(), here, strict=True):
        assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
