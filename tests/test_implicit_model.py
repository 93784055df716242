"""Implicit models as modules: constraint, training, saving, compiling."""

import copy
import io
import os
import pickle
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import ParameterError, SolveError, SpecificationError
from declarative_cvx.nonconvex.implicit.model import ImplicitModel
from declarative_cvx.nonconvex.implicit.parametrizations import (
    InfinityNorm,
    LowRank,
    OneNorm,
    PerronFrobenius,
    SpectralNorm,
    StrictlyTriangular,
    TriangularReLU,
    Unconstrained,
)
from declarative_cvx.nonconvex.implicit.uncertified import IllPosedWarning
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights
from declarative_cvx.nonconvex.implicit.well_posedness import is_well_posed

SETS = [
    InfinityNorm(0.9),
    OneNorm(0.9),
    SpectralNorm(0.9),
    StrictlyTriangular(),
    StrictlyTriangular(blocks=(3, 2, 3)),
    TriangularReLU(0.1),
    PerronFrobenius(0.9),
    LowRank(2, 0.9),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(well_posed=None, n=8, dtype=torch.float64, **options):
    return ImplicitModel(3, 2, n, well_posed=well_posed, dtype=dtype, generator=seeded(), **options)


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


@pytest.mark.parametrize("well_posed", SETS, ids=str)
def test_output_is_that_of_the_equations(well_posed):
    model, u = model_of(well_posed), normal(5, 3)
    A, x = model.A, torch.zeros(5, 8, dtype=torch.float64)
    for _ in range(3000):
        x = torch.relu(x @ A.mT + u @ model.B.mT + model.b)
    expected = x @ model.C.mT + u @ model.D.mT + model.c
    torch.testing.assert_close(model(u), expected, rtol=1e-9, atol=1e-10)
    solution = model.solve(u)
    torch.testing.assert_close(solution.x, x, rtol=1e-9, atol=1e-10)
    assert bool(solution.solved.all())


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("well_posed", SETS, ids=str)
def test_training_lowers_the_loss_and_keeps_the_constraint(well_posed, optimiser):
    model, u = model_of(well_posed, dtype=torch.float32), normal(40, 3, dtype=torch.float32)
    target = torch.stack([u[:, 0] * u[:, 1], u.sum(1).sin()], 1)
    step = optimiser(model.parameters(), lr=0.1 if optimiser is torch.optim.SGD else 0.05)
    losses = []
    for _ in range(40):
        step.zero_grad()
        loss = nn.functional.mse_loss(model(u), target)
        loss.backward()
        step.step()
        losses.append(loss.item())
        assert is_well_posed(model.A.detach())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_gradient_of_all_weights_and_of_the_input():
    model, u = model_of(InfinityNorm(0.5), n=4, tol=1e-14), normal(2, 3)
    with torch.no_grad():
        model.raw_A.mul_(4.0)  # outside of the set, so that the projection counts
    names = [name for name, _ in model.named_parameters()]

    def call(u, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, parameters, (u,))

    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert gradcheck(call, (u.requires_grad_(), *values))
    assert gradgradcheck(call, (u, *values))


def test_initial_weights_follow_the_generator():
    one, two = model_of(), model_of()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    two.reset_parameters(seeded(5))
    assert not torch.equal(one.raw_A, two.raw_A)
    two.reset_parameters(seeded())
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("well_posed", SETS, ids=str)
def test_weights_are_saved_copied_and_loaded_exactly(well_posed):
    model, other, u = model_of(well_posed), model_of(well_posed), normal(4, 3)
    other.reset_parameters(seeded(7))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    again = [other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    w = model.weights.detach()
    again.append(ImplicitModel.from_weights(w.A, w.B, w.C, w.D, w.b, w.c))
    again.append(ImplicitModel.from_weights(w.A, w.B, w.C, w.D, w.b, w.c, well_posed=well_posed))
    again.append(ImplicitModel.from_weights(w, well_posed=well_posed))
    for each in again:
        torch.testing.assert_close(each(u), model(u), rtol=1e-9, atol=1e-10)


def test_weights_outside_of_the_set_are_refused():
    A, B = torch.eye(3) * 2, torch.ones(3, 1)
    rest = (B, torch.ones(1, 3), torch.ones(1, 1))
    with pytest.raises(ParameterError, match="not in the set"):
        ImplicitModel.from_weights(A, *rest, well_posed=InfinityNorm(0.9))
    with pytest.raises(ParameterError, match="B must have shape"):
        ImplicitModel.from_weights(A, B[:2], *rest[1:])
    with pytest.raises(ParameterError, match="neither"):
        ImplicitModel.from_weights(A, *rest, b=torch.zeros(3))
    with pytest.raises(ParameterError, match="D is missing"):
        ImplicitModel.from_weights(A, *rest[:2])


def test_weights_as_one_record():
    A, B, C, D = 0.3 * torch.ones(2, 2), torch.ones(2, 1), torch.ones(1, 2), torch.ones(1, 1)
    weights = ImplicitWeights(A, B, C, D, torch.tensor([0.1, 0.2]), torch.ones(1), "tanh")
    model, u = ImplicitModel.from_weights(weights), torch.tensor([[0.4]])
    x = torch.zeros(2)
    for _ in range(100):
        x = torch.tanh(A @ x + u[0] + weights.b)
    torch.testing.assert_close(model(u)[0], x.sum() + u[0] + 1)
    for name in ("B", "b", "activation"):
        with pytest.raises(ParameterError, match=f"hold {name} already"):
            ImplicitModel.from_weights(weights, **{name: getattr(weights, name)})


def test_weights_that_do_not_fit_leave_the_model_as_it_was():
    model = model_of(InfinityNorm(0.9))
    before, n = copy.deepcopy(model.state_dict()), model.state_features
    weights = model.weights.detach()
    other = replace(weights, activation="sigmoid")
    with pytest.raises(ParameterError, match="activation"):
        model.load_weights(other)
    wide = replace(weights, A=weights.A / 2, B=weights.B.new_ones(n, 9), D=weights.D.new_ones(2, 9))
    with pytest.raises(ParameterError, match="B has shape"):
        model.load_weights(wide)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_weights_are_never_rounded_without_a_word():
    model = model_of(InfinityNorm(0.9), dtype=torch.float32)
    weights = model.weights.detach().to(torch.float64)
    before = model.B.detach().clone()
    with pytest.raises(ParameterError, match=r"float64, the model is torch.float32.*rounded"):
        model.load_weights(replace(weights, B=weights.B + 1))
    assert torch.equal(model.B, before)
    wide = model_of(InfinityNorm(0.9), dtype=torch.float64)
    wide.load_weights(weights.to(torch.float32))  # float64 holds them
    assert torch.equal(wide.B, before.double())


def test_without_biases():
    model = model_of(bias=False)
    assert model.b is None
    assert model.c is None
    assert not model(torch.zeros(2, 3).double()).any()
    w = model.weights.detach()
    again = ImplicitModel.from_weights(w.A, w.B, w.C, w.D)
    assert again.b is None


def test_rank_is_that_of_a():
    model = ImplicitModel(3, 2, 9, rank=2, generator=seeded())
    assert model.well_posed == LowRank(2)
    assert int(torch.linalg.matrix_rank(model.A.detach())) == 2
    with pytest.raises(SpecificationError, match="rank"):
        ImplicitModel(3, 2, 9, well_posed=InfinityNorm(0.9), rank=2)


@pytest.mark.parametrize("batch", [(), (4,), (2, 5)])
def test_leading_dimensions_are_those_of_the_input(batch):
    model = model_of()
    assert model(normal(*batch, 3)).shape == (*batch, 2)


def test_warm_start_saves_steps_and_is_not_copied():
    model, u = model_of(InfinityNorm(0.99), n=40, warm_start=True), normal(6, 3)
    cold = model.solve(u).iterations
    warm = model.solve(u + 1e-9 * normal(6, 3, seed=2)).iterations
    assert bool((warm < cold).all())
    assert torch.equal(pickle.loads(pickle.dumps(model)).solve(u).iterations, cold)
    assert model(normal(2, 3)).shape == (2, 2)  # another batch starts anew


def test_elements_without_a_state():
    A = torch.tensor([[2.0]])
    weights = (A, torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    model = ImplicitModel.from_weights(*weights, well_posed=Unconstrained(), max_iters=50)
    u = torch.tensor([[-1.0], [1.0]])
    with pytest.warns(IllPosedWarning), pytest.raises(SolveError, match="element 1"):
        model(u)
    model.on_failure = "nan"
    with pytest.warns(IllPosedWarning):
        y = model(u)
    assert y.isnan().flatten().tolist() == [False, True]


def test_bad_arguments_are_refused():
    for arguments, options, message in (
        ((0, 2, 5), {}, "in_features"),
        ((3, 2, 5.0), {}, "state_features"),
        ((3, 2, 5), {"activation": "rleu"}, "relu"),
        ((3, 2, 5), {"well_posed": "inf"}, "well_posed"),
        ((3, 2, 5), {"well_posed": TriangularReLU(), "activation": "tanh"}, "tanh"),
        ((3, 2, 5), {"on_failure": "no"}, "on_failure"),
        ((3, 2, 5), {"tol": -1.0}, "tol"),
    ):
        with pytest.raises(SpecificationError, match=message):
            ImplicitModel(*arguments, **options)
    model = model_of()
    with pytest.raises(ParameterError, match="u has shape"):
        model(normal(2, 4))
    with pytest.raises(ParameterError, match=r"u has type torch\.float32"):
        model(normal(2, 3).float())
    with pytest.raises(ParameterError, match="finite"):
        model(torch.full((2, 3), torch.nan).double())


def test_mixed_precision():
    model, u = model_of(dtype=torch.float32), normal(4, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(u)
    torch.testing.assert_close(y.float(), model(u), rtol=0.05, atol=0.05)


def test_compiled_model_gives_the_same():
    model, u = model_of(), normal(4, 3)
    compiled = torch.compile(nn.Sequential(model, nn.ReLU()), backend="eager")
    torch.testing.assert_close(compiled(u), model(u).relu())


def test_data_parallel_training():
    os.environ.setdefault("MASTER_ADDR", "localhost")
    model, u = model_of(), normal(4, 3)
    alone = copy.deepcopy(model)
    alone(u).sum().backward()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(model)(u).sum().backward()
    finally:
        dist.destroy_process_group()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_repr_names_what_was_chosen():
    assert "InfinityNorm(kappa=0.9)" in repr(model_of(InfinityNorm(0.9)))
