"""Every wrong input is refused by the library's own exceptions, naming what is wrong."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cvxpy.atoms.affine.wraps import nsd_wrap, psd_wrap
from torch import Tensor

from declarative_cvx import (
    BackendError,
    Clarabel,
    DeclarativeError,
    DeclarativeLayer,
    MissingBackendError,
    ParameterError,
    SpecificationError,
)
from declarative_cvx.backends import BACKENDS, Answer, Point
from declarative_cvx.compiled import MODULE
from declarative_cvx.host import HostProgram


@dataclass(frozen=True, kw_only=True)
class Counting(Clarabel):
    """Records every call, to show that a solver was not reached."""

    calls: list[int] = field(default_factory=list)

    def solve(self, program: HostProgram, start: Point | None = None) -> Answer:
        self.calls.append(program.batch)
        return super().solve(program, start)


def assert_names(error: pytest.ExceptionInfo[DeclarativeError], *words: str) -> None:
    assert isinstance(error.value, DeclarativeError)
    for word in words:
        assert word in str(error.value), f"{word!r} not in {error.value}"


# Problems


def _x(n: int = 2, **attributes: Any) -> cp.Variable:
    return cp.Variable(n, name="x", **attributes)


def _product_of_parameters() -> cp.Problem:
    a, b, x = cp.Parameter(2, name="alpha"), cp.Parameter(2, name="beta"), _x()
    return cp.Problem(cp.Minimize(cp.multiply(cp.multiply(a, b), x) @ np.ones(2)), [x >= 0])


def _quadratic_form_in_a_constraint() -> cp.Problem:
    P, x = cp.Parameter((2, 2), PSD=True, name="sigma"), _x()
    return cp.Problem(cp.Minimize(cp.sum(x)), [cp.quad_form(x, P) <= 1])


def _division_by_a_parameter() -> cp.Problem:
    a, x = cp.Parameter(pos=True, name="alpha"), _x()
    return cp.Problem(cp.Minimize(cp.sum_squares(x) / a), [x >= 1])


def _square_of_a_parameter() -> cp.Problem:
    a, x = cp.Parameter(name="alpha"), _x()
    return cp.Problem(cp.Minimize(cp.square(a) * cp.sum(x)), [x >= 0])


def _weight_of_unknown_sign() -> cp.Problem:
    a, x = cp.Parameter(name="alpha"), _x()
    return cp.Problem(cp.Minimize(a * cp.norm(x)), [x >= 1])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_product_of_parameters, ["alpha", "beta", "objective"]),
        (_quadratic_form_in_a_constraint, ["sigma", "constraint 0"]),
        (_division_by_a_parameter, ["alpha", "divides", "reciprocal", "objective"]),
        (_square_of_a_parameter, ["alpha", "objective"]),
        (_weight_of_unknown_sign, ["alpha", "nonneg=True", "objective"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_problem_that_is_not_dpp_is_explained(build: Any, words: list[str]) -> None:
    problem = build()
    with pytest.raises(SpecificationError) as error:
        DeclarativeLayer(problem, problem.parameters(), problem.variables(), nonconvex=False)
    assert_names(error, *words)


def test_breach_in_a_later_constraint_is_the_one_named() -> None:
    a, b, x = cp.Parameter(name="alpha"), cp.Parameter(name="beta"), _x()
    constraints = [x >= 0, cp.sum(x) <= a, a * b * x[0] <= 1]
    with pytest.raises(SpecificationError) as error:
        DeclarativeLayer(
            cp.Problem(cp.Minimize(cp.sum(x)), constraints), [a, b], [x], nonconvex=False
        )
    assert_names(error, "constraint 2", "alpha", "beta")


@pytest.mark.parametrize(
    ("objective", "constraint"),
    [
        (lambda x: cp.Maximize(cp.sum_squares(x)), lambda x: x <= 1),
        (lambda x: cp.Minimize(cp.sum(x)), lambda x: cp.norm(x) >= 1),
        (lambda x: cp.Minimize(x[0] * x[1]), lambda x: x >= 0),
        (lambda x: cp.Minimize(cp.sum(x)), lambda x: cp.square(x) == 1),
    ],
    ids=["objective", "constraint", "product of variables", "curved equality"],
)
def test_nonconvex_problem_is_refused_on_request(objective: Any, constraint: Any) -> None:
    x = _x()
    problem = cp.Problem(objective(x), [constraint(x)])
    with pytest.raises(SpecificationError, match=r"objective|constraint 0"):
        DeclarativeLayer(problem, [], [x], nonconvex=False)


def test_geometric_program_needs_positive_variables() -> None:
    x, y = cp.Variable(pos=True, name="x"), cp.Variable(name="height")
    with pytest.raises(SpecificationError, match=r"height.*pos=True"):
        DeclarativeLayer(cp.Problem(cp.Minimize(x * y), [x >= 1]), [], [x], gp=True)


def test_convex_program_is_no_geometric_program() -> None:
    x = cp.Variable(pos=True, name="x")
    with pytest.raises(SpecificationError, match="gp=True"):
        DeclarativeLayer(cp.Problem(cp.Minimize(x), [x - 3 >= 1]), [], [x], gp=True)


def test_geometric_program_without_its_flag_is_refused() -> None:
    x, y = cp.Variable(pos=True, name="x"), cp.Variable(pos=True, name="y")
    with pytest.raises(SpecificationError, match="gp=True"):
        DeclarativeLayer(cp.Problem(cp.Minimize(x + y), [x * y >= 1]), [], [x, y], nonconvex=False)


@pytest.mark.parametrize("attribute", ["boolean", "integer"])
def test_mixed_integer_problem_is_refused(attribute: str) -> None:
    x = cp.Variable(2, name="choice", **{attribute: True})
    with pytest.raises(SpecificationError, match=r"mixed-integer.*choice"):
        DeclarativeLayer(cp.Problem(cp.Minimize(cp.sum(x)), [x >= 0]), [], [x])


def test_complex_problem_is_refused() -> None:
    x = cp.Variable(2, name="phase", complex=True)
    with pytest.raises(SpecificationError, match=r"complex.*phase"):
        DeclarativeLayer(cp.Problem(cp.Minimize(cp.norm(x))), [], [x])
    x, a = _x(), cp.Parameter(2, name="gain", complex=True)
    with pytest.raises(SpecificationError, match=r"complex.*gain"):
        DeclarativeLayer(cp.Problem(cp.Minimize(cp.norm(x - a))), [a], [x])


def test_problem_without_variables_is_refused() -> None:
    a = cp.Parameter(name="a")
    with pytest.raises(SpecificationError, match="without variables"):
        DeclarativeLayer(cp.Problem(cp.Minimize(a)), [a], [])


@pytest.mark.parametrize("problem", [None, "min x", cp.Variable(2), [1, 2]])
def test_something_else_than_a_problem_is_refused(problem: Any) -> None:
    with pytest.raises(SpecificationError, match=r"cvxpy\.Problem"):
        DeclarativeLayer(problem, [], [])


# Lists of parameters and variables


def _projection() -> tuple[cp.Problem, cp.Parameter, cp.Parameter, cp.Variable]:
    x = _x(3)
    target, low = cp.Parameter(3, name="target"), cp.Parameter(3, name="low")
    return cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [x >= low]), target, low, x


def test_missing_parameter_is_named() -> None:
    problem, target, _, x = _projection()
    with pytest.raises(SpecificationError) as error:
        DeclarativeLayer(problem, [target], [x])
    assert_names(error, "low")
    assert "target" not in str(error.value)


def test_parameter_given_twice_is_named() -> None:
    problem, target, low, x = _projection()
    with pytest.raises(SpecificationError, match=r"'low' twice"):
        DeclarativeLayer(problem, [low, target, low], [x])


def test_foreign_parameter_is_named_with_its_position() -> None:
    problem, target, low, x = _projection()
    with pytest.raises(SpecificationError, match=r"parameters\[1\].*'foreign'"):
        DeclarativeLayer(problem, [target, cp.Parameter(name="foreign"), low], [x])


def test_foreign_variable_is_named_with_its_position() -> None:
    problem, target, low, x = _projection()
    with pytest.raises(SpecificationError, match=r"variables\[1\].*'foreign'"):
        DeclarativeLayer(problem, [target, low], [x, cp.Variable(name="foreign")])


def test_dual_variable_of_another_problem_is_foreign() -> None:
    problem, target, low, _ = _projection()
    other = cp.Variable() >= 0
    with pytest.raises(SpecificationError, match=r"variables\[0\]"):
        DeclarativeLayer(problem, [target, low], [other.dual_variables[0]])


def test_parameters_and_variables_in_each_others_place_are_noticed() -> None:
    problem, target, low, x = _projection()
    with pytest.raises(SpecificationError, match=r"parameters\[0\].*Parameter"):
        DeclarativeLayer(problem, [x], [target, low])
    with pytest.raises(SpecificationError, match=r"variables\[0\].*Variable"):
        DeclarativeLayer(problem, [target, low], [2 * x])


def test_lists_are_asked_for() -> None:
    problem, target, low, x = _projection()
    with pytest.raises(SpecificationError, match="parameters must be a list"):
        DeclarativeLayer(problem, target, [x])
    with pytest.raises(SpecificationError, match="variables must be a list"):
        DeclarativeLayer(problem, [target, low], x)


@pytest.mark.parametrize("choice", ["ignore", None, "NaN"])
def test_unknown_way_to_handle_failures_is_refused(choice: Any) -> None:
    problem, target, low, x = _projection()
    with pytest.raises(SpecificationError) as error:
        DeclarativeLayer(problem, [target, low], [x], on_failure=choice)
    assert_names(error, "on_failure", "raise", "nan", repr(choice))


# Tensors


@pytest.fixture
def layer() -> DeclarativeLayer:
    problem, target, low, x = _projection()
    return DeclarativeLayer(problem, [target, low], [x], solver=Counting())


def _refused(layer: DeclarativeLayer, values: list[Any], *words: str) -> None:
    """Refused by name, before the solver ran, with the tensors as they were."""
    before = [value.detach().clone() if isinstance(value, Tensor) else value for value in values]
    for call in (layer, layer.solve):
        with pytest.raises(ParameterError) as error:
            call(*values)
        assert_names(error, *words)
    assert layer._route._solver.calls == []
    for old, new in zip(before, values, strict=True):
        if isinstance(new, Tensor):
            assert torch.equal(torch.nan_to_num(old), torch.nan_to_num(new.detach()))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_tensors(layer: DeclarativeLayer, count: int) -> None:
    _refused(layer, [torch.zeros(3)] * count, "2 tensors", "target", "low", f"got {count}")


@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (2, 2, 3), (3, 1), (1, 3, 1)])
def test_wrong_shape(layer: DeclarativeLayer, shape: tuple[int, ...]) -> None:
    _refused(layer, [torch.zeros(3), torch.zeros(shape)], "'low'", str(shape), "(3,)", "batch")


def test_transposed_matrix_is_a_wrong_shape() -> None:
    A, x = cp.Parameter((3, 2), name="design"), _x(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - 1)))
    layer = DeclarativeLayer(problem, [A], [x], solver=Counting())
    _refused(layer, [torch.ones(2, 3)], "'design'", "(2, 3)", "(3, 2)")


def test_different_batch_sizes(layer: DeclarativeLayer) -> None:
    values = [torch.zeros(4, 3), torch.zeros(5, 3)]
    _refused(layer, values, "'target'", "'low'", "4", "5")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensor_that_is_not_floating_point(layer: DeclarativeLayer, dtype: torch.dtype) -> None:
    _refused(layer, [torch.zeros(3), torch.zeros(3, dtype=dtype)], "'low'", str(dtype), "float")


@pytest.mark.parametrize("value", [np.zeros(3), [0.0] * 3, 1.0, None])
def test_something_else_than_a_tensor(layer: DeclarativeLayer, value: Any) -> None:
    _refused(layer, [torch.zeros(3), value], "'low'", type(value).__name__, "torch")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(layer: DeclarativeLayer, value: float) -> None:
    bad = torch.zeros(4, 3, requires_grad=True)
    with torch.no_grad():
        bad[2, 1] = value
    _refused(layer, [torch.zeros(3), bad], "'low'", "low[2, 1]", f"{value:g}", "finite")


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("nonneg", -0.5), ("pos", -0.5), ("pos", 0.0), ("nonpos", 0.5), ("neg", 0.5), ("neg", 0.0)],
)
def test_declared_sign_is_kept(attribute: str, value: float) -> None:
    x, a = _x(2), cp.Parameter(2, name="weights", **{attribute: True})
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)))
    layer = DeclarativeLayer(problem, [a], [x], solver=Counting())
    good = 1.0 if attribute in ("nonneg", "pos") else -1.0
    words = ["'weights'", "weights[1]", f"{value:g}", attribute]
    _refused(layer, [torch.tensor([good, value])], *words)
    assert layer(torch.tensor([good, good]))[0].tolist() == pytest.approx([good] * 2, abs=1e-6)


def test_declared_bounds_are_kept() -> None:
    x, a = _x(2), cp.Parameter(2, name="rate", bounds=[0.0, np.array([1.0, 2.0])])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)))
    layer = DeclarativeLayer(problem, [a], [x], solver=Counting())
    _refused(layer, [torch.tensor([1.5, 1.5])], "rate[0]", "1.5", "at most")
    _refused(layer, [torch.tensor([0.5, -0.5])], "rate[1]", "-0.5", "at least")
    assert layer(torch.tensor([0.5, 1.5]))[0].tolist() == pytest.approx([0.5, 1.5], abs=1e-6)


def _matrix_layer(**attributes: Any) -> DeclarativeLayer:
    x, S = _x(2), cp.Parameter((2, 2), name="shape", **attributes)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + cp.sum(S @ x)), [x >= -9])
    return DeclarativeLayer(problem, [S], [x], solver=Counting())


@pytest.mark.parametrize("attribute", ["symmetric", "PSD", "NSD"])
def test_declared_symmetry_is_kept(attribute: str) -> None:
    bad = torch.eye(2) * (-1 if attribute == "NSD" else 1)
    bad[0, 1] = 0.25
    _refused(_matrix_layer(**{attribute: True}), [bad], "'shape'", "shape[0, 1]", "symmetric")


@pytest.mark.parametrize(("attribute", "sign"), [("PSD", 1.0), ("NSD", -1.0)])
def test_declared_definiteness_is_kept(attribute: str, sign: float) -> None:
    batch = sign * torch.stack([torch.eye(2), torch.eye(2), torch.diag(torch.tensor([1.0, -0.5]))])
    layer = _matrix_layer(**{attribute: True})
    _refused(layer, [batch], "'shape'", attribute, "eigenvalue", "-0.5", "element 2")
    layer(batch[:2])
    assert layer._route._solver.calls == [2]


@pytest.mark.parametrize(("sign", "wrap"), [(1.0, psd_wrap), (-1.0, nsd_wrap)])
@pytest.mark.parametrize("sparse", [False, True])
def test_definiteness_of_constants_is_not_taken_on_trust(
    sign: float, wrap: Any, sparse: bool
) -> None:
    """Zero is a saddle point of x0^2 - x1^2 / 1000: it satisfies all optimality conditions."""
    x, q = _x(2), cp.Parameter(2)

    def build(smallest: float) -> DeclarativeLayer:
        matrix = sign * np.diag([1.0, smallest])
        form = cp.quad_form(x, wrap(sp.csc_array(matrix) if sparse else matrix))
        problem = cp.Problem(cp.Minimize(sign * form + q @ x), [x >= -1, x <= 1])
        return DeclarativeLayer(problem, [q], [x])

    with pytest.raises(SpecificationError) as error:
        build(-1e-3)
    assert_names(error, wrap.__name__, "semidefinite", f"eigenvalue {-sign * 1e-3}", "nonconvex")
    build(-1e-9)  # rounding


def test_declared_zeros_are_kept() -> None:
    bad = torch.diag(torch.ones(2))
    bad[1, 0] = 0.5
    _refused(_matrix_layer(diag=True), [bad], "shape[1, 0]", "0.5", "zero")
    sparse = _matrix_layer(sparsity=[(0, 1), (1, 1)])
    _refused(sparse, [torch.tensor([[0.5, 1.0], [0.0, 1.0]])], "shape[0, 0]", "0.5", "zero")


def test_rounding_of_single_precision_is_no_breach() -> None:
    rng = np.random.default_rng(0)
    factor = torch.tensor(rng.standard_normal((2, 1)), dtype=torch.float32)
    layer = _matrix_layer(PSD=True)
    layer(factor @ factor.T)
    assert layer._route._solver.calls == [1]


# Solvers


def test_unknown_solver_is_answered_with_the_nearest() -> None:
    problem, target, low, x = _projection()
    with pytest.raises(BackendError, match="Did you mean 'Clarabel'") as error:
        DeclarativeLayer(problem, [target, low], [x], solver="Claribel")
    assert_names(error, "'Claribel'", *BACKENDS, "auto")


@pytest.mark.parametrize("name", ["clarabel", "CLARABEL", "Clarabel"])
def test_solver_names_are_known_in_upper_and_lower_case(name: str) -> None:
    problem, target, low, x = _projection()
    layer = DeclarativeLayer(problem, [target, low], [x], solver=name)
    assert layer.solve(torch.zeros(3), torch.ones(3)).backend == ("Clarabel",)


@pytest.mark.parametrize("solver", [None, 3, Clarabel])
def test_solver_must_be_a_name_or_an_object(solver: Any) -> None:
    problem, target, low, x = _projection()
    with pytest.raises(BackendError, match="name or a Backend object"):
        DeclarativeLayer(problem, [target, low], [x], solver=solver)


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_solver_that_is_not_installed_comes_with_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, command = BACKENDS[name].capabilities.package, "pip install"
    if name == "DualActiveSet":
        package, command = MODULE, "C compiler"
    _hide(monkeypatch, package)
    problem, target, low, x = _projection()
    attempts = (
        lambda: DeclarativeLayer(problem, [target, low], [x], solver=name),
        BACKENDS[name],
    )
    for attempt in attempts:
        with pytest.raises(MissingBackendError) as error:
            attempt()
        assert_names(error, name, BACKENDS[name].capabilities.package, command)


def _hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in packages else find(name)
    )


def test_auto_does_without_a_solver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, target, low, x = _projection()
    _hide(monkeypatch, MODULE, "moreau")
    layer = DeclarativeLayer(problem, [target, low], [x])
    assert layer.solve(torch.zeros(3), torch.ones(3)).backend == ("Clarabel",)


@pytest.mark.parametrize(
    ("solver", "constraint", "kind", "able", "unable"),
    [
        ("OSQP", lambda x: cp.norm(x) <= 1, "soc", ["Clarabel", "SCS", "ECOS"], []),
        ("OSQP", lambda x: cp.exp(x[0]) <= 2, "exp", ["Clarabel", "SCS"], []),
        ("ECOS", lambda x: cp.diag(x) << np.eye(3), "psd", ["Clarabel", "SCS"], ["OSQP"]),
        (
            "diffcp",
            lambda x: cp.PowCone3D(x[0], x[1], x[2], 0.3),
            "power",
            ["Clarabel", "SCS"],
            ["ECOS", "OSQP"],
        ),
    ],
)
def test_cone_that_a_solver_lacks_comes_with_those_that_have_it(
    solver: str, constraint: Any, kind: str, able: list[str], unable: list[str]
) -> None:
    x, c = _x(3), cp.Parameter(3, name="c")
    problem = cp.Problem(cp.Minimize(c @ x), [constraint(x), x >= -1])
    with pytest.raises(BackendError) as error:
        DeclarativeLayer(problem, [c], [x], solver=solver)
    assert_names(error, solver, kind, *able)
    offered = str(error.value).split("Solvers that do")[1]
    assert not any(name in offered for name in unable)


def test_solver_option_misspelt_for_the_layer() -> None:
    problem, target, low, x = _projection()
    with pytest.raises(BackendError, match="Did you mean 'max_iters'"):
        DeclarativeLayer(problem, [target, low], [x], solver_args={"max_itres": 10})
    layer = DeclarativeLayer(problem, [target, low], [x])
    with pytest.raises(BackendError, match="Did you mean 'max_iters'"):
        layer(torch.zeros(3), torch.zeros(3), solver_args={"max_itres": 10})


def test_unknown_derivative_is_answered_with_the_nearest() -> None:
    problem, target, low, x = _projection()
    with pytest.raises(BackendError, match="Did you mean 'implicit'"):
        DeclarativeLayer(problem, [target, low], [x], derivative="implict")


def test_errors_can_be_caught_by_one_class_and_by_the_usual_ones() -> None:
    for error in (SpecificationError, ParameterError, BackendError):
        assert issubclass(error, DeclarativeError)
        assert issubclass(error, ValueError)
    assert issubclass(MissingBackendError, ImportError)


def test_problem_that_is_not_convex_with_a_cone_that_has_no_rules_for_smooth_programs() -> None:
    x, scale = cp.Variable(2), cp.Parameter()
    cone = cp.bmat([[1, x[0]], [x[0], x[1]]]) >> 0
    problem = cp.Problem(cp.Minimize(scale * cp.norm1(x)), [cone])
    with pytest.raises(SpecificationError, match="norm1"):
        DeclarativeLayer(problem, [scale], [x])
