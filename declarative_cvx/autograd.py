"""Where solving enters torch's automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.cone_solution import ConeSolution
from declarative_cvx.derivative import Derivative
from declarative_cvx.derivative.regularity import (
    DerivativeReport,
    Outputs,
    Solved,
    ambiguous,
    assess,
    data_gradients,
    suspect,
    weakly_active,
)
from declarative_cvx.elimination import (
    extend,
    extend_data_gradients,
    reduce,
    restrict,
    restrict_changes,
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

    def scaled(self) -> tuple[Solved, Tensor | None]:
        """What is solved in units of size one, solved elements only, and their places.

        None stands for all places.
        """
        assert self.program is not None
        assert self.solution is not None
        found, program, at = self.solution, self.program, None
        point = (found.x, found.y, found.s)
        if not found.all_solved:
            at = torch.where(found.solved)[0]
            program, point = program.select(at), (found.x[at], found.y[at], found.s[at])
        scaling, scaled = Scaling.scaled(program)
        return Solved(scaled, scaling.point(*point)), at

    def assess(self) -> DerivativeReport:
        """The report of the last backward pass, or one made by probing."""
        if self.report is None:
            solved, at = self.scaled()
            report = assess(solved, self._residual(at), self.derivative, self.outputs)
            self.report = self._whole(at, report)
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
        place, at = self.scaled()
        assert self.solution is not None
        times = self.solution.status.shape[0] // max(residual.shape[0], 1)
        if times > 1:
            residual, singular = residual.repeat(times), singular.repeat(times)
        residual, singular = _at(residual, at), _at(singular, at)
        found = self._residual(at)
        suspected = suspect(place, found, residual, singular)
        if not bool(suspected.any()):
            weak = several = suspected
        elif self.report is None:
            weak = weakly_active(place, found, self.derivative, self.outputs)
            several = ambiguous(place, singular, self.outputs)
        else:
            weak, several = _at(self.report.weakly_active, at), _at(self.report.ambiguous, at)
        report = DerivativeReport(residual, weak, several)
        self.report = self._whole(at, report)
        if weak is not suspected and not bool(report.regular.all()):
            irregular = torch.where(~report.regular)[0]
            reasons = [report.reason[i] for i in irregular.tolist()]
            places = irregular if at is None else at[irregular]
            complain(places.tolist(), reasons, self.on_irregular)

    def _residual(self, at: Tensor | None) -> Tensor:
        """The largest residuals of some elements' solutions."""
        assert self.solution is not None
        return _at(self.solution.residuals.worst, at)

    def _whole(self, at: Tensor | None, part: DerivativeReport) -> DerivativeReport:
        """A report on the solved elements as one on all."""
        assert self.solution is not None
        if at is None:
            return part
        residual = torch.full_like(self.solution.residuals.primal, torch.nan)
        no = torch.zeros_like(self.solution.solved)
        return DerivativeReport(
            residual.index_copy(0, at, part.residual),
            no.index_copy(0, at, part.weakly_active),
            no.index_copy(0, at, part.ambiguous),
        )


def _at(v: Tensor, at: Tensor | None) -> Tensor:
    return v if at is None else v[at]


def solve_differentiably(program: ConeProgram, call: Call) -> tuple[Tensor, Tensor]:
    """Solve a batch of cone programs, differentiably, any number of times and in both modes.

    Elements that were not solved are NaN and get zero gradient.

    Parameters
    ----------
    program : ConeProgram
    call : Call
        Its `program` and `solution` are set.

    Returns
    -------
    x, y : Tensor
        Of the reduced program (`declarative_cvx.elimination`), shapes (batch, X) and (batch, R).
    """
    data = (program.P, program.q, program.A, program.b)
    x, y, _ = apply_function(_Solve, *data, call)
    if call.program is not None and not recording(*data):
        call.program.forget()  # no backward pass will come
    return x, y


