"""The alternation of robust training: its blocks are exact, its conditions mean what they say."""

import itertools
from dataclasses import replace

import pytest
import torch

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.reduction import predict, states
from declarative_cvx.nonconvex.implicit.robust_counterpart import (
    HeadStep,
    RelaxedStates,
    RobustObjective,
    RowStep,
    StateStep,
)
from declarative_cvx.nonconvex.implicit.robust_training import fit_robust
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

M, P, Q, N = 12, 3, 2, 4
SIGMA = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)


def data():
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(M, P, generator=generator, dtype=torch.float64)
    labels = (U[:, 0] > U[:, 1].abs()).long()
    return U, torch.nn.functional.one_hot(labels, Q).double()


def fitted(sweeps=2, **options):
    generator = torch.Generator().manual_seed(1)
    return fit_robust(*data(), SIGMA, N, sweeps=sweeps, generator=generator, **options)


@pytest.mark.parametrize("recourse", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_objective_never_rises_and_conditions_hold(loss, recourse):
    fit = fitted(loss=loss, recourse=recourse, sweeps=3)
    for before, after in itertools.pairwise(fit.history):
        assert after <= before + 1e-7
    assert fit.history[-1] < 0.8 * fit.history[0]
    assert float(fit.objective.violation(fit.weights, fit.states)) < 1e-6
    assert bool(fit.states.R.any()) == recourse
    assert fit.unsolved == (0, 0, 0)


@pytest.mark.parametrize("recourse", [False, True])
def test_each_block_is_minimised(recourse):
    """No feasible step of a block lowers the objective: tried towards many points."""
    fit = fitted(recourse=recourse, sweeps=1)
    objective, generator = fit.objective, torch.Generator().manual_seed(2)
    A, B, b = RowStep(objective, N, recourse)(fit.states)
    C, c = HeadStep(objective, N, recourse)(fit.states)
    weights = replace(fit.weights, A=A, B=B, C=C, b=b, c=c)
    best = float(objective(weights, fit.states))
    active = objective.activity(weights, fit.states.s)
    found = StateStep(objective, N, recourse)(weights, active)
    best_states, tried = float(objective(weights, found)), 0
    for _ in range(200):
        share = 10.0 ** -torch.randint(1, 6, (), generator=generator)

        def towards(value, other, share=share):
            return (1 - share) * value + share * other

        def draw(like):
            return torch.randn(like.shape, generator=generator, dtype=torch.float64)

        far = draw(A)
        far = objective.kappa * far / far.abs().sum(1, keepdim=True)
        other = replace(
            weights, A=towards(A, far), B=towards(B, draw(B)), b=towards(b, draw(b) - 30)
        )
        assert float(objective.violation(other, fit.states)) < 1e-6
        assert float(objective(other, fit.states)) >= best - 1e-7
        head = replace(weights, C=towards(C, draw(C)), c=towards(c, draw(c)))
        assert float(objective(head, fit.states)) >= best - 1e-7
        R = towards(found.R, draw(found.R)) if recourse else found.R
        near = RelaxedStates(towards(found.s, 30 + 10 * draw(found.s).abs()), R, active)
        if float(objective.violation(weights, near)) < 1e-8:
            tried += 1
            assert float(objective(weights, near)) >= best_states - 1e-7
    assert tried > 50


def test_relaxed_states_satisfy_the_conditions_for_every_input():
    """IDL 5.3, 5.4: x >= 0 and x >= A x + B u + b for random inputs within sigma and corners."""
    fit = fitted(recourse=True)
    generator = torch.Generator().manual_seed(3)
    offsets = 2 * torch.rand(200, M, P, generator=generator, dtype=torch.float64) - 1
    offsets[:100] = offsets[:100].sign()
    offsets = offsets * SIGMA
    x = fit.states.s + torch.einsum("mnp,kmp->kmn", fit.states.R, offsets)
    weights = fit.weights
    z = x @ weights.A.T + (fit.objective.U + offsets) @ weights.B.T + weights.b
    assert float(x.min()) > -1e-7
    assert float((x - z).min()) > -1e-7
    tight = fit.objective.arguments(weights, fit.states.s) + fit.objective.margin(
        weights, fit.states
    )
    assert float((fit.states.s - tight).min()) < 1e-4, "somewhere the conditions bind"


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_worst_loss_bounds_every_loss(loss):
    fit = fitted(loss=loss, recourse=True, sweeps=1)
    objective, weights = fit.objective, fit.weights
    worst = objective.worst_loss(weights, fit.states)
    generator = torch.Generator().manual_seed(3)
    offsets = SIGMA * (2 * torch.rand(500, M, P, generator=generator, dtype=torch.float64) - 1)
    x = fit.states.s + torch.einsum("mnp,kmp->kmn", fit.states.R, offsets)
    logits = x @ weights.C.T + weights.c
    if loss == "squared":
        value = (logits - objective.Y).square().sum(-1)
    else:
        value = torch.logsumexp(logits, -1) - (logits * objective.Y).sum(-1)
    assert bool((value <= worst + 1e-12).all())


def test_a_large_weight_of_the_gap_gives_the_states_proper():
    """With certain inputs and exact states the relaxation (17) is the model itself."""
    fit = fit_robust(*data(), 0.0, N, gap=100.0, recourse=False, sweeps=1)
    torch.testing.assert_close(
        fit.states.s, states(fit.weights, fit.objective.U), rtol=0, atol=1e-6
    )


def test_without_gap_the_relaxation_is_vacuous():
    """Why there is a gap: with A = B = 0 any states satisfy (17), and fit any labels."""
    U, Y = data()
    objective = RobustObjective(U, Y, 0 * SIGMA, "cross_entropy", 0.0, 0.0, 0.9)
    zero = fitted(sweeps=0).weights
    C = torch.zeros(Q, N, dtype=torch.float64)
    C[:, :Q] = 50 * torch.eye(Q)
    zero = replace(zero, A=0 * zero.A, B=0 * zero.B, C=C, b=0 * zero.b, c=0 * zero.c)
    s = torch.cat([Y, torch.zeros(M, N - Q, dtype=torch.float64)], 1)
    free = RelaxedStates(s, torch.zeros(M, N, P, dtype=torch.float64), s > 0)
    assert float(objective.violation(zero, free)) == 0
    assert float(objective(zero, free)) < 1e-12


def test_a_start_is_gone_on_from():
    first = fitted(recourse=False, sweeps=2)
    both = fitted(recourse=False, sweeps=4)
    U, Y = data()
    again = fit_robust(U, Y, SIGMA, N, recourse=False, sweeps=1, start=first.weights)
    assert again.history[-1] <= first.history[0]
    assert both.history[:3] == pytest.approx(first.history, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_its_own_start_is_better_than_a_random_one(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(N, N), draw(N, P) / P**0.5
    A = 0.45 * A / A.abs().sum(1, keepdim=True)
    zeros = (torch.zeros(shape, dtype=torch.float64) for shape in ((Q, N), (Q, P), N, Q))
    start = ImplicitWeights(A, B, *zeros, "relu")
    U, Y = data()
    random = fit_robust(U, Y, SIGMA, N, sweeps=1, start=start)
    own = fit_robust(U, Y, SIGMA, N, sweeps=1, generator=generator)
    assert own.history[-1] < 0.9 * random.history[-1]
    assert torch.equal(predict(own.weights, U).argmax(1), Y.argmax(1))


def test_a_last_fit_that_fails_is_said_and_changes_nothing(monkeypatch):
    plain = fitted(refit=False, sweeps=0)
    last = fitted(sweeps=0)
    assert (plain.refitted, last.refitted) == (False, True)
    assert not torch.equal(last.weights.C, plain.weights.C)
    nothing = torch.full((Q, N), torch.nan).double(), torch.full((Q,), torch.nan).double()
    monkeypatch.setattr(HeadStep, "__call__", lambda self, states: nothing)
    failed = fitted(sweeps=0)
    assert not failed.refitted
    assert torch.equal(failed.weights.C, plain.weights.C)


def test_bad_arguments_are_refused():
    U, Y = data()
    with pytest.raises(SpecificationError, match="squared"):
        fit_robust(U, Y, 0.1, N, loss="squarred")
    with pytest.raises(ParameterError, match="probabilities"):
        fit_robust(U, 2 * Y, 0.1, N)
    with pytest.raises(ParameterError, match="one row for each data point"):
        fit_robust(U[1:], Y, 0.1, N)
    with pytest.raises(ParameterError, match="not negative"):
        fit_robust(U, Y, -0.1, N)
    with pytest.raises(ParameterError, match="kappa"):
        fit_robust(U, Y, 0.1, N, kappa=1.0)
    with pytest.raises(ParameterError, match="4 states, 3 inputs"):
        fit_robust(U, Y, 0.1, N, start=fit_robust(U[:, :2], Y, 0.1, N, sweeps=0).weights)
