"""Blocks of the lifted problem, each of them convex, and how each is minimised (IDL Sec. 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.training.composite import (
    Composite,
    Minimum,
    Potentials,
    newton,
)
from declarative_cvx.nonconvex.implicit.training.lifted import LiftedProblem, Variables
from declarative_cvx.nonconvex.implicit.training.parameter_matrix import ParameterMatrix, region
from declarative_cvx.nonconvex.implicit.training.penalties import Penalties
from declarative_cvx.nonconvex.implicit.training.penalty_terms import Constraint
from declarative_cvx.nonconvex.implicit.training.proximal import (
    Penalised,
    conditional_gradient,
    newton_cg,
    proximal_gradient,
    proximal_newton,
)
from declarative_cvx.nonconvex.implicit.training.row_functions import (
    LossRows,
    RowFunction,
    SeparateRows,
    Stacked,
)
from declarative_cvx.nonconvex.implicit.training.state_terms import (
    OwnDivergence,
    PredictionLoss,
    Proximity,
    StateTerm,
    StateTerms,
)
from declarative_cvx.nonconvex.implicit.training.states import (
    StateProblem,
    fixed_point_x,
    minimise_states,
    minimise_x,
)

WEIGHT_UPDATES = ("exact", "gradient", "conditional_gradient")
STATE_UPDATES = ("exact", "fixed_point")


@dataclass(frozen=True)
class BlockMethod:
    """How blocks are minimised.

    Parameters
    ----------
    weight_update : {"exact", "gradient", "conditional_gradient"}
        Of (A, B) and (C, D): to the minimum by Newton's method and exact projections or proxes; by
        so many proximal gradient steps; or by conditional gradients, which every part of the
        block has to be bounded for.
    state_update : {"exact", "fixed_point"}
        Of X.
    gradient_steps : int
    tol : float
        Residual of the optimality conditions, relative to their terms, that counts as a minimum.
    """

    weight_update: str = "exact"
    state_update: str = "exact"
    gradient_steps: int = 200
    tol: float = 1e-8

    def __post_init__(self) -> None:
        _require_choice("weight_update", self.weight_update, WEIGHT_UPDATES)
        _require_choice("state_update", self.state_update, STATE_UPDATES)


def minimise_block(
    name: str, problem: LiftedProblem, at: Variables, method: BlockMethod
) -> tuple[Variables, Minimum]:
    """Minimise over "AB", "CD", "ABCD", "X" or "P", the others being fixed."""
    return _BLOCKS[name](problem, at, method)


def check_order(order: tuple[str, ...]) -> None:
    """Refuse names that are no blocks."""
    for k, name in enumerate(order):
        _require_choice(f"order[{k}]", name, tuple(_BLOCKS))


def _minimise_p(
    problem: LiftedProblem, at: Variables, method: BlockMethod
) -> tuple[Variables, Minimum]:
    weights = at.weights
    offset = weights.offsets(problem.u)
    terms: list[StateTerm] = [_prediction(problem, weights)]
    if problem.mu is None:
        terms.append(OwnDivergence(problem.activation, weights.A, offset, problem.weight))
        states = StateProblem(StateTerms(terms), problem.activation, offset, problem.weight)
    else:
        terms.append(Proximity(problem.mu, at.x))
        z = at.x @ weights.A.T + offset
        states = StateProblem(StateTerms(terms, problem.mu), problem.activation, z, problem.weight)
    found = minimise_states(states, at.p, method.tol)
    return Variables(weights, found.point if problem.mu is None else at.x, found.point), found


def _prediction(problem: LiftedProblem, weights: ParameterMatrix) -> PredictionLoss:
    offset = weights.output_offsets(problem.u)
    return PredictionLoss(problem.loss, weights.C, offset, problem.y)


def _minimise_x(
    problem: LiftedProblem, at: Variables, method: BlockMethod
) -> tuple[Variables, Minimum]:
    if problem.mu is None:
        return _minimise_p(problem, at, method)
    minimise = minimise_x if method.state_update == "exact" else fixed_point_x
    weights = at.weights
    found = minimise(
        weights.A, weights.offsets(problem.u), at.p, problem.activation, problem.weight,
        problem.mu, at.x, tol=method.tol,
    )  # fmt: skip
    return Variables(weights, found.point, at.p), found


def _minimise_ab(
    problem: LiftedProblem, at: Variables, method: BlockMethod
) -> tuple[Variables, Minimum]:
    function = divergence_rows(problem, at)
    rows = _Rows(problem.penalties.part("AB"), at.weights, slice(0, at.weights.states))
    if method.weight_update == "exact" and not rows.penalties.terms:
        found = newton(function.rows, at.weights.top, method.tol)
    else:
        found = rows.minimise(function, method)
    return at.with_weights(at.weights.with_top(found.point)), found


def _minimise_cd(
    problem: LiftedProblem, at: Variables, method: BlockMethod
) -> tuple[Variables, Minimum]:
    function = loss_rows(problem, at)
    rows = _Rows(problem.penalties.part("CD"), at.weights, slice(at.weights.states, None))
    if method.weight_update == "exact" and not rows.penalties.terms:
        found = _without_penalty(function, at.weights.bottom, method.tol)
    else:
        found = rows.minimise(function, method)
    return at.with_weights(at.weights.with_bottom(found.point)), found


def _without_penalty(function: RowFunction, start: Tensor, tol: float) -> Minimum:
    if isinstance(function, SeparateRows):
        return newton(function.rows, start, tol)
    return newton_cg(function, start, tol)


def _minimise_abcd(
    problem: LiftedProblem, at: Variables, method: BlockMethod
) -> tuple[Variables, Minimum]:
    both = Stacked(divergence_rows(problem, at), loss_rows(problem, at), at.weights.states)
    rows = _Rows(problem.penalties.part("ABCD"), at.weights, slice(None))
    found = rows.minimise(both, method)
    return at.with_weights(at.weights.with_matrix(found.point)), found


_Block = Callable[[LiftedProblem, Variables, BlockMethod], tuple[Variables, Minimum]]
_BLOCKS: dict[str, _Block] = {
    "AB": _minimise_ab,
    "CD": _minimise_cd,
    "ABCD": _minimise_abcd,
    "X": _minimise_x,
    "P": _minimise_p,
}


def divergence_rows(problem: LiftedProblem, at: Variables) -> SeparateRows:
    """sum_i w_i F(P, AX + BU)_i and the quadratic penalties as a function of (A, B, b)."""
    n, weights = at.weights.states, at.weights
    K = weights.regressors(at.x, problem.u)
    Q, r = (part[:n] for part in problem.quadratic(weights))
    weight = problem.weight[:, None]
    potentials = Potentials(
        problem.activation, K, K.new_zeros(1, len(K)), weight.expand(n, len(K)),
        over_batch=True, total=problem.total,
    )  # fmt: skip
    return SeparateRows(Composite(Q, r + weight * problem.total.sum(at.p.T @ K), potentials))


def loss_rows(problem: LiftedProblem, at: Variables) -> RowFunction:
    """L(Y, CP + DU) and the quadratic penalties as a function of (C, D, c)."""
    n, weights = at.weights.states, at.weights
    K = weights.regressors(at.p, problem.u)
    Q, r = (part[n:] for part in problem.quadratic(weights))
    if not problem.loss.quadratic:
        return LossRows(problem.loss, K, problem.y, Q, r, problem.total)
    gram = problem.total.sum(K.T @ K)
    return SeparateRows(Composite(Q + gram, r + problem.total.sum(problem.y.T @ K)))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of the parameters, with the penalties on them."""

    penalties: Penalties
    weights: ParameterMatrix
    rows: slice

    def minimise(self, function: RowFunction, method: BlockMethod) -> Minimum:
        start = self.weights.matrix[self.rows]
        if method.weight_update == "conditional_gradient":
            self._check_bounded()
            return conditional_gradient(function, self._vertex, start)
        by_row = self.penalties.by_row
        jacobian = self._jacobian if by_row else None
        penalised = Penalised(function, self._penalty, self._prox, by_row, jacobian)
        if method.weight_update == "gradient":
            return proximal_gradient(penalised, start, method.gradient_steps)
        return proximal_newton(penalised, start, method.tol)

    def _penalty(self, V: Tensor) -> Tensor:
        weights = self._with(V)
        if self.penalties.by_row:
            return self.penalties.values(weights)[self.rows]
        return self.penalties.value(weights)[None]

    def _prox(self, V: Tensor, step: Tensor) -> Tensor:
        return self.penalties.prox(self._with(V), self._steps(step)).matrix[self.rows]

    def _jacobian(self, V: Tensor, step: Tensor) -> Tensor:
        return self.penalties.jacobian(self._with(V), self._steps(step))[self.rows]

    def _steps(self, step: Tensor) -> Tensor:
        steps = step.new_ones(len(self.weights.matrix), 1)
        steps[self.rows] = step
        return steps

    def _vertex(self, G: Tensor) -> Tensor:
        full, vertex = self._with(G).matrix, torch.zeros_like(self.weights.matrix)
        for term in self.penalties.terms:
            assert isinstance(term, Constraint)
            place = region(term.on, self.weights)
            vertex[place] = term.vertex(full[place])
        return vertex[self.rows]

    def _with(self, V: Tensor) -> ParameterMatrix:
        matrix = self.weights.matrix.clone()
        matrix[self.rows] = V
        return self.weights.with_matrix(matrix)

    def _check_bounded(self) -> None:
        covered = torch.zeros_like(self.weights.matrix, dtype=torch.bool)
        for term in self.penalties.terms:
            if isinstance(term, Constraint):
                covered[region(term.on, self.weights)] = True
        if not bool(covered[self.rows].all()) or not all(
            isinstance(term, Constraint) for term in self.penalties.terms
        ):
            raise SpecificationError(
                "Conditional gradients need a bounded set: every block (and there are no biases) "
                f"in a ball such as RowBall or L1Ball, or Zero; got {self.penalties.terms}. Add "
                'the missing balls and bias=False, or use weight_update="exact".'
            )


def _require_choice(name: str, given: object, known: tuple[str, ...]) -> None:
    if given not in known:
        raise SpecificationError(f"{name} is {given!r}; expected one of {', '.join(known)}.")
