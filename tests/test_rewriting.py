"""Convex problems that are not DPP, solved as if they were: same solutions, right gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpy.atoms.affine.wraps import psd_wrap
from torch import Tensor

import declarative_cvx as dcx
from declarative_cvx.computed_route import ComputedRoute
from declarative_cvx.rewriting import SquareRoot, rewrite

N = 3


class Leaves:
    """Variables and parameters that the problems below are made of."""

    def __init__(self) -> None:
        self.x = cp.Variable(N, name="x")
        self.X = cp.Variable((2, 2), name="X")
        self.p, self.q = (cp.Parameter(name=name, nonneg=True) for name in "pq")
        self.r, self.s = (cp.Parameter(name=name) for name in "rs")
        self.d = cp.Parameter(name="d", pos=True)
        self.a, self.b = (cp.Parameter(N, name=name) for name in "ab")
        self.w = cp.Parameter(N, name="w", nonneg=True)
        self.A, self.B = cp.Parameter((4, N), name="A"), cp.Parameter((N, N), name="B")
        self.C, self.D = (cp.Parameter((2, 2), name=name) for name in "CD")
        self.P = cp.Parameter((N, N), name="P", PSD=True)
        self.half = cp.sum_squares(self.x) / 2


def smallest(objective: cp.Expression, *constraints: cp.Constraint) -> cp.Problem:
    return cp.Problem(cp.Minimize(objective), list(constraints))


def largest(objective: cp.Expression, *constraints: cp.Constraint) -> cp.Problem:
    return cp.Problem(cp.Maximize(objective), list(constraints))


def with_bounds(v: Leaves) -> cp.Problem:
    y = cp.Variable(N, name="y", bounds=[v.r * v.a, cp.exp(v.b) + 4])
    return smallest(cp.sum_squares(y - v.w) + v.p * v.q * cp.sum(y))


PROBLEMS: dict[str, Callable[[Leaves], cp.Problem]] = {
    "product_of_parameters": lambda v: smallest(v.half + (v.p * v.q) * cp.sum(v.x) + v.a @ v.x),
    "factors_one_by_one": lambda v: smallest(v.half + v.p * (v.r * (v.a @ v.x))),
    "weighted_squares": lambda v: smallest(
        v.half + v.p * cp.sum_squares(v.A @ v.x - 1) + v.r**2 * cp.norm1(v.x)
    ),
    "weighted_norm": lambda v: smallest(
        v.half + v.p * (v.q * cp.norm(v.x - v.a) + cp.norm1(v.x - v.b) + v.r)
    ),
    "matrices": lambda v: smallest(v.half + cp.norm(v.A @ (v.B @ v.x - v.b), 1)),
    "risk_limit": lambda v: largest(v.a @ v.x, cp.quad_form(v.x - v.b, v.P) <= v.d * v.d),
    "shifted_quadratic_forms": lambda v: smallest(
        cp.quad_form(v.x - v.a, v.P) + v.half + v.p * cp.quad_form(v.x - v.b, v.P)
    ),
    "negative_definite": lambda v: largest(
        cp.quad_form(v.x, -v.P) + v.a @ v.x, cp.quad_form(v.x - v.b, -v.P) >= -v.d * v.d
    ),
    "asserted_definiteness": lambda v: smallest(
        v.half - v.a @ v.x, cp.quad_form(v.x - v.b, psd_wrap(v.B @ v.B.T)) <= v.d
    ),
    "quotient": lambda v: smallest(v.half + cp.norm1(v.x / v.d - v.a)),
    "squares_over_a_parameter": lambda v: smallest(
        cp.sum(cp.quad_over_lin(v.X - v.C, v.d, axis=0)) + cp.sum_squares(v.X - v.D)
    ),
    "functions_of_parameters": lambda v: smallest(
        cp.exp(v.r) * cp.sum_squares(v.x - v.a) + cp.norm(v.b) * cp.norm1(v.x),
        v.x >= cp.minimum(v.a, v.b) - cp.maximum(v.s, 1),
    ),
    "convolution": lambda v: smallest(
        v.half + cp.sum_squares(cp.convolve(v.a, cp.multiply(v.b, v.x)) - v.r)
    ),
    "kronecker_product": lambda v: smallest(
        cp.sum_squares(cp.kron(v.X - v.D, v.C) - 1) + cp.sum_squares(cp.kron(v.C, v.X))
        + cp.sum_squares(v.X)
    ),
    "huber_of_computed_scale": lambda v: smallest(
        v.half + v.p * cp.sum(dcx.pseudo_huber(v.x - v.a, v.d * v.d))
    ),
    "weighted_huber": lambda v: smallest(
        v.half + cp.sum(cp.multiply(v.w, cp.huber(v.x / v.d - v.a, v.d)))
    ),
    "bounds": with_bounds,
    "second_order_cone": lambda v: smallest(
        v.a @ v.x + v.half, cp.SOC(v.d * v.d, v.x - v.r * v.b)
    ),
    "semidefinite": lambda v: smallest(
        v.r * cp.trace(v.C @ v.X) + cp.sum_squares(v.X), v.X + v.X.T >> v.r * (v.D + v.D.T)
    ),
    "exponential_cone": lambda v: smallest(v.half + v.p * cp.log_sum_exp(v.x - v.r * v.a)),
    "nested_maximum": lambda v: smallest(
        v.half + v.p * cp.maximum(v.q * cp.norm(v.x - v.a), v.a @ v.x + v.r, 1)
    ),
    "concave_with_weight": lambda v: largest(
        v.p * cp.sum(cp.sqrt(v.x + 6 + v.r * v.d)) - v.q * cp.sum_squares(v.x), v.x >= -1
    ),
    "equality": lambda v: smallest(
        v.half + cp.norm1(v.x), (v.p * v.B + 3 * np.eye(N)) @ v.x == v.r * v.a
    ),
    "sorted_product": lambda v: smallest(
        v.p * cp.dotsort(v.x - v.a, v.w) + cp.sum_squares(v.x - v.b)
    ),
    "parameters_only": lambda v: smallest(v.half, v.p * v.q >= -1, v.x >= v.r * v.a),
}  # fmt: skip

# Which CVXPY takes to be DPP, but cannot canonicalise.
OVERLOOKED: dict[str, Callable[[Leaves], cp.Problem]] = {
    "huber": lambda v: smallest(v.half + cp.sum(cp.huber(v.x - v.a, v.p * v.q + 0.1))),
    "form_in_a_function": lambda v: smallest(cp.exp(cp.quad_form(v.x, v.P) / 9) + v.a @ v.x),
    "form_in_a_maximum": lambda v: smallest(
        cp.maximum(cp.quad_form(v.x, v.P), v.d) + v.half + v.a @ v.x
    ),
}


def parameters_of(problem: cp.Problem) -> list[cp.Parameter]:
    bounds = [end for variable in problem.variables() for end in variable.bounds or ()]
    trees = [problem, *(end for end in bounds if isinstance(end, cp.Expression))]
    return list({p.id: p for tree in trees for p in tree.parameters()}.values())


def values_of(parameters: Sequence[cp.Parameter], batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = []
    for parameter in parameters:
        value = torch.randn(batch, *parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.attributes["PSD"]:
            value = value @ value.mT + 0.3 * torch.eye(N, dtype=torch.float64)
        values.append(value.abs() + 0.3 if parameter.is_nonneg() else value)
    return values


def layer_of(problem: cp.Problem, **options: object) -> dcx.DeclarativeLayer:
    return dcx.DeclarativeLayer(problem, parameters_of(problem), problem.variables(), **options)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ALL = {**PROBLEMS, **OVERLOOKED}


@pytest.mark.parametrize("name", PROBLEMS)
def test_they_break_the_rules_and_are_solved_as_cone_programs(name: str) -> None:
    problem = PROBLEMS[name](Leaves())
    assert not problem.is_dpp()
    layer = layer_of(problem)
    assert layer.spec.verdict is dcx.Verdict.CONVEX
    assert isinstance(layer._route, ComputedRoute)
    assert "computed beforehand" in str(layer.spec) or "auxiliary" in str(layer.spec)


@pytest.mark.parametrize("name", ALL)
def test_solution_and_value(name: str) -> None:
    """Against CVXPY, which puts in the numbers of one element."""
    problem = ALL[name](Leaves())
    parameters, variables = parameters_of(problem), problem.variables()
    values = values_of(parameters)
    solution = layer_of(problem).solve(*values)
    assert bool(solution.solved.all())
    for element in range(2):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.value = value[element].numpy()
        numeric = at_values(problem)
        numeric.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
        by_name = {variable.name(): variable.value for variable in numeric.variables()}
        for variable, found in zip(variables, solution.variables, strict=True):
            expected = torch.as_tensor(by_name[variable.name()])
            torch.testing.assert_close(found[element], expected, rtol=0, atol=3e-6)
        assert float(solution.value[element]) == pytest.approx(numeric.value, abs=1e-7, rel=1e-7)


def at_values(problem: cp.Problem) -> cp.Problem:
    """The problem with numbers: also where CVXPY's own substitution does not reach."""
    leaves = {p.id: cp.Constant(p.value) for p in parameters_of(problem)}

    def substituted(node: cp.Expression) -> cp.Expression:
        if isinstance(node, cp.Parameter):
            return leaves[node.id]
        if isinstance(node, cp.Variable):
            return twins[node.id]
        new = node.copy([substituted(argument) for argument in node.args])
        if isinstance(new, cp.huber):
            new.M = substituted(new.M)
        return new

    twins = {}
    for v in problem.variables():
        ends = [substituted(e).value if isinstance(e, cp.Expression) else e for e in v.bounds or ()]
        twins[v.id] = cp.Variable(v.shape, v.name(), bounds=ends or None)
    constraints = [type(c)(*map(substituted, c.args)) for c in problem.constraints if c.variables()]
    return cp.Problem(type(problem.objective)(substituted(problem.objective.expr)), constraints)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str) -> None:
    """Against central differences, solution and value."""
    problem = ALL[name](Leaves())
    inputs = [v.requires_grad_() for v in values_of(parameters_of(problem), batch=1)]
    layer = layer_of(problem, optimal_value=True)
    assert torch.autograd.gradcheck(layer, inputs, atol=1e-5, rtol=1e-4)


