"""Solvers of CVXPY problems, asked about one element after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from cvxpy.atoms.affine.binary_operators import DivExpression
from torch import Tensor

from declarative_cvx.errors import BackendError
from declarative_cvx.nonconvex.cvxpy_form import CvxpyForm
from declarative_cvx.nonconvex.form import Form
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.proposer import Proposal, Proposer
from declarative_cvx.status import Status


@dataclass(frozen=True, eq=False)
class Found:
    """What a solver knows of one element: values by the variables' ids, status, its words."""

    values: Mapping[int, np.ndarray]
    status: Status
    said: str


class ProblemSolver(Proposer):
    """A solver of CVXPY problems without parameters."""

    @abstractmethod
    def solve_one(self, problem: cp.Problem) -> Found:
        """Solve a problem that is the solver's own to change; see `at_values`."""

    def obstacle(self, form: Form) -> str | None:
        if not isinstance(form, CvxpyForm):
            return f"{self.name} solves problems written in CVXPY only"
        return None

    def propose(self, form: Form, program: NonlinearProgram, start: Tensor) -> Proposal:
        assert isinstance(form, CvxpyForm)
        starts = [value.cpu().numpy() for value in form.disassemble(start)]
        given = [value.detach().cpu().numpy() for value in form.given(program)]
        found = []
        for i in range(program.batch):
            values = {
                parameter.id: value[i if len(value) > 1 else 0]
                for parameter, value in zip(form.parameters, given, strict=True)
            }
            found.append(self._solve_one(form.problem, values, [value[i] for value in starts]))
        columns = [
            [one.values.get(variable.id, np.full(variable.shape, np.nan)) for one in found]
            for variable in form.problem.variables()
        ]
        return Proposal(
            [torch.as_tensor(np.array(column, dtype=float)) for column in columns],
            torch.tensor([int(one.status) for one in found]),
            tuple(one.said for one in found),
        )

    def _solve_one(
        self, problem: cp.Problem, values: Mapping[int, np.ndarray], start: list[np.ndarray]
    ) -> Found:
        try:
            own = at_values(problem, values)
            by_id = {variable.id: variable for variable in own.variables()}
            for variable, value in zip(problem.variables(), start, strict=True):
                if self.takes_start and variable.id in by_id:
                    by_id[variable.id].value = by_id[variable.id].project(value)
            found = self.solve_one(own)
        except BackendError:  # whoever chose the solver has to know
            raise
        except Exception as error:  # whatever a solver raises must not cost the others
            return Found({}, Status.NUMERICAL_ERROR, f"{type(error).__name__}: {error}")
        free = {v.id: s for v, s in zip(problem.variables(), start, strict=True)}
        # Variables that parameters' values have removed are free to stay where they are.
        left = {key: value for key, value in free.items() if key not in by_id}
        return Found({**found.values, **left}, found.status, found.said) if found.values else found


def at_values(problem: cp.Problem, values: Mapping[int, np.ndarray]) -> cp.Problem:
    """A problem with numbers for its parameters.

    Parameters
    ----------
    problem : cvxpy.Problem
        Left as it is: the new one has variables of its own, with the same ids.
    values : mapping of int to ndarray
        By the parameters' ids.

    Returns
    -------
    cvxpy.Problem
        Without constraints on parameters only. Constraints that are objects of a set (`NonNeg`,
        `NonPos`, `Zero`), which CVXPY's nonlinear path loses, are written as relations, and
        divisions by numbers, which it takes to be nonnegative, as products.
    """
    parameters = {p.id: p for p in problem.parameters()}
    bounds = [end for variable in problem.variables() for end in variable.bounds or ()]
    for end in bounds:
        if isinstance(end, cp.Expression):
            parameters |= {p.id: p for p in end.parameters()}
    leaves: dict[int, cp.Expression] = {
        id(p): cp.Constant(values[key]) for key, p in parameters.items()
    }
    leaves |= {id(v): _twin(v, leaves) for v in problem.variables()}
    objective = type(problem.objective)(_substituted(problem.objective.expr, leaves))
    constraints = [_relation(c, leaves) for c in problem.constraints if c.variables() and c.size]
    return cp.Problem(objective, constraints)


def _substituted(node: Any, leaves: Mapping[int, cp.Expression]) -> Any:
    """A copy of a tree with other leaves, also where an atom keeps a parameter beside its args."""
    if id(node) in leaves or not node.args:
        return leaves.get(id(node), node)
    args, data = [_substituted(arg, leaves) for arg in node.args], node.get_data() or []
    if isinstance(node, DivExpression) and args[1].is_constant():
        return cp.multiply(1 / args[1].value, args[0])
    if not any(isinstance(item, cp.Expression) and item.parameters() for item in data):
        return node.copy(args)
    kept = (
        _substituted(item, leaves) if isinstance(item, cp.Expression) else item for item in data
    )
    return type(node)(*args, *kept)


def _twin(variable: cp.Variable, leaves: Mapping[int, cp.Expression]) -> cp.Variable:
    """A variable with the same id and attributes, and numbers for its bounds."""
    attributes = dict(variable.attributes)
    if variable.bounds is not None:
        attributes["bounds"] = [
            _substituted(end, leaves).value if isinstance(end, cp.Expression) else end
            for end in variable.bounds
        ]
    return cp.Variable(variable.shape, variable.name(), variable.id, **attributes)


def _relation(constraint: cp.Constraint, leaves: Mapping[int, cp.Expression]) -> cp.Constraint:
    new = _substituted(constraint, leaves)
    if isinstance(new, cp.constraints.NonNeg):
        return new.args[0] >= 0
    if isinstance(new, cp.constraints.NonPos):
        return new.args[0] <= 0
    if isinstance(new, cp.constraints.Zero):
        return new.args[0] == 0
    return new
