"""Forward solvers that are not the library's: users' functions, NLP and cone solvers."""

from __future__ import annotations

import importlib.util
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import declarative_cvx as dcx
from declarative_cvx.conic_points import ConicSolver
from declarative_cvx.nonconvex.forward_solver import ForwardSolver
from declarative_cvx.nonconvex.minimization.external import External
from declarative_cvx.nonconvex.minimization.solve import solve_nonlinear
from declarative_cvx.nonconvex.nlp_solver import IPOPT, NLP_SOLVERS, UNO, Knitro
from declarative_cvx.nonconvex.problem_solver import at_values

Built = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- a user's own function -----------------------------------------------------------------------


def smallest_eigenvector() -> Built:
    x, a = cp.Variable(3, name="x"), cp.Parameter((3, 3), symmetric=True, name="A")
    return cp.Problem(cp.Minimize(cp.quad_form(x, a)), [cp.sum_squares(x) == 1]), [a], [x]


def eigenvector(a: Tensor, which: int = 0) -> Tensor:
    vector = torch.linalg.eigh(a).eigenvectors[..., which]
    return vector * torch.sign(vector[..., :1])


def symmetric(batch: int) -> Tensor:
    a = randn(batch, 3, 3)
    return a + a.mT


def test_an_eigendecomposition_against_its_own_derivative() -> None:
    seen = []

    def solver(a: Tensor) -> np.ndarray:
        seen.append((a.shape, a.dtype, a.requires_grad))
        return eigenvector(a).numpy()

    layer = dcx.DeclarativeLayer(*smallest_eigenvector(), solver=solver, optimal_value=True)
    a = symmetric(4).requires_grad_()
    x, value = layer(a)
    assert seen == [((4, 3, 3), torch.float64, False)]
    torch.testing.assert_close(x, eigenvector(a), rtol=0, atol=1e-12)
    torch.testing.assert_close(value, torch.linalg.eigvalsh(a)[:, 0], rtol=0, atol=1e-12)
    weights = randn(4, 3, seed=1)
    found, exact = (torch.autograd.grad((v * weights).sum(), a)[0] for v in (x, eigenvector(a)))
    torch.testing.assert_close(found + found.mT, exact + exact.mT, rtol=0, atol=1e-10)


def test_single_precision_unbatched_and_inside_vmap() -> None:
    layer = dcx.DeclarativeLayer(*smallest_eigenvector(), solver=eigenvector)
    a = symmetric(2)
    (one,) = layer(a[0].float())
    assert one.dtype == torch.float32
    assert one.shape == (3,)
    torch.testing.assert_close(one, eigenvector(a[0]).float())
    (mapped,) = torch.func.vmap(layer)(a)
    torch.testing.assert_close(mapped, eigenvector(a))


def test_derivatives_of_both_orders() -> None:
    layer = dcx.DeclarativeLayer(*smallest_eigenvector(), solver=eigenvector)

    def solve(a: Tensor) -> Tensor:
        return layer((a + a.mT) / 2)[0]

    a = symmetric(2).requires_grad_()
    assert torch.autograd.gradcheck(solve, [a])
    assert torch.autograd.gradgradcheck(solve, [a], fast_mode=True)


def constrained() -> Built:
    x, p = cp.Variable(2, name="x"), cp.Parameter(2, name="p")
    objective = cp.square(x[0] * x[1] - p[0]) + cp.sum_squares(x - p)
    return cp.Problem(cp.Minimize(objective), [cp.sum_squares(x) >= 2, x >= 0.1]), [p], [x]


def slsqp(p: Tensor) -> np.ndarray:
    q = p.numpy()
    return scipy.optimize.minimize(
        lambda x: (x[0] * x[1] - q[0]) ** 2 + ((x - q) ** 2).sum(),
        np.ones(2),
        method="SLSQP",
        bounds=[(0.1, None)] * 2,
        constraints={"type": "ineq", "fun": lambda x: x @ x - 2},
        options={"ftol": 1e-12},
    ).x


