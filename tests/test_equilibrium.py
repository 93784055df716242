"""Equilibria x = phi(A x + c): solutions, derivatives, reports."""

import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from declarative_cvx.errors import IrregularError, ParameterError, SolveError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import as_activation
from declarative_cvx.nonconvex.implicit.equilibrium import solve_equilibrium
from declarative_cvx.nonconvex.implicit.uncertified import IllPosedWarning
from declarative_cvx.status import Status

ACTIVATIONS = ["relu", "leaky_relu", "tanh", "sigmoid", [("relu", 2), ("tanh", 2)]]
WHOLE = ["softmax", [("relu", 2), ("softmax", 2)]]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def contraction(n, kappa, nonnegative=False, seed=0):
    A = normal(n, n, seed=seed)
    A = A.abs() if nonnegative else A
    return kappa * A / A.abs().sum(1, keepdim=True)


def by_dense_newton(A, c, steps=60):
    """The solution for ReLU: (I - diag(s) A) x = s c, s found by policy iteration, element-wise."""
    rows = []
    for b in c:
        x = torch.zeros_like(b)
        for _ in range(steps):
            s = (A @ x + b > 0).to(A)
            x = torch.linalg.solve(torch.eye(len(A)).to(A) - s[:, None] * A, s * b)
        rows.append(x)
    return torch.stack(rows)


def by_picard(A, c, phi, steps=3000):
    x = torch.zeros_like(c)
    for _ in range(steps):
        x = phi(x @ A.mT + c)
    return x


def gradients_by_dense_solve(A, x, c, grad, phi):
    """IDL Sec. 3: (I - A' Phi) v = grad for each element; gradients of A and c are from Phi v."""
    slope = phi.slope(x @ A.mT + c)
    system = torch.eye(len(A)).to(A) - A.mT * slope[:, None, :]
    w = slope * torch.linalg.solve(system, grad)
    return w.mT @ x, w


@pytest.mark.parametrize("method", ["auto", "picard", "anderson", "newton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_methods_find_the_same_solution(activation, method):
    A, c = contraction(4, 0.8), normal(6, 4, seed=1)
    expected = by_picard(A, c, as_activation(activation))
    found = solve_equilibrium(A, c, activation, method=method).require_solved()
    torch.testing.assert_close(found.x, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kappa", [0.5, 0.99, 0.9999])
def test_slow_nonnegative_weights_are_solved_in_few_steps(kappa):
    A, c = contraction(60, kappa, nonnegative=True), normal(8, 60, seed=1)
    found = solve_equilibrium(A, c)
    torch.testing.assert_close(found.x, by_dense_newton(A, c), rtol=1e-8, atol=1e-9)
    assert int(found.iterations.max()) < 60  # Picard's iteration takes log(1e-12) / log(kappa)


SLOW_IN_MANY_DIRECTIONS = {
    "cycle": 0.99 * torch.eye(80, dtype=torch.float64).roll(1, 0),
    "chain": 0.495
    * (torch.ones(79, dtype=torch.float64).diag(1) + torch.ones(79, dtype=torch.float64).diag(-1)),
    "rotation": 0.99 * torch.linalg.qr(normal(80, 80))[0],
}


@pytest.mark.filterwarnings("ignore::declarative_cvx.IrregularWarning")
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "identity"])
@pytest.mark.parametrize("name", SLOW_IN_MANY_DIRECTIONS)
def test_many_slow_directions(name, activation):
    A, c = SLOW_IN_MANY_DIRECTIONS[name], normal(6, 80, seed=1) + 0.5
    phi = as_activation(activation)
    A, c = A.clone().requires_grad_(), c.requires_grad_()
    found = solve_equilibrium(A, c, phi).require_solved()
    torch.testing.assert_close(found.x, phi(found.x @ A.mT + c), rtol=0, atol=1e-9)
    grad = normal(6, 80, seed=2)
    expected = gradients_by_dense_solve(A, found.x, c, grad, phi)
    actual = torch.autograd.grad(found.x, (A, c), grad)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("diagonal", [0.0, 0.6, -5.0])
def test_triangular_relu_is_solved_by_substitution(upper, diagonal):
    n = 150  # more than a block
    A = 2 * normal(n, n).triu(1) / n**0.5 + diagonal * torch.eye(n).double()
    c = normal(4, n, seed=1)
    expected = torch.zeros_like(c)  # IDL Sec. 2: from the last state to the first
    for i in range(n - 1, -1, -1):
        rest = expected[:, i + 1 :] @ A[i, i + 1 :]
        expected[:, i] = (c[:, i] + rest).clamp(min=0) / (1 - diagonal)
    order = torch.arange(n) if upper else torch.arange(n - 1, -1, -1)
    A, c, expected = A[order][:, order], c[:, order], expected[:, order]
    found = solve_equilibrium(A, c).require_solved()
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-9)


