"""Eigenvectors of the derivatives of projections, and what linear systems leave out by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from declarative_cvx.cones import Cone
from declarative_cvx.kkt import free_variables, solve_kkt, solve_kkt_and_rank
from declarative_cvx.program import ConeProgram, Sparsity, Structure

EVERY_CONE = Cone(zero=2, nonneg=3, soc=(3, 1, 2, 7, 3), psd=(1, 2, 4, 2), exp=3, power=(0.3, 0.6))
SINGLE = {
    "soc": Cone(soc=(5,)),
    "flat_soc": Cone(soc=(2,)),
    "psd": Cone(psd=(4,)),
    "exp": Cone(exp=1),
    "power": Cone(power=(0.4,)),
}


def points(cone: Cone, seed: int = 0, batch: int = 40) -> Tensor:
    """Normal ones, some of them moved inside of the cone or its polar, and zero."""
    rng = np.random.default_rng(seed)
    z = torch.as_tensor(rng.standard_normal((batch, cone.rows)))
    z[::4] += 5 * cone.centre(z)
    z[1::4] -= 5 * cone.centre(z)
    z[-1] = 0
    return z


def dense(cone: Cone, z: Tensor) -> Tensor:
    out = z.new_zeros((len(z), cone.rows, cone.rows))
    cone.decompose(z)[1].write(out)
    return out


@pytest.mark.parametrize("name", [*SINGLE, "every"])
def test_decomposition_is_that_of_the_differentiable_derivative(name: str) -> None:
    cone = EVERY_CONE if name == "every" else SINGLE[name]
    z = points(cone)
    projection, derivative = cone.decompose(z)
    assert_allclose(projection, cone.project(z), atol=1e-14)
    expected = z.new_zeros((len(z), cone.rows, cone.rows))
    cone.derivative(z.clone().requires_grad_()).write(expected)
    assert_allclose(dense(cone, z), expected.detach(), atol=1e-13)
    for _, spectrum in derivative.parts:
        eye = torch.eye(spectrum.vectors.shape[-1], dtype=z.dtype)
        product = spectrum.vectors.mT @ spectrum.vectors
        assert_allclose(product, eye.expand_as(product), atol=1e-13)
        assert float(spectrum.values.min()) >= 0
        assert float(spectrum.values.max()) <= 1
    v = torch.as_tensor(np.random.default_rng(1).standard_normal((len(z), cone.rows, 2)))
    assert_allclose(derivative.matmul(v), dense(cone, z) @ v, atol=1e-12)


@pytest.mark.parametrize("name", list(SINGLE))
def test_nothing_jumps_within_the_distance_to_the_next_kink(name: str) -> None:
    cone = SINGLE[name]
    z = points(cone, seed=2)[:-1]
    kink = cone.decompose(z)[1].parts[0][1].kink
    assert (kink > 0).any()
    way = kink.clamp(max=10.0) * cone.centre(z)
    for share in (-0.999, -0.9, -0.5, 0.1, 0.7, 0.999):
        move = dense(cone, z + share * way) - dense(cone, z + (share + 1e-6) * way)
        assert float(move.abs().max()) <= 1e-4
    assert not cone.kinked(z).any()


@pytest.mark.parametrize("name", list(SINGLE))
@pytest.mark.parametrize("polar", [False, True])
def test_boundaries_are_kinks(name: str, polar: bool) -> None:
    cone = SINGLE[name]
    z = points(cone, seed=3)[:-1]
    z = z - cone.project(z) if polar else cone.project(z)
    shift = 1e-3 * cone.centre(z)
    # Both sides of the boundary: on one of them the projection is the identity, or zero.
    sides = [cone.project(side) - (0 if polar else side) for side in (z + shift, z - shift)]
    near, far = (side.abs().amax(1) for side in (sides[::-1] if polar else sides))
    on = (near < 1e-9) & (far > 1e-5) & (z.abs().amax(1) > 0.1)
    assert int(on.sum()) >= 5
    assert bool(cone.kinked(z[on]).all())


def bounded_term() -> ConeProgram:
    """Minimise ||x||^2 / 2 - c'x, ||x|| <= t <= 2: t is free unless the bound is active."""
    cone = Cone(nonneg=1, soc=(3,))
    A = np.array([[0, 0, 1.0], [0, 0, -1.0], [-1.0, 0, 0], [0, -1.0, 0]])
    rows, cols = np.nonzero(A)
    structure = Structure(
        Sparsity((3, 3), np.array([0, 1]), np.array([0, 1])), Sparsity((4, 3), rows, cols), cone
    )
    c = np.array([[0.3, 0.4, 0], [3.0, 4.0, 0]])
    data = np.ones((1, 2)), -c, A[rows, cols][None], np.array([[2.0, 0, 0, 0]] * 2)
    return ConeProgram(structure, *(torch.as_tensor(v) for v in data))


