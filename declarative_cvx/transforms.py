"""What has to be known of torch.func's transforms: the only file that touches their internals."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def outside_transforms() -> AbstractContextManager:
    """Context in which new tensors belong to no transform.

    Constants that are kept for later calls are made in it: a tensor made inside a transform
    belongs to that transform and is of no use after it.
    """
    return temporarily_clear_interpreter_stack()


def forward_mode_is_nested() -> bool:
    """Whether forward mode runs over forward mode, which torch.autograd.Function cannot follow."""
    stack = get_interpreter_stack() or []
    return sum(level.key() == TransformType.Jvp for level in stack) > 1