def test_scipy_one_element_at_a_time() -> None:
    layer = dcx.DeclarativeLayer(*constrained(), solver=ForwardSolver(slsqp, batched=False))
    p = numbers([0.3, 0.5], [1.5, 1.0], [1.0, -0.4]).requires_grad_()
    solution = layer.solve(p)
    assert set(solution.backend) == {"slsqp"}
    assert float(solution.residuals.worst.max()) < 1e-12  # sharpened
    problem, _, (x,) = constrained()
    x.value = np.ones(2)
    (own,) = dcx.DeclarativeLayer(problem, problem.parameters(), [x])(p)
    torch.testing.assert_close(solution[layer_variable(layer)], own, rtol=0, atol=1e-9)
    assert torch.autograd.gradcheck(layer, [p])


def layer_variable(layer: dcx.DeclarativeLayer) -> cp.Variable:
    return layer._route._form.problem.variables()[0]


def line_fit() -> Built:
    """A line through points of which some are wrong, with a penalty that stops growing."""
    x, points, heights = cp.Variable(2, name="x"), cp.Parameter(9), cp.Parameter(9)
    errors = x[0] * points + x[1] - heights
    objective = cp.sum(1 - cp.exp(-cp.square(errors) / (2 * 0.09)))
    return cp.Problem(cp.Minimize(objective)), [points, heights], [x]


def ransac(t: Tensor, y: Tensor) -> Tensor:
    """The best line through two of the points, then reweighted least squares."""
    pairs = torch.combinations(torch.arange(len(t)))
    slope = (y[pairs[:, 1]] - y[pairs[:, 0]]) / (t[pairs[:, 1]] - t[pairs[:, 0]])
    lines = torch.stack([slope, y[pairs[:, 0]] - slope * t[pairs[:, 0]]], 1)
    errors = lines[:, :1] * t + lines[:, 1:] - y
    line = lines[(errors.abs() < 0.3).sum(1).argmax()]
    basis = torch.stack([t, torch.ones_like(t)], 1)
    for _ in range(40):
        weight = torch.exp(-((basis @ line - y) ** 2) / (2 * 0.09))[:, None]
        line = torch.linalg.solve(basis.T @ (weight * basis), basis.T @ (weight[:, 0] * y))
    return line


def test_a_search_among_samples() -> None:
    """Local minimisation from zero ends elsewhere; the function's minimum is kept."""
    t = torch.linspace(-1, 1, 9, dtype=torch.float64)
    y = 2 * t + 1 + 0.05 * randn(9)
    y[:3] += 4.0
    layer = dcx.DeclarativeLayer(*line_fit(), solver=ForwardSolver(ransac, batched=False))
    (line,) = layer(t, y)
    assert (line - numbers(2.0, 1.0)).abs().max() < 0.2
    torch.testing.assert_close(line, ransac(t, y), rtol=0, atol=1e-6)
    assert torch.autograd.gradcheck(layer, [t.requires_grad_(), y.requires_grad_()])


def test_a_convex_problem_against_the_cone_solvers() -> None:
    """Projection onto the simplex by sorting; here the answer lies on many constraints."""

    def by_sorting(p: Tensor) -> Tensor:
        ordered = p.sort(descending=True).values
        excess = (ordered.cumsum(1) - 1) / torch.arange(1, p.shape[1] + 1)
        count = (ordered > excess).sum(1, keepdim=True)
        return (p - excess.gather(1, count - 1)).clamp(min=0)

    x, p = cp.Variable(6), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [cp.sum(x) == 1, x >= 0])
    value = randn(5, 6).requires_grad_()
    weights, grads = randn(5, 6, seed=1), []
    for solver in (by_sorting, "clarabel"):
        (found,) = dcx.DeclarativeLayer(problem, [p], [x], solver=solver)(value)
        grads.append(torch.autograd.grad((weights * found).sum(), value)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=1e-7)


