"""Total-variation denoising: exact, at any length, with the derivative of segment means."""

from __future__ import annotations

import time

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.kernels.total_variation import (
    TotalVariation1d,
    _play,
    total_variation_1d,
)

FLOAT = torch.float64

SIGNALS = {
    "noise": lambda n: torch.randn(n, dtype=FLOAT),
    "walk": lambda n: torch.randn(n, dtype=FLOAT).cumsum(0),
    "ramp": lambda n: torch.linspace(-1, 1, n, dtype=FLOAT),
    "steps": lambda n: (torch.arange(n) // 9 % 5).double() + 0.1 * torch.randn(n, dtype=FLOAT),
    "heavy_tails": lambda n: torch.randn(n, dtype=FLOAT) / torch.randn(n, dtype=FLOAT),
    "ties": lambda n: torch.randint(0, 3, (n,)).double(),
    "constant": lambda n: torch.full((n,), 0.3, dtype=FLOAT),
    "growth": lambda n: 1.2 ** torch.arange(n).double(),
}


def violation(x: Tensor, y: Tensor, strength: Tensor, weights: Tensor) -> float:
    """Of the optimality conditions, with NumPy's sums, relative to the size of the running sums."""
    x, y, strength, weights = (t.double().numpy() for t in (x, y, strength, weights))
    z = np.cumsum(weights * (x - y))
    rise = np.diff(x)
    jump = np.abs(rise) > 1e-12 * np.abs(y).max()
    bad = np.where(jump, np.abs(z[:-1] - strength * np.sign(rise)), np.abs(z[:-1]) - strength)
    scale = np.abs(np.cumsum(weights * y)).max() + 1e-300
    return max(bad.max(initial=0.0), abs(z[-1])) / scale


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("strength", [0.0, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 300])
def test_optimality_conditions(n: int, strength: float, kind: str) -> None:
    torch.manual_seed(n)
    y = SIGNALS[kind](n)
    edges, weights = strength * torch.rand(n - 1, dtype=FLOAT), 0.1 + torch.rand(n, dtype=FLOAT)
    report = TotalVariation1d(edges).solve(y, weights)
    assert violation(report.value, y, edges, weights) < 1e-12
    assert report.solved
    assert report.residual < 1e-13


@pytest.mark.parametrize("kind", ["noise", "steps"])
def test_agrees_with_cvxpy(kind: str) -> None:
    torch.manual_seed(0)
    y, strength = SIGNALS[kind](60), 0.7
    x = cp.Variable(60)
    objective = cp.sum_squares(x - y.numpy()) / 2 + strength * cp.norm1(cp.diff(x))
    tight = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}
    optimum = cp.Problem(cp.Minimize(objective)).solve(solver="CLARABEL", **tight)
    report = TotalVariation1d(strength).solve(y)
    torch.testing.assert_close(report.value, torch.tensor(x.value), rtol=0, atol=1e-7)
    assert float(report.objective) == pytest.approx(optimum, rel=1e-10)


def test_two_points_closed_form() -> None:
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.3]])
    expected = torch.tensor([[0.2, 0.8], [0.8, 0.2], [0.15, 0.15]])
    torch.testing.assert_close(total_variation_1d(y, 0.2), expected)


def test_strong_smoothing_gives_the_weighted_mean() -> None:
    torch.manual_seed(1)
    y, weights = torch.randn(4, 30, dtype=FLOAT), 0.1 + torch.rand(30, dtype=FLOAT)
    mean = (weights * y).sum(-1, keepdim=True) / weights.sum()
    torch.testing.assert_close(total_variation_1d(y, 1e6, weights), mean.expand(4, 30))


def test_no_smoothing_gives_the_data() -> None:
    torch.manual_seed(2)
    y = torch.randn(5, 20)
    torch.testing.assert_close(total_variation_1d(y, 0.0), y, rtol=0, atol=0)


def test_derivatives() -> None:
    torch.manual_seed(3)
    y = torch.randn(3, 12, dtype=FLOAT, requires_grad=True)
    edges = (0.3 * torch.rand(11, dtype=FLOAT)).requires_grad_()
    weights = (0.5 + torch.rand(3, 12, dtype=FLOAT)).requires_grad_()
    assert TotalVariation1d(edges).solve(y, weights).regular.all()
    assert gradcheck(total_variation_1d, (y, edges, weights))
    assert gradgradcheck(total_variation_1d, (y, edges, weights))


def test_jacobian_averages_over_segments() -> None:
    torch.manual_seed(4)
    y = SIGNALS["steps"](45)
    jacobian = torch.autograd.functional.jacobian(lambda y: total_variation_1d(y, 0.5), y)
    torch.testing.assert_close(jacobian @ jacobian, jacobian)
    torch.testing.assert_close(jacobian, jacobian.T)
    distinct = torch.unique(total_variation_1d(y, 0.5)).numel()
    assert float(jacobian.trace()) == pytest.approx(distinct)


