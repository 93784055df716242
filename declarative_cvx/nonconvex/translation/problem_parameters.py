"""The parameters of a problem, also where CVXPY does not look for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cvxpy as cp
from cvxpy.atoms.perspective import perspective

from declarative_cvx.errors import SpecificationError


def parameters_in_order(
    problem: cp.Problem, parameters: Sequence[cp.Parameter] | None
) -> tuple[cp.Parameter, ...]:
    """The parameters as given, or those of the problem and then those of bounds only."""
    bounds = [end for variable in problem.variables() for end in variable.bounds or ()]
    expressions = [end for end in bounds if isinstance(end, cp.Expression)]
    inner = [atom.f for atom in _perspectives([problem.objective, *problem.constraints])]
    needed = {p.id: p for e in (problem, *expressions, *inner) for p in e.parameters()}
    if parameters is None:
        return tuple(needed.values())
    missing = set(needed) - {p.id for p in parameters}
    if missing:
        names = ", ".join(f"`{needed[key].name()}`" for key in missing)
        raise SpecificationError(f"the problem has parameters that are not listed: {names}.")
    return tuple(parameters)


def _perspectives(trees: Sequence[Any]) -> Iterator[perspective]:
    """Perspectives of functions, of whose parameters CVXPY does not know."""
    for tree in trees:
        if isinstance(tree, perspective):
            yield tree
        yield from _perspectives(tree.args)
