"""A problem whose functions are written in torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from declarative_cvx.errors import SpecificationError

Shape = int | Sequence[int]
# A number, an array or tensor, or a function of the parameters.
Value = Any
FUNCTIONS = ("objective", "equality", "inequality")
# What else than variables a layer can return: multipliers.
MULTIPLIERS = ("equality", "inequality", "lower", "upper")


@dataclass(frozen=True, eq=False)
class TorchProblem:
    """A problem whose functions are written in torch, to be solved by `DeclarativeLayer`::

        minimise f(x, *parameters)  subject to  h(x, *parameters) = 0,  g(x, *parameters) <= 0,
        lower <= x <= upper

    It is a deep declarative node (DDN Sec. 3): any functions that torch differentiates twice, and
    that are smooth, as CVXPY's need not be able to say them. A local minimum is found, verified,
    and differentiated by its optimality conditions (DDN Props. 4.4-4.6). The Lagrangian is
    f + y'h + z'g with z >= 0; to maximise, minimise the negative.

    Functions get the variables, then the parameters, all of them float64 tensors (constants of
    other types are best converted beforehand), and return float64. They are written for one
    element and mapped over the batch by `torch.func.vmap`; see `batched` for those that cannot
    be. They are called many times, so they may neither be random nor keep a state. Where they are
    not defined they had better return NaN than raise: an exception costs the whole batch. Nothing
    is differentiated by what they take from elsewhere: a tensor that requires a gradient is
    refused unless it is a parameter, or a parameter of the `torch.nn.Module` that the function is.
    Such modules become submodules of the layer, and are trained with it.

    Parameters
    ----------
    objective : callable or torch.nn.Module
        f, returning a number, of shape ().
    equality, inequality : callable or torch.nn.Module, optional
        h and g, returning tensors of any shapes.
    shape : int, tuple of int, or mapping of str to these
        Of the variable, which is called "x"; or names and shapes of several variables, which the
        functions get in this order.
    parameters : mapping of str to shapes, optional
        Names and shapes of the parameters of one element, in the order in which the functions,
        and the layer, take them: ``{"points": (None, 3), "radius": ()}``. None is any size.
    lower, upper : number, array, tensor or callable, optional
        Bounds, which methods exploit better than they do inequalities; of the variable's shape or
        broadcast to it. A callable gets the parameters. For several variables a number, or a
        mapping from names to these.
    start : number, array, tensor or callable, optional
        Where to start, likewise; by default in the middle of the bounds, or at zero.
    sample_bounds : pair of numbers, arrays, tensors or callables, optional
        Between which the random starts of ``restarts=`` are drawn, by default the bounds; for
        several variables a mapping from names to pairs.
    batched : bool, optional
        The callables are written for a batch: variables ``(batch, *shape)``, and parameters, of
        which each is ``(batch, *shape)`` too, to a number for each element, (batch,), or a tensor
        (batch, ...). A value may depend on its own element only. Without vmap, what it does not
        support (in-place writes, decisions by values) is possible, and small problems are faster.
        Modules with weights of their own are best written for one element.

    Raises
    ------
    SpecificationError

    Examples
    --------
    The nearest point of an ellipse:

    >>> import torch, declarative_cvx as dcx
    >>> problem = dcx.TorchProblem(
    ...     objective=lambda x, point, axes: (x - point).square().sum(),
    ...     equality=lambda x, point, axes: (x / axes).square().sum() - 1,
    ...     shape=2,
    ...     parameters={"point": 2, "axes": 2},
    ...     start=lambda point, axes: point,
    ... )
    >>> (x,) = dcx.DeclarativeLayer(problem)(torch.tensor([2.0, 0.5]), torch.tensor([2.0, 1.0]))
    """

    objective: Callable[..., Tensor]
    equality: Callable[..., Tensor] | None = None
    inequality: Callable[..., Tensor] | None = None
    shape: Shape | Mapping[str, Shape] = field(kw_only=True)
    parameters: Mapping[str, int | Sequence[int | None]] = field(default_factory=dict, kw_only=True)
    lower: Value = field(default=None, kw_only=True)
    upper: Value = field(default=None, kw_only=True)
    start: Value = field(default=None, kw_only=True)
    sample_bounds: Any = field(default=None, kw_only=True)
    batched: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        names = [*self.variable_shapes, *self.parameter_shapes]
        for name in MULTIPLIERS:
            if name in self.variable_shapes:
                raise SpecificationError(
                    f"a variable is called {name!r}, which is the name of multipliers: call it "
                    "something else."
                )
        for name in FUNCTIONS:
            function = getattr(self, name)
            if function is not None or name == "objective":
                _require_callable(name, function, names)
        for name in ("lower", "upper", "start", "sample_bounds"):
            for value in _leaves(getattr(self, name)):
                if callable(value):
                    _require_callable(name, value, list(self.parameter_shapes))

    @property
    def variable_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the variables by their names."""
        given = self.shape if isinstance(self.shape, Mapping) else {"x": self.shape}
        found = {name: _shape(f"shape of {name!r}", value) for name, value in given.items()}
        if not any(_size(shape) for shape in found.values()):
            raise SpecificationError(f"shape is {self.shape!r}: there is nothing to solve for.")
        return found

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one element's parameters by their names; None stands for any size."""
        if not isinstance(self.parameters, Mapping):
            raise SpecificationError(
                f"parameters is {self.parameters!r}, but a mapping from names to shapes is "
                'expected: {"target": (2,), "radius": ()}.'
            )
        return {
            name: _shape(f"parameters[{name!r}]", value, free=True)
            for name, value in self.parameters.items()
        }

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The functions that are modules, by their roles."""
        functions = {name: getattr(self, name) for name in FUNCTIONS}
        return {name: f for name, f in functions.items() if isinstance(f, nn.Module)}


def _leaves(value: Value) -> list[Value]:
    """What stands in mappings and pairs."""
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    return [*value] if isinstance(value, tuple) else [value]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _shape(what: str, given: Any, free: bool = False) -> tuple[int, ...]:
    """A shape as a tuple."""
    shape = (given,) if isinstance(given, int) else given
    good = isinstance(shape, (list, tuple)) and all(
        (free and extent is None)
        or (isinstance(extent, int) and not isinstance(extent, bool) and extent >= 0)
        for extent in shape
    )
    if not good:
        also = ", in which None stands for any size" if free else ""
        raise SpecificationError(
            f"{what} is {given!r}, but a shape is expected: an integer, or a tuple of integers"
            f"{also}."
        )
    return tuple(shape)


def _require_callable(name: str, function: Any, names: list[str]) -> None:
    """Refuse what cannot be called with as many arguments as it will get."""
    if not callable(function):
        raise SpecificationError(
            f"{name} must be a function of ({', '.join(names)}), got {function!r}."
        )
    call = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise SpecificationError(
            f"the {name} function takes {signature}, but it will be called with "
            f"({', '.join(names)})."
        ) from error
