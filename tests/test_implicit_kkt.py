"""Derivatives of minima of nonlinear programs."""

from __future__ import annotations

import pytest
import torch
from smooth_programs import CASES, Case, banana, rows
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from declarative_cvx.errors import DerivativeModeError, IrregularError, IrregularWarning
from declarative_cvx.nonconvex.minimization.interior_point import InteriorPoint
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram
from declarative_cvx.nonconvex.minimization.solve import NonlinearSolution, solve_nonlinear

double = torch.float64
STEP = 1e-4


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=double)


def outputs(found: NonlinearSolution) -> Tensor:
    """Everything differentiable, shape (batch, outputs)."""
    return torch.cat(
        [found.x, found.equality, found.inequality, found.lower_bound, found.upper_bound,
         found.value[:, None]], 1,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_match_central_differences_of_tight_solutions(case: Case) -> None:
    data = numbers(*case.data)[None].requires_grad_()
    found = solve_nonlinear(case.program(data), case.first)
    assert bool(found.regular.all())
    y = outputs(found)
    weights = torch.linspace(0.5, 1.5, y.shape[1], dtype=double)
    (gradient,) = torch.autograd.grad((y @ weights).sum(), data)
    reference = _fourth_order(case, data.detach(), found.x.detach()) @ weights
    scale = reference.abs().max().clamp(min=1e-3)
    assert (gradient[0] - reference).abs().max() <= 1e-6 * scale


def _fourth_order(case: Case, data: Tensor, start: Tensor) -> Tensor:
    """Differences of order four of all outputs by each parameter, (parameters, outputs)."""
    count = data.shape[1]
    steps = torch.diag(STEP * (1 + data[0].abs()))
    moves = torch.cat([k * steps for k in (-2, -1, 1, 2)])
    found = solve_nonlinear(case.program(data + moves), start)
    assert bool(found.solved.all())
    far_low, low, high, far_high = outputs(found).split(count)
    return (far_low - 8 * low + 8 * high - far_high) / (12 * steps.diagonal()[:, None])


class TestBoundsAndParametersTogether:
    case = next(case for case in CASES if case.name == "HS71")

    def solve(self, data: Tensor, lower: Tensor, upper: Tensor) -> NonlinearSolution:
        program = NonlinearProgram(
            4, self.case.objective, self.case.equality, self.case.inequality, lower, upper,
            tuple(data.unbind(1)), len(data),
        )  # fmt: skip
        return solve_nonlinear(program, self.case.first)

    def inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        data = numbers(*self.case.data) * (1 + 0.02 * torch.arange(batch, dtype=double)[:, None])
        lower, upper = torch.ones(1, 4, dtype=double), torch.full((batch, 4), 5.0, dtype=double)
        return tuple(v.requires_grad_() for v in (data, lower, upper))

    def test_first_derivatives_in_both_modes(self) -> None:
        def of(*inputs: Tensor) -> Tensor:
            return outputs(self.solve(*inputs))

        assert gradcheck(
            of, self.inputs(), eps=1e-5, atol=1e-7, check_forward_ad=True, fast_mode=True
        )

    def test_second_derivatives(self) -> None:
        def of(*inputs: Tensor) -> Tensor:
            found = self.solve(*inputs)
            return torch.cat([found.x, found.inequality, found.lower_bound], 1)[:, 1:6].sum(1)

        assert gradgradcheck(of, self.inputs(1), eps=1e-5, atol=1e-6)

    def test_transforms_agree(self) -> None:
        data, lower, upper = (v.detach() for v in self.inputs())

        def of(data: Tensor) -> Tensor:
            return self.solve(data, lower, upper).x

        reverse, forward = torch.func.jacrev(of)(data), torch.func.jacfwd(of)(data)
        assert torch.allclose(reverse, forward, atol=1e-12)
        assert reverse[0, :, 1].abs().max() == 0
        mapped = torch.func.vmap(of)(torch.stack([data, 1.01 * data]))
        assert torch.allclose(mapped[1], of(1.01 * data), atol=1e-12)
        each = torch.func.vmap(torch.func.grad(lambda d: of(d)[:, 1].sum()))(data[None])
        assert torch.allclose(each[0], torch.func.grad(lambda d: of(d)[:, 1].sum())(data))

    def test_hessian_of_the_value(self) -> None:
        data, lower, upper = (v.detach() for v in self.inputs(1))

        def value(data: Tensor) -> Tensor:
            return self.solve(data, lower, upper).value.sum()

        one = torch.func.jacrev(torch.func.jacrev(value))(data)
        two = torch.func.hessian(value)(data)
        assert torch.allclose(one, two, atol=1e-10)
        with pytest.raises(DerivativeModeError, match="Forward mode over forward mode"):
            torch.func.jacfwd(torch.func.jacfwd(value))(data)


def sphere_program(target: Tensor) -> NonlinearProgram:
    return NonlinearProgram(
        target.shape[1], lambda x, p: -(x @ p[0]), lambda x, p: rows((x**2).sum() - 1), None,
        None, None, (target,), len(target),
    )  # fmt: skip


def alignment(target: Tensor) -> Tensor:
    """(I - x x' / |x|^2) / |x|, the derivative of x / |x|."""
    unit = target / target.norm()
    return (torch.eye(len(target), dtype=double) - unit[:, None] * unit) / target.norm()


def test_alignment_on_the_sphere() -> None:
    """DDN eq. 37."""
    target = numbers(1, -2, 0.5, 1)
    jacobian = torch.func.jacrev(
        lambda t: solve_nonlinear(sphere_program(t[None]), numbers(1, 0, 0, 0)[None]).x[0]
    )(target)
    assert torch.allclose(jacobian, alignment(target), atol=1e-13)


def test_alignment_with_a_singular_hessian_takes_the_pseudo_inverse() -> None:
    """DDN eqs. 36 and 38."""
    target = numbers(1, -2, 0.5, 1)
    start = numbers(1, -1, 1, 0.5)[None]

    def solve(t: Tensor) -> NonlinearSolution:
        program = NonlinearProgram(
            4, lambda x, p: -(x @ p[0]) / x.norm(), None, None, None, None, (t[None],), 1
        )
        return solve_nonlinear(program, start, on_irregular="ignore")

    found = solve(target)
    scale = found.x.norm()
    assert torch.allclose(found.x[0] / scale, target / target.norm(), atol=1e-9)
    assert not bool(found.regular.any())
    jacobian = torch.func.jacrev(lambda t: solve(t).x[0])(target)
    assert torch.allclose(jacobian, scale * alignment(target), atol=1e-8)


@pytest.mark.parametrize("sign", [-1, 1])
def test_two_branches(sign: int) -> None:
    """DDN eqs. 33 and 34: the derivative is that of the branch that was found."""
    p = numbers(0.5).requires_grad_()
    program = NonlinearProgram(
        1, lambda x, p: 0 * x[0], lambda x, p: rows((x[0] - 1) ** 2 - p[0] ** 2), None, None, None,
        (p,), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, numbers(1 + 0.4 * sign)[None])
    assert float(found.x.detach()) == pytest.approx(1 + 0.5 * sign)
    assert float(torch.autograd.grad(found.x.sum(), p)[0]) == pytest.approx(sign)


def test_projection_onto_an_ellipsoid_inside_and_outside() -> None:
    axes = numbers(1, 4, 9)
    targets = torch.tensor([[0.1, 0.1, 0.1], [1, 2, 3]], dtype=double, requires_grad=True)

    def solve(targets: Tensor) -> Tensor:
        program = NonlinearProgram(
            3, lambda x, p: ((x - p[0]) ** 2).sum() / 2, None,
            lambda x, p: rows(((axes * x**2).sum() - 1) / 2), None, None, (targets,), len(targets),
        )  # fmt: skip
        return solve_nonlinear(program, torch.zeros(1, 3, dtype=double)).x

    assert gradcheck(solve, targets)
    jacobian = torch.func.jacrev(solve)(targets.detach())
    assert torch.allclose(jacobian[0, :, 0], torch.eye(3, dtype=double))


def test_the_optimal_value_needs_no_linear_system(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "HS71")
    data = numbers(*case.data)[None].requires_grad_()
    found = solve_nonlinear(case.program(data), case.first)

    def refuse(*_: object) -> None:
        raise AssertionError("a linear system was solved")

    monkeypatch.setattr("declarative_cvx.nonconvex.minimization.active_set.solve_symmetric", refuse)
    (gradient,) = torch.autograd.grad(found.value.sum(), data)
    expected = [found.x[0, 2], -found.equality[0, 0], found.inequality[0, 0]]
    assert torch.allclose(gradient[0], torch.stack(expected).detach())


def weak_program(p: Tensor) -> NonlinearProgram:
    """Minimise (x - p)^2 with x >= 0: weakly active at p = 0."""
    return NonlinearProgram(
        1, lambda x, p: (x[0] - p[0]) ** 2, None, lambda x, p: rows(-x[0]), None, None, (p,), len(p)
    )


def test_a_weakly_active_constraint_is_reported() -> None:
    p = numbers(-1, 0, 1).requires_grad_()
    found = solve_nonlinear(weak_program(p), torch.ones(1, 1, dtype=double))
    assert bool(found.solved.all())
    assert found.regular.tolist() == [True, False, True]
    assert found.derivative.weakly_active.tolist() == [False, True, False]
    with pytest.warns(IrregularWarning, match=r"1 element\(s\) of the batch \(1\)"):
        (gradient,) = torch.autograd.grad(found.x.sum(), p)
    assert gradient[[0, 2]].tolist() == [0, 1]
    assert float(gradient[1]) in (0.0, 1.0)
    strict = solve_nonlinear(weak_program(p), torch.ones(1, 1, dtype=double), on_irregular="raise")
    with pytest.raises(IrregularError):
        torch.autograd.grad(strict.x.sum(), p)


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-9])
def test_what_slack_the_minimiser_leaves_does_not_matter(tol: float) -> None:
    p = numbers(-0.01, -1, 0.01, 1).requires_grad_()
    found = solve_nonlinear(weak_program(p), torch.ones(1, 1, dtype=double), InteriorPoint(tol=tol))
    assert found.x[:, 0].tolist() == pytest.approx([0, 0, 0.01, 1], abs=1e-15)
    assert torch.autograd.grad(found.x.sum(), p)[0].tolist() == [0, 0, 1, 1]


