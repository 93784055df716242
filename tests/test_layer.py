"""The layer as a torch module: batches, types, gradients, copies, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from problems import CASES, Case, case_named
from torch import Tensor

from declarative_cvx import (
    SCS,
    BackendError,
    Clarabel,
    DeclarativeLayer,
    Diffcp,
    IrregularWarning,
    SolveError,
    Status,
)
from declarative_cvx.backends import installed

GRADIENT_ACCURACY = 1e-5
REGULAR = [case for case in CASES if case.regular and case.values]
SOME = [
    case_named(name)
    for name in (
        "inequality_qp_with_psd_parameter",
        "best_asset_maximised",
        "ball_projection",
        "nearest_psd_matrix_with_dual",
        "softmax_as_entropy_maximisation",
        "weighted_geometric_mean_under_a_budget",
        "cheapest_rectangle_of_given_area",
    )
]


def tensors(values: Any, **options: Any) -> list[Tensor]:
    return [torch.tensor(np.asarray(value, dtype=float), **options) for value in values]


def new_layer(case: Case, **options: Any) -> DeclarativeLayer:
    return DeclarativeLayer(*case.build(), gp=case.gp, **options)


@lru_cache
def layer_of(case: Case, derivative: str = "implicit") -> DeclarativeLayer:
    return new_layer(case, derivative=derivative, optimal_value=True)


def assert_same(found: Any, expected: Any, accuracy: float = 1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        scale = float(other.detach().abs().max()) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=accuracy * max(1.0, scale))


def weighted_sum(outputs: tuple[Tensor, ...], seed: int = 0) -> Tensor:
    """A scalar in which every entry of every output takes part with its own weight."""
    rng = np.random.default_rng(seed)
    weights = [torch.as_tensor(rng.standard_normal(tuple(out.shape))) for out in outputs]
    return sum((w * out).sum() for w, out in zip(weights, outputs, strict=True))


# Batches


MIXED = [
    case_named(name)
    for name in (
        "inequality_qp_with_psd_parameter",
        "box_projection",
        "group_lasso_with_groups_of_several_sizes",
        "singular_value_threshold",
        "logarithms_over_a_ball",
        "power_cone_of_several_dimensions",
        "monomials",
    )
]


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_any_mixture_of_batched_and_shared_parameters_equals_a_loop(case: Case) -> None:
    layer, size = layer_of(case), 2
    batch, single = case.draw_batch(size), case.values
    for mixture in itertools.product([True, False], repeat=len(single)):
        if not any(mixture):
            continue
        values = tensors(
            b if taken else v for b, v, taken in zip(batch, single, mixture, strict=True)
        )
        together = layer(*values)
        for element in range(size):
            alone = layer(
                *(v[element] if taken else v for v, taken in zip(values, mixture, strict=True))
            )
            assert_same([out[element] for out in together], alone)


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_gradient_of_a_shared_parameter_is_the_sum_over_the_batch(case: Case) -> None:
    layer, size = layer_of(case), 3
    single = case.values
    shared = tensors(single, requires_grad=True)
    copies = tensors([np.stack([value] * size) for value in single], requires_grad=True)
    first = [copies[0], *shared[1:]]
    weighted_sum(layer(*first)).backward()
    from_shared = [tensor.grad for tensor in shared[1:]]
    copies[0].grad = None
    weighted_sum(layer(*copies)).backward()
    summed = [tensor.grad.sum(0) for tensor in copies[1:]]
    assert_same(from_shared, summed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_of_one_has_a_batch_dimension_and_no_batch_has_none(case: Case) -> None:
    layer = layer_of(case)
    alone = layer(*tensors(case.values))
    for out, expected in zip(alone, [*case.expected(), np.zeros(())], strict=True):
        assert tuple(out.shape) == expected.shape
    if case.values:
        batch = layer(*tensors(value[None] for value in case.values))
        assert_same([out[0] for out in batch], alone, accuracy=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_of_random_elements_has_the_known_answers(case: Case) -> None:
    if not case.values:
        pytest.skip("nothing to draw")
    outputs = layer_of(case)(*tensors(case.draw_batch(4)))
    for seed in range(4):
        values = case.draw(seed)
        for out, expected in zip(outputs, case.expected(values), strict=False):
            scale = np.abs(expected).max() or 1.0
            assert_allclose(out[seed].numpy(), expected, rtol=0, atol=1e-6 * scale)
        if case.value is not None:
            assert float(outputs[-1][seed]) == pytest.approx(
                float(case.value(*values)), rel=1e-6, abs=1e-6
            )


@pytest.mark.parametrize("derivative", ["implicit", "diffcp"])
@pytest.mark.parametrize(
    "name", ["inequality_qp_with_psd_parameter", "ball_projection", "simplex_projection"]
)
def test_empty_batch_has_empty_outputs_and_gradients(name: str, derivative: str) -> None:
    case = case_named(name)
    layer = layer_of(case, derivative)
    inputs = [torch.zeros((0, *value.shape), requires_grad=True) for value in case.values]
    outputs = layer(*inputs)
    expected = [(0, *part.shape) for part in case.expected()]
    assert [tuple(out.shape) for out in outputs] == [*expected, (0,)]
    weighted_sum(outputs).backward()
    for tensor in inputs:
        assert tensor.grad.shape == tensor.shape


# Types and layouts


def test_outputs_have_the_common_type_of_the_parameters() -> None:
    case = case_named("box_projection")
    layer = layer_of(case)
    exact = tensors(case.values)
    reference = layer(*exact)
    assert {out.dtype for out in reference} == {torch.float64}
    single = [value.float() for value in exact]
    out32 = layer(*single)
    assert {out.dtype for out in out32} == {torch.float32}
    assert_same([out.double() for out in out32], reference)
    mixed = layer(exact[0], *single[1:])
    assert {out.dtype for out in mixed} == {torch.float64}
    assert_same(mixed, reference)


def test_gradients_have_the_type_of_their_own_parameter() -> None:
    case = case_named("box_projection")
    layer = layer_of(case)
    inputs = tensors(case.values)
    inputs = [inputs[0].float(), *inputs[1:]]
    for tensor in inputs:
        tensor.requires_grad_()
    weighted_sum(layer(*inputs)).backward()
    assert [tensor.grad.dtype for tensor in inputs] == [torch.float32, *[torch.float64] * 2]
    exact = tensors(case.values, requires_grad=True)
    weighted_sum(layer(*exact)).backward()
    assert_same([t.grad.double() for t in inputs], [t.grad for t in exact], accuracy=1e-5)


def test_half_precision_inputs_are_solved_in_double_precision() -> None:
    layer = layer_of(case_named("softmax_as_entropy_maximisation"))
    c = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.25], dtype=torch.bfloat16)
    x, _ = layer(c)
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x.double(), torch.softmax(c.double(), 0), rtol=2**-8, atol=0)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_layout_of_tensors_in_memory_does_not_matter(case: Case) -> None:
    layer = layer_of(case)
    straight = tensors(case.draw_batch(3))
    crooked = []
    for tensor in straight:
        wide = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
        wide[..., 0] = tensor
        crooked.append(wide[..., 0])
        assert not crooked[-1].is_contiguous()
    assert_same(layer(*crooked), layer(*straight), accuracy=1e-12)
    turned = [t.mT.contiguous().mT if t.ndim >= 3 else t for t in straight]
    expanded = [t[:1].expand(3, *t.shape[1:]) for t in turned]
    repeated = [t[:1].repeat(3, *[1] * (t.ndim - 1)) for t in straight]
    assert_same(layer(*expanded), layer(*repeated), accuracy=1e-12)


def test_caller_may_overwrite_inputs_after_the_call() -> None:
    case = case_named("inequality_qp_with_psd_parameter")
    layer = layer_of(case)
    inputs = tensors(case.values, requires_grad=True)
    weighted_sum(layer(*inputs)).backward()
    expected = [tensor.grad.clone() for tensor in inputs]
    again = tensors(case.values, requires_grad=True)
    loss = weighted_sum(layer(*again))
    with torch.no_grad():
        for tensor in again:
            tensor.zero_()
    loss.backward()
    assert_same([tensor.grad for tensor in again], expected, accuracy=1e-12)


# What is differentiated


def test_only_what_requires_gradients_gets_them() -> None:
    case = case_named("box_projection")
    layer = layer_of(case)
    v, low, high = tensors(case.values)
    v.requires_grad_()
    weighted_sum(layer(v, low, high)).backward()
    assert v.grad is not None
    assert low.grad is high.grad is None
    full = tensors(case.values, requires_grad=True)
    weighted_sum(layer(*full)).backward()
    assert_same([v.grad], [full[0].grad], accuracy=1e-12)


def test_no_grad_and_inputs_without_gradient_give_constants() -> None:
    case = case_named("box_projection")
    layer = layer_of(case)
    assert not any(out.requires_grad for out in layer(*tensors(case.values)))
    with torch.no_grad():
        outputs = layer(*tensors(case.values, requires_grad=True))
    assert not any(out.requires_grad for out in outputs)


def test_parameter_that_does_not_reach_the_solution_has_zero_gradient_but_moves_the_value() -> None:
    case = case_named("parameter_that_does_not_reach_the_solution")
    layer = layer_of(case)
    a, v = tensors(case.values, requires_grad=True)
    x, value = layer(a, v)
    (grad,) = torch.autograd.grad(x.sum(), a, allow_unused=True, retain_graph=True)
    assert grad is None or not grad.any()
    (grad,) = torch.autograd.grad(value, a)
    assert_allclose(grad.numpy(), [1.0, 1.0], atol=1e-12)


def _along_directions(case: Case, count: int = 2) -> tuple[Any, Tensor]:
    """The layer as a function of steps along directions that keep the parameters' attributes."""
    base = tensors(case.values)
    directions = []
    for k in range(count):
        ends = tensors(case.draw(2 * k + 1)), tensors(case.draw(2 * k + 2))
        directions.append([one - other for one, other in zip(*ends, strict=True)])

    def moved(steps: Tensor) -> list[Tensor]:
        return [
            value
            + sum(step * direction[i] for step, direction in zip(steps, directions, strict=True))
            for i, value in enumerate(base)
        ]

    return moved, torch.zeros(count, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", REGULAR, ids=str)
def test_gradient_of_solution_duals_and_value_is_that_of_finite_differences(case: Case) -> None:
    layer = layer_of(case)
    moved, steps = _along_directions(case)
    assert torch.autograd.gradcheck(
        lambda t: weighted_sum(layer(*moved(t))),
        steps,
        eps=1e-5,
        atol=GRADIENT_ACCURACY,
        rtol=GRADIENT_ACCURACY,
    )


@pytest.mark.parametrize("case", [c for c in REGULAR if c.value is not None], ids=str)
def test_gradient_of_the_value_is_that_of_the_known_value(case: Case) -> None:
    moved, steps = _along_directions(case)
    value = layer_of(case)(*moved(steps))[-1]
    (found,) = torch.autograd.grad(value, steps)

    def known(k: int, length: float) -> float:
        at = torch.zeros_like(steps)
        at[k] = length
        return float(case.value(*(v.numpy() for v in moved(at))))

    # Fourth-order differences of the closed form.
    h = 1e-3
    expected = [
        (8 * (known(k, h) - known(k, -h)) - (known(k, 2 * h) - known(k, -2 * h))) / (12 * h)
        for k in range(len(steps))
    ]
    scale = max(1.0, np.abs(expected).max())
    assert_allclose(found.numpy(), expected, rtol=0, atol=GRADIENT_ACCURACY * scale)


@pytest.mark.parametrize(
    "case",
    [case for case in REGULAR if "power" not in case.cones],
    ids=str,
)
def test_two_ways_of_differentiating_agree(case: Case) -> None:
    found = []
    for derivative in ("implicit", "diffcp"):
        inputs = tensors(case.values, requires_grad=True)
        weighted_sum(layer_of(case, derivative)(*inputs)[:-1]).backward()
        found.append([t.grad if t.grad is not None else torch.zeros_like(t) for t in inputs])
    assert_same(*found, accuracy=GRADIENT_ACCURACY)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradient_of_a_batch_is_that_of_its_elements(case: Case) -> None:
    layer, size = layer_of(case), 3
    batch = tensors(case.draw_batch(size), requires_grad=True)
    outputs = layer(*batch)
    sum(weighted_sum([out[i] for out in outputs], seed=i) for i in range(size)).backward()
    for i in range(size):
        alone = tensors(case.draw(i), requires_grad=True)
        weighted_sum(layer(*alone), seed=i).backward()
        assert_same([t.grad[i] for t in batch], [t.grad for t in alone])


def test_gradient_of_a_symmetric_parameter_is_symmetric() -> None:
    case = case_named("nearest_psd_matrix_with_dual")
    (C,) = tensors(case.values, requires_grad=True)
    weighted_sum(layer_of(case)(C)).backward()
    assert C.grad.abs().max() > 0.1
    assert_allclose(C.grad.numpy(), C.grad.numpy().T, atol=1e-12)


def test_diffcp_has_no_derivative_for_power_cones_and_says_so() -> None:
    case = case_named("weighted_geometric_mean_under_a_budget")
    with pytest.raises(BackendError, match=r"diffcp.*power cone.*implicit"):
        new_layer(case, derivative=Diffcp())


def test_weakly_active_constraint_is_reported_and_disturbs_nothing_else() -> None:
    case = case_named("weakly_active_inequality")
    v = torch.stack([*tensors(case.values), *tensors(case.values)])
    v[0, 0] = 3.0  # off the kink
    v.requires_grad_()
    (x, _) = layer_of(case)(v)
    assert_allclose(x[1].detach().numpy(), case.expected()[0], atol=1e-6)
    with pytest.warns(IrregularWarning, match=r"1 element.*\(1\)|element 1\b"):
        (grad,) = torch.autograd.grad(x.sum(), v)
    # x_0 = max(v_0 - 1, 0) at its kink: any one-sided derivative, or one between them, will do.
    assert -1e-6 <= float(grad[1, 0]) <= 1 + 1e-6
    assert_allclose(grad.numpy()[1, 1:], [1.0, 1.0], atol=1e-6)
    assert_allclose(grad.numpy()[0], [1.0, 1.0, 1.0], atol=1e-6)


# Reports


def test_solution_is_indexed_by_variables_and_dual_variables() -> None:
    x, hidden = cp.Variable(3, name="x"), cp.Variable(2, name="hidden")
    v = cp.Parameter(3, name="v")
    constraint = cp.sum(x) == 1
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - v) / 2 + cp.sum_squares(hidden - x[:2])), [constraint]
    )
    layer = DeclarativeLayer(problem, [v], [x])
    values = torch.tensor(
        [[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True
    )
    solution = layer.solve(values)
    excess = (values.detach().sum(1, keepdim=True) - 1) / 3
    assert_allclose(solution[x].detach().numpy(), values.detach() - excess, atol=1e-6)
    assert_allclose(solution[hidden].detach(), (values.detach() - excess)[:, :2], atol=1e-6)
    dual = solution[constraint.dual_variables[0]]
    assert_allclose(dual.detach(), excess[:, 0], atol=1e-6)
    (grad,) = torch.autograd.grad(dual[0], values)
    assert_allclose(grad.numpy(), [[1 / 3] * 3, [0.0] * 3], atol=1e-6)
    torch.testing.assert_close(solution.variables[0], solution[x])


def test_report_says_what_happened_to_each_element() -> None:
    case = case_named("simplex_projection")
    solution = layer_of(case).solve(*tensors(case.draw_batch(3)))
    assert solution.status == (Status.OPTIMAL,) * 3
    assert len(solution.backend) == len(solution.iterations) == 3
    assert solution.seconds > 0
    assert solution.residuals.worst.shape == (3,)
    assert float(solution.residuals.worst.max()) <= 1e-6
    assert solution.value.shape == (3,)
    text = repr(solution)
    assert "3 OPTIMAL" in text
    assert solution.backend[0] in text


def test_representation_names_inputs_outputs_and_solver() -> None:
    x, v = cp.Variable(3, name="position"), cp.Parameter(3, name="wish")
    layer = DeclarativeLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [x >= 0]), [v], [x], solver="Clarabel"
    )
    for word in ("position", "wish", "3", "Clarabel"):
        assert word in repr(layer)


