"""Products of which one factor has no variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import cvxpy as cp
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.quad_over_lin import quad_over_lin


@dataclass(frozen=True, eq=False)
class Factor:
    """What an expression with variables is multiplied by.

    Attributes
    ----------
    kind : type
        `multiply` (elementwise) or `MulExpression` (matrices).
    value : cvxpy.Expression
        Without variables.
    left : bool
        Whether it is the first of the two factors.
    """

    kind: type
    value: cp.Expression
    left: bool = True

    def times(self, other: cp.Expression) -> cp.Expression:
        return self.kind(*((self.value, other) if self.left else (other, self.value)))

    def mapped(self, change: Callable[[cp.Expression], cp.Expression]) -> Factor:
        """The factor with another value."""
        return replace(self, value=change(self.value))

    @property
    def scalar(self) -> cp.Expression | None:
        """The number that it is for every entry; None if it is none."""
        if self.kind is not multiply:
            return None
        if isinstance(self.value, Promote):
            return self.value.args[0]
        return self.value if self.value.shape == () else None

    def after(self, first: Factor) -> Factor | None:
        """This factor and one that is applied before it as one; None if that is not worth it."""
        if self.kind is first.kind is multiply:
            return Factor(multiply, _elementwise(self.value, first.value))
        for one, other in ((self, first), (first, self)):
            if one.scalar is not None and other.value.ndim:
                scale = cp.promote(one.scalar, other.value.shape)
                return other.mapped(partial(multiply, scale))
        if self.kind is first.kind is MulExpression and self.left == first.left:
            return self._after_matrix(first)
        return None

    def _after_matrix(self, first: Factor) -> Factor | None:
        pair = (self.value, first.value) if self.left else (first.value, self.value)
        if first.value.ndim != 2 or self.value.ndim not in (1, 2):
            return None
        product = pair[0] @ pair[1]
        if product.size > pair[0].size + pair[1].size:  # of low rank: better one after the other
            return None
        return Factor(MulExpression, product, self.left)


def _elementwise(one: cp.Expression, other: cp.Expression) -> cp.Expression:
    """The product entry by entry; of two promoted numbers, promoted."""
    if isinstance(one, Promote) and isinstance(other, Promote):
        return cp.promote(multiply(one.args[0], other.args[0]), one.shape)
    return multiply(one, other)


def factorised(expression: cp.Expression) -> tuple[Factor, cp.Expression] | None:
    """A product of something without variables and something with variables, as such.

    Quotients are products with a reciprocal. None for all other expressions.
    """
    kind = type(expression)
    if kind in (multiply, MulExpression):
        left, right = expression.args
        if left.variables() and right.variables():
            return None
        on_left = not left.variables()
        return Factor(kind, *((left, True) if on_left else (right, False))), (
            right if on_left else left
        )
    if kind is DivExpression and not expression.args[1].variables():
        dividend, divisor = expression.args
        return Factor(multiply, reciprocal(divisor)), dividend
    if kind is quad_over_lin and expression.args[1].parameters():
        return _squares_over(expression)
    return None


def _squares_over(expression: quad_over_lin) -> tuple[Factor, cp.Expression] | None:
    """A sum of squares divided by something without variables."""
    argument, divisor = expression.args
    if divisor.variables() or divisor.size != 1:
        return None
    squares = expression.copy([argument, cp.Constant(1.0)])
    share = reciprocal(divisor if divisor.shape == () else cp.sum(divisor))
    return Factor(multiply, cp.promote(share, squares.shape)), squares


def reciprocal(divisor: cp.Expression) -> cp.Expression:
    if isinstance(divisor, Promote):
        return cp.promote(reciprocal(divisor.args[0]), divisor.shape)
    return 1 / divisor
