"""From a CVXPY problem to a cone program with parameters: the only file that touches CVXPY's
canonicalisation internals (`declarative_cvx.atoms` enters its own atoms in CVXPY's tables).

CVXPY's reductions are run once, up to the sparse tensors that take parameters to problem data.
What happens per call afterwards is in `declarative_cvx.param_program`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.constraints import PowCone3D, SvecPSD
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
from cvxpy.utilities.psd_utils import TriangleKind

from declarative_cvx.cones import Cone
from declarative_cvx.elimination import Orders, arrange, find_elimination, ordered
from declarative_cvx.errors import SpecificationError
from declarative_cvx.fixed_variables import FixedVariables, find_fixed_variables
from declarative_cvx.linear_map import AffineMap
from declarative_cvx.param_program import ParamConeProgram, Source
from declarative_cvx.program import Structure
from declarative_cvx.sparsity import Sparsity


class _Recorder(ConicSolver):
    """Stands at the end of CVXPY's chain and hands out the parametrized cone program.

    It declares every cone of `Cone` and a quadratic objective, so that CVXPY rewrites neither,
    and no direct cones, so that every constraint is a row of A. (The atoms that CVXPY itself
    approximates by second-order cones, such as `cp.power` without ``approx=False``, stay so.)
    """

    SUPPORTED_CONSTRAINTS = [
        *ConicSolver.SUPPORTED_CONSTRAINTS, cp.SOC, cp.ExpCone, SvecPSD, PowCone3D,
    ]  # fmt: skip
    EXP_CONE_ORDER = [0, 1, 2]
    PSD_TRIANGLE_KIND = TriangleKind.LOWER
    PSD_SQRT2_SCALING = True

    def name(self) -> str:
        return "DECLARATIVE_CVX"

    def import_solver(self) -> None:
        return None

    def supports_quad_obj(self) -> bool:
        return True

    def apply(self, problem: ParamConeProg) -> tuple[ParamConeProg, None]:
        if not problem.formatted:
            problem = self.format_constraints(problem, self.EXP_CONE_ORDER)
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
        CVXPY's canonicalisation backend ("CPP", "SCIPY" or "COO"); None lets CVXPY choose.

    Returns
    -------
    ParamConeProgram
    """
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
    selection, logarithms = _parameter_selection(cone_prog, parameters, reductions)
    kept = _finite_rows(cone_prog)
    structure, tensors = _data_tensors(cone_prog, kept)
    tensors = {name: sp.csr_array(tensor @ selection) for name, tensor in tensors.items()}
    sources = {
        **_primal_sources(problem, cone_prog, reductions),
        **_dual_sources(problem, cone_prog, reductions, kept),
    }
    sizes = tuple(parameter.size for parameter in parameters)
    widths = (*sizes, *(sizes[position] for position in logarithms))
    constants = AffineMap(tensors["A"], tensors["A"].shape[:1], widths).constants()
    structure, fixed, orders = _smaller(structure, constants)
    if orders:
        tensors.update({name: tensors[name][order] for name, order in orders.items()})
        moved = (orders["q"], orders["b"])
        sources = {identity: source.moved(*moved) for identity, source in sources.items()}
    blocks = [tensors[name] for name in ("P", "q", "A", "b", "d")]
    heights = [block.shape[0] for block in blocks]
    return ParamConeProgram(
        structure=structure,
        fixed=fixed,
        data=AffineMap(sp.vstack(blocks), heights, widths),
        logarithms=logarithms,
        sizes=sizes,
        sources=sources,
        gp=gp,
        maximize=isinstance(problem.objective, cp.Maximize),
    )


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