def test_several_variables_by_order_and_by_name() -> None:
    """Minimise (x y - p)^2 + |x|^2 + y^2: x = y = sqrt(p - 1) for one entry."""
    x, y, p = cp.Variable(name="x"), cp.Variable(name="y"), cp.Parameter(pos=True)
    problem = cp.Problem(cp.Minimize(cp.square(x * y - p) + cp.square(x) + cp.square(y)))

    def root(p: Tensor) -> Tensor:
        return torch.sqrt(p - 1)

    for solver in (lambda p: (root(p), root(p)), lambda p: {x: root(p), y: root(p)}):
        layer = dcx.DeclarativeLayer(problem, [p], [y, x], solver=solver)
        found = layer(numbers(2.0, 5.0))
        for value in found:
            torch.testing.assert_close(value, numbers(1.0, 2.0))
    layer = dcx.DeclarativeLayer(problem, [p], [y], solver=root)
    with pytest.raises(dcx.SpecificationError, match="no value for x"):
        layer(numbers(2.0))
    layer = dcx.DeclarativeLayer(problem, [p], [y], solver=lambda p: {x: p, p: p})
    with pytest.raises(dcx.SpecificationError, match="no variable of the problem"):
        layer(numbers(2.0))


def two_minima() -> Built:
    """(x^2 - 1)^2 + p x: minima near -1 and 1, a maximum near 0."""
    x, p = cp.Variable(name="x"), cp.Parameter(name="p")
    return cp.Problem(cp.Minimize(cp.square(cp.square(x) - 1) + p * x)), [p], [x]


@pytest.mark.parametrize("which", ["minimum", "rough", "far", "maximum", "nowhere"])
def test_only_minima_are_accepted_and_no_other_point_takes_their_place(which: str) -> None:
    roots = np.roots([4, 0, -4, 0.1])
    lowest, highest, other = sorted(roots.real)[0], *sorted(roots.real)[1:]
    given = {
        "minimum": other,  # the higher one of the two
        "rough": other + 1e-3,
        "far": other + 0.1,
        "maximum": highest,
        "nowhere": lowest - 5.0,
    }[which]
    layer = dcx.DeclarativeLayer(
        *two_minima(), solver=lambda p: torch.full_like(p, given), on_failure="nan"
    )
    solution = layer.solve(numbers(0.1))
    if which in ("minimum", "rough"):
        assert solution.status == (dcx.Status.OPTIMAL,)
        assert float(solution.variables[0]) == pytest.approx(other, abs=1e-12)
    else:
        assert solution.status == (dcx.Status.INACCURATE,)
        assert torch.isnan(solution.variables[0]).all()


def test_points_outside_are_reported_not_moved_inside() -> None:
    x, p = cp.Variable(bounds=[0, 2]), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x) * x + p * x))
    layer = dcx.DeclarativeLayer(
        problem, [p], [x], solver=lambda p: numbers(0.0, -0.5, 5e-9), on_failure="nan"
    )
    solution = layer.solve(numbers(1.0, 1.0, 1.0))
    assert [s.name for s in solution.status] == ["OPTIMAL", "INACCURATE", "OPTIMAL"]
    assert "bounds" in solution.said[1]
    assert float(solution.variables[0][2]) == 0.0


def test_a_failing_element_does_not_spoil_the_others() -> None:
    def solver(p: Tensor) -> Tensor:
        if (p < 0).any():
            raise ZeroDivisionError("p is negative")
        return torch.where(p > 5, torch.nan, torch.sqrt(p))

    x, p = cp.Variable(), cp.Parameter()
    x.value = 1.0
    build = (cp.Problem(cp.Minimize(cp.square(cp.square(x) - p)), [x >= 0.1]), [p], [x])
    value = numbers(4.0, -1.0, 9.0, 1.0).requires_grad_()
    solution = dcx.DeclarativeLayer(*build, solver=solver, on_failure="nan").solve(value)
    names = ["OPTIMAL", "NUMERICAL_ERROR", "NUMERICAL_ERROR", "OPTIMAL"]
    assert [status.name for status in solution.status] == names
    assert solution.said == ("", "ZeroDivisionError: p is negative", "", "")
    (found,) = solution.variables
    found[[0, 3]].sum().backward()
    torch.testing.assert_close(value.grad, numbers(0.25, 0.0, 0.0, 0.5))
    with pytest.raises(dcx.SolveError, match=r"element 1: NUMERICAL_ERROR.*p is negative"):
        dcx.DeclarativeLayer(*build, solver=solver)(value)
    one_by_one = ForwardSolver(solver, batched=False)
    again = dcx.DeclarativeLayer(*build, solver=one_by_one, on_failure="nan").solve(value)
    assert again.said == solution.said
    torch.testing.assert_close(again.variables[0], found, equal_nan=True)
    assert x.value == 1.0


