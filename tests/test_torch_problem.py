"""Problems whose functions are written in torch, as layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import declarative_cvx as dcx
from declarative_cvx.specification import Verdict

FLOAT = torch.float64
DIRECTION = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=FLOAT)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def layer_of(**options: Any) -> dcx.DeclarativeLayer:
    """Of the nearest point to p in the plane, with other options."""
    problem = {
        "objective": lambda x, p: (x - p).square().sum(),
        "shape": 2,
        "parameters": {"p": 2},
    }
    return dcx.DeclarativeLayer(dcx.TorchProblem(**{**problem, **options}))


# Nodes of the paper --------------------------------------------------------------------------


def test_robust_mean_of_any_number_of_points() -> None:
    """DDN Sec. 5.1: pseudo-Huber pooling, against the kernel's solution and gradients."""

    def objective(u: Tensor, points: Tensor, alpha: Tensor) -> Tensor:
        return (alpha**2 * ((1 + ((u - points) / alpha) ** 2).sqrt() - 1)).sum()

    problem = dcx.TorchProblem(objective, shape=(), parameters={"points": (None,), "alpha": ()})
    layer = dcx.DeclarativeLayer(problem)
    for count in (5, 9):
        points, alpha = leaf(normal(0, 3, count)), leaf(torch.tensor(0.7, dtype=FLOAT))
        expected = dcx.robust_pool(points, "pseudo_huber", alpha=alpha)
        (found,) = layer(points, alpha)
        assert_close(found, expected, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad(v.square().sum(), (points, alpha)) for v in (found, expected)]
        assert_close(*grads, rtol=1e-8, atol=1e-10)
    assert gradgradcheck(layer, (points, alpha), fast_mode=True)


@pytest.mark.parametrize("inequality", [False, True])
def test_projection_onto_a_sphere_or_ball(inequality: bool) -> None:
    def outside(u: Tensor, x: Tensor, r: Tensor) -> Tensor:
        return u.square().sum() - r**2

    problem = dcx.TorchProblem(
        lambda u, x, r: (u - x).square().sum() / 2,
        **{"inequality" if inequality else "equality": outside},
        shape=4,
        parameters={"x": 4, "r": ()},
        start=lambda x, r: x,
    )
    layer = dcx.DeclarativeLayer(problem)
    x, r = leaf(normal(1, 5, 4)), leaf(torch.tensor(1.8, dtype=FLOAT))
    onto = "ball" if inequality else "sphere"
    expected = dcx.project(x, onto, radius=r)
    (found,) = layer(x, r)
    assert_close(found, expected, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(v.pow(3).sum(), (x, r)) for v in (found, expected)]
    assert_close(*grads, rtol=1e-8, atol=1e-9)


def test_alignment_on_the_sphere() -> None:
    """DDN eq. 37, whose derivative is (I - y y') / ||x||."""
    problem = dcx.TorchProblem(
        lambda u, x: -(x @ u),
        lambda u, x: torch.linalg.vector_norm(u) - 1,
        shape=4,
        parameters={"x": 4},
        start=[1.0, 0.0, 0.0, 0.0],
    )
    layer = dcx.DeclarativeLayer(problem, variables=["x", "equality"])
    y, multiplier = layer(DIRECTION)
    length = DIRECTION.norm()
    assert_close(y, DIRECTION / length)
    assert_close(multiplier, length)  # shaped like what the function returns
    jacobian = torch.func.jacrev(lambda x: layer(x)[0])(DIRECTION)
    assert_close(jacobian, (torch.eye(4, dtype=FLOAT) - torch.outer(y, y)) / length)


def test_alignment_of_any_length_has_the_pseudo_inverse_derivative() -> None:
    """DDN eqs. 36 and 38, which leaves out the scale that y = alpha x brings along."""
    length, scale = DIRECTION.norm(), 1.5
    problem = dcx.TorchProblem(
        lambda u, x: -(x @ u) / torch.linalg.vector_norm(u),
        shape=4,
        parameters={"x": 4},
        start=scale * DIRECTION / length,
    )
    layer = dcx.DeclarativeLayer(problem, on_irregular="ignore")
    solution = layer.solve(DIRECTION)
    y = solution["x"]
    assert_close(y, scale * DIRECTION / length)
    assert solution.derivative.regular.tolist() == [False]
    jacobian = torch.func.jacrev(lambda x: layer(x)[0])(DIRECTION)
    unit = DIRECTION / length
    assert_close(jacobian, scale / length * (torch.eye(4, dtype=FLOAT) - torch.outer(unit, unit)))