def test_feedforward_nets_are_exact_after_as_many_steps_as_layers():
    sizes, phi = [6, 5, 4], torch.tanh
    first, second = 3 * normal(5, 6), 3 * normal(4, 5, seed=1)
    A = torch.zeros(15, 15, dtype=torch.float64)
    A[6:11, :6], A[11:, 6:11] = first, second
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))  # any order of states
    c = normal(7, 15, seed=2)
    x = phi(c[:, :6])
    y = phi(x @ first.mT + c[:, 6:11])
    expected = torch.cat([x, y, phi(y @ second.mT + c[:, 11:])], 1)[:, order]
    found = solve_equilibrium(A[order][:, order], c[:, order], "tanh")
    torch.testing.assert_close(found.x, expected, rtol=1e-13, atol=1e-13)
    assert int(found.iterations.max()) <= len(sizes) + 1


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *WHOLE])
def test_first_and_second_derivatives(activation):
    A, c = contraction(4, 0.8).requires_grad_(), normal(1, 4, seed=1).requires_grad_()

    def solve(A, c):
        return solve_equilibrium(A, c, activation, tol=1e-14).x

    assert gradcheck(solve, (A, c), check_forward_ad=True)
    assert gradgradcheck(solve, (A, c), check_fwd_over_rev=True)


@pytest.mark.parametrize("upper", [True, False])
def test_derivatives_of_substitution(upper):
    A, c = normal(4, 4), normal(2, 4, seed=1)
    A = (A.triu(1) - 0.5 * torch.eye(4)).requires_grad_()

    def solve(A, c):
        A = A.triu()
        return solve_equilibrium(A if upper else A.mT, c, tol=1e-14).x

    assert gradcheck(solve, (A, c.requires_grad_()), check_forward_ad=True)
    assert gradgradcheck(solve, (A, c))


def test_low_rank_weights_are_solved_in_their_rank():
    L, R, c = 0.2 * normal(6, 2), 0.2 * normal(6, 2, seed=1), normal(3, 6, seed=2)
    whole = solve_equilibrium(L @ R.mT, c, "tanh").x
    for method in ("auto", "newton"):
        found = solve_equilibrium((L, R), c, "tanh", method=method)
        torch.testing.assert_close(found.x, whole, rtol=1e-11, atol=1e-11)

    def solve(L, R, c):
        return solve_equilibrium((L, R), c, "tanh", tol=1e-14).x

    inputs = tuple(v.requires_grad_() for v in (L, R, c))
    assert gradcheck(solve, inputs, check_forward_ad=True)
    assert gradgradcheck(solve, inputs)