def test_dependent_constraints_that_move_together_are_regular_in_x() -> None:
    r = numbers(2.0).requires_grad_()
    program = NonlinearProgram(
        2, lambda x, p: -x.sum(),
        lambda x, p: rows((x**2).sum() - p[0], 3 * (x**2).sum() - 3 * p[0]), None, None, None,
        (r,), 1,
    )  # fmt: skip
    found = solve_nonlinear(program, numbers(1, 0.5)[None])
    assert torch.allclose(found.x, numbers(1, 1))
    (gradient,) = torch.autograd.grad(found.x.sum(), r)
    assert float(gradient) == pytest.approx(0.5)


def test_dependent_constraints_that_move_apart_are_reported() -> None:
    p = numbers(1, 1)[None].requires_grad_()
    program = NonlinearProgram(
        1, lambda x, p: -x[0], None, lambda x, p: x[[0, 0]] - p[0], None, None, (p,), 1
    )
    found = solve_nonlinear(program, torch.zeros(1, 1, dtype=double), on_irregular="ignore")
    (gradient,) = torch.autograd.grad(found.x.sum(), p)
    assert torch.allclose(gradient, numbers(0.5, 0.5))
    assert found.derivative.ambiguous.tolist() == [True]


def test_a_vertex_needs_no_curvature() -> None:
    """A linear program in the plane: H = 0, and the vertex moves with the right-hand sides."""
    A = torch.tensor([[1, 2], [3, 1.0]], dtype=double)
    b = numbers(4, 6)[None].requires_grad_()
    program = NonlinearProgram(
        2, lambda x, p: -x.sum(), None, lambda x, p: A @ x - p[0], None, None, (b,), 1
    )
    found = solve_nonlinear(program, torch.zeros(1, 2, dtype=double))
    assert torch.allclose(found.x[0], torch.linalg.solve(A, b[0]))
    (gradient,) = torch.autograd.grad(found.x[0, 0], b)
    assert torch.allclose(gradient[0], torch.linalg.inv(A)[0])


