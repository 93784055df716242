"""CVXPY's problems as cone programs with parameters: the data, in the row order of `Cone`."""

from __future__ import annotations

from collections.abc import Sequence

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cvxpy.reductions.chain import Chain
from numpy.testing import assert_allclose, assert_array_equal

import declarative_cvx as dcx
from declarative_cvx import param_data
from declarative_cvx.canonical import ENTRIES_PER_CONSTRAINT, ParamConeProgram, canonicalize
from declarative_cvx.cones import Cone
from declarative_cvx.errors import SpecificationError
from declarative_cvx.param_data import Coefficients, ParamData

CPU = torch.device("cpu")


def every_cone() -> tuple[cp.Problem, list[cp.Parameter]]:
    """Several cones of every kind, one of them with a matrix of heads and vectors."""
    rng = np.random.default_rng(0)
    x, X = cp.Variable(6), cp.Variable((3, 3), symmetric=True)
    E, f, c = cp.Parameter((2, 6)), cp.Parameter(2), cp.Parameter(6)
    S, level = cp.Parameter((3, 3), symmetric=True), cp.Parameter(3)
    vectors = cp.reshape(rng.standard_normal((12, 6)) @ x, (4, 3), order="F")
    constraints = [
        E @ x == f,
        rng.standard_normal((4, 6)) @ x <= 1,
        cp.SOC(level + x[:3], vectors),
        cp.norm(x) <= 3,
        X + S >> 0,
        cp.diag(X) == level,
        cp.ExpCone(x[:2], x[2:4], x[4:] + 2),
        cp.PowCone3D(x[:2] + 1, x[2:4] + 2, x[4:], [0.3, 0.6]),
    ]
    objective = cp.Maximize(c @ x - cp.trace(X))
    return cp.Problem(objective, constraints), [E, f, c, S, level]


def quadratic(n: int) -> tuple[cp.Problem, list[cp.Parameter]]:
    x, Q, q = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    D = np.diag(np.full(n - 1, 0.3), 1) + np.eye(n)
    objective = cp.sum_squares(Q @ x - q) + cp.quad_form(x, D + D.T) + q @ x
    return cp.Problem(cp.Minimize(objective), [x >= 0, cp.sum(x) == 1]), [Q, q]


def draw(parameters: Sequence[cp.Parameter]) -> list[torch.Tensor]:
    """Values, which the parameters are given too."""
    rng = np.random.default_rng(1)
    for parameter in parameters:
        value = rng.standard_normal(parameter.shape)
        parameter.value = value + value.T if parameter.attributes["symmetric"] else value
    return [torch.as_tensor(parameter.value) for parameter in parameters]


def dense(canonical: ParamConeProgram, values: list[torch.Tensor]) -> dict[str, np.ndarray]:
    program, constant = canonical.apply(values, [False] * len(values), 1, CPU)
    structure, found = program.structure, {"q": program.q[0], "b": program.b[0], "d": constant}
    arrays = {name: value.numpy() for name, value in found.items()}
    for name, pattern in (("P", structure.P), ("A", structure.A)):
        arrays[name] = np.zeros(pattern.shape)
        arrays[name][pattern.rows, pattern.cols] = getattr(program, name)[0].numpy()
    return arrays


def test_rows_are_those_that_cvxpy_hands_to_a_solver_with_the_same_order() -> None:
    problem, parameters = every_cone()
    canonical = canonicalize(problem, parameters)
    structure = canonical.structure
    assert canonical.fixed is None
    assert structure.elimination is None  # so that nothing has been moved
    ours = dense(canonical, draw(parameters))
    data, *_ = problem.get_problem_data(cp.SCS)  # for these values, formatted by CVXPY
    assert_allclose(ours["A"], data["A"].toarray(), atol=1e-14)
    assert_allclose(ours["b"], data["b"], atol=1e-14)
    assert_allclose(ours["q"], data["c"], atol=1e-14)
    sizes = structure.cone.sizes
    assert all(sizes.values())
    assert structure.cone.soc == (5, 5, 5, 7)
    assert structure.cone.power == (0.3, 0.6)


def test_only_the_symmetric_parts_of_stacked_matrices_are_semidefinite() -> None:
    """Of an unsymmetric matrix the other part is free; the multipliers are 2 (X - C)."""
    C = np.random.default_rng(4).standard_normal((2, 3, 3))
    X, given = cp.Variable((2, 3, 3)), cp.Parameter((2, 3, 3))
    semidefinite = cp.PSD(X)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - given)), [semidefinite])
    layer = dcx.DeclarativeLayer(problem, [given], [X, semidefinite.dual_variables[0]])
    found, multipliers = layer(torch.as_tensor(C))
    values, vectors = np.linalg.eigh((C + C.mT) / 2)
    expected = (vectors * np.maximum(values, 0)[:, None]) @ vectors.mT + (C - C.mT) / 2
    assert_allclose(found, expected, atol=1e-10)
    assert_allclose(multipliers, 2 * (expected - C), atol=1e-10)