def test_where_the_derivative_jumps() -> None:
    """At |y_2 - y_1| = 2 lambda the two points merge."""
    y = torch.tensor([[0.0, 1.0], [0.0, 0.9], [0.0, 1.1]], dtype=FLOAT)
    report = TotalVariation1d(0.5).solve(y)
    assert report.regular.tolist() == [False, True, True]
    assert report.solved.all()


def test_one_sequence_does_not_change_another() -> None:
    torch.manual_seed(5)
    y = torch.randn(4, 50, dtype=FLOAT)
    strength = torch.tensor([[0.1], [0.2], [0.5], [2.0]], dtype=FLOAT)
    alone = total_variation_1d(y, strength)
    y[1] *= 1e12
    y[2] = 0.0
    assert torch.equal(total_variation_1d(y, strength)[[0, 3]], alone[[0, 3]])


def test_float32_is_rounded_float64() -> None:
    torch.manual_seed(6)
    y, strength = torch.randn(3, 2000), torch.rand(3, 1)
    expected = total_variation_1d(y.double(), strength.double())
    found = total_variation_1d(y, strength)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", ["noise", "walk", "steps", "heavy_tails", "growth"])
def test_long_sequences_take_time_in_proportion(kind: str) -> None:
    torch.manual_seed(7)
    n = 200_000
    y = SIGNALS[kind](1000).repeat(n // 1000)
    start = time.perf_counter()
    report = TotalVariation1d(0.3).solve(y)
    # A method with a pass per segment, or per point, takes minutes.
    assert time.perf_counter() - start < 10
    assert report.solved


@given(
    lower=st.lists(st.integers(-9, 9), min_size=1, max_size=40),
    widths=st.lists(st.integers(0, 5), min_size=40, max_size=40),
)
@settings(deadline=None, max_examples=50)
def test_succession_of_clamps(lower: list[int], widths: list[int]) -> None:
    low = torch.tensor(lower, dtype=FLOAT)
    high = low + torch.tensor(widths[: len(low)], dtype=FLOAT)
    high[0] = low[0]
    expected, state = [], float(low[0])
    for bottom, top in zip(low.tolist(), high.tolist(), strict=True):
        state = min(max(state, bottom), top)
        expected.append(state)
    assert _play(low, high).tolist() == expected


@given(
    n=st.integers(1, 12),
    shapes=st.sampled_from(
        [((), (), ()), ((3,), (), (3,)), ((2, 1), (3,), ()), ((), (4, 1), (2,))]
    ),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_batch_dimensions_broadcast(n: int, shapes: tuple, seed: int) -> None:
    torch.manual_seed(seed)
    batch_y, batch_s, batch_w = shapes
    y = torch.randint(-3, 4, (*batch_y, n)).double()
    strength = torch.rand(*batch_s, 1, dtype=FLOAT)
    weights = 0.5 + torch.rand(*batch_w, n, dtype=FLOAT)
    x = total_variation_1d(y, strength, weights)
    batch = torch.broadcast_shapes(*shapes)
    assert x.shape == (*batch, n)
    rows = [
        data.expand(*batch, data.shape[-1]).reshape(-1, data.shape[-1])
        for data in (x, y, strength.expand(*batch_s, max(n - 1, 1)), weights)
    ]
    for one, data, bound, weight in zip(*rows, strict=True):
        assert violation(one, data, bound[: n - 1], weight) < 1e-12


def test_under_vmap() -> None:
    torch.manual_seed(8)
    y, strength = torch.randn(5, 20, dtype=FLOAT), torch.rand(5, dtype=FLOAT)
    expected = total_variation_1d(y, strength[:, None])
    assert torch.equal(torch.func.vmap(total_variation_1d)(y, strength), expected)
    grads = torch.func.vmap(torch.func.grad(lambda s, y: total_variation_1d(y, s)[3]))(strength, y)
    inputs = strength.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total_variation_1d(y, inputs[:, None])[:, 3].sum(), inputs)
    torch.testing.assert_close(grads, grad)


def test_learned_strength() -> None:
    module = TotalVariation1d(torch.nn.Parameter(torch.tensor(0.2)))
    module(torch.tensor([0.0, 1.0]))[0].backward()
    assert float(module.strength.grad) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": -1.0}, r"strength(\[0\])? is -1; it must be a finite nonnegative"),
        ({"strength": torch.ones(4)}, r"strength has shape \(4,\); expected \(\.\.\., 2\)"),
        ({"weights": torch.tensor([1.0, 0.0, 1.0])}, r"weights\[1\] is 0; it must be a finite pos"),
        ({"y": torch.tensor([1.0, torch.nan, 0.0])}, r"y\[1\] is nan"),
        ({"y": torch.ones(2, 0)}, r"y has shape \(2, 0\)"),
        ({"y": torch.ones(3, dtype=torch.int32)}, "y has type torch.int32"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        total_variation_1d(**({"y": torch.ones(3), "strength": 1.0} | change))
