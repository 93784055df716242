"""Feedforward nets in lifted form, layer by layer: objective (9) with strictly block triangular A
(IDL Sec. 2.2 and 7.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.activations import (
    Activation,
    ActivationLike,
    LeakyReLU,
    as_activation,
)
from declarative_cvx.nonconvex.implicit.training.blocks import BlockMethod
from declarative_cvx.nonconvex.implicit.training.composite import (
    Composite,
    Minimum,
    Potentials,
    newton,
)
from declarative_cvx.nonconvex.implicit.training.descent import check_data
from declarative_cvx.nonconvex.implicit.training.history import (
    BlockRecord,
    History,
    SweepRecord,
    warn_of_rise,
)
from declarative_cvx.nonconvex.implicit.training.losses import Loss, as_loss
from declarative_cvx.nonconvex.implicit.training.proximal import (
    Penalised,
    newton_cg,
    proximal_gradient,
)
from declarative_cvx.nonconvex.implicit.training.row_functions import (
    LossRows,
    RowFunction,
    SeparateRows,
)
from declarative_cvx.nonconvex.implicit.training.state_terms import (
    NextDivergence,
    PredictionLoss,
    StateTerms,
)
from declarative_cvx.nonconvex.implicit.training.states import StateProblem, minimise_states


@dataclass(frozen=True, eq=False)
class Layers:
    """W_0, ..., W_L and the states X_1, ..., X_L, with prediction W_L X_L.

    Attributes
    ----------
    weights : tuple of Tensor
        Each (outputs, inputs) of a layer.
    states : tuple of Tensor
        Each (batch, width).
    """

    weights: tuple[Tensor, ...]
    states: tuple[Tensor, ...]

    def with_weight(self, layer: int, weight: Tensor) -> Layers:
        return replace(self, weights=_replaced(self.weights, layer, weight))

    def with_state(self, layer: int, state: Tensor) -> Layers:
        """X_layer, counted from 1."""
        return replace(self, states=_replaced(self.states, layer - 1, state))


@dataclass(frozen=True, eq=False)
class FeedforwardTraining:
    """What was found.

    Attributes
    ----------
    layers : Layers
    activation : Activation
    history : History
    """

    layers: Layers
    activation: Activation
    history: History

    def network(self) -> nn.Sequential:
        """The net, in float64: `from_sequential` makes an implicit model of it."""
        return sequential(self.layers.weights, self.activation)


@dataclass(frozen=True)
class FeedforwardDescent:
    """Train y = W_L phi(... phi(W_0 u)) by block coordinate descent on

        L(Y, W_L X_L) + sum over l of e^(L - l + 1) F(X_l, W_(l-1) X_(l-1)) + ridge/2 sum ||W_l||^2

    in the order W_L, X_L, W_(L-1), ..., X_1, W_0 (IDL Sec. 7.1). There are no biases; a column of
    ones in the inputs gives the first layer one.

    Parameters
    ----------
    widths : sequence of int
        Of the hidden layers.
    activation : Activation or str
    loss : {"squared", "cross_entropy"} or Loss
    epsilon : float
        e: the divergence of the last hidden layer has this weight, the one before its square, ...
    ridge : float
        On hidden weights, relative to the weight of their own layer's divergence. The weights of
        the output have `output_ridge`.
    output_ridge : float
    sweeps : int
    method : BlockMethod
        `weight_update` "exact" or "gradient" for hidden layers.
    tol : float
        It stops when a sweep lowers the objective by less than this, relative to it.
    """

    widths: Sequence[int]
    activation: ActivationLike = "tanh"
    loss: str | Loss = "squared"
    epsilon: float = 1e-3
    ridge: float = 1.0
    output_ridge: float = 1e-10
    sweeps: int = 5
    method: BlockMethod = field(default_factory=BlockMethod)
    tol: float = 1e-6

    def __post_init__(self) -> None:
        as_loss(self.loss)
        if not len(self.widths) or any(width < 1 for width in self.widths):
            raise SpecificationError(f"widths is {self.widths!r}; expected positive integers.")
        for name in ("epsilon", "ridge", "output_ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise SpecificationError(
                    f"{name} is {getattr(self, name)!r}; it must be positive and finite."
                )
        if self.method.weight_update == "conditional_gradient":
            raise SpecificationError(
                'Weights of layers are not bounded: use weight_update="exact" or "gradient".'
            )

    def fit(
        self,
        u: Tensor,
        y: Tensor,
        *,
        start: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[Layers, SweepRecord], bool | None] | None = None,
    ) -> FeedforwardTraining:
        """Train on inputs (batch, p) and targets (batch, q).

        Parameters
        ----------
        u, y : Tensor
        start : sequence of Tensor, optional
            Weights to start from; random ones unless given.
        generator : torch.Generator, optional
        callback : callable, optional
            Called after every sweep; training stops if it returns True.

        Raises
        ------
        ParameterError, SpecificationError
        """
        check_data(u, y)
        u, y = u.detach().to(torch.float64), y.detach().to(torch.float64)
        run = _Run(self, as_activation(self.activation), as_loss(self.loss), u, y)
        run.loss.check(y)
        weights = self._first(u, y, generator) if start is None else start
        layers = run.propagated(tuple(weight.detach().to(u) for weight in weights))
        history = History(float(run.value(layers)))
        for _ in range(self.sweeps):
            before = history.objectives[-1]
            layers, record = run.sweep(layers, before)
            history.sweeps.append(record)
            if callback is not None and callback(layers, record):
                history.stopped = "callback"
                break
            if before - record.objective <= self.tol * abs(before):
                history.stopped = "tolerance"
                break
        return FeedforwardTraining(layers, run.activation, history)

    def _first(self, u: Tensor, y: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        return first_layers((u.shape[1], *self.widths, y.shape[1]), generator, u)


def first_layers(
    sizes: Sequence[int], generator: torch.Generator | None, like: Tensor
) -> list[Tensor]:
    """Normal weights of size 0.2 / sqrt(inputs): activations are nearly linear at first."""
    pairs = zip(sizes[1:], sizes[:-1], strict=True)
    drawn = (torch.randn(*pair, generator=generator, dtype=torch.float64) for pair in pairs)
    return [(0.2 / math.sqrt(w.shape[1]) * w).to(like.device) for w in drawn]


def sequential(weights: Sequence[Tensor], activation: Activation) -> nn.Sequential:
    """Linear layers without biases, with activations between them."""
    modules: list[nn.Module] = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight.detach().clone())
        modules += [linear, _module(activation)]
    return nn.Sequential(*modules[:-1])


def _module(activation: Activation) -> nn.Module:
    if isinstance(activation, LeakyReLU):
        return nn.LeakyReLU(activation.leak)
    kinds = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "identity": nn.Identity}
    if activation.name not in kinds:
        raise SpecificationError(f"torch has no module for the activation {activation!r}.")
    return kinds[activation.name]()


@dataclass(frozen=True, eq=False)
class _Run:
    """One data set, and the blocks of the lifted net."""

    options: FeedforwardDescent
    activation: Activation
    loss: Loss
    u: Tensor
    y: Tensor

    def propagated(self, weights: tuple[Tensor, ...]) -> Layers:
        """States that the weights have."""
        states = [self.u]
        for weight in weights[:-1]:
            states.append(self.activation(states[-1] @ weight.T))
        return Layers(weights, tuple(states[1:]))

    def weight_of(self, layer: int) -> float:
        """Lambda of X_layer, counted from 1."""
        return self.options.epsilon ** (len(self.options.widths) - layer + 1)

    def below(self, layers: Layers, layer: int) -> Tensor:
        """X_layer, the inputs for layer 0."""
        return self.u if layer == 0 else layers.states[layer - 1]

    def parts(self, layers: Layers) -> dict[str, Tensor]:
        depth = len(layers.states)
        fit = self.loss.value(self.y, layers.states[-1] @ layers.weights[-1].T).sum()
        divergence, penalty = fit * 0, self.options.output_ridge * layers.weights[-1].square().sum()
        for layer in range(1, depth + 1):
            lam, weight = self.weight_of(layer), layers.weights[layer - 1]
            z = self.below(layers, layer - 1) @ weight.T
            divergence += lam * self.activation.divergence(layers.states[layer - 1], z).sum()
            penalty += lam * self.options.ridge * weight.square().sum()
        return {"loss": fit, "divergence": divergence, "penalty": penalty / 2}

    def value(self, layers: Layers) -> Tensor:
        return torch.stack(list(self.parts(layers).values())).sum()

    def sweep(self, layers: Layers, value: float) -> tuple[Layers, SweepRecord]:
        """One update of every block, from the outputs to the inputs."""
        records = []
        for name in self.order():
            layer = int(name[1:])
            update = self.update_weight if name[0] == "W" else self.update_state
            layers, found = update(layers, layer)
            after = float(self.value(layers))
            residual = float(found.residual.max())
            solved = residual <= self.options.method.tol
            records.append(BlockRecord(name, value, after, residual, found.iterations, solved))
            warn_of_rise(records[-1])
            value = after
        parts = {name: float(part) for name, part in self.parts(layers).items()}
        return layers, SweepRecord(value, parts, tuple(records))

    def order(self) -> list[str]:
        """W_L, X_L, W_(L-1), ..., X_1, W_0"""
        depth = len(self.options.widths)
        hidden = [name for layer in range(depth, 0, -1) for name in (f"X{layer}", f"W{layer - 1}")]
        return [f"W{depth}", *hidden]

    def update_weight(self, layers: Layers, layer: int) -> tuple[Layers, Minimum]:
        if layer == len(layers.states):
            found = self._output_weight(layers)
        else:
            found = self._hidden_weight(layers, layer)
        return layers.with_weight(layer, found.point), found

    def _hidden_weight(self, layers: Layers, layer: int) -> Minimum:
        """The layer's lambda is a common factor, and left out."""
        K, target = self.below(layers, layer), layers.states[layer]
        weight, method = layers.weights[layer], self.options.method
        Q = self.options.ridge * torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
        potentials = Potentials(
            self.activation, K, K.new_zeros(1, len(K)), K.new_ones(1, len(K)), over_batch=True
        )
        rows = Composite(Q, target.T @ K, potentials)
        if method.weight_update == "exact":
            return newton(rows, weight, method.tol)
        free = Penalised(
            SeparateRows(rows), lambda V: V.new_zeros(len(V)), lambda V, step: V, by_row=True
        )
        return proximal_gradient(free, weight, method.gradient_steps)

    def _output_weight(self, layers: Layers) -> Minimum:
        K, weight = layers.states[-1], layers.weights[-1]
        ridge = self.options.output_ridge
        Q = ridge * torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
        if self.loss.quadratic:
            rows = Composite(Q + K.T @ K, self.y.T @ K)
            return newton(rows, weight, self.options.method.tol)
        full = Q.expand(len(weight), -1, -1)
        function: RowFunction = LossRows(self.loss, K, self.y, full, torch.zeros_like(weight))
        return newton_cg(function, weight, self.options.method.tol)

    def update_state(self, layers: Layers, layer: int) -> tuple[Layers, Minimum]:
        """X_layer, which the loss or the next layer's divergence depends on."""
        x, W = layers.states[layer - 1], layers.weights[layer]
        term: PredictionLoss | NextDivergence
        if layer == len(layers.states):
            term = PredictionLoss(self.loss, W, x.new_zeros(1, len(W)), self.y)
        else:
            lam = x.new_full((len(W),), self.weight_of(layer + 1))
            offset = x.new_zeros(1, len(W))
            term = NextDivergence(self.activation, W, offset, layers.states[layer], lam)
        z = self.below(layers, layer - 1) @ layers.weights[layer - 1].T
        weight = x.new_full((x.shape[1],), self.weight_of(layer))
        problem = StateProblem(StateTerms([term]), self.activation, z, weight)
        found = minimise_states(problem, x, self.options.method.tol)
        return layers.with_state(layer, found.point), found


def _replaced(values: tuple[Tensor, ...], index: int, value: Tensor) -> tuple[Tensor, ...]:
    return (*values[:index], value, *values[index + 1 :])
