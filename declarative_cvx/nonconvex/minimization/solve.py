"""Solve a batch of nonlinear programs, with a derivative."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from declarative_cvx.derivative.regularity import DerivativeReport
from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.minimization.differentiable import (
    NonlinearCall,
    minimize_differentiably,
)
from declarative_cvx.nonconvex.minimization.evaluation import equality_count
from declarative_cvx.nonconvex.minimization.function_checks import checked_functions
from declarative_cvx.nonconvex.minimization.interior_point import InteriorPoint
from declarative_cvx.nonconvex.minimization.kkt_residual import KKTResiduals
from declarative_cvx.nonconvex.minimization.lbfgs import LBFGS
from declarative_cvx.nonconvex.minimization.local_minimum import local_minima
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.trust_region import TrustRegion
from declarative_cvx.status import Status
from declarative_cvx.transforms import without_inference_mode

# Variables from which, without constraints, Hessians of every iterate cost more than they save.
MANY = 40


@dataclass(frozen=True, eq=False)
class NonlinearSolution:
    """Local minima of a batch, their multipliers, and what is known about them.

    Elements without a verified answer are NaN. The Lagrangian is
    f + equality'h + inequality'g - lower_bound'(x - lower) - upper_bound'(upper - x), so all
    multipliers but those of equalities are nonnegative; DDN's are their negatives.

    Attributes
    ----------
    x : Tensor, shape (batch, n)
    equality, inequality : Tensor, shapes (batch, k) and (batch, l)
    lower_bound, upper_bound : Tensor, shape (batch, n)
    value : Tensor, shape (batch,)
        All of these are differentiable.
    residuals : KKTResiduals
        Violations of the optimality conditions, relative, each of shape (batch,).
    iterations : Tensor of int64, shape (batch,)
        Of all starts together.
    codes : Tensor of int64, shape (batch,)
        `status` as numbers.
    """

    x: Tensor
    equality: Tensor
    inequality: Tensor
    lower_bound: Tensor
    upper_bound: Tensor
    value: Tensor
    residuals: KKTResiduals
    iterations: Tensor
    codes: Tensor
    _call: NonlinearCall = field(repr=False)

    @property
    def status(self) -> tuple[Status, ...]:
        """One per element. INFEASIBLE: no point nearby violates the constraints less."""
        return tuple(Status(code) for code in self.codes.tolist())

    @property
    def solved(self) -> Tensor:
        """Whether each element has a verified answer, bool, shape (batch,)."""
        return self.codes == int(Status.OPTIMAL)

    @property
    def source(self) -> Tensor:
        """Who found each element: 0 the minimiser, 1 the first of its alternatives, ..."""
        assert self._call.found is not None
        return self._call.found.source

    @property
    def derivative(self) -> DerivativeReport:
        """Whether there is a derivative, and how accurately the adjoint system is solved."""
        return self._call.assess()

    @property
    def regular(self) -> Tensor:
        """Whether each element has a derivative, bool, shape (batch,)."""
        return self.derivative.regular

    def __repr__(self) -> str:
        names = [status.name for status in self.status]
        counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
        worst = self.residuals.worst[self.solved]
        residual = f", largest residual {float(worst.max()):.1e}" if worst.numel() else ""
        return f"NonlinearSolution({counts}{residual})"


def automatic_minimizer(program: NonlinearProgram) -> Minimizer:
    """The minimiser for a program by its variables and constraints, whatever the batch."""
    if program.equality is not None or program.inequality is not None:
        return InteriorPoint()
    return LBFGS() if program.variables >= MANY else TrustRegion()


@without_inference_mode()
def solve_nonlinear(
    program: NonlinearProgram,
    start: Tensor,
    minimizer: Minimizer | None = None,
    on_irregular: str = "warn",
) -> NonlinearSolution:
    """Local minima of a batch of nonlinear programs, differentiable in parameters and bounds.

    Parameters
    ----------
    program : NonlinearProgram
        Its parameters and bounds are converted to float64.
    start : Tensor, shape (batch or 1, n) or (starts, batch or 1, n)
        Of several starts the one that leads to the lowest value is kept, the first of those that
        do (within rounding), so that a warm start in the first place keeps its branch. The answer
        has its dtype.
    minimizer : Minimizer or None
        None: `automatic_minimizer(program)`.
    on_irregular : {"warn", "ignore", "raise"}
        What a gradient does at an element that has none.

    Raises
    ------
    ParameterError
        The start, a parameter or a bound has the wrong shape.
    SpecificationError
        A function returns something of the wrong shape, or uses a tensor that requires a
        gradient and is no parameter.
    """
    starts = _checked_start(program, start)
    _check(program)
    exact = replace(
        program,
        parameters=tuple(_double(v) for v in program.parameters),
        lower=None if program.lower is None else _double(program.lower),
        upper=None if program.upper is None else _double(program.upper),
    )
    exact = checked_functions(exact, starts[0])
    chosen = automatic_minimizer(exact) if minimizer is None else minimizer
    call = NonlinearCall(exact, partial(local_minima, minimizer=chosen), on_irregular)
    found = minimize_differentiably(exact, starts, call)
    x, y, lower, upper, value = (v.to(start.dtype) for v in found)
    assert call.found is not None
    k = equality_count(exact)
    return NonlinearSolution(
        x, y[:, :k], y[:, k:], lower, upper, value,
        call.found.residuals, call.found.iterations, call.found.status, call,
    )  # fmt: skip


def _double(value: Tensor) -> Tensor:
    value = value.clone() if value.is_inference() else value
    return value.to(torch.float64)


def _checked_start(program: NonlinearProgram, start: Tensor) -> Tensor:
    """Starts of every element, float64, shape (starts, batch, n)."""
    n, batch = program.variables, program.batch
    starts = start[None] if start.dim() == 2 else start
    good = starts.dim() == 3 and starts.shape[2] == n and starts.shape[1] in (1, batch)
    if not good or not len(starts):
        raise ParameterError(
            f"start has shape {tuple(start.shape)}, but ({batch} or 1, {n}), or that for several "
            f"starts, ({batch} or 1, {n}) after their number, is expected."
        )
    if not start.is_floating_point():
        raise ParameterError(
            f"start has dtype {start.dtype}, but a floating-point one is expected."
        )
    return _double(starts.detach()).expand(-1, batch, -1)


def _check(program: NonlinearProgram) -> None:
    for index, tensor in enumerate(program.parameters):
        if tensor.dim() < 1 or tensor.shape[0] not in (1, program.batch):
            raise ParameterError(
                f"parameter {index} has shape {tuple(tensor.shape)}, but a first dimension of 1 or "
                f"{program.batch}, the batch, is expected."
            )
        if not tensor.is_floating_point():
            raise ParameterError(
                f"parameter {index} has dtype {tensor.dtype}, but a floating-point one is expected."
            )
    for name, value in (("lower", program.lower), ("upper", program.upper)):
        if value is not None and (
            value.dim() != 2
            or value.shape[1] != program.variables
            or value.shape[0] not in (1, program.batch)
        ):
            raise ParameterError(
                f"{name} has shape {tuple(value.shape)}, but ({program.batch} or 1, "
                f"{program.variables}) is expected."
            )
    if program.variables < 1:
        raise SpecificationError("the program has no variables.")
