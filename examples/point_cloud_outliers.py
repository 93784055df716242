"""Recognise point clouds among outliers: PointNet with robust pooling in place of the maximum.

PointNet applies one small network to each point of a cloud and takes the largest value of every
feature over the points. One stray point can set that value. With

    minimize over u   sum_i phi(u - x_i; alpha)

in its place, for a robust penalty phi, a minority of outliers has little to say. This program
trains PointNet with the maximum (max), and with the quadratic (Q, the mean), pseudo-Huber (PH),
Huber (H), Welsch (W) and truncated quadratic (TQ) penalties, as Gould, Hartley and Campbell did in
Section 7 of "Deep Declarative Networks". Part of the points are replaced by others anywhere in the
unit ball, in training and test alike (their Table 3) or in the test alone (Table 4).

Run it with ``python examples/point_cloud_outliers.py``: small networks and generated solids, two
or three minutes. ``--modelnet PATH`` reads ModelNet40 instead, and ``--full`` has the paper's
sizes, which want a GPU (``--device cuda``): a processor would take days.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import torch
from point_clouds.clouds import Clouds, generated, modelnet
from point_clouds.pointnet import POOLINGS
from point_clouds.training import Recipe, Score, score, train
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

mpl.use("Agg")
import matplotlib.pyplot as plt

TESTED = (0, 1, 10, 20, 30, 40, 50, 60, 70, 80, 90)  # per cent of outliers, as in Table 4

Curve = dict[int, Score]  # by per cent of outliers


@dataclass(frozen=True)
class Form:
    """How large the experiment is.

    Attributes
    ----------
    recipe : Recipe
    points : int
        Of each cloud.
    clouds : tuple of int
        For training and test, at most, of each class.
    trained : tuple of int
        Per cents of outliers for which networks are trained; the first is 0.
    """

    recipe: Recipe
    points: int
    clouds: tuple[int, int]
    trained: tuple[int, ...]


REDUCED = Form(
    Recipe((32, 64, 64), (64,), epochs=5, batch=32, step_size=0.04),
    points=128,
    clouds=(100, 40),
    trained=(0, 20, 50, 90),
)
FULL = Form(Recipe(), points=2048, clouds=(1000, 100), trained=(0, 10, 20, 50, 90))


# ---------------------------------------------------------------------------------- experiment


@dataclass(frozen=True)
class Results:
    """Scores by pooling and per cent of outliers.

    Attributes
    ----------
    matched : dict
        Trained and tested with the same share of outliers (Table 3).
    clean : dict
        Trained without outliers (Table 4).
    """

    matched: dict[str, Curve]
    clean: dict[str, Curve]


def experiment(data: tuple[Clouds, Clouds], form: Form, poolings: Sequence[str]) -> Results:
    """Train a network for each pooling and share of outliers, and test it."""
    results = Results({name: {} for name in poolings}, {name: {} for name in poolings})
    total = len(poolings) * len(form.trained) * form.recipe.epochs
    with tqdm(total=total, unit="epoch") as bar:
        for name in poolings:
            for percent in form.trained:
                bar.set_description(f"training PointNet-{name}, {percent} % outliers")
                curve = _curve(data, name, percent, form.recipe, bar)
                results.matched[name][percent] = curve[percent]
                if percent == 0:
                    results.clean[name].update(curve)
    return results


def _curve(
    data: tuple[Clouds, Clouds], pooling: str, percent: int, recipe: Recipe, bar: tqdm
) -> Curve:
    """Scores of one network: with its own share of outliers, or all if it was trained without."""
    training, test = data
    net = train(pooling, training, percent, recipe, bar)
    tested = (percent,) if percent else TESTED
    return {share: score(net, test, share, recipe) for share in tested}


def half_left(curve: Curve) -> float:
    """Per cent of outliers at which half of the accuracy without outliers is left."""
    half = curve[0].accuracy / 2
    for before, after in pairwise(sorted(curve)):
        high, low = curve[before].accuracy, curve[after].accuracy
        if low < half:
            return before + (after - before) * (high - half) / (high - low)
    return max(curve)


# -------------------------------------------------------------------------- tables and picture


def table_of(curves: dict[str, Curve], title: str) -> Table:
    """Accuracy and mean average precision, both in per cent, the best of each row bold."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("\nO %", justify="right")
    for heading in ("top-1", "mAP"):
        for i, name in enumerate(curves):
            table.add_column(f"{'' if i else heading}\n{name}", justify="right")
    for percent in next(iter(curves.values())):
        scores = [curve[percent] for curve in curves.values()]
        accuracies = _row([score.accuracy for score in scores])
        table.add_row(str(percent), *accuracies, *_row([score.precision for score in scores]))
    return table


def _row(shares: list[float]) -> list[str]:
    texts = [f"{100 * share:.1f}" for share in shares]
    best = f"{100 * max(shares):.1f}"
    return [f"[bold]{text}[/bold]" if text == best else text for text in texts]


