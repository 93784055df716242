"""Training by block coordinate descent on the lifted problem (IDL Sec. 4)."""

from declarative_cvx.nonconvex.implicit.training.blocks import BlockMethod
from declarative_cvx.nonconvex.implicit.training.convex_penalty import ConvexPenalty
from declarative_cvx.nonconvex.implicit.training.descent import (
    BlockCoordinateDescent,
    Continuation,
    Lifting,
    Training,
)
from declarative_cvx.nonconvex.implicit.training.feedforward import (
    FeedforwardDescent,
    FeedforwardTraining,
)
from declarative_cvx.nonconvex.implicit.training.hand_over import trained_model
from declarative_cvx.nonconvex.implicit.training.history import DescentWarning, History
from declarative_cvx.nonconvex.implicit.training.losses import CrossEntropy, Loss, SquaredLoss
from declarative_cvx.nonconvex.implicit.training.penalty_terms import (
    L1,
    ColumnBall,
    ColumnGroups,
    Constraint,
    L1Ball,
    PenaltyTerm,
    Ridge,
    RowBall,
    SpectralBall,
    Triangular,
    Zero,
    sparsity_penalty,
    triangular_penalty,
)

__all__ = [
    "L1",
    "BlockCoordinateDescent",
    "BlockMethod",
    "ColumnBall",
    "ColumnGroups",
    "Constraint",
    "Continuation",
    "ConvexPenalty",
    "CrossEntropy",
    "DescentWarning",
    "FeedforwardDescent",
    "FeedforwardTraining",
    "History",
    "L1Ball",
    "Lifting",
    "Loss",
    "PenaltyTerm",
    "Ridge",
    "RowBall",
    "SpectralBall",
    "SquaredLoss",
    "Training",
    "Triangular",
    "Zero",
    "sparsity_penalty",
    "trained_model",
    "triangular_penalty",
]
