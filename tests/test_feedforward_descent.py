"""Feedforward nets in lifted form: every block is a minimum, and the objective never rises."""

import math

import pytest
import torch
from lifted_problems import P, Q, data, generator

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.activations import Tanh
from declarative_cvx.nonconvex.implicit.training import feedforward as net
from declarative_cvx.nonconvex.implicit.training.blocks import BlockMethod
from declarative_cvx.nonconvex.implicit.training.feedforward import (
    FeedforwardDescent,
    first_layers,
)
from declarative_cvx.nonconvex.implicit.training.losses import SquaredLoss


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "leaky_relu"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("update", ["exact", "gradient"])
def test_objective_never_rises(activation, loss, update):
    method = BlockMethod(weight_update=update, gradient_steps=20)
    descent = FeedforwardDescent(
        (5, 4), activation, loss, epsilon=0.1, output_ridge=1e-3, sweeps=3, method=method
    )
    found = descent.fit(*data(loss), generator=generator())
    assert not found.history.rises
    assert found.history.objectives[-1] < found.history.objectives[0]
    names = [block.name for block in found.history.sweeps[0].blocks]
    assert names == ["W2", "X2", "W1", "X1", "W0"]


def test_every_block_zeroes_its_gradient_of_the_objective():
    u, y = data()
    descent = FeedforwardDescent((5, 4), "tanh", epsilon=0.1, sweeps=1)
    run = net._Run(descent, Tanh(), SquaredLoss(), u, y)
    layers = run.propagated(tuple(first_layers((P, 5, 4, Q), generator(), u)))
    layers = run.sweep(layers, math.inf)[0]  # away from the start
    for name in run.order():
        layer = int(name[1:])
        update = run.update_weight if name[0] == "W" else run.update_state
        layers, _ = update(layers, layer)
        leaves = [*layers.weights, *layers.states]
        place = layer if name[0] == "W" else len(layers.weights) + layer - 1
        leaves[place] = leaves[place].clone().requires_grad_()
        depth = len(layers.weights)
        tried = net.Layers(tuple(leaves[:depth]), tuple(leaves[depth:]))
        (gradient,) = torch.autograd.grad(run.value(tried), leaves[place])
        assert gradient.abs().max() < 1e-7, name


def test_divergences_have_powers_of_epsilon_as_weights():
    u, y = data()
    run = net._Run(FeedforwardDescent((5, 4), epsilon=0.1), Tanh(), SquaredLoss(), u, y)
    assert [run.weight_of(layer) for layer in (1, 2)] == pytest.approx([0.01, 0.1])


def test_network_predicts_what_the_layers_say():
    u, y = data()
    found = FeedforwardDescent((5,), "relu", sweeps=1).fit(u, y, generator=generator())
    first, last = found.layers.weights
    torch.testing.assert_close(found.network()(u), torch.relu(u @ first.T) @ last.T)


def test_callback_sees_every_sweep_and_can_stop():
    seen = []

    def stop(layers, record):
        seen.append(record.objective)
        return len(seen) == 2

    found = FeedforwardDescent((5,)).fit(*data(), generator=generator(), callback=stop)
    assert found.history.stopped == "callback"
    assert seen == [sweep.objective for sweep in found.history.sweeps]
    assert len(seen) == 2


def test_bad_nets_are_refused():
    with pytest.raises(SpecificationError, match="widths"):
        FeedforwardDescent(())
    with pytest.raises(SpecificationError, match="epsilon"):
        FeedforwardDescent((3,), epsilon=0.0)
    with pytest.raises(SpecificationError, match="not bounded"):
        FeedforwardDescent((3,), method=BlockMethod("conditional_gradient"))