@pytest.mark.parametrize(("start", "sign"), [(1.2, 1.0), (0.8, -1.0)])
def test_two_branches(start: float, sign: float) -> None:
    """DDN eq. 33: the branch of the start, and its derivative, 1 or -1."""
    problem = dcx.TorchProblem(
        lambda u, x: 0 * u,
        lambda u, x: (u - 1) ** 2 - x**2,
        shape=(),
        parameters={"x": ()},
        start=start,
    )
    layer = dcx.DeclarativeLayer(problem)
    x = leaf(torch.tensor([0.7, 0.4], dtype=FLOAT))
    (y,) = layer(x)
    assert_close(y, 1 + sign * x)
    y.sum().backward()
    assert_close(x.grad, torch.full_like(x, sign))


def test_entropic_optimal_transport() -> None:
    """Against the kernel, whose problem differs by a constant of the marginals."""

    def objective(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (plan * cost).sum() + 0.3 * torch.xlogy(plan, plan / torch.outer(a, b)).sum()

    def marginals(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([plan.sum(1) - a, (plan.sum(0) - b)[:-1]])  # the last one follows

    problem = dcx.TorchProblem(
        objective,
        marginals,
        shape={"plan": (3, 4)},
        parameters={"cost": (3, 4), "a": 3, "b": 4},
        lower=0.0,
        start={"plan": lambda cost, a, b: torch.outer(a, b)},
    )
    cost, a, b = leaf(normal(2, 2, 3, 4)), normal(3, 2, 3).softmax(1), normal(4, 4).softmax(0)
    (found,) = dcx.DeclarativeLayer(problem)(cost, a, b)
    expected = dcx.optimal_transport(cost, a, b.expand(2, 4), epsilon=0.3)
    assert_close(found, expected, rtol=1e-8, atol=1e-10)
    grads = [torch.autograd.grad(v.square().sum(), cost)[0] for v in (found, expected)]
    assert_close(*grads, rtol=1e-7, atol=1e-10)


# The same problem said in several ways -------------------------------------------------------


def cvxpy_twin() -> tuple[cp.Problem, list[cp.Parameter], list[Any]]:
    x, p, q = cp.Variable(3), cp.Parameter(3), cp.Parameter(pos=True)
    x.value = np.ones(3)
    rows = [cp.sum_squares(x) == q, cp.exp(x[0]) <= x[1] + 1, x[2] * x[1] >= 0.6]
    problem = cp.Problem(cp.Minimize(p @ x + cp.sum(cp.power(x, 4))), rows)
    return problem, [p, q], [x, *(row.dual_variables[0] for row in rows)]


def torch_twin(batched: bool) -> dcx.DeclarativeLayer:
    def objective(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return (p * x + x**4).sum(-1)

    def equality(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return x.square().sum(-1) - q

    def inequality(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        low, middle, high = x.unbind(-1)
        return torch.stack([low.exp() - middle - 1, 0.6 - high * middle], -1)

    problem = dcx.TorchProblem(
        objective,
        equality,
        inequality,
        shape=3,
        parameters={"p": 3, "q": ()},
        start=1.0,
        batched=batched,
    )
    outputs = ["x", "equality", "inequality"]
    return dcx.DeclarativeLayer(problem, variables=outputs, optimal_value=True)


def test_values_multipliers_and_gradients_are_those_of_the_cvxpy_twin() -> None:
    p, q = leaf(normal(5, 4, 3)), leaf(torch.tensor(2.0, dtype=FLOAT))
    x, y, first, second, value = dcx.DeclarativeLayer(*cvxpy_twin(), optimal_value=True)(p, q)
    expected = (x, y, torch.stack([first, second], 1), value)
    assert bool((expected[2].amax(0) > 1e-3).all())  # both are active somewhere
    for batched in (False, True):
        found = torch_twin(batched)(p, q)
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for mine, theirs in zip(found, expected, strict=True):
            grads = [
                torch.autograd.grad(v.pow(2).sum(), (p, q), retain_graph=True)
                for v in (mine, theirs)
            ]
            assert_close(*grads, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("batched", [False, True])
def test_derivatives_of_every_kind(batched: bool) -> None:
    layer = torch_twin(batched)
    p, q = leaf(normal(5, 2, 3)), leaf(torch.tensor(2.0, dtype=FLOAT))
    assert gradcheck(layer, (p, q), fast_mode=True)
    assert gradgradcheck(layer, (p, q), fast_mode=True)
    reverse, forward = (
        jacobian(lambda *v: layer(*v)[0], (0, 1))(p, q)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd)
    )
    assert_close(reverse, forward)
    assert_close(torch.func.vmap(layer, (0, None))(p, q), layer(p, q))
    doubled = torch.func.vmap(layer, (0, None))(torch.stack([p, 2 * p]), q)
    assert_close([v[1] for v in doubled], list(layer(2 * p, q)))


def test_what_only_a_batch_function_can_do() -> None:
    """In-place writes and decisions by values, against the same without."""

    def of_batch(x: Tensor, p: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0] = x[:, 1] ** 3
        y[:, 1] = x[:, 0] * p[:, 0]
        if bool((x > 1e6).any()):
            y = 0 * y
        return (x + y).square().sum(1) + (x - p).pow(4).sum(1)

    def of_one(x: Tensor, p: Tensor) -> Tensor:
        y = torch.stack([x[1] ** 3, x[0] * p[0]])
        return (x + y).square().sum() + (x - p).pow(4).sum()

    p = leaf(normal(6, 3, 2))
    batch, one = (
        layer_of(objective=f, batched=b, start=lambda p: p)
        for f, b in ((of_batch, True), (of_one, False))
    )
    assert_close(batch(p), one(p))
    assert gradcheck(batch, (p,))
    assert gradgradcheck(batch, (p,), fast_mode=True)


def test_several_variables_with_bounds_that_are_functions() -> None:
    """A rotation by alignment: complex arithmetic, and bounds that the parameters move."""

    def objective(angle: Tensor, shift: Tensor, z: Tensor, w: Tensor) -> Tensor:
        turn = torch.polar(torch.ones_like(angle), angle)
        gap = turn * torch.view_as_complex(z) + torch.complex(*shift) - torch.view_as_complex(w)
        return (gap.real**2 + gap.imag**2).sum()

    problem = dcx.TorchProblem(
        objective,
        shape={"angle": (), "shift": (2,)},
        parameters={"z": (None, 2), "w": (None, 2)},
        lower={"shift": lambda z, w: (w - z).amin(0)},
        upper={"angle": 3.0},
    )
    layer = dcx.DeclarativeLayer(problem, variables=["shift", "angle", "lower"])
    z = normal(7, 6, 2)
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=FLOAT)
    shift = torch.tensor([0.3, -0.2], dtype=FLOAT)
    found, angle, lower = layer(z, z @ turn.T + shift)
    assert_close(found, shift)
    assert_close(angle, torch.atan2(turn[1, 0], turn[0, 0]))
    assert lower.shape == (3,)
    w = leaf(torch.stack([z @ turn.T + shift, z @ turn.T + torch.tensor([-5.0, 0.0], dtype=FLOAT)]))
    assert gradcheck(lambda w: layer(z, w)[:2], (w,))


def test_a_bound_that_is_active_moves_the_solution() -> None:
    layer = layer_of(
        parameters={"p": 2, "low": ()},
        objective=lambda x, p, low: (x - p).square().sum(),
        lower=lambda p, low: low,
    )
    p = torch.tensor([[0.0, 2.0]], dtype=FLOAT)
    low = leaf(torch.tensor(1.0, dtype=FLOAT))
    (x,) = layer(p, low)
    assert_close(x.detach(), torch.tensor([[1.0, 2.0]], dtype=FLOAT))
    x.sum().backward()
    assert float(low.grad) == pytest.approx(1.0)
    solution = layer.solve(p, low)
    assert_close(solution["lower"].detach(), torch.tensor([[2.0, 0.0]], dtype=FLOAT))


# Modules -------------------------------------------------------------------------------------


class Energy(nn.Module):
    """A learned energy: a quadratic and a small network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        energy = self.net(torch.cat([x, c], -1)).squeeze(-1)
        return 0.3 * energy + (self.weight * (x - c.sum(-1, keepdim=True)).square()).sum(-1)


def energy_layer(module: nn.Module, batched: bool = False) -> dcx.DeclarativeLayer:
    problem = dcx.TorchProblem(module, shape=3, parameters={"c": 2}, batched=batched)
    return dcx.DeclarativeLayer(problem)


@pytest.mark.parametrize("batched", [False, True])
def test_weights_of_a_module_get_gradients(batched: bool) -> None:
    module = Energy().double()
    layer, c = energy_layer(module, batched), normal(8, 4, 2)
    weights = dict(layer.named_parameters())
    assert set(weights) == {
        f"objective.net.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    }

    def of_weights(first: Tensor, second: Tensor) -> Tensor:
        changed = {**weights, "objective.net.0.weight": first, "objective.net.2.weight": second}
        return torch.func.functional_call(layer, changed, (c,))[0]

    values = tuple(leaf(weights[f"objective.net.{i}.weight"].detach()) for i in (0, 2))
    assert gradcheck(of_weights, values, fast_mode=True)
    assert gradgradcheck(of_weights, values, fast_mode=True)
    found = torch.func.vmap(of_weights)(*(torch.stack([v, 2 * v]) for v in values))
    assert_close(found[1], of_weights(*(2 * v for v in values)))
    single = torch.func.jacrev(lambda v: energy_jacobian(layer, weights, v, c[0]))(values[0])
    whole = torch.func.jacrev(lambda v: of_weights(v, values[1]))(values[0])
    assert_close(single, whole[0])


def energy_jacobian(
    layer: dcx.DeclarativeLayer, weights: dict[str, Tensor], first: Tensor, c: Tensor
) -> Tensor:
    changed = {**weights, "objective.net.0.weight": first}
    return torch.func.functional_call(layer, changed, (c,))[0]


def test_a_module_inside_is_trained_with_the_layer() -> None:
    """A student's energy learns from the minima of a teacher's."""
    teacher, student = Energy(), Energy()
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(3.0)
    layer, c = energy_layer(student), normal(9, 16, 2).float()
    (wanted,) = energy_layer(teacher)(c)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (layer(c)[0] - wanted.detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    assert layer(c)[0].dtype == torch.float32


def test_a_module_that_two_functions_share_gets_the_gradients_of_both() -> None:
    """X minimises (x - a)^2 subject to x >= b: one scale makes both numbers."""

    class Shared(nn.Module):
        def __init__(self, scale: nn.Parameter, factor: float) -> None:
            super().__init__()
            self.scale, self.factor = scale, factor

        def forward(self, x: Tensor) -> Tensor:
            if self.factor > 0:
                return (x - self.factor * self.scale).square()
            return -self.factor * self.scale - x

    scale = nn.Parameter(torch.tensor(2.0, dtype=FLOAT))
    problem = dcx.TorchProblem(Shared(scale, 1.0), inequality=Shared(scale, -1.5), shape=())
    layer = dcx.DeclarativeLayer(problem, optimal_value=True)
    assert [name for name, _ in layer.named_parameters()] == ["objective.scale"]
    x, value = layer()
    assert_close([x.detach(), value.detach()], [v.to(FLOAT) for v in torch.tensor([3.0, 1.0])])
    grads = [torch.autograd.grad(out, scale, retain_graph=True)[0] for out in (x, value)]
    assert_close(torch.stack(grads), torch.tensor([1.5, 1.0], dtype=FLOAT))


def test_copies_have_weights_of_their_own() -> None:
    layer, c = energy_layer(Energy()), normal(8, 4, 2)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(twin(c), layer(c))
        before = layer(c)
        with torch.no_grad():
            for weight in twin.parameters():
                weight.zero_()
        assert_close(twin(c)[0], c.sum(1, keepdim=True).expand(4, 3))
        assert_close(layer(c), before)


# What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_tensors_from_elsewhere_that_need_a_gradient_are_refused(batched: bool) -> None:
    """Through autograd, and through every transform that follows them."""
    p = normal(10, 1, 2)

    def solved(w: Tensor, p: Tensor = p) -> Tensor:
        layer = layer_of(objective=lambda x, p: (w * (x - p)).square().sum(-1), batched=batched)
        return layer(p)[0].sum()

    w = torch.ones(2, dtype=FLOAT)
    solved(w)
    ways: list[Callable[[], Any]] = [
        lambda: solved(leaf(w)),
        lambda: torch.func.grad(solved)(w),
        lambda: torch.func.jvp(solved, (w,), (w,)),
        lambda: torch.func.vmap(solved)(w[None]),
        lambda: torch.func.vmap(lambda w: torch.func.grad(solved, 1)(w, p))(w[None]),
        lambda: torch.func.grad(lambda w: torch.func.vmap(lambda p: solved(w, p))(p[None]).sum())(
            w
        ),
    ]
    for way in ways:
        with pytest.raises(dcx.SpecificationError, match="requires a gradient"):
            way()
    own = leaf(w)
    with pytest.raises(dcx.SpecificationError, match="the equality function uses a tensor"):
        layer_of(equality=lambda x, p: own @ x)(p)


P = normal(11, 5, 2)
FUNCTIONS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vector": ({"objective": lambda x, p: x - p}, r"shape \(2,\), but a number"),
    "number": ({"objective": lambda x, p: 1.0}, "returns a float"),
    "single": (
        {"objective": lambda x, p: (x - p).square().sum().float()},
        "returns torch.float32",
    ),
    "raises": ({"objective": lambda x, p: x @ torch.ones(3)}, "objective function, called with"),
    "decides": (
        {"objective": lambda x, p: x.sum() if x.sum() > 0 else p.sum()},
        "batched=True",
    ),
    "random": ({"objective": lambda x, p: (x - torch.rand(2)).square().sum()}, "random"),
    "whole_batch": (
        {"objective": lambda x, p: (x - p).square().sum(), "batched": True},
        r"\(batch,\)",
    ),
    "mean_over_batch": (
        {"objective": lambda x, p: (x - p + x.mean(0)).square().sum(1), "batched": True},
        "depend on each other",
    ),
    "batch_from_elsewhere": (
        {"objective": lambda x, p: (x - P).square().sum(1), "batched": True},
        r"shape \(5,\)",
    ),
    "rows_without_batch": (
        {
            "objective": lambda x, p: (x - p).square().sum(1),
            "equality": lambda x, p: x.sum(0) - 1,
            "batched": True,
        },
        "keep the first dimension",
    ),
    "no_tensor": ({"start": lambda p: 0.5}, "the start function of 'x' fails"),
    "bounds": ({"lower": lambda p: torch.zeros(3)}, r"shape \(3,\), but the variable has"),
}


@pytest.mark.parametrize("name", FUNCTIONS_REFUSED)
def test_functions_that_return_the_wrong_thing_are_refused(name: str) -> None:
    options, message = FUNCTIONS_REFUSED[name]
    with pytest.raises(dcx.SpecificationError, match=message):
        layer_of(**options)(P)


DESCRIPTIONS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "arguments": ({"objective": lambda x: x.sum()}, r"takes \(x\), but .* \(x, p\)"),
    "function": ({"objective": 3}, r"objective must be a function of \(x, p\), got 3"),
    "nothing": ({"shape": 0}, "nothing to solve for"),
    "open_shape": ({"shape": (2, None)}, "shape of 'x'"),
    "parameters": ({"parameters": [2]}, "a mapping from names to shapes"),
    "parameter": ({"parameters": {"p": "two"}}, r"parameters\['p'\] is 'two'"),
    "reserved": ({"shape": {"equality": 2}}, "name of multipliers"),
    "lower_shape": ({"lower": torch.zeros(3)}, r"lower of 'x' is a value of shape \(3,\)"),
    "lower_kind": ({"lower": "zero"}, "lower of 'x' must be a number"),
    "lower_name": ({"lower": {"y": 2.0}}, "lower names 'y'"),
    "lower_gradient": ({"lower": torch.zeros(2, requires_grad=True)}, "requires a gradient"),
    "lower_number": ({"lower": float("nan")}, "contains NaN"),
    "lower_nan": ({"lower": torch.tensor([0.0, torch.nan])}, "contains NaN"),
    "start_arguments": ({"start": lambda p, q: p}, "the start function takes"),
    "pair": ({"sample_bounds": 3.0}, "a pair, lower and upper"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS_REFUSED)
def test_descriptions_that_make_no_sense_are_refused(name: str) -> None:
    options, message = DESCRIPTIONS_REFUSED[name]
    with pytest.raises(dcx.SpecificationError, match=message):
        layer_of(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"parameters": [cp.Parameter(2)]},
        {"gp": True},
        {"derivative": "diffcp"},
        {"nonconvex": False},
        {"canon_backend": "SCIPY"},
        {"variables": ["y"]},
        {"variables": ["equality"]},
        {"variables": [cp.Variable()]},
        {"restarts": 2},
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any]) -> None:
    problem = dcx.TorchProblem(lambda x: (x - 1).square().sum(), shape=2)
    with pytest.raises(dcx.SpecificationError, match=next(iter(options))):
        dcx.DeclarativeLayer(problem, **options)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (1, 5, 2), ()])
def test_tensors_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(dcx.ParameterError, match=r"expected \(2,\), or a batch \(batch, 2\)"):
        layer_of()(torch.zeros(shape))


# As any layer --------------------------------------------------------------------------------


def test_report_and_names() -> None:
    layer = layer_of(inequality=lambda x, p: x.sum() - 1)
    assert layer.spec.verdict is Verdict.TORCH
    assert "written in torch" in str(layer.spec)
    assert repr(layer).startswith("DeclarativeLayer((p[2]) -> (x), TORCH")
    solution = layer.solve(torch.ones(2))
    assert solution["x"].shape == (2,)
    assert solution["inequality"].shape == ()
    assert float(solution["inequality"]) == pytest.approx(1.0)
    with pytest.raises(KeyError, match="no variable"):
        solution["equality"]


def test_problems_without_parameters() -> None:
    (x,) = dcx.DeclarativeLayer(dcx.TorchProblem(lambda x: (x - 1).square().sum(), shape=(2, 2)))()
    assert_close(x, torch.ones(2, 2))


def test_elements_without_an_answer_do_not_touch_the_others() -> None:
    problem = dcx.TorchProblem(
        lambda x, p: p * x,
        inequality=lambda x, p: x**2 - p,
        shape=(),
        parameters={"p": ()},
    )
    layer = dcx.DeclarativeLayer(problem, on_failure="nan")
    p = leaf(torch.tensor([4.0, -1.0, 1.0], dtype=FLOAT))
    solution = layer.solve(p)
    assert [status.name for status in solution.status] == ["OPTIMAL", "INFEASIBLE", "OPTIMAL"]
    (x,) = solution.variables
    assert_close(x[[0, 2]], -p[[0, 2]].sqrt())
    x.nansum().backward()
    assert_close(p.grad, torch.tensor([-0.25, 0.0, -0.5], dtype=FLOAT))
    with pytest.raises(dcx.SolveError, match="element 1: INFEASIBLE"):
        dcx.DeclarativeLayer(problem)(p)


def test_a_start_where_a_function_is_not_finite_is_named_as_a_cause() -> None:
    problem = dcx.TorchProblem(lambda x: x - x.log(), shape=())
    with pytest.raises(dcx.SolveError, match="not finite, at the start"):
        dcx.DeclarativeLayer(problem)()
    (x,) = dcx.DeclarativeLayer(dcx.TorchProblem(lambda x: x - x.log(), shape=(), start=0.5))()
    assert float(x) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "options", [{"sample_bounds": (-3.0, 3.0), "start": 2.0}, {"lower": -3.0, "upper": 3.0}]
)
def test_restarts_find_the_better_minimum_and_are_repeatable(options: dict[str, Any]) -> None:
    problem = dcx.TorchProblem(
        lambda x, tilt: (x**2 - 4) ** 2 + tilt * x, shape=(), parameters={"tilt": ()}, **options
    )
    layer = dcx.DeclarativeLayer(problem, restarts=8)
    tilts = torch.tensor([1.0, -1.0], dtype=FLOAT)
    (best,) = layer(tilts)
    assert (best > 0).tolist() == [False, True]
    assert torch.equal(best, layer(tilts)[0])


@pytest.mark.parametrize("warm", [False, True])
def test_a_warm_start_keeps_the_branch(warm: bool) -> None:
    problem = dcx.TorchProblem(
        lambda x, tilt: (x**2 - 4) ** 2 + tilt * x,
        shape=(),
        parameters={"tilt": ()},
        start=lambda tilt: torch.where(tilt > 0, -2.0, 2.0),
    )
    layer = dcx.DeclarativeLayer(problem, warm_start=warm)
    tilt = torch.tensor([0.01], dtype=FLOAT)
    assert float(layer(tilt)[0]) < -1.5
    assert (float(layer(-tilt)[0]) < -1.5) is warm


def test_a_solver_of_the_users_own() -> None:
    """Its answers are differentiated; what is no minimum is not accepted."""
    wave = {"objective": lambda x, p: ((x - p).sin() + 0.1 * x).sum(), "start": lambda p: p - 1}
    problem = dcx.TorchProblem(**wave, shape=2, parameters={"p": 2})
    exact = dcx.DeclarativeLayer(problem)
    p = leaf(normal(12, 3, 2))
    (expected,) = exact(p)
    layer = dcx.DeclarativeLayer(problem, solver=lambda p: exact(p)[0].numpy() + 1e-4)
    (found,) = layer(p)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found.sum().backward()
    assert_close(p.grad, torch.ones_like(p))
    wrong = dcx.DeclarativeLayer(problem, solver=lambda p: p, on_failure="nan")
    assert not bool(wrong.solve(p).solved.any())


def test_types_devices_and_compilation() -> None:
    layer, p = layer_of(), torch.tensor([0.3, 0.4])
    (x,) = layer(p)
    assert (x.dtype, x.shape) == (torch.float32, (2,))
    assert_close(torch.compile(layer)(p), layer(p))
    fresh = layer_of(inequality=lambda x, p: x.pow(4).sum() - p.square().sum())
    with torch.inference_mode():
        assert_close(fresh(p), (x,))
        assert fresh.solve(p.clone()).derivative.regular.all()
    assert gradcheck(lambda p: fresh(p)[0], (leaf(p.double()),))


def test_nothing_depends_on_the_default_device() -> None:
    """A tensor that is made without naming its device lands on "meta", where it has no value."""
    p, q = leaf(normal(13, 2, 2)), torch.tensor(2.0, dtype=FLOAT)
    wide, twin = normal(5, 4, 3), torch_twin(False)
    expected = twin(wide, q)
    torch.set_default_device("meta")
    try:
        found = twin(wide, q)
        (x,) = layer_of(lower=-5.0, sample_bounds=(-1.0, 1.0))(p)
        problem = dcx.TorchProblem(
            lambda x, p: (x - p).square().sum(), shape=2, parameters={"p": 2}, lower=-5.0, upper=5.0
        )
        (again,) = dcx.DeclarativeLayer(problem, restarts=2)(p)
        again.sum().backward()
    finally:
        torch.set_default_device(None)
    assert_close(found, expected)
    assert_close((x, again), (p, p))
    assert_close(p.grad, torch.ones_like(p))


def test_an_objective_that_is_not_finite_has_no_minimum() -> None:
    problem = dcx.TorchProblem(
        lambda x, p, c: (c * x - p).square().sum() + 0 * p.sqrt().sum(),
        shape=1,
        parameters={"p": 1, "c": ()},
    )
    p = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    c = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    solution = dcx.DeclarativeLayer(problem).solve(p, c)  # x = p / c
    assert solution.solved.tolist() == [True, False]
    by_p, by_c = torch.autograd.grad(torch.nansum(solution.variables[0]), (p, c))
    assert_close(by_p, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    assert_close(by_c, torch.tensor(-1.0, dtype=torch.float64))


@pytest.mark.parametrize("batched", [False, True])
def test_functions_that_write_into_their_arguments(batched: bool) -> None:
    def objective(x: Tensor, p: Tensor) -> Tensor:
        p.add_(1.0)
        return (x - p).square().sum(-1)

    def start(p: Tensor) -> Tensor:
        return p.mul_(3.0)

    p = torch.ones(2, 2, dtype=torch.float64)
    problem = dcx.TorchProblem(objective, shape=2, parameters={"p": 2}, batched=batched)
    with pytest.raises(dcx.SpecificationError, match="writes into its arguments"):
        dcx.DeclarativeLayer(problem)(p)
    problem = dcx.TorchProblem(
        lambda x, p: (x - p).square().sum(-1),
        shape=2,
        parameters={"p": 2},
        batched=batched,
        start=start,
    )
    assert_close(dcx.DeclarativeLayer(problem)(p)[0], torch.ones(2, 2, dtype=torch.float64))
    assert bool((p == 1).all())
