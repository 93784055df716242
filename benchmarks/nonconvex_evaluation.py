"""Time of values, Jacobian and Hessian of nonconvex problems, by three ways to evaluate them.

    python benchmarks/nonconvex_evaluation.py

Expressions of scalars, which the layers use, with sparse and with full derivatives; CVXPY's own
compiled differentiation engine, element by element, new parameter values included (its problems
have more variables where CVXPY adds some); and torch.compile of the derivatives that torch.func
takes of the translated functions, from their trace. Microseconds, medians.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from cvxpy.reductions.cvx_attr2constr import CvxAttr2Constr
from cvxpy.reductions.dnlp2smooth.dnlp2smooth import Dnlp2Smooth
from cvxpy.reductions.solvers.nlp_solvers.nlp_solver import Bounds, Oracles
from nonconvex_problems import Case, hock_schittkowski_71, path_planning, power_flow
from rich.console import Console
from rich.table import Table
from torch.fx.experimental.proxy_tensor import make_fx

from declarative_cvx.nonconvex.minimization.evaluation import evaluate, row_values
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.translation.translate import NonlinearForm

BATCHES = (1, 64)


def microseconds(work: Callable[[], object], repeats: int = 100) -> float:
    """Median time of a call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e6 * float(np.median(times))


def program_of(case: Case, batch: int) -> tuple[NonlinearProgram, torch.Tensor, torch.Tensor]:
    """A program, points and weights."""
    problem, parameters, _ = case.build()
    form = NonlinearForm(problem)
    values = dict(zip((p.id for p in parameters), case.batch(batch), strict=True))
    tensors = [torch.as_tensor(values[p.id]) for p in form.parameters]
    program = form.program(tensors, [True] * len(tensors), batch, torch.device("cpu"))
    torch.manual_seed(0)
    x = torch.rand(batch, program.variables, dtype=torch.float64) + 0.5
    rows = row_values(program, x, program.parameters).shape[1]
    return program, x, torch.rand(batch, rows, dtype=torch.float64)


def by_engine(case: Case, batch: int) -> float:
    problem, parameters, _ = case.build()
    data = case.batch(batch)
    for parameter, value in zip(parameters, data, strict=True):
        parameter.value = value[0]
    for reduction in (CvxAttr2Constr(reduce_bounds=False), Dnlp2Smooth()):
        problem = reduction.apply(problem)[0]
    bounds = Bounds(problem)
    engine = Oracles(bounds.new_problem, verbose=False).c_problem
    own = {p.id: value for p, value in zip(parameters, data, strict=True)}
    order = bounds.new_problem.parameters()
    themes = [
        np.concatenate([own[p.id][i].flatten(order="F") for p in order]) for i in range(batch)
    ]
    z = np.asarray(bounds.x0, dtype=float)
    duals = np.ones(len(bounds.cu))

    def work() -> None:
        for values in themes:
            engine.update_params(values)
            engine.objective_forward(z)
            engine.constraint_forward(z)
            engine.gradient()
            engine.eval_jacobian_vals()
            engine.eval_hessian_vals_coo_lower_tri(1.0, duals)

    return microseconds(work)


def by_scalars(case: Case, batch: int, sparse: bool) -> float:
    program, x, weights = program_of(case, batch)
    program = replace(program, sparse=sparse)
    return microseconds(lambda: evaluate(program, x, weights))


def by_compiler(case: Case, batch: int) -> tuple[float, float]:
    """Time of a call, and seconds of the compilation."""
    program, x, weights = program_of(case, batch)
    program = replace(program, separable=None)

    def everything(x: torch.Tensor, w: torch.Tensor, *parameters: torch.Tensor) -> object:
        def rows(x: torch.Tensor) -> torch.Tensor:
            single = tuple(v[None] for v in parameters)
            return row_values(replace(program, batched=False), x[None], single)[0]

        def total(x: torch.Tensor) -> torch.Tensor:
            return (rows(x) * w).sum()

        return rows(x), torch.func.jacrev(rows)(x), torch.func.hessian(total)(x)

    began = time.perf_counter()
    traced = make_fx(torch.func.vmap(everything))(x, weights, *program.parameters)
    compiled = torch.compile(traced)
    with torch.no_grad():
        compiled(x, weights, *program.parameters)
        seconds = time.perf_counter() - began
        return microseconds(lambda: compiled(x, weights, *program.parameters)), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table = Table(title="f, g, J and H, microseconds a batch")
    columns = ["problem (variables)", "batch", "scalars", "scalars, sparse", "CVXPY's engine"]
    for column in [*columns, *(["torch.compile", "compilation, s"] if options.compile else [])]:
        table.add_column(column, justify="right")
    for case in (hock_schittkowski_71(), power_flow(), path_planning(40)):
        for batch in BATCHES:
            cells = [by_scalars(case, batch, False), by_scalars(case, batch, True)]
            cells.append(by_engine(case, batch))
            if options.compile:
                cells += by_compiler(case, batch)
            name = f"{case.name} ({case.size})"
            table.add_row(name, str(batch), *(f"{cell:.0f}" for cell in cells))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