# Copies and threads


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "module"])
def test_copies_give_the_same_outputs_and_gradients(case: Case, way: str) -> None:
    layer = new_layer(case, optimal_value=True)
    inputs = tensors(case.draw_batch(2), requires_grad=True)
    expected = layer(*inputs)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        twin = _saved_and_loaded(layer)
    else:
        twin = _saved_and_loaded(torch.nn.ModuleList([layer]))[0]
    found = twin(*inputs)
    assert_same(found, expected, accuracy=1e-12)
    grads = [
        torch.autograd.grad(weighted_sum(out), inputs, allow_unused=True)
        for out in (found, expected)
    ]
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same([one], [other], accuracy=1e-9)


def _saved_and_loaded(module: torch.nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_copy_after_a_warm_started_call_works() -> None:
    case = case_named("simplex_projection")
    layer = new_layer(case, warm_start=True, solver="SCS")
    inputs = tensors(case.draw_batch(2), requires_grad=True)
    expected = layer(*inputs)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(twin(*inputs), expected)


@pytest.mark.parametrize("solver", ["auto", "SCS"])
@pytest.mark.parametrize("case", [SOME[0], *SOME[2:5]], ids=str)
def test_calls_from_several_threads_are_those_from_one(case: Case, solver: str) -> None:
    layer = new_layer(case, solver=solver, optimal_value=True)

    def work(seed: int) -> list[Tensor]:
        inputs = tensors(case.draw(seed % 3), requires_grad=True)
        outputs = layer(*inputs)
        return [*outputs, *torch.autograd.grad(weighted_sum(outputs), inputs)]

    serial = [work(seed) for seed in range(3)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(work, range(8)))
    for seed, found in enumerate(parallel):
        assert_same(found, serial[seed % 3], accuracy=1e-9)


# What a call leaves alone


def test_callers_problem_is_untouched() -> None:
    x, P = cp.Variable(2, name="x"), cp.Parameter((2, 2), PSD=True, name="P")
    q = cp.Parameter(2, name="q")
    constraint = x >= -1
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x), [constraint])
    P.value, q.value = np.eye(2), np.array([4.0, 1.0])
    problem.solve(solver="CLARABEL")
    before = (P.value, q.value, x.value, constraint.dual_value, problem.value, problem.status)
    before = copy.deepcopy(before)
    objective, constraints = problem.objective, list(problem.constraints)
    text = str(problem)
    layer = DeclarativeLayer(problem, [P, q], [x, constraint.dual_variables[0]])
    inputs = tensors([2 * np.eye(2), [1.0, -3.0]], requires_grad=True)
    weighted_sum(layer(*inputs)).backward()
    after = (P.value, q.value, x.value, constraint.dual_value, problem.value, problem.status)
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old, new)
    assert problem.objective is objective
    assert all(a is b for a, b in zip(problem.constraints, constraints, strict=True))
    assert str(problem) == text
    problem.solve(solver="CLARABEL")
    assert_allclose(x.value, before[2], atol=1e-6)


