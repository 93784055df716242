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

where every term of both denominators is positive, so nothing cancels: :math:`a'\!\cdot c =
e^\rho |b|^2` and :math:`b'\!\cdot c = e^{-\rho} |a|^2`.  All vectors are scaled by a power of
:math:`e^{-|\rho|}`, so nothing overflows.

References
----------
.. [1] H. A. Friberg, "Projection onto the exponential cone: a univariate root-finding problem",
   Optimization Methods and Software 38 (2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from declarative_cvx.cones.curved import Frame, spectrum
from declarative_cvx.cones.spectrum import Spectrum
from declarative_cvx.transforms import apply_function

__all__ = ["decompose", "derivative", "project"]

_STEPS_AT_LEAST, _STEPS = 2, 5
_BRACKETED_STEPS = 100
# The error is of the order of the cube of the last step.
_LAST_STEP, _LAST_STEP_RATIO = 3e-6, 1e-10
# Beyond these the neglected parts are far below the rounding of a point of unit size.
_LARGEST_START = 1e40
_LONGEST_SEARCH = 800.0
_SMALLEST = 5e-324
_ROUNDING = 16 * torch.finfo(torch.float64).eps


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _sizes(v: Tensor) -> Tensor:
    """Largest absolute entries, not 0, shape (..., 1); constants for differentiation."""
    return v.detach().abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)


def _pieces(unit: Tensor) -> tuple[Tensor, Tensor]:
    """Which points project to the curved boundary, and the derivative's diagonal at the others."""
    x, y, z = unit.unbind(-1)
    x_positive, y_positive = x > 0, y > 0
    # A point on the boundary may be outside by rounding, and is its own projection to rounding.
    in_cone = y_positive & (y * torch.exp(x / y) <= z + _ROUNDING)
    in_polar = x_positive & (x * torch.exp(y / x - 1) <= _ROUNDING - z)
    outside = x_positive | y_positive
    curved = outside & ~(in_cone | in_polar)
    if bool(curved.all()):
        return curved, torch.zeros_like(unit)
    z_nonpositive = z <= 0
    in_cone = in_cone | ~(outside | (y != 0) | (z < 0))
    # There the projection is (x, 0, max(z, 0)).
    on_face = ~(outside | in_cone | ((x == 0) & z_nonpositive))
    diagonal = (in_cone | on_face, in_cone, in_cone | (on_face & ~z_nonpositive))
    return curved, torch.stack(diagonal, -1).to(unit.dtype)


