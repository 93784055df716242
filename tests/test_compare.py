"""Comparing solvers: are the rows true, and do failures stay in their rows?"""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch

import declarative_cvx as dcx
from declarative_cvx.backends import Backend
from declarative_cvx.comparison import Comparison, Row, Sweep, compare
from declarative_cvx.comparison.candidate import Candidate
from declarative_cvx.comparison.measure import Work, measure, reference_of
from declarative_cvx.comparison.row import Timing
from declarative_cvx.errors import BackendError, ParameterError, SpecificationError

QUIET = {"progress": False, "repeats": 1, "time_limit": None}


def projection() -> tuple[cp.Problem, list[cp.Parameter], cp.Variable]:
    """Projection onto the nonnegative orthant, whose solution and gradient are known."""
    x, b = cp.Variable(3, name="x"), cp.Parameter(3, name="b")
    return cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0]), [b], x


POINTS = np.array([[1.0, -1.0, 2.0], [0.5, 3.0, -0.25]])


class Reckless(dcx.SCS):
    """A solver that takes its process with it."""

    def solve(self, program, start=None):
        os.kill(os.getpid(), signal.SIGKILL)


class Broken(dcx.SCS):
    def obstacle(self, structure):
        raise RuntimeError("no licence")


def test_every_installed_solver_with_every_derivative_has_a_row() -> None:
    problem, parameters, _ = projection()
    found = compare(problem, parameters, [POINTS], **QUIET)
    assert isinstance(found, Comparison)
    pairs = {(row.candidate.name, row.derivative) for row in found.rows}
    for name in ("auto", *dcx.backends.installed()):
        assert {(name, "implicit"), (name, "diffcp")} <= pairs
    for row in found.rows:
        if not row.failure and row.candidate.label_without("refine") == row.solver:
            assert row.is_right(1e-8), (row.solver, row.derivative, row.error)
            assert row.status == {"OPTIMAL": 2}
            assert row.forward.median > 0
            assert row.backward.median > 0


def test_errors_are_those_of_the_closed_form() -> None:
    """What a loose solver's row says is what one finds by hand."""
    problem, parameters, x = projection()
    loose = dcx.Clarabel(tol=1e-3, refine=False)
    layer = dcx.DeclarativeLayer(problem, parameters, [x], solver=loose, on_failure="nan")
    solution = layer.solve(torch.tensor(POINTS))
    right = np.maximum(POINTS, 0)
    size = right.max(1, keepdims=True)
    both = solution.solved.numpy()
    error = (np.abs(solution.variables[0].numpy() - right) / size)[both].max()
    found = compare(problem, parameters, [POINTS], solvers=[loose], derivatives=["implicit"],
                    reference=[right], **QUIET)  # fmt: skip
    (row,) = found.rows
    assert row.solution_error == pytest.approx(error, rel=1e-6)
    assert row.solution_error > 1e-9
    assert "given" in found.reference


def test_objective_and_gradient_reference() -> None:
    problem, parameters, _ = projection()
    (row,) = compare(problem, parameters, [POINTS], solvers=["clarabel"], derivatives=["implicit"],
                     **QUIET).rows  # fmt: skip
    assert row.objective == pytest.approx(np.mean([1.0, 0.0625]), rel=1e-9)
    assert row.gradient_error <= 1e-12


def test_infeasible_elements_are_part_of_being_right() -> None:
    x, b = cp.Variable(name="x"), cp.Parameter(name="b")
    problem = cp.Problem(cp.Minimize(x), [x >= 1, x <= b])
    found = compare(problem, [b], [[2.0, 0.0]], solvers=["clarabel"], derivatives=["implicit"],
                    **QUIET)  # fmt: skip
    (row,) = found.rows
    assert row.status == {"OPTIMAL": 1, "INFEASIBLE": 1}
    assert row.agrees
    assert row.is_right(1e-8)
    given = compare(problem, [b], [[2.0, 0.0]], solvers=["clarabel"], derivatives=["implicit"],
                    reference=[[1.0, np.nan]], **QUIET)  # fmt: skip
    assert given.rows[0].is_right(1e-8)


