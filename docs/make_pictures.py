"""Draw the pictures of docs/gradients.md into docs/pictures/: ``python docs/make_pictures.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cvxpy as cp
import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

import declarative_cvx as dcx

mpl.use("Agg")
import matplotlib.pyplot as plt

PICTURES = Path(__file__).resolve().parent / "pictures"
SIZE = (9.5, 3.6)
NOTHING = 1e-16  # where an error of zero is drawn


def slopes(layer: dcx.DeclarativeLayer, p: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's single output, and its derivative, for each value of a scalar parameter."""
    p = p.clone().requires_grad_()
    (x,) = layer(p)
    (slope,) = torch.autograd.grad(x.sum(), p)
    return x.detach(), slope


def save(figure: Any, name: str) -> None:
    figure.savefig(PICTURES / f"{name}.png", dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------- weakly active


def nearest() -> tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]:
    """The nonnegative number nearest to p."""
    x, p = cp.Variable(), cp.Parameter()
    return cp.Problem(cp.Minimize(cp.square(x - p)), [x >= 0]), [p], [x]


def draw_weakly_active() -> None:
    """A constraint becomes active: solution, multiplier and derivative on both sides."""
    problem, parameters, variables = nearest()
    dual = problem.constraints[0].dual_variables[0]
    layer = dcx.DeclarativeLayer(problem, parameters, [*variables, dual], on_irregular="ignore")
    single = dcx.DeclarativeLayer(problem, parameters, variables, on_irregular="ignore")
    p = torch.linspace(-1, 1, 41, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE, layout="constrained")
    x, multiplier = layer(p)
    left.plot(p, x, label="solution")
    left.plot(p, multiplier, "--", color="tab:orange", label="multiplier of x >= 0")
    left.plot(0, 0, "o", color="black", label="both are zero: weakly active")
    left.set(xlabel="parameter p", title="nearest nonnegative number to p")
    slope = slopes(single, p)[1]
    for side in (p < 0, p > 0):
        right.plot(p[side], slope[side], color="tab:blue")
    at_zero = float(slopes(single, zero)[1])
    right.plot(
        0, at_zero, "o", color="black", label=f"returned at p = 0: {at_zero:g}, with a warning"
    )
    right.plot(0, 1 - at_zero, "o", mfc="none", mec="black", label="the other side's")
    right.set(xlabel="parameter p", title="derivative of the solution", ylim=(-0.3, 1.5))
    left.legend(frameon=False)
    right.legend(frameon=False, loc="upper left")
    save(figure, "weakly_active")


# ------------------------------------------------------------------------------ loose solvers


def sparse_fit() -> tuple[cp.Problem, cp.Parameter, cp.Variable, np.ndarray]:
    """A second-order cone program: a fit with few coefficients."""
    random = np.random.default_rng(0)
    A = random.normal(size=(20, 10))
    x, b = cp.Variable(10), cp.Parameter(20)
    problem = cp.Problem(cp.Minimize(cp.norm(A @ x - b) + 0.5 * cp.norm1(x)))
    return problem, b, x, random.normal(size=20)


def gradient_of_layer(solver: dcx.Backend | str) -> np.ndarray:
    """Of the sum of the coefficients."""
    problem, b, x, value = sparse_fit()
    layer = dcx.DeclarativeLayer(problem, [b], [x], solver=solver)
    given = torch.tensor(value, requires_grad=True)
    (found,) = layer(given)
    (gradient,) = torch.autograd.grad(found.sum(), given)
    return gradient.numpy()


def gradient_of_cvxpy(tol: float) -> np.ndarray:
    """Likewise by CVXPY's own derivative: diffcp at the solution that SCS has found."""
    problem, b, x, value = sparse_fit()
    b.value = value
    problem.solve(solver=cp.DIFFCP, requires_grad=True, eps=tol)
    x.gradient = np.ones(10)
    problem.backward()
    return b.gradient


def loose_solver_errors(tols: np.ndarray) -> dict[str, list[float]]:
    """Relative errors of gradients by the solver's tolerance."""
    ways = {
        "SCS and diffcp, as they come (CVXPY)": gradient_of_cvxpy,
        "SCS, refined": lambda tol: gradient_of_layer(dcx.SCS(tol=tol)),
        "Clarabel, refined": lambda tol: gradient_of_layer(dcx.Clarabel(tol=tol)),
    }
    right = gradient_of_layer(dcx.Moreau(tol=1e-10))
    size = np.abs(right).max()
    return {
        name: [float(np.abs(way(tol) - right).max() / size) for tol in tols]
        for name, way in ways.items()
    }


def draw_loose_solvers() -> None:
    """Gradient error against the tolerance of the solver."""
    tols = 10.0 ** np.arange(-2, -11, -1)
    figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    marks = ("X-", "o-", "s--")
    for (name, errors), mark in zip(loose_solver_errors(tols).items(), marks, strict=True):
        print(f"{name}: {' '.join(f'{error:.0e}' for error in errors)}")
        axes.plot(tols, np.maximum(errors, NOTHING), mark, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tolerance that the solver stops at")
    axes.set(ylabel="relative error of the gradient", ylim=(NOTHING / 3, 10))
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, "loose_solvers")


# --------------------------------------------------------------------------------- two minima


def two_valleys(**options: Any) -> dcx.DeclarativeLayer:
    """A quartic with two minima, tilted by p; started on the right."""
    x, p = cp.Variable(), cp.Parameter()
    x.value = 1.0
    x.sample_bounds = (-2, 2)  # where restarts are drawn
    objective = cp.Minimize(cp.square(cp.square(x) - 1) + p * x)
    return dcx.DeclarativeLayer(cp.Problem(objective), [p], [x], **options)


def followed(p: Tensor) -> Tensor:
    """The minimum for one p after the other, each started from the one before."""
    layer = two_valleys(warm_start=True)
    return torch.stack([layer(value)[0] for value in p])


def draw_two_valleys() -> None:
    """Where a branch is kept, and where it is left for the lowest minimum."""
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE, layout="constrained")
    x = np.linspace(-1.6, 1.6, 200)
    for tilt in (-0.5, 0.0, 0.5):
        left.plot(x, (x**2 - 1) ** 2 + tilt * x, label=f"p = {tilt:g}")
    left.set(xlabel="x", title="objective", ylim=(-0.8, 2))
    left.legend(frameon=False, loc="upper center")
    p = torch.linspace(-1, 2, 61, dtype=torch.float64)
    (lowest,) = two_valleys(restarts=8)(p)
    kept = followed(p)
    print("kept until p =", float(p[kept > 0].max()), "lowest jumps after p =",
          float(p[lowest > 0].max()))  # fmt: skip
    right.plot(p, kept, ".", color="tab:green", label="warm_start=True, p rising: keeps its valley")
    for side, label in ((lowest > 0, None), (lowest < 0, "restarts=8: the lowest minimum")):
        right.plot(p[side], lowest[side], color="tab:purple", label=label)
    right.set(xlabel="parameter p", title="solution", ylim=(-1.5, 2.0))
    right.legend(frameon=False, loc="upper right", fontsize=9)
    save(figure, "two_valleys")


def main() -> None:
    """Draw all."""
    PICTURES.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    draw_weakly_active()
    draw_loose_solvers()
    draw_two_valleys()


if __name__ == "__main__":
    main()
