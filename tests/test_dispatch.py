"""Problems that a kernel solves are recognised and solved with its numbers; no others are."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
import torch

import declarative_cvx as dcx
from declarative_cvx.patterns import Pooling, ProjectionPattern, recognise

N, D = 6, 3


class Leaves:
    """Variables and parameters that the problems below are made of."""

    def __init__(self) -> None:
        self.u, self.v = cp.Variable(name="u"), cp.Variable(D, name="v")
        self.p, self.X, self.q = cp.Parameter(N), cp.Parameter((N, D)), cp.Parameter(D)
        self.w, self.signed = cp.Parameter(N, nonneg=True), cp.Parameter(N)
        self.a, self.r = cp.Parameter(pos=True), cp.Parameter(pos=True)
        self.any = cp.Parameter()


Objective = Callable[[Leaves], cp.Expression]

POOLING: dict[str, Objective] = {
    "welsch": lambda x: cp.sum(dcx.welsch(x.u - x.p, 0.5)),
    "of_the_negative": lambda x: cp.sum(dcx.welsch(x.p - x.u, 0.5)),
    "alpha_parameter": lambda x: cp.sum(dcx.cauchy(x.u - x.p, x.a)),
    "weights": lambda x: x.w @ dcx.geman_mcclure(x.u - x.p, x.a),
    "multiplied_weights": lambda x: cp.sum(cp.multiply(x.w, dcx.tukey(x.u - x.p, x.a))) / 3,
    "truncated": lambda x: cp.sum(dcx.truncated_quadratic(x.u - x.p, 0.7)),
    "huber": lambda x: 0.5 * cp.sum(cp.huber(x.u - x.p, 0.3)),
    "pseudo_huber": lambda x: cp.sum(dcx.pseudo_huber(x.u - x.p, 0.3)),
    "affine_data": lambda x: cp.sum(dcx.welsch(x.u - (2 * x.p + 1), 0.5)),
    "two_sums": lambda x: cp.sum(dcx.welsch(x.u - x.p, 0.5)) + 2 * dcx.welsch(x.u - 0.1, 0.5),
    "one_by_one": lambda x: sum(dcx.welsch(x.u - x.p[i], 0.5) for i in range(N)),
    "constant_added": lambda x: cp.sum(dcx.welsch(x.u - x.p, 0.5)) + cp.sum(x.p),
    "several_pools": lambda x: cp.sum(dcx.welsch(x.v - x.X, 0.5)),
    "pools_of_several_sizes": lambda x: cp.sum(dcx.welsch(x.v - x.X, 0.5)) + cp.sum(
        dcx.welsch(x.v - x.q, 0.5)
    ),
}  # fmt: skip

VECTOR: dict[str, Objective] = {
    "rows": lambda x: cp.sum(dcx.welsch(cp.norm(x.v - x.X, 2, axis=1), 1.5)),
    "columns": lambda x: cp.sum(dcx.welsch(cp.norm(x.X.T - x.v[:, None], 2, axis=0), 1.5)),
    "weighted_rows": lambda x: x.w @ dcx.cauchy(cp.norm(x.v - x.X, 2, axis=1), x.a),
    "point_by_point": lambda x: sum(dcx.pseudo_huber(cp.norm(x.v - x.X[i]), 0.8) for i in range(N)),
}
NOT_VECTOR = "columns"  # the variable is indexed there

Constraints = Callable[[Leaves], list[cp.Constraint]]
PROJECTIONS: dict[str, tuple[Constraints, str, float | None]] = {
    "l1_ball": (lambda x: [cp.norm(x.v, 1) <= x.r], "ball", 1),
    "l1_ball_turned": (lambda x: [x.r >= cp.norm1(x.v)], "ball", 1),
    "l2_ball": (lambda x: [cp.norm(x.v) <= 0.8], "ball", 2),
    "squared_ball": (lambda x: [cp.sum_squares(x.v) <= x.r], "ball", 2),
    "linf_ball": (lambda x: [cp.norm(x.v, "inf") <= x.r], "ball", np.inf),
    "l1_sphere": (lambda x: [cp.norm(x.v, 1) == x.r], "sphere", 1),
    "l2_sphere": (lambda x: [cp.norm(x.v, 2) == x.r], "sphere", 2),
    "squared_sphere": (lambda x: [cp.sum_squares(x.v) == 4], "sphere", 2),
    "linf_sphere": (lambda x: [cp.norm(x.v, "inf") == x.r], "sphere", np.inf),
    "simplex": (lambda x: [cp.sum(x.v) == x.r, x.v >= 0], "simplex", None),
}

# What is almost one of the patterns, and is not.
NEARLY: dict[str, Callable[[Leaves], tuple]] = {
    "scaled_variable": lambda x: (cp.sum(dcx.welsch(2 * x.u - x.p)),),
    "variable_twice": lambda x: (cp.sum(dcx.welsch(x.u + x.u - x.p)),),
    "variable_times_data": lambda x: (cp.sum(dcx.welsch(cp.multiply(x.u, x.p))),),
    "part_of_the_variable": lambda x: (cp.sum(dcx.welsch(x.v[:2] - x.X[:, :2])),),
    "weights_of_any_sign": lambda x: (x.signed @ dcx.welsch(x.u - x.p),),
    "negative": lambda x: (-cp.sum(dcx.welsch(x.u - x.p)),),
    "two_penalties": lambda x: (
        cp.sum(dcx.welsch(x.u - x.p)) + cp.sum(dcx.cauchy(x.u - x.p)),
    ),
    "two_scales": lambda x: (
        cp.sum(dcx.welsch(x.u - x.p, x.a)) + cp.sum(dcx.welsch(x.u - x.p, 2 * x.a)),
    ),
    "scale_for_each_point": lambda x: (cp.sum(dcx.welsch(x.u - x.p, np.arange(1.0, N + 1))),),
    "huber_that_may_vanish": lambda x: (cp.sum(cp.huber(x.u - x.p, cp.abs(x.any))),),
    "huber_by_a_nonnegative_parameter": lambda x: (cp.sum(cp.huber(x.u - x.p, x.w[0])),),
    "linear_term": lambda x: (cp.sum(dcx.welsch(x.u - x.p)) + x.u,),
    "squared_penalty": lambda x: (cp.sum(cp.square(dcx.welsch(x.u - x.p))),),
    "worst_penalty": lambda x: (cp.max(dcx.welsch(x.u - x.p)),),
    "l1_distance": lambda x: (cp.sum(dcx.welsch(cp.norm(x.v - x.X, 1, axis=1))),),
    "constrained_pool": lambda x: (cp.sum(dcx.welsch(x.u - x.p)), x.u >= 0),
    "two_variables": lambda x: (cp.sum(dcx.welsch(x.u - x.p)) + dcx.welsch(x.v[0] - 1),),
    "outside_a_ball": lambda x: (cp.sum_squares(x.v - x.q), cp.norm(x.v) >= x.r),
    "radius_of_any_sign": lambda x: (cp.sum_squares(x.v - x.q), cp.norm(x.v) <= x.any),
    "ellipsoid": lambda x: (
        cp.sum_squares(x.v - x.q), cp.norm(cp.multiply([1, 2, 3], x.v)) <= 1,
    ),
    "ball_elsewhere": lambda x: (cp.sum_squares(x.v - x.q), cp.norm(x.v - x.q) <= 1),
    "norm_of_a_part": lambda x: (cp.sum_squares(x.v - x.q), cp.norm(x.v[:2]) <= 1),
    "scaled_distance": lambda x: (cp.sum_squares(2 * x.v - x.q), cp.norm(x.v) <= 1),
    "weighted_distance": lambda x: (
        cp.sum(cp.multiply([1, 2, 3], cp.square(x.v - x.q))), cp.norm(x.v) <= 1,
    ),
    "distance_and_more": lambda x: (
        cp.sum_squares(x.v - x.q) + cp.sum(x.v), cp.norm(x.v) <= 1,
    ),
    "ball_and_orthant": lambda x: (cp.sum_squares(x.v - x.q), cp.norm(x.v) <= 1, x.v >= 0),
    "below_the_simplex": lambda x: (cp.sum_squares(x.v - x.q), cp.sum(x.v) <= 1, x.v >= 0),
    "shifted_simplex": lambda x: (cp.sum_squares(x.v - x.q), cp.sum(x.v) == 4, x.v >= 1),
    "hyperplane": lambda x: (cp.sum_squares(x.v - x.q), cp.sum(x.v) == 1),
    "another_norm": lambda x: (cp.sum_squares(x.v - x.q), cp.pnorm(x.v, 3) <= 1),
    "empty_simplex": lambda x: (cp.sum_squares(x.v - x.q), cp.sum(x.v) == -1, x.v >= 0),
}  # fmt: skip


def problem_of(objective: cp.Expression, *constraints: cp.Constraint) -> cp.Problem:
    return cp.Problem(cp.Minimize(objective), list(constraints))


def values_of(problem: cp.Problem, batch: int = 4, seed: int = 0) -> list[torch.Tensor]:
    """Random values in the parameters' declared range, some shared by the batch."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for position, parameter in enumerate(problem.parameters()):
        shape = parameter.shape if position == 1 else (batch, *parameter.shape)
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        values.append(value.abs() + 0.3 if parameter.is_nonneg() else value)
    return values


