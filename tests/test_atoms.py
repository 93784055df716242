"""Penalties as CVXPY atoms: rules, numbers, printing, parameters, and cone programs."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpy.reductions.dnlp2smooth.dnlp2smooth import Dnlp2Smooth

from declarative_cvx import DeclarativeLayer, ParameterError, SpecificationError, classify
from declarative_cvx.atoms import (
    PenaltyAtom,
    cauchy,
    geman_mcclure,
    penalty_atom,
    pseudo_huber,
    truncated_quadratic,
    tukey,
    welsch,
)
from declarative_cvx.penalties import PENALTIES, Penalty

# phi(z; alpha), in numpy.
FORMULAS = {
    pseudo_huber: lambda z, a: a**2 * (np.sqrt(1 + (z / a) ** 2) - 1),
    welsch: lambda z, a: 1 - np.exp(-(z**2) / (2 * a**2)),
    truncated_quadratic: lambda z, a: np.minimum(z**2, a**2) / 2,
    cauchy: lambda z, a: a**2 / 2 * np.log(1 + (z / a) ** 2),
    geman_mcclure: lambda z, a: z**2 / (2 * (1 + (z / a) ** 2)),
    tukey: lambda z, a: a**2 / 6 * (1 - np.maximum(1 - (z / a) ** 2, 0) ** 3),
}
ATOMS = tuple(FORMULAS)
NONCONVEX = ATOMS[1:]
EVERY = pytest.mark.parametrize("atom", ATOMS, ids=lambda atom: atom.__name__)
SHAPES = (((), ()), ((), (4,)), ((3,), ()), ((3,), (3,)), ((2, 3), (3,)), ((2, 3, 2), (3, 1)))
BROADCAST = pytest.mark.parametrize(("shape", "alpha_shape"), SHAPES)


class Logcosh(Penalty):
    """log(cosh(r)): a penalty of the user's own."""

    name = "logcosh"
    convex = True

    def rho(self, r: torch.Tensor) -> torch.Tensor:
        return r.abs() + torch.nn.functional.softplus(-2 * r.abs()) - math.log(2)


