"""Points that satisfy the conditions for a minimum to rounding, and are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.external import External
from declarative_cvx.nonconvex.minimization.interior_point import InteriorPoint
from declarative_cvx.nonconvex.minimization.lbfgs import LBFGS
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram, Parameters
from declarative_cvx.nonconvex.minimization.solve import NonlinearSolution, solve_nonlinear
from declarative_cvx.nonconvex.minimization.trust_region import TrustRegion
from declarative_cvx.status import Status

double = torch.float64
softplus = torch.nn.functional.softplus
Function = Callable[[Tensor, Parameters], Tensor]
MINIMIZERS = [TrustRegion(), LBFGS(), InteriorPoint()]


@dataclass(frozen=True)
class Case:
    """An objective of x and one parameter, which is zero, and a start."""

    name: str
    objective: Function
    start: tuple[float, ...]
    lower: tuple[float, ...] | None = None
    equality: Function | None = None
    inequality: Function | None = None

    def program(self, parameter: Tensor) -> NonlinearProgram:
        lower = None if self.lower is None else torch.tensor([self.lower], dtype=double)
        functions = self.objective, self.equality, self.inequality
        return NonlinearProgram(
            len(self.start), *functions, lower, None, (parameter,), len(parameter)
        )

    def solved(
        self, minimizer: Minimizer | None = None, parameter: float = 0.0
    ) -> NonlinearSolution:
        program = self.program(torch.tensor([parameter], dtype=double))
        start = torch.tensor([self.start], dtype=double)
        return solve_nonlinear(program, start, minimizer, "ignore")


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


# Two classes of points that a line separates, their labels multiplied in.
_SEPARABLE = torch.tensor([[1.0, 2.0], [2.0, 1.5], [1.0, 2.0], [2.0, 0.5]], dtype=double)
NOT_ATTAINED = [
    Case("exp(-x)", lambda x, p: torch.exp(-x[0]), (0.0,)),
    Case("1 + exp(-x)", lambda x, p: 1 + torch.exp(-x[0]), (0.0,)),
    Case("exp(-x / 1000)", lambda x, p: torch.exp(-x[0] / 1000), (0.0,)),
    Case("with a minimum", lambda x, p: torch.exp(-x[0]) + (x[1] - 1) ** 2, (0.0, 0.0)),
    Case("bound", lambda x, p: 1 / x[0], (2.0,), lower=(1.0,)),
    Case("logarithm", lambda x, p: softplus(-x[0]), (0.0,)),
    Case("arctangent", lambda x, p: -torch.atan(x[0]), (0.5,)),
    Case("fraction", lambda x, p: -x[0] / (1 + x[0]), (1.0,), lower=(0.0,)),
    Case("valley", lambda x, p: (x[0] * x[1] - 1) ** 2 + x[0] ** 2, (1.0, 0.5)),
    Case("separable classes", lambda x, p: softplus(-(_SEPARABLE @ x)).sum(), (0.0, 0.0)),
]
NOT_ATTAINED_WITHIN = [
    Case(
        "inequalities",
        lambda x, p: 1 / x[0] + (x[1] - 3) ** 2,
        (2.0, 0.0),
        inequality=lambda x, p: torch.stack([1 - x[0], x[1] - 2]),
    ),
    Case(
        "equality",
        lambda x, p: torch.exp(-x[0] - x[1]) + (x[2] - 1) ** 2,
        (0.0, 1.0, 0.0),
        equality=lambda x, p: x[:1] - 2 * x[1:2],
    ),
]


@pytest.mark.parametrize("minimizer", MINIMIZERS, ids=lambda m: m.name)
@named(NOT_ATTAINED)
def test_a_minimum_at_infinity_is_not_found(case: Case, minimizer: Minimizer) -> None:
    found = case.solved(minimizer)
    assert found.status in ((Status.INACCURATE,), (Status.ITERATION_LIMIT,))
    assert bool(torch.isnan(found.x).all())


@named(NOT_ATTAINED_WITHIN)
def test_a_minimum_at_infinity_is_not_found_within_constraints(case: Case) -> None:
    assert case.solved().status == (Status.INACCURATE,)


def test_elements_with_and_without_a_minimum() -> None:
    """exp(-x) + p x: x = -log p, if p is positive."""
    p = torch.tensor([1e-3, 0.0, 1e-12], dtype=double)
    case = Case("", lambda x, p: torch.exp(-x[0]) + p[0] * x[0], (0.0,))
    found = solve_nonlinear(case.program(p), torch.zeros(1, 1, dtype=double))
    assert found.status == (Status.OPTIMAL, Status.INACCURATE, Status.OPTIMAL)
    torch.testing.assert_close(found.x[[0, 2], 0], -torch.log(p[[0, 2]]))


FAR = [
    (Case("square", lambda x, p: (x[0] - 1e9) ** 2, (0.0,)), (1e9,)),
    (Case("flat", lambda x, p: 1e-12 * (x[0] - 1e6) ** 2 + x[1] ** 2, (0.0, 1.0)), (1e6, 0.0)),
    (Case("balance", lambda x, p: 1 / x[0] + 1e-8 * x[0], (2.0,), lower=(1.0,)), (1e4,)),
]


@pytest.mark.parametrize("minimizer", MINIMIZERS, ids=lambda m: m.name)
@pytest.mark.parametrize(("case", "expected"), FAR, ids=[case.name for case, _ in FAR])
def test_far_minima_are_found(
    case: Case, expected: tuple[float, ...], minimizer: Minimizer
) -> None:
    found = case.solved(minimizer)
    assert found.status == (Status.OPTIMAL,)
    assert bool(found.regular.all())
    torch.testing.assert_close(found.x[0], torch.tensor(expected, dtype=double))


# --- no curvature ------------------------------------------------------------------------------

FALLING = [
    (Case("-x^4", lambda x, p: -(x[0] ** 4) + x[0] ** 6, (0.0,)), -4 / 27),
    (Case("x^3", lambda x, p: x[0] ** 3 + x[0] ** 4, (0.0,)), -27 / 256),
    (Case("x^3 from above", lambda x, p: x[0] ** 3 + x[0] ** 4, (1e-6,)), -27 / 256),
    (
        Case(
            "between the axes",
            lambda x, p: (x[0] + x[1]) ** 4 - (x[0] - x[1]) ** 4 + (x**2).sum() ** 4,
            (0.0, 0.0),
        ),
        -4.0,  # 8 x y r^2 + r^8, least where x = -y: -4 r^4 + r^8
    ),
    (
        Case(
            "along a parabola",
            lambda x, p: -(x[1] ** 2) + x[0] ** 6,
            (0.0, 0.0),
            equality=lambda x, p: x[1:] - x[:1] ** 2,
        ),
        -4 / 27,
    ),
    (
        Case(
            "up to a constraint",
            lambda x, p: -(x[0] ** 4),
            (0.0,),
            inequality=lambda x, p: x**2 - 1,
        ),
        -1.0,
    ),
]


@pytest.mark.parametrize(("case", "value"), FALLING, ids=[case.name for case, _ in FALLING])
def test_stationary_points_where_the_objective_falls_are_left(case: Case, value: float) -> None:
    found = case.solved()
    assert found.status == (Status.OPTIMAL,)
    assert float(found.value) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("minimizer", MINIMIZERS, ids=lambda m: m.name)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_point_of_inflection_is_no_minimum(start: float, minimizer: Minimizer) -> None:
    found = Case("", lambda x, p: x[0] ** 3, (start,)).solved(minimizer)
    assert found.status == (Status.UNBOUNDED,)


FLAT = [
    Case("x^4", lambda x, p: x[0] ** 4, (0.0,)),
    Case("a line", lambda x, p: (x[0] + x[1] - 1) ** 2, (3.0, 0.0)),
    Case("a hyperbola", lambda x, p: (x[0] * x[1] - 1) ** 2, (3.0, 1.0)),
    Case("a circle", lambda x, p: ((x**2).sum() - 1) ** 2, (3.0, 1.0)),
    Case("a constant", lambda x, p: 0 * x[0], (3.0, 1.0)),
]


@named(FLAT)
def test_minima_without_curvature_are_minima(case: Case) -> None:
    found = case.solved()
    assert found.status == (Status.OPTIMAL,)
    assert float(found.value) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("minimizer", MINIMIZERS, ids=lambda m: m.name)
@pytest.mark.parametrize("n", [1, 2])
def test_minima_of_fourth_order_have_no_derivative(n: int, minimizer: Minimizer) -> None:
    """(x - 1)^4 - p x has its minimum at 1 + (p / 4)^(1/3)."""
    case = Case(
        "",
        lambda x, p: (x[0] - 1) ** 4 - p[0] * x[0] + ((x[1:] - 2) ** 2).sum(),
        (3.0, 0.0)[:n],
    )
    found = case.solved(minimizer)
    assert found.status == (Status.OPTIMAL,)
    assert found.regular.tolist() == [False]
    assert found.derivative.reason[0]
    near = case.solved(minimizer, parameter=0.5)
    assert near.regular.tolist() == [True]
    assert float(near.x[0, 0]) == pytest.approx(1.5)


def test_minima_of_fourth_order_on_a_line_are_reached() -> None:
    case = Case(
        "",
        lambda x, p: (x**4).sum(),
        (1.0, 0.3),
        equality=lambda x, p: x[:1] + x[1:],
    )
    found = case.solved()
    assert found.status == (Status.OPTIMAL,)
    assert float(found.x.abs().max()) <= 1e-5
    assert found.regular.tolist() == [False]


def test_a_corner_that_can_be_left_along_a_face_is_no_minimum() -> None:
    """Though the direction of least curvature leads out of the bounds, both ways."""
    case = Case(
        "",
        lambda x, p: -x[0] * x[1] + 2 * x[0] * x[2] + (x**2).sum() ** 2,
        (0.0, 0.0, 0.0),
        lower=(0.0, 0.0, 0.0),
    )
    found = case.solved()
    assert found.status == (Status.OPTIMAL,)
    assert found.x[0].tolist() == pytest.approx([8**-0.5, 8**-0.5, 0.0])


def test_curvature_that_vanishes_below_rounding_leaves_no_derivative() -> None:
    """Powell's singular function; its Hessian at the minimum, zero, has two zero eigenvalues."""
    case = Case(
        "",
        lambda x, p: (
            (x[0] + 10 * x[1]) ** 2
            + 5 * (x[2] - x[3]) ** 2
            + (x[1] - 2 * x[2]) ** 4
            + 10 * (x[0] - x[3]) ** 4
        ),
        (3.0, -1.0, 0.0, 1.0),
    )
    found = case.solved()
    assert found.status == (Status.OPTIMAL,)
    assert found.regular.tolist() == [False]


# --- somebody else's points --------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1.0])
@pytest.mark.parametrize("off", [0.5, 5.0])
def test_a_wrong_point_is_seen_whatever_its_curvature(scale: float, off: float) -> None:
    case = Case("", lambda x, p: scale * (x[0] - 3) ** 2 + (x[1] - 1) ** 2, (0.0, 0.0))
    for wrong, status in ((off, Status.INACCURATE), (1e-4, Status.OPTIMAL)):
        point = torch.tensor([[3.0 + wrong, 1.0]], dtype=double)
        found = case.solved(External(lambda program, start, point=point: (point, None)))
        assert found.status == (status,)
    torch.testing.assert_close(found.x[0], torch.tensor([3.0, 1.0], dtype=double))