def test_values_that_were_never_set_stay_unset() -> None:
    case = case_named("inequality_qp_with_psd_parameter")
    problem, parameters, variables = case.build()
    DeclarativeLayer(problem, parameters, variables)(*tensors(case.values))
    assert all(leaf.value is None for leaf in [*parameters, *problem.variables()])
    assert all(dual.value is None for con in problem.constraints for dual in con.dual_variables)


def test_two_layers_share_one_problem() -> None:
    case = case_named("simplex_projection")
    built = case.build()
    first, second = DeclarativeLayer(*built, solver="SCS"), DeclarativeLayer(*built, solver="OSQP")
    for _ in range(2):
        assert_same(first(*tensors(case.values)), second(*tensors(case.values)))


def test_tensors_of_the_caller_are_untouched() -> None:
    case = case_named("inequality_qp_with_psd_parameter")
    inputs = tensors(case.draw_batch(2), requires_grad=True)
    before = [tensor.detach().clone() for tensor in inputs]
    outputs = layer_of(case)(*inputs)
    weighted_sum(outputs).backward()
    for old, new in zip(before, inputs, strict=True):
        assert torch.equal(old, new.detach())


def test_nothing_of_a_call_stays_on_the_layer() -> None:
    case = case_named("inequality_qp_with_psd_parameter")
    layer = new_layer(case)
    before = dict(layer.__dict__)
    outputs = layer(*tensors(case.draw_batch(2), requires_grad=True))
    weighted_sum(outputs).backward()
    layer.solve(*tensors(case.values), solver_args={"tol": 1e-7})
    assert layer.__dict__.keys() == before.keys()
    assert all(layer.__dict__[key] is before[key] for key in before)


