"""The one place where minimising a nonlinear program enters torch's automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.derivative.regularity import DerivativeReport
from declarative_cvx.errors import DerivativeModeError
from declarative_cvx.irregular import complain
from declarative_cvx.kkt import fold
from declarative_cvx.nonconvex.minimization.implicit_kkt import Minimum
from declarative_cvx.nonconvex.minimization.local_minimum import LocalMinimum
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.status import Status
from declarative_cvx.transforms import (
    apply_function,
    forward_mode_is_nested,
    over_gradients,
    without_inference_mode,
)

Find = Callable[[NonlinearProgram, Tensor], LocalMinimum]


@dataclass(eq=False)
class NonlinearCall:
    """One call: what to solve with, and what was found.

    Attributes
    ----------
    program : NonlinearProgram
        For its functions.
    find : callable
        From a program and starts (starts, batch, n) to its `LocalMinimum`.
    on_irregular : {"warn", "ignore", "raise"}
    found : LocalMinimum or None
        Set by the forward pass.
    report : DerivativeReport or None
        Set by the first backward pass, or when it is asked for.
    """

    program: NonlinearProgram
    find: Find
    on_irregular: str = "warn"
    found: LocalMinimum | None = None
    solved_program: NonlinearProgram | None = None
    report: DerivativeReport | None = None

    def minimum(self) -> Minimum:
        """What was found, outside of any graph; elements that were not solved are replaced."""
        assert self.found is not None
        assert self.solved_program is not None
        found, program = self.found, self.solved_program
        solved = found.status == int(Status.OPTIMAL)
        place = _stand_in(solved)
        parameters = tuple(v if len(v) == 1 else v[place] for v in program.parameters)
        free, rows = found.active.free.to(found.value), found.active.rows.to(found.value)
        tensors = (v[place] for v in (found.point.x, found.point.y, free, rows))
        x, y, free, rows = tensors
        return Minimum(program, x, y, parameters, free, rows)

    @without_inference_mode()
    def assess(self) -> DerivativeReport:
        """The report of the last backward pass, or one made by probing."""
        if self.report is None:
            minimum = self.minimum()
            seen: list[tuple[Tensor, Tensor]] = []
            rhs = _probe(torch.cat([minimum.x, minimum.y], 1))
            minimum.solve(rhs, lambda *both: seen.append(both))
            self.report = self._reported(*seen[0])
        return self.report

    def record(self, residual: Tensor, singular: Tensor) -> None:
        """Take note of a backward pass, and complain of irregular elements."""
        assert self.found is not None
        times = len(self.found.value) // max(len(residual), 1)
        self.report = self._reported(residual.repeat(times), singular.repeat(times))
        solved = self.found.status == int(Status.OPTIMAL)
        irregular = torch.where(~self.report.regular & solved)[0]
        if len(irregular):
            reasons = self.report.reason
            names = irregular.tolist()
            complain(names, [reasons[i] for i in names], self.on_irregular)

    def _reported(self, residual: Tensor, singular: Tensor) -> DerivativeReport:
        assert self.found is not None
        solved = self.found.status == int(Status.OPTIMAL)
        several = ambiguous(self.minimum(), singular & solved)
        return DerivativeReport(
            torch.where(solved, residual, torch.nan),
            self.found.weak & solved,
            several,
            degenerate=self.found.degenerate & solved,
        )


def ambiguous(minimum: Minimum, singular: Tensor) -> Tensor:
    """Elements with a singular system whose null space the parameters move, bool, (batch,).

    Constraints that depend on each other and would move apart, or minima that are not unique and
    would drift: the derivative then depends on the direction.
    """
    at = torch.where(singular)[0]
    found = torch.zeros_like(singular)
    if not len(at):
        return found
    random = _probe(torch.cat([minimum.x, minimum.y], 1))
    kept = torch.cat([minimum.free, minimum.active], 1)
    random = random * kept
    image = minimum.pull_back(random)[0] * kept
    null = random - minimum.solve(image)
    sizes = []
    for w in (null, random):
        part = [torch.zeros_like(minimum.x[:, 0])]
        shared = tuple(v.expand(len(w), *v.shape[1:]) for v in minimum.parameters)
        grads = replace(minimum, parameters=shared).pull_back(w)[1]
        part += [g.abs().reshape(len(g), -1).amax(1) for g in grads if g.numel()]
        sizes.append(torch.stack(part).amax(0))
    moved = sizes[0] > 1e-6 * sizes[1]
    return found.index_copy(0, at, moved[at])


def _probe(like: Tensor) -> Tensor:
    """Fixed numbers between 1/2 and 3/2, the same for every element."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(like.shape[1], generator=generator, dtype=like.dtype, device="cpu")
    return (numbers + 0.5).to(like.device).expand_as(like)


