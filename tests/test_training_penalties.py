"""Penalties on the parameters: proximal maps, vertices, declared ones, and what is refused."""

import math

import cvxpy as cp
import pytest
import torch
from lifted_problems import N, Q, generator, setting, solved

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.training.convex_penalty import ConvexPenalty
from declarative_cvx.nonconvex.implicit.training.penalties import Penalties
from declarative_cvx.nonconvex.implicit.training.penalty_terms import (
    L1,
    ColumnBall,
    ColumnGroups,
    L1Ball,
    Ridge,
    RowBall,
    SpectralBall,
    Triangular,
    Zero,
)


@pytest.mark.parametrize(
    "term",
    [
        Ridge(0.7, "B"),
        L1(0.7, "B"),
        ColumnGroups(0.7, on="B"),
        ColumnGroups(0.7, math.inf, "B"),
        L1Ball(0.9, "B"),
        RowBall(0.4, "B"),
        ColumnBall(0.4, "B"),
        SpectralBall(0.4, "B"),
    ],
    ids=repr,
)
def test_prox_is_what_cvxpy_finds(term):
    W = torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    step = torch.full((3, 1), 0.6, dtype=torch.float64)
    V = cp.Variable((3, 4))
    pieces = {
        Ridge: lambda: (0.35 * cp.sum_squares(V), []),
        L1: lambda: (0.7 * cp.sum(cp.abs(V)), []),
        ColumnGroups: lambda: (0.7 * cp.sum(cp.norm(V, term.alpha, axis=0)), []),
        L1Ball: lambda: (0, [cp.sum(cp.abs(V)) <= 0.9]),
        RowBall: lambda: (0, [cp.sum(cp.abs(V), axis=1) <= 0.4]),
        ColumnBall: lambda: (0, [cp.sum(cp.abs(V), axis=0) <= 0.4]),
        SpectralBall: lambda: (0, [cp.sigma_max(V) <= 0.4]),
    }
    value, constraints = pieces[type(term)]()
    objective = cp.sum_squares(V - W.numpy()) / 2 + 0.6 * value
    cp.Problem(cp.Minimize(objective), constraints).solve(cp.CLARABEL)
    torch.testing.assert_close(term.prox(W, step), torch.as_tensor(V.value), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "term", [L1(0.7, "A"), RowBall(0.8, "A"), Triangular(), Zero("A")], ids=repr
)
def test_slopes_are_the_derivative_of_the_prox(term):
    W = torch.randn(4, 4, generator=generator(), dtype=torch.float64)
    W[3] /= 20  # inside the ball
    step = torch.full((4, 1), 0.3, dtype=torch.float64)
    d, a = term.slopes(W, step)
    found = (
        torch.diag_embed(d)
        - a[:, :, None] * a[:, None] / a.square().sum(1).clamp(min=1)[:, None, None]
    )
    for place in range(4):
        change = torch.zeros_like(W)
        change[:, place] = 1e-7
        column = (term.prox(W + change, step) - term.prox(W - change, step)) / 2e-7
        torch.testing.assert_close(found[:, :, place], column, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "term", [L1Ball(0.9, "B"), RowBall(0.4, "B"), ColumnBall(0.4, "B"), SpectralBall(0.4, "B")]
)
def test_vertex_is_lowest_among_points_of_the_set(term):
    G = torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    best = term.vertex(G)
    assert float(term.value(best)) == 0
    for seed in range(50):
        other = term.project(3 * torch.randn(3, 4, generator=generator(seed), dtype=G.dtype))
        assert float((G * other).sum()) >= float((G * best).sum()) - 1e-12


def test_blocks_of_layers_are_strictly_above_the_diagonal():
    mask = Triangular(sizes=(1, 2)).mask(torch.ones(3, 3))
    assert mask.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("make", [Ridge, L1, ColumnGroups, L1Ball, RowBall, SpectralBall])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_sizes_that_are_not_positive_are_refused(make, value):
    with pytest.raises(SpecificationError, match="positive"):
        make(value)


def test_two_terms_on_a_block_are_refused_unless_they_are_ridges():
    Penalties.of((Ridge(1.0), Ridge(2.0, "A"), RowBall()))
    with pytest.raises(SpecificationError, match="both act on A"):
        Penalties.of((RowBall(), L1(1.0, "AB")))


def test_a_region_that_is_no_rectangle_is_refused():
    with pytest.raises(SpecificationError, match="rectangle"):
        L1(1.0, "AD")


# ------------------------------------------------------------------------------------- declared


def test_declared_penalty_does_what_the_one_in_closed_form_does():
    penalty = (RowBall(0.5), Ridge(0.1))
    declared = ConvexPenalty(lambda B: cp.sum(cp.norm(B, 2, axis=0)))
    groups = setting("tanh", penalty=(*penalty, ColumnGroups(1.0, on="B")))
    written = setting("tanh", penalty=(*penalty, declared))
    expected, _ = solved("AB", *groups)
    found, _ = solved("AB", *written, tol=1e-5)
    torch.testing.assert_close(found.weights.B, expected.weights.B, rtol=0, atol=1e-4)
    value = float(groups[0].value(expected))
    assert float(written[0].value(found)) == pytest.approx(value, rel=1e-6)


def test_declared_constraints_are_kept():
    declared = ConvexPenalty(lambda A: 0 * cp.sum(A), lambda A: [A >= 0, cp.sum(A, axis=1) <= 0.5])
    problem, at = setting("relu", penalty=(declared, Ridge(0.1)))
    at = at.with_weights(problem.penalties.prox(at.weights, torch.ones(N + Q, 1).double()))
    found, _ = solved("AB", problem, at, tol=1e-5)
    assert float(found.weights.A.min()) > -1e-6
    assert float(found.weights.A.sum(1).max()) < 0.5 + 1e-6
    assert float(problem.value(found)) < float(problem.value(at))


def test_declared_penalties_that_are_not_convex_are_refused():
    penalty = ConvexPenalty(lambda B: -cp.sum_squares(B))
    with pytest.raises(SpecificationError, match="not a convex number"):
        penalty.prox(torch.ones(2, 2).double(), torch.ones(2, 1).double())
    with pytest.raises(SpecificationError, match="name it after its region"):
        ConvexPenalty(lambda weight: 2 * cp.norm1(weight))