def layer_of(problem: cp.Problem, **options: object) -> dcx.DeclarativeLayer:
    return dcx.DeclarativeLayer(problem, problem.parameters(), problem.variables(), **options)


@pytest.mark.parametrize("name", POOLING)
def test_pooling_is_recognised_and_global(name: str) -> None:
    """Against the least value on a dense grid, with CVXPY's own evaluation of the objective."""
    leaves = Leaves()
    problem = problem_of(POOLING[name](leaves))
    layer = layer_of(problem)
    assert isinstance(layer.spec.pattern, Pooling)
    assert "robust pooling" in str(layer.spec)
    assert "robust pooling" in repr(layer)
    values = values_of(problem)
    solution = layer.solve(*values)
    assert bool(solution.solved.all())
    (variable,) = problem.variables()
    grid = np.linspace(-4, 4, 4001)
    for element in range(4):
        for parameter, value in zip(problem.parameters(), values, strict=True):
            parameter.value = (value[element] if value.ndim > parameter.ndim else value).numpy()
        found = solution.variables[0][element].numpy()
        variable.value = found
        value = float(problem.objective.value)
        assert float(solution.value[element]) == pytest.approx(value, rel=1e-12, abs=1e-14)
        for entry in range(variable.size):
            least = min(_with_entry(problem, variable, found, entry, u) for u in grid[::20])
            assert value <= least + 1e-10


