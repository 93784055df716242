"""Entropic optimal transport, batched, by Newton's method in the log domain."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.kernels.arguments import BatchFunction, align, prepare, require
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.status import Status

# Relative difference of the two masses that is taken for rounding.
MASS_TOLERANCE = 1e-5
# Relative violation of the marginals from which two more Newton steps lead to rounding level, and
# the one up to which an answer counts as solved.
CLOSE = 1e-10
SOLVED = 1e-9
# Factor between successive values of epsilon, and the violation at which the next one is tried.
SCALING = 4.0
NEXT = 0.1
# Regularisation of the Newton system, relative to its diagonal.
DAMPING = 1e-14
# Entries of a plan, relative to the largest, that play no part in that system.
TINY = 1e-60


@torch.compiler.disable  # looks at values
def optimal_transport(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    epsilon: Tensor | float = 0.1,
    max_iterations: int = 500,
) -> Tensor:
    """Minimise <cost, P> + epsilon KL(P || a b') over plans P >= 0 with marginals a and b.

    Sinkhorn steps (Cuturi 2013) and damped Newton steps on the dual alternate, on logarithms,
    while epsilon is lowered to the value asked for; last, the plan is scaled to the marginals.
    The derivative comes from the optimality conditions (DDN Prop. 4.5), not from the iterations:
    one system of order min(m, n). Computed in float64 whatever the dtype of the arguments.

    Parameters
    ----------
    cost : Tensor, shape (..., m, n)
    a : Tensor, shape (..., m), optional
        Nonnegative, of positive sum; 1 / m if not given.
    b : Tensor, shape (..., n), optional
        The same, with the same sum (a difference within rounding is shared by both); 1 / n if
        not given. Leading dimensions are batch dimensions and broadcast.
    epsilon : float or Tensor, shape (...), optional
        Positive, in units of the cost.
    max_iterations : int, optional
        A limit that is meant never to be met: some 10 are needed for an epsilon of a tenth of the
        costs' range, some 25 for a thousandth. Elements stop one by one.

    Returns
    -------
    Tensor, shape (..., m, n)
        Twice differentiable for all tensors. An entry of a or b that is zero gets a zero gradient.

    Raises
    ------
    ParameterError, SpecificationError
    """
    cost, a, b, epsilon = _checked(cost, a, b, epsilon, max_iterations)
    return _plan(cost, a, b, epsilon, max_iterations)[0].to(cost.dtype)


class OptimalTransport(nn.Module):
    """`optimal_transport` as a module.

    Parameters
    ----------
    epsilon : float or Tensor, optional
        A `torch.nn.Parameter` is learned.
    max_iterations : int, optional
    """

    def __init__(self, epsilon: Tensor | float = 0.1, max_iterations: int = 500) -> None:
        super().__init__()
        self.epsilon, self.max_iterations = epsilon, max_iterations

    def forward(self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """The optimal plan; see `optimal_transport`."""
        return optimal_transport(cost, a, b, self.epsilon, self.max_iterations)

    def solve(
        self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> KernelSolution:
        """The optimal plan and a report.

        The residual is the sum of the absolute violations of the marginals, relative to the mass.
        A problem is not `regular` if an entry of a or b is zero.
        """
        cost, a, b, epsilon = _checked(cost, a, b, self.epsilon, self.max_iterations)
        plan, a, b = _plan(cost, a, b, epsilon, self.max_iterations)
        return _report(cost, a, b, epsilon, plan)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, max_iterations={self.max_iterations}"


def _checked(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: Tensor | float,
    max_iterations: int,
) -> list[Tensor]:
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise SpecificationError(
            f"max_iterations is {max_iterations!r}; it must be a positive integer."
        )
    given = {"cost": cost, "a": 1.0 if a is None else a, "b": 1.0 if b is None else b}
    cost, a, b, epsilon = prepare({**given, "epsilon": epsilon})
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ParameterError(
            f"cost has shape {tuple(cost.shape)}; expected (..., m, n) with m >= 1 and n >= 1."
        )
    m, n = cost.shape[-2:]
    a = (a / m).expand(m) if a.ndim == 0 else a
    b = (b / n).expand(n) if b.ndim == 0 else b
    aligned = align(
        {"cost": (cost, (m, n)), "a": (a, (m,)), "b": (b, (n,)), "epsilon": (epsilon, ())}
    )
    cost, a, b, epsilon = aligned
    require("cost", cost)
    for name, mass in (("a", a), ("b", b)):
        require(name, mass, lambda v: v.isfinite() & (v >= 0), "a finite nonnegative number")
        require(f"the sum of {name}", mass.sum(-1), lambda v: v > 0, "positive")
    require("epsilon", epsilon, lambda v: v.isfinite() & (v > 0), "a finite positive number")
    require(
        "sum of a / sum of b",
        a.sum(-1) / b.sum(-1),
        lambda ratio: (ratio - 1).abs() <= MASS_TOLERANCE,
        "1: pass a / a.sum(-1, keepdim=True), and b likewise",
    )
    return aligned


def _plan(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan and marginals of equal mass, in float64."""
    cost, a, b, epsilon = (t.double() for t in (cost, a, b, epsilon))
    # The plan does not depend on a constant in the cost, but rounding does.
    cost = cost - cost.detach().amin((-2, -1), keepdim=True)
    ratio = (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)).sqrt()
    a, b = a / ratio, b * ratio
    return _Plan.apply(cost, a, b, epsilon, max_iterations), a, b


