"""Parameters that stand for expressions of a problem's own parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
from cvxpy.atoms.affine.wraps import nonneg_wrap, nonpos_wrap, nsd_wrap, psd_wrap, symmetric_wrap

_WRAPS: dict[str, Callable[[cp.Expression], cp.Expression]] = {
    "nonneg": nonneg_wrap,
    "nonpos": nonpos_wrap,
    "PSD": psd_wrap,
    "NSD": nsd_wrap,
    "symmetric": symmetric_wrap,
}


@dataclass(frozen=True, eq=False)
class ComputedParameter:
    """A parameter whose value is that of an expression.

    Attributes
    ----------
    parameter : cvxpy.Parameter
    expression : cvxpy.Expression
        Of other parameters; without variables.
    claims : frozenset of str
        What CVXPY's analysis knows of it: nonneg, nonpos, PSD, NSD, symmetric.
    """

    parameter: cp.Parameter
    expression: cp.Expression
    claims: frozenset[str]

    @classmethod
    def of(cls, expression: cp.Expression) -> ComputedParameter:
        parameter = cp.Parameter(expression.shape, name=str(expression))
        return cls(parameter, expression, claims_of(expression))

    @property
    def stand_in(self) -> cp.Expression:
        """The parameter, as an expression of which CVXPY knows what it knew of the original.

        (As wraps, of which there may be several, and not as attributes of the parameter.)
        """
        return with_claims(self.parameter, self.claims)


def claims_of(expression: cp.Expression) -> frozenset[str]:
    """What CVXPY's analysis says of an expression's sign and, of a matrix, its definiteness."""
    known = {"nonneg": expression.is_nonneg(), "nonpos": expression.is_nonpos()}
    if expression.ndim == 2 and expression.shape[0] == expression.shape[1]:
        known["PSD"], known["NSD"] = expression.is_psd(), expression.is_nsd()
        known["symmetric"] = expression.is_symmetric()
    return frozenset(name for name, holds in known.items() if holds)


def with_claims(expression: cp.Expression, claims: frozenset[str]) -> cp.Expression:
    """An expression of which CVXPY is told what is claimed."""
    for name, wrap in _WRAPS.items():
        if name in claims:
            expression = wrap(expression)
    return expression
