"""Exact solutions and gradients by routes that the library takes no part in.

- `closed`: a formula in torch, differentiated by autograd.
- `quadratic`: the active set of a quadratic or linear program, by a solver; then one linear system
  for the solution and one for the gradient, and a proof that the active set was right.
- `stationary`: equations that hold at the solution of the original problem, polished by Newton's
  method and differentiated by the implicit function theorem.
- `differences`: a closed form in NumPy and central differences of order eight.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import clarabel
import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from collection.problem import Built, Exact, Oracle, Values

# Relative cut-off below which a singular value stands for a freedom that the outputs do not have.
GAUGE = 1e-10


def tensors(values: Sequence[Any]) -> list[Tensor]:
    """Leaves of a graph."""
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def _loss(outputs: Sequence[Tensor], weights: Values) -> Tensor:
    parts = [(torch.as_tensor(w) * out).sum() for w, out in zip(weights, outputs, strict=True)]
    return torch.stack(parts).sum()


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Values:
    if not parameters:
        return ()
    if not loss.requires_grad:
        return tuple(np.zeros(p.shape) for p in parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return tuple(
        np.zeros(p.shape) if g is None else g.numpy()
        for p, g in zip(parameters, found, strict=True)
    )


def _numbers(outputs: Sequence[Tensor]) -> Values:
    return tuple(out.detach().numpy() for out in outputs)


def closed(answer: Callable[..., Sequence[Tensor]]) -> Oracle:
    """From a formula for the outputs."""

    def oracle(values: Values, weights: Values) -> Exact:
        parameters = tensors(values)
        outputs = answer(*parameters)
        return Exact(_numbers(outputs), _gradients(_loss(outputs, weights), parameters))

    return oracle


def kink(one: Callable[..., Sequence[Tensor]], other: Callable[..., Sequence[Tensor]]) -> Oracle:
    """From the formulas on the two sides of a kink."""

    def oracle(values: Values, weights: Values) -> Exact:
        first, second = closed(one)(values, weights), closed(other)(values, weights)
        for a, b in zip(first.outputs, second.outputs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)
        return Exact(first.outputs, first.gradients, second.gradients)

    return oracle


# Linear and quadratic programs


@dataclass
class Form:
    """1/2 x'Px + q'x subject to A x = b, G x <= h; missing parts are empty."""

    q: Tensor
    P: Tensor | None = None
    A: Tensor | None = None
    b: Tensor | None = None
    G: Tensor | None = None
    h: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.q)

        def default(value: Any, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64) if value is None else _double(value)

        self.P = default(self.P, n, n)
        self.A, self.b = default(self.A, 0, n), default(self.b, 0)
        self.G, self.h = default(self.G, 0, n), default(self.h, 0)

    def numbers(self) -> Values:
        return tuple(
            part.detach().numpy() for part in (self.P, self.q, self.A, self.b, self.G, self.h)
        )


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def active_rows(form: Form) -> np.ndarray:
    """Inequalities that are active at the solution, by an interior-point solver."""
    P, q, A, b, G, h = form.numbers()
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    solution = clarabel.DefaultSolver(
        sp.csc_matrix(np.triu(P)),
        q,
        sp.csc_matrix(np.vstack([A, G])),
        np.concatenate([b, h]),
        [clarabel.ZeroConeT(len(b)), clarabel.NonnegativeConeT(len(h))],
        settings,
    ).solve()
    z, s = (np.asarray(v)[len(b) :] for v in (solution.z, solution.s))
    return np.where(z / max(z.max(initial=0), 1e-300) > s / max(s.max(initial=0), 1e-300))[0]


def _solver(K: np.ndarray, dependent: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Solve with a symmetric matrix, refined twice."""
    if dependent:
        U, sizes, V = np.linalg.svd(K)
        inverse = np.where(sizes > GAUGE * sizes[0], 1 / np.maximum(sizes, 1e-300), 0)
        factor = lambda r: V.T @ (inverse * (U.T @ r))  # noqa: E731
    else:
        factor = splu(sp.csc_matrix(K)).solve

    def solve(rhs: np.ndarray) -> np.ndarray:
        x = factor(rhs)
        for _ in range(2):
            x = x + factor(rhs - K @ x)
        assert np.abs(K @ x - rhs).max() <= 1e-11 * max(
            np.abs(rhs).max(), (np.abs(K) @ np.abs(x)).max(), 1e-300
        )
        return x

    return solve


