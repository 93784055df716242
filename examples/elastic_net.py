"""Tune the two weights of an elastic net by gradient descent through its solution.

The elastic net fits m rows of features X to a target y by solving

    minimize over w   1/2m ||X w - y||^2 + lam1 ||w||_1 + lam2/2 ||w||^2.

How large should lam1 and lam2 be? So that the error on rows that were held out is small. With
the problem as a differentiable layer the gradient of that error with respect to the weights is
one call of ``backward``, and any optimiser of torch can follow it. This program does so on the
diabetes data that come with scikit-learn, compares the outcome with a search over a grid of
weights and with scikit-learn's own elastic net, and then lets every installed solver do the same
work.

Run it with ``python examples/elastic_net.py`` or ``make demo``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cvxpy as cp
import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor
from tqdm import tqdm

import declarative_cvx as dcx
from declarative_cvx.backends import BACKENDS

mpl.use("Agg")
import matplotlib.pyplot as plt

FOLDS = 5
TEST_ROWS = 82  # of 442; the other 360 make five folds of 72
START = (-0.4, 0.7)  # log10 of (lam1, lam2)
GRID = 15
LOG_LAM1 = torch.linspace(-3.0, 0.0, GRID, dtype=torch.float64)
LOG_LAM2 = torch.linspace(-3.0, 1.0, GRID, dtype=torch.float64)
STEPS = 60
STEP_SIZE = 0.1  # in decades
BETAS = (0.7, 0.8)  # short memory: the gradient has no noise
TIMED_RUNS = 3


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Split:
    """A batch of training sets with their held-out rows.

    Features have mean 0 and variance 1, and targets mean 0, over the training rows of their own
    batch element. The intercept of a fit is then 0.

    Attributes
    ----------
    x : Tensor, shape (batch, m, features)
    y : Tensor, shape (batch, m)
    new_x : Tensor, shape (batch, k, features)
    new_y : Tensor, shape (batch, k)
    """

    x: Tensor
    y: Tensor
    new_x: Tensor
    new_y: Tensor

    def compressed(self) -> tuple[Tensor, Tensor]:
        """Square data with the same fit: R (batch, features, features) and z (batch, features).

        ||R w - z||^2 and 1/m ||X w - y||^2 differ by a constant. The layer need not see 288 rows
        where 55 say the same.
        """
        Q, R = torch.linalg.qr(self.x)
        root = math.sqrt(self.x.shape[1])
        return R / root, (Q.mT @ self.y[:, :, None])[:, :, 0] / root

    def errors(self, w: Tensor) -> Tensor:  # (batch, features) -> (batch,)
        """Mean squared error on the held-out rows."""
        return ((self.new_x @ w[:, :, None])[:, :, 0] - self.new_y).square().mean(1)

    def repeat(self, times: int) -> Split:
        """The whole batch, `times` times."""
        return Split(
            self.x.repeat(times, 1, 1),
            self.y.repeat(times, 1),
            self.new_x.repeat(times, 1, 1),
            self.new_y.repeat(times, 1),
        )


def load(seed: int) -> tuple[Split, Split]:
    """Five folds for choosing the weights, and the final split: all their rows against the test.

    The features are the ten of the data and their 45 products; the target is in units of its
    standard deviation, so that an error of 1 is that of always predicting the mean.
    """
    x, y = load_diabetes(return_X_y=True)
    x = PolynomialFeatures(2, interaction_only=True, include_bias=False).fit_transform(x / x.std(0))
    order = np.random.default_rng(seed).permutation(len(y))
    test, rest = order[:TEST_ROWS], order[TEST_ROWS:]
    y = y / y[rest].std()
    parts = np.split(rest, FOLDS)
    folds = [_split(x, y, np.setdiff1d(rest, part), part) for part in parts]
    return _stack(folds), _stack([_split(x, y, rest, test)])


def _split(x: np.ndarray, y: np.ndarray, rows: np.ndarray, new: np.ndarray) -> list[np.ndarray]:
    center, scale, mean = x[rows].mean(0), x[rows].std(0), y[rows].mean()
    return [(x[rows] - center) / scale, y[rows] - mean, (x[new] - center) / scale, y[new] - mean]


def _stack(splits: list[list[np.ndarray]]) -> Split:
    return Split(*(torch.as_tensor(np.stack(arrays)) for arrays in zip(*splits, strict=True)))


# --------------------------------------------------------------------------------------- layer


def elastic_net(
    features: int, solver: str = "auto", on_failure: str = "raise"
) -> dcx.DeclarativeLayer:
    """The elastic net as a layer from (R, z, lam1, lam2) to w."""
    w = cp.Variable(features, name="w")
    R = cp.Parameter((features, features), name="R")
    z = cp.Parameter(features, name="z")
    lam1 = cp.Parameter(nonneg=True, name="lam1")
    lam2 = cp.Parameter(nonneg=True, name="lam2")
    fit = cp.sum_squares(R @ w - z) / 2
    problem = cp.Problem(cp.Minimize(fit + lam1 * cp.norm1(w) + lam2 / 2 * cp.sum_squares(w)))
    return dcx.DeclarativeLayer(
        problem, parameters=[R, z, lam1, lam2], variables=[w], solver=solver, on_failure=on_failure
    )


def fit(layer: dcx.DeclarativeLayer, split: Split, log_weights: Tensor) -> Tensor:
    """Coefficients for each element of a split, at log10 weights (2,) or (batch, 2)."""
    weights = 10**log_weights
    (w,) = layer(*split.compressed(), weights[..., 0], weights[..., 1])
    return w


# ------------------------------------------------------------------------- two ways to tune it


@dataclass(frozen=True)
class Descent:
    """Where gradient descent went: log10 weights (steps, 2) and validation errors (steps,)."""

    log_weights: Tensor
    errors: Tensor
    seconds: float

    @property
    def best(self) -> Tensor:
        """The log10 weights of the smallest error, shape (2,)."""
        return self.log_weights[self.errors.argmin()]


@dataclass(frozen=True)
class Grid:
    """Validation errors (lam1, lam2) over all pairs of `LOG_LAM1` and `LOG_LAM2`."""

    errors: Tensor
    seconds: float

    @property
    def best(self) -> Tensor:
        """The log10 weights of the smallest error, shape (2,)."""
        row, column = divmod(int(self.errors.argmin()), GRID)
        return torch.stack([LOG_LAM1[row], LOG_LAM2[column]])


def descend(layer: dcx.DeclarativeLayer, folds: Split, steps: int) -> Descent:
    """Follow the gradient of the mean validation error of all folds."""
    began = time.perf_counter()
    log_weights = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([log_weights], lr=STEP_SIZE, betas=BETAS)
    path, errors = [], []
    for _ in tqdm(range(steps), desc="gradient descent", unit="step"):
        optimiser.zero_grad()
        error = folds.errors(fit(layer, folds, log_weights)).mean()
        error.backward()
        path.append(log_weights.detach().clone())
        errors.append(error.detach())
        optimiser.step()
    return Descent(torch.stack(path), torch.stack(errors), time.perf_counter() - began)


def search(layer: dcx.DeclarativeLayer, folds: Split) -> Grid:
    """Try every pair of weights; one call solves all folds for one lam1 and every lam2."""
    began = time.perf_counter()
    batch = folds.repeat(GRID)
    rows = []
    for log_lam1 in tqdm(LOG_LAM1, desc="grid search", unit="row"):
        pairs = torch.stack([log_lam1.expand(GRID), LOG_LAM2], 1).repeat_interleave(FOLDS, 0)
        with torch.no_grad():
            errors = batch.errors(fit(layer, batch, pairs))
        rows.append(errors.reshape(GRID, FOLDS).mean(1))
    return Grid(torch.stack(rows), time.perf_counter() - began)


def difference_to_sklearn(
    layer: dcx.DeclarativeLayer, split: Split, log_weights: Tensor
) -> tuple[float, int]:
    """Largest difference of a coefficient to scikit-learn's, and the number of coefficients."""
    lam1, lam2 = (10**log_weights).tolist()
    net = ElasticNet(
        alpha=lam1 + lam2,
        l1_ratio=lam1 / (lam1 + lam2),
        fit_intercept=False,
        tol=1e-12,
        max_iter=100_000,
    )
    ours = fit(layer, split, log_weights).detach().numpy()
    theirs = [net.fit(x, y).coef_ for x, y in zip(split.x.numpy(), split.y.numpy(), strict=True)]
    return float(np.abs(ours - np.stack(theirs)).max()), ours.size


