"""Fixed points of functions of the user's own."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import (
    BackendError,
    IrregularError,
    IrregularWarning,
    ParameterError,
    SolveError,
    SpecificationError,
)
from declarative_cvx.layer import DeclarativeLayer
from declarative_cvx.nonconvex.fixed_points.problem import FixedPointLayer, FixedPointProblem
from declarative_cvx.nonconvex.fixed_points.route import FixedPointRoute
from declarative_cvx.nonconvex.implicit.equilibrium import solve_equilibrium
from declarative_cvx.parameters import Arguments


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Cell(nn.Module):
    """x -> tanh(W x + V u)."""

    def __init__(self, n=3, p=2, scale=0.4):
        super().__init__()
        self.W = nn.Parameter(scale * normal(n, n, seed=5) / n**0.5)
        self.V = nn.Parameter(normal(n, p, seed=6))

    def forward(self, x, u):
        return torch.tanh(x @ self.W.mT + u @ self.V.mT)


@pytest.mark.parametrize("method", ["auto", "picard", "anderson", "newton"])
def test_solution_and_gradients_are_those_of_the_implicit_model(method):
    cell, u = Cell(), normal(4, 2)
    problem = FixedPointProblem(cell, shape=(3,), tol=1e-13, method=method)
    found = problem.solve(u).require_solved()
    expected = solve_equilibrium(cell.W, u @ cell.V.mT, "tanh").x
    torch.testing.assert_close(found.x, expected, rtol=1e-11, atol=1e-11)
    grad = normal(4, 3, seed=1)
    mine = torch.autograd.grad(found.x, list(cell.parameters()), grad)
    theirs = torch.autograd.grad(expected, list(cell.parameters()), grad)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_slow_maps_are_solved():
    """A rotation by 0.999, which has no few slow directions, and one slow direction."""
    n = 20
    rotation, u = 0.999 * torch.linalg.qr(normal(n, n))[0], normal(3, n, seed=1)
    slow = 0.999 * torch.full((n, n), 1 / n, dtype=torch.float64)
    for W in (rotation, slow):
        problem = FixedPointProblem(lambda x, u, W=W: x @ W.mT + u, shape=(n,), tol=1e-12)
        found = problem.solve(u.requires_grad_())
        assert int(found.iterations.max()) < 200
        expected = torch.linalg.solve(torch.eye(n) - W, u[..., None])[..., 0]
        torch.testing.assert_close(found.x, expected, rtol=1e-8, atol=1e-8)
        (grad,) = torch.autograd.grad(found.x.sum(), u)
        expected = torch.linalg.solve((torch.eye(n) - W).mT, torch.ones(n).double())
        torch.testing.assert_close(grad, expected.expand(3, n), rtol=1e-8, atol=1e-8)


def test_first_and_second_derivatives_of_inputs_and_parameters():
    cell, u = Cell(), normal(2, 2).requires_grad_()
    layer = FixedPointLayer(FixedPointProblem(cell, shape=(3,), tol=1e-14))
    names = [name for name, _ in layer.named_parameters()]

    def call(u, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, parameters, (u,))

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert gradcheck(call, (u, *values), check_forward_ad=True)
    assert gradgradcheck(call, (u, *values))


def test_transforms():
    def solve(u):
        problem = FixedPointProblem(lambda x, u: 0.5 * torch.sin(x) + u, shape=(2,), tol=1e-14)
        return problem.solve(u).x

    u = normal(3, 2)
    slope = 0.5 * torch.cos(solve(u))
    jacobian = torch.func.jacrev(solve)(u)
    torch.testing.assert_close(
        jacobian, torch.diag((1 / (1 - slope)).flatten()).reshape(3, 2, 3, 2)
    )
    torch.testing.assert_close(torch.func.jacfwd(solve)(u), jacobian)
    several = torch.stack([u, -u])
    torch.testing.assert_close(
        torch.func.vmap(solve)(several), torch.stack([solve(u), solve(-u)]), rtol=1e-11, atol=1e-11
    )


def test_images_as_states():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    with torch.no_grad():
        conv.weight.mul_(0.2)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x, u):
            return torch.relu(self.conv(x) + u)

    layer, u = FixedPointLayer(FixedPointProblem(Deep(), shape=(2, 6, 6))), torch.randn(3, 2, 6, 6)
    x = layer(u)
    torch.testing.assert_close(x, torch.relu(conv(x) + u), rtol=1e-4, atol=1e-5)
    step = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        step.zero_grad()
        loss = (layer(u) - 1).pow(2).mean()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_inputs_that_are_no_numbers():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(normal(5, 3))

        def forward(self, x, index, u):
            return 0.5 * torch.sin(x) + self.table[index] * u

    cell, index, u = Embedded(), torch.tensor([0, 2, 2]), normal(3, 1, seed=1)
    start = torch.zeros(3, 3, dtype=torch.float64)
    x = FixedPointProblem(cell, shape=(3,), tol=1e-13).solve(index, u, start=start).x
    (grad,) = torch.autograd.grad(x.sum(), cell.table)
    slope = (u / (1 - 0.5 * torch.cos(x))).detach()
    torch.testing.assert_close(grad, torch.zeros(5, 3).double().index_add(0, index, slope))


def test_elements_without_a_solution():
    layer = FixedPointLayer(FixedPointProblem(lambda x, u: x * x + u, shape=(1,), max_iters=60))
    u = torch.tensor([[0.1], [1.0]]).double().requires_grad_()
    with pytest.raises(SolveError, match="element 1"):
        layer(u)
    layer.on_failure = "nan"
    x = layer(u)
    assert x.isnan().flatten().tolist() == [False, True]
    root = (1 - (1 - 0.4) ** 0.5) / 2
    torch.testing.assert_close(x[0, 0].item(), root)
    (grad,) = torch.autograd.grad(x.nansum(), u)
    torch.testing.assert_close(grad, torch.tensor([[1 / (1 - 2 * root)], [0.0]]).double())


def test_tensors_that_would_get_no_gradient_are_refused():
    W = (0.1 * normal(3, 3)).requires_grad_()
    problem = FixedPointProblem(lambda x, u: torch.tanh(x @ W) + u, shape=(3,))
    with pytest.raises(ParameterError, match="would get none"):
        problem.solve(normal(2, 3))
    with torch.no_grad():
        problem.solve(normal(2, 3)).require_solved()


def test_warm_start_copies_and_pickles():
    layer = FixedPointLayer(FixedPointProblem(Cell(scale=0.9), shape=(3,)), warm_start=True)
    u = normal(4, 2)
    cold = layer.solve(u).iterations
    assert bool((layer.solve(u).iterations < cold).all())
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.solve(u).iterations, cold)
        again.function.W.data.zero_()  # the copy has one module, not two
        torch.testing.assert_close(again(u), torch.tanh(u @ again.function.V.mT))


def test_bad_arguments_are_refused():
    for options, message in (
        ({"shape": ()}, "shape"),
        ({"shape": (0,)}, "shape"),
        ({"shape": (1,), "tol": 2.0}, "tol"),
        ({"shape": (1,), "method": "broyden"}, "method"),
    ):
        with pytest.raises(SpecificationError, match=message):
            FixedPointProblem(torch.cos, **options)
    with pytest.raises(SpecificationError, match="callable"):
        FixedPointProblem(1, shape=(1,))
    problem = FixedPointProblem(lambda x, u: x[:, :1] + u, shape=(2,))
    with pytest.raises(ParameterError, match="returned"):
        problem.solve(normal(3, 1))
    with pytest.raises(ParameterError, match="start"):
        problem.solve()
    with pytest.raises(ParameterError, match="Argument 1"):
        problem.solve(normal(3, 1), normal(2, 1))
    with pytest.raises(ParameterError, match="start has shape"):
        problem.solve(normal(3, 1), start=normal(3, 1))


@pytest.mark.parametrize("batched", [True, False])
def test_route_of_a_layer(batched):
    cell = Cell()
    route = FixedPointRoute(FixedPointProblem(cell, shape=(3,)), "warn")
    u = normal(4, 2) if batched else normal(2)
    arguments = Arguments((u,), (batched,), 4 if batched else None, u.dtype, u.device)
    found = route.solve(arguments, None, None)
    (x,) = found.variables
    torch.testing.assert_close(x, torch.tanh(x @ cell.W.mT + u @ cell.V.mT), rtol=0, atol=1e-9)
    assert bool(found.solved.all())
    assert bool(found.derivative.regular.all())
    again = route.solve(arguments, {"tol": 1e-8}, found.state)
    assert max(again.iterations) < max(found.iterations)
    with pytest.raises(BackendError, match="max_iters"):
        route.solve(arguments, {"max_iter": 5}, None)


def test_the_same_layer():
    cell = Cell()
    problem = FixedPointProblem(cell, shape=(3,), parameters={"u": (2,)})
    layer = DeclarativeLayer(problem)
    assert layer.spec.verdict.name == "FIXED_POINT"
    assert {id(p) for p in layer.parameters()} == {id(p) for p in cell.parameters()}
    u = normal(4, 2).requires_grad_()
    (x,) = layer(u)
    torch.testing.assert_close(x, torch.tanh(x @ cell.W.mT + u @ cell.V.mT), rtol=0, atol=1e-9)
    x.square().sum().backward()
    expected = torch.autograd.grad(
        FixedPointLayer(problem)(u).square().sum(), [u, *cell.parameters()]
    )
    for found, right in zip((u.grad, *(p.grad for p in cell.parameters())), expected, strict=True):
        torch.testing.assert_close(found, right)
    assert layer(u[0])[0].shape == (3,)
    assert layer.solve(u)["x"].shape == (4, 3)
    named = DeclarativeLayer(problem, solver="newton", solver_args={"tol": 1e-12})
    assert float(named.solve(u).residuals.primal.max()) <= 1e-12


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"parameters": []}, SpecificationError, "parameters"),
        ({"variables": ["x"]}, SpecificationError, "one variable"),
        ({"restarts": 2}, SpecificationError, "restarts"),
        ({"gp": True}, SpecificationError, "gp=True"),
        ({"solver": "clarabel"}, SpecificationError, "method"),
        ({"solver": lambda u: u}, BackendError, "objective"),
        ({"solver_args": {"tolerance": 1}}, BackendError, "tol"),
    ],
)
def test_the_layer_refuses_what_would_do_nothing(options, error, words):
    problem = FixedPointProblem(Cell(), shape=(3,), parameters={"u": (2,)})
    with pytest.raises(error, match=words):
        DeclarativeLayer(problem, **options)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_unsolved_elements_leave_shared_gradients_alone(bad):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x, u):
            return torch.cos(self.weight * x) * u.sqrt()

    def gradients(values):
        model, u = Model(), torch.tensor(values, dtype=torch.float64)[:, None].requires_grad_()
        x = FixedPointLayer(FixedPointProblem(model, shape=(1,)), on_failure="nan")(u)
        return torch.autograd.grad(torch.nansum(x), (model.weight, u))

    weight, u = gradients([1.0, 2.0])
    weight_beside, u_beside = gradients([1.0, bad, 2.0])
    torch.testing.assert_close(weight_beside, weight)
    torch.testing.assert_close(u_beside[[0, 2]], u)
    assert u_beside[1] == 0
    assert all(bool((g == 0).all()) for g in gradients([bad, bad]))


def test_singular_derivatives_are_reported():
    problem = FixedPointProblem(lambda x, u: torch.tanh(x) + u, (1,), {"u": (1,)})
    layer = DeclarativeLayer(problem)  # x - tanh(x) = u, whose slope is 0 at 0
    u = torch.tensor([[0.0], [0.5]], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(u)
    assert solution.derivative.regular.tolist() == [False, True]
    assert "no solution" in solution.derivative.reason[0]
    with pytest.warns(IrregularWarning, match=r"1 element\(s\) of the batch \(0\)"):
        (gradient,) = torch.autograd.grad(solution.variables[0].sum(), u)
    x = solution.variables[0][1]
    torch.testing.assert_close(gradient[1], 1 / torch.tanh(x).square())


def test_warm_start_follows_the_type_of_the_inputs():
    problem = FixedPointProblem(lambda x, u: torch.cos(x) * u, (1,), {"u": (1,)})
    single, double = (torch.ones(2, 1, dtype=kind) for kind in (torch.float32, torch.float64))
    for kind in (DeclarativeLayer, FixedPointLayer):
        layer = kind(problem, warm_start=True)
        layer(single)
        (x,) = layer(double) if kind is DeclarativeLayer else (layer(double),)
        torch.testing.assert_close(x, torch.cos(x))
        assert x.dtype == torch.float64


def test_functions_that_write_into_their_arguments_are_refused():
    def function(x, u):
        u.mul_(0.5)
        return 0.5 * x + u

    u = torch.ones(2, 1)
    with pytest.raises(ParameterError, match="writes into its arguments"):
        FixedPointProblem(function, (1,)).solve(u)
    assert bool((u == 1).all())


def test_inference_mode():
    layer = FixedPointLayer(FixedPointProblem(lambda x, u: torch.cos(x) * u, (1,)))
    with torch.inference_mode():
        x = layer(torch.ones(2, 1, dtype=torch.float64))
        torch.testing.assert_close(x, torch.cos(x))


class Shared(nn.Module):
    """Every second of its functions mixes the batch."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, x, u):
        return 0.3 * self.mix(torch.tanh(x)) + u


