"""From weights found by block coordinate descent to models that backpropagation can train."""

from __future__ import annotations

from declarative_cvx.nonconvex.implicit.model import ImplicitModel
from declarative_cvx.nonconvex.implicit.parametrizations import (
    InfinityNorm,
    OneNorm,
    SpectralNorm,
    StrictlyTriangular,
)
from declarative_cvx.nonconvex.implicit.training.descent import Training
from declarative_cvx.nonconvex.implicit.training.penalties import Penalties
from declarative_cvx.nonconvex.implicit.training.penalty_terms import (
    ColumnBall,
    RowBall,
    SpectralBall,
    Triangular,
)
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights
from declarative_cvx.nonconvex.implicit.well_posed_set import WellPosed


def well_posed_set(penalties: Penalties) -> WellPosed | None:
    """The parametrisation with the constraint on A that training had; None if it had none."""
    for term in penalties.terms:
        if term.on != "A":
            continue
        if isinstance(term, Triangular):
            return StrictlyTriangular(term.sizes)
        for ball, kind in (
            (RowBall, InfinityNorm),
            (ColumnBall, OneNorm),
            (SpectralBall, SpectralNorm),
        ):
            if isinstance(term, ball):
                return kind(term.kappa)
    return None


def model_of(weights: ImplicitWeights, penalties: Penalties) -> ImplicitModel:
    """A model with these weights, in the set of A that they were trained in."""
    w = weights
    chosen = well_posed_set(penalties)
    return ImplicitModel.from_weights(w.A, w.B, w.C, w.D, w.b, w.c, w.activation, chosen)


def trained_model(training: Training) -> ImplicitModel:
    """The model that block coordinate descent found, in float64; it can be trained further."""
    return model_of(training.weights, training.problem.penalties)
