"""The compiled linear systems: solutions are those of the matrices written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from declarative_cvx.compiled_systems import COLUMNS, LARGEST, CompiledSystems, suits
from declarative_cvx.condensed import Condensed, condense
from declarative_cvx.cones import ConeDerivative

compiled_part = pytest.importorskip("declarative_cvx.compiled._programs", reason="no C compiler")


def matrix(P: Tensor, A: Tensor, diagonal: Tensor, transpose: bool) -> Tensor:
    """J or its transpose, block by block."""
    D, one = torch.diag_embed(diagonal), torch.eye(diagonal.shape[1], dtype=P.dtype)
    P, A = (v.expand(len(diagonal), -1, -1) for v in (P, A))
    J = torch.cat([torch.cat([P, A.mT @ (D - one)], 2), torch.cat([A, D], 2)], 1)
    return J.mT if transpose else J


def systems(
    seed: int, batch: int, n: int, m: int, kept: int, rank: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """P of a rank, A, and a diagonal with so many zeros, at random places."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(batch, n if rank is None else rank, n, generator=generator).double()
    A = torch.randn(batch, m, n, generator=generator).double()
    diagonal = torch.ones(batch, m, dtype=torch.float64)
    for row in diagonal:
        row[torch.randperm(m, generator=generator)[:kept]] = 0.0
    return factor.mT @ factor, A, diagonal


def unused(at: Tensor) -> Condensed:
    raise AssertionError(f"elements {at.tolist()} were not solved by the compiled code")


def rhs_of(P: Tensor, A: Tensor, batch: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(batch, P.shape[1] + A.shape[1], columns, generator=generator).double()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("batch", "n", "m", "kept", "rank"),
    [
        (1, 1, 1, 1, 1),
        (3, 5, 0, 0, 5),
        (4, 6, 9, 0, 6),
        (20, 10, 10, 4, 10),
        (7, 33, 50, 20, 33),
        (2, 120, 90, 45, 120),
        (6, 8, 20, 8, 0),  # as at a vertex of a linear program
        (6, 12, 20, 7, 5),  # P singular, J not
        (6, 12, 20, 11, 9),
    ],
)
def test_solutions_are_those_of_the_matrix(
    batch: int, n: int, m: int, kept: int, rank: int, transpose: bool
) -> None:
    P, A, diagonal = systems(0, batch, n, m, kept, rank)
    rhs = rhs_of(P, A, batch, 3)
    found = CompiledSystems(P, A, diagonal, unused).solve(rhs, transpose)
    expected = torch.linalg.solve(matrix(P, A, diagonal, transpose), rhs)
    scale = expected.abs().amax((1, 2), keepdim=True)
    assert_close(found / scale, expected / scale, rtol=0, atol=1e-9)
    left = matrix(P, A, diagonal, transpose) @ found - rhs
    assert left.abs().amax() <= 1e-13 * float(
        (matrix(P, A, diagonal, transpose).abs() @ found.abs()).amax()
    )


@pytest.mark.parametrize("shared", ["P", "A", "both"])
def test_elements_may_share_matrices(shared: str) -> None:
    P, A, diagonal = systems(1, 5, 7, 11, 3)
    P = P[:1] if shared != "A" else P
    A = A[:1] if shared != "P" else A
    rhs = rhs_of(P, A, 5, 1)
    found = CompiledSystems(P, A, diagonal, unused).solve(rhs, True)
    assert_close(found, torch.linalg.solve(matrix(P, A, diagonal, True), rhs))


def test_matrices_may_be_views() -> None:
    P, A, diagonal = systems(2, 4, 6, 8, 3)
    wide = torch.zeros(4, 8, 9, dtype=torch.float64)
    wide[:, :, 2:8] = A
    rhs = rhs_of(P, A, 4, 2)
    found = CompiledSystems(P, wide[:, :, 2:8], diagonal, unused).solve(rhs, False)
    assert_close(found, torch.linalg.solve(matrix(P, A, diagonal, False), rhs))


def _dependent(P: Tensor, A: Tensor, diagonal: Tensor) -> None:
    rows = torch.where(diagonal[1] == 0)[0]
    A[1, rows[0]] = 2 * A[1, rows[1]]


def _more_rows_than_variables(P: Tensor, A: Tensor, diagonal: Tensor) -> None:
    diagonal[1] = 0.0


def _flat(P: Tensor, A: Tensor, diagonal: Tensor) -> None:
    P[1] = 0.0


def _between(P: Tensor, A: Tensor, diagonal: Tensor) -> None:
    diagonal[1, 0] = 0.5


def _not_finite(P: Tensor, A: Tensor, diagonal: Tensor) -> None:
    P[1, 0, 0] = torch.nan


