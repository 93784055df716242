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

where every term of both denominators is positive, so nothing cancels: :math:`p'\!\cdot c =
e^{(b - a) \rho} |q|^2` and :math:`q'\!\cdot c = a b\, e^{(a - b) \rho} |p|^2`.

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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from declarative_cvx.cones.curved import Frame, spectrum
from declarative_cvx.cones.spectrum import Spectrum
from declarative_cvx.transforms import apply_function

__all__ = ["decompose", "derivative", "project"]

_STEPS_AT_LEAST, _STEPS = 3, 5
_BRACKETED_STEPS = 100
# The error is of the order of the cube of the last step, and a polishing step squares it.
_LAST_STEP = 1e-3
_POLISHING_STEPS = 4
_LAST_POLISHING_STEP = 1e-8
# The logarithm of any ratio of two numbers in double precision is smaller.
_LARGEST_LOGARITHM = 1500.0
# Of that of an argument, beyond which asinh is the logarithm of its double.
_LARGE_LOGARITHM = 300.0
_SMALLEST = 5e-324
_ROUNDING = 16 * torch.finfo(torch.float64).eps


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _sizes(v: Tensor) -> Tensor:
    """Largest absolute entries, not 0, shape (..., 1); constants for differentiation."""
    return v.detach().abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)