# --------------------------------------------------------------------------------- all solvers


@dataclass(frozen=True)
class Run:
    """One solver's work on the folds: coefficients and gradients, or the reason for none."""

    backend: str
    refused: str = ""
    statuses: str = ""
    seconds: float = math.nan
    residual: float = math.inf
    w: Tensor | None = None  # (batch, features), NaN where not solved
    gradient: Tensor | None = None  # (batch, 2), of the errors with respect to the log10 weights


def run_backend(name: str, split: Split, log_weights: Tensor) -> Run:
    """Solve a batch with one solver and differentiate its validation errors."""
    try:
        return _run_backend(name, split, log_weights)
    except Exception as error:  # a foreign solver may raise anything
        return Run(name, refused=str(error))


def _run_backend(name: str, split: Split, log_weights: Tensor) -> Run:
    layer = elastic_net(split.x.shape[2], name, on_failure="nan")
    weights = log_weights.repeat(len(split.x), 1).requires_grad_()
    lam1, lam2 = (10**weights).unbind(1)
    data = split.compressed()
    seconds = []
    for _ in range(TIMED_RUNS):
        began = time.perf_counter()
        solution = layer.solve(*data, lam1, lam2)
        seconds.append(time.perf_counter() - began)
    (w,) = solution.variables
    solved = solution.cone.solved
    (gradient,) = torch.autograd.grad(split.errors(w)[solved].sum(), weights)
    counts = Counter(status.name for status in solution.status)
    return Run(
        backend=name,
        statuses=", ".join(f"{count} {status}" for status, count in counts.items()),
        seconds=statistics.median(seconds),
        residual=float(solution.residuals.worst.nan_to_num(math.inf).max()),
        w=w.detach(),
        gradient=torch.where(solved[:, None], gradient, torch.nan),
    )


