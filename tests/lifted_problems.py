"""Small training problems in lifted form, and steps on their blocks."""

import torch

from declarative_cvx.nonconvex.implicit.activations import (
    Blocks,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Tanh,
    as_activation,
)
from declarative_cvx.nonconvex.implicit.training.blocks import BlockMethod, minimise_block
from declarative_cvx.nonconvex.implicit.training.descent import Lifting, first_weights, started
from declarative_cvx.nonconvex.implicit.training.lifted import Variables
from declarative_cvx.nonconvex.implicit.training.penalty_terms import (
    ColumnGroups,
    L1Ball,
    Ridge,
    RowBall,
    SpectralBall,
    sparsity_penalty,
    triangular_penalty,
)

N, P, Q, M = 4, 3, 2, 30
ACTIVATIONS = [ReLU(), LeakyReLU(0.1), Tanh(), Sigmoid(), Blocks([("relu", 2), ("tanh", 2)])]
PENALTIES = {
    "ridge": (Ridge(0.1),),
    "(5)": (*sparsity_penalty(0.5, 0.3, 0.3), Ridge(0.01)),
    "(6)": (*triangular_penalty(0.8, 0.8), Ridge(0.01)),
    "group": (RowBall(0.5), ColumnGroups(1.0, on="B"), Ridge(0.1)),
    "group of both": (RowBall(0.5), ColumnGroups(1.0, on="BD"), Ridge(0.1)),
    "spectral": (SpectralBall(0.5), L1Ball(1.0, "CD"), Ridge(0.1)),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(loss="squared", seed=0):
    random = generator(seed)
    u = torch.randn(M, P, generator=random, dtype=torch.float64)
    y = torch.randn(M, Q, generator=random, dtype=torch.float64)
    return u, (2 * y).softmax(1) if loss == "cross_entropy" else y


def setting(activation="tanh", loss="squared", penalty=PENALTIES["ridge"], mu=0.4, bias=True):
    """A problem, and variables that are no minimum of any block."""
    lam = torch.tensor([0.5, 1.0, 0.7, 2.0], dtype=torch.float64)
    problem = Lifting(activation, loss, penalty, lam, mu).problem(*data(loss), N)
    weights = first_weights(problem, N, bias, generator())
    start = started(problem, weights)
    random = torch.randn(2, M, N, generator=generator(1), dtype=torch.float64)
    x, p = (as_activation(activation).clamp(0.9 * value) for value in random)
    return problem, Variables(start.weights, x if mu is not None else p, p)


def solved(name, problem, at, **options):
    new, found = minimise_block(name, problem, at, BlockMethod(**options))
    return new, float(found.residual.max())
