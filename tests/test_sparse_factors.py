"""Sparse matrices of a batch, the order of their elimination, and their factorisation."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from declarative_cvx.nonconvex.minimization.sparse.matrix import SparseMatrix
from declarative_cvx.nonconvex.minimization.sparse.ordering import eliminate, neighbours
from declarative_cvx.nonconvex.minimization.sparse.pattern import Pattern
from declarative_cvx.nonconvex.minimization.sparse.plan import Plan

double = torch.float64
Places = list[tuple[int, int]]

sizes = st.tuples(st.integers(6, 24), st.integers(0, 9), st.integers(1, 4), st.integers(0, 10**6))


def symmetric(n: int, share: float) -> Places:
    """A random pattern with a full diagonal."""
    chosen = torch.rand(n, n) < share
    mask = chosen | chosen.T | torch.eye(n, dtype=torch.bool)
    return [(int(i), int(j)) for i, j in mask.nonzero()]


def sparse(places: Places, shape: tuple[int, int], batch: int) -> SparseMatrix:
    return SparseMatrix(torch.randn(batch, len(places), dtype=double), Pattern(places, shape))


def mirrored(matrix: SparseMatrix) -> SparseMatrix:
    """The same with the upper triangle copied from the lower one."""
    full = matrix.dense().tril()
    full = full + full.tril(-1).mT
    return SparseMatrix(entries_of(full, matrix.pattern), matrix.pattern)


def entries_of(full: Tensor, pattern: Pattern) -> Tensor:
    return torch.stack([full[:, i, j] for i, j in pattern.places], 1)


def system(
    n: int, r: int, batch: int, share: float = 0.08, wide: int = 0
) -> tuple[SparseMatrix, SparseMatrix, Plan]:
    """A Hessian and rows, of which the first few are full, with a plan."""
    hessian = mirrored(sparse(symmetric(n, share), (n, n), batch))
    mask = torch.rand(r, n) < share
    mask[:wide] = True
    rows = sparse([(int(i), int(j)) for i, j in mask.nonzero()], (r, n), batch)
    plan = Plan.of(hessian.pattern, rows.pattern)
    assume(plan is not None)
    assert plan is not None
    return hessian, rows, plan


def whole(hessian: SparseMatrix, rows: SparseMatrix, w: Tensor, diagonal: Tensor) -> Tensor:
    A = rows.dense()
    return hessian.dense() + (A * w[:, :, None]).mT @ A + torch.diag_embed(diagonal)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- matrices ------------------------------------------------------------------------------------


def test_sparse_matrices_do_what_full_ones_do() -> None:
    torch.manual_seed(0)
    places = [(i, j) for i in range(5) for j in range(4) if (i * j) % 3 != 1 and i != 2]
    matrix = sparse(places, (5, 4), 3)
    full = matrix.dense()
    x, y = torch.randn(3, 4, dtype=double), torch.randn(3, 5, dtype=double)
    torch.testing.assert_close(matrix.along(x), (full @ x[:, :, None])[:, :, 0])
    torch.testing.assert_close(matrix.mix(y), (full * y[:, :, None]).sum(1))
    torch.testing.assert_close(matrix.largest(0), full.abs().amax(2))
    torch.testing.assert_close(matrix.largest(1), full.abs().amax(1))
    torch.testing.assert_close(matrix.norms(), full.norm(dim=2))
    torch.testing.assert_close(matrix.scaled(y, x).dense(), full * y[:, :, None] * x[:, None])
    torch.testing.assert_close(matrix.abs().dense(), full.abs())
    torch.testing.assert_close(matrix.first(), full[:, 0])
    torch.testing.assert_close(matrix.rest().dense(), full[:, 1:])


def test_a_matrix_may_have_no_rows_or_no_entries() -> None:
    for places, shape in (([], (0, 3)), ([], (2, 3))):
        matrix = sparse(places, shape, 2)
        assert torch.equal(matrix.mix(torch.ones(2, shape[0], dtype=double)), torch.zeros(2, 3))
        assert torch.equal(matrix.along(torch.ones(2, 3, dtype=double)), torch.zeros(2, shape[0]))
        assert torch.equal(matrix.largest(1), torch.zeros(2, 3))
        assert torch.equal(matrix.dense(), torch.zeros(2, *shape))


def test_records_of_sparse_matrices_are_taken_apart_by_elements() -> None:
    torch.manual_seed(0)
    matrix, other = (sparse([(0, 0), (1, 2), (1, 1)], (2, 3), 4) for _ in range(2))
    other = SparseMatrix(other.values, matrix.pattern)
    at = torch.tensor([3, 1])
    torch.testing.assert_close(matrix.select(at).dense(), matrix.dense()[at])
    put = matrix.put(at, other.select(at)).dense()
    torch.testing.assert_close(put[at], other.dense()[at])
    torch.testing.assert_close(put[[0, 2]], matrix.dense()[[0, 2]])


# --- order ---------------------------------------------------------------------------------------


def fill(order: list[int], graph: list[set[int]]) -> set[frozenset[int]]:
    """Pairs of nodes with an entry in L, by elimination of one node after the other."""
    graph = [set(found) for found in graph]
    pairs = set()
    for node in order:
        near = list(graph[node])
        pairs |= {frozenset((node, other)) for other in near}
        for a, b in combinations(near, 2):
            graph[a].add(b)
            graph[b].add(a)
        for other in near:
            graph[other].discard(node)
    return pairs


@given(sizes, st.sampled_from([1.0, 2.0, 3.0]))
@settings(deadline=None, max_examples=40)
def test_rounds_are_an_elimination_of_independent_nodes(
    size: tuple[int, int, int, int], slack: float
) -> None:
    n, _, _, seed = size
    torch.manual_seed(seed)
    graph = neighbours(n, symmetric(n, 0.1))
    ordering = eliminate(graph, slack, 10**9)
    assert ordering is not None
    order = [node for members in ordering.rounds for node, _ in members] + ordering.rest
    assert sorted(order) == list(range(n))
    for members in ordering.rounds:
        nodes = {node for node, _ in members}
        assert not any(nodes & set(below) for _, below in members)
    columns = {
        frozenset((v, u)) for members in ordering.rounds for v, below in members for u in below
    }
    columns |= {frozenset(pair) for pair in combinations(ordering.rest, 2)}
    assert columns == fill(order, graph)


def test_a_chain_takes_the_logarithm_of_its_length() -> None:
    n = 512
    ordering = eliminate(neighbours(n, [(i, i + 1) for i in range(n - 1)]), 2.0, 10**9)
    assert ordering is not None
    assert len(ordering.rounds) <= 16
    assert ordering.products <= 8 * n


def test_an_order_that_takes_too_many_products_is_given_up() -> None:
    full = neighbours(20, combinations(range(20), 2))
    star = neighbours(20, [(0, i) for i in range(1, 20)])
    ring = neighbours(60, [(i, (i + k) % 60) for i in range(60) for k in range(1, 9)])
    assert eliminate(ring, 1.0, 100) is None
    assert eliminate(full, 1.0, 100) is None
    found, dense = eliminate(star, 1.0, 100), eliminate(full, 1.0, 10**4)
    assert found is not None
    assert len(found.rounds) <= 2
    assert dense is not None
    assert dense.rest == list(range(20))


def test_full_patterns_have_no_plan() -> None:
    places = [(i, j) for i in range(30) for j in range(30)]
    none: Places = []
    assert Plan.of(Pattern(places, (30, 30)), Pattern(none, (0, 30))) is None


# --- factors -------------------------------------------------------------------------------------


@given(sizes, st.booleans())
@settings(deadline=None, max_examples=60)
def test_definite_matrices_are_solved(size: tuple[int, int, int, int], wide: bool) -> None:
    n, r, batch, seed = size
    torch.manual_seed(seed)
    hessian, rows, plan = system(n, r, batch, wide=min(int(wide), r))
    w, rhs = 10 ** torch.randn(batch, r, dtype=double), torch.randn(batch, n, dtype=double)
    diagonal = hessian.abs().dense().sum(2) + 0.1
    matrix = whole(hessian, rows, w, diagonal)
    factors = plan.factors(plan.assemble(hessian, rows, w, diagonal))
    assert bool(plan.definite(factors).all())
    assert relative(factors.solve(rhs), torch.linalg.solve(matrix, rhs)) <= 1e-10


@given(sizes, st.booleans())
@settings(deadline=None, max_examples=60)
def test_signs_of_pivots_are_those_of_eigenvalues(
    size: tuple[int, int, int, int], wide: bool
) -> None:
    n, r, batch, seed = size
    torch.manual_seed(seed)
    hessian, rows, plan = system(n, r, batch, wide=min(int(wide), r))
    w, diagonal = torch.rand(batch, r, dtype=double), torch.randn(batch, n, dtype=double)
    matrix = whole(hessian, rows, w, diagonal)
    factors = plan.factors(plan.assemble(hessian, rows, w, diagonal))
    curvatures = torch.linalg.eigvalsh(matrix)
    # Pivots can only be trusted where no eigenvalue is near zero and none of them is.
    clear = (curvatures.abs().amin(1) > 1e-6) & factors.usable
    negative = (curvatures < 0).sum(1) + len(plan.wide)
    assert torch.equal(factors.negative[clear], negative[clear])
    assert torch.equal(plan.definite(factors)[clear], (curvatures > 0).all(1)[clear])


def test_wide_rows_are_nodes_of_their_own() -> None:
    torch.manual_seed(0)
    n, r, batch = 40, 2, 3
    hessian = mirrored(sparse([(i, i) for i in range(n)], (n, n), batch))
    rows = sparse([(i, j) for i in range(r) for j in range(n)], (r, n), batch)
    plan = Plan.of(hessian.pattern, rows.pattern)
    assert plan is not None
    assert plan.wide == [0, 1]
    assert plan.elimination.size <= n * (r + 1) + 3
    hessian = hessian.abs()
    w = torch.tensor([[0.0, 2.0], [1e9, 1.0], [0.5, 0.0]], dtype=double)  # also inactive ones
    diagonal = torch.full((batch, n), 0.5, dtype=double)
    factors = plan.factors(plan.assemble(hessian, rows, w, diagonal))
    assert bool(plan.definite(factors).all())
    rhs = torch.randn(batch, n, dtype=double)
    expected = torch.linalg.solve(whole(hessian, rows, w, diagonal), rhs)
    assert relative(factors.solve(rhs), expected) <= 1e-6
    exact = factors.solve(rhs)[[0, 2]]
    assert relative(exact, expected[[0, 2]]) <= 1e-12


def test_singular_and_infinite_elements_leave_the_others_alone() -> None:
    torch.manual_seed(0)
    n, batch = 30, 4
    chain = [(i, j) for i in range(n) for j in (i - 1, i, i + 1) if 0 <= j < n]
    hessian = mirrored(sparse(chain, (n, n), batch))
    none: Places = []
    rows = sparse(none, (0, n), batch)
    plan = Plan.of(hessian.pattern, rows.pattern)
    assert plan is not None
    values = hessian.values.clone()
    values[1] = 0.0
    values[2, 5] = torch.inf
    hessian, w = SparseMatrix(values, hessian.pattern), values.new_zeros(batch, 0)
    diagonal = 4 * torch.ones(batch, n, dtype=double)
    diagonal[1] = 0.0
    factors = plan.factors(plan.assemble(hessian, rows, w, diagonal))
    assert factors.usable.tolist() == [True, False, False, True]
    rhs, good = torch.randn(batch, n, dtype=double), [0, 3]
    expected = torch.linalg.solve(whole(hessian, rows, w, diagonal)[good], rhs[good])
    assert relative(factors.solve(rhs)[good], expected) <= 1e-12


def test_pivots_that_are_too_small_are_noticed() -> None:
    torch.manual_seed(0)
    n, batch = 40, 2
    hessian = sparse([(i, i) for i in range(n)], (n, n), batch)
    rows = sparse([(0, j) for j in range(n)], (1, n), batch)
    plan = Plan.of(hessian.pattern, rows.pattern)
    assert plan is not None
    assert plan.wide == [0]
    values = torch.ones_like(hessian.values)
    values[1, 7] = 1e-17  # where the row alone makes the matrix definite
    hessian, w = SparseMatrix(values, hessian.pattern), torch.ones(batch, 1, dtype=double)
    table = plan.assemble(hessian, rows, w, None)
    factors = plan.factors(table.clone())
    matrix = whole(hessian, rows, w, torch.zeros(batch, n, dtype=double))
    assert bool((torch.linalg.eigvalsh(matrix) > 1e-4).all())
    assert plan.reliable(factors, table).tolist() == [True, False]
