"""What a problem has to offer to be minimised in torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.solve import NonlinearSolution
from declarative_cvx.parameters import Arguments


@dataclass(frozen=True)
class Unknown:
    """A tensor that is solved for: its name for messages, and its shape."""

    name: str
    shape: tuple[int, ...]


class Form(ABC):
    """A problem as a batch of nonlinear programs, and the way back to its own quantities.

    Attributes
    ----------
    outputs : tuple
        Names of what the layer returns, as `read` takes them.
    maximize : bool
        Whether the program's objective is the problem's with the opposite sign.
    unknowns : tuple of Unknown
        What a solver of the user's own has to find.
    own : int or None
        Number of entries of x that these are, the first ones; None: all.
    """

    outputs: tuple[Any, ...]
    maximize: bool = False
    unknowns: tuple[Unknown, ...]
    own: int | None = None

    @abstractmethod
    def program(self, arguments: Arguments, batch: int) -> NonlinearProgram:
        """The programs of checked parameter values; differentiable with respect to these."""

    @abstractmethod
    def violation(self, program: NonlinearProgram) -> Tensor:
        """How far parameters alone make a program infeasible, shape (batch,)."""

    @abstractmethod
    def start(
        self,
        program: NonlinearProgram,
        generator: torch.Generator | None = None,
        given: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """A point to start from, (batch or 1, n); with a generator (on the CPU), a random one.

        `given` has values, ``(batch or 1, *shape)``, of some unknowns by their places.
        """

    @abstractmethod
    def place(self, variable: Any) -> int:
        """Where among the unknowns a variable, or a name, is.

        Raises
        ------
        SpecificationError
            If there is none.
        """

    @abstractmethod
    def read(self, name: Any, program: NonlinearProgram, found: NonlinearSolution) -> Tensor:
        """A variable, or a constraint's multipliers, shape (batch, ...)."""

    def given(self, program: NonlinearProgram) -> Sequence[Tensor]:
        """The values of the problem's own parameters, each (batch or 1, *shape)."""
        return program.parameters

    @abstractmethod
    def unpack(self, result: Any, solver: str) -> Sequence[Any]:
        """What a user's solver, of this name, returned, as one value for each unknown."""

    @abstractmethod
    def assemble(self, program: NonlinearProgram, values: Sequence[Tensor]) -> Tensor:
        """The points, (batch, n), at which the unknowns have these values, (batch, *shape)."""

    @abstractmethod
    def disassemble(self, x: Tensor) -> list[Tensor]:
        """The values of the unknowns, each (batch, *shape), at points x, (batch, n)."""
