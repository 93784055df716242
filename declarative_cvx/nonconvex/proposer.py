"""Solvers that are not the library's minimisers: they propose points, the library judges them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from declarative_cvx.errors import BackendError
from declarative_cvx.nonconvex.form import Form
from declarative_cvx.nonconvex.minimization.external import External, InTurn
from declarative_cvx.nonconvex.minimization.minimizer import Minimizer
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.status import Status

# How far, relatively, a value may be from what bounds and structure of its variable admit.
_OFF = 1e-2


@dataclass(frozen=True, eq=False)
class Proposal:
    """Values of a form's unknowns.

    Attributes
    ----------
    values : sequence of Tensor, each (batch, *shape)
        NaN where there is no answer.
    status : Tensor of int64, shape (batch,), or None
        What the solver thinks of them; None where it says nothing.
    said : tuple of str
        Its words about each element.
    """

    values: Sequence[Tensor]
    status: Tensor | None
    said: tuple[str, ...]


class Proposer(ABC):
    """A solver whose answers are taken as proposals.

    Attributes
    ----------
    takes_start : bool
        Whether it starts from a given point.
    """

    takes_start: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """For reports."""

    def obstacle(self, form: Form) -> str | None:
        """Why it cannot take a problem; None if it can."""
        return None

    def require(self, form: Form, restarts: int) -> None:
        """Refuse a problem or option that it has no use for.

        Raises
        ------
        BackendError
        """
        reason = self.obstacle(form)
        if reason is not None:
            raise BackendError(f"{reason}.")

    @abstractmethod
    def changed(self, options: Mapping[str, Any]) -> Proposer:
        """The same solver with some options changed."""

    def turns(self, program: NonlinearProgram, own: Minimizer) -> tuple[Minimizer, ...]:
        """What is tried in turn; `own` asks the proposer."""
        return (own,)

    @abstractmethod
    def propose(self, form: Form, program: NonlinearProgram, start: Tensor) -> Proposal:
        """Values for every element of a batch; outside of any graph and transform."""


class Inquiry:
    """One call of a solver, as a minimiser.

    Attributes
    ----------
    minimizer : Minimizer
    names : tuple of str
        Of it and its alternatives.
    said : tuple of str
        A proposer's words about every element, set by the call; empty if it was not the first to
        be asked.
    """

    minimizer: Minimizer
    names: tuple[str, ...]
    said: tuple[str, ...] = ()

    @classmethod
    def of(cls, solver: Minimizer | Proposer, form: Form, program: NonlinearProgram) -> Inquiry:
        inquiry = cls()
        if isinstance(solver, Minimizer):
            turns = (solver, *solver.alternatives())
            inquiry.minimizer, inquiry.names = solver, tuple(turn.name for turn in turns)
        else:
            inquiry._ask(solver, form, program)
        return inquiry

    def _ask(self, proposer: Proposer, form: Form, program: NonlinearProgram) -> None:
        self._proposer, self._form = proposer, form
        own = External(self._find, form.own)
        turns = proposer.turns(program, own)
        self._first = turns[0] is own
        self.minimizer = InTurn(turns)
        self.names = tuple(proposer.name if turn is own else turn.name for turn in turns)

    def _find(self, program: NonlinearProgram, start: Tensor) -> tuple[Tensor, Tensor]:
        proposal = self._proposer.propose(self._form, program, start)
        values, known = _completed(self._form, start, proposal.values)
        x = self._form.assemble(program, values)
        status = proposal.status
        if status is None:
            status = torch.full_like(known, int(Status.OPTIMAL), dtype=torch.long)
        off = _distance(self._form.disassemble(x), values) > _OFF
        status = torch.where(known & off, int(Status.INACCURATE), status.to(known.device))
        if self._first:
            self.said = tuple(
                words or ("its values violate bounds or the structure of a variable" if bad else "")
                for words, bad in zip(proposal.said, (known & off).tolist(), strict=True)
            )
        return torch.where((known & ~off)[:, None], x, torch.nan), status


def _distance(taken: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """How far, relatively, values are from what was taken for them, shape (batch,)."""
    gaps = [
        ((new - old).abs() / (1 + old.abs())).reshape(len(old), -1).amax(1)
        for new, old in zip(taken, values, strict=True)
        if old.numel()
    ]
    return torch.stack(gaps).amax(0)


def _completed(form: Form, start: Tensor, values: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Values with the start's where there are none, and which elements are known, (batch,)."""
    known = torch.stack([torch.isfinite(v).reshape(len(v), -1).all(1) for v in values]).all(0)
    known = known.to(start.device)
    stand_ins = form.disassemble(start)
    return [
        torch.where(known.view(-1, *[1] * (v.dim() - 1)), v.to(start), own)
        for v, own in zip(values, stand_ins, strict=True)
    ], known
