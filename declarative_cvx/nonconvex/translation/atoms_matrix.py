"""CVXPY's reductions and functions of matrices in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from cvxpy.atoms.condition_number import condition_number
from cvxpy.atoms.cummax import cummax
from cvxpy.atoms.cumprod import cumprod
from cvxpy.atoms.dist_ratio import dist_ratio
from cvxpy.atoms.dotsort import dotsort
from cvxpy.atoms.eye_minus_inv import eye_minus_inv
from cvxpy.atoms.geo_mean import GeoMean, GeoMeanApprox
from cvxpy.atoms.gmatmul import gmatmul
from cvxpy.atoms.lambda_max import lambda_max
from cvxpy.atoms.lambda_sum_largest import lambda_sum_largest
from cvxpy.atoms.log_det import log_det
from cvxpy.atoms.log_sum_exp import log_sum_exp
from cvxpy.atoms.matrix_frac import MatrixFrac
from cvxpy.atoms.max import max as maximal
from cvxpy.atoms.min import min as minimal
from cvxpy.atoms.norm1 import norm1
from cvxpy.atoms.norm_inf import norm_inf
from cvxpy.atoms.norm_nuc import normNuc
from cvxpy.atoms.pnorm import Pnorm, PnormApprox
from cvxpy.atoms.prod import Prod
from cvxpy.atoms.quad_form import QuadForm
from cvxpy.atoms.quad_over_lin import quad_over_lin
from cvxpy.atoms.sigma_max import sigma_max
from cvxpy.atoms.sum_largest import sum_largest
from cvxpy.atoms.tr_inv import tr_inv
from cvxpy.atoms.von_neumann_entr import von_neumann_entr
from torch import Tensor

from declarative_cvx.nonconvex.translation.along_axes import (
    over_axes,
    product,
    reduction,
    running_along,
)
from declarative_cvx.nonconvex.translation.rule import Function, Operand, Rule, of_arguments
from declarative_cvx.rewriting.square_root import FLOOR, SquareRoot


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2


def _where_definite(X: Tensor, value: Tensor) -> Tensor:
    """The value, and NaN where X is not positive definite."""
    definite = torch.linalg.cholesky_ex(X.detach()).info == 0
    return torch.where(definite, value, math.nan)


def _log_det(X: Tensor) -> Tensor:
    X = _symmetric(X)
    return _where_definite(X, torch.linalg.slogdet(X).logabsdet)


def _tr_inv(X: Tensor) -> Tensor:
    X = _symmetric(X)
    inverse = torch.linalg.inv_ex(X).inverse
    return _where_definite(X, inverse.diagonal(dim1=-2, dim2=-1).sum(-1))


def _matrix_frac(X: Tensor, P: Tensor) -> Tensor:
    P = _symmetric(P)
    columns = X.reshape(X.shape[0], -1)
    return _where_definite(P, (columns * (torch.linalg.inv_ex(P).inverse @ columns)).sum())


def _eigenvalues(X: Tensor) -> Tensor:
    """Eigenvalues of the symmetric part, ascending."""
    return torch.linalg.eigvalsh(_symmetric(X))


def _quad_form(x: Tensor, P: Tensor) -> Tensor:
    x = x.reshape(-1)
    return x @ (P @ x)


def _quad_over_lin(atom: quad_over_lin) -> tuple[Function, Sequence[Operand]]:
    sum_of_squares = reduction(atom, lambda x: (x * x).sum(-1))
    return lambda x, y: sum_of_squares(x) / y.reshape(()), atom.args


def _pnorm(atom: Pnorm) -> tuple[Function, Sequence[Operand]]:
    p = float(atom.original_p)

    def norm(x: Tensor) -> Tensor:
        if p >= 1:
            return torch.linalg.vector_norm(x, p, dim=-1)
        return (x**p).sum(-1) ** (1 / p)  # NaN outside the nonnegative orthant

    return reduction(atom, norm), atom.args


def _geo_mean(atom: GeoMean) -> tuple[Function, Sequence[Operand]]:
    weights = np.zeros(atom._keep.shape)
    weights[atom._keep] = np.asarray(atom.p, dtype=float) / sum(atom.p)

    def mean(x: Tensor, weights: Tensor) -> Tensor:
        return reduction(atom, lambda entries: product(entries**weights))(x)

    return mean, [atom.args[0], weights]


def _largest(k: float, n: int) -> np.ndarray:
    """Weights of n entries in descending order whose k largest are summed."""
    return np.clip(k - np.arange(n), 0.0, 1.0)


def _sum_largest(atom: sum_largest) -> tuple[Function, Sequence[Operand]]:
    argument = atom.args[0]
    reduced = argument.size // max(math.prod(atom.shape), 1)

    def total(x: Tensor, weights: Tensor) -> Tensor:
        ordered = reduction(atom, lambda x: x.sort(-1, descending=True).values @ weights)
        return ordered(x)

    return total, [argument, _largest(atom.k, reduced)]


def _lambda_sum_largest(atom: lambda_sum_largest) -> tuple[Function, Sequence[Operand]]:
    argument = atom.args[0]
    weights = _largest(atom.k, argument.shape[-1])[::-1].copy()
    return lambda X, weights: _eigenvalues(X) @ weights, [argument, weights]


def _dotsort(x: Tensor, weights: Tensor) -> Tensor:
    x, weights = x.reshape(-1), weights.reshape(-1)
    padded = torch.nn.functional.pad(weights, (0, x.shape[0] - weights.shape[0]))
    return x.sort().values @ padded.sort().values


def _dist_ratio(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x - a) / torch.linalg.vector_norm(x - b)


def _condition_number(X: Tensor) -> Tensor:
    values = _eigenvalues(X)
    return values[..., -1] / values[..., 0]


def _eye_minus_inv(X: Tensor) -> Tensor:
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    return torch.linalg.inv_ex(eye - X).inverse


def _square_root(P: Tensor) -> Tensor:
    """R with R R = P. The derivative is that of a solution of this equation, not of eigenvectors.

    In the basis of the eigenvectors a change E of R = diag(r) obeys r E + E r + E E = D for a
    change D of P. Two steps of iteration, at D = 0, have the right first and second derivatives.
    """
    P = _symmetric(P)
    values, vectors = torch.linalg.eigh(torch.nan_to_num(P.detach()))  # else it raises
    largest = values[..., -1:]
    floor = FLOOR * torch.where(largest > 0, largest, 1.0)
    roots = torch.maximum(values, floor).sqrt()
    sums = roots[..., :, None] + roots[..., None, :]
    change = vectors.mT @ (P - P.detach()) @ vectors
    first = change / sums
    second = (change - first @ first) / sums
    return vectors @ (torch.diag_embed(roots) + second) @ vectors.mT


MATRIX: dict[type, Rule] = {
    Prod: over_axes(product),
    cumprod: running_along(torch.mul, 1.0),
    cummax: running_along(torch.maximum, -math.inf),
    log_sum_exp: over_axes(lambda x: x.logsumexp(-1)),
    GeoMean: _geo_mean,
    GeoMeanApprox: _geo_mean,
    Pnorm: _pnorm,
    PnormApprox: _pnorm,
    norm1: over_axes(lambda x: x.abs().sum(-1)),
    norm_inf: over_axes(lambda x: x.abs().amax(-1)),
    maximal: over_axes(lambda x: x.amax(-1)),
    minimal: over_axes(lambda x: x.amin(-1)),
    sum_largest: _sum_largest,
    dotsort: of_arguments(_dotsort),
    quad_over_lin: _quad_over_lin,
    QuadForm: of_arguments(_quad_form),
    MatrixFrac: of_arguments(_matrix_frac),
    tr_inv: of_arguments(_tr_inv),
    log_det: of_arguments(_log_det),
    lambda_max: of_arguments(lambda X: _eigenvalues(X)[..., -1]),
    lambda_sum_largest: _lambda_sum_largest,
    von_neumann_entr: of_arguments(lambda X: torch.special.entr(_eigenvalues(X)).sum(-1)),
    sigma_max: of_arguments(lambda X: torch.linalg.svdvals(X)[..., 0]),
    normNuc: of_arguments(lambda X: torch.linalg.svdvals(X).sum(-1)),
    condition_number: of_arguments(_condition_number),
    dist_ratio: of_arguments(_dist_ratio),
    eye_minus_inv: of_arguments(_eye_minus_inv),
    SquareRoot: of_arguments(_square_root),
    gmatmul: lambda atom: (lambda A, X: (A @ X.log()).exp(), [atom.A, atom.args[0]]),
}