def _stand_in(solved: Tensor) -> Tensor:
    """For each element itself if it was solved, else the first one that was."""
    own = torch.arange(len(solved), device=solved.device)
    return torch.where(solved, own, solved.int().argmax())


def minimize_differentiably(
    program: NonlinearProgram, start: Tensor, call: NonlinearCall
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Minimise, differentiably, any number of times and in both modes.

    Elements that were not solved are NaN and get zero gradient.

    Returns
    -------
    x : Tensor, shape (batch, n)
    y : Tensor, shape (batch, k + l)
        Multipliers of equalities and inequalities.
    lower, upper : Tensor, shape (batch, n)
        Multipliers of the bounds.
    value : Tensor, shape (batch,)
        Its gradient needs no linear system (DDN eq. 10).
    """
    return apply_function(
        _Minimize, call, start, program.lower, program.upper, *program.parameters
    )[:5]


class _Minimize(torch.autograd.Function):
    @staticmethod
    def forward(
        call: NonlinearCall,
        start: Tensor,  # (starts, batch, n)
        lower: Tensor | None,
        upper: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        program = replace(
            call.program, lower=lower, upper=upper, parameters=parameters, batch=start.shape[1]
        )
        found = call.find(program, start)
        call.solved_program, call.found = program, found
        solved = found.status == int(Status.OPTIMAL)
        point = found.point
        outputs = (point.x, point.y, point.lower, point.upper)
        x, y, low, high = (torch.where(solved[:, None], v, torch.nan) for v in outputs)
        # -1, 0, 1: at the lower bound, free, at the upper bound
        side = found.active.upper.to(x) - found.active.lower.to(x)
        return (
            x,
            y,
            low,
            high,
            torch.where(solved, found.value, torch.nan),
            side,
            (found.active.rows.to(x)),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, _, lower, upper, *parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.has_bounds = (lower is not None, upper is not None)
        ctx.shared_bounds = tuple(v is not None and len(v) == 1 for v in (lower, upper))
        ctx.mark_non_differentiable(output[5], output[6])
        ctx.save_for_backward(*output[:4], *output[5:], *parameters)
        ctx.save_for_forward(*output[:4], *output[5:], *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *over_gradients(partial(_gradients, ctx), grads[:5])

    @staticmethod
    def jvp(ctx: Any, _call: Any, _start: Any, low: Any, high: Any, *changes: Any) -> Any:
        if forward_mode_is_nested():
            raise DerivativeModeError(
                "Forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) does not reach "
                "through torch's custom functions. Use forward over reverse mode: "
                "jacfwd(jacrev(...)), jvp(grad(...))."
            )
        return (*_Node.of(ctx).tangents(low, high, changes), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: NonlinearCall, start: Tensor, *tensors: Any) -> Any:
        batch = start.shape[2 if in_dims[1] == 0 else 1]
        size = info.batch_size
        start = (
            start.expand(size, *start.shape) if in_dims[1] is None else start.movedim(in_dims[1], 0)
        )
        start = start.movedim(0, 1).flatten(1, 2)
        folded = [
            None if v is None else fold(v, dim, size, batch)
            for v, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        outputs = apply_function(_Minimize, call, start, *folded)
        return tuple(v.unflatten(0, (size, batch)) for v in outputs), (0,) * len(outputs)


def _gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """Of the bounds and the parameters."""
    by_p, low, high = _Node.of(ctx).pull_back(*grads)
    of_bounds = (
        None if not has else grad.sum(0, keepdim=True) if shared else grad
        for has, shared, grad in zip(ctx.has_bounds, ctx.shared_bounds, (low, high), strict=True)
    )
    return *of_bounds, *by_p


@dataclass(frozen=True, eq=False)
class _Node:
    """A minimum in the graph; elements that were not solved are replaced, and weigh nothing."""

    call: NonlinearCall
    minimum: Minimum
    bounds: tuple[Tensor, Tensor]  # multipliers
    side: Tensor  # (batch, n): -1, 0, 1
    solved: Tensor  # (batch,)

    @classmethod
    def of(cls, ctx: Any) -> _Node:
        x, y, low, high, side, rows, *parameters = ctx.saved_tensors
        solved = ~torch.isnan(x).any(1)
        place = _stand_in(solved)
        x, y, low, high, side, rows = (v[place] for v in (x, y, low, high, side, rows))
        kept = tuple(v if v.shape[0] == 1 else v[place] for v in parameters)
        x, y, low, high = (torch.where(torch.isnan(v), 0.0, v) for v in (x, y, low, high))
        free = (side == 0).to(rows)
        minimum = Minimum(ctx.call.program, x, y, kept, free, rows)
        return cls(ctx.call, minimum, (low, high), side, solved)

    def _mine(self, grad: Any, like: Tensor) -> Tensor:
        """A gradient, zero where there is none or the element was not solved."""
        if grad is None:
            return torch.zeros_like(like)
        mask = self.solved.view(-1, *[1] * (like.dim() - 1))
        return torch.where(mask, grad, 0.0)

    def pull_back(
        self, gx: Any, gy: Any, glow: Any, ghigh: Any, gvalue: Any
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Gradients of the parameters, lower and upper bounds.

        With q and v from [H q + A'v] = -gx on free variables, A q = -gy on active rows, and q
        given by the gradients of the bounds' multipliers elsewhere, they are q'B + v'C.
        """
        minimum, n = self.minimum, self.minimum.x.shape[1]
        at_low, at_high = (self.side < 0).to(minimum.x), (self.side > 0).to(minimum.x)
        needed = any(grad is not None for grad in (gx, gy, glow, ghigh))
        gx, gy = self._mine(gx, minimum.x), self._mine(gy, minimum.y)
        fixed = at_low * self._mine(glow, minimum.x) - at_high * self._mine(ghigh, minimum.x)
        w = torch.cat([fixed, torch.zeros_like(minimum.y)], 1)
        rhs = -torch.cat([gx, gy], 1)
        if glow is not None or ghigh is not None:
            rhs = rhs - minimum.pull_back(w)[0]
        if needed:  # otherwise the value alone is: DDN eq. 10
            w = w + minimum.solve(rhs, self.call.record)
        value = None if gvalue is None else self._mine(gvalue, minimum.x[:, 0])
        by_xy, by_p = minimum.pull_back(w, value)
        edge = gx + by_xy[:, :n]
        low, high = at_low * edge, at_high * edge
        if value is not None:
            low = low + value[:, None] * self.bounds[0] * at_low
            high = high - value[:, None] * self.bounds[1] * at_high
        by_p = tuple(torch.where(self.solved.any(), g, 0.0) for g in by_p)
        return by_p, low, high

    def tangents(self, low: Any, high: Any, changes: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Changes of x, y, the multipliers of the bounds and the value."""
        minimum, n = self.minimum, self.minimum.x.shape[1]
        at_low, at_high = (self.side < 0).to(minimum.x), (self.side > 0).to(minimum.x)
        edge = at_low * (0.0 if low is None else low) + at_high * (0.0 if high is None else high)
        place = _stand_in(self.solved)
        changes = tuple(d if d is None or len(d) == 1 else d[place] for d in changes)
        forced, value = minimum.push(changes)
        w = torch.cat([edge, torch.zeros_like(minimum.y)], 1)
        moved = minimum.pull_back(w)[0] + forced
        w = w + minimum.solve(-moved)
        slope = (minimum.pull_back(w)[0] + forced)[:, :n]
        if low is not None:
            value = value + (self.bounds[0] * at_low * low).sum(1)
        if high is not None:
            value = value - (self.bounds[1] * at_high * high).sum(1)
        outputs = (w[:, :n], w[:, n:], at_low * slope, -at_high * slope, value)
        return tuple(self._mine(v, v) for v in outputs)