@pytest.mark.parametrize(
    "spoil", [_dependent, _more_rows_than_variables, _flat, _between, _not_finite]
)
def test_singular_elements_go_to_the_other_solver(
    spoil: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    P, A, diagonal = systems(3, 4, 6, 10, 3)
    spoil(P, A, diagonal)
    asked: list[list[int]] = []

    class Other:
        free = torch.zeros(1, 6, dtype=torch.bool)
        doubtful = torch.tensor([True])

        def solve(self, rhs: Tensor, transpose: bool) -> Tensor:
            return torch.full_like(rhs, 7.0)

    def otherwise(at: Tensor) -> Other:
        asked.append(at.tolist())
        return Other()

    compiled, rhs = CompiledSystems(P, A, diagonal, otherwise), rhs_of(P, A, 4, 2)
    found = compiled.solve(rhs, True)
    assert asked == [[1]]
    assert compiled.doubtful.tolist() == [False, True, False, False]
    assert (found[1] == 7.0).all()
    whole = [0, 2, 3]
    expected = torch.linalg.solve(matrix(P, A, diagonal, True)[whole], rhs[whole])
    assert_close(found[whole], expected)
    compiled.solve(rhs, False)
    assert asked == [[1]]  # and is kept for the next system
    compiled.solve(rhs_of(P, A, 4, COLUMNS + 1), False)
    assert asked == [[1], [0, 1, 2, 3]]


def test_direction_without_curvature_is_singular_whatever_the_right_hand_side() -> None:
    """Solutions along it are not unique even where the right-hand side has no share in it."""
    P = torch.diag_embed(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    A = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    rhs = torch.tensor([[[1.0], [0.0], [0.0]]], dtype=torch.float64)
    P[0, 0, 1] = P[0, 1, 0] = 1e-30  # not a free variable: a condition contains it
    with pytest.raises(AssertionError, match=r"\[0\] were not solved"):
        CompiledSystems(P, A, torch.ones(1, 1, dtype=torch.float64), unused).solve(rhs, True)


@pytest.mark.parametrize("row", [[1.0, 1.0], [1.0, -1.0], [2.0, 1.0]])
def test_edge_of_solutions_is_singular(row: list[float]) -> None:
    """Whatever the direction along which nothing changes."""
    P, A = torch.zeros(1, 2, 2, dtype=torch.float64), torch.tensor([[row]], dtype=torch.float64)
    rhs = torch.tensor([[[row[0]], [row[1]], [0.0]]], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"\[0\] were not solved"):
        CompiledSystems(P, A, torch.zeros(1, 1, dtype=torch.float64), unused).solve(rhs, True)


@pytest.mark.parametrize("transpose", [False, True])
def test_free_variables_are_zero_as_in_the_other_solver(transpose: bool) -> None:
    P, A, diagonal = systems(4, 3, 6, 5, 2, rank=6)
    P[:, 5], P[:, :, 5] = 0.0, 0.0
    A[:, :, 5] = A[:, :, 5] * diagonal  # only in rows that do not bind
    compiled = CompiledSystems(P, A, diagonal, unused)
    other = Condensed.of(P, A, ConeDerivative(diagonal, [], None))
    assert compiled.free.tolist() == other.free.tolist() == 3 * [[False] * 5 + [True]]
    rhs = rhs_of(P, A, 3, 2)
    found = compiled.solve(rhs, transpose)
    assert (found[:, 5] == 0).all()
    assert_close(found, other.solve(rhs, transpose))


def test_number_of_threads_does_not_change_the_solution() -> None:
    P, A, diagonal = systems(5, 40, 30, 40, 10)
    rhs, threads = rhs_of(P, A, 40, 1), torch.get_num_threads()
    compiled, found = CompiledSystems(P, A, diagonal, unused), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(compiled.solve(rhs, True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_it_is_chosen_for_small_double_precision_systems_on_the_host() -> None:
    P, A, diagonal = systems(6, 2, 3, 4, 1)
    assert isinstance(condense(P, A, ConeDerivative(diagonal, [], None)), CompiledSystems)
    assert not suits(P.float(), A.float())
    assert not suits(P.to("meta"), A.to("meta"))
    large = torch.zeros(1, LARGEST + 1, LARGEST + 1, dtype=torch.float64)
    assert not suits(large, large)


def test_arrays_that_do_not_fit_are_refused() -> None:
    P, A, diagonal = (v.numpy() for v in systems(7, 2, 3, 4, 1))
    rhs = np.zeros((2, 6, 1))  # one row too few
    with pytest.raises(ValueError, match="do not fit"):
        compiled_part.solve_systems(
            2, 3, 4, 1, True, 1, P, A, diagonal, rhs, rhs.copy(), np.zeros(2, dtype=bool)
        )
