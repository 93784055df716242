"""Minimisers of smooth nonlinear programs find minima, and say what they did not find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from smooth_programs import CASES, Case, banana, rows
from torch import Tensor

from declarative_cvx.errors import BackendError, ParameterError, SpecificationError
from declarative_cvx.nonconvex.minimization.interior_point import InteriorPoint
from declarative_cvx.nonconvex.minimization.lbfgs import LBFGS
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer, MinimizerAnswer
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.solve import automatic_minimizer, solve_nonlinear
from declarative_cvx.nonconvex.minimization.trust_region import TrustRegion
from declarative_cvx.status import Status

double = torch.float64


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=double)


def unconstrained(n: int, objective, batch: int = 1, data: Tensor | None = None):  # type: ignore[no-untyped-def]
    data = torch.zeros(1, dtype=double) if data is None else data
    return NonlinearProgram(n, objective, None, None, None, None, (data,), batch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_optima_are_found_to_rounding(case: Case) -> None:
    found = solve_nonlinear(case.program(), case.first)
    assert found.status == (Status.OPTIMAL,)
    assert float(found.value) == pytest.approx(case.value, rel=1e-7, abs=1e-9)
    assert float(found.residuals.worst) < 1e-12
    _assert_kkt(case.program(), found)


def _assert_kkt(program: NonlinearProgram, found) -> None:  # type: ignore[no-untyped-def]
    """The optimality conditions, evaluated without the library's own functions."""
    x, p = found.x[0].clone().requires_grad_(), tuple(v[0] for v in program.parameters)
    total = program.objective(x, p)
    scale = 1 + total.detach().abs()
    if program.equality is not None:
        h = program.equality(x, p)
        assert float(h.detach().abs().max()) < 1e-9 * scale
        total = total + found.equality[0] @ h
    if program.inequality is not None:
        g, z = program.inequality(x, p), found.inequality[0]
        assert float(g.max()) < 1e-9 * scale
        assert float(z.min()) > -1e-9 * scale
        assert float((z * g).abs().max()) < 1e-8 * scale
        total = total + z @ g
    (gradient,) = torch.autograd.grad(total, x)
    gradient = gradient - found.lower_bound[0] + found.upper_bound[0]
    assert float(gradient.abs().max()) < 1e-9 * scale
    for bound, z, sign in (
        (program.lower, found.lower_bound, 1),
        (program.upper, found.upper_bound, -1),
    ):
        if bound is not None:
            gap = sign * (x.detach() - bound[0])
            assert float(gap.min()) >= 0
            assert float(z.min()) >= 0
            assert float(torch.where(torch.isfinite(gap), gap * z[0], 0.0).abs().max()) < 1e-8


@pytest.mark.parametrize(
    "minimizer", [TrustRegion(), LBFGS(), InteriorPoint()], ids=lambda m: m.name
)
@pytest.mark.parametrize("n", [2, 10])
def test_rosenbrock_from_many_starts(minimizer, n: int) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(n)
    start = 1 + 0.3 * torch.randn(16, n, generator=generator, dtype=double)
    program = unconstrained(n, banana, 16, numbers(100.0))
    found = solve_nonlinear(program, start, minimizer)
    assert bool(found.solved.all())
    assert (found.x - 1).abs().max() < 1e-11


def test_rosenbrock_with_a_hundred_variables() -> None:
    start = torch.tensor([-1.2, 1.0] * 50, dtype=double)[None]
    found = solve_nonlinear(unconstrained(100, banana, 1, numbers(100.0)), start)
    assert found.status == (Status.OPTIMAL,)
    assert float(found.residuals.worst) < 1e-12
    # The chained function has a second minimum with the first variable near -1.
    assert float(found.value) == pytest.approx(0.0, abs=1e-12) or found.x[0, 0] < 0