def test_warm_start_keeps_no_graph_and_gives_the_same_answers() -> None:
    case = case_named("simplex_projection")
    layer = new_layer(case, warm_start=True, solver="SCS")
    inputs = tensors(case.draw_batch(3), requires_grad=True)
    first = layer.solve(*inputs)
    again = layer.solve(*inputs)
    assert_same(again.variables, first.variables)
    assert sum(again.iterations) < sum(first.iterations)
    kept = list(vars(layer.__dict__["_previous"]).values())
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in kept)
    grads = [torch.autograd.grad(weighted_sum(s.variables), inputs) for s in (first, again)]
    assert_same(*grads)
    other_size = tensors(case.draw_batch(5))
    assert_same(layer(*other_size), new_layer(case, solver="SCS")(*other_size))


def test_warm_start_goes_on_after_an_element_failed() -> None:
    x, a, b = cp.Variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x)), [x >= a, x <= b])
    layer = DeclarativeLayer(problem, [a, b], [x], solver="SCS", warm_start=True, on_failure="nan")
    a_values = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    solution = layer.solve(a_values, torch.tensor(1.5, dtype=torch.float64))
    assert solution.status == (Status.OPTIMAL, Status.INFEASIBLE, Status.OPTIMAL)
    solution = layer.solve(a_values, torch.tensor(3.0, dtype=torch.float64))
    assert_allclose(solution.variables[0].numpy(), [1.0, 2.0, 0.0], atol=1e-6)


