"""The compiled solver by itself: its answers satisfy the conditions that tests/kkt.py computes."""

from __future__ import annotations

import numpy as np
import pytest
from kkt import infeasibility_violation, unboundedness_violation, violations
from numpy.testing import assert_array_equal

from declarative_cvx import BackendError, DualActiveSet, MissingBackendError, Status
from declarative_cvx.backends import Answer, Point, dual_active_set
from declarative_cvx.cones import Cone
from declarative_cvx.host import HostProgram
from declarative_cvx.program import Structure
from declarative_cvx.sparsity import Sparsity

pytest.importorskip("declarative_cvx.compiled._programs", reason="no C compiler")

# Violations relative to the terms of each condition; proofs that there is no solution count up to
# 1e-6.
ROUNDING = 1e-11
PROVEN = 1e-9


def program(
    P: np.ndarray, q: np.ndarray, A: np.ndarray, b: np.ndarray, equalities: int = 0
) -> HostProgram:
    """A batch from dense matrices (batch or 1, rows, cols) and vectors (batch, size)."""
    structure = Structure(
        P=_pattern(P), A=_pattern(A), cone=Cone(zero=equalities, nonneg=b.shape[1] - equalities)
    )
    values = [M[:, at.rows, at.cols] for M, at in ((P, structure.P), (A, structure.A))]
    P, q, A, b = (np.ascontiguousarray(v) for v in (values[0], q, values[1], b))
    return HostProgram(structure, P, q, A, b)


def _pattern(matrix: np.ndarray) -> Sparsity:
    rows, cols = np.nonzero((matrix != 0).any(0))
    return Sparsity(matrix.shape[1:], rows, cols)


