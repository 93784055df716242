"""Projections: against CVXPY, searches over all faces, Table 1 of DDN and finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import declarative_cvx.nonconvex.kernels.projection.l1_projection as l1_projection
from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.kernels.projection import Projection, project

INF = math.inf
SPHERES = [("sphere", 1), ("sphere", 2), ("sphere", INF)]
BALLS = [("ball", 1), ("ball", 2), ("ball", INF)]
SETS = [*SPHERES, *BALLS, ("simplex", None)]
# Radii for points with standard normal entries, n = 6: far outside, across the boundary, inside.
RADII = [0.3, 1.7, 9.0]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def measure(y: Tensor, p: float | None) -> Tensor:
    """The norm that a set bounds; for the simplex the sum."""
    return y.sum(-1) if p is None else torch.linalg.vector_norm(y.double(), p, -1)


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, x)


def differences(function: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-6) -> Tensor:
    """Jacobian by central differences."""
    steps = h * torch.eye(x.numel(), dtype=x.dtype)
    return torch.stack([(function(x + e) - function(x - e)) / (2 * h) for e in steps], -1)


# The nearest point -------------------------------------------------------------------------------


def by_cvxpy(x: np.ndarray, onto: str, p: float | None, radius: float) -> np.ndarray:
    u = cp.Variable(x.size)
    constraints = [cp.sum(u) == radius, u >= 0] if p is None else [cp.norm(u, p) <= radius]
    precise = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
    cp.Problem(cp.Minimize(cp.sum_squares(u - x)), constraints).solve(cp.CLARABEL, **precise)
    return u.value


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize(("onto", "p"), [*BALLS, ("simplex", None)])
def test_convex_sets_agree_with_cvxpy(onto: str, p: float | None, radius: float) -> None:
    x = normal(5, 6)
    expected = np.stack([by_cvxpy(row, onto, p, radius) for row in x.numpy()])
    assert np.abs(project(x, onto, p, radius).numpy() - expected).max() < 1e-5


def on_simplex(x: np.ndarray, radius: float) -> np.ndarray:
    """The nearest point of the simplex, by bisection for the threshold."""
    low, high = x.min() - radius, x.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(x - middle, 0).sum() > radius else (low, middle)
    return np.maximum(x - low, 0)


def faces(x: np.ndarray, p: float, radius: float) -> list[np.ndarray]:
    """The nearest point of each face of a sphere of the L1 or the L-inf norm."""
    if p == 1:
        signs = [np.array(s) for s in itertools.product((-1.0, 1.0), repeat=x.size)]
        return [s * on_simplex(s * x, radius) for s in signs]
    clipped = np.clip(x, -radius, radius)
    ends = itertools.product(range(x.size), (-radius, radius))
    return [np.where(np.arange(x.size) == i, end, clipped) for i, end in ends]


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("p", [1, INF])
def test_spheres_with_faces_get_the_nearest_of_all_faces(p: float, radius: float) -> None:
    x = normal(6, 6)
    for row, y in zip(x.numpy(), project(x, "sphere", p, radius).numpy(), strict=True):
        nearest = min(faces(row, p, radius), key=lambda u: np.square(u - row).sum())
        assert np.abs(y - nearest).max() < 1e-12


def test_the_l2_sphere_and_ball_scale_the_point() -> None:
    x = normal(4, 6)
    norms = x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(project(x, radius=2.0), 2 * x / norms)
    torch.testing.assert_close(project(x, "ball", radius=2.0), x * (2 / norms).clamp(max=1))


def test_the_box_clips() -> None:
    x, lower, upper = normal(4, 6), -normal(6).abs(), normal(4, 1).abs()
    assert torch.equal(project(x, "box", lower=lower, upper=upper), x.clamp(lower, upper))
    assert torch.equal(project(x, "box", lower=0.0), x.clamp(min=0))


@pytest.mark.parametrize(("onto", "p"), BALLS)
def test_points_inside_a_ball_stay_to_the_last_bit(onto: str, p: float) -> None:
    x = normal(3, 6)
    x[1] *= 100
    y = project(x, onto, p, 30.0)
    assert torch.equal(y[[0, 2]], x[[0, 2]])
    assert not torch.equal(y[1], x[1])


# Derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", RADII)
@pytest.mark.parametrize(("onto", "p"), SETS)
def test_derivatives_in_point_and_radius(onto: str, p: float | None, scale: float) -> None:
    x = normal(4, 6).requires_grad_()
    radius = (scale * torch.tensor([0.5, 1, 1.5, 2], dtype=torch.float64)).requires_grad_()

    def function(x: Tensor, radius: Tensor) -> Tensor:
        return project(x, onto, p, radius)

    assert gradcheck(function, (x, radius), check_forward_ad=True)
    assert gradgradcheck(function, (x, radius), check_fwd_over_rev=True)


def test_derivatives_of_the_box() -> None:
    bounds = -normal(6, seed=1).abs(), torch.tensor(0.5, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (normal(4, 6), *bounds)]

    def function(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        return project(x, "box", lower=lower, upper=upper)

    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs)


def table_1(x: Tensor, p: float, radius: float, derivative: str) -> Tensor:
    """Dy(x) for a sphere by the formulas of DDN, Table 1, with the radius put in."""
    y, eye = project(x, "sphere", p, radius), torch.eye(x.numel(), dtype=x.dtype)
    if p == 2:
        return radius / x.norm() * (eye - torch.outer(y, y) / radius**2)
    held = y.abs() >= y.abs().max() * (1 - 1e-12) if p == INF else torch.ones_like(y)
    a = y.sign() * held
    line = torch.outer(a, a) / (a @ a)
    if derivative == "unmasked":
        return eye - line
    return torch.diag(a.abs()) - line if p == 1 else eye - torch.diag(a.abs())


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("derivative", ["exact", "unmasked"])
@pytest.mark.parametrize("p", [1, 2, INF])
def test_table_1(p: float, derivative: str, radius: float) -> None:
    for x in normal(4, 6):
        formula = table_1(x, p, radius, derivative)
        sphere = jacobian(lambda x: project(x, "sphere", p, radius, derivative=derivative), x)
        torch.testing.assert_close(sphere, formula)
        ball = jacobian(lambda x: project(x, "ball", p, radius, derivative=derivative), x)
        inside = bool(torch.linalg.vector_norm(x, p) < radius)
        torch.testing.assert_close(ball, torch.eye(6, dtype=x.dtype) if inside else formula)
        if derivative == "exact":
            finite = differences(lambda x: project(x, "sphere", p, radius), x)
            torch.testing.assert_close(finite, formula, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("p", [1, INF])
def test_the_unmasked_derivative_is_another_one_where_entries_are_held(p: float) -> None:
    x = torch.tensor([3.0, -2.5, 0.1, 0.2], dtype=torch.float64)
    finite = differences(lambda x: project(x, "sphere", p, 1.0), x)
    unmasked = jacobian(lambda x: project(x, "sphere", p, 1.0, derivative="unmasked"), x)
    assert (finite - unmasked).abs().max() > 0.4


@pytest.mark.parametrize("p", [1, 2, INF])
def test_the_choice_does_not_change_point_or_radius_derivative(p: float) -> None:
    x, radius = normal(4, 6), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    results = [project(x, "sphere", p, radius, derivative=d) for d in ("exact", "unmasked")]
    slopes = [torch.autograd.grad(y.cos().sum(), radius)[0] for y in results]
    assert torch.equal(*results)
    torch.testing.assert_close(*slopes)


# Where the projection is not unique or has no derivative -----------------------------------------


@pytest.mark.parametrize(
    ("onto", "p", "expected"),
    [
        ("sphere", 1, [0.5, 0.5, 0.5, 0.5]),
        ("sphere", 2, [1.0, 1.0, 1.0, 1.0]),
        ("sphere", INF, [2.0, 0.0, 0.0, 0.0]),
        ("ball", 1, [0.0, 0.0, 0.0, 0.0]),
        ("ball", 2, [0.0, 0.0, 0.0, 0.0]),
        ("ball", INF, [0.0, 0.0, 0.0, 0.0]),
        ("simplex", None, [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_zero(onto: str, p: float | None, expected: list[float]) -> None:
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    radius = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    solution = Projection(onto, p, radius).solve(x)
    torch.testing.assert_close(solution.value.tolist(), expected)
    assert bool(solution.regular) == (onto != "sphere")
    slope = torch.autograd.grad(solution.value.sum(), radius, retain_graph=True)[0]
    assert slope == pytest.approx(sum(expected) / 2)
    loss = solution.value.exp().sum()
    first = torch.autograd.grad(loss, (x, radius), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), (x, radius), materialize_grads=True)
    assert all(bool(g.isfinite().all()) for g in (*first, *second))


def test_of_several_largest_entries_the_first_is_moved() -> None:
    x = torch.tensor([[1.0, -2.0, 2.0], [1.0, -3.0, 2.0], [5.0, 5.0, 1.0]], dtype=torch.float64)
    solution = Projection("sphere", INF, 4.0).solve(x)
    assert solution.value.tolist() == [[1, -4, 2], [1, -4, 2], [4, 4, 1]]
    assert solution.regular.tolist() == [False, True, True]
    assert solution.solved.all()


def test_ties_share_what_there_is() -> None:
    x = torch.tensor([3.0, 3.0, -3.0, 1.0], dtype=torch.float64)
    for onto, expected in (("sphere", [1, 1, -1, 0]), ("ball", [1, 1, -1, 0])):
        torch.testing.assert_close(project(x, onto, 1, 3.0), torch.tensor(expected).double())


@pytest.mark.parametrize(
    ("onto", "p", "x", "radius"),
    [
        ("ball", 1, [0.5, -0.5, 1.0], 2.0),
        ("ball", 2, [3.0, 0.0, 4.0], 5.0),
        ("ball", INF, [2.0, 0.5, -1.0], 2.0),
        ("sphere", 1, [2.0, 0.0, 0.0], 2.0),
        ("sphere", 1, [3.0, 1.0, 0.0], 2.0),
        ("sphere", 1, [0.5, 0.0, 0.2], 2.0),
        ("sphere", INF, [2.0, 2.0, 0.0], 2.0),
        ("simplex", None, [3.0, 1.0, 0.0], 2.0),
    ],
)
def test_breakpoints_are_reported_and_have_the_derivative_from_outside(
    onto: str, p: float | None, x: list[float], radius: float
) -> None:
    """Every x here lies on the boundary, or has an entry at the threshold of shrinking or at 0."""
    point = torch.tensor(x, dtype=torch.float64)
    solution = Projection(onto, p, radius).solve(point)
    assert solution.solved
    assert not solution.regular
    if onto == "ball":
        found = jacobian(lambda x: project(x, onto, p, radius), point)
        torch.testing.assert_close(found, table_1(point, p, radius, "exact"))


@pytest.mark.parametrize(("onto", "p"), SETS)
def test_points_of_normal_data_are_regular(onto: str, p: float | None) -> None:
    for radius in RADII:
        solution = Projection(onto, p, radius).solve(normal(50, 6))
        assert solution.regular.all()
        assert solution.solved.all()


@pytest.mark.parametrize(("onto", "p"), SETS)
def test_one_dimension(onto: str, p: float | None) -> None:
    x = torch.tensor([[-3.0], [-0.5], [0.5], [3.0]], dtype=torch.float64, requires_grad=True)
    y = project(x, onto, p, 2.0)
    expected = {"ball": [-2, -0.5, 0.5, 2], "sphere": [-2, -2, 2, 2], "simplex": [2, 2, 2, 2]}
    assert y.flatten().tolist() == expected[onto]
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.flatten().tolist() == ([0, 1, 1, 0] if onto == "ball" else [0, 0, 0, 0])


# Accuracy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_that_would_overflow_or_underflow(
    dtype: torch.dtype, size: float, radius: float
) -> None:
    x = normal(8, 1000, dtype=dtype) * size
    x[0], x[1], x[2, 0] = 0, size, 1e3 * size
    for onto, p in SETS:
        y = project(x, onto, p, radius)
        reach = measure(y.double() / radius, p)
        moved = torch.ones(8, dtype=torch.bool)
        if onto == "ball":
            moved = measure(x.double() / radius, p) > 1
        off = (reach - 1).abs()[moved]
        assert (off <= 30 * torch.finfo(dtype).eps).all(), (onto, p)
        assert Projection(onto, p, radius).solve(x).solved.all(), (onto, p)


@pytest.mark.parametrize(("onto", "p"), SETS)
@pytest.mark.parametrize("radius", [1.0, 300.0, 3000.0])
def test_float32_is_accurate(onto: str, p: float | None, radius: float) -> None:
    x, g = normal(8, 3000, dtype=torch.float32), normal(8, 3000, seed=1, dtype=torch.float32)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        y = project(leaf, onto, p, radius)
        assert y.dtype == dtype
        results.append((y, torch.autograd.grad(y, leaf, g.to(dtype))[0]))
    (y, slope), (precise, precise_slope) = results
    assert (y - precise).abs().max() <= 3e-7 * precise.abs().max()
    assert (slope - precise_slope).abs().max() <= 2e-6 * precise_slope.abs().max()


def sequences(n: int) -> Tensor:
    """Points of many distributions, two with one entry far above many small ones."""
    k = torch.arange(1, n + 1, dtype=torch.float64)
    ramps = [-k, -(k**2), -(1.001 ** k.clamp(max=1e5)), -k.log(), 1 / k, torch.ones_like(k)]
    noise = [normal(n), normal(n).exp(), normal(n) * 1e-6 + (k == 5), normal(n) * 1e-4 + (k == 5)]
    return torch.stack([*ramps, *noise])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [1e-6, 0.1, 1.0, 30.0, 1e5])
def test_few_passes_find_the_l1_threshold(
    monkeypatch: pytest.MonkeyPatch, radius: float, dtype: torch.dtype
) -> None:
    """None of these distributions needs more passes than log2(n)."""
    x = sequences(20_000).to(dtype)
    monkeypatch.setattr(l1_projection, "MAX_PASSES", 15)
    rounding = torch.finfo(dtype).eps
    for onto, p in (("sphere", 1), ("simplex", None)):
        y = project(x, onto, p, radius).double()
        assert ((measure(y.abs(), None) / radius - 1).abs() <= 10 * rounding).all()
        if onto == "simplex":
            wide = x.double().numpy().astype(np.longdouble)
            wide -= wide.max(-1, keepdims=True)
            expected = np.stack([on_simplex(row, radius) for row in wide])
            error = np.abs(y.numpy() - expected).max(-1)
            assert (error <= 10 * rounding * expected.max(-1)).all()


@pytest.mark.parametrize(("onto", "p"), SETS)
def test_points_of_a_batch_do_not_influence_each_other(onto: str, p: float | None) -> None:
    x = sequences(1000).float()
    for radius in (0.1, 30.0):
        alone = torch.stack([project(row, onto, p, radius) for row in x])
        assert torch.equal(project(x, onto, p, radius), alone)


def test_one_large_entry_among_very_many_small_ones() -> None:
    """Settling with too small a sum must not be followed by a step that overshoots."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.rand(100_000, generator=generator) * 1e-6
        x[5] += 1
        assert abs(float(project(x, "sphere", 1, 1.0).double().sum()) - 1) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("onto", ["sphere", "ball"])
