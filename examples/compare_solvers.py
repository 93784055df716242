"""Which solver? A portfolio in daily units, where several popular defaults are visibly wrong.

Each morning a portfolio w of n assets is chosen by

    maximize over w   r'w - 4 ||F'w||^2    subject to   sum w = 1,  w >= 0,

where r are the expected returns of the day, of size 1e-4, and F F' is their covariance, of size
1e-4. That is how such numbers come when a year is counted in days. A tolerance of 1e-4, harmless
in other units, is then as large as the data: the objective hardly differs between good and bad
portfolios.

This program solves 16 days by CVXPY with tolerances that solvers are often used with, their own
defaults among them, and measures how far the weights are off. All answers are called "optimal".
Then `declarative_cvx.compare` does the same days with the same solvers as they come
(``refine=False``) and refined, checks every answer and gradient, times them, and names the fastest
way that is right.

What one sees: SCS at its own 1e-4 has 55 % of the capital in the wrong assets on the worst day and
2 % on a median one, OSQP at its own 1e-3 up to 1 %, and interior-point solvers at 1e-8 up to 0.2 %.
As they come, the library takes hardly one of these answers for a solution (INACCURATE in the
table), and rightly: Clarabel's few that pass, with residuals of 1e-7, have weights off by 0.4 % and
gradients off altogether. Refined, all are right to 1e-14, from whatever start, and the gradients
with them. The derivative of the package diffcp, which comes with the solver of that name, is off by
2 % even at exact solutions, and reported as inaccurate.

Run it with ``python examples/compare_solvers.py``, or from the command line of the library:
``declarative-cvx compare examples/compare_solvers.py:portfolio``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cvxpy as cp
import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import declarative_cvx as dcx

mpl.use("Agg")
import matplotlib.pyplot as plt

ASSETS = 20
DAYS = 16
AVERSION = 4.0  # to risk
BARS = 8  # assets in the picture
NOTHING = 1e-17  # where an error of zero is drawn

Problem = tuple[cp.Problem, list[cp.Parameter], list[np.ndarray]]


def portfolio(assets: int = ASSETS, days: int = DAYS, seed: int = 0) -> Problem:
    """Mean and variance in daily units: a problem, its parameters and their values."""
    random = np.random.default_rng(seed)
    market = 1e-2 * random.normal(size=(assets, 3))
    factors = np.hstack([market, np.diag(5e-3 + 5e-3 * random.random(assets))])
    w = cp.Variable(assets, name="w")
    r = cp.Parameter(assets, name="r")
    gain = r @ w - AVERSION * cp.sum_squares(factors.T @ w)
    problem = cp.Problem(cp.Maximize(gain), [cp.sum(w) == 1, w >= 0])
    return problem, [r], [1e-4 * random.normal(size=(days, assets))]


# ------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """A solver and its tolerance, for CVXPY and for this library.

    Attributes
    ----------
    name : str
    cvxpy : mapping
        Arguments of ``cvxpy.Problem.solve``.
    backend : Backend
    """

    name: str
    cvxpy: Mapping[str, Any]
    backend: dcx.Backend


def settings() -> list[Setting]:
    """Tolerances that are in wide use."""
    loose = {"eps_abs": 1e-3, "eps_rel": 1e-3, "polishing": False}
    return [
        Setting("SCS 1e-4, its own", {"solver": cp.SCS, "eps": 1e-4}, dcx.SCS(tol=1e-4)),
        Setting("SCS 1e-5, CVXPY's", {"solver": cp.SCS, "eps": 1e-5}, dcx.SCS(tol=1e-5)),
        Setting("OSQP 1e-3, its own", {"solver": cp.OSQP, **loose}, dcx.OSQP(tol=1e-3)),
        Setting("OSQP 1e-5, CVXPY's", {"solver": cp.OSQP}, dcx.OSQP(tol=1e-5)),
        Setting("ECOS 1e-8", {"solver": cp.ECOS}, dcx.ECOS(tol=1e-8)),
        Setting("Clarabel 1e-8", {"solver": cp.CLARABEL}, dcx.Clarabel(tol=1e-8)),
        Setting("diffcp 1e-8", {"solver": cp.DIFFCP, "eps": 1e-8}, dcx.DIFFCP(tol=1e-8)),
    ]


# -------------------------------------------------------------------------------- what CVXPY says


@dataclass(frozen=True)
class Plain:
    """What CVXPY returns with a setting, a row a day.

    Attributes
    ----------
    weights : ndarray, shape (days, assets)
    statuses : list of str
    """

    weights: np.ndarray
    statuses: list[str]

    def misplaced(self, right: np.ndarray) -> np.ndarray:
        """Share of the capital that is not where it ought to be, shape (days,)."""
        return np.abs(self.weights - right).sum(1) / 2


def solve_plainly(given: Problem, setting: Setting) -> Plain:
    """One day after the other, as CVXPY's users do."""
    problem, (returns,), (values,) = given
    (w,) = problem.variables()
    weights, statuses = [], []
    for day in values:
        returns.value = day
        problem.solve(**setting.cvxpy)
        weights.append(w.value)
        statuses.append(problem.status)
    return Plain(np.array(weights), statuses)


def right_weights(given: Problem) -> np.ndarray:
    """The library's refined solution, whose residuals it has verified: (days, assets)."""
    problem, parameters, values = given
    layer = dcx.DeclarativeLayer(problem, parameters, problem.variables())
    (weights,) = layer(torch.as_tensor(values[0]))
    return weights.numpy()


