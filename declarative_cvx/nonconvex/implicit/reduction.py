"""States that need no fixed point, and states that need not be there (IDL 6.1, 6.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError, SpecificationError, nearest
from declarative_cvx.nonconvex.fixed_points.settings import check_solver
from declarative_cvx.nonconvex.implicit.algebra import select_states, taken
from declarative_cvx.nonconvex.implicit.equilibrium import solve_equilibrium
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

# Of `solve_equilibrium`, where they mean something for all states.
_OPTIONS = ("tol", "max_iters", "method", "on_irregular")


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller model of the same rule, and what went.

    Attributes
    ----------
    weights : ImplicitWeights
        Of the states in `kept`, in that order.
    kept, constant, unseen : Tensor of int64
        States of the original model: those that are left; those that do not depend on the input,
        now part of the biases; and those that no output depends on.
    idle_inputs : Tensor of int64
        Inputs without any effect on an output (IDL 6.1). They remain inputs.
    entries : int
        Weights that are not zero, before.
    """

    weights: ImplicitWeights
    kept: Tensor
    constant: Tensor
    unseen: Tensor
    idle_inputs: Tensor
    entries: int

    def __str__(self) -> str:
        before = len(self.kept) + len(self.constant) + len(self.unseen)
        return (
            f"{before} -> {len(self.kept)} states ({len(self.constant)} constant, "
            f"{len(self.unseen)} unseen by the outputs); {self.entries} -> "
            f"{_count_entries(self.weights)} weights that are not zero; "
            f"{len(self.idle_inputs)} of {self.weights.in_features} inputs without effect."
        )


@dataclass(frozen=True)
class Partition:
    """States by how they are computed (IDL 6.2, applied until nothing changes).

    Attributes
    ----------
    before : tuple of Tensor of int64
        States that depend on no cycle, by substitution, one level after the other. (Row sparsity:
        the first level are the zero rows of A.)
    core : Tensor of int64
        States that need a fixed point. None in a feedforward network.
    after : tuple of Tensor of int64
        States that no cycle depends on, by substitution. (Column sparsity of A.)
    """

    before: tuple[Tensor, ...]
    core: Tensor
    after: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Graph:
    """Which group of states (of one state each where phi is componentwise) depends on which.

    Attributes
    ----------
    user, source : Tensor of int64, shape (edges,)
        Group `user` depends on group `source`.
    owner : Tensor of int64, shape (n,)
        The group of each state.
    count : int
        Number of groups.
    """

    user: Tensor
    source: Tensor
    owner: Tensor
    count: int

    @classmethod
    def of(cls, weights: ImplicitWeights) -> _Graph:
        sizes = weights.activation.groups(weights.state_features)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes).long())
        owner = owner.to(weights.A.device)
        user, source = owner[_nonzero(weights.A)]
        return cls(user, source, owner, len(sizes))

    def reversed(self) -> _Graph:
        return replace(self, user=self.source, source=self.user)

    def groups(self, states: Tensor) -> Tensor:
        """Whether each group has one of these states."""
        return self._mask(self.owner[states])

    def levels(self, excluded: Tensor) -> Tensor:
        """The level at which each group can be computed by substitution, -1 if at none."""
        level = torch.full((self.count,), -1, device=self.owner.device)
        for number in range(self.count):
            ready = ~self._mask(self.user[level[self.source] < 0]) & ~excluded & (level < 0)
            if not bool(ready.any()):
                break
            level[ready] = number
        return level

    def reach(self, start: Tensor) -> Tensor:
        """The groups that depend on one of `start`, itself included."""
        reached = start
        for _ in range(self.count):
            further = reached | self._mask(self.user[reached[self.source]])
            if torch.equal(further, reached):
                break
            reached = further
        return reached

    def _mask(self, groups: Tensor) -> Tensor:
        mask = torch.zeros(self.count, dtype=torch.bool, device=self.owner.device)
        mask[groups] = True
        return mask


def prune(weights: ImplicitWeights) -> Pruned:
    """Leave out states without changing the rule (IDL 6.2).

    Left out are states that do not depend on the input and can be computed by substitution (zero
    rows of (A, B), then rows that only touch such states, ...): their values go into the biases.
    And states that no output depends on (zero columns of (A; C), and whatever is used by such
    states only). The outputs change by rounding at most; what is counted as zero is exactly zero.

    Parameters
    ----------
    weights : ImplicitWeights
        Dense or sparse.

    Returns
    -------
    Pruned
    """
    graph = _Graph.of(weights)
    driven = graph.groups(_nonzero(weights.B)[0])
    level = graph.levels(excluded=driven)
    constant = (level >= 0)[graph.owner]
    seen = graph.reversed().reach(graph.groups(_nonzero(weights.C)[1]))[graph.owner]
    value = _constants(weights, constant, int(level.max()) + 1 if len(level) else 0)
    folded = replace(weights, b=weights.b + weights.A @ value, c=weights.c + weights.C @ value)
    kept = torch.nonzero(seen & ~constant).flatten()
    reduced = select_states(folded, kept)
    return Pruned(
        reduced,
        kept,
        torch.nonzero(constant).flatten(),
        torch.nonzero(~seen & ~constant).flatten(),
        _idle_inputs(reduced),
        _count_entries(weights),
    )


