"""Code written for `cvxpylayers.torch.CvxpyLayer` runs with another import."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from problems import Case, case_named
from torch import Tensor

from declarative_cvx import BackendError, Clarabel, SolveError
from declarative_cvx.compat import CvxpyLayer

AGREEMENT = 1e-4


def tensors(values: Any, **options: Any) -> list[Tensor]:
    return [torch.tensor(np.asarray(value, dtype=float), **options) for value in values]


def reference(case: Case, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What cvxpylayers returns, where it is there and takes the problem; else the closed form."""
    problem, parameters, variables = case.build()
    accepted = problem.is_dgp(dpp=True) if case.gp else problem.is_dpp()
    if not accepted or importlib.util.find_spec("cvxpylayers") is None:
        return list(case.expected(tuple(values)))
    original = importlib.import_module("cvxpylayers.torch").CvxpyLayer
    own = {variable.id for variable in problem.variables()}
    primal = [v for v in variables if v.id in own]
    outputs = original(problem, parameters=parameters, variables=primal, gp=case.gp)(
        *tensors(values)
    )
    found = {v.id: out.detach().numpy() for v, out in zip(primal, outputs, strict=True)}
    known = case.expected(tuple(values))
    return [found.get(v.id, answer) for v, answer in zip(variables, known, strict=True)]


SHARED = [
    case_named(name)
    for name in (
        "equality_constrained_qp",
        "inequality_qp_with_psd_parameter",
        "box_projection",
        "ball_projection",
        "smallest_eigenvalue_of_order_3",
        "softmax_as_entropy_maximisation",
        "cheapest_rectangle_of_given_area",
    )
]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_outputs_are_those_of_cvxpylayers(case: Case) -> None:
    problem, parameters, variables = case.build()
    layer = CvxpyLayer(problem, parameters=parameters, variables=variables, gp=case.gp)
    assert isinstance(layer, torch.nn.Module)
    outputs = layer(*tensors(case.values))
    assert isinstance(outputs, tuple)
    for out, expected in zip(outputs, reference(case, case.values), strict=True):
        assert tuple(out.shape) == np.shape(expected)
        assert_allclose(out.numpy(), expected, atol=AGREEMENT)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_batched_and_unbatched_parameters_mix(case: Case) -> None:
    problem, parameters, variables = case.build()
    layer = CvxpyLayer(problem, parameters, variables, gp=case.gp)
    for chosen in range(len(parameters)):
        batch = case.draw_batch(3)
        values = [b if k == chosen else s for k, (b, s) in enumerate(zip(batch, case.values))]  # noqa: B905
        outputs = layer(*tensors(values))
        for i in range(3):
            single = [v[i] if k == chosen else v for k, v in enumerate(values)]
            alone = layer(*tensors(single))
            for out, one in zip(outputs, alone, strict=True):
                assert_allclose(out[i], one, atol=1e-7)


def _readme_problem() -> tuple[cp.Problem, cp.Parameter, cp.Parameter, cp.Variable]:
    """The example that cvxpylayers' documentation opens with."""
    x, A, b = cp.Variable(2), cp.Parameter((3, 2)), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0])
    return problem, A, b, x


def test_opening_example() -> None:
    problem, A, b, x = _readme_problem()
    assert problem.is_dpp()
    layer = CvxpyLayer(problem, parameters=[A, b], variables=[x])
    generator = torch.Generator().manual_seed(3)
    A_value = torch.randn(3, 2, generator=generator, requires_grad=True)
    b_value = torch.randn(3, generator=generator, requires_grad=True)
    (solution,) = layer(A_value, b_value)
    solution.sum().backward()
    assert solution.dtype == A_value.grad.dtype == b_value.grad.dtype == torch.float32
    A.value, b.value = A_value.detach().double().numpy(), b_value.detach().double().numpy()
    problem.solve(solver=cp.CLARABEL)
    assert_allclose(solution.detach().numpy(), x.value, atol=AGREEMENT)