@pytest.mark.parametrize(
    "mix",
    [
        lambda v: v - v.mean(0),
        lambda v: v.roll(1, 0),
        lambda v: v + v.cumsum(0),
        lambda v: torch.nn.functional.batch_norm(v, None, None, training=True),
    ],
)
def test_functions_that_mix_the_batch_are_refused(mix):
    problem = FixedPointProblem(Shared(mix), shape=(2,))
    with pytest.raises(ParameterError, match="elements of the batch depend on each other"):
        problem.solve(normal(4, 2))
    by_inputs = FixedPointProblem(lambda x, u: 0.3 * torch.tanh(x) + u - u.mean(0), shape=(2,))
    with pytest.raises(ParameterError, match="depend on each other"):
        by_inputs.solve(normal(4, 2))
    FixedPointProblem(Shared(lambda v: v - v.mean(1, keepdim=True)), shape=(2,)).solve(normal(4, 2))


def test_kinks_of_functions_are_reported():
    """X = relu(x / 2 + u) has its kink at u = 0; tanh(40 x) is steep, but smooth."""
    problem = FixedPointProblem(lambda x, u: torch.relu(x / 2 + u), shape=(2,))
    u = torch.tensor([[1.0, -1.0], [0.0, 1.0], [1e-3, 2.0], [-1e-3, 1.0]], dtype=torch.float64)
    u = u.requires_grad_()
    found = problem.solve(u).require_solved()
    assert found.regular.tolist() == [True, False, True, True]
    with pytest.warns(IrregularWarning, match="kink"):
        found.x.sum().backward()
    with pytest.raises(IrregularError, match=r"1 element\(s\) of the batch \(1\)"):
        problem.solve(u, on_irregular="raise").x.sum().backward()
    steep = FixedPointProblem(lambda x, u: torch.tanh(40 * u) + torch.cos(x) / 2, shape=(2,))
    for dtype in (torch.float64, torch.float32):
        found = steep.solve(u.detach().to(dtype).requires_grad_(), on_irregular="raise")
        assert found.regular.all()
        found.x.sum().backward()


