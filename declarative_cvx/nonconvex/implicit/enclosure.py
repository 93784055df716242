"""Boxes that hold every state of an implicit model, for all inputs of a box (IDL 5.1).

Whether there is a first box is decided by a certificate that the model is well-posed, made
quantitative. From there every step maps a box that holds all states to one that does, too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.errors import SpecificationError
from declarative_cvx.nonconvex.implicit.activations import ReLU
from declarative_cvx.nonconvex.implicit.diagonal_lmi import lyapunov_scaling, monotone_scaling
from declarative_cvx.nonconvex.implicit.intervals import Box, applied, image, rounding
from declarative_cvx.nonconvex.implicit.reduction import partition, states
from declarative_cvx.nonconvex.implicit.uncertified import IllPosedWarning
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

_SWEEPS = 100
_GAIN = 0.01  # a sweep that narrows the boxes by less, relatively, is the last
_MOST_STATES = 100  # for which semidefinite programs are solved
_MARGIN = 1e-9  # relative, for the rounding of the linear system behind a first box


@dataclass(frozen=True)
class StateMap:
    """``x -> phi(A x + B u + b)`` for boxes of x, and all u in one box.

    Attributes
    ----------
    weights : ImplicitWeights
        In float64, with a componentwise nondecreasing activation.
    inputs : Box
        Of u, shape (batch, p).
    matrix : Tensor, shape (n, n + p)
        (A, B).
    """

    weights: ImplicitWeights
    inputs: Box
    matrix: Tensor

    @classmethod
    def of(cls, weights: ImplicitWeights, inputs: Box) -> StateMap:
        weights = without_loops(weights)
        return cls(weights, inputs, torch.cat([weights.A, weights.B], dim=1))

    def arguments(self, box: Box) -> Box:
        """All z = A x + B u + b."""
        return image(self.matrix, self.weights.b, box.join(self.inputs))

    def __call__(self, box: Box) -> Box:
        return applied(self.weights.activation, self.arguments(box))


def without_loops(weights: ImplicitWeights) -> ImplicitWeights:
    """ReLU states that depend on themselves by less than 1, without that (IDL 3.1).

    For a < 1, ``x = relu(a x + w)`` is ``x = relu(w / (1 - a))``.
    """
    if type(weights.activation) is not ReLU or weights.is_sparse:
        return weights
    loop = weights.A.diagonal()
    loop = torch.where(loop < 1, loop, 0)
    scale = 1 / (1 - loop)
    A = (weights.A - torch.diag(loop)) * scale[:, None]
    return replace(weights, A=A, B=weights.B * scale[:, None], b=weights.b * scale)


def enclose(state_map: StateMap) -> Box:
    """A box with the states of all inputs; as small as interval arithmetic alone makes it.

    Raises
    ------
    SpecificationError
        If nothing shows the model to be well-posed.
    """
    order = partition(state_map.weights)
    if not len(order.core):
        return _substituted(state_map, len(order.before))
    return narrowed(state_map, _first_box(state_map))


def narrowed(state_map: StateMap, box: Box) -> Box:
    """The box after as many steps of the map as narrow it noticeably, for each element."""
    going = torch.ones_like(box.lower[:, :1], dtype=torch.bool)
    for _ in range(_SWEEPS):
        width = _width(box)
        box = box.intersect(state_map(box)).where(going, box)
        going = going & (_width(box) < (1 - _GAIN) * width)
        if not bool(going.any()):
            break
    return box


def _width(box: Box) -> Tensor:
    return (box.upper - box.lower).detach().sum(1, keepdim=True)


def _substituted(state_map: StateMap, levels: int) -> Box:
    """Without cycles the box after so many steps does not depend on the first."""
    zero = state_map.inputs.lower.new_zeros(
        len(state_map.inputs.lower), state_map.weights.state_features
    )
    box = Box(zero, zero)
    for _ in range(levels):
        box = state_map(box)
    return box


def _first_box(state_map: StateMap) -> Box:
    weights = state_map.weights
    center = state_map.inputs.center
    with warnings.catch_warnings():  # what is missing is said below
        warnings.simplefilter("ignore", IllPosedWarning)
        middle = states(weights.detach(), center.detach()).nan_to_num(0.0)
    constants = weights.activation.lipschitz_constants(middle)
    scaled = constants[:, None] * weights.A.to_dense()
    drive = _drive(state_map, center, middle, constants)
    whole = Box(*(end.expand_as(middle) for end in weights.activation.bounds(middle)))
    bounded = bool(whole.lower.isfinite().all() & whole.upper.isfinite().all())
    radius = _first_radius(scaled, drive, inequalities=not bounded)
    shown = radius.isfinite().all(1, keepdim=True)
    if bounded or bool(shown.all()):
        around = Box.around(middle, torch.where(shown, radius, 0.0))
        return around.intersect(whole).where(shown, whole)
    raise SpecificationError(
        "No certificate bounds the states of this model: the spectral radius of |A| is "
        f"{float(torch.linalg.eigvals(scaled.detach().abs()).abs().max()):.3g}, the 2-norm of A "
        f"{float(torch.linalg.matrix_norm(scaled.detach(), 2)):.3g} (times the Lipschitz constants "
        "of phi), where one below 1 or a bounded phi would do. Train with a well-posed "
        "parametrisation, such as InfinityNorm(0.95)."
    )


def _first_radius(scaled: Tensor, drive: Tensor, inequalities: bool) -> Tensor:
    """A radius r with ``|x - middle| <= r`` by the first certificate that holds, else infinite.

    Elements do not depend on each other.
    """
    radius = _by_perron_frobenius(scaled.abs(), drive)
    if not _found(radius):
        radius = _or_else(radius, _by_norm(scaled, drive))
    if _found(radius) or not inequalities or len(scaled) > _MOST_STATES:
        return radius
    M = scaled.detach().cpu().numpy()
    for proposed, bound in ((lyapunov_scaling, _by_norm), (monotone_scaling, _by_monotonicity)):
        scaling = proposed(M)
        if scaling is not None:
            d = torch.as_tensor(scaling).to(drive)
            other = bound(d[:, None] * scaled / d, d * drive)
            other = None if other is None else other / d * (1 + rounding(2))
            radius = _or_else(radius, other)
    return radius


def _found(radius: Tensor) -> bool:
    return bool(radius.isfinite().all())


def _or_else(radius: Tensor, other: Tensor | None) -> Tensor:
    """The other one where the first is infinite."""
    return radius if other is None else torch.where(radius.isfinite(), radius, other)


def _drive(state_map: StateMap, center: Tensor, middle: Tensor, constants: Tensor) -> Tensor:
    """A g with ``|x - middle| <= L |A| |x - middle| + g`` for every state x; positive."""
    weights, inputs = state_map.weights, state_map.inputs
    point = replace(state_map, inputs=Box(center, center))(Box(middle, middle))
    defect = torch.maximum(point.upper - middle, middle - point.lower)
    reach = constants * (inputs.radius @ weights.B.abs().t())
    least = _MARGIN**2 * (1 + middle.abs().amax(1, keepdim=True))
    return (defect + reach) * (1 + rounding(weights.in_features)) + least


def _by_perron_frobenius(gain: Tensor, drive: Tensor) -> Tensor:
    """An r with ``gain r + drive <= r``, or infinity; as r > 0 this shows that rho(gain) < 1.

    Then (I - gain)^-1 is nonnegative, so that every |x - middle| is at most r.
    """
    system = torch.eye(len(gain), dtype=gain.dtype, device=gain.device) - gain
    factors = torch.linalg.lu_factor(system)
    if not bool(torch.isfinite(factors.LU).all()) or bool((factors.LU.diagonal() == 0).any()):
        return torch.full_like(drive, torch.inf)

    def solve(rows: Tensor) -> Tensor:
        return torch.linalg.lu_solve(*factors, rows.t()).t()

    radius = solve(drive)
    radius = solve(drive + _MARGIN * radius.abs().amax(1, keepdim=True))
    mapped = radius @ gain.t()
    shown = (mapped + drive) * (1 + rounding(len(gain))) <= radius
    shown = (shown & (radius > 0)).all(1, keepdim=True)
    return torch.where(shown, radius, torch.inf)


def _by_norm(scaled: Tensor, drive: Tensor) -> Tensor | None:
    """``||x - middle||_2 <= ||drive||_2 / (1 - ||L A||_2)``, for every entry."""
    norm = torch.linalg.matrix_norm(scaled, 2) * (1 + _spectral_unit(scaled))
    return _shared(drive, 1 - norm)


def _by_monotonicity(scaled: Tensor, drive: Tensor) -> Tensor | None:
    """``||x - middle||_2 <= ||drive||_2 / m``, m the least eigenvalue of ``I - L A``'s symmetric
    part, as phi is nondecreasing. (The defect of the middle counts through A, too.)
    """
    symmetric = (scaled + scaled.t()) / 2
    eigenvalues = torch.linalg.eigvalsh(symmetric)
    error = _spectral_unit(scaled) * (1 + eigenvalues.abs().max())
    return _shared(drive + drive @ scaled.abs().t(), 1 - eigenvalues.max() - error)


def _shared(drive: Tensor, divisor: Tensor) -> Tensor | None:
    if not bool(divisor > 0):
        return None
    size = torch.linalg.vector_norm(drive, dim=1, keepdim=True) / divisor
    return (size * (1 + rounding(2 * drive.shape[1]))).expand_as(drive)


def _spectral_unit(matrix: Tensor) -> float:
    """Relative error that singular values and eigenvalues are trusted to."""
    return rounding(10 * len(matrix))
