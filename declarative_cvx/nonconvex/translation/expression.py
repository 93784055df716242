"""From a CVXPY expression to a torch function: the only file that walks CVXPY's atoms.

The tree is compiled once to a list of steps. A call runs through the list: subexpressions that
several places share are computed once, constants are kept on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from cvxpy.atoms.atom import Atom
from cvxpy.atoms.perspective import perspective
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.translation.atoms_affine import AFFINE
from declarative_cvx.nonconvex.translation.atoms_elementwise import ELEMENTWISE
from declarative_cvx.nonconvex.translation.atoms_matrix import MATRIX
from declarative_cvx.nonconvex.translation.rule import Function, Operand, Rule
from declarative_cvx.transforms import outside_transforms

# Ids of variables and parameters to their values, each of its leaf's shape (one element).
Values = Mapping[int, Tensor]


def translate_expression(
    expression: cp.Expression, where: str = "the expression"
) -> Callable[[Values], Tensor]:
    """Compile an expression to a torch function.

    Parameters
    ----------
    expression : cvxpy.Expression
    where : str
        Where the expression stands, for error messages.

    Returns
    -------
    callable
        Takes a mapping from the ids of variables and parameters to tensors of their shapes (one
        element, no batch dimension) to a tensor of the expression's shape, on the device and in
        the type of those tensors. It works under torch.func's vmap, grad, jacfwd and hessian.

    Raises
    ------
    SpecificationError
        If an atom has no translation, or something is complex.
    """
    program = translate_expressions([expression], [where])
    return lambda values: program(values)[0]


def translate_expressions(
    expressions: Sequence[cp.Expression], where: Sequence[str]
) -> Callable[[Values], tuple[Tensor, ...]]:
    """Compile expressions to one function that computes what they share only once.

    Parameters
    ----------
    expressions : sequence of cvxpy.Expression
    where : sequence of str
        Where each of them stands, for error messages.

    Returns
    -------
    callable
        As for `translate_expression`, with a tuple of tensors for its result.
    """
    compiler = _Compiler()
    results = [compiler.place(e, w) for e, w in zip(expressions, where, strict=True)]
    return _Tape(compiler, results)


class _Compiler:
    """Gives every subexpression a place in a list of values.

    Attributes
    ----------
    constants : dict of int to ndarray
        Places of constants.
    leaves : dict of int to int
        Places of variables and parameters, and their ids.
    steps : list of (callable, tuple of int, int)
        Functions, the places of their arguments, and that of the result.
    """

    def __init__(self) -> None:
        self.constants: dict[int, np.ndarray] = {}
        self.leaves: dict[int, int] = {}
        self.steps: list[tuple[Function, tuple[int, ...], int]] = []
        self.size = 0
        self._places: dict[int, int] = {}
        self._alive: list[Any] = []  # an id names an object only as long as that exists

    def place(self, operand: Operand, where: str) -> int:
        key = _key(operand)
        if key not in self._places:
            self._alive.append(operand)
            self._places[key] = self._new_place(operand, where)
        return self._places[key]

    def _new_place(self, operand: Operand, where: str) -> int:
        if isinstance(operand, np.ndarray):
            return self._store(self.constants, operand)
        if operand.is_complex():
            raise SpecificationError(
                f"{where} contains `{operand}`, which is complex. Write real and imaginary part as "
                "two real expressions."
            )
        if isinstance(operand, cp.Variable | cp.Parameter):
            return self._store(self.leaves, operand.id)
        if operand.size == 0:
            return self._store(self.constants, np.zeros(operand.shape))
        if operand.is_constant() and not operand.parameters():
            return self._store(self.constants, _array(operand.value).reshape(operand.shape))
        function, operands = _rule(operand, where)(operand)
        arguments = tuple(self.place(argument, where) for argument in operands)
        result = self._next()
        self.steps.append((function, arguments, result))
        return result

    def _store(self, table: dict[int, Any], entry: Any) -> int:
        place = self._next()
        table[place] = entry
        return place

    def _next(self) -> int:
        self.size += 1
        return self.size - 1


class _Tape:
    """What a compiler has written down, ready to run."""

    def __init__(self, compiler: _Compiler, results: Sequence[int]) -> None:
        self._constants = compiler.constants
        self._leaves = tuple(compiler.leaves.items())
        self._steps = tuple(compiler.steps)
        self._size = compiler.size
        self._results = tuple(results)
        self._kept: dict[tuple[torch.device, torch.dtype], list[Any]] = {}

    def __call__(self, values: Values) -> tuple[Tensor, ...]:
        like = next(iter(values.values()), None)
        table = self._with_constants(like).copy()
        for place, leaf in self._leaves:
            table[place] = values[leaf]
        for function, arguments, result in self._steps:
            table[result] = function(*[table[place] for place in arguments])
        return tuple(table[place] for place in self._results)

    def _with_constants(self, like: Tensor | None) -> list[Any]:
        device = torch.device("cpu") if like is None else like.device
        dtype = torch.float64 if like is None else like.dtype
        if (device, dtype) not in self._kept:
            table: list[Any] = [None] * self._size
            with outside_transforms():
                for place, array in self._constants.items():
                    kind = dtype if array.dtype == np.float64 else torch.int64
                    table[place] = torch.as_tensor(array, device=device, dtype=kind)
            self._kept[device, dtype] = table
        return self._kept[device, dtype]


def _key(operand: Operand) -> int:
    """Leaves are known by their CVXPY ids, of which no atom has the same; the rest as objects."""
    return -operand.id - 1 if isinstance(operand, cp.Variable | cp.Parameter) else id(operand)


def _array(value: Any) -> np.ndarray:
    dense = value.toarray() if sp.issparse(value) else value
    return np.array(dense, dtype=np.float64)


def _perspective(atom: perspective) -> tuple[Function, Sequence[Operand]]:
    """The function s f(x / s), where f may have parameters too that are no arguments."""
    inner = translate_expression(atom.f, f"the function of `{atom}`")
    variables, parameters = atom.f.variables(), atom.f.parameters()
    shape = atom.shape

    def value(s: Tensor, *rest: Tensor) -> Tensor:
        scaled = [x / s.reshape(()) for x in rest[: len(variables)]]
        leaves = [*variables, *parameters]
        values = {
            leaf.id: x for leaf, x in zip(leaves, [*scaled, *rest[len(variables) :]], strict=True)
        }
        return (s * inner({**values, -1: s})).reshape(shape)

    return value, [*atom.args, *parameters]


RULES: dict[type, Rule] = {**AFFINE, **ELEMENTWISE, **MATRIX, perspective: _perspective}


def _rule(atom: Atom, where: str) -> Rule:
    rule = RULES.get(type(atom))
    if rule is None:
        raise SpecificationError(
            f"{where} contains `{atom}`, but {type(atom).__name__} has no translation to torch. "
            "Write it with other atoms."
        )
    return rule
