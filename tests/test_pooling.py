"""Robust pooling: global minima, derivatives, reports, and what it refuses."""

from __future__ import annotations

import math

import cvxpy as cp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.kernels.pooling import RobustPool, robust_pool
from declarative_cvx.penalties import PENALTIES, Penalty, Quadratic
from declarative_cvx.status import Status

NAMES = sorted(PENALTIES)
NONCONVEX = [name for name in NAMES if not PENALTIES[name].convex]
SMOOTH = [name for name in NAMES if not PENALTIES[name].breakpoints]
double = torch.float64


class Logcosh(Penalty):
    """A convex penalty of a user's own."""

    name = "logcosh"
    convex = True

    def rho(self, r: Tensor) -> Tensor:
        return r.abs() + torch.nn.functional.softplus(-2 * r.abs()) - math.log(2)


class Bump(Penalty):
    """One that is not convex, of which nothing more is known."""

    name = "bump"
    power = 0

    def rho(self, r: Tensor) -> Tensor:
        return r * r / (2 + r * r)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=double, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=double, generator=torch.Generator().manual_seed(seed))


def spoilt(pools: int, n: int, outliers: float, cluster: float, seed: int = 0) -> Tensor:
    """Inliers of width 1 with uniform outliers in [-10, 10] and a second cluster at 6."""
    x = normal(pools, n, seed=seed)
    x = torch.where(uniform(pools, n, seed=seed + 1) < outliers, 20 * uniform(pools, n) - 10, x)
    return torch.where(uniform(pools, n, seed=seed + 2) < cluster, x + 6, x)


def objective(penalty: Penalty, x: Tensor, u: Tensor, alpha: float, weights: Tensor) -> Tensor:
    """Sum of penalties of pools (batch, n) at arguments (batch, k)."""
    terms = penalty.value(u.unsqueeze(-1) - x.unsqueeze(1), alpha)
    return (terms * weights.unsqueeze(1)).sum(-1)


def least_by_dense_search(penalty: Penalty, x: Tensor, alpha: float, weights: Tensor) -> Tensor:
    """The global minima of pools (batch, n): grids around all data, then around the best point."""
    width, points = alpha, x
    for _ in range(6):
        grid = torch.linspace(-width, width, 41, dtype=double)
        grid = (points.unsqueeze(-1) + grid).flatten(1)
        value = objective(penalty, x, grid, alpha, weights)
        points = grid.gather(-1, value.argmin(-1, keepdim=True))
        width /= 10
    return value.amin(-1)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, double])
@pytest.mark.parametrize("name", NAMES)
def test_every_pool_is_at_its_global_minimum(name, dtype, weighted):
    """No point of a dense search is lower, whatever the outliers, and the slope is zero."""
    precision = 1e-6 if dtype == torch.float32 else 1e-13
    for seed, (n, outliers, cluster) in enumerate(
        [(1, 0, 0), (2, 0, 0), (7, 0.5, 0), (40, 0, 0.45), (60, 0.5, 0), (60, 0.8, 0.3)]
    ):
        x = spoilt(5, n, outliers, cluster, seed).to(dtype)
        weights = uniform(5, n, seed=seed).to(dtype) if weighted else torch.ones_like(x)
        for alpha in (0.2, 1.0, 5.0):
            y = robust_pool(x, name, alpha, weights=weights if weighted else None)
            assert y.dtype == dtype
            arguments = PENALTIES[name], x.double(), alpha, weights.double()
            least = least_by_dense_search(*arguments)
            size = weights.double().sum(-1) * alpha ** PENALTIES[name].power + least
            reached = objective(*arguments[:2], y.double()[:, None], *arguments[2:]).squeeze(-1)
            assert ((reached - least) / size).max() < precision
            slope = weights * PENALTIES[name].slope(y.unsqueeze(-1) - x, alpha)
            scale = slope.abs().sum(-1) + alpha ** (PENALTIES[name].power - 1)
            bound = 40 * torch.finfo(dtype).eps * (1 + x.abs().amax() / alpha)
            assert (slope.sum(-1).abs() / scale).max() < bound


@pytest.mark.parametrize("penalty", [Logcosh(), Bump()], ids=repr)
def test_a_penalty_of_ones_own_is_minimised_globally(penalty):
    x = spoilt(3, 15, 0.2, 0.4)
    least = least_by_dense_search(penalty, x, 1.0, torch.ones_like(x))
    pool = RobustPool(penalty, dim=-1, keepdim=False)
    solution = pool.solve(x)
    assert torch.allclose(solution.objective, least, rtol=1e-12)
    assert solution.gap.max() < (1e-15 if penalty.convex else 2e-4)
    assert solution.residual.max() < 1e-15
    assert gradcheck(pool, x.requires_grad_())


