"""Arguments of the kernels: of one type, of batch dimensions that broadcast, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError


def prepare(numbers: Mapping[str, Tensor | float]) -> list[Tensor]:
    """Arguments as tensors of one dtype on one device.

    Parameters
    ----------
    numbers : mapping from names to tensors or real numbers; the first is a tensor

    Raises
    ------
    ParameterError
        Naming the argument that is not a float32 or float64 tensor, or on another device.
    """
    first = next(iter(numbers))
    tensors = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    for name, value in numbers.items():
        if name not in tensors and (name == first or not isinstance(value, int | float)):
            raise ParameterError(
                f"{name} is a {type(value).__name__}; expected a torch tensor: pass "
                "torch.as_tensor(value)."
            )
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ParameterError(
                f"{name} has type {tensor.dtype}; expected float32 or float64: pass "
                f"{name}.to(torch.float64)."
            )
        if tensor.device != tensors[first].device:
            raise ParameterError(
                f"{name} is on {tensor.device}, but {first} is on {tensors[first].device}; put "
                "all on one device."
            )
    dtype = torch.float32
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    device = tensors[first].device
    return [torch.as_tensor(v, dtype=dtype, device=device) for v in numbers.values()]


def align(operands: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> list[Tensor]:
    """Give all operands batch dimensions of the same rank, which broadcast.

    Parameters
    ----------
    operands : mapping from names to pairs of a tensor and the shape that its last dimensions
        must have

    Raises
    ------
    ParameterError
        Naming the operand whose shape does not fit.
    """
    batches = []
    for name, (tensor, core) in operands.items():
        shape = tuple(tensor.shape)
        if shape[len(shape) - len(core) :] != core or len(shape) < len(core):
            wanted = ", ".join(["...", *map(str, core)])
            raise ParameterError(f"{name} has shape {shape}; expected ({wanted}).")
        batches.append(shape[: len(shape) - len(core)])
        try:
            torch.broadcast_shapes(*batches)
        except RuntimeError:
            others = ", ".join(f"{o} {b}" for o, b in zip(operands, batches, strict=False))
            raise ParameterError(
                f"The batch dimensions of {name} do not broadcast with the others'. Batch "
                f"dimensions: {others}."
            ) from None
    rank = max(map(len, batches))
    return [
        tensor.reshape((1,) * (rank - len(batch)) + tuple(tensor.shape))
        for (tensor, _), batch in zip(operands.values(), batches, strict=True)
    ]


def require(
    name: str, value: Tensor, holds: Callable[[Tensor], Tensor] = torch.isfinite,
    wording: str = "a finite number",
) -> None:  # fmt: skip
    """Refuse a tensor with an entry that does not hold what is asked of it.

    Raises
    ------
    ParameterError
        Naming the tensor, the entry's index and value, and what was expected.
    """
    _Inspection.apply(value.detach(), name, holds, wording)


class _Inspection(torch.autograd.Function):
    """Looks at values where they can be looked at: also inside vmap."""

    @staticmethod
    def forward(
        value: Tensor, name: str, holds: Callable[[Tensor], Tensor], wording: str
    ) -> Tensor:
        ok = holds(value)
        if not bool(ok.all()):
            index = tuple(torch.nonzero(~ok)[0].tolist())
            # The index is shorter where a whole vector or matrix is at fault.
            found = f" is {float(value[index]):g}; it" if len(index) == value.ndim else ""
            where = f"[{', '.join(map(str, index))}]" if index else ""
            raise ParameterError(f"{name}{where}{found} must be {wording}.")
        return value.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, value: Tensor, *rest: Any) -> Any:
        return _Inspection.apply(value.movedim(in_dims[0], 0), *rest), None


class BatchFunction(torch.autograd.Function):
    """A function of tensors with batch dimensions of the same rank in front: vmap adds one."""

    @classmethod
    def over_batch(cls, in_dims: Any, args: Any) -> Any:
        """The rule that a subclass's `vmap` returns."""
        moved = [
            arg if not isinstance(arg, Tensor)
            else arg.unsqueeze(0) if dim is None
            else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        ]  # fmt: skip
        outputs = cls.apply(*moved)
        return outputs, (0,) * len(outputs) if isinstance(outputs, tuple) else 0
