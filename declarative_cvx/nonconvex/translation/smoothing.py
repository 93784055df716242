"""From a disciplined nonlinear program to smooth functions of variables with bounds.

A kinked convex function becomes a variable above it (a concave one, below it), which is exact
where CVXPY's rules for nonlinear programs allow the function. The argument of a function with a
limited domain becomes a variable with bounds, so that a method that keeps within bounds keeps
within the domain; a variable that is such an argument itself is given the bounds.

CVXPY's own reduction is not used: it fixes the values that parameters have when it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from cvxpy.atoms.dotsort import dotsort
from cvxpy.atoms.perspective import perspective
from cvxpy.atoms.pnorm import Pnorm
from cvxpy.reductions.dcp2cone.canonicalizers import CANON_METHODS
from torch import Tensor

from declarative_cvx.atoms import PenaltyAtom
from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.translation.atoms_affine import SELECTIONS
from declarative_cvx.nonconvex.translation.domains import DEFINITE, NONZERO, Domain, domains
from declarative_cvx.nonconvex.translation.expression import RULES, translate_expression
from declarative_cvx.nonconvex.translation.rows import Row


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """A variable that stands for an expression.

    Attributes
    ----------
    variable : cvxpy.Variable
    start : cvxpy.Expression
        What it starts from, in variables that come before it.
    repair : callable
        Moves that value, of one element, to where it can be used as a start.
    exact : callable
        Makes it the variable's value, of one element, without moving it.
    """

    variable: cp.Variable
    start: cp.Expression
    repair: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor] = torch.nan_to_num


@dataclass(frozen=True, eq=False)
class Restriction:
    """Entries of a variable, in C order, that must lie in a domain."""

    variable: cp.Variable
    entries: np.ndarray
    domain: Domain


class Smoother:
    """Replaces what is not smooth, and writes down the rows and variables that this takes.

    Attributes
    ----------
    auxiliaries : list of Auxiliary
    restrictions : list of Restriction
    rows : list of Row
    convex : bool
        Whether odd powers are those of CVXPY's convex rules: of nonnegative arguments only.
    where : str
        What is being worked on, for error messages.
    exact : bool
        Whether a kinked function may be replaced there.
    """

    def __init__(
        self, convex: bool, epigraphs: Mapping[type, Epigraph], constrain: Constrain
    ) -> None:
        self.auxiliaries: list[Auxiliary] = []
        self.restrictions: list[Restriction] = []
        self.rows: list[Row] = []
        self.convex = convex
        self.where, self.exact = "the objective", True
        self._epigraphs = epigraphs
        self._constrain = constrain
        self._lowered: dict[int, cp.Expression] = {}
        self._lifted: dict[tuple[int, Domain], cp.Expression] = {}
        self._alive: list[cp.Expression] = []

    def enter(self, where: str, exact: bool) -> None:
        """Turn to another place of the problem."""
        self.where, self.exact = where, exact

    def smooth(self, expression: cp.Expression) -> cp.Expression:
        """A smooth expression that may stand where this one stands."""
        key = id(expression)
        if key not in self._lowered:
            self._alive.append(expression)
            self._lowered[key] = self._smooth(expression)
        return self._lowered[key]

    def _smooth(self, expression: cp.Expression) -> cp.Expression:
        if not expression.args or expression.is_constant():
            return expression
        if not all(isinstance(argument, cp.Expression) for argument in expression.args):
            raise SpecificationError(
                f"{self.where} contains `{expression}`, which is a problem of its own or has "
                "constraints. Write its objective and constraints into this one."
            )
        args = [self.smooth(argument) for argument in expression.args]
        if self._is_kinked(expression):
            return self._replace(expression, args)
        limits = domains(expression, self.convex)
        args = [self.lift(a, d) for a, d in zip(args, limits, strict=True)]
        if all(new is old for new, old in zip(args, expression.args, strict=True)):
            return expression
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return expression.copy(args)

    def _is_kinked(self, atom: cp.Expression) -> bool:
        if isinstance(atom, Pnorm):
            return bool(atom.original_p > 1)
        if isinstance(atom, PenaltyAtom):
            return not atom.penalty.smooth
        if isinstance(atom, perspective):
            return not atom.f.is_smooth()
        return type(atom) in self._epigraphs or type(atom) is dotsort or type(atom) not in RULES

    def _replace(self, atom: cp.Expression, args: list[cp.Expression]) -> cp.Expression:
        if not self.exact:
            raise SpecificationError(
                f"{self.where} contains `{atom}`, which is not smooth, where a variable above it "
                "(if it is convex; below it, if concave) need not meet it. It may stand only "
                "where CVXPY's rules for nonlinear programs (problem.is_dnlp()) allow it."
            )
        epigraph = self._epigraphs.get(type(atom))
        return epigraph(self, atom, args) if epigraph else self._cone_form(atom, args)

    def _cone_form(self, atom: cp.Expression, args: list[cp.Expression]) -> cp.Expression:
        """What CVXPY makes of an atom in convex problems."""
        method = CANON_METHODS.get(type(atom))
        if method is None:
            raise SpecificationError(
                f"{self.where} contains `{atom}`, but {type(atom).__name__} is neither smooth nor "
                "has a smooth form. Write it with other atoms."
            )
        known = {v.id for v in atom.variables()}.union(
            *({v.id for v in a.variables()} for a in args)
        )
        expression, constraints = method(atom, args)
        made = {v.id: v for e in (expression, *constraints) for v in e.variables()}
        for key, variable in made.items():
            if key not in known:
                start = atom if variable is expression else cp.Constant(np.zeros(variable.shape))
                self.introduce(start, variable=variable)
        for constraint in constraints:
            self.constrain(constraint)
        return expression

    def constrain(self, constraint: cp.Constraint) -> None:
        """Add the rows of a constraint whose dual nobody asks for."""
        self._constrain(self, constraint)

    def zero(self, expression: cp.Expression) -> Row:
        """Add a row that says that a smooth expression is zero."""
        return self._add(expression, equality=True)

    def nonpositive(self, expression: cp.Expression) -> Row:
        """Add a row that says that a smooth expression is at most zero."""
        return self._add(expression, equality=False)

    def _add(self, expression: cp.Expression, equality: bool) -> Row:
        row = Row(expression, equality, self.where)
        self.rows.append(row)
        return row

    def introduce(
        self,
        start: cp.Expression,
        repair: Callable[[Tensor], Tensor] = torch.nan_to_num,
        variable: cp.Variable | None = None,
        exact: Callable[[Tensor], Tensor] = torch.nan_to_num,
        **attributes: object,
    ) -> cp.Variable:
        """A new variable that starts where an expression is, of its shape unless it is given."""
        if variable is None:
            variable = cp.Variable(start.shape, **attributes)
        self.auxiliaries.append(Auxiliary(variable, start, repair, exact))
        return variable

    def lift(self, argument: cp.Expression, domain: Domain | None) -> cp.Expression:
        """An argument that stays within a domain, equal to the one given.

        Where neither bounds nor sign are known, a denominator is left as it is.
        """
        if domain is None or argument.is_constant():
            return argument
        key = (id(argument), domain)
        if key not in self._lifted:
            self._alive.append(argument)
            self._lifted[key] = self._lift(argument, domain)
        return self._lifted[key]

    def _lift(self, argument: cp.Expression, domain: Domain) -> cp.Expression:
        restriction = restriction_of(argument, domain)
        if restriction is not None:
            self.restrictions.append(restriction)
            return argument
        if domain is NONZERO or domain.contains(argument):
            return argument
        if domain is DEFINITE:
            variable = self.introduce(argument, domain.repair, symmetric=True)
            self.zero(variable - (argument + argument.T) / 2)
            return variable
        return self._separate(argument, domain)[0]

    def separate(self, argument: cp.Expression, domain: Domain) -> tuple[cp.Expression, Row | None]:
        """As `lift`, with a row whose multiplier is that of this use alone.

        None if the argument is surely inside the domain, and not at its end.
        """
        if argument.is_constant() or domain.contains(argument, strictly=True):
            return argument, None
        return self._separate(argument, domain)

    def _separate(self, argument: cp.Expression, domain: Domain) -> tuple[cp.Variable, Row]:
        variable = self.introduce(argument, domain.repair, bounds=[domain.lower, domain.upper])
        return variable, self.zero(variable - argument)


# Of a smoother, a kinked atom, and its arguments made smooth: what stands for it.
Epigraph = Callable[[Smoother, cp.Expression, Sequence[cp.Expression]], cp.Expression]
Constrain = Callable[[Smoother, cp.Constraint], object]


def restriction_of(argument: cp.Expression, domain: Domain) -> Restriction | None:
    """The restriction of a variable that an argument amounts to that only picks its entries."""
    leaf = argument
    while isinstance(leaf, SELECTIONS):
        leaf = leaf.args[0]
    if not isinstance(leaf, cp.Variable) or (domain is DEFINITE and leaf is not argument):
        return None
    return Restriction(leaf, selected(argument, leaf), domain)


def selected(argument: cp.Expression, variable: cp.Variable) -> np.ndarray:
    """Which entries of a variable, in C order, an expression picks: found by picking numbers."""
    numbers = torch.arange(variable.size, dtype=torch.float64, device="cpu")
    numbers = numbers.reshape(variable.shape)
    picked = translate_expression(argument)({variable.id: numbers})
    return picked.reshape(-1).round().to(torch.int64).numpy()
