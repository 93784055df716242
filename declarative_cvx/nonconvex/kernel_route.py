"""Problems written in CVXPY that a fast kernel solves."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from declarative_cvx.derivative import DerivativeReport
from declarative_cvx.errors import BackendError, SpecificationError
from declarative_cvx.irregular import Watched
from declarative_cvx.nonconvex.kernels.pooling import Pooling as PoolingKernel
from declarative_cvx.nonconvex.kernels.projection import Projection
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.nonconvex.translation.expression import translate_expressions
from declarative_cvx.parameters import Arguments
from declarative_cvx.patterns import Difference, Pattern, Pooling, ProjectionPattern
from declarative_cvx.residuals import Residuals
from declarative_cvx.route import Route, batch_of, shape_output
from declarative_cvx.solution import Solution
from declarative_cvx.transforms import observed

# Data points from which vector pooling starts, besides median and mean.
RESTARTS = 8
IRREGULAR = (
    "the data lie on a kink (the boundary of the set with a zero multiplier, a breakpoint of the "
    "penalty), or the solution is not unique; the derivative of one side is returned"
)


@dataclass(frozen=True, eq=False, repr=False)
class KernelRouteSolution(Solution):
    """The solution of a problem that a kernel solved.

    Attributes
    ----------
    kernel : KernelSolution
        The kernel's own report; for several pools per element the worst of them.
    """

    kernel: KernelSolution
    _name: str
    _seconds: float

    @property
    def codes(self) -> Tensor:
        return self.kernel.status

    @property
    def residuals(self) -> Residuals:
        """The kernel's residual, of which feasibility is a part, as the dual one."""
        found = self.kernel.residual
        none = torch.zeros_like(found)
        return Residuals(primal=none, dual=found, gap=none, cone=none)

    @property
    def derivative(self) -> DerivativeReport:
        found = self.kernel
        no = torch.zeros_like(found.regular)
        residual = torch.zeros_like(found.residual)  # formulas, not a linear solve
        return DerivativeReport(residual, ~found.regular, no, kink=IRREGULAR)

    @property
    def backend(self) -> tuple[str, ...]:
        return (self._name,) * len(self.codes)

    @property
    def iterations(self) -> tuple[int, ...]:
        return (0,) * len(self.codes)

    @property
    def seconds(self) -> float:
        return self._seconds

    @property
    def state(self) -> None:
        return None

    def describe_failures(self) -> str:
        failed = torch.nonzero(~self.solved)[:, 0].tolist()
        listed = "; ".join(
            f"element {i}: {self.status[i].name}, residual {float(self.kernel.residual[i]):.1e}"
            for i in failed[:10]
        )
        return (
            f"The kernel for {self._name} did not solve {len(failed)} of {len(self.codes)} "
            f'problems. {listed}. To go on without them use on_failure="nan".'
        )