def test_a_reference_that_is_given_says_what_can_be_solved() -> None:
    """Where the library's own answer would be missing, a right one is not held against a solver."""
    problem, parameters, _ = projection()
    right = np.maximum(POINTS, 0)
    chosen = {"solvers": ["clarabel"], "derivatives": ["implicit"], **QUIET}
    (row,) = compare(problem, parameters, [POINTS], reference=[right], **chosen).rows
    assert row.is_right(1e-8)
    (row,) = compare(problem, parameters, [POINTS], reference=[right + 0.1], **chosen).rows
    assert not row.is_right(1e-2)
    assert row.solution_error == pytest.approx(0.1 / 2.1, rel=1e-6)


def test_what_the_reference_could_not_settle_is_no_measure() -> None:
    problem, parameters, x = projection()
    work = Work(problem, parameters, [x], [torch.tensor(POINTS)], [1], {})
    found = reference_of(work)
    unsettled = replace(found, codes=torch.tensor([int(dcx.Status.INACCURATE), 0]))
    row = measure(work, Candidate(dcx.Clarabel(), "implicit"), unsettled, 1, None)
    assert row.agrees
    wrong = replace(found, codes=torch.tensor([int(dcx.Status.INFEASIBLE), 0]))
    assert not measure(work, Candidate(dcx.Clarabel(), "implicit"), wrong, 1, None).agrees


def test_a_table_says_where_no_gradient_was_compared() -> None:
    """At b = 0 the constraint is active with a zero multiplier."""
    problem, parameters, _ = projection()
    found = compare(problem, parameters, [np.zeros((1, 3))], solvers=["clarabel"],
                    derivatives=["implicit"], **QUIET)  # fmt: skip
    assert "no gradient to compare" in found.to_markdown()


def test_a_solver_that_cannot_take_the_problem_is_a_row_that_says_why() -> None:
    x, b = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.norm(x - b)), [x >= 0])
    found = compare(problem, [b], [POINTS], solvers=["osqp", Broken(), "clarabel"],
                    derivatives=["implicit"], **QUIET)  # fmt: skip
    by_name = {row.candidate.name: row for row in found.rows if row.candidate.name != "SCS"}
    assert "no soc cone" in by_name["OSQP"].failure
    assert not by_name["Clarabel"].failure
    assert any("no licence" in row.failure for row in found.rows)
    assert [bool(row.failure) for row in found.rows] == [False, True, True]


def test_a_process_that_dies_or_is_too_slow_costs_its_own_row_only() -> None:
    problem, parameters, _ = projection()
    found = compare(problem, parameters, [POINTS], solvers=[Reckless(), "clarabel"],
                    derivatives=["implicit"], progress=False, repeats=1)  # fmt: skip
    good, dead = found.rows
    assert good.is_right(1e-8)
    assert "signal 9" in dead.failure


@pytest.mark.parametrize("solver", [cp.OSQP, cp.CLARABEL, cp.SCS])
def test_a_problem_that_cvxpy_has_solved_before(solver: str) -> None:
    problem, parameters, _ = projection()
    parameters[0].value = POINTS[0]
    problem.solve(solver=solver)
    found = compare(problem, parameters, [POINTS], solvers=["clarabel"], derivatives=["implicit"],
                    progress=False, repeats=1)  # fmt: skip
    assert found.rows[0].is_right(1e-8)


