"""Projections onto the exponential and power cones against references of 50 digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.cones import exponential, power

DIGITS = 50
ALPHAS = (0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99)
Map = Callable[..., Tensor]
Point = list[mpf]


# References: bisection in a parameter of the boundary, in 50 digits.


def _bisect(rising: Callable[[mpf], bool], low: mpf, high: mpf) -> mpf:
    """Find where `rising`, true on the left, becomes false."""
    for _ in range(150):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) else (low, middle)
    return (low + high) / 2


def _onto_ray(v: Point, ray: tuple[mpf, mpf, mpf]) -> Point:
    length = sum(a * b for a, b in zip(v, ray, strict=True)) / sum(a * a for a in ray)
    return [length * a for a in ray]


def _unit(reference: Callable[..., Point]) -> Callable[..., Point]:
    """Let a reference see points of unit size only."""

    def scaled(v: Any, *parameters: float) -> Point:
        with mpmath.workdps(DIGITS):
            exact = [mpf(c) for c in v]
            size = max(abs(c) for c in exact) or mpf(1)
            return [size * c for c in reference([c / size for c in exact], *parameters)]

    return scaled


@_unit
def exponential_reference(v: Point) -> Point:
    x, y, z = v
    exp = mpmath.exp
    if (y > 0 and y * exp(x / y) <= z) or (y == 0 and x <= 0 and z >= 0):
        return v
    if (x > 0 and x * exp(y / x - 1) <= -z) or (x == 0 and y <= 0 and z <= 0):
        return [mpf(0)] * 3
    if x <= 0 and y <= 0:
        return [x, mpf(0), max(z, mpf(0))]

    def too_small(rho: mpf) -> bool:
        gap = rho * rho - rho + 1
        s, t = (y - (1 - rho) * x) / gap, (x - rho * y) / gap
        return s * exp(rho) - t * exp(-rho) < z

    # The search is in the logarithm of the distance to an end of the interval of rho, or to 0.
    if 0 < x <= y:
        base, sign = mpf(0), 1 if y - 2 * x < z else -1
        length = x / y if sign > 0 else (y - x) / x
    elif x > 0:
        base, sign, length = 1 - y / x, 1, x / y - 1 + y / x if y > 0 else mpf(1000)
    else:
        base, sign, length = x / y, -1, mpf(1000)

    def rho(exponent: mpf) -> mpf:
        return base + sign * exp(exponent)

    high = min(mpmath.log(length), mpf(7))
    root = rho(_bisect(lambda e: too_small(rho(e)) == (sign > 0), mpf(-120), high))
    return _onto_ray(v, (root, mpf(1), exp(root)))


@_unit
def power_reference(v: Point, alpha: float) -> Point:
    x, y, z = v
    a, b, height = mpf(alpha), 1 - mpf(alpha), abs(v[2])
    if x >= 0 and y >= 0 and x**a * y**b >= height:
        return v
    if x <= 0 and y <= 0 and (-x / a) ** a * (-y / b) ** b >= height:
        return [mpf(0)] * 3
    if height == 0:
        return [max(x, mpf(0)), max(y, mpf(0)), mpf(0)]

    def entries(logit: mpf) -> Point:
        """Entries that the multiplier fixes when the third is height / (1 + exp(-logit))."""
        r, rest = height / (1 + mpmath.exp(-logit)), height / (1 + mpmath.exp(logit))

        def entry(u: mpf, exponent: mpf) -> mpf:
            root = mpmath.sqrt(u * u + 4 * exponent * r * rest)
            return (u + root) / 2 if u > 0 else 2 * exponent * r * rest / (root - u)

        return [entry(x, a), entry(y, b), r]

    def too_small(logit: mpf) -> bool:
        px, py, r = entries(logit)
        return a * mpmath.log(px) + b * mpmath.log(py) > mpmath.log(r)

    px, py, r = entries(_bisect(too_small, mpf(-20000), mpf(20000)))
    return [px, py, r if z > 0 else -r]


# Points.


def _decompositions(ray: np.ndarray, normal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points at known distances, near or far, from the two curved boundaries."""
    ray = ray / abs(ray).max(-1, keepdims=True)
    normal = normal / abs(normal).max(-1, keepdims=True)
    s, t = 10.0 ** rng.uniform(-16, 0, (2, len(ray), 1))
    return s * ray + t * normal


