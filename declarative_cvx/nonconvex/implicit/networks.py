"""Feedforward and recurrent networks as implicit models, exactly (IDL 2.2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.activations import (
    Activation,
    ReLU,
    as_activation,
)
from declarative_cvx.nonconvex.implicit.algebra import affine, cascade, elementwise, parallel
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

_LINEAR = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_ADAPTIVE_MAX_POOLS = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid)
_RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
_PROBES = 256  # unit vectors sent through a linear module at once


@torch.no_grad()
def from_sequential(
    network: nn.Module,
    in_shape: int | Sequence[int],
    *,
    sparse: bool = False,
    dtype: torch.dtype | None = None,
) -> ImplicitWeights:
    """A feedforward network as an implicit model, exact to rounding (IDL 2.2).

    A is strictly block lower triangular: states are in the order of the layers, first to last,
    the flattened output of each activation. Linear modules that follow each other become one.
    The maximum over a window becomes ReLU states by ``max(v, w) = w + relu(v - w)``, in rounds
    of pairs: k - 1 states for a window of k, so that every state has a componentwise activation.

    Parameters
    ----------
    network : nn.Module
        A `nn.Sequential`, or one of its modules. Linear layers, convolutions (also transposed),
        average and maximum pooling (also adaptive), batch normalisation and dropout in
        evaluation mode, zero padding, upsampling, flattening; activations ReLU, LeakyReLU, Tanh,
        Sigmoid. Sequentials may be nested.
    in_shape : int or sequence of int
        Shape of one input, without the batch. The model's input is that, flattened.
    sparse : bool, optional
        Give A, B, C and D as sparse tensors.
    dtype : torch.dtype, optional
        Of the result; that of the network's parameters unless given.

    Returns
    -------
    ImplicitWeights
        On the device of the network's parameters. They are copies: gradients do not reach the
        network.

    Raises
    ------
    SpecificationError
        If a module is of another kind, has forward hooks, or is in training mode where that
        matters.
    """
    shape = (in_shape,) if isinstance(in_shape, int) else tuple(in_shape)
    like = next(network.parameters(), torch.empty(0))
    models = [_identity(torch.Size(shape).numel(), like.device)]
    for name, module in _leaves(network, ""):
        _require_known(name, module)
        work = copy.deepcopy(module).to(dtype=torch.float64)
        probe = torch.zeros(1, *shape, dtype=torch.float64, device=like.device)
        out_shape = tuple(work(probe).shape[1:])
        models.extend(_models(work, shape, out_shape, like.device))
        shape = out_shape
    whole = cascade(*models)
    return (whole if sparse else whole.dense()).to(dtype=dtype or like.dtype)


def from_recurrent(network: nn.RNN, steps: int, *, sparse: bool = False) -> ImplicitWeights:
    """A recurrent network, unrolled over so many steps, as an implicit model (IDL 2.2).

    Input and output are sequences, flattened: of shapes (steps, input_size) and
    (steps, hidden_size), for both directions (steps, 2 hidden_size). The first hidden state is 0.

    Parameters
    ----------
    network : nn.RNN
        With tanh or relu; several layers and both directions may be.
    steps : int
    sparse : bool, optional
        Give A, B, C and D as sparse tensors.

    Raises
    ------
    SpecificationError
        If the network is of another kind, or has dropout and is in training mode.
    """
    if not isinstance(network, nn.RNN):
        raise SpecificationError(
            f"from_recurrent takes nn.RNN (tanh or relu), got {type(network).__name__}: gates "
            "multiply states, which x = phi(A x + B u) does not."
        )
    if not isinstance(steps, int) or steps < 1:
        raise SpecificationError(f"steps must be a positive integer, got {steps!r}.")
    if network.training and network.dropout and network.num_layers > 1:
        raise SpecificationError("The recurrent network drops out at random: call .eval() first.")
    _require_no_hooks("", network)
    layers = [_recurrent_layer(network, layer, steps) for layer in range(network.num_layers)]
    whole = cascade(*layers)
    return whole if sparse else whole.dense()


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested sequentials in order, with the names by which they are reached."""
    _require_no_hooks(name, module)
    if type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    # named_children would leave out a module that is there twice.
    for key, child in module._modules.items():
        if child is not None:
            yield from _leaves(child, f"{name}.{key}" if name else key)


