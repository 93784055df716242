"""From a convex problem to one that keeps CVXPY's rules for parameters (DPP)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from textwrap import shorten
from typing import Any

import cvxpy as cp
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.affine_atom import AffAtom
from cvxpy.atoms.affine.binary_operators import MulExpression, multiply
from cvxpy.atoms.affine.broadcast_to import broadcast_to
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.atoms.affine.wraps import nonneg_wrap, nonpos_wrap, nsd_wrap, psd_wrap, symmetric_wrap
from cvxpy.atoms.dotsort import dotsort
from cvxpy.atoms.elementwise.huber import huber
from cvxpy.atoms.quad_form import QuadForm
from cvxpy.utilities import scopes

from declarative_cvx.rewriting.bilinear import BILINEAR, as_matrix_product
from declarative_cvx.rewriting.computed import ComputedParameter, claims_of, with_claims
from declarative_cvx.rewriting.products import Factor, factorised
from declarative_cvx.rewriting.square_root import SquareRoot


class Place(Enum):
    """Where an expression stands.

    Under affine functions in the objective, quadratic forms are kept: CVXPY hands their matrices
    on. Elsewhere it needs them as sums of squares.
    """

    QUADRATIC = "under affine functions only, in the objective"
    OBJECTIVE = "elsewhere in the objective"
    CONSTRAINT = "in a constraint"

    def under(self, expression: cp.Expression) -> Place:
        """The place of an expression's arguments."""
        kept = isinstance(expression, AffAtom) or self is Place.CONSTRAINT
        return self if kept else Place.OBJECTIVE


# What says of an expression what CVXPY does not see: to be checked when the values are known.
_ASSERTIONS = (nonneg_wrap, nonpos_wrap, psd_wrap, nsd_wrap, symmetric_wrap)


@dataclass(frozen=True, eq=False)
class Rewriting:
    """A problem with the same solutions and dual variables that keeps the rules.

    Attributes
    ----------
    problem : cvxpy.Problem
        Its variables have the ids of the original ones; there may be auxiliary ones besides.
    computed : tuple of ComputedParameter
    """

    problem: cp.Problem
    computed: tuple[ComputedParameter, ...]

    @property
    def parameters(self) -> list[cp.Parameter]:
        """The parameters of the new problem, those of its variables' bounds included."""
        bounds = [end for variable in self.problem.variables() for end in variable.bounds or ()]
        trees = [self.problem, *(end for end in bounds if isinstance(end, cp.Expression))]
        return list({p.id: p for tree in trees for p in tree.parameters()}.values())

    def __str__(self) -> str:
        names = [f"`{shorten(c.parameter.name(), 60)}`" for c in self.computed]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        return f"computed beforehand: {shown}" if names else "written with auxiliary variables"


def rewrite(problem: cp.Problem) -> Rewriting | None:
    """Write a convex problem so that it is DPP.

    Parameters
    ----------
    problem : cvxpy.Problem
        Convex by the rules for given parameters (DCP). Left as it is.

    Returns
    -------
    Rewriting or None
        None if there is nothing to change, or if the result is not DPP either.
    """
    rewriter = _Rewriter()
    new = rewriter.problem(problem)
    if new is problem or not new.is_dpp(quad_form_dpp="qp"):
        return None
    return Rewriting(new, tuple(rewriter.computed))


