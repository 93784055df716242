"""Training of a PointNet on clouds with outliers, and its scores on others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.metrics import average_precision_score
from torch import nn
from tqdm import tqdm

from point_clouds.clouds import Clouds, with_outliers
from point_clouds.pointnet import PointNet


@dataclass(frozen=True)
class Recipe:
    """How large a network is and how it is trained.

    The defaults are those of DDN Sec. 7: stochastic gradient descent, whose step is halved after
    each third of the epochs.
    """

    point_channels: tuple[int, ...] = (64, 128, 1024)
    head_channels: tuple[int, ...] = (512, 256)
    epochs: int = 60
    batch: int = 24
    step_size: float = 0.01
    momentum: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Share of the clouds that are recognised, and mean average precision over the classes."""

    accuracy: float
    precision: float


def train(pooling: str, clouds: Clouds, percent: float, recipe: Recipe, bar: tqdm) -> PointNet:
    """A network trained on clouds of which so many per cent are outliers, drawn anew each epoch.

    The same recipe gives networks with different poolings the same start, batches and outliers.
    The bar moves by one each epoch.
    """
    device = clouds.points.device
    torch.manual_seed(recipe.seed)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    classes = len(clouds.names)
    net = PointNet(pooling, classes, recipe.point_channels, recipe.head_channels).to(device)
    optimiser = torch.optim.SGD(net.parameters(), recipe.step_size, recipe.momentum)
    third = max(1, recipe.epochs // 3)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, third, gamma=0.5)
    for _ in range(recipe.epochs):
        _epoch(net, clouds, percent, recipe.batch, optimiser, generator)
        schedule.step()
        bar.update()
    return net


def _epoch(
    net: nn.Module,
    clouds: Clouds,
    percent: float,
    batch: int,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    net.train()
    batch = min(batch, len(clouds))
    order = torch.randperm(len(clouds))[: len(clouds) // batch * batch]
    for points, labels in clouds.batches(batch, order):
        optimiser.zero_grad()
        logits = net(with_outliers(points, percent, generator))
        nn.functional.cross_entropy(logits, labels).backward()
        optimiser.step()


@torch.no_grad()
def score(net: nn.Module, clouds: Clouds, percent: float, recipe: Recipe) -> Score:
    """Quality on clouds of which so many per cent are outliers, the same for every network."""
    net.eval()
    generator = torch.Generator(clouds.points.device).manual_seed(recipe.seed)
    batches = clouds.batches(recipe.batch)
    logits = torch.cat([net(with_outliers(points, percent, generator)) for points, _ in batches])
    hit = logits.argmax(1) == clouds.labels
    truth = nn.functional.one_hot(clouds.labels, len(clouds.names))
    precision = average_precision_score(truth.cpu(), logits.softmax(1).cpu(), average="macro")
    return Score(float(hit.double().mean()), float(precision))
