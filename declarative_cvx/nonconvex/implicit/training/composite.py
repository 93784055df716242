"""A quadratic function plus a sum of potentials: what every exact block comes down to.

The potential Psi has the activation as its derivative, so that the Fenchel divergence is convex in
its second argument. Rows of (A, B), the state X, and the dual problem of the state P all minimise

    v'Qv / 2 - r'v + sum_j w_j Psi(k_j'v + d_j),

the first over n rows, the others over the data points: a batch of small problems that share K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.activations import Activation, Blocks
from declarative_cvx.nonconvex.implicit.distributed import DataSum
from declarative_cvx.nonconvex.implicit.training.line_search import downhill

# Numbers in the largest temporary array.
_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class Potentials:
    """sum_j w_j Psi(k_j'v + d_j), for a batch of points v.

    Attributes
    ----------
    activation : Activation
        Psi is its potential.
    K : Tensor or None, shape (rows, k)
        Shared by the batch; None is the identity.
    offset : Tensor, shape (batch or 1, rows)
        d
    weight : Tensor, shape (batch or 1, rows)
        w > 0
    over_batch : bool
        Whether the states that the activation acts on are the elements of the batch (rows of
        (A, B), the rows of K being data points) rather than the rows of K.
    total : DataSum
        Where the rows of K are data points: how sums over all of them are made.
    """

    activation: Activation
    K: Tensor | None
    offset: Tensor
    weight: Tensor
    over_batch: bool = False
    total: DataSum = field(default_factory=DataSum)

    def along(self, v: Tensor) -> Tensor:
        """K v, shape (batch, rows)."""
        return v if self.K is None else v @ self.K.T

    def back(self, s: Tensor) -> Tensor:
        """K' s, shape (batch, k)."""
        return s if self.K is None else s @ self.K

    def value(self, v: Tensor) -> Tensor:
        terms = self.weight * self._each(self.activation.potential, self.along(v) + self.offset)
        return self.total.sum(terms.sum(1))

    def gradient(self, v: Tensor) -> Tensor:
        slopes = self.weight * self._each(self.activation, self.along(v) + self.offset)
        return self.total.sum(self.back(slopes))

    def hessian(self, v: Tensor) -> Tensor:
        slopes = self.weight * self._each(self.activation.slope, self.along(v) + self.offset)
        if self.K is None:
            return torch.diag_embed(slopes)
        size = max(_CHUNK // self.K.numel(), 1)
        parts = [(self.K.T * s[:, None]) @ self.K for s in slopes.split(size)]
        return self.total.sum(torch.cat(parts))

    def slope_along(self, v: Tensor, step: Tensor) -> Callable[[Tensor], Tensor]:
        """The slope at v + t step as a function of t, all of shape (batch,)."""
        z, dz = self.along(v) + self.offset, self.along(step)

        def slope(t: Tensor) -> Tensor:
            pushed = self.weight * self._each(self.activation, z + t[:, None] * dz)
            return self.total.sum((pushed * dz).sum(1))

        return slope

    def select(self, index: Tensor) -> Potentials:
        """The potentials of some elements of the batch."""
        activation = self.activation
        if self.over_batch and isinstance(activation, Blocks):
            activation = activation.take(index.tolist())
        offset, weight = (_pick(value, index) for value in (self.offset, self.weight))
        return replace(self, activation=activation, offset=offset, weight=weight)

    def _each(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        return function(z.mT).mT if self.over_batch else function(z)


@dataclass(frozen=True, eq=False)
class Composite:
    """v'Qv / 2 - r'v + potentials, for a batch of points v of shape (batch, k).

    Attributes
    ----------
    Q : Tensor, shape (k, k) or (batch, k, k)
        Symmetric, positive semidefinite.
    r : Tensor, shape (batch, k)
    potentials : Potentials or None
    """

    Q: Tensor
    r: Tensor
    potentials: Potentials | None = None

    def value(self, v: Tensor) -> Tensor:
        """Shape (batch,)."""
        quadratic = (v * (_times(self.Q, v) / 2 - self.r)).sum(1)
        return quadratic if self.potentials is None else quadratic + self.potentials.value(v)

    def gradient(self, v: Tensor) -> Tensor:
        """Shape (batch, k)."""
        slope = _times(self.Q, v) - self.r
        return slope if self.potentials is None else slope + self.potentials.gradient(v)

    def hessian(self, v: Tensor) -> Tensor:
        """Shape (batch, k, k); where an activation has a kink, one of the limits."""
        Q = self.Q.expand(len(v), *self.Q.shape[-2:])
        return Q if self.potentials is None else Q + self.potentials.hessian(v)

    def scale(self, v: Tensor) -> Tensor:
        """Size of the terms of the gradient: what a residual is relative to. Shape (batch, 1)."""
        terms = [_times(self.Q, v), self.r]
        if self.potentials is not None:
            terms.append(self.potentials.gradient(v))
        return torch.cat(terms, 1).abs().amax(1, keepdim=True).clamp(min=1e-300)

    def select(self, index: Tensor) -> Composite:
        Q = self.Q if self.Q.dim() == 2 else self.Q[index]
        potentials = None if self.potentials is None else self.potentials.select(index)
        return Composite(Q, self.r[index], potentials)


@dataclass(frozen=True, eq=False)
class Minimum:
    """Attributes
    ----------
    point : Tensor, shape (batch, k)
    residual : Tensor, shape (batch,)
        How far the optimality conditions are from holding, relative to their terms.
    iterations : int
    """

    point: Tensor
    residual: Tensor
    iterations: int


def newton(problem: Composite, start: Tensor, tol: float = 1e-10, max_iters: int = 60) -> Minimum:
    """Minimise without constraints: damped semismooth Newton steps, elements dropping out as they
    converge. With piecewise linear activations it ends after finitely many steps.
    """
    v, residual = start.clone(), start.new_full((len(start),), torch.inf)
    running = torch.arange(len(start), device=start.device)
    for iteration in range(max_iters + 1):
        active, at = problem.select(running), v[running]
        gradient = active.gradient(at)
        relative = gradient.abs().amax(1) / active.scale(at)[:, 0]
        residual[running] = relative
        unsolved = relative > tol
        if iteration == max_iters or not bool(unsolved.any()):
            break
        running, at, gradient = running[unsolved], at[unsolved], gradient[unsolved]
        active = active.select(unsolved.nonzero()[:, 0])
        step = _newton_step(active, at, gradient, relative[unsolved])
        v[running] = at + _line_search(active, at, step)[:, None] * step
    return Minimum(v, residual, iteration)


def _newton_step(problem: Composite, v: Tensor, gradient: Tensor, relative: Tensor) -> Tensor:
    """-(H + damping)^-1 g; the damping vanishes with the residual, so that convergence is fast also
    where H is singular (a row of (A, B) that no data point switches on).
    """
    H = problem.hessian(v)
    diagonal = H.diagonal(dim1=1, dim2=2)
    size = diagonal.mean(1) + gradient.abs().amax(1) / (1 + v.abs().amax(1))
    damping = size * (1e-12 + 1e-4 * relative.clamp(max=1).square())
    factor = torch.linalg.cholesky_ex(H + torch.diag_embed(damping[:, None].expand_as(v)))[0]
    return -torch.cholesky_solve(gradient[:, :, None], factor)[:, :, 0]


def _line_search(problem: Composite, v: Tensor, step: Tensor) -> Tensor:
    base = ((_times(problem.Q, v) - problem.r) * step).sum(1)
    bend = (_times(problem.Q, step) * step).sum(1)
    if problem.potentials is None:
        return torch.ones_like(base)
    pushed = problem.potentials.slope_along(v, step)
    return downhill(lambda t: base + t * bend + pushed(t), base)


def _times(Q: Tensor, v: Tensor) -> Tensor:
    return v @ Q if Q.dim() == 2 else (Q @ v[:, :, None])[:, :, 0]


def _pick(value: Tensor, index: Tensor) -> Tensor:
    return value if len(value) == 1 else value[index]