def _common(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    normal = rng.standard_normal((4, count, 3))
    return [
        normal[0],
        normal[1] * 10.0 ** rng.uniform(-8, 0, (count, 3)),
        normal[2] * 10.0 ** rng.uniform(-40, 0, (count, 3)),
        normal[3] * 10.0 ** rng.choice([-200, -3, 3, 200], (count, 1)),
        rng.integers(-2, 3, (count, 3)).astype(float),
    ]


def exponential_points(count: int, seed: int) -> tuple[Tensor]:
    """About `count` points of all cases, shape (n, 3)."""
    rng = np.random.default_rng(seed)
    each = count // 6 + 1
    rho = rng.standard_normal(each) * 10.0 ** rng.uniform(-2, 1.3, each)
    one = np.ones(each)
    ray = np.stack((rho, one, np.exp(rho)), -1)
    normal = np.stack((one, 1 - rho, -np.exp(-rho)), -1)
    points = [*_common(each, rng), _decompositions(ray, normal, rng)]
    return (torch.tensor(np.concatenate(points)),)


def power_points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """About `count` points of all cases, shape (n, 3), and exponents, shape (n,)."""
    rng = np.random.default_rng(seed)
    each = count // 6 + 1
    alpha = rng.choice(ALPHAS, 6 * each)
    a, b = alpha[-each:], 1 - alpha[-each:]
    rho = rng.standard_normal(each) * 10.0 ** rng.uniform(-2, 1.3, each)
    one = np.ones(each)
    ray = np.stack((np.exp(b * rho), np.exp(-a * rho), one), -1)
    normal = np.stack((-a * np.exp(-b * rho), -b * np.exp(a * rho), one), -1)
    points = [*_common(each, rng), _decompositions(ray, normal, rng)]
    return torch.tensor(np.concatenate(points)), torch.tensor(alpha)


CONES = [
    pytest.param(exponential, exponential_points, exponential_reference, id="exponential"),
    pytest.param(power, power_points, power_reference, id="power"),
]
both = pytest.mark.parametrize(("cone", "points", "reference"), CONES)

SPECIAL = torch.cartesian_prod(
    *3 * [torch.tensor([-1.0, -1e-20, -1e-300, 0.0, 1e-300, 1e-20, 1.0], dtype=torch.float64)]
)


def _special(cone: Any) -> tuple[Tensor, ...]:
    if cone is exponential:
        return (SPECIAL,)
    alpha = torch.tensor(ALPHAS, dtype=torch.float64).repeat(len(SPECIAL) // len(ALPHAS) + 1)
    return SPECIAL, alpha[: len(SPECIAL)]


def _size(v: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(v, ord=float("inf"), dim=-1)
    return torch.where(size > 0, size, 1.0)


def _exact_error(p: Tensor, exact: Point, size: float) -> float:
    with mpmath.workdps(DIGITS):
        return float(
            max(abs(mpf(a) - b) for a, b in zip(p.tolist(), exact, strict=True)) / mpf(size)
        )


def _is_near(p: Tensor, parameters: tuple[Tensor, ...], polar: bool) -> bool:
    """Whether all points are in the cone or its polar after a move by 1e-14 to its inside."""
    if not parameters:
        inward = p.new_tensor([1.0, -1.0, -1.0] if polar else [-1.0, 1.0, 1.0])
        x, y, z = (p + 1e-14 * inward).unbind(-1)
        if polar:
            inside = (x > 0) & (x * torch.exp(y / x - 1) <= -z)
        else:
            inside = (y > 0) & (y * torch.exp(x / y) <= z)
        return bool(inside.all())
    a, b = parameters[0], 1 - parameters[0]
    x, y, z = p.unbind(-1)
    x, y = ((1e-14 - x) / a, (1e-14 - y) / b) if polar else (x + 1e-14, y + 1e-14)
    inside = (x >= 0) & (y >= 0) & (x.clamp(min=0) ** a * y.clamp(min=0) ** b >= z.abs() - 1e-14)
    return bool(inside.all())


# Accuracy.


@both
def test_projection_agrees_with_50_digits(cone: Any, points: Any, reference: Any) -> None:
    v, *parameters = points(200, seed=0)
    p = cone.project(v, *parameters)
    size = _size(v)
    for i in range(len(v)):
        exact = reference(v[i].tolist(), *(q[i].item() for q in parameters))
        assert _exact_error(p[i], exact, size[i].item()) <= 1e-14, v[i].tolist()


@both
def test_derivative_agrees_with_differences_of_50_digits(
    cone: Any, points: Any, reference: Any
) -> None:
    v, *parameters = points(36, seed=1)
    v = v / _size(v).unsqueeze(-1)
    matrices = cone.derivative(v, *parameters)
    compared = 0
    for i in range(len(v)):
        arguments = [q[i].item() for q in parameters]
        centre = [mpf(c) for c in v[i].tolist()]
        exact = reference(centre, *arguments)
        normal = max(abs(a - b) for a, b in zip(exact, centre, strict=True))
        # Within rounding of a kink either side is right.
        if min(abs(c) for c in centre) < 1e-15:
            continue
        if any(0 < distance < 1e-13 for distance in (normal, max(abs(c) for c in exact))):
            continue
        step = mpf(10) ** -24
        columns, kink = [], False
        for k in range(3):
            with mpmath.workdps(DIGITS):
                ahead, behind = list(centre), list(centre)
                ahead[k] += step
                behind[k] -= step
                ends = zip(
                    reference(ahead, *arguments), exact, reference(behind, *arguments), strict=True
                )
                slopes = [((a - c) / step, (c - b) / step) for a, c, b in ends]
                kink = kink or any(abs(right - left) > 1e-6 for right, left in slopes)
                columns.append([(right + left) / 2 for right, left in slopes])
        if kink:
            continue
        compared += 1
        for k, column in enumerate(columns):
            assert _exact_error(matrices[i, :, k], column, 1.0) <= 1e-13, v[i].tolist()
    assert compared >= 15


@both
def test_moreau_decomposition(cone: Any, points: Any, reference: Any) -> None:
    v, *parameters = points(20000, seed=2)
    v = v / _size(v).unsqueeze(-1)
    p = cone.project(v, *parameters)
    rest = v - p
    assert (p * rest).sum(-1).abs().max() <= 2e-15
    assert _is_near(p, tuple(parameters), polar=False)
    assert _is_near(rest, tuple(parameters), polar=True)


@both
def test_idempotent_homogeneous_nonexpansive(cone: Any, points: Any, reference: Any) -> None:
    v, *parameters = points(20000, seed=3)
    size = _size(v)
    p = cone.project(v, *parameters)
    assert ((cone.project(p, *parameters) - p).abs().amax(-1) / size).max() <= 2e-15
    unit = v / size.unsqueeze(-1)
    q = cone.project(unit, *parameters)
    for factor in (1e-280, 0.3, 7.0, 1e280):
        scaled = cone.project(factor * unit, *parameters) / factor
        torch.testing.assert_close(scaled, q, rtol=0, atol=2e-15)
    generator = torch.Generator().manual_seed(0)
    for distance in (1e-9, 1e-3, 1.0):
        move = distance * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        change = cone.project(unit + move, *parameters) - q
        excess = torch.linalg.vector_norm(change, dim=-1) - torch.linalg.vector_norm(move, dim=-1)
        assert excess.max() <= 1e-14


@given(
    st.tuples(*3 * [st.floats(-1e300, 1e300, allow_subnormal=False)]),
    st.floats(0.01, 0.99),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_point(entries: tuple[float, float, float], exponent: float) -> None:
    v = torch.tensor(entries, dtype=torch.float64)
    alpha = torch.tensor(exponent, dtype=torch.float64)
    unit = v / _size(v)
    for cone, parameters in ((exponential, ()), (power, (alpha,))):
        p = cone.project(v, *parameters) / _size(v)
        matrix = cone.derivative(v, *parameters)
        # The derivative is homogeneous of degree 0, so it maps v to its projection.
        torch.testing.assert_close(matrix @ unit, p, rtol=0, atol=5e-15)
        assert abs(p @ (unit - p)) <= 5e-15
        assert _is_near(p, parameters, polar=False)
        assert _is_near(unit - p, parameters, polar=True)


@both
def test_derivative_is_symmetric_with_eigenvalues_in_unit_interval(
    cone: Any, points: Any, reference: Any
) -> None:
    for arguments in (points(20000, seed=4), _special(cone)):
        matrices = cone.derivative(*arguments)
        assert torch.equal(matrices, matrices.mT)
        values = torch.linalg.eigvalsh(matrices)
        assert values.min() >= -2e-15
        assert values.max() <= 1 + 3e-15


# Pieces, and the documented choices at kinks.


def test_exponential_pieces() -> None:
    e = torch.e
    cases = [
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1, 1, 1)),
        ((1.0, 2.0, 9.0), (1.0, 2.0, 9.0), (1, 1, 1)),
        ((-1.0, 0.0, 2.0), (-1.0, 0.0, 2.0), (1, 1, 1)),
        ((-1.0, -2.0, 3.0), (-1.0, 0.0, 3.0), (1, 0, 1)),
        ((-1.0, -2.0, -3.0), (-1.0, 0.0, 0.0), (1, 0, 0)),
        ((1.0, 1.0, -2.0 * e), (0.0, 0.0, 0.0), (0, 0, 0)),
        ((0.0, -1.0, -1.0), (0.0, 0.0, 0.0), (0, 0, 0)),
    ]
    for point, projection, diagonal in cases:
        v = torch.tensor(point, dtype=torch.float64)
        assert exponential.project(v).tolist() == list(projection)
        assert torch.equal(exponential.derivative(v), torch.diag(torch.tensor(diagonal)).to(v))
    # a(0) + b(0), where rho changes sign
    v = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(exponential.project(v), v.new_tensor([0.0, 1.0, 1.0]))


def test_power_pieces() -> None:
    cases = [
        (0.3, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1, 1, 1)),
        (0.3, (1.0, 2.0, -1.0), (1.0, 2.0, -1.0), (1, 1, 1)),
        (0.3, (-1.0, -2.0, 1.0), (0.0, 0.0, 0.0), (0, 0, 0)),
        (0.3, (1.0, -2.0, 0.0), (1.0, 0.0, 0.0), (1, 0, 0)),
        (0.7, (1.0, -2.0, 0.0), (1.0, 0.0, 0.0), (1, 0, 1)),
        (0.3, (-1.0, 2.0, 0.0), (0.0, 2.0, 0.0), (0, 1, 1)),
        (0.5, (2.0, -3.0, 0.0), (2.0, 0.0, 0.0), (1, 0, 0.25)),
    ]
    for exponent, point, projection, diagonal in cases:
        v = torch.tensor(point, dtype=torch.float64)
        alpha = torch.tensor(exponent, dtype=torch.float64)
        assert power.project(v, alpha).tolist() == list(projection)
        expected = torch.diag(torch.tensor(diagonal)).to(v)
        assert torch.equal(power.derivative(v, alpha), expected)
        # The choice at z = 0 is the limit.
        near = v + 1e-140 * torch.tensor([0.0, 0.0, 1.0])
        torch.testing.assert_close(power.derivative(near, alpha), expected)


def test_symmetries_of_the_power_cone() -> None:
    """Exchange of x and y with alpha and 1 - alpha, and change of the sign of z."""
    v, alpha = power_points(6000, seed=8)
    v = v / _size(v).unsqueeze(-1)
    p = power.project(v, alpha)
    exchanged = power.project(v[:, [1, 0, 2]], 1 - alpha)[:, [1, 0, 2]]
    torch.testing.assert_close(exchanged, p, rtol=0, atol=5e-15)
    reflection = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    assert torch.equal(reflection * power.project(reflection * v, alpha), p)
    matrices = power.derivative(v, alpha)
    reflected = power.derivative(reflection * v, alpha)
    assert torch.equal(reflected, reflection[:, None] * matrices * reflection)


# Differentiation.


def _regular(cone: Any) -> tuple[Tensor, Map, Map]:
    generator = torch.Generator().manual_seed(3)
    v = 2 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    v[0] = torch.tensor([1.0, 2.0, 0.1])
    if cone is exponential:
        return v, cone.project, cone.derivative
    alpha = 0.1 + 0.8 * torch.rand(4, generator=generator, dtype=torch.float64)
    return v, lambda u: cone.project(u, alpha), lambda u: cone.derivative(u, alpha)


@pytest.mark.parametrize("cone", [exponential, power])
def test_gradcheck(cone: Any) -> None:
    v, project, derivative = _regular(cone)
    v.requires_grad_()
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert gradcheck(project, (v,), check_batched_forward_grad=True, **options)
    assert gradgradcheck(project, (v,), check_fwd_over_rev=True)
    assert gradcheck(derivative, (v,), **options)
    assert gradgradcheck(derivative, (v,))


@pytest.mark.parametrize("cone", [exponential, power])
def test_function_transforms(cone: Any) -> None:
    v, _, _ = _regular(cone)
    alpha = torch.linspace(0.1, 0.9, len(v), dtype=torch.float64)

    def project(u: Tensor, a: Tensor) -> Tensor:
        return cone.project(u) if cone is exponential else cone.project(u, a)

    expected = cone.derivative(v) if cone is exponential else cone.derivative(v, alpha)
    vmap, jacrev, jacfwd = torch.func.vmap, torch.func.jacrev, torch.func.jacfwd
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(vmap(transform(project))(v, alpha), expected)
    reverse = vmap(jacrev(jacrev(project)))(v, alpha)
    torch.testing.assert_close(vmap(jacfwd(jacrev(project)))(v, alpha), reverse)
    move = torch.ones_like(v)
    _, change = torch.func.jvp(lambda u: project(u, alpha), (v,), (move,))
    torch.testing.assert_close(change, expected @ move[0])


@pytest.mark.parametrize("cone", [exponential, power])
def test_gradients_at_special_points_are_finite(cone: Any) -> None:
    v, *parameters = _special(cone)
    v = v.clone().requires_grad_()
    p = cone.project(v, *parameters)
    (first,) = torch.autograd.grad(p.sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), v)
    (slope,) = torch.autograd.grad(cone.derivative(v, *parameters).sum(), v)
    for result in (p, first, second, slope):
        assert torch.isfinite(result).all()