@pytest.mark.parametrize("name", ["quadratic", "huber"])
def test_convex_pooling_agrees_with_cvxpy(name):
    x, weights = spoilt(3, 12, 0.3, 0), uniform(3, 12) + 0.1
    y = robust_pool(x, name, 1.5, weights=weights)
    for data, w, found in zip(x.numpy(), weights.numpy(), y, strict=True):
        u = cp.Variable()
        terms = cp.square(u - data) / 2 if name == "quadratic" else cp.huber(u - data, 1.5) / 2
        cp.Problem(cp.Minimize(w @ terms)).solve(solver=cp.CLARABEL)
        assert abs(float(found) - u.value) < 1e-6


def test_the_quadratic_penalty_gives_the_mean():
    x, weights = normal(4, 5, 6), uniform(4, 5, 6)
    assert torch.allclose(robust_pool(x, "quadratic", dim=(0, 2)), x.mean((0, 2)))
    y = robust_pool(x, "quadratic", 7.0, dim=1, weights=weights)
    assert torch.allclose(y, (weights * x).sum(1) / weights.sum(1))


@pytest.mark.parametrize("name", NAMES)
def test_far_outliers_do_not_move_the_minimum_of_the_others(name):
    near = normal(5, 30)
    far = torch.cat([near, 1e6 + 100 * uniform(5, 8)], dim=-1)
    y, alone = robust_pool(far, name), robust_pool(near, name)
    if PENALTIES[name].support < math.inf or name in ("welsch", "geman_mcclure"):
        assert torch.allclose(y, alone, atol=1e-10)
    least = least_by_dense_search(PENALTIES[name], far, 1.0, torch.ones_like(far))
    reached = objective(PENALTIES[name], far, y[:, None], 1.0, torch.ones_like(far)).squeeze(-1)
    assert (reached <= least * (1 + 1e-12)).all() or name == "quadratic"


@pytest.mark.parametrize("name", NONCONVEX)
def test_the_larger_of_two_clusters_wins_however_far_away_it_is(name):
    """The median is between: neither start of the usual method would find it."""
    tight = torch.linspace(-0.1, 0.1, 45, dtype=double)
    spread = torch.linspace(10, 1e5, 40, dtype=double)
    x = torch.cat([spread, 3e5 + tight]).expand(2, -1)
    assert torch.allclose(robust_pool(x, name), torch.full((2,), 3e5, dtype=double), atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, double])
def test_equal_points_and_single_points_are_their_own_minimum(name, dtype):
    value = torch.tensor([[-3.7], [0.0], [1e5]], dtype=dtype)
    for n in (1, 2, 50):
        x = value.repeat(1, n).requires_grad_()
        y = robust_pool(x, name)
        assert torch.allclose(y, value.squeeze(-1), rtol=1e-15, atol=1e-14)
        y.sum().backward()
        assert torch.allclose(x.grad, torch.full_like(x, 1 / n))


@pytest.mark.parametrize("name", NONCONVEX)
def test_of_two_equal_minima_the_smaller_is_taken_and_reported(name):
    x = torch.tensor([[0.0, 0.1, 20.0, 20.1], [0.0, 0.1, 20.0, 20.0]], dtype=double)
    solution = RobustPool(name, dim=-1, keepdim=False).solve(x)
    assert float(solution.value[0]) < 1 < float(solution.value[1])
    assert solution.regular.tolist() == [False, True]
    assert torch.equal(robust_pool(-x, name)[1], -solution.value[1])


def test_huber_takes_the_middle_of_an_interval_of_minima():
    x = torch.tensor([[0.0, 1.0, 7.0, 9.0]], dtype=double, requires_grad=True)
    solution = RobustPool("huber", dim=-1, keepdim=False).solve(x)
    assert solution.value.item() == 4.0
    assert not solution.regular.item()
    solution.value.backward()
    assert x.grad.tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_small_changes_keep_the_branch():
    x = spoilt(20, 30, 0, 0.45)
    for name in NONCONVEX:
        y = robust_pool(x, name)
        assert torch.equal(y, robust_pool(x, name))
        assert (robust_pool(x + 1e-9 * normal(20, 30, seed=5), name) - y).abs().max() < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_no_pool_influences_another(name):
    x = spoilt(6, 40, 0.5, 0)
    alone = torch.stack([robust_pool(row, name) for row in x])
    strange = torch.cat([x, 1e9 * x[:1], x[:1] * 0])
    assert torch.allclose(robust_pool(strange, name)[:6], alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-2, 1e6])
