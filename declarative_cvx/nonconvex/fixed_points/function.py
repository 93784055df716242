"""Fixed points of torch functions, ``x = f(x, ...)``, solved and implicitly differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.irregular import complain
from declarative_cvx.least_squares import Factors
from declarative_cvx.nonconvex.fixed_points.map import FixedPointMap, relative_to_terms
from declarative_cvx.nonconvex.fixed_points.probes import kinked
from declarative_cvx.nonconvex.fixed_points.settings import Settings
from declarative_cvx.nonconvex.fixed_points.solution import KINK, SINGULAR
from declarative_cvx.transforms import apply_function, transforming

Function = Callable[..., Tensor]  # of x, (batch, ...), and other tensors, to the shape of x
# Numbers in the Jacobians up to which Newton's method forms them.
ROOM = 2**24
# Rounding of the largest component that smaller ones are affected by, in units of eps.
_ROUNDING = 16
# Share of the right-hand side up to which the linear systems of derivatives may be left unsolved.
_LEFT = 1e-2


def solve_function(
    function: Function, start: Tensor, arguments: Sequence[Tensor], settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``x = function(x, *arguments)``, differentiably in the arguments.

    Derivatives are those of the implicit function theorem: one linear system with the Jacobian of
    `function` at the solution, of which products are all that is needed, and one product with its
    derivative by the arguments. `function` has to be differentiable by torch.func.

    Parameters
    ----------
    function : callable
    start : Tensor, shape (batch, ...)
    arguments : sequence of Tensor
        Everything that x is to be differentiated by.
    settings : Settings

    Returns
    -------
    x : Tensor, shape (batch, ...)
        NaN for elements that were not solved.
    residual, iterations : Tensor, shape (batch,)
    """
    return apply_function(_Solve, function, settings, start, *arguments)


@dataclass(frozen=True, eq=False)
class _OfFunction(FixedPointMap):
    """A function of the whole batch as a map of some of its elements, made flat.

    Elements that are solved already are kept in place, so that a function in which elements depend
    on each other, or that was written for a batch of one size, is not called otherwise.
    """

    function: Callable[[Tensor], Tensor]
    whole: Tensor  # (batch, ...)
    tol: float
    at: Tensor | None = None
    memory = 5

    def _placed(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, *self.whole.shape[1:])
        return x if self.at is None else self.whole.index_copy(0, self.at, x)

    def _taken(self, value: Tensor) -> Tensor:
        value = value.flatten(1)
        return value if self.at is None else value[self.at]

    @property
    def direct(self) -> bool:  # type: ignore[override]
        return self.whole.numel() * self.whole[0].numel() <= ROOM

    def inner(self, x: Tensor) -> Tensor:
        return self._taken(self.function(self._placed(x)))

    def relative(self, x: Tensor, f: Tensor, floor: Tensor | float) -> Tensor:
        """Each component relative to its own size, down to the rounding of the largest.

        What the terms of a component add up to in size is not known of a function.
        """
        least = min(1.0, _ROUNDING * torch.finfo(f.dtype).eps / self.tol)
        return relative_to_terms(x, f, f.abs(), floor, least)

    def newton(self, x: Tensor, q: Tensor, r: Tensor) -> Tensor:
        """With Jacobians of single elements, formed by one product per row."""
        pull = torch.func.vjp(self.function, self._placed(x))[1]
        return self._solved(torch.func.vmap(lambda row: pull(row)[0]), r, transpose=False)

    def _solved(self, products: Callable[[Tensor], Tensor], r: Tensor, transpose: bool) -> Tensor:
        n = r.shape[1]
        identity = torch.eye(n, dtype=r.dtype, device=r.device)
        rows = identity[:, None].expand(n, len(self.whole), n)
        rows = rows.reshape(n, *self.whole.shape)
        jacobian = products(rows).flatten(2).movedim(0, 1)  # (batch, n, n)
        jacobian = jacobian if self.at is None else jacobian[self.at]
        return Factors.of(identity - jacobian).solve(r[:, :, None], transpose)[:, :, 0]

    def select(self, index: Tensor) -> _OfFunction:
        return replace(self, at=index if self.at is None else self.at[index])


