"""PointNet without its alignment networks (Qi et al., 2017), the pooling exchangeable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from declarative_cvx import RobustPool

# By the names of DDN Tables 3 and 4, with the penalty that takes the place of the maximum.
POOLINGS: dict[str, str | None] = {
    "max": None,
    "Q": "quadratic",
    "PH": "pseudo_huber",
    "H": "huber",
    "W": "welsch",
    "TQ": "truncated_quadratic",
}


class MaxPool(nn.Module):
    """Largest value over the points."""

    def forward(self, features: Tensor) -> Tensor:  # (clouds, points, channels)
        return features.amax(1)


def pooling_named(name: str) -> nn.Module:
    """A layer from (clouds, points, channels) to (clouds, channels).

    The features that it sees are batch-normalised, which is what makes alpha = 1 a sensible
    threshold for all of them.
    """
    penalty = POOLINGS[name]
    if penalty is None:
        return MaxPool()
    return RobustPool(penalty, alpha=1.0, dim=1, keepdim=False)


class PointNet(nn.Module):
    """A network applied to each point, a pooling over the points, and a classifier.

    Parameters
    ----------
    pooling : str
        Key of `POOLINGS`.
    classes : int
    point_channels, head_channels : sequence of int
        Widths of the layers before and after the pooling.
    """

    def __init__(
        self,
        pooling: str,
        classes: int,
        point_channels: Sequence[int],
        head_channels: Sequence[int],
    ) -> None:
        super().__init__()
        *hidden, last = point_channels
        self.of_point = nn.Sequential(
            *_layers([3, *hidden]), nn.Linear([3, *hidden][-1], last), nn.BatchNorm1d(last)
        )
        self.pooling = pooling_named(pooling)
        self.head = nn.Sequential(
            *_layers([last, *head_channels]),
            nn.Dropout(0.3),
            nn.Linear([last, *head_channels][-1], classes),
        )

    def forward(self, points: Tensor) -> Tensor:  # (clouds, points, 3) -> (clouds, classes)
        """Logits of the classes."""
        features = self.of_point(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        return self.head(self.pooling(features))


def _layers(channels: list[int]) -> list[nn.Module]:
    return [
        layer
        for inputs, outputs in pairwise(channels)
        for layer in (nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())
    ]
