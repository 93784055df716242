"""Euclidean projection onto the matrices of spectral norm at most a radius."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import DerivativeModeError
from declarative_cvx.nonconvex.implicit.perron_frobenius import ON_BOUNDARY


def project_onto_spectral_ball(A: Tensor, radius: float) -> Tensor:
    """The nearest matrix to A, in the Frobenius norm, with singular values of at most `radius`.

    Those above are clipped. The derivative does not go through singular vectors, so that it is
    right also where singular values repeat or are zero.

    Parameters
    ----------
    A : Tensor, shape (..., m, n)
    radius : float

    Returns
    -------
    Tensor, shape (..., m, n)
        A itself, to the last bit, where its norm is at most `radius`. Differentiable twice.
    """
    return _Clipped.apply(A, radius)[0]


class _Clipped(torch.autograd.Function):
    """The projection, and the singular value decomposition that its derivatives need."""

    @staticmethod
    def forward(A: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        U, values, Vh = torch.linalg.svd(A, full_matrices=False)
        limit = _limit(radius, values)
        clipped = (U * values.clamp(max=radius)[..., None, :]) @ Vh
        inside = (values <= limit).all(-1)[..., None, None]
        return torch.where(inside, A, clipped), U, values, Vh

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        A, ctx.radius = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(A, *output[1:])
        ctx.save_for_forward(A, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        # A projection is the gradient of a convex function: its Jacobian is symmetric.
        return _Derivative.apply(grad, *ctx.saved_tensors, ctx.radius), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Any:  # type: ignore[override]
        return _Derivative.apply(tangent, *ctx.saved_tensors, ctx.radius), None, None, None


class _Derivative(torch.autograd.Function):
    """DP(A)[G], a function of the direction G and of A."""

    @staticmethod
    def forward(
        G: Tensor, A: Tensor, U: Tensor, values: Tensor, Vh: Tensor, radius: float
    ) -> Tensor:
        return _directional(G, U, values, Vh, radius)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.radius = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, H: Tensor) -> Any:  # type: ignore[override]
        G, A, U, values, Vh = ctx.saved_tensors
        by_G, by_A = ctx.needs_input_grad[:2]
        first = _Derivative.apply(H, A, U, values, Vh, ctx.radius) if by_G else None
        second = _SecondDerivative.apply(A, G, H, ctx.radius) if by_A else None
        return first, second, None, None, None, None


class _SecondDerivative(torch.autograd.Function):
    """D^2 P(A)[G, H], of which no derivative is known here."""

    @staticmethod
    def forward(A: Tensor, G: Tensor, H: Tensor, radius: float) -> Tensor:
        return _second_derivative(A, G, H, radius)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise DerivativeModeError(
            "The projection onto a spectral norm ball can be differentiated twice, not three times."
        )


def _limit(radius: float, values: Tensor) -> float:
    """What a singular value may be and count as inside or on the boundary."""
    rounding = ON_BOUNDARY + values.shape[-1] ** 0.5
    return radius * (1 + rounding * torch.finfo(values.dtype).eps)


def _directional(
    G: Tensor, U: Tensor, values: Tensor, Vh: Tensor, radius: float
) -> Tensor:  # (..., m, n)
    """DP(A)[G] = G less the derivative of what is cut off, U diag(max(s - radius, 0)) V'.

    That is a spectral function; the symmetric and the antisymmetric part of U' G V are multiplied
    by divided differences of the cut, seen as an odd function of s (Lewis and Sendov 2005).
    """
    over = values > _limit(radius, values)
    cut = torch.where(over, values - radius, 0.0)
    GV, UG = G @ Vh.mT, U.mT @ G
    core = UG @ Vh.mT
    inner = _ratio(cut, values, -1) * (core + core.mT) / 2
    inner = inner + _ratio(cut, values, 1) * (core - core.mT) / 2
    share = cut / torch.where(over, values, 1.0)
    # Zero for square matrices: what U or V does not span.
    left = (GV - U @ core) * share[..., None, :]
    right = share[..., :, None] * (UG - core @ Vh)
    return G - U @ (inner @ Vh + right) - left @ Vh


def _ratio(cut: Tensor, values: Tensor, sign: int) -> Tensor:
    """(c_i + sign c_j) / (s_i + sign s_j), its limit where that is 0 / 0."""
    above = (cut[..., :, None] + sign * cut[..., None, :]).abs()
    below = (values[..., :, None] + sign * values[..., None, :]).abs()
    ratio = above / torch.where(above > 0, below, 1.0)
    if sign > 0:
        return ratio
    over = cut > 0
    return torch.where(over[..., :, None] & over[..., None, :], 1.0, ratio)


def _second_derivative(A: Tensor, G: Tensor, H: Tensor, radius: float) -> Tensor:
    """D^2 P(A)[G, H].

    With J = [[0, A], [A', 0]], which has eigenvalues s and -s, P(A) is the upper right block of
    (|J + radius I| - |J - radius I|) / 2.
    """
    m = A.shape[-2]
    values, Z = torch.linalg.eigh(_dilate(A))
    g, h = (Z.mT @ _dilate(E) @ Z for E in (G, H))
    kink = _limit(radius, values) - radius
    bent = _bend(values + radius, g, h, kink, 1.0) - _bend(values - radius, g, h, kink, -1.0)
    return (Z @ bent @ Z.mT)[..., :m, m:] / 2


def _bend(k: Tensor, g: Tensor, h: Tensor, kink: float, side: float) -> Tensor:
    """D^2 |K|[g, h] for K = diag(k): from W^2 = K^2, differentiated twice, with W = |K|.

    Of a k up to `kink` only the `side` is known on which it counts.
    """
    k = torch.where(k.abs() <= kink, 0.0, k)
    total = k.abs()[..., :, None] + k.abs()[..., None, :]
    safe = torch.where(total > 0, total, 1.0)
    slope = torch.where(total > 0, (k[..., :, None] + k[..., None, :]) / safe, side)
    dg, dh = slope * g, slope * h
    return torch.where(total > 0, (g @ h + h @ g - dg @ dh - dh @ dg) / safe, 0.0)


def _dilate(E: Tensor) -> Tensor:
    """[[0, E], [E', 0]]."""
    *batch, m, n = E.shape
    out = E.new_zeros((*batch, m + n, m + n))
    out[..., :m, m:] = E
    out[..., m:, :m] = E.mT
    return out