def random_program(
    seed: int, batch: int, n: int, m: int, rank: int, equalities: int, active: int
) -> HostProgram:
    """A batch with solutions: a point, rows that hold there, and multipliers, came first."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(batch, rank, n))
    P = factor.transpose(0, 2, 1) @ factor
    A, x = rng.normal(size=(batch, m, n)), rng.normal(size=(batch, n))
    y, s = np.zeros((batch, m)), rng.uniform(0.1, 1.0, size=(batch, m))
    y[:, :equalities] = rng.normal(size=(batch, equalities))
    bound = slice(equalities, equalities + active)
    y[:, bound] = rng.uniform(0.1, 1.0, size=(batch, active))
    s[:, : equalities + active] = 0.0
    q = -np.einsum("bij,bj->bi", P, x) - np.einsum("bji,bj->bi", A, y)
    return program(P, q, A, np.einsum("bij,bj->bi", A, x) + s, equalities)


def assert_solved(given: HostProgram, answer: Answer) -> None:
    assert answer.status == [Status.OPTIMAL] * given.batch
    for i in range(given.batch):
        found = violations(given.element(i), answer.x[i], answer.y[i], answer.s[i])
        assert max(found.values()) < ROUNDING, (i, found)


@pytest.mark.parametrize(
    ("n", "m", "rank", "equalities", "active"),
    [
        (1, 1, 1, 0, 1),
        (5, 0, 5, 0, 0),
        (7, 3, 7, 3, 0),
        (10, 10, 10, 0, 4),
        (9, 31, 9, 2, 5),
        (40, 25, 40, 5, 10),
        (100, 120, 100, 10, 30),
        (10, 30, 0, 0, 10),  # linear programs
        (33, 70, 0, 5, 28),
        (60, 130, 0, 0, 60),
        (20, 40, 7, 2, 13),  # semidefinite P
        (20, 40, 7, 2, 18),
        (24, 30, 23, 0, 3),
    ],
)
def test_programs_with_solutions_are_solved(
    n: int, m: int, rank: int, equalities: int, active: int
) -> None:
    given = random_program(0, 12, n, m, rank, equalities, active)
    assert_solved(given, DualActiveSet().solve(given))


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_more_rows_may_hold_than_there_are_variables(rank: int) -> None:
    """Degenerate vertices: many rows through one point."""
    given = random_program(1, 20, 8, 40, rank, 0, 25)
    assert_solved(given, DualActiveSet().solve(given))


@pytest.mark.parametrize("rank", [0, 4, 6])
def test_rows_may_be_there_several_times(rank: int) -> None:
    once = random_program(2, 10, 6, 12, rank, 2, 5)
    dense = once.A.reshape(10, 12, 6)
    order = [0, 1, 0, 1, 1, *range(2, 12), *range(2, 12)]  # the first five are equalities
    P = once.P.reshape(10, 6, 6) if rank else np.zeros((10, 6, 6))
    given = program(P, once.q, dense[:, order], once.b[:, order], equalities=5)
    assert_solved(given, DualActiveSet().solve(given))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rank", [0, 5, 10])
def test_units_do_not_matter(scale: float, rank: int) -> None:
    given = random_program(3, 10, 10, 25, rank, 1, 9)
    moved = HostProgram(
        given.structure, given.P * scale, given.q * scale, given.A / scale, given.b / scale
    )
    assert_solved(moved, DualActiveSet().solve(moved))


def test_elements_may_share_their_matrices() -> None:
    one = random_program(4, 1, 9, 20, 6, 2, 5)
    rng = np.random.default_rng(0)
    q = one.q + 0.1 * rng.normal(size=(30, 9))
    shared = HostProgram(one.structure, one.P, q, one.A, np.repeat(one.b, 30, 0))
    for threads in (1, 3):
        answer = DualActiveSet(threads=threads).solve(shared)
        assert_solved(shared, answer)
    for i in (0, 17):
        alone = HostProgram(one.structure, one.P, q[i : i + 1], one.A, one.b)
        assert_array_equal(DualActiveSet().solve(alone).x[0], answer.x[i])


def test_number_of_threads_does_not_change_the_answer() -> None:
    given = random_program(5, 50, 30, 40, 30, 3, 12)
    one, several = (DualActiveSet(threads=count).solve(given) for count in (1, 4))
    for name in ("x", "y", "s"):
        assert_array_equal(getattr(one, name), getattr(several, name))


def _infeasible(rank: int, equalities: int) -> HostProgram:
    """Rows a'x <= 1 and -a'x <= -2, or a'x = 1 and a'x = 2, among others."""
    given = random_program(6, 8, 5, 12, rank, equalities, 2)
    A, b = given.A.reshape(8, 12, 5).copy(), given.b.copy()
    sign = 1.0 if equalities >= 2 else -1.0
    A[:, 1], b[:, 0], b[:, 1] = sign * A[:, 0], 1.0, 2.0 * sign
    P = given.P.reshape(8, 5, 5) if rank else np.zeros((8, 5, 5))
    return program(P, given.q, A, b, equalities)


@pytest.mark.parametrize("rank", [0, 2, 5])
@pytest.mark.parametrize("equalities", [0, 2, 4])
def test_infeasible_programs_come_with_a_proof(rank: int, equalities: int) -> None:
    given = _infeasible(rank, equalities)
    answer = DualActiveSet().solve(given)
    assert answer.status == [Status.INFEASIBLE] * 8
    for i in range(8):
        assert infeasibility_violation(given.element(i), answer.y[i]) < PROVEN


def test_unbounded_programs_come_with_a_direction() -> None:
    rng = np.random.default_rng(7)
    factor, A = rng.normal(size=(8, 3, 6)), rng.normal(size=(8, 9, 6))
    ray = np.linalg.svd(factor)[2][:, -1]  # P ray = 0
    A *= -np.sign(np.einsum("bij,bj->bi", A, ray))[:, :, None]  # A ray <= 0
    q = rng.normal(size=(8, 6)) - 3 * ray
    q -= (np.einsum("bi,bi->b", q, ray) + 1.0)[:, None] * ray  # q'ray = -1
    given = program(factor.transpose(0, 2, 1) @ factor, q, A, np.ones((8, 9)))
    answer = DualActiveSet().solve(given)
    assert answer.status == [Status.UNBOUNDED] * 8
    for i in range(8):
        assert unboundedness_violation(given.element(i), answer.x[i]) < PROVEN


def test_objective_that_is_not_convex_is_said_to_be_so() -> None:
    given = program(-np.eye(2)[None], np.ones((3, 2)), np.eye(2)[None], np.ones((3, 2)))
    answer = DualActiveSet().solve(given)
    assert answer.status == [Status.NUMERICAL_ERROR] * 3
    assert answer.said == ["objective not convex"] * 3


def test_numbers_that_are_not_finite_do_not_hang_or_pass_as_solved() -> None:
    for name in ("P", "q", "A", "b"):
        given = random_program(8, 3, 4, 6, 4, 1, 2)
        getattr(given, name)[1] = np.nan
        answer = DualActiveSet().solve(given)
        assert answer.status[0] == answer.status[2] == Status.OPTIMAL
        assert answer.status[1] != Status.OPTIMAL or not np.isfinite(answer.x[1]).all()


def test_limits_end_the_work() -> None:
    given = random_program(9, 4, 60, 130, 0, 0, 60)
    assert DualActiveSet(max_iters=1).solve(given).status == [Status.ITERATION_LIMIT] * 4
    assert DualActiveSet(time_limit=1e-9).solve(given).status == [Status.TIME_LIMIT] * 4
    assert_solved(given, DualActiveSet(time_limit=60.0).solve(given))


def test_start_from_the_solution_takes_no_exchange() -> None:
    given = random_program(10, 6, 40, 90, 0, 0, 40)
    cold = DualActiveSet().solve(given)
    warm = DualActiveSet().solve(given, Point(cold.x, cold.y, cold.s))
    assert_solved(given, warm)
    assert max(warm.iterations) <= 2 < min(cold.iterations)
    nowhere = DualActiveSet().solve(
        given, Point(*(np.full_like(v, np.nan) for v in (cold.x, cold.y, cold.s)))
    )
    assert_solved(given, nowhere)


def test_log_tells_what_became_of_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    DualActiveSet(verbose=True).solve(_infeasible(5, 0))
    assert "8 programs of 5 variables and 12 rows: 8 infeasible" in capsys.readouterr().out


def test_arrays_that_do_not_fit_are_refused() -> None:
    given = random_program(11, 3, 4, 6, 4, 1, 2)
    short = HostProgram(given.structure, given.P, given.q, given.A, given.b[:2])
    with pytest.raises(ValueError, match="do not fit"):
        DualActiveSet().solve(short)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "all"])
def test_wrong_number_of_threads_is_refused(threads: object) -> None:
    with pytest.raises(BackendError, match="threads must be"):
        DualActiveSet(threads=threads)  # type: ignore[arg-type]


def test_without_the_compiled_part_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_active_set, "MODULE", "declarative_cvx._no_such_part")
    assert not DualActiveSet.is_installed()
    with pytest.raises(MissingBackendError, match="C compiler"):
        DualActiveSet()
