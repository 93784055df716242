"""The equation of an implicit model, ``x = phi(A x + c)``, solved and differentiated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import DerivativeModeError
from declarative_cvx.kkt import fold
from declarative_cvx.nonconvex.fixed_points.function import solve_function
from declarative_cvx.nonconvex.fixed_points.iteration import Found
from declarative_cvx.nonconvex.fixed_points.map import (
    FixedPointMap,
    relative_to_norm,
    relative_to_terms,
)
from declarative_cvx.nonconvex.fixed_points.precision import without_autocast
from declarative_cvx.nonconvex.fixed_points.settings import (
    Settings,
    check_solver,
    default_tolerance,
)
from declarative_cvx.nonconvex.fixed_points.solution import (
    FixedPointSolution,
)
from declarative_cvx.nonconvex.fixed_points.structure import (
    NONE,
    Structure,
    structure_of,
    substitute,
)
from declarative_cvx.nonconvex.implicit.activations import Activation, ActivationLike, as_activation
from declarative_cvx.nonconvex.implicit.adjoint import each_slice, solve_linear
from declarative_cvx.nonconvex.implicit.equilibrium_arguments import (
    Weights,
    prepared,
)
from declarative_cvx.nonconvex.implicit.kinks import KinkComplaint, kinked_at
from declarative_cvx.nonconvex.implicit.product import (
    Matrices,
    affine,
    bilinear_change,
    bilinear_gradient,
    norm_of,
    sizes_of_terms,
    solve_scaled,
    transposed,
)
from declarative_cvx.nonconvex.implicit.uncertified import warn_if_uncertified
from declarative_cvx.transforms import (
    apply_function,
    forward_mode_is_nested,
    observed,
    recording,
    transforming,
)


@dataclass(frozen=True, eq=False, repr=False)
class EquilibriumSolution(FixedPointSolution):
    """States of an implicit model, with a report per element.

    Attributes
    ----------
    y : Tensor, shape (..., q), or None
        The model's output, if a model was asked.
    """

    y: Tensor | None = None


@torch.compiler.disable  # looks at values
def solve_equilibrium(
    A: Weights,
    c: Tensor,
    activation: ActivationLike = "relu",
    *,
    tol: float | None = None,
    max_iters: int = 1000,
    start: Tensor | None = None,
    method: str = "auto",
    on_irregular: str = "warn",
) -> EquilibriumSolution:
    """Solve x = phi(A x + c) for each element of a batch, differentiably.

    The method is chosen by what is observed: substitution where A is triangular, plain iteration
    where it converges fast or ends after finitely many steps (feedforward networks), acceleration
    where it is slow, and Newton's method, which factorises a matrix per element, where that is slow
    too. Gradients solve one linear system per element in the same way (IDL Sec. 3). Slow systems in
    float32 are finished in float64, so that the error is of the size of rounding in the type of
    the arguments.

    Parameters
    ----------
    A : Tensor, shape (n, n), or pair of Tensor, each of shape (n, k)
        For a pair (L, R), A = L R', which is not formed: systems are then of order k (IDL Sec.
        6.3).
    c : Tensor, shape (..., n)
    activation : Activation, str or nn.Module, optional
    tol : float, optional
        Relative residual to reach; 1e-12 in float64, 5e-7 in float32.
    max_iters : int, optional
        Evaluations of the right-hand side.
    start : Tensor, shape (..., n), optional
        Where to start from, such as the x of an earlier call.
    method : {"auto", "picard", "anderson", "newton"}, optional
        Where to begin instead: with acceleration or with Newton's method, which take over from each
        other where needed; or "picard": plain iteration and nothing else.
    on_irregular : {"warn", "ignore", "raise"}, optional
        What to do in a backward pass at an element that lies on a kink of phi.

    Returns
    -------
    EquilibriumSolution
        Failures do not raise: see its `solved` and `require_solved`.

    Raises
    ------
    ParameterError

    Examples
    --------
    >>> import torch
    >>> A, c = torch.tensor([[0.0, 0.5], [0.5, 0.0]]), torch.tensor([[1.0, -2.0]])
    >>> solve_equilibrium(A, c).x
    tensor([[1., 0.]])
    """
    return solve_certified(
        A,
        c,
        activation,
        tol=tol,
        max_iters=max_iters,
        start=start,
        method=method,
        on_irregular=on_irregular,
        certified=False,
    )


def solve_certified(
    A: Weights,
    c: Tensor,
    activation: ActivationLike,
    *,
    tol: float | None,
    max_iters: int,
    start: Tensor | None,
    method: str,
    on_irregular: str,
    certified: bool,
) -> EquilibriumSolution:
    """`solve_equilibrium`; an A that is known to be well-posed is not looked at."""
    phi = as_activation(activation)
    check_solver(tol, max_iters, method, on_irregular)
    matrices, rows, first = prepared(A, c, start)
    phi.check(rows.shape[1])
    tol = default_tolerance(rows.dtype) if tol is None else tol
    settings = Settings(tol, max_iters, method, on_irregular)
    seen = _seen(matrices)
    if seen is not None:
        settings = replace(settings, structure=_structure(phi, seen, method, certified))
    with without_autocast(c.device):
        if phi.componentwise:
            found = apply_function(_Equilibrium, rows, first, phi, settings, *matrices)
        else:
            function = partial(_right_hand_side, phi)
            first = phi(rows.detach()) if first is None else first
            found = solve_function(function, first, (rows, *matrices), settings)
    kinked = partial(kinked_at, phi, found[0], rows, matrices)
    return _solution(c, found, tol, kinked)


def _seen(matrices: Matrices) -> list[Tensor] | None:
    """The numbers of the matrices; None if vmap maps over them."""
    if not transforming():
        return [matrix.detach() for matrix in matrices]
    seen = [observed(matrix[None])[0] for matrix in matrices]
    return [each[0] for each in seen] if all(len(each) == 1 for each in seen) else None


def _structure(
    phi: Activation, matrices: Sequence[Tensor], method: str, certified: bool
) -> Structure:
    """What can be known of A before solving; a warning if that it is well-posed cannot."""
    for p in (math.inf, 1):  # iteration converges
        if p in phi.norms and phi.lipschitz * norm_of(matrices, p) < 1:
            return Structure(norm=p)
    if not certified:
        warn_if_uncertified(phi, matrices)
    if method != "auto" or len(matrices) > 1:
        return NONE
    n, homogeneous = len(matrices[0]), phi.monotone and phi.positively_homogeneous
    return structure_of(matrices[0], phi.groups(n), homogeneous)


def _solution(c: Tensor, found: tuple[Tensor, ...], tol: float, kinked: Any) -> EquilibriumSolution:
    """The rows that were found in the shape and type of the call."""
    x, residual, iterations = found[0], *observed(*found[1:3])
    batch = c.shape[:-1]
    batch = batch if residual.numel() == math.prod(batch) else residual.shape  # vmapped
    return EquilibriumSolution(
        x.reshape(c.shape).to(c.dtype),
        residual.reshape(batch),
        iterations.reshape(batch),
        tol,
        kinked,
    )


def _right_hand_side(phi: Activation, x: Tensor, c: Tensor, *matrices: Tensor) -> Tensor:
    return phi(affine(x, matrices, c))


@dataclass(frozen=True, eq=False)
class _Equation(FixedPointMap):
    """x -> phi(x M + c)."""

    phi: Activation
    c: Tensor
    matrices: Matrices
    norm: float | None  # in which it contracts, if known
    direct = widens = True

    def inner(self, x: Tensor) -> Tensor:
        return affine(x, self.matrices, self.c)

    def outer(self, q: Tensor) -> Tensor:
        return self.phi(q)

    def outer_changes(self, q: Tensor, changes: Tensor) -> Tensor:
        return self.phi.slope(q)[:, None] * changes

    @property
    def contracts(self) -> bool:  # type: ignore[override]
        return self.norm is not None

    def relative(self, x: Tensor, f: Tensor, floor: Tensor | float) -> Tensor:
        if self.norm is not None:
            return relative_to_norm(x, f, self.norm, floor)
        terms = self.c.abs() + sizes_of_terms(x, self.matrices)
        return relative_to_terms(x, f, terms, floor)

    def newton(self, x: Tensor, q: Tensor, r: Tensor) -> Tensor:
        return solve_scaled(self.phi.slope(q), self.matrices, r)

    def select(self, index: Tensor) -> _Equation:
        return replace(self, c=self.c[index])

    def double(self) -> _Equation:
        matrices = tuple(matrix.double() for matrix in self.matrices)
        return _Equation(self.phi, self.c.double(), matrices, self.norm)


class _Equilibrium(torch.autograd.Function):
    @staticmethod
    def forward(
        c: Tensor, start: Tensor | None, phi: Activation, settings: Settings, *matrices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        problem = _Equation(phi, c, matrices, settings.structure.norm)
        if settings.structure.triangular:
            found = _by_substitution(problem, settings)
        else:
            first = phi(c) if start is None else start
            found = settings.solve(problem, first, warm=start is not None)
        x = found.masked(settings.tol)
        z = problem.inner(x) if found.q is None else found.q
        return x, found.residual, found.iterations, z

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        c, _, ctx.phi, ctx.settings, *matrices = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        x, residual, _, z = output
        ctx.save_for_backward(c, x, residual, z, *matrices)
        ctx.save_for_forward(c, x, residual, z, *matrices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:  # type: ignore[override]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        node = _Node.of(ctx)
        if ctx.settings.on_irregular != "ignore":
            seen = (v.detach() for v in (node.z, node.x, node.c, node.solved))
            apply_function(KinkComplaint, *seen, node.phi, ctx.settings, *node.matrices)
        settings = ctx.settings.transposed()
        slope = node.slope
        rhs = node.masked(grad) * slope
        w = solve_linear(slope, rhs, settings, transposed(node.matrices))
        return w, None, None, None, *bilinear_gradient(node.x, node.matrices, w)

    @staticmethod
    def jvp(ctx: Any, dc: Any, _start: Any, _phi: Any, _settings: Any, *changes: Any) -> Any:
        if forward_mode_is_nested():
            raise DerivativeModeError(
                "Forward mode over forward mode does not reach through torch's custom functions. "
                "Use forward over reverse mode: jacfwd(jacrev(...)), jvp(grad(...))."
            )
        node = _Node.of(ctx)
        moved = bilinear_change(node.x, node.matrices, changes)
        forced = sum(term for term in (dc, moved) if term is not None)
        slope = node.slope
        forced = node.masked(slope * forced)
        return solve_linear(slope, forced, ctx.settings, node.matrices), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, c: Tensor, start: Any, phi: Any, settings: Any, *matrices: Any
    ) -> Any:
        size, batch = info.batch_size, c.shape[1 if in_dims[0] == 0 else 0]
        if any(dim is not None for dim in in_dims[4:]):
            inputs = each_slice(size, in_dims, c, start, phi, settings, *matrices)
            each = [apply_function(_Equilibrium, *one) for one in inputs]
            return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0, 0)
        c = fold(c, in_dims[0], size, batch)
        start = None if start is None else fold(start, in_dims[1], size, batch)
        outputs = apply_function(_Equilibrium, c, start, phi, settings, *matrices)
        return tuple(v.unflatten(0, (size, batch)) for v in outputs), (0, 0, 0, 0)


def _by_substitution(problem: _Equation, settings: Settings) -> Found:
    """By substitution, checked, and improved where rounding was amplified."""
    phi, (M,) = problem.phi, problem.matrices

    def entry(i: int, known: Tensor) -> Tensor:
        part = phi.take([i])
        if M[i, i] == 0:
            return part(known[:, None])[:, 0]
        slope = part.slope(known[:, None])[:, 0]  # x has the sign of what is known
        return slope * known / (1 - slope * M[i, i])

    x = substitute(M, problem.c, settings.structure, entry)
    return replace(settings, method="newton").solve(problem, x)


@dataclass(frozen=True, eq=False)
class _Node:
    """A solution in the graph; elements that were not solved are zero."""

    phi: Activation
    x: Tensor
    z: Tensor
    c: Tensor
    matrices: list[Tensor]
    solved: Tensor  # (batch,)
    whole: bool  # whether all are known to be

    @classmethod
    def of(cls, ctx: Any) -> _Node:
        c, x, residual, z, *matrices = ctx.saved_tensors
        solved = residual <= ctx.settings.tol
        whole = not transforming() and bool(solved.all())
        x = x if whole else torch.where(solved[:, None], x, 0.0)
        if recording(x) or not whole:
            z = affine(x, matrices, c)  # as a function of x
        return cls(ctx.phi, x, z, c, matrices, solved, whole)

    def masked(self, value: Tensor) -> Tensor:
        return value if self.whole else torch.where(self.solved[:, None], value, 0.0)

    @property
    def slope(self) -> Tensor:
        return self.phi.slope(self.z)
