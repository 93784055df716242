"""What a problem is: convex with parameters in the right places, or not, and why not."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum

import cvxpy as cp
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.utilities import scopes

from declarative_cvx.errors import SpecificationError
from declarative_cvx.patterns import Pattern, recognise
from declarative_cvx.rewriting import Rewriting, rewrite


class Verdict(Enum):
    """The class a problem falls into; the value is its description in words."""

    DPP = "convex, disciplined parametrized (DPP)"
    DGP = "log-log convex, disciplined parametrized geometric program (DGP)"
    CONVEX = "convex, but not disciplined parametrized (DPP)"
    SMOOTH = "nonconvex, disciplined nonlinear (DNLP)"
    TORCH = "written in torch, its functions taken to be smooth"
    FIXED_POINT = "a fixed point of a function written in torch"
    MIXED_INTEGER = "mixed-integer"
    COMPLEX = "complex-valued"
    EMPTY = "without variables"
    UNKNOWN = "neither convex nor disciplined nonlinear"


@dataclass(frozen=True)
class ProblemSpec:
    """The verdict on a problem.

    Attributes
    ----------
    verdict : Verdict
    reason : str
        For a problem that is not DPP (DGP): which expression breaks the rules, where it stands
        and why. Empty otherwise.
    pattern : Pattern or None
        What a fast kernel knows the problem as: "robust pooling (welsch)".
    rewriting : Rewriting or None
        The same problem with whatever depends on parameters only as parameters of their own, if
        it has to be written so for a cone program with parameters to represent it.
    """

    verdict: Verdict
    reason: str = ""
    pattern: Pattern | None = None
    rewriting: Rewriting | None = None

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        known = [f"; {found}" for found in (self.pattern, self.rewriting) if found is not None]
        return self.verdict.value + reason + "".join(known)

    @property
    def is_convex(self) -> bool:
        """Whether a cone program with parameters represents the problem."""
        return self.verdict in (Verdict.DPP, Verdict.DGP)


def classify(problem: cp.Problem, gp: bool = False) -> ProblemSpec:
    """Decide what kind of problem this is.

    Parameters
    ----------
    problem : cvxpy.Problem
    gp : bool
        Read the problem as a geometric program.

    Returns
    -------
    ProblemSpec
    """
    leaves = [*problem.variables(), *problem.parameters()]
    for leaf in leaves:
        if leaf.attributes["boolean"] or leaf.attributes["integer"]:
            return ProblemSpec(
                Verdict.MIXED_INTEGER, f"variable `{leaf.name()}` is boolean or integer"
            )
        if leaf.is_complex():
            return ProblemSpec(Verdict.COMPLEX, f"`{leaf.name()}` is complex")
    if any(isinstance(con, cp.FiniteSet) for con in problem.constraints):
        return ProblemSpec(Verdict.MIXED_INTEGER, "a FiniteSet constraint makes a choice")
    if not any(variable.size for variable in problem.variables()):
        return ProblemSpec(Verdict.EMPTY, "there is nothing to solve for")
    if gp:
        if problem.is_dgp(dpp=True):
            return ProblemSpec(Verdict.DGP)
        return ProblemSpec(Verdict.UNKNOWN, _first_breach(problem, gp=True))
    pattern = recognise(problem)
    # (The rules let pass what cannot be canonicalised, such as exp(quad_form(x, P)).)
    rewriting = rewrite(problem) if problem.is_dcp() else None
    if problem.is_dpp(quad_form_dpp="qp"):
        return ProblemSpec(Verdict.DPP, "", pattern, rewriting)
    reason = _first_breach(problem, gp=False)
    if problem.is_dcp():
        return ProblemSpec(Verdict.CONVEX, reason, pattern, rewriting)
    verdict = Verdict.SMOOTH if _is_smooth(problem) else Verdict.UNKNOWN
    return ProblemSpec(verdict, reason, pattern)


def _is_smooth(problem: cp.Problem) -> bool:
    """Whether CVXPY has rules by which the problem is smooth; for some cones it has none."""
    parts = [*problem.constraints, problem.objective]
    return all(hasattr(part, "is_dnlp") for part in parts) and bool(problem.is_dnlp())


def require_convex(spec: ProblemSpec, gp: bool) -> None:
    """Refuse a problem that no cone program with parameters represents.

    Raises
    ------
    SpecificationError
        Naming the expression at fault and what to do.
    """
    if spec.is_convex:
        return
    raise SpecificationError(f"The problem is {spec}. {_advice(spec.verdict, gp)}")


def require_smooth(spec: ProblemSpec) -> None:
    """Refuse a problem that no smooth nonlinear program represents.

    Raises
    ------
    SpecificationError
    """
    if spec.verdict in (Verdict.MIXED_INTEGER, Verdict.COMPLEX, Verdict.EMPTY):
        raise SpecificationError(f"The problem is {spec}. {_advice(spec.verdict, gp=False)}")


def _advice(verdict: Verdict, gp: bool) -> str:
    if gp:
        return (
            "With gp=True, variables and parameters must be positive (pos=True), objective and "
            "constraints monomials or posynomials, and exponents constants."
        )
    return {
        Verdict.MIXED_INTEGER: "Its solution does not depend smoothly on parameters; relax it.",
        Verdict.COMPLEX: "Write real and imaginary part as two real variables.",
        Verdict.EMPTY: "Pass a problem with at least one variable.",
        Verdict.CONVEX: (
            "Give each product or function of parameters a Parameter of its own, compute it in "
            "torch, and pass the result."
        ),
    }.get(verdict, "A geometric program needs gp=True; a smooth nonconvex problem nonconvex=True.")


def _first_breach(problem: cp.Problem, gp: bool) -> str:
    """The first expression of a problem that breaks the rules, where it stands, and why."""
    objective = problem.objective
    with nullcontext() if gp else scopes.quad_form_dpp_scope():
        ok = objective.is_dgp(dpp=True) if gp else objective.is_dcp(dpp=True)
        if not ok:
            return _breach(f"the objective, `{objective}`,", [objective.expr], gp)
    for number, constraint in enumerate(problem.constraints):
        ok = constraint.is_dgp(dpp=True) if gp else constraint.is_dcp(dpp=True)
        if not ok:
            return _breach(f"constraint {number}, `{constraint}`,", constraint.args, gp)
    return "a parameter stands where the rules do not allow one"


def _breach(where: str, expressions: list[cp.Expression], gp: bool) -> str:
    with scopes.dpp_scope():
        for expression in expressions:
            culprit = _deepest_breach(expression, gp)
            if culprit is not None:
                return f"{where} contains `{culprit}`, {_why(culprit, gp)}"
    kind = "log-log curvature" if gp else "curvature"
    shapes = ", ".join(f"`{expr}` is {expr.curvature.lower()}" for expr in expressions)
    return f"{where} has the wrong {kind}: {shapes}"


def _deepest_breach(expression: cp.Expression, gp: bool) -> cp.Expression | None:
    if expression.is_dgp() if gp else expression.is_dcp():
        return None
    for argument in expression.args:
        found = _deepest_breach(argument, gp)
        if found is not None:
            return found
    return expression


def _why(culprit: cp.Expression, gp: bool) -> str:
    """Why an expression, whose arguments are all fine, breaks the rules (in a DPP scope)."""
    atom = type(culprit).__name__
    if gp and not culprit.args:
        return "which is not declared positive (pos=True)"
    if gp:
        return f"to which {atom} does not apply under the rules of geometric programming"
    names = _parameter_names(culprit)
    pure = [arg for arg in culprit.args if arg.parameters() and not arg.variables()]
    if len(pure) >= 2:
        return f"which combines parameters {names} in a way that is not affine in them"
    if len(culprit.args) == 2 and all(arg.variables() for arg in culprit.args):
        return "which combines variables in both arguments"
    if isinstance(culprit, DivExpression) and pure:
        return f"which divides by parameter {names}: make the reciprocal a Parameter"
    if any(arg.parameters() and arg.variables() for arg in culprit.args) and pure:
        return f"which multiplies parameters {names}"
    if pure and not pure[0].is_affine():
        return f"which multiplies by `{pure[0]}`, a nonlinear function of parameter {names}"
    if pure and isinstance(culprit, (multiply, MulExpression)):
        return (
            f"whose curvature depends on the sign of parameter {names}: declare it nonneg=True "
            "or nonpos=True"
        )
    if pure:
        return f"which applies {atom} to parameter {names}"
    if culprit.parameters() and all(arg.variables() for arg in culprit.args):
        return f"which applies {atom} to an expression in parameter {names}"
    return f"to which the rules of {atom} give no curvature"


def _parameter_names(expression: cp.Expression) -> str:
    return " and ".join(sorted({f"`{parameter.name()}`" for parameter in expression.parameters()}))