def _with_entry(
    problem: cp.Problem, variable: cp.Variable, found: np.ndarray, entry: int, u: float
) -> float:
    trial = np.array(found, dtype=float).reshape(-1)
    trial[entry] = u
    variable.value = trial.reshape(variable.shape)
    return float(problem.objective.value)


@pytest.mark.parametrize("name", [name for name in VECTOR if name != NOT_VECTOR])
def test_vector_pooling_is_recognised_and_stationary(name: str) -> None:
    leaves = Leaves()
    problem = problem_of(VECTOR[name](leaves))
    layer = layer_of(problem)
    assert isinstance(layer.spec.pattern, Pooling)
    assert layer.spec.pattern.vector
    values = values_of(problem)
    (found,) = layer(*values)
    (variable,) = problem.variables()
    for element in range(4):
        for parameter, value in zip(problem.parameters(), values, strict=True):
            parameter.value = (value[element] if value.ndim > parameter.ndim else value).numpy()
        best = found[element].numpy()
        variable.value = best
        value = float(problem.objective.value)
        rng = np.random.default_rng(0)
        for step in 10.0 ** rng.uniform(-6, 0.5, 200):
            variable.value = best + step * rng.normal(size=best.shape)
            assert value <= float(problem.objective.value) + 1e-12


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projection_is_recognised_and_nearest(name: str) -> None:
    constraints, onto, p = PROJECTIONS[name]
    leaves = Leaves()
    problem = problem_of(cp.sum_squares(leaves.v - leaves.q), *constraints(leaves))
    layer = layer_of(problem)
    pattern = layer.spec.pattern
    assert isinstance(pattern, ProjectionPattern)
    assert (pattern.onto, pattern.p) == (onto, p)
    values = values_of(problem)
    (found,) = layer(*values)
    if problem.is_dcp():
        (expected,) = layer_of(problem, solver="Clarabel")(*values)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        return
    by_name = dict(zip([parameter.id for parameter in problem.parameters()], values, strict=True))
    radius = by_name.get(leaves.r.id, torch.tensor(2.0, dtype=torch.float64))
    expected = dcx.project(by_name[leaves.q.id], onto, p, radius=radius)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [*POOLING, *PROJECTIONS])
