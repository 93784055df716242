"""Weighted least squares with regularisation, batched, by orthogonal factorisation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from declarative_cvx.errors import ParameterError
from declarative_cvx.nonconvex.kernels.arguments import BatchFunction, align, prepare, require
from declarative_cvx.nonconvex.kernels.report import KernelSolution
from declarative_cvx.status import Status

# Violation of the normal equations, in units of rounding, up to which an answer counts as solved.
SOLVED = 1e3


class _Data(NamedTuple):
    """The terms of the objective, with batch dimensions of the same rank."""

    A: Tensor  # (..., m, n), with a column of ones for the intercept
    weights: Tensor  # (..., m)
    ridge: Tensor  # (..., n), the regularisation of each unknown

    def hessian(self, x: Tensor) -> Tensor:
        """The product of the objective's second derivative and x."""
        return self.transposed(self.weights * self.times(x)) + self.ridge * x

    def times(self, x: Tensor) -> Tensor:
        return _times(self.A, x)

    def transposed(self, y: Tensor) -> Tensor:
        return _times(self.A.mT, y)


@torch.compiler.disable  # looks at values
def weighted_least_squares(
    A: Tensor,
    b: Tensor,
    weights: Tensor | None = None,
    regularisation: Tensor | float = 0.0,
    intercept: bool = False,
) -> Tensor:
    """Minimise sum_i w_i (a_i' x - b_i)^2 / 2 + lambda ||x||^2 / 2.

    By QR factorisation of the stacked weighted matrix, and refinement; the derivative is that of
    the normal equations (DDN Prop. 4.6), solved with the same factor. Where the minimum is not
    unique the answer is the one of least norm.

    Parameters
    ----------
    A : Tensor, shape (..., m, n)
    b : Tensor, shape (..., m)
        Leading dimensions are batch dimensions and broadcast. Several right-hand sides of one
        matrix go into a leading dimension of `b`; it is then factorised once.
    weights : Tensor, shape (..., m), optional
        Nonnegative; ones if not given.
    regularisation : float or Tensor, shape (...), optional
        Nonnegative.
    intercept : bool, optional
        Fit a' x + x_0: the last entry of the answer is x_0, which is not regularised.

    Returns
    -------
    Tensor, shape (..., n), or (..., n + 1) with an intercept
        Twice differentiable for all tensors. Where the rank is less than min(m, n), what
        is returned as derivative is that along matrices of this rank.

    Raises
    ------
    ParameterError
    """
    data, b = _checked(A, b, weights, regularisation, intercept)
    return _Solve.apply(*data, b, None, *_factor(data))