def test_answers_of_the_wrong_kind_are_refused() -> None:
    build = smallest_eigenvector()
    for answer, message in (
        (lambda a: eigenvector(a)[:, :2], r"shape \(2, 2\) for `x`; expected \(2, 3\)"),
        (lambda a: "x", "returns a str"),
        (lambda a: (1, 2), "returns 2 values, but a tuple of 1"),
    ):
        with pytest.raises(dcx.SpecificationError, match=message):
            dcx.DeclarativeLayer(*build, solver=answer)(symmetric(2))


def test_what_a_function_has_no_use_for_is_refused() -> None:
    build = smallest_eigenvector()
    with pytest.raises(dcx.BackendError, match="restarts=3"):
        dcx.DeclarativeLayer(*build, solver=eigenvector, restarts=3)
    with pytest.raises(dcx.BackendError, match="no options, got 'tol'"):
        dcx.DeclarativeLayer(*build, solver=eigenvector, solver_args={"tol": 1e-3})
    with pytest.raises(dcx.BackendError, match="gp=True"):
        dcx.DeclarativeLayer(*build, solver=eigenvector, gp=True)
    with pytest.raises(dcx.BackendError, match="takes a callable"):
        ForwardSolver(3)  # type: ignore[arg-type]
    with pytest.raises(dcx.BackendError, match="solver must be"):
        dcx.DeclarativeLayer(*build, solver=dict)
    with pytest.raises(dcx.SpecificationError, match="nonconvex=True"):
        dcx.DeclarativeLayer(*build, solver=eigenvector, nonconvex=False)


def test_points_for_a_nonlinear_program() -> None:
    """`External` by itself: codes that claim no answer are kept, wrong shapes refused."""
    program = dcx.NonlinearProgram(
        1, lambda x, p: ((x - p[0]) ** 2).sum(), None, None, None, None, (numbers(1.0, 2, 3),), 3
    )
    codes = torch.tensor([0, int(dcx.Status.INFEASIBLE), 0])
    points = numbers([1.0], [2.0], [9.0])
    start = torch.zeros(1, 1, dtype=torch.float64)
    found = solve_nonlinear(program, start, External(lambda program, start: (points, codes)))
    assert [s.name for s in found.status] == ["OPTIMAL", "INFEASIBLE", "INACCURATE"]
    with pytest.raises(dcx.SpecificationError, match=r"shape \(1, 1\), but \(3, 1\)"):
        solve_nonlinear(program, start, External(lambda program, start: (points[:1], None)))


# --- solvers of nonlinear programs ---------------------------------------------------------------

NLP = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(cls.module) is None, reason=f"{cls.package} is not installed"
        ),
    )
    for name, cls in NLP_SOLVERS.items()
    if cls in (IPOPT, UNO)
]


def rosenbrock() -> Built:
    x, a, r = cp.Variable(2, name="x"), cp.Parameter(name="a"), cp.Parameter(pos=True, name="r")
    x.value = np.array([1.0, 1.2])
    objective = 100 * cp.square(x[1] - cp.square(x[0])) + cp.square(a - x[0])
    return cp.Problem(cp.Minimize(objective), [cp.sum_squares(x) == r]), [a, r], [x]