def draw(shape: tuple[int, ...], alpha_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    return 1.5 * random.normal(size=shape), random.uniform(0.4, 2.0, alpha_shape)


def regression(alpha: float | cp.Parameter) -> tuple[cp.Variable, cp.Parameter, cp.Problem]:
    """Pseudo-Huber regression with two unknowns and six observations, three of them a parameter."""
    random = np.random.default_rng(3)
    A, x, b = random.normal(size=(6, 2)), cp.Variable(2), cp.Parameter(6, name="b")
    return x, b, cp.Problem(cp.Minimize(cp.sum(pseudo_huber(A @ x - b, alpha))))


# Values, gradients, shapes


@EVERY
@BROADCAST
def test_values_are_those_of_the_formula(atom, shape, alpha_shape):
    z, alpha = draw(shape, alpha_shape)
    x = cp.Variable(shape, value=z)
    expected = FORMULAS[atom](z, alpha)
    expression = atom(x, alpha)
    assert expression.shape == expected.shape
    np.testing.assert_allclose(expression.value, expected, rtol=1e-13, atol=1e-15)
    constant = atom(z, alpha)
    assert constant.is_constant()
    np.testing.assert_allclose(constant.value, expected, rtol=1e-13, atol=1e-15)


@EVERY
@BROADCAST
def test_gradients_are_those_of_central_differences(atom, shape, alpha_shape):
    z, alpha = draw(shape, alpha_shape)
    x = cp.Variable(shape, value=z)
    expression = atom(2 * x - 0.3, alpha)
    found = expression.grad[x]
    found = found.toarray() if x.size * expression.size > 1 else np.reshape(found, (1, 1))
    step = 1e-6
    for entry in range(x.size):
        shift = step * (np.arange(x.size) == entry).reshape(shape, order="F")
        x.value = z + shift
        above = expression.value
        x.value = z - shift
        central = (above - expression.value) / (2 * step)
        np.testing.assert_allclose(found[entry], central.ravel(order="F"), atol=1e-8)


def test_gradient_at_a_kink_is_that_from_the_side_of_zero():
    x = cp.Variable(2, value=[0.5, -0.5])
    assert truncated_quadratic(x, 0.5).grad[x].diagonal() == pytest.approx([0.5, -0.5])


def test_no_value_gives_no_value():
    x, alpha = cp.Variable(3), cp.Parameter(pos=True)
    assert welsch(x).value is None
    assert welsch(x).grad[x] is None
    x.value = np.ones(3)
    assert welsch(x, alpha).value is None
    assert welsch(cp.Variable(0, value=[])).value.size == 0


@EVERY
def test_a_changed_parameter_changes_the_value(atom):
    z = np.array([0.3, -2.0])
    x, alpha = cp.Variable(2, value=z), cp.Parameter(pos=True)
    doubled = atom(x, 2 * alpha)
    for scale in (0.5, 3.0):
        alpha.value = scale
        np.testing.assert_allclose(atom(x, alpha).value, FORMULAS[atom](z, scale))
        np.testing.assert_allclose(doubled.value, FORMULAS[atom](z, 2 * scale))
        assert doubled.grad[x].shape == (2, 2)


# What CVXPY's rules say


@EVERY
def test_curvature_is_declared_rightly(atom):
    x, b, alpha = cp.Variable(3), cp.Parameter(3), cp.Parameter(pos=True)
    expression = atom(x - b, alpha)
    problem = cp.Problem(cp.Minimize(cp.sum(expression)))
    convex = atom is pseudo_huber
    assert problem.is_dcp() == problem.is_dpp() == expression.is_convex() == convex
    assert not expression.is_concave()
    assert not cp.Problem(cp.Maximize(cp.sum(expression))).is_dcp()
    assert expression.is_quasiconvex()
    assert not expression.is_quasiconcave()
    smooth = atom is not truncated_quadratic
    assert problem.is_dnlp() == expression.is_smooth() == smooth
    assert classify(problem).is_convex == convex


@EVERY
def test_sign_and_monotonicity_are_declared_rightly(atom):
    x, up, down = cp.Variable(2), cp.Variable(2, nonneg=True), cp.Variable(2, nonpos=True)
    assert atom(x).is_nonneg()
    assert not atom(x).is_nonpos()
    assert [atom(v).is_incr(0) for v in (x, up, down)] == [False, True, False]
    assert [atom(v).is_decr(0) for v in (x, up, down)] == [False, False, True]
    assert not atom(up).is_incr(1)
    assert atom(x).domain == []
    lower, upper = atom(x).get_bounds()
    assert (lower == 0).all()
    assert np.isinf(upper).all()


def test_the_composition_rule_holds_for_the_convex_one():
    x = cp.Variable(2)
    assert pseudo_huber(cp.square(x)).is_dcp()
    assert pseudo_huber(-cp.square(x)).is_dcp()
    assert not pseudo_huber(cp.square(x) - 1).is_dcp()
    assert not welsch(cp.square(x)).is_dcp()


def test_parameters_within_are_dpp_where_they_are_affine():
    x, a, c = cp.Variable(2), cp.Parameter(pos=True), cp.Parameter(pos=True)
    assert pseudo_huber(a * x, a + 2 * c).is_dpp()
    assert not pseudo_huber(x, a * c).is_dpp()
    assert not pseudo_huber(x, cp.exp(c)).is_dpp()
    assert pseudo_huber(x, cp.exp(c)).is_dcp()
    assert welsch(x, cp.exp(c)).is_dnlp()


@EVERY
def test_constants_are_constant(atom):
    p = cp.Parameter(2, value=[0.1, 4.0])
    expression = atom(p)
    assert expression.is_constant()
    assert expression.is_convex()
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum(x)), [x >= expression])
    with warnings.catch_warnings(action="ignore"):
        problem.solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(x.value, FORMULAS[atom](p.value, 1.0), atol=1e-7)