# --- the same problem, rewritten by hand ---------------------------------------------------------

Layers = tuple[dcx.DeclarativeLayer, dcx.DeclarativeLayer, Callable[..., Sequence[Tensor]]]


def weights() -> Layers:
    v, y, z = Leaves(), cp.Variable(N), cp.Variable(N)
    weight, shift = cp.Parameter(nonneg=True), cp.Parameter(N)
    direct = smallest(weight * cp.norm(z) + cp.sum_squares(y) / 2, z == y - shift)
    return (
        layer_of(smallest(v.p**2 * cp.norm(v.x - v.a / v.d) + v.half)),
        dcx.DeclarativeLayer(direct, [weight, shift], [y]),
        lambda p, a, d: (p**2, a / d[:, None]),
    )


def matrices() -> Layers:
    v, y, matrix, shift = Leaves(), cp.Variable(N), cp.Parameter((N, N)), cp.Parameter(N)
    direct = smallest(cp.norm1(shift - matrix @ y) + cp.sum_squares(y) / 2)
    return (
        layer_of(smallest(cp.norm1(v.B @ (cp.exp(v.a) - v.d * v.x)) + v.half)),
        dcx.DeclarativeLayer(direct, [matrix, shift], [y]),
        lambda B, a, d: (d[:, None, None] * B, (B @ a.exp()[:, :, None])[:, :, 0]),
    )


