"""What came out of comparing solvers: for reading, for programs, as a picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table

from declarative_cvx.comparison.candidate import Solver
from declarative_cvx.comparison.plot import draw_errors
from declarative_cvx.comparison.row import Row, Timing
from declarative_cvx.errors import BackendError

COLUMNS = (
    "solver",
    "derivative",
    "status",
    "objective",
    "forward ms (range)",
    "backward ms (range)",
    "solution error",
    "gradient error",
    "residual",
    "gap",
    "iterations",
    "MiB",
    "note",
)
# What a terminal shows that is narrower than this.
SHORT = ("solver", "derivative", "solved", "ms", "solution error", "gradient error")
WIDE = 140
_WORDS = ("solver", "derivative", "status", "note")
ACCURACY = 1e-6


@dataclass(frozen=True)
class Comparison:
    """Solvers and derivatives on one problem and one batch of values.

    Attributes
    ----------
    rows : tuple of Row
        Those without numbers last, the others by their time.
    batch : int
    reference : str
        What the errors are measured against.
    where : str
        Device, dtype and threads.
    """

    rows: tuple[Row, ...]
    batch: int
    reference: str
    where: str

    def best_row(self, accuracy: float = ACCURACY, derivative: str | None = None) -> Row:
        """The fastest row whose statuses, solutions and gradients are right to an accuracy.

        Parameters
        ----------
        accuracy : float
            Relative error of solution and gradient.
        derivative : str, optional
            Only rows with this derivative.

        Raises
        ------
        BackendError
            If there is none; the message names the most accurate one.
        """
        rows = [row for row in self.rows if derivative in (None, row.derivative)]
        right = [row for row in rows if row.is_right(accuracy)]
        if right:
            return min(right, key=lambda row: row.seconds)
        closest = min(rows, key=lambda row: row.error, default=None)
        hint = "none has numbers"
        if closest is not None and math.isfinite(closest.error):
            hint = f"{closest.solver} comes closest, with an error of {closest.error:.1e}"
        raise BackendError(f"No row is right to {accuracy:.0e}: {hint}. Ask for less accuracy.")

    def best(self, accuracy: float = ACCURACY) -> Solver:
        """The solver of the fastest right row, for ``DeclarativeLayer(..., solver=...)``.

        Among rows with the derivative that layers have unless told otherwise; see `best_row` for
        the parameters and errors.
        """
        usual = "auto" if any(row.derivative == "auto" for row in self.rows) else "implicit"
        return self.best_row(accuracy, usual).candidate.solver

    def table(self, width: int = WIDE) -> Table:
        """As a table of rich, a short one for a narrow terminal."""
        wide = width >= WIDE
        table = Table(title=self._title(), caption=self.reference, box=SIMPLE_HEAD)
        for name in COLUMNS if wide else SHORT:
            side: JustifyMethod = "left" if name in _WORDS else "right"
            table.add_column(name.replace(" ", "\n"), justify=side, overflow="fold")
        for row in self.rows:
            style = "dim" if row.failure else "" if row.is_right(ACCURACY) else "red"
            cells = _cells(row) if wide else _short_cells(row, self.batch)
            table.add_row(*cells, style=style)
        return table

    def _title(self) -> str:
        return f"{len(self.rows)} ways to solve {self.batch} elements, {self.where}"

    def __str__(self) -> str:
        stream = io.StringIO()
        console = Console(file=stream, color_system=None)
        console.print(self.table(console.width))
        return stream.getvalue().rstrip()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{_escaped(column)}</th>" for column in COLUMNS)
        lines = []
        for row in self.rows:
            right = "" if row.failure or row.is_right(ACCURACY) else ' style="color: #b00020"'
            cells = "".join(f"<td>{_escaped(cell)}</td>" for cell in _cells(row))
            lines.append(f"<tr{right}>{cells}</tr>")
        caption = f"<caption>{_escaped(self._title())}. {_escaped(self.reference)}</caption>"
        body = "".join(lines)
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as dictionaries and lists of numbers and strings."""
        return {
            "batch": self.batch,
            "where": self.where,
            "reference": self.reference,
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """As a table of Markdown."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(row) for row in self.rows)]
        return "\n".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )

    def plot(self, path: str | Path) -> Path:
        """Draw time against gradient error, a point for each row, into a file.

        Parameters
        ----------
        path : path
            Its ending says which format: .png, .pdf, .svg.
        """
        return draw_errors(self.rows, self._title(), ACCURACY, Path(path))


def described(device: torch.device, dtype: torch.dtype) -> str:
    """The machine, in words."""
    kind = str(dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{kind} on {device}{threads}"


def sorted_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """By time; rows without numbers last."""
    return tuple(sorted(rows, key=lambda row: (bool(row.failure), row.seconds)))


def _cells(row: Row) -> list[str]:
    if row.failure:
        return [row.solver, row.derivative, *[""] * (len(COLUMNS) - 3), row.failure]
    counts = sorted(row.status.items())
    status = ", ".join(f"{count} {name}" for name, count in counts)
    worst = max(row.primal, row.dual, row.cone)
    return [
        row.solver,
        row.derivative,
        status,
        "" if math.isnan(row.objective) else f"{row.objective:.6g}",
        _milliseconds(row.forward),
        _milliseconds(row.backward),
        _power(row.solution_error),
        _power(row.gradient_error),
        _power(worst),
        _power(row.gap),
        "" if math.isnan(row.iterations) else f"{row.iterations:g}",
        "" if math.isnan(row.memory) else f"{row.memory / 2**20:.0f}",
        _note(row),
    ]


def _short_cells(row: Row, batch: int) -> list[str]:
    if row.failure:
        return [row.solver, row.derivative, "failed", "", "", ""]
    solved = f"{row.status.get('OPTIMAL', 0)}/{batch}"
    errors = (_power(row.solution_error), _power(row.gradient_error))
    return [row.solver, row.derivative, solved, f"{row.seconds * 1e3:.1f}", *errors]


def _milliseconds(timing: Timing) -> str:
    median, low, high = (1e3 * part for part in (timing.median, timing.low, timing.high))
    return f"{median:.1f} ({low:.1f}-{high:.1f})"


def _note(row: Row) -> str:
    notes = [] if row.agrees else ["other statuses"]
    if not math.isnan(row.solution_error) and math.isnan(row.gradient_error):
        notes.append("no gradient to compare")
    if row.irregular:
        notes.append(f"{row.irregular} without derivative")
    return "; ".join(notes)


def _power(value: float) -> str:
    return "" if math.isnan(value) else "0" if value == 0 else f"{value:.0e}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
