"""Learn how a demonstrator holds an arm: a network that ends in inverse kinematics.

An arm of four links puts parcels under a shelf. Where the hand has to be and how high the shelf is
is known; four joints can do it in infinitely many ways. A demonstrator takes the most comfortable
one, and what is comfortable depends on the load, a digit that is written on the parcel. Neither the
load nor the comfort is ever told: there are photographs of parcels, and joint angles.

The *declared* network reads the photograph and predicts how stiff each joint is and where it rests:
parameters of a problem that is not convex, written in CVXPY::

    minimise    stiffness @ (joint - rest)^2
    subject to  the hand is at the target (sums of sines and cosines of the angles),
                no joint is above the shelf, or beyond its limits

Its solution is compared with the demonstrated angles, and the gradient goes through the solution.
A *plain* network of that size predicts angles from photograph, target and shelf. It is compared as
it is, and *moved* to the nearest posture that does the task, by the same layer.

From 400 demonstrations, over three seeds: the declared network's hand misses its target by no more
than 0.0002 mm, the rounding of single precision, and its joints are 4.9 to 5.6 degrees (rms) from
the demonstrator's. The plain network misses by 17 to 19 mm in the median, puts an elbow into the
shelf in 6 to 9 % of the tests, and is 7.2 to 8.1 degrees off; moved, 6.4 to 7.5. The stiffness is
learnt from angles alone; rest angles are only known as far as tasks leave them free.

Run it with ``python examples/inverse_kinematics.py``.
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
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import declarative_cvx as dcx

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

LENGTHS = np.array([0.40, 0.35, 0.25, 0.15])  # of the links, in metres
JOINTS = len(LENGTHS)
LIMITS = np.array([[-1.0, -2.4, -2.0, -1.6], [2.4, 0.2, 0.2, 0.2]])  # joints bend one way
USUAL = torch.tensor([1.0, -0.7, -0.5, -0.3])  # a posture to begin with
HEAVIEST = 9
TREMBLE = 0.02  # of demonstrated angles, in radians
TRAINING_IMAGES = 1000  # of 1797
DEMONSTRATIONS, TESTS = 400, 400
STEPS, PLAIN_STEPS = 200, 3000  # a plain step takes a fiftieth of the time
BATCH, STEP_SIZE = 64, 1e-2
PLAIN, MOVED, DECLARED = "plain", "plain, moved", "declared"


# --------------------------------------------------------------------------------------- layer


def points(joint: Tensor) -> Tensor:
    """Where joints and hand are: (batch, JOINTS) -> (batch, JOINTS + 1, 2), from the shoulder."""
    angle, lengths = joint.cumsum(-1), torch.as_tensor(LENGTHS).to(joint)
    ends = torch.stack([lengths * angle.cos(), lengths * angle.sin()], -1).cumsum(-2)
    return torch.cat([torch.zeros_like(ends[:, :1]), ends], 1)


def inverse_kinematics() -> dcx.DeclarativeLayer:
    """The most comfortable posture, by target (2,), shelf (), stiffness and rest (JOINTS,)."""
    joint = cp.Variable(JOINTS, name="joint", bounds=list(LIMITS))
    target, shelf = cp.Parameter(2, name="target"), cp.Parameter(name="shelf")
    stiffness = cp.Parameter(JOINTS, name="stiffness", nonneg=True)
    rest = cp.Parameter(JOINTS, name="rest")
    angle = np.tril(np.ones((JOINTS, JOINTS))) @ joint
    reach = np.tril(np.tile(LENGTHS, (JOINTS, 1)))
    ahead, up = reach @ cp.nlp.cos(angle), reach @ cp.nlp.sin(angle)
    task = [ahead[-1] == target[0], up[-1] == target[1], up[:-1] <= shelf]
    problem = cp.Problem(cp.Minimize(stiffness @ (joint - rest) ** 2), task)
    joint.value = USUAL.numpy()
    return dcx.DeclarativeLayer(
        problem,
        parameters=[target, shelf, stiffness, rest],
        variables=[joint],
        solver=dcx.InteriorPoint(barrier=1e-3),  # a small one leaves a good start where it is
        on_failure="nan",  # counted in the table; a step of training goes on without them
    )


# ---------------------------------------------------------------------------------------- data


def hidden_comfort(load: Tensor) -> tuple[Tensor, Tensor]:
    """What the demonstrator feels: stiffness of mean 1, and rest, each (n, JOINTS)."""
    part = load[:, None] / HEAVIEST
    stiffness = (part * torch.tensor([1.5, 0.5, -0.5, -1.5])).softmax(1) * JOINTS
    return stiffness, USUAL + (part - 0.5) * torch.tensor([0.8, -1.2, -0.6, 0.6])


@dataclass(frozen=True)
class Scenes:
    """Photographs (n, 1, 8, 8), tasks, loads (never shown to a network) and the postures taken."""

    image: Tensor
    target: Tensor  # (n, 2)
    shelf: Tensor  # (n,)
    load: Tensor  # (n,)
    joint: Tensor  # (n, JOINTS)

    def select(self, index: Tensor) -> Scenes:
        return Scenes(*(value[index] for value in vars(self).values()))


def perform(n: int, images: Tensor, loads: Tensor, generator: torch.Generator) -> Scenes:
    """Random tasks that can be done, as the demonstrator does them."""
    which = torch.randint(len(images), (n,), generator=generator)
    lower, upper = torch.as_tensor(LIMITS).float()
    some = USUAL + 0.5 * torch.randn(n, JOINTS, generator=generator)
    arm = points(some.clamp(lower + 0.3, upper - 0.5))  # not stretched out
    room = 0.03 + 0.05 * torch.rand(n, generator=generator)
    target, shelf, load = arm[:, -1], arm[..., 1].amax(1) + room, loads[which]
    (joint,) = inverse_kinematics()(target, shelf, *hidden_comfort(load))
    return Scenes(images[which], target, shelf, load, joint)


def load_scenes(seed: int) -> tuple[Scenes, Scenes]:
    """Demonstrations to learn from, and tests with images and tasks of their own."""
    generator, digits = torch.Generator().manual_seed(seed), load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.as_tensor(digits.images, dtype=torch.float32)[order, None] / 16
    loads, first = torch.as_tensor(digits.target)[order], TRAINING_IMAGES
    shown = perform(DEMONSTRATIONS, images[:first], loads[:first], generator)
    shown.joint.add_(TREMBLE * torch.randn(shown.joint.shape, generator=generator))
    return shown, perform(TESTS, images[first:], loads[first:], generator)


# ------------------------------------------------------------------------------------ networks


def reader() -> nn.Sequential:
    """Convolutions that make 2 JOINTS numbers of a photograph."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 2 * JOINTS)),
    )


