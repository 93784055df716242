"""Where is the camera? A network weighs correspondences, and a declared layer finds the pose.

Points of a known object are seen in an image, and each is matched to a point of the object; many of
the matches are wrong. The pose of the camera is the minimum of a sum over all matches::

    minimise  weight @ (1 - exp(-(distance in the image / alpha)^2 / 2))      (Welsch's penalty)

over a rotation and a translation. It is not convex: there is a division by the depth, and the
rotation is Cayley's, R = ((1 - g'g) I + 2 gg' + 2 [g]x) / (1 + g'g), which holds for any vector g,
so that no constraint is needed. Written in CVXPY it becomes a layer, of which `weight` and `alpha`
are parameters. A network predicts the weights, match by match, from three clues (two doubtful
scores of a matcher and the size of the spot) and learns `alpha` on the way; all that it is told is
the true pose of the camera: not which matches are wrong, and not that large spots are less sharp.

It is compared with least squares, with Welsch's penalty at equal weights and the `alpha` that is
best on such scenes, and with weights learnt for least squares. With 0, 20, 40 and 60 % of the
matches wrong the median error of the rotation is 0.37, 0.46, 0.55, 0.95 degrees with both learnt,
0.72, 0.96, 1.35 and 2.45 with Welsch's penalty alone, 0.91, 1.18, 1.57 and 3.77 with weights alone
(clues are not enough to rule a match out), and 0.78, 9.1, 16 and 27 with neither.

Run it with ``python examples/robust_pose.py``.
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
from torch import Tensor, nn
from tqdm import tqdm

import declarative_cvx as dcx

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MATCHES = 32
CLUES = 3
NOISE = 0.004  # of a spot of size 1, in focal lengths
ALPHAS = (0.2, 0.1, 0.05, 0.02, 0.01)
OUTLIERS = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # rates in the tests
TESTS = 128  # scenes for each rate
TUNING = 128
STEPS, BATCH, STEP_SIZE = 100, 32, 3e-2
RESTARTS = 3  # besides the usual pose: with many outliers there are several minima
LEAST_SQUARES, WELSCH = "least squares", "Welsch, best alpha"
WEIGHTED, LEARNT = "learnt weights", "learnt weights, Welsch"


# --------------------------------------------------------------------------------------- layer


def pose_layer(robust: bool) -> dcx.DeclarativeLayer:
    """The pose by points (MATCHES, 3), where seen (MATCHES, 2), weights; with robust, precision.

    The precision is 1 / (2 alpha^2). The pose is Cayley's vector, and where the object is.
    """
    g = cp.Variable(3, name="g")
    t = cp.Variable(3, name="t", bounds=[np.array([-3, -3, 2]), np.array([3, 3, 9])])
    point, seen = cp.Parameter((MATCHES, 3), name="point"), cp.Parameter((MATCHES, 2), name="seen")
    weight = cp.Parameter(MATCHES, name="weight", nonneg=True)
    precision = cp.Parameter(name="precision", nonneg=True)
    x, y, z = g[0], g[1], g[2]
    turned = [  # (1 + g'g) R, row by row
        [1 + x**2 - y**2 - z**2, 2 * (x * y - z), 2 * (x * z + y)],
        [2 * (x * y + z), 1 - x**2 + y**2 - z**2, 2 * (y * z - x)],
        [2 * (x * z - y), 2 * (y * z + x), 1 - x**2 - y**2 + z**2],
    ]
    scale = 1 + cp.sum_squares(g)
    across, down, depth = (point @ cp.hstack(turned[i]) + scale * t[i] for i in range(3))
    distance = (across / depth - seen[:, 0]) ** 2 + (down / depth - seen[:, 1]) ** 2
    loss = 1 - cp.exp(-precision * distance) if robust else distance
    g.value, t.value = np.zeros(3), np.array([0, 0, 5])
    g.sample_bounds = [np.full(3, -0.4), np.full(3, 0.4)]
    return dcx.DeclarativeLayer(
        cp.Problem(cp.Minimize(weight @ loss)),
        parameters=[point, seen, weight, *([precision] if robust else [])],
        variables=[g, t],
        on_irregular="ignore",
        on_failure="nan",
        restarts=RESTARTS if robust else 0,
    )


def rotation(g: Tensor) -> Tensor:
    """Cayley's rotation: (n, 3) -> (n, 3, 3)."""
    zero = torch.zeros_like(g[:, 0])
    x, y, z = g.unbind(1)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).unflatten(1, (3, 3))
    eye = torch.eye(3).to(g)
    return torch.linalg.solve(eye - cross, eye + cross)


