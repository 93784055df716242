"""CVXPY problems as smooth nonlinear programs: minima, multipliers, starts, and refusals."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import scipy.optimize
import torch
from cvxpy import nlp
from torch.func import grad, jacrev

from declarative_cvx.atoms import truncated_quadratic, welsch
from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.translation.translate import Multipliers, NonlinearForm

rng = np.random.default_rng(0)
A, b, a = rng.normal(size=(4, 3)), rng.normal(size=4), rng.normal(size=3)
S = (lambda M: M + M.T)(rng.normal(size=(3, 3)))
C, scale = rng.normal(size=(2, 3)), np.diag([0.5, 1.0, 2.0])
CPU = torch.device("cpu")
TIGHT = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}


def program_of(form, values=None):
    if values is None:
        values = [np.asarray(p.value, dtype=float) for p in form.parameters]
    values = [torch.as_tensor(value, dtype=torch.float64) for value in values]
    return form.program(values, [False] * len(values), 1, CPU)


def in_numpy(function, program):
    """A function of a vector, and its Jacobian."""
    parameters = tuple(value[0] for value in program.parameters)
    if function is None:
        return lambda x: np.zeros(0), lambda x: np.zeros((0, len(x)))
    return (
        lambda x: function(torch.tensor(x), parameters).numpy(),
        lambda x: jacrev(lambda y: function(y, parameters))(torch.tensor(x)).numpy(),
    )


def minimise(form, start=None, values=None):
    """Minimum by sequential quadratic programming in SciPy: program and point (1, n)."""
    program = program_of(form, values)
    (f, df), (h, dh), (g, dg) = (
        in_numpy(function, program)
        for function in (program.objective, program.equality, program.inequality)
    )
    constraints = [{"type": "eq", "fun": h, "jac": dh}] if program.equality else []
    if program.inequality:
        constraints.append({"type": "ineq", "fun": lambda x: -g(x), "jac": lambda x: -dg(x)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = scipy.optimize.minimize(
            f,
            form.start(program)[0].numpy() if start is None else start,
            jac=df,
            bounds=list(zip(program.lower[0] + 1e-10, program.upper[0] - 1e-10, strict=True)),
            constraints=constraints,
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-15},
        ).x
    return program, torch.tensor(x)[None]


def multipliers_of(program, x, near=1e-6):
    """Multipliers with the right signs that make the gradient of the Lagrangian least."""
    x = x[0].numpy()
    (_, df), (_, dh), (g, dg) = (
        in_numpy(function, program)
        for function in (program.objective, program.equality, program.inequality)
    )
    active, unit = g(x) > -near, np.eye(len(x))
    low, high = x - program.lower[0].numpy() < near, program.upper[0].numpy() - x < near
    rows = np.concatenate([dh(x), dg(x)[active], -unit[low], unit[high]])
    free = len(dh(x))
    found = np.zeros(0)
    if len(rows):
        least = np.r_[np.full(free, -np.inf), np.zeros(len(rows) - free)]
        found = scipy.optimize.lsq_linear(rows.T, -df(x), bounds=(least, np.inf), tol=1e-14).x
    assert np.abs(rows.T @ found + df(x)).max() < 1e-4
    parts = [np.zeros(free), np.zeros(len(active)), np.zeros(len(x)), np.zeros(len(x))]
    end = 0
    for part, mask in zip(parts, (np.ones(free, dtype=bool), active, low, high), strict=True):
        part[mask] = found[end : end + mask.sum()]
        end += mask.sum()
    return Multipliers(*(torch.tensor(part)[None] for part in parts))


def dense(value):
    return value.toarray() if hasattr(value, "toarray") else np.asarray(value)


def lasso(penalty):
    x = cp.Variable(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - a) + penalty(x)))


def fit(norm):
    x = cp.Variable(3)
    return cp.Problem(cp.Minimize(norm(A @ x - b)))


def nearest(*constraints, shape=3, to=a, **attributes):
    """The nearest point with constraints, each a function of the variable."""
    x = cp.Variable(shape, **attributes)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - to)), [c(x) for c in constraints])


def nearest_matrix(*constraints, **attributes):
    return nearest(*constraints, shape=(3, 3), to=S, **attributes)


def spectral(penalty, shape=(3, 3), to=S, **attributes):
    X = cp.Variable(shape, **attributes)
    return cp.Problem(cp.Minimize(cp.sum_squares(X - to) + penalty(X)))


CONVEX = {
    "equality": lambda: nearest(lambda x: cp.sum(x) == 1),
    "bounds": lambda: nearest(lambda x: x >= 0.3, lambda x: x <= 0.6),
    "bounds_of_entries": lambda: nearest(lambda x: x[1:] <= -1, lambda x: x[:1] >= 0.2),
    "tied_bounds": lambda: nearest(lambda x: x >= 0.8, lambda x: x[0] >= 0.8, lambda x: x >= 0),
    "inequality": lambda: nearest(lambda x: A[:2] @ x <= -1),
    "constraint_objects": lambda: nearest(
        lambda x: cp.NonNeg(-x[1]), lambda x: cp.NonPos(A[0] @ x + 1),
        lambda x: cp.Zero(x[0] - x[2]), lambda x: cp.NonNeg(A[1] @ x - 1),
    ),
    "attributes": lambda: nearest(shape=3, bounds=[-0.1, np.array([0.05, 0.1, 0.2])]),
    "second_order": lambda: nearest(lambda x: cp.SOC(cp.sum(x) / 1.5, x)),
    "second_order_constant": lambda: nearest(lambda x: cp.SOC(cp.Constant(0.5), x)),
    "second_order_rows": lambda: nearest(
        lambda x: cp.SOC(np.array([0.3, 0.2]), cp.vstack([x[:2], x[1:]]), axis=1)
    ),
    "second_order_columns": lambda: nearest(
        lambda x: cp.SOC(0.2 + cp.hstack([x[0], x[2]]) / 2, cp.vstack([x[:2], x[1:]]).T, axis=0)
    ),
    "norm_bound": lambda: nearest(lambda x: cp.norm(x) <= 0.3),
    "semidefinite": lambda: nearest_matrix(lambda X: X >> 0, symmetric=True),
    "semidefinite_general": lambda: nearest_matrix(lambda X: X << 0.1 * np.eye(3)),
    "semidefinite_variable": lambda: nearest_matrix(PSD=True),
    "negative_semidefinite_variable": lambda: nearest_matrix(NSD=True),
    "symmetric": lambda: nearest_matrix(
        lambda X: X >= -0.5, lambda X: X @ scale + scale @ X <= np.ones((3, 3)),
        symmetric=True,
    ),
    "symmetry_as_a_constraint": lambda: nearest_matrix(lambda X: X >= 0, lambda X: X == X.T),
    "diagonal": lambda: nearest_matrix(lambda X: X >= -1, diag=True),
    "sparse": lambda: nearest_matrix(lambda X: cp.sum(X) == 1, sparsity=[(0, 1), (1, 2)]),
    "exponential": lambda: nearest(
        lambda x: cp.ExpCone(x[0], x[1], x[2]), to=np.array([1.0, 0.5, 0.2])
    ),
    "exponential_of_one": lambda: nearest(
        lambda x: cp.ExpCone(x[0], cp.Constant(1.0), x[2]), to=np.array([1.0, 0.5, 0.2])
    ),
    "power3": lambda: nearest(
        lambda x: cp.PowCone3D(x[0], x[1], x[2], 0.3), to=np.array([0.5, 0.4, 2])
    ),
    "power": lambda: nearest(
        lambda x: cp.PowConeND(x[:3], x[3], np.array([0.3, 0.3, 0.4])), shape=4,
        to=np.array([0.5, 0.4, 0.3, 2.0]),
    ),
    "abs": lambda: lasso(lambda x: cp.sum(cp.abs(x))),
    "norm1": lambda: fit(lambda r: cp.norm(r, 1)),
    "norm2": lambda: fit(cp.norm),
    "norm3": lambda: fit(lambda r: cp.pnorm(r, 3)),
    "norm1.5": lambda: fit(lambda r: cp.pnorm(r, 1.5)),
    "norm_inf": lambda: fit(lambda r: cp.norm(r, "inf")),
    "mixed_norm": lambda: fit(lambda r: cp.mixed_norm(cp.reshape(r, (2, 2), order="F"), 2, 1)),
    "huber": lambda: fit(lambda r: cp.sum(cp.huber(r, 0.2))),
    "max": lambda: lasso(lambda x: cp.max(x) + cp.maximum(x[0], x[1], 0) - cp.min(x)),
    "max_along": lambda: fit(
        lambda r: cp.sum_squares(r) + cp.sum(cp.max(cp.reshape(r, (2, 2), order="F"), axis=1))
    ),
    "minimum": lambda: lasso(lambda x: -cp.sum(cp.minimum(x, 0.1)) + cp.sum(cp.pos(x))),
    "sum_largest": lambda: lasso(lambda x: cp.sum_largest(x, 2)),
    "cummax": lambda: lasso(lambda x: cp.sum(cp.cummax(x))),
    "dotsort": lambda: lasso(lambda x: cp.dotsort(x, [1, 2])),
    "total_variation": lambda: lasso(cp.tv),
    "support_function": lambda: lasso(
        lambda x: cp.suppfunc(z := cp.Variable(3), [z >= 0, cp.sum(z) <= 1])(x)
    ),
    "lambda_max": lambda: spectral(cp.lambda_max, symmetric=True),
    "lambda_max_general": lambda: spectral(cp.lambda_max),
    "lambda_sum_largest": lambda: spectral(
        lambda X: cp.lambda_sum_largest(X, 2), symmetric=True
    ),
    "sigma_max": lambda: spectral(cp.sigma_max, shape=(2, 3), to=C),
    "nuclear_norm": lambda: spectral(cp.normNuc, shape=(2, 3), to=C),
    "log_det": lambda: spectral(lambda X: -cp.log_det(X + np.eye(3)), symmetric=True),
    "log_det_of_variable": lambda: spectral(lambda X: -cp.log_det(X), symmetric=True),
    "tr_inv": lambda: spectral(lambda X: cp.tr_inv(X + 0.1 * np.eye(3)), symmetric=True),
    "matrix_frac": lambda: spectral(lambda X: cp.matrix_frac(a, X), symmetric=True),
    "exp": lambda: lasso(lambda x: cp.sum(cp.exp(x)) + cp.log_sum_exp(x)),
    "log": lambda: lasso(lambda x: -cp.sum(cp.log(x + 1)) - cp.sum(cp.entr(x)) - cp.log1p(x[0])),
    "cube": lambda: lasso(lambda x: cp.sum(cp.power(x, 3))),
    "inv_pos": lambda: lasso(lambda x: cp.sum(cp.inv_pos(x)) + cp.quad_over_lin(x, x[0] + x[1])),
    "geo_mean": lambda: lasso(lambda x: -cp.geo_mean(x)),
    "kl_div": lambda: lasso(lambda x: cp.sum(cp.kl_div(x, [1, 2, 3]) + cp.rel_entr(x + 1, x))),
    "perspective": lambda: lasso(
        lambda x: cp.perspective(cp.square(z := cp.Variable()) + cp.exp(z), s := cp.Variable(
        nonneg=True)) + cp.square(z - x[0]) + cp.square(s - 1)
    ),
    "kinked_perspective": lambda: lasso(
        lambda x: cp.perspective(cp.abs((z := cp.Variable()) - 1), s := cp.Variable(nonneg=True))
        + cp.square(z - x[0]) + cp.square(s - 1)
    ),
    "concave": lambda: cp.Problem(
        cp.Maximize(cp.sum(cp.sqrt(x := cp.Variable(3)) + cp.log(x))),
        [cp.sum(x) <= 1, x[0] == x[1]],
    ),
}  # fmt: skip

# A tolerance of the values of variables where solution and solver are worse conditioned.
LOOSE = 2e-5


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.filterwarnings("ignore")
def test_minimum_and_duals_are_those_of_the_convex_problem(name):
    problem = CONVEX[name]()
    form = NonlinearForm(problem)
    program, x = minimise(form)
    problem.solve(solver=cp.CLARABEL, **TIGHT)
    assert form.value(program, x).item() == pytest.approx(problem.value, rel=1e-7, abs=1e-7)
    for variable in problem.variables():
        ours = form.recover(variable, x)[0].numpy()
        np.testing.assert_allclose(ours, dense(variable.value), rtol=LOOSE, atol=LOOSE)
    if problem.constraints:
        duals = form.duals(program, x, multipliers_of(program, x))
        for constraint in problem.constraints:
            for dual in constraint.dual_variables:
                ours = duals[dual.id][0].numpy()
                theirs = np.reshape(dual.value, ours.shape)
                np.testing.assert_allclose(ours, theirs, rtol=LOOSE, atol=LOOSE)


# What CVXPY's own way of solving nonlinear programs gets wrong.


def with_parameter(make, value, **attributes):
    p = cp.Parameter(np.shape(value), value=value, **attributes)
    return make(p), p


PARAMETRIC = {
    "denominator_of_quad_over_lin": (
        lambda x, p: cp.quad_over_lin(x - a, p) + cp.sum(x), {"nonneg": True}, (0.5, 2.0)
    ),
    "first_argument_of_rel_entr": (
        lambda x, p: cp.sum(cp.rel_entr(p, x)) + cp.sum(x), {"nonneg": True}, (0.5, 2.0)
    ),
    "second_argument_of_kl_div": (
        lambda x, p: cp.sum(cp.kl_div(x, p)) + cp.sum(x), {"nonneg": True}, (0.5, 2.0)
    ),
    "negative_denominator": (
        lambda x, p: cp.sum(cp.square(x)) + cp.sum(x / p), {}, (-0.5, -2.0)
    ),
    "huber_width": (lambda x, p: cp.sum(cp.huber(x - a, p)) + cp.sum_squares(x), {"nonneg": True},
                    (0.1, 0.5)),
    "exponent": (lambda x, p: cp.sum(cp.power(x, p)) - cp.sum(x), {"nonneg": True}, (1.5, 2.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETRIC)
def test_parameters_keep_no_old_value(name):
    make, attributes, values = PARAMETRIC[name]
    x, p = cp.Variable(3), cp.Parameter(value=values[0], **attributes)
    form = NonlinearForm(cp.Problem(cp.Minimize(make(x, p))))
    for value in values:
        _, found = minimise(form, values=[value])
        fresh = cp.Variable(3)
        expected = cp.Problem(cp.Minimize(make(fresh, cp.Constant(value))))
        expected.solve(solver=cp.CLARABEL, **TIGHT)
        np.testing.assert_allclose(form.recover(x, found)[0], fresh.value, atol=1e-4)


def test_parameter_in_bounds_only():
    p = cp.Parameter(value=0.5)
    x = cp.Variable(3, bounds=[-1, p])
    form = NonlinearForm(cp.Problem(cp.Minimize(cp.sum_squares(x - 2))))
    assert form.parameters == (p,)
    values = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
    program = form.program([values], [True], 2, CPU)
    assert program.upper.tolist() == [[0.25] * 3, [0.75] * 3]
    assert program.lower.tolist() == [[-1] * 3] * 2
    program.upper.sum().backward()
    assert values.grad.tolist() == [3, 3]


def test_parameter_only_constraints_are_checked_at_each_call():
    p, x = cp.Parameter(2), cp.Variable(2)
    constraints = [p <= 1, cp.sum(p) == 1, cp.SOC(p[0], p), cp.norm(p) <= 5]
    form = NonlinearForm(cp.Problem(cp.Minimize(cp.sum_squares(x - p)), constraints))
    values = torch.tensor([[1.0, 0], [2, -1], [0, 1], [np.nan, 1]], dtype=torch.float64)
    found = form.violation(form.program([values], [True], 4, CPU))
    torch.testing.assert_close(found[:3], torch.tensor([0, 1, 1]).double())
    assert found[3] == torch.inf


def test_bounds_that_cross_are_a_violation():
    p = cp.Parameter()
    x = cp.Variable(bounds=[0, p])
    form = NonlinearForm(cp.Problem(cp.Minimize(x)))
    values = torch.tensor([1.0, -0.5], dtype=torch.float64)
    assert form.violation(form.program([values], [True], 2, CPU)).tolist() == [0, 0.5]


def test_a_violation_of_constants_needs_no_parameters():
    x = cp.Variable(2)
    form = NonlinearForm(cp.Problem(cp.Minimize(cp.sum(x)), [cp.Constant(1) <= 0.25, x >= 0]))
    assert form.violation(form.program([], [], 3, CPU)).tolist() == [0.75] * 3


@pytest.mark.parametrize("name", ["boolean", "integer"])
def test_integers_are_refused(name):
    x = cp.Variable(2, name="x", **{name: True})
    with pytest.raises(SpecificationError, match=f"`x` is declared {name}"):
        NonlinearForm(cp.Problem(cp.Minimize(cp.sum_squares(x))))


REFUSED = {
    "complex": (lambda x: cp.norm(cp.Variable(complex=True) + x[0]), "is complex"),
    "kink_from_the_wrong_side": (
        lambda x: -cp.abs(x[0]),
        "the objective contains .*abs.* not smoo",
    ),
    "kink_inside_a_smooth_atom": (lambda x: nlp.sin(cp.max(x)), "the objective contains .*max"),
    "kinked_penalty": (lambda x: cp.sum(truncated_quadratic(x)), "contains .*truncated_quadratic"),
    "no_translation": (lambda x: cp.sum(cp.ceil(x)), "objective contains .*ceil"),
    "problem_within": (lambda x: cp.transforms.indicator([x >= 1]), "problem of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_smooth_form_is_refused_by_name(name):
    make, match = REFUSED[name]
    with pytest.raises(SpecificationError, match=match):
        NonlinearForm(cp.Problem(cp.Minimize(make(cp.Variable(2)))))


def test_refusals_name_the_constraint():
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum(x)), [x >= 0, cp.abs(x) >= 1])
    with pytest.raises(SpecificationError, match=r"constraint 1, .* contains .*abs"):
        NonlinearForm(problem)
    problem = cp.Problem(cp.Minimize(cp.sum(x)), [cp.FiniteSet(x, [1, 2])])
    with pytest.raises(SpecificationError, match=r"constraint 0, .* FiniteSet"):
        NonlinearForm(problem)


def test_parameters_must_be_listed():
    x, p = cp.Variable(), cp.Parameter(name="p")
    with pytest.raises(SpecificationError, match="`p`"):
        NonlinearForm(cp.Problem(cp.Minimize(cp.square(x - p))), parameters=[])


def test_parameters_within_a_perspective_are_known():
    x, s, p = cp.Variable(), cp.Variable(nonneg=True), cp.Parameter(nonneg=True, value=2.0)
    problem = cp.Problem(cp.Minimize(cp.perspective(p * cp.square(x), s)), [s <= 1, x >= 2])
    form = NonlinearForm(problem)
    assert form.parameters == (p,)
    program, found = minimise(form)
    assert form.value(program, found).item() == pytest.approx(8)


# Atoms that CVXPY's rules for nonlinear programs accept, and its solvers do not.

UNUSUAL = {
    "cumsum": lambda x: cp.sum_squares(cp.cumsum(nlp.sin(x)) - 1),
    "cumprod": lambda x: cp.sum_squares(cp.cumprod(x) - 1),
    "kron": lambda x: cp.sum_squares(cp.kron(np.eye(2), cp.reshape(x, (3, 1), order="F")) - 1),
    "concatenate": lambda x: cp.sum_squares(cp.concatenate([x, nlp.cos(x)]) - 1),
    "log1p": lambda x: cp.sum_squares(x) - cp.sum(cp.log1p(x)),
    "log_det": lambda x: cp.sum_squares(x) - cp.log_det(cp.diag(x) + 2 * np.eye(3)),
    "lambda_max": lambda x: cp.lambda_max(cp.diag(x - 1)) + cp.sum_squares(x),
    "pnorm": lambda x: cp.pnorm(x - 1, 3) + cp.sum(nlp.sin(x)) + cp.sum_squares(x),
    "three_axes": lambda x: cp.sum_squares(
        cp.exp(cp.reshape(x, (1, 3, 1), order="F")) - np.ones((2, 3, 1))
    ),
    "penalty": lambda x: cp.sum(welsch(A @ x - b, 2.0)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_atoms_have_minima(name):
    """No neighbour of what is found is lower."""
    x = cp.Variable(3)
    expression = UNUSUAL[name](x)
    form = NonlinearForm(cp.Problem(cp.Minimize(expression)))
    program, found = minimise(form, start=None)
    at = form.recover(x, found)[0].numpy()
    x.value = at
    best = expression.value
    assert form.value(program, found).item() == pytest.approx(best, rel=1e-6, abs=1e-8)
    for step in np.random.default_rng(0).normal(size=(20, 3)):
        x.value = at + 1e-3 * step
        assert expression.value > best - 1e-9


# Starting points.


def start_of(problem, **options):
    form = NonlinearForm(problem)
    program = program_of(form)
    return form, program, form.start(program, **options)


def test_start_without_values():
    free, above, below, between = (
        cp.Variable(2), cp.Variable(nonneg=True), cp.Variable(bounds=[None, -3]),
        cp.Variable(bounds=[1, 4]),
    )  # fmt: skip
    X = cp.Variable((2, 2), PSD=True)
    variables = [free, above, below, between, X]
    form, _, x = start_of(cp.Problem(cp.Minimize(sum(cp.sum(v) for v in variables))))
    expected = [[0, 0], 1, -4, 2.5, [[1, 0], [0, 1]]]
    assert [form.recover(v, x)[0].tolist() for v in variables] == expected


def test_start_from_values_moves_into_bounds_and_domains():
    x, y = cp.Variable(3, value=[-1.0, 0.0, 2.0]), cp.Variable(2, value=[5.0, 0.0])
    problem = cp.Problem(cp.Minimize(-cp.sum(cp.log(x)) + 1 / y[1]), [y <= 3])
    form, _, start = start_of(problem)
    assert form.recover(x, start)[0].tolist() == [0.01, 0.01, 2.0]
    assert form.recover(y, start)[0].tolist() == [3.0, 0.01]


def test_start_leaves_points_without_derivative():
    x, y = cp.Variable(2), cp.Variable(value=0.25)
    expression = cp.sqrt(cp.sum_squares(x)) + 1 / (x[0] - x[1]) + y
    form, _, start = start_of(cp.Problem(cp.Minimize(expression)))
    moved = form.recover(x, start)[0]
    assert ((moved >= 0.5) & (moved <= 1)).all()
    assert moved[0] != moved[1]
    assert form.recover(y, start).item() == 0.25


AUXILIARIES = {
    "none": (lambda x: cp.sum(cp.log(x)) + cp.sum(cp.log(cp.sum_squares(x) + cp.exp(x))), 0),
    "argument_that_may_be_negative": (lambda x: cp.sum(cp.log(x - 1)), 3),
    "used_twice": (lambda x: cp.sum(cp.log(e := x - 1) + cp.sqrt(e) + cp.entr(e)), 3),
    "denominator": (lambda x: cp.sum(1 / (x - 1)), 0),
    "huber": (lambda x: cp.sum(cp.huber(x)), 0),
    "kink": (lambda x: -cp.max(x), 1),
    "kink_twice": (lambda x: -(m := cp.max(x)) - 2 * m, 1),
    "kink_of_parameters": (lambda x: cp.sum(x) * cp.max(cp.Parameter(2)), 0),
}


@pytest.mark.parametrize("name", AUXILIARIES)
def test_auxiliary_variables_only_where_they_are_needed(name):
    make, count = AUXILIARIES[name]
    form = NonlinearForm(cp.Problem(cp.Maximize(make(cp.Variable(3)))))
    assert form.variables == 3 + count


def test_start_given_for_each_element():
    x, p = cp.Variable(2), cp.Parameter(2)
    form = NonlinearForm(cp.Problem(cp.Minimize(cp.sum(cp.abs(x - p)))))
    values, given = torch.rand(3, 2).double(), torch.rand(3, 2).double()
    program = form.program([values], [True], 3, CPU)
    start = form.start(program, given={x.id: given})
    torch.testing.assert_close(form.recover(x, start), given)
    distance = form.value(program, start)  # the variables above abs(x - p) are where they belong
    torch.testing.assert_close(distance, (given - values).abs().sum(1))


@pytest.mark.parametrize("name", [*CONVEX])
@pytest.mark.filterwarnings("ignore")
def test_start_is_finite_and_within_bounds(name):
    _, program, x = start_of(CONVEX[name]())
    assert (x >= program.lower).all()
    assert (x <= program.upper).all()
    parameters = tuple(value[0] for value in program.parameters)
    for function in (program.objective, program.equality, program.inequality):
        if function is not None:
            value = jacrev(lambda y, f=function: f(y, parameters))(x[0])
            assert value.isfinite().all()


def test_random_starts_keep_to_sample_bounds_and_to_the_seed():
    x, y, z = cp.Variable(2), cp.Variable(bounds=[0, 1]), cp.Variable(value=3.0)
    x.sample_bounds = (-5, [-4, 7])
    form = NonlinearForm(cp.Problem(cp.Minimize(cp.sum(x) + y + z)))
    program = form.program([], [], 50, CPU)
    starts = [form.start(program, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    drawn = form.recover(x, starts[0])
    assert drawn.min() >= -5
    assert (drawn <= torch.tensor([-4, 7])).all()
    assert drawn[:, 1].max() > -4
    assert len(form.recover(y, starts[0]).unique()) == 50
    assert (form.recover(z, starts[0]) == 3).all()
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


# Programs.


def test_batches_share_or_have_their_own_parameters():
    x, p, q = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p) + q * x[0]), [nlp.sin(x) <= q])
    form = NonlinearForm(problem, parameters=[q, p])
    qs, ps = torch.rand(3).double(), torch.rand(2).double()
    program = form.program([qs, ps], [True, False], 3, CPU)
    assert [v.shape for v in program.parameters] == [(3,), (1, 2)]
    assert program.inequality is not None
    assert program.equality is None
    points = torch.rand(3, 2).double()
    expected = ((points - ps) ** 2).sum(1) + qs * points[:, 0]
    torch.testing.assert_close(form.value(program, points), expected)
    part = program.select(torch.tensor([1]))
    torch.testing.assert_close(
        part.inequality(points[1], (part.parameters[0][0], ps)), points[1].sin() - qs[1]
    )


def test_maximum_is_a_minimum_of_the_opposite():
    x = cp.Variable()
    form = NonlinearForm(cp.Problem(cp.Maximize(1 - cp.square(x - 1))))
    program, found = minimise(form)
    assert form.maximize
    assert program.objective(found[0], ()).item() == pytest.approx(-1)
    assert form.value(program, found).item() == pytest.approx(1)


def test_gradient_by_parameters_goes_through_the_functions():
    x, p = cp.Variable(2), cp.Parameter(2)
    form = NonlinearForm(cp.Problem(cp.Minimize(cp.sum(cp.multiply(p, nlp.sin(x))))))
    at, values = torch.rand(2).double(), torch.rand(2).double()
    program = form.program([values], [False], 1, CPU)
    slope = grad(lambda v: program.objective(at, (v,)))(values)
    torch.testing.assert_close(slope, at.sin())


def test_a_problem_is_left_as_it_is():
    x, p = cp.Variable(3, bounds=[-1, 1]), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.norm1(x - p) + cp.sum(nlp.sin(x))), [cp.max(x) <= 1])
    before = str(problem)
    form = NonlinearForm(problem)
    form.start(form.program([torch.zeros(3)], [False], 1, CPU))
    assert str(problem) == before
    assert x.value is None
    assert p.value is None


# Nonconvex problems with known minima.


def test_nearest_point_outside_a_circle():
    x, radius = cp.Variable(2, value=[0.5, 0.1]), cp.Parameter(value=2.0)
    target = np.array([0.6, 0.8])
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - target)), [cp.sum_squares(x) >= cp.square(radius)]
    )
    form = NonlinearForm(problem)
    program, found = minimise(form)
    np.testing.assert_allclose(form.recover(x, found)[0], 2 * target, atol=1e-7)
    dual = form.duals(program, found, multipliers_of(program, found))
    # 2 (x - t) = 2 dual x  with  x = 2 t.
    assert dual[problem.constraints[0].dual_variables[0].id].item() == pytest.approx(0.5)


def test_rosenbrock_with_a_parameter():
    x, y, p = cp.Variable(value=-1.0), cp.Variable(value=1.0), cp.Parameter(value=100.0)
    form = NonlinearForm(cp.Problem(cp.Minimize((1 - x) ** 2 + p * (y - x**2) ** 2)))
    _, found = minimise(form)
    np.testing.assert_allclose(found[0], [1, 1], atol=1e-6)


def test_packing_two_circles_in_a_square():
    """Half the diagonal of a square of side 1 - 2 r is r: r = 1 / (2 + sqrt(2))."""
    centres, r = cp.Variable((2, 2), value=[[0.2, 0.3], [0.8, 0.7]]), cp.Variable(value=0.1)
    apart = cp.norm(centres[0] - centres[1])
    constraints = [r <= centres, centres <= 1 - r, apart >= 2 * r]
    with pytest.raises(SpecificationError, match=r"constraint 2"):
        NonlinearForm(cp.Problem(cp.Maximize(r), constraints))
    constraints[2] = cp.sum_squares(centres[0] - centres[1]) >= 4 * cp.square(r)
    form = NonlinearForm(cp.Problem(cp.Maximize(r), constraints))
    program, found = minimise(form)
    assert form.value(program, found).item() == pytest.approx(1 / (2 + 2**0.5))


def test_denominators_may_have_either_sign():
    """Stationary points of x + 1 / x are -1 (a maximum) and 1 (a minimum)."""
    for start, sign in ((0.3, 1), (-0.3, -1)):
        x = cp.Variable(value=start)
        goal = cp.Minimize if sign > 0 else cp.Maximize
        form = NonlinearForm(cp.Problem(goal(x + 1 / (2 * x))))
        _, found = minimise(form)
        assert form.recover(x, found).item() == pytest.approx(sign / 2**0.5, rel=1e-6)
