"""Implicit models as scikit-learn estimators, trained by block coordinate descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.errors import MissingBackendError, ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import ActivationLike
from declarative_cvx.nonconvex.implicit.equilibrium import solve_equilibrium
from declarative_cvx.nonconvex.implicit.model import ImplicitModel
from declarative_cvx.nonconvex.implicit.training.blocks import BlockMethod
from declarative_cvx.nonconvex.implicit.training.descent import (
    BlockCoordinateDescent,
    Continuation,
    Lifting,
    first_weights,
    implicit_weights,
    refit_outputs,
    started,
)
from declarative_cvx.nonconvex.implicit.training.hand_over import model_of
from declarative_cvx.nonconvex.implicit.training.history import History
from declarative_cvx.nonconvex.implicit.training.lifted import LiftedProblem, Past, remember
from declarative_cvx.nonconvex.implicit.training.parameter_matrix import ParameterMatrix
from declarative_cvx.nonconvex.implicit.training.penalties import Penalties
from declarative_cvx.nonconvex.implicit.training.penalty_terms import PenaltyTerm, Ridge, RowBall
from declarative_cvx.nonconvex.implicit.training.standardisation import Standardisation
from declarative_cvx.nonconvex.implicit.training.watch import Watch
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise MissingBackendError(
        "ImplicitRegressor and ImplicitClassifier need scikit-learn 1.6 or newer, which is not "
        "installed. Run: pip install scikit-learn. BlockCoordinateDescent does without."
    ) from error


_PARAMETERS = """
    Parameters
    ----------
    n_states : int
        n, the size of the state.
    activation : Activation, str or sequence of pairs
        With a potential: "relu", "leaky_relu", "tanh", "sigmoid" or blocks of these.
    kappa : float
        ||A||_inf <= kappa; below 1 / the activation's Lipschitz constant the model is well posed.
    ridge : float
        Weight of the squares of A, B and D, and of those of C times the number of data points:
        without the latter a large C and small states would fit anything.
    penalty : PenaltyTerm or sequence of them, optional
        In place of `kappa` and `ridge`.
    lam : float or sequence of n floats
        Weight of the Fenchel divergence (IDL eq. 10, 11).
    mu : float or None
        Weight of ||X - P||^2 / 2; None stands for X = P (IDL eq. 9).
    continuation : Continuation, optional
        How lam and mu grow from sweep to sweep.
    max_sweeps : int
    tol : float
        Training stops when a sweep lowers the objective by less than this, relative to it.
    method : BlockMethod, optional
        How blocks are minimised.
    refit : bool
        Whether (C, D, c) are fitted once more at the end, to the true equilibria.
    standardise : bool
        Train on inputs (and targets of a regression) of mean 0 and variance 1. The weights are
        those for the data as they were.
    early_stopping : bool
        Hold data out, keep the weights with the best score on it, and stop after
        `n_iter_no_change` sweeps without a better one.
    validation_fraction : float
    n_iter_no_change : int
    batch_sweeps : int
        Sweeps of one call of `partial_fit`.
    memory : float
        Weight of all earlier batches together at each new one, 1 for no forgetting.
    progress : bool
        Show a progress bar (tqdm).
    random_state : int, RandomState or None

    Attributes
    ----------
    weights_ : ImplicitWeights
    model_ : ImplicitModel
        Made anew each time it is asked for.
    history_ : History
        Objectives, and every block's residual.
    n_iter_ : int
        Sweeps.
    n_features_in_ : int
