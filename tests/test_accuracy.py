"""Default settings give the exact solution and gradient, and mark gradients that do not exist."""

from __future__ import annotations

import itertools

import pytest
from collection import FAST, GROUPS, PROBLEMS, Problem, measure
from problems import ALL_KINDS

from declarative_cvx.canonical import canonicalize


@pytest.mark.parametrize("problem", FAST, ids=lambda problem: problem.name)
def test_exact_at_default_settings(problem: Problem) -> None:
    found = measure(problem)
    assert found.within(), (
        f"solution {found.solution_error:.1e}, gradient {found.gradient_error:.1e}"
    )
    assert found.marked, f"regular: {found.regular}, warned: {found.warned}"


def test_every_pair_of_cones_occurs() -> None:
    together = set()
    for problem in FAST:
        built, parameters, _ = problem.build()
        cone = canonicalize(built, parameters, problem.gp, None).structure.cone
        kinds = sorted(kind for kind, size in cone.sizes.items() if size)
        together |= set(itertools.combinations(kinds, 2))
    assert together == set(itertools.combinations(sorted(ALL_KINDS), 2))


def test_the_collection_is_complete() -> None:
    assert len({problem.name for problem in PROBLEMS}) == len(PROBLEMS) >= 60
    assert {problem.group for problem in PROBLEMS} == set(GROUPS)
