"""From a CVXPY problem to a cone program with parameters: the only file that touches CVXPY's
canonicalisation internals (`declarative_cvx.atoms` enters its own atoms in CVXPY's tables).

CVXPY's reductions are run once, up to the sparse tensors that take parameters to problem data.
What happens per call afterwards is in `declarative_cvx.param_program`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.constraints import PowCone3D
from cvxpy.lin_ops.lin_op import CONSTANT_ID
from cvxpy.reductions.canonicalization import Canonicalization
from cvxpy.reductions.dcp2cone.cone_matrix_stuffing import ParamConeProg
from cvxpy.reductions.dcp2cone.dcp2cone import Dcp2Cone
from cvxpy.reductions.dgp2dcp.dgp2dcp import Dgp2Dcp
from cvxpy.reductions.reduction import Reduction
from cvxpy.reductions.solution import Solution
from cvxpy.reductions.solvers.conic_solvers.conic_solver import ConicSolver
from cvxpy.reductions.solvers.solving_chain import resolve_and_build_chain
from cvxpy.utilities import scopes

from declarative_cvx.cones import Cone
from declarative_cvx.elimination import Orders, arrange, find_elimination, ordered
from declarative_cvx.errors import SpecificationError
from declarative_cvx.fixed_variables import FixedVariables, find_fixed_variables
from declarative_cvx.param_data import Coefficients, ParamData
from declarative_cvx.param_program import ParamConeProgram, Source
from declarative_cvx.program import Structure
from declarative_cvx.row_order import RowOrder

# CVXPY's default backend passes over every entry of the parameters, which takes it 20 microseconds;
# "COO" does not, but takes 0.3 ms more for each constraint.
ENTRIES_PER_CONSTRAINT = 20


class _Recorder(ConicSolver):
    """Stands at the end of CVXPY's chain and hands out the parametrized cone program.

    It declares every cone of `Cone` and a quadratic objective, so that CVXPY rewrites neither,
    and no direct cones, so that every constraint is a row of A. (The atoms that CVXPY itself
    approximates by second-order cones, such as `cp.power` without ``approx=False``, stay so.)
    """

    SUPPORTED_CONSTRAINTS = [
        *ConicSolver.SUPPORTED_CONSTRAINTS, cp.SOC, cp.ExpCone, cp.PSD, PowCone3D,
    ]  # fmt: skip

    def name(self) -> str:
        return "DECLARATIVE_CVX"

    def import_solver(self) -> None:
        return None

    def supports_quad_obj(self) -> bool:
        return True

    def apply(self, problem: ParamConeProg) -> tuple[ParamConeProg, None]:
        return problem, None

    def solve_via_data(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        raise TypeError("canonicalisation only: this object solves nothing")

    cite = solve_via_data


def canonicalize(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    gp: bool = False,
    canon_backend: str | None = None,
) -> ParamConeProgram:
    """Turn a DPP (or, with `gp`, DGP) problem into a cone program with parameters.

    Parameters
    ----------
    problem : cvxpy.Problem
        Left as it is.
    parameters : sequence of cvxpy.Parameter
        All parameters of the problem, in the order in which values will be passed.
    gp : bool
    canon_backend : str, optional
        CVXPY's canonicalisation backend ("CPP", "SCIPY" or "COO"). None is CVXPY's choice, or
        "COO" where that is faster.

    Returns
    -------
    ParamConeProgram
    """
    if canon_backend is None and _has_many_parameters(problem, parameters):
        canon_backend = cp.settings.COO_CANON_BACKEND
    with warnings.catch_warnings(), nullcontext() if gp else scopes.quad_form_dpp_scope():
        # CVXPY's choice of a backend, and how it reads its own sparse leaves, are no news.
        warnings.filterwarnings("ignore", message=".*for canonicalization.*")
        warnings.filterwarnings("ignore", message="Reading from a sparse CVXPY expression.*")
        chain = resolve_and_build_chain(
            problem, solver=_Recorder(), gp=gp, enforce_dpp=True, canon_backend=canon_backend
        )
        for reduction in chain.reductions:
            if isinstance(reduction, Dcp2Cone) and reduction.solver_context is not None:
                # Perspectives have their functions canonicalised for a solver of this name.
                reduction.solver_context.solver_name = cp.CLARABEL
        cone_prog, inverse_data = chain.apply(problem)
    reductions = list(zip(chain.reductions[:-1], inverse_data[:-1], strict=True))
    columns, logarithms = _parameter_columns(cone_prog, parameters, reductions)
    order = RowOrder(cone_prog.constraints)
    data, kept = _data(cone_prog, order, columns)
    sources = {
        **_primal_sources(problem, cone_prog, reductions),
        **_dual_sources(problem, cone_prog, reductions, order, kept),
    }
    sizes = tuple(parameter.size for parameter in parameters)
    widths = (*sizes, *(sizes[position] for position in logarithms))
    structure, fixed, orders = _smaller(data.structure, data.constants(sum(widths)))
    if orders:
        data = data.ordered(structure, orders)
        moved = (orders["q"], orders["b"])
        sources = {identity: source.moved(*moved) for identity, source in sources.items()}
    return ParamConeProgram(
        structure=structure,
        fixed=fixed,
        data=data.map(widths),
        logarithms=logarithms,
        sizes=sizes,
        sources=sources,
        gp=gp,
        maximize=isinstance(problem.objective, cp.Maximize),
    )


def _has_many_parameters(problem: cp.Problem, parameters: Sequence[cp.Parameter]) -> bool:
    size = sum(parameter.size for parameter in parameters)
    return size > ENTRIES_PER_CONSTRAINT * (1 + len(problem.constraints))


def _smaller(
    structure: Structure, constant: np.ndarray
) -> tuple[Structure, FixedVariables | None, Orders]:
    """What need not be solved for: what equalities set and, of the rest, what is substituted.

    The structure is put in an order that suits the substitution.
    """
    fixed = find_fixed_variables(structure, constant)
    inner, entries = (structure, constant) if fixed is None else fixed.inner(constant)
    elimination = find_elimination(inner, entries)
    if elimination is None:
        return structure, fixed, {}
    if fixed is None:
        structure, orders = arrange(structure, elimination)
        return structure, None, orders
    structure, orders = ordered(structure, *fixed.order(elimination))
    fixed = find_fixed_variables(structure, constant[orders["A"]])
    assert fixed is not None
    inner, entries = fixed.inner(constant[orders["A"]])
    inner = replace(inner, elimination=find_elimination(inner, entries))
    return structure, replace(fixed, remaining=inner), orders


_Reductions = list[tuple[Reduction, object]]


def _parameter_columns(
    cone_prog: ParamConeProg, parameters: Sequence[cp.Parameter], reductions: _Reductions
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[int, ...]]:
    """Which entries of (parameters in C order, logarithms, 1) CVXPY's parameter vector consists of.

    CVXPY stores reduced forms of parameters with attributes (triangles, diagonals, listed
    entries), in Fortran order. Which entry goes where is found by sending numbered entries
    through its own reductions; a symmetric parameter is sent twice, the second time transposed,
    and the mean is to be taken, so that its gradient is symmetric too.

    With them the positions of the parameters that enter by their logarithm.
    """
    log_ids = _logarithm_ids(reductions)
    logarithms = tuple(i for i, p in enumerate(parameters) if p.id in log_ids)
    keys = [p.id for p in parameters] + [log_ids[parameters[i].id] for i in logarithms]
    entered = [*parameters, *(parameters[i] for i in logarithms)]
    codes, start = {}, 0
    for key, parameter in zip(keys, entered, strict=True):
        code = np.arange(start, start + parameter.size, dtype=float)
        codes[key] = code.reshape(parameter.shape)
        start += parameter.size
    first = _sent(cone_prog, codes, reductions, start)
    symmetric = [k for k, p in zip(keys, entered, strict=True) if _is_symmetric(p)]
    if not symmetric:
        return (first, first), logarithms
    codes.update({key: np.swapaxes(codes[key], -1, -2) for key in symmetric})
    return (first, _sent(cone_prog, codes, reductions, start)), logarithms


def _sent(
    cone_prog: ParamConeProg, codes: dict[int, np.ndarray], reductions: _Reductions, one: int
) -> np.ndarray:
    """Numbered entries of parameters as they stand in CVXPY's parameter vector, int64."""
    for reduction, _ in reductions:
        if not isinstance(reduction, Dgp2Dcp):
            codes = reduction.param_forward(codes)
    columns = np.empty(cone_prog.q.shape[1], dtype=np.int64)
    for key, first in cone_prog.param_id_to_col.items():
        code = np.array(one) if key == CONSTANT_ID else np.asarray(codes[key])
        columns[np.arange(first, first + code.size)] = code.ravel(order="F")
    return columns


