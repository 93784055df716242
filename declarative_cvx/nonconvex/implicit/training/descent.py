"""Block coordinate descent on the lifted training problem (IDL Sec. 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.implicit.activations import ActivationLike, Blocks, as_activation
from declarative_cvx.nonconvex.implicit.distributed import DataSum
from declarative_cvx.nonconvex.implicit.training.blocks import (
    BlockMethod,
    check_order,
    minimise_block,
)
from declarative_cvx.nonconvex.implicit.training.history import (
    BlockRecord,
    History,
    SweepRecord,
    warn_of_rise,
)
from declarative_cvx.nonconvex.implicit.training.lifted import LiftedProblem, Past, Variables
from declarative_cvx.nonconvex.implicit.training.losses import Loss, as_loss
from declarative_cvx.nonconvex.implicit.training.parameter_matrix import ParameterMatrix
from declarative_cvx.nonconvex.implicit.training.penalties import Penalties
from declarative_cvx.nonconvex.implicit.training.penalty_terms import PenaltyTerm, Ridge, RowBall
from declarative_cvx.nonconvex.implicit.weights import ImplicitWeights

_ONE_PROCESS = DataSum()
# Row sums of the first A, and Picard steps that make the first states.
_START_NORM, _START_STEPS = 0.5, 100
# Length of the steps that only satisfy constraints: cone solvers lose costs that are much smaller.
_TOUCH = 1e-7


@dataclass(frozen=True, eq=False)
class Lifting:
    """What to minimise: IDL eq. (10), eq. (11) with a lambda for each state, eq. (9) without mu.

    Parameters
    ----------
    activation : Activation, str or sequence of pairs
        With a potential: "relu", "leaky_relu", "tanh", "sigmoid", "identity" or blocks of these.
    loss : {"squared", "cross_entropy"} or Loss
    penalty : PenaltyTerm or sequence of them
        It should include a constraint on A that makes the model well posed, as RowBall does.
    lam : float or Tensor of shape (n,)
        Weight of the divergence, positive.
    mu : float or None
        Weight of ||X - P||^2 / 2, positive. None stands for X = P; then the step in X is not
        convex, and goes down to a stationary point, as far as its iterations reach.

    Raises
    ------
    SpecificationError
    """

    activation: ActivationLike = "relu"
    loss: str | Loss = "squared"
    penalty: PenaltyTerm | Sequence[PenaltyTerm] = (RowBall(0.95), Ridge(1e-3))
    lam: float | Tensor = 1.0
    mu: float | None = 1.0

    def __post_init__(self) -> None:
        as_loss(self.loss)
        Penalties.of(self.penalty)
        activation = as_activation(self.activation)
        parts = activation.activations if isinstance(activation, Blocks) else (activation,)
        for part in parts:
            part.potential(torch.zeros(1))
        lam = torch.as_tensor(self.lam)
        if lam.dim() > 1 or not bool(((lam > 0) & torch.isfinite(lam)).all()):
            raise SpecificationError(
                f"lam is {self.lam!r}; expected a positive number, or one for each state."
            )
        if self.mu is not None and not 0 < self.mu < math.inf:
            raise SpecificationError(f"mu is {self.mu!r}; expected a positive number, or None.")

    def problem(
        self,
        u: Tensor,
        y: Tensor,
        states: int,
        total: DataSum = _ONE_PROCESS,
        past: Past | None = None,
    ) -> LiftedProblem:
        """The problem of a data set, in float64."""
        check_data(u, y)
        activation, loss = as_activation(self.activation), as_loss(self.loss)
        activation.check(states)
        u, y = u.detach().to(torch.float64), y.detach().to(torch.float64)
        loss.check(y)
        weight = torch.as_tensor(self.lam, dtype=u.dtype, device=u.device)
        if weight.dim() == 1 and len(weight) != states:
            raise SpecificationError(f"lam has {len(weight)} entries for {states} states.")
        penalties = Penalties.of(self.penalty)
        weight = weight.expand(states)
        return LiftedProblem(activation, loss, penalties, weight, self.mu, u, y, total, past)


@dataclass(frozen=True)
class Continuation:
    """lambda and mu multiplied by so much after every sweep, up to a limit.

    The larger they are, the nearer the relaxation to X = phi(AX + BU); the smaller, the easier.
    """

    lam_factor: float = 1.5
    lam_limit: float = 100.0
    mu_factor: float = 1.5
    mu_limit: float = 100.0

    def __post_init__(self) -> None:
        for name in ("lam_factor", "mu_factor"):
            if not 1 <= getattr(self, name) < math.inf:
                raise SpecificationError(f"{name} is {getattr(self, name)!r}; expected at least 1.")

    def next(self, problem: LiftedProblem) -> LiftedProblem:
        """The problem of the next sweep. The ratios of the entries of lambda stay."""
        largest = float(problem.weight.max())
        grown = min(largest * self.lam_factor, max(self.lam_limit, largest))
        mu = problem.mu
        if mu is not None:
            mu = min(mu * self.mu_factor, max(self.mu_limit, mu))
        return replace(problem, weight=problem.weight * (grown / largest), mu=mu)


@dataclass(frozen=True, eq=False)
class Training:
    """What block coordinate descent found.

    Attributes
    ----------
    variables : Variables
        Weights (float64) and states.
    problem : LiftedProblem
        With the lambda and mu of the last sweep.
    history : History
    """

    variables: Variables
    problem: LiftedProblem
    history: History

    @property
    def weights(self) -> ImplicitWeights:
        """The model's weights: `ImplicitModel.from_weights` makes a model of them."""
        return implicit_weights(self.variables.weights, self.problem)