@pytest.mark.parametrize("name", NLP)
def test_an_nlp_solver_against_the_own_one(name: str) -> None:
    problem, parameters, variables = rosenbrock()
    parameters[0].value = 7.0
    multiplier = problem.constraints[0].dual_variables[0]
    layer = dcx.DeclarativeLayer(
        problem, parameters, [*variables, multiplier], solver=name.lower(), optimal_value=True
    )
    inputs = [numbers(1.3, 1.5).requires_grad_(), torch.tensor(2.0).double().requires_grad_()]
    own = dcx.DeclarativeLayer(problem, parameters, [*variables, multiplier], optimal_value=True)(
        *inputs
    )
    for found, expected in zip(layer(*inputs), own, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert torch.autograd.gradcheck(layer, inputs)
    assert variables[0].value.tolist() == [1.0, 1.2]
    assert parameters[0].value == 7.0
    assert set(layer.solve(*inputs).backend) == {name}


@pytest.mark.parametrize("name", NLP)
def test_faults_of_the_way_there_are_not_passed_on(name: str) -> None:
    """Lost `NonNeg`, first values of parameters that stay, crossed signs, parametric bounds."""
    p, q, u, m = cp.Parameter(3), cp.Parameter(), cp.Parameter(), cp.Parameter(nonneg=True)
    x = cp.Variable(3, bounds=[-9, u])
    x.value = np.full(3, 0.3)
    objective = cp.sum(cp.power(x - p, 4)) + cp.sum(x / q) + cp.sum(cp.huber(x - 1, m))
    problem = cp.Problem(cp.Minimize(objective), [cp.NonNeg(x[0] - 0.2), q >= -4, x[1] * x[2] <= 1])
    build, values = (problem, [p, q, u, m], [x]), [
        randn(4, 3), numbers(1.0, -0.5, -2.0, 0.3), numbers(3, 0.4, 1, 0.3), numbers(1, 2, 0.5, 1)
    ]  # fmt: skip
    found = dcx.DeclarativeLayer(*build, solver=name).solve(*values)
    (own,) = dcx.DeclarativeLayer(*build)(*values)
    torch.testing.assert_close(found.variables[0], own, rtol=0, atol=1e-8)
    assert float(found.variables[0][:, 0].min()) >= 0.2 - 1e-12


@pytest.mark.parametrize("name", NLP)
def test_what_is_infeasible_and_what_the_solver_does_not_know(name: str) -> None:
    x, p = cp.Variable(), cp.Parameter()
    x.value = 0.5
    problem = cp.Problem(cp.Minimize(cp.square(x) * x + x), [cp.square(x) <= p, x >= -3])
    layer = dcx.DeclarativeLayer(problem, [p], [x], solver=name, on_failure="nan")
    solution = layer.solve(numbers(4.0, -1.0))
    assert solution.solved.tolist() == [True, False]
    assert float(solution.variables[0][0]) == pytest.approx(-2.0, abs=1e-9)
    assert torch.isnan(solution.variables[0][1])
    assert solution.status[1] is dcx.Status.INACCURATE  # there is no certificate
    problem = cp.Problem(cp.Minimize(dcx.tukey(x - p, 1.0) + 0.1 * cp.square(x)))
    layer = dcx.DeclarativeLayer(problem, [p], [x], solver=name)
    with pytest.raises(dcx.SolveError, match="tukey"):
        layer(numbers(1.0))


@pytest.mark.parametrize("penalty", [dcx.pseudo_huber, dcx.welsch, dcx.cauchy, dcx.geman_mcclure])
@pytest.mark.parametrize("name", NLP)
def test_smooth_penalties_through_an_nlp_solver(name: str, penalty: Any) -> None:
    x, p, scale = cp.Variable(2), cp.Parameter(2), cp.Parameter(pos=True)
    x.value = [0.4, 0.9]
    objective = cp.sum(penalty(x - p, scale)) + 0.1 * cp.sum_squares(x) + x[0] * x[1] / 9
    build = (cp.Problem(cp.Minimize(objective)), [p, scale], [x])
    values = [numbers(0.5, 1.0, 0.3, 1.2).reshape(2, 2), numbers(1.5, 0.9)]
    found = dcx.DeclarativeLayer(*build, solver=name).solve(*values)
    assert bool(found.solved.all())
    (own,) = dcx.DeclarativeLayer(*build)(*values)
    torch.testing.assert_close(found.variables[0], own, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NLP)
def test_starts_of_an_nlp_solver(name: str) -> None:
    x, tilt = cp.Variable(bounds=[-3, 3]), cp.Parameter()
    x.value, x.sample_bounds = 2.0, [-3, 3]
    build = (cp.Problem(cp.Minimize(cp.square(cp.square(x) - 4) + tilt * x)), [tilt], [x])
    tilts = numbers(1.0, -1.0)
    single = dcx.DeclarativeLayer(*build, solver=name)(tilts)[0]
    assert bool((single > 1.5).all())
    best = dcx.DeclarativeLayer(*build, solver=name, restarts=8)(tilts)[0]
    assert (best > 0).tolist() == [False, True]
    layer = dcx.DeclarativeLayer(*build, solver=name, warm_start=True)
    x.value = -2.0
    assert float(layer(numbers(0.01))[0]) < -1.5
    x.value = 2.0
    assert float(layer(numbers(-0.01))[0]) < -1.5


@pytest.mark.parametrize("name", NLP)
def test_options_of_an_nlp_solver(name: str) -> None:
    cls = NLP_SOLVERS[name]
    with pytest.raises(dcx.BackendError, match=r"max_iter'.*max_iters"):
        cls(max_iter=3)
    with pytest.raises(dcx.BackendError, match="tol must be a positive number"):
        cls(tol=0)
    with pytest.raises(dcx.BackendError, match="does not take the setting 'tool'"):
        cls(settings={"tool": 3})
    with pytest.raises(dcx.BackendError, match="does not take the setting 'tool'"):
        dcx.DeclarativeLayer(*rosenbrock(), solver=name, solver_args={"tool": 3})
    layer = dcx.DeclarativeLayer(*rosenbrock(), solver=cls(max_iters=1), on_failure="nan")
    assert not bool(layer.solve(numbers(1.0), numbers(2.0)).solved.any())
    again = layer.solve(numbers(1.0), numbers(2.0), solver_args={"max_iters": 100})
    assert bool(again.solved.all())


def test_a_missing_solver_names_the_command() -> None:
    if importlib.util.find_spec(Knitro.module) is not None:
        pytest.skip("Knitro is installed")
    with pytest.raises(dcx.MissingBackendError, match="pip install knitro"):
        dcx.DeclarativeLayer(*rosenbrock(), solver="knitro")


def test_a_problem_with_numbers_for_its_parameters() -> None:
    """Also those beside an atom's arguments, in bounds, and in constraints that vanish."""
    p, m, low = cp.Parameter(pos=True), cp.Parameter(nonneg=True), cp.Parameter()
    x = cp.Variable(2, bounds=[low, 4])
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.huber(x - 1, m)) + cp.sum(cp.power(x, p))),
        [p >= 0, cp.Zero(x[0] - p), cp.SOC(p * m, x)],
    )
    values = {p.id: np.array(2.0), m.id: np.array(3.0), low.id: np.array(-1.0)}
    fixed = at_values(problem, values)
    assert not fixed.parameters()
    assert [type(c).__name__ for c in fixed.constraints] == ["Equality", "SOC"]
    (own,) = fixed.variables()
    assert own.id == x.id
    assert own is not x
    assert np.all(own.bounds[0] == -1.0)
    own.value = np.array([2.0, -0.5])
    assert fixed.objective.value == pytest.approx(1.0 + 2.25 + 4.25)
    assert x.value is None