def _report(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, plan: Tensor) -> KernelSolution:
    some = plan.detach() > 0
    product = a[..., :, None] * b[..., None, :]
    odds = torch.where(some, plan, 1.0) / torch.where(some, product, 1.0)
    divergence = (plan * odds.log()).sum((-2, -1))
    objective = (plan * cost).sum((-2, -1)) + epsilon * divergence
    value = plan.to(cost.dtype)
    residual = _violation(value.detach().double(), a.detach(), b.detach())
    tolerance = max(SOLVED, 64 * torch.finfo(cost.dtype).eps)
    solved = residual <= tolerance
    regular = (a > 0).all(-1) & (b > 0).all(-1)
    return KernelSolution(
        value=value,
        objective=objective.to(cost.dtype),
        status=torch.where(solved, int(Status.OPTIMAL), int(Status.ITERATION_LIMIT)),
        residual=residual.to(cost.dtype),
        gap=torch.where(solved, 0.0, torch.nan).to(cost.dtype),
        regular=regular.expand(residual.shape),
    )


def _violation(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rows, columns = (plan.sum(-1) - a).abs().sum(-1), (plan.sum(-2) - b).abs().sum(-1)
    return (rows + columns) / a.sum(-1)


class _Plan(BatchFunction):
    """The plan, with the derivative of its optimality conditions."""

    @staticmethod
    def forward(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, limit: int) -> Tensor:
        batch = torch.broadcast_shapes(cost.shape[:-2], a.shape[:-1], b.shape[:-1], epsilon.shape)
        m, n = cost.shape[-2:]
        cost = cost.expand(*batch, m, n).reshape(-1, m, n)
        a, b = a.expand(*batch, m).reshape(-1, m), b.expand(*batch, n).reshape(-1, n)
        epsilon = epsilon.expand(batch).reshape(-1)
        if n <= m:
            return _iterate(_Iterate.start(cost, a, b, epsilon), limit).reshape(*batch, m, n)
        return _iterate(_Iterate.start(cost.mT, b, a, epsilon), limit).mT.reshape(*batch, m, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        cost, a, b, epsilon, _ = inputs
        ctx.save_for_backward(cost, epsilon, output)
        ctx.shapes = a.shape, b.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cost, epsilon, P = ctx.saved_tensors
        weighted = P * grad
        alpha, beta = _Potentials.apply(P, weighted.sum(-1), weighted.sum(-2))
        inner = weighted - P * (alpha[..., :, None] + beta[..., None, :])
        return (
            (-inner / epsilon[..., None, None]).sum_to_size(cost.shape),
            alpha.sum_to_size(ctx.shapes[0]),
            beta.sum_to_size(ctx.shapes[1]),
            ((inner * cost).sum((-2, -1)) / epsilon**2).sum_to_size(epsilon.shape),
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _Plan.over_batch(in_dims, args)


class _Iterate(NamedTuple):
    """Where the iteration stands, for the elements that are not done."""

    cost: Tensor  # (batch, m, n), m >= n
    a: Tensor  # (batch, m)
    b: Tensor  # (batch, n)
    epsilon: Tensor  # (batch,), the value asked for
    current: Tensor  # (batch,), the present value
    f: Tensor  # (batch, m), potentials of the rows, in units of the present epsilon
    g: Tensor  # (batch, n)

    @classmethod
    def start(cls, cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> _Iterate:
        current = torch.maximum(epsilon, cost.amax((-2, -1)) - cost.amin((-2, -1)))
        return cls(cost, a, b, epsilon, current, torch.zeros_like(a), torch.zeros_like(b))

    def kernel(self) -> Tensor:
        return -self.cost / self.current[:, None, None]

    def sinkhorn(self) -> _Iterate:
        """Fit the columns' marginal, then the rows'."""
        kernel = self.kernel()
        g = self.b.log() - torch.logsumexp(self.f[:, :, None] + kernel, -2)
        f = self.a.log() - torch.logsumexp(g[:, None, :] + kernel, -1)
        return self._replace(f=f, g=g)

    def plan(self) -> Tensor:
        return torch.exp(self.f[:, :, None] + self.g[:, None, :] + self.kernel())

    def newton(self, plan: Tensor) -> _Iterate:
        g = self.g + _newton_step(plan, self.b)
        f = self.a.log() - torch.logsumexp(g[:, None, :] + self.kernel(), -1)
        return self._replace(f=f, g=g)

    def lower(self, violation: Tensor) -> _Iterate:
        """Go on to the next epsilon where this one's problem is roughly solved."""
        target = torch.maximum(self.epsilon, self.current / SCALING)
        following = torch.where(violation < NEXT, target, self.current)
        factor = (self.current / following)[:, None]
        return self._replace(current=following, f=self.f * factor, g=self.g * factor)

    def tolerance(self) -> Tensor:
        """What rounding of the exponents lets one ask of the marginals, if not `CLOSE`."""
        spread = self.cost.amax((-2, -1)) / self.epsilon
        return (8 * torch.finfo(spread.dtype).eps * spread).clamp(min=CLOSE)


def _iterate(state: _Iterate, limit: int) -> Tensor:
    """Plans; an element leaves the iteration as soon as it is solved."""
    result = torch.empty_like(state.cost)
    a, b, index = state.a, state.b, torch.arange(len(state.cost), device=state.cost.device)
    for _ in range(limit):
        state = state.sinkhorn()
        plan = state.plan()
        result[index] = plan
        violation = _violation(plan, state.a, state.b)
        going = (violation > state.tolerance()) | (state.current > state.epsilon)
        remaining = int(going.sum())
        if remaining == 0:
            break
        if remaining < len(index):
            state = _Iterate(*(part[going] for part in state))
            index, plan, violation = index[going], plan[going], violation[going]
        state = state.newton(plan).lower(violation)
    return _scaled(_scaled(result, a, b), a, b)


def _newton_step(plan: Tensor, b: Tensor) -> Tensor:
    """Change of g, in units of epsilon, for a plan whose rows have the right sums.

    With the dual's third derivative at most the range of the step times the second, this damping
    makes the dual increase from anywhere (Sun and Tran-Dinh 2019).
    """
    step = _Laplacian.of(plan).solve(b - plan.sum(-2))
    step = torch.where(step.isfinite().all(-1, keepdim=True), step, 0.0)
    size = step.amax(-1, keepdim=True) - step.amin(-1, keepdim=True)
    return step * torch.where(size > 0, torch.log1p(size) / size, 1.0)


def _scaled(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One Newton step by factors of the plan, free of the rounding of large exponents."""
    plan = plan * torch.exp(_newton_step(plan, b))[:, None, :]
    return plan * (a * _inverse(plan.sum(-1)))[:, :, None]


class _Potentials(BatchFunction):
    """Solve diag(P 1) alpha + P beta = r, P' alpha + diag(P' 1) beta = c, where sum r = sum c.

    The system is symmetric, and singular by the constant that may move from alpha to beta.
    """

    @staticmethod
    def forward(P: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if P.shape[-1] > P.shape[-2]:
            beta, alpha = _Potentials.forward(P.mT, c, r)
            return alpha, beta
        rows = _inverse(P.sum(-1))
        beta = _Laplacian.of(P).solve(c - _times(P.mT, rows * r))
        return rows * (r - _times(P, beta)), beta

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad_alpha: Tensor, grad_beta: Tensor) -> Any:
        P, alpha, beta = ctx.saved_tensors
        mu, nu = _Potentials.apply(P, grad_alpha, grad_beta)
        outer = (mu[..., :, None] + nu[..., None, :]) * (alpha[..., :, None] + beta[..., None, :])
        return -outer, mu, nu

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _Potentials.over_batch(in_dims, args)


class _Laplacian(NamedTuple):
    """diag(P' 1) - P' diag(P 1)^-1 P: that of a graph of columns, linked by the rows they share."""

    matrix: Tensor  # (..., n, n)
    scale: Tensor  # (..., n)
    factor: Tensor  # (..., n, n)

    @classmethod
    def of(cls, P: Tensor) -> _Laplacian:
        # Products of entries like these are denormal numbers, which take a hundred times longer.
        smallest = TINY * P.amax((-2, -1), keepdim=True)
        P = torch.where(smallest <= P, P, 0.0)
        S = -P.mT @ (_inverse(P.sum(-1))[..., None] * P)
        # The diagonal from the other entries, which no cancellation has touched.
        S.diagonal(dim1=-2, dim2=-1).zero_()
        S.diagonal(dim1=-2, dim2=-1).copy_(-S.sum(-1))
        b = P.sum(-2)
        scale = _inverse(b).sqrt()
        root = b.sqrt()
        # The rank-one term settles the constant, without a change to what is of interest.
        full = scale[..., None] * S * scale[..., None, :]
        full = full + root[..., None] * root[..., None, :] / b.sum(-1)[..., None, None]
        full.diagonal(dim1=-2, dim2=-1).add_(torch.where(b > 0, DAMPING, 1.0))
        return cls(S, scale, torch.linalg.cholesky_ex(full).L)

    def solve(self, rhs: Tensor) -> Tensor:
        """The solution that is orthogonal to the column sums, for rhs of zero sum."""
        x = self._solve(rhs)
        return x + self._solve(rhs - _times(self.matrix, x))

    def _solve(self, rhs: Tensor) -> Tensor:
        scaled = (self.scale * rhs)[..., None]
        return self.scale * torch.cholesky_solve(scaled, self.factor)[..., 0]


def _inverse(mass: Tensor) -> Tensor:
    """1 / mass, and 0 where there is none."""
    return torch.where(mass > 0, 1 / torch.where(mass > 0, mass, 1.0), 0.0)


def _times(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x[..., None])[..., 0]
