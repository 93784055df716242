"""The one place where solving enters torch's automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.cone_solution import ConeSolution
from declarative_cvx.derivative import Derivative
from declarative_cvx.derivative.regularity import (
    DerivativeReport,
    Outputs,
    ambiguous,
    assess,
    data_gradients,
    weakly_active,
)
from declarative_cvx.errors import DerivativeModeError
from declarative_cvx.irregular import complain
from declarative_cvx.kkt import fold
from declarative_cvx.program import ConeProgram, Point, Structure
from declarative_cvx.scaling import Scaling
from declarative_cvx.sparsity import matvec
from declarative_cvx.transforms import (
    apply_function,
    forward_mode_is_nested,
    recording,
    transforming,
)


@dataclass(eq=False)
class Call:
    """One call of the layer: what to solve with, what to differentiate with, what was found.

    Attributes
    ----------
    structure : Structure
    solver : callable
        From `ConeProgram` to `ConeSolution`.
    derivative : Derivative
    outputs : Outputs
    on_irregular : {"warn", "ignore", "raise"}
    program : ConeProgram or None
    solution : ConeSolution or None
        Set by the forward pass.
    report : DerivativeReport or None
        Set by the first backward pass, or when it is asked for.
    """

    structure: Structure
    solver: Callable[[ConeProgram], ConeSolution]
    derivative: Derivative
    outputs: Outputs
    on_irregular: str
    program: ConeProgram | None = None
    solution: ConeSolution | None = None
    report: DerivativeReport | None = None

    def scaled(self) -> tuple[ConeProgram, Point, Tensor]:
        """Program and point in units of size one, solved elements only, and their places."""
        assert self.program is not None
        assert self.solution is not None
        found, program = self.solution, self.program
        point = (found.x, found.y, found.s)
        at = torch.where(found.solved)[0]
        if len(at) < len(found.solved):
            program, point = program.select(at), (found.x[at], found.y[at], found.s[at])
        scaling, scaled = Scaling.scaled(program)
        return scaled, scaling.point(*point), at

    def assess(self) -> DerivativeReport:
        """The report of the last backward pass, or one made by probing."""
        if self.report is None:
            program, point, at = self.scaled()
            self.report = self._whole(at, assess(program, point, self.derivative, self.outputs))
        return self.report

    def record(self, residual: Tensor, singular: Tensor) -> None:
        """Take note of a backward pass, and complain of irregular elements.

        Parameters
        ----------
        residual : Tensor, shape (batch,)
            From inside vmap, whose dimension is part of the batch, the worst of several elements
            for each of them.
        singular : Tensor of bool, shape (batch,)
            Likewise.
        """
        program, point, at = self.scaled()
        assert self.solution is not None
        times = len(self.solution.solved) // max(len(residual), 1)
        if times > 1 or len(at) < len(residual):
            residual, singular = residual.repeat(times)[at], singular.repeat(times)[at]
        if self.report is None:
            weak = weakly_active(program, point, self.derivative, self.outputs)
            several = ambiguous(program, point, singular, self.outputs)
        else:
            weak, several = self.report.weakly_active[at], self.report.ambiguous[at]
        report = DerivativeReport(residual, weak, several)
        self.report = self._whole(at, report)
        if not bool(report.regular.all()):
            irregular = torch.where(~report.regular)[0]
            reasons = [report.reason[i] for i in irregular.tolist()]
            complain(at[irregular].tolist(), reasons, self.on_irregular)

    def _whole(self, at: Tensor, part: DerivativeReport) -> DerivativeReport:
        """A report on the solved elements as one on all."""
        assert self.solution is not None
        if len(at) == len(self.solution.solved):
            return part
        residual = torch.full_like(self.solution.residuals.primal, torch.nan)
        no = torch.zeros_like(self.solution.solved)
        return DerivativeReport(
            residual.index_copy(0, at, part.residual),
            no.index_copy(0, at, part.weakly_active),
            no.index_copy(0, at, part.ambiguous),
        )


def solve_differentiably(program: ConeProgram, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a batch of cone programs, differentiably, any number of times and in both modes.

    Elements that were not solved are NaN and get zero gradient.

    Parameters
    ----------
    program : ConeProgram
    call : Call
        Its `program` and `solution` are set.

    Returns
    -------
    x : Tensor, shape (batch, n)
    y : Tensor, shape (batch, m)
    objective : Tensor, shape (batch,)
        1/2 x'P x + q'x at the solution. Its gradient needs no linear system (DDN eq. 10).
    """
    x, y, objective, _ = apply_function(_Solve, program.P, program.q, program.A, program.b, call)
    if call.program is not None and not recording(program.P, program.q, program.A, program.b):
        call.program.forget()  # no backward pass will come
    return x, y, objective


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        P: Tensor, q: Tensor, A: Tensor, b: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        program = ConeProgram(call.structure, P, q, A, b).detach()
        call.program, call.solution = program, call.solver(program)
        found = call.solution
        if bool(found.solved.all()):
            x, y, s = found.x.clone(), found.y.clone(), found.s.clone()
        else:
            solved = found.solved[:, None]
            x, y, s = (torch.where(solved, v, torch.nan) for v in (found.x, found.y, found.s))
        return x, y, program.objective(x), s

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *data, ctx.call = inputs
        x, y, _, s = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*data, x, y, s)
        ctx.save_for_forward(*data, x, y, s)

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_y: Any, grad_objective: Any, grad_s: Any) -> Any:
        node = _Node.of(ctx)
        total: list[Tensor | None] = [None] * 4
        if any(grad is not None for grad in (grad_x, grad_y, grad_s)):
            total = _add(total, node.through_solution((grad_x, grad_y, grad_s)))
        if grad_objective is not None:
            total = _add(total, node.through_value(grad_objective))
        shared = (node.program.P, node.program.q, node.program.A, node.program.b)
        return *(
            None if grad is None else grad if len(grad) == len(v) else grad.sum(0, keepdim=True)
            for grad, v in zip(total, shared, strict=True)
        ), None

    @staticmethod
    def jvp(ctx: Any, dP: Any, dq: Any, dA: Any, db: Any, _: Any) -> Any:
        _refuse_nested_forward_mode()
        return _Node.of(ctx).tangents(dP, dq, dA, db)

    @staticmethod
    def vmap(info: Any, in_dims: Any, P: Any, q: Any, A: Any, b: Any, call: Call) -> Any:
        batch = q.shape[1 if in_dims[1] == 0 else 0]
        folded = [
            fold(value, dim, info.batch_size, batch)
            for value, dim in zip((P, q, A, b), in_dims[:4], strict=True)
        ]
        inner = replace(call)
        outputs = apply_function(_Solve, *folded, inner)
        call.program, call.solution = inner.program, inner.solution
        return tuple(v.unflatten(0, (info.batch_size, batch)) for v in outputs), (0, 0, 0, 0)