def test_l2_derivative_where_the_square_of_the_radius_is_out_of_range(
    onto: str, size: float
) -> None:
    g, slopes = normal(3, 6, seed=1), []
    for dtype in (torch.float32, torch.float64):
        x = (normal(3, 6) * size).to(dtype).requires_grad_()
        slopes += torch.autograd.grad(project(x, onto, 2, size), x, g.to(dtype))
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=1e-5, atol=1e-6)


def test_points_that_fill_several_blocks() -> None:
    x = normal(5, l1_projection.BLOCK // 2 + 1)
    whole = project(x, "ball", 1, 10.0)
    assert torch.equal(whole, torch.stack([project(row, "ball", 1, 10.0) for row in x]))
    torch.testing.assert_close(whole.abs().sum(-1), torch.full((5,), 10.0, dtype=torch.float64))


def test_half_precision_is_computed_in_single() -> None:
    x = normal(3, 2000).to(torch.bfloat16)
    y = project(x, "sphere", 2)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, project(x.float(), "sphere", 2).to(torch.bfloat16))


# Shapes and transforms ---------------------------------------------------------------------------


@st.composite
def shapes_and_dims(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    axes = draw(st.permutations(range(len(shape))))
    return shape, tuple(axes[: draw(st.integers(1, len(shape)))])


@settings(deadline=None, max_examples=40)
@given(case=shapes_and_dims(), kind=st.sampled_from(SETS), seed=st.integers(0, 99))
def test_any_dimensions_make_up_a_point(
    case: tuple[tuple[int, ...], tuple[int, ...]], kind: tuple[str, float | None], seed: int
) -> None:
    shape, dims = case
    batch = [axis for axis in range(len(shape)) if axis not in dims]
    x, (onto, p) = normal(*shape, seed=seed), kind
    radius = normal(*(shape[axis] for axis in batch), seed=seed + 1).abs() + 0.1
    solution = Projection(onto, p, radius, dims).solve(x)
    assert solution.value.shape == shape
    assert solution.residual.shape == radius.shape
    order = [*batch, *dims]
    rows = x.permute(order).reshape(radius.numel(), -1)
    each = [project(row, onto, p, float(r)) for row, r in zip(rows, radius.flatten(), strict=True)]
    found = solution.value.permute(order).reshape(radius.numel(), -1)
    torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize(("onto", "p"), SETS)
def test_vmap(onto: str, p: float | None) -> None:
    x, radius = normal(3, 4, 6), normal(3, 4, seed=1).abs() + 0.1

    def function(x: Tensor, radius: Tensor) -> Tensor:
        return project(x, onto, p, radius)

    expected = function(x, radius)
    twice = torch.func.vmap(torch.func.vmap(function))(x, radius)
    torch.testing.assert_close(twice, expected)
    radii_only = torch.func.vmap(function, in_dims=(None, 1))(x[:, 0], radius)
    torch.testing.assert_close(radii_only[2], function(x[:, 0], radius[:, 2]))
    torch.testing.assert_close(torch.func.vmap(function, 1, 1)(x, radius), expected)


@pytest.mark.parametrize(("onto", "p"), SETS)
def test_function_transforms(onto: str, p: float | None) -> None:
    x = normal(2, 6)

    def loss(x: Tensor) -> Tensor:
        return project(x, onto, p, 1.7).cos().sum()

    hessians = torch.func.vmap(torch.func.hessian(loss))(x)
    expected = [torch.autograd.functional.hessian(loss, row) for row in x]
    torch.testing.assert_close(hessians, torch.stack(expected))
    forward, reverse = torch.func.jacfwd(loss)(x), torch.func.jacrev(loss)(x)
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize(("onto", "p"), [("sphere", 1), ("ball", 2), ("sphere", INF)])
def test_compiles_without_a_break(onto: str, p: float) -> None:
    layer = Projection(onto, p, torch.tensor(1.7, dtype=torch.float64))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(4, 6).requires_grad_()
    y, z = compiled(x), layer(x)
    torch.testing.assert_close(y, z)
    slopes = [torch.autograd.grad(value.cos().sum(), x)[0] for value in (y, z)]
    torch.testing.assert_close(*slopes)


# The module and its report -----------------------------------------------------------------------


def test_the_report() -> None:
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    solution = Projection("ball", 2).solve(x)
    torch.testing.assert_close(solution.objective, torch.tensor([8.0, 0.0]).double())
    assert solution.solved.all()
    assert solution.gap.tolist() == [0, 0]
    assert solution.residual.max() < 1e-15


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize(("onto", "p"), [*SETS, ("box", None)])
def test_the_residual_tells_wrong_points(onto: str, p: float | None, radius: float) -> None:
    from declarative_cvx.nonconvex.kernels.projection.sets import SETS as KNOWN

    x, wrong = normal(20, 6), normal(20, 6, seed=1) * 1e-3
    name = onto if p is None else f"{onto} {p} exact"
    bounds = [torch.full((20, 1), r, dtype=torch.float64) for r in (radius,)]
    if onto == "box":
        bounds = [-bounds[0], bounds[0]]
    y, norm = KNOWN[name].nearest(x, *bounds)
    assert KNOWN[name].residual(x, y, norm, *bounds).max() < 1e-14
    assert KNOWN[name].residual(x, y + wrong, norm, *bounds).min() > 1e-8


def test_a_radius_can_be_learned() -> None:
    layer = Projection("sphere", 1, torch.nn.Parameter(torch.tensor(2.0)))
    layer(normal(3, 5, dtype=torch.float32)).abs().sum().backward()
    assert layer.radius.grad == pytest.approx(3.0)
    assert [*layer.state_dict()] == ["radius"]
    assert "'sphere', p=1" in repr(layer)


def test_inputs_are_left_alone() -> None:
    x, radius = normal(4, 6), torch.full((4,), 1.5, dtype=torch.float64)
    kept = x.clone(), radius.clone()
    for onto, p in SETS:
        project(x, onto, p, radius)
    assert torch.equal(x, kept[0])
    assert torch.equal(radius, kept[1])


def test_an_empty_batch_is_none_to_project() -> None:
    for onto, p in SETS:
        assert project(torch.empty(0, 3), onto, p).shape == (0, 3)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize(("onto", "p"), [*SETS, ("box", None)])
def test_entries_that_are_not_finite(onto: str, p: float | None, value: float) -> None:
    x = normal(3, 4, 5)
    x[2, 1, 3] = value
    bounds = {"lower": -1.0} if onto == "box" else {}
    with pytest.raises(ParameterError, match=rf"x is {value} at entry 3 of batch element \(2, 1\)"):
        project(x, onto, p, **bounds)


@pytest.mark.parametrize(("onto", "p"), SETS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, INF])
def test_radii_that_are_not_positive(onto: str, p: float | None, value: float) -> None:
    radius = torch.ones(3, 4)
    radius[1, 2] = value
    with pytest.raises(ParameterError, match=rf"radius is {value} for batch element \(1, 2\)"):
        project(torch.ones(3, 4, 5), onto, p, radius)
    with pytest.raises(ParameterError, match=rf"radius is {value}; it must be positive"):
        Projection(onto, p, value)


