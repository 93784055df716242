"""A user's own solver, as a function of parameter values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import BackendError, SpecificationError
from declarative_cvx.nonconvex.form import Form, Unknown
from declarative_cvx.nonconvex.minimization.evaluation import graph
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.proposer import Proposal, Proposer


@dataclass(frozen=True)
class ForwardSolver(Proposer):
    """A user's own solver. It need not be differentiable, nor be written in torch.

    Only its answer is used: it is sharpened by Newton's method, without being moved by more than
    ``1e-2 (1 + |x|)``, verified, and differentiated through the problem's optimality conditions
    (DDN Sec. 4.3). An answer that is no local minimum gets the status INACCURATE.

    Parameters
    ----------
    function : callable
        Called with one tensor per parameter, in the layer's order, detached copies in float64 on
        the layer's device: ``function(*values)``. Returns the values of the variables as tensors,
        arrays or numbers; of several variables as a tuple in the order of the layer's
        `variables`, or as a mapping from the problem's variables. All variables of the problem
        need a value. NaN in an element, or an exception, means that there is no answer for it.
    batched : bool, optional
        True: called once with all elements, each tensor ``(batch, *shape)``, and returns values
        ``(batch, *shape)``; if that raises an exception, once more for each element, with a batch
        of one. False: called for one element after the other, without the batch dimension.

    Raises
    ------
    BackendError
        If `function` cannot be called.
    """

    function: Callable[..., Any]
    batched: bool = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise BackendError(
                f"ForwardSolver takes a callable, got {self.function!r}. Pass a function from the "
                "parameters' values to those of the variables."
            )

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def require(self, form: Form, restarts: int) -> None:
        super().require(form, restarts)
        if restarts:
            raise BackendError(
                f"restarts={restarts} has nothing to start: {self.name} is a function of the "
                "parameters only. Leave restarts out, or try several starts in the function."
            )

    def changed(self, options: Mapping[str, Any]) -> ForwardSolver:
        if options:
            raise BackendError(
                f"A user's own solver has no options, got {', '.join(map(repr, options))}: make "
                "them part of the function."
            )
        return self

    def propose(self, form: Form, program: NonlinearProgram, start: Tensor) -> Proposal:
        batch = program.batch
        values = [v.detach().expand(batch, *v.shape[1:]) for v in form.given(program)]
        read = _Reader(self.name, form, start.device)
        if self.batched:
            result, said = self._call(values)
            if not said:
                return Proposal(read(result, (batch,)), None, ("",) * batch)
        parts, messages = [], []
        for i in range(batch):
            if not self.batched:
                result, said = self._call([value[i] for value in values])
            elif batch > 1:
                result, said = self._call([value[i : i + 1] for value in values])
            one = (1,) if self.batched else ()
            parts.append(read.nothing() if said else read(result, one))
            messages.append(said)
        values = [torch.cat(column) for column in zip(*parts, strict=True)]
        return Proposal(values, None, tuple(messages))

    def _call(self, values: Sequence[Tensor]) -> tuple[Any, str]:
        try:
            with graph():
                return self.function(*(value.clone() for value in values)), ""
        except Exception as error:  # whatever a solver raises must not cost the others
            return None, f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class _Reader:
    """Turns what a function returned into tensors."""

    name: str
    form: Form
    device: torch.device

    def __call__(self, result: Any, batch: tuple[int, ...]) -> list[Tensor]:
        """Each ``(batch or 1, *shape)``; `batch` is () for values without that dimension."""
        values = self.form.unpack(result, self.name)
        found = [
            self._one(unknown, value, batch)
            for unknown, value in zip(self.form.unknowns, values, strict=True)
        ]
        return found if batch else [value[None] for value in found]

    def nothing(self) -> list[Tensor]:
        """The reading of one element without an answer."""
        return [
            torch.full((1, *unknown.shape), torch.nan, dtype=torch.float64, device=self.device)
            for unknown in self.form.unknowns
        ]

    def _one(self, unknown: Unknown, value: Any, batch: tuple[int, ...]) -> Tensor:
        expected = (*batch, *unknown.shape)
        try:
            tensor = torch.as_tensor(value)
            if tensor.is_complex():
                raise TypeError
            tensor = tensor.detach().to(self.device, torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SpecificationError(
                f"the solver {self.name} returns a {type(value).__name__} for `{unknown.name}`; "
                f"expected a tensor or array of real numbers of shape {expected}."
            ) from error
        if tuple(tensor.shape) != expected:
            raise SpecificationError(
                f"the solver {self.name} returns a value of shape {tuple(tensor.shape)} for "
                f"`{unknown.name}`; expected {expected}."
            )
        return tensor
