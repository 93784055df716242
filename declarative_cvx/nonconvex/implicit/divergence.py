"""The Fenchel divergence of an activation: how far x is from phi(z) (IDL 4.1, eqs. 7 and 8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.implicit.activations import (
    Activation,
    ActivationLike,
    as_activation,
)


def fenchel_divergence(activation: ActivationLike, x: Tensor, z: Tensor) -> Tensor:
    """F(x, z) = Psi*(x) + Psi(z) - x z, elementwise, for the potential Psi with Psi' = phi.

    F is convex in x and in z, never negative, and zero exactly where x = phi(z). Its derivatives
    are (Psi*)'(x) - z and phi(z) - x.

    Parameters
    ----------
    activation : Activation or its name
    x, z : Tensor, shapes that broadcast
        Numbers of one floating type.

    Returns
    -------
    Tensor
        +inf where x is outside the activation's domain. Differentiable twice, and right where
        F is next to nothing: derivatives are not those of a difference of large numbers. At the
        ends of the domain of tanh and sigmoid the derivative in x is infinite, outside it is NaN.

    Raises
    ------
    ParameterError
        If the tensors do not go together.
    SpecificationError
        If the activation has no elementwise potential.

    Examples
    --------
    >>> z = torch.tensor([-1.0, 2.0])
    >>> fenchel_divergence("relu", torch.tensor([0.0, 1.0]), z)
    tensor([0.0000, 0.5000])
    """
    if not x.is_floating_point() or x.dtype != z.dtype:
        raise ParameterError(
            f"x has type {x.dtype} and z has type {z.dtype}; expected one floating type for both."
        )
    try:
        x, z = torch.broadcast_tensors(x, z)
    except RuntimeError:
        raise ParameterError(
            f"x has shape {tuple(x.shape)}, which does not broadcast with {tuple(z.shape)}, the "
            "shape of z."
        ) from None
    return _Divergence.apply(as_activation(activation), x, z)


class _Divergence(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(activation: Activation, x: Tensor, z: Tensor) -> Tensor:
        return activation.divergence(x, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.activation, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, z = ctx.saved_tensors
        _, by_x, by_z = ctx.needs_input_grad
        return (
            None,
            grad * (ctx.activation.inverse(x) - z) if by_x else None,
            grad * (ctx.activation(z) - x) if by_z else None,
        )

    @staticmethod
    def jvp(ctx: Any, _: None, dx: Tensor | None, dz: Tensor | None) -> Tensor:  # type: ignore[override]
        x, z = ctx.saved_tensors
        moved = torch.zeros_like(x)
        if dx is not None:
            moved = moved + dx * (ctx.activation.inverse(x) - z)
        return moved if dz is None else moved + dz * (ctx.activation(z) - x)
