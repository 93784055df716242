"""Implicit deep learning: models defined by fixed points, their training and robustness."""

from declarative_cvx.nonconvex.fixed_points.problem import FixedPointLayer, FixedPointProblem
from declarative_cvx.nonconvex.fixed_points.solution import FixedPointSolution
from declarative_cvx.nonconvex.implicit.activations import (
    ACTIVATIONS,
    Activation,
    Blocks,
    Componentwise,
    Identity,
    LayerNormalisation,
    LeakyReLU,
    MaxPool,
    Normalisation,
    ReLU,
    Sigmoid,
    Softmax,
    Sort,
    Tanh,
    activation_named,
    as_activation,
)
from declarative_cvx.nonconvex.implicit.algebra import (
    add,
    affine,
    cascade,
    elementwise,
    parallel,
    permute,
    rescale,
)
from declarative_cvx.nonconvex.implicit.certificate import Certificate
from declarative_cvx.nonconvex.implicit.distributed import DataSum, ShardedSum
from declarative_cvx.nonconvex.implicit.divergence import fenchel_divergence
from declarative_cvx.nonconvex.implicit.equilibrium import EquilibriumSolution, solve_equilibrium
from declarative_cvx.nonconvex.implicit.model import ImplicitModel
from declarative_cvx.nonconvex.implicit.networks import from_recurrent, from_sequential
from declarative_cvx.nonconvex.implicit.parametrizations import (
    InfinityNorm,
    LowRank,
    OneNorm,
    PerronFrobenius,
    SpectralNorm,
    StrictlyTriangular,
    TriangularReLU,
    Unconstrained,
)
from declarative_cvx.nonconvex.implicit.reduction import (
    Partition,
    Pruned,
    partition,
    predict,
    prune,
)
from declarative_cvx.nonconvex.implicit.robust_counterpart import RelaxedStates, RobustObjective
from declarative_cvx.nonconvex.implicit.robust_training import RobustFit, fit_robust
from declarative_cvx.nonconvex.implicit.robustness import (
    CertifiedBounds,
    certified_bounds,
    certified_margins,
)
from declarative_cvx.nonconvex.implicit.training import (
    L1,
    BlockCoordinateDescent,
    BlockMethod,
    ColumnBall,
    ColumnGroups,
    Constraint,
    Continuation,
    ConvexPenalty,
    CrossEntropy,
    DescentWarning,
    FeedforwardDescent,
    FeedforwardTraining,
    History,
    L1Ball,
    Lifting,
    Loss,
    PenaltyTerm,
    Ridge,
    RowBall,
    SpectralBall,
    SquaredLoss,
    Training,
    Triangular,
    Zero,
    sparsity_penalty,
    trained_model,
    triangular_penalty,
)
from declarative_cvx.nonconvex.implicit.uncertified import IllPosedWarning
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights
from declarative_cvx.nonconvex.implicit.well_posed_set import WellPosed
from declarative_cvx.nonconvex.implicit.well_posedness import WellPosedness, is_well_posed

__all__ = [
    "ACTIVATIONS",
    "L1",
    "Activation",
    "BlockCoordinateDescent",
    "BlockMethod",
    "Blocks",
    "Certificate",
    "CertifiedBounds",
    "ColumnBall",
    "ColumnGroups",
    "Componentwise",
    "Constraint",
    "Continuation",
    "ConvexPenalty",
    "CrossEntropy",
    "DataSum",
    "DescentWarning",
    "EquilibriumSolution",
    "FeedforwardDescent",
    "FeedforwardTraining",
    "FixedPointLayer",
    "FixedPointProblem",
    "FixedPointSolution",
    "History",
    "Identity",
    "IllPosedWarning",
    "ImplicitClassifier",
    "ImplicitModel",
    "ImplicitRegressor",
    "ImplicitWeights",
    "InfinityNorm",
    "L1Ball",
    "LayerNormalisation",
    "LeakyReLU",
    "Lifting",
    "Loss",
    "LowRank",
    "MaxPool",
    "Normalisation",
    "OneNorm",
    "Partition",
    "PenaltyTerm",
    "PerronFrobenius",
    "Pruned",
    "ReLU",
    "RelaxedStates",
    "Ridge",
    "RobustFit",
    "RobustObjective",
    "RowBall",
    "ShardedSum",
    "Sigmoid",
    "Softmax",
    "Sort",
    "SpectralBall",
    "SpectralNorm",
    "SquaredLoss",
    "StrictlyTriangular",
    "Tanh",
    "Training",
    "Triangular",
    "TriangularReLU",
    "Unconstrained",
    "WellPosed",
    "WellPosedness",
    "Zero",
    "activation_named",
    "add",
    "affine",
    "as_activation",
    "cascade",
    "certified_bounds",
    "certified_margins",
    "elementwise",
    "fenchel_divergence",
    "fit_robust",
    "from_recurrent",
    "from_sequential",
    "is_well_posed",
    "parallel",
    "partition",
    "permute",
    "predict",
    "prune",
    "rescale",
    "solve_equilibrium",
    "sparsity_penalty",
    "trained_model",
    "triangular_penalty",
]


def __getattr__(name: str) -> type:
    """The estimators need scikit-learn, which is imported only if one of them is asked for."""
    if name not in ("ImplicitRegressor", "ImplicitClassifier"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from declarative_cvx.nonconvex.implicit import estimators

    return getattr(estimators, name)
