r"""Projection onto the three-dimensional power cone and its derivative.

The cone is, in the convention of CVXPY and SCS, for an exponent :math:`0 < a < 1` and
:math:`b = 1 - a`,

.. math:: K_a = \{(x, y, z) : x^a y^b \ge |z|,\ x \ge 0,\ y \ge 0\}.

It is symmetric in z, so take z >= 0.  The curved boundary is swept by the rays
:math:`p(\rho) = (e^{b\rho}, e^{-a\rho}, 1)`, and that of the polar cone by
:math:`q(\rho) = (-a e^{-b\rho}, -b e^{a\rho}, 1)`, orthogonal to :math:`p(\rho)` and to
:math:`p'(\rho)`.  A point which projects to the curved boundary is, for exactly one
:math:`\rho`,

.. math:: v = s\,p(\rho) + t\,q(\rho), \qquad s, t > 0,

and its projection is :math:`s\,p(\rho)`.  With :math:`c = p \times q` the differential of the
decomposition gives

.. math::

    D\Pi(v) = \hat p \hat p^T + \theta\,\hat c \hat c^T, \qquad
    \theta = \frac{s\,p'\!\cdot c}{s\,p'\!\cdot c + t\,q'\!\cdot c} \in (0, 1), \qquad
    d\rho = \frac{c \cdot dv}{s\,p'\!\cdot c + t\,q'\!\cdot c},

where every term of both denominators is positive, so nothing cancels.

The optimality conditions give the first two entries of the projection in terms of its third, r,
which leaves one equation [1]_.  Here its unknown is :math:`\nu = \frac12 \log(r / (z - r))`, in
which it reads

.. math::

    a \operatorname{asinh} \frac{x \cosh \nu}{z \sqrt a}
    + b \operatorname{asinh} \frac{y \cosh \nu}{z \sqrt b}
    + \tfrac12 (a \log a + b \log b) - \nu = 0

with a left side that decreases, and :math:`\rho` is the difference of the two inverse hyperbolic
sines, plus :math:`\frac12 \log(a / b)`.

References
----------
.. [1] L. T. K. Hien, "Differential properties of Euclidean projection onto power cone",
   Mathematical Methods of Operations Research 82 (2015).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["derivative", "project"]

_ITERATIONS = 10
_POLISHING_STEPS = 3
# The logarithm of any ratio of two numbers in double precision is smaller.
_LARGEST_LOGARITHM = 1500.0


class _Pieces(NamedTuple):
    """Which piece of the projection holds at each point (shapes ``(...)``)."""

    scale: Tensor
    """Largest absolute entry, 1 for the zero vector."""
    in_cone: Tensor
    in_polar: Tensor
    on_face: Tensor
    """z = 0, and the projection is that onto the quadrant."""
    curved: Tensor
    """The projection lies on the curved boundary, with z nonzero."""


class _Frame(NamedTuple):
    """The decomposition of a point along the orthogonal vectors p, q, c, all suitably scaled."""

    ray: Tensor
    """Parallel to p, shape ``(..., 3)``."""
    tangent: Tensor
    """Parallel to c, shape ``(..., 3)``."""
    numerator: Tensor
    """``s p'.c`` in the scaling of ``tangent``."""
    denominator: Tensor
    """``s p'.c + t q'.c`` in the scaling of ``tangent``."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _pieces(v: Tensor, alpha: Tensor) -> _Pieces:
    size = v.abs().amax(-1)
    scale = torch.where(size > 0, size, torch.ones_like(size))
    x, y, z = (v / scale.unsqueeze(-1)).unbind(-1)
    beta, height = 1 - alpha, z.abs()
    in_cone = (x >= 0) & (y >= 0)
    in_cone = in_cone & (x.clamp(min=0) ** alpha * y.clamp(min=0) ** beta >= height)
    dual_x, dual_y = (-x).clamp(min=0) / alpha, (-y).clamp(min=0) / beta
    in_polar = (x <= 0) & (y <= 0) & (dual_x**alpha * dual_y**beta >= height) & ~in_cone
    on_face = (z == 0) & ~in_cone & ~in_polar
    return _Pieces(scale, in_cone, in_polar, on_face, ~(in_cone | in_polar | on_face))


def _reflect(u: Tensor, v: Tensor) -> Tensor:
    """Change the sign of the last entry of u where that of v is negative."""
    last = torch.cumsum(torch.ones_like(v), -1) == 3
    return torch.where(last & (v < 0), -u, u)


def _curved_point(v: Tensor, pieces: _Pieces) -> Tensor:
    """Points scaled to unit size with z > 0; where the curved piece does not hold, (0, 0, 1)."""
    upper = _reflect(v, v.detach()) / pieces.scale.unsqueeze(-1)
    last = (torch.cumsum(torch.ones_like(v), -1) == 3).to(v.dtype)
    return torch.where(pieces.curved.unsqueeze(-1), upper, last)


def _frame(v: Tensor, alpha: Tensor, rho: Tensor) -> _Frame:
    """Exchange x and y where rho < 0, so that no exponential grows."""
    x, y, z = v.unbind(-1)
    keep = rho >= 0
    major, minor = torch.where(keep, x, y), torch.where(keep, y, x)
    a, b = torch.where(keep, alpha, 1 - alpha), torch.where(keep, 1 - alpha, alpha)
    sign = torch.where(keep, 1.0, -1.0).to(v.dtype)
    size = sign * rho
    e, e_a, e_b = torch.exp(-size), torch.exp(-a * size), torch.exp(-b * size)

    one = torch.ones_like(e)
    ray = torch.stack((one, e, e_b), -1)
    normal = torch.stack((-a * e, -b, e_a), -1)
    point = torch.stack((major, minor, z), -1)
    along_ray = (_dot(point, ray) / _dot(ray, ray)).clamp(min=0)
    along_normal = (_dot(point, normal) / _dot(normal, normal)).clamp(min=0)
    numerator = along_ray * e_b * (e_a * e_a + b * b + a * a * e * e)
    remainder = along_normal * e_a * (a * b) * (1 + e * e + e_b * e_b)

    c_major, c_minor = e_a * e + b * e_b, -(e_a + a * e_b * e)
    tangent = sign.unsqueeze(-1) * torch.stack(
        (torch.where(keep, c_major, c_minor), torch.where(keep, c_minor, c_major), a * e * e - b),
        -1,
    )
    ray = torch.stack((torch.where(keep, one, e), torch.where(keep, e, one), e_b), -1)
    return _Frame(ray, tangent, numerator, numerator + remainder)


def _signed_asinh(sign: Tensor, logarithm: Tensor) -> Tensor:
    """Return asinh(sign exp(logarithm)) without overflow."""
    large = logarithm > 20.0
    value = torch.asinh(torch.exp(torch.where(large, torch.zeros_like(logarithm), logarithm)))
    return sign * torch.where(large, logarithm + math.log(2.0), value)


def _solve(v: Tensor, alpha: Tensor) -> Tensor:
    """Parameter rho of points that project to the curved boundary, z > 0 (no derivative)."""
    x, y, z = v.unbind(-1)
    a, b = alpha, 1 - alpha
    log_a, log_b, log_z = torch.log(a), torch.log(b), torch.log(z)
    log_x = torch.log(x.abs()) - log_z - log_a / 2
    log_y = torch.log(y.abs()) - log_z - log_b / 2
    sign_x, sign_y = torch.sign(x), torch.sign(y)
    constant = (a * log_a + b * log_b) / 2

    def sines(nu: Tensor) -> tuple[Tensor, Tensor]:
        log_cosh = nu.abs() + torch.log1p(torch.exp(-2 * nu.abs())) - math.log(2.0)
        return _signed_asinh(sign_x, log_x + log_cosh), _signed_asinh(sign_y, log_y + log_cosh)

    nu = torch.zeros_like(x)
    upper = _LARGEST_LOGARITHM / torch.minimum(a, b) + nu
    lower = -upper
    for _ in range(_ITERATIONS):
        sine_x, sine_y = sines(nu)
        tanh_x, tanh_y, tanh = torch.tanh(sine_x), torch.tanh(sine_y), torch.tanh(nu)
        value = a * sine_x + b * sine_y + constant - nu
        mean = a * tanh_x + b * tanh_y
        slope = tanh * mean - 1
        bend = a * tanh_x * (1 - tanh_x**2) + b * tanh_y * (1 - tanh_y**2)
        bend = (1 - tanh**2) * mean + tanh**2 * bend
        # The equation flattens exponentially where the point is near the cone or its polar.
        # Fitting constant + exponential, of the same two derivatives, is exact there.
        newton = -value / slope
        rate = -bend / slope
        fitted = -torch.log1p(-rate * newton) / rate
        usable = (rate.abs() > 1e-6) & torch.isfinite(fitted)
        candidate = nu + torch.where(usable, fitted, newton)

        lower, upper = torch.where(value > 0, nu, lower), torch.where(value > 0, upper, nu)
        slack = 1e-12 * (1 + nu.abs())
        inside = (candidate >= lower - slack) & (candidate <= upper + slack)
        candidate = torch.minimum(torch.maximum(candidate, lower), upper)
        nu = torch.where(inside, candidate, lower + (upper - lower) / 2)
    sine_x, sine_y = sines(nu)
    return _polish(v, alpha, (log_a - log_b) / 2 + sine_x - sine_y)


def _polish(v: Tensor, alpha: Tensor, rho: Tensor) -> Tensor:
    """Newton steps on v.c(rho) = 0, whose rounding is that of a change of v by rounding."""
    for _ in range(_POLISHING_STEPS):
        frame = _frame(v, alpha, rho)
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
    def forward(v: Tensor, alpha: Tensor) -> Tensor:
        return _solve(v, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # the projection sends no gradient to rho
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def _gradient(v: Tensor, alpha: Tensor, rho: Tensor) -> Tensor:
        frame = _frame(v, alpha, rho)
        return frame.tangent / frame.denominator.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        if grads[0] is None:
            return None, None
        return grads[0].unsqueeze(-1) * _RayParameter._gradient(*ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _dot(_RayParameter._gradient(*ctx.saved_tensors), tangents[0])


def _rho(v: Tensor, alpha: Tensor) -> Tensor:
    return _RayParameter.apply(_curved_point(v, _pieces(v.detach(), alpha)), alpha)


def _face_slope(v: Tensor, alpha: Tensor) -> Tensor:
    """Derivative of the third entry by z at z = 0, x y < 0."""
    x, y, _ = v.unbind(-1)
    exponent = torch.where(x > 0, alpha, 1 - alpha)
    positive, negative = torch.maximum(x, y), -torch.minimum(x, y)
    balanced = positive / (positive + 2 * negative)
    return torch.where(exponent == 0.5, balanced, (exponent > 0.5).to(v.dtype))


def _jacobian(v: Tensor, alpha: Tensor, rho: Tensor) -> Tensor:
    fixed = v.detach()
    pieces = _pieces(fixed, alpha)
    frame = _frame(_curved_point(v, pieces), alpha, rho)
    ray = frame.ray / torch.linalg.vector_norm(frame.ray, dim=-1, keepdim=True)
    tangent = frame.tangent / torch.linalg.vector_norm(frame.tangent, dim=-1, keepdim=True)
    ray, tangent = _reflect(ray, fixed), _reflect(tangent, fixed)
    theta = (frame.numerator / frame.denominator)[..., None, None]
    curved = ray.unsqueeze(-1) * ray.unsqueeze(-2)
    curved = curved + theta * (tangent.unsqueeze(-1) * tangent.unsqueeze(-2))

    identity = pieces.in_cone.to(v.dtype)
    face_x, face_y = (fixed[..., 0] > 0).to(v.dtype), (fixed[..., 1] > 0).to(v.dtype)
    face = torch.stack((face_x, face_y, _face_slope(fixed, alpha)), -1)
    flat = torch.where(pieces.on_face.unsqueeze(-1), face, identity.unsqueeze(-1))
    return torch.where(pieces.curved[..., None, None], curved, torch.diag_embed(flat))


class _Projection(torch.autograd.Function):
    """The projection given rho.

    The derivative is the total one, so rho receives none; it is an argument so that the
    derivative, evaluated at it, is itself differentiable without a second solve.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, alpha: Tensor, rho: Tensor) -> Tensor:
        pieces = _pieces(v, alpha)
        scale = pieces.scale.unsqueeze(-1)
        point = _curved_point(v, pieces)
        ray = _frame(point, alpha, rho).ray
        length = (_dot(point, ray) / _dot(ray, ray)).clamp(min=0)
        curved = _reflect(scale * (length.unsqueeze(-1) * ray), v)
        flat = torch.where(pieces.on_face.unsqueeze(-1), v.clamp(min=0), torch.zeros_like(v))
        flat = torch.where(pieces.in_cone.unsqueeze(-1), v, flat)
        return torch.where(pieces.curved.unsqueeze(-1), curved, flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        jacobian = _jacobian(*ctx.saved_tensors)
        return (jacobian * grads[0].unsqueeze(-2)).sum(-1), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        jacobian = _jacobian(*ctx.saved_tensors)
        return (jacobian * tangents[0].unsqueeze(-2)).sum(-1)


def _prepare(v: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    exponent = alpha.detach().to(torch.float64)
    return v.to(torch.float64), exponent.expand(v.shape[:-1])


def project(v: Tensor, alpha: Tensor) -> Tensor:
    """Euclidean projection onto three-dimensional power cones.

    Parameters
    ----------
    v : Tensor
        Points, shape ``(..., 3)``, real floating point.
    alpha : Tensor
        Exponents in (0, 1), of a shape that broadcasts to ``v.shape[:-1]``; a constant for
        differentiation.

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
    w, exponent = _prepare(v, alpha)
    return _Projection.apply(w, exponent, _rho(w, exponent)).to(v.dtype)


def derivative(v: Tensor, alpha: Tensor) -> Tensor:
    """Derivative of the projection onto three-dimensional power cones.

    Parameters
    ----------
    v : Tensor
        Points, shape ``(..., 3)``.
    alpha : Tensor
        Exponents in (0, 1), of a shape that broadcasts to ``v.shape[:-1]``; a constant for
        differentiation.

    Returns
    -------
    Tensor
        Symmetric matrices with eigenvalues in [0, 1], shape ``(..., 3, 3)``; they do not change
        when a point is multiplied by a positive number.

    Notes
    -----
    The projection is not differentiable everywhere.  The element of its generalised Jacobian that
    is returned at kinks is the identity on the cone, boundary and origin included, and zero at
    every other point of the polar cone.  Where z = 0 and x y < 0 the matrix is diagonal, the
    limit from either side of z = 0.  Differentiable any number of times by autograd, except
    exactly there, where the result is treated as constant.
    """
    w, exponent = _prepare(v, alpha)
    return _jacobian(w, exponent, _rho(w, exponent)).to(v.dtype)
