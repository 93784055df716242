"""Forms of scalars evaluated for a batch: equal operations of equal depth are one operation."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.scalars.forms import ONE, Scalars
from declarative_cvx.nonconvex.minimization.scalars.functions import FUNCTIONS
from declarative_cvx.transforms import outside_transforms

# Numbers that are worked on at once: on a processor they should stay in its cache.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 250_000, 50_000_000

# What is done to the table of all rows, (rows, columns).
Step = Callable[[Tensor], Tensor]
# Makes a step with its indices on a device.
Maker = Callable[[torch.device], Step]


class Tape:
    """Operations on a table with a row for each scalar and a column for each element.

    Parameters
    ----------
    scalars : Scalars
    inputs : sequence of sequence of int
        Forms of the entries of each input.
    outputs : sequence of (mapping of int to int, int)
        Forms of the entries of each output by their places, the others being zero; its size.
    across : bool
        Whether outputs keep the batch innermost in memory.
    """

    def __init__(
        self,
        scalars: Scalars,
        inputs: Sequence[Sequence[int]],
        outputs: Sequence[tuple[Mapping[int, int], int]],
        across: bool = False,
    ) -> None:
        self._scalars, self._across = scalars, across
        self._rows: dict[int, int] = {}  # of forms
        self._size = 1  # row 0 is one
        for forms in inputs:
            self._place(forms)
        wanted = {f for entries, _ in outputs for f in entries.values()}
        self._makers = self._plan({f for f in wanted if scalars.value(f) is None})
        self._outputs = [self._output(entries, size) for entries, size in outputs]
        self._ready: dict[torch.device, tuple[list[Step], list[_Output]]] = {}

    # --- order of the operations -----------------------------------------------------------------

    def _place(self, forms: Iterable[int]) -> slice:
        """New rows for forms."""
        start = self._size
        for form in forms:
            self._rows[form] = self._size
            self._size += 1
        return slice(start, self._size)

    def _plan(self, wanted: set[int]) -> list[Maker]:
        depth = self._depths(wanted)
        functions: dict[int, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
        sums: dict[int, list[int]] = defaultdict(list)
        for form in sorted(depth.keys() - self._rows.keys()):
            atom = self._plain(form)
            if atom is None:
                sums[depth[form]].append(form)
            else:
                key = self._scalars.atoms[atom]
                kind = key[:1] if key[0] == "*" else key[:2]
                functions[depth[form]][kind].append(form)
        makers = []
        for level in range(1 + max(depth.values(), default=0)):
            makers += [self._apply(kind, forms) for kind, forms in functions[level].items()]
            if sums[level]:
                makers.append(self._combine(sums[level]))
        return makers

    def _plain(self, form: int) -> int | None:
        """The atom that a form consists of, if it is one and no more."""
        ((atom, factor), *more) = self._scalars.forms[form]
        return None if more or factor != 1.0 else atom

    def _depths(self, wanted: set[int]) -> dict[int, int]:
        """The forms that are needed, each with the number of functions that precede it."""
        needed, atoms, pending = set(wanted), {ONE}, list(wanted)
        while pending:
            for atom, _ in self._scalars.forms[pending.pop()]:
                if atom not in atoms:
                    atoms.add(atom)
                    fresh = {self._atom_form(atom), *self._scalars.arguments(atom)} - needed
                    needed |= fresh
                    pending += fresh
        of_atom: dict[int, int] = {}

        def of_form(form: int) -> int:
            return max(of_atom[atom] for atom, _ in self._scalars.forms[form])

        for atom in sorted(atoms):
            below = [of_form(form) for form in self._scalars.arguments(atom)]
            of_atom[atom] = 1 + max(below) if below else 0
        return {form: of_form(form) for form in needed}

    def _atom_form(self, atom: int) -> int:
        return self._scalars.form({atom: 1.0})

    # --- operations ------------------------------------------------------------------------------

    def _apply(self, kind: tuple, forms: list[int]) -> Maker:
        """One function of many rows."""

        def arguments(form: int) -> tuple[int, ...]:
            atom = self._plain(form)
            assert atom is not None
            return tuple(self._rows[f] for f in self._scalars.arguments(atom))

        forms = sorted(forms, key=arguments)
        columns = list(zip(*map(arguments, forms), strict=True))
        to = self._place(forms)
        if kind[0] == "*":
            first, second = columns
            return lambda device: _multiply(_picked(first, device), _picked(second, device), to)
        value, exponent = FUNCTIONS[kind[0]].value, kind[1]

        def make(device: torch.device) -> Step:
            pick = _picked(columns[0], device)
            return lambda table: _rows(table, to).copy_(value(pick(table), exponent))

        return make

    def _combine(self, forms: list[int]) -> Maker:
        """Linear forms, as a product with a sparse matrix."""
        terms = [self._scalars.forms[form] for form in forms]
        ends = torch.tensor([0, *map(len, terms)]).cumsum(0)
        flat = [pair for row in terms for pair in row]
        columns = torch.tensor([self._rows[self._atom_form(a)] if a else 0 for a, _ in flat])
        factors = torch.tensor([factor for _, factor in flat], dtype=torch.float64)
        used = slice(0, self._size)
        to = self._place(forms)

        def make(device: torch.device) -> Step:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that the layout is young
                matrix = torch.sparse_csr_tensor(
                    ends.to(device),
                    columns.to(device),
                    factors.to(device),
                    size=(len(forms), used.stop),
                )
            return lambda table: torch.mm(matrix, _rows(table, used), out=_rows(table, to))

        return make

    def _output(self, entries: Mapping[int, int], size: int) -> _Output:
        constant = torch.zeros(size, dtype=torch.float64)
        places, rows = [], []
        for place, form in sorted(entries.items()):
            value = self._scalars.value(form)
            if value is None:
                places.append(place)
                rows.append(self._rows[form])
            else:
                constant[place] = value
        return _Output(constant, *(torch.tensor(v, dtype=torch.int64) for v in (places, rows)))

    # --- evaluation ------------------------------------------------------------------------------

    def __call__(self, batch: int, *inputs: Tensor) -> list[Tensor]:
        """Outputs, each (batch, size), from inputs, each (batch or 1, size), in float64."""
        device = inputs[0].device
        if device not in self._ready:
            with outside_transforms(), torch.inference_mode(False):
                self._ready[device] = (
                    [make(device) for make in self._makers],
                    [output.to(device) for output in self._outputs],
                )
        steps, outputs = self._ready[device]
        limit = _AT_ONCE if device.type == "cpu" else _AT_ONCE_ELSEWHERE
        width = max(1, limit // self._size)
        if batch <= width:
            return self._columns(steps, outputs, batch, inputs)
        parts = [
            self._columns(
                steps,
                outputs,
                min(width, batch - start),
                [v if len(v) == 1 else v[start : start + width] for v in inputs],
            )
            for start in range(0, batch, width)
        ]
        if self._across:
            return [
                torch.cat([v.t() for v in pieces], 1).t() for pieces in zip(*parts, strict=True)
            ]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def _columns(
        self, steps: list[Step], outputs: list[_Output], batch: int, inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        table = inputs[0].new_empty(self._size, batch)
        given = torch.cat([v.expand(batch, -1) for v in (inputs[0].new_ones(1, 1), *inputs)], 1)
        table.narrow(0, 0, given.shape[1]).copy_(given.t())
        for step in steps:
            step(table)
        if self._across:
            return [output.across(table).t() for output in outputs]
        return [output(table) for output in outputs]


@dataclass(frozen=True)
class _Output:
    """Entries of an output: constants, and rows of the table in some places."""

    constant: Tensor  # (size,)
    places: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> _Output:
        return _Output(*(v.to(device) for v in (self.constant, self.places, self.rows)))

    def across(self, table: Tensor) -> Tensor:
        """(size, columns)"""
        size, found = len(self.constant), table.index_select(0, self.rows)
        if len(self.rows) < size:
            whole = self.constant[:, None].repeat(1, table.shape[1])
            return whole.index_copy_(0, self.places, found)
        return found

    def __call__(self, table: Tensor) -> Tensor:
        """(columns, size)"""
        size, found = len(self.constant), table.index_select(0, self.rows)
        if len(self.rows) < size:
            whole = self.constant.repeat(table.shape[1], 1)
            return whole.index_copy_(1, self.places, found.t())
        return found.t().contiguous()


def _rows(table: Tensor, part: slice) -> Tensor:
    return table.narrow(0, part.start, part.stop - part.start)


def _picked(rows: Sequence[int], device: torch.device) -> Step:
    """The rows of a table; a view where they are consecutive."""
    start, stop = rows[0], rows[0] + len(rows)
    if tuple(rows) == tuple(range(start, stop)):
        return lambda table: table.narrow(0, start, stop - start)
    index = torch.tensor(rows, device=device)
    return lambda table: table.index_select(0, index)


def _multiply(first: Step, second: Step, to: slice) -> Step:
    return lambda table: torch.mul(first(table), second(table), out=_rows(table, to))