class KernelRoute(Route):
    """A problem that fits a pattern, solved by the kernel for it.

    Parameters
    ----------
    problem : cvxpy.Problem
    pattern : Pooling or ProjectionPattern
    parameters, variables : sequence
        As for `DeclarativeLayer`; the variables are the pattern's.
    on_irregular : {"warn", "ignore", "raise"}
    restarts : int
        Starts of vector pooling beyond its own; the other kernels find the global minimum.
    """

    def __init__(
        self,
        problem: cp.Problem,
        pattern: Pattern,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        on_irregular: str,
        restarts: int,
    ) -> None:
        self._name, self._on_irregular = str(pattern), on_irregular
        self._ids = tuple(parameter.id for parameter in parameters)
        self._outputs = tuple(variable.id for variable in variables)
        self._variable, self._shape = pattern.variable.id, pattern.variable.shape
        self._kernel = _kernel_of(pattern, restarts)
        self._data = _Batched(self._kernel.expressions, self._ids)
        objective = problem.objective.expr
        self._value = _Batched([objective], (*self._ids, self._variable))

    @property
    def solvers(self) -> tuple[str, ...]:
        return (self._name,)

    def solve(
        self, arguments: Arguments, options: Mapping[str, Any] | None, start: Any
    ) -> KernelRouteSolution:
        if options:
            raise BackendError(
                f"The kernel for {self._name} has no options, got {sorted(options)}; name a solver "
                "to use its own."
            )
        began = time.perf_counter()
        values = [value.to(torch.float64) for value in arguments.values]
        batch = batch_of(arguments)
        data = self._data(values, arguments.batched, batch)
        found = self._kernel.solve(*data)
        u = Watched.apply(found.value, ~found.regular, IRREGULAR, self._on_irregular)
        u = torch.where(found.solved[:, None], u, torch.nan).reshape(batch, *self._shape)
        names = ("objective", "status", "residual", "gap", "regular")
        seen = observed(*(getattr(found, name) for name in names))
        report = replace(found, **dict(zip(names, seen, strict=True)))
        (value,) = self._value([*values, u], (*arguments.batched, True), batch)
        recover = partial(self._recover, shape_output(arguments, u))
        return KernelRouteSolution(
            variables=tuple(recover(identity) for identity in self._outputs),
            _evaluate=partial(shape_output, arguments, value),
            kernel=report,
            _recover=recover,
            _name=self._name,
            _seconds=time.perf_counter() - began,
        )

    def _recover(self, u: Tensor, identity: int) -> Tensor:
        if identity != self._variable:
            raise SpecificationError(
                f"The kernel for {self._name} gives no multipliers; ask for one in variables= to "
                "have the problem solved by another method."
            )
        return u