class WeightedLeastSquares(nn.Module):
    """`weighted_least_squares` as a module.

    Parameters
    ----------
    regularisation : float or Tensor, optional
        A `torch.nn.Parameter` is learned.
    intercept : bool, optional
    """

    def __init__(self, regularisation: Tensor | float = 0.0, intercept: bool = False) -> None:
        super().__init__()
        self.regularisation, self.intercept = regularisation, intercept

    def forward(self, A: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
        """The minimiser; see `weighted_least_squares`."""
        return weighted_least_squares(A, b, weights, self.regularisation, self.intercept)

    def solve(self, A: Tensor, b: Tensor, weights: Tensor | None = None) -> KernelSolution:
        """The minimiser and a report.

        The residual is that of the normal equations, relative to the norms of the factors in them.
        A problem is `regular` if its weighted matrix has full rank.
        """
        data, b = _checked(A, b, weights, self.regularisation, self.intercept)
        factor = _factor(data)
        x = _Solve.apply(*data, b, None, *factor)
        return _report(data, b, x, factor.full_rank)

    def extra_repr(self) -> str:
        return f"regularisation={self.regularisation}, intercept={self.intercept}"


def _checked(
    A: Tensor,
    b: Tensor,
    weights: Tensor | None,
    regularisation: Tensor | float,
    intercept: bool,
) -> tuple[_Data, Tensor]:
    given = {"A": A, "b": b, "weights": 1.0 if weights is None else weights}
    A, b, weights, ridge = prepare({**given, "regularisation": regularisation})
    if A.ndim < 2 or 0 in A.shape[-2:]:
        raise ParameterError(
            f"A has shape {tuple(A.shape)}; expected (..., m, n) with m >= 1 and n >= 1."
        )
    m, n = A.shape[-2:]
    weights = weights.expand(m) if weights.ndim == 0 else weights
    require("A", A)
    require("b", b)
    for name, value in (("weights", weights), ("regularisation", ridge)):
        require(name, value, _finite_nonnegative, "a finite nonnegative number")
    A, b, weights, ridge = align(
        {
            "A": (A, (m, n)),
            "b": (b, (m,)),
            "weights": (weights, (m,)),
            "regularisation": (ridge, ()),
        }
    )
    ridge = ridge[..., None].expand(*ridge.shape, n)
    if intercept:
        A, ridge = pad(A, (0, 1), value=1.0), pad(ridge, (0, 1))
    return _Data(A, weights, ridge), b


def _finite_nonnegative(value: Tensor) -> Tensor:
    return value.isfinite() & (value >= 0)


class _Factor(NamedTuple):
    """The pseudo-inverse of the stacked matrix M, F Q'; that of the Hessian M'M is F F'."""

    F: Tensor  # (..., n, k)
    Q: Tensor  # (..., rows, k), orthonormal columns
    full_rank: Tensor  # (...)


def _factor(data: _Data) -> _Factor:
    return _Factor(*_Factorisation.apply(*(part.detach() for part in data)))


class _Factorisation(BatchFunction):
    """`_Factor` of the data; not differentiated, since `_Solve` is."""

    @staticmethod
    def forward(A: Tensor, weights: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        M = _stacked(A, weights, ridge)
        rows, n = M.shape[-2:]
        if rows < n:
            return _pseudo_inverse(M)
        Q, R = torch.linalg.qr(M)
        # Rank is judged with columns of norm 1: units of the unknowns have no say in it.
        norms = torch.linalg.norm(R, dim=-2, keepdim=True)
        norms = torch.where(norms > 0, norms, 1.0)
        F = torch.linalg.solve_triangular(R / norms, torch.eye(n).to(R), upper=True)
        condition = math.sqrt(n) * torch.linalg.norm(F, dim=(-2, -1))
        F = F / norms.mT
        full_rank = condition < 1 / (rows * torch.finfo(R.dtype).eps)
        if not bool(full_rank.all()):
            some = ~full_rank
            F[some], turn, full_rank[some] = _pseudo_inverse(R[some])
            Q[some] = Q[some] @ turn
        return F, Q, full_rank

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _Factorisation.over_batch(in_dims, args)


def _stacked(A: Tensor, weights: Tensor, ridge: Tensor) -> Tensor:
    """M with M'M the Hessian; without rows for the regularisation where there is none."""
    M = weights.sqrt()[..., None] * A
    if not bool(ridge.any()):
        return M
    batch = torch.broadcast_shapes(M.shape[:-2], ridge.shape[:-1])
    lower = torch.diag_embed(ridge.sqrt())
    return torch.cat([part.expand(*batch, *part.shape[-2:]) for part in (M, lower)], -2)


def _pseudo_inverse(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    kept = max(M.shape[-2:]) * torch.finfo(S.dtype).eps * S[..., :1] < S
    inverse = torch.where(kept, 1 / S, 0.0)
    return Vh.mT * inverse[..., None, :], U, kept.all(-1)


class _Solve(BatchFunction):
    """x = H^+ (A' W b + g), H = A' W A + ridge, with F F' = H^+; g is a linear term.

    Its derivative needs the same function with b absent: u = H^+ dx.
    """

    @staticmethod
    def forward(
        A: Tensor,
        weights: Tensor,
        ridge: Tensor,
        b: Tensor | None,
        g: Tensor | None,
        F: Tensor,
        Q: Tensor,
        full_rank: Tensor,
    ) -> Tensor:
        if b is None:
            assert g is not None
            return _times(F, _times(F.mT, g))
        root, m = weights.sqrt(), A.shape[-2]
        x = _times(F, _times(Q[..., :m, :].mT, root * b))
        # The residual corrects for the rounding of the explicit inverse F.
        misfit = _times(Q[..., :m, :].mT, root * (b - _times(A, x)))
        if Q.shape[-2] > m:
            misfit = misfit - _times(Q[..., m:, :].mT, ridge.sqrt() * x)
        return x + _times(F, misfit)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        A, weights, ridge, b, g, F, Q, full_rank, x = ctx.saved_tensors
        data, factor = _Data(A, weights, ridge), _Factor(F, Q, full_rank)
        u = _Solve.apply(*data, None, grad, *factor)
        Ax, Au = data.times(x), data.times(u)
        r = -Ax if b is None else b - Ax
        grad_A = _outer(weights * r, u) - _outer(weights * Au, x)
        if F.shape[-1] < F.shape[-2]:
            grad_A = grad_A + _of_null_space(data, factor, x, grad)
            if g is not None:
                grad_A = grad_A + _of_null_space(data, factor, u, g)
        return (
            grad_A.sum_to_size(A.shape),
            (r * Au).sum_to_size(weights.shape),
            (-u * x).sum_to_size(ridge.shape),
            None if b is None else (weights * Au).sum_to_size(b.shape),
            None if g is None else u.sum_to_size(g.shape),
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _Solve.over_batch(in_dims, args)


def _of_null_space(data: _Data, factor: _Factor, x: Tensor, v: Tensor) -> Tensor:
    """What the turning of the null space adds to the derivative for A (Golub and Pereyra 1973)."""
    project = v - _Solve.apply(*data, None, data.hessian(v), *factor)
    return _outer(data.weights * data.times(_Solve.apply(*data, None, x, *factor)), project)


def _times(A: Tensor, x: Tensor) -> Tensor:
    """Matrix times vector, batched; one product where many vectors share a matrix."""
    return (x[..., None, :] @ A.mT)[..., 0, :]


def _outer(y: Tensor, x: Tensor) -> Tensor:
    return y[..., :, None] * x[..., None, :]


def _report(data: _Data, b: Tensor, x: Tensor, full_rank: Tensor) -> KernelSolution:
    r = b - data.times(x)
    objective = ((data.weights * r * r).sum(-1) + (data.ridge * x * x).sum(-1)) / 2
    with torch.no_grad():
        slope = (data.transposed(data.weights * r) - data.ridge * x).norm(dim=-1)
        M = ((data.weights[..., None] * data.A**2).sum((-2, -1)) + data.ridge.sum(-1)).sqrt()
        c = (data.weights * b * b).sum(-1).sqrt()
        size = M * (M * x.norm(dim=-1) + c)
        residual = torch.where(slope == 0, 0.0, slope / size)
        tolerance = SOLVED * math.sqrt(data.A.shape[-2]) * torch.finfo(x.dtype).eps
        status = torch.where(residual <= tolerance, int(Status.OPTIMAL), int(Status.INACCURATE))
        status = torch.where(x.isfinite().all(-1), status, int(Status.NUMERICAL_ERROR))
    return KernelSolution(
        value=x,
        objective=objective,
        status=status,
        residual=residual,
        gap=torch.zeros_like(residual),
        regular=full_rank.expand(residual.shape),
    )
