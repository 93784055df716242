"""What has to be known of torch.func's transforms: the only file that touches their internals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def outside_transforms() -> AbstractContextManager:
    """Context in which new tensors belong to no transform.

    Constants that are kept for later calls are made in it: a tensor made inside a transform
    belongs to that transform and is of no use after it.
    """
    return temporarily_clear_interpreter_stack()


def transforming() -> bool:
    """Whether a transform (vmap, grad, ...) or forward mode is at work."""
    return bool(get_interpreter_stack()) or forward_ad._current_level >= 0


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """Context in which new tensors may take part in derivatives, and nothing is recorded newly.

    Inside of `torch.inference_mode` they may not, although iterations need derivatives.
    """
    if not torch.is_inference_mode_enabled():
        yield
    else:
        with torch.inference_mode(False), torch.no_grad():
            yield


def recording(*values: Any) -> bool:
    """Whether torch takes note of what is done with these values, in any mode or transform."""
    if transforming():
        return True
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in values
    )


def apply_function(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply(*inputs)``, without its bookkeeping where nothing is recorded.

    (Binding the arguments costs torch as much as solving a small linear system, and only
    transforms need it.)
    """
    if transforming():
        return function.apply(*inputs)
    if recording(*inputs):
        return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]
    return function.forward(*inputs)


def over_gradients(backward: Callable[..., Sequence[Any]], grads: Sequence[Any]) -> tuple:
    """``backward(*grads)``, also where many gradients come at once.

    ``torch.autograd.grad(..., is_grads_batched=True)`` hands them over in a vmap of its own, older
    than torch.func's, that does not know many operations; torch.func's takes its place.
    """
    if not are_batched(grads):
        return tuple(backward(*grads))
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    at = [i for i, v in enumerate(grads) if isinstance(v, Tensor) and is_legacy_batchedtensor(v)]
    # (The size is asked for only to expand what has no such dimension.)
    plain = [torch._remove_batch_dim(grads[i], level, 1, 0) for i in at]
    missing: list[bool] = []

    def one(*values: Tensor) -> tuple[Tensor, ...]:
        given = list(grads)
        for i, value in zip(at, values, strict=True):
            given[i] = value
        out = backward(*given)
        missing[:] = [value is None for value in out]
        return tuple(value for value in out if value is not None)

    found = iter(torch.func.vmap(one)(*plain))
    return tuple(None if no else torch._add_batch_dim(next(found), 0, level) for no in missing)


def are_batched(grads: Sequence[Any]) -> bool:
    """Whether one of them stands for many, in the older vmap."""
    return any(isinstance(grad, Tensor) and is_legacy_batchedtensor(grad) for grad in grads)


def followed(value: Tensor) -> bool:
    """Whether a derivative or a vmap follows this tensor: through autograd or any transform."""
    tracked = value.requires_grad or is_batchedtensor(value)
    if not tracked and forward_ad._current_level >= 0:
        tracked = forward_ad.unpack_dual(value).tangent is not None
    if tracked or not is_functorch_wrapped_tensor(value):
        return tracked
    return followed(get_unwrapped(value))


def forward_mode_is_nested() -> bool:
    """Whether forward mode runs over forward mode, which torch.autograd.Function cannot follow."""
    stack = get_interpreter_stack() or []
    return sum(level.key() == TransformType.Jvp for level in stack) > 1


def observed(*values: Tensor) -> tuple[Tensor, ...]:
    """Values, each (batch, ...), as plain tensors: vmapped elements are part of the batch."""
    if not transforming():
        return tuple(value.detach() for value in values)
    seen = _Seen()
    _Observation.apply(seen, *(value.detach() for value in values))
    return seen.values


class _Seen:
    """Where an observation is put (a list would be taken apart by torch.func)."""

    values: tuple[Tensor, ...] = ()


class _Observation(torch.autograd.Function):
    @staticmethod
    def forward(seen: _Seen, *values: Tensor) -> Tensor:
        seen.values = values
        return values[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, seen: _Seen, *values: Tensor) -> Any:
        merged = [
            (v.expand(info.batch_size, *v.shape) if dim is None else v.movedim(dim, 0)).flatten(
                0, 1
            )
            for v, dim in zip(values, in_dims[1:], strict=True)
        ]
        return _Observation.apply(seen, *merged), None
