"""Sums of penalties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.training.parameter_matrix import ParameterMatrix, region
from declarative_cvx.nonconvex.implicit.training.penalty_terms import PenaltyTerm, Ridge


@dataclass(frozen=True)
class Penalties:
    """A sum of terms: any number of `Ridge`s, and one other term for each entry at most.

    Raises
    ------
    SpecificationError
        If two terms that are not `Ridge` share a block: their sum has no prox in closed form.
    """

    terms: tuple[PenaltyTerm, ...]

    def __post_init__(self) -> None:
        taken: dict[str, PenaltyTerm] = {}
        for term in self.rough:
            for block in term.on:
                if block in taken:
                    raise SpecificationError(
                        f"{taken[block]} and {term} both act on {block}. Give one term for each "
                        "block (besides Ridge), or write their sum as one ConvexPenalty."
                    )
                taken[block] = term

    @classmethod
    def of(cls, given: PenaltyTerm | Sequence[PenaltyTerm]) -> Penalties:
        """From one term or several."""
        terms = (given,) if isinstance(given, PenaltyTerm) else tuple(given)
        for k, term in enumerate(terms):
            if not isinstance(term, PenaltyTerm):
                raise SpecificationError(
                    f"penalty[{k}] is {term!r}; expected a PenaltyTerm such as Ridge(1e-3)."
                )
        return cls(terms)

    @property
    def rough(self) -> tuple[PenaltyTerm, ...]:
        """The terms that are not smooth."""
        return tuple(term for term in self.terms if not isinstance(term, Ridge))

    @property
    def couples(self) -> bool:
        """Whether some term ties (A, B) to (C, D), which are then one block."""
        return any(set(term.on) & set("AB") and set(term.on) & set("CD") for term in self.rough)

    def part(self, blocks: str) -> Penalties:
        """The rough terms on some of these blocks."""
        return Penalties(tuple(term for term in self.rough if set(term.on) & set(blocks)))

    @property
    def by_row(self) -> bool:
        return all(term.by_row for term in self.terms)

    def value(self, weights: ParameterMatrix) -> Tensor:
        """The sum, shape ()."""
        total = weights.matrix.new_zeros(())
        for term in self.terms:
            total = total + term.value(weights.block(term.on))
        return total

    def values(self, weights: ParameterMatrix) -> Tensor:
        """Of each row, where all terms are `by_row`; shape (n + q,)."""
        total = weights.matrix.new_zeros(len(weights.matrix))
        for term in self.terms:
            rows, columns = region(term.on, weights)
            total[rows] += term.values(weights.matrix[rows, columns])
        return total

    def prox(self, weights: ParameterMatrix, step: Tensor) -> ParameterMatrix:
        """The prox of the rough terms; step is (n + q, 1)."""
        matrix = weights.matrix.clone()
        for term in self.rough:
            rows, columns = region(term.on, weights)
            matrix[rows, columns] = term.prox(matrix[rows, columns], step[rows])
        return weights.with_matrix(matrix)

    def jacobian(self, weights: ParameterMatrix, step: Tensor) -> Tensor:
        """Derivative of `prox`, row by row, where all rough terms are `by_row`.

        Returns
        -------
        Tensor, shape (n + q, k, k)
        """
        found = torch.diag_embed(torch.ones_like(weights.matrix))
        for term in self.rough:
            rows, columns = region(term.on, weights)
            d, a = term.slopes(weights.matrix[rows, columns], step[rows])
            count = a.square().sum(1).clamp(min=1)[:, None, None]
            found[rows, columns, columns] = torch.diag_embed(d) - a[:, :, None] * a[:, None] / count
        return found

    def ridge(self, weights: ParameterMatrix) -> Tensor:
        """Weights of the squares of all entries, shape of the matrix."""
        total = torch.zeros_like(weights.matrix)
        for term in self.terms:
            if isinstance(term, Ridge):
                total[region(term.on, weights)] += term.weight
        return total
