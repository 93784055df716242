"""The lifted training problem of IDL Sec. 4: its data, its variables and its value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.implicit.activations import Activation
from declarative_cvx.nonconvex.implicit.distributed import DataSum
from declarative_cvx.nonconvex.implicit.training.losses import Loss
from declarative_cvx.nonconvex.implicit.training.parameter_matrix import ParameterMatrix
from declarative_cvx.nonconvex.implicit.training.penalties import Penalties


@dataclass(frozen=True, eq=False)
class Variables:
    """What is minimised over.

    Attributes
    ----------
    weights : ParameterMatrix
    x, p : Tensor, shape (batch, n)
        The state and its proxy (Z in IDL eq. 10), the same tensor in objective (9).
    """

    weights: ParameterMatrix
    x: Tensor
    p: Tensor

    def with_weights(self, weights: ParameterMatrix) -> Variables:
        return replace(self, weights=weights)


@dataclass(frozen=True, eq=False)
class Past:
    """Earlier batches, summarised by their Gram matrices G: sum_i ||m_i - c_i||_G^2 / 2 over the
    rows of the parameters. For a squared loss this is recursive least squares; for the
    divergence G bounds the curvature from above.

    Attributes
    ----------
    center : Tensor, shape (n + q, k)
        c
    of_states, of_outputs : Tensor, shape (k, k)
        Gram matrices of (x, u, 1) and of (p, u, 1).
    """

    center: Tensor
    of_states: Tensor
    of_outputs: Tensor

    def gram(self, weight: Tensor) -> Tensor:
        """One matrix for each row, those of states times their weight: (n + q, k, k)."""
        outputs = len(self.center) - len(weight)
        top = weight[:, None, None] * self.of_states
        return torch.cat([top, self.of_outputs.expand(outputs, -1, -1)])


@dataclass(frozen=True, eq=False)
class LiftedProblem:
    """L(Y, CP + DU) + sum_i w_i F(P, AX + BU)_i + mu/2 ||X - P||^2 + penalties (IDL eq. 10, 11), or
    eq. (9) where mu is None and X = P.

    Attributes
    ----------
    activation : Activation
    loss : Loss
    penalties : Penalties
    weight : Tensor, shape (n,)
        lambda for each state.
    mu : float or None
    u : Tensor, shape (batch, p)
    y : Tensor, shape (batch, q)
    total : DataSum
        How sums over the data are made, where they are spread over processes.
    past : Past or None
    """

    activation: Activation
    loss: Loss
    penalties: Penalties
    weight: Tensor
    mu: float | None
    u: Tensor
    y: Tensor
    total: DataSum = field(default_factory=DataSum)
    past: Past | None = None

    def parts(self, at: Variables) -> dict[str, Tensor]:
        """The terms of the objective by name, each of shape ()."""
        weights = at.weights
        z = at.x @ weights.A.T + weights.offsets(self.u)
        fit = self.loss.value(self.y, weights.outputs_of(at.p, self.u)).sum()
        divergence = (self.weight * self.activation.divergence(at.p, z)).sum()
        found = {"loss": fit, "divergence": divergence}
        if self.mu is not None:
            found["proximity"] = self.mu / 2 * (at.x - at.p).square().sum()
        sums = self.total.sum(torch.stack(list(found.values())))
        found = dict(zip(found, sums.unbind(), strict=True))
        found["penalty"] = self.penalties.value(weights) + self._past_value(weights)
        return found

    def value(self, at: Variables) -> Tensor:
        """The objective, shape ()."""
        return torch.stack(list(self.parts(at).values())).sum()

    def quadratic(self, weights: ParameterMatrix) -> tuple[Tensor, Tensor]:
        """The quadratic terms <m, Q m> / 2 - <r, m> in each row of the parameters.

        Returns
        -------
        Q : Tensor, shape (n + q, k, k)
        r : Tensor, shape (n + q, k)
        """
        Q = torch.diag_embed(self.penalties.ridge(weights))
        if self.past is None:
            return Q, torch.zeros_like(weights.matrix)
        gram = self.past.gram(self.weight)
        return Q + gram, (gram @ self.past.center[:, :, None])[:, :, 0]

    def _past_value(self, weights: ParameterMatrix) -> Tensor:
        if self.past is None:
            return weights.matrix.new_zeros(())
        change = (weights.matrix - self.past.center)[:, :, None]
        return (change.mT @ self.past.gram(self.weight) @ change).sum() / 2


def remember(problem: LiftedProblem, at: Variables, memory: float) -> Past:
    """The Gram matrices of all batches so far."""
    x = at.weights.regressors(at.x, problem.u)
    p = at.weights.regressors(at.p, problem.u)
    curvature = problem.loss.curvature
    grams = x.T @ x, curvature * p.T @ p
    if problem.past is not None:
        before = problem.past.of_states, problem.past.of_outputs
        grams = memory * before[0] + grams[0], memory * before[1] + grams[1]
    return Past(at.weights.matrix, *grams)