def test_torch_func_transforms():
    A, c = contraction(4, 0.7), normal(3, 4, seed=1)
    several = torch.stack([A, 0.5 * A])

    def solve(A, c):
        return solve_equilibrium(A, c, "tanh", tol=1e-14).x

    reverse = torch.func.jacrev(solve, (0, 1))(A, c)
    forward = torch.func.jacfwd(solve, (0, 1))(A, c)
    torch.testing.assert_close(reverse, forward, rtol=1e-10, atol=1e-11)
    hessian = torch.func.hessian(lambda A: solve(A, c).pow(2).sum())(A)
    twice = torch.func.jacrev(torch.func.jacrev(lambda A: solve(A, c).pow(2).sum()))(A)
    torch.testing.assert_close(hessian, twice, rtol=1e-9, atol=1e-10)
    mapped = torch.func.vmap(solve, (0, None))(several, c)
    torch.testing.assert_close(mapped, torch.stack([solve(A, c) for A in several]))
    shifts = torch.stack([c, c + 1])
    mapped = torch.func.vmap(torch.func.grad(lambda A, c: solve(A, c).sum()), (0, 0))
    each = [
        torch.func.grad(lambda A, c: solve(A, c).sum())(*one)
        for one in zip(several, shifts, strict=True)
    ]
    torch.testing.assert_close(mapped(several, shifts), torch.stack(each))


@pytest.mark.parametrize("nonnegative", [False, True])
def test_float32_is_as_accurate_as_its_numbers(nonnegative):
    A, c = contraction(100, 0.99, nonnegative).float(), normal(16, 100, seed=1).float()
    grad = normal(16, 100, seed=2).float()
    A.requires_grad_(), c.requires_grad_()
    found = solve_equilibrium(A, c)
    actual = (found.x, *torch.autograd.grad(found.x, (A, c), grad))
    A, c = A.detach().double(), c.detach().double()
    x = by_dense_newton(A, c)
    expected = (x, *gradients_by_dense_solve(A, x, c, grad.double(), as_activation("relu")))
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine.detach() - theirs).abs().max() / theirs.abs().max()) < 1e-6


def test_half_precision_comes_back_in_half_precision():
    A, c = contraction(5, 0.5), normal(3, 5, seed=1)
    found = solve_equilibrium(A.bfloat16(), c.bfloat16())
    assert found.x.dtype == torch.bfloat16
    exact = solve_equilibrium(A.bfloat16().double(), c.bfloat16().double()).x
    torch.testing.assert_close(found.x.double(), exact, rtol=1e-2, atol=1e-2)


def test_one_element_without_a_solution_spoils_no_other():
    # x = relu(2 x + c) has two solutions for c <= 0 (zero is one), and none for c > 0.
    A, c = torch.tensor([[2.0]]).double(), torch.tensor([[-1.0], [1.0], [-3.0]]).double()
    c.requires_grad_()
    with pytest.warns(IllPosedWarning):
        found = solve_equilibrium(A, c, max_iters=100)
    assert [status is Status.OPTIMAL for status in found.status] == [True, False, True]
    assert bool(found.x[1].isnan().all())
    assert not bool(found.x[[0, 2]].isnan().any())
    with pytest.raises(SolveError, match="element 1"):
        found.require_solved()
    (grad,) = torch.autograd.grad(found.x.nansum(), c)
    assert bool((grad[1] == 0).all())
    assert bool(grad.isfinite().all())


def test_too_few_steps_are_reported():
    A, c = contraction(20, 0.99, nonnegative=True), normal(3, 20, seed=1)
    found = solve_equilibrium(A, c, max_iters=3)
    assert found.status == (Status.ITERATION_LIMIT,) * 3
    assert bool(found.x.isnan().all())
    assert bool((found.residual > 1e-12).all())


def test_a_tolerance_out_of_reach_ends():
    A, c = contraction(20, 0.99, nonnegative=True), normal(3, 20, seed=1)
    found = solve_equilibrium(A, c, tol=1e-19)
    assert bool((found.residual < 1e-14).all())
    assert int(found.iterations.max()) <= 1000


