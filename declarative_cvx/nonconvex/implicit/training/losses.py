"""Losses of predictions: convex, with a first and a second derivative."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from declarative_cvx.errors import ParameterError, SpecificationError, nearest


class Loss(ABC):
    """L(y, prediction), a sum over data points (IDL Sec. 4.1). Tensors have shape (batch, q)."""

    name: ClassVar[str]
    quadratic: ClassVar[bool] = False
    curvature: ClassVar[float]  # largest eigenvalue that the second derivative can have

    @abstractmethod
    def value(self, y: Tensor, prediction: Tensor) -> Tensor:
        """Of each data point, shape (batch,)."""

    @abstractmethod
    def gradient(self, y: Tensor, prediction: Tensor) -> Tensor:
        """In the prediction, shape (batch, q)."""

    @abstractmethod
    def hessian(self, prediction: Tensor) -> Tensor:
        """In the prediction: shape (q, q) if it is constant, else (batch, q, q)."""

    def check(self, y: Tensor) -> None:  # noqa: B027 (there may be nothing to check)
        """Refuse targets that the loss is not made for."""


@dataclass(frozen=True)
class SquaredLoss(Loss):
    """||y - prediction||^2 / 2"""

    name: ClassVar[str] = "squared"
    quadratic: ClassVar[bool] = True
    curvature: ClassVar[float] = 1.0

    def value(self, y: Tensor, prediction: Tensor) -> Tensor:
        return (prediction - y).square().sum(1) / 2

    def gradient(self, y: Tensor, prediction: Tensor) -> Tensor:
        return prediction - y

    def hessian(self, prediction: Tensor) -> Tensor:
        q = prediction.shape[1]
        return torch.eye(q, dtype=prediction.dtype, device=prediction.device)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """log sum exp(prediction) - y'prediction, for probabilities y (IDL eq. 4)."""

    name: ClassVar[str] = "cross_entropy"
    curvature: ClassVar[float] = 0.5

    def value(self, y: Tensor, prediction: Tensor) -> Tensor:
        return -(y * functional.log_softmax(prediction, 1)).sum(1)

    def gradient(self, y: Tensor, prediction: Tensor) -> Tensor:
        return prediction.softmax(1) - y

    def hessian(self, prediction: Tensor) -> Tensor:
        s = prediction.softmax(1)
        return torch.diag_embed(s) - s[:, :, None] * s[:, None, :]

    def check(self, y: Tensor) -> None:
        bad = ((y < 0).any(1) | ((y.sum(1) - 1).abs() > 1e-6)).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ParameterError(
                f"y[{row}] = {y[row].tolist()} is not a vector of probabilities; cross-entropy "
                "takes rows that are nonnegative and sum to 1, such as one-hot labels."
            )


LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (SquaredLoss, CrossEntropy)}


def as_loss(spec: str | Loss) -> Loss:
    """A loss by its name, or as it is."""
    if isinstance(spec, Loss):
        return spec
    if spec not in LOSSES:
        raise SpecificationError(f"Unknown loss {spec!r}. {nearest(str(spec), LOSSES)}")
    return LOSSES[spec]()