def extend_differentiably(program: ConeProgram, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All variables and multipliers, from what `solve_differentiably` returns."""
    if program.structure.elimination is None:
        return x, y
    lost = torch.isnan(x).any(1, keepdim=True)
    x, y = torch.where(lost, 0.0, x), torch.where(lost, 0.0, y)
    x, y, _ = extend(program, (x, y, y))
    return torch.where(lost, torch.nan, x), torch.where(lost, torch.nan, y)


def summed(grads: Sequence[Any], program: ConeProgram) -> tuple[Any, ...]:
    """Gradients per element as those of data that all elements may share."""
    shared = (program.P, program.q, program.A, program.b)
    return tuple(
        grad if grad is None or grad.shape[0] == v.shape[0] else grad.sum(0, keepdim=True)
        for grad, v in zip(grads, shared, strict=True)
    )


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        P: Tensor, q: Tensor, A: Tensor, b: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        program = ConeProgram(call.structure, P, q, A, b).detach()
        call.program, call.solution = program, call.solver(program)
        found = call.solution
        x, y, s = restrict(program, (found.x, found.y, found.s))
        if found.all_solved:
            return x.clone(), y.clone(), s.clone()
        solved = found.solved[:, None]
        x, y, s = (torch.where(solved, v, torch.nan) for v in (x, y, s))
        return x, y, s

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *data, ctx.call = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*data, *output)
        ctx.save_for_forward(*data, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * 5
        node = _Node.of(ctx)
        found = node.gradients(grads, ctx.needs_input_grad[:4])
        return *summed(found, node.program), None

    @staticmethod
    def jvp(ctx: Any, dP: Any, dq: Any, dA: Any, db: Any, _: Any) -> Any:
        refuse_nested_forward_mode()
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
        return tuple(v.unflatten(0, (info.batch_size, batch)) for v in outputs), (0, 0, 0)


def refuse_nested_forward_mode() -> None:
    """Forward mode over forward mode: torch drops terms of custom functions without a word."""
    if forward_mode_is_nested():
        raise DerivativeModeError(
            "Forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) does not reach through "
            "torch's custom functions. Use forward over reverse mode: jacfwd(jacrev(...)), "
            "jvp(grad(...))."
        )


@dataclass(frozen=True, eq=False)
class _Node:
    """A solved program in the graph, and the point of the reduced one.

    Elements that were not solved are zero.
    """

    call: Call
    program: ConeProgram
    point: Point
    solved: Tensor | None  # (batch,); None if all are

    @classmethod
    def of(cls, ctx: Any) -> _Node:
        P, q, A, b, *point = ctx.saved_tensors
        program = ConeProgram(ctx.call.structure, P, q, A, b)
        found = ctx.call.solution
        if not transforming() and found is not None and found.all_solved:
            return cls(ctx.call, program, tuple(point), None)
        solved = ~torch.isnan(point[0]).any(1)
        x, y, s = (torch.where(solved[:, None], v, 0.0) for v in point)
        return cls(ctx.call, program, (x, y, s), solved)

    def scaled(self) -> tuple[Scaling, ConeProgram]:
        """Units, and the program in them: that of the forward pass if nothing is recorded."""
        if self._is_recorded:
            scaling = Scaling.units(self.program.detach())
            return scaling, scaling.apply(self.program)
        assert self.call.program is not None
        return Scaling.scaled(self.call.program)

    @property
    def _is_recorded(self) -> bool:
        program = self.program
        return recording(program.P, program.q, program.A, program.b)

    def whole(self) -> tuple[Tensor, Tensor]:
        """X and y of the whole program."""
        found = self.call.solution
        if self.solved is None and found is not None and not self._is_recorded:
            return found.x, found.y
        return extend(self.program, self.point)[:2]

    def masked(self, v: Tensor) -> Tensor:
        """Zero in elements that were not solved."""
        return v if self.solved is None else torch.where(self.solved[:, None], v, 0.0)

    def gradients(self, upstream: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
        """Gradients of P, q, A, b, per element, for gradients of x, y and s."""
        q, b = self._adjoint(upstream)
        x, y = self.whole()
        if self.call.program is not None:
            self.call.program.forget()  # what was kept for this pass
        return data_gradients(self.program, x, y, q, b, wanted)

    def _adjoint(self, upstream: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Gradients of q and b for those of x, y and s."""
        grads = tuple(
            torch.zeros_like(v) if grad is None else self.masked(grad)
            for grad, v in zip(upstream, self.point, strict=True)
        )
        scaling, program = self.scaled()
        adjoint = self.call.derivative.adjoint(
            reduce(program), scaling.point(*self.point), scaling.restore(*grads)
        )
        residual, singular = adjoint.residual.detach(), adjoint.singular
        if singular is None:
            singular = torch.ones_like(residual, dtype=torch.bool)
        if transforming():
            _Record.apply(residual, singular, self.call)
        else:
            self.call.record(residual, singular)
        return scaling.data(*extend_data_gradients(program, adjoint.q, adjoint.b))

    def tangents(self, dP: Any, dq: Any, dA: Any, db: Any) -> tuple[Tensor, ...]:
        """Changes of x, y and s for changes of P, q, A and b."""
        q, b = changes_of_data(self.program.structure, *self.whole(), (dP, dq, dA, db))
        scaling, program = self.scaled()
        changes = restrict_changes(program, *scaling.data(self.masked(q), self.masked(b)))
        change = self.call.derivative.tangent(reduce(program), scaling.point(*self.point), *changes)
        return scaling.restore(*change)


def changes_of_data(
    structure: Structure, x: Tensor, y: Tensor, changes: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """The changes of q and b that changes of P, q, A and b (None: no change) act like."""
    dP, dq, dA, db = changes
    q = torch.zeros_like(x) if dq is None else dq
    b = torch.zeros_like(y) if db is None else db
    if dP is not None:
        q = q + matvec(dP, structure.P, x)
    if dA is not None:
        q = q + matvec(dA, structure.A, y, transpose=True)
        b = b - matvec(dA, structure.A, x)
    return q, b


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
        return _Record.apply(residual, singular, call), None