def table_of(plain: Mapping[str, Plain], right: np.ndarray) -> Table:
    """How far CVXPY's answers are off."""
    table = Table(title=f"{len(right)} days by CVXPY: capital in the wrong place")
    for heading in ("solver, tolerance", "says"):
        table.add_column(heading)
    for heading in ("median day", "worst day"):
        table.add_column(heading, justify="right")
    for name, found in plain.items():
        share = 100 * found.misplaced(right)
        words = ", ".join(sorted(set(found.statuses)))
        table.add_row(name, words, f"{np.median(share):.2g} %", f"{share.max():.2g} %")
    return table


# ------------------------------------------------------------------------------------- comparison


def compare(given: Problem, listed: Sequence[Setting], repeats: int) -> dcx.Comparison:
    """The same solvers as they come and refined, and the library's own choice."""
    problem, parameters, values = given
    refined = [setting.backend for setting in listed]
    solvers = [
        "auto",
        *refined,
        *(replace(backend, refine=False) for backend in refined),
    ]
    found = dcx.compare(
        problem, parameters, values, solvers=solvers, derivatives=["auto"], repeats=repeats
    )
    assert isinstance(found, dcx.Comparison)
    return found


def row_of(found: dcx.Comparison, solver: object) -> Any:
    """The comparison's row of a solver."""
    (row,) = [row for row in found.rows if row.candidate.solver == solver]
    return row


# ---------------------------------------------------------------------------------------- picture


def plot(
    listed: Sequence[Setting],
    plain: Mapping[str, Plain],
    right: np.ndarray,
    found: dcx.Comparison,
    path: Path,
) -> None:
    """Draw the portfolio of the worst day, and the errors before and after refinement."""
    figure, (left, side) = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    worst = max(plain, key=lambda name: plain[name].misplaced(right).max())
    _draw_day(left, worst, plain[worst], right)
    _draw_errors(side, listed, plain, right, found)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_day(axes: Any, name: str, found: Plain, right: np.ndarray) -> None:
    day = int(found.misplaced(right).argmax())
    weights = found.weights[day]
    shown = np.maximum(weights, right[day]).argsort()[::-1][:BARS]
    at = np.arange(len(shown))
    axes.bar(at - 0.2, 100 * right[day][shown], 0.4, color="tab:green", label="right")
    axes.bar(at + 0.2, 100 * weights[shown], 0.4, color="tab:red", label=f"{name} default")
    axes.set(xticks=at, xticklabels=[f"{i}" for i in shown], xlabel="asset")
    axes.set(ylabel="share of the capital (%)", title=f"Day {day}: both are called optimal")
    axes.legend(frameon=False)


def _draw_errors(
    axes: Any,
    listed: Sequence[Setting],
    plain: Mapping[str, Plain],
    right: np.ndarray,
    found: dcx.Comparison,
) -> None:
    names = [setting.name for setting in listed]
    rows = [row_of(found, setting.backend) for setting in listed]
    errors = {
        "weights, from CVXPY": [plain[n].misplaced(right).max() for n in names],
        "weights, refined": [row.solution_error for row in rows],
        "gradients after it": [row.gradient_error for row in rows],
    }
    styles = (("tab:red", "X"), ("tab:green", "o"), ("tab:blue", "|"))
    at = np.arange(len(names))[::-1]
    for (label, values), (color, marker) in zip(errors.items(), styles, strict=True):
        axes.plot(np.maximum(values, NOTHING), at, marker, color=color, ms=9, mew=2, label=label)
    axes.set(yticks=at, yticklabels=names, xscale="log", xlim=(NOTHING / 3, 3))
    axes.set(xlabel="largest error of a day (none: at the left edge)")
    axes.set(title=f"{len(right)} days: as they come, and refined")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="center", fontsize=9)


# ---------------------------------------------------------------------------------------- program

INTRODUCTION = (
    f"A portfolio of {ASSETS} assets on {DAYS} days, with returns and variances of 1e-4: a year in "
    "daily units. First by CVXPY, with tolerances in wide use, as if their answers were right.\n"
)
LEGEND = (
    "A row in red is not right to 1e-6 on every day. INACCURATE: the answer fails the library's "
    "own check of the optimality conditions, and is not passed on. Derivatives are the library's, "
    "with the solver diffcp that of diffcp."
)


@dataclass(frozen=True)
class Report:
    """Everything the program found.

    Attributes
    ----------
    right : ndarray, shape (days, assets)
    plain : dict of str to Plain
    comparison : Comparison
    """

    right: np.ndarray
    plain: dict[str, Plain]
    comparison: dcx.Comparison


def run(output: Path, repeats: int = 3) -> Report:
    """Solve, compare, draw; print what is seen on the way."""
    console = Console(highlight=False)
    console.print(INTRODUCTION)
    given, listed = portfolio(), settings()
    right = right_weights(given)
    plain = {s.name: solve_plainly(portfolio(), s) for s in tqdm(listed, desc="CVXPY")}
    console.print(table_of(plain, right))
    found = compare(given, listed, repeats)
    console.print(found.table(console.width), LEGEND)
    console.print(f"\n[bold]best()[/bold], the fastest that is right: {found.best()!r}")
    plot(listed, plain, right, found, output)
    console.print(f"A day's portfolio, and all errors: see [bold]{output}[/bold]")
    return Report(right, plain, found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Compare solvers on a portfolio in daily units.")
    parser.add_argument("--output", type=Path, default=Path("compare_solvers.png"), help="picture")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # enough for problems this small, and steady on a busy machine
    run(options.output, options.repeats)


if __name__ == "__main__":
    main()
