"""Complaining of elements where a gradient was asked for that does not exist."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import IrregularError, IrregularWarning

# Packages whose frames a warning does not point at.
_OURS = ("declarative_cvx", "torch")


def complain(elements: Sequence[int], reasons: Sequence[str], on_irregular: str) -> None:
    """Warn of elements without a derivative, or raise.

    Parameters
    ----------
    elements : sequence of int
    reasons : sequence of str
        Why, for each of them.
    on_irregular : {"warn", "ignore", "raise"}

    Raises
    ------
    IrregularError
        If asked for.
    """
    if on_irregular == "ignore" or not elements:
        return
    listed = ", ".join(map(str, elements[:10])) + (", ..." if len(elements) > 10 else "")
    text = (
        f"The solution map has no derivative at {len(elements)} element(s) of the batch "
        f"({listed}): {'; or '.join(dict.fromkeys(reasons))}. See layer.solve(...).derivative; "
        'on_irregular="ignore" silences this, "raise" makes it an error.'
    )
    if on_irregular == "raise":
        raise IrregularError(text)
    warnings.warn(text, IrregularWarning, stacklevel=level_of_caller())


def level_of_caller() -> int:
    """The stack level, seen from the calling function, of the code that uses torch and this."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame, level = frame.f_back, level + 1
    return level


class Watched(torch.autograd.Function):
    """A value, unchanged, whose gradient at irregular elements draws a complaint."""

    @staticmethod
    def forward(value: Tensor, irregular: Tensor, reason: str, on_irregular: str) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.irregular, ctx.reason, ctx.on_irregular = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        elements = torch.nonzero(ctx.irregular)[:, 0].tolist()
        complain(elements, [ctx.reason] * len(elements), ctx.on_irregular)
        return grad, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: Any, value: Tensor, irregular: Tensor, *rest: Any) -> Any:
        if in_dims[0] is None:
            value = value.expand(info.batch_size, *value.shape)
        else:
            value = value.movedim(in_dims[0], 0)
        if in_dims[1] is not None:
            irregular = irregular.movedim(in_dims[1], 0).any(0)
        return Watched.apply(value, irregular, *rest), 0