def test_many_variables_without_forming_hessians() -> None:
    n = 1000
    weight = torch.linspace(1, 100, n, dtype=double)

    def objective(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
        return (weight * (x - p[0]) ** 2).sum() / 2 + ((x[1:] - x[:-1]) ** 4).sum()

    program = unconstrained(n, objective, 2, torch.randn(2, n, dtype=double))
    assert isinstance(automatic_minimizer(program), LBFGS)
    found = solve_nonlinear(program, torch.zeros(1, n, dtype=double))
    assert bool(found.solved.all())
    x = found.x.detach().requires_grad_()
    gradient = torch.autograd.grad(torch.func.vmap(objective)(x, program.parameters).sum(), x)[0]
    assert gradient.abs().max() < 1e-8


def test_bounds_hold_exactly_with_their_multipliers() -> None:
    target = torch.tensor([[-2.0, 0.3, 5.0]], dtype=double)
    for minimizer in (TrustRegion(), LBFGS(), InteriorPoint()):
        program = NonlinearProgram(
            3, lambda x, p: ((x - p[0]) ** 2).sum(), None, None,
            torch.zeros(1, 3, dtype=double), torch.ones(1, 3, dtype=double), (target,), 1,
        )  # fmt: skip
        found = solve_nonlinear(program, torch.full((1, 3), 0.5, dtype=double), minimizer)
        assert torch.equal(found.x[0, [0, 2]], numbers(0, 1))
        assert torch.allclose(found.x[0, 1], numbers(0.3))
        assert torch.allclose(found.lower_bound, numbers(4, 0, 0))
        assert torch.allclose(found.upper_bound, numbers(0, 0, 8))


def test_fixed_variables() -> None:
    bound = torch.tensor([[0.5, -torch.inf]], dtype=double)
    upper = torch.tensor([[0.5, torch.inf]], dtype=double)
    program = NonlinearProgram(
        2, lambda x, p: (x**2).sum() + x.prod(), None, lambda x, p: rows(x[1] - 5),
        bound, upper, (torch.zeros(1, dtype=double),), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, torch.zeros(1, 2, dtype=double))
    assert torch.allclose(found.x, numbers(0.5, -0.25))


def test_projection_onto_an_ellipsoid() -> None:
    """Against bisection on the multiplier: x = t / (1 + y a), sum a x^2 = 1."""
    axes = numbers(1.0, 4.0, 9.0)
    targets = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=double)
    program = NonlinearProgram(
        3, lambda x, p: ((x - p[0]) ** 2).sum() / 2, None,
        lambda x, p: rows(((axes * x**2).sum() - 1) / 2), None, None, (targets,), 8,
    )  # fmt: skip
    found = solve_nonlinear(program, torch.zeros(1, 3, dtype=double))
    low, high = torch.zeros(8, 1, dtype=double), torch.full((8, 1), 100.0, dtype=double)
    for _ in range(80):
        y = (low + high) / 2
        outside = (axes * (targets / (1 + y * axes)) ** 2).sum(1, keepdim=True) > 1
        low, high = torch.where(outside, y, low), torch.where(outside, high, y)
    assert (found.x - targets / (1 + low * axes)).abs().max() < 1e-12
    assert (found.inequality - low).abs().max() < 1e-11


@pytest.mark.parametrize(
    "minimizer", [TrustRegion(), InteriorPoint(), LBFGS()], ids=lambda m: m.name
)
def test_a_saddle_point_is_left(minimizer) -> None:  # type: ignore[no-untyped-def]
    program = unconstrained(2, lambda x, p: x[0] ** 2 - x[1] ** 2 + x[1] ** 4)
    found = solve_nonlinear(program, torch.zeros(1, 2, dtype=double), minimizer)
    assert found.status == (Status.OPTIMAL,)
    assert float(found.value) == pytest.approx(-0.25)