# --- convex problems that are not DPP ------------------------------------------------------------


def risk_limited() -> Built:
    """Maximise m'x with x'Sx <= g^2, x >= 0 and sum(x) = 1."""
    x, m = cp.Variable(5, name="x"), cp.Parameter(5, name="m")
    s, g = cp.Parameter((5, 5), PSD=True, name="S"), cp.Parameter(nonneg=True, name="g")
    constraints = [cp.quad_form(x, s) <= g * g, cp.sum(x) == 1, x >= 0]
    return cp.Problem(cp.Maximize(m @ x), constraints), [m, s, g], [x]


def risk_values() -> list[Tensor]:
    root = randn(3, 5, 5)
    return [randn(3, 5, seed=1), root @ root.mT + 0.1 * torch.eye(5).double(), numbers(0.9, 1, 1.1)]


@pytest.mark.parametrize(
    "solver", ["auto", "clarabel", dcx.Clarabel(tol=1e-9), "InteriorPoint", "scs"], ids=str
)
def test_convex_but_not_dpp(solver: Any) -> None:
    """Against the same problem as DPP: norm(root x) <= g with the root as the parameter."""
    layer = dcx.DeclarativeLayer(*risk_limited(), solver=solver, optimal_value=True)
    assert layer.spec.verdict is dcx.Verdict.CONVEX
    values = [value.requires_grad_() for value in risk_values()]
    x, value = layer(*values)
    other, m = cp.Variable(5), cp.Parameter(5)
    root, g = cp.Parameter((5, 5)), cp.Parameter(nonneg=True)
    direct = dcx.DeclarativeLayer(
        cp.Problem(
            cp.Maximize(m @ other), [cp.norm(root @ other) <= g, cp.sum(other) == 1, other >= 0]
        ),
        [m, root, g],
        [other],
        optimal_value=True,
    )
    expected, best = direct(values[0], torch.linalg.cholesky(values[1]).mT, values[2])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(value, best, rtol=0, atol=1e-7)
    weights = randn(3, 5, seed=2)
    mine, theirs = (torch.autograd.grad((weights * v).sum(), values) for v in (x, expected))
    for one, two in zip(mine, theirs, strict=True):
        if one.dim() == 3:
            one, two = one + one.mT, two + two.mT
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["auto", "clarabel"])
def test_certificates_of_convex_problems(solver: str) -> None:
    x, p, q = cp.Variable(2), cp.Parameter(), cp.Parameter()
    objective = cp.square(x[0]) + (p * q) * x[1]
    problem = cp.Problem(cp.Minimize(objective), [x[0] >= p * q, x[0] <= 1, x[1] >= 0])
    layer = dcx.DeclarativeLayer(problem, [p, q], [x], solver=solver, on_failure="nan")
    values = [numbers(0.5, 2.0, -1.0).requires_grad_(), numbers(1.0, 1.0, 1.0)]
    solution = layer.solve(*values)
    assert [s.name for s in solution.status] == ["OPTIMAL", "INFEASIBLE", "UNBOUNDED"]
    assert torch.isnan(solution.variables[0]).any(1).tolist() == [False, True, True]
    solution.variables[0][0].sum().backward()
    torch.testing.assert_close(values[0].grad, numbers(1.0, 0.0, 0.0))


