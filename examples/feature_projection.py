"""Project features onto spheres and balls before the last layer of a residual network.

The experiment of Table 5 in *Deep Declarative Networks* (Gould, Hartley, Campbell). Between the
features of a residual network and its last, linear layer stand a batch normalisation without
parameters and a projection onto an L1, L2 or L-infinity sphere or ball. Its radius is the paper's:

    r_p = 2/3 median_i ||f_i||_p,

where f_i are the batch-normalised features of the training images in the network without
projection, trained first. So most features lie outside the ball, but not by much. For the 512
features of ResNet-18 on ImageNet that gave 250, 15 and 3.

Measured are, on images that took no part in the training,

- top-1 accuracy;
- mean average precision (mAP): for each class all images are ranked, and the precision averaged
  over the recall. The paper ranks by the scores that go into the softmax, which need not be
  comparable between images; ranking by the probabilities that come out of it is given, too;
- the expected calibration error (ECE): how far confidence and accuracy are apart.

By default the images are scikit-learn's digits with noise as strong as the signal, so that a small
network reaches about 83 %. The paper's effect appears: accuracy hardly changes, and the mAP by
scores goes up by about 2 to 4 points, most with the L2 norm; batch normalisation alone does
little. Ranking by probabilities shows no such difference, and no calibration error gets smaller by
more than its spread: what the projection brings is scores that can be compared between images.

Run it with ``python examples/feature_projection.py``, and on images of your own, in one folder a
class or in such folders under ``train`` and ``val``, for instance with ``--images PATH --side 64
--width 64 --blocks 2 --epochs 90 --seeds 3 --device cuda``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from declarative_cvx import Projection

mpl.use("Agg")
import matplotlib.pyplot as plt

BATCH = 64
STEP_SIZE = 0.1  # divided by 10 after each third of the epochs; momentum and decay as in the paper
BINS = 15  # of confidence, in the calibration error
PLAIN, NORMALISED = "none", "batch norm"
VARIANTS: dict[str, tuple[str, float]] = {
    PLAIN: ("", 0),
    NORMALISED: ("", 0),
    "L1 sphere": ("sphere", 1),
    "L2 sphere": ("sphere", 2),
    "Linf sphere": ("sphere", math.inf),
    "L1 ball": ("ball", 1),
    "L2 ball": ("ball", 2),
    "Linf ball": ("ball", math.inf),
}
PAPER = ("59.0", "", "62.7", "72.0", "64.0", "61.3", "72.4", "63.3")  # mAP of ResNet-18, ImageNet


@dataclass(frozen=True)
class Settings:
    """How to train."""

    seeds: int = 3
    epochs: int = 18
    training: int = 600  # images, where the data have no split of their own
    width: int = 8  # channels of the first stage; the features are four times as many
    blocks: int = 1  # residual blocks in each of three stages
    noise: float = 1.0  # in standard deviations of a pixel, drawn anew for every use of an image
    device: str = "cpu"


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Images:
    """All images, in memory, of mean 0 and variance 1.

    Attributes
    ----------
    pixels : Tensor, shape (n, channels, side, side)
    labels : Tensor of int64, shape (n,)
    split : int or None
        Where the test images begin, if the data say so.
    """

    pixels: Tensor
    labels: Tensor
    split: int | None = None

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def rows(self, training: int, seed: int) -> tuple[Tensor, Tensor]:
        """Which images to train with, and which to test with."""
        if self.split is not None:
            return torch.arange(self.split), torch.arange(self.split, len(self.labels))
        if not 1 < training < len(self.labels):
            raise ValueError(
                f"Of {len(self.labels)} images {training} cannot be for training: there must be "
                "two at least, and one left for the test."
            )
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        return order[:training], order[training:]


def digits() -> Images:
    """The digits of scikit-learn."""
    data = load_digits()
    pixels = torch.as_tensor(data.images, dtype=torch.float32)[:, None]
    return Images(_standardised(pixels), torch.as_tensor(data.target))


def folder(path: Path, side: int) -> Images:
    """Images in one folder a class, or in such folders under train and val; scaled and cropped."""
    parts = [path / "train", path / "val"]
    parts = parts if all(part.is_dir() for part in parts) else [path]
    files = [_files(part) for part in parts]
    classes = {name: label for label, name in enumerate(sorted(set().union(*files)))}
    if len(classes) < 2:
        raise ValueError(f"{path} has no two folders with images; each is taken for a class.")
    found = [(each, classes[name]) for part in files for name in part for each in part[name]]
    pixels = [_read(file, side) for file, _ in tqdm(found, desc="reading", unit="image")]
    split = sum(map(len, files[0].values())) if len(parts) == 2 else None
    labels = torch.tensor([label for _, label in found])
    return Images(_standardised(torch.stack(pixels)), labels, split)


def _standardised(pixels: Tensor) -> Tensor:
    return (pixels - pixels.mean()) / pixels.std()


def _files(part: Path) -> dict[str, list[Path]]:
    """Image files by the name of their class."""
    known, files = Image.registered_extensions(), {}
    for directory in sorted(each for each in part.iterdir() if each.is_dir()):
        found = [file for file in sorted(directory.rglob("*")) if file.suffix.lower() in known]
        if found:
            files[directory.name] = found
    return files


def _read(file: Path, side: int) -> Tensor:
    with Image.open(file) as image:
        pixels = np.array(ImageOps.fit(image.convert("RGB"), (side, side)))
    return torch.as_tensor(pixels).movedim(-1, 0).float()


class Loader:
    """Batches of images with noise, the same for the same seed."""

    def __init__(self, images: Images, settings: Settings, seed: int) -> None:
        self.images, self.settings = images, settings
        self.generator = torch.Generator().manual_seed(seed)

    def shuffled(self, rows: Tensor) -> Tensor:
        """The same rows in another order."""
        return rows[torch.randperm(len(rows), generator=self.generator)]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, channels, side, side) and labels (n,) on the device."""
        x = self.images.pixels[rows]
        x = x + self.settings.noise * torch.randn(x.shape, generator=self.generator)
        return x.to(self.settings.device), self.images.labels[rows].to(self.settings.device)


