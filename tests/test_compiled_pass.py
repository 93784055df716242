"""Whole passes by compiled code give what the long way gives, or leave it to that."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from declarative_cvx import (
    BackendError,
    DeclarativeLayer,
    IrregularError,
    IrregularWarning,
    ParameterError,
    SolveError,
)
from declarative_cvx.compiled import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="installed without a compiler")

Problem = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]


def least_squares() -> Problem:
    """With rows of inequalities that belong to the substitution, to A, and to bounds."""
    x, F, g = cp.Variable(4, name="x"), cp.Parameter((6, 4), name="F"), cp.Parameter(6, name="g")
    G, h = cp.Parameter((3, 4), name="G"), cp.Parameter(3, name="h")
    constraints = [G @ x <= h, x >= -0.1]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g)), constraints)
    return problem, [F, g, G, h], [x, constraints[0].dual_variables[0]]


def portfolio() -> Problem:
    """A symmetric parameter, an equality, a constant matrix, its parts in two places."""
    x, mu = cp.Variable(5), cp.Parameter(5)
    root, limit = cp.Parameter((5, 5)), cp.Parameter(nonneg=True)
    exposure = np.random.default_rng(1).normal(size=(2, 5))
    risk = cp.sum_squares(root.T @ x) + 0.1 * cp.sum_squares(x)
    constraints = [cp.sum(x) == 1, x >= 0, exposure @ x <= limit, cp.sum(x[:2]) <= 2 * limit]
    problem = cp.Problem(cp.Maximize(mu @ x - risk), constraints)
    return problem, [mu, root, limit], [x, constraints[0].dual_variables[0]]


def linear() -> Problem:
    """Without curvature: a vertex."""
    x, c, b = cp.Variable((2, 3)), cp.Parameter((2, 3)), cp.Parameter(2, nonneg=True)
    constraints = [cp.sum(x, axis=1) == b, x >= 0, x[:, 0] + x[:, 1] <= 0.7]
    return cp.Problem(cp.Minimize(cp.sum(cp.multiply(c, x))), constraints), [c, b], [x]


def lasso() -> Problem:
    """With a curvature that does not reach all variables."""
    x, F = cp.Variable(4), cp.Parameter((8, 4))
    g, weight = cp.Parameter(8), cp.Parameter(nonneg=True)
    objective = 0.5 * cp.sum_squares(F @ x - g) + weight * cp.norm1(x)
    return cp.Problem(cp.Minimize(objective)), [F, g, weight], [x]


def quadratic_form() -> Problem:
    """P itself is a parameter, and is used transposed."""
    x, P, G = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter((3, 2))
    q = cp.Parameter(3)
    problem = cp.Problem(
        cp.Minimize(cp.quad_form(x, P) + q @ x), [G.T @ x <= 0.2, cp.sum(x) == q[0]]
    )
    return problem, [P, G, q], [x]


def fixed_matrix() -> Problem:
    """Constants right behind the coefficients of what is substituted, and fewer rows than x."""
    x, q, b = cp.Variable(6), cp.Parameter(6), cp.Parameter(nonneg=True)
    F = np.random.default_rng(0).normal(size=(4, 6))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x) + q @ x), [cp.sum(x) == b, x >= 0])
    return problem, [q, b], [x]


def rewritten() -> Problem:
    """Not disciplined: a product of parameters is computed beforehand."""
    x, p, q = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - cp.multiply(p, q))), [x >= -0.1]), [p, q], [x]


PROBLEMS: list[Callable[[], Problem]] = [
    least_squares,
    portfolio,
    linear,
    lasso,
    quadratic_form,
    fixed_matrix,
    rewritten,
]


def draw(parameters: list[cp.Parameter], batch: int, shared: bool, seed: int = 0) -> list[Tensor]:
    """Values, every second one shared by the batch if asked for; no batch at all for 0."""
    rng, values = np.random.default_rng(seed), []
    for i, parameter in enumerate(parameters):
        lead = () if batch == 0 or (shared and i % 2) else (batch,)
        value = rng.normal(size=(*lead, *parameter.shape))
        if parameter.attributes["nonneg"]:
            value = np.abs(value) + 0.2
        if parameter.attributes["PSD"]:
            value = value @ np.swapaxes(value, -1, -2) + 0.1 * np.eye(parameter.shape[0])
        if parameter.ndim == 1 and not parameter.attributes["nonneg"]:
            value = value + 0.5
        values.append(torch.tensor(value, requires_grad=True))
    return values


def long_way(layer: DeclarativeLayer, values: list[Tensor]) -> tuple[Tensor, ...]:
    """What `solve` gives, which never takes the compiled pass."""
    solution = layer.solve(*values)
    assert solution.all_solved
    return solution.variables


def is_compiled(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_PassBackward"


def gradients(outputs: tuple[Tensor, ...], values: list[Tensor]) -> tuple[Tensor, ...]:
    weights = [torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape).to(out) for out in outputs]
    total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, values)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("build", PROBLEMS)
def test_outputs_and_gradients_are_those_of_the_long_way(
    build: Callable[[], Problem], batch: int, shared: bool
) -> None:
    problem, parameters, variables = build()
    layer = DeclarativeLayer(problem, parameters, variables)
    values = draw(parameters, batch, shared)
    outputs, expected = layer(*values), long_way(layer, values)
    assert all(map(is_compiled, outputs))
    assert not any(map(is_compiled, expected))
    for found, wanted in zip(outputs, expected, strict=True):
        assert found.shape == wanted.shape
        assert_allclose(found.detach(), wanted.detach(), rtol=1e-9, atol=1e-10)
    pairs = zip(gradients(outputs, values), gradients(expected, values), strict=True)
    for value, (found, wanted) in zip(values, pairs, strict=True):
        assert found.shape == value.shape
        assert_allclose(found, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("build", PROBLEMS)
def test_gradients_are_those_of_differences(build: Callable[[], Problem]) -> None:
    problem, parameters, variables = build()
    layer = DeclarativeLayer(problem, parameters, variables)
    values = draw(parameters, 2, shared=True, seed=3)

    def outputs(*perturbed: Tensor) -> tuple[Tensor, ...]:
        # Differences leave the symmetric matrices, on which a gradient is defined.
        return layer(*(
            (v + v.mT) / 2 if parameter.attributes["PSD"] else v
            for v, parameter in zip(perturbed, parameters, strict=True)
        ))  # fmt: skip

    assert all(map(is_compiled, layer(*values)))
    assert torch.autograd.gradcheck(outputs, values, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_second_derivatives_take_the_long_way() -> None:
    problem, parameters, variables = least_squares()
    layer = DeclarativeLayer(problem, parameters, variables)
    values = draw(parameters, 2, shared=False)
    assert is_compiled(layer(*values)[0])
    assert torch.autograd.gradgradcheck(lambda *v: layer(*v)[0], values, atol=1e-6, rtol=1e-5)


def test_transforms_take_the_long_way() -> None:
    problem, parameters, variables = lasso()
    layer = DeclarativeLayer(problem, parameters, variables)
    F, g, weight = (v.detach() for v in draw(parameters, 3, shared=False))
    (expected,) = layer(F, g, weight)
    (found,) = torch.func.vmap(layer)(F, g, weight)
    assert_allclose(found, expected, atol=1e-10)
    jacobian = torch.func.jacrev(lambda v: layer(F[0], v, weight[0])[0])(g[0])
    forward = torch.func.jacfwd(lambda v: layer(F[0], v, weight[0])[0])(g[0])
    by_pass = torch.autograd.functional.jacobian(lambda v: layer(F[0], v, weight[0])[0], g[0])
    assert_allclose(jacobian, by_pass, atol=1e-10)
    assert_allclose(forward, by_pass, atol=1e-10)


def test_many_gradients_at_once_take_the_long_way() -> None:
    problem, parameters, variables = lasso()
    layer = DeclarativeLayer(problem, parameters, variables)
    values = draw(parameters, 0, shared=False)
    (x,) = layer(*values)
    several = torch.autograd.grad(
        x, values[1], torch.eye(4, dtype=x.dtype), is_grads_batched=True, retain_graph=True
    )[0]
    single = [
        torch.autograd.grad(x, values[1], row, retain_graph=True)[0] for row in torch.eye(4).to(x)
    ]
    assert_allclose(several, torch.stack(single), atol=1e-10)


def test_gradients_come_again_from_a_graph_that_is_kept() -> None:
    problem, parameters, variables = portfolio()
    layer = DeclarativeLayer(problem, parameters, variables)
    values = draw(parameters, 4, shared=True)
    x, _ = layer(*values)
    first = torch.autograd.grad(x[:, 0].sum(), values, retain_graph=True)
    again = torch.autograd.grad(x[:, 0].sum(), values)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_only_what_is_wanted_is_differentiated() -> None:
    problem, parameters, variables = least_squares()
    layer = DeclarativeLayer(problem, parameters, variables)
    values = draw(parameters, 3, shared=False)
    every = gradients(layer(*values), values)
    alone = [v if i == 3 else v.detach() for i, v in enumerate(values)]
    (found,) = gradients(layer(*alone), [values[3]])
    assert torch.equal(found, every[3])
    with torch.no_grad():
        assert layer(*values)[0].grad_fn is None
    with torch.inference_mode():
        assert_allclose(layer(*values)[0], layer.solve(*values).variables[0], atol=1e-10)


def test_values_in_other_orders_and_types_of_memory() -> None:
    problem, parameters, variables = least_squares()
    layer = DeclarativeLayer(problem, parameters, variables)
    values = draw(parameters, 3, shared=False)
    expected = layer(*values)
    strided = [v.detach().movedim(0, -1).contiguous().movedim(-1, 0) for v in values]
    assert not strided[0].is_contiguous()
    strided = [v.requires_grad_() for v in strided]
    found = layer(*strided)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(gradients(found, strided), gradients(expected, values), strict=True):
        assert torch.equal(one, other)
    single = [v.detach().float().requires_grad_() for v in values]
    (x, y) = layer(*single)
    assert is_compiled(x)
    assert x.dtype == y.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in gradients((x, y), single))
    assert_allclose(x.detach(), expected[0].detach(), atol=1e-4)


def test_views_of_negated_memory() -> None:
    problem, parameters, variables = lasso()
    layer = DeclarativeLayer(problem, parameters, variables)
    F, g, weight = (v.detach() for v in draw(parameters, 2, shared=False))
    negated = torch._neg_view(g)
    assert negated.is_neg()
    assert torch.equal(layer(F, negated, weight)[0], layer(F, -g, weight)[0])
    assert negated[0].is_contiguous()
    assert torch.equal(layer(F, negated[0], weight)[0], layer(F, -g[0], weight)[0])


def test_an_empty_batch_has_empty_outputs() -> None:
    problem, parameters, variables = lasso()
    layer = DeclarativeLayer(problem, parameters, variables)
    F, g, weight = (v.detach() for v in draw(parameters, 0, shared=False))
    F.requires_grad_()
    (x,) = layer(F, g.expand(0, 8), weight)
    assert x.shape == (0, 4)
    (grad,) = torch.autograd.grad(x.sum(), F)
    assert torch.equal(grad, torch.zeros_like(F))


def test_gradients_that_come_in_other_orders_of_memory() -> None:
    problem, parameters, variables = linear()
    layer = DeclarativeLayer(problem, parameters, variables)
    values = draw(parameters, 3, shared=False)
    (x,) = layer(*values)
    weights = torch.randn(3, 3, 2, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).mT
    assert not weights.is_contiguous()
    strided = torch.autograd.grad(x, values, weights, retain_graph=True)
    packed = torch.autograd.grad(x, values, weights.contiguous(), retain_graph=True)
    expanded = torch.autograd.grad(x.sum(), values)
    assert all(map(torch.equal, strided, packed))
    assert expanded[1].shape == values[1].shape


def projection(**options: object) -> DeclarativeLayer:
    x, p, b = cp.Variable(3), cp.Parameter(3), cp.Parameter(name="limit")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, cp.sum(x) <= b])
    return DeclarativeLayer(problem, [p, b], [x], **options)  # type: ignore[arg-type]


def test_weakly_active_constraints_are_still_complained_of() -> None:
    points = torch.tensor([[1.0, -1.0, 0.5], [1.0, 0.0, 0.5]], dtype=torch.float64)
    limit = torch.tensor(9.0, dtype=torch.float64)
    layer = projection()
    (x,) = layer(points[:1].requires_grad_(), limit)
    assert is_compiled(x)
    points = points.detach().requires_grad_()
    (x,) = layer(points, limit)
    assert not is_compiled(x)
    with pytest.warns(IrregularWarning, match="element"):
        x.sum().backward()
    with pytest.raises(IrregularError):
        projection(on_irregular="raise")(points, limit)[0].sum().backward()


def test_one_infeasible_element_leaves_the_others_right() -> None:
    points = torch.tensor([[1.0, -1.0, 0.5], [2.0, 1.0, 0.5]], dtype=torch.float64)
    limits = torch.tensor([1.0, -1.0], dtype=torch.float64)
    with pytest.raises(SolveError, match="element 1: INFEASIBLE"):
        projection()(points, limits)
    (x,) = projection(on_failure="nan")(points, limits)
    assert_allclose(x[0], [0.75, 0.0, 0.25], atol=1e-12)
    assert bool(torch.isnan(x[1]).all())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(wrong: float) -> None:
    points = torch.tensor([[1.0, -1.0, wrong]], dtype=torch.float64)
    with pytest.raises(ParameterError, match="finite"):
        projection()(points, torch.tensor(1.0, dtype=torch.float64))


def test_infinite_bounds_take_the_long_way() -> None:
    point = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    (x,) = projection()(point, torch.tensor(1e20, dtype=torch.float64))
    assert not is_compiled(x)
    assert_allclose(x.detach(), [1.0, 0.0, 0.5], atol=1e-12)


def test_a_start_is_refused_though_it_is_empty() -> None:
    with pytest.raises(BackendError, match="start="):
        projection()(torch.zeros(3), torch.tensor(1.0), start={})


def test_changed_options_take_the_long_way() -> None:
    point = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    limit = torch.tensor(1.0, dtype=torch.float64)
    for options in (
        {"solver": "Clarabel"},
        {"solver_args": {"tol": 1e-7}},
        {"warm_start": True},
        {"derivative": "diffcp", "solver": "Clarabel"},
        {"optimal_value": True},
    ):
        assert not is_compiled(projection(**options)(point, limit)[0])
    assert not is_compiled(projection()(point, limit, solver_args={"tol": 1e-7})[0])
    assert is_compiled(projection(solver="DualActiveSet")(point, limit)[0])


def test_values_changed_in_place_are_noticed() -> None:
    point = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    limit = torch.tensor(1.0, dtype=torch.float64)
    (x,) = projection()(point, limit)
    with torch.no_grad():
        point.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_copies_of_a_layer_pass_too() -> None:
    layer = projection()
    point = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    limit = torch.tensor(1.0, dtype=torch.float64)
    (expected,) = layer(point, limit)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (x,) = copied(point, limit)
        assert is_compiled(x)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("exponent", [-6, -3, 3, 6])
@pytest.mark.parametrize("build", [least_squares, lasso, portfolio])
def test_units_do_not_matter(build: Callable[[], Problem], exponent: int) -> None:
    """Multiplied objectives have the same solutions; upstream gradients scale the result."""
    problem, parameters, variables = build()
    factor = 10.0**exponent
    scaled = cp.Problem(factor * problem.objective, problem.constraints)
    layer = DeclarativeLayer(scaled, parameters, variables[:1])
    values = draw(parameters, 3, shared=False)
    (expected,) = DeclarativeLayer(problem, parameters, variables[:1])(*values)
    (x,) = layer(*values)
    assert_allclose(x.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
    total, wanted = x[:, 0].sum(), torch.autograd.grad(expected[:, 0].sum(), values)
    upstream = torch.tensor(1e-12, dtype=x.dtype)
    small = torch.autograd.grad(total, values, upstream, retain_graph=True)
    whole = torch.autograd.grad(total, values)
    for one, other, right in zip(small, whole, wanted, strict=True):
        assert_allclose(1e12 * one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
        assert_allclose(other, right, rtol=1e-7, atol=1e-8 * float(right.abs().max()))


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int) -> None:
    """Of rounded numbers, so that degenerate ones are among them; complaints included."""
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(1, 7)), int(rng.integers(1, 9))
    x, F, c = cp.Variable(n), cp.Parameter((n + 1, n)), cp.Parameter(n)
    G, h = cp.Parameter((m, n)), cp.Parameter(m)
    constraints = [G @ x <= h, x <= 3, x >= -3]
    curved = cp.sum_squares(F @ x) if seed % 3 else 0
    layer = DeclarativeLayer(
        cp.Problem(cp.Minimize(curved + c @ x), constraints),
        [F, c, G, h][0 if seed % 3 else 1 :],
        [x],
    )
    shapes = [(4, n + 1, n), (4, n), (4, m, n), (4, m)][0 if seed % 3 else 1 :]
    drawn = [rng.normal(size=shape) for shape in shapes]
    drawn[-1] = np.abs(drawn[-1]) + 0.1
    if seed % 2:
        drawn = [np.round(v) for v in drawn]
    values = [torch.tensor(v, requires_grad=True) for v in drawn]
    outcomes = []
    for way in (lambda: layer(*values)[0], lambda: layer.solve(*values).variables[0]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = way()
            grads = torch.autograd.grad(out.sum(), values)
        complaints = [w for w in caught if issubclass(w.category, IrregularWarning)]
        outcomes.append((out.detach(), grads, bool(complaints)))
    (out, grads, complained), (expected, right, also) = outcomes
    assert_allclose(out, expected, atol=1e-8)
    assert complained == also
    if not complained:
        for one, other in zip(grads, right, strict=True):
            assert_allclose(one, other, rtol=1e-7, atol=1e-8)
