"""A CVXPY problem as a batch of smooth nonlinear programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cvxpy as cp
import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.minimization.program import Function, NonlinearProgram, Parameters
from declarative_cvx.nonconvex.minimization.scalars.separated import Separable
from declarative_cvx.nonconvex.translation.constraint_rows import Answer, Duals, rows_of, violation
from declarative_cvx.nonconvex.translation.epigraphs import EPIGRAPHS
from declarative_cvx.nonconvex.translation.expression import (
    Values,
    translate_expression,
    translate_expressions,
)
from declarative_cvx.nonconvex.translation.layout import Layout
from declarative_cvx.nonconvex.translation.over_batch import over_batch
from declarative_cvx.nonconvex.translation.problem_parameters import parameters_in_order
from declarative_cvx.nonconvex.translation.rows import Row
from declarative_cvx.nonconvex.translation.smoothing import Smoother
from declarative_cvx.nonconvex.translation.starting_point import StartingPoint
from declarative_cvx.nonconvex.translation.variable_bounds import (
    Bound,
    Bounds,
    declared,
    implied,
    written,
)
from declarative_cvx.transforms import outside_transforms


@dataclass(frozen=True, eq=False)
class Multipliers:
    """Multipliers of a batch.

    The Lagrangian is f + y'h + z'g - z_l'(x - lower) - z_u'(upper - x) with z, z_l, z_u >= 0.

    Attributes
    ----------
    equality, inequality : Tensor, shapes (batch, k) and (batch, l)
        y and z.
    lower, upper : Tensor, shape (batch, n)
        z_l and z_u.
    """

    equality: Tensor
    inequality: Tensor
    lower: Tensor
    upper: Tensor


class NonlinearForm:
    """A problem's objective, constraints and bounds as functions of one vector.

    The vector x holds the free entries of the problem's variables and then those of auxiliary
    variables. What is maximised is minimised with the opposite sign.

    Parameters
    ----------
    problem : cvxpy.Problem
        Left as it is.
    parameters : sequence of cvxpy.Parameter, optional
        In the order in which values will be passed; by default those of the problem, then those
        that occur in bounds of its variables only.

    Attributes
    ----------
    parameters : tuple of cvxpy.Parameter
    variables : int
        Number n of entries of x.
    maximize : bool
    layout : Layout
        Where the variables stand in x.

    Raises
    ------
    SpecificationError
        If the problem is not one of smooth functions, naming what is not and where it stands.
    """

    def __init__(
        self, problem: cp.Problem, parameters: Sequence[cp.Parameter] | None = None
    ) -> None:
        unknowns = problem.variables()
        for leaf in (*unknowns, *problem.parameters()):
            _require_real_and_continuous(leaf)
        self.parameters = parameters_in_order(problem, parameters)
        self.maximize = isinstance(problem.objective, cp.Maximize)
        smoother = Smoother(problem.is_dcp(), EPIGRAPHS, rows_of)
        smoother.enter("the objective", problem.objective.is_dnlp())
        expression = smoother.smooth(problem.objective.expr)
        self._sources = [
            (constraint, _source(smoother, number, constraint))
            for number, constraint in enumerate(problem.constraints)
        ]
        for variable in unknowns:
            _constrain_definite(smoother, variable)
        self.layout = Layout([*unknowns, *(a.variable for a in smoother.auxiliaries)])
        self.variables = self.layout.size
        objective = translate_expression(-expression if self.maximize else expression)
        self._objective: Function = lambda x, p: objective(self._values(x, p)).reshape(())
        self._equality, self._equality_slices = self._stack(smoother.rows, equality=True)
        self._inequality, self._inequality_slices = self._stack(smoother.rows, equality=False)
        functions = (self._objective, self._equality, self._inequality)
        self._separable = Separable(
            [function for function in functions if function is not None],
            self.variables,
            [parameter.shape for parameter in self.parameters],
        )
        self._bounds = Bounds(self._all_bounds(smoother), self.layout)
        self._start = StartingPoint(
            self.layout, unknowns, smoother.restrictions, smoother.auxiliaries, self._values
        )
        self._violations = self._checks()
        self._constant_bounds: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._translated: dict[int, tuple[cp.Expression, Callable[[Values], Tensor]]] = {}

    def _stack(
        self, rows: Sequence[Row], equality: bool
    ) -> tuple[Function | None, dict[Row, slice]]:
        """The function of all equalities or inequalities, and which of its entries are whose."""
        rows = [row for row in rows if row.equality == equality and row.size]
        slices, end = {}, 0
        for row in rows:
            slices[row] = slice(end, end + row.size)
            end += row.size
        if not end:
            return None, slices
        compiled = translate_expressions([r.kept for r in rows], [r.where for r in rows])

        def function(x: Tensor, p: Parameters) -> Tensor:
            return torch.cat([value.reshape(-1) for value in compiled(self._values(x, p))])

        return function, slices

    def _all_bounds(self, smoother: Smoother) -> list[Bound]:
        bounds = [source for _, source in self._sources if isinstance(source, Bound)]
        for variable in self.layout.variables:
            bounds += declared(variable)
        for restriction in smoother.restrictions:
            bounds += implied(restriction)
        return bounds

    def _checks(self) -> Callable[[Values], tuple[Tensor, ...]] | None:
        """Violations of the constraints without variables."""
        constraints = [con for con, source in self._sources if source is None and con.size]
        if not constraints:
            return None
        return translate_expressions(
            [violation(con) for con in constraints], [f"`{con}`" for con in constraints]
        )

    def _values(self, x: Tensor, parameters: Parameters) -> dict[int, Tensor]:
        """Values of all leaves, of one element."""
        return {**self.layout.values(x), **self._named(parameters)}

    def _named(self, parameters: Parameters) -> dict[int, Tensor]:
        return {p.id: value for p, value in zip(self.parameters, parameters, strict=True)}

    def program(
        self, values: Sequence[Tensor], batched: Sequence[bool], batch: int, device: torch.device
    ) -> NonlinearProgram:
        """The programs of a batch of parameter values.

        Parameters
        ----------
        values : sequence of Tensor
            One per parameter, of its shape, with the batch as the first dimension if batched.
        batched : sequence of bool
        batch : int
        device : torch.device

        Returns
        -------
        NonlinearProgram
            In float64; differentiable with respect to the values, bounds included.
        """
        parameters = tuple(
            (value if is_batched else value[None]).to(device, torch.float64)
            for value, is_batched in zip(values, batched, strict=True)
        )
        lower, upper = self._evaluate_bounds(parameters, batch, device)
        return NonlinearProgram(
            variables=self.variables,
            objective=self._objective,
            equality=self._equality,
            inequality=self._inequality,
            lower=lower,
            upper=upper,
            parameters=parameters,
            batch=batch,
            separable=self._separable,
        )

    def _evaluate_bounds(
        self, parameters: Parameters, batch: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds, each (batch or 1, n)."""
        if self._bounds.parametric:
            return over_batch(
                lambda *p: self._bounds.of_one(self._named(p), device), parameters, batch
            )
        if device not in self._constant_bounds:
            with outside_transforms():
                lower, upper = self._bounds.of_one({}, device)
            self._constant_bounds[device] = lower[None], upper[None]
        return self._constant_bounds[device]

    def violation(self, program: NonlinearProgram) -> Tensor:
        """How far parameters alone make a program infeasible, shape (batch,).

        The largest violation of constraints without variables and of lower <= upper; infinite
        where it is not a number.
        """
        gaps = program.crossing
        if self._violations is None:
            return gaps
        found = over_batch(self._largest_violation, program.parameters, program.batch)
        return torch.maximum(gaps, torch.nan_to_num(found.to(gaps), nan=math.inf))

    def _largest_violation(self, *parameters: Tensor) -> Tensor:
        assert self._violations is not None
        return torch.stack(self._violations(self._named(parameters))).amax().clamp(min=0)

    def start(
        self,
        program: NonlinearProgram,
        given: Mapping[int, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A point to start from, shape (batch, n).

        Parameters
        ----------
        program : NonlinearProgram
        given : mapping of int to Tensor, optional
            Values, (batch or 1, *shape), of variables by their ids.
        generator : torch.Generator, optional
            On the CPU. Draw at random, for each element, the variables that have sample bounds,
            and those without a value whose bounds are finite.

        Returns
        -------
        Tensor
            Variables at the values given, else at `Variable.value`, else in the middle of their
            bounds, at distance 1 from a single bound, at 0 without any (definite variables at the
            unit matrix), moved into bounds and domains; auxiliary variables where they belong.
            Where a function or its derivative is not finite there, variables without a value are
            moved by different amounts between 0.5 and 1.
        """
        with torch.no_grad():
            return self._start.of(program, given or {}, generator)

    def at(self, program: NonlinearProgram, given: Mapping[int, Tensor]) -> Tensor:
        """The points, (batch, n), where the problem's variables have given values.

        `given` holds them, (batch or 1, *shape), by their ids. They are moved into bounds;
        auxiliary variables are exactly where they belong or, where a function or its derivative
        is not finite there, where `start` has them.
        """
        with torch.no_grad():
            return self._start.at(program, given)

    def recover(self, variable: cp.Variable, x: Tensor) -> Tensor:
        """The values of a variable, (batch, *shape), at points x, (batch, n)."""
        return self.layout.recover(variable, x)

    def value(self, program: NonlinearProgram, x: Tensor) -> Tensor:
        """The problem's objective, with its own sign, at points x: shape (batch,)."""
        found = over_batch(
            lambda x, *p: self._objective(x, p), (x, *program.parameters), program.batch
        )
        return -found if self.maximize else found

    def duals(
        self, program: NonlinearProgram, x: Tensor, multipliers: Multipliers
    ) -> dict[int, Tensor]:
        """The dual variables of all constraints by their ids, (batch, *shape), with CVXPY's signs.

        Those of a constraint without variables are zero.
        """

        def multiplier(row: Row) -> Tensor:
            if row.equality:
                return row.spread(multipliers.equality[:, self._equality_slices[row]])
            return row.spread(multipliers.inequality[:, self._inequality_slices[row]])

        def value(expression: cp.Expression) -> Tensor:
            function = self._translate(expression)
            return over_batch(
                lambda x, *p: function(self._values(x, p)), (x, *program.parameters), len(x)
            )

        by_bound = self._bound_duals(program, multipliers)
        found = {}
        for constraint, source in self._sources:
            if source is None:
                values = [x.new_zeros(len(x), v.size) for v in constraint.dual_variables]
            elif isinstance(source, Bound):
                values = [by_bound[source]]
            else:
                values = list(source(Answer(multiplier, value)))
            for variable, dual in zip(constraint.dual_variables, values, strict=True):
                found[variable.id] = dual.reshape(len(x), *variable.shape)
        return found

    def _bound_duals(
        self, program: NonlinearProgram, multipliers: Multipliers
    ) -> dict[Bound, Tensor]:
        lower, upper = _bounds_of(program)
        shares = over_batch(
            lambda lower, upper, *p: self._bounds.shares_of_one(self._named(p), lower, upper),
            (lower, upper, *program.parameters),
            program.batch,
        )
        return {
            bound: self._bounds.at(bound, multipliers.upper if bound.upper else multipliers.lower)
            * share
            for bound, share in zip(self._bounds.all, shares, strict=True)
        }

    def _translate(self, expression: cp.Expression) -> Callable[[Values], Tensor]:
        if id(expression) not in self._translated:
            self._translated[id(expression)] = expression, translate_expression(expression)
        return self._translated[id(expression)][1]


def _bounds_of(program: NonlinearProgram) -> tuple[Tensor, Tensor]:
    assert program.lower is not None
    assert program.upper is not None
    return program.lower, program.upper


def _require_real_and_continuous(leaf: cp.Variable | cp.Parameter) -> None:
    for name in ("boolean", "integer"):
        if leaf.attributes[name] and isinstance(leaf, cp.Variable):
            raise SpecificationError(
                f"`{leaf.name()}` is declared {name}: solutions do not depend smoothly on "
                "parameters then. Relax it."
            )
    if leaf.is_complex():
        raise SpecificationError(
            f"`{leaf.name()}` is complex. Write real and imaginary part as two real leaves."
        )


def _source(smoother: Smoother, number: int, constraint: cp.Constraint) -> Duals | Bound | None:
    """What a constraint became: rows with multipliers, a bound, or nothing without variables."""
    if not constraint.variables() or not constraint.size:
        return None
    bound = written(constraint)
    if bound is not None:
        return bound
    smoother.enter(f"constraint {number}, `{constraint}`,", _admits_kinks(constraint))
    return rows_of(smoother, constraint)


def _admits_kinks(constraint: cp.Constraint) -> bool:
    """Whether kinked functions in a constraint may be replaced by variables above or below them."""
    if isinstance(constraint, cp.SOC):
        t, x = constraint.args
        return bool(t.is_linearizable_concave() and x.is_smooth())
    if hasattr(constraint, "is_dnlp"):
        return bool(constraint.is_dnlp())
    return all(argument.is_smooth() for argument in constraint.args)


def _constrain_definite(smoother: Smoother, variable: cp.Variable) -> None:
    smoother.enter(f"variable `{variable.name()}`", exact=False)
    if variable.attributes["PSD"]:
        smoother.constrain(variable >> 0)
    if variable.attributes["NSD"]:
        smoother.constrain(variable << 0)
