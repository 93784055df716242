"""Kinked convex (concave) atoms as variables above (below) smooth functions."""

from __future__ import annotations

from collections.abc import Sequence

import cvxpy as cp
import numpy as np
from cvxpy.atoms.cummax import cummax
from cvxpy.atoms.elementwise.abs import abs as absolute
from cvxpy.atoms.elementwise.maximum import maximum
from cvxpy.atoms.elementwise.minimum import minimum
from cvxpy.atoms.lambda_max import lambda_max
from cvxpy.atoms.lambda_sum_largest import lambda_sum_largest
from cvxpy.atoms.max import max as maximal
from cvxpy.atoms.min import min as minimal
from cvxpy.atoms.norm1 import norm1
from cvxpy.atoms.norm_inf import norm_inf
from cvxpy.atoms.norm_nuc import normNuc
from cvxpy.atoms.pnorm import Pnorm, PnormApprox
from cvxpy.atoms.sigma_max import sigma_max
from cvxpy.atoms.sum_largest import sum_largest

from declarative_cvx.nonconvex.translation.domains import POSITIVE
from declarative_cvx.nonconvex.translation.rows import mirror
from declarative_cvx.nonconvex.translation.smoothing import Epigraph, Smoother

Arguments = Sequence[cp.Expression]


def _along(t: cp.Expression, atom: cp.Expression) -> cp.Expression:
    """A reduction's result, so shaped that it broadcasts against the reduced argument."""
    shape = atom.args[0].shape
    if atom.axis is None or not shape:
        return cp.reshape(t, (1,) * len(shape), order="F")
    axes = (atom.axis,) if isinstance(atom.axis, int) else atom.axis
    kept = tuple(1 if i in axes else length for i, length in enumerate(shape))
    return cp.reshape(t, kept, order="F")


def _above(smoother: Smoother, atom: cp.Expression, pieces: Arguments) -> cp.Variable:
    t = smoother.introduce(atom)
    for piece in pieces:
        smoother.nonpositive(piece - t)
    return t


def _absolute(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    return _above(smoother, atom, [args[0], -args[0]])


def _minimum(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    t = smoother.introduce(atom)
    for piece in args:
        smoother.nonpositive(t - piece)
    return t


def _maximal(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    t = smoother.introduce(atom)
    smoother.nonpositive(args[0] - _along(t, atom))
    return t


def _minimal(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    t = smoother.introduce(atom)
    smoother.nonpositive(_along(t, atom) - args[0])
    return t


def _norm1(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    size = _absolute(smoother, cp.abs(args[0]), args)
    return cp.sum(size, axis=atom.axis, keepdims=atom.keepdims)


def _norm_inf(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    t = smoother.introduce(atom)
    for piece in (args[0], -args[0]):
        smoother.nonpositive(piece - _along(t, atom))
    return t


def _cummax(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    t = _above(smoother, atom, args)
    axis = 0 if atom.axis is None else atom.axis
    before = [slice(None)] * t.ndim
    after = list(before)
    before[axis], after[axis] = slice(None, -1), slice(1, None)
    if t.shape[axis] > 1:
        smoother.nonpositive(t[tuple(before)] - t[tuple(after)])
    return t


def _sum_largest(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    """The least of sum(t) + k q with t >= x - q, t >= 0; q starts between two order statistics."""
    x, k = args[0], atom.k
    n = x.size // max(atom.size, 1)
    middle = (min(np.floor(k) + 1, n), max(np.floor(k) - 1, 0.0))
    sums = [
        sum_largest(x, count, axis=atom.axis, keepdims=atom.keepdims) if count else 0
        for count in middle
    ]
    q = smoother.introduce((sums[0] - sums[1]) / max(middle[0] - middle[1], 1))
    t = smoother.introduce(cp.pos(x - _along(q, atom)), POSITIVE.repair, nonneg=True)
    smoother.nonpositive(x - _along(q, atom) - t)
    return cp.sum(t, axis=atom.axis, keepdims=atom.keepdims) + k * q


def _pnorm(smoother: Smoother, atom: Pnorm, args: Arguments) -> cp.Expression:
    """The rows sum(abs(x)**p) / t**(p - 1) <= t: convex, and smooth where t > 0."""
    p = float(atom.original_p)
    t = smoother.introduce(atom, POSITIVE.repair, nonneg=True)
    x = args[0]
    if p < 2:
        size = smoother.introduce(cp.abs(x), POSITIVE.repair, nonneg=True)
        smoother.nonpositive(x - size)
        smoother.nonpositive(-x - size)
        x = size
    powers = cp.square(x) if p == 2 else cp.power(x if p < 2 else cp.abs(x), p)
    total = cp.sum(powers, axis=atom.axis, keepdims=atom.keepdims)
    smoother.nonpositive(total / cp.power(t, p - 1) - t)
    return t


def _lambda_max(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    A = args[0]
    t = smoother.introduce(atom)
    if mirror(A) != 1 and A.shape[-1] > 1:  # as the rules of convex problems demand
        smoother.zero(cp.upper_tri(A) - cp.upper_tri(cp.swapaxes(A, -2, -1)))
    eye = np.broadcast_to(np.eye(A.shape[-1]), A.shape)
    smoother.constrain(cp.multiply(cp.reshape(t, (*t.shape, 1, 1), order="F"), eye) - A >> 0)
    return t


def _lambda_sum_largest(
    smoother: Smoother, atom: lambda_sum_largest, args: Arguments
) -> cp.Expression:
    """The least of k lambda_max(A - Z) + trace(Z) with Z positive semidefinite."""
    Z = smoother.introduce(cp.Constant(np.eye(args[0].shape[-1])), symmetric=True)
    smoother.constrain(Z >> 0)
    return atom.k * smoother.smooth(cp.lambda_max(args[0] - Z)) + cp.trace(Z)


def _sigma_max(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    A = args[0]
    t = smoother.introduce(atom)
    smoother.constrain(cp.bmat([[t * np.eye(A.shape[0]), A], [A.T, t * np.eye(A.shape[1])]]) >> 0)
    return t


def _norm_nuc(smoother: Smoother, atom: cp.Expression, args: Arguments) -> cp.Expression:
    """Half the least trace of [[U, A], [A', V]] positive semidefinite."""
    A = args[0]
    U, V = (smoother.introduce(atom * np.eye(length), symmetric=True) for length in A.shape)
    smoother.constrain(cp.bmat([[U, A], [A.T, V]]) >> 0)
    return (cp.trace(U) + cp.trace(V)) / 2


EPIGRAPHS: dict[type, Epigraph] = {
    absolute: _absolute,
    maximum: _above,
    minimum: _minimum,
    maximal: _maximal,
    minimal: _minimal,
    norm1: _norm1,
    norm_inf: _norm_inf,
    cummax: _cummax,
    sum_largest: _sum_largest,
    Pnorm: _pnorm,
    PnormApprox: _pnorm,
    lambda_max: _lambda_max,
    lambda_sum_largest: _lambda_sum_largest,
    sigma_max: _sigma_max,
    normNuc: _norm_nuc,
}