def _boundary(rho: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rays a and b, shapes (..., 3), scaled by the factors exp(min(-rho, 0)), exp(min(rho, 0))."""
    # With torch.abs, whose derivative is 0 at 0, the ratio would not be differentiated rightly.
    exponent = rho.clamp(max=0)
    outer, inner = torch.exp(exponent - rho), torch.exp(exponent)
    ray = torch.stack((rho * outer, outer, inner), -1)
    normal = torch.stack((inner, inner - rho * inner, -outer), -1)
    return ray, normal, outer, inner


def _frame(unit: Tensor, rho: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a, c = b x a, ``s a'.c`` and ``s a'.c + t b'.c`` (1 where it is not used)."""
    ray, normal, outer, inner = _boundary(rho)
    ray_square, normal_square = _dot(ray, ray), _dot(normal, normal)
    along_ray = (_dot(unit, ray) / ray_square).clamp(min=0)
    along_normal = (_dot(unit, normal) / normal_square).clamp(min=0)
    numerator = along_ray * outer * normal_square
    denominator = numerator + along_normal * inner * ray_square
    denominator = torch.where(used, denominator, 1.0)
    return ray, torch.linalg.cross(normal, ray), numerator, denominator


class _Equation(NamedTuple):
    """The equation for rho, of points that project to the curved boundary (shapes ``(n,)``).

    With r = abs(rho), and S the coefficient of the ray that grows like exp(r), the equation for
    either sign of rho is S exp(r) - T exp(-r) = level, where S D = s0 + s1 r, T D = t0 - t1 r and
    D = r^2 -+ r + 1.  Multiplied by D exp(-r), it is k(r) = 0; k' is positive at the root.
    """

    sign: Tensor
    """Sign of rho."""
    level: Tensor
    s0: Tensor
    s1: Tensor
    t0: Tensor
    t1: Tensor
    lower: Tensor
    """Left end of the interval that contains r."""
    upper: Tensor
    one: Tensor

    def guess(self) -> Tensor:
        """Solve s1 (r - end) = D exp(-r) (level + T exp(-r)) with the right side of the last r.

        The left side is 0 at the end, and near it a solution w = r - end of w exp(w) = C, with w
        small, is l = log(1 + C), which is used throughout; l - l log(1 + l) / (2 + l) comes nearer,
        and is used last.
        """
        level, r, end = self.level.clamp(min=0), self.lower, -self.s0 / self.s1
        for last in (False, True):
            gap = torch.addcmul(self.one, r, r - self.sign)
            rest = torch.addcmul(self.t0, self.t1, r, value=-1).clamp(min=0)
            mass = torch.addcmul(rest * torch.exp(-r), level, gap)
            way = torch.nn.functional.softplus(torch.log(mass / self.s1) - self.lower)
            if last:
                way = way - way * torch.log1p(way) / (2 + way)
            r = torch.clamp(end + way, self.lower, self.upper)
        return r

    def step(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return k(r), and the step to the root of A + B exp(C r) with its two derivatives."""
        e, difference = torch.exp(-r), r - self.sign
        s = torch.addcmul(self.s0, self.s1, r)
        t = torch.addcmul(self.t0, self.t1, r, value=-1) * e
        gap = torch.addcmul(self.one, r, difference)
        value = torch.addcmul(s, e, torch.addcmul(t, self.level, gap), value=-1)
        s, t = s + self.s1, torch.addcmul(t, self.t1, e)
        decline = torch.addcmul(t, self.level, r + difference, value=-1)
        slope = torch.addcmul(s, e, decline)
        decline = torch.addcmul(t, self.t1, e).add(self.level, alpha=2)
        bend = torch.addcmul(s + self.s1, e, decline, value=-1)
        newton = value / slope
        # The number that is added only avoids 0 / 0.
        ratio = (newton * bend / slope).clamp(max=0.99) + 1e-300
        return value, newton * torch.log1p(-ratio) / ratio


def _equation(unit: Tensor) -> _Equation:
    x, y, z = unit.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    difference = y - x
    positive = (x > zero) & (torch.minimum(difference, difference - x - z) < zero)
    sign = torch.where(positive, one, -one)
    s0, t0 = torch.where(positive, difference, x), torch.where(positive, x, difference)
    s1, t1 = torch.where(positive, x, y), torch.where(positive, y, x)
    lower = (-s0 / s1).clamp(0.0, _LARGEST_START)
    upper = torch.maximum(torch.where(t1 > zero, t0 / t1, torch.inf), lower)
    upper = torch.minimum(upper, lower + _LONGEST_SEARCH)
    return _Equation(sign, sign * z, s0, s1, t0, t1, lower, upper, one)


def _converged(r: Tensor, step: Tensor) -> Tensor:
    return step.abs() <= _LAST_STEP + _LAST_STEP_RATIO * r


def _solve(unit: Tensor) -> Tensor:
    """Parameter rho of points that project to the curved boundary, shape (n, 3)."""
    equation = _equation(unit)
    r = equation.guess()
    for taken in range(1, _STEPS + 1):
        last, r = r, torch.clamp(r + equation.step(r)[1], equation.lower, equation.upper)
        if taken >= _STEPS_AT_LEAST and (converged := _converged(r, r - last)).all():
            break
    else:
        left = (~converged).nonzero()[:, 0]
        r[left] = _bracketed(_Equation(*(part[left] for part in equation)), r[left])
    return equation.sign * r


def _bracketed(equation: _Equation, r: Tensor) -> Tensor:
    """Continue with bisection where a step leaves the bracket of the root."""
    lower, upper = equation.lower, equation.upper
    for _ in range(_BRACKETED_STEPS):
        value, step = equation.step(r)
        lower, upper = torch.where(value < 0, r, lower), torch.where(value > 0, r, upper)
        # Rounding may carry a converged step just past the end of its bracket.
        slack = 1e-12 * (1 + r)
        inside = (r + step >= lower - slack) & (r + step <= upper + slack)
        middle = lower + (upper - lower) / 2
        last, r = r, torch.where(inside, torch.clamp(r + step, lower, upper), middle)
        if _converged(r, r - last).all():
            break
    return r


def _along(unit: Tensor, rho: Tensor) -> Tensor:
    """Projections to the rays a."""
    ray = _boundary(rho)[0]
    return (_dot(unit, ray) / _dot(ray, ray)).clamp(min=0).unsqueeze(-1) * ray


class _Decomposition(torch.autograd.Function):
    """Projections, rho, and the two results of `_pieces`.

    The gradient of rho, and that of the projection, are written with the saved output rho, which
    autograd treats as this same function of the saved input; so they are differentiable any
    number of times without a second solve.  The derivative of the projection is the total one.
    """

    @staticmethod
    def forward(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        points = v.reshape(-1, 3)
        scale = _sizes(points)
        unit = points / scale
        curved, diagonal = _pieces(unit)
        index = curved.nonzero()[:, 0]
        if len(index) == len(unit):
            rho = _solve(unit)
            projection = _along(unit, rho) * scale
        else:
            projection, rho = diagonal * points, torch.zeros_like(unit[:, 0])
        if 0 < len(index) < len(unit):
            rho[index] = parameter = _solve(unit[index])
            projection[index] = _along(unit[index], parameter) * scale[index]
        batch = v.shape[:-1]
        results = projection.view(v.shape), rho.view(batch), curved.view(batch)
        return *results, diagonal.view(v.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.save_for_forward(*inputs, *output[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], v: Tensor) -> Any:
        return apply_function(_Decomposition, v.movedim(in_dims[0], 0)), (0, 0, 0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        total = None
        if grads[0] is not None:
            total = (_jacobian(*ctx.saved_tensors) * grads[0].unsqueeze(-2)).sum(-1)
        if grads[1] is not None:
            part = _gradient(*ctx.saved_tensors[:3]) * grads[1].unsqueeze(-1)
            total = part if total is None else total + part
        return total

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, Tensor, None, None]:
        jacobian, gradient = _jacobian(*ctx.saved_tensors), _gradient(*ctx.saved_tensors[:3])
        move = tangents[0]
        return (jacobian * move.unsqueeze(-2)).sum(-1), _dot(gradient, move), None, None


def _gradient(v: Tensor, rho: Tensor, curved: Tensor) -> Tensor:
    """Gradient of rho."""
    scale = _sizes(v)
    # Beyond, rho was cut off, and the squares would overflow.
    used = curved & (rho.detach().abs() < 0.5 * _LARGEST_START)
    _, tangent, _, denominator = _frame(v / scale, rho, used)
    gradient = tangent / (denominator.unsqueeze(-1) * scale)
    return torch.where(used.unsqueeze(-1), gradient, 0.0)


def _jacobian(v: Tensor, rho: Tensor, curved: Tensor, diagonal: Tensor) -> Tensor:
    """Derivative of the projection, shape (..., 3, 3)."""
    ray, tangent, numerator, denominator = _frame(v / _sizes(v), rho, curved)
    pair = torch.stack((ray, tangent), -2)
    pair = pair / torch.linalg.vector_norm(pair, dim=-1, keepdim=True)
    along_ray, along_tangent = (pair.unsqueeze(-1) * pair.unsqueeze(-2)).unbind(-3)
    theta = (numerator / denominator)[..., None, None]
    curved_jacobian = along_ray + theta * along_tangent
    return torch.where(curved[..., None, None], curved_jacobian, torch.diag_embed(diagonal))


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
    return apply_function(_Decomposition, v.to(torch.float64))[0].to(v.dtype)


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
    return _jacobian(w, *apply_function(_Decomposition, w)[1:]).to(v.dtype)


def decompose(v: Tensor) -> tuple[Tensor, Spectrum]:
    """Projection, and eigenvectors of its derivative (the constants of `derivative`).

    Parameters
    ----------
    v : Tensor
        Points, shape ``(..., 3)``, double precision.
    """
    projection, rho, curved, diagonal = _Decomposition.forward(v)
    sizes = _sizes(v)

    def frame() -> Frame:
        return _frame(v / sizes, rho, curved)

    return projection, spectrum(frame, v, projection, sizes, curved, diagonal)
