"""Certified bounds hold and are of use; robust training descends and makes models more robust."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import (
    Blocks,
    Componentwise,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Tanh,
)
from declarative_cvx.nonconvex.implicit.intervals import Box
from declarative_cvx.nonconvex.implicit.model import ImplicitModel
from declarative_cvx.nonconvex.implicit.networks import from_sequential
from declarative_cvx.nonconvex.implicit.reduction import predict
from declarative_cvx.nonconvex.implicit.relaxation import lines, tightest_slopes
from declarative_cvx.nonconvex.implicit.robustness import certified_bounds, certified_margins
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

N, P, Q, BATCH = 20, 6, 3, 3
SOLVED = 1e-9  # to which a forward pass is


def random_weights(activation="relu", kappa=0.9, norm="inf", nonnegative=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = draw(N, N)
    A = A.abs() if nonnegative else A
    size = A.abs().sum(1, keepdim=True) if norm == "inf" else torch.linalg.matrix_norm(A, 2)
    B, C, D = draw(N, P) / P**0.5, draw(Q, N) / N**0.5, draw(Q, P) / P**0.5
    return ImplicitWeights(kappa * A / size, B, C, D, draw(N), draw(Q), activation)


def scaled_contraction():
    """Well-posed by the diagonal Lyapunov inequality only."""
    weights = random_weights(kappa=0.9, norm="2")
    d = torch.exp(torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return replace(weights, A=d[:, None] * weights.A / d)


def monotone():
    """Well-posed as I - A has a positive definite symmetric part: skew, plus less than 1."""
    A = random_weights().A
    skew = 6 * (A - A.T)
    return replace(random_weights(), A=skew - torch.eye(N, dtype=torch.float64))


def network():
    torch.manual_seed(0)
    layers = (nn.Linear(P, 15), nn.ReLU(), nn.Linear(15, 15), nn.Tanh(), nn.Linear(15, Q))
    return from_sequential(nn.Sequential(*layers).double(), P)


# Model, and the largest mean ratio of certified width to the range found by attacks at sigma 0.05.
MODELS = {
    "relu": (random_weights, 1.1),
    "nonnegative": (lambda: random_weights(kappa=0.95, nonnegative=True), 1.3),
    "2-norm": (lambda: random_weights(norm="2"), 1.5),
    "tanh": (lambda: random_weights("tanh"), 1.3),
    "tanh, 2-norm": (lambda: random_weights("tanh", norm="2"), 1.6),
    "sigmoid, large A": (lambda: random_weights("sigmoid", kappa=3.5), 1.2),
    "leaky": (lambda: random_weights(LeakyReLU(0.3)), 1.2),
    "blocks": (lambda: random_weights(Blocks([("relu", 12), ("tanh", 8)])), 1.2),
    "Lyapunov": (scaled_contraction, 2.0),
    "monotone": (monotone, math.inf),
    "network": (network, 1.5),
}


def inputs():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, P, generator=generator, dtype=torch.float64)


def attacked_range(weights, u, sigma, steps=10, starts=6):
    """The range of outputs found by random points, corners and projected gradient steps."""
    generator = torch.Generator().manual_seed(7)
    shape = (starts, Q, 2, BATCH, P)
    points = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    points[: starts // 2] = points[: starts // 2].sign()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None]
    least, most = torch.full((BATCH, Q), math.inf).double(), torch.full((BATCH, Q), -math.inf)
    most = most.double()
    for _ in range(steps):
        points = points.detach().requires_grad_()
        y = predict(weights, (u + sigma * points).flatten(0, 3), on_irregular="ignore")
        y = y.unflatten(0, shape[:4])
        everything = y.detach().flatten(0, 2)
        least = torch.minimum(least, everything.amin(0))
        most = torch.maximum(most, everything.amax(0))
        own = torch.stack([y[:, k, ..., k] for k in range(Q)], 1)
        (direction,) = torch.autograd.grad((sign * own).sum(), points)
        points = (points.detach() + 0.4 * direction.sign()).clamp(-1, 1)
    return least, most


@pytest.mark.filterwarnings("ignore::declarative_cvx.nonconvex.implicit.IllPosedWarning")
@pytest.mark.parametrize("name", MODELS)
def test_no_attack_leaves_the_bounds_and_they_are_tight(name):
    make, ratio = MODELS[name]
    weights, u = make(), inputs()
    for sigma in (0.05, 0.5):
        least, most = attacked_range(weights, u, sigma)
        bounds = certified_bounds(weights, u, sigma)
        assert bool((bounds.lower <= least + SOLVED).all())
        assert bool((bounds.upper >= most - SOLVED).all())
        if sigma == 0.05:
            assert float((bounds.width / (most - least)).mean()) < ratio


@pytest.mark.parametrize("name", ["relu", "tanh", "network"])
def test_more_work_never_loosens_the_bounds(name):
    weights, u = MODELS[name][0](), inputs()
    options = [{"refinements": 0}, {"refinements": 1}, {}, {"steps": 20}]
    widths = [certified_bounds(weights, u, 0.4, **option).width for option in options]
    for before, after in itertools.pairwise(widths):
        assert bool((after <= before + 1e-9).all())
    assert float((widths[-1] / widths[0]).mean()) < 0.95


def test_one_state_has_its_exact_range():
    """The state x = relu(a x + u) = relu(u) / (1 - a): with one kink the relaxation is exact."""
    one = torch.ones(1, 1, dtype=torch.float64)
    none = torch.zeros(1, dtype=torch.float64)
    for a in (0.75, -3.0):
        weights = ImplicitWeights(a * one, one, one, 0 * one, none, none, "relu")
        bounds = certified_bounds(weights, torch.tensor([[0.5]], dtype=torch.float64), 2.0)
        torch.testing.assert_close(bounds.lower, 0 * one, atol=1e-12, rtol=0)
        torch.testing.assert_close(bounds.upper, 2.5 / (1 - a) * one, atol=1e-8, rtol=0)


def test_linear_model_has_its_exact_range():
    weights = random_weights("identity", kappa=0.8)
    u = inputs()
    eye = torch.eye(N, dtype=torch.float64)
    gain = weights.C @ torch.linalg.solve(eye - weights.A, weights.B) + weights.D
    y = predict(weights, u)
    reach = 0.3 * gain.abs().sum(1)
    bounds = certified_bounds(weights, u, 0.3)
    torch.testing.assert_close(bounds.lower, y - reach, atol=1e-7, rtol=0)
    torch.testing.assert_close(bounds.upper, y + reach, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_inputs_have_bounds_as_narrow_as_rounding(dtype):
    weights, u = random_weights("tanh").to(dtype), inputs().to(dtype)
    bounds = certified_bounds(weights, u, 0.0)
    exact = predict(weights.to(torch.float64), u.double(), tol=1e-14)
    assert bounds.lower.dtype == dtype
    assert bool((bounds.lower.double() <= exact + 1e-12).all())
    assert bool((bounds.upper.double() >= exact - 1e-12).all())
    assert float(bounds.width.max()) < 1e4 * torch.finfo(dtype).eps


def test_sigma_of_each_input_and_element():
    weights, u = random_weights(), inputs()
    every = 0.1 * torch.arange(1, BATCH * P + 1, dtype=torch.float64).view(BATCH, P) / P
    whole = certified_bounds(weights, u, every)
    alone = certified_bounds(weights, u[1:2], every[1])
    torch.testing.assert_close(whole.upper[1:2], alone.upper, rtol=0.02, atol=0)
    least, most = attacked_range(weights, u, every)
    assert bool((whole.lower <= least + SOLVED).all() & (whole.upper >= most - SOLVED).all())


def test_sparse_weights_have_the_same_bounds():
    weights, u = network(), inputs()
    dense = certified_bounds(weights, u, 0.2)
    sparse = certified_bounds(weights.sparse(), u, 0.2)
    torch.testing.assert_close(dense.upper, sparse.upper, rtol=1e-9, atol=1e-12)


def test_bounds_are_differentiable():
    weights, u = random_weights(kappa=0.7), inputs()[:1]

    def width(A, u, sigma):
        return certified_bounds(replace(weights, A=A), u, sigma, refinements=1).width

    sigma = torch.full((P,), 0.02, dtype=torch.float64)
    arguments = [value.clone().requires_grad_() for value in (weights.A, u, sigma)]
    value = width(*arguments).sum()
    gradients = torch.autograd.grad(value, arguments)
    generator = torch.Generator().manual_seed(3)
    for k, gradient in enumerate(gradients):
        step = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = []
        for t in (1e-6, -1e-6):
            moved = [
                value.detach() + (t * step if j == k else 0) for j, value in enumerate(arguments)
            ]
            ends.append(width(*moved).sum())
        difference = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-3, atol=1e-5)


def test_a_model_is_bounded_like_its_weights():
    model = ImplicitModel(P, Q, N, activation="tanh").double()
    bounds = certified_bounds(model, inputs(), 0.1)
    assert torch.equal(bounds.upper, certified_bounds(model.weights, inputs(), 0.1).upper)
    bounds.width.sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters())


def test_margins_certify_labels():
    weights, u = random_weights(), inputs()
    labels = predict(weights, u).argmax(1)
    margins = certified_margins(weights, u, 1e-3, labels)
    y = predict(weights, u).sort(1, descending=True).values
    torch.testing.assert_close(margins, y[:, 0] - y[:, 1], rtol=0, atol=0.05)
    assert bool((margins < y[:, 0] - y[:, 1]).all())
    assert bool((certified_margins(weights, u, 1e-3, (labels + 1) % Q) < 0).all())


@pytest.mark.parametrize("activation", [ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid()])
def test_lines_enclose_the_activation(activation):
    generator = torch.Generator().manual_seed(0)
    ends = 4 * torch.randn(2, 200, generator=generator, dtype=torch.float64)
    box = Box(ends.amin(0), ends.amax(0))
    z = box.lower + torch.linspace(0, 1, 501, dtype=torch.float64)[:, None] * (
        box.upper - box.lower
    )
    tight = tightest_slopes(activation, box)
    any_slope = torch.rand(2, 200, generator=generator, dtype=torch.float64) * activation.lipschitz
    areas = []
    for lower, upper in (tight, any_slope.unbind()):
        around = lines(activation, box, lower, upper)
        above = around.upper_slope * z + around.upper_offset - activation(z)
        below = activation(z) - around.lower_slope * z - around.lower_offset
        assert float(torch.minimum(above, below).min()) >= 0
        assert float(torch.maximum(above.amin(0), below.amin(0)).max()) < 0.02, (
            "they touch, but for the grid"
        )
        areas.append((above + below)[250])  # at the middle
    assert bool((areas[0] <= areas[1] + 1e-6).all())


@dataclass(frozen=True)
class Softplus(Componentwise):
    name = "softplus"
    monotone = True

    def __call__(self, z):
        return torch.nn.functional.softplus(z)

    def slope(self, z):
        return torch.sigmoid(z)


def test_unknown_monotone_activations_have_bounds_too():
    weights, u = random_weights(Softplus(), kappa=0.6), inputs()
    least, most = attacked_range(weights, u, 0.1)
    bounds = certified_bounds(weights, u, 0.1, steps=3)
    assert bool((bounds.lower <= least + SOLVED).all() & (bounds.upper >= most - SOLVED).all())


def test_what_cannot_be_bounded_is_refused():
    weights, u = random_weights(), inputs()
    with pytest.raises(SpecificationError, match="softmax is not componentwise"):
        certified_bounds(random_weights("softmax"), u, 0.1)
    with pytest.raises(SpecificationError, match="No certificate"):
        certified_bounds(random_weights(kappa=40.0), u, 0.1)
    with pytest.raises(ParameterError, match="not negative"):
        certified_bounds(weights, u, -0.1)
    with pytest.raises(ParameterError, match="sigma must be a number"):
        certified_bounds(weights, u, torch.ones(P + 1))
    with pytest.raises(ParameterError, match="labels must be from 0 to 2"):
        certified_margins(weights, u, 0.1, torch.tensor([0, 3, 1]))


def test_margin_needs_a_second_output() -> None:
    weights = from_sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), 2)
    with pytest.raises(ParameterError, match="one output"):
        certified_margins(weights, torch.zeros(2, 2), 0.1, torch.tensor([0, 0]))


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_bounds_of_an_element_do_not_depend_on_the_others(activation, steps):
    """Some of them narrow in a few rounds, others in many."""
    model = random_weights(activation)
    u = torch.randn(6, P, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = torch.tensor([1e-6, 1e-3, 0.05, 0.3, 1.0, 5.0], dtype=torch.float64)[:, None]
    sigma = sigma.expand(6, P)
    together = certified_bounds(model, u, sigma, steps=steps)
    for i in range(len(u)):
        alone = certified_bounds(model, u[i : i + 1], sigma[i : i + 1], steps=steps)
        for name in ("lower", "upper", "state_lower", "state_upper"):
            torch.testing.assert_close(
                getattr(together, name)[i : i + 1], getattr(alone, name), rtol=1e-9, atol=1e-10
            )
