"""CVXPY's elementwise atoms, and the library's penalties, in torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from cvxpy.atoms.elementwise.abs import abs as absolute
from cvxpy.atoms.elementwise.entr import entr
from cvxpy.atoms.elementwise.exp import exp
from cvxpy.atoms.elementwise.huber import huber
from cvxpy.atoms.elementwise.hyperbolic import asinh, atanh, sinh, tanh
from cvxpy.atoms.elementwise.kl_div import kl_div
from cvxpy.atoms.elementwise.log import log
from cvxpy.atoms.elementwise.log1p import log1p
from cvxpy.atoms.elementwise.logistic import logistic
from cvxpy.atoms.elementwise.maximum import maximum
from cvxpy.atoms.elementwise.minimum import minimum
from cvxpy.atoms.elementwise.normcdf import normcdf
from cvxpy.atoms.elementwise.power import Power, PowerApprox
from cvxpy.atoms.elementwise.rel_entr import rel_entr
from cvxpy.atoms.elementwise.trig import cos, sin, tan
from cvxpy.atoms.elementwise.xexp import xexp
from cvxpy.atoms.one_minus_pos import one_minus_pos
from cvxpy.expressions.constants import Constant
from torch import Tensor

from declarative_cvx.atoms import PenaltyAtom
from declarative_cvx.nonconvex.translation.rule import Function, Operand, Rule, of_arguments

# Above it log(1 + exp(x)) is x to rounding.
_LOGISTIC_IS_LINEAR = 40.0


def _logistic(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x, threshold=_LOGISTIC_IS_LINEAR)


def _rel_entr(x: Tensor, y: Tensor) -> Tensor:
    # In two terms, so that the derivative in y is right where x is zero.
    return -torch.special.entr(x) - torch.xlogy(x, y)


def _kl_div(x: Tensor, y: Tensor) -> Tensor:
    return _rel_entr(x, y) - x + y


def _huber(x: Tensor, half_width: Tensor) -> Tensor:
    inside = torch.clamp(x, -half_width, half_width)
    return inside * (2 * x - inside)


def _power(atom: Power) -> tuple[Function, Sequence[Operand]]:
    if not isinstance(atom.p, Constant):
        return torch.pow, [atom.args[0], atom.p]
    exponent = float(atom.p.value)
    if exponent == 1:
        return lambda x: x, atom.args
    return lambda x: torch.pow(x, exponent), atom.args


def _penalty(atom: PenaltyAtom) -> tuple[Function, Sequence[Operand]]:
    shape = atom.shape

    def value(x: Tensor, alpha: Tensor) -> Tensor:
        return atom.penalty.value(x, alpha).expand(shape)

    return value, atom.args


ELEMENTWISE: dict[type, Rule] = {
    exp: of_arguments(torch.exp),
    log: of_arguments(torch.log),
    log1p: of_arguments(torch.log1p),
    entr: of_arguments(torch.special.entr),
    rel_entr: of_arguments(_rel_entr),
    kl_div: of_arguments(_kl_div),
    logistic: of_arguments(_logistic),
    xexp: of_arguments(lambda x: x * torch.exp(x)),
    normcdf: of_arguments(torch.special.ndtr),
    sin: of_arguments(torch.sin),
    cos: of_arguments(torch.cos),
    tan: of_arguments(torch.tan),
    sinh: of_arguments(torch.sinh),
    tanh: of_arguments(torch.tanh),
    asinh: of_arguments(torch.asinh),
    atanh: of_arguments(torch.atanh),
    Power: _power,
    PowerApprox: _power,
    one_minus_pos: of_arguments(lambda x: 1 - x),
    absolute: of_arguments(torch.abs),
    maximum: of_arguments(lambda *x: reduce(torch.maximum, x)),
    minimum: of_arguments(lambda *x: reduce(torch.minimum, x)),
    huber: lambda atom: (_huber, [atom.args[0], atom.M]),
    PenaltyAtom: _penalty,
}