def test_gradients_for_every_parameter(name: str) -> None:
    leaves = Leaves()
    if name in POOLING:
        problem = problem_of(POOLING[name](leaves))
    else:
        constraints = PROJECTIONS[name][0](leaves)
        problem = problem_of(cp.sum_squares(leaves.v - leaves.q), *constraints)
    layer = layer_of(problem, optimal_value=True)
    inputs = [value.requires_grad_() for value in values_of(problem, batch=2, seed=3)]
    assert torch.autograd.gradcheck(layer, inputs, atol=1e-6)


@pytest.mark.parametrize("name", NEARLY)
def test_what_only_nearly_fits_is_left_alone(name: str) -> None:
    objective, *constraints = NEARLY[name](Leaves())
    assert recognise(problem_of(objective, *constraints)) is None


def test_maximisation_is_no_pattern() -> None:
    leaves = Leaves()
    problem = cp.Problem(cp.Maximize(cp.sum(dcx.welsch(leaves.u - leaves.p))))
    assert recognise(problem) is None


def test_declared_variables_are_no_plain_pools() -> None:
    u, p = cp.Variable(nonneg=True), cp.Parameter(N)
    assert recognise(problem_of(cp.sum(dcx.welsch(u - p)))) is None
    v, q = cp.Variable(D, nonneg=True), cp.Parameter(D)
    simplex = recognise(problem_of(cp.sum_squares(v - q), cp.sum(v) == 2))
    assert isinstance(simplex, ProjectionPattern)
    assert simplex.onto == "simplex"
    assert recognise(problem_of(cp.sum_squares(v - q), cp.norm(v) <= 2)) is None


def test_a_named_solver_or_a_multiplier_gets_the_cone_program() -> None:
    leaves = Leaves()
    ball = cp.norm(leaves.v) <= leaves.r
    problem = problem_of(cp.sum_squares(leaves.v - leaves.q), ball)
    values = values_of(problem)
    assert layer_of(problem, solver="SCS").solve(*values).backend == ("SCS",) * 4
    multiplier = ball.dual_variables[0]
    layer = dcx.DeclarativeLayer(problem, problem.parameters(), [leaves.v, multiplier])
    (x, y), (found,) = layer(*values), layer_of(problem)(*values)
    torch.testing.assert_close(x, found, rtol=0, atol=1e-9)
    assert bool((y >= 0).all())
    with pytest.raises(dcx.SpecificationError, match="multiplier"):
        _ = layer_of(problem).solve(*values)[multiplier]


def test_options_are_refused_where_there_are_none() -> None:
    leaves = Leaves()
    problem = problem_of(POOLING["welsch"](leaves))
    with pytest.raises(dcx.BackendError, match="max_iters"):
        layer_of(problem)(*values_of(problem), solver_args={"max_iters": 3})


def test_a_gradient_that_does_not_exist_is_complained_of() -> None:
    leaves = Leaves()
    problem = problem_of(cp.sum_squares(leaves.v - leaves.q), cp.norm(leaves.v) == 1)
    q = torch.zeros(2, D, dtype=torch.float64)
    q[1, 0] = 3.0
    q.requires_grad_()
    with pytest.warns(dcx.IrregularWarning, match=r"1 element\(s\) of the batch \(0\)"):
        layer_of(problem)(q)[0].sum().backward()
    report = layer_of(problem).solve(q).derivative
    assert report.regular.tolist() == [False, True]
    with pytest.raises(dcx.IrregularError):
        layer_of(problem, on_irregular="raise")(q)[0].sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_of(problem, on_irregular="ignore")(q)[0].sum().backward()