# Use in larger expressions


@EVERY
def test_prints_as_it_is_written(atom):
    x, y = cp.Variable(3, name="x"), cp.Variable(3, name="y")
    alpha = cp.Parameter(pos=True, name="alpha")
    name = atom.__name__
    assert str(atom(x)) == f"{name}(x, 1.0)"
    assert str(atom(x + y, alpha)[0]) == f"{name}(x + y, alpha)[0]"
    assert atom(x.set_label("residual"), alpha).format_labeled() == f"{name}(residual, alpha)"
    assert atom(x).set_label("cost").format_labeled() == "cost"


def test_works_in_larger_expressions():
    random = np.random.default_rng(0)
    A, b, z = random.normal(size=(5, 3)), random.normal(size=5), random.normal(size=3)
    x, alpha = cp.Variable(3, value=z), cp.Parameter(pos=True, value=0.6)
    expression = 2 * cp.sum(welsch(A @ x - b, alpha)) + cp.norm1(x)
    costs = FORMULAS[welsch](A @ z - b, 0.6)
    assert expression.value == pytest.approx(2 * costs.sum() + np.abs(z).sum())
    assert expression.parameters() == [alpha]
    assert expression.variables() == [x]
    assert welsch(A @ x - b, alpha)[1:3].value == pytest.approx(costs[1:3])
    assert (-welsch(A @ x - b, alpha)).is_nonpos()
    assert PenaltyAtom in cp.Problem(cp.Minimize(expression)).atoms()


@EVERY
def test_copies_are_the_same_function(atom):
    x, alpha = cp.Variable(2, value=[0.4, -3.0]), cp.Parameter(pos=True, value=0.7)
    original = atom(x, alpha)
    for twin in (
        copy.copy(original),
        copy.deepcopy(original),
        original.tree_copy(),
        pickle.loads(pickle.dumps(original)),
    ):
        assert twin.penalty == original.penalty
        np.testing.assert_array_equal(twin.value, original.value)
    y = cp.Variable(2, value=[1.0, 2.0])
    np.testing.assert_array_equal(original.copy([y, alpha]).value, atom(y, alpha).value)
    deep = copy.deepcopy(original)
    deep.parameters()[0].value = 2.0
    assert original.value[1] == pytest.approx(FORMULAS[atom](3.0, 0.7))


# Penalties by name, and the user's own


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_has_an_expression(name):
    z = np.array([0.2, -0.9, 5.0])
    x = cp.Variable(3, value=z)
    expression = penalty_atom(name, x, 0.8)
    expected = PENALTIES[name].value(torch.from_numpy(z), 0.8).numpy()
    np.testing.assert_allclose(expression.value, expected)
    assert expression.is_convex() == PENALTIES[name].convex


def test_huber_is_that_of_cvxpy():
    x = cp.Variable(name="x")
    assert str(penalty_atom("huber", x, 0.5)) == "huber(x, 0.5) / 2.0"


def test_a_penalty_of_the_users_own_is_an_atom():
    x = cp.Variable(3, name="x", value=[0.1, -1.0, 20.0])
    expression = penalty_atom(Logcosh(), x, 0.5)
    np.testing.assert_allclose(expression.value, 0.25 * np.log(np.cosh(x.value / 0.5)))
    np.testing.assert_allclose(expression.grad[x].diagonal(), 0.5 * np.tanh(x.value / 0.5))
    assert str(expression) == "logcosh(x, 0.5)"
    assert expression.is_convex()
    assert pickle.loads(pickle.dumps(expression)).penalty == Logcosh()
    with pytest.raises(SpecificationError, match=r"`logcosh\(x, 0.5\)` is convex, but its cone"):
        cp.Problem(cp.Minimize(cp.sum(expression))).solve(solver=cp.CLARABEL)


# Pseudo-Huber problems are solved