def test_a_maximum_on_a_sphere_is_left() -> None:
    target = numbers(0.0, 0.0, 1.0)
    program = NonlinearProgram(
        3, lambda x, p: -(x @ p[0]), lambda x, p: rows((x**2).sum() - 1), None, None, None,
        (target[None],), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, -target[None])
    assert torch.allclose(found.x[0], target)


def test_a_saddle_that_cannot_be_left_is_no_minimum() -> None:
    """Between f = -x^2 and the walls: x = 0 is a maximum, both walls are minima."""
    program = NonlinearProgram(
        1, lambda x, p: -(x[0] ** 2), None, None,
        -torch.ones(1, 1, dtype=double), torch.ones(1, 1, dtype=double),
        (torch.zeros(1, dtype=double),), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, torch.zeros(1, 1, dtype=double))
    assert found.status == (Status.OPTIMAL,)
    assert float(found.x.abs()) == 1


def test_copositive_curvature_at_a_corner_is_a_minimum() -> None:
    program = NonlinearProgram(
        2, lambda x, p: x[0] * x[1] + (x**4).sum(), None, None, torch.zeros(1, 2, dtype=double),
        None, (torch.zeros(1, dtype=double),), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, torch.zeros(1, 2, dtype=double))
    assert found.status == (Status.OPTIMAL,)
    assert float(found.x.abs().max()) == 0


def test_infeasible_unbounded_and_solved_elements_side_by_side() -> None:
    """Minimise a x + x^2 (b) within x <= c, x >= 1: element by element another fate."""
    a, b, c = numbers(1, 1, -1), numbers(1, 1, 0), numbers(2, 0, torch.inf)
    c = torch.where(torch.isinf(c), 1e30, c)

    def build(index: Tensor) -> NonlinearProgram:
        return NonlinearProgram(
            1, lambda x, p: p[0] * x[0] + p[1] * x[0] ** 2, None,
            lambda x, p: rows((x[0] - p[2]) / (1 + p[2]), 1 - x[0]), None, None,
            (a[index], b[index], c[index]), len(index),
        )  # fmt: skip

    start = torch.zeros(1, 1, dtype=double)
    found = solve_nonlinear(build(torch.arange(3)), start)
    assert found.status == (Status.OPTIMAL, Status.INFEASIBLE, Status.UNBOUNDED)
    assert float(found.x[0]) == pytest.approx(1.0)
    assert bool(torch.isnan(found.x[1:]).all())
    alone = solve_nonlinear(build(torch.tensor([0])), start)
    assert torch.equal(alone.x[0], found.x[0])


def test_infeasible_equations_end_where_their_violation_is_least() -> None:
    program = NonlinearProgram(
        2, lambda x, p: x.sum(), lambda x, p: rows((x**2).sum() + 1), None, None, None,
        (torch.zeros(1, dtype=double),), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, torch.ones(1, 2, dtype=double))
    assert found.status == (Status.INFEASIBLE,)


def test_a_locally_infeasible_point_with_crushed_slacks_is_recognised() -> None:
    """An arm that has run into a disc: the multipliers, not the violations, are in balance."""
    length, rest = numbers(0.4, 0.35, 0.25, 0.15), numbers(0.823, -0.238, 0.651, -0.217)
    stiffness = numbers(0.908, 0.335, 0.781, 0.694)
    target, disc = numbers(0.6609, 0.5654), numbers(0.7042, 0.1854)

    def ends(x: Tensor) -> Tensor:
        angle = x.cumsum(0)
        return (length[:, None] * torch.stack([angle.cos(), angle.sin()], 1)).cumsum(0)

    program = NonlinearProgram(
        4,
        lambda x, p: (stiffness * (x - rest) ** 2).sum(),
        lambda x, p: ends(x)[-1] - target,
        lambda x, p: 0.12**2 - ((ends(x)[:-1] - disc) ** 2).sum(1),
        -2.2 * torch.ones(1, 4, dtype=double),
        2.2 * torch.ones(1, 4, dtype=double),
        (),
        1,
    )
    start = numbers(0.5, 0.4, 0.3, 0.2)[None]
    assert InteriorPoint().solve(program, start).status.tolist() == [int(Status.INFEASIBLE)]
    assert solve_nonlinear(program, start).status == (Status.OPTIMAL,)  # on another path