def at_solution() -> Tensor:
    """Points s - y where the norm is 1/2, with t = 1, and where the bound is active."""
    inactive, active = [1.0, 1.0, 0.3, 0.4], [-3.0, -1.0, 3.0, 4.0]
    return torch.tensor([inactive, active], dtype=torch.float64)


def test_free_variables_are_found_and_do_not_move() -> None:
    program = bounded_term()
    z = at_solution()
    projection = program.structure.cone.derivative(z)
    assert free_variables(program, projection).tolist() == [[False] * 2 + [True], [False] * 3]
    matrix = np.zeros((2, 7, 7))
    P, A = torch.diag(torch.tensor([1.0, 1.0, 0.0])).double(), program.dense_A[0]
    for i, D in enumerate(dense(program.structure.cone, z)):
        eye = torch.eye(4, dtype=torch.float64)
        matrix[i] = torch.cat([torch.cat([P, A.T @ (D - eye)], 1), torch.cat([A, D], 1)])
    assert np.linalg.matrix_rank(matrix[0]) == 6
    rhs = matrix.swapaxes(1, 2) @ np.random.default_rng(0).standard_normal((7, 2))
    found, residual, defect = solve_kkt_and_rank(program, projection, torch.as_tensor(rhs), True)
    assert float(residual.max()) <= 1e-13
    assert defect.tolist() == [1, 0]
    for i in range(2):
        assert_allclose(found[i], np.linalg.pinv(matrix[i].T, 1e-12) @ rhs[i], atol=1e-12)
    rhs = matrix @ np.random.default_rng(1).standard_normal((7, 2))
    found, residual = solve_kkt(program, projection, torch.as_tensor(rhs))
    assert float(residual.max()) <= 1e-13
    assert not found[0, 2].any()


def test_systems_of_rows_that_do_not_bind_agree_with_dense_ones() -> None:
    """Elements with different numbers of kept rows share a batch."""
    rng = np.random.default_rng(5)
    n, cone = 60, EVERY_CONE
    patterns = (Sparsity(s, *np.nonzero(np.ones(s))) for s in ((n, n), (cone.rows, n)))
    structure = Structure(*patterns, cone)
    P = 3 * np.eye(n) + 0.1 * np.ones((n, n))
    A = rng.standard_normal((1, cone.rows * n))
    q, b = np.zeros((40, n)), np.zeros((40, cone.rows))
    program = ConeProgram(structure, *(torch.as_tensor(v) for v in (P.reshape(1, -1), q, A, b)))
    z = points(cone, seed=6)[:-1]
    z = torch.cat([z, 9 * cone.centre(z)[None]])  # nothing binds but the equality
    projection = cone.derivative(z)
    D, matrix = dense(cone, z).numpy(), A.reshape(cone.rows, n)
    rhs = torch.as_tensor(rng.standard_normal((40, n + cone.rows, 1)))
    found, residual, defect = solve_kkt_and_rank(program, projection, rhs)
    assert float(residual[defect == 0].max()) <= 1e-12
    for i in np.flatnonzero((defect == 0).numpy()):
        J = np.block([[P, matrix.T @ (D[i] - np.eye(cone.rows))], [matrix, D[i]]])
        expected = np.linalg.solve(J, rhs[i].numpy())
        assert_allclose(found[i], expected, atol=1e-8 * np.abs(expected).max())
    assert int((defect == 0).sum()) >= 20
    assert defect[-1] == 0