def _closed_form() -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]:
    x, v = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [x >= 0, cp.norm(x) <= 10]), [v], [x]


_V = [0.5, -1.0, 2.0]
_X = [0.5, 0.0, 2.0]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (None,),
        ("SCS",),
        ("CLARABEL", False, False, None),
        ("Clarabel", False, False, "SCIPY"),
        ("DIFFCP", False, False, None, {"eps": 1e-8}),
        (cp.ECOS,),
        (cp.SCS, False, False, None, {"eps_abs": 1e-9, "max_iters": 10_000}),
        (None, False, False, None, {"solve_method": "Clarabel"}),
        (None, False, False, None, {"solve_method": "SCS", "mode": "lsqr", "n_jobs_forward": -1}),
        (None, False, False, None, {"n_jobs_forward": 1, "n_jobs_backward": 1}),
        (Clarabel(tol=1e-10),),
    ],
    ids=repr,
)
def test_constructor_takes_the_same_arguments_in_the_same_order(arguments: tuple) -> None:
    layer = CvxpyLayer(*_closed_form(), *arguments)
    v = torch.tensor(_V, dtype=torch.float64, requires_grad=True)
    (x,) = layer(v)
    assert_allclose(x.detach().numpy(), _X, atol=AGREEMENT)
    (grad,) = torch.autograd.grad(x.sum(), v)
    assert_allclose(grad.numpy(), [1.0, 0.0, 1.0], atol=AGREEMENT)


@pytest.mark.parametrize("backend", [None, cp.SCIPY_CANON_BACKEND, cp.CPP_CANON_BACKEND])
def test_keywords_have_the_same_names(backend: str | None) -> None:
    problem, parameters, variables = _closed_form()
    layer = CvxpyLayer(
        problem=problem,
        parameters=parameters,
        variables=variables,
        solver="CLARABEL",
        gp=False,
        verbose=False,
        canon_backend=backend,
        solver_args={"max_iter": 100},
    )
    (x,) = layer(torch.tensor(_V, dtype=torch.float64), solver_args={}, warm_start=False)
    assert_allclose(x, _X, atol=AGREEMENT)


def test_verbose_lets_the_solver_speak(capfd: pytest.CaptureFixture[str]) -> None:
    v = torch.tensor(_V, dtype=torch.float64)
    for verbose in (False, True):
        CvxpyLayer(*_closed_form(), solver="SCS", verbose=verbose)(v)
        assert ("SCS" in capfd.readouterr().out) == verbose


def test_options_of_the_solver_take_effect() -> None:
    v = torch.tensor(_V, dtype=torch.float64)
    layer = CvxpyLayer(*_closed_form(), solver="SCS")
    plenty = layer.solve(v).iterations
    assert layer.solve(v, solver_args={"max_iters": 3}).iterations == (3,) != plenty
    assert layer.solve(v).iterations == plenty
    limited = CvxpyLayer(*_closed_form(), solver="SCS", solver_args={"max_iters": 3})
    assert limited.solve(v).iterations == (3,)
    rough = layer.solve(v, solver_args={"eps_abs": 1e-2, "eps_rel": 1e-2}).iterations
    assert rough[0] < plenty[0]


def _logistic() -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]:
    """A problem that one iteration and a few Newton steps do not solve."""
    rng = np.random.default_rng(0)
    x, A = cp.Variable(6), cp.Parameter((20, 6))
    labels = rng.choice([-1.0, 1.0], 20)
    loss = cp.sum(cp.logistic(cp.multiply(labels, A @ x))) + cp.norm1(x)
    return cp.Problem(cp.Minimize(loss), [cp.norm(x, 2) <= 1]), [A], [x]