def test_semidefinite_variables_whose_answer_is_singular() -> None:
    """The unit matrix of least c'x: the projector on the eigenvector of the smallest eigenvalue."""
    x, c, q = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3), symmetric=True), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.trace((q * c) @ x)), [cp.trace(x) == q * q])
    layer = dcx.DeclarativeLayer(problem, [c, q], [x], solver="clarabel")
    c_value = symmetric(2)
    (found,) = layer(c_value, torch.tensor(1.5).double())
    vector = eigenvector(c_value)
    expected = 2.25 * vector[:, :, None] * vector[:, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_cone_solvers_that_cannot_and_options_that_do_not_exist() -> None:
    values = risk_values()
    with pytest.raises(dcx.BackendError, match="no soc cone"):
        dcx.DeclarativeLayer(*risk_limited(), solver="osqp")(*values)
    with pytest.raises(dcx.BackendError, match="max_itters"):
        dcx.DeclarativeLayer(*risk_limited(), solver="clarabel", solver_args={"max_itters": 3})
    with pytest.raises(dcx.BackendError, match="is no solver for problems that are not convex"):
        dcx.DeclarativeLayer(*risk_limited(), solver="clarabell")
    layer = dcx.DeclarativeLayer(*risk_limited(), solver=ConicSolver(dcx.Clarabel(max_iters=2)))
    with pytest.raises(dcx.SolveError, match="MaxIterations"):
        layer(*values)


def test_complex_answers_are_refused() -> None:
    problem = dcx.TorchProblem(lambda x, p: (x - p).square().sum(), shape=2, parameters={"p": 2})
    layer = dcx.DeclarativeLayer(problem, solver=lambda p: p + 1j)
    with pytest.raises(dcx.SpecificationError, match="real numbers"):
        layer(torch.ones(1, 2))
