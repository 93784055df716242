"""Functions taken apart into scalars have the values and derivatives of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from nonconvex_collection import NonconvexProblem, all_problems
from torch import Tensor

from declarative_cvx.nonconvex.minimization.evaluation import evaluate, hessian_product, values
from declarative_cvx.nonconvex.minimization.implicit_kkt import Minimum
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.scalars.forms import ZERO, Scalars
from declarative_cvx.nonconvex.minimization.scalars.functions import FUNCTIONS
from declarative_cvx.nonconvex.minimization.scalars.separated import Separable
from declarative_cvx.nonconvex.minimization.scalars.tape import Tape
from declarative_cvx.nonconvex.translation.translate import NonlinearForm

BATCH, N = 5, 4
# Problems of the collection with functions that have no rule.
WHOLE = {"robust_mean_huber", "robust_mean_cauchy", "robust_mean_tukey"}
Function = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


def program_of(
    objective: Function, constraints: Function | None = None, shared: bool = False
) -> NonlinearProgram:
    """With a vector and a matrix for parameters, the matrix shared if asked for."""
    torch.manual_seed(0)
    p = torch.rand(BATCH, N, dtype=torch.float64) + 0.5
    A = torch.rand(1 if shared else BATCH, 3, N, dtype=torch.float64)
    functions = [f for f in (objective, constraints) if f is not None]
    separable = Separable(functions, N, [(N,), (3, N)])
    return NonlinearProgram(
        N, objective, None, constraints, None, None, (p, A), BATCH, separable=separable
    )


def point() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(BATCH, N, dtype=torch.float64) * 0.8 + 0.1


def check(program: NonlinearProgram, x: Tensor) -> None:
    """All that is computed by scalars, against automatic differentiation."""
    assert program.separated is not None
    whole = replace(program, separable=None)
    torch.manual_seed(2)
    weights = torch.randn(len(x), sum(program.separated.sizes), dtype=torch.float64)
    for given in (None, weights, weights[:, :1]):
        found, expected = evaluate(program, x, given), evaluate(whole, x, given)
        for name in ("values", "jacobian", "hessian"):
            same(getattr(found, name), getattr(expected, name))
    same(values(program, x), values(whole, x))
    y, v = weights[:, 1:], torch.randn_like(x)
    same(hessian_product(program, x, y)(v), hessian_product(whole, x, y)(v))
    check_pulled_back(program, whole, x, y)


def check_pulled_back(
    program: NonlinearProgram, whole: NonlinearProgram, x: Tensor, y: Tensor
) -> None:
    w = torch.randn(len(x), x.shape[1] + y.shape[1], dtype=torch.float64)
    for factor in (None, torch.randn(len(x), dtype=torch.float64)):
        found, expected = (
            Minimum(p, x, y, p.parameters, torch.ones_like(x), torch.ones_like(y)).pull_back(
                w, factor
            )
            for p in (program, whole)
        )
        same(found[0], expected[0])
        for mine, other in zip(found[1], expected[1], strict=True):
            same(mine, other)


def same(found: Tensor, expected: Tensor) -> None:
    size = float(expected.abs().amax()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12 * max(size, 1.0))


ROWS: dict[str, Function] = {
    "linear": lambda x, p: p[1] @ x - 1,
    "constant": lambda x, p: torch.ones(2, dtype=torch.float64),
    "parameters only": lambda x, p: p[0][:2] ** 2,
    "products": lambda x, p: torch.outer(x, x).reshape(-1)[:6] * p[0][0],
    "quotient": lambda x, p: p[0] / (1 + x),
    "powers": lambda x, p: torch.cat([x**3, x**0.5, x**-1.5, x**2.0, 2 / x]),
    "waves": lambda x, p: torch.cat([x.sin(), (p[0] * x).cos(), x.tan()]),
    "growth": lambda x, p: torch.cat([x.exp(), x.log(), x.log1p(), x.sinh(), x.cosh(), x.tanh()]),
    "inverse": lambda x, p: torch.cat([x.asinh(), x.atanh(), x.erf(), torch.special.ndtr(x)]),
    "logistic": lambda x, p: torch.nn.functional.softplus(3 * x - 1, threshold=40.0),
    "entropy": lambda x, p: torch.special.entr(x) + x.sigmoid(),
    "matrices": lambda x, p: (p[1] @ x.reshape(2, 2).kron(x.reshape(2, 2))[:, :2]).reshape(-1),
    "moved": lambda x, p: torch.cat([x.flip(0)[1:], x.cumsum(0), torch.diag_embed(x).reshape(-1)]),
    "triangle": lambda x, p: torch.outer(x, p[0]).tril().sum(1) - x.mean(),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shared", [False, True])
def test_values_and_derivatives_are_those_of_the_whole(name: str, shared: bool) -> None:
    program = program_of(lambda x, p: (x * p[0]).sum() ** 2 * x[0].exp(), ROWS[name], shared)
    check(program, point())


@pytest.mark.parametrize("case", [c for c in all_problems() if c.dnlp], ids=lambda c: c.name)
def test_problems_of_the_collection(case: NonconvexProblem) -> None:
    problem, parameters, _ = case.build()
    form = NonlinearForm(problem, parameters)
    given = [torch.tensor(np.asarray(v), dtype=torch.float64) for v in case.values()]
    program = form.program(given, [False] * len(given), 3, torch.device("cpu"))
    assert (program.separated is None) == (case.name in WHOLE)
    if case.name in WHOLE:
        return
    x = form.start(program)
    check(program, x + 0.01 * torch.arange(3)[:, None] * (1 + x.abs()))


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"sign"}))
def test_derivatives_of_functions(name: str) -> None:
    scalars = Scalars()
    x = scalars.input()
    exponent = 2.7 if name == "pow" else 0.0
    function = FUNCTIONS[name]
    forms = [
        scalars.apply(name, x, exponent),
        function.first(scalars, x, exponent),
        function.second(scalars, x, exponent),
    ]
    tape = Tape(scalars, [[x]], [(dict(enumerate(forms)), 3)])
    at = torch.linspace(0.15, 0.85, 7, dtype=torch.float64)[:, None]
    (found,) = tape(7, at)
    leaf = at.clone().requires_grad_()
    value = function.value(leaf, exponent)
    (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    same(found, torch.cat([value, first, second], 1).detach())


def test_wide_batches_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(lambda x, p: (x * p[0]).sum() ** 3, ROWS["matrices"])
    together = evaluate(program, point(), torch.ones(BATCH, 1, dtype=torch.float64))
    module = "declarative_cvx.nonconvex.minimization.scalars.tape._AT_ONCE"
    monkeypatch.setattr(module, 1000)
    apart = evaluate(program, point(), torch.ones(BATCH, 1, dtype=torch.float64))
    same(apart.jacobian, together.jacobian)
    same(apart.hessian, together.hessian)


def test_functions_without_rule_are_left_whole() -> None:
    program = program_of(lambda x, p: torch.linalg.vector_norm(x).maximum(p[0][0]))
    assert program.separated is None
    assert evaluate(program, point()).values.shape == (BATCH, 1)


def test_too_many_scalars_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("declarative_cvx.nonconvex.minimization.scalars.forms._MOST_TERMS", 2000)
    many = torch.rand(400, 1, dtype=torch.float64)
    few = program_of(lambda x, p: (x * p[0]).sum().exp())
    assert few.separated is not None
    assert program_of(lambda x, p: (many * x).exp().sum()).separated is None


def test_equal_expressions_are_stored_once() -> None:
    scalars = Scalars()
    a, b = scalars.input(), scalars.input()
    assert scalars.multiply(a, b) == scalars.multiply(b, a)
    double = scalars.scale(a, 2.0)
    assert scalars.multiply(double, b) == scalars.scale(scalars.multiply(a, b), 2.0)
    assert scalars.total(a, scalars.scale(a, -1.0)) == ZERO
