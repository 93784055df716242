"""A look at what the library does, in a few seconds."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from rich.console import Console

from declarative_cvx.atoms import welsch
from declarative_cvx.comparison import Comparison, compare
from declarative_cvx.layer import DeclarativeLayer


def portfolio(
    assets: int = 12, days: int = 16
) -> tuple[cp.Problem, list[cp.Parameter], list[np.ndarray]]:
    """A mean-variance portfolio in daily units: returns of 1e-3, variances of 1e-4."""
    random = np.random.default_rng(0)
    factors = 1e-2 * random.normal(size=(assets, 3))
    root = np.hstack([factors, np.diag(5e-3 + 5e-3 * random.random(assets))])
    weights = cp.Variable(assets, name="weights")
    returns = cp.Parameter(assets, name="returns")
    risk = cp.sum_squares(root.T @ weights)
    problem = cp.Problem(
        cp.Maximize(returns @ weights - 4 * risk), [cp.sum(weights) == 1, weights >= 0]
    )
    return problem, [returns], [5e-4 * random.normal(size=(days, assets))]


def run(console: Console) -> Comparison:
    """Differentiate a convex and a nonconvex problem, then compare solvers on the convex one."""
    problem, parameters, values = portfolio()
    layer = DeclarativeLayer(problem, parameters, problem.variables())
    returns = torch.tensor(values[0], requires_grad=True)
    solution = layer.solve(returns)
    held = (solution.variables[0] > 1e-9).sum(1).double().mean()
    (slope,) = torch.autograd.grad(solution.value.sum(), returns)
    console.print(f"[bold]Convex[/bold]: {layer.spec.verdict.name}, {solution}")
    difference = float((slope - solution.variables[0]).detach().abs().max())
    console.print(
        f"  {len(returns)} portfolios hold {held:.1f} assets on average; the gradient of the "
        f"optimal value is the portfolio, to {difference:.0e}."
    )
    u, x = cp.Variable(name="u"), cp.Parameter(9, name="x")
    pool = DeclarativeLayer(cp.Problem(cp.Minimize(cp.sum(welsch(u - x, 1.0)))), [x], [u])
    points = torch.tensor([*torch.linspace(-1, 1, 7), 40.0, 50.0], dtype=torch.float64)
    points.requires_grad_()
    (centre,) = pool(points)
    (share,) = torch.autograd.grad(centre, points)
    console.print(f"[bold]Not convex[/bold]: {pool.spec.reason}")
    console.print(
        f"  The robust mean of seven points about 0 and outliers at 40 and 50 is {centre:.4f}; "
        f"the outliers' share in its gradient is {float(share[-2:].abs().sum()):.0e}."
    )
    console.print("[bold]Solvers[/bold] on the portfolio, as they come and refined:")
    found = compare(problem, parameters, values, derivatives=["implicit"], repeats=3)
    assert isinstance(found, Comparison)
    return found
