"""Values and derivatives of a batch of nonlinear programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.program import NonlinearProgram, Parameters
from declarative_cvx.nonconvex.minimization.scalars.separated import Separated

# Entries of Jacobians from which rows are pulled back one by one, if there are large parameters:
# the copies of these that batched passes make then cost more than they save (measured).
_TOGETHER = 40_000


@dataclass(frozen=True, eq=False)
class Record:
    """Tensors that belong together, the batch the first dimension of each.

    What is neither a tensor nor a record is the same for all elements.
    """

    def select(self, index: Tensor) -> Self:
        """The elements named by an index tensor."""
        return self._map(lambda value: value[index])

    def put(self, index: Tensor, part: Self) -> Self:
        """This record with the elements named by an index tensor taken from another one."""
        return self._map(lambda value, new: value.index_copy(0, index, new), part)

    def where(self, mask: Tensor, other: Self) -> Self:
        """This record where mask, of shape (batch,), holds; the other one elsewhere."""
        if mask.device.type == "cpu" and bool(mask.all()):
            return self

        def choose(mine: Tensor, others: Tensor) -> Tensor:
            if mine is others:
                return mine
            return torch.where(mask.view(-1, *[1] * (mine.dim() - 1)), mine, others)

        return self._map(choose, other)

    def joined(self, others: Sequence[Self]) -> Self:
        """This record's elements, then those of others."""
        return self._map(lambda *values: torch.cat(values), *others)

    def _map(self, function: Callable[..., Tensor], *others: Self) -> Self:
        """Apply a function field by field, also to the records among the fields."""
        found: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), [getattr(other, name) for other in others]
            if isinstance(mine, Record):
                found[name] = mine._map(function, *theirs)
            else:
                found[name] = function(mine, *theirs) if isinstance(mine, Tensor) else mine
        return replace(self, **found)


@dataclass(frozen=True, eq=False)
class Evaluation(Record):
    """A program at a point: row 0 is the objective, then the equalities, then the inequalities.

    Attributes
    ----------
    values : Tensor, shape (batch, 1 + k + l)
    jacobian : Tensor, shape (batch, 1 + k + l, n)
    hessian : Tensor, shape (batch, n, n)
        Of the rows' sum, weighted as asked for; (batch, 0, 0) if it was not.
    """

    values: Tensor
    jacobian: Tensor
    hessian: Tensor

    @property
    def objective(self) -> Tensor:
        return self.values[:, 0]

    @property
    def gradient(self) -> Tensor:
        return self.jacobian[:, 0]

    @property
    def constraints(self) -> Tensor:
        return self.values[:, 1:]

    @property
    def rows(self) -> Tensor:
        """Jacobian of the constraints, shape (batch, k + l, n)."""
        return self.jacobian[:, 1:]

    @property
    def finite(self) -> Tensor:
        """Whether every number of an element is finite, bool, shape (batch,)."""
        total = self.values.sum(1) + self.jacobian.sum((1, 2)) + self.hessian.sum((1, 2))
        return torch.isfinite(total)


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
    given = [x.detach(), *flat_parameters(program.parameters)]
    if weights is None:
        rows, slopes = separated.first(batch, *given)
        hessian = x.new_zeros(batch, 0, 0)
    else:
        missing = sum(separated.sizes) - weights.shape[1]
        given.insert(1, torch.nn.functional.pad(weights.detach(), (0, missing)))
        rows, slopes, hessian = separated.second(batch, *given)
        hessian = hessian.view(batch, n, n)
    return Evaluation(rows, slopes.view(batch, -1, n), hessian)


def flat_parameters(parameters: Parameters) -> list[Tensor]:
    """Each (batch or 1, entries)."""
    return [value.detach().reshape(len(value), -1) for value in parameters]


def mix(weights: Tensor, rows: Tensor) -> Tensor:
    """Weighted sums of rows: (batch, r) and (batch, r, n) to (batch, n)."""
    return torch.bmm(weights[:, None], rows)[:, 0]


def squares(program: NonlinearProgram, rows: Tensor, weights: Tensor) -> Tensor:
    """A' diag(w) A of the constraints' rows (batch, r, n) and weights (batch, r): (batch, n, n)."""
    separated = program.separated
    if separated is not None and separated.squares is not None:
        return separated.squares(rows, weights)
    return (rows * weights[:, :, None]).mT @ rows


def along(rows: Tensor, x: Tensor) -> Tensor:
    """Products of rows and x: (batch, r, n) and (batch, n) to (batch, r)."""
    return torch.bmm(rows, x[:, :, None])[:, :, 0]


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