class Declared(nn.Module):
    """Comfort from the photograph, and the most comfortable posture."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.layer = reader(), inverse_kinematics()

    def parameters_of(self, scenes: Scenes) -> tuple[Tensor, ...]:
        """The layer's arguments; only ratios of stiffness matter, so its mean is 1."""
        stiffness, rest = self.read(scenes.image).split(JOINTS, 1)
        return scenes.target, scenes.shelf, JOINTS * stiffness.softmax(1), USUAL + rest

    def forward(self, scenes: Scenes) -> Tensor:
        (joint,) = self.layer(*self.parameters_of(scenes))
        return joint


class Plain(nn.Module):
    """Joint angles from photograph, target and shelf."""

    def __init__(self) -> None:
        super().__init__()
        first, last = nn.Linear(2 * JOINTS + 3, 64), nn.Linear(64, JOINTS)
        self.read = reader()
        self.answer = nn.Sequential(first, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), last)

    def forward(self, scenes: Scenes) -> Tensor:
        seen = [self.read(scenes.image), scenes.target, scenes.shelf[:, None]]
        return USUAL + self.answer(torch.cat(seen, 1))


def train(model: nn.Module, shown: Scenes, steps: int, seed: int, name: str) -> Tensor:
    """Imitate the demonstrations; returns the error of each batch, rms, in degrees."""
    generator, errors = torch.Generator().manual_seed(seed), []
    optimiser = torch.optim.Adam(model.parameters(), STEP_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    for _ in tqdm(range(steps), desc=f"{name:8}", unit="step"):
        batch = shown.select(torch.randint(len(shown.load), (BATCH,), generator=generator))
        optimiser.zero_grad()
        loss = (model(batch) - batch.joint).square().nanmean()
        loss.backward()
        optimiser.step()
        schedule.step()
        errors.append(loss.detach().sqrt().rad2deg())
    return torch.stack(errors)


# ------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Result:
    """Answers to the test scenes, and batch errors on the way to them, in degrees."""

    joint: Tensor
    training: Tensor
    solution: dcx.Solution | None = None

    def measures(self, tests: Scenes) -> dict[str, float]:
        """The columns of the table."""
        at, wrong = points(self.joint), self.joint - tests.joint
        miss = 1000 * (at[:, -1] - tests.target).norm(dim=1)
        above = at[:, 1:-1, 1].amax(1) > tests.shelf + 1e-3
        found = {
            "hand, median (mm)": miss.nanmedian(),
            "hand, worst (mm)": miss.nan_to_num().max(),
            "above shelf (%)": 100 * above.float().mean(),
            "joints (deg)": wrong.square().nanmean().sqrt().rad2deg(),
        }
        if self.solution is not None:
            found["optimal (%)"] = 100 * self.solution.solved.float().mean()
            found["regular (%)"] = 100 * self.solution.derivative.regular.float().mean()
        return {name: float(value) for name, value in found.items()}


def compare(
    shown: Scenes, tests: Scenes, seed: int, steps: int, plain_steps: int
) -> tuple[dict[str, Result], Declared]:
    """Train both networks, and answer all tests in three ways."""
    torch.manual_seed(seed)
    plain, declared = Plain(), Declared()
    direct = train(plain, shown, plain_steps, seed, PLAIN)
    through = train(declared, shown, steps, seed, DECLARED)
    with torch.no_grad():
        guess, solve = plain(tests), declared.layer.solve
        moved = solve(tests.target, tests.shelf, torch.ones(JOINTS), guess)
        best = solve(*declared.parameters_of(tests))
    results = {
        PLAIN: Result(guess, direct),
        MOVED: Result(moved.variables[0], direct, moved),
        DECLARED: Result(best.variables[0], through, best),
    }
    return results, declared


def table_of(results: dict[str, Result], tests: Scenes) -> Table:
    """One row for each way to answer."""
    rows = {name: result.measures(tests) for name, result in results.items()}
    table = Table(
        "network", title="Tests: errors of hand and joints (rms), and what the layer verified"
    )
    for column in rows[DECLARED]:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.3g}" if c in row else "-" for c in rows[DECLARED]))
    return table