def _pieces(unit: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Which points project to the curved boundary, and the derivative's diagonal at the others."""
    entries, height = unit[..., :2], unit[..., 2].abs()
    exponents, zero = torch.stack((alpha, 1 - alpha), -1), torch.zeros_like(height)
    # Powers of negative numbers are NaN, and comparisons with NaN are false.
    # A point on the boundary may be outside by rounding, and is its own projection to rounding.
    needed = height - _ROUNDING
    in_cone = (entries**exponents).prod(-1) >= needed
    in_polar = ((-entries / exponents) ** exponents).prod(-1) >= needed
    curved = ~(in_cone | in_polar | (height == zero))
    # Where z = 0 and x y < 0, the projection is that onto the quadrant.
    positive, low, high = entries > 0, entries.amin(-1), entries.amax(-1)
    on_face = ~(curved | in_cone | in_polar)
    exponent = torch.where(positive, exponents, zero.unsqueeze(-1)).sum(-1)
    slope = torch.where(exponent == 0.5, high / (high - 2 * low), (exponent > 0.5).to(unit.dtype))
    face = torch.cat((positive.to(unit.dtype), slope.unsqueeze(-1)), -1)
    flat = in_cone.to(unit.dtype).unsqueeze(-1)
    return curved, torch.where(on_face.unsqueeze(-1), face, flat)


def _boundary(
    alpha: Tensor, rho: Tensor, sign: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Rays p and q, shapes (..., 3), scaled so that no exponential grows, and their scales.

    They are mirrored to where the last entry has the given sign.
    """
    # With torch.abs, whose derivative is 0 at 0, the ratio would not be differentiated rightly.
    beta, first = 1 - alpha, rho.clamp(max=0)
    second = first - rho
    outer, inner = torch.exp(second), torch.exp(first)
    p_scale = torch.exp(torch.addcmul(alpha * first, beta, second))
    q_scale = torch.exp(torch.addcmul(beta * first, alpha, second))
    ray = torch.stack((inner, outer, sign * p_scale), -1)
    normal = torch.stack((-alpha * outer, -beta * inner, sign * q_scale), -1)
    return ray, normal, (p_scale, q_scale)


def _frame(
    unit: Tensor, alpha: Tensor, rho: Tensor, sign: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p, the mirrored c = p x q, ``s p'.c`` and ``s p'.c + t q'.c``."""
    ray, normal, (p_scale, q_scale) = _boundary(alpha, rho, sign)
    ray_square, normal_square = _dot(ray, ray), _dot(normal, normal)
    along_ray = (_dot(unit, ray) / ray_square).clamp(min=0)
    along_normal = (_dot(unit, normal) / normal_square).clamp(min=0)
    numerator = along_ray * p_scale * normal_square
    remainder = along_normal * (alpha - alpha * alpha) * q_scale * ray_square
    tangent = sign.unsqueeze(-1) * torch.linalg.cross(ray, normal)
    return ray, tangent, numerator, numerator + remainder


def _sign(v: Tensor) -> Tensor:
    last = v.detach()[..., 2]
    return torch.copysign(torch.ones_like(last), last)


class _Equation(NamedTuple):
    """The equation for nu; first x and y, then points, shapes ``(2, n)`` or ``(n,)``."""

    exponents: Tensor
    signs: Tensor
    logarithms: Tensor
    """Of the factors of 2 cosh(nu)."""
    constant: Tensor
    end: Tensor
    """The root lies between -end and end."""

    def sines(self, nu: Tensor) -> Tensor:
        """Inverse hyperbolic sines, without overflow."""
        logarithm = self.logarithms + torch.logaddexp(nu, -nu)
        sine = torch.asinh(self.signs * torch.exp(logarithm.clamp(max=_LARGE_LOGARITHM)))
        return torch.addcmul(sine, self.signs, (logarithm - _LARGE_LOGARITHM).clamp(min=0))

    def step(self, nu: Tensor) -> tuple[Tensor, Tensor]:
        """Return the left side and the step to the root of a constant plus an exponential.

        The equation flattens exponentially where the point is near the cone or its polar, where
        fitting those, with the same two derivatives, is exact.
        """
        sine, tanh = self.sines(nu), torch.tanh(nu)
        tanhs = torch.tanh(sine)
        weighted = self.exponents * tanhs
        value = (self.exponents * sine).sum(0) + self.constant - nu
        mean, bend = weighted.sum(0), torch.addcmul(weighted, weighted, tanhs * tanhs, value=-1)
        slope = tanh * mean - 1
        bend = torch.addcmul(mean, tanh * tanh, bend.sum(0) - mean)
        newton = value / slope
        # The number that is added only avoids 0 / 0.
        ratio = (newton * bend / slope).clamp(max=0.99) + 1e-300
        return value, newton * torch.log1p(-ratio) / ratio


def _equation(unit: Tensor, alpha: Tensor) -> _Equation:
    exponents = torch.stack((alpha, 1 - alpha))
    entries, height = unit.mT[:2], unit[:, 2].abs()
    log_exponents = torch.log(exponents)
    logarithms = torch.log(entries.abs()) - torch.log(2 * height) - log_exponents / 2
    constant = (exponents * log_exponents).sum(0) / 2
    end = _LARGEST_LOGARITHM / exponents.amin(0)
    return _Equation(exponents, torch.sign(entries), logarithms, constant, end)


def _solve(unit: Tensor, alpha: Tensor) -> Tensor:
    """Parameter rho of points that project to the curved boundary, shape (n, 3)."""
    equation = _equation(unit, alpha)
    nu = torch.zeros_like(alpha)
    for taken in range(1, _STEPS + 1):
        step = equation.step(nu)[1]
        nu = nu + step
        converged = step.abs() <= _LAST_STEP
        if taken >= _STEPS_AT_LEAST and converged.all():
            break
    else:
        left = (~converged).nonzero()[:, 0]
        nu[left] = _bracketed(_Equation(*(part[..., left] for part in equation)), nu[left])
    sine_x, sine_y = equation.sines(nu)
    log_a, log_b = torch.log(equation.exponents)
    return _polish(unit, alpha, (log_a - log_b) / 2 + sine_x - sine_y)


def _bracketed(equation: _Equation, nu: Tensor) -> Tensor:
    """Continue with bisection where a step leaves the bracket of the root."""
    lower, upper = -equation.end, equation.end
    for _ in range(_BRACKETED_STEPS):
        value, step = equation.step(nu)
        lower, upper = torch.where(value > 0, nu, lower), torch.where(value < 0, nu, upper)
        # Rounding may carry a converged step just past the end of its bracket.
        slack = 1e-12 * (1 + nu.abs())
        inside = (nu + step >= lower - slack) & (nu + step <= upper + slack)
        middle = lower + (upper - lower) / 2
        last, nu = nu, torch.where(inside, torch.clamp(nu + step, lower, upper), middle)
        if ((nu - last).abs() <= _LAST_STEP).all():
            break
    return nu


def _polish(unit: Tensor, alpha: Tensor, rho: Tensor) -> Tensor:
    """Newton steps on v.c(rho) = 0, whose rounding is that of a change of v by rounding."""
    sign = _sign(unit)
    for _ in range(_POLISHING_STEPS):
        _, tangent, _, denominator = _frame(unit, alpha, rho, sign)
        step, size = _dot(unit, tangent) / denominator, 1 + rho.abs()
        rho = torch.where(step.abs() <= 1e-2 * size, rho + step, rho)
        if (step.abs() <= _LAST_POLISHING_STEP * size).all():
            break
    return rho


class _Decomposition(torch.autograd.Function):
    """Projections, rho, and the two results of `_pieces`.

    The gradient of rho, and that of the projection, are written with the saved output rho, which
    autograd treats as this same function of the saved input; so they are differentiable any
    number of times without a second solve.  The derivative of the projection is the total one.
    """

    @staticmethod
    def forward(v: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        points, exponents = v.reshape(-1, 3), alpha.reshape(-1)
        scale = _sizes(points)
        unit = points / scale
        curved, diagonal = _pieces(unit, exponents)
        projection, rho = diagonal * points, torch.zeros_like(exponents)
        index = curved.nonzero()[:, 0]
        if len(index):
            chosen, exponents = unit[index], exponents[index]
            rho[index] = parameter = _solve(chosen, exponents)
            ray = _boundary(exponents, parameter, _sign(chosen))[0]
            length = (_dot(chosen, ray) / _dot(ray, ray)).clamp(min=0)
            projection[index] = scale[index] * (length.unsqueeze(-1) * ray)
        batch = v.shape[:-1]
        results = projection.view(v.shape), rho.view(batch), curved.view(batch)
        return *results, diagonal.view(v.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.save_for_forward(*inputs, *output[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], *inputs: Tensor) -> Any:
        moved = (
            part.expand(info.batch_size, *part.shape) if dim is None else part.movedim(dim, 0)
            for part, dim in zip(inputs, in_dims, strict=True)
        )
        return apply_function(_Decomposition, *moved), (0, 0, 0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        total = None
        if grads[0] is not None:
            total = (_jacobian(*ctx.saved_tensors) * grads[0].unsqueeze(-2)).sum(-1)
        if grads[1] is not None:
            part = _gradient(*ctx.saved_tensors[:4]) * grads[1].unsqueeze(-1)
            total = part if total is None else total + part
        return total, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, Tensor, None, None]:
        jacobian, gradient = _jacobian(*ctx.saved_tensors), _gradient(*ctx.saved_tensors[:4])
        move = tangents[0]
        return (jacobian * move.unsqueeze(-2)).sum(-1), _dot(gradient, move), None, None


def _gradient(v: Tensor, alpha: Tensor, rho: Tensor, curved: Tensor) -> Tensor:
    """Gradient of rho."""
    scale = _sizes(v)
    _, tangent, _, denominator = _frame(v / scale, alpha, rho, _sign(v))
    denominator = torch.where(curved, denominator, 1.0)
    gradient = tangent / (denominator.unsqueeze(-1) * scale)
    return torch.where(curved.unsqueeze(-1), gradient, 0.0)


def _jacobian(v: Tensor, alpha: Tensor, rho: Tensor, curved: Tensor, diagonal: Tensor) -> Tensor:
    """Derivative of the projection, shape (..., 3, 3)."""
    ray, tangent, numerator, denominator = _frame(v / _sizes(v), alpha, rho, _sign(v))
    pair = torch.stack((ray, tangent), -2)
    pair = pair / torch.linalg.vector_norm(pair, dim=-1, keepdim=True)
    along_ray, along_tangent = (pair.unsqueeze(-1) * pair.unsqueeze(-2)).unbind(-3)
    theta = numerator / torch.where(curved, denominator, 1.0)
    curved_jacobian = along_ray + theta[..., None, None] * along_tangent
    return torch.where(curved[..., None, None], curved_jacobian, torch.diag_embed(diagonal))


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
    return apply_function(_Decomposition, *_prepare(v, alpha))[0].to(v.dtype)


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
    return _jacobian(w, exponent, *apply_function(_Decomposition, w, exponent)[1:]).to(v.dtype)


def decompose(v: Tensor, alpha: Tensor) -> tuple[Tensor, Spectrum]:
    """Projection, and eigenvectors of its derivative (the constants of `derivative`).

    Parameters
    ----------
    v : Tensor
        Points, shape ``(..., 3)``, double precision.
    alpha : Tensor
        As for `project`.
    """
    w, exponent = _prepare(v, alpha)
    projection, rho, curved, diagonal = _Decomposition.forward(w, exponent)
    sizes = _sizes(w)

    def frame() -> Frame:
        ray, tangent, numerator, denominator = _frame(w / sizes, exponent, rho, _sign(w))
        return ray, tangent, numerator, torch.where(curved, denominator, 1.0)

    return projection, spectrum(frame, w, projection, sizes, curved, diagonal)
