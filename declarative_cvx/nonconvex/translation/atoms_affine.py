"""CVXPY's affine atoms, and those it counts among them, in torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce

import cvxpy as cp
import numpy as np
import torch
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.broadcast_to import broadcast_to
from cvxpy.atoms.affine.concatenate import Concatenate
from cvxpy.atoms.affine.conj import conj
from cvxpy.atoms.affine.conv import conv, convolve
from cvxpy.atoms.affine.cumsum import cumsum
from cvxpy.atoms.affine.diag import diag_mat, diag_vec
from cvxpy.atoms.affine.hstack import Hstack
from cvxpy.atoms.affine.imag import imag
from cvxpy.atoms.affine.index import index, special_index
from cvxpy.atoms.affine.kron import kron
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.affine.real import real
from cvxpy.atoms.affine.reshape import reshape
from cvxpy.atoms.affine.sum import Sum
from cvxpy.atoms.affine.trace import Trace
from cvxpy.atoms.affine.transpose import transpose
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.atoms.affine.upper_tri import upper_tri
from cvxpy.atoms.affine.vstack import Vstack
from cvxpy.atoms.affine.wraps import (
    hermitian_wrap,
    nonneg_wrap,
    nonpos_wrap,
    nsd_wrap,
    psd_wrap,
    skew_symmetric_wrap,
    symmetric_wrap,
)
from torch import Tensor

from declarative_cvx.nonconvex.translation.along_axes import over_axes
from declarative_cvx.nonconvex.translation.rule import Function, Operand, Rule, of_arguments


def _identity(x: Tensor) -> Tensor:
    return x


def _sum(*terms: Tensor) -> Tensor:
    return reduce(operator.add, terms)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return a * b if a.ndim == 0 or b.ndim == 0 else a @ b


def _kron(a: Tensor, b: Tensor) -> Tensor:
    # (torch.kron fails on transposed arguments.)
    blocks = a[:, None, :, None] * b[None, :, None, :]
    return blocks.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def reversed_axes(x: Tensor) -> Tensor:
    """Transpose of a tensor of any rank: it turns CVXPY's order of entries into torch's."""
    return x.permute(tuple(range(x.ndim))[::-1])


def _reshape(atom: reshape) -> tuple[Function, Sequence[Operand]]:
    shape = atom.shape
    if atom.order == "C":
        return lambda x: x.reshape(shape), atom.args
    return lambda x: reversed_axes(reversed_axes(x).reshape(shape[::-1])), atom.args


def _transpose(atom: transpose) -> tuple[Function, Sequence[Operand]]:
    if atom.axes is None:
        return reversed_axes, atom.args
    axes = tuple(int(axis) for axis in atom.axes)
    return lambda x: x.permute(axes), atom.args


def _expand(atom: cp.Expression) -> tuple[Function, Sequence[Operand]]:
    shape = tuple(int(length) for length in atom.shape)
    return lambda x: x.expand(shape), atom.args


def _concatenate(atom: Concatenate) -> tuple[Function, Sequence[Operand]]:
    if atom.axis is None:
        return lambda *parts: torch.cat([part.reshape(-1) for part in parts]), atom.args
    return lambda *parts: torch.cat(parts, dim=atom.axis), atom.args


def _selection(
    select: Callable[[cp.Expression, np.ndarray], np.ndarray],
) -> Rule:
    """Rule of an atom that picks entries: which ones is found by picking from their numbers."""

    def rule(atom: cp.Expression) -> tuple[Function, Sequence[Operand]]:
        argument, shape = atom.args[0], atom.shape
        numbers = np.arange(argument.size).reshape(argument.shape)
        picked = np.ascontiguousarray(select(atom, numbers)).reshape(-1)
        return (
            lambda x, entries: x.reshape(-1)[entries].reshape(shape),
            [argument, picked],
        )

    return rule


def _triangle(atom: upper_tri, numbers: np.ndarray) -> np.ndarray:
    rows, columns = np.triu_indices(numbers.shape[-1], k=1)
    return numbers[..., rows, columns]


def _cumsum(atom: cumsum) -> tuple[Function, Sequence[Operand]]:
    if atom.axis is None or atom.args[0].ndim == 0:
        shape = atom.shape
        return lambda x: x.reshape(-1).cumsum(0).reshape(shape), atom.args
    return lambda x: x.cumsum(int(atom.axis)), atom.args


def _diag_vec(atom: diag_vec) -> tuple[Function, Sequence[Operand]]:
    return lambda x: torch.diag_embed(x, atom.k), atom.args


def _diag_mat(atom: diag_mat) -> tuple[Function, Sequence[Operand]]:
    return lambda x: torch.diagonal(x, atom.k), atom.args


def _convolution(atom: cp.Expression) -> tuple[Function, Sequence[Operand]]:
    """Product with the Toeplitz matrix of the first argument, whose last entry here is 0."""
    n, m = atom.args[0].size, atom.args[1].size
    lag = np.arange(n + m - 1)[:, None] - np.arange(m)
    entries = np.where((lag >= 0) & (lag < n), lag, n)
    shape = atom.shape

    def convolve_with(kernel: Tensor, signal: Tensor, entries: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(kernel.reshape(-1), (0, 1))
        return (padded[entries] @ signal.reshape(-1)).reshape(shape)

    return convolve_with, [*atom.args, entries]


_WRAPS = (nonneg_wrap, nonpos_wrap, psd_wrap, nsd_wrap, symmetric_wrap, skew_symmetric_wrap,
          hermitian_wrap)  # fmt: skip

AFFINE: dict[type, Rule] = {
    AddExpression: of_arguments(_sum),
    NegExpression: of_arguments(torch.neg),
    multiply: of_arguments(torch.mul),
    DivExpression: of_arguments(torch.div),
    MulExpression: of_arguments(_matmul),
    kron: of_arguments(_kron),
    conv: _convolution,
    convolve: _convolution,
    Sum: over_axes(lambda x: x.sum(-1)),
    Trace: of_arguments(_trace),
    cumsum: _cumsum,
    reshape: _reshape,
    transpose: _transpose,
    Promote: _expand,
    broadcast_to: _expand,
    Hstack: of_arguments(lambda *parts: torch.hstack(parts)),
    Vstack: of_arguments(lambda *parts: torch.vstack(parts)),
    Concatenate: _concatenate,
    index: _selection(lambda atom, numbers: numbers[atom._orig_key]),
    special_index: _selection(lambda atom, numbers: numbers[atom.key]),
    upper_tri: _selection(_triangle),
    diag_vec: _diag_vec,
    diag_mat: _diag_mat,
    # Arguments are real: complex ones are refused before.
    real: of_arguments(_identity),
    conj: of_arguments(_identity),
    imag: of_arguments(torch.zeros_like),
    **dict.fromkeys(_WRAPS, of_arguments(_identity)),
}

# Atoms whose entries are entries of their one argument.
SELECTIONS = (index, special_index, reshape, transpose, Promote, broadcast_to, upper_tri,
              diag_mat, *_WRAPS)  # fmt: skip
