"""Where the arguments of CVXPY's smooth atoms may lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from cvxpy.atoms.affine.binary_operators import DivExpression
from cvxpy.atoms.elementwise.entr import entr
from cvxpy.atoms.elementwise.hyperbolic import atanh
from cvxpy.atoms.elementwise.kl_div import kl_div
from cvxpy.atoms.elementwise.log import log
from cvxpy.atoms.elementwise.log1p import log1p
from cvxpy.atoms.elementwise.power import Power
from cvxpy.atoms.elementwise.rel_entr import rel_entr
from cvxpy.atoms.elementwise.trig import tan
from cvxpy.atoms.geo_mean import GeoMean, GeoMeanApprox
from cvxpy.atoms.log_det import log_det
from cvxpy.atoms.matrix_frac import MatrixFrac
from cvxpy.atoms.perspective import perspective
from cvxpy.atoms.pnorm import Pnorm
from cvxpy.atoms.quad_over_lin import quad_over_lin
from cvxpy.atoms.tr_inv import tr_inv
from cvxpy.atoms.von_neumann_entr import von_neumann_entr
from cvxpy.expressions.constants import Constant
from torch import Tensor

# Where starting values outside a domain are put: how far from its ends, absolute, and as a share
# of a finite width or of a matrix's size.
_MARGIN = 1e-2
_SHARE = 0.1
# Least eigenvalue, relative to the largest, of a matrix that counts as definite.
_DEFINITE = 1e-6


@dataclass(frozen=True)
class Domain:
    """An open interval; or what NONZERO and DEFINITE, below, stand for."""

    lower: float = -math.inf
    upper: float = math.inf
    name: str = "interval"

    def contains(self, argument: cp.Expression, strictly: bool = False) -> bool:
        """Whether CVXPY's bounds of an expression lie in the domain; its ends included or not."""
        if self.name == "definite":
            return False
        lower, upper = (np.asarray(end) for end in argument.get_bounds())
        if self.name == "nonzero":
            return bool(np.all(lower >= 0) or np.all(upper <= 0))
        if strictly:
            return bool(np.all(lower > self.lower) and np.all(upper <= self.upper))
        return bool(np.all(lower >= self.lower) and np.all(upper <= self.upper))

    def repair(self, value: Tensor) -> Tensor:
        """The value, if it is in the domain; otherwise one near it that is well within."""
        value = torch.nan_to_num(value)
        if self.name == "nonzero":
            away = torch.full_like(value, _MARGIN)
            return torch.where(value == 0, away, value)
        if self.name == "definite":
            return interior(value)
        width = self.upper - self.lower
        margin = _SHARE * width if math.isfinite(width) else _MARGIN
        inside = (value > self.lower) & (value < self.upper)
        return torch.where(inside, value, value.clamp(self.lower + margin, self.upper - margin))


def interior(X: Tensor) -> Tensor:
    """Symmetric matrices that are near given ones and well within the semidefinite cone.

    Those that are there already are only made symmetric.
    """
    values, vectors = torch.linalg.eigh((X + X.mT) / 2)
    size = values.abs().amax(-1, keepdim=True)
    lifted = torch.maximum(values, _SHARE * size.clamp(min=1.0))
    inside = values[..., :1] > _DEFINITE * size
    return (vectors * torch.where(inside, values, lifted)[..., None, :]) @ vectors.mT


POSITIVE = Domain(lower=0.0)
NONZERO = Domain(name="nonzero")
DEFINITE = Domain(name="definite")


def domains(atom: cp.Expression, convex: bool) -> Sequence[Domain | None]:
    """For each argument of an atom where it may lie; None for anywhere.

    Parameters
    ----------
    atom : cvxpy.Expression
    convex : bool
        Whether the rules are those of convex problems, where odd powers are of nonnegative
        arguments only.
    """
    if isinstance(atom, Power):
        return [_of_power(atom, convex)]
    if isinstance(atom, Pnorm):
        return [POSITIVE if atom.original_p < 1 else None]
    if isinstance(atom, perspective):
        return [POSITIVE, *[None] * (len(atom.args) - 1)]
    return _DOMAINS.get(type(atom), [None] * len(atom.args))


def _of_power(atom: Power, convex: bool) -> Domain | None:
    if not isinstance(atom.p, Constant):
        return POSITIVE
    exponent = float(atom.p.value)
    if exponent < 0 or exponent != int(exponent):
        return POSITIVE
    return POSITIVE if convex and exponent > 1 and exponent % 2 else None


_DOMAINS: dict[type, Sequence[Domain | None]] = {
    log: [POSITIVE],
    log1p: [Domain(lower=-1.0)],
    entr: [POSITIVE],
    rel_entr: [POSITIVE, POSITIVE],
    kl_div: [POSITIVE, POSITIVE],
    atanh: [Domain(-1.0, 1.0)],
    tan: [Domain(-math.pi / 2, math.pi / 2)],
    GeoMean: [POSITIVE],
    GeoMeanApprox: [POSITIVE],
    DivExpression: [None, NONZERO],
    quad_over_lin: [None, POSITIVE],
    log_det: [DEFINITE],
    tr_inv: [DEFINITE],
    von_neumann_entr: [DEFINITE],
    MatrixFrac: [None, DEFINITE],
}
