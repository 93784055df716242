"""Guaranteed intervals for the outputs of implicit models (IDL 5.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.dual_bounds import Rows, refined, settled
from declarative_cvx.nonconvex.implicit.enclosure import StateMap, enclose
from declarative_cvx.nonconvex.implicit.intervals import Box, image
from declarative_cvx.nonconvex.implicit.reduction import require_inputs
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights


@dataclass(frozen=True, eq=False)
class CertifiedBounds:
    """Intervals that hold what a model computes, whatever the inputs within theirs.

    Attributes
    ----------
    lower, upper : Tensor, shape (batch, q)
        Of the outputs.
    state_lower, state_upper : Tensor, shape (batch, n)
    """

    lower: Tensor
    upper: Tensor
    state_lower: Tensor
    state_upper: Tensor

    @property
    def width(self) -> Tensor:
        """Of the outputs' intervals, shape (batch, q)."""
        return self.upper - self.lower


def certified_bounds(
    model: ImplicitWeights,
    u: Tensor,
    sigma: Tensor | float,
    *,
    refinements: int = 10,
    steps: int = 0,
) -> CertifiedBounds:
    """Intervals that hold the model's outputs for every input within `sigma` of `u` (IDL eq. 16).

    First interval arithmetic, starting from a box given by a certificate of well-posedness
    (substitution without cycles, Perron-Frobenius, the 2-norm, a bounded activation), then bounds
    by linear programming duality: the relaxation (17) with a line on the other side, too. They
    hold for real numbers: the rounding of every step is added on the outside. A forward pass that
    stops at a tolerance, or in a shorter type, may end outside by that much.

    Parameters
    ----------
    model : ImplicitWeights or ImplicitModel
        Its activation must be componentwise and nondecreasing.
    u : Tensor, shape (batch, p)
    sigma : float or Tensor, shape (p,) or (batch, p)
        Not negative.
    refinements : int, optional
        At most so many rounds in which all states are bounded by duality, before the outputs are.
        They end when a round narrows the boxes by less than 5 %.
    steps : int, optional
        Gradient steps by which the lines' slopes are fitted to each output; 20 gain most.

    Returns
    -------
    CertifiedBounds
        Differentiable in u, sigma and the weights.

    Raises
    ------
    ParameterError
        If shapes or values are wrong.
    SpecificationError
        If the activation is of another kind or no certificate holds.
    """
    weights = _weights_of(model)
    _require_monotone(weights)
    inputs = _input_box(weights, u, sigma)
    _require_count("refinements", refinements)
    _require_count("steps", steps)
    state_map = StateMap.of(weights.to(dtype=torch.float64), inputs)
    known = refined(settled(state_map, enclose(state_map)), refinements)
    outputs = _outputs(state_map.weights, known.x, inputs)
    rows = Rows(*(_dense(part) for part in (weights.C, weights.D, weights.c)))
    rows = Rows(*(part.to(torch.float64) for part in (rows.c, rows.d, rows.e)))
    outputs = outputs.intersect(known.bounds(rows, steps)).rounded_to(u.dtype)
    found = known.x.rounded_to(u.dtype)
    return CertifiedBounds(outputs.lower, outputs.upper, found.lower, found.upper)


def certified_margins(
    model: ImplicitWeights, u: Tensor, sigma: Tensor | float, labels: Tensor, **options: int
) -> Tensor:
    """Lower bounds of how far each label's output stays above every other, shape (batch,).

    The label is certified where this is positive: no input within `sigma` is classified otherwise.
    Differences of outputs are bounded, which is sharper than the difference of bounds.

    Parameters
    ----------
    model : ImplicitWeights or ImplicitModel
    u : Tensor, shape (batch, p)
    sigma : float or Tensor, shape (p,) or (batch, p)
    labels : Tensor of int64, shape (batch,)
    **options
        Of `certified_bounds`.
    """
    weights = _weights_of(model)
    _require_labels(labels, len(u), weights.out_features)
    q = weights.out_features
    if q < 2:
        raise ParameterError("The model has one output: there is no other for a margin.")
    first, second = torch.nonzero(~torch.eye(q, dtype=torch.bool)).t().to(u.device)
    C, D = _dense(weights.C), _dense(weights.D)
    differences = ImplicitWeights(
        _dense(weights.A), _dense(weights.B), C[first] - C[second], D[first] - D[second],
        weights.b, weights.c[first] - weights.c[second], weights.activation,
    )  # fmt: skip
    lower = certified_bounds(differences, u, sigma, **options).lower
    own = first == labels[:, None]
    return torch.where(own, lower, torch.inf).amin(1)


def _outputs(weights: ImplicitWeights, states: Box, inputs: Box) -> Box:
    matrix = torch.cat([weights.C, weights.D], dim=1)
    return image(matrix, weights.c, states.join(inputs))


def _input_box(weights: ImplicitWeights, u: Tensor, sigma: Tensor | float) -> Box:
    require_inputs(weights, u)
    size = torch.as_tensor(sigma, dtype=torch.float64, device=u.device)
    if size.shape not in ((), u.shape[1:], u.shape):
        raise ParameterError(
            f"sigma must be a number or have shape ({u.shape[1]},) or {tuple(u.shape)}, "
            f"got {tuple(size.shape)}."
        )
    if not bool((size >= 0).logical_and(size.isfinite()).all()):
        raise ParameterError(f"sigma must be finite and not negative, got {sigma!r}.")
    return Box.around(u.to(torch.float64), size.expand_as(u))


def _weights_of(model: ImplicitWeights) -> ImplicitWeights:
    return model if isinstance(model, ImplicitWeights) else model.weights


def _require_monotone(weights: ImplicitWeights) -> None:
    if not weights.activation.monotone:
        raise SpecificationError(
            f"The activation {weights.activation.name} is not componentwise and nondecreasing, "
            "as interval bounds need it. Bound a model of what comes before it."
        )


def _require_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ParameterError(f"{name} must be an integer from 0 on, got {value!r}.")


def _require_labels(labels: Tensor, batch: int, classes: int) -> None:
    if labels.shape != (batch,) or labels.is_floating_point():
        raise ParameterError(f"labels must be {batch} integers, got {labels!r}.")
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ParameterError(f"labels must be from 0 to {classes - 1}, got {labels!r}.")


def _dense(value: Tensor) -> Tensor:
    return value.to_dense() if value.is_sparse else value
