"""The optimal value of a cone program, whose derivative needs no linear system."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from declarative_cvx.autograd import changes_of_data, refuse_nested_forward_mode, summed
from declarative_cvx.derivative.regularity import data_gradients
from declarative_cvx.kkt import fold
from declarative_cvx.program import ConeProgram, Structure
from declarative_cvx.transforms import apply_function


def objective(program: ConeProgram, x: Tensor, y: Tensor) -> Tensor:
    """1/2 x'P x + q'x at a solution, shape (batch,), differentiable like the solution.

    Its gradient needs no linear system (DDN eq. 10).

    Parameters
    ----------
    program : ConeProgram
    x, y : Tensor, shapes (batch, n) and (batch, m)
        Solution and multipliers; NaN for elements that were not solved, which get zero gradient.
    """
    data = (program.P, program.q, program.A, program.b)
    return apply_function(_Value, *data, x, y, program.structure)


class _Value(torch.autograd.Function):
    """The objective at a solution: it changes like the Lagrangian with x and y fixed."""

    @staticmethod
    def forward(
        P: Tensor, q: Tensor, A: Tensor, b: Tensor, x: Tensor, y: Tensor, structure: Structure
    ) -> Tensor:
        return ConeProgram(structure, P, q, A, b).objective(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.structure = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        *data, x, y = ctx.saved_tensors
        program = ConeProgram(ctx.structure, *data)
        solved = ~torch.isnan(x).any(1, keepdim=True)
        x, y, weight = (torch.where(solved, v, 0.0) for v in (x, y, grad[:, None]))
        wanted = ctx.needs_input_grad[:4]
        P, q, A, b = data_gradients(program, x, y, weight * x, -weight * y, wanted)
        # Half of x x', and y x' once: the map above counts y x' from q and from b.
        P, A = (None if v is None else v / 2 for v in (P, A))
        return *summed((P, q, A, b), program), None, None, None

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> Any:
        refuse_nested_forward_mode()
        *_, x, y = ctx.saved_tensors
        solved = ~torch.isnan(x).any(1, keepdim=True)
        x, y = torch.where(solved, x, 0.0), torch.where(solved, y, 0.0)
        dP, dq, dA, db = changes[:4]
        half = [None if v is None else v / 2 for v in (dP, dA)]
        q, b = changes_of_data(ctx.structure, x, y, (half[0], dq, half[1], db))
        return (q * x).sum(1) - (b * y).sum(1)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, structure = inputs
        q, dim = tensors[1], in_dims[1]
        batch = q.shape[1 if dim == 0 else 0]
        folded = [
            fold(value, dim, info.batch_size, batch)
            for value, dim in zip(tensors, in_dims, strict=False)
        ]
        values = apply_function(_Value, *folded, structure)
        return values.unflatten(0, (info.batch_size, batch)), 0
