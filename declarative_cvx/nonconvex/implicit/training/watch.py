"""What is looked at between the sweeps of an estimator's training."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from declarative_cvx.errors import MissingBackendError
from declarative_cvx.nonconvex.implicit.training.descent import implicit_weights
from declarative_cvx.nonconvex.implicit.training.history import SweepRecord
from declarative_cvx.nonconvex.implicit.training.lifted import LiftedProblem, Variables
from declarative_cvx.nonconvex.implicit.training.parameter_matrix import ParameterMatrix


class Watch:
    """After each sweep: the progress bar, and the score of data that were held out."""

    def __init__(self, estimator: Any, problem: LiftedProblem, u: Tensor, y: Tensor) -> None:
        self.estimator, self.problem, self.u, self.y = estimator, problem, u, y
        self.best: ParameterMatrix | None = None
        self.score, self.waited = -math.inf, 0
        self.bar = _bar(estimator.max_sweeps) if estimator.progress else None

    def __call__(self, at: Variables, record: SweepRecord) -> bool:
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(objective=f"{record.objective:.4g}")
        return bool(len(self.u)) and self._judge(at.weights)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _judge(self, weights: ParameterMatrix) -> bool:
        scale = self.estimator._data_scale
        model = scale.folded(implicit_weights(weights, self.problem))
        score = self.estimator._score_of(model, self.u, self.y)
        if score > self.score + 1e-12:
            self.best, self.score, self.waited = weights, score, 0
        else:
            self.waited += 1
        return self.waited >= self.estimator.n_iter_no_change


def _bar(sweeps: int) -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingBackendError(
            "progress=True needs tqdm, which is not installed. Run: pip install tqdm."
        ) from error
    return tqdm(total=sweeps, desc="block coordinate descent", unit="sweep")