"""


class _ImplicitEstimator(BaseEstimator):
    """What both estimators share: parameters, training, the equilibrium."""

    _loss: str
    _past: Past | None

    def __init__(
        self,
        n_states: int = 20,
        *,
        activation: ActivationLike = "relu",
        kappa: float = 0.95,
        ridge: float = 0.01,
        penalty: PenaltyTerm | Sequence[PenaltyTerm] | None = None,
        lam: float | Sequence[float] = 10.0,
        mu: float | None = 3.0,
        continuation: Continuation | None = None,
        max_sweeps: int = 20,
        tol: float = 1e-4,
        method: BlockMethod | None = None,
        refit: bool = True,
        standardise: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        batch_sweeps: int = 3,
        memory: float = 1.0,
        progress: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_states = n_states
        self.activation = activation
        self.kappa = kappa
        self.ridge = ridge
        self.penalty = penalty
        self.lam = lam
        self.mu = mu
        self.continuation = continuation
        self.max_sweeps = max_sweeps
        self.tol = tol
        self.method = method
        self.refit = refit
        self.standardise = standardise
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.batch_sweeps = batch_sweeps
        self.memory = memory
        self.progress = progress
        self.random_state = random_state

    def _train(self, u: Tensor, y: Tensor) -> None:
        """Fit to all data at once, from random weights."""
        random = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
        held, kept = self._split(len(u), generator)
        self._data_scale = self._standardisation(u[kept], y[kept])
        problem = self._problem(u[kept], y[kept])
        start = started(problem, first_weights(problem, self.n_states, True, generator))
        watch = Watch(self, problem, u[held], y[held])
        found = self._descent(self.max_sweeps).run(problem, start, watch)
        best = found.variables.weights if watch.best is None else watch.best
        self.n_iter_ = len(found.history.sweeps)
        self._finish(found.problem, best, found.history)
        watch.close()

    def _train_batch(self, u: Tensor, y: Tensor) -> None:
        """Go on with a batch; what earlier ones said stays in their Gram matrices."""
        if not hasattr(self, "weights_"):
            self._data_scale = self._standardisation(u, y)
        past = getattr(self, "_past", None)
        problem = replace(self._problem(u, y), past=past)
        weights = self._current(problem)
        found = self._descent(self.batch_sweeps).run(problem, started(problem, weights))
        self._past = remember(found.problem, found.variables, self.memory)
        self.n_iter_ = getattr(self, "n_iter_", 0) + len(found.history.sweeps)
        self._finish(found.problem, found.variables.weights, found.history)

    def _finish(self, problem: LiftedProblem, weights: ParameterMatrix, history: History) -> None:
        if self.refit:
            x = self._equilibrium(implicit_weights(weights, problem), problem.u)
            weights = refit_outputs(problem, weights, x)
        self.history_ = history
        self.weights_ = self._data_scale.folded(implicit_weights(weights, problem))

    def _current(self, problem: LiftedProblem) -> ParameterMatrix:
        """Weights to go on from."""
        if not hasattr(self, "weights_"):
            random = check_random_state(self.random_state)
            generator = torch.Generator().manual_seed(int(random.randint(2**31 - 1)))
            return first_weights(problem, self.n_states, True, generator)
        w = self._data_scale.unfolded(self.weights_)
        return ParameterMatrix.of(w.A, w.B, w.C, w.D, w.b, w.c)

    def _problem(self, u: Tensor, y: Tensor) -> LiftedProblem:
        """In standardised data."""
        scale = self._data_scale
        lam = torch.as_tensor(self.lam, dtype=torch.float64)
        lifting = Lifting(self.activation, self._loss, self._penalty(len(u)), lam, self.mu)
        return lifting.problem(scale.inputs(u), scale.outputs(y), self.n_states)

    def _penalty(self, count: int) -> PenaltyTerm | Sequence[PenaltyTerm]:
        """Unless given: without a ridge on C that grows with the data, a large C and small states
        would fit any outputs at next to no divergence.
        """
        if self.penalty is not None:
            return self.penalty
        ball = RowBall(self.kappa)
        rest = Ridge(self.ridge, "AB"), Ridge(self.ridge, "D")
        return ball, Ridge(self.ridge * count, "C"), *rest

    def _descent(self, sweeps: int) -> BlockCoordinateDescent:
        return BlockCoordinateDescent(
            sweeps=sweeps,
            method=self.method or BlockMethod(tol=1e-6),
            tol=self.tol,
            continuation=self.continuation,
        )

    def _standardisation(self, u: Tensor, y: Tensor) -> Standardisation:
        if not self.standardise:
            return Standardisation.none(u, y)
        return Standardisation.of(u, y, outputs=self._loss == "squared")

    def _split(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of validation and of training data."""
        if not self.early_stopping:
            return torch.arange(0), torch.arange(count)
        if not 0 < self.validation_fraction < 1:
            raise SpecificationError(
                f"validation_fraction is {self.validation_fraction!r}; expected between 0 and 1."
            )
        order = torch.randperm(count, generator=generator)
        held = max(1, round(self.validation_fraction * count))
        if held >= count:
            raise ParameterError(f"{count} data points are too few to hold some out.")
        return order[:held], order[held:]

    # ------------------------------------------------------------------------------ prediction

    def _equilibrium(self, weights: ImplicitWeights, u: Tensor) -> Tensor:
        offset = u @ weights.B.T + weights.b
        found = solve_equilibrium(weights.A, offset, weights.activation)
        found.require_solved()
        return found.x

    def _outputs(self, weights: ImplicitWeights, u: Tensor) -> Tensor:
        x = self._equilibrium(weights, u)
        return x @ weights.C.T + u @ weights.D.T + weights.c

    def _predict(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        u = validate_data(self, X, reset=False, dtype=np.float64)
        return self._outputs(self.weights_, torch.tensor(u)).numpy()

    # ------------------------------------------------------------------------------- hand-over

    @property
    def model_(self) -> ImplicitModel:
        """A model with these weights, in float64, that can be trained further. Its A stays in the
        set that the penalty keeps it in.
        """
        check_is_fitted(self)
        return model_of(self.weights_, Penalties.of(self._penalty(1)))

    def load_model(self, model: ImplicitModel | ImplicitWeights) -> Self:
        """Take over the weights of a model, fine-tuned by backpropagation for instance.

        Parameters
        ----------
        model : ImplicitModel or ImplicitWeights
            With as many inputs and outputs as this estimator was fitted with.

        Returns
        -------
        The estimator.
        """
        check_is_fitted(self)
        given = model.weights if isinstance(model, ImplicitModel) else model
        weights = given.detach().dense().to(torch.float64, "cpu")
        for name in ("in_features", "out_features"):
            if getattr(weights, name) != getattr(self.weights_, name):
                raise ParameterError(
                    f"The model has {name}={getattr(weights, name)}, but the estimator was fitted "
                    f"with {getattr(self.weights_, name)}."
                )
        self.n_states = weights.state_features
        self.weights_ = weights
        self._past = None
        return self


class ImplicitRegressor(RegressorMixin, _ImplicitEstimator):
    __doc__ = f"""Regression by y = C x + D u + c with x = phi(A x + B u + b); squared loss.
    {_PARAMETERS}"""

    _loss = "squared"

    def fit(self, X: Any, y: Any) -> ImplicitRegressor:
        """Train on inputs (batch, p) and targets (batch,) or (batch, q)."""
        self._train(*self._checked(X, y, reset=True))
        self._past = None
        return self

    def partial_fit(self, X: Any, y: Any) -> ImplicitRegressor:
        """Go on with a batch, as if earlier batches were still there."""
        self._train_batch(*self._checked(X, y, reset=not hasattr(self, "weights_")))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Outputs, of the shape of the targets in `fit`."""
        found = self._predict(X)
        return found[:, 0] if self._flat else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _checked(self, X: Any, y: Any, *, reset: bool) -> tuple[Tensor, Tensor]:
        X, y = validate_data(
            self, X, y, reset=reset, dtype=np.float64, multi_output=True, y_numeric=True
        )
        if reset:
            self._flat = y.ndim == 1
        columns = y.reshape(len(y), -1).astype(np.float64)
        return torch.tensor(X), torch.tensor(columns)

    def _score_of(self, weights: ImplicitWeights, u: Tensor, y: Tensor) -> float:
        return float(r2_score(y.numpy(), self._outputs(weights, u).numpy()))


class ImplicitClassifier(ClassifierMixin, _ImplicitEstimator):
    __doc__ = f"""Classification by softmax of C x + D u + c with x = phi(A x + B u + b).
    {_PARAMETERS}
    classes_ : array
    """

    _loss = "cross_entropy"

    def fit(self, X: Any, y: Any) -> ImplicitClassifier:
        """Train on inputs (batch, p) and labels (batch,)."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        self._train(torch.tensor(X), self._one_hot(y))
        self._past = None
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> ImplicitClassifier:
        """Go on with a batch, as if earlier batches were still there.

        Parameters
        ----------
        X : array, shape (batch, p)
        y : array, shape (batch,)
        classes : array, optional
            All labels that will ever occur; needed in the first call.
        """
        first = not hasattr(self, "weights_")
        X, y = validate_data(self, X, y, reset=first, dtype=np.float64)
        check_classification_targets(y)
        if first:
            if classes is None:
                raise ParameterError("The first call of partial_fit needs classes=all labels.")
            self.classes_ = np.unique(classes)
        self._train_batch(torch.tensor(X), self._one_hot(y))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Outputs (batch, classes); for two classes their difference, (batch,)."""
        found = self._predict(X)
        return found[:, 1] - found[:, 0] if len(self.classes_) == 2 else found

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities, shape (batch, classes)."""
        return torch.as_tensor(self._predict(X)).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels, shape (batch,)."""
        found = self._predict(X).argmax(1)
        return self.classes_[found]

    def _one_hot(self, y: Any) -> Tensor:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ParameterError(f"Label {unknown[0]} is not one of {self.classes_.tolist()}.")
        place = torch.as_tensor(np.searchsorted(self.classes_, y))
        return torch.nn.functional.one_hot(place, len(self.classes_)).to(torch.float64)

    def _score_of(self, weights: ImplicitWeights, u: Tensor, y: Tensor) -> float:
        found = self._outputs(weights, u).argmax(1)
        return float(accuracy_score(y.argmax(1).numpy(), found.numpy()))