def test_an_unsolved_element_gets_no_gradient_and_spoils_none() -> None:
    shared = numbers(2.0).requires_grad_()
    limits = numbers(1, 0.1, 3).requires_grad_()
    program = NonlinearProgram(
        1, lambda x, p: p[0] * (x[0] - 2) ** 2 - torch.log(x[0]), None,
        lambda x, p: rows(x[0] - p[1], 0.5 - x[0]), None, None, (shared, limits), 3,
    )  # fmt: skip
    found = solve_nonlinear(program, torch.ones(1, 1, dtype=double))
    assert found.solved.tolist() == [True, False, True]
    gradients = torch.autograd.grad(found.x[found.solved].sum(), (shared, limits))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    assert gradients[1].tolist() == pytest.approx([1, 0, 0])
    whole = torch.autograd.grad(
        solve_nonlinear(program, torch.ones(1, 1, dtype=double)).x.nansum(), shared
    )
    assert torch.allclose(whole[0], gradients[0])


def test_many_variables_by_conjugate_gradients() -> None:
    """Against the same problem's formed Hessian."""
    n = 500
    weight = torch.linspace(1, 10, n, dtype=double)

    def objective(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
        return (weight * (x - p[0]) ** 2).sum() / 2 + ((x[1:] - x[:-1]) ** 4).sum() / 10

    target = torch.sin(torch.arange(n, dtype=double))[None].requires_grad_()
    program = NonlinearProgram(n, objective, None, None, None, None, (target,), 1)
    found = solve_nonlinear(program, torch.zeros(1, n, dtype=double))
    w = torch.cos(torch.arange(n, dtype=double))
    (gradient,) = torch.autograd.grad(found.x[0] @ w, target, create_graph=True)
    hessian = torch.func.hessian(objective)(found.x[0].detach(), (target[0].detach(),))
    expected = weight * torch.linalg.solve(hessian, w)
    assert torch.allclose(gradient[0], expected, rtol=1e-9)
    assert float(found.derivative.residual.max()) < 1e-12
    (second,) = torch.autograd.grad(gradient[0, 3], target)
    step = torch.zeros_like(target).detach()
    step[0, 5] = 1e-5
    sides = []
    for sign in (1, -1):
        moved = (target.detach() + sign * step).requires_grad_()
        x = solve_nonlinear(
            NonlinearProgram(n, objective, None, None, None, None, (moved,), 1), found.x.detach()
        ).x
        sides.append(torch.autograd.grad(x[0] @ w, moved)[0][0, 3])
    assert float(second[0, 5]) == pytest.approx(float(sides[0] - sides[1]) / 2e-5, abs=1e-7)


class LargestTensor(TorchDispatchMode):
    """Counts the entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.entries = max([self.entries, *made])
        return out


def test_memory_is_linear_in_many_variables() -> None:
    """No matrix is formed on the way forward or back: one of 400 x 400 would be seen."""
    n = 400

    def objective(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
        return (x - p[0]).square().sum() + ((x[1:] - x[:-1]) ** 4).sum() / 10

    target = torch.sin(torch.arange(n, dtype=double))[None].requires_grad_()
    program = NonlinearProgram(n, objective, None, None, None, None, (target,), 1)
    with LargestTensor() as watched:
        found = solve_nonlinear(program, torch.zeros(1, n, dtype=double))
        torch.autograd.grad(found.x.sum(), target)
    assert bool(found.solved.all())
    assert n <= watched.entries <= 20 * n


def test_rosenbrock_shared_and_own_parameters() -> None:
    """The minimum is at p: x_i = 1 whatever the weight, and moves with a shift of its own."""
    weight, shift = numbers(100.0).requires_grad_(), torch.zeros(3, 5, dtype=double)
    shift.requires_grad_()
    program = NonlinearProgram(
        5, lambda x, p: banana(x - p[1], p), None, None, None, None, (weight, shift), 3
    )
    found = solve_nonlinear(program, 0.8 * torch.ones(3, 5, dtype=double))
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=double)
    by_weight, by_shift = torch.autograd.grad((found.x * w).sum(), (weight, shift))
    assert float(by_weight.abs()) < 1e-12
    assert torch.allclose(by_shift, w, atol=1e-10)


def test_single_precision_parameters_get_single_precision_gradients() -> None:
    target = torch.tensor([[1.0, 2.0, 2.0]], requires_grad=True)
    found = solve_nonlinear(sphere_program(target), torch.ones(1, 3))
    (gradient,) = torch.autograd.grad(found.x[0, 0], target)
    assert gradient.dtype == torch.float32
    assert torch.allclose(
        gradient[0].double(), alignment(target[0].detach().double())[0], atol=1e-7
    )
