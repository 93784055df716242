"""Values and derivatives of a batch of nonlinear programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.matrices import (
    Matrix,
    entry_sum,
    first_row,
    full,
    mix,
    other_rows,
)
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram, Parameters
from declarative_cvx.nonconvex.minimization.records import Record
from declarative_cvx.nonconvex.minimization.scalars.separated import Separated
from declarative_cvx.nonconvex.minimization.sparse.matrix import SparseMatrix
from declarative_cvx.nonconvex.minimization.sparse.plan import Plan

# Entries of Jacobians from which rows are pulled back one by one, if there are large parameters:
# the copies of these that batched passes make then cost more than they save (measured).
_TOGETHER = 40_000


@dataclass(frozen=True, eq=False)
class Evaluation(Record):
    """A program at a point: row 0 is the objective, then the equalities, then the inequalities.

    Attributes
    ----------
    values : Tensor, shape (batch, 1 + k + l)
    jacobian : Tensor or SparseMatrix, shape (batch, 1 + k + l, n)
    hessian : Tensor or SparseMatrix, shape (batch, n, n)
        Of the rows' sum, weighted as asked for; (batch, 0, 0) if it was not.
    plan : Plan or None
        How systems with sparse matrices are factorised.
    """

    values: Tensor
    jacobian: Matrix
    hessian: Matrix
    plan: Plan | None = None

    @property
    def objective(self) -> Tensor:
        return self.values[:, 0]

    @cached_property
    def gradient(self) -> Tensor:
        return first_row(self.jacobian)

    @property
    def constraints(self) -> Tensor:
        return self.values[:, 1:]

    @cached_property
    def rows(self) -> Matrix:
        """Jacobian of the constraints, shape (batch, k + l, n)."""
        return other_rows(self.jacobian)

    @property
    def finite(self) -> Tensor:
        """Whether every number of an element is finite, bool, shape (batch,)."""
        total = self.values.sum(1) + entry_sum(self.jacobian) + entry_sum(self.hessian)
        return torch.isfinite(total)

    def dense(self) -> Evaluation:
        """The same with full matrices."""
        return Evaluation(self.values, full(self.jacobian), full(self.hessian))


def equality_count(program: NonlinearProgram) -> int:
    """Number of equalities, by evaluating one element's if it is not known."""
    if program.equality is None:
        return 0
    if program.separated is not None:
        return program.separated.sizes[1]
    if program.equalities is not None:
        return program.equalities
    x = torch.zeros(1, program.variables, dtype=torch.float64, device=program.device)
    with torch.no_grad():
        first = tuple(value[:1].detach() for value in program.parameters)
        return mapped(program, program.equality, x, first).shape[1]


def row_count(program: NonlinearProgram) -> int:
    """Number 1 + k + l of rows, by evaluating one element's if it is not known."""
    if program.separated is not None:
        return sum(program.separated.sizes)
    x = torch.zeros(1, program.variables, dtype=torch.float64, device=program.device)
    with torch.no_grad():
        first = tuple(value[:1].detach() for value in program.parameters)
        return row_values(program, x, first).shape[1]


def mapped(
    program: NonlinearProgram, function: Callable[..., Any], x: Tensor, parameters: Parameters
) -> Any:
    """A function of the program's kind at every element of a batch.

    Parameters
    ----------
    program : NonlinearProgram
        Says what kind that is.
    function : callable
        Returns a tensor, or a tuple of them.
    x : Tensor, shape (batch, n)
    parameters : tuple of Tensor
        Each (batch or 1, ...).
    """
    if program.batched:
        return function(x, parameters)
    shared = len(x) > 1
    dims = tuple(None if shared and len(value) == 1 else 0 for value in parameters)
    values = tuple(v[0] if d is None else v for v, d in zip(parameters, dims, strict=True))
    return torch.func.vmap(function, (0, dims))(x, values)


def row_values(program: NonlinearProgram, x: Tensor, parameters: Parameters) -> Tensor:
    """Objective and constraints, by differentiable operations, shape (batch, 1 + k + l).

    Parameters
    ----------
    program : NonlinearProgram
        For its functions.
    x : Tensor, shape (batch, n)
    parameters : tuple of Tensor
        Each (batch or 1, ...).
    """
    functions = [program.objective, program.equality, program.inequality]

    def all_at_once(x: Tensor, p: Parameters) -> tuple[Tensor, ...]:
        return tuple(function(x, p) for function in functions if function is not None)

    first, *rest = mapped(program, all_at_once, x, parameters)
    return torch.cat([first[:, None], *rest], 1) if rest else first[:, None]


def values(program: NonlinearProgram, x: Tensor) -> Tensor:
    """Objective and constraints at x, shape (batch, 1 + k + l)."""
    with torch.no_grad():
        if program.separated is not None:
            return program.separated.values(len(x), x, *flat_parameters(program.parameters))[0]
        return row_values(program, x, program.parameters)


