"""Checking the tensors that are passed for parameters, before any work starts."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError
from declarative_cvx.transforms import transforming

# Rounding that a declared attribute tolerates, relative to the largest entry.
SIGN_TOLERANCE = 1e-8
SYMMETRY_TOLERANCE = 1e-5
SEMIDEFINITE_TOLERANCE = 1e-6

# What signs that are declared ask of the values, in code and in words.
_SIGNS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nonneg": (lambda v: v >= -SIGN_TOLERANCE, "nonnegative, as declared"),
    "pos": (lambda v: v > 0, "positive, as declared"),
    "nonpos": (lambda v: v <= SIGN_TOLERANCE, "nonpositive, as declared"),
    "neg": (lambda v: v < 0, "negative, as declared"),
}


@dataclass(frozen=True, eq=False)
class ParameterSpec:
    """What is known of one parameter of a problem.

    Attributes
    ----------
    name : str
    shape : tuple of int or None
        None stands for any size.
    attributes : frozenset of str
        Declared attributes: nonneg, pos, nonpos, neg, symmetric, PSD, NSD, diag.
    lower, upper : ndarray or None
        Declared bounds, broadcastable to `shape`.
    support : ndarray of bool or None
        Where a parameter with declared sparsity may differ from zero.
    """

    name: str
    shape: tuple[int | None, ...]
    attributes: frozenset[str] = frozenset()
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    support: np.ndarray | None = None

    @classmethod
    def of(cls, parameter: cp.Parameter) -> ParameterSpec:
        """Read what a CVXPY parameter declares."""
        names = ("nonneg", "pos", "nonpos", "neg", "symmetric", "PSD", "NSD", "diag")
        declared = frozenset(name for name in names if parameter.attributes[name])
        lower = upper = support = None
        if parameter.attributes["bounds"] is not None:
            lower, upper = (np.asarray(bound, float) for bound in parameter.attributes["bounds"])
        if parameter.sparse_idx is not None:
            support = np.zeros(parameter.shape, dtype=bool)
            support[parameter.sparse_idx] = True
        return cls(parameter.name(), tuple(parameter.shape), declared, lower, upper, support)

    @cached_property
    def declares(self) -> bool:
        """Whether anything is known of the values."""
        known = (self.lower, self.upper, self.support)
        return bool(self.attributes) or any(value is not None for value in known)

    @property
    def symmetric(self) -> bool:
        """Whether it is declared to be a symmetric matrix."""
        return bool(self.attributes & {"symmetric", "PSD", "NSD"})

    def is_batched(self, position: int, value: Tensor) -> bool:
        """Whether a tensor holds a batch of values; an error if its shape fits neither way."""
        shape = value.shape
        if shape == self.shape or self._fits(shape):
            return False
        if shape and (shape[1:] == self.shape or self._fits(shape[1:])):
            return True
        sizes = ["any" if extent is None else str(extent) for extent in self.shape]
        single, many = (
            f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
            for parts in (sizes, ["batch", *sizes])
        )
        raise ParameterError(
            f"{self._where(position)} has shape {tuple(shape)}; expected {single}, or a batch "
            f"{many}."
        )

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return (
            len(shape) == len(self.shape)
            and None in self.shape
            and all(
                extent in (None, given) for extent, given in zip(self.shape, shape, strict=True)
            )
        )

    def check_finite(self, position: int, value: Tensor) -> None:
        """Refuse values that are not finite."""
        self._require(position, value, torch.isfinite(value), "a finite number")

    def check(self, position: int, value: Tensor) -> None:
        """Refuse values that are not what the parameter declares."""
        for attribute in self.attributes & _SIGNS.keys():
            holds, wording = _SIGNS[attribute]
            self._require(position, value, holds(value), f"{wording} by {attribute}=True")
        for bound, sign, wording in ((self.lower, 1, "at least"), (self.upper, -1, "at most")):
            if bound is not None:
                limit = torch.as_tensor(bound, dtype=value.dtype, device=value.device)
                ok = sign * (value - limit) >= -SIGN_TOLERANCE
                self._require(position, value, ok, f"{wording} its declared bound")
        self._check_matrix(position, value)

    def _check_matrix(self, position: int, value: Tensor) -> None:
        off = None
        if "diag" in self.attributes:
            off = ~torch.eye(value.shape[-1], dtype=torch.bool, device=value.device)
        if self.support is not None:
            off = ~torch.as_tensor(self.support, device=value.device)
        if off is not None:
            self._require(position, value, ~off | (value == 0), "zero, by its declared sparsity")
        if not self.symmetric:
            return
        scale = value.abs().amax() if value.numel() else 0.0
        close = (value - value.mT).abs() <= SYMMETRY_TOLERANCE * scale
        self._require(position, value, close, "equal to its transposed entry (symmetric)")
        for attribute, sign in (("PSD", 1), ("NSD", -1)):
            if attribute in self.attributes and value.numel():
                smallest = torch.linalg.eigvalsh(sign * value.to(torch.float64))[..., 0]
                self._check_definite(position, attribute, smallest, scale)

    def _check_definite(
        self, position: int, attribute: str, smallest: Tensor, scale: Tensor | float
    ) -> None:
        bad = torch.nonzero(smallest.reshape(-1) < -SEMIDEFINITE_TOLERANCE * scale)
        if len(bad):
            element = int(bad[0, 0])
            where = f", batch element {element}," if smallest.ndim else ""
            sign = "" if attribute == "PSD" else "-"
            raise ParameterError(
                f"{self._where(position)}{where} is declared {attribute}=True but "
                f"{sign}{self.name} has the eigenvalue {float(smallest.reshape(-1)[element]):.3g}."
            )

    def _require(self, position: int, value: Tensor, ok: Tensor, wording: str) -> None:
        if bool(ok.all()):
            return
        index = tuple(torch.nonzero(~ok)[0].tolist())
        found = float(value[index])
        where = f"[{', '.join(map(str, index))}]" if index else ""
        raise ParameterError(
            f"{self._where(position)}: entry {self.name}{where} is {found:g}; it must be {wording}."
        )

    def _where(self, position: int) -> str:
        return f"Parameter {self.name!r} (argument {position})"


@dataclass(frozen=True)
class Arguments:
    """Checked values of all parameters of one call.

    Attributes
    ----------
    values : tuple of Tensor
    batched : tuple of bool
        Which of them have a batch dimension.
    batch : int or None
        Batch size; None if no value is batched.
    dtype : torch.dtype
        Common floating-point type: that of the outputs.
    device : torch.device
    """

    values: tuple[Tensor, ...]
    batched: tuple[bool, ...]
    batch: int | None
    dtype: torch.dtype
    device: torch.device


def bind_arguments(
    specs: Sequence[ParameterSpec], values: Sequence[Tensor], like: Sequence[Tensor] = ()
) -> Arguments:
    """Check shapes, types and devices of the tensors of one call, not yet their values.

    Parameters
    ----------
    specs : sequence of ParameterSpec
    values : sequence of Tensor
    like : sequence of Tensor, optional
        Whose type and device the outputs have if there are no values.

    Raises
    ------
    ParameterError
        Naming the parameter, and what was expected.
    """
    if len(values) != len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise ParameterError(
            f"The layer takes {len(specs)} tensors, one for each of its parameters ({names}), in "
            f"this order; got {len(values)}."
        )
    batched = []
    for position, (spec, value) in enumerate(zip(specs, values, strict=True)):
        _require_tensor(position, spec, value)
        if position and value.device != values[0].device:
            raise ParameterError(
                f"Parameter {spec.name!r} (argument {position}) is on {value.device}, but "
                f"{specs[0].name!r} is on {values[0].device}; put all on one device."
            )
        batched.append(spec.is_batched(position, value))
    batch = _batch_size(specs, values, batched)
    models = values or like
    types = {model.dtype for model in models} or {torch.get_default_dtype()}
    dtype = reduce(torch.promote_types, types)
    device = models[0].device if models else torch.device("cpu")
    return Arguments(tuple(values), tuple(batched), batch, dtype, device)


def _require_tensor(position: int, spec: ParameterSpec, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ParameterError(
            f"Parameter {spec.name!r} (argument {position}) is a {type(value).__name__}; "
            "expected a torch tensor: pass torch.as_tensor(value)."
        )
    if not value.is_floating_point():
        raise ParameterError(
            f"Parameter {spec.name!r} (argument {position}) has type {value.dtype}; expected "
            "floating point: pass value.to(torch.float64)."
        )


def check_values(specs: Sequence[ParameterSpec], values: Sequence[Tensor]) -> None:
    """Refuse values that are not finite or not what is declared of them, in any transform.

    Raises
    ------
    ParameterError
    """
    if not values:
        return
    if transforming():
        _Check.apply(tuple(specs), *values)
    else:
        _inspect(specs, values)


@torch.no_grad()
def _inspect(specs: Sequence[ParameterSpec], values: Sequence[Tensor]) -> None:
    if not math.isfinite(reduce(operator.add, (value.sum() for value in values))):
        for position, (spec, value) in enumerate(zip(specs, values, strict=True)):
            spec.check_finite(position, value)  # or a sum overflowed
    for position, (spec, value) in enumerate(zip(specs, values, strict=True)):
        if spec.declares:
            spec.check(position, value)


class _Check(torch.autograd.Function):
    """Looks at values where they can be looked at: also inside vmap and other transforms."""

    @staticmethod
    def forward(specs: tuple[ParameterSpec, ...], *values: Tensor) -> Tensor:
        _inspect(specs, values)
        return values[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, specs: Any, *values: Any) -> Any:
        moved = [
            value if dim is None else value.movedim(dim, 0)
            for value, dim in zip(values, in_dims[1:], strict=True)
        ]
        return _Check.apply(specs, *moved), None


def _batch_size(
    specs: Sequence[ParameterSpec], values: Sequence[Tensor], batched: Sequence[bool]
) -> int | None:
    first: int | None = None
    for position, is_batched in enumerate(batched):
        if not is_batched:
            continue
        if first is None:
            first = position
        elif values[position].shape[0] != values[first].shape[0]:
            raise ParameterError(
                f"Parameter {specs[position].name!r} (argument {position}) has batch size "
                f"{values[position].shape[0]}, but {specs[first].name!r} (argument {first}) has "
                f"{values[first].shape[0]}; batched parameters must have the same batch size. A "
                "value shared by all elements is passed without a batch dimension."
            )
    return None if first is None else values[first].shape[0]
