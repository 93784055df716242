"""Expressions of scalars, with their sparse first and second derivatives."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import torch

from declarative_cvx.nonconvex.minimization.scalars.functions import FUNCTIONS

# Terms in all forms together above which taking functions apart costs more than it saves.
_MOST_TERMS = 300_000

# A linear combination of atoms: pairs of an atom and its coefficient, in order of the atoms.
Form = tuple[tuple[int, float], ...]
Terms = dict[int, float]
# ("*", form, form), or (name of a function, its exponent, form); ("input",).
Atom = tuple
# The form without terms, and the atom that is one.
ZERO, ONE = 0, 0


class NotSeparableError(Exception):
    """The functions are better evaluated as a whole."""


class Scalars:
    """Linear forms of atoms: of inputs, products of two forms, and functions of one.

    Equal ones are stored once. An atom comes after those that it depends on.

    Attributes
    ----------
    forms : list of Form
    atoms : list of Atom
    variables : dict of int to int
        The atoms of the inputs that `slopes` and `curvatures` differentiate by, and their numbers.
    """

    def __init__(self) -> None:
        self.forms: list[Form] = [()]
        self.atoms: list[Atom] = [("one",)]
        self.variables: dict[int, int] = {}
        self._form_of: dict[Form, int] = {(): ZERO}
        self._atom_of: dict[Atom, int] = {}
        self._slopes: dict[int, dict[int, int]] = {}
        self._terms = 0

    # --- arithmetic ------------------------------------------------------------------------------

    def input(self) -> int:
        """The form of a new input."""
        self.atoms.append(("input",))
        return self.form({len(self.atoms) - 1: 1.0})

    def constant(self, value: float) -> int:
        return self.form({ONE: value})

    def form(self, terms: Mapping[int, float]) -> int:
        """The number of a linear form."""
        key = tuple(sorted((atom, c) for atom, c in terms.items() if c != 0.0))
        if key not in self._form_of:
            self._count(1 + len(key))
            self._form_of[key] = len(self.forms)
            self.forms.append(key)
        return self._form_of[key]

    def add(self, collected: Terms, form: int, factor: float = 1.0) -> None:
        """Add a multiple of a form to collected terms."""
        for atom, coefficient in self.forms[form]:
            collected[atom] = collected.get(atom, 0.0) + factor * coefficient

    def total(self, *forms: int) -> int:
        collected: Terms = {}
        for form in forms:
            self.add(collected, form)
        return self.form(collected)

    def scale(self, form: int, factor: float) -> int:
        if factor == 1.0:
            return form
        return self.form({atom: factor * c for atom, c in self.forms[form]})

    def multiply(self, a: int, b: int) -> int:
        for one, other in ((a, b), (b, a)):
            value = self.value(one)
            if value is not None:
                return self.scale(other, value)
        (a, first), (b, second) = self._unit(a), self._unit(b)
        return self.form({self._atom(("*", min(a, b), max(a, b))): first * second})

    def apply(self, name: str, a: int, exponent: float = 0.0) -> int:
        """A function of a form."""
        if name == "pow" and exponent in (0.0, 1.0, 2.0):
            return (self.constant(1.0), a, self.multiply(a, a))[int(exponent)]
        value = self.value(a)
        if value is not None:
            given = torch.tensor(value, dtype=torch.float64)
            return self.constant(float(FUNCTIONS[name].value(given, exponent)))
        return self.form({self._atom((name, exponent, a)): 1.0})

    def value(self, form: int) -> float | None:
        """What a form is, if it is constant."""
        terms = self.forms[form]
        if not terms:
            return 0.0
        return terms[0][1] if len(terms) == 1 and terms[0][0] == ONE else None

    def _unit(self, form: int) -> tuple[int, float]:
        """A form of one term without its coefficient, and that."""
        terms = self.forms[form]
        if len(terms) > 1 or terms[0][1] == 1.0:
            return form, 1.0
        return self.form({terms[0][0]: 1.0}), terms[0][1]

    def _atom(self, key: Atom) -> int:
        if key not in self._atom_of:
            self._count(1)
            self._atom_of[key] = len(self.atoms)
            self.atoms.append(key)
        return self._atom_of[key]

    def _count(self, terms: int) -> None:
        self._terms += terms
        if self._terms > _MOST_TERMS:
            raise NotSeparableError(f"there are more than {_MOST_TERMS} terms")

    # --- derivatives -----------------------------------------------------------------------------

    def arguments(self, atom: int) -> tuple[int, ...]:
        """The forms that an atom is a function of."""
        key = self.atoms[atom]
        return key[1:] if key[0] == "*" else key[2:]

    def _partial(self, atom: int) -> list[tuple[int, int]]:
        """Arguments of an atom, and its derivatives by them."""
        key = self.atoms[atom]
        if key[0] == "*":
            return [(key[1], key[2]), (key[2], key[1])]
        if len(key) < 3:
            return []
        name, exponent, argument = key
        return [(argument, FUNCTIONS[name].first(self, argument, exponent))]

    def slopes(self, form: int) -> dict[int, int]:
        """Derivatives of a form by variables, those that are not zero everywhere."""
        return self._combined((c, self._slopes_of(atom)) for atom, c in self.forms[form])

    def _slopes_of(self, atom: int) -> dict[int, int]:
        if atom in self.variables:
            return {self.variables[atom]: self.constant(1.0)}
        if atom not in self._slopes:
            parts = [
                (1.0, {j: self.multiply(factor, slope) for j, slope in self.slopes(form).items()})
                for form, factor in self._partial(atom)
            ]
            self._slopes[atom] = self._combined(parts)
        return self._slopes[atom]

    def _combined(self, parts: Iterable[tuple[float, Mapping[int, int]]]) -> dict[int, int]:
        """The sum of sparse vectors of forms with coefficients."""
        collected: dict[int, Terms] = {}
        for factor, vector in parts:
            for place, form in vector.items():
                self.add(collected.setdefault(place, {}), form, factor)
        return {place: self.form(terms) for place, terms in collected.items()}

    def adjoints(self, weighted: Iterable[tuple[int, int]]) -> dict[int, int]:
        """Derivatives by every atom of the sum of forms times weights, pairs of both."""
        collected: dict[int, Terms] = {}
        pending: list[int] = []

        def spread(form: int, weight: int) -> None:
            for atom, coefficient in self.forms[form]:
                if atom not in collected:
                    heapq.heappush(pending, -atom)
                self.add(collected.setdefault(atom, {}), weight, coefficient)

        for form, weight in weighted:
            spread(form, weight)
        found = {}
        while pending:
            atom = -heapq.heappop(pending)
            found[atom] = self.form(collected[atom])
            for argument, factor in self._partial(atom):
                spread(argument, self.multiply(found[atom], factor))
        return found

    def curvatures(self, adjoints: Mapping[int, int]) -> dict[tuple[int, int], int]:
        """Second derivatives by variables (i, j), i >= j, of the sum that adjoints belong to.

        Every product and every function adds its own second derivative between the slopes of its
        arguments; linear forms add nothing.
        """
        collected: dict[tuple[int, int], Terms] = {}
        for atom, weight in adjoints.items():
            key = self.atoms[atom]
            if key[0] == "*":
                first, second = self.slopes(key[1]), self.slopes(key[2])
                self._add_outer(collected, weight, first, second)
                self._add_outer(collected, weight, second, first)
            elif len(key) == 3:
                name, exponent, argument = key
                bend = FUNCTIONS[name].second(self, argument, exponent)
                slopes = self.slopes(argument)
                self._add_outer(collected, self.multiply(weight, bend), slopes, slopes)
        return {place: self.form(terms) for place, terms in collected.items()}

    def _add_outer(
        self,
        collected: dict[tuple[int, int], Terms],
        weight: int,
        first: Mapping[int, int],
        second: Mapping[int, int],
    ) -> None:
        self._count(len(first) * len(second) // 2)
        for i, slope in first.items():
            scaled = self.multiply(weight, slope)
            for j, other in second.items():
                if i >= j:
                    self.add(collected.setdefault((i, j), {}), self.multiply(scaled, other))
