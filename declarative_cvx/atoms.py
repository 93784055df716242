"""Penalties as atoms of CVXPY: expression in, expression out.

CVXPY has Huber's penalty (``cp.huber(x, alpha) / 2``) and no nonconvex one. The atoms here obey
its rules (sign, monotonicity, curvature, parameters), so that `is_dcp()` and its relatives answer
rightly for problems that contain them. Their formulas stand in `declarative_cvx.penalties`.

`pseudo_huber` is convex, and CVXPY solves problems with it; its nonlinear solvers take others that
are smooth, too. At the end of this module the cone form and the smooth forms are entered in CVXPY's
tables of canonicalisations, as those of CVXPY's own atoms are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from cvxpy.atoms.elementwise.elementwise import Elementwise
from cvxpy.reductions.dcp2cone.canonicalizers import CANON_METHODS
from cvxpy.reductions.dnlp2smooth.canonicalizers import SMOOTH_CANON_METHODS
from cvxpy.reductions.dnlp2smooth.dnlp2smooth import Dnlp2Smooth
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.penalties import (
    Cauchy,
    GemanMcClure,
    Huber,
    Penalty,
    PseudoHuber,
    Quadratic,
    TruncatedQuadratic,
    Tukey,
    Welsch,
    penalty_named,
)


class PenaltyAtom(Elementwise):
    """A penalty of each entry of an expression.

    Parameters
    ----------
    x : cvxpy.Expression or array_like
        Real residuals.
    alpha : float, array_like, cvxpy.Parameter or cvxpy.Expression
        Positive scale, free of variables, of a shape that broadcasts with that of `x`. A Parameter
        is declared with ``pos=True``; an expression in parameters must be known to be nonnegative,
        and is checked to be positive when it is evaluated.
    penalty : Penalty or str

    Raises
    ------
    SpecificationError
        If an argument is complex, shapes do not broadcast, or `alpha` is not as described.

    Notes
    -----
    Nonnegative; increasing where ``x >= 0`` and decreasing where ``x <= 0``, hence quasiconvex;
    convex in `x` if the penalty is. Nothing is claimed of the dependence on `alpha`.
    """

    def __init__(self, x: Any, alpha: Any, penalty: Penalty | str) -> None:
        self.penalty = penalty_named(penalty)
        super().__init__(x, alpha)

    # What the atom is.

    def get_data(self) -> list[Penalty]:
        return [self.penalty]

    def name(self) -> str:
        return self._call(*(arg.name() for arg in self.args))

    def format_labeled(self) -> str:
        if self.label is not None:
            return self.label
        return self._call(*(arg.format_labeled() for arg in self.args))

    def _call(self, *arguments: str) -> str:
        return f"{self.penalty.name}({', '.join(arguments)})"

    def validate_arguments(self) -> None:
        name = self.penalty.name
        for role, arg in zip(("x", "alpha"), self.args, strict=True):
            if arg.is_complex():
                raise SpecificationError(
                    f"{name}: {role}, `{arg}`, is complex; expected a real expression. Apply the "
                    "atom to cp.real(...), cp.imag(...) or cp.abs(...)."
                )
        _require_broadcastable(name, *self.args)
        _require_positive(name, self.args[1])

    # What CVXPY's rules ask.

    def sign_from_args(self) -> tuple[bool, bool]:
        return True, False

    def is_atom_convex(self) -> bool:
        return self.penalty.convex

    def is_atom_concave(self) -> bool:
        return False

    def is_atom_quasiconvex(self) -> bool:
        return True

    def is_atom_smooth(self) -> bool:
        return self.penalty.smooth

    def is_incr(self, idx: int) -> bool:
        return idx == 0 and self.args[0].is_nonneg()

    def is_decr(self, idx: int) -> bool:
        return idx == 0 and self.args[0].is_nonpos()

    # Numbers.

    def numeric(self, values: list[Any]) -> np.ndarray:
        return self.penalty.value(*self._tensors(values)).numpy()

    def _grad(self, values: list[Any]) -> list[sp.csc_array | None]:
        x = self.args[0]
        slope = self.penalty.slope(*self._tensors(values)).numpy()
        entry = np.arange(x.size).reshape(x.shape, order="F")
        row = np.broadcast_to(entry, self.shape).ravel(order="F")
        column = np.arange(self.size)
        by_x = sp.csc_array((slope.ravel(order="F"), (row, column)), shape=(x.size, self.size))
        return [by_x, None]  # alpha has no variables

    def _tensors(self, values: list[Any]) -> tuple[Tensor, Tensor]:
        x, alpha = (_dense(value) for value in values)
        _require_positive_value(self.penalty.name, self.args[1], alpha)
        return torch.from_numpy(x), torch.from_numpy(alpha)


def _dense(value: Any) -> np.ndarray:
    return np.array(value.toarray() if sp.issparse(value) else value, dtype=np.float64)


def _require_broadcastable(name: str, x: cp.Expression, alpha: cp.Expression) -> None:
    try:
        np.broadcast_shapes(x.shape, alpha.shape)
    except ValueError:
        raise SpecificationError(
            f"{name}: alpha, `{alpha}`, has shape {alpha.shape}, which does not broadcast with "
            f"the shape {x.shape} of `{x}`; expected a scalar or one scale per entry."
        ) from None


def _require_positive(name: str, alpha: cp.Expression) -> None:
    if alpha.variables():
        raise SpecificationError(
            f"{name}: alpha, `{alpha}`, depends on variables; expected a number, a Parameter or an "
            "expression in parameters."
        )
    if not alpha.parameters():
        _require_positive_value(name, alpha, _dense(alpha.value))
    elif isinstance(alpha, cp.Parameter):
        if not alpha.is_pos():
            raise SpecificationError(
                f"{name}: alpha, the Parameter `{alpha}`, is not declared positive; make it "
                f"cp.Parameter({alpha.shape or ''}{', ' if alpha.shape else ''}pos=True)."
            )
    elif not alpha.is_nonneg():
        raise SpecificationError(
            f"{name}: alpha, `{alpha}`, is not known to be positive; declare its parameters with "
            "pos=True, and combine them so that the sign stays known."
        )


def _require_positive_value(name: str, alpha: cp.Expression, value: np.ndarray) -> None:
    wrong = np.argwhere(~((value > 0) & np.isfinite(value)))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        where = f"entry {list(index)} of alpha" if index else "alpha"
        raise SpecificationError(
            f"{name}: {where}, `{alpha}`, is {value[index]:g}; it must be positive and finite."
        )


def penalty_atom(penalty: Penalty | str, x: Any, alpha: Any = 1.0) -> cp.Expression:
    """A penalty, also one of the user's own, of each entry of an expression.

    Parameters
    ----------
    penalty : Penalty or str
    x, alpha
        As for `PenaltyAtom`.

    Returns
    -------
    cvxpy.Expression
        A `PenaltyAtom`; for the penalties that CVXPY has itself, ``cp.huber(x, alpha) / 2`` and
        ``cp.square(x) / 2``.

    Examples
    --------
    >>> expression = penalty_atom(Logcosh(), A @ x - b, alpha=0.5)
    """
    penalty = penalty_named(penalty)
    own = _CVXPY_ATOMS.get(type(penalty))
    return PenaltyAtom(x, alpha, penalty) if own is None else own(x, alpha)


_CVXPY_ATOMS: dict[type[Penalty], Callable[[Any, Any], cp.Expression]] = {
    Huber: lambda x, alpha: cp.huber(x, alpha) / 2,
    Quadratic: lambda x, alpha: cp.square(x) / 2,
}


def pseudo_huber(x: Any, alpha: Any = 1.0) -> PenaltyAtom:
    """``alpha**2 (sqrt(1 + (x / alpha)**2) - 1)``, elementwise: convex.

    Quadratic near zero, linear far away, and smooth (DDN Table 2). `x` and `alpha` are those of
    `PenaltyAtom`; the problem stays DPP if they are affine in parameters.
    """
    return PenaltyAtom(x, alpha, PseudoHuber())


def welsch(x: Any, alpha: Any = 1.0) -> PenaltyAtom:
    """``1 - exp(-x**2 / (2 alpha**2))``, elementwise: nonconvex, smooth, at most 1.

    DDN Table 2. `x` and `alpha` are those of `PenaltyAtom`.
    """
    return PenaltyAtom(x, alpha, Welsch())


def truncated_quadratic(x: Any, alpha: Any = 1.0) -> PenaltyAtom:
    """``min(x**2, alpha**2) / 2``, elementwise: nonconvex, with a kink at ``abs(x) == alpha``.

    DDN Table 2. `x` and `alpha` are those of `PenaltyAtom`.
    """
    return PenaltyAtom(x, alpha, TruncatedQuadratic())


def cauchy(x: Any, alpha: Any = 1.0) -> PenaltyAtom:
    """``alpha**2 / 2 log(1 + (x / alpha)**2)``, elementwise: nonconvex, smooth, unbounded.

    `x` and `alpha` are those of `PenaltyAtom`.
    """
    return PenaltyAtom(x, alpha, Cauchy())


def geman_mcclure(x: Any, alpha: Any = 1.0) -> PenaltyAtom:
    """``x**2 / (2 (1 + (x / alpha)**2))``, elementwise: nonconvex, smooth, below ``alpha**2 / 2``.

    `x` and `alpha` are those of `PenaltyAtom`.
    """
    return PenaltyAtom(x, alpha, GemanMcClure())


def tukey(x: Any, alpha: Any = 1.0) -> PenaltyAtom:
    """Tukey's biweight, elementwise: nonconvex, smooth, at most ``alpha**2 / 6``.

    ``alpha**2 / 6 (1 - (1 - (x / alpha)**2)**3)`` where ``abs(x) <= alpha``, constant beyond. `x`
    and `alpha` are those of `PenaltyAtom`.
    """
    return PenaltyAtom(x, alpha, Tukey())


def _cone_form(
    atom: PenaltyAtom, args: list[cp.Expression], solver_context: Any = None
) -> tuple[cp.Expression, list[cp.Constraint]]:
    """Alpha excess with norm(alpha, x) <= alpha + excess, a second-order cone for every entry.

    Each product has one parameter in it and no constant needs alpha**2, so that the cone program
    is affine in alpha: the problem is DPP in it.
    """
    if not isinstance(atom.penalty, PseudoHuber):
        raise SpecificationError(
            f"`{atom}` is convex, but its cone form is not known; write it with CVXPY's own atoms."
        )
    x, alpha = (cp.vec(arg + np.zeros(atom.shape), order="F") for arg in args)
    excess = cp.Variable(atom.size)
    cone = cp.SOC(alpha + excess, cp.vstack([alpha, x]), axis=0)
    return cp.reshape(cp.multiply(alpha, excess), atom.shape, order="F"), [cone]


# Penalties in units of alpha, made of functions that CVXPY's nonlinear solvers know.
_SMOOTH_FORMS: dict[type[Penalty], Callable[[cp.Expression], cp.Expression]] = {
    PseudoHuber: lambda r: cp.sqrt(1 + cp.square(r)) - 1,
    Welsch: lambda r: 1 - cp.exp(-cp.square(r) / 2),
    Cauchy: lambda r: cp.log(1 + cp.square(r)) / 2,
    GemanMcClure: lambda r: (1 - cp.power(1 + cp.square(r), -1)) / 2,
}


def _smooth_form(
    atom: PenaltyAtom, args: list[cp.Expression]
) -> tuple[cp.Expression, list[cp.Constraint]]:
    """A penalty of a variable r, with alpha r = x, for nonlinear solvers."""
    form = _SMOOTH_FORMS.get(type(atom.penalty))
    if form is None:
        raise SpecificationError(
            f"CVXPY's nonlinear solvers do not know `{atom}`. Solve a convex problem without "
            "nlp=True, and a nonconvex one with declarative_cvx's own minimisers."
        )
    x, alpha = (arg + np.zeros(atom.shape) for arg in args)
    r = cp.Variable(atom.shape)
    if x.value is not None and alpha.value is not None:
        r.value = x.value / alpha.value
    value = form(r)
    for _ in range(atom.penalty.power):
        value = cp.multiply(alpha, value)
    expression, constraints = Dnlp2Smooth().canonicalize_tree(value, False)
    return expression, [*constraints, cp.multiply(alpha, r) == x]


CANON_METHODS[PenaltyAtom] = _cone_form
SMOOTH_CANON_METHODS[PenaltyAtom] = _smooth_form