def project(point: Tensor, g: Tensor, t: Tensor) -> Tensor:
    """Where points are in the image: (n, m, 3), (n, 3), (n, 3) -> (n, m, 2)."""
    at = point @ rotation(g).mT + t[:, None]
    return at[..., :2] / at[..., 2:]


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Scenes:
    """Matches of points of an object with spots in an image, and the pose.

    Attributes
    ----------
    point : Tensor, shape (n, MATCHES, 3)
        In the object's frame, in a ball around the origin.
    seen : Tensor, shape (n, MATCHES, 2)
        In the image, in focal lengths.
    clues : Tensor, shape (n, MATCHES, CLUES)
        Score, ratio, size.
    wrong : Tensor of bool, shape (n, MATCHES)
        Never shown to a network.
    g, t : Tensor, shape (n, 3)
        The pose.
    """

    point: Tensor
    seen: Tensor
    clues: Tensor
    wrong: Tensor
    g: Tensor
    t: Tensor


def photograph(n: int, rate: Tensor | float, generator: torch.Generator) -> Scenes:
    """Random scenes with a rate of outliers, or with one each, shape (n, 1)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    axis = nn.functional.normalize(normal(n, 3), dim=1)
    g, t = axis * (0.35 * uniform(n, 1)).tan(), torch.tensor([0.0, 0.0, 5.0]) + 0.3 * normal(n, 3)
    direction = nn.functional.normalize(normal(n, MATCHES, 3), dim=2)
    point = 1.3 * direction * uniform(n, MATCHES, 1) ** (1 / 3)
    spot = project(point, g, t)
    size, wrong = (0.8 * normal(n, MATCHES)).exp(), uniform(n, MATCHES) < rate
    elsewhere = spot.gather(1, uniform(n, MATCHES).argsort(1)[..., None].expand(-1, -1, 2))
    seen = torch.where(wrong[..., None], elsewhere, spot)
    seen = seen + NOISE * size[..., None] * normal(n, MATCHES, 2)
    score = 1.2 * wrong + normal(n, MATCHES)  # neither tells right from wrong by itself
    ratio = 1.2 * wrong + normal(n, MATCHES)
    return Scenes(point, seen, torch.stack([score, ratio, size.log()], 2), wrong, g, t)


# ------------------------------------------------------------------------------------- network


class Pose(nn.Module):
    """The pose, with weights that are learnt or equal, and an `alpha` that is learnt or given.

    Parameters
    ----------
    weighted, robust : bool
        Whether there is a network for the weights; whether the penalty is Welsch's.
    alpha : float
        At the beginning.
    """

    def __init__(self, weighted: bool, robust: bool, alpha: float = 0.1) -> None:
        super().__init__()
        first, last = nn.Linear(CLUES, 16), nn.Linear(16, 1)
        self.weigh = nn.Sequential(first, nn.Tanh(), last) if weighted else None
        self.log_alpha = nn.Parameter(torch.tensor(alpha).log(), requires_grad=weighted)
        self.robust, self.layer = robust, pose_layer(robust)

    def weights(self, clues: Tensor) -> Tensor:
        """(n, MATCHES, CLUES) -> (n, MATCHES), of mean 1: only ratios matter."""
        if self.weigh is None:
            return torch.ones_like(clues[..., 0])
        return MATCHES * self.weigh(clues)[..., 0].softmax(1)

    def solve(self, scenes: Scenes) -> dcx.Solution:
        precision = [(-2 * self.log_alpha).exp() / 2] if self.robust else []
        return self.layer.solve(scenes.point, scenes.seen, self.weights(scenes.clues), *precision)


def errors(solution: dcx.Solution, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Of the rotation, in degrees, and of the translation, relative; (n,) each."""
    g, t = solution.variables
    # The sine of half the angle is smooth but at 0, and at most 1.
    half = (rotation(g.nan_to_num()) - rotation(scenes.g)).norm(dim=(1, 2)) / 8**0.5
    angle = 2 * half.clamp(max=1 - 1e-6).asin().rad2deg()
    away = (t.nan_to_num() - scenes.t).norm(dim=1) / scenes.t.norm(dim=1)
    return angle, away