# Shapes, types and devices.


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 4)])
def test_batch_shapes(shape: tuple[int, ...]) -> None:
    v = torch.ones(*shape, 3, dtype=torch.float64)
    v[..., 2] = -2.0
    alphas = [torch.tensor(0.3), torch.full(shape, 0.3), torch.full(shape[-1:], 0.3)]
    assert exponential.project(v).shape == (*shape, 3)
    assert exponential.derivative(v).shape == (*shape, 3, 3)
    for alpha in alphas:
        assert power.project(v, alpha).shape == (*shape, 3)
        assert power.derivative(v, alpha).shape == (*shape, 3, 3)


@both
def test_batch_does_not_matter(cone: Any, points: Any, reference: Any) -> None:
    arguments = points(60, seed=5)
    p, matrices = cone.project(*arguments), cone.derivative(*arguments)
    for i in range(0, len(p), 7):
        single = [a[i] for a in arguments]
        torch.testing.assert_close(cone.project(*single), p[i], rtol=1e-14, atol=0)
        torch.testing.assert_close(cone.derivative(*single), matrices[i], rtol=0, atol=1e-14)


@both
def test_float32_is_the_rounded_result(cone: Any, points: Any, reference: Any) -> None:
    v, *parameters = points(600, seed=6)
    v = v[_size(v) < 1e30].float()
    parameters = [q[: len(v)] for q in parameters]
    p = cone.project(v, *parameters)
    assert p.dtype == torch.float32
    assert torch.equal(p, cone.project(v.double(), *parameters).float())
    assert cone.derivative(v, *parameters).dtype == torch.float32
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(cone.project(v, *parameters).sum(), v)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@both
def test_results_are_on_the_device_and_do_not_depend_on_it(
    cone: Any, points: Any, reference: Any, device: str
) -> None:
    arguments = points(2000, seed=7)
    v = arguments[0] / _size(arguments[0]).unsqueeze(-1)
    arguments = (v, *arguments[1:])
    moved = [a.to(device) for a in arguments]
    p, matrices = cone.project(*moved), cone.derivative(*moved)
    assert p.device.type == device
    assert matrices.device.type == device
    torch.testing.assert_close(p.cpu(), cone.project(*arguments), rtol=0, atol=2e-15)
