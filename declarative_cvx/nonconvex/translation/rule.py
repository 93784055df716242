"""How one atom of CVXPY is computed in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import cvxpy as cp
import numpy as np
from torch import Tensor

# A function of tensors without in-place operations and without decisions on their values.
Function = Callable[..., Tensor]
# What such a function is applied to: expressions, or arrays that are kept on the device.
Operand: TypeAlias = cp.Expression | np.ndarray
Rule = Callable[[cp.Expression], tuple[Function, Sequence[Operand]]]


def of_arguments(function: Function) -> Rule:
    """The rule of an atom that is one function of its arguments, whatever its data are."""
    return lambda atom: (function, atom.args)
