"""Comparisons while one thing varies: the batch, the tolerance, the size of the problem."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from declarative_cvx.comparison.candidate import Candidate
from declarative_cvx.comparison.comparison import Comparison
from declarative_cvx.comparison.measure import Work
from declarative_cvx.comparison.plot import draw_curves
from declarative_cvx.errors import SpecificationError, nearest

KINDS = ("batch", "tol", "size")


@dataclass(frozen=True)
class Variation:
    """What is varied.

    Attributes
    ----------
    name : {"batch", "tol", "size"}
    values : sequence
    """

    name: str
    values: Sequence[Any]

    def apply(
        self, value: Any, work: Work, listed: list[Candidate]
    ) -> tuple[Work, list[Candidate]]:
        """Work and candidates at one of the values."""
        if self.name == "batch":
            return replace(work, values=[_repeated(v, value) for v in work.values]), listed
        with_options = [c for c in listed if not isinstance(c.solver, str)]
        return work, [c.with_tolerance(value) for c in with_options]


def _repeated(value: torch.Tensor, batch: int) -> torch.Tensor:
    """The elements over and over, until there are so many."""
    return value[torch.arange(batch, device=value.device) % len(value)]


def read_variation(sweep: Mapping[str, Sequence[Any]], problem: Any) -> Variation:
    """What a user wrote, checked."""
    if len(sweep) != 1:
        raise SpecificationError(f"sweep varies one thing, got {sorted(sweep)}: compare twice.")
    ((name, values),) = sweep.items()
    if name not in KINDS:
        raise SpecificationError(f"sweep cannot vary {name!r}. {nearest(name, KINDS)}")
    if name == "size" and not callable(problem):
        raise SpecificationError(
            'sweep={"size": ...} needs a callable in place of the problem: from a size to '
            "(problem, parameters, values)."
        )
    values = list(values)
    if not values:
        raise SpecificationError(f"sweep[{name!r}] is empty.")
    for at, value in enumerate(values):
        whole = name == "batch"
        if name != "size" and not (value > 0 and (not whole or int(value) == value)):
            kind = "positive integers" if whole else "positive numbers"
            raise SpecificationError(f"sweep[{name!r}][{at}] is {value!r}; {kind} are expected.")
    return Variation(name, [int(v) for v in values] if name == "batch" else values)


@dataclass(frozen=True)
class Sweep:
    """A comparison for each value of what was varied.

    Attributes
    ----------
    name : {"batch", "tol", "size"}
    values : tuple
    comparisons : tuple of Comparison
    """

    name: str
    values: tuple[Any, ...]
    comparisons: tuple[Comparison, ...]

    def curves(self) -> dict[str, list[tuple[float, float, float]]]:
        """For each solver and derivative the points (value, seconds, gradient error)."""
        found: dict[str, list[tuple[float, float, float]]] = {}
        for value, comparison in zip(self.values, self.comparisons, strict=True):
            for row in comparison.rows:
                if not row.failure and math.isfinite(row.gradient_error):
                    label = f"{row.candidate.label_without(self.name)}, {row.derivative}"
                    found.setdefault(label, []).append((value, row.seconds, row.gradient_error))
        return found

    def __str__(self) -> str:
        pairs = zip(self.values, self.comparisons, strict=True)
        return "\n\n".join(f"{self.name} = {value}\n{found}" for value, found in pairs)

    def _repr_html_(self) -> str:
        pairs = zip(self.values, self.comparisons, strict=True)
        return "".join(
            f"<h4>{self.name} = {value}</h4>{found._repr_html_()}" for value, found in pairs
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "varied": self.name,
            "values": list(self.values),
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        pairs = zip(self.values, self.comparisons, strict=True)
        return "\n\n".join(
            f"**{self.name} = {value}**\n\n{found.to_markdown()}" for value, found in pairs
        )

    def plot(self, path: str | Path) -> Path:
        """Draw time and gradient error against what was varied into a file.

        Parameters
        ----------
        path : path
            Its ending says which format: .png, .pdf, .svg.
        """
        return draw_curves(self.curves(), self.name, Path(path))