def test_certified_weights_draw_no_warning():
    c = normal(2, 3)
    for A in (contraction(3, 0.9), contraction(3, 0.9).mT, normal(3, 3).triu(1) * 100):
        with warnings.catch_warnings():
            warnings.simplefilter("error", IllPosedWarning)
            solve_equilibrium(A, c)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_warm_start_saves_steps(nonnegative):
    A, c = contraction(40, 0.95, nonnegative), normal(4, 40, seed=1)
    cold = solve_equilibrium(A, c)
    near = c + 1e-6 * normal(4, 40, seed=2)
    warm, again = solve_equilibrium(A, near, start=cold.x), solve_equilibrium(A, near)
    torch.testing.assert_close(warm.x, again.x, rtol=1e-9, atol=1e-9)
    assert bool((warm.iterations < again.iterations).all())
    assert int(solve_equilibrium(A, c, start=cold.x).iterations.max()) <= 2


def test_order_of_elements_and_of_states_does_not_matter():
    A, c = contraction(30, 0.95, nonnegative=True), normal(9, 30, seed=1)
    x = solve_equilibrium(A, c).x
    generator = torch.Generator().manual_seed(0)
    elements, states = (
        torch.randperm(9, generator=generator),
        torch.randperm(30, generator=generator),
    )
    torch.testing.assert_close(
        solve_equilibrium(A, c[elements]).x, x[elements], atol=1e-10, rtol=1e-9
    )
    moved = solve_equilibrium(A[states][:, states], c[:, states]).x
    torch.testing.assert_close(moved, x[:, states], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_leading_dimensions(batch):
    A, c = contraction(4, 0.8), normal(*batch, 4, seed=1)
    found = solve_equilibrium(A, c).require_solved()
    assert found.x.shape == c.shape
    assert found.residual.shape == found.codes.shape == found.iterations.shape == batch
    torch.testing.assert_close(found.x, by_picard(A, c, torch.relu), rtol=1e-10, atol=1e-11)


def test_elements_on_a_kink_are_reported():
    A = contraction(3, 0.5)
    x = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.5, 2.0]]).double()
    z = x.clone()
    z[1] = torch.tensor([1.0, 0.5, 2.0])
    c = (z - x @ A.mT).requires_grad_()
    found = solve_equilibrium(A, c, on_irregular="raise")
    assert found.regular.tolist() == [False, True]
    with pytest.raises(IrregularError):
        found.x.sum().backward()
    assert solve_equilibrium(A, c, "tanh").regular.all()


def test_bad_arguments_are_refused():
    A, c = contraction(3, 0.5), normal(2, 3)
    for bad, message in (
        ((A[:2], c), "A has shape"),
        ((A[0], c), "A has shape"),
        ((A, c[:, :2]), "c has shape"),
        ((A, c.long()), "c is torch.int64"),
        ((A, c.tolist()), "c is list"),
        ((A.where(A > 0, torch.nan), c), "A.* must be a finite number"),
        ((A, c.where(c > 0, torch.inf)), "c.* must be a finite number"),
        (((A, A[:, :2]), c), "L has shape|R has shape"),
    ):
        with pytest.raises(ParameterError, match=message):
            solve_equilibrium(*bad)
    with pytest.raises(ParameterError, match="start has shape"):
        solve_equilibrium(A, c, start=c[:1])
    for options in ({"tol": 0.0}, {"max_iters": 0}, {"method": "newtn"}, {"on_irregular": "no"}):
        with pytest.raises(SpecificationError, match=next(iter(options))):
            solve_equilibrium(A, c, **options)


def test_nothing_of_the_callers_is_changed():
    A, c, start = contraction(30, 0.99, nonnegative=True), normal(3, 30), normal(3, 30, seed=1)
    before = [v.clone() for v in (A, c, start)]
    solve_equilibrium(A, c, start=start)
    assert all(torch.equal(v, w) for v, w in zip((A, c, start), before, strict=True))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e7), (torch.float32, 1e4)])