@pytest.mark.parametrize("where", ["constructor", "call"])
@pytest.mark.parametrize("solver", ["SCS", None])
def test_too_few_iterations_are_an_error_rather_than_a_wrong_answer(
    where: str, solver: str | None
) -> None:
    A = torch.as_tensor(np.random.default_rng(1).standard_normal((20, 6)) * 5)
    few = {"max_iters": 1}
    in_constructor = where == "constructor"
    layer = CvxpyLayer(*_logistic(), solver=solver, solver_args=few if in_constructor else None)
    with pytest.raises(SolveError, match="element 0"):
        layer(A, solver_args=None if in_constructor else few)


@pytest.mark.parametrize("option", ["max_itrs", "epsilon", "acceleration_look_back"])
@pytest.mark.parametrize("solver", ["SCS", None, "CLARABEL"])
def test_misspelt_options_are_errors(solver: str | None, option: str) -> None:
    with pytest.raises(BackendError, match=option):
        CvxpyLayer(*_closed_form(), solver=solver, solver_args={option: 1})
    layer = CvxpyLayer(*_closed_form(), solver=solver)
    with pytest.raises(BackendError, match=option):
        layer(torch.tensor(_V, dtype=torch.float64), solver_args={option: 1})


def test_approximate_derivatives_are_refused() -> None:
    with pytest.raises(BackendError, match="lpgd"):
        CvxpyLayer(*_closed_form(), solver_args={"mode": "lpgd"})


def test_solver_names_that_do_not_exist_are_errors() -> None:
    with pytest.raises(BackendError, match=r"CLARABELL.*[Cc]larabel"):
        CvxpyLayer(*_closed_form(), solver="CLARABELL")


def test_warm_start_takes_up_the_last_solution() -> None:
    layer = CvxpyLayer(*_closed_form(), solver="SCS")
    v = torch.tensor(_V, dtype=torch.float64)
    (cold,) = layer(v, warm_start=True)
    first = layer.solve(v).iterations[0]
    again = layer.solve(v, warm_start=True)
    assert again.iterations[0] < first
    assert_allclose(again.variables[0], cold, atol=1e-8)
    assert layer.solve(v, warm_start=False).iterations[0] == first


def test_semidefinite_parameter_and_its_gradient() -> None:
    x, P, q = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x))
    layer = CvxpyLayer(problem, parameters=[P, q], variables=[x])
    factor = np.random.default_rng(2).standard_normal((3, 3))
    P_value, q_value = tensors([factor @ factor.T + np.eye(3), [1.0, -2.0, 0.5]])
    P_value, q_value = P_value.requires_grad_(), q_value.requires_grad_()
    (x_value,) = layer(P_value, q_value)
    found = torch.autograd.grad(x_value.sum(), [P_value, q_value])
    known = -torch.linalg.solve((P_value + P_value.T) / 2, q_value)
    torch.testing.assert_close(x_value, known)
    torch.testing.assert_close(found, torch.autograd.grad(known.sum(), [P_value, q_value]))


def test_geometric_program_and_its_gradient() -> None:
    """The cheapest box of volume a: x = (a q / p)^(1/2), y = (a p / q)^(1/2)."""
    case = case_named("cheapest_rectangle_of_given_area")
    problem, parameters, variables = case.build()
    layer = CvxpyLayer(problem, parameters, variables, gp=True)
    a, p, q = tensors(case.values, requires_grad=True)
    x, y = layer(a, p, q)
    found = torch.autograd.grad(x + 2 * y, [a, p, q])
    known = torch.sqrt(a * q / p) + 2 * torch.sqrt(a * p / q)
    torch.testing.assert_close(found, torch.autograd.grad(known, [a, p, q]), rtol=1e-6, atol=1e-6)


def test_layer_trains_inside_a_module() -> None:
    """Learning what another module of the same form does."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 3, dtype=torch.float64)
            self.layer = CvxpyLayer(*_closed_form())

        def forward(self, z: Tensor) -> Tensor:
            return self.layer(self.linear(z))[0]

    torch.manual_seed(0)
    model, teacher, z = Model(), Model(), torch.randn(8, 4, dtype=torch.float64)
    target = teacher(z).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ((model(z) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