def test_best_is_the_fastest_row_that_is_right() -> None:
    def row(solver: Backend | str, seconds: float, error: float, derivative: str) -> Row:
        timing = Timing.of([seconds])
        return Row(
            Candidate(solver, derivative), agrees=True, forward=timing, backward=timing,
            solution_error=error, gradient_error=error,
        )  # fmt: skip

    rows = (
        row(dcx.SCS(), 1.0, 1e-3, "implicit"),
        row(dcx.Clarabel(), 2.0, 1e-9, "diffcp"),
        row(dcx.OSQP(), 3.0, 1e-9, "implicit"),
        row(dcx.ECOS(), 4.0, 1e-12, "implicit"),
    )
    found = Comparison(rows, 1, "", "")
    assert found.best(1e-2) == dcx.SCS()
    assert found.best() == dcx.OSQP()
    assert found.best(1e-10) == dcx.ECOS()
    assert found.best_row().candidate.name == "Clarabel"
    with pytest.raises(BackendError, match=r"ECOS comes closest, with an error of 1.0e-12"):
        found.best(1e-14)
    wrong = Comparison((replace(rows[0], agrees=False),), 1, "", "")
    with pytest.raises(BackendError, match="none has numbers"):
        wrong.best()


def test_a_layer_takes_the_best_solver() -> None:
    problem, parameters, x = projection()
    found = compare(problem, parameters, [POINTS], solvers=["scs", "clarabel"], **QUIET)
    layer = dcx.DeclarativeLayer(problem, parameters, [x], solver=found.best())
    torch.testing.assert_close(layer(torch.tensor(POINTS))[0], torch.tensor(POINTS).clamp(min=0))


def test_minimisers_are_compared_on_problems_that_are_not_convex() -> None:
    x, b = cp.Variable(2, name="x"), cp.Parameter(2, name="b")
    x.value = np.array([1.0, 0.5])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [cp.sum_squares(x) == 1])
    found = compare(problem, [b], [[[2.0, 0.0], [3.0, 4.0]]],
                    solvers=["InteriorPoint", "TrustRegion"], **QUIET)  # fmt: skip
    point, region = found.rows
    assert point.candidate.name == "InteriorPoint"
    assert point.is_right(1e-8)
    assert "constraints" in region.failure
    with pytest.raises(BackendError, match="solves cone programs"):
        compare(problem, [b], [[2.0, 0.0]], solvers=["clarabel"], **QUIET)


def squared_distance(x, b):
    return (x - b).square().sum()


def circle(x, b):
    return x.square().sum() - 1