# Options


def test_solver_options_of_constructor_and_call_take_effect() -> None:
    case = case_named("softmax_as_entropy_maximisation")
    values = tensors(case.values)
    free = new_layer(case, solver="Clarabel")
    (steps,) = free.solve(*values).iterations
    assert steps > 3
    limited = new_layer(case, solver="Clarabel", solver_args={"max_iters": 3}, on_failure="nan")
    assert limited.solve(*values).iterations == (3,)
    assert free.solve(*values, solver_args={"max_iters": 3}).iterations == (3,)
    assert free.solve(*values).iterations == (steps,)
    assert limited.solve(*values, solver_args={"max_iters": 100}).iterations == (steps,)


def test_options_of_a_call_change_a_given_solver_object_for_that_call_only() -> None:
    case = case_named("softmax_as_entropy_maximisation")
    values = tensors(case.values)
    backend = Clarabel(max_iters=3, settings={"equilibrate_enable": False})
    layer = new_layer(case, solver=backend, on_failure="nan")
    assert layer.solve(*values).iterations == (3,)
    assert layer.solve(*values, solver_args={"max_iters": 2}).iterations == (2,)
    assert layer.solve(*values).iterations == (3,)
    assert backend == Clarabel(max_iters=3, settings={"equilibrate_enable": False})