@dataclass(frozen=True, eq=False)
class _LinearOfFunction(_OfFunction):
    """w -> P w + h for a linear function P."""

    rhs: Tensor | None = None

    def outer(self, q: Tensor) -> Tensor:
        assert self.rhs is not None
        return q + self._taken(self.rhs)

    def newton(self, x: Tensor, q: Tensor, r: Tensor) -> Tensor:
        return self._solved(torch.func.vmap(self.function), r, transpose=True)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        function: Function, settings: Settings, start: Tensor, *arguments: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem = _OfFunction(lambda x: function(x, *arguments), start, settings.tol)
        found = settings.solve(problem, start.flatten(1), warm=True)
        return found.masked(settings.tol).reshape(start.shape), found.residual, found.iterations

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, ctx.settings, _, *arguments = inputs
        x, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *arguments)
        ctx.save_for_forward(x, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:  # type: ignore[override]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        node = _Node.of(ctx)
        if ctx.settings.on_irregular != "ignore" and not transforming():
            at = torch.nonzero(node.kinked() & node.solved.flatten())
            complain(at[:, 0].tolist(), [KINK] * len(at), ctx.settings.on_irregular)
        w = node.solve(node.masked(grad), transpose=True)
        pull = torch.func.vjp(partial(ctx.function, node.x), *node.arguments)[1]
        return None, None, None, *pull(w)

    @staticmethod
    def jvp(ctx: Any, _function: Any, _settings: Any, _start: Any, *changes: Any) -> Any:
        node = _Node.of(ctx)
        moved = [k for k, change in enumerate(changes) if change is not None]

        def of_moved(*values: Tensor) -> Tensor:
            arguments = list(node.arguments)
            for k, value in zip(moved, values, strict=True):
                arguments[k] = value
            return ctx.function(node.x, *arguments)

        forced = _push(of_moved, [node.arguments[k] for k in moved], [changes[k] for k in moved])
        return node.solve(node.masked(forced), transpose=False), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, settings: Any, start: Any, *rest: Any) -> Any:
        size = info.batch_size
        start = _folded(start, in_dims[2], size)
        mapped = _Mapped(function, size, in_dims[3:])
        outputs = apply_function(_Solve, mapped, settings, start, *rest)
        return tuple(v.unflatten(0, (size, -1)) for v in outputs), (0, 0, 0)


@dataclass(frozen=True)
class _Mapped:
    """A function over a batch of batches, laid out as one batch."""

    function: Function
    size: int
    in_dims: tuple[int | None, ...]

    def __call__(self, x: Tensor, *arguments: Tensor) -> Tensor:
        x = x.unflatten(0, (self.size, -1))
        return torch.func.vmap(self.function, (0, *self.in_dims))(x, *arguments).flatten(0, 1)


def _folded(value: Tensor, dim: int | None, size: int) -> Tensor:
    value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _Node:
    """A solution in the graph; elements that were not solved are zero."""

    function: Function
    settings: Settings
    x: Tensor
    arguments: list[Tensor]
    solved: Tensor

    @classmethod
    def of(cls, ctx: Any) -> _Node:
        x, *arguments = ctx.saved_tensors
        solved = ~torch.isnan(x).flatten(1).any(1)
        solved = solved.reshape(-1, *[1] * (x.ndim - 1))
        return cls(ctx.function, ctx.settings, torch.where(solved, x, 0.0), arguments, solved)

    def kinked(self) -> Tensor:
        """Elements on a kink of the function, (batch,)."""
        return kinked(self.function, self.x, self.arguments, self.settings.tol)

    def masked(self, value: Tensor) -> Tensor:
        return torch.where(self.solved, value, 0.0)

    def solve(self, rhs: Tensor, transpose: bool) -> Tensor:
        system = _System(self.function, self.settings, transpose)
        return apply_function(_Linear, system, self.solved, rhs, self.x, *self.arguments)