class _Rewriter:
    """Rewrites expressions, and keeps what that takes.

    Attributes
    ----------
    computed : list of ComputedParameter
    definitions : list of cvxpy.Constraint
        Of auxiliary variables.
    """

    def __init__(self) -> None:
        self.computed: list[ComputedParameter] = []
        self.definitions: list[cp.Constraint] = []
        self._twins: dict[int, cp.Variable] = {}
        # With the original, as an id names an object only as long as that exists.
        self._known: dict[tuple[Any, ...], tuple[cp.Expression, cp.Expression]] = {}

    def problem(self, problem: cp.Problem) -> cp.Problem:
        """The problem, rewritten; itself if there is nothing to do."""
        for variable in problem.variables():
            self._replace_bounds(variable)
        old = [problem.objective.expr, *problem.constraints]
        objective = self.expression(problem.objective.expr, Place.QUADRATIC)
        constraints = [self._constraint(constraint) for constraint in problem.constraints]
        if _same([objective, *constraints], old):
            return problem
        return cp.Problem(type(problem.objective)(objective), [*constraints, *self.definitions])

    def _replace_bounds(self, variable: cp.Variable) -> None:
        """Find a variable another one in whose stead it has bounds that are affine in parameters.

        It has the same id, so that values are found under it.
        """
        old = variable.bounds or ()
        new = [self.constant(end) if isinstance(end, cp.Expression) else end for end in old]
        if not _same(new, old):
            attributes = {**variable.attributes, "bounds": new}
            twin = cp.Variable(variable.shape, variable.name(), variable.id, **attributes)
            self._twins[variable.id] = twin

    def _constraint(self, constraint: cp.Constraint) -> cp.Constraint:
        arguments = [self.expression(argument) for argument in constraint.args]
        if _same(arguments, constraint.args):
            return constraint
        new = constraint.copy(arguments)
        new.dual_variables = constraint.dual_variables
        return new

    def expression(
        self, expression: cp.Expression, place: Place = Place.CONSTRAINT
    ) -> cp.Expression:
        """An expression with the same value, written by the rules; itself if it is so already."""
        return self._once("expression", expression, self._expression, place)

    def constant(self, expression: cp.Expression) -> cp.Expression:
        """An expression without variables: itself if affine in parameters, else computed."""
        return self._once("constant", expression, self._constant)

    def isolated(self, expression: cp.Expression) -> cp.Expression:
        """An expression without parameters that has the same value, or at an optimum has it."""
        return self._once("isolated", expression, self._isolated)

    def _once(
        self, kind: str, expression: cp.Expression, make: Callable[..., cp.Expression], *rest: Any
    ) -> cp.Expression:
        key = (kind, id(expression), *rest)
        if key not in self._known:
            self._known[key] = expression, make(expression, *rest)
        return self._known[key][1]

    def _expression(self, expression: cp.Expression, place: Place) -> cp.Expression:
        if isinstance(expression, cp.Variable):
            return self._twins.get(expression.id, expression)
        if not expression.parameters() and not self._twins:
            return expression
        if not expression.variables():
            return self.constant(expression)
        if isinstance(expression, QuadForm):
            return self._quad_form(expression, place)
        if isinstance(expression, BILINEAR):
            return self._bilinear(expression, place)
        factor, other = factorised(expression) or (None, expression)
        if factor is not None and factor.value.parameters():
            return self._product(expression, factor, other, place)
        return self._any(expression, place)

    def _any(self, expression: cp.Expression, place: Place) -> cp.Expression:
        """An atom to which the rules apply if they apply to its arguments."""
        below = place.under(expression)
        new = self._with_arguments(expression, lambda argument: self.expression(argument, below))
        if isinstance(new, huber) and self.constant(new.M) is not new.M:
            return huber(new.args[0], self.constant(new.M))
        if isinstance(new, dotsort) and all(argument.parameters() for argument in new.args):
            return dotsort(self.isolated(expression.args[0]), new.args[1])
        return new

    def _with_arguments(
        self, expression: cp.Expression, change: Callable[[cp.Expression], cp.Expression]
    ) -> cp.Expression:
        arguments = [change(argument) for argument in expression.args]
        return expression if _same(arguments, expression.args) else expression.copy(arguments)

    def _constant(self, expression: cp.Expression) -> cp.Expression:
        if not expression.parameters() or isinstance(expression, cp.Parameter):
            return expression
        if isinstance(expression, Promote | broadcast_to | NegExpression):
            return self._with_arguments(expression, self.constant)
        with scopes.dpp_scope():
            affine = expression.is_affine()
        if affine and not any(issubclass(atom, _ASSERTIONS) for atom in expression.atoms()):
            return expression
        self.computed.append(ComputedParameter.of(expression))
        return self.computed[-1].stand_in

    def _product(
        self, expression: cp.Expression, factor: Factor, other: cp.Expression, place: Place
    ) -> cp.Expression:
        if other.parameters() or not isinstance(expression, multiply | MulExpression):
            return self.times(factor, other, place)
        return self._with_arguments(
            expression, lambda e: self.expression(e) if e.variables() else self.constant(e)
        )

    def times(self, factor: Factor, other: cp.Expression, place: Place) -> cp.Expression:
        """The product of a factor and an expression that may have parameters, too.

        Factors are multiplied with each other, and over sums, as far as that goes. What is left
        is a product with an expression whose parameters hide in auxiliary variables.
        """
        if not other.variables():
            return self.constant(factor.times(other))
        if isinstance(other, AddExpression) and all(a.shape == other.shape for a in other.args):
            return reduce(operator.add, [self.times(factor, part, place) for part in other.args])
        if isinstance(other, NegExpression):
            return -self.times(factor, other.args[0], place)
        scaled = _scaled(factor, other)
        if scaled is not None:
            return self._quad_form(scaled, place)
        inner, rest = factorised(other) or (None, other)
        both = None if inner is None else factor.after(inner)
        if both is not None and other.parameters():
            return self.times(both, rest, place)
        return factor.mapped(self.constant).times(self.isolated(other))

    def _quad_form(self, expression: QuadForm, place: Place) -> cp.Expression:
        x, P = expression.args
        matrix = self.constant(P)  # also where only its root is used: its definiteness is checked
        if P.parameters() and place is not Place.QUADRATIC:
            definite = P if P.is_psd() else -P
            root = Factor(MulExpression, SquareRoot(definite))
            squares = cp.sum_squares(self.times(root, x, place))
            return squares if definite is P else -squares
        x = self.expression(x) if place is Place.CONSTRAINT else self.isolated(x)
        new = [x, matrix]
        return expression if _same(new, expression.args) else QuadForm(*new)

    def _bilinear(self, expression: cp.Expression, place: Place) -> cp.Expression:
        product = as_matrix_product(expression)
        if product is None:
            return self._any(expression, place)
        entries = self.times(*product, place)
        return cp.reshape(entries, expression.shape, order="F")

    def _isolated(self, expression: cp.Expression) -> cp.Expression:
        if not expression.parameters():
            return self.expression(expression)
        if expression.is_affine():
            return self._defined(expression, operator.eq)
        if _hides_no_parameters(expression):
            return self._with_arguments(expression, self.isolated)
        return self._defined(expression, operator.ge if expression.is_convex() else operator.le)

    def _defined(
        self, expression: cp.Expression, relation: Callable[[Any, Any], cp.Constraint]
    ) -> cp.Expression:
        """A variable that is equal to an expression, or a bound of it that an optimum reaches."""
        variable = cp.Variable(expression.shape)
        self.definitions.append(relation(variable, self.expression(expression)))
        return with_claims(variable, claims_of(expression))


def _same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    return all(one is other for one, other in zip(new, old, strict=True))


def _hides_no_parameters(expression: cp.Expression) -> bool:
    """Whether all parameters of an atom are in arguments that may be variables."""
    fixed = [item for item in expression.get_data() or () if isinstance(item, cp.Expression)]
    if not isinstance(expression, AddExpression):
        fixed += [argument for argument in expression.args if not argument.variables()]
    return not any(item.parameters() for item in fixed)


def _scaled(factor: Factor, expression: cp.Expression) -> QuadForm | None:
    """A number times a quadratic form as one quadratic form, if its matrix has parameters."""
    if not isinstance(expression, QuadForm) or factor.scalar is None:
        return None
    (x, P), scale = expression.args, factor.scalar
    if not P.parameters() or not (scale.is_nonneg() or scale.is_nonpos()):
        return None
    wrap = psd_wrap if scale.is_nonneg() == P.is_psd() else nsd_wrap
    return QuadForm(x, wrap(multiply(cp.promote(scale, P.shape), P)))
