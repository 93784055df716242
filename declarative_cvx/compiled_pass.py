"""Whole passes of small layers with linear cones, by compiled code.

From parameters to outputs, and from gradients of outputs to those of parameters, without a tensor
in between: see compiled/layer.h. It answers only where solution and derivative are beyond doubt in
all elements of a batch; everything else is for those who look closer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from declarative_cvx.backends.dual_active_set import (
    ROWS,
    SLACK_SHARE,
    VARIABLES,
    DualActiveSet,
    most_exchanges,
)
from declarative_cvx.compiled import is_available
from declarative_cvx.cones.product import POLYHEDRAL
from declarative_cvx.param_program import ParamConeProgram, Source
from declarative_cvx.parameters import Arguments
from declarative_cvx.transforms import (
    are_batched,
    over_gradients,
    recording,
    transforming,
)

# Multiplications, over a batch, that are worth another thread.
WORTH_A_THREAD = 50_000

# What else than a place among the parameters the source of a line may be.
_CONSTANTS, _SUMS = -1, -2

Otherwise = Callable[[Arguments], tuple[Tensor, ...]]


class _Form(NamedTuple):
    """What the compiled code has to know of a layer: the arrays of `describe` in programs.c."""

    start: np.ndarray
    source: np.ndarray
    factor: np.ndarray
    constant: np.ndarray
    lines: np.ndarray
    sections: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    place: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, canonical: ParamConeProgram, sources: Sequence[Source]) -> _Form:
        structure, n = canonical.structure, canonical.solved_structure.reduced.variables
        heights = canonical.data.heights[:4]  # P, q, A and b
        rows = sum(heights)
        data = sp.csr_array(canonical.data.matrix[:rows])
        place = [s.index + n * (s.dual & (s.index >= 0)) for s in sources]
        share = [np.ones(s.index.size) if s.scale is None else s.scale for s in sources]
        row = [structure.P.rows, np.zeros(heights[1]), structure.A.rows, np.zeros(heights[3])]
        col = [structure.P.cols, np.arange(heights[1]), structure.A.cols, np.arange(heights[3])]
        constant, count = canonical.data.constant[:rows], structure.variables - n
        lines = _lines(count, data, constant, heights, row, col)
        arrays = (
            (data.indptr, np.int64),
            (data.indices, np.int64),
            (data.data, np.float64),
            (constant, np.float64),
            (lines, np.int64),
            (np.searchsorted(lines[:, 3], np.cumsum([0, *heights])), np.int64),
            (canonical.sizes, np.int64),
            ([s.index.size for s in sources], np.int64),
            (np.concatenate(place), np.int64),
            (np.concatenate(share), np.float64),
        )
        return cls(*(np.ascontiguousarray(values, dtype=kind) for values, kind in arrays))


def _lines(
    count: int,
    data: sp.csr_array,
    constant: np.ndarray,
    heights: Sequence[int],
    row: Sequence[np.ndarray],
    col: Sequence[np.ndarray],
) -> np.ndarray:
    """Entries of the data as lines (see `Line` in layer.h), int64, shape (lines, 6).

    No line goes on from the first `count` variables, which are substituted, to the others.
    """
    part = np.repeat(np.arange(len(heights)), heights)
    rows, cols = np.concatenate(row), np.concatenate(col)
    counts = np.diff(data.indptr)
    kind = np.where(counts == 0, _CONSTANTS, np.where((counts > 1) | (constant != 0), _SUMS, 0))
    source, factor = np.zeros(kind.size, dtype=np.int64), np.zeros(kind.size)
    copied = np.flatnonzero(kind == 0)
    source[copied] = data.indices[data.indptr[copied]]
    factor[copied] = data.data[data.indptr[copied]]
    follows = np.diff(cols) == 1
    for known in (part, rows, cols < count, kind, factor):
        follows &= np.diff(known) == 0
    step = np.diff(source)
    steady = np.append(True, ~follows[:-1] | (step[1:] == step[:-1]))[: follows.size]
    first = np.flatnonzero(np.append(True, ~(follows & steady))[: kind.size])
    length = np.diff(np.append(first, kind.size))
    along = np.where(length > 1, np.append(step, 0)[first], 1)
    origin = np.where(kind == 0, source, kind)[first]
    return np.stack([rows[first], cols[first], length, first, origin, along], 1)


@dataclass(frozen=True, eq=False)
class CompiledPass:
    """A layer that compiled code can pass through.

    Attributes
    ----------
    form : tuple of ndarray
        See `_Form`.
    variables, rows : int
        Of the program that is left when variables are substituted.
    constants : tuple
        These, how many variables are substituted, how many rows are equalities, and what the
        method is asked for: see `pass` in programs.c.
    shapes : tuple of tuple of int
        Of the outputs.
    matrices : tuple of bool
        Which of the parameters P and A depend on.
    """

    form: _Form
    variables: int
    rows: int
    constants: tuple[float, ...]
    shapes: tuple[tuple[int, ...], ...]
    matrices: tuple[bool, ...]
    _strides: dict[tuple[bool, ...], tuple[np.ndarray, bool]] = field(default_factory=dict)

    @classmethod
    def of(cls, canonical: ParamConeProgram, output_ids: Sequence[int]) -> CompiledPass | None:
        """The pass of a layer with such outputs; None if it is not for compiled code."""
        left = canonical.structure.reduced
        linear = canonical.fixed is None and left.cone.kinds <= POLYHEDRAL and not canonical.gp
        small = 0 < left.variables <= VARIABLES and left.rows <= ROWS
        if not (linear and small and is_available()):
            return None
        sources = [canonical.direct_source(identity) for identity in output_ids]
        found = [source for source in sources if source is not None]
        if len(found) < len(sources):
            return None
        n, m = left.variables, left.rows
        count, equalities = canonical.structure.variables - n, left.cone.zero
        asked = (SLACK_SHARE * DualActiveSet.tol, most_exchanges(n, m))
        return cls(
            _Form.of(canonical, found),
            n,
            m,
            (n, m, count, equalities, *asked),
            tuple(source.shape for source in found),
            tuple(bool(P or A) for P, _, A, *_ in canonical.data.dependence.T),
        )

    def strides(self, batched: tuple[bool, ...]) -> tuple[np.ndarray, bool]:
        """Distances between elements in the parameters, and whether all share P and A."""
        if batched not in self._strides:
            varies = any(map(operator.and_, batched, self.matrices))
            self._strides[batched] = (self.form.widths * batched, not varies)
        return self._strides[batched]

    def threads(self, batch: int) -> int:
        """How many are worth while."""
        if batch <= 1:
            return 1
        n, m, count = self.constants[:3]
        worth = 1 + int(batch * n * n * (n + m + count)) // WORTH_A_THREAD
        return min(torch.get_num_threads(), batch, worth)

    def outputs(self, arguments: Arguments, otherwise: Otherwise) -> tuple[Tensor, ...] | None:
        """Outputs of the layer, differentiable; None where they have to be found in another way.

        Parameters
        ----------
        arguments : Arguments
        otherwise : callable
            From arguments to the outputs, in that other way: for derivatives that are themselves
            differentiated, and those that are in doubt.
        """
        if transforming() or arguments.device.type != "cpu":
            return None
        # (What the graph keeps of the values is for autograd to say.)
        run = _Run.of(self, replace(arguments, values=()))
        outputs = run.forward(arguments.values)
        if outputs is None or not recording(*arguments.values):
            return outputs
        return super(torch.autograd.Function, _Pass).apply(  # type: ignore[misc]
            run, otherwise, outputs, *arguments.values
        )


@dataclass(frozen=True, eq=False)
class _Run:
    """A batch, and its solutions x (batch, n) and y (batch, m)."""

    layer: CompiledPass
    arguments: Arguments
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def of(cls, layer: CompiledPass, arguments: Arguments) -> _Run:
        batch = 1 if arguments.batch is None else arguments.batch
        return cls(
            layer, arguments, np.empty((batch, layer.variables)), np.empty((batch, layer.rows))
        )

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The outputs; None if an element is not solved beyond doubt."""
        from declarative_cvx.compiled._programs import solve_layers

        outputs = [self._empty(shape) for shape in self.layer.shapes]
        if self._pass(solve_layers, values, outputs, [None] * len(values)):
            return None
        return tuple(_typed(v, self.arguments.dtype) for v in outputs)

    def backward(
        self, values: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None] | None:
        """Gradients of the parameters; None if one of them is in doubt."""
        from declarative_cvx.compiled._programs import differentiate_layers

        batched = self.arguments.batched
        given = [None if grad is None else _plain(grad) for grad in grads]
        found = [
            self._like(value, several) if is_wanted else None
            for value, several, is_wanted in zip(values, batched, wanted, strict=True)
        ]
        if self._pass(differentiate_layers, values, given, found):
            return None
        return [
            grad if grad is None else _typed(self._shared(grad, several), value.dtype)
            for grad, several, value in zip(found, batched, values, strict=True)
        ]

    def _like(self, value: Tensor, several: bool) -> Tensor:
        """For a gradient of every element."""
        if self.arguments.batch is None or several:
            return torch.empty_like(
                value, dtype=torch.float64, memory_format=torch.contiguous_format
            )
        return self._empty(value.shape)

    def _empty(self, shape: Sequence[int]) -> Tensor:
        """For one value of every element."""
        batch = self.arguments.batch
        lead = () if batch is None else (batch,)
        return torch.empty((*lead, *shape), dtype=torch.float64, device=self.arguments.device)

    def _shared(self, grad: Tensor, several: bool) -> Tensor:
        """Gradients of every element, as one where all share the parameter."""
        return grad if several or self.arguments.batch is None else grad.sum(0)

    def _pass(
        self,
        function: Callable[..., int],
        values: Sequence[Tensor],
        outputs: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> int:
        """How many elements are in doubt."""
        layer, batch = self.layer, len(self.x)
        stride, shared = layer.strides(self.arguments.batched)
        inputs = [_plain(value) for value in values]  # alive as long as their addresses are used
        return function(
            layer.form,
            *layer.constants,
            batch,
            layer.threads(batch),
            shared,
            _addresses(inputs),
            _addresses(outputs),
            _addresses(gradients),
            stride,
            self.x,
            self.y,
        )


def _plain(v: Tensor) -> Tensor:
    """The numbers as compiled code reads them."""
    if v.dtype is torch.float64 and v.is_contiguous() and not v.is_neg():
        return v
    return v.detach().resolve_neg().to(torch.float64).contiguous()


def _typed(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v if dtype is torch.float64 else v.to(dtype)


def _addresses(values: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple([0 if v is None else v.data_ptr() for v in values])


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, run: _Run, otherwise: Otherwise, outputs: tuple[Tensor, ...], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.otherwise = run, otherwise
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*values)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        values, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        found = None
        if not (torch.is_grad_enabled() or transforming() or are_batched(grads)):
            found = ctx.run.backward(values, grads, wanted)
        if found is None:
            found = _otherwise(ctx, values, wanted, grads)
        return None, None, None, *found


def _otherwise(
    ctx: Any, values: Sequence[Tensor], wanted: Sequence[bool], grads: Sequence[Any]
) -> list[Tensor | None]:
    """Gradients in the other way."""
    recorded = torch.is_grad_enabled()
    if not recorded:
        pairs = zip(values, wanted, strict=True)
        values = [value.detach().requires_grad_(is_wanted) for value, is_wanted in pairs]
    with torch.enable_grad():
        outputs = ctx.otherwise(replace(ctx.run.arguments, values=tuple(values)))
    there = [i for i, grad in enumerate(grads) if grad is not None]
    pull_back = partial(
        torch.autograd.grad,
        [outputs[i] for i in there],
        [value for value, is_wanted in zip(values, wanted, strict=True) if is_wanted],
        create_graph=recorded,
        allow_unused=True,
    )
    found = iter(over_gradients(lambda *given: pull_back(given), [grads[i] for i in there]))
    return [next(found) if is_wanted else None for is_wanted in wanted]
