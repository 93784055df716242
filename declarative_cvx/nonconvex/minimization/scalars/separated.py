"""The functions of a nonlinear program, taken apart into scalars once for all calls."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.scalars.forms import ZERO, NotSeparableError, Scalars
from declarative_cvx.nonconvex.minimization.scalars.symbols import Symbols
from declarative_cvx.nonconvex.minimization.scalars.tape import Tape
from declarative_cvx.nonconvex.minimization.sparse.pattern import Pattern
from declarative_cvx.nonconvex.minimization.sparse.plan import Plan
from declarative_cvx.transforms import outside_transforms

Entries = tuple[dict[int, int], int]  # forms by their places, and the number of places


# By how much fewer products there have to be than with full matrices for sparse ones to be faster.
_SPARSE = 8


class Squares:
    """A' diag(w) A for sparse rows A.

    Parameters
    ----------
    columns : mapping of int to sequence of int
        By rows, where entries are not zero.
    rows, variables : int
    """

    def __init__(self, columns: Mapping[int, Sequence[int]], rows: int, variables: int) -> None:
        self._places = torch.tensor([i * variables + j for i, row in columns.items() for j in row])
        scalars = Scalars()
        weights = [scalars.input() for _ in range(rows)]
        entries = {(i, j): scalars.input() for i, row in columns.items() for j in row}
        collected: dict[int, dict[int, float]] = defaultdict(dict)
        for i, row in columns.items():
            for j in row:
                weighted = scalars.multiply(weights[i], entries[i, j])
                for k in row:
                    product = scalars.multiply(weighted, entries[i, k])
                    scalars.add(collected[j * variables + k], product)
        forms = {place: scalars.form(terms) for place, terms in collected.items()}
        inputs = [weights, list(entries.values())]
        self._tape = Tape(scalars, inputs, [(forms, variables**2)])

    def __call__(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Products (batch, n, n), of rows (batch, r, n) and weights (batch, r)."""
        batch, _, n = rows.shape
        entries = rows.flatten(1).index_select(1, self._places.to(rows.device))
        return self._tape(batch, weights, entries)[0].view(batch, n, n)