def test_the_units_do_not_matter(name, scale):
    x = spoilt(6, 40, 0.5, 0)
    y = robust_pool(scale * x, name, scale)
    assert torch.allclose(y / scale, robust_pool(x, name), rtol=0, atol=1e-12)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.data(),
)
@settings(deadline=None, max_examples=25)
def test_any_dimensions_of_a_tensor_of_any_rank(shape, data):
    dims = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    signed = tuple(data.draw(st.sampled_from([d, d - len(shape)])) for d in sorted(dims))
    keepdim = data.draw(st.booleans())
    x = normal(*shape)
    y = robust_pool(x, "quadratic", dim=signed, keepdim=keepdim)
    expected = x.mean(signed, keepdim=keepdim)
    assert y.shape == expected.shape
    assert torch.allclose(y, expected)


def test_alpha_and_weights_broadcast():
    x = normal(3, 4, 5)
    alpha, weights = uniform(3, 1) + 0.5, uniform(4, 5)
    y = robust_pool(x, "welsch", alpha, weights=weights)
    for i in range(3):
        for j in range(4):
            one = robust_pool(x[i, j], "welsch", float(alpha[i, 0]), weights=weights[j])
            assert torch.allclose(y[i, j], one, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_in_data_scale_and_weights(name):
    x = spoilt(2, 6, 0.3, 0).requires_grad_()
    alpha = (uniform(2) + 0.8).requires_grad_()
    weights = (uniform(2, 6, seed=4) + 0.1).requires_grad_()

    def pool(x, alpha, weights):
        return robust_pool(x, name, alpha, weights=weights)

    assert gradcheck(pool, (x, alpha, weights))
    assert gradgradcheck(pool, (x, alpha, weights))


@pytest.mark.parametrize("name", ["pseudo_huber", "huber", "welsch", "truncated_quadratic"])
def test_the_derivative_in_the_data_is_that_of_the_papers_table(name):
    x = spoilt(3, 20, 0.3, 0)
    y = robust_pool(x, name, 1.3)
    z = (y.unsqueeze(-1) - x) / 1.3
    inside = (z.abs() <= 1).to(double)
    weight = {
        "pseudo_huber": (1 + z**2) ** -1.5,
        "huber": inside,
        "welsch": (1 - z**2) * torch.exp(-(z**2) / 2),
        "truncated_quadratic": inside,
    }[name]
    leaf = x.requires_grad_()
    robust_pool(leaf, name, 1.3).sum().backward()
    assert torch.allclose(leaf.grad, weight / weight.sum(-1, keepdim=True), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_float32_gradients_are_accurate(name):
    x = spoilt(20, 200, 0.3, 0).float()
    gradients = []
    for kind in (torch.float32, double):
        leaf = x.to(kind).requires_grad_()
        gradients.append(torch.autograd.grad(robust_pool(leaf, name).sum(), leaf)[0].double())
    single, exact = gradients
    assert ((single - exact).abs().amax(-1) / exact.abs().amax(-1)).max() < 1e-4


def test_gradients_do_not_underflow_with_tiny_weights():
    x = spoilt(2, 20, 0.3, 0)
    weights = uniform(2, 20) + 0.5
    gradients = []
    for scale in (1.0, 1e-300):
        leaf, w = x.clone().requires_grad_(), (scale * weights).requires_grad_()
        robust_pool(leaf, "welsch", weights=w).sum().backward()
        gradients.append((leaf.grad, w.grad * scale))
    for first, second in zip(*gradients, strict=True):
        assert torch.allclose(first, second, rtol=1e-10)


def test_a_residual_at_the_breakpoint_counts_as_inside():
    x = torch.tensor([[-1.0, 0.0, 1.0]], dtype=double, requires_grad=True)
    solution = RobustPool("huber", dim=-1, keepdim=False).solve(x)
    solution.value.backward()
    assert not solution.regular.item()
    assert torch.allclose(x.grad, torch.full_like(x, 1 / 3))


def test_under_vmap_and_jacrev():
    x = spoilt(4, 15, 0.3, 0)
    for name in ("pseudo_huber", "huber", "welsch", "truncated_quadratic"):

        def pool(row, name=name):
            return robust_pool(row, name)

        assert torch.allclose(torch.func.vmap(pool)(x), robust_pool(x, name))
        leaf = x.clone().requires_grad_()
        robust_pool(leaf, name).sum().backward()
        each = torch.func.vmap(torch.func.grad(pool))(x)
        assert torch.allclose(each, leaf.grad)
        assert torch.allclose(torch.func.jacrev(pool)(x).sum(0), leaf.grad)
        batched = torch.autograd.grad(
            robust_pool(leaf, name), leaf, torch.eye(4, dtype=double), is_grads_batched=True
        )[0]
        assert torch.allclose(batched.sum(0), leaf.grad)


@pytest.mark.parametrize("name", NAMES)
def test_reports_say_how_good_each_pool_is(name):
    x = spoilt(8, 15, 0.2, 0).reshape(2, 4, 15)
    solution = RobustPool(name, 1.7, dim=-1, keepdim=False).solve(x)
    assert solution.status.tolist() == [[int(Status.OPTIMAL)] * 4] * 2
    assert solution.residual.max() < 1e-14
    assert solution.gap.max() < 1e-12
    assert solution.regular.all()
    expected = PENALTIES[name].value(solution.value.unsqueeze(-1) - x, 1.7).sum(-1)
    assert torch.allclose(solution.objective, expected)


def test_the_layer_stands_where_average_pooling_stood():
    images = normal(2, 3, 6, 7).float()
    average = torch.nn.AdaptiveAvgPool2d(1)(images)
    assert torch.allclose(RobustPool("quadratic")(images), average, atol=1e-6)
    layer = RobustPool("welsch", 2.0, learn_alpha=True)
    layer(images).sum().backward()
    assert layer.log_alpha.grad is not None
    assert not list(RobustPool("welsch", 2.0).parameters())
    other = RobustPool("welsch", 1.0)
    other.load_state_dict(RobustPool("welsch", 2.0).state_dict())
    assert torch.equal(other(images), RobustPool("welsch", 2.0)(images))
    assert "welsch" in repr(layer)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(kind):
    x = normal(3, 50).to(kind)
    assert torch.equal(robust_pool(x, "welsch"), robust_pool(x.float(), "welsch").to(kind))


@pytest.mark.parametrize("name", NAMES)
def test_points_in_the_plane_are_stationary_and_differentiable(name):
    x = torch.stack([spoilt(2, 6, 0.2, 0, seed) for seed in (0, 7)], dim=1)  # (2, 2, 6)
    layer = RobustPool(name, 1.5, dim=-1, point_dim=1, keepdim=False)
    solution = layer.solve(x)
    assert solution.value.shape == (2, 2)
    assert solution.residual.max() < 1e-14
    assert solution.solved.all()
    if PENALTIES[name].convex:
        assert solution.gap.max() < 1e-13
    else:
        assert solution.gap.isnan().all()
    weights = (uniform(6) + 0.2).requires_grad_()
    alpha = torch.tensor(1.5, dtype=double, requires_grad=True)

    def pool(x, alpha, weights):
        return robust_pool(x, name, alpha, weights=weights, point_dim=1)

    inputs = x.requires_grad_(), alpha, weights
    assert gradcheck(pool, inputs)
    assert gradgradcheck(pool, inputs)


@pytest.mark.parametrize("name", NONCONVEX)
def test_restarts_find_the_larger_cluster_of_points(name):
    """The mean and the median are both between the clusters, or in the smaller one."""
    first, second = normal(5, 40, 3), normal(5, 30, 3, seed=1) / 4 + 12
    far = 60 * uniform(5, 30, 3) + 20
    x = torch.cat([second, far, first], dim=1)
    y = robust_pool(x, name, 2.0, dim=1, point_dim=2, restarts=8)
    expected = robust_pool(second, name, 2.0, dim=1, point_dim=2)

    def value(u):
        return PENALTIES[name].value((u.unsqueeze(1) - x).norm(dim=-1), 2.0).sum(-1)

    assert (value(y) <= value(expected) + 1e-9).all()
    assert (value(y) <= value(robust_pool(first, name, 2.0, dim=1, point_dim=2)) + 1e-9).all()


def test_points_of_one_dimension_are_numbers():
    x = spoilt(4, 20, 0.3, 0)
    for name in ("pseudo_huber", "huber", "cauchy"):
        y = robust_pool(x.unsqueeze(1), name, point_dim=1, restarts=20).squeeze(1)
        assert torch.allclose(y, robust_pool(x, name), atol=1e-12)


def test_equal_points_in_space():
    x = normal(2, 1, 3).expand(2, 6, 3).clone().requires_grad_()
    for name in NAMES:
        y = robust_pool(x, name, dim=1, point_dim=2)
        assert torch.allclose(y, x[:, 0])
        gradient = torch.autograd.grad(y.sum(), x)[0]
        assert torch.allclose(gradient, torch.full_like(x, 1 / 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor([[[1.0, 2.0]], [[math.nan, 1.0]]])}, r"x\[1, 0, 0\] is nan"),
        ({"x": torch.tensor([[[1.0, math.inf]], [[0.0, 1.0]]])}, r"x\[0, 0, 1\] is inf"),
        ({"x": torch.zeros(2, 1, 2, dtype=torch.int64)}, "floating-point"),
        ({"x": torch.zeros(2, 1, 0)}, r"shape \(2, 1, 0\) is empty in dimension 2"),
        ({"alpha": 0.0}, r"alpha\[0, 0\] is 0.0"),
        ({"alpha": torch.tensor([[1.0], [-2.0]])}, r"alpha\[1, 0\] is -2.0"),
        ({"alpha": math.nan}, "alpha.* is nan"),
        ({"alpha": torch.ones(3)}, r"alpha of shape \(3,\) does not broadcast"),
        ({"weights": torch.tensor([1.0, -1.0])}, r"weights\[0, 0, 1\] is -1.0"),
        ({"weights": torch.zeros(2)}, "largest weight of a pool must be positive"),
        ({"weights": torch.tensor([1.0, math.nan])}, "is nan"),
        ({"weights": torch.ones(5)}, "does not broadcast"),
    ],
)
def test_bad_numbers_are_named(change, message):
    arguments = {"x": torch.zeros(2, 1, 2), "alpha": 1.0, "weights": None} | change
    with pytest.raises(ParameterError, match=message):
        robust_pool(arguments["x"], "welsch", arguments["alpha"], weights=arguments["weights"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "welch"}, "Did you mean 'welsch'"),
        ({"dim": 3}, "dim=3 is not of x"),
        ({"dim": (1, -1)}, "more than once"),
        ({"dim": ()}, "is empty"),
        ({"point_dim": -1}, "more than once"),
        ({"restarts": -1}, "restarts"),
    ],
)
def test_bad_choices_are_named(options, message):
    with pytest.raises(SpecificationError, match=message):
        robust_pool(torch.zeros(3, 4), **options)


