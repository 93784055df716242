"""In which order solvers are tried, and which elements each of them is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.backends.base import Backend
from declarative_cvx.cone_solution import ConeSolution
from declarative_cvx.cones import POLYHEDRAL, Cone
from declarative_cvx.status import Status

# Largest relative residual of a solution that counts as one, unless the solver was asked for less.
ACCEPTED = 1e-7
# Largest residual of a solution that no other solver is asked to improve upon.
PRECISE = 1e-10
# What the first solver is asked for where refinement takes Newton steps anyway: not more of them
# follow than after its default, and it takes a tenth to a fifth fewer iterations.
LOOSE = 1e-7


@dataclass(frozen=True)
class Turn:
    """A solver's turn.

    Attributes
    ----------
    backend : Backend
    accepted : float
        Largest residual of an answer of it that counts as a solution.
    largest : bool
        Whether it sees programs in units of their largest entries: data of widely mixed sizes may
        suit the one or the other.
    alone : bool
        Whether no other solver follows, so that whatever it leaves is worth refining.
    """

    backend: Backend
    accepted: float
    largest: bool = False
    alone: bool = False

    def elements(self, known: ConeSolution | None, batch: Tensor) -> Tensor:
        """Those of the elements `batch`, an increasing index tensor, that need this turn."""
        if known is None:
            return batch
        precise = known.solved & (known.residuals.worst <= PRECISE)
        if bool(precise.all()):
            return batch[:0]
        return batch[~precise & (known.solved | ~is_final(known))]


def turns(backends: Sequence[Backend], cone: Cone) -> Iterator[Turn]:
    """The turns of several solvers on programs with a cone; of a single one, its own.

    The first one's tolerance is loose where cones are curved. After it come those with tight
    tolerances, of other solvers first: they cost about as much and leave less to do for refinement,
    but on easy programs, which need no more than the first, they fail more often. Then what the
    solvers were asked for, in both kinds of units.
    """
    asked = [Turn(backend, max(ACCEPTED, 10 * backend.tol)) for backend in backends]
    first = [turn for turn in asked if turn.backend.name == asked[0].backend.name]
    if len(asked) == 1:
        yield replace(asked[0], alone=True)
        return
    yield from first if cone.kinds <= POLYHEDRAL else map(_loosened, first)
    others = asked[len(first) :]
    sharp = [turn for known in (*others, *first) if (turn := _sharpened(known)) is not None]
    yield from sharp
    yield from (replace(turn, largest=True) for turn in sharp)
    yield from others
    yield from (replace(turn, largest=True) for turn in asked)


def _loosened(turn: Turn) -> Turn:
    """With a loose tolerance, unless another one than the default was asked for."""
    backend = turn.backend
    if not backend.refine or backend.tol != type(backend).tol:
        return turn
    return replace(turn, backend=replace(backend, tol=LOOSE))


def _sharpened(turn: Turn) -> Turn | None:
    backend = turn.backend.sharpened()
    return None if backend is None else replace(turn, backend=backend)


def is_final(solution: ConeSolution) -> Tensor:
    """Elements of which nothing better could be said, bool, shape (batch,)."""
    codes = [status.value for status in Status if status.final]
    return torch.isin(solution.status, torch.tensor(codes, device=solution.status.device))