def outcome(results: Results) -> str:
    """The numbers of the tables in one sentence."""
    halves = [f"{name} {half_left(curve):.0f} %" for name, curve in results.clean.items()]
    return (
        "O %: share of the points that are outliers. Half of the accuracy on clean clouds is left, "
        f"for networks trained on clean clouds, at this share of outliers: {', '.join(halves)}."
    )


def plot(results: Results, chance: float, path: Path) -> None:
    """Draw accuracy against the share of outliers, one panel for each table."""
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.6), sharey=True, layout="constrained")
    titles = "Trained without outliers", "Trained with as many outliers"
    for axes, curves, title in zip(panels, (results.clean, results.matched), titles, strict=True):
        _draw(axes, curves)
        axes.axhline(100 * chance, color="grey", ls=":", lw=1)
        axes.text(0, 100 * chance, "chance", color="grey", va="top", fontsize=8)
        axes.set_title(title)
        axes.set_xlabel("outliers among the points of a test cloud (%)")
    panels[0].set_ylabel("top-1 accuracy (%)")
    panels[0].set_ylim(0, 100)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, title="pooling", loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axes: plt.Axes, curves: dict[str, Curve]) -> None:
    """One line for each pooling; colour and marker depend on nothing but its name."""
    for i, (name, penalty) in enumerate(POOLINGS.items()):
        if name not in curves:
            continue
        shares = sorted(curves[name])
        accuracies = [100 * curves[name][share].accuracy for share in shares]
        label = name if penalty is None else f"{name}: {penalty.replace('_', ' ')}"
        color = "black" if penalty is None else f"C{i - 1}"
        axes.plot(shares, accuracies, "osvD^P"[i] + "-", color=color, lw=1.4, ms=5, label=label)
    axes.grid(alpha=0.3)


# ------------------------------------------------------------------------------------- program


def load(folder: Path | None, form: Form) -> tuple[Clouds, Clouds]:
    """Training and test clouds of a folder, or generated ones if there is none."""
    if folder is None:
        return generated(form.clouds, form.points, form.recipe.seed)
    return modelnet(folder, form.clouds, form.points, form.recipe.seed)


def run(data: tuple[Clouds, Clouds], form: Form, poolings: Sequence[str], output: Path) -> Results:
    """Train, test, draw; print what is seen on the way."""
    console = Console(highlight=False)
    training, test = data
    classes = len(training.names)
    console.print(
        f"{len(training)} clouds for training and {len(test)} for test, of {classes} classes, with "
        f"{form.points} points each. {len(poolings) * len(form.trained)} networks are trained for "
        f"{form.recipe.epochs} epochs.\n"
    )
    results = experiment(data, form, poolings)
    console.print(table_of(results.matched, "Trained with as many outliers (DDN Table 3)"))
    console.print(table_of(results.clean, "Trained without outliers (DDN Table 4)"))
    console.print(outcome(results))
    plot(results, 1 / classes, output)
    console.print(f"\nAccuracy against the share of outliers: see [bold]{output}[/bold]")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = _parser()
    options = parser.parse_args(arguments)
    form = _form(options)
    try:
        data = load(options.modelnet, form)
    except ValueError as error:
        parser.error(str(error))
    if options.device.type == "cpu" and not options.full:
        torch.set_num_threads(1)  # enough for networks this small
    training, test = (part.to(options.device) for part in data)
    run((training, test), form, options.poolings, options.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Recognise point clouds among outliers.")
    parser.add_argument("--full", action="store_true", help="sizes of the paper")
    parser.add_argument("--modelnet", type=Path, metavar="PATH", help="folder ModelNet40")
    parser.add_argument(
        "--output", type=Path, default=Path("point_cloud_outliers.png"), help="picture"
    )
    parser.add_argument(
        "--poolings", nargs="+", choices=POOLINGS, default=[*POOLINGS], help="default: all"
    )
    parser.add_argument("--epochs", type=_at_least(1), help="5, or 60 in the full form")
    parser.add_argument("--points", type=_at_least(2), help="of each cloud; 128, or 2048")
    parser.add_argument(
        "--clouds", type=_at_least(1), help="of each class for training, at most; 100, or 1000"
    )
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="for example cuda"
    )
    parser.add_argument("--seed", type=int, default=0, help="of clouds, outliers and networks")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        return int(text)

    return number


def _form(options: argparse.Namespace) -> Form:
    """The form that was asked for, with what was asked for otherwise."""
    form = FULL if options.full else REDUCED
    recipe = replace(form.recipe, epochs=options.epochs or form.recipe.epochs, seed=options.seed)
    clouds = (options.clouds or form.clouds[0], form.clouds[1])
    return replace(form, recipe=recipe, points=options.points or form.points, clouds=clouds)


if __name__ == "__main__":
    main()