def compare_backends(split: Split, log_weights: Tensor) -> list[Run]:
    """The same batch with every solver of the library, the most accurate answer first."""
    runs = [run_backend(name, split, log_weights) for name in BACKENDS]
    return sorted(runs, key=lambda run: run.residual)


def difference(found: Tensor | None, reference: Tensor | None) -> float:
    """Largest difference where both are numbers, relative to the largest entry; NaN if none."""
    if found is None or reference is None:
        return math.nan
    both = torch.isfinite(found) & torch.isfinite(reference)
    if not both.any():
        return math.nan
    return float((found - reference)[both].abs().max() / reference[both].abs().max())


def table_of(runs: Sequence[Run]) -> Table:
    """Runs as a table for the console; the first one is the reference."""
    table = Table(title=f"The {FOLDS} folds at the weights found, by every solver")
    table.add_column("solver")
    table.add_column("status")
    for heading in ("ms", "largest\nresidual", "solution\ndifference", "gradient\ndifference"):
        table.add_column(heading, justify="right")
    for run in runs:
        if run.refused:
            table.add_row(run.backend, run.refused, "", "", "", "")
            continue
        numbers = [f"{1e3 * run.seconds:.1f}", f"{run.residual:.0e}"]
        if run is runs[0]:
            numbers += ["reference", "reference"]
        else:
            numbers += [f"{difference(run.w, runs[0].w):.0e}"]
            numbers += [f"{difference(run.gradient, runs[0].gradient):.0e}"]
        table.add_row(run.backend, run.statuses, *numbers)
    return table


LEGEND = (
    "Each solver found the coefficients of the same folds, and the library refined what it found, "
    "computed the residual itself and differentiated the result. Differences are relative to the "
    "largest entry of the first row's; the gradient is that of the validation errors with respect "
    f"to the weights. ms: all folds in one call, median of {TIMED_RUNS} on this machine."
)


# ------------------------------------------------------------------------------------- picture


