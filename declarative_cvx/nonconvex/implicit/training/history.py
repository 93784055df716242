"""What happened in a run of block coordinate descent."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

# Rise of the objective, relative to it, that is rounding.
ROUNDING = 1e-9


class DescentWarning(UserWarning):
    """A block raised the objective."""


@dataclass(frozen=True)
class BlockRecord:
    """One update of one block.

    Attributes
    ----------
    name : str
        "AB", "CD", "ABCD", "X" or "P"; in a feedforward net "W0", "X1", ...
    before, after : float
        The objective.
    residual : float
        Largest violation of the block's optimality conditions, relative to their terms (for
        conditional gradients the relative duality gap; for states the length of the last step).
    iterations : int
    solved : bool
        Whether the residual is within the tolerance asked for.
    """

    name: str
    before: float
    after: float
    residual: float
    iterations: int
    solved: bool

    @property
    def rose(self) -> bool:
        """Whether the objective rose by more than rounding, or is not a number."""
        return not self.after <= self.before + ROUNDING * (1 + abs(self.before))


@dataclass(frozen=True)
class SweepRecord:
    """One sweep over all blocks.

    Attributes
    ----------
    objective : float
        After the sweep, with the lambda and mu of this sweep.
    parts : dict of float
        "loss", "divergence", "proximity" and "penalty", of which it is the sum.
    blocks : tuple of BlockRecord
        In the order of the updates.
    score : float or None
        Of the validation data, where there are any.
    """

    objective: float
    parts: dict[str, float]
    blocks: tuple[BlockRecord, ...]
    score: float | None = None


@dataclass
class History:
    """Of a whole run.

    Attributes
    ----------
    start : float
        The objective before the first sweep.
    sweeps : list of SweepRecord
    stopped : str
        Why it ended: "tolerance", "patience", "callback" or "sweeps".
    """

    start: float
    sweeps: list[SweepRecord] = field(default_factory=list)
    stopped: str = "sweeps"

    @property
    def objectives(self) -> list[float]:
        """After every sweep, the start first."""
        return [self.start, *(sweep.objective for sweep in self.sweeps)]

    @property
    def blocks(self) -> list[BlockRecord]:
        """All updates in order."""
        return [block for sweep in self.sweeps for block in sweep.blocks]

    @property
    def rises(self) -> list[BlockRecord]:
        """Updates that raised the objective: none, unless something is wrong."""
        return [block for block in self.blocks if block.rose]

    @property
    def largest_residual(self) -> float:
        """Of all blocks."""
        return max((block.residual for block in self.blocks), default=0.0)


def warn_of_rise(record: BlockRecord) -> None:
    """Say so if a block raised the objective."""
    if not record.rose:
        return
    warnings.warn(
        f"Block {record.name} raised the objective from {record.before:.9g} to {record.after:.9g} "
        f"(residual {record.residual:.1e} after {record.iterations} iterations). Look at the "
        "scales of the data and of lam and mu.",
        DescentWarning,
        stacklevel=4,
    )