@BROADCAST
def test_cone_solvers_minimise_pseudo_huber(shape, alpha_shape):
    z, scale = draw(shape, alpha_shape)
    x, alpha = cp.Variable(shape), cp.Parameter(alpha_shape, pos=True)
    costs = pseudo_huber(x - z, alpha)
    weight = 1 + np.arange(costs.size).reshape(costs.shape) / 10
    cost = cp.sum(cp.multiply(weight, costs)) + cp.sum_squares(x) / 2
    problem = cp.Problem(cp.Minimize(cost))
    assert problem.is_dpp()
    for factor in (1.0, 0.01, 30.0):
        alpha.value = factor * scale
        with warnings.catch_warnings(action="ignore"):
            value = problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12)
        assert value == pytest.approx(problem.objective.value, rel=1e-7)
        r = torch.as_tensor(x.value - z)
        slope = weight * PENALTIES["pseudo_huber"].slope(r, torch.as_tensor(alpha.value)).numpy()
        total = slope if slope.shape == shape else slope.sum()
        np.testing.assert_allclose(total, -x.value, atol=1e-5)


def test_the_cone_form_holds_in_constraints_compositions_and_complex_problems():
    x, alpha = cp.Variable(), cp.Parameter(pos=True, value=2.0)
    cp.Problem(cp.Maximize(x), [pseudo_huber(x, alpha) <= 3]).solve(solver=cp.CLARABEL)
    assert FORMULAS[pseudo_huber](x.value, 2.0) == pytest.approx(3, abs=1e-6)
    nested = cp.square(pseudo_huber(cp.square(x), alpha))
    cp.Problem(cp.Maximize(x), [nested <= 3]).solve(solver=cp.CLARABEL)
    assert nested.value == pytest.approx(3, abs=1e-5)
    z = cp.Variable(complex=True)
    distance = pseudo_huber(cp.abs(z - (3 + 4j)), alpha)
    value = cp.Problem(cp.Minimize(distance), [cp.abs(z) <= 2]).solve(solver=cp.CLARABEL)
    assert value == pytest.approx(FORMULAS[pseudo_huber](3.0, 2.0), abs=1e-6)


def test_problems_that_are_not_dpp_are_solved_too():
    x, p = cp.Variable(), cp.Parameter(value=0.4)
    problem = cp.Problem(cp.Minimize(pseudo_huber(x - 3, cp.exp(p)) + x / 2))
    with pytest.warns(UserWarning, match="not DPP"):
        value = problem.solve(solver=cp.CLARABEL)
    assert value == pytest.approx(FORMULAS[pseudo_huber](x.value - 3, np.exp(0.4)) + x.value / 2)


def test_a_layer_differentiates_through_data_and_scale():
    alpha = cp.Parameter(pos=True, name="alpha")
    x, b, problem = regression(alpha)
    layer = DeclarativeLayer(problem, parameters=[b, alpha], variables=[x])
    torch.manual_seed(0)
    data = 2 * torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    scale = (torch.rand(4, dtype=torch.float64) + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda *values: layer(*values)[0], (data, scale))
    with pytest.raises(ParameterError, match=r"'alpha'.*must be positive"):
        layer(data, -scale)


def test_the_layers_gradient_is_that_of_the_implicit_function_theorem():
    alpha = cp.Parameter(pos=True)
    x, b, problem = regression(alpha)
    A = np.random.default_rng(3).normal(size=(6, 2))
    layer = DeclarativeLayer(problem, parameters=[b, alpha], variables=[x])
    torch.manual_seed(1)
    data = torch.randn(6, dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64)
    by_data, by_scale = torch.autograd.functional.jacobian(
        lambda *values: layer(*values)[0], (data, scale)
    )
    A = torch.from_numpy(A)
    r = A @ layer(data, scale)[0] - data
    penalty = PENALTIES["pseudo_huber"]
    hessian = A.T @ (penalty.curvature(r, scale)[:, None] * A)
    expected = torch.linalg.solve(hessian, A.T * penalty.curvature(r, scale))
    torch.testing.assert_close(by_data, expected, rtol=1e-6, atol=1e-8)
    expected = -torch.linalg.solve(hessian, A.T @ penalty.slope_by_alpha(r, scale))
    torch.testing.assert_close(by_scale, expected, rtol=1e-6, atol=1e-8)


