"""Symmetric matrices of a batch that are made positive definite, and their factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.matrices import Matrix, full
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.records import Record
from declarative_cvx.nonconvex.minimization.sparse.factors import SparseFactors
from declarative_cvx.nonconvex.minimization.sparse.matrix import SparseMatrix, across
from declarative_cvx.nonconvex.minimization.sparse.plan import Plan

# Attempts at a factorisation in one iteration, each with more damping.
_ATTEMPTS = 6


@dataclass(frozen=True, eq=False)
class FullFactors(Record):
    """Cholesky factors, shape (batch, n, n)."""

    lower: Tensor

    def solve(self, rhs: Tensor) -> Tensor:
        """Solutions for rhs (batch, n)."""
        return torch.cholesky_solve(rhs[:, :, None], self.lower)[:, :, 0]


Factors = FullFactors | SparseFactors


class Condensed(Record, ABC):
    """A symmetric matrix for each element."""

    @abstractmethod
    def factors(self, extra: Tensor | None) -> tuple[Any, Tensor]:
        """Factors with more on the diagonal, (batch, n), and whether it is indefinite."""


@dataclass(frozen=True, eq=False)
class FullCondensed(Condensed):
    """Values of shape (batch, n, n)."""

    values: Tensor

    def factors(self, extra: Tensor | None) -> tuple[FullFactors, Tensor]:
        matrix = self.values if extra is None else self.values + torch.diag_embed(extra)
        lower, info = torch.linalg.cholesky_ex(matrix)
        return FullFactors(lower), info > 0


@dataclass(frozen=True, eq=False)
class SparseCondensed(Condensed):
    """A plan's table, (batch, entries)."""

    values: Tensor
    plan: Plan

    def factors(self, extra: Tensor | None) -> tuple[SparseFactors, Tensor]:
        table = self.values.t().clone(memory_format=torch.contiguous_format)
        if extra is not None:
            table.index_add_(0, self.plan.diagonal(table.device), across(extra))
        matrix = table.clone() if self.plan.wide else table
        factors = self.plan.factors(table)
        return factors, ~(self.plan.definite(factors) & self.plan.reliable(factors, matrix))


def condensed(
    program: NonlinearProgram,
    hessian: Matrix,
    rows: Matrix,
    weights: Tensor,  # (batch, k + l)
    diagonal: Tensor | None,  # (batch, n)
) -> Condensed:
    """H + A'diag(w)A + diag(d) of the constraints' rows A."""
    if isinstance(hessian, SparseMatrix) and isinstance(rows, SparseMatrix):
        plan = plan_of(program)
        table = plan.assemble(hessian, rows, weights, diagonal)
        return SparseCondensed(table.t(), plan)
    matrix = full(hessian) + squares(program, full(rows), weights)
    if diagonal is not None:
        matrix.diagonal(dim1=1, dim2=2).add_(diagonal)
    return FullCondensed(matrix)


def plan_of(program: NonlinearProgram) -> Plan:
    """How the matrices of a program with sparse derivatives are factorised."""
    assert program.separated is not None
    plan = program.separated.sparse.plan
    assert plan is not None
    return plan


def squares(program: NonlinearProgram, rows: Tensor, weights: Tensor) -> Tensor:
    """A' diag(w) A of the constraints' rows (batch, r, n) and weights (batch, r): (batch, n, n)."""
    separated = program.separated
    if separated is not None and separated.squares is not None:
        return separated.squares(rows, weights)
    return (rows * weights[:, :, None]).mT @ rows


def damped_factors(
    matrix: Condensed, units: Callable[[], Tensor], damping: Tensor
) -> tuple[Tensor, Any]:
    """Damping t with matrix + t diag(units) positive definite, and its factors.

    After the attempts of one iteration the last one's factors are returned, good or not. The units,
    (batch, n), are only asked for where there is damping.
    """
    free_look = damping.device.type == "cpu"
    undamped = free_look and not bool(damping.any())
    factors, failed = matrix.factors(None if undamped else damping[:, None] * units())
    for _ in range(_ATTEMPTS - 1):
        if free_look and not bool(failed.any()):
            break
        at = torch.where(failed)[0] if free_look else torch.arange(len(failed)).to(failed.device)
        raised = torch.where(failed, torch.clamp(damping * 4, min=1e-2), damping)[at]
        damping = damping.index_copy(0, at, raised)
        part, still = matrix.select(at).factors(raised[:, None] * units()[at])
        factors, failed = factors.put(at, part), failed.index_copy(0, at, still)
    return damping, factors