def test_unbounded_below() -> None:
    for minimizer in (TrustRegion(), LBFGS(), InteriorPoint()):
        program = unconstrained(2, lambda x, p: x[0] ** 3 + x[1] ** 2)
        found = solve_nonlinear(program, torch.ones(1, 2, dtype=double) * -1, minimizer)
        assert found.status == (Status.UNBOUNDED,)
        assert bool(torch.isnan(found.value).all())


def test_too_few_iterations_are_reported() -> None:
    program = unconstrained(10, banana, 1, numbers(100.0))
    found = solve_nonlinear(program, torch.zeros(1, 10, dtype=double), TrustRegion(max_iters=2))
    assert found.status == (Status.ITERATION_LIMIT,)
    assert bool(torch.isnan(found.x).all())


def test_a_start_outside_the_domain_is_a_numerical_error() -> None:
    program = unconstrained(1, lambda x, p: x[0] - torch.log(x[0]))
    found = solve_nonlinear(program, -torch.ones(1, 1, dtype=double))
    assert found.status == (Status.NUMERICAL_ERROR,)


def test_dependent_constraints_do_no_harm() -> None:
    program = NonlinearProgram(
        2, lambda x, p: ((x - 3) ** 2).sum(),
        lambda x, p: rows((x**2).sum() - 1, 2 * (x**2).sum() - 2), None, None, None,
        (torch.zeros(1, dtype=double),), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, numbers(1, 0.5)[None])
    assert found.status == (Status.OPTIMAL,)
    assert torch.allclose(found.x, numbers(0.5, 0.5).sqrt())


def test_more_active_rows_than_variables() -> None:
    """Four planes through the apex of a pyramid."""
    normals = torch.tensor([[1, 0, 1], [-1, 0, 1], [0, 1, 1], [0, -1, 1.0]], dtype=double)
    program = NonlinearProgram(
        3, lambda x, p: -x[2], None, lambda x, p: normals @ x - 1, None, None,
        (torch.zeros(1, dtype=double),), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, torch.zeros(1, 3, dtype=double))
    assert found.status == (Status.OPTIMAL,)
    assert torch.allclose(found.x, numbers(0, 0, 1), atol=1e-12)
    assert torch.allclose(found.inequality @ normals, numbers(0, 0, 1))


def test_units_of_objective_and_constraints_do_not_matter() -> None:
    case = next(case for case in CASES if case.name == "HS71")
    program = case.program()
    plain = solve_nonlinear(program, case.first)
    for unit in (1e-8, 1e8):
        scaled = NonlinearProgram(
            4, lambda x, p, u=unit: u * case.objective(x, p),
            lambda x, p, u=unit: case.equality(x, p) / u,  # type: ignore[misc]
            lambda x, p, u=unit: case.inequality(x, p) / u,  # type: ignore[misc]
            program.lower, program.upper, program.parameters, 1,
        )  # fmt: skip
        found = solve_nonlinear(scaled, case.first)
        assert found.status == (Status.OPTIMAL,)
        assert torch.allclose(found.x, plain.x, rtol=1e-10)


def test_elements_do_not_touch_each_other() -> None:
    case = next(case for case in CASES if case.name == "HS71")
    data = torch.tensor(case.data, dtype=double) * (1 + 0.05 * torch.rand(40, 3, dtype=double))
    together = solve_nonlinear(case.program(data), case.first)
    assert bool(together.solved.all())
    for i in (0, 17, 39):
        alone = solve_nonlinear(case.program(data[[i]]), case.first)
        assert torch.allclose(alone.x[0], together.x[i], rtol=1e-13)


