"""Classify digits with implicit models, trained with and without backpropagation.

The digits of scikit-learn (8 x 8 pixels, 1797 images) are classified by four models with about as
many parameters:

- an implicit model with no direct path from the pixels to the outputs (D = 0), trained by block
  coordinate descent on the lifted problem with cross-entropy; ||A||_inf <= 0.9;
- the same, fine-tuned by backpropagation from where the descent stopped;
- an implicit model trained by backpropagation (Adam) from random weights;
- a feedforward net with one hidden layer, trained in the same way.

Run it with ``python examples/implicit_digits.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from declarative_cvx.nonconvex.implicit.estimators import ImplicitClassifier
from declarative_cvx.nonconvex.implicit.model import ImplicitModel
from declarative_cvx.nonconvex.implicit.parametrizations import InfinityNorm
from declarative_cvx.nonconvex.implicit.training.blocks import BlockMethod
from declarative_cvx.nonconvex.implicit.training.history import History
from declarative_cvx.nonconvex.implicit.training.penalty_terms import Ridge, RowBall, Zero

mpl.use("Agg")
import matplotlib.pyplot as plt

PIXELS, CLASSES = 64, 10
STATES = 20
KAPPA = 0.9
TRAINING_IMAGES = 1200  # of 1797
SWEEPS = 20
EPOCHS, TUNING, BATCH = 40, 10, 50
STEP_SIZE, TUNING_STEP = 5e-3, 1e-3
PENALTY = (RowBall(KAPPA), Ridge(3.0, "C"), Ridge(0.1, "AB"), Zero("D"))
LAMBDA, MU = 1.0, 1.0

DESCENT, TUNED = "implicit, block coordinate descent", "  then backpropagation"
BACKPROPAGATION, FEEDFORWARD = "implicit, backpropagation", "feedforward, backpropagation"


@dataclass(frozen=True)
class Data:
    """Images (m, 64), from 0 to 1, and digits (m,)."""

    u: Tensor
    digits: Tensor
    test_u: Tensor
    test_digits: Tensor


@dataclass(frozen=True)
class Score:
    """Of one model, in fractions of 1; how long training took, in processor seconds."""

    training: float
    test: float
    parameters: int
    seconds: float


def load(seed: int) -> Data:
    """Images to train with, and others to test with."""
    digits = load_digits()
    images = torch.as_tensor(digits.data) / 16
    labels = torch.as_tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return Data(images[first], labels[first], images[rest], labels[rest])


class NoDirectPath(nn.Module):
    """An implicit model with D = 0."""

    def __init__(self, model: ImplicitModel) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            model.D.zero_()
        model.D.requires_grad_(False)

    def forward(self, u: Tensor) -> Tensor:
        return self.model(u)


def feedforward(parameters: int) -> nn.Module:
    """One hidden layer, as wide as so many parameters allow for."""
    width = round((parameters - CLASSES) / (PIXELS + 1 + CLASSES))
    layers = nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, CLASSES)
    return nn.Sequential(*layers).double()


def train(model: nn.Module, data: Data, epochs: int, step_size: float, name: str) -> None:
    """Adam on the cross-entropy of random batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=step_size)
    steps = -(-len(data.u) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, step_size, epochs * steps)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        for batch in torch.randperm(len(data.u), generator=generator).split(BATCH):
            optimiser.zero_grad()
            functional.cross_entropy(model(data.u[batch]), data.digits[batch]).backward()
            optimiser.step()
            schedule.step()


def descend(data: Data, seed: int, sweeps: int) -> ImplicitClassifier:
    """Block coordinate descent."""
    estimator = ImplicitClassifier(
        STATES,
        penalty=PENALTY,
        lam=LAMBDA,
        mu=MU,
        max_sweeps=sweeps,
        method=BlockMethod(tol=1e-4),
        standardise=False,
        progress=True,
        random_state=seed,
    )
    return estimator.fit(data.u.numpy(), data.digits.numpy())


def score(model: nn.Module, data: Data, seconds: float) -> Score:
    """How many digits a model reads right."""
    with torch.no_grad():
        right = (model(data.u).argmax(1) == data.digits).double().mean()
        test_right = (model(data.test_u).argmax(1) == data.test_digits).double().mean()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Score(float(right), float(test_right), count, seconds)


def compare(seed: int, sweeps: int, epochs: int) -> tuple[dict[str, Score], History]:
    """Train all models, on the same images."""
    data, scores = load(seed), {}
    began = time.process_time()
    estimator = descend(data, seed, sweeps)
    model = NoDirectPath(estimator.model_)
    spent = time.process_time() - began
    scores[DESCENT] = score(model, data, spent)
    parameters = scores[DESCENT].parameters

    torch.manual_seed(seed)
    fresh = ImplicitModel(PIXELS, CLASSES, STATES, "relu", InfinityNorm(KAPPA), dtype=torch.float64)
    plans = (
        (TUNED, model, min(TUNING, epochs), TUNING_STEP, spent),
        (BACKPROPAGATION, NoDirectPath(fresh), epochs, STEP_SIZE, 0.0),
        (FEEDFORWARD, feedforward(parameters), epochs, STEP_SIZE, 0.0),
    )
    for name, network, rounds, step_size, before in plans:
        began = time.process_time()
        train(network, data, rounds, step_size, name.strip())
        scores[name] = score(network, data, before + time.process_time() - began)
    return scores, estimator.history_


def table_of(scores: dict[str, Score]) -> Table:
    """One row for each model."""
    table = Table(title="Digits read right, in %")
    table.add_column("model")
    for name in ("parameters", "training", "test", "seconds"):
        table.add_column(name, justify="right")
    for name, found in scores.items():
        percent = f"{100 * found.training:.1f}", f"{100 * found.test:.1f}"
        table.add_row(name, f"{found.parameters}", *percent, f"{found.seconds:.0f}")
    return table


def plot(scores: dict[str, Score], history: History, path: Path) -> None:
    """The objective and its parts by sweep, and the accuracies."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    left.semilogy(history.objectives, "k-", label="objective")
    for part in history.sweeps[0].parts:
        values = [sweep.parts[part] for sweep in history.sweeps]
        left.semilogy(range(1, len(values) + 1), values, "--", label=part)
    left.set(xlabel="sweep", title="Block coordinate descent: the objective and its parts")
    left.legend()
    values = [100 * found.test for found in scores.values()]
    bars = right.barh([name.strip() for name in scores], values)
    right.bar_label(bars, fmt="%.1f")
    right.set(xlim=(80, 101), xlabel="test images read right (%)")
    right.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


INTRODUCTION = (
    f"The digits of scikit-learn are read by implicit models with {STATES} states, trained by "
    "block coordinate descent and by backpropagation, and by a feedforward net with as many "
    "parameters.\n"
)


def run(
    output: Path, seed: int = 0, sweeps: int = SWEEPS, epochs: int = EPOCHS
) -> dict[str, Score]:
    """Train, print the table, draw the picture."""
    console = Console(highlight=False)
    console.print(INTRODUCTION)
    scores, history = compare(seed, sweeps, epochs)
    plot(scores, history, output)
    console.print(table_of(scores))
    console.print(f"\nObjective, its parts and accuracies: see [bold]{output}[/bold]")
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Implicit models that read digits.")
    parser.add_argument("--output", type=Path, default=Path("implicit_digits.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweeps", type=int, default=SWEEPS, help="of block coordinate descent")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of backpropagation")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run(options.output, options.seed, options.sweeps, options.epochs)


if __name__ == "__main__":
    main()