# ------------------------------------------------------------------------------ picture, program


def plot(results: dict[str, Result], declared: Declared, tests: Scenes, path: Path) -> None:
    """Draw some postures, errors while training, and the comfort that was learnt."""
    figure = plt.figure(figsize=(11, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    for load, axes in zip((1, 5, 9), top.subplots(1, 3), strict=True):
        _draw_arms(axes, results, tests, int((tests.load == load).int().argmax()))
    axes.legend(loc="lower left", fontsize="small")
    left, right = bottom.subplots(1, 2)
    for name, color in ((PLAIN, "C1"), (DECLARED, "C0")):
        curve = results[name].training
        smooth = curve.unfold(0, max(1, len(curve) // 40), 1).mean(1)
        left.plot(np.linspace(0, 100, len(smooth)), smooth, color, label=f"{name}: training")
        test = results[name].measures(tests)["joints (deg)"]
        left.axhline(test, color=color, ls="--", label=f"{name}: test, at the end")
    left.set(xlabel="part of training (%)", ylabel="error of joints, rms (deg)", yscale="log")
    left.legend(ncols=2, fontsize="small")
    _draw_comfort(right, declared, tests)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_arms(axes: Axes, results: dict[str, Result], tests: Scenes, at: int) -> None:
    styles = {"demonstrated": ("0.75", 7), PLAIN: ("C1", 1.8), DECLARED: ("C0", 1.8)}
    joints = {"demonstrated": tests.joint} | {n: r.joint for n, r in results.items()}
    for name, (color, width) in styles.items():
        arm = points(joints[name][at : at + 1])[0]
        axes.plot(*arm.T, "o-", color=color, lw=width, ms=width + 2.5, label=name)
    axes.axhspan(float(tests.shelf[at]), 1.0, color="peru", alpha=0.35, lw=0)
    axes.plot(*tests.target[at], "kx", ms=11, label="target")
    axes.set(aspect="equal", xlim=(-0.15, 1.2), ylim=(-0.5, 0.9), xticks=[], yticks=[])
    axes.text(-0.1, 0.78, "photograph of the load:")
    inset = axes.inset_axes((0.58, 0.83, 0.14, 0.14))
    inset.imshow(1 - tests.image[at, 0], cmap="gray")
    inset.set(xticks=[], yticks=[])


def _draw_comfort(axes: Axes, declared: Declared, tests: Scenes) -> None:
    with torch.no_grad():
        learnt = declared.parameters_of(tests)[2]
    loads = torch.arange(HEAVIEST + 1)
    hidden, _ = hidden_comfort(loads)
    means = torch.stack([learnt[tests.load == load].mean(0) for load in loads])
    for joint in range(JOINTS):
        axes.plot(loads, hidden[:, joint], f"C{joint + 2}", label=f"joint {joint + 1}")
        axes.plot(loads, means[:, joint], f"C{joint + 2}o")
    axes.set(xlabel="load", ylabel="stiffness: hidden (lines), learnt (dots)", xticks=loads)
    axes.legend(fontsize="small")


def run(
    output: Path, steps: int = STEPS, plain_steps: int = PLAIN_STEPS, seed: int = 0
) -> tuple[dict[str, Result], Declared, Scenes]:
    """Train, test, draw; print what is seen on the way."""
    console, began = Console(highlight=False), time.process_time()
    shown, tests = load_scenes(seed)
    results, declared = compare(shown, tests, seed, steps, plain_steps)
    plot(results, declared, tests, output)
    console.print()
    console.print(table_of(results, tests))
    seconds = time.process_time() - began
    console.print(f"\n{seconds:.0f} s of processor time. Postures: see [bold]{output}[/bold]")
    return results, declared, tests


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Learn inverse kinematics from demonstrations.")
    parser.add_argument("--output", type=Path, default=Path("inverse_kinematics.png"))
    parser.add_argument("--steps", type=int, default=STEPS, help="of training through the layer")
    parser.add_argument("--plain-steps", type=int, default=PLAIN_STEPS, help="of the plain network")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # enough for a layer this small, and steady on a busy machine
    run(options.output, options.steps, options.plain_steps, options.seed)


if __name__ == "__main__":
    main()