def _is_symmetric(parameter: cp.Parameter) -> bool:
    return any(parameter.attributes[name] for name in ("symmetric", "PSD", "NSD"))


def _logarithm_ids(reductions: _Reductions) -> dict[int, int]:
    """Parameter id to the id of its logarithm, for those that a DGP reduction replaced."""
    for reduction, _ in reductions:
        if isinstance(reduction, Dgp2Dcp):
            return {old: new[0] for old, new in reduction.param_id_map.items()}
    return {}


def _data(
    cone_prog: ParamConeProg, order: RowOrder, columns: tuple[np.ndarray, np.ndarray]
) -> tuple[ParamData, np.ndarray]:
    """The data with A x + s = b in the row order of `Cone`, and which rows were kept, bool."""
    P, q = (
        Coefficients(*np.zeros((3, 0), dtype=np.int64))
        if tensor is None
        else Coefficients.of(tensor).shared(*columns)
        for tensor in (cone_prog.P, cone_prog.q)
    )
    Ab, kept = _rows(cone_prog, order, Coefficients.of(cone_prog.A).shared(*columns))
    dims = cone_prog.cone_dims
    cone = Cone(
        zero=dims.zero,
        nonneg=dims.nonneg - int((~kept).sum()),
        soc=tuple(dims.soc),
        psd=tuple(dims.psd),
        exp=dims.exp,
        power=tuple(float(alpha) for alpha in dims.p3d),
    )
    n = cone_prog.x.size
    P = P._replace(row=P.row % n * n + P.row // n)
    return ParamData.of(P, q, Ab, n, cone), kept


def _rows(
    cone_prog: ParamConeProg, order: RowOrder, stuffed: Coefficients
) -> tuple[Coefficients, np.ndarray]:
    """(A, b) out of CVXPY's tensor of expressions A x + b, and which rows were kept, bool.

    `x <= inf` says nothing and is left out.
    """
    n, dims, kept = cone_prog.x.size, cone_prog.cone_dims, np.ones(order.size, dtype=bool)
    if not order.size:
        return stuffed, kept
    col, entry = np.divmod(stuffed.row, order.place.size)
    row = order.place[entry]
    negative = (row < dims.zero) != (col < n)
    value = np.where(negative, -stuffed.value, stuffed.value) * order.share[entry]
    infinite = ~np.isfinite(value)
    if infinite.any():
        vacuous = (col == n) & (value > 0) & (row >= dims.zero) & (row < dims.zero + dims.nonneg)
        if not vacuous[infinite].all():
            raise SpecificationError(
                "The problem has an infinite or NaN constant in a place where it is not an absent "
                "bound. Only `expression <= inf` and the like, which say nothing, are left out."
            )
        kept[row[infinite]] = False
        row = np.where(kept, np.cumsum(kept) - 1, -1)[row]
    found = Coefficients(row * (n + 1) + col, stuffed.column, value)
    return found.where(row >= 0), kept


def _primal_sources(
    problem: cp.Problem, cone_prog: ParamConeProg, reductions: _Reductions
) -> dict[int, Source]:
    """Where every variable is read off x, found by sending numbered entries back."""
    values = cone_prog.split_solution(np.arange(1.0, cone_prog.x.size + 1))
    for reduction, _ in reversed(reductions):
        if isinstance(reduction, Dgp2Dcp):
            ids = {new[0]: old for old, new in reduction.var_id_map.items()}
            values = {ids.get(key, key): value for key, value in values.items()}
        else:
            values = reduction.var_forward(values)
    sources = {}
    for variable in problem.variables():
        code = values.get(variable.id, np.zeros(variable.shape))
        code = code.toarray() if sp.issparse(code) else np.asarray(code)
        index = code.reshape(variable.shape).ravel().astype(np.int64) - 1
        sources[variable.id] = Source(variable.shape, index, None, dual=False)
    return sources


def _dual_sources(
    problem: cp.Problem,
    cone_prog: ParamConeProg,
    reductions: _Reductions,
    order: RowOrder,
    kept: np.ndarray,
) -> dict[int, Source]:
    """Where every constraint's dual variables are read off y, and with which factor.

    An entry of a dual is a multiple of one entry of y. CVXPY's own inversion of y = k and
    y = k^2 for k = 1, ..., m tells which and how much.
    """
    k = np.arange(1.0, order.size + 1)
    place = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # of row k; -1 is "always 0"
    found = [_dual_values(cone_prog, reductions, order, y) for y in (k, k**2)]
    sources = {}
    for constraint in problem.constraints:
        values = [_read(constraint, by_id.get(constraint.id)) for by_id in found]
        for variable, first, second in zip(constraint.dual_variables, *values, strict=True):
            entry = np.divide(second, first, out=np.zeros_like(first), where=first != 0)
            scale = np.divide(first, entry, out=np.zeros_like(first), where=first != 0)
            index = place[np.rint(entry).astype(np.int64) - 1]
            factors = None if np.all(scale[entry != 0] == 1) else scale
            sources[variable.id] = Source(variable.shape, index, factors, dual=True)
    return sources


def _dual_values(
    cone_prog: ParamConeProg, reductions: _Reductions, order: RowOrder, y: np.ndarray
) -> dict[int, np.ndarray]:
    """What CVXPY makes of a given y for the constraints of the problem, by their ids."""
    by_id = {constraint.id: piece for constraint, piece in order.duals(y)}
    solution = Solution(cp.OPTIMAL, 0.0, {cone_prog.x.id: np.ones(cone_prog.x.size)}, by_id, {})
    for reduction, inverse_data in reversed(reductions):
        # A geometric program's duals are those of its convex form; only its variables change.
        step = Canonicalization if isinstance(reduction, Dgp2Dcp) else type(reduction)
        solution = step.invert(reduction, solution, inverse_data)
    return solution.dual_vars


class _Reader:
    """Stands for a dual variable, which keeps its value, and takes the one that is saved."""

    def __init__(self, variable: cp.Variable) -> None:
        self.shape, self.entries = variable.shape, np.zeros(variable.size)

    def save_value(self, value: np.ndarray) -> None:
        self.entries = np.asarray(value, dtype=float).reshape(self.shape).ravel()


def _read(constraint: cp.Constraint, value: np.ndarray | None) -> list[np.ndarray]:
    """The entries of a constraint's dual variables, for what CVXPY would save in them."""
    stand_in = object.__new__(type(constraint))
    readers = [_Reader(variable) for variable in constraint.dual_variables]
    stand_in.__dict__.update(vars(constraint), dual_variables=readers)
    if value is not None:
        stand_in.save_dual_value(value)
    return [reader.entries for reader in readers]
