"""Functions of one element, over a batch in which some arguments are shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def over_batch(function: Callable[..., Any], arguments: Sequence[Tensor], batch: int) -> Any:
    """Apply a function of one element's arguments to a batch.

    Parameters
    ----------
    function : callable
    arguments : sequence of Tensor
        Each (batch or 1, ...): a value for every element, or one that all share.
    batch : int

    Returns
    -------
    Tensor or tuple of Tensor
        Each (batch, ...).
    """
    if not arguments:
        one = function()
        many = [v.expand(batch, *v.shape) for v in (one if isinstance(one, tuple) else (one,))]
        return tuple(many) if isinstance(one, tuple) else many[0]
    values = [value.expand(batch, *value.shape[1:]) for value in arguments]
    return torch.func.vmap(function)(*values)