def _require_no_hooks(name: str, module: nn.Module) -> None:
    """Refuse what a module computes beside its own function."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise SpecificationError(
            f"Module {name!r} ({type(module).__name__}) has forward hooks or a forward of its own, "
            "which may change what it computes. Remove them; of nn.utils.weight_norm and "
            "spectral_norm by nn.utils.remove_weight_norm and remove_spectral_norm."
        )


def _require_known(name: str, module: nn.Module) -> None:
    known = (*_LINEAR, *_MAX_POOLS, *_ADAPTIVE_MAX_POOLS, *_ACTIVATIONS)
    if type(module) not in known:
        raise SpecificationError(
            f"Module {name!r} is {type(module).__name__}, which has no exact form here. "
            f"Known: {', '.join(sorted(kind.__name__ for kind in known))}."
        )
    if isinstance(module, _RANDOM) and (module.training or _uses_batch(module)):
        raise SpecificationError(
            f"Module {name!r} ({type(module).__name__}) depends on the batch or on chance in "
            "training mode: call .eval() first, and keep running statistics."
        )


def _uses_batch(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def _models(
    module: nn.Module, in_shape: tuple[int, ...], out_shape: tuple[int, ...], device: torch.device
) -> list[ImplicitWeights]:
    """One module as models to be cascaded."""
    if isinstance(module, _ACTIVATIONS):
        features = torch.Size(in_shape).numel()
        return [_bend(as_activation(module), features, device)]
    if isinstance(module, (*_MAX_POOLS, *_ADAPTIVE_MAX_POOLS)):
        return _maxima(_windows(module, in_shape, out_shape), in_shape, device)
    return [_linear(module, in_shape, device)]


def _bend(activation: Activation, features: int, device: torch.device) -> ImplicitWeights:
    return elementwise(activation, features, dtype=torch.float64, device=device, sparse=True)


def _linear(module: nn.Module, in_shape: tuple[int, ...], device: torch.device) -> ImplicitWeights:
    """The matrix of an affine module: its values at unit vectors without its offset.

    (To subtract the offset from values with it would round.)
    """
    size = torch.Size(in_shape).numel()
    offset = module(torch.zeros(1, *in_shape, dtype=torch.float64, device=device)).flatten()
    for name in ("bias", "running_mean"):
        if getattr(module, name, None) is not None:
            getattr(module, name).zero_()
    columns = []
    for first in range(0, size, _PROBES):
        count = min(_PROBES, size - first)
        units = torch.zeros(count, size, dtype=torch.float64, device=device)
        units[torch.arange(count), torch.arange(first, first + count)] = 1
        columns.append(module(units.view(count, *in_shape)).flatten(1).to_sparse())
    return affine(torch.cat(columns).t().coalesce(), offset)


# --------------------------------------------------------------------------- maxima over windows


def _windows(module: nn.Module, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> Tensor:
    """For each output the inputs over which a pooling module takes the maximum, -1 for none.

    Returns
    -------
    Tensor of int64, shape (outputs, largest window)
    """
    axes = len(in_shape) - 1
    if axes != int(type(module).__name__[-2]):
        raise SpecificationError(
            f"{type(module).__name__} needs inputs of shape (channels, ...), got {in_shape}."
        )
    reach = _adaptive_reach if isinstance(module, _ADAPTIVE_MAX_POOLS) else _reach
    along = [reach(module, axis, in_shape[1:], out_shape[1:]) for axis in range(axes)]
    window = torch.zeros(1, 1, dtype=torch.int64)
    for size, index in zip(in_shape[1:], along, strict=True):
        combined = window[:, None, :, None] * size + index[None, :, None, :]
        missing = (window < 0)[:, None, :, None] | (index < 0)[None, :, None, :]
        window = combined.masked_fill(missing, -1).flatten(2).flatten(0, 1)
    channel = torch.arange(in_shape[0])[:, None, None] * torch.Size(in_shape[1:]).numel()
    every = torch.where(window >= 0, window + channel, -1).flatten(0, 1)
    return every.sort(dim=1, descending=True).values


def _reach(module: Any, axis: int, in_sizes: Sequence[int], out_sizes: Sequence[int]) -> Tensor:
    """Positions along one axis under each window, shape (out, kernel), -1 beyond the border."""
    kernel, stride, padding, dilation = (
        value[axis] if isinstance(value, tuple) else value
        for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    start = torch.arange(out_sizes[axis])[:, None] * stride - padding
    position = start + torch.arange(kernel) * dilation
    return position.masked_fill((position < 0) | (position >= in_sizes[axis]), -1)


def _adaptive_reach(
    module: nn.Module, axis: int, in_sizes: Sequence[int], out_sizes: Sequence[int]
) -> Tensor:
    """As `_reach`, for windows that share the input evenly."""
    size, out = in_sizes[axis], out_sizes[axis]
    number = torch.arange(out)[:, None]
    start, end = number * size // out, -(-(number + 1) * size // out)
    position = start + torch.arange(int((end - start).max()))
    return position.masked_fill(position >= end, -1)


def _maxima(
    windows: Tensor,  # (outputs, largest window)
    in_shape: tuple[int, ...],
    device: torch.device,
) -> list[ImplicitWeights]:
    """Maxima over windows, in rounds of pairs: ``max(v, w) = w + relu(v - w)``."""
    size = torch.Size(in_shape).numel()
    models: list[ImplicitWeights] = []
    while windows.shape[1] > 1 or not models:
        left, right = windows[:, ::2].flatten(), windows[:, 1::2]
        right = nn.functional.pad(right, (0, windows[:, ::2].shape[1] - right.shape[1]), value=-1)
        models.append(_round(left, right.flatten(), size, device))
        size = len(left)
        kept = torch.arange(size).view(len(windows), -1)
        windows = kept.masked_fill((windows[:, ::2] < 0), -1)
    return models


def _round(left: Tensor, right: Tensor, size: int, device: torch.device) -> ImplicitWeights:
    """``max(u[left], u[right])``, where there is no right one ``u[left]``, without either 0."""
    pairs = torch.nonzero(right >= 0).flatten()
    single = torch.nonzero((right < 0) & (left >= 0)).flatten()
    state = torch.arange(len(pairs))
    base = torch.cat([torch.stack([pairs, right[pairs]]), torch.stack([single, left[single]])], 1)
    difference = torch.cat(
        [torch.stack([state, left[pairs]]), torch.stack([state, right[pairs]])], dim=1
    )
    signs = torch.ones(len(pairs)).repeat(2) * torch.tensor([1.0, -1.0]).repeat_interleave(
        len(pairs)
    )
    activation = _bend(ReLU(), len(pairs), device)
    taken = _entries(difference, signs, (len(pairs), size), device)
    placed = _entries(torch.stack([pairs, state]), None, (len(left), len(pairs)), device)
    kept = _entries(base, None, (len(left), size), device)
    excess = cascade(affine(taken), activation, affine(placed))
    return ImplicitWeights(excess.A, excess.B, excess.C, kept, excess.b, excess.c, ReLU())


def _entries(
    indices: Tensor, values: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """A sparse matrix of given entries, 1 where they have no value."""
    filled = torch.ones(indices.shape[1]) if values is None else values
    matrix = torch.sparse_coo_tensor(
        indices.to(device), filled.to(device, torch.float64), shape, check_invariants=False
    )
    return matrix.coalesce()


def _identity(size: int, device: torch.device) -> ImplicitWeights:
    return affine(torch.eye(size, dtype=torch.float64, device=device).to_sparse())


# --------------------------------------------------------------------------- recurrent networks


def _recurrent_layer(network: nn.RNN, layer: int, steps: int) -> ImplicitWeights:
    """One layer, unrolled: its directions side by side, their outputs in turn at each step."""
    if not network.bidirectional:
        return _direction(network, f"_l{layer}", steps, forward=True)
    both = parallel(
        _direction(network, f"_l{layer}", steps, forward=True),
        _direction(network, f"_l{layer}_reverse", steps, forward=False),
    )
    hidden = network.hidden_size
    order = torch.arange(2 * steps * hidden).view(2, steps, hidden).transpose(0, 1).flatten()
    order = order.to(both.A.device)
    eye = torch.eye(len(order), dtype=both.A.dtype, device=both.A.device)
    return cascade(both, affine(eye[order].to_sparse()))


def _direction(network: nn.RNN, suffix: str, steps: int, *, forward: bool) -> ImplicitWeights:
    """``x_t = phi(W_ih u_t + b_ih + W_hh x_(t-1) + b_hh)``, or backwards in time."""
    weight_in, weight = (
        getattr(network, f"weight_{kind}{suffix}").detach() for kind in ("ih", "hh")
    )
    hidden = network.hidden_size
    bias = weight.new_zeros(hidden)
    if network.bias:
        bias = sum(getattr(network, f"bias_{kind}{suffix}").detach() for kind in ("ih", "hh"))
    eye = torch.eye(steps, dtype=weight.dtype, device=weight.device)
    shift = torch.diag(eye.new_ones(steps - 1), -1 if forward else 1)
    size = steps * hidden
    return ImplicitWeights(
        A=torch.kron(shift, weight).to_sparse(),
        B=torch.kron(eye, weight_in).to_sparse(),
        C=torch.eye(size, dtype=weight.dtype, device=weight.device).to_sparse(),
        D=weight.new_zeros(size, steps * weight_in.shape[1]).to_sparse(),
        b=bias.repeat(steps),
        c=weight.new_zeros(size),
        activation=as_activation(network.nonlinearity),
    )