def plot(grid: Grid, descent: Descent, path: Path) -> None:
    """Draw the validation error over the weights, with the way of gradient descent on it."""
    figure, axes = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    lam1, lam2 = 10**LOG_LAM1, 10**LOG_LAM2
    low = float(min(grid.errors.min(), descent.errors.min()))
    levels = low + (1.05 - low) * np.linspace(0, 1, 19) ** 2.2
    filled = axes.contourf(lam1, lam2, grid.errors.T, levels, cmap="viridis_r", extend="both")
    axes.contour(lam1, lam2, grid.errors.T, levels, colors="white", linewidths=0.4, alpha=0.6)
    steps = 10**descent.log_weights
    axes.plot(*steps.T, ".-", color="black", lw=1.2, ms=4, label="gradient descent")
    axes.plot(*steps[0], "o", color="white", mec="black", ms=9, label="its start")
    axes.plot(*10**descent.best, "*", color="gold", mec="black", ms=17, label="its best point")
    axes.plot(*10**grid.best, "s", color="none", mec="red", mew=1.8, ms=10, label="best of grid")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(r"weight of the 1-norm, $\lambda_1$")
    axes.set_ylabel(r"weight of the squared 2-norm, $\lambda_2$")
    axes.set_title(f"Elastic net on the diabetes data, mean of {FOLDS} folds")
    axes.legend(loc="upper left", framealpha=0.95)
    bar = figure.colorbar(filled, ax=axes, format="%.3f")
    bar.set_label("validation error (mean squared; 1 = predicting the mean)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------- program


@dataclass(frozen=True)
class Report:
    """Everything the program found."""

    descent: Descent
    grid: Grid
    test_errors: tuple[float, float]  # at the best of descent and of grid
    sklearn_difference: float
    runs: list[Run]


def run(output: Path, steps: int = STEPS, seed: int = 0) -> Report:
    """Tune, check, compare and draw; print what is seen on the way."""
    console = Console(highlight=False)
    folds, final = load(seed)
    layer = elastic_net(folds.x.shape[2])
    console.print(introduction(folds))
    descent, grid = descend(layer, folds, steps), search(layer, folds)
    with torch.no_grad():
        errors = [final.errors(fit(layer, final, found.best)).item() for found in (descent, grid)]
    console.print(outcome("Gradient descent", steps * FOLDS, descent, errors[0]))
    console.print(outcome("Grid search", GRID**2 * FOLDS, grid, errors[1]))
    gap, count = difference_to_sklearn(layer, folds, descent.best)
    console.print(
        f"\nAs a check, scikit-learn's ElasticNet at the weights that gradient descent found: its "
        f"{count} coefficients differ from the layer's by at most {gap:.0e}.\n"
    )
    runs = compare_backends(folds, descent.best)
    console.print(table_of(runs), LEGEND)
    plot(grid, descent, output)
    console.print(
        f"\nThe validation error over both weights, and the way down: see [bold]{output}[/bold]"
    )
    return Report(descent, grid, (errors[0], errors[1]), gap, runs)


def introduction(folds: Split) -> str:
    """What is going to happen."""
    batch, rows, features = folds.x.shape
    return (
        f"An elastic net predicts the progress of diabetes from {features} features of a patient. "
        "How strongly should its coefficients be penalised? Two weights are to be chosen so that "
        f"the error on patients held out is small: the mean over {batch} folds, each fitted to "
        f"{rows} patients. The {batch} fits are one call of a layer, and the gradient of the "
        "error with respect to the two weights is one call of backward.\n"
    )


def outcome(name: str, fits: int, found: Descent | Grid, test_error: float) -> str:
    """What one way of tuning found."""
    lam1, lam2 = (10**found.best).tolist()
    return (
        f"\n[bold]{name}[/bold]: {fits} fits in {found.seconds:.1f} s. Best weights: lam1 = "
        f"{lam1:.3g}, lam2 = {lam2:.3g}. Validation error {float(found.errors.min()):.4f}; error "
        f"on {TEST_ROWS} patients that took no part, {test_error:.4f}. (Always predicting the "
        "mean has an error of about 1.)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Tune an elastic net through its solution.")
    parser.add_argument("--output", type=Path, default=Path("elastic_net.png"), help="picture")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of gradient descent")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random split")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # enough for matrices this small, and steady on a busy machine
    run(options.output, options.steps, options.seed)


if __name__ == "__main__":
    main()