def loss(angle: Tensor, away: Tensor) -> Tensor:
    """What training makes small: a lost scene counts, but does not drown the others."""
    return (10 * (angle.deg2rad() + away)).log1p().mean()


def train(model: Pose, steps: int, seed: int, name: str) -> None:
    """Make the pose right, whatever the rate of outliers."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), STEP_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, steps)
    for _ in tqdm(range(steps), desc=f"{name:22}", unit="step"):
        rate = float(OUTLIERS[-1]) * torch.rand(BATCH, 1, generator=generator)
        scenes = photograph(BATCH, rate, generator)
        angle, away = errors(model.solve(scenes), scenes)
        optimiser.zero_grad()
        loss(angle, away).backward()
        optimiser.step()
        schedule.step()


def best_alpha(seed: int) -> float:
    """The alpha that is best with equal weights, for scenes such as those of the training."""
    generator = torch.Generator().manual_seed(seed)
    scenes = photograph(
        TUNING, OUTLIERS[-1] * torch.rand(TUNING, 1, generator=generator), generator
    )
    found = [Pose(False, True, alpha).solve(scenes) for alpha in ALPHAS]
    losses = torch.stack([loss(*errors(solution, scenes)) for solution in found])
    return ALPHAS[int(losses.argmin())]


# -------------------------------------------------------------------------- comparison and table


@dataclass(frozen=True)
class Result:
    """For each rate of outliers and scene, (len(OUTLIERS), TESTS): errors, what is verified."""

    angle: Tensor
    away: Tensor
    optimal: Tensor
    regular: Tensor


@torch.no_grad()
def test(model: Pose, scenes: Sequence[Scenes]) -> Result:
    """Solve all test scenes."""
    found = [model.solve(each) for each in scenes]
    pairs = [errors(solution, each) for solution, each in zip(found, scenes, strict=True)]
    angle, away = (torch.stack(values) for values in zip(*pairs, strict=True))
    regular = torch.stack([solution.derivative.regular for solution in found])
    return Result(angle, away, torch.stack([solution.solved for solution in found]), regular)


def compare(seed: int, steps: int) -> tuple[dict[str, Result], dict[str, Pose], list[Scenes]]:
    """Train, tune, and test every way to find a pose on the same scenes."""
    torch.manual_seed(seed)
    models = {
        LEAST_SQUARES: Pose(weighted=False, robust=False),
        WELSCH: Pose(weighted=False, robust=True, alpha=best_alpha(seed)),
        WEIGHTED: Pose(weighted=True, robust=False),
        LEARNT: Pose(weighted=True, robust=True),
    }
    for name in (WEIGHTED, LEARNT):
        train(models[name], steps, seed, name)
    generator = torch.Generator().manual_seed(seed + 1)
    tests = [photograph(TESTS, float(rate), generator) for rate in OUTLIERS]
    return {name: test(model, tests) for name, model in models.items()}, models, tests


def table_of(results: dict[str, Result]) -> Table:
    """Median errors of the rotation by rate of outliers, and what the layer verified."""
    table = Table("", title="Error of the rotation in degrees, median / nine in ten below")
    for rate in OUTLIERS[::2]:
        table.add_column(f"{100 * rate:.0f} % wrong", justify="right")
    for column in ("optimal", "regular"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        ends = zip(result.angle.median(1).values, result.angle.quantile(0.9, dim=1), strict=True)
        cells = [f"{middle:.2f} / {most:.1f}" for middle, most in ends][::2]
        known = [f"{100 * v.float().mean():.1f} %" for v in (result.optimal, result.regular)]
        table.add_row(name, *cells, *known)
    return table


# ------------------------------------------------------------------------------ picture, program


def plot(
    results: dict[str, Result], models: dict[str, Pose], tests: Sequence[Scenes], path: Path
) -> None:
    """Draw errors by rate of outliers, one scene, and weights of matches."""
    figure = plt.figure(figsize=(12, 7.6), layout="constrained")
    grid = figure.subplot_mosaic([["middle", "good"], ["scene", "weights"]])
    for name, result in results.items():
        grid["middle"].plot(100 * OUTLIERS, result.angle.median(1).values, "o-", label=name)
        grid["good"].plot(100 * OUTLIERS, 100 * (result.angle < 2).float().mean(1), "o-")
    grid["middle"].set(yscale="log", ylabel="error of the rotation, median (degrees)")
    grid["middle"].set(ylim=(0.2, 300))
    grid["good"].set(ylabel="scenes with an error below 2 degrees (%)", ylim=(-3, 103))
    for axes in (grid["middle"], grid["good"]):
        axes.set(xlabel="wrong matches (%)")
        axes.grid(alpha=0.3)
    grid["middle"].legend(ncols=2, loc="upper left", fontsize="small")
    with torch.no_grad():
        weights = models[LEARNT].weights(tests[-2].clues)
        _draw_scene(grid["scene"], models, tests[-2], weights[0])
    _draw_weights(grid["weights"], tests[-2], weights)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_scene(axes: Axes, models: dict[str, Pose], scenes: Scenes, weight: Tensor) -> None:
    styles = {LEAST_SQUARES: ("C0", "s"), LEARNT: ("C3", "o")}
    wrong, seen = scenes.wrong[0], scenes.seen[0]
    for name, (color, mark) in styles.items():
        g, t = models[name].solve(scenes).variables
        at = project(scenes.point, g, t)[0]
        axes.plot(*at.T, mark, ms=9, mfc="none", color=color, label=f"pose by {name}")
    kinds = (~wrong, "o", "C2", "right match"), (wrong, "X", "k", "wrong match")
    for kind, mark, color, label in kinds:
        sizes = 12 + 40 * weight[kind].clamp(max=3)
        axes.scatter(*seen[kind].T, s=sizes, marker=mark, c=color, alpha=0.8, label=label)
    axes.set(aspect="equal", xticks=[], yticks=[], title="A scene; marks as large as weights")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize="small")


def _draw_weights(axes: Axes, scenes: Scenes, weights: Tensor) -> None:
    doubt, size = scenes.clues[..., :2].mean(2), scenes.clues[..., 2].exp()
    some = torch.arange(len(doubt))[:, None] < 40  # scenes
    for kind, mark, label in (
        (~scenes.wrong & some, "o", "right"),
        (scenes.wrong & some, "x", "wrong"),
    ):
        shown = axes.scatter(
            *(doubt[kind], size[kind]), c=weights[kind].clamp(min=1e-3).log10(),
            marker=mark, s=16, vmin=-2, vmax=0.7, label=f"{label} match",
        )  # fmt: skip
    axes.figure.colorbar(shown, ax=axes, label="weight learnt, power of 10")
    axes.set(yscale="log", xlabel="mean of the first two clues", ylabel="size of the spot")
    axes.legend()


def run(
    output: Path, steps: int = STEPS, seed: int = 0
) -> tuple[dict[str, Result], dict[str, Pose], list[Scenes]]:
    """Train, test, draw; print what is seen on the way."""
    console, began = Console(highlight=False), time.process_time()
    results, models, tests = compare(seed, steps)
    plot(results, models, tests, output)
    console.print()
    console.print(table_of(results))
    alphas = (f"{models[name].log_alpha.detach().exp():.3f}" for name in (WELSCH, LEARNT))
    console.print("alpha: {} by search, {} learnt".format(*alphas))
    seconds = time.process_time() - began
    console.print(f"\n{seconds:.0f} s of processor time. Errors: see [bold]{output}[/bold]")
    return results, models, tests


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Poses of a camera from doubtful matches.")
    parser.add_argument("--output", type=Path, default=Path("robust_pose.png"), help="picture")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of training, each network")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # enough for a layer this small, and steady on a busy machine
    run(options.output, options.steps, options.seed)


if __name__ == "__main__":
    main()