def test_no_pools_at_all_is_fine():
    x = torch.zeros(0, 3, requires_grad=True)
    y = robust_pool(x, "welsch")
    assert y.shape == (0,)
    y.sum().backward()
    assert x.grad.shape == (0, 3)


def test_the_data_are_left_as_they_were():
    x = spoilt(3, 20, 0.3, 0)
    before = x.clone()
    for name in NAMES:
        robust_pool(x, name)
    assert torch.equal(x, before)
    assert Quadratic() == PENALTIES["quadratic"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("penalty", ["huber", "pseudo_huber", "welsch"])
def test_points_whose_minimum_is_far_from_their_median(penalty: str, dtype: torch.dtype) -> None:
    """Three clusters at 1e6 alpha on the axes: the coordinates' medians are none of them."""
    generator = torch.Generator().manual_seed(0)
    corners = 1e6 * torch.eye(3, dtype=torch.float64)
    sizes = torch.tensor([144, 78, 78])
    noise = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    x = (corners.repeat_interleave(sizes, 0) + noise).to(dtype)
    near = x[:50].double() - corners[0]  # a pool beside it that has nothing far
    beside = torch.cat([near] * 6).to(dtype)
    found = robust_pool(torch.stack([x, beside]), penalty, 1.0, dim=1, point_dim=2)
    points, rho = x.double() - corners[0], PENALTIES[penalty]
    u = found[0].double() - corners[0]
    for _ in range(3):  # Newton's method in float64, about the corner
        hessian = torch.func.hessian(lambda v: rho.rho((v - points).norm(dim=1)).sum())(u)
        slope = torch.func.grad(lambda v: rho.rho((v - points).norm(dim=1)).sum())(u)
        u = u - torch.linalg.solve(hessian, slope)
    resolution = 2 * torch.finfo(dtype).eps * 1e6
    assert float((found[0].double() - corners[0] - u).abs().max()) <= resolution
    alone = robust_pool(beside[None], penalty, 1.0, dim=1, point_dim=2)
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=0)
