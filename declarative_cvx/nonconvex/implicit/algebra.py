"""Models made of models, by matrix algebra (IDL 2.3, 3.2). Every rule is exact.

All of it works on `ImplicitWeights`, dense or sparse, and is differentiable where these are dense.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from math import inf

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.implicit.activations import (
    Activation,
    Blocks,
    ReLU,
    as_activation,
)
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights


def affine(
    weight: Tensor,  # (q, p), dense or sparse
    bias: Tensor | None = None,  # (q,)
) -> ImplicitWeights:
    """The model without states ``y = weight u + bias``."""
    q, p = weight.shape
    return ImplicitWeights(
        A=_zeros(weight, 0, 0),
        B=_zeros(weight, 0, p),
        C=_zeros(weight, q, 0),
        D=weight,
        b=weight.new_zeros(0, layout=torch.strided),
        c=weight.new_zeros(q, layout=torch.strided) if bias is None else bias,
        activation=ReLU(),
    )


def elementwise(
    activation: Activation | str,
    features: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    sparse: bool = False,
) -> ImplicitWeights:
    """The model ``y = activation(u)`` of so many features."""
    eye = torch.eye(features, dtype=dtype, device=device)
    eye = eye.to_sparse() if sparse else eye
    zero, none = _zeros(eye, features, features), eye.new_zeros(features, layout=torch.strided)
    return ImplicitWeights(zero, eye, eye, zero, none, none, as_activation(activation))


def cascade(*models: ImplicitWeights) -> ImplicitWeights:
    """The models one after the other: the first one's output is the second one's input (IDL 2.3).

    Well-posed if and only if each of them is. States are in the order of the models.

    Parameters
    ----------
    *models : ImplicitWeights

    Raises
    ------
    ParameterError
        If a model has not as many inputs as the one before has outputs, or their types differ.
    """
    return reduce(_cascade, _compatible(models))


def parallel(*models: ImplicitWeights) -> ImplicitWeights:
    """The models side by side, for the same input; their outputs are stacked."""
    return _side_by_side(models, _diagonal, torch.cat)


def add(*models: ImplicitWeights) -> ImplicitWeights:
    """The sum of the models' outputs for the same input: a skip connection is ``add(model, I)``."""
    if len({model.out_features for model in models}) > 1:
        raise ParameterError(
            "add needs models with the same number of outputs, got "
            f"{[model.out_features for model in models]}."
        )
    return _side_by_side(models, lambda C: torch.cat(C, dim=1), _total)


def permute(weights: ImplicitWeights, order: Tensor) -> ImplicitWeights:
    """The same rule with its states in another order (IDL 3.2, 6).

    Parameters
    ----------
    weights : ImplicitWeights
    order : Tensor of int64, shape (n,)
        State ``i`` of the result is state ``order[i]`` of `weights`.
    """
    n = weights.state_features
    if order.shape != (n,) or not torch.equal(order.sort().values.cpu(), torch.arange(n)):
        raise ParameterError(f"order must hold each of 0, ..., {n - 1} once, got {order!r}.")
    return select_states(weights, order)


def select_states(weights: ImplicitWeights, states: Tensor) -> ImplicitWeights:
    """The model with some of its states only, in the order given; the others count as zero."""
    order = states.to(weights.A.device)
    return replace(
        weights,
        A=weights.A.index_select(0, order).index_select(1, order),
        B=weights.B.index_select(0, order),
        C=weights.C.index_select(1, order),
        b=weights.b.index_select(0, order),
        activation=taken(weights, states),
    )


def taken(weights: ImplicitWeights, states: Tensor) -> Activation:
    """The activation of some states, in the order given.

    As of blocks, so that none with an activation of whole vectors is cut.
    """
    return Blocks(_parts(weights)).take(states.tolist()) if len(states) else ReLU()


def rescale(
    weights: ImplicitWeights,
    scale: Tensor,  # (n,)
) -> ImplicitWeights:
    """The same rule with its states multiplied by positive numbers (IDL 3.2).

    A becomes ``S A S^-1``: the scale may bring its norm below 1. Exact but for the rounding of
    products, and without any where the scales are powers of 2.

    Parameters
    ----------
    weights : ImplicitWeights
    scale : Tensor, shape (n,)

    Raises
    ------
    ParameterError
        If a scale is not positive, or an activation is not positively homogeneous (tanh, sigmoid).
    """
    n, scale = weights.state_features, scale.to(weights.A)
    if scale.shape != (n,) or not bool(((scale > 0) & (1 / scale > 0) & (1 / scale < inf)).all()):
        raise ParameterError(
            f"scale must be {n} positive numbers that have reciprocals in {scale.dtype}, "
            f"got {scale!r}."
        )
    for activation, _ in _parts(weights):
        if not (activation.componentwise and activation.positively_homogeneous):
            raise ParameterError(
                f"States with the activation {activation.name} cannot be rescaled: "
                "phi(s z) = s phi(z) holds for relu, leaky relu and the identity."
            )
    return replace(
        weights,
        A=_columns(_rows(weights.A, scale), 1 / scale),
        B=_rows(weights.B, scale),
        C=_columns(weights.C, 1 / scale),
        b=weights.b * scale,
    )