def quadratic(
    form: Callable[..., Form],
    outputs: Callable[..., Sequence[Tensor]] | None = None,
    *,
    dependent: bool = False,
    scales: float = 1.0,
) -> Oracle:
    """From the data of a quadratic program.

    Parameters
    ----------
    form : callable
        From parameters to `Form`.
    outputs : callable, optional
        From (x, equality multipliers, inequality multipliers) to the outputs; x alone if missing.
    dependent : bool
        Whether active rows may depend on each other. Multipliers are then no outputs.
    scales : float
        Size of the right-hand sides, to which margins are relative.
    """
    read = outputs or (lambda x, nu, lam: (x,))

    def oracle(values: Values, weights: Values) -> Exact:
        parameters = tensors(values)
        data = form(*parameters)
        P, q, A, b, G, h = data.numbers()
        n, p = len(q), len(b)
        active = active_rows(data)
        Ga = G[active]
        rows = np.vstack([A, Ga])
        K = np.block([[P, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
        solve = _solver(K, dependent)
        w = solve(np.concatenate([-q, b, h[active]]))
        x, nu = w[:n], w[n : n + p]
        lam = np.zeros(len(h))
        lam[active] = w[n + p :]
        inactive = np.setdiff1d(np.arange(len(h)), active)
        assert (G[inactive] @ x < h[inactive] - 1e-7 * scales).all(), "wrong active set"
        if not dependent:
            assert (lam[active] > 1e-9).all(), "not strictly complementary"
        tx, tnu, tlam = tensors([x, nu, lam])
        direct = _loss(read(tx, tnu, tlam), weights)
        seeds = _gradients(direct, [tx, tnu, tlam])
        adjoint = solve(np.concatenate([seeds[0], seeds[1], seeds[2][active]]))
        cx, cnu, clam = (_double(v) for v in (x, nu, lam))
        dx, dnu, dlam = (_double(v) for v in np.split(adjoint, [n, n + p]))
        residual = (
            dx @ (data.P @ cx + data.q + data.A.T @ cnu + data.G.T @ clam)
            + dnu @ (data.A @ cx - data.b)
            + dlam @ (data.G[active] @ cx - data.h[active])
        )
        gradients = _gradients(-residual, parameters)
        return Exact(_numbers(read(cx, cnu, clam)), gradients)

    return oracle


# Smooth equations


@dataclass
class System:
    """Equations that hold at a solution.

    Attributes
    ----------
    start : array
        Unknowns, nearly right.
    equations : callable
        From the unknowns and the parameters to what must vanish.
    outputs : callable
        From the unknowns and the parameters to the outputs.
    gauge : bool
        Whether the unknowns have freedoms that the outputs do not see.
    holds : callable
        Whether the inequalities of the optimality conditions hold at the unknowns, strictly.
    """

    start: np.ndarray
    equations: Callable[..., Tensor]
    outputs: Callable[..., Sequence[Tensor]]
    gauge: bool = False
    holds: Callable[[np.ndarray], bool] = field(default=lambda unknowns: True)


def stationary(setup: Callable[..., System], build: Callable[[], Built] | None = None) -> Oracle:
    """From the equations of a solution, near the solution that a solver finds.

    Parameters
    ----------
    setup : callable
        From parameter values, followed by the rough solution of the problem if `build` is given,
        to `System`.
    build : callable, optional
        The problem that is solved for a start.
    """

    def oracle(values: Values, weights: Values) -> Exact:
        rough = solved(build, values) if build else ()
        system = setup(*values, *rough)
        fixed = [_double(value) for value in values]
        unknowns = _newton(system, fixed)
        assert system.holds(unknowns), "the inequalities of the optimality conditions"
        z, *parameters = tensors([unknowns, *values])
        outputs = system.outputs(z, *parameters)
        loss = _loss(outputs, weights)
        (seed,) = _gradients(loss, [z])
        direct = _gradients(loss, parameters)
        J = _jacobian(system, unknowns, fixed)
        adjoint = np.linalg.lstsq(J.T, seed, rcond=GAUGE)[0]
        assert np.abs(J.T @ adjoint - seed).max() <= 1e-10 * np.abs(seed).max()
        product = _double(adjoint) @ system.equations(_double(unknowns), *parameters)
        implicit = _gradients(product, parameters)
        gradients = tuple(a - b for a, b in zip(direct, implicit, strict=True))
        return Exact(_numbers(outputs), gradients)

    return oracle


def _jacobian(system: System, unknowns: np.ndarray, fixed: list[Tensor]) -> np.ndarray:
    return torch.func.jacrev(lambda z: system.equations(z, *fixed))(_double(unknowns)).numpy()


def _newton(system: System, fixed: list[Tensor]) -> np.ndarray:
    z = np.asarray(system.start, dtype=float)
    previous = np.inf
    for _ in range(60):
        residual = system.equations(_double(z), *fixed).numpy()
        J = _jacobian(system, z, fixed)
        if system.gauge:
            step = np.linalg.lstsq(J, residual, rcond=GAUGE)[0]
        else:
            step = np.linalg.solve(J, residual)
        size = np.abs(step).max() / max(np.abs(z).max(), 1e-300)
        if size < 1e-12 and size >= previous / 2:
            break
        z, previous = z - step, size
    assert previous < 1e-10, f"Newton's method stopped with a step of {previous:.1e}"
    assert np.abs(residual).max() < 1e-9, f"and with a residual of {np.abs(residual).max():.1e}"
    return z


def solved(build: Callable[[], Built], values: Values) -> list[np.ndarray]:
    """Variables of a problem, by a solver; roughly right."""
    problem, parameters, variables = build()
    for parameter, value in zip(parameters, values, strict=True):
        parameter.save_value(value)
    gp = not problem.is_dcp()
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        problem.solve(solver=cp.CLARABEL, gp=gp, **tolerances)
    return [np.asarray(variable.value) for variable in variables]


# Differences


def differences(answer: Callable[..., Sequence[Any]], directions: Sequence[Any]) -> Oracle:
    """From a formula in NumPy.

    Parameters
    ----------
    answer : callable
        From parameter values to the outputs.
    directions : sequence
        For each parameter a function from its shape to the directions that it can move in, each
        with one unit of size one, mutually orthogonal.
    """
    stencil = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}

    def oracle(values: Values, weights: Values) -> Exact:
        def loss(moved: list[np.ndarray]) -> float:
            parts = zip(weights, answer(*moved), strict=True)
            return sum(float((w * np.asarray(out)).sum()) for w, out in parts)

        def slope(position: int, direction: np.ndarray, step: float) -> float:
            total = 0.0
            for times, factor in stencil.items():
                ahead, behind = list(values), list(values)
                ahead[position] = values[position] + times * step * direction
                behind[position] = values[position] - times * step * direction
                total += factor * (loss(ahead) - loss(behind))
            return total / step

        def steady_slope(position: int, direction: np.ndarray) -> float:
            # a kink within reach of the stencil shows as a slope that depends on the step
            found = [slope(position, direction, step) for step in (2e-3, 1e-3, 5e-4, 2e-4, 1e-4)]
            for first, second in itertools.pairwise(found):
                if abs(first - second) <= 1e-9 * max(abs(first), 1e-3):
                    return first
            raise AssertionError("a kink is too near")

        gradients = []
        for position, value in enumerate(values):
            gradient = np.zeros(value.shape)
            for direction in directions[position](value.shape):
                gradient += steady_slope(position, direction) * direction / (direction**2).sum()
            gradients.append(gradient)
        outputs = tuple(np.asarray(out, dtype=float) for out in answer(*values))
        return Exact(outputs, tuple(gradients))

    return oracle


def every_entry(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Directions of a parameter without attributes."""
    basis = np.eye(int(np.prod(shape)))
    return [row.reshape(shape) for row in basis]


def symmetric_pairs(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Directions of a symmetric parameter."""
    n = shape[0]
    out = []
    for i in range(n):
        for j in range(i + 1):
            direction = np.zeros(shape)
            direction[i, j] = direction[j, i] = 1.0
            out.append(direction)
    return out