def test_float32_functions_are_solved_as_exactly_as_asked():
    cell, u = Cell().float(), normal(4, 2).float().requires_grad_()
    found = FixedPointProblem(cell, shape=(3,), tol=1e-12).solve(u).require_solved()
    assert found.x.dtype == torch.float32
    exact, wide = Cell(), u.detach().double().requires_grad_()
    exact.load_state_dict(cell.state_dict())
    expected = FixedPointProblem(exact, shape=(3,), tol=1e-12).solve(wide).x
    torch.testing.assert_close(found.x, expected.float(), rtol=0, atol=0)
    grad = normal(4, 3, seed=1)
    mine = torch.autograd.grad(found.x, [u, *cell.parameters()], grad.float())
    theirs = torch.autograd.grad(expected, [wide, *exact.parameters()], grad.float().double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=1e-7)


def test_functions_bound_to_float32_are_told_so():
    W = (normal(2, 2) / 8).float()
    bound = FixedPointProblem(lambda x, u: torch.tanh(x @ W) + u, shape=(2,), tol=1e-10)
    with pytest.raises(ParameterError, match="does not compute in float64"):
        bound.solve(torch.ones(1, 2))


@pytest.mark.parametrize("method", ["auto", "picard", "newton"])
def test_small_components_are_as_right_as_rounding_of_the_largest_allows(method):
    """x0 = 0.1 x1 + c0, x1 = x0, x2 = x1, x3 = 1e-7 x2, x4 = 1e7 x3: all by hand."""
    A = torch.diag(torch.tensor([1, 1, 1e-7, 1e7], dtype=torch.float64), -1)
    A[0, 1] = 0.1
    c = torch.tensor([[0.9, 0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    problem = FixedPointProblem(lambda x, u: torch.relu(x @ A.mT + u), shape=(5,), method=method)
    found = problem.solve(c, on_irregular="raise").require_solved()
    expected = torch.tensor([[1, 1, 1, 1e-7, 1]], dtype=torch.float64)
    torch.testing.assert_close(found.x, expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(found.x[0, 4], c)
    expected = torch.tensor([[1 / 0.9, 1 / 0.9, 1, 1e7, 1]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