class Separable:
    """Functions that always do the same, to be taken apart when they are first evaluated.

    Parameters
    ----------
    functions : sequence of callable
        Of x, (n,), and parameters, of one element: the objective, then constraints.
    variables : int
        Number n.
    shapes : sequence of tuple of int
        Of the parameters of one element.
    """

    def __init__(
        self, functions: Sequence[Callable], variables: int, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self._made = tuple(functions), variables, tuple(shapes)
        self._lock = threading.RLock()

    @property
    def separated(self) -> Separated | None:
        """None if they do something that has no rule for scalars, or consist of too many."""
        with self._lock:
            return self._separated

    @cached_property
    def _separated(self) -> Separated | None:
        with outside_transforms(), torch.inference_mode(False), torch.no_grad():
            try:
                return Separated(*self._made)
            except (NotSeparableError, RecursionError):
                return None


@dataclass(frozen=True)
class SparseFunctions:
    """The tapes of `Separated` whose derivatives are the entries of sparse matrices.

    Attributes
    ----------
    first, second : Tape
    jacobian, hessian : Pattern
        Of all rows, and of both triangles.
    plan : Plan or None
        How systems with them are factorised; None if the factors are nearly full.
    """

    first: Tape
    second: Tape
    jacobian: Pattern
    hessian: Pattern
    plan: Plan | None


def _packed(entries: dict[int, int], shape: tuple[int, int]) -> tuple[Pattern, Entries]:
    """The pattern of sparse entries, and those by their numbers."""
    places = sorted(place for place, form in entries.items() if form != ZERO)
    packed = {i: entries[place] for i, place in enumerate(places)}
    return Pattern([divmod(place, shape[1]) for place in places], shape), (packed, len(packed))


class Separated:
    """Rows of one element as expressions of scalars, and their derivatives.

    Row 0 is the objective. The Lagrangian is row 0 plus the others times multipliers y. Tapes take
    inputs (batch or 1, entries) and return outputs (batch, entries).

    Attributes
    ----------
    sizes : tuple of int
        Number of rows of each function.
    values : Tape
        From x and the parameters to the rows.
    first : Tape
        From the same to the rows and their Jacobian.
    second : Tape
        From x, weights and the parameters to rows, Jacobian, and the Hessian of the weighted sum.
    product : Tape
        From x, y, v and the parameters to the Hessian of the Lagrangian times v.
    squares : Squares or None
        Weighted sums of the squares of the constraints' gradients, where these are sparse.
    pulled_back : Tape
        From x, y, w, c and the parameters to gradients by x, y and each parameter: of w times the
        Lagrangian's derivative by (x, y) and, by the parameters only, of c times the Lagrangian.
    """

    def __init__(
        self,
        functions: Sequence[Callable],
        variables: int,
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        self._scalars, self._lock = Scalars(), threading.RLock()
        x = self._new_inputs((variables,))
        parameters = tuple(self._new_inputs(shape) for shape in shapes)
        self._x, self._p = x.forms, [value.forms for value in parameters]
        self._scalars.variables = {self._atom(form): j for j, form in enumerate(self._x)}
        found = [self._forms(function(x, parameters)) for function in functions]
        self.sizes = tuple(map(len, found))
        self._rows = [form for rows in found for form in rows]
        self._build()

    def _new_inputs(self, shape: tuple[int, ...]) -> Symbols:
        numbers = [self._scalars.input() for _ in range(torch.Size(shape).numel())]
        return Symbols(self._scalars, torch.tensor(numbers, dtype=torch.int64).reshape(shape))

    def _forms(self, rows: Tensor) -> list[int]:
        if isinstance(rows, Symbols):
            return rows.forms
        return [self._scalars.constant(value) for value in rows.reshape(-1).tolist()]

    def _atom(self, form: int) -> int:
        return self._scalars.forms[form][0][0]

    def _build(self) -> None:
        """All tapes but those that few programs need."""
        values, slopes = self._values(), self._slopes()
        weights = [self._scalars.input() for _ in self._rows]
        curvatures = self._curvatures(weights)
        self.squares = self._squares(slopes)
        self.values = self._tape([], [values])
        self.first = self._tape([], [values, slopes])
        self.second = self._tape([weights], [values, slopes, curvatures])
        y, w, c = (self._inputs(m) for m in (self._constraints, self._order, 1))
        self.product = self._tape([y, w[: len(self._x)]], [self._curved(y, w)])
        self.pulled_back = self._tape([y, w, c], self._gradients(y, w, c[0]))

    def _tape(
        self, more: Sequence[Sequence[int]], outputs: Sequence[Entries], across: bool = False
    ) -> Tape:
        return Tape(self._scalars, [self._x, *more, *self._p], outputs, across)

    @cached_property
    def sparse(self) -> SparseFunctions:
        """The same with sparse outputs, made when they are first asked for."""
        with self._lock, outside_transforms(), torch.inference_mode(False), torch.no_grad():
            return self._sparse()

    def _sparse(self) -> SparseFunctions:
        values, n = self._values(), len(self._x)
        weights = self._inputs(len(self._rows))
        jacobian, slopes = _packed(self._slopes()[0], (len(self._rows), n))
        hessian, curvatures = _packed(self._curvatures(weights)[0], (n, n))
        return SparseFunctions(
            self._tape([], [values, slopes], across=True),
            self._tape([weights], [values, slopes, curvatures], across=True),
            jacobian, hessian, Plan.of(hessian, jacobian.rest),
        )  # fmt: skip

    def _inputs(self, count: int) -> list[int]:
        return [self._scalars.input() for _ in range(count)]

    @property
    def _constraints(self) -> int:
        return len(self._rows) - 1

    @property
    def _order(self) -> int:
        return len(self._x) + self._constraints

    # --- outputs ---------------------------------------------------------------------------------

    def _values(self) -> Entries:
        return dict(enumerate(self._rows)), len(self._rows)

    def _slopes(self) -> Entries:
        """Entries of the Jacobian: the objective's by reverse, the others by forward mode."""
        n, one = len(self._x), self._scalars.constant(1.0)
        entries, _ = self._by(self._scalars.adjoints([(self._rows[0], one)]), self._x)
        for i, row in enumerate(self._rows[1:], 1):
            entries |= {i * n + j: form for j, form in self._scalars.slopes(row).items()}
        return entries, len(self._rows) * n

    def _curvatures(self, weights: list[int]) -> Entries:
        adjoints = self._scalars.adjoints(zip(self._rows, weights, strict=True))
        found, n = self._scalars.curvatures(adjoints), len(self._x)
        lower = {i * n + j: form for (i, j), form in found.items()}
        return lower | {j * n + i: form for (i, j), form in found.items()}, n * n

    def _squares(self, slopes: Entries) -> Squares | None:
        """For sparse rows; None if a product of matrices is as good."""
        n = len(self._x)
        columns: dict[int, list[int]] = defaultdict(list)
        for place, form in sorted(slopes[0].items()):
            if place >= n and form != ZERO:
                columns[place // n - 1].append(place % n)
        pairs = sum(len(row) ** 2 for row in columns.values())
        if not columns or pairs * _SPARSE > self._constraints * n * n:
            return None
        return Squares(columns, self._constraints, n)

    def _slope(self, y: list[int]) -> list[tuple[int, int]]:
        """Rows and their weights in the Lagrangian."""
        return [(self._rows[0], self._scalars.constant(1.0)), *zip(self._rows[1:], y, strict=True)]

    def _directional(self, y: list[int], w: list[int]) -> list[tuple[int, int]]:
        """Entries of the Lagrangian's derivative by (x, y), and those of w."""
        by_x = self._scalars.adjoints(self._slope(y))
        slopes = [by_x.get(self._atom(form), ZERO) for form in self._x]
        return list(zip([*slopes, *self._rows[1:]], w, strict=True))

    def _curved(self, y: list[int], w: list[int]) -> Entries:
        pairs = self._directional(y, w)[: len(self._x)]
        return self._by(self._scalars.adjoints(pairs), self._x)

    def _gradients(self, y: list[int], w: list[int], c: int) -> list[Entries]:
        pairs = self._directional(y, w)
        own = [(row, self._scalars.multiply(weight, c)) for row, weight in self._slope(y)]
        moved = self._scalars.adjoints(pairs)
        both = self._scalars.adjoints([*pairs, *own]) if self._p else {}
        by_xy = [self._by(moved, inputs) for inputs in (self._x, y)]
        return by_xy + [self._by(both, inputs) for inputs in self._p]

    def _by(self, adjoints: dict[int, int], inputs: list[int]) -> Entries:
        atoms = map(self._atom, inputs)
        return {i: adjoints[a] for i, a in enumerate(atoms) if a in adjoints}, len(inputs)