def _parameter_selection(
    cone_prog: ParamConeProg, parameters: Sequence[cp.Parameter], reductions: _Reductions
) -> tuple[sp.csr_array, tuple[int, ...]]:
    """Matrix that takes (parameters in C order, logarithms, 1) to CVXPY's parameter vector.

    CVXPY stores reduced forms of parameters with attributes (triangles, diagonals, listed
    entries), in Fortran order. Which entry goes where is found by sending numbered entries
    through its own reductions; a symmetric parameter is sent twice, the second time transposed,
    and the mean taken, so that its gradient is symmetric too.
    """
    log_ids = _logarithm_ids(reductions)
    logarithms = tuple(i for i, p in enumerate(parameters) if p.id in log_ids)
    codes, transposed = {}, {}
    start = 1
    for position in [*range(len(parameters)), *logarithms]:
        parameter = parameters[position]
        is_log = parameter.id in codes
        key = log_ids[parameter.id] if is_log else parameter.id
        code = np.arange(start, start + parameter.size, dtype=float).reshape(parameter.shape)
        start += parameter.size
        codes[key] = code
        transposed[key] = np.swapaxes(code, -1, -2) if _is_symmetric(parameter) else code
    rows, cols = [], []
    for sent in (codes, transposed):
        for reduction, _ in reductions:
            if not isinstance(reduction, Dgp2Dcp):
                sent = reduction.param_forward(sent)
        for key, first in cone_prog.param_id_to_col.items():
            if key == CONSTANT_ID:
                rows.append(np.array([first]))
                cols.append(np.array([start - 1]))
                continue
            code = np.asarray(sent[key]).flatten(order="F").astype(int)
            rows.append(first + np.arange(code.size))
            cols.append(code - 1)
    row, col = np.concatenate(rows), np.concatenate(cols)
    width = cone_prog.q.shape[1]
    row = np.where(row < 0, width + row, row)
    halves = sp.coo_array((np.full(row.size, 0.5), (row, col)), shape=(width, start))
    return sp.csr_array(halves), logarithms


def _is_symmetric(parameter: cp.Parameter) -> bool:
    return any(parameter.attributes[name] for name in ("symmetric", "PSD", "NSD"))


def _logarithm_ids(reductions: _Reductions) -> dict[int, int]:
    """Parameter id to the id of its logarithm, for those that a DGP reduction replaced."""
    for reduction, _ in reductions:
        if isinstance(reduction, Dgp2Dcp):
            return {old: new[0] for old, new in reduction.param_id_map.items()}
    return {}


def _finite_rows(cone_prog: ParamConeProg) -> np.ndarray:
    """Which rows to keep, bool, shape (m,): `x <= inf` says nothing and is left out."""
    n, m = cone_prog.x.size, cone_prog.constr_size
    if not m:
        return np.zeros(0, dtype=bool)
    infinite = sp.coo_array(cone_prog.A)
    rows = infinite.coords[0][~np.isfinite(infinite.data)]
    signs = infinite.data[~np.isfinite(infinite.data)]
    row, col = rows % m, rows // m
    dims = cone_prog.cone_dims
    vacuous = (col == n) & (signs > 0) & (row >= dims.zero) & (row < dims.zero + dims.nonneg)
    if not vacuous.all():
        raise SpecificationError(
            "The problem has an infinite or NaN constant in a place where it is not an absent "
            "bound. Only `expression <= inf` and the like, which say nothing, are left out."
        )
    kept = np.ones(m, dtype=bool)
    kept[row] = False
    return kept


def _data_tensors(
    cone_prog: ParamConeProg, kept: np.ndarray
) -> tuple[Structure, dict[str, sp.csr_array]]:
    """Patterns of the data and the matrices that take CVXPY's parameter vector to the values."""
    n, m = cone_prog.x.size, int(kept.sum())
    q = sp.csr_array(cone_prog.q)
    Ab = sp.csr_array(cone_prog.A) if m else sp.csr_array((0, q.shape[1]))
    if m and not kept.all():
        Ab = Ab[np.tile(kept, n + 1)]
    P = sp.csr_array((n * n, q.shape[1])) if cone_prog.P is None else sp.csr_array(cone_prog.P)
    swap = np.arange(n * n).reshape(n, n).T.ravel()
    P = sp.csr_array((P + P[swap]) / 2)  # CVXPY may store a quadratic form one-sidedly
    P_pattern, P_rows = _pattern(P, (n, n))
    A_pattern, A_rows = _pattern(sp.csr_array(Ab[: m * n]), (m, n))
    dims = cone_prog.cone_dims
    cone = Cone(
        zero=dims.zero,
        nonneg=dims.nonneg - int((~kept).sum()),
        soc=tuple(dims.soc),
        psd=tuple(dims.psd),
        exp=dims.exp,
        power=tuple(float(alpha) for alpha in dims.p3d),
    )
    tensors = {"P": P[P_rows], "q": q[:-1], "A": -Ab[A_rows], "b": Ab[m * n :], "d": q[-1:]}
    return Structure(P_pattern, A_pattern, cone), tensors