def test_options_of_a_solver_by_its_own_names_are_checked_in_calls_too() -> None:
    case = case_named("softmax_as_entropy_maximisation")
    layer = new_layer(case, solver=SCS())
    with pytest.raises(BackendError, match="Did you mean 'eps_abs'"):
        layer(*tensors(case.values), solver_args={"eps_absolute": 1e-3})


def test_failure_raises_or_gives_nan_as_asked() -> None:
    x, a = cp.Variable(), cp.Parameter(name="a")
    problem = cp.Problem(cp.Minimize(cp.square(x)), [x >= a, x <= 1])
    with pytest.raises(SolveError, match="element 0: INFEASIBLE"):
        DeclarativeLayer(problem, [a], [x])(torch.tensor(2.0))
    layer = DeclarativeLayer(problem, [a], [x], on_failure="nan", optimal_value=True)
    outputs = layer(torch.tensor(2.0))
    assert all(torch.isnan(out) for out in outputs)
    assert layer.solve(torch.tensor(2.0)).status == (Status.INFEASIBLE,)
    assert float(layer(torch.tensor(0.5))[0]) == pytest.approx(0.5, abs=1e-6)


def test_geometric_program_goes_through_torch_modules() -> None:
    case = case_named("cheapest_rectangle_of_given_area")
    network = torch.nn.Linear(2, 3).double()
    layer = new_layer(case)
    features = torch.tensor([[0.5, -1.0], [1.0, 2.0]], dtype=torch.float64)
    sizes = network(features).exp()
    loss = sum(out.sum() for out in layer(*sizes.unbind(1)))
    loss.backward(retain_graph=True)
    a, p, q = sizes.unbind(1)
    expected = ((a * q / p).sqrt() + (a * p / q).sqrt()).sum()
    reference = torch.autograd.grad(expected, network.weight)
    assert_same([network.weight.grad], reference)


