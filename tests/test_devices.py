"""Nothing depends on torch's default device or default type; every device gives the same.

A tensor that is made without naming its device lands on the default one. With the default device
"meta", on which there are no numbers, any such tensor makes arithmetic fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from problems import CASES, Case, case_named
from torch import Tensor

from declarative_cvx import DeclarativeLayer, IrregularWarning

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
KINDS = [
    case_named(name)
    for name in (
        "quadratic_form_of_psd_parameter",
        "inequality_qp_with_psd_parameter",
        "least_squares",
        "parameters_with_attributes",
        "group_lasso_with_groups_of_several_sizes",
        "nearest_psd_matrix_with_dual",
        "symmetric_diagonal_and_sparse_variables",
        "softmax_as_entropy_maximisation",
        "weighted_geometric_mean_under_a_budget",
        "geometric_mean_of_a_psd_diagonal",
        "logarithms_over_a_ball",
        "cheapest_rectangle_of_given_area",
        "parameter_that_does_not_reach_the_solution",
    )
]
assert {kind for case in KINDS for kind in case.cones} == {k for c in CASES for k in c.cones}


@contextmanager
def defaults(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Other defaults for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def tensors(values: Any, device: str = "cpu") -> list[Tensor]:
    return [torch.tensor(np.asarray(v), dtype=torch.float64, device=device) for v in values]


def new_layer(case: Case, **options: Any) -> DeclarativeLayer:
    return DeclarativeLayer(*case.build(), gp=case.gp, optimal_value=True, **options)


def work(layer: DeclarativeLayer, values: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients, second derivatives, and the report."""
    inputs = [v.clone().requires_grad_() for v in values]
    solution = layer.solve(*inputs)
    outputs = solution.variables
    loss = sum((out**2).sum() for out in outputs)
    once = torch.autograd.grad(loss, inputs, create_graph=True)
    twice = torch.autograd.grad(sum((g**2).sum() for g in once), inputs)
    report = solution.derivative
    return [*(v.detach() for v in (*outputs, *once, *twice)), report.regular, report.residual]


def assert_same(found: list[Tensor], expected: list[Tensor], accuracy: float = 0.0) -> None:
    """All but the residuals, which are compared with a bound."""
    assert float(found[-1].max()) <= 1e-9
    assert found[-2].tolist() == expected[-2].tolist()
    for one, other in zip(found[:-2], expected[:-2], strict=True):
        assert one.dtype == other.dtype
        scale = max(1.0, float(other.abs().max()))
        assert_allclose(one.cpu().numpy(), other.numpy(), rtol=0, atol=accuracy * scale)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_default_device_does_not_matter_to_calls(case: Case) -> None:
    values = tensors(case.draw_batch(2))
    expected = work(new_layer(case), values)
    layer = new_layer(case)
    with defaults(device="meta"):
        found = work(layer, values)
    assert_same(found, expected)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_default_device_does_not_matter_to_constructors_and_single_calls(case: Case) -> None:
    values = tensors(case.values)
    expected = work(new_layer(case), values)
    with defaults(device="meta"):
        layer = new_layer(case)
    assert_same(work(layer, values), expected)
    with defaults(device="meta"):
        found = work(new_layer(case), values)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "solver", ["DualActiveSet", "Clarabel", "SCS", "Moreau", "OSQP", "ECOS", "diffcp"]
)
def test_default_device_does_not_matter_to_solvers(solver: str) -> None:
    case = case_named("simplex_projection")
    values = tensors(case.values)
    layers = [new_layer(case, solver=solver, warm_start=True) for _ in range(2)]
    expected = [out.numpy() for out in layers[0](*values)]
    with defaults(device="meta"):
        for _ in range(2):
            found = [out.numpy() for out in layers[1](*values)]
    for one, other in zip(found, expected, strict=True):
        assert_allclose(one, other, atol=1e-7)


def test_default_device_does_not_matter_to_reports_of_probes() -> None:
    case = case_named("weakly_active_inequality")
    values = tensors(case.values)
    layer = new_layer(case, on_irregular="warn")
    with defaults(device="meta"):
        assert layer.solve(*values).derivative.regular.tolist() == [False]
        inputs = [v.requires_grad_() for v in values]
        with pytest.warns(IrregularWarning):
            torch.autograd.grad(layer(*inputs)[0].sum(), inputs)


def test_default_device_does_not_matter_to_failures() -> None:
    x, v = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum(x)), [x >= v, x <= 1])
    layer = DeclarativeLayer(problem, [v], [x], on_failure="nan")
    value = torch.tensor([[0.0, 0.5], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    with defaults(device="meta"):
        (x_value,) = layer(value)
        (grad,) = torch.autograd.grad(x_value[0].sum(), value)
    assert_allclose(x_value.detach().numpy(), [[0.0, 0.5], [np.nan, np.nan]], atol=1e-8)
    assert_allclose(grad.numpy(), [[1.0, 1.0], [0.0, 0.0]], atol=1e-8)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_default_type_does_not_matter(case: Case) -> None:
    values = tensors(case.draw_batch(2))
    results = []
    for dtype in (torch.float64, torch.float32):
        with defaults(dtype=dtype):
            results.append(work(new_layer(case), values))
    assert {v.dtype for v in results[0]} == {torch.float64, torch.bool}
    for found in results[1:]:
        assert_same(found, results[0])


def test_problem_without_parameters_has_the_default_type() -> None:
    case = case_named("no_parameters")
    for dtype in (torch.float32, torch.float64):
        with defaults(dtype=dtype):
            outputs = new_layer(case)()
        assert {out.dtype for out in outputs} == {dtype}
        assert_allclose(outputs[0].numpy(), case.expected()[0], atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_every_device_gives_the_same(case: Case, device: str) -> None:
    layer = new_layer(case)
    found = work(layer, tensors(case.draw_batch(3), device))
    assert {v.device.type for v in found} == {device}
    assert_same(found, work(layer, tensors(case.draw_batch(3))), accuracy=1e-6)
    if case.answer is not None:
        for i in range(3):
            for out, known in zip(found, case.expected(case.draw(i)), strict=False):
                assert_allclose(out[i].cpu().numpy(), known, atol=1e-6)