class _Batched:
    """Expressions as functions of a batch of parameter values."""

    def __init__(self, expressions: Sequence[cp.Expression], ids: Sequence[int]) -> None:
        self._expressions, self._ids = tuple(expressions), tuple(ids)
        self._function = translate_expressions(expressions, [str(e) for e in expressions])

    def __call__(
        self, values: Sequence[Tensor], batched: Sequence[bool], batch: int
    ) -> tuple[Tensor, ...]:
        """Values of shape (batch, *shape)."""
        table = dict(zip(self._ids, values, strict=True))
        dims = {i: 0 if b else None for i, b in zip(self._ids, batched, strict=True)}
        if any(batched):
            return torch.func.vmap(self._function, in_dims=(dims,))(table)
        return tuple(v.expand(batch, *v.shape) for v in self._function(table))

    def __deepcopy__(self, memo: Any) -> _Batched:
        return self  # nothing in it changes, and CVXPY gives copies of its leaves new ids

    def __getstate__(self) -> dict[str, Any]:
        return {"expressions": self._expressions, "ids": self._ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _PatternKernel(ABC):
    """How a pattern's data, computed for a batch, are handed to a kernel.

    Attributes
    ----------
    expressions : list of cvxpy.Expression
        Functions of the parameters, whose values `solve` takes.
    """

    expressions: list[cp.Expression]

    @abstractmethod
    def solve(self, *data: Tensor) -> KernelSolution:
        """A solution for each element; its value has shape (batch, entries of the variable)."""


def _kernel_of(pattern: Pattern, restarts: int) -> _PatternKernel:
    if isinstance(pattern, ProjectionPattern):
        return _ProjectionKernel(pattern)
    return _VectorPooling(pattern, restarts) if pattern.vector else _ScalarPooling(pattern)


class _ProjectionKernel(_PatternKernel):
    def __init__(self, pattern: ProjectionPattern) -> None:
        self.expressions = [pattern.data.data, pattern.radius]
        self._onto, self._p = pattern.onto, pattern.p
        self._order = np.argsort(pattern.data.index, axis=None)

    def solve(self, *data: Tensor) -> KernelSolution:
        points, radius = data
        points = points.flatten(1)[:, torch.as_tensor(self._order, device=points.device)]
        return Projection(self._onto, self._p, radius.flatten()).solve(points)


class _ScalarPooling(_PatternKernel):
    """One pool for every entry of the variable; shorter pools are filled with weights of zero."""

    def __init__(self, pattern: Pooling) -> None:
        self.expressions = [d.data for d in pattern.data]
        self.expressions += [_broadcast(w, d) for w, d in zip(*_zip(pattern), strict=True)]
        self.expressions.append(pattern.alpha)
        self._count, self._penalty = len(pattern.data), pattern.penalty
        index = np.concatenate([d.index.ravel() for d in pattern.data])
        sizes = np.bincount(index)
        self._places = np.zeros((len(sizes), sizes.max()), dtype=np.int64)
        self._filled = np.arange(sizes.max()) < sizes[:, None]
        self._places[self._filled] = np.argsort(index, kind="stable")
        self._weighted = not self._filled.all() or not _are_equal(pattern.weights)

    def solve(self, *data: Tensor) -> KernelSolution:
        *rest, alpha = data
        count, device = self._count, alpha.device
        places = torch.as_tensor(self._places, device=device)
        x = _rows(rest[:count])[:, places]
        weights, some = None, torch.ones_like(alpha, dtype=torch.bool)[:, None]
        if self._weighted:
            filled = torch.as_tensor(self._filled, device=device).to(x.dtype)
            weights, some = _usable(_rows(rest[count:])[:, places] * filled, filled)
        pooling = PoolingKernel(self._penalty, -1, False, None, 0)
        found = pooling.solve(x, alpha.reshape(-1, 1), weights)
        return _worst(replace(found, regular=found.regular & some.flatten(1)))


class _VectorPooling(_PatternKernel):
    def __init__(self, pattern: Pooling, restarts: int) -> None:
        self._restarts = RESTARTS + restarts
        self.expressions = [d.data for d in pattern.data]
        self.expressions += [
            w + np.zeros(d.index.shape[0]) for w, d in zip(*_zip(pattern), strict=True)
        ]
        self.expressions.append(pattern.alpha)
        self._count, self._penalty = len(pattern.data), pattern.penalty
        self._weighted = not _are_equal(pattern.weights)

    def solve(self, *data: Tensor) -> KernelSolution:
        *rest, alpha = data
        x = torch.cat(rest[: self._count], 1)  # (batch, points, d)
        weights, some = None, torch.ones_like(alpha, dtype=torch.bool)
        if self._weighted:
            weights, some = _usable(torch.cat(rest[self._count :], 1), alpha.new_ones(()))
            weights, some = weights[:, :, None], some[:, 0]
        pooling = PoolingKernel(self._penalty, 1, False, 2, self._restarts)
        found = pooling.solve(x, alpha.reshape(-1, 1), weights)
        return replace(found, regular=found.regular & some)


def _usable(weights: Tensor, equal: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (..., n) of which some are positive, and which pools (..., 1) had such.

    A negative one is the rounding that a nonnegative parameter is allowed. Where all are zero any
    point is a minimum: that of equal weights is taken.
    """
    weights = weights.clamp(min=0.0)
    some = weights.detach().amax(-1, keepdim=True) > 0
    return torch.where(some, weights, equal), some


def _rows(values: Sequence[Tensor]) -> Tensor:
    """Values (batch, ...) side by side, one row for each element."""
    return torch.cat([v.flatten(1) if v.dim() > 1 else v[:, None] for v in values], 1)


def _zip(pattern: Pooling) -> tuple[tuple[cp.Expression, ...], tuple[Difference, ...]]:
    return pattern.weights, pattern.data


def _broadcast(weights: cp.Expression, difference: Difference) -> cp.Expression:
    return weights + np.zeros(difference.index.shape)


def _are_equal(weights: Sequence[cp.Expression]) -> bool:
    """Whether weights are all the same, as if there were none."""
    if any(expression.parameters() for expression in weights):
        return False
    return len(np.unique(np.concatenate([np.ravel(w.value) for w in weights]))) == 1


def _worst(found: KernelSolution) -> KernelSolution:
    """One report for each element out of those for its pools, (batch, pools)."""
    return KernelSolution(
        value=found.value,
        objective=found.objective.sum(1),
        status=found.status.amax(1),
        residual=found.residual.amax(1),
        gap=found.gap.amax(1),
        regular=found.regular.all(1),
    )