def evaluate(
    program: NonlinearProgram,
    x: Tensor,  # (batch, n)
    weights: Tensor | None = None,  # (batch, 1 + k + l), or of the first rows
) -> Evaluation:
    """Values, Jacobian and, for given weights of the rows, the Hessian of their sum.

    By scalars where the functions can be taken apart; otherwise by one pass forward and batched
    passes backward: reverse over reverse mode costs a third of
    forward over reverse mode through nested transforms, whose bookkeeping dominates small
    problems, and no more where arithmetic dominates.
    """
    if program.separated is not None:
        return _evaluate_scalars(program.separated, program, x, weights)
    with graph():
        x = x.detach().clone().requires_grad_()
        rows = row_values(program, x, tuple(v.detach() for v in program.parameters))
        second = weights is not None
        heavy = _has_large_parameters(program)
        jacobian = _jacobian(rows, x, second, heavy)
        if weights is None:
            hessian = x.new_zeros(len(x), 0, 0)
        else:
            gradient = mix(weights, jacobian[:, : weights.shape[1]])
            hessian = _jacobian(gradient, x, False, heavy).detach()
    return Evaluation(rows.detach(), jacobian.detach(), hessian)


def _evaluate_scalars(
    separated: Separated, program: NonlinearProgram, x: Tensor, weights: Tensor | None
) -> Evaluation:
    batch, n = x.shape
    given, none = [x.detach(), *flat_parameters(program.parameters)], x.new_zeros(batch, 0, 0)
    if weights is not None:
        missing = sum(separated.sizes) - weights.shape[1]
        given.insert(1, torch.nn.functional.pad(weights.detach(), (0, missing)))
    if program.sparse:
        return _evaluate_sparse(separated, batch, given, weights is not None, none)
    if weights is None:
        rows, slopes = separated.first(batch, *given)
        return Evaluation(rows, slopes.view(batch, -1, n), none)
    rows, slopes, hessian = separated.second(batch, *given)
    return Evaluation(rows, slopes.view(batch, -1, n), hessian.view(batch, n, n))


def _evaluate_sparse(
    separated: Separated, batch: int, given: list[Tensor], second: bool, none: Tensor
) -> Evaluation:
    sparse = separated.sparse
    if not second:
        rows, slopes = sparse.first(batch, *given)
        return Evaluation(rows, SparseMatrix(slopes, sparse.jacobian), none, sparse.plan)
    rows, slopes, curvatures = sparse.second(batch, *given)
    hessian = SparseMatrix(curvatures, sparse.hessian)
    return Evaluation(rows, SparseMatrix(slopes, sparse.jacobian), hessian, sparse.plan)


def flat_parameters(parameters: Parameters) -> list[Tensor]:
    """Each (batch or 1, entries)."""
    return [value.detach().reshape(len(value), -1) for value in parameters]


@contextmanager
def graph() -> Iterator[None]:
    """Context in which derivatives can be taken, whatever surrounds it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _has_large_parameters(program: NonlinearProgram) -> bool:
    """Whether elements have parameters of their own that are much larger than x."""
    own = (value[0].numel() for value in program.parameters if len(value) > 1)
    return max(own, default=0) > 4 * program.variables


def _jacobian(rows: Tensor, x: Tensor, create_graph: bool, heavy: bool) -> Tensor:
    """Derivatives of rows (batch, m) by x (batch, n), element by element: (batch, m, n)."""
    (batch, m), n = rows.shape, x.shape[1]
    if not rows.requires_grad:
        return x.new_zeros(batch, m, n)
    if m == 1:
        (found,) = torch.autograd.grad(
            rows.sum(), x, create_graph=create_graph, materialize_grads=True, allow_unused=True
        )
        return found[:, None]
    unit = torch.eye(m, dtype=rows.dtype, device=rows.device)[:, None].expand(m, batch, m)
    together = not heavy or m * n * batch <= _TOGETHER

    def pull(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(
            rows,
            x,
            cotangent,
            is_grads_batched=together,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
            allow_unused=True,
        )[0]

    found = pull(unit) if together else torch.stack([pull(row) for row in unit])
    return found.movedim(0, 1)


def hessian_product(
    program: NonlinearProgram,
    x: Tensor,  # (batch, n)
    multipliers: Tensor,  # (batch, k + l)
) -> Callable[[Tensor], Tensor]:
    """The map from v, (batch, n), to the Hessian of the Lagrangian times v."""
    separated = program.separated
    if separated is not None:
        x, multipliers = x.detach(), multipliers.detach()
        rest = flat_parameters(program.parameters)
        return lambda v: separated.product(len(x), x, multipliers, v, *rest)[0]
    with graph():
        x = x.detach().clone().requires_grad_()
        rows = row_values(program, x, tuple(v.detach() for v in program.parameters))
        total = rows[:, 0].sum() + (rows[:, 1:] * multipliers).sum()
        gradient = torch.autograd.grad(total, x, create_graph=True, materialize_grads=True)[0]

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(v)
        return torch.autograd.grad(
            gradient, x, v, retain_graph=True, materialize_grads=True, allow_unused=True
        )[0]

    return product
