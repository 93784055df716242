"""Linear systems with the Jacobian of the optimality conditions, and what is substituted first.

The Jacobian is assembled here once more, in NumPy and entry by entry, from its definition
J = [[P, A'(DΠ - I)], [A, DΠ]].
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kkt import infeasibility_violation, unboundedness_violation, violations
from numpy.testing import assert_allclose
from torch import Tensor

from declarative_cvx import Clarabel, Status
from declarative_cvx.cones import Cone, ConeDerivative
from declarative_cvx.elimination import (
    arrange,
    extend,
    extend_data_gradients,
    find_elimination,
    reduce,
    restrict,
    restrict_changes,
    restrict_gradients,
)
from declarative_cvx.host import HostProgram
from declarative_cvx.kkt import solve_kkt
from declarative_cvx.optimality import residual_map
from declarative_cvx.program import ConeProgram, Sparsity, Structure

ACCURATE = 1e-9
EVERY_CONE = Cone(zero=6, nonneg=4, soc=(3, 2, 3), psd=(2, 3), exp=1, power=(0.3, 0.6))
FEW_CONES = Cone(zero=4, nonneg=2, soc=(3,))


# Random programs


def pattern(mask: np.ndarray) -> Sparsity:
    rows, cols = np.nonzero(mask)
    return Sparsity(mask.shape, rows, cols)


def defining(cone: Cone, variables: int, defined: int, rng: np.random.Generator) -> Structure:
    """The first rows define the last variables, which stand on the diagonal of P only."""
    n, kept = variables + defined, variables
    A = rng.random((cone.rows, n)) < 0.7
    A[:, kept:] = False
    A[np.arange(defined), kept + np.arange(defined)] = True
    P = np.zeros((n, n), dtype=bool)
    P[:kept, :kept] = rng.random((kept, kept)) < 0.5
    P |= P.T | np.eye(n, dtype=bool)
    return Structure(pattern(P), pattern(A), cone)


def random_program(
    structure: Structure, rng: np.random.Generator, batch: int = 3, shared: tuple[str, ...] = ()
) -> ConeProgram:
    """Positive definite P; P and A may be shared by all elements."""
    n = structure.variables
    rows, cols = structure.P.rows, structure.P.cols
    P = rng.standard_normal((1 if "P" in shared else batch, n, n)) / n
    P = P + P.swapaxes(1, 2) + 2 * np.eye(n)
    A = rng.standard_normal((1 if "A" in shared else batch, structure.A.nnz))
    A += np.sign(A) * 0.3
    data = P[:, rows, cols], rng.standard_normal((batch, n)), A
    values = [torch.as_tensor(v) for v in (*data, rng.standard_normal((batch, structure.rows)))]
    return ConeProgram(structure, *values)


def with_elimination(program: ConeProgram) -> ConeProgram:
    """All entries of A are taken for constants."""
    elimination = find_elimination(program.structure, program.A[0].numpy())
    assert elimination is not None
    return replace(program, structure=replace(program.structure, elimination=elimination))


def dense(values: Tensor, sparsity: Sparsity, element: int) -> np.ndarray:
    out = np.zeros(sparsity.shape)
    out[sparsity.rows, sparsity.cols] = values[element if len(values) > 1 else 0].numpy()
    return out


def jacobian(program: ConeProgram, projection: ConeDerivative, element: int) -> np.ndarray:
    P = dense(program.P, program.structure.P, element)
    A = dense(program.A, program.structure.A, element)
    D = np.diag(projection.diagonal[element].numpy())
    for index, block in projection.blocks:
        for cone, rows in enumerate(index.numpy()):
            D[np.ix_(rows, rows)] = block[element, cone].numpy()
    return np.block([[P, A.T @ (D - np.eye(len(D)))], [A, D]])


def projection_at(program: ConeProgram, rng: np.random.Generator) -> ConeDerivative:
    z = torch.as_tensor(rng.standard_normal((program.batch, program.structure.rows)))
    return program.structure.cone.derivative(z)


# Solutions of the systems


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("eliminated", [False, True])
@pytest.mark.parametrize("shared", [(), ("P",), ("A",), ("P", "A")])
@pytest.mark.parametrize("columns", [1, 4])
def test_solutions_are_those_of_dense_systems(
    transpose: bool, eliminated: bool, shared: tuple[str, ...], columns: int
) -> None:
    rng = np.random.default_rng(columns)
    program = random_program(defining(EVERY_CONE, 24, 5, rng), rng, shared=shared)
    projection = projection_at(program, rng)
    rhs = rng.standard_normal((3, program.structure.variables + EVERY_CONE.rows, columns))
    if eliminated:
        program = with_elimination(program)
    found, residual = solve_kkt(program, projection, torch.as_tensor(rhs), transpose)
    assert residual.shape == (3, columns)
    assert float(residual.max()) <= ACCURATE
    for i in range(3):
        J = jacobian(program, projection, i)
        expected = np.linalg.solve(J.T if transpose else J, rhs[i])
        assert_allclose(found[i], expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_matrix_is_the_derivative_of_the_optimality_conditions() -> None:
    rng = np.random.default_rng(0)
    program = random_program(defining(EVERY_CONE, 24, 5, rng), rng)
    x = torch.as_tensor(rng.standard_normal((3, program.structure.variables)))
    z = torch.as_tensor(rng.standard_normal((3, EVERY_CONE.rows)))
    change = torch.as_tensor(rng.standard_normal((3, x.shape[1] + z.shape[1])))
    h = 1e-6
    ends = [
        torch.cat(
            residual_map(program, x + s * change[:, : x.shape[1]], z + s * change[:, x.shape[1] :]),
            1,
        )
        for s in (h, -h)
    ]
    rhs = ((ends[0] - ends[1]) / (2 * h))[:, :, None]
    found = solve_kkt(program, EVERY_CONE.derivative(z), rhs)[0][:, :, 0]
    assert_allclose(found, change, atol=1e-5)


def singular_program(rng: np.random.Generator) -> tuple[ConeProgram, ConeDerivative]:
    """Two elements; in the second one two equalities are proportional."""
    cone = FEW_CONES
    structure = defining(cone, 8, 2, rng)
    mask = np.zeros(structure.A.shape, dtype=bool)
    mask[structure.A.rows, structure.A.cols] = True
    mask[2:4, :8] = True
    structure = Structure(structure.P, pattern(mask), cone)
    program = random_program(structure, rng, batch=2)
    A = np.stack([dense(program.A, structure.A, i) for i in range(2)])
    A[1, 3] = -2 * A[1, 2]
    A = A[:, structure.A.rows, structure.A.cols]
    program = replace(program, A=torch.as_tensor(A))
    return program, projection_at(program, rng)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("eliminated", [False, True])
def test_singular_systems_have_the_solution_of_least_norm(
    transpose: bool, eliminated: bool
) -> None:
    rng = np.random.default_rng(4)
    program, projection = singular_program(rng)
    if eliminated:
        program = with_elimination(program)
    matrices = [jacobian(program, projection, i) for i in range(2)]
    matrices = [J.T if transpose else J for J in matrices]
    size = len(matrices[0])
    assert [np.linalg.matrix_rank(J) for J in matrices] == [size, size - 1]
    rhs = np.stack([J @ rng.standard_normal((size, 2)) for J in matrices])
    found, residual = solve_kkt(program, projection, torch.as_tensor(rhs), transpose)
    assert float(residual.max()) <= ACCURATE
    for i, J in enumerate(matrices):
        assert_allclose(found[i], np.linalg.lstsq(J, rhs[i], rcond=1e-10)[0], atol=1e-7)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("eliminated", [False, True])
def test_systems_without_solution_have_the_least_squares_one_and_say_so(
    transpose: bool, eliminated: bool
) -> None:
    rng = np.random.default_rng(5)
    program, projection = singular_program(rng)
    if eliminated:
        program = with_elimination(program)
    rhs = rng.standard_normal((2, 10 + FEW_CONES.rows, 3)) * [1e-12, 1.0, 1e12]
    found, residual = solve_kkt(program, projection, torch.as_tensor(rhs), transpose)
    for i in range(2):
        J = jacobian(program, projection, i)
        J = J.T if transpose else J
        expected = np.linalg.lstsq(J, rhs[i], rcond=1e-10)[0]
        sizes = np.abs(expected).max(0)
        assert_allclose(found[i] / sizes, expected / sizes, atol=1e-7)
        error = np.abs(J @ expected - rhs[i]).max(0) / np.abs(rhs[i]).max(0)
        assert_allclose(residual[i], error, atol=ACCURATE)
        assert (error > 1e-3).all() == (i == 1)


def test_right_hand_side_zero_has_solution_zero() -> None:
    rng = np.random.default_rng(6)
    program, projection = singular_program(rng)
    found, residual = solve_kkt(program, projection, torch.zeros((2, 19, 2), dtype=torch.float64))
    assert not found.any()
    assert not residual.any()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("eliminated", [False, True])
def test_gradients_of_the_solution(transpose: bool, eliminated: bool) -> None:
    rng = np.random.default_rng(7)
    cone = Cone(zero=2, nonneg=1, soc=(2,))
    program = random_program(defining(cone, 4, 1, rng), rng, batch=2, shared=("A",))
    if eliminated:
        program = with_elimination(program)
    structure = program.structure
    projection = projection_at(program, rng)
    ((rows, block),) = projection.blocks
    mirrored = torch.as_tensor(structure.P.transposed_order)
    rhs = torch.as_tensor(rng.standard_normal((2, structure.variables + cone.rows, 2)))

    def solution(
        P: Tensor, A: Tensor, diagonal: Tensor, block: Tensor, rhs: Tensor
    ) -> Tensor:  # P and the blocks are symmetric
        symmetric = ConeProgram(structure, (P + P[:, mirrored]) / 2, program.q, A, program.b)
        rest = torch.zeros((2, 2), dtype=torch.float64)  # the rows of the block
        derivative = ConeDerivative(
            torch.cat([diagonal, rest], 1), [(rows, (block + block.mT) / 2)]
        )
        return solve_kkt(symmetric, derivative, rhs, transpose)[0]

    inputs = [program.P, program.A, projection.diagonal[:, :3], block, rhs]
    inputs = [v.clone().requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(solution, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solution, inputs, check_fwd_over_rev=True)


# Substitution


def small_structure() -> Structure:
    """Three variables kept, three defined by the equalities 0, 1 and 3; row 2 defines nothing."""
    A = np.array(
        [
            [1, 1, 0, 1, 0, 0],
            [0, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 1],
            [1, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
        ],
        dtype=bool,
    )
    P = np.diag([True, True, False, True, True, False])
    P[0, 1] = P[1, 0] = True
    return Structure(pattern(P), pattern(A), Cone(zero=4, nonneg=4))


def small_program(b: list[float], q: list[float]) -> ConeProgram:
    """x0 <= b4, -x0 <= b5, -x2 <= b6, x1 <= b7 and the four equalities."""
    structure = small_structure()
    A = np.array([1.0, 2.0, 2.0, -1.0, 0.5, 1.0, 1.0, 1.0, 1.0, -4.0, 1.0, -1.0, -1.0, 1.0])
    P = np.zeros((6, 6))
    P[:2, :2], P[3, 3], P[4, 4] = [[2.0, 0.5], [0.5, 1.0]], 3.0, 0.7
    values = (P[structure.P.rows, structure.P.cols], np.array(q), A, np.array(b))
    program = ConeProgram(structure, *(torch.as_tensor(v)[None] for v in values))
    return with_elimination(program)


def solve_reduced(program: ConeProgram) -> tuple[Status, tuple[Tensor, Tensor, Tensor]]:
    answer = Clarabel().solve(HostProgram.of(reduce(program)))
    x, y, s = (torch.as_tensor(v) for v in (answer.x, answer.y, answer.s))
    return answer.status[0], (x, y, s)


_NO, _YES = torch.tensor([False]), torch.tensor([True])
FEASIBLE = [1.0, -0.5, 0.25, 2.0, 1.0, 2.0, 3.0, 4.0]


def test_what_is_eliminated() -> None:
    program = small_program(FEASIBLE, [1.0] * 6)
    elimination = program.structure.elimination
    assert elimination.E.tolist() == [0, 1, 3]
    assert elimination.T.tolist() == [3, 4, 5]
    assert elimination.X.tolist() == [0, 1, 2]
    assert elimination.R.tolist() == [2, 4, 5, 6, 7]
    smaller = reduce(program)
    assert smaller.structure.cone == Cone(zero=1, nonneg=4)
    assert (smaller.structure.variables, smaller.structure.rows) == (3, 5)


def test_solutions_of_the_reduced_program_extend_to_solutions_of_the_whole() -> None:
    program = small_program(FEASIBLE, [1.0, -2.0, 1.0, 0.5, -1.0, 2.0])
    status, point = solve_reduced(program)
    assert status is Status.OPTIMAL
    whole = extend(program, point, (_NO, _NO))
    element = HostProgram.of(program).element(0)
    found = violations(element, *(v[0].numpy() for v in whole))
    assert max(found.values()) <= 1e-7, found
    for one, other in zip(restrict(program, whole), point, strict=True):
        assert_allclose(one, other, atol=1e-15)
    again = extend(program, restrict(program, whole), (_NO, _NO))
    for one, other in zip(again, whole, strict=True):
        assert_allclose(one, other, atol=1e-15)


def test_values_of_both_programs_differ_by_a_constant() -> None:
    program = small_program(FEASIBLE, [1.0, -2.0, 1.0, 0.5, -1.0, 2.0])
    differences = []
    for x in np.random.default_rng(1).standard_normal((4, 1, 3)):
        point = torch.as_tensor(x), torch.zeros((1, 5)).double(), torch.zeros((1, 5)).double()
        whole = extend(program, point, (_NO, _NO))[0]
        assert_allclose((program.A_times(whole) - program.b)[0, [0, 1, 3]], 0, atol=1e-13)
        differences.append(program.objective(whole) - reduce(program).objective(point[0]))
    assert np.ptp([float(d) for d in differences]) <= 1e-12


def dense_program(shared: bool) -> ConeProgram:
    """Nothing is missing in the rows that define variables, nor in the others."""
    rng = np.random.default_rng(8)
    cone = Cone(zero=3, nonneg=4)
    structure = defining(cone, 4, 3, rng)
    A = np.ones((7, 7), dtype=bool)
    A[:, 4:] = False
    A[np.arange(3), 4 + np.arange(3)] = True
    program = random_program(Structure(structure.P, pattern(A), cone), rng, shared=("A",) * shared)
    elimination = with_elimination(program).structure.elimination
    assert elimination is not None
    arranged, orders = arrange(program.structure, elimination)
    assert arranged.has_joined_blocks
    data = {name: getattr(program, name)[:, order] for name, order in orders.items()}
    return ConeProgram(arranged, **data)


def pieces_program() -> ConeProgram:
    rng = np.random.default_rng(9)
    return with_elimination(random_program(defining(EVERY_CONE, 24, 5, rng), rng))


REDUCIBLE = {
    "small": lambda: small_program(FEASIBLE, [1.0, -2.0, 1.0, 0.5, -1.0, 2.0]),
    "joined": lambda: dense_program(shared=False),
    "joined, A shared": lambda: dense_program(shared=True),
    "every cone": pieces_program,
}
reducible = pytest.mark.parametrize("name", REDUCIBLE)


def vectors(*like: Tensor, seed: int = 3) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.as_tensor(rng.standard_normal(tuple(v.shape))) for v in like]


@reducible
def test_conditions_of_the_reduced_program_are_those_of_the_whole(name: str) -> None:
    program = REDUCIBLE[name]()
    smaller, elimination = reduce(program), program.structure.elimination
    x, y, s = vectors(smaller.q, smaller.b, smaller.b)
    dual, primal = program.conditions(*extend(program, (x, y, s)))
    assert_allclose(dual[:, elimination.T], 0, atol=1e-13)
    assert_allclose(primal[:, elimination.E], 0, atol=1e-13)
    found = smaller.conditions(x, y, s)
    assert_allclose(found[0], dual[:, elimination.X], atol=1e-12)
    assert_allclose(found[1], primal[:, elimination.R], atol=1e-12)
    formed = ConeProgram(smaller.structure, smaller.P, smaller.q, smaller.A, smaller.b)
    for one, other in zip(formed.conditions(x, y, s), found, strict=True):
        assert_allclose(one, other, atol=1e-12)


@reducible
def test_terms_bound_the_conditions_and_select_takes_elements(name: str) -> None:
    program = REDUCIBLE[name]()
    smaller = reduce(program)
    point = vectors(smaller.q, smaller.b, smaller.b)
    found, sizes = smaller.conditions(*point), smaller.terms(*point, torch.abs)
    for one, size in zip(found, sizes, strict=True):
        assert bool((one.abs() <= 4 * size + 1e-15).all())
    at = torch.arange(program.batch - 1, program.batch)
    part = smaller.select(at)
    for one, other in zip(part.conditions(*(v[at] for v in point)), found, strict=True):
        assert_allclose(one, other[at], atol=1e-14)


@reducible
def test_changes_and_gradients_of_the_data_are_adjoint(name: str) -> None:
    program = REDUCIBLE[name]()
    smaller = reduce(program)
    q, b, grad_q, grad_b = vectors(program.q, program.b, smaller.q, smaller.b)
    moved = replace(program, q=program.q + q, b=program.b + b)
    changes = restrict_changes(program, q, b)
    assert_allclose(reduce(moved).q - smaller.q, changes[0], atol=1e-12)
    assert_allclose(reduce(moved).b - smaller.b, changes[1], atol=1e-12)
    pulled = extend_data_gradients(program, grad_q, grad_b)
    one = (changes[0] * grad_q).sum(1) + (changes[1] * grad_b).sum(1)
    assert_allclose(one, (q * pulled[0]).sum(1) + (b * pulled[1]).sum(1), atol=1e-11)


@reducible
def test_changes_and_gradients_of_the_solution_are_adjoint(name: str) -> None:
    program = REDUCIBLE[name]()
    smaller = reduce(program)
    x, y, dx, dy = vectors(smaller.q, smaller.b, smaller.q, smaller.b)
    here, there = extend(program, (x, y, y)), extend(program, (x + dx, y + dy, y))
    grad_x, grad_y = vectors(program.q, program.b, seed=4)
    pulled = restrict_gradients(program, grad_x, grad_y)
    one = ((there[0] - here[0]) * grad_x).sum(1) + ((there[1] - here[1]) * grad_y).sum(1)
    assert_allclose(one, (dx * pulled[0]).sum(1) + (dy * pulled[1]).sum(1), atol=1e-11)


def test_certificates_extend_too() -> None:
    element_of = HostProgram.of
    infeasible = small_program([1.0, -0.5, 0.25, 2.0, -1.0, -1.0, 3.0, 4.0], [1.0] * 6)
    status, point = solve_reduced(infeasible)
    assert status is Status.INFEASIBLE
    y = extend(infeasible, point, (_NO, _YES))[1][0].numpy()
    assert infeasibility_violation(element_of(infeasible).element(0), y) <= 1e-7
    # Along x2 nothing is curved; t5 = (x0 + x2 - b3) / 4 moves with it.
    unbounded = small_program(FEASIBLE, [1.0, 1.0, -1.0, 1.0, 1.0, 0.4])
    status, point = solve_reduced(unbounded)
    assert status is Status.UNBOUNDED
    x = extend(unbounded, point, (_YES, _NO))[0][0].numpy()
    assert x[5] == pytest.approx(x[2] / 4, rel=1e-6)
    assert unboundedness_violation(element_of(unbounded).element(0), x) <= 1e-7


def eliminated(A: list[list[int]], P: list[list[int]], zero: int, **constants: float) -> list:
    """Pairs (row, variable); entries of A are constants except those given as `row_col=value`."""
    mask, coupling = np.array(A, dtype=bool), np.array(P, dtype=bool)
    structure = Structure(pattern(mask), pattern(mask), Cone(zero=zero, nonneg=len(A) - zero))
    structure = replace(structure, P=pattern(coupling))
    values = np.ones(mask.shape)
    for place, value in constants.items():
        row, col = place[1:].split("_")
        values[int(row), int(col)] = value
    found = find_elimination(structure, values[structure.A.rows, structure.A.cols])
    return [] if found is None else list(zip(found.E.tolist(), found.T.tolist(), strict=True))


_A = [[1, 1, 0], [1, 0, 1], [1, 0, 0]]
_P = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_only_what_qualifies_is_eliminated() -> None:
    assert eliminated(_A, _P, 2) == [(0, 1), (1, 2)]
    # A coefficient that depends on parameters, or is zero, cannot be divided by.
    assert eliminated(_A, _P, 2, a0_1=np.nan) == [(1, 2)]
    assert eliminated(_A, _P, 2, a0_1=0.0) == [(1, 2)]
    # Others in the same rows may depend on parameters.
    assert eliminated(_A, _P, 2, a0_0=np.nan, a1_0=np.nan, a2_0=np.nan) == [(0, 1), (1, 2)]
    # A second occurrence, in an equality or in an inequality.
    assert eliminated([[1, 1, 0], [1, 0, 1], [1, 1, 0]], _P, 2) == [(1, 2)]
    # A coupling in P, from either side.
    assert eliminated(_A, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], 2) == [(1, 2)]
    # Inequalities define nothing.
    assert eliminated(_A, _P, 1) == [(0, 1)]
    assert eliminated(_A, _P, 0) == []
    # One variable for each equality.
    assert len(eliminated([[1, 1, 1], [1, 0, 0]], _P, 1)) == 1
    # Variables without curvature as well.
    assert eliminated(_A, np.diag([1, 0, 1]).tolist(), 2) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_pattern_of_the_reduced_objective(share: float) -> None:
    """P over x for ||B x||^2 plus a quadratic form, with B as ever a dense or a sparse matrix."""
    rng = np.random.default_rng(3)
    rows, n = 20, 40
    B, own = rng.random((rows, n)) < share, rng.random((n, n)) < 0.01
    own |= own.T
    A = np.block([[np.eye(rows, dtype=bool), B], [np.zeros((1, rows)), np.ones((1, n))]])
    P = np.block([[np.eye(rows), np.zeros((rows, n))], [np.zeros((n, rows)), own]])
    structure = Structure(pattern(P), pattern(A), Cone(zero=rows, nonneg=1))
    found = find_elimination(structure, np.ones(structure.A.nnz))
    assert found is not None
    curvature = found.reduced.P
    expected = (B.T.astype(int) @ B + own) > 0
    assert np.array_equal([curvature.rows, curvature.cols], np.nonzero(expected))


def test_nothing_is_eliminated_where_the_reduced_objective_would_be_denser_than_the_data() -> None:
    """One equality over n variables defines one more: P over the n would have n^2 entries."""
    for n, worth in ((30, True), (100, True), (101, False)):
        A = np.ones((2, n + 1), dtype=int)
        A[1, n] = 0
        found = eliminated(A.tolist(), np.diag([0] * n + [1]).tolist(), 1, **{f"a0_{n}": 1.0})
        assert n**2 > A.sum() + 1
        assert bool(found) == worth  # up to a hundred a denser P does not matter


def test_nothing_is_left_to_eliminate_without_equalities_or_other_rows() -> None:
    assert eliminated([[1, 1]], [[1, 0], [0, 1]], 1) == []
    assert eliminated([[1, 1]], [[1, 0], [0, 1]], 0) == []