@pytest.mark.parametrize(
    "solver", [name for name, cls in installed().items() if cls.capabilities.warm_start]
)
def test_warm_start_is_per_element(solver: str) -> None:
    """An element that had no solution last time starts cold; the others start warm."""
    x, p, total = cp.Variable(4), cp.Parameter(4), cp.Parameter()
    constraints = [x >= -1, x <= 1, cp.sum(x) == total]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), constraints)
    build = (problem, [p, total], [x])
    points = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4)
    feasible = torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64)
    warm = DeclarativeLayer(*build, solver=solver, warm_start=True, on_failure="nan")
    cold = DeclarativeLayer(*build, solver=solver)
    first = warm.solve(points, torch.tensor([0.5, 100.0, 0.1], dtype=torch.float64))
    assert [status.solved for status in first.status] == [True, False, True]
    second, reference = warm.solve(points, feasible), cold.solve(points, feasible)
    torch.testing.assert_close(second.variables[0], reference.variables[0], rtol=1e-9, atol=1e-9)
    assert all(second.iterations[i] <= reference.iterations[i] for i in (0, 2))
    # One iteration for each element is as few as there can be.
    fewest = len(points)
    assert sum(second.iterations) < max(sum(reference.iterations), fewest + 1)


def test_nothing_is_kept_for_a_backward_pass_that_will_not_come() -> None:
    """Of a call without gradients only the data and the answer stay, not factors of matrices."""
    x, b = cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b) + cp.norm1(x)), [cp.sum(x) <= 1])
    layer = DeclarativeLayer(problem, [b], [x])
    value = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = layer.solve(value)
    tracked = layer.solve(value.clone().requires_grad_())
    kept = [
        [name for name in solution._assess.__self__.program.__dict__ if name.startswith("_")]
        for solution in (plain, tracked)
    ]
    assert kept[0] == []
    assert kept[1] == ["_scaled"]
    assert plain.derivative.regular.tolist() == tracked.derivative.regular.tolist()
    tracked.variables[0].sum().backward()
    assert "_scaled" not in tracked._assess.__self__.program.__dict__