@dataclass(frozen=True, eq=False)
class _System:
    """What is no tensor about ``w = P w + h``, P the Jacobian of f by x, or its transpose."""

    function: Function
    settings: Settings
    transpose: bool

    def product(self, x: Tensor, arguments: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """The function w -> P w."""
        pull = torch.func.vjp(lambda x: self.function(x, *arguments), x)[1]
        if self.transpose:
            return lambda w: pull(w)[0]
        push = torch.func.vjp(lambda w: pull(w)[0], torch.zeros_like(x))[1]
        return lambda w: push(w)[0]


def _linear(
    system: _System, solved: Tensor, rhs: Tensor, x: Tensor, arguments: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The solution of ``w = P w + rhs``, and whether there is none, (batch,)."""
    settings, product = system.settings, system.product(x, arguments)
    problem = _LinearOfFunction(
        lambda w: torch.where(solved, product(w), 0.0), x, settings.tol, rhs=rhs
    )
    found = settings.solve(problem, rhs.flatten(1))
    # Beside a solution that grows without end any residual looks small.
    left = found.residual * found.x.abs().amax(1)
    good = (found.residual <= settings.tol) & (left <= _LEFT * rhs.flatten(1).abs().amax(1))
    return found.x.reshape(x.shape), ~good


def irregular(
    function: Function, settings: Settings, x: Tensor, arguments: Sequence[Tensor]
) -> Tensor:
    """Elements at whose solution x there is a kink, or a singular linear system, (batch,)."""
    solved = ~torch.isnan(x).flatten(1).any(1).reshape(-1, *[1] * (x.ndim - 1))
    generator = torch.Generator().manual_seed(0)
    rhs = 0.5 + torch.rand(x.shape[1:], generator=generator, dtype=x.dtype, device="cpu")
    rhs = torch.where(solved, rhs.to(x.device), 0.0)
    system = _System(function, settings, transpose=True)
    x = torch.where(solved, x, 0.0)
    singular = _linear(system, solved, rhs, x, arguments)[1]
    return singular | kinked(function, x, arguments, settings.tol)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        system: _System, solved: Tensor, rhs: Tensor, x: Tensor, *arguments: Tensor
    ) -> Tensor:
        w, singular = _linear(system, solved, rhs, x, arguments)
        at = torch.nonzero(singular)[:, 0].tolist()
        complain(at, [SINGULAR] * len(at), system.settings.on_irregular)
        return w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.system, solved, _, x, *arguments = inputs
        ctx.save_for_backward(solved, output, x, *arguments)
        ctx.save_for_forward(solved, output, x, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        solved, w, x, *arguments = ctx.saved_tensors
        system = replace(ctx.system, transpose=not ctx.system.transpose)
        u = apply_function(_Linear, system, solved, grad, x, *arguments)

        def paired(x: Tensor, *arguments: Tensor) -> Tensor:
            return (u * ctx.system.product(x, arguments)(w)).sum()

        by = torch.func.grad(paired, tuple(range(1 + len(arguments))))(x, *arguments)
        return None, None, u, *by

    @staticmethod
    def jvp(ctx: Any, _system: Any, _solved: Any, drhs: Any, dx: Any, *changes: Any) -> Any:
        solved, w, x, *arguments = ctx.saved_tensors
        points, tangents = (x, *arguments), (dx, *changes)
        pairs = [
            (p, torch.zeros_like(p) if t is None else t)
            for p, t in zip(points, tangents, strict=True)
        ]

        def image(x: Tensor, *arguments: Tensor) -> Tensor:
            return ctx.system.product(x, arguments)(w)

        forced = _push(image, [p for p, _ in pairs], [t for _, t in pairs])
        forced = forced if drhs is None else forced + drhs
        return apply_function(_Linear, ctx.system, solved, forced, x, *arguments)

    @staticmethod
    def vmap(info: Any, in_dims: Any, system: _System, solved: Any, *tensors: Any) -> Any:
        size = info.batch_size
        folded = [
            _folded(v, d, size) for v, d in zip((solved, *tensors[:2]), in_dims[1:4], strict=True)
        ]
        mapped = replace(system, function=_Mapped(system.function, size, in_dims[4:]))
        w = apply_function(_Linear, mapped, *folded, *tensors[2:])
        return w.unflatten(0, (size, -1)), 0


def _push(function: Function, points: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """The derivative of a function in a direction, by reverse mode only.

    (Forward mode inside a rule of forward mode is not followed by torch.)
    """
    value, pull = torch.func.vjp(function, *points)[:2]

    def paired(cotangent: Tensor) -> Tensor:
        grads = pull(cotangent)
        return sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))

    return torch.func.grad(paired)(torch.zeros_like(value))
