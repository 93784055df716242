"""Derivatives of every order, in both modes, against closed forms that torch differentiates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from closed_forms import FORMS, G, Outputs, values_of
from numpy.testing import assert_allclose
from problems import Case, case_named
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from declarative_cvx import DeclarativeLayer, SolveError, Status

ALL = [case_named(name) for name in FORMS]
KINDS = [
    case_named(name)
    for name in (
        "inequality_qp_with_psd_parameter",
        "linear_over_a_ball_with_dual",
        "nearest_psd_matrix_with_dual",
        "exponential_cone_with_duals",
        "weighted_geometric_mean_under_a_budget",
        "logarithms_over_a_ball",
        "cheapest_rectangle_of_given_area",
    )
]


def tensors(values: Any) -> list[Tensor]:
    return [torch.tensor(np.asarray(value, dtype=float)) for value in values]


@lru_cache
def layer_of(case: Case) -> DeclarativeLayer:
    return DeclarativeLayer(*case.build(), gp=case.gp, optimal_value=True)


def weighted(outputs: Outputs) -> Tensor:
    """A scalar in which every entry of every output has a weight of its own."""
    rng = np.random.default_rng(5)
    weights = [torch.as_tensor(rng.uniform(0.5, 1.5, tuple(out.shape))) for out in outputs]
    return sum((w * out).sum() for w, out in zip(weights, outputs, strict=True))


def assert_close(found: Any, expected: Any, accuracy: float) -> None:
    """Nested tuples of tensors, compared relative to the largest entry of each."""
    if isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, accuracy)
        return
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=accuracy * scale)


def every(values: list[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(values)))


def along(values: list[Tensor], like: Case, seed: int = 1) -> list[Tensor]:
    """Directions of the parameters that keep their attributes."""
    ends = tensors(like.draw(seed)), tensors(like.draw(seed + 1))
    return [one - other for one, other in zip(*ends, strict=True)]


# First derivatives


@pytest.mark.parametrize("case", ALL, ids=str)
def test_outputs_and_their_jacobians_are_those_of_the_closed_form(case: Case) -> None:
    layer, form, values = layer_of(case), FORMS[case.name], tensors(values_of(case))
    assert_close(layer(*values), form(*values), 1e-7)
    expected = jacrev(form, argnums=every(values))(*values)
    assert_close(jacrev(layer, argnums=every(values))(*values), expected, 1e-6)
    assert_close(jacfwd(layer, argnums=every(values))(*values), expected, 1e-6)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_jvp_is_the_directional_derivative(case: Case) -> None:
    values = tensors(values_of(case))
    tangents = along(values, case)
    outputs, changes = jvp(layer_of(case), tuple(values), tuple(tangents))
    assert_close(outputs, layer_of(case)(*values), 1e-12)
    expected = jvp(FORMS[case.name], tuple(values), tuple(tangents))[1]
    assert_close(changes, expected, 1e-6)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    layer, values = layer_of(case), tensors(values_of(case))
    direction = along(values, case)

    def loss(step: Tensor) -> Tensor:
        return weighted(layer(*(v + step * d for v, d in zip(values, direction, strict=True))))

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    tolerances: dict[str, float] = {"eps": 1e-5, "atol": 1e-5, "rtol": 1e-5}
    assert torch.autograd.gradcheck(loss, step, check_forward_ad=True, **tolerances)
    assert torch.autograd.gradgradcheck(loss, step, **tolerances)


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_gradients_are_linear_in_the_upstream_gradient(case: Case, size: float) -> None:
    values = [v.requires_grad_() for v in tensors(values_of(case))]
    loss = weighted(layer_of(case)(*values))
    expected = torch.autograd.grad(loss, values, retain_graph=True)
    found = torch.autograd.grad(loss, values, torch.tensor(size, dtype=torch.float64))
    assert_close([g / size for g in found], expected, 1e-10)


# The optimal value


@pytest.mark.parametrize("case", ALL, ids=str)
def test_hessian_of_the_optimal_value(case: Case) -> None:
    values, form = tensors(values_of(case)), FORMS[case.name]
    layer = layer_of(case)
    hessian = torch.autograd.functional.hessian
    found = hessian(lambda *v: layer(*v)[-1], tuple(values))
    assert_close(found, hessian(lambda *v: form(*v)[-1], tuple(values)), 1e-6)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_hessian_of_the_optimal_value_is_that_of_differences_of_its_gradient(case: Case) -> None:
    values = tensors(values_of(case))
    direction = along(values, case)
    slope = grad(lambda *v: layer_of(case)(*v)[-1], argnums=every(values))
    found = jvp(slope, tuple(values), tuple(direction))[1]
    h = 1e-5
    ends = [
        slope(*(v + sign * h * d for v, d in zip(values, direction, strict=True)))
        for sign in (1, -1)
    ]
    assert_close(found, [(up - down) / (2 * h) for up, down in zip(*ends, strict=True)], 1e-5)


def test_gradient_of_the_optimal_value_is_that_of_the_lagrangian() -> None:
    case = case_named("inequality_qp_with_psd_parameter")
    P, q, h = (v.requires_grad_() for v in tensors(values_of(case)))
    x, y, value = layer_of(case)(P, q, h)
    found = torch.autograd.grad(value, [P, q, h])
    x, y = (torch.as_tensor(v) for v in case.expected(values_of(case)))
    lagrangian = x @ P @ x + q @ x + y @ (G @ x - h)
    assert_close(found, torch.autograd.grad(lagrangian, [P, q, h]), 1e-8)
    step = 1e-4

    def solved(k: int) -> float:
        moved = torch.eye(4, dtype=torch.float64)[k % 4] * (step if k < 4 else -step)
        return float(layer_of(case)(P.detach(), q.detach(), h.detach() + moved)[-1])

    differences = [(solved(k) - solved(k + 4)) / (2 * step) for k in range(4)]
    assert_allclose(found[2].numpy(), differences, atol=1e-6)


# Transforms of functions


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_vmap_over_each_parameter_and_over_all_equals_a_loop(case: Case) -> None:
    layer, size = layer_of(case), 3
    batch, single = tensors(case.draw_batch(size)), tensors(values_of(case))
    choices = [{k} for k in range(len(single))] + [set(range(len(single)))]
    for chosen in choices:
        values = [b if k in chosen else s for k, (b, s) in enumerate(zip(batch, single))]  # noqa: B905
        dims = tuple(0 if k in chosen else None for k in range(len(single)))
        found = vmap(layer, in_dims=dims)(*values)
        for i in range(size):
            alone = layer(*(v[i] if k in chosen else v for k, v in enumerate(values)))
            assert_close([out[i] for out in found], alone, 1e-8)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_vmap_along_other_dimensions_around_batches_and_nested(case: Case) -> None:
    layer = layer_of(case)
    four = tensors(case.draw_batch(4))
    expected = layer(*four)
    last = [v.movedim(0, -1) for v in four]
    assert_close(vmap(layer, in_dims=-1)(*last), expected, 1e-8)
    square = [v.unflatten(0, (2, 2)) for v in four]
    for function in (vmap(layer), vmap(vmap(layer))):
        assert_close([out.flatten(0, 1) for out in function(*square)], expected, 1e-8)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_transforms_of_transforms(case: Case) -> None:
    layer, form, size = layer_of(case), FORMS[case.name], 3
    single, which = tensors(values_of(case)), every(tensors(values_of(case)))
    near = [
        torch.stack([v + 1e-3 * k * d for k in range(size)])
        for v, d in zip(single, along(single, case), strict=True)
    ]
    expected = vmap(jacrev(form, argnums=which))(*near)
    for transform in (jacrev, jacfwd):
        assert_close(vmap(transform(layer, argnums=which))(*near), expected, 1e-6)
    slope = grad(lambda *v: weighted(form(*v)), argnums=which)
    expected = jacrev(slope, argnums=which)(*single)  # reverse mode, which torch has right
    slope = grad(lambda *v: weighted(layer(*v)), argnums=which)
    assert_close(jacfwd(slope, argnums=which)(*single), expected, 1e-5)
    assert_close(jacrev(slope, argnums=which)(*single), expected, 1e-5)
    mixed = jacrev(jacfwd(lambda *v: weighted(layer(*v)), argnums=which), argnums=which)
    assert_close(mixed(*single), expected, 1e-5)


def test_forward_mode_over_forward_mode_is_right_or_refused() -> None:
    """Torch drops forward mode inside the forward mode of a custom function, without a word."""
    case = case_named("softmax_as_entropy_maximisation")
    (c,) = tensors(values_of(case))
    try:
        found = jacfwd(jacfwd(layer_of(case)))(c)
    except Exception as error:
        assert "forward" in str(error)  # noqa: PT017
        return
    assert_close(found, jacfwd(jacfwd(FORMS[case.name]))(c), 1e-6)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_second_derivatives_of_one_parameter_while_others_stay(case: Case) -> None:
    single = tensors(values_of(case))
    for k, value in enumerate(single):

        def loss(function: Callable[..., Outputs], v: Tensor, k: int = k) -> Tensor:
            return weighted(function(*single[:k], v, *single[k + 1 :]))

        layer, form = partial(loss, layer_of(case)), partial(loss, FORMS[case.name])
        expected = jacrev(jacrev(form))(value)
        for outer, inner in ((jacrev, jacfwd), (jacfwd, jacrev), (jacrev, jacrev)):
            assert_close(outer(inner(layer))(value), expected, 1e-5)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_first_call_inside_transforms_does_not_spoil_later_ones(case: Case) -> None:
    layer = DeclarativeLayer(*case.build(), gp=case.gp)
    first, *others = tensors(values_of(case))

    def loss(v: Tensor) -> Tensor:
        return weighted(layer(v, *others))

    third = jacrev(jacrev(jacrev(loss)))(first)
    assert_close(jacfwd(jacrev(jacrev(loss)))(first), third, 1e-5)
    again = first.clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(again), again, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), again)
    form = FORMS[case.name]
    expected = jacrev(jacrev(lambda v: weighted(form(v, *others)[:-1])))(first)
    assert_close(twice, expected.sum(tuple(range(first.ndim))), 1e-5)


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_third_derivatives(transform: Callable[..., Any]) -> None:
    case = case_named("equality_constrained_qp")
    layer, (A, b, c) = layer_of(case), tensors(values_of(case))

    def entry(function: Callable[..., Outputs], A: Tensor, outer: Callable[..., Any]) -> Tensor:
        return outer(grad(lambda a: weighted(function(a, b, c))))(A)[0, 1, 1, 2]

    found = grad(lambda A: entry(layer, A, transform))(A)
    # Reverse mode only: torch's own systems are wrong with forward mode in between.
    assert_close(found, grad(lambda A: entry(FORMS[case.name], A, jacrev))(A), 1e-8)
    h, step = 1e-4, torch.zeros_like(A)
    step[1, 3] = h
    difference = (entry(layer, A + step, jacrev) - entry(layer, A - step, jacrev)) / (2 * h)
    assert float(found[1, 3]) == pytest.approx(float(difference), rel=1e-5, abs=1e-5)


def test_one_parameter_may_enter_everything() -> None:
    """It multiplies P and A and shifts q and b; three derivatives of solution, dual and value."""
    rng = np.random.default_rng(8)
    A, b, q = rng.standard_normal((2, 4)), rng.standard_normal(2), rng.standard_normal(4)
    t, x = cp.Parameter(nonneg=True), cp.Variable(4)
    equality = t * (A @ x) + A @ x == b + t
    problem = cp.Problem(cp.Minimize(t * cp.sum_squares(x) + (1 + t) * (q @ x)), [equality])
    layer = DeclarativeLayer(problem, [t], [x, equality.dual_variables[0]], optimal_value=True)
    A, b, q = tensors([A, b, q])

    def form(t: Tensor) -> Outputs:
        rows = (1 + t) * A
        multiplier = torch.linalg.solve(
            rows @ rows.T, -(1 + t) * (rows @ q) - 2 * t * (b + t)
        )  # 2 t x = -(1 + t) q - rows' y
        x = -((1 + t) * q + rows.T @ multiplier) / (2 * t)
        return x, multiplier, t * (x @ x) + (1 + t) * (q @ x)

    at = torch.tensor(0.7, dtype=torch.float64)
    one, other = layer, form
    for accuracy in (1e-8, 1e-7, 1e-6):
        one, other = jacrev(one), jacrev(other)
        assert_close(one(at), other(at), accuracy)
    assert_close(jacrev(jacfwd(layer))(at), jacrev(jacrev(form))(at), 1e-7)
    assert_close(jacfwd(jacrev(layer))(at), jacrev(jacrev(form))(at), 1e-7)


# Failed elements


def _distance_to_a_half_line(**options: Any) -> DeclarativeLayer:
    """The x in [low, 1] that is nearest to v: infeasible where low > 1."""
    x, v, low = cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x - v) / 2), [x >= low, x <= 1])
    return DeclarativeLayer(problem, [v, low], [x], **options)


def test_failed_elements_under_vmap_are_nan_with_zero_gradient() -> None:
    layer = _distance_to_a_half_line(on_failure="nan")
    v = torch.tensor([0.5, 0.2, -3.0], dtype=torch.float64)
    low = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    statuses: list[tuple[Status, ...]] = []

    def solve(v: Tensor, low: Tensor) -> Tensor:
        solution = layer.solve(v, low)
        statuses.append(solution.status)
        return solution.variables[0]

    (x,) = vmap(layer)(v, low)
    assert_allclose(x, [0.5, np.nan, -1.0], atol=1e-8)
    gradients = vmap(grad(solve, argnums=(0, 1)))(v, low)
    assert_allclose(gradients[0], [1.0, 0.0, 0.0], atol=1e-8)
    assert_allclose(gradients[1], [0.0, 0.0, 1.0], atol=1e-8)
    assert statuses == [(Status.OPTIMAL, Status.INFEASIBLE, Status.OPTIMAL)]
    forward = vmap(lambda v, low: jvp(layer, (v, low), (torch.ones_like(v), low))[1][0])(v, low)
    assert_allclose(forward[[0, 2]], [1.0, -1.0], atol=1e-8)


def test_failed_elements_under_vmap_raise_where_they_should() -> None:
    layer = _distance_to_a_half_line()
    with pytest.raises(SolveError, match="element 1: INFEASIBLE"):
        vmap(layer, in_dims=(None, 0))(torch.zeros(()), torch.tensor([0.0, 2.0]))


# Compilation


class _Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn((5, 5), generator=generator, dtype=torch.float64)
        self.mix, self.layer = nn.Parameter(mix), layer_of(case)

    def forward(self, v: Tensor) -> Tensor:
        x, value = self.layer(torch.tanh(v @ self.mix))
        return (x * torch.arange(5.0, dtype=torch.float64)).sum() + value.square().sum()


# The default backend needs a compiler.
COMPILERS = ["eager", "aot_eager", *(["inductor"] if shutil.which("g++") else [])]


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_models_have_the_same_values_and_gradients(backend: str) -> None:
    model = _Model(case_named("softmax_as_entropy_maximisation"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    v = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)
    results = []
    for function in (model, compiled):
        inputs = v.clone().requires_grad_()
        loss = function(inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, [inputs, model.mix])])
    assert_close(results[1], results[0], 1e-10)


# Units


UNITS = [(1e-5, 1e-4), (1e-5, 1e5), (1.0, 1e5), (1e5, 1e-4), (1e5, 1.0), (3e-2, 7e2)]


@pytest.mark.parametrize(("b", "objective"), UNITS)
@pytest.mark.parametrize(
    ("name", "powers", "outputs"),
    # Powers of the units of b and of the objective in which each parameter and output is measured.
    [
        ("linear_program_vertex", [(0, 0), (1, 0), (0, 1)], [(1, 0), (0, 1), (1, 1)]),
        ("inequality_qp_with_psd_parameter", [(0, 1), (1, 1), (1, 0)], [(1, 0), (1, 1), (2, 1)]),
        ("linear_over_a_ball_with_dual", [(0, 1), (1, 0)], [(1, 0), (0, 1), (0, 1), (1, 1)]),
        ("smallest_eigenvalue_of_order_3", [(0, 1)], [(0, 0), (0, 1), (0, 1)]),
    ],
)
def test_units_of_the_data_are_those_of_the_answer(
    name: str, powers: Any, outputs: Any, b: float, objective: float
) -> None:
    case = case_named(name)
    layer = layer_of(case)
    values = tensors(values_of(case))
    units = [b**i * objective**j for i, j in powers]
    expected, slopes = layer(*values), jacrev(layer, argnums=every(values))(*values)
    scaled = [v * unit for v, unit in zip(values, units, strict=True)]
    found, jacobians = layer(*scaled), jacrev(layer, argnums=every(values))(*scaled)
    for k, (i, j) in enumerate(outputs):
        size = b**i * objective**j
        assert_close(found[k] / size, expected[k], 1e-9)
        in_units = [part * (unit / size) for part, unit in zip(jacobians[k], units, strict=True)]
        assert_close(in_units, slopes[k], 1e-9)
