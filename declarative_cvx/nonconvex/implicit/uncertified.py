"""A warning where nothing says that ``x = phi(A x + c)`` has one solution."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from declarative_cvx.irregular import level_of_caller
from declarative_cvx.nonconvex.fixed_points.structure import structure_of
from declarative_cvx.nonconvex.implicit.activations import Activation
from declarative_cvx.nonconvex.implicit.perron_frobenius import perron_scaling
from declarative_cvx.nonconvex.implicit.product import times


class IllPosedWarning(UserWarning):
    """An equilibrium was asked for that may not exist, or of which there may be several."""


def warn_if_uncertified(phi: Activation, matrices: Sequence[Tensor]) -> None:
    """Look for a certificate that costs no more than solving, the cheapest first; warn if none.

    Parameters
    ----------
    phi : Activation
    matrices : sequence of Tensor
        Factors of A'.
    """
    if not _certified(phi, [matrix.detach() for matrix in matrices]):
        warnings.warn(
            "No norm of A is below 1 (for phi with Lipschitz constant 1), nor is A triangular: "
            "x = phi(A x + c) may have no solution, or several. is_well_posed(A, activation) looks "
            "further; ImplicitModel(..., well_posed=...) keeps A well-posed.",
            IllPosedWarning,
            stacklevel=level_of_caller(),
        )


def _certified(phi: Activation, matrices: Sequence[Tensor]) -> bool:
    M = times(matrices[0], matrices[1:])
    M = M * phi.lipschitz_constants(M)  # column i of A' goes into state i
    norms = {math.inf: 1, 1: math.inf}  # of A by those of A'
    if any(bool(torch.linalg.matrix_norm(M, norms[p]) < 1) for p in norms if p in phi.norms):
        return True
    homogeneous = phi.monotone and phi.positively_homogeneous
    found = structure_of(M, phi.groups(len(M)), homogeneous)
    if found.triangular or found.depth:
        return True
    if phi.componentwise and perron_scaling(M.mT.double()) is not None:
        return True
    return 2 in phi.norms and bool(torch.linalg.matrix_norm(M, 2) < 1)