@dataclass(frozen=True)
class BlockCoordinateDescent:
    """Minimise over one block of variables after the other; no block raises the objective.

    Parameters
    ----------
    sweeps : int
        Most sweeps over all blocks.
    order : tuple of str, optional
        Blocks of a sweep, of "CD", "P", "AB" and "X" (with a penalty that ties (A, B) to (C, D),
        "ABCD" in their place). Default: ("CD", "P", "AB", "X").
    method : BlockMethod
    tol : float
        It stops when a sweep lowers the objective by less than this, relative to it.
    continuation : Continuation, optional

    Notes
    -----
    A block that raises the objective, by more than rounding, gives a `DescentWarning`. All updates
    are in the history, with the residual of the block's optimality conditions and whether it is
    within tolerance.
    """

    sweeps: int = 20
    order: tuple[str, ...] | None = None
    method: BlockMethod = field(default_factory=BlockMethod)
    tol: float = 1e-5
    continuation: Continuation | None = None

    def __post_init__(self) -> None:
        check_order(self.order or ())
        if self.sweeps < 1:
            raise SpecificationError(f"sweeps is {self.sweeps!r}; expected at least 1.")

    def fit(
        self,
        lifting: Lifting,
        u: Tensor,
        y: Tensor,
        states: int,
        *,
        bias: bool = True,
        generator: torch.Generator | None = None,
        total: DataSum = _ONE_PROCESS,
        callback: Callable[[Variables, SweepRecord], bool] | None = None,
    ) -> Training:
        """Train a model from random weights.

        Parameters
        ----------
        lifting : Lifting
        u : Tensor, shape (batch, p)
        y : Tensor, shape (batch, q)
        states : int
            n
        bias : bool
        generator : torch.Generator, optional
            Of the first weights.
        total : DataSum
            `ShardedSum()` where every process holds data points of its own.
        callback : callable, optional
            Called after every sweep; training stops if it returns True.

        Raises
        ------
        ParameterError, SpecificationError
        """
        problem = lifting.problem(u, y, states, total)
        weights = first_weights(problem, states, bias, generator)
        return self.run(problem, started(problem, weights), callback)

    def run(
        self,
        problem: LiftedProblem,
        start: Variables,
        callback: Callable[[Variables, SweepRecord], bool] | None = None,
    ) -> Training:
        """Go on from given variables."""
        at, history = start, History(float(problem.value(start)))
        for sweep in range(self.sweeps):
            before = float(problem.value(at))
            at, record = self._sweep(problem, at, before)
            history.sweeps.append(record)
            if callback is not None and callback(at, record):
                history.stopped = "callback"
                break
            following = problem if self.continuation is None else self.continuation.next(problem)
            grows = following.mu != problem.mu or bool((following.weight > problem.weight).any())
            if not grows and before - record.objective <= self.tol * (1 + abs(before)):
                history.stopped = "tolerance"
                break
            problem = following if sweep + 1 < self.sweeps else problem
        return Training(at, problem, history)

    def _sweep(
        self, problem: LiftedProblem, at: Variables, value: float
    ) -> tuple[Variables, SweepRecord]:
        records = []
        for name in self._order(problem):
            new, found = minimise_block(name, problem, at, self.method)
            after = float(problem.value(new))
            residual = float(found.residual.max())
            solved = residual <= self.method.tol
            record = BlockRecord(name, value, after, residual, found.iterations, solved)
            records.append(record)
            warn_of_rise(record)
            at, value = new, after
        parts = {name: float(part) for name, part in problem.parts(at).items()}
        return at, SweepRecord(value, parts, tuple(records))

    def _order(self, problem: LiftedProblem) -> tuple[str, ...]:
        """The blocks of one sweep."""
        couples = problem.penalties.couples
        order = self.order or (("ABCD", "P", "X") if couples else ("CD", "P", "AB", "X"))
        if couples and {"AB", "CD"} & set(order):
            raise SpecificationError(
                'A penalty ties (A, B) to (C, D), so that they are one block: use "ABCD" in place '
                'of "AB" and "CD".'
            )
        if problem.mu is None:  # the blocks X and P are the same
            order = tuple(name for name in order if name != "P" or "X" not in order)
        return order


