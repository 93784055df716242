"""Where a call starts, if it is told."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import declarative_cvx as dcx


def valleys() -> tuple[cp.Problem, cp.Parameter, cp.Variable]:
    """Minima near -1 and 1, the lower one on the side opposite to the tilt."""
    x, tilt = cp.Variable(name="x"), cp.Parameter(name="tilt")
    x.value = 1.0
    return cp.Problem(cp.Minimize(cp.square(cp.square(x) - 1) + tilt * x)), tilt, x


def of_torch() -> dcx.TorchProblem:
    return dcx.TorchProblem(
        lambda x, y, tilt: (x.square() - 1).square() + (y.square() - 4).square() + tilt * x,
        shape={"x": (), "y": ()},
        parameters={"tilt": ()},
        start=1.0,
    )


TILTS = torch.tensor([0.1, -0.1, 0.1])


@pytest.mark.parametrize(
    ("start", "signs"),
    [
        (torch.tensor([-1.0, 0.5, -2.0]), [-1, 1, -1]),
        (torch.tensor(-0.5), [-1, -1, -1]),
        (torch.tensor([-0.5]), [-1, -1, -1]),
    ],
)
def test_each_element_starts_where_it_is_told(start: Tensor, signs: list[int]) -> None:
    problem, tilt, x = valleys()
    layer = dcx.DeclarativeLayer(problem, [tilt], [x])
    (found,) = layer(TILTS, start={x: start})
    assert found.sign().tolist() == signs
    assert (layer(TILTS)[0] > 0).all()  # and the next call where it always does
    assert x.value == 1.0


def test_variables_by_name_of_a_torch_problem() -> None:
    layer = dcx.DeclarativeLayer(of_torch())
    x, y = layer(TILTS, start={"y": torch.tensor([-1.0, 3.0, -5.0])})
    assert y.tolist() == pytest.approx([-2.0, 2.0, -2.0])
    assert (x > 0).all()


def test_a_warm_start_goes_on_from_there() -> None:
    problem, tilt, x = valleys()
    layer = dcx.DeclarativeLayer(problem, [tilt], [x], warm_start=True)
    layer(TILTS, start={x: torch.tensor(-1.0)})
    assert (layer(TILTS)[0] < 0).all()


def test_fixed_points() -> None:
    problem = dcx.FixedPointProblem(lambda x, u: x - (x**3 - x) / 4 + 0 * u, (1,), {"u": (1,)})
    layer = dcx.DeclarativeLayer(problem)
    u = torch.zeros(2, 1, dtype=torch.float64)
    (x,) = layer(u, start={"x": torch.tensor([[-0.9], [1.2]])})
    torch.testing.assert_close(x, torch.tensor([[-1.0], [1.0]], dtype=torch.float64))


def test_gradients_are_those_of_the_branch() -> None:
    problem, tilt, x = valleys()
    layer = dcx.DeclarativeLayer(problem, [tilt], [x])
    tilts = TILTS.double().requires_grad_()
    (found,) = layer(tilts, start={x: torch.tensor([-1.0, 1.0, -1.0])})
    (slope,) = torch.autograd.grad(found.sum(), tilts)
    # 4 x (x^2 - 1) + tilt = 0
    torch.testing.assert_close(slope, -1 / (12 * found.detach() ** 2 - 4), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("start", "error", "words"),
    [
        ({"x": torch.zeros(2)}, dcx.ParameterError, r"start of 'x' has shape \(2,\)"),
        ({"x": torch.tensor(float("nan"))}, dcx.ParameterError, "not finite"),
        ({"x": 1.0}, dcx.ParameterError, "tensor"),
        ({"z": torch.zeros(3)}, dcx.SpecificationError, "'z'"),
    ],
)
def test_bad_starts_are_refused(start: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        dcx.DeclarativeLayer(of_torch())(TILTS, start=start)
    problem, tilt, x = valleys()
    by_variable = {x if key == "x" else key: value for key, value in start.items()}
    with pytest.raises(error, match=words):
        dcx.DeclarativeLayer(problem, [tilt], [x])(TILTS, start=by_variable)


def test_a_start_that_would_do_nothing_is_refused() -> None:
    x, b = cp.Variable(), cp.Parameter()
    convex = cp.Problem(cp.Minimize(cp.square(x - b)), [x >= 1])
    pool = cp.Problem(cp.Minimize(dcx.welsch(x - b, 1.0)))
    problem, tilt, y = valleys()
    layers = [
        (dcx.DeclarativeLayer(convex, [b], [x]), x),
        (dcx.DeclarativeLayer(pool, [b], [x]), x),
        (dcx.DeclarativeLayer(problem, [tilt], [y], solver=lambda tilt: torch.ones(3)), y),
    ]
    for layer, variable in layers:
        with pytest.raises(dcx.BackendError, match="start= is for"):
            layer(TILTS, start={variable: torch.zeros(3)})