def test_problems_written_in_torch_are_compared() -> None:
    problem = dcx.TorchProblem(
        squared_distance, circle, shape=2, parameters={"b": 2}, start=lambda b: b
    )
    points = torch.tensor([[2.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    right = points / points.norm(dim=1, keepdim=True)
    found = compare(problem, values=[points], reference=[right], **QUIET)
    best = found.best_row(1e-8)
    assert best.candidate.name in ("auto", "InteriorPoint")
    assert {"TrustRegion", "LBFGS"} == {row.candidate.name for row in found.rows if row.failure}


def test_renderings_say_the_same() -> None:
    problem, parameters, _ = projection()
    found = compare(problem, parameters, [POINTS], solvers=["clarabel", "scs"], **QUIET)
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.to_dict()))
    assert [row["solver"] for row in data["rows"]] == [row.solver for row in found.rows]
    markdown = found.to_markdown().splitlines()
    assert len(markdown) == 2 + len(found.rows)
    assert len({line.count("|") for line in markdown}) == 1
    for text in (str(found), found._repr_html_(), found.to_markdown()):
        assert text.count("Clarabel") == 2
    assert str(found).count("2/2") == 4
    assert found.to_markdown().count("2 OPTIMAL") == 4
    low, high = 1e3 * found.rows[0].forward.low, 1e3 * found.rows[0].forward.high
    assert f"({low:.1f}-{high:.1f})" in found.to_markdown()


def test_pictures(tmp_path) -> None:
    problem, parameters, _ = projection()
    chosen = {"solvers": [dcx.Clarabel(), dcx.SCS()], "derivatives": ["implicit"], **QUIET}
    found = compare(problem, parameters, [POINTS], **chosen)
    assert found.plot(tmp_path / "errors.png").stat().st_size > 5_000
    sweep = compare(problem, parameters, [POINTS], sweep={"tol": [1e-3, 1e-8]}, **chosen)
    assert sweep.plot(tmp_path / "curves.svg").stat().st_size > 5_000


def test_sweeps() -> None:
    problem, parameters, _ = projection()
    chosen = {"solvers": ["clarabel"], "derivatives": ["implicit"], **QUIET}
    batches = compare(problem, parameters, [POINTS], sweep={"batch": [1, 5]}, **chosen)
    assert isinstance(batches, Sweep)
    assert [comparison.batch for comparison in batches.comparisons] == [1, 5]
    ((label, points),) = batches.curves().items()
    assert label == "Clarabel, implicit"
    assert [value for value, _, _ in points] == [1, 5]

    loose = compare(problem, parameters, [POINTS], sweep={"tol": [1e-1, 1e-9]},
                    **{**chosen, "solvers": [dcx.SCS(refine=False)]})  # fmt: skip
    errors = [found.rows[0].solution_error for found in loose.comparisons]
    assert errors[1] < 1e-6 < errors[0]

    def build(n: int) -> tuple:
        x, b = cp.Variable(n), cp.Parameter(n)
        return cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0]), [b], [np.ones((2, n))]

    sizes = compare(build, sweep={"size": [2, 4]}, **chosen)
    assert all(found.rows[0].is_right(1e-8) for found in sizes.comparisons)
    assert json.loads(sizes.to_json())["values"] == [2, 4]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"solvers": ["clarabell"]}, BackendError, "Did you mean 'Clarabel'"),
        ({"derivatives": ["implict"]}, BackendError, "Did you mean 'implicit'"),
        ({"repeats": 0}, SpecificationError, "at least 1"),
        ({"time_limit": -1.0}, SpecificationError, "positive"),
        ({"sweep": {"bach": [1]}}, SpecificationError, "Did you mean 'batch'"),
        ({"sweep": {"batch": [0]}}, SpecificationError, r"sweep\['batch'\]\[0\] is 0"),
        ({"sweep": {"batch": [1], "tol": [1]}}, SpecificationError, "one thing"),
        ({"sweep": {"size": [1]}}, SpecificationError, "callable"),
        ({"values": ["a"]}, ParameterError, r"values\[0\]"),
        ({"values": [np.ones((2, 4))]}, ParameterError, "b"),
        ({"values": None}, SpecificationError, "values"),
        ({"reference": [np.ones((2, 4))]}, ParameterError, r"reference\[0\]"),
        ({"nonconvx": True}, TypeError, "nonconvx"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(change, error, words) -> None:
    problem, parameters, _ = projection()
    options = {"values": [POINTS], **QUIET, **change}
    with pytest.raises(error, match=words):
        compare(problem, parameters, **options)


def test_nothing_of_the_callers_is_changed() -> None:
    problem, parameters, x = projection()
    parameters[0].value, x.value = np.ones(3), np.full(3, 7.0)
    values = torch.tensor(POINTS, requires_grad=True)
    compare(problem, parameters, [values], solvers=["clarabel"], **QUIET)
    assert values.grad is None
    np.testing.assert_array_equal(parameters[0].value, np.ones(3))
    np.testing.assert_array_equal(x.value, np.full(3, 7.0))
    assert math.isnan(Row(Candidate("auto", "implicit")).seconds)


@pytest.mark.parametrize("count", [0, 2])
def test_a_reference_for_other_variables_is_refused(count: int) -> None:
    x, p = cp.Variable(2), cp.Parameter(2)
    problem, value = cp.Problem(cp.Minimize(cp.sum_squares(x - p))), torch.ones(1, 2)
    with pytest.raises(ParameterError, match="one for each of the 1 variables"):
        compare(
            problem, [p], [value], solvers=["clarabel"], reference=[value] * count, progress=False
        )