def double_well(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
    return (x[0] ** 2 - 1) ** 2 + p[0] * x[0]


def test_the_best_of_several_starts_is_kept() -> None:
    program = unconstrained(1, double_well, 2, numbers(0.1, -0.1))
    starts = torch.tensor([[[1.0]], [[-1.0]], [[0.3]]], dtype=double)
    found = solve_nonlinear(program, starts)
    assert found.x[0] < 0 < found.x[1]
    again = solve_nonlinear(program, starts)
    assert torch.equal(found.x, again.x)


def test_a_warm_start_keeps_its_branch_among_equals() -> None:
    program = unconstrained(1, double_well, 1, numbers(1e-12))
    for first in (1.0, -1.0):
        starts = torch.tensor([[[first]], [[-first]]], dtype=double)
        assert float(solve_nonlinear(program, starts).x) * first > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_warm_start_needs_no_minimiser(case: Case) -> None:
    program = case.program()
    found = solve_nonlinear(program, case.first)
    moved = program.parameters[0] * (1 + 1e-4)
    near = replace(program, parameters=(moved, *program.parameters[1:]))
    again = solve_nonlinear(near, found.x)
    assert again.status == (Status.OPTIMAL,)
    assert int(again.iterations) == 0
    assert float(again.residuals.worst) < 1e-12
    assert (again.x - found.x).abs().max() < 1e-2


def test_a_minimiser_without_multipliers() -> None:
    """One that only knows the answer: multipliers come from least squares (DDN eq. 25)."""
    case = next(case for case in CASES if case.name == "HS71")
    exact = solve_nonlinear(case.program(), case.first)

    class Oracle(Minimizer):
        name, takes_constraints = "oracle", True

        def solve(self, program: NonlinearProgram, start: Tensor) -> MinimizerAnswer:
            none = torch.full_like(start, torch.nan)
            zero = torch.zeros(len(start), dtype=torch.long)
            return MinimizerAnswer(exact.x + 1e-5, none[:, :1], none[:, :1], none, none, zero, zero)

    found = solve_nonlinear(case.program(), case.first, Oracle())
    assert found.status == (Status.OPTIMAL,)
    assert torch.allclose(found.x, exact.x, rtol=1e-12)
    assert torch.allclose(found.inequality, exact.inequality)


def test_single_precision_in_and_out() -> None:
    case = next(case for case in CASES if case.name == "HS71")
    program = case.program(torch.tensor([case.data], dtype=torch.float32))
    found = solve_nonlinear(program, case.first.float())
    assert found.x.dtype == torch.float32
    assert float(found.residuals.worst) < 1e-12


def test_minimizers_are_chosen_by_size_and_constraints() -> None:
    assert isinstance(automatic_minimizer(unconstrained(3, banana)), TrustRegion)
    assert isinstance(automatic_minimizer(unconstrained(5000, banana)), LBFGS)
    assert isinstance(automatic_minimizer(CASES[3].program()), InteriorPoint)


def test_wrong_input_is_refused() -> None:
    program = unconstrained(3, banana, 2, numbers(100.0))
    with pytest.raises(ParameterError, match=r"start has shape \(3, 3\)"):
        solve_nonlinear(program, torch.zeros(3, 3))
    with pytest.raises(ParameterError, match="dtype"):
        solve_nonlinear(program, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ParameterError, match="parameter 0 has shape"):
        solve_nonlinear(unconstrained(3, banana, 2, numbers(1, 2, 3)), torch.zeros(1, 3))
    with pytest.raises(SpecificationError, match="objective function returns a tensor of shape"):
        solve_nonlinear(unconstrained(3, lambda x, p: x), torch.zeros(1, 3))
    with pytest.raises(BackendError, match="takes bounds but no other constraints"):
        solve_nonlinear(CASES[3].program(), CASES[3].first, TrustRegion())
    with pytest.raises(BackendError, match="tol is 2"):
        InteriorPoint(tol=2)