# ------------------------------------------------------------------------------------- network


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.short: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.short = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.short(x))


class ResNet(nn.Module):
    """Three stages of residual blocks, a mean over the image, a projection, a linear layer."""

    def __init__(
        self, images: Images, settings: Settings, name: str, radii: Mapping[float, float]
    ) -> None:
        super().__init__()
        width = settings.width
        self.features = nn.Sequential(
            nn.Conv2d(images.pixels.shape[1], width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *_stages(width, settings.blocks),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.project = projection(name, 4 * width, radii)
        self.last = nn.Linear(4 * width, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.project(self.features(x)))


def _stages(width: int, blocks: int) -> Iterator[Block]:
    channels = width
    for stage in range(3):
        for block in range(blocks):
            out = width * 2**stage
            yield Block(channels, out, stride=2 if stage > 0 and block == 0 else 1)
            channels = out


def projection(name: str, features: int, radii: Mapping[float, float]) -> nn.Module:
    """What stands between the features and the last layer."""
    if name == PLAIN:
        return nn.Identity()
    norm = nn.BatchNorm1d(features, affine=False)
    if name == NORMALISED:
        return norm
    onto, p = VARIANTS[name]
    return nn.Sequential(norm, Projection(onto, p=p, radius=radii[p]))


# ---------------------------------------------------------------------------- training and test


def train(model: ResNet, loader: Loader, rows: Tensor, epochs: int, progress: tqdm) -> None:
    """Stochastic gradient descent as in the paper."""
    optimiser = torch.optim.SGD(model.parameters(), STEP_SIZE, momentum=0.9, weight_decay=1e-4)
    thirds = [epochs // 3, 2 * epochs // 3]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, thirds, 0.1)
    model.train()
    for _ in range(epochs):
        for chosen in loader.shuffled(rows).split(BATCH):
            if len(chosen) > 1:  # of a single image batch normalisation makes nothing
                optimiser.zero_grad()
                x, labels = loader.batch(chosen)
                functional.cross_entropy(model(x), labels).backward()
                optimiser.step()
        schedule.step()
        progress.update()


@torch.no_grad()
def outputs(model: nn.Module, loader: Loader, rows: Tensor) -> Tensor:
    """What a network in evaluation mode makes of images, (n, outputs)."""
    model.eval()
    return torch.cat([model(loader.batch(chosen)[0]).cpu() for chosen in rows.split(4 * BATCH)])


def paper_radii(features: Tensor) -> dict[float, float]:
    """Two thirds of the median norm of batch-normalised features (n, features), for each p."""
    normed = functional.batch_norm(features, None, None, training=True)
    return {p: 2 / 3 * float(normed.norm(p, dim=1).median()) for p in (1, 2, math.inf)}


# ------------------------------------------------------------------------------------- measures


def mean_average_precision(values: Tensor, labels: Tensor) -> float:
    """Area under precision over recall, mean over the classes; values (n, classes).

    As in Pascal VOC from 2010 on and in the paper, the precision at a recall is the best one at
    this recall or a higher one. Classes without an image are left out.
    """
    order = values.argsort(dim=0, descending=True, stable=True)
    hit = (labels[order] == torch.arange(values.shape[1])).double()  # (n, classes)
    precision = hit.cumsum(0) / torch.arange(1, len(values) + 1)[:, None]
    best = precision.flip(0).cummax(0).values.flip(0)
    return float(((best * hit).sum(0) / hit.sum(0)).nanmean())


def reliability(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of images, mean confidence and accuracy, for each of BINS bins of confidence."""
    confidence, found = probabilities.max(1)
    index = (confidence * BINS).long().clamp_max(BINS - 1)
    count = torch.bincount(index, minlength=BINS)
    total = torch.bincount(index, confidence, minlength=BINS)
    right = torch.bincount(index, (found == labels).to(confidence), minlength=BINS)
    return count, total / count, right / count


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Mean distance of confidence to accuracy, over all images (ECE)."""
    count, confidence, accuracy = reliability(probabilities, labels)
    return float((count * (confidence - accuracy).abs()).nansum() / count.sum())


def measures(scores: Tensor, labels: Tensor) -> Tensor:
    """Top-1, mAP by scores, mAP by probabilities and ECE in percent, shape (4,)."""
    p = scores.double().softmax(1)
    top1 = float((p.argmax(1) == labels).double().mean())
    precisions = [mean_average_precision(values, labels) for values in (scores, p)]
    return 100 * torch.tensor([top1, *precisions, calibration_error(p, labels)])


# ------------------------------------------------------------------------------------ experiment


@dataclass(frozen=True)
class Report:
    """Everything found, with one entry a seed in each list.

    Attributes
    ----------
    scores : dict from the name of a variant to a list of Tensor, shape (n, classes)
        What the networks said of the test images.
    labels : list of Tensor, shape (n,)
    radii : list of dict from p to a radius
    """

    scores: dict[str, list[Tensor]]
    labels: list[Tensor]
    radii: list[dict[float, float]]

    def measures(self, name: str) -> Tensor:
        """Of one variant, shape (seeds, 4)."""
        pairs = zip(self.scores[name], self.labels, strict=True)
        return torch.stack([measures(scores, labels) for scores, labels in pairs])


def compare(images: Images, settings: Settings) -> Report:
    """Train all networks for all seeds."""
    report = Report({name: [] for name in VARIANTS}, [], [])
    with tqdm(total=settings.seeds * len(VARIANTS) * settings.epochs, unit="epoch") as progress:
        for seed in range(settings.seeds):
            _compare(images, settings, seed, progress, report)
    return report


def _compare(images: Images, settings: Settings, seed: int, progress: tqdm, report: Report) -> None:
    """All networks from one start: the plain one first, for it sets the radii."""
    training, test = images.rows(settings.training, seed)
    radii: dict[float, float] = {}
    for name in VARIANTS:
        progress.set_description(f"seed {seed}, {name:15}")
        torch.manual_seed(seed)
        model = ResNet(images, settings, name, radii).to(settings.device)
        loader = Loader(images, settings, seed)
        train(model, loader, training, settings.epochs, progress)
        if name == PLAIN:
            radii = paper_radii(outputs(model.features, loader, training))
        unseen = Loader(images, settings, seed + 1)  # with noise of its own
        report.scores[name].append(outputs(model, unseen, test))
    report.labels.append(images.labels[test])
    report.radii.append(radii)


# --------------------------------------------------------------------------- table and picture


def table_of(report: Report) -> Table:
    """Means over the seeds, with standard deviations where there are several."""
    table = Table(title=f"In %, mean and standard deviation over seeds: {len(report.labels)}")
    table.add_column("projection", no_wrap=True)
    headings = ("radius", "top-1", "mAP by\nscore", "mAP by\nprob.", "ECE", "paper's\nmAP")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for (name, (_, p)), paper in zip(VARIANTS.items(), PAPER, strict=True):
        radii = [found[p] for found in report.radii if p]
        radius = f"{sum(radii) / len(radii):.1f}" if radii else ""
        table.add_row(name, radius, *map(_spread, report.measures(name).unbind(1)), paper)
    return table


def _spread(values: Tensor) -> str:  # (seeds,)
    return f"{values.mean():.1f}" + (f"±{values.std():.1f}" if len(values) > 1 else "")


def plot(report: Report, path: Path) -> None:
    """Draw both mAPs of every network, and the reliability of three."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    at = np.arange(len(VARIANTS))
    values = np.stack([report.measures(name) for name in VARIANTS])  # (variants, seeds, 4)
    for column, label, x in ((1, "ranked by score", at - 0.12), (2, "by probability", at + 0.12)):
        (bars,) = left.plot(x, values[:, :, column].mean(1), "_", ms=14, mew=3, label=label)
        left.plot(x, values[:, :, column], ".", color=bars.get_color(), alpha=0.5)
    left.set_xticks(at, list(VARIANTS), rotation=35, ha="right")
    left.set(ylabel="mean average precision (%)", title="Each dot one seed, bars the means")
    left.legend()
    right.plot([0, 1], [0, 1], color="gray", lw=1, ls="--", label="calibrated")
    for name, color in ((PLAIN, "black"), ("L2 sphere", "C2"), ("L2 ball", "C3")):
        _draw_reliability(right, report, name, color)
    right.set(xlabel="confidence", ylabel="accuracy", title="Reliability, all seeds together")
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_reliability(axes: plt.Axes, report: Report, name: str, color: str) -> None:
    p = torch.cat(report.scores[name]).double().softmax(1)
    count, confidence, accuracy = reliability(p, torch.cat(report.labels))
    many = count >= 20  # with fewer, accuracy is mostly chance
    axes.plot(confidence[many].numpy(), accuracy[many].numpy(), "o-", ms=4, color=color, label=name)


# ------------------------------------------------------------------------------------- program


def run(output: Path, images: Images, settings: Settings) -> Report:
    """Train, measure, draw; print what is seen on the way."""
    console = Console(highlight=False)
    console.print(introduction(images, settings))
    began = time.process_time()
    report = compare(images, settings)
    console.print(table_of(report), LEGEND)
    plot(report, output)
    console.print(
        f"\n{time.process_time() - began:.0f} s of processor time. Precision and calibration: see "
        f"[bold]{output}[/bold]"
    )
    return report


LEGEND = (
    "radius: two thirds of the median norm of the batch-normalised features of the network without "
    "projection. mAP by score is the paper's measure: images are ranked by what goes into the "
    "softmax; mAP by probability: by what comes out. ECE: expected calibration error, 0 for a "
    "network that is as often right as it says. The paper's mAP is that of ResNet-18 on ImageNet."
)


def introduction(images: Images, settings: Settings) -> str:
    """What is going to happen."""
    training, test = images.rows(settings.training, 0)
    return (
        f"{len(VARIANTS)} residual networks for {images.classes} classes are trained on "
        f"{len(training)} images, and tested on {len(test)} others, with {settings.seeds} seeds. "
        "They differ in what stands before the last layer: nothing, batch normalisation, or that "
        "and a projection onto a sphere or a ball.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Project features before the last layer.")
    parser.add_argument("--output", type=Path, default=Path("feature_projection.png"))
    parser.add_argument("--images", type=Path, help="folder of images; default: digits")
    parser.add_argument("--side", type=int, default=32, help="pixels to scale these images to")
    helps = {
        "seeds": "how often to repeat everything",
        "epochs": "passes over the training images",
        "training": "images to train with, if there are no train and val folders",
        "width": "channels of the first stage",
        "blocks": "residual blocks a stage",
        "noise": "added to pixels, in their standard deviations (default: 1 for digits, else 0)",
        "device": "where to train",
    }
    for name, text in helps.items():
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=type(default), help=text)
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in helps if getattr(options, name) is not None}
    if options.images is not None:
        given.setdefault("noise", 0.0)
    torch.set_num_threads(1 if given.get("device", "cpu") == "cpu" else torch.get_num_threads())
    settings = replace(Settings(), **given)
    try:
        images = digits() if options.images is None else folder(options.images, options.side)
        images.rows(settings.training, seed=0)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run(options.output, images, settings)


if __name__ == "__main__":
    main()