def test_boxes_that_are_empty() -> None:
    lower = torch.tensor([0.0, 2.0, 0.0])
    with pytest.raises(ParameterError, match=r"lower is 2.0 and upper is 1.0 at entry 1 of the po"):
        project(torch.zeros(3), "box", lower=lower, upper=1.0)
    with pytest.raises(ParameterError, match="upper is nan at entry 0"):
        project(torch.zeros(3), "box", lower=lower, upper=math.nan)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([1.0], {}, "x must be a tensor, got list"),
        (torch.ones(3, dtype=torch.int64), {}, "x has dtype torch.int64"),
        (torch.ones(3), {"dim": 1}, "dim 1 does not exist: x has 1 dimensions"),
        (torch.ones(2, 0), {}, r"dim -1 of x, of shape \(2, 0\), is empty"),
        (torch.ones(2, 3), {"radius": torch.ones(3)}, r"radius has shape \(3,\).*to \(2,\), the"),
    ],
)
def test_tensors_that_do_not_fit(x: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        project(x, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"onto": "spere"}, "Did you mean 'sphere'"),
        ({"p": 3}, "p must be 1, 2 or inf, got 3"),
        ({"derivative": "masked"}, "'exact' .the masked or plateau form"),
        ({"onto": "simplex", "p": 1}, "p has no meaning for onto='simplex'"),
        ({"onto": "box", "radius": 1.0, "upper": 1.0}, "radius has no meaning for onto='box'"),
        ({"onto": "ball", "lower": 1.0}, "lower has no meaning for onto='ball'"),
        ({"onto": "box"}, "needs lower, upper or both"),
        ({"onto": "simplex", "derivative": "unmasked"}, "has no meaning for onto='simplex'"),
        ({"radius": "1"}, "radius must be a number or a tensor, got str"),
        ({"dim": ()}, "dim is empty"),
        ({"dim": (0, -2)}, "names a dimension of x twice"),
    ],
)
def test_arguments_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecificationError, match=message):
        project(torch.ones(2, 3), **options)
