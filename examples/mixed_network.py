"""Read a code of six different digits from spoiled photographs: one network, three declared layers.

A door opens to a code of six digits, no two of them the same. Five photographs of each digit were
taken, at unknown exposure and with a noisy sensor, and in some of them the camera had slipped: they
show another digit. A network reads all six digits of a code at once:

1. Convolutions turn each photograph into a vector of features, and a *projection* puts the vector
   on a sphere: most of the exposure drops out, no photograph is louder than another, and distances
   between them have a unit, in which the next layer can say what is far.
2. *Robust pooling* with the Welsch penalty makes one vector of the five photographs of a digit. A
   mean would move with each spoiled one; the minimum of a sum of bounded penalties stays
   where most photographs agree.
3. A *convex problem*, declared in CVXPY, turns scores into readings: the nearest matrix of
   probabilities in which no digit is used more than once. A softmax reads each digit on its own.

All three are trained end to end on the digits of scikit-learn, on photographs of which none are
spoiled, and compared with the same network with none, one and two of them, on photographs of
other digits, of which more and more are spoiled. Over five seeds 3, 26, 66 and 70 of 100 codes are
read right by the four networks when three of five photographs are spoiled, and 78, 91, 91 and 93
when none is. As a check, the readings of the third network are also replaced by the likeliest ones
that differ: as many codes come out right as with the constraint in the network or slightly more,
72 and 94. For the hard answer alone no derivative is needed; the constraint in the network gives
probabilities, and a gradient to whatever comes before it.

Run it with ``python examples/mixed_network.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cvxpy as cp
import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import declarative_cvx as dcx
from declarative_cvx import Projection, RobustPool

mpl.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10
KEYS = 6  # digits in a code
FRAMES = 5  # photographs of each
SIDE = 8  # pixels
FEATURES = 32
RADIUS = 3.0
SOFTNESS = 3.0  # how far scores must differ for a probability of 1; no gradient comes from there
ALPHA = RADIUS / 2  # photographs of the same digit are nearer than this, of two digits farther
TRAINING_IMAGES = 1000  # of 1797
STEPS = 120
BATCH = 12
STEP_SIZE = 8e-3
SPOILED = range(4)  # photographs of each digit, when tested
TEST_CODES = 200


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, sorted by class.

    Attributes
    ----------
    images : Tensor, shape (n, SIDE, SIDE), from 0 to 1
    first, count : Tensor of int64, shape (CLASSES,)
        Where the images of a class begin, and how many there are.
    """

    images: Tensor
    first: Tensor
    count: Tensor

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A random image of each class given: (*batch,) -> (*batch, SIDE, SIDE)."""
        part = torch.rand(labels.shape, generator=generator)
        return self.images[self.first[labels] + (part * self.count[labels]).long()]


def load(seed: int) -> tuple[Digits, Digits]:
    """Images to train with, and others to test with."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32) / 16
    labels = torch.as_tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    training, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return _sorted(images[training], labels[training]), _sorted(images[test], labels[test])


def _sorted(images: Tensor, labels: Tensor) -> Digits:
    count = torch.bincount(labels, minlength=CLASSES)
    return Digits(images[labels.argsort()], count.cumsum(0) - count, count)


@dataclass(frozen=True)
class Codes:
    """Photographs of codes.

    Attributes
    ----------
    frames : Tensor, shape (n, KEYS, FRAMES, SIDE, SIDE)
    digits : Tensor of int64, shape (n, KEYS)
        What they say; all different in a code.
    spoiled : Tensor of bool, shape (n, KEYS, FRAMES)
        Which frames show something else.
    """

    frames: Tensor
    digits: Tensor
    spoiled: Tensor


