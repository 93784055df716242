"""The one place where solving enters torch's automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.derivative import Derivative
from declarative_cvx.errors import IrregularWarning
from declarative_cvx.program import ConeProgram, Structure
from declarative_cvx.scaling import Scaling
from declarative_cvx.solution import ConeSolution

# Relative residual of the adjoint system above which an element's gradient is called irregular.
REGULAR = 1e-6


@dataclass(eq=False)
class Call:
    """One call of the layer: what to solve with, what to differentiate with, what was found.

    Attributes
    ----------
    structure : Structure
    solver : callable
        From `ConeProgram` to `ConeSolution`.
    derivative : Derivative
    solution : ConeSolution
        Set by the forward pass.
    """

    structure: Structure
    solver: Callable[[ConeProgram], ConeSolution]
    derivative: Derivative
    solution: ConeSolution = field(init=False)


def solve_differentiably(program: ConeProgram, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a batch of cone programs, differentiably.

    Elements that were not solved are NaN and get zero gradient.

    Parameters
    ----------
    program : ConeProgram
    call : Call
        Its `solution` is set.

    Returns
    -------
    x : Tensor, shape (batch, n)
    y : Tensor, shape (batch, m)
    objective : Tensor, shape (batch,)
        1/2 x'P x + q'x at the solution. Its gradient needs no linear system (DDN eq. 10).
    """
    x, y, objective, _ = _Solve.apply(program.P, program.q, program.A, program.b, call)
    return x, y, objective


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        P: Tensor, q: Tensor, A: Tensor, b: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        program = ConeProgram(call.structure, P, q, A, b)
        call.solution = call.solver(program)
        solved = call.solution.solved[:, None]
        x, y, s = (
            torch.where(solved, v, torch.nan)
            for v in (call.solution.x, call.solution.y, call.solution.s)
        )
        return x, y, program.objective(x), s

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        *data, call = inputs
        x, y, _, s = output
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*data, x, y, s)

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_y: Any, grad_objective: Any, grad_s: Any) -> Any:
        P, q, A, b, *point = ctx.saved_tensors
        program = ConeProgram(ctx.call.structure, P, q, A, b)
        solved = ctx.call.solution.solved
        x, y, s = (torch.where(solved[:, None], v, 0.0) for v in point)
        grads = _Gradients(program, x, y)
        if any(grad is not None for grad in (grad_x, grad_y, grad_s)):
            upstream = [
                torch.zeros_like(v) if grad is None else torch.where(solved[:, None], grad, 0.0)
                for grad, v in ((grad_x, x), (grad_y, y), (grad_s, s))
            ]
            grads.add_implicit(ctx.call.derivative, (x, y, s), tuple(upstream), solved)
        if grad_objective is not None:
            grads.add_envelope(torch.where(solved, grad_objective, 0.0))
        return *grads.total, None


class _Gradients:
    """Gradients with respect to P, q, A and b, summed from their sources."""

    def __init__(self, program: ConeProgram, x: Tensor, y: Tensor) -> None:
        self.program, self.x, self.y = program, x, y
        self.total: list[Tensor | None] = [None, None, None, None]

    def add_implicit(
        self, derivative: Derivative, point: Any, upstream: Any, solved: Tensor
    ) -> None:
        """Through the solution: d(P x + q + A'y) and d(A x - b) act like dq and -db."""
        part, at = self.program, None
        if not solved.all():
            at = torch.where(solved)[0]
            part = part.select(at)
            point = tuple(v[at] for v in point)
            upstream = tuple(v[at] for v in upstream)
        scaling = Scaling.of(part.detach())
        adjoint = derivative.adjoint(
            scaling.apply(part), scaling.point(*point), scaling.gradients(*upstream)
        )
        _report(adjoint.residual.detach(), at)
        q, b = scaling.restore_gradients(adjoint.q, adjoint.b)
        if at is not None:
            q = torch.zeros_like(self.x).index_copy(0, at, q)
            b = torch.zeros_like(self.y).index_copy(0, at, b)
        rows, cols = self.program.structure.A.index(q.device)
        P_rows, P_cols = self.program.structure.P.index(q.device)
        self._add(
            q[:, P_rows] * self.x[:, P_cols],
            q,
            self.y[:, rows] * q[:, cols] - b[:, rows] * self.x[:, cols],
            b,
        )

    def add_envelope(self, grad: Tensor) -> None:
        """Through the optimal value: the gradient of the Lagrangian (DDN eq. 10)."""
        x, y, weight = self.x, self.y, grad[:, None]
        rows, cols = self.program.structure.A.index(x.device)
        P_rows, P_cols = self.program.structure.P.index(x.device)
        self._add(
            weight * x[:, P_rows] * x[:, P_cols] / 2,
            weight * x,
            weight * y[:, rows] * x[:, cols],
            -weight * y,
        )

    def _add(self, *grads: Tensor) -> None:
        """Add, summing over the batch where the elements share values."""
        for position, shared in enumerate((self.program.P, None, self.program.A, None)):
            grad = grads[position]
            if shared is not None and shared.shape[0] == 1:
                grad = grad.sum(0, keepdim=True)
            known = self.total[position]
            self.total[position] = grad if known is None else known + grad


def _report(residual: Tensor, elements: Tensor | None) -> None:
    """Warn of elements whose adjoint system has no solution."""
    irregular = torch.where(~(residual <= REGULAR))[0]
    if not len(irregular):
        return
    worst = float(residual[irregular].max())
    names = (irregular if elements is None else elements[irregular]).tolist()
    listed = ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")
    warnings.warn(
        f"The solution map has no derivative at {len(names)} element(s) of the batch ({listed}): "
        f"the adjoint system is solved only to a relative residual of {worst:.1e}. The "
        "least-squares gradient is returned. Typical causes: a constraint that is active with a "
        "zero multiplier, or a solution that is not unique.",
        IrregularWarning,
        stacklevel=2,
    )