def check_data(u: Tensor, y: Tensor) -> None:
    """Refuse data of the wrong shape, type or values."""
    for name, value in (("u", u), ("y", y)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 2:
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise ParameterError(
                f"{name} must be a floating tensor (batch, features), got "
                f"{getattr(value, 'dtype', type(value).__name__)}{shape}."
            )
        bad = (~torch.isfinite(value)).nonzero()
        if len(bad):
            place = tuple(bad[0].tolist())
            raise ParameterError(f"{name}[{place}] is {float(value[place])}; data must be finite.")
    if len(u) != len(y) or not len(u):
        raise ParameterError(
            f"u has {len(u)} data points and y has {len(y)}; expected as many, and at least one."
        )


def first_weights(
    problem: LiftedProblem, states: int, bias: bool, generator: torch.Generator | None
) -> ParameterMatrix:
    """Random (A, B), with rows of A of norm 1/2 at most, and C = D = 0."""
    u, y = problem.u, problem.y
    p, q = u.shape[1], y.shape[1]
    random = torch.randn(states, states + p, generator=generator, dtype=u.dtype).to(u.device)
    matrix = u.new_zeros(states + q, states + p + int(bias))
    A, B = random.split([states, p], 1)
    matrix[:states, :states] = _START_NORM * A / A.abs().sum(1, keepdim=True)
    matrix[:states, states : states + p] = B / math.sqrt(p)
    weights = ParameterMatrix(problem.total.same(matrix), states, p)
    return constrained(problem, weights)


def constrained(problem: LiftedProblem, weights: ParameterMatrix) -> ParameterMatrix:
    """The nearest weights that satisfy the constraints, but for a touch of the penalties."""
    step = weights.matrix.new_full((len(weights.matrix), 1), _TOUCH)
    return problem.penalties.prox(weights, step)


def started(problem: LiftedProblem, weights: ParameterMatrix) -> Variables:
    """States that go with weights: an equilibrium, roughly."""
    offset = weights.offsets(problem.u)
    x = problem.activation(offset)
    for _ in range(_START_STEPS):
        x = problem.activation(x @ weights.A.T + offset)
    return Variables(weights, x, x)


def implicit_weights(weights: ParameterMatrix, problem: LiftedProblem) -> ImplicitWeights:
    """A record of the weights, with zero biases where there were none."""
    none = weights.matrix.new_zeros(len(weights.matrix))
    biases = weights.matrix[:, -1] if weights.bias else none
    b, c = biases[: weights.states].clone(), biases[weights.states :].clone()
    A, B, C, D = (block.clone() for block in (weights.A, weights.B, weights.C, weights.D))
    return ImplicitWeights(A, B, C, D, b, c, problem.activation)


def refit_outputs(problem: LiftedProblem, weights: ParameterMatrix, x: Tensor) -> ParameterMatrix:
    """(C, D, c) fitted to the true equilibria x, which the relaxation only comes near to."""
    at = Variables(weights, x, x)
    return minimise_block("CD", problem, at, BlockMethod())[0].weights