@pytest.mark.parametrize("build", [every_cone, lambda: quadratic(4), lambda: quadratic(12)])
@pytest.mark.parametrize("backend", [cp.CPP_CANON_BACKEND, cp.SCIPY_CANON_BACKEND, "COO"])
def test_every_canonicalisation_backend_gives_the_same_data(build, backend) -> None:
    problem, parameters = build()
    values = draw(parameters)
    default, named = (canonicalize(problem, parameters, False, name) for name in (None, backend))
    for pattern in ("P", "A"):
        one, other = (getattr(c.structure, pattern) for c in (default, named))
        assert_array_equal(one.rows, other.rows)
        assert_array_equal(one.cols, other.cols)
    one, other = dense(default, values), dense(named, values)
    for name in one:
        assert_allclose(one[name], other[name], rtol=1e-13, atol=1e-14)


def test_the_sizes_above_are_on_both_sides_of_the_choice_of_a_backend() -> None:
    counts = []
    for n in (4, 12):
        problem, parameters = quadratic(n)
        allowed = ENTRIES_PER_CONSTRAINT * (1 + len(problem.constraints))
        counts.append(sum(p.size for p in parameters) > allowed)
    assert counts == [False, True]


def test_reductions_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, apply = [], Chain.apply
    monkeypatch.setattr(Chain, "apply", lambda *a, **k: (calls.append(a), apply(*a, **k))[1])
    problem, parameters = quadratic(4)
    dcx.DeclarativeLayer(problem, parameters, problem.variables())
    assert len(calls) == 1


def test_infinite_bounds_say_nothing_and_have_no_multipliers() -> None:
    x, p = cp.Variable(3), cp.Parameter(3)
    upper = x <= np.array([0.5, np.inf, 0.5])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [upper, x >= -np.inf])
    layer = dcx.DeclarativeLayer(problem, [p], [x, upper.dual_variables[0]])
    found, multipliers = layer(torch.tensor([1.0, 9.0, 0.0], dtype=torch.float64))
    assert_allclose(found, [0.5, 9.0, 0.0], atol=1e-12)
    assert_allclose(multipliers, [1.0, 0.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    "constraint",
    [
        lambda x: x >= np.inf,
        lambda x: x == np.array([np.inf, 0.0]),
        lambda x: cp.SOC(cp.Constant(np.inf), x),
    ],
)
def test_infinity_elsewhere_is_refused(constraint) -> None:
    x, p = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [constraint(x)])
    with pytest.raises(SpecificationError, match="infinite or NaN"):
        dcx.DeclarativeLayer(problem, [p], [x])


@pytest.mark.parametrize("table", [0, param_data.TABLE])
def test_data_are_the_coefficients_times_the_parameters(
    table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P given by one triangle, and two columns of a symmetric parameter that share a value."""
    monkeypatch.setattr(param_data, "TABLE", table)
    n, m, columns = 3, 4, 6  # the last of them is the constant 1
    rng = np.random.default_rng(2)
    P, q, Ab = (
        sp.csr_array(rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < 0.3))
        for rows in (n * n, n + 1, m * (n + 1))
    )
    P = sp.csr_array(P.toarray() * np.triu(np.ones((n, n))).reshape(-1, 1))
    first, second = np.arange(columns), np.array([0, 2, 1, 3, 4, 5])
    parts = [Coefficients.of(matrix).shared(first, second) for matrix in (P, q, Ab)]
    data = ParamData.of(*parts, n, Cone(zero=1, nonneg=3))
    parameters = rng.standard_normal(columns - 1)
    blocks = data.map([columns - 1])(CPU, torch.as_tensor(parameters[None]))
    vector = np.append(parameters, 1.0)
    swapped = (vector[first] + vector[second]) / 2
    P_values, q_values, Ab_values = (matrix @ swapped for matrix in (P, q, Ab))
    P_values = (P_values.reshape(n, n) + P_values.reshape(n, n).T) / 2
    Ab_values = Ab_values.reshape(m, n + 1)
    expected = {
        "P": P_values[data.structure.P.rows, data.structure.P.cols],
        "q": q_values[:n],
        "A": Ab_values[data.structure.A.rows, data.structure.A.cols],
        "b": Ab_values[:, n],
        "d": q_values[n:],
    }
    for block, value in zip(blocks, expected.values(), strict=True):
        assert_allclose(block[0], value, atol=1e-14)
    assert data.structure.P.nnz == np.count_nonzero(P_values)
    assert data.structure.A.nnz == np.count_nonzero(Ab_values[:, :n])


def test_constants_are_what_depends_on_no_parameter() -> None:
    """Entries with a parameter only, with a constant only, and with both."""
    Ab = sp.csr_array(np.array([[2.0, 0], [0, 3], [4, 5], [0, 0]]))  # (A, b) of shape (2, 2)
    nothing = Coefficients(*np.zeros((3, 0), dtype=np.int64))
    data = ParamData.of(nothing, nothing, Coefficients.of(Ab), 1, Cone(nonneg=2))
    assert_array_equal(data.constants(1), [np.nan, np.nan])
    turned = Coefficients.of(sp.csr_array(Ab[:, ::-1]))
    data = ParamData.of(nothing, nothing, turned, 1, Cone(nonneg=2))
    assert_array_equal(data.constants(1), [2.0, np.nan])
