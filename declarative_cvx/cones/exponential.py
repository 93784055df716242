r"""Projection onto the exponential cone and its derivative.

The cone is, in the convention of CVXPY and SCS,

.. math:: K = \operatorname{cl}\{(x, y, z) : y > 0,\ y e^{x/y} \le z\}.

Its curved boundary is swept by the rays :math:`a(\rho) = (\rho, 1, e^\rho)`, and that of its
polar cone by :math:`b(\rho) = (1, 1 - \rho, -e^{-\rho})`, orthogonal to :math:`a(\rho)` and to
:math:`a'(\rho)`.  A point which projects to the curved boundary is, for exactly one
:math:`\rho`,

.. math:: v = s\,a(\rho) + t\,b(\rho), \qquad s, t > 0,

and its projection is :math:`s\,a(\rho)`.  That leaves one equation in one unknown [1]_.  With
:math:`c = b \times a` the differential of the decomposition gives

.. math::

    D\Pi(v) = \hat a \hat a^T + \theta\,\hat c \hat c^T, \qquad
    \theta = \frac{s\,a'\!\cdot c}{s\,a'\!\cdot c + t\,b'\!\cdot c} \in (0, 1), \qquad
    d\rho = \frac{c \cdot dv}{s\,a'\!\cdot c + t\,b'\!\cdot c},

where every term of both denominators is positive, so nothing cancels.  All vectors are scaled by
a power of :math:`e^{-|\rho|}`, so nothing overflows.

References
----------
.. [1] H. A. Friberg, "Projection onto the exponential cone: a univariate root-finding problem",
   Optimization Methods and Software 38 (2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["derivative", "project"]

_ITERATIONS = 14
_POLISHING_STEPS = 2
# Beyond these the neglected parts are far below the rounding of a point of unit size.
_LARGEST_START = 1e40
_LONGEST_SEARCH = 800.0


class _Pieces(NamedTuple):
    """Which piece of the projection holds at each point (shapes ``(...)``)."""

    scale: Tensor
    """Largest absolute entry, 1 for the zero vector."""
    in_cone: Tensor
    in_polar: Tensor
    on_face: Tensor
    """The projection is ``(x, 0, max(z, 0))``."""
    curved: Tensor
    """The projection lies on the curved boundary."""


class _Frame(NamedTuple):
    """The decomposition of a point along the orthogonal vectors a, b, c, all suitably scaled."""

    ray: Tensor
    """Parallel to a, shape ``(..., 3)``."""
    tangent: Tensor
    """Parallel to c, shape ``(..., 3)``."""
    numerator: Tensor
    """``s a'.c`` in the scaling of ``tangent``."""
    denominator: Tensor
    """``s a'.c + t b'.c`` in the scaling of ``tangent``."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _pieces(v: Tensor) -> _Pieces:
    size = v.abs().amax(-1)
    scale = torch.where(size > 0, size, torch.ones_like(size))
    x, y, z = (v / scale.unsqueeze(-1)).unbind(-1)
    one = torch.ones_like(x)
    safe_x, safe_y = torch.where(x > 0, x, one), torch.where(y > 0, y, one)
    in_cone = ((y > 0) & (y * torch.exp(x / safe_y) <= z)) | ((x <= 0) & (y == 0) & (z >= 0))
    in_polar = ((x > 0) & (x * torch.exp(y / safe_x - 1) <= -z)) | ((x == 0) & (y <= 0) & (z <= 0))
    in_polar = in_polar & ~in_cone
    on_face = (x <= 0) & (y <= 0) & ~in_cone & ~in_polar
    return _Pieces(scale, in_cone, in_polar, on_face, ~(in_cone | in_polar | on_face))


def _curved_point(v: Tensor, pieces: _Pieces) -> Tensor:
    """Points scaled to unit size; where the curved piece does not hold, a harmless point of it."""
    harmless = torch.cumsum(torch.ones_like(v), -1) % 3  # (1, 2, 0), which is a(0) + b(0)
    return torch.where(pieces.curved.unsqueeze(-1), v / pieces.scale.unsqueeze(-1), harmless)


def _frame(v: Tensor, rho: Tensor) -> _Frame:
    positive = rho >= 0
    # torch.abs has derivative 0 at 0, which would be wrong here.
    e = torch.exp(torch.where(positive, -rho, rho))
    one, gap = torch.ones_like(e), rho * rho - rho + 1
    outer, inner = torch.where(positive, e, one), torch.where(positive, one, e)
    ray = torch.stack((rho * outer, outer, inner), -1)
    normal = torch.stack((inner, (1 - rho) * inner, -outer), -1)
    tangent = torch.stack(
        (
            outer * outer + (1 - rho) * inner * inner,
            -(inner * inner + rho * outer * outer),
            gap * e,
        ),
        -1,
    )
    along_ray = (_dot(v, ray) / _dot(ray, ray)).clamp(min=0)
    along_normal = (_dot(v, normal) / _dot(normal, normal)).clamp(min=0)
    numerator = along_ray * outer * (outer * outer + inner * inner * ((rho - 1) ** 2 + 1))
    remainder = along_normal * inner * (inner * inner + outer * outer * (rho * rho + 1))
    return _Frame(ray, tangent, numerator, numerator + remainder)


def _solve(v: Tensor) -> Tensor:
    """Parameter rho of points that project to the curved boundary (no derivative).

    With r = abs(rho), and S the coefficient of the ray that grows like exp(r), the equation for
    either sign of rho is S exp(r) - T exp(-r) = Z, where S D = S0 + S1 r, T D = T0 - T1 r and
    D = r^2 -+ r + 1.  The unknown is the distance of r to the left end of its interval.
    """
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    positive = (x > 0) & ((y < x) | (y - 2 * x - z < 0))
    sign = torch.where(positive, 1.0, -1.0).to(v.dtype)
    s0, t0 = torch.where(positive, y - x, x), torch.where(positive, x, y - x)
    s1, t1 = torch.where(positive, x, y), torch.where(positive, y, x)
    level = sign * z
    start = (-s0 / s1).clamp(0.0, _LARGEST_START)
    offset = (s0 / s1).clamp(0.0, torch.finfo(v.dtype).max)
    lower = zero
    safe_t1 = torch.where(t1 > 0, t1, torch.ones_like(t1))
    upper = torch.where(t1 > 0, t0 / safe_t1 - start, zero + _LONGEST_SEARCH)
    upper = upper.clamp(0.0, _LONGEST_SEARCH)

    # Level < 0 keeps the unknown of order one and the equation nearly linear in it.  Otherwise
    # the logarithm of the equation is nearly linear in log(expm1(width)).
    logarithmic = level >= 0
    gap0 = start * start - sign * start + 1
    mass0 = level.clamp(min=0) + (t0 - t1 * start).clamp(min=0) / gap0 * torch.exp(-start)
    guess = torch.log(mass0) - torch.log(s1) + torch.log(gap0) - start
    guess = torch.nn.functional.softplus(guess) - offset
    step = torch.where(logarithmic, guess, zero)
    step = torch.where(step > lower, step, torch.where(logarithmic, lower + 1e-300, lower))
    step = torch.minimum(step, upper)

    for _ in range(_ITERATIONS):
        r, width = start + step, offset + step
        gap, gap_slope = r * r - sign * r + 1, 2 * r - sign
        e, rest = torch.exp(-r), t0 - t1 * r
        # Linear form, multiplied by D exp(-r).
        value = s1 * width - e * (e * rest + level * gap)
        slope = s1 + e * (e * (t1 + 2 * rest) + level * (gap - gap_slope))
        linear = step - value / slope
        # Logarithmic form.
        small = rest.clamp(min=0) / gap * e
        mass = level + small
        log_value = r + torch.log(s1) + torch.log(width) - torch.log(gap) - torch.log(mass)
        change = -(t1 / gap * e + small * (gap_slope / gap + 1))
        log_slope = 1 + 1 / width - gap_slope / gap - change / mass
        newton = -log_value / log_slope
        # Newton in log(expm1(width)) near the end, where the logarithm is singular.
        stretched = width.clamp(max=1.0)
        factor = torch.exp((newton / -torch.expm1(-stretched)).clamp(-700.0, 700.0))
        curved = torch.log1p(torch.expm1(stretched) * factor) - offset
        logarithm = torch.where(width < 1, curved, step + newton)

        below = torch.where(logarithmic, log_value, value) < 0
        lower, upper = torch.where(below, step, lower), torch.where(below, upper, step)
        candidate = torch.where(logarithmic, logarithm, linear)
        # Rounding may carry a converged step just past the end of its bracket.
        slack = 1e-12 * (1 + r)
        inside = (candidate >= lower - slack) & (candidate <= upper + slack)
        candidate = torch.minimum(torch.maximum(candidate, lower), upper)
        step = torch.where(inside, candidate, lower + (upper - lower) / 2)
    return _polish(v, sign * (start + step))


def _polish(v: Tensor, rho: Tensor) -> Tensor:
    """Newton steps on v.c(rho) = 0, whose rounding is that of a change of v by rounding."""
    for _ in range(_POLISHING_STEPS):
        frame = _frame(v, rho)
        step = _dot(v, frame.tangent) / frame.denominator
        small = step.abs() <= 1e-2 * (1 + rho.abs())
        rho = torch.where(small, rho + step, rho)
    return rho


class _RayParameter(torch.autograd.Function):
    """The parameter rho as an implicit function of the point, differentiable any number of times.

    Its gradient is written with the saved output, which autograd treats as this same function of
    the saved input.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return _solve(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # the projection sends no gradient to rho
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def _gradient(v: Tensor, rho: Tensor) -> Tensor:
        frame = _frame(v, rho)
        # Rho was cut off there, and the squares below would overflow.
        saturated = rho.abs() >= 0.5 * _LARGEST_START
        denominator = torch.where(saturated, torch.ones_like(rho), frame.denominator)
        gradient = frame.tangent / denominator.unsqueeze(-1)
        return torch.where(saturated.unsqueeze(-1), torch.zeros_like(gradient), gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        if grads[0] is None:
            return None
        return grads[0].unsqueeze(-1) * _RayParameter._gradient(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _dot(_RayParameter._gradient(*ctx.saved_tensors), tangents[0])


def _rho(v: Tensor) -> Tensor:
    return _RayParameter.apply(_curved_point(v, _pieces(v.detach())))


def _jacobian(v: Tensor, rho: Tensor) -> Tensor:
    pieces = _pieces(v.detach())
    frame = _frame(_curved_point(v, pieces), rho)
    ray = frame.ray / torch.linalg.vector_norm(frame.ray, dim=-1, keepdim=True)
    tangent = frame.tangent / torch.linalg.vector_norm(frame.tangent, dim=-1, keepdim=True)
    theta = (frame.numerator / frame.denominator)[..., None, None]
    curved = ray.unsqueeze(-1) * ray.unsqueeze(-2)
    curved = curved + theta * (tangent.unsqueeze(-1) * tangent.unsqueeze(-2))
    face_z = pieces.on_face & (v[..., 2] > 0)
    diagonal = torch.stack(
        (pieces.in_cone | pieces.on_face, pieces.in_cone, pieces.in_cone | face_z), -1
    )
    flat = torch.diag_embed(diagonal.to(v.dtype))
    return torch.where(pieces.curved[..., None, None], curved, flat)


class _Projection(torch.autograd.Function):
    """The projection given rho.

    The derivative is the total one, so rho receives none; it is an argument so that the
    derivative, evaluated at it, is itself differentiable without a second solve.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, rho: Tensor) -> Tensor:
        pieces = _pieces(v)
        scale = pieces.scale.unsqueeze(-1)
        point = _curved_point(v, pieces)
        ray = _frame(point, rho).ray
        length = (_dot(point, ray) / _dot(ray, ray)).clamp(min=0)
        curved = scale * (length.unsqueeze(-1) * ray)
        x, y, z = v.unbind(-1)
        face = torch.stack((x, torch.zeros_like(y), z.clamp(min=0)), -1)
        flat = torch.where(pieces.on_face.unsqueeze(-1), face, torch.zeros_like(v))
        flat = torch.where(pieces.in_cone.unsqueeze(-1), v, flat)
        return torch.where(pieces.curved.unsqueeze(-1), curved, flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        jacobian = _jacobian(*ctx.saved_tensors)
        return (jacobian * grads[0].unsqueeze(-2)).sum(-1), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        jacobian = _jacobian(*ctx.saved_tensors)
        return (jacobian * tangents[0].unsqueeze(-2)).sum(-1)


def project(v: Tensor) -> Tensor:
    """Euclidean projection onto the exponential cone.

    Parameters
    ----------
    v : Tensor
        Points, shape ``(..., 3)``, real floating point.

    Returns
    -------
    Tensor
        Projections, of the shape, dtype and device of `v`.  The arithmetic is in double
        precision, and accurate to rounding relative to the size of each point.

    Notes
    -----
    The first derivative is that of `derivative`.  Differentiable any number of times, backward,
    forward, or backward and then once forward; PyTorch does not carry forward mode nested in
    forward mode through custom functions.
    """
    w = v.to(torch.float64)
    return _Projection.apply(w, _rho(w)).to(v.dtype)


def derivative(v: Tensor) -> Tensor:
    """Derivative of the projection onto the exponential cone.

    Parameters
    ----------
    v : Tensor
        Points, shape ``(..., 3)``.

    Returns
    -------
    Tensor
        Symmetric matrices with eigenvalues in [0, 1], shape ``(..., 3, 3)``; they do not change
        when a point is multiplied by a positive number.

    Notes
    -----
    The projection is not differentiable everywhere.  The element of its generalised Jacobian that
    is returned at kinks is the identity on the cone, boundary and origin included; zero at every
    other point of the polar cone; and ``diag(1, 0, z > 0)`` where x <= 0 and y <= 0 otherwise.
    Differentiable any number of times by autograd.
    """
    w = v.to(torch.float64)
    return _jacobian(w, _rho(w)).to(v.dtype)
