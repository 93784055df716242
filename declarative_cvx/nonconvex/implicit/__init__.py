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
from declarative_cvx.nonconvex.implicit.uncertified import IllPosedWarning
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights
from declarative_cvx.nonconvex.implicit.well_posed_set import WellPosed
from declarative_cvx.nonconvex.implicit.well_posedness import WellPosedness, is_well_posed

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Blocks",
    "Certificate",
    "CertifiedBounds",
    "Componentwise",
    "DataSum",
    "EquilibriumSolution",
    "FixedPointLayer",
    "FixedPointProblem",
    "FixedPointSolution",
    "Identity",
    "IllPosedWarning",
    "ImplicitModel",
    "ImplicitWeights",
    "InfinityNorm",
    "LayerNormalisation",
    "LeakyReLU",
    "LowRank",
    "MaxPool",
    "Normalisation",
    "OneNorm",
    "Partition",
    "PerronFrobenius",
    "Pruned",
    "ReLU",
    "RelaxedStates",
    "RobustFit",
    "RobustObjective",
    "ShardedSum",
    "Sigmoid",
    "Softmax",
    "Sort",
    "SpectralNorm",
    "StrictlyTriangular",
    "Tanh",
    "TriangularReLU",
    "Unconstrained",
    "WellPosed",
    "WellPosedness",
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
]