def limit() -> Layers:
    v, y, root = Leaves(), cp.Variable(N), cp.Parameter((N, N))
    a, d = cp.Parameter(N), cp.Parameter(nonneg=True)
    direct = largest(a @ y - cp.sum_squares(y) / 2, cp.norm(root @ y) <= d)
    return (
        layer_of(largest(v.a @ v.x - v.half, cp.quad_form(v.x, v.P) <= v.d**2)),
        dcx.DeclarativeLayer(direct, [a, root, d], [y]),
        lambda a, P, d: (a, torch.linalg.cholesky((P + P.mT) / 2).mT, d),
    )


@pytest.mark.parametrize("layers", [weights, matrices, limit])
def test_the_same_as_rewriting_by_hand(layers: Callable[[], Layers]) -> None:
    layer, direct, computed = layers()
    names = [spec.name for spec in layer._parameters_spec]
    by_name = {p.name(): p for p in vars(Leaves()).values() if isinstance(p, cp.Parameter)}
    inputs = [v.requires_grad_() for v in values_of([by_name[name] for name in names], batch=3)]
    found, expected = layer(*inputs)[0], direct(*computed(*inputs))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(3, N, generator=torch.Generator().manual_seed(2)).double()
    mine = torch.autograd.grad(found, inputs, upstream, create_graph=True)
    theirs = torch.autograd.grad(expected, inputs, upstream, create_graph=True)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-8)
    second = [
        torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        for grads in (mine, theirs)
    ]
    for one, two in zip(*second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


# --- derivatives in closed form ------------------------------------------------------------------


def test_at_a_kink() -> None:
    """norm(x - p q) holds x at p q as long as the other term pulls less than 1."""
    x, p, q = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    layer = dcx.DeclarativeLayer(smallest(cp.norm(x - q * p) + cp.sum_squares(x)), [p, q], [x])
    p_value = numbers(0.3, -0.4, 3.0, 4.0).reshape(2, 2).requires_grad_()
    q_value = numbers(0.8, 1.0).requires_grad_()
    solution = layer.solve(p_value, q_value)
    assert bool(solution.solved.all())
    (found,) = solution.variables
    # Beyond that, x = p q / (2 norm(p q)): half a unit towards the target.
    expected = torch.stack([0.8 * p_value[0], p_value[1] / (2 * p_value[1].norm())])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    upstream = numbers(1.0, 2.0, -1.0, 0.5).reshape(2, 2)
    inputs = [p_value, q_value]
    mine = torch.autograd.grad(found, inputs, upstream)
    by_p = torch.autograd.grad(expected, p_value, upstream)[0]
    torch.testing.assert_close(mine[0], by_p, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        mine[1],
        torch.stack([upstream[0] @ p_value[0], numbers(0.0)[0]]).detach(),
        rtol=0,
        atol=1e-9,
    )


def test_a_singular_quadratic_form_in_a_constraint() -> None:
    """Least 1/2 |x - c|^2 with x'Px <= 1 and P = diag(4, 0), by the implicit function theorem.

    From x - c + 2 l P x = 0 and x'Px = 1: x = (1/2, c_2) with l = (c_1 - 1/2) / 4. An entry P_22
    changes x_2 by -2 l x_2 and x_1 by -x_2^2 / (8 x_1); P_11 changes x_1 by -x_1^2 / (8 x_1).
    P_12 and P_21 change both: x_1 by -x_1 x_2 / (8 x_1) each, x_2 by -l x_1 each.
    """
    x, P, c = cp.Variable(2), cp.Parameter((2, 2), PSD=True), cp.Parameter(2)
    problem = smallest(cp.sum_squares(x - c) / 2, cp.quad_form(x, P) <= 1)
    layer = dcx.DeclarativeLayer(problem, [P, c], [x])
    P_value = torch.diag(numbers(4.0, 0.0)).requires_grad_()
    found = layer(P_value, numbers(2.5, 3.0))[0]
    torch.testing.assert_close(found, numbers(0.5, 3.0), rtol=0, atol=1e-10)
    multiplier = 0.5
    first, second = (torch.autograd.grad(found[i], P_value, retain_graph=True)[0] for i in (0, 1))
    expected = -torch.tensor([[0.25, 1.5], [1.5, 9.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-7)
    expected = -multiplier * torch.tensor([[0.0, 0.5], [0.5, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-7)


def test_the_square_root_of_a_matrix() -> None:
    from declarative_cvx.nonconvex.translation.expression import translate_expression

    P = cp.Parameter((N, N), PSD=True)
    function = translate_expression(SquareRoot(P))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(N, N, dtype=torch.float64, generator=generator)
    for matrix in (base @ base.T, torch.eye(N).double(), base[:, :1] @ base[:, :1].T):
        root = function({P.id: matrix})
        torch.testing.assert_close(root @ root, matrix, rtol=0, atol=1e-11)
        P.value = matrix.numpy()
        torch.testing.assert_close(root, torch.as_tensor(SquareRoot(P).value), rtol=0, atol=1e-9)

    def of_root(root: Tensor) -> Tensor:
        return function({P.id: root @ root.mT})

    # Repeated eigenvalues are no obstacle.
    for root in (base, torch.diag(numbers(1.0, 1.0, 2.0))):
        inputs = [root.clone().requires_grad_()]
        assert torch.autograd.gradcheck(of_root, inputs)
        assert torch.autograd.gradgradcheck(of_root, inputs)
        forward, backward = torch.func.jacfwd(of_root)(root), torch.func.jacrev(of_root)(root)
        torch.testing.assert_close(forward, backward)


# --- transforms, types, copies -------------------------------------------------------------------


def test_derivatives_twice_and_in_forward_mode() -> None:
    v = Leaves()
    problem = smallest(
        v.half + v.p * cp.sum_squares(v.A @ v.x - v.r * v.s) + cp.exp(v.r) * cp.sum(v.x)
    )
    layer = layer_of(problem)
    inputs = [value.requires_grad_() for value in values_of(parameters_of(problem), batch=1)]
    assert torch.autograd.gradgradcheck(layer, inputs, atol=1e-4, rtol=1e-4)
    values = [value.detach()[0] for value in inputs]
    forward = torch.func.jacfwd(lambda *v: layer(*v)[0], argnums=(0, 1, 2))(*values)
    backward = torch.func.jacrev(lambda *v: layer(*v)[0], argnums=(0, 1, 2))(*values)
    for one, two in zip(forward, backward, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["risk_limit", "weighted_norm", "bounds"])
def test_batches_single_elements_vmap_and_copies(name: str) -> None:
    problem = PROBLEMS[name](Leaves())
    layer, values = layer_of(problem), values_of(parameters_of(problem), batch=3)
    (batch,) = layer(*values)
    (single,) = layer(*[value[1] for value in values])
    assert single.shape == problem.variables()[0].shape
    torch.testing.assert_close(single, batch[1], rtol=0, atol=1e-9)
    # The last parameter shared by all elements.
    (shared,) = layer(*values[:-1], values[-1][1])
    torch.testing.assert_close(shared[1], batch[1], rtol=0, atol=1e-9)
    (mapped,) = torch.func.vmap(layer)(*values)
    torch.testing.assert_close(mapped, batch, rtol=0, atol=1e-9)
    (half,) = layer(*[value.float() for value in values])
    assert half.dtype == torch.float32
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(*values)[0], batch, rtol=0, atol=0)


def test_the_problem_is_left_as_it_is() -> None:
    v = Leaves()
    problem = with_bounds(v)
    before = str(problem), [p.id for p in parameters_of(problem)], problem.variables()[0].bounds
    layer_of(problem)(*values_of(parameters_of(problem)))
    variable = problem.variables()[0]
    assert (str(problem), [p.id for p in parameters_of(problem)], variable.bounds) == before
    assert variable.value is None
    assert all(parameter.value is None for parameter in parameters_of(problem))


def test_dual_variables_are_those_of_the_constraints() -> None:
    v = Leaves()
    above, sphere = v.x >= v.r * v.a, cp.norm(v.x - v.b / v.d) <= v.d**2
    problem = smallest(v.a @ v.x, above, sphere)
    duals = [above.dual_variables[0], sphere.dual_variables[0]]
    layer = dcx.DeclarativeLayer(problem, problem.parameters(), [v.x, *duals])
    values = {
        "r": numbers(-1.0),
        "a": numbers(1.0, -0.5, 0.5)[None],
        "b": torch.zeros(1, N, dtype=torch.float64),
        "d": numbers(1.2),
    }
    _, lower, radius = layer(*[values[p.name()] for p in problem.parameters()])
    for parameter in problem.parameters():
        parameter.value = values[parameter.name()][0].numpy()
    problem.solve(solver=cp.CLARABEL, ignore_dpp=True, tol_gap_rel=1e-11, tol_feas=1e-11)
    torch.testing.assert_close(lower[0], torch.as_tensor(duals[0].value), rtol=0, atol=1e-6)
    assert float(radius[0]) == pytest.approx(float(duals[1].value), abs=1e-6)
    assert float(radius[0]) > 0.1


# --- what is refused, and what is left alone -----------------------------------------------------


def test_values_that_make_no_sense_are_refused_by_name() -> None:
    v = Leaves()
    layer = layer_of(smallest(v.half + cp.norm1(v.x / v.r - 1)))
    with pytest.raises(dcx.ParameterError, match=r"`1.0 / r` .*\[1\] is inf"):
        layer(numbers(1.0, 0.0))
    layer = layer_of(smallest(v.half + cp.sqrt(v.s) * cp.norm1(v.x)))
    with pytest.raises(dcx.ParameterError, match=r"\[0\] is nan"):
        layer(numbers(-1.0, 1.0))
    layer = layer_of(smallest(v.half, cp.quad_form(v.x, psd_wrap(v.B / v.r)) <= 1))
    with pytest.raises(dcx.ParameterError, match=r"is nan|is inf"):
        layer(torch.eye(N).double(), numbers(0.0, 1.0))
    with pytest.raises(dcx.ParameterError, match="declared by nonneg=True"):
        layer_of(smallest(v.half + v.p * v.q * cp.norm1(v.x)))(numbers(-1.0), numbers(1.0))


@pytest.mark.parametrize("limit", [True, False])
def test_asserted_definiteness_is_checked(limit: bool) -> None:
    """Also where CVXPY's rules are content: the answer would be a maximum."""
    v, S = Leaves(), cp.Parameter((N, N), symmetric=True, name="S")
    form = cp.quad_form(v.x, S, assume_PSD=True)
    problem = smallest(v.half, form <= 1) if limit else smallest(form - v.a @ v.x)
    layer = layer_of(problem)
    values = {"S": torch.stack([torch.eye(N), torch.diag(torch.tensor([1.0, -1.0, 1.0]))]).double(),
              "a": torch.ones(N).double()}  # fmt: skip
    given = [values[p.name()] for p in problem.parameters()]
    with pytest.raises(dcx.ParameterError, match=r"batch element 1.* eigenvalue -1"):
        layer(*given)
    good = [value[0] if value.ndim == 3 else value for value in given]
    assert bool(layer.solve(*good).solved.all())


def test_elements_without_a_solution_have_a_status() -> None:
    v = Leaves()
    problem = smallest(v.half, v.x >= v.p * v.q, v.x <= v.r, v.r * v.s <= 7)
    layer = dcx.DeclarativeLayer(problem, [v.p, v.q, v.r, v.s], [v.x], on_failure="nan")
    p, q, r = (numbers(1.0, 2.0, 1.0).requires_grad_(), numbers(1.0, 2.0, 1.0), numbers(3.0, 3, 4))
    solution = layer.solve(p, q, r, numbers(1.0, 1.0, 2.0))
    assert [s.name for s in solution.status] == ["OPTIMAL", "INFEASIBLE", "INFEASIBLE"]
    solution.variables[0][0].sum().backward()
    torch.testing.assert_close(p.grad, numbers(3.0, 0.0, 0.0))


def test_what_needs_no_rewriting_has_none() -> None:
    v = Leaves()
    for problem in (
        smallest(cp.sum_squares(v.A @ v.x - 1) + v.p * cp.norm1(v.x), v.x >= v.a),
        smallest(cp.quad_form(v.x, v.P) + v.a @ v.x, cp.norm(v.x - v.b) <= v.d),
        smallest(v.half, v.p * cp.norm(v.x) <= v.q + 1, cp.SOC(v.d, v.B @ v.x)),
    ):
        assert rewrite(problem) is None
        assert layer_of(problem).spec.rewriting is None


def test_geometric_programs_are_left_alone() -> None:
    x, p, q = cp.Variable(pos=True), cp.Parameter(pos=True), cp.Parameter(pos=True)
    problem = smallest(x + p * q / x)
    layer = dcx.DeclarativeLayer(problem, [p, q], [x], gp=True)
    assert layer.spec.verdict is dcx.Verdict.DGP
    assert layer.spec.rewriting is None
    torch.testing.assert_close(layer(numbers(2.0), numbers(8.0))[0], numbers(4.0))


def test_the_words_of_the_verdict() -> None:
    v = Leaves()
    words = str(dcx.classify(smallest(v.half, cp.sum(v.x) >= v.r * v.s)))
    assert words.startswith("convex, but not disciplined parametrized (DPP): constraint 0")
    assert words.endswith("; computed beforehand: `r * s`")
    with pytest.raises(dcx.SpecificationError, match="not disciplined parametrized"):
        layer_of(smallest(v.half, cp.sum(v.x) >= v.r * v.s), nonconvex=False)


@pytest.mark.parametrize("product", [False, True])
def test_perspectives(product: bool) -> None:
    """The least u^2 / t + t with u = r is 2 abs(r), at t = abs(r)."""
    u, t, r, s = cp.Variable(), cp.Variable(nonneg=True), cp.Parameter(), cp.Parameter()
    objective = cp.perspective(cp.square(u), t) + t
    problem = smallest(objective, u == (r * s if product else r + s))
    layer = dcx.DeclarativeLayer(problem, [r, s], [t], optimal_value=True)
    values = numbers(2.0, -3.0).requires_grad_(), numbers(0.5)[0]
    found, value = layer(*values)
    given = (values[0] * values[1] if product else values[0] + values[1]).abs()
    torch.testing.assert_close(found, given, rtol=0, atol=1e-9)
    torch.testing.assert_close(value, 2 * given, rtol=0, atol=1e-9)
    slopes = [torch.autograd.grad(v.sum(), values[0], retain_graph=True)[0] for v in (found, given)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-8)


def test_products_of_low_rank_stay_apart() -> None:
    """The product of a column and a row with many entries would have their product as a count."""
    x, u, w = cp.Variable(30), cp.Parameter((30, 1)), cp.Parameter((1, 30))
    found = rewrite(smallest(cp.sum_squares(x) + cp.norm1(u @ (w @ x) - 1)))
    assert found is not None
    assert not found.computed
    assert sum(variable.size for variable in found.problem.variables()) == 31
