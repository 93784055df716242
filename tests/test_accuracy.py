"""Default settings give the exact solution and gradient, and mark gradients that do not exist."""

from __future__ import annotations

import itertools

import pytest
from collection import FAST, GROUPS, PROBLEMS, Problem, measure
from problems import ALL_KINDS

from declarative_cvx import DeclarativeLayer

# What the library does not yet get right, and why.
KNOWN_FAULTS = {
    "vertex_where_three_edges_meet": "more active rows than variables, of parameters of their own",
    "two_equal_bounds_of_different_parameters": "two active rows that are alike",
    "regression_with_power_10_again": "with a multiplier of 1e-13 refinement stops early",
}


def _with_known_faults(problem: Problem) -> object:
    reason = KNOWN_FAULTS.get(problem.name)
    marks = [pytest.mark.xfail(reason=reason)] if reason else []
    return pytest.param(problem, id=problem.name, marks=marks)


@pytest.mark.parametrize("problem", [_with_known_faults(problem) for problem in FAST])
def test_exact_at_default_settings(problem: Problem) -> None:
    found = measure(problem)
    assert found.within(), (
        f"solution {found.solution_error:.1e}, gradient {found.gradient_error:.1e}"
    )
    assert found.marked, f"regular: {found.regular}, warned: {found.warned}"


def test_every_pair_of_cones_occurs() -> None:
    together = set()
    for problem in FAST:
        cone = DeclarativeLayer(*problem.build(), gp=problem.gp)._canonical.structure.cone
        kinds = sorted(kind for kind, size in cone.sizes.items() if size)
        together |= set(itertools.combinations(kinds, 2))
    assert together == set(itertools.combinations(sorted(ALL_KINDS), 2))


def test_the_collection_is_complete() -> None:
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS) >= 60
    assert {problem.group for problem in PROBLEMS} == set(GROUPS)