def _refuse_nested_forward_mode() -> None:
    """Forward mode over forward mode: torch drops terms of custom functions without a word."""
    if forward_mode_is_nested():
        raise DerivativeModeError(
            "Forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) does not reach through "
            "torch's custom functions. Use forward over reverse mode: jacfwd(jacrev(...)), "
            "jvp(grad(...))."
        )


def _add(total: list[Tensor | None], grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [new if old is None else old + new for old, new in zip(total, grads, strict=True)]


@dataclass(frozen=True, eq=False)
class _Node:
    """A solved program in the graph; elements that were not solved are zero."""

    call: Call
    program: ConeProgram
    point: Point
    solved: Tensor  # (batch,)

    @classmethod
    def of(cls, ctx: Any) -> _Node:
        P, q, A, b, *point = ctx.saved_tensors
        program = ConeProgram(ctx.call.structure, P, q, A, b)
        solved = ~torch.isnan(point[0]).any(1)
        if not transforming() and bool(solved.all()):
            return cls(ctx.call, program, tuple(point), solved)
        x, y, s = (torch.where(solved[:, None], v, 0.0) for v in point)
        return cls(ctx.call, program, (x, y, s), solved)

    def scaled(self) -> tuple[Scaling, ConeProgram]:
        """Units, and the program in them: that of the forward pass if nothing is recorded."""
        program = self.program
        if recording(program.P, program.q, program.A, program.b):
            scaling = Scaling.units(program.detach())
            return scaling, scaling.apply(program)
        assert self.call.program is not None
        return Scaling.scaled(self.call.program)

    def through_solution(self, upstream: tuple[Any, Any, Any]) -> tuple[Tensor, ...]:
        """Gradients of P, q, A, b for gradients of x, y and s."""
        x, y, _ = self.point
        q, b = self._adjoint(upstream)
        if self.call.program is not None:
            self.call.program.forget()  # what was kept for this pass
        return data_gradients(self.program, x, y, q, b)

    def _adjoint(self, upstream: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
        """Gradients of q and b for those of x, y and s."""
        grads = tuple(
            torch.zeros_like(v) if grad is None else torch.where(self.solved[:, None], grad, 0.0)
            for grad, v in zip(upstream, self.point, strict=True)
        )
        scaling, program = self.scaled()
        adjoint = self.call.derivative.adjoint(
            program, scaling.point(*self.point), scaling.restore(*grads)
        )
        residual, singular = adjoint.residual.detach(), adjoint.singular
        singular = torch.ones_like(self.solved) if singular is None else singular
        apply_function(_Record, residual, singular, self.call)
        return scaling.data(adjoint.q, adjoint.b)

    def through_value(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of P, q, A, b for that of the value: those of the Lagrangian (DDN eq. 10)."""
        x, y, _ = self.point
        weight = torch.where(self.solved, grad, 0.0)[:, None]
        P, q, A, b = data_gradients(self.program, x, y, weight * x, -weight * y)
        # Half of x x', and y x' once: the map above counts y x' from q and from b.
        return P / 2, q, A / 2, b

    def tangents(self, dP: Any, dq: Any, dA: Any, db: Any) -> tuple[Tensor, ...]:
        """Changes of x, y, the value and s for changes of P, q, A and b."""
        x, y, _ = self.point
        structure = self.program.structure
        q_change = torch.zeros_like(x) if dq is None else dq
        b_change = torch.zeros_like(y) if db is None else db
        value = (q_change * x).sum(1) - (b_change * y).sum(1)
        if dP is not None:
            moved = matvec(dP, structure.P, x)
            q_change, value = q_change + moved, value + (moved * x).sum(1) / 2
        if dA is not None:
            moved = matvec(dA, structure.A, x)
            q_change = q_change + matvec(dA, structure.A, y, transpose=True)
            b_change, value = b_change - moved, value + (moved * y).sum(1)
        scaling, program = self.scaled()
        mask = self.solved[:, None]
        change = self.call.derivative.tangent(
            program,
            scaling.point(*self.point),
            *scaling.data(torch.where(mask, q_change, 0.0), torch.where(mask, b_change, 0.0)),
        )
        dx, dy, ds = scaling.restore(*change)
        return dx, dy, value, ds


class _Record(torch.autograd.Function):
    """Shows a residual to the call, also from inside vmap."""

    @staticmethod
    def forward(residual: Tensor, singular: Tensor, call: Call) -> Tensor:
        call.record(residual, singular)
        return residual.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, residual: Tensor, singular: Tensor, call: Call) -> Any:
        if in_dims[0] is not None:
            residual = residual.movedim(in_dims[0], 0).amax(0)
        if in_dims[1] is not None:
            singular = singular.movedim(in_dims[1], 0).any(0)
        return apply_function(_Record, residual, singular, call), None
