"""Projections by compiled code, where there is any: a hundred operations of torch at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from declarative_cvx.cones.spectrum import Spectrum

MODULE = "declarative_cvx.compiled._projections"
# Dimensions up to which eigenvectors are worth computing before they are asked for.
WIDEST = 32
# Entries of eigenvectors that are worth another thread: a millisecond.
WORTH_A_THREAD = 30_000


@cache
def is_available() -> bool:
    """Whether it was compiled when the package was installed."""
    return importlib.util.find_spec(MODULE) is not None


def suits(v: Tensor) -> bool:
    """Whether points (batch, cones, dim) go to the compiled code."""
    host = v.device.type == "cpu" and v.dtype == torch.float64
    return host and v.shape[-1] <= WIDEST and is_available()


def exponential(v: Tensor) -> tuple[Tensor, Spectrum]:
    """As `declarative_cvx.cones.exponential.decompose`."""
    from declarative_cvx.compiled import _projections

    return _decompose(_projections.exponential, v)


def second_order(v: Tensor) -> tuple[Tensor, Spectrum]:
    """As `declarative_cvx.cones.second_order.decompose`."""
    from declarative_cvx.compiled import _projections

    return _decompose(_projections.second_order, v)


def semidefinite(eigenvalues: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of DΠ, from those of matrices of order k, (..., k, k)."""
    from declarative_cvx.compiled import _projections

    k, shape = q.shape[-1], q.shape[:-2]
    size = k * (k + 1) // 2
    vectors, values = q.new_empty((*shape, size, size)), q.new_empty((*shape, size))
    arrays = (eigenvalues.contiguous(), q.contiguous(), vectors, values)
    _projections.semidefinite(k, _threads(vectors), *(tensor.numpy() for tensor in arrays))
    return vectors, values


def _decompose(function: Callable[..., None], v: Tensor) -> tuple[Tensor, Spectrum]:
    batch, cones, dim = v.shape
    points = v.detach().contiguous()
    projection, values = torch.empty_like(points), torch.empty_like(points)
    vectors, kink = points.new_empty((batch, cones, dim, dim)), points.new_empty((batch, cones))
    outputs = (points, projection, vectors, values, kink)
    function(dim, _threads(vectors), *(tensor.numpy() for tensor in outputs))
    return projection, Spectrum(lambda: (vectors, values), lambda: kink)


def _threads(vectors: Tensor) -> int:
    return min(torch.get_num_threads(), 1 + vectors.numel() // WORTH_A_THREAD)