# Refusals


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (0, "alpha, `0.*`, is 0; it must be positive and finite"),
        (-1.5, "alpha, `-1.5`, is -1.5"),
        (np.nan, "is nan; it must be positive"),
        (np.inf, "is inf; it must be positive"),
        ([1.0, 2.0, -3.0], r"entry \[2\] of alpha, .* is -3"),
        (np.ones(4), r"has shape \(4,\), which does not broadcast with the shape \(3,\)"),
        (1j, "alpha, `1j`, is complex"),
        (cp.Variable(name="s", pos=True), "alpha, `s`, depends on variables"),
        (cp.Parameter(name="p"), r"Parameter `p`, is not declared .* cp.Parameter\(pos=True\)"),
        (cp.Parameter(3, nonneg=True), r"make it cp.Parameter\(\(3,\), pos=True\)"),
        (cp.Parameter(name="p") + 1, "`p .* 1.0`, is not known to be positive"),
    ],
    ids=str,
)
def test_a_wrong_scale_is_refused(alpha, message):
    for atom in (welsch, pseudo_huber):
        with pytest.raises(SpecificationError, match=message) as error:
            atom(cp.Variable(3), alpha)
        assert str(error.value).startswith(atom.__name__)


def test_complex_residuals_are_refused():
    with pytest.raises(SpecificationError, match="tukey: x, `z`, is complex"):
        tukey(cp.Variable(complex=True, name="z"))


def test_a_scale_that_turns_out_zero_is_refused():
    p = cp.Parameter(2, nonneg=True, name="p", value=[1.0, 0.0])
    expression = pseudo_huber(cp.Variable(2, value=[1.0, 1.0]), 2 * p)
    for read in (lambda: expression.value, lambda: expression.grad):
        with pytest.raises(SpecificationError, match=r"entry \[1\] of alpha, .* is 0; it must"):
            read()


def test_an_unknown_penalty_is_refused():
    with pytest.raises(SpecificationError, match="Did you mean 'tukey'"):
        penalty_atom("tuckey", cp.Variable())


@pytest.mark.parametrize("atom", NONCONVEX, ids=lambda atom: atom.__name__)
def test_cvxpys_solvers_refuse_nonconvex_problems(atom):
    problem = cp.Problem(cp.Minimize(cp.sum(atom(cp.Variable(2) - 1))))
    with pytest.raises(cp.DCPError, match=atom.__name__):
        problem.solve()


@pytest.mark.parametrize("atom", [truncated_quadratic, tukey], ids=lambda atom: atom.__name__)
def test_cvxpys_nonlinear_solvers_refuse_what_they_do_not_know(atom):
    problem = cp.Problem(cp.Minimize(cp.sum(atom(cp.Variable(2) - 1))))
    with pytest.raises(SpecificationError, match=f"nonlinear solvers do not know `{atom.__name__}"):
        Dnlp2Smooth().apply(problem)


@pytest.mark.parametrize("atom", [pseudo_huber, welsch, cauchy, geman_mcclure],
                         ids=lambda atom: atom.__name__)  # fmt: skip
@pytest.mark.parametrize("alpha", [0.7, np.array([[0.5], [2.0]])], ids=["scalar", "broadcast"])
def test_smooth_forms_have_the_same_value(atom, alpha):
    """At a point where the auxiliary variables are what the constraints say, as they start."""
    x = cp.Variable(3, value=[0.3, -2.0, 1.5])
    objective = cp.sum(atom(2 * x - 1, alpha))
    smooth, _ = Dnlp2Smooth().apply(cp.Problem(cp.Minimize(objective)))
    assert not any(isinstance(node, PenaltyAtom) for node in smooth.atoms())
    assert smooth.objective.value == pytest.approx(float(objective.value), rel=1e-12)
    for constraint in smooth.constraints:
        np.testing.assert_allclose(constraint.violation(), 0.0, atol=1e-12)
