"""Functions of one scalar, in torch and with their derivatives as expressions of scalars."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Above it log(1 + exp(x)) is x to rounding.
_LOGISTIC_IS_LINEAR = 40.0


class Algebra(Protocol):
    """What derivatives are built with; forms are numbers."""

    def constant(self, value: float) -> int: ...
    def scale(self, form: int, factor: float) -> int: ...
    def total(self, *forms: int) -> int: ...
    def multiply(self, a: int, b: int) -> int: ...
    def apply(self, name: str, a: int, exponent: float = 0.0) -> int: ...


@dataclass(frozen=True)
class ScalarFunction:
    """A function that is applied entry by entry.

    Attributes
    ----------
    value : callable
        From entries and the exponent (of powers; 0 of other functions) to values.
    first, second : callable
        From the algebra, the argument's form and the exponent to the derivative's form.
    """

    value: Callable[[Tensor, float], Tensor]
    first: Callable[[Algebra, int, float], int]
    second: Callable[[Algebra, int, float], int]


def _power(s: Algebra, x: int, k: float) -> int:
    return s.apply("pow", x, k)


def _one_minus_square(s: Algebra, y: int) -> int:
    return s.total(s.constant(1.0), s.scale(s.multiply(y, y), -1.0))


def _squared_plus(s: Algebra, x: int, sign: float) -> int:
    """1 + sign x^2"""
    return s.total(s.constant(1.0), s.scale(s.multiply(x, x), sign))


def _tan_slope(s: Algebra, x: int, k: float) -> int:
    tangent = s.apply("tan", x)
    return s.total(s.constant(1.0), s.multiply(tangent, tangent))


def _sigmoid_slope(s: Algebra, x: int, k: float = 0.0) -> int:
    y = s.apply("sigmoid", x)
    return s.total(y, s.scale(s.multiply(y, y), -1.0))


def _bell(factor: float) -> Callable[[Algebra, int, float], int]:
    """The function factor exp(-x^2)."""
    return lambda s, x, k: s.scale(s.apply("exp", s.scale(s.multiply(x, x), -1.0)), factor)


FUNCTIONS: dict[str, ScalarFunction] = {
    "pow": ScalarFunction(
        torch.pow,
        lambda s, x, k: s.scale(_power(s, x, k - 1), k),
        lambda s, x, k: s.scale(_power(s, x, k - 2), k * (k - 1)),
    ),
    "exp": ScalarFunction(
        lambda x, k: x.exp(), lambda s, x, k: s.apply("exp", x), lambda s, x, k: s.apply("exp", x)
    ),
    "expm1": ScalarFunction(
        lambda x, k: x.expm1(), lambda s, x, k: s.apply("exp", x), lambda s, x, k: s.apply("exp", x)
    ),
    "abs": ScalarFunction(
        lambda x, k: x.abs(), lambda s, x, k: s.apply("sign", x), lambda s, x, k: s.constant(0.0)
    ),
    "sign": ScalarFunction(
        lambda x, k: x.sign(), lambda s, x, k: s.constant(0.0), lambda s, x, k: s.constant(0.0)
    ),
    "log": ScalarFunction(
        lambda x, k: x.log(),
        lambda s, x, k: _power(s, x, -1.0),
        lambda s, x, k: s.scale(_power(s, x, -2.0), -1.0),
    ),
    "sin": ScalarFunction(
        lambda x, k: x.sin(),
        lambda s, x, k: s.apply("cos", x),
        lambda s, x, k: s.scale(s.apply("sin", x), -1.0),
    ),
    "cos": ScalarFunction(
        lambda x, k: x.cos(),
        lambda s, x, k: s.scale(s.apply("sin", x), -1.0),
        lambda s, x, k: s.scale(s.apply("cos", x), -1.0),
    ),
    "tan": ScalarFunction(
        lambda x, k: x.tan(),
        _tan_slope,
        lambda s, x, k: s.scale(s.multiply(s.apply("tan", x), _tan_slope(s, x, k)), 2.0),
    ),
    "sinh": ScalarFunction(
        lambda x, k: x.sinh(),
        lambda s, x, k: s.apply("cosh", x),
        lambda s, x, k: s.apply("sinh", x),
    ),
    "cosh": ScalarFunction(
        lambda x, k: x.cosh(),
        lambda s, x, k: s.apply("sinh", x),
        lambda s, x, k: s.apply("cosh", x),
    ),
    "tanh": ScalarFunction(
        lambda x, k: x.tanh(),
        lambda s, x, k: _one_minus_square(s, s.apply("tanh", x)),
        lambda s, x, k: s.scale(
            s.multiply(s.apply("tanh", x), _one_minus_square(s, s.apply("tanh", x))), -2.0
        ),
    ),
    "asinh": ScalarFunction(
        lambda x, k: x.asinh(),
        lambda s, x, k: _power(s, _squared_plus(s, x, 1.0), -0.5),
        lambda s, x, k: s.scale(s.multiply(x, _power(s, _squared_plus(s, x, 1.0), -1.5)), -1.0),
    ),
    "atanh": ScalarFunction(
        lambda x, k: x.atanh(),
        lambda s, x, k: _power(s, _squared_plus(s, x, -1.0), -1.0),
        lambda s, x, k: s.scale(s.multiply(x, _power(s, _squared_plus(s, x, -1.0), -2.0)), 2.0),
    ),
    "log1p": ScalarFunction(
        lambda x, k: x.log1p(),
        lambda s, x, k: _power(s, s.total(s.constant(1.0), x), -1.0),
        lambda s, x, k: s.scale(_power(s, s.total(s.constant(1.0), x), -2.0), -1.0),
    ),
    "sigmoid": ScalarFunction(
        lambda x, k: x.sigmoid(),
        _sigmoid_slope,
        lambda s, x, k: s.multiply(
            _sigmoid_slope(s, x),
            s.total(s.constant(1.0), s.scale(s.apply("sigmoid", x), -2.0)),
        ),
    ),
    "softplus": ScalarFunction(
        lambda x, k: torch.nn.functional.softplus(x, threshold=_LOGISTIC_IS_LINEAR),
        lambda s, x, k: s.apply("sigmoid", x),
        _sigmoid_slope,
    ),
    "entr": ScalarFunction(
        lambda x, k: torch.special.entr(x),
        lambda s, x, k: s.total(s.constant(-1.0), s.scale(s.apply("log", x), -1.0)),
        lambda s, x, k: s.scale(_power(s, x, -1.0), -1.0),
    ),
    "erf": ScalarFunction(
        lambda x, k: x.erf(),
        _bell(2 / math.sqrt(math.pi)),
        lambda s, x, k: s.scale(s.multiply(x, _bell(2 / math.sqrt(math.pi))(s, x, k)), -2.0),
    ),
}