def _cascade(first: ImplicitWeights, second: ImplicitWeights) -> ImplicitWeights:
    if first.out_features != second.in_features:
        raise ParameterError(
            f"A model with {second.in_features} inputs cannot follow one with "
            f"{first.out_features} outputs."
        )
    n1, n2 = first.state_features, second.state_features
    top = torch.cat([first.A, _zeros(first.A, n1, n2)], dim=1)
    bottom = torch.cat([product(second.B, first.C), second.A], dim=1)
    return ImplicitWeights(
        A=torch.cat([top, bottom]),
        B=torch.cat([first.B, product(second.B, first.D)]),
        C=torch.cat([product(second.D, first.C), second.C], dim=1),
        D=product(second.D, first.D),
        b=torch.cat([first.b, second.b + second.B @ first.c]),
        c=second.c + second.D @ first.c,
        activation=_joined(first, second),
    )


def _side_by_side(
    models: Sequence[ImplicitWeights],
    outputs: Callable[[list[Tensor]], Tensor],
    gather: Callable[[list[Tensor]], Tensor],
) -> ImplicitWeights:
    models = _compatible(models)
    if len({model.in_features for model in models}) > 1:
        raise ParameterError(
            "Models side by side need the same number of inputs, got "
            f"{[model.in_features for model in models]}."
        )
    return ImplicitWeights(
        A=_diagonal([model.A for model in models]),
        B=torch.cat([model.B for model in models]),
        C=outputs([model.C for model in models]),
        D=gather([model.D for model in models]),
        b=torch.cat([model.b for model in models]),
        c=gather([model.c for model in models]),
        activation=_joined(*models),
    )


def _compatible(models: Sequence[ImplicitWeights]) -> Sequence[ImplicitWeights]:
    """The models, all sparse if one is; their types and devices must agree."""
    if not models:
        raise ParameterError("There must be one model at least.")
    kinds = {(model.A.dtype, model.A.device) for model in models}
    if len(kinds) > 1:
        raise ParameterError(f"The models' types and devices differ ({kinds}): use `.to(...)`.")
    if any(model.is_sparse for model in models):
        return [model if model.is_sparse else model.sparse() for model in models]
    return models


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two dense or two sparse matrices."""
    with warnings.catch_warnings():  # torch goes through its CSR format, and says so
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return left @ right


def _parts(weights: ImplicitWeights) -> Sequence[tuple[Activation, int]]:
    """The activations of the states in order, each with its number of states."""
    if isinstance(weights.activation, Blocks):
        return tuple(zip(weights.activation.activations, weights.activation.sizes, strict=True))
    return ((weights.activation, weights.state_features),) if weights.state_features else ()


def _joined(*models: ImplicitWeights) -> Activation:
    """The activation of all states of the models; equal neighbours are one block."""
    parts = [part for model in models for part in _parts(model)]
    return Blocks(parts).take(range(sum(size for _, size in parts))) if parts else ReLU()


def _total(values: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, values)


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The block diagonal matrix of `blocks`."""
    width = sum(block.shape[1] for block in blocks)
    rows, before = [], 0
    for block in blocks:
        height, after = block.shape[0], width - before - block.shape[1]
        row = [_zeros(block, height, before), block, _zeros(block, height, after)]
        rows.append(torch.cat(row, dim=1))
        before += block.shape[1]
    return torch.cat(rows)


def _zeros(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=like.dtype, device=like.device, layout=like.layout)


def _rows(matrix: Tensor, scale: Tensor) -> Tensor:
    """Each row times a number."""
    return scaled_entries(matrix, lambda indices: scale[indices[0]], scale[:, None])


def _columns(matrix: Tensor, scale: Tensor) -> Tensor:
    """Each column times a number."""
    return scaled_entries(matrix, lambda indices: scale[indices[1]], scale)


def scaled_entries(
    matrix: Tensor, sparse_factor: Callable[[Tensor], Tensor], dense_factor: Tensor
) -> Tensor:
    """`matrix` times a factor for each entry, computed only where there are entries."""
    if not matrix.is_sparse:
        return matrix * dense_factor
    matrix = matrix.coalesce()
    indices = matrix.indices()
    return torch.sparse_coo_tensor(
        indices, matrix.values() * sparse_factor(indices), matrix.shape, check_invariants=False
    )