def photograph(digits: Digits, n: int, spoiled: int, generator: torch.Generator) -> Codes:
    """Photographs of n random codes, with so many spoiled of the FRAMES of each digit."""
    shape = (n, KEYS, FRAMES)
    code = torch.rand(n, CLASSES, generator=generator).argsort(1)[:, :KEYS]
    right = digits.draw(code, generator)[:, :, None]  # of each digit one image, seen five times
    wrong = digits.draw(torch.randint(CLASSES, shape, generator=generator), generator)
    is_spoiled = torch.rand(shape, generator=generator).argsort(2) < spoiled
    seen = torch.where(is_spoiled[..., None, None], wrong, right)
    exposure = 0.5 + torch.rand(*shape, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(seen.shape, generator=generator)
    return Codes(exposure * seen + noise, code, is_spoiled)


# ------------------------------------------------------------------------------------- network


class Distinct(nn.Module):
    """The probabilities nearest to scores / SOFTNESS, (batch, KEYS, CLASSES), no class twice."""

    def __init__(self) -> None:
        super().__init__()
        P, S = cp.Variable((KEYS, CLASSES), name="P"), cp.Parameter((KEYS, CLASSES), name="S")
        # SOFTNESS ||P - S / SOFTNESS||^2 without its constant: as it stands the solver would get
        # the difference as a second variable.
        distance = SOFTNESS * cp.sum_squares(P) - 2 * cp.sum(cp.multiply(S, P))
        constraints = [P >= 0, cp.sum(P, axis=1) == 1, cp.sum(P, axis=0) <= 1]
        problem = cp.Problem(cp.Minimize(distance), constraints)
        self.layer = dcx.DeclarativeLayer(problem, parameters=[S], variables=[P])

    def forward(self, scores: Tensor) -> Tensor:
        (probabilities,) = self.layer(scores)
        return probabilities


class Mean(nn.Module):
    """What robust pooling replaces."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2)


class Reader(nn.Module):
    """From photographs to the probability of each class for each digit of a code."""

    def __init__(self, project: bool, robust: bool, distinct: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * SIDE**2 // 4, FEATURES),
        )
        self.project = Projection("sphere", p=2, radius=RADIUS) if project else nn.Identity()
        self.pool = _welsch() if robust else Mean()
        self.scores = nn.Linear(FEATURES, CLASSES)
        self.read = Distinct() if distinct else nn.Softmax(-1)

    def forward(self, frames: Tensor) -> Tensor:  # (n, KEYS, FRAMES, SIDE, SIDE)
        features = self.features(frames.reshape(-1, 1, SIDE, SIDE))
        features = self.project(features).reshape(*frames.shape[:3], FEATURES)
        return self.read(self.scores(self.pool(features)))  # (n, KEYS, CLASSES)


def _welsch() -> RobustPool:
    # Started from every frame, so that no group of frames that agree is missed.
    return RobustPool(
        "welsch", ALPHA, dim=-2, point_dim=-1, keepdim=False, restarts=FRAMES, learn_alpha=True
    )


VARIANTS = {
    "mean, softmax": (False, False, False),
    "+ projection": (True, False, False),
    "+ robust pooling": (True, True, False),
    "+ all digits differ": (True, True, True),
}
MATCHED = "third, then matching"  # the third network, with the constraint in its readings only


# ---------------------------------------------------------------------------- training and test


def loss(probabilities: Tensor, digits: Tensor) -> Tensor:
    """Squared distance to the right answer (Brier's score), finite also at probability zero."""
    right = functional.one_hot(digits, CLASSES)
    return (probabilities - right).square().sum(-1).mean()


def train(model: Reader, digits: Digits, steps: int, seed: int, name: str = "") -> None:
    """Follow the gradient through everything, on photographs of which none are spoiled."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), STEP_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    for _ in tqdm(range(steps), desc=f"{name:20}", unit="step"):
        codes = photograph(digits, BATCH, 0, generator)
        optimiser.zero_grad()
        loss(model(codes.frames), codes.digits).backward()
        optimiser.step()
        schedule.step()


def best_match(probabilities: Tensor) -> Tensor:
    """The likeliest codes with six different digits, (n, KEYS): what needs no derivative."""
    costs = -probabilities.double().clamp_min(1e-30).log()
    return torch.stack([torch.as_tensor(linear_sum_assignment(cost)[1]) for cost in costs])


@dataclass(frozen=True)
class Score:
    """Parts read right, each of shape (len(SPOILED),): of all digits, and of all codes."""

    digits: Tensor
    codes: Tensor


def score(readings: Sequence[Tensor], tests: Sequence[Codes]) -> Score:
    """Compare readings (n, KEYS) with the truth, for each number of spoiled frames."""
    right = [read == codes.digits for read, codes in zip(readings, tests, strict=True)]
    digits = torch.stack([each.float().mean() for each in right])
    return Score(digits, torch.stack([each.all(1).float().mean() for each in right]))


@torch.no_grad()
def probabilities_of(model: Reader, tests: Sequence[Codes]) -> list[Tensor]:
    """What a network says of each test, (n, KEYS, CLASSES)."""
    return [model(codes.frames) for codes in tests]


def compare(seed: int, steps: int) -> tuple[dict[str, Score], dict[str, Reader], list[Codes]]:
    """Train every variant from the same start, and test all with the same photographs."""
    training, test = load(seed)
    generator = torch.Generator().manual_seed(seed)
    tests = [photograph(test, TEST_CODES, count, generator) for count in SPOILED]
    scores, models = {}, {}
    for name, parts in VARIANTS.items():
        torch.manual_seed(seed)
        models[name] = Reader(*parts)
        train(models[name], training, steps, seed, name)
        found = probabilities_of(models[name], tests)
        scores[name] = score([p.argmax(-1) for p in found], tests)
        if parts == (True, True, False):
            scores[MATCHED] = score([best_match(p) for p in found], tests)
    return scores, models, tests


# --------------------------------------------------------------------------- table and picture


def table_of(runs: Sequence[dict[str, Score]]) -> Table:
    """Mean over the seeds, and their standard deviation where there are several."""
    table = Table(title="Digits right / codes right, in %, by spoiled photographs of each digit")
    table.add_column("network")
    for count in SPOILED:
        table.add_column(f"{count} of {FRAMES}", justify="right")
    for name in runs[0]:
        digits = torch.stack([run[name].digits for run in runs])
        codes = torch.stack([run[name].codes for run in runs])
        pairs = zip(digits.unbind(1), codes.unbind(1), strict=True)
        between = " / " if len(runs) == 1 else "\n"
        table.add_row(name, *(f"{_percent(d, 1)}{between}{_percent(c, 0)}" for d, c in pairs))
    return table


def _percent(values: Tensor, places: int) -> str:
    text = f"{100 * values.mean():.{places}f}"
    return text if len(values) == 1 else f"{text} ± {100 * values.std():.{places}f}"


def plot(scores: dict[str, Score], models: dict[str, Reader], codes: Codes, path: Path) -> None:
    """Draw codes read right, and the photographs of one code with what was read."""
    figure = plt.figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    axes = left.subplots()
    for name, found in scores.items():
        style = "--" if name == MATCHED else "-"
        axes.plot(SPOILED, 100 * found.codes.numpy(), "o" + style, label=name)
    axes.set(xticks=SPOILED, ylim=(-3, 103), ylabel="codes read right (%)")
    axes.set_xlabel(f"spoiled photographs of each digit, of {FRAMES}")
    axes.legend(loc="lower left")
    right.suptitle(f"A code, {SPOILED[-1]} of {FRAMES} photographs spoiled (red)")
    _draw_code(right.subplots(FRAMES, KEYS), models, codes)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_code(grid: np.ndarray, models: dict[str, Reader], codes: Codes) -> None:
    first = Codes(codes.frames[:1], codes.digits[:1], codes.spoiled[:1])
    plain, declared = (
        probabilities_of(model, [first])[0].argmax(-1)[0]
        for model in (models["mean, softmax"], models["+ all digits differ"])
    )
    for key in range(KEYS):
        for frame in range(FRAMES):
            axes = grid[frame, key]
            axes.imshow(first.frames[0, key, frame].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            spoiled = bool(first.spoiled[0, key, frame])
            axes.spines[:].set(color="red" if spoiled else "limegreen", linewidth=2.5)
        grid[0, key].set_title(f"is {first.digits[0, key]}")
        grid[-1, key].set_xlabel(f"mean: {plain[key]}\ndeclared: {declared[key]}")


# ------------------------------------------------------------------------------------- program


INTRODUCTION = (
    f"Codes of {KEYS} different digits are read from {FRAMES} photographs of each digit, of which "
    "some are spoiled: they show another digit. Networks are trained on photographs none of which "
    "are spoiled, and tested on digits that were not seen in training. The first has no declared "
    "layer, and each of the others one more: a projection onto a sphere, robust pooling, and a "
    "convex problem that knows that no digit occurs twice.\n"
)
LEGEND = (
    "A code is right if all its digits are. In the row '" + MATCHED + "' the readings of the "
    "network with projection and robust pooling were replaced, after training, by the likeliest "
    "ones that differ. The convex problem does this inside the network: it gives probabilities, "
    "and training follows its gradient."
)


def run(output: Path, steps: int = STEPS, seeds: int = 1) -> list[dict[str, Score]]:
    """Train, test, draw; print what is seen on the way. One set of scores a seed."""
    console = Console(highlight=False)
    console.print(INTRODUCTION)
    began, runs = time.process_time(), []
    for seed in range(seeds):
        scores, models, tests = compare(seed, steps)
        runs.append(scores)
        if seed == 0:
            plot(scores, models, tests[-1], output)
    console.print()
    console.print(table_of(runs), LEGEND)
    console.print(
        f"\n{time.process_time() - began:.0f} s of processor time. Codes read right, and "
        f"photographs: see [bold]{output}[/bold]"
    )
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Read codes from spoiled photographs.")
    parser.add_argument("--output", type=Path, default=Path("mixed_network.png"), help="picture")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of training, each network")
    parser.add_argument("--seeds", type=int, default=1, help="how often to repeat everything")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # enough for layers this small, and steady on a busy machine
    run(options.output, options.steps, options.seeds)


if __name__ == "__main__":
    main()