def _pattern(tensor: sp.csr_array, shape: tuple[int, int]) -> tuple[Sparsity, np.ndarray]:
    """Which entries of a matrix are ever nonzero, and their rows (Fortran order) in a tensor."""
    tensor.eliminate_zeros()
    flat = np.flatnonzero(np.diff(tensor.indptr))
    rows, cols = (flat % shape[0], flat // shape[0]) if flat.size else (flat, flat)
    order = np.argsort(rows * shape[1] + cols, kind="stable")
    return Sparsity(shape, rows[order].astype(np.int64), cols[order].astype(np.int64)), flat[order]


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
    problem: cp.Problem, cone_prog: ParamConeProg, reductions: _Reductions, kept: np.ndarray
) -> dict[int, Source]:
    """Where every constraint's dual variables are read off y, and with which factor.

    An entry of a dual is a multiple of one entry of y. CVXPY's own inversion of y = k and
    y = k^2 for k = 1, ..., m tells which and how much.
    """
    k = np.arange(1.0, cone_prog.constr_size + 1)
    place = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # of row k; -1 is "always 0"
    sources = {}
    for (variable, first), (_, second) in zip(
        _duals(problem, cone_prog, reductions, k),
        _duals(problem, cone_prog, reductions, k**2),
        strict=True,
    ):
        entry = np.divide(second, first, out=np.zeros_like(first), where=first != 0)
        scale = np.divide(first, entry, out=np.zeros_like(first), where=first != 0)
        index = place[np.rint(entry).astype(np.int64).ravel() - 1]
        factors = None if np.all(scale[entry != 0] == 1) else scale.ravel()
        sources[variable.id] = Source(variable.shape, index, factors, dual=True)
    return sources


def _duals(
    problem: cp.Problem, cone_prog: ParamConeProg, reductions: _Reductions, y: np.ndarray
) -> Iterator[tuple[cp.Variable, np.ndarray]]:
    """Dual variables of all constraints, and the values they would take for a given y."""
    by_id, start = {}, 0
    for constraint in cone_prog.constraints:
        piece = y[start : start + constraint.size]
        by_id[constraint.id] = piece[0] if piece.size == 1 else piece
        start += constraint.size
    solution = Solution(cp.OPTIMAL, 0.0, {cone_prog.x.id: np.ones(cone_prog.x.size)}, by_id, {})
    for reduction, inverse_data in reversed(reductions):
        # A geometric program's duals are those of its convex form; only its variables change.
        step = Canonicalization if isinstance(reduction, Dgp2Dcp) else type(reduction)
        solution = step.invert(reduction, solution, inverse_data)
    for constraint in problem.constraints:
        scratch = copy.copy(constraint)  # the caller's dual variables keep their values
        scratch.dual_variables = [cp.Variable(v.shape) for v in constraint.dual_variables]
        if constraint.id in solution.dual_vars:
            scratch.save_dual_value(solution.dual_vars[constraint.id])
        for variable, filled in zip(constraint.dual_variables, scratch.dual_variables, strict=True):
            value = np.zeros(variable.shape) if filled.value is None else filled.value
            yield variable, np.asarray(value, dtype=float).reshape(variable.shape)
