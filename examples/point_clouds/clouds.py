"""Point clouds sampled from the surfaces of solids, and outliers among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from point_clouds.modelnet import class_names, read_off, solid_files
from point_clouds.solids import SOLIDS, posed, swept

NOISE = 0.02  # standard deviation, where the cloud's radius is about 1
PARTS = "train", "test"


@dataclass(frozen=True)
class Clouds:
    """Labelled clouds, each around the origin and within the unit ball.

    Attributes
    ----------
    points : Tensor, shape (clouds, points, 3)
    labels : Tensor, shape (clouds,)
    names : tuple of str
        Of the classes.
    """

    points: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Clouds:
        return Clouds(self.points.to(device), self.labels.to(device), self.names)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Points and labels, so many at a time, all of them or those of an order."""
        order = torch.arange(len(self)) if order is None else order
        for rows in order.to(self.labels.device).split(size):
            yield self.points[rows], self.labels[rows]


def generated(counts: tuple[int, int], points: int, seed: int) -> tuple[Clouds, Clouds]:
    """Noisy clouds of `SOLIDS` for training and test; `counts` are those of each class."""
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=len(PARTS) * len(SOLIDS), desc="sampling solids", unit="class")

    def sample(solid: str, count: int) -> Tensor:
        bar.update()
        triangles = posed(swept(*SOLIDS[solid]), count, generator)
        clouds = normalised(on_surface(triangles, points, generator))
        return normalised(clouds + NOISE * torch.randn(clouds.shape, generator=generator))

    with bar:
        train, test = ([sample(solid, count) for solid in SOLIDS] for count in counts)
        return _labelled(train, list(SOLIDS)), _labelled(test, list(SOLIDS))


def modelnet(folder: Path, most: tuple[int, int], points: int, seed: int) -> tuple[Clouds, Clouds]:
    """Clouds of the solids of a folder, at most so many of each class for training and test."""
    generator = torch.Generator().manual_seed(seed)
    names = class_names(folder)

    def sample(part: str, count: int) -> Clouds:
        files = [solid_files(folder, name, part, count) for name in names]
        with tqdm(total=sum(map(len, files)), desc=f"reading {part}", unit="file") as bar:
            return _labelled([_read(some, points, generator, bar) for some in files], names)

    train, test = map(sample, PARTS, most)
    return train, test


def _read(files: list[Path], points: int, generator: torch.Generator, bar: tqdm) -> Tensor:
    clouds = []
    for path in files:
        triangles = read_off(path)[None]
        if not _areas(triangles).sum().isfinite() or not _areas(triangles).any():
            raise ValueError(f"{path}: the surface has no area, or none that is finite.")
        clouds.append(normalised(on_surface(triangles, points, generator)))
        bar.update()
    return torch.cat(clouds)


def _labelled(clouds: list[Tensor], names: list[str]) -> Clouds:
    """One data set of a list with the clouds of each class."""
    sizes = torch.tensor([len(some) for some in clouds])
    labels = torch.arange(len(clouds)).repeat_interleave(sizes)
    return Clouds(torch.cat(clouds), labels, tuple(names))


def on_surface(
    triangles: Tensor,  # (solids, triangles, 3 corners, 3)
    count: int,
    generator: torch.Generator,
) -> Tensor:  # (solids, count, 3)
    """Points that are uniformly distributed on the surface of each solid."""
    chosen = torch.multinomial(_areas(triangles), count, replacement=True, generator=generator)
    corners = triangles[torch.arange(len(triangles))[:, None], chosen]
    u, v = torch.rand(2, len(triangles), count, 1, generator=generator)
    beyond = u + v > 1  # the other half of the parallelogram
    u, v = torch.where(beyond, 1 - u, u), torch.where(beyond, 1 - v, v)
    a, b, c = corners.unbind(2)
    return a + u * (b - a) + v * (c - a)


def _areas(triangles: Tensor) -> Tensor:  # (solids, triangles, 3, 3) -> (solids, triangles)
    a, b, c = triangles.unbind(2)
    return torch.linalg.cross(b - a, c - a).norm(dim=-1) / 2


def normalised(points: Tensor) -> Tensor:  # (clouds, points, 3)
    """Clouds moved to the origin and shrunk or stretched to touch the unit sphere."""
    centred = points - points.mean(1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).amax(1, keepdim=True)


def with_outliers(
    points: Tensor,  # (clouds, points, 3)
    percent: float,
    generator: torch.Generator,
) -> Tensor:
    """The clouds with that share of their points moved to anywhere in the unit ball."""
    clouds, count, _ = points.shape
    device = points.device
    order, volume = torch.rand(2, clouds, count, 1, generator=generator, device=device)
    direction = torch.randn(points.shape, generator=generator, device=device)
    outliers = torch.nn.functional.normalize(direction, dim=-1) * volume ** (1 / 3)
    return torch.where(order.argsort(1) < int(percent * count / 100), outliers, points)
