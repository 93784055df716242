"""The comparison of solvers shows wrong defaults for what they are, and names one that is right."""

from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
import torch

from declarative_cvx import DIFFCP, SCS
from declarative_cvx.cli.loading import built, load

EXAMPLE = "compare_solvers"
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "compare_solvers.py"


@pytest.fixture(scope="module")
def report(example, picture, one_thread):
    return example.run(picture, repeats=1)


def test_right_weights_satisfy_the_conditions_for_an_optimum(example, report):
    problem, _, (values,) = example.portfolio()
    (w,) = problem.variables()
    assert np.abs(report.right.sum(1) - 1).max() < 1e-12
    assert report.right.min() > -1e-12
    for day, weights in zip(values, report.right, strict=True):
        problem.parameters()[0].value, w.value = day, weights
        (slope,) = _slopes(problem, w)
        held = weights > 1e-6
        assert np.ptp(slope[held]) < 1e-12  # of one size for all that is held,
        assert (slope[~held] < slope[held].max() + 1e-12).all()  # and no larger elsewhere


def _slopes(problem, w):
    grad = problem.objective.expr.grad[w]
    return (np.asarray(grad.todense()).ravel(),)


def test_cvxpy_calls_every_answer_optimal(report):
    assert all(set(plain.statuses) == {cp.OPTIMAL} for plain in report.plain.values())


def test_popular_defaults_are_visibly_wrong(report):
    worst = {name: found.misplaced(report.right).max() for name, found in report.plain.items()}
    assert worst["SCS 1e-4, its own"] > 0.3
    assert worst["OSQP 1e-3, its own"] > 3e-3
    assert worst["Clarabel 1e-8"] > 3e-4
    assert all(0 <= share <= 1 for share in worst.values())


def test_answers_as_they_come_are_not_taken_for_right(example, report):
    loose = example.row_of(report.comparison, SCS(tol=1e-4, refine=False))
    assert loose.status == {"INACCURATE": example.DAYS}
    as_they_come = [
        row for row in report.comparison.rows if not getattr(row.candidate.solver, "refine", True)
    ]
    assert len(as_they_come) == len(example.settings())
    assert not any(row.is_right(1e-6) for row in as_they_come)


def test_refined_answers_are_right_and_their_gradients_too(example, report):
    for setting in example.settings():
        row = example.row_of(report.comparison, setting.backend)
        assert not row.failure
        assert row.status == {"OPTIMAL": example.DAYS}
        assert row.solution_error < 1e-10
        if not isinstance(setting.backend, DIFFCP):
            assert row.gradient_error < 1e-8


def test_an_inaccurate_gradient_is_reported(example, report):
    row = example.row_of(report.comparison, DIFFCP(tol=1e-8))
    assert row.gradient_error > 1e-4
    assert row.irregular == example.DAYS


def test_the_best_is_right(report):
    best = report.comparison.best_row()
    assert best.error < 1e-6
    assert report.comparison.best() == best.candidate.solver


def test_the_command_line_of_the_library_takes_the_file():
    problem, parameters, values, variables = built(load(f"{SCRIPT}:portfolio"))
    assert problem.is_dpp()
    assert parameters == problem.parameters()
    assert values[0].shape[1:] == parameters[0].shape
    assert variables is None


def test_picture_is_readable(report, picture):
    from matplotlib import image

    height, width, _ = image.imread(picture).shape
    assert height > 500
    assert width > 1000


def test_command_line_passes_its_options_on(example, monkeypatch):
    seen = []
    monkeypatch.setattr(example, "run", lambda *given: seen.append(given))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    example.main(["--output", "a.png", "--repeats", "7"])
    assert seen == [(Path("a.png"), 7)]
