"""The tensors of ``x = phi(A x + c)``, checked before any work starts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.implicit.product import Matrices
from declarative_cvx.nonconvex.kernels.arguments import require
from declarative_cvx.transforms import transforming

Weights = Tensor | tuple[Tensor, Tensor]  # A, or L and R of A = L R'


def prepared(A: Weights, c: Tensor, start: Tensor | None) -> tuple[Matrices, Tensor, Tensor | None]:
    """The factors of M = A', c as (batch, n), and start, of one type that can be computed with.

    Raises
    ------
    ParameterError
        Naming the tensor that does not fit.
    """
    L, R = A if isinstance(A, tuple) else (A, None)
    given = {"c": c, "L": L, "R": R} if R is not None else {"c": c, "A": L}
    for name, value in given.items():
        _require_floating(name, value, c)
    for name, value in given.items():
        if name != "c" and value.ndim != 2:
            raise ParameterError(f"{name} has shape {tuple(value.shape)}; expected a matrix.")
    n = len(L)
    shape = (n, n) if R is None else (n, L.shape[-1])
    for name, value in given.items():
        if name != "c" and tuple(value.shape) != shape:
            raise ParameterError(f"{name} has shape {tuple(value.shape)}; expected {shape}.")
    if c.ndim == 0 or c.shape[-1] != n:
        raise ParameterError(
            f"c has shape {tuple(c.shape)}; expected (..., {n}), as A has {n} rows."
        )
    for name, value in given.items():
        _require_finite(name, value)
    dtype = _working_type(*given.values())
    rows = c.reshape(-1, n).to(dtype)
    matrices = (L.mT.to(dtype),) if R is None else (R.to(dtype), L.mT.to(dtype))
    return matrices, rows, None if start is None else _checked_start(start, c, rows)


def _require_floating(name: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ParameterError(f"{name} is {kind}; expected a tensor of floating-point numbers.")
    if value.is_sparse:
        raise ParameterError(
            f"{name} is sparse, which factorisations are not for: pass {name}.to_dense(), or "
            "predict(weights, u), which solves for the states of cycles only and keeps the rest "
            "sparse."
        )
    if value.device != like.device:
        raise ParameterError(
            f"{name} is on {value.device}, but c is on {like.device}; put all on one device."
        )


def _require_finite(name: str, value: Tensor) -> None:
    if transforming() or not math.isfinite(float(value.detach().sum())):  # overflow is no error
        require(name, value)


def _working_type(*values: Tensor) -> torch.dtype:
    dtype = torch.float32  # also of half-precision numbers
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _checked_start(start: Tensor, c: Tensor, rows: Tensor) -> Tensor:
    if not isinstance(start, Tensor) or start.shape != c.shape:
        shape = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ParameterError(f"start has shape {shape}; expected that of c, {tuple(c.shape)}.")
    start = start.detach().reshape(rows.shape).to(rows)
    return torch.where(start.isfinite(), start, 0.0)  # an element that failed starts anew