def partition(weights: ImplicitWeights) -> Partition:
    """Which states need a fixed point, and in which order the others are substituted (IDL 6.2)."""
    graph = _Graph.of(weights)
    nothing = torch.zeros(graph.count, dtype=torch.bool, device=graph.owner.device)
    before = graph.levels(excluded=nothing)
    after = graph.reversed().levels(excluded=before >= 0)
    core = torch.nonzero(((before < 0) & (after < 0))[graph.owner]).flatten()
    return Partition(_by_level(before, graph), core, _by_level(after, graph)[::-1])


def predict(
    weights: ImplicitWeights,
    u: Tensor,  # (batch, p)
    **options: Any,
) -> Tensor:
    """Outputs of the model, its fixed point solved for the core of the states only (IDL 6.2).

    All others are substituted, level by level: a feedforward network is simply run.

    Parameters
    ----------
    weights : ImplicitWeights
    u : Tensor, shape (batch, p)
    **options
        Of `solve_equilibrium`: tol, max_iters, method, on_irregular.

    Returns
    -------
    Tensor, shape (batch, q)
        NaN for elements whose fixed point was not found.

    Raises
    ------
    ParameterError
        If inputs do not fit.
    SpecificationError
        If there is no such option.
    """
    x = states(weights, u, **options)
    return x @ weights.C.t() + u @ weights.D.t() + weights.c


def states(
    weights: ImplicitWeights,
    u: Tensor,  # (batch, p)
    **options: Any,
) -> Tensor:
    """The states x of `predict`, shape (batch, n)."""
    require_inputs(weights, u)
    _require_options(options)
    order = partition(weights)
    drive = u @ weights.B.t() + weights.b
    x = torch.zeros_like(drive)
    for level in order.before:
        x = _substituted(weights, level, drive, x)
    if len(order.core):
        x = _solved(weights, order.core, drive, x, options)
    for level in order.after:
        x = _substituted(weights, level, drive, x)
    return x


def require_inputs(weights: ImplicitWeights, u: Tensor) -> None:
    """Refuse inputs of the wrong shape or type.

    Raises
    ------
    ParameterError
    """
    if u.ndim != 2 or u.shape[1] != weights.in_features:
        raise ParameterError(
            f"u must have shape (batch, {weights.in_features}), got {tuple(u.shape)}."
        )
    if (u.dtype, u.device) != (weights.b.dtype, weights.b.device):
        raise ParameterError(
            f"u is {u.dtype} on {u.device}, the weights {weights.b.dtype} on {weights.b.device}: "
            "convert one with `.to(...)`."
        )
    if not bool(u.isfinite().all()):
        row, column = torch.nonzero(~u.isfinite())[0].tolist()
        raise ParameterError(f"u[{row}, {column}] is {u[row, column]}: inputs must be finite.")


def _require_options(options: dict[str, Any]) -> None:
    """Refuse options that mean nothing, also where no fixed point is to be solved."""
    for name in options:
        if name not in _OPTIONS:
            raise SpecificationError(f"There is no option {name!r}. {nearest(name, _OPTIONS)}")
    given = {"tol": None, "max_iters": 1, "method": "auto", "on_irregular": "warn", **options}
    check_solver(**given)


def _substituted(weights: ImplicitWeights, level: Tensor, drive: Tensor, x: Tensor) -> Tensor:
    """`x` with the states of one level filled in."""
    z = drive[:, level] + x @ weights.A.index_select(0, level).t()
    return x.index_copy(1, level, taken(weights, level)(z))


def _solved(
    weights: ImplicitWeights, core: Tensor, drive: Tensor, x: Tensor, options: dict[str, Any]
) -> Tensor:
    """`x` with the states of the core filled in."""
    rows = weights.A.index_select(0, core)
    matrix = rows.index_select(1, core)
    matrix = matrix.to_dense() if matrix.is_sparse else matrix
    c = drive[:, core] + x @ rows.t()
    return x.index_copy(1, core, solve_equilibrium(matrix, c, taken(weights, core), **options).x)


def _by_level(level: Tensor, graph: _Graph) -> tuple[Tensor, ...]:
    of_state = level[graph.owner]
    count = int(level.max()) + 1 if len(level) else 0
    return tuple(torch.nonzero(of_state == number).flatten() for number in range(count))


def _constants(weights: ImplicitWeights, constant: Tensor, levels: int) -> Tensor:
    """The values of the states that do not depend on the input, 0 for the others."""
    value = torch.zeros_like(weights.b)
    for _ in range(levels):
        value = torch.where(constant, weights.activation(weights.A @ value + weights.b), 0)
    return value


def _idle_inputs(weights: ImplicitWeights) -> Tensor:
    """Zero columns of (B; D)."""
    used = torch.zeros(weights.in_features, dtype=torch.bool, device=weights.b.device)
    used[_nonzero(weights.B)[1]] = True
    used[_nonzero(weights.D)[1]] = True
    return torch.nonzero(~used).flatten()


def _count_entries(weights: ImplicitWeights) -> int:
    matrices = (weights.A, weights.B, weights.C, weights.D)
    return sum(_nonzero(matrix).shape[1] for matrix in matrices)


def _nonzero(matrix: Tensor) -> Tensor:
    """Row and column of each entry that is not zero, shape (2, entries)."""
    if not matrix.is_sparse:
        return matrix.detach().nonzero().t()
    matrix = matrix.detach().coalesce()
    return matrix.indices()[:, matrix.values() != 0]