@pytest.mark.parametrize("length", [5, 6, 8, 11])
def test_layers_behind_small_weights_are_reached(dtype, size, length):
    A = torch.diag(torch.ones(length - 1, dtype=dtype), -1)
    A[-2, -3], A[-1, -2] = 1 / size, size
    order = torch.randperm(length, generator=torch.Generator().manual_seed(41))
    c = torch.eye(length, dtype=dtype)[:1].requires_grad_()
    for index in (torch.arange(length), order):
        moved = A[index][:, index].requires_grad_()
        solution = solve_equilibrium(moved, c[:, index], "relu", on_irregular="ignore")
        last = solution.x[0, index == length - 1].sum()
        torch.testing.assert_close(last, torch.ones_like(last))
        by_c, by_A = torch.autograd.grad(last, (c, moved))
        torch.testing.assert_close(by_c[0, 0], torch.ones_like(last))
        steps = (by_A * moved).detach().sum(1)  # every edge of the path multiplies by its weight
        torch.testing.assert_close(steps.sum(), torch.full_like(last, length - 1))


def test_start_far_from_the_solution():
    for kind in (torch.float32, torch.float64):
        A, c = 0.5 * torch.eye(3, dtype=kind) + 0.1, torch.ones(2, 3, dtype=kind)
        for value in (1e6, 1e10, 1e14, 1e30):
            found = solve_equilibrium(A, c, start=value * c)
            torch.testing.assert_close(found.x[found.solved], 5 * c[found.solved])
    zero = solve_equilibrium(A, 0 * c, start=c)
    assert zero.solved.all()
    torch.testing.assert_close(zero.x, 0 * c)


@pytest.mark.parametrize("method", ["auto", "picard", "anderson", "newton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_small_weights_pass_on_to_large_ones_is_right(dtype, method):
    """x0 = 0.1 x1 + c0, x1 = x0, x2 = x1, x3 = 1e-7 x2, x4 = 1e7 x3: all by hand."""
    A = torch.diag(torch.tensor([1, 1, 1e-7, 1e7], dtype=torch.float64), -1)
    A[0, 1] = 0.1
    A, c = A.to(dtype), torch.tensor([[0.9, 0, 0, 0, 0]], dtype=dtype, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IllPosedWarning)
        found = solve_equilibrium(A, c, method=method).require_solved()
    expected = torch.tensor([[1, 1, 1, 1e-7, 1]], dtype=dtype)
    rtol = 1e-11 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.x, expected, rtol=rtol, atol=0)
    (by_last,) = torch.autograd.grad(found.x[0, 4], c, retain_graph=True)
    expected = torch.tensor([[1 / 0.9, 1 / 0.9, 1, 1e7, 1]], dtype=dtype)
    torch.testing.assert_close(by_last, expected, rtol=rtol, atol=0)
    (by_fourth,) = torch.autograd.grad(found.x[0, 3], c)
    expected = torch.tensor([[1e-7 / 0.9, 1e-7 / 0.9, 1e-7, 1, 0]], dtype=dtype)
    torch.testing.assert_close(by_fourth, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("method", ["auto", "anderson", "newton"])
@pytest.mark.parametrize("kappa", [0.5, 0.99])
def test_scaled_states_are_as_right_as_unscaled_ones(kappa, method):
    """To y = D x belongs y = relu(D A D^-1 y + D c); D holds powers of 2 from 2^-25 to 2^25."""
    n = 30
    generator = torch.Generator().manual_seed(0)
    A, c, grad = (torch.randn(k, n, generator=generator, dtype=torch.float64) for k in (n, 4, 4))
    A = kappa * A.abs() / A.abs().sum(1, keepdim=True)
    d = 2.0 ** torch.randint(-25, 26, (n,), generator=generator).double()
    plain, scaled = (v.clone().requires_grad_() for v in (c, c * d))
    found = solve_equilibrium(A, plain, tol=1e-14).require_solved().x
    expected = torch.autograd.grad(found, plain, grad)[0]
    x = solve_equilibrium(d[:, None] * A / d, scaled, method=method).require_solved().x
    gradient = torch.autograd.grad(x, scaled, grad / d)[0]
    torch.testing.assert_close(x / d, found, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradient * d, expected, rtol=1e-8, atol=1e-10)
