"""Exact minimisation over states: the blocks X and P of IDL Sec. 4.2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.activations import Activation
from declarative_cvx.nonconvex.implicit.training.composite import (
    Composite,
    Minimum,
    Potentials,
    newton,
)
from declarative_cvx.nonconvex.implicit.training.state_terms import StateTerms

# Least curvature of the model of the smooth terms, relative to that of the divergence's weight.
_FLOOR = 1e-2
_HALVINGS = 40


@dataclass(frozen=True, eq=False)
class StateProblem:
    """min over p of h(p) + sum_i w_i (Psi*(p_i) - z_i p_i), for each data point.

    Attributes
    ----------
    smooth : StateTerms
        h
    activation : Activation
    z : Tensor, shape (batch, n)
    weight : Tensor, shape (n,)
        w > 0: lambda, or one of its entries for each state (IDL eq. 11).
    """

    smooth: StateTerms
    activation: Activation
    z: Tensor
    weight: Tensor

    def value(self, p: Tensor) -> Tensor:
        """Shape (batch,); infinite outside the range of the activation."""
        own = self.activation.conjugate(p) - self.z * p
        return self.smooth.value(p) + (self.weight * own).sum(1)


def minimise_states(
    problem: StateProblem,
    start: Tensor,  # (batch, n), in the range of the activation
    tol: float = 1e-10,
    max_iters: int = 50,
) -> Minimum:
    """Proximal Newton: h is replaced by its quadratic model, of which the minimum is exact.

    P >= 0 (ReLU) and the ranges of the other activations are kept by construction: the state is
    phi of something. For a squared loss the model is h itself and the first step the solution. The
    objective of a data point never rises.
    """
    p, dual, iteration = start, problem.z, 0
    smooth, weight = problem.smooth, problem.weight
    while iteration < max_iters:
        iteration += 1
        M = smooth.hessian(p)
        M = M + _floor(M, weight, smooth.curvature)
        g = (M @ p[:, :, None])[:, :, 0] - smooth.gradient(p)
        target, dual = minimise_model(M, g, problem, dual)
        step = target - p
        residual = step.abs().amax(1) / (1 + p.abs().amax(1))
        p = p + _step_length(problem, p, step)[:, None] * step
        if not bool((residual > tol).any()):
            break
    return Minimum(problem.activation.clamp(p), residual, iteration)


def minimise_model(
    M: Tensor,  # (n, n) or (batch, n, n), positive definite
    g: Tensor,  # (batch, n)
    problem: StateProblem,
    dual: Tensor,  # (batch, n), where to start
) -> tuple[Tensor, Tensor]:
    """Min over p of p'Mp / 2 - g'p + sum_i w_i (Psi*(p_i) - z_i p_i), through its dual

        min over v of sum_i w_i Psi(v_i) + s(v)' M^-1 s(v) / 2,   s(v) = g + w (z - v),

    which has no constraints and the solution p = phi(v).

    Returns
    -------
    p, v : Tensor, shape (batch, n)
    """
    weight = problem.weight
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(M))
    Q = weight[:, None] * inverse * weight
    shifted = (inverse @ (g + weight * problem.z)[:, :, None])[:, :, 0]
    none = weight.new_zeros(1, 1)
    potentials = Potentials(problem.activation, None, none, weight[None])
    found = newton(Composite(Q, weight * shifted, potentials), dual, tol=1e-13)
    return problem.activation(found.point), found.point


def _floor(M: Tensor, weight: Tensor, curvature: float) -> Tensor:
    """What makes M positive definite without slowing convergence: little next to w Psi*''."""
    size = M.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None]
    lacking = (_FLOOR * weight.expand(M.shape[:-1]) - curvature).clamp(min=0)
    return torch.diag_embed(torch.maximum(lacking, 1e-13 * size))


def _step_length(problem: StateProblem, p: Tensor, step: Tensor) -> Tensor:
    """Halved until the value has not risen (within rounding). Shape (batch,)."""
    before = problem.value(p)
    t = torch.ones_like(before)
    noise = 1e-14 * (1 + before.abs())
    for _ in range(_HALVINGS):
        rises = problem.value(p + t[:, None] * step) > before + noise
        if not bool(rises.any()):
            return t
        t = torch.where(rises, t / 2, t)
    return torch.where(rises, 0.0, t)


def minimise_x(
    A: Tensor,  # (n, n)
    offset: Tensor,  # (batch, n), B u + b
    p: Tensor,  # (batch, n)
    activation: Activation,
    weight: Tensor,  # (n,)
    mu: float,
    start: Tensor,  # (batch, n)
    tol: float = 1e-10,
) -> Minimum:
    """The X-step (IDL eq. 14): min over x of sum_i w_i (Psi(z_i) - p_i z_i) + mu/2 ||x - p||^2 with
    z = A x + offset; strictly convex.
    """
    Q = mu * torch.eye(len(A), dtype=A.dtype, device=A.device)
    r = mu * p + (weight * p) @ A
    return newton(Composite(Q, r, Potentials(activation, A, offset, weight[None])), start, tol)


def fixed_point_x(
    A: Tensor,
    offset: Tensor,
    p: Tensor,
    activation: Activation,
    weight: Tensor,
    mu: float,
    start: Tensor,
    tol: float = 1e-10,
    max_iters: int = 1000,
) -> Minimum:
    """The X-step by Picard iterations x <- p - A'diag(w)(phi(A x + offset) - p) / mu.

    Raises
    ------
    SpecificationError
        Unless they are known to contract: mu > l ||diag(w)^(1/2) A||_2^2, with l the Lipschitz
        constant of the activation. (The condition printed in IDL Sec. 4.2 has its sign turned, and
        bounds a norm that does not bound the one of A'.)
    """
    rate = contraction_rate(A, activation, weight, mu)
    if rate >= 1:
        raise SpecificationError(
            f"Fixed-point updates of X need mu > lambda ||A||_2^2, but {rate:.3g} mu is that much. "
            f'Raise mu, lower lambda or kappa, or use state_update="exact".'
        )
    x, iteration = start, 0
    while iteration < max_iters:
        iteration += 1
        new = p - (weight * (activation(x @ A.T + offset) - p)) @ A / mu
        residual = (new - x).abs().amax(1) / (1 + x.abs().amax(1))
        x = new
        if not bool((residual > tol * (1 - rate)).any()):
            break
    return Minimum(x, residual, iteration)


def contraction_rate(A: Tensor, activation: Activation, weight: Tensor, mu: float) -> float:
    """Bound on the rate of the fixed-point updates: l ||diag(w)^(1/2) A||_2^2 / mu."""
    norm = torch.linalg.matrix_norm(weight.sqrt()[:, None] * A, 2)
    return float(activation.lipschitz * norm.square() / mu)