def test_shapes_types_transforms_and_copies() -> None:
    leaves = Leaves()
    problem = problem_of(POOLING["weights"](leaves))
    layer = layer_of(problem)
    values = values_of(problem, batch=3)
    singles = [
        value[0] if value.ndim > parameter.ndim else value
        for value, parameter in zip(values, problem.parameters(), strict=True)
    ]
    (single,) = layer(*singles)
    (batch,) = layer(*values)
    assert single.shape == ()
    assert float(single) == pytest.approx(float(batch[0]), abs=1e-14)
    (half,) = layer(*[value.float() for value in values])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, batch.float(), rtol=1e-5, atol=1e-5)
    dims = tuple(
        0 if value.ndim > parameter.ndim else None
        for value, parameter in zip(values, problem.parameters(), strict=True)
    )
    (mapped,) = torch.func.vmap(layer, in_dims=dims)(*values)
    torch.testing.assert_close(mapped, batch, rtol=0, atol=1e-14)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(*values)[0], batch, rtol=0, atol=0)


def test_bad_values_are_refused_by_name() -> None:
    leaves = Leaves()
    problem = problem_of(POOLING["alpha_parameter"](leaves))
    values = dict(zip(problem.parameters(), values_of(problem), strict=True))
    values[leaves.a] = -values[leaves.a]
    with pytest.raises(dcx.ParameterError, match=leaves.a.name()):
        layer_of(problem)(*values.values())


def test_pools_without_weight_spoil_no_others() -> None:
    """Any point is a minimum of such a pool, which is called irregular; the others are as alone."""
    leaves = Leaves()
    problem = problem_of(POOLING["multiplied_weights"](leaves))
    layer = layer_of(problem, on_irregular="ignore")
    by_id = dict(zip([p.id for p in problem.parameters()], values_of(problem), strict=True))
    by_id[leaves.w.id] = torch.tensor([[0.0] * N, [1.0, -1e-9, 1.0, 0.0, 2.0, 1.0]])
    by_id[leaves.p.id], by_id[leaves.a.id] = torch.randn(2, N).double(), torch.ones(2).double()
    solution = layer.solve(*[by_id[p.id] for p in problem.parameters()])
    assert bool(solution.solved.all())
    assert solution.derivative.regular.tolist() == [False, True]
    (alone,) = layer(*[by_id[p.id][1] for p in problem.parameters()])
    assert float(solution.variables[0][1]) == pytest.approx(float(alone), abs=1e-14)


def test_nonconvex_patterns_are_refused_on_request() -> None:
    problem = problem_of(POOLING["welsch"](Leaves()))
    with pytest.raises(dcx.SpecificationError, match="nonconvex"):
        layer_of(problem, nonconvex=False)
    ball = Leaves()
    convex = problem_of(cp.sum_squares(ball.v - ball.q), cp.norm(ball.v) <= ball.r)
    assert "projection" in repr(layer_of(convex, nonconvex=False))


def test_empty_batches_are_refused_and_empty_tensors_pooled() -> None:
    problem = problem_of(POOLING["welsch"](Leaves()))
    with pytest.raises(dcx.ParameterError, match="empty"):
        layer_of(problem)(torch.zeros(0, N, dtype=torch.float64))
    assert dcx.RobustPool("welsch", dim=-1, keepdim=False).solve(torch.zeros(0, N)).value.shape == (
        0,
    )
    assert "0 of 0" in repr(dcx.Projection().solve(torch.zeros(0, N)))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_pool_gives_the_same_numbers() -> None:
    pool = dcx.RobustPool("welsch", dim=-1)
    x = torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for function in (pool, torch.compile(pool, backend="eager")):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(leaf).square().sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-15)
