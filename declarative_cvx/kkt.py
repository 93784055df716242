"""Linear systems with the Jacobian of the optimality conditions, differentiable at will.

J = [[P, A'(DΠ - I)], [A, DΠ]] (see `declarative_cvx.optimality`) and its transpose are what Newton
steps, gradients and directional derivatives of a solution have to be solved with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.cones import ConeDerivative
from declarative_cvx.elimination import Parts
from declarative_cvx.least_squares import FACTORED, Factors, least_norm
from declarative_cvx.program import ConeProgram
from declarative_cvx.sparse_kkt import sparse_least_norm, sparse_solve
from declarative_cvx.sparsity import columns
from declarative_cvx.transforms import apply_function, transforming

# Residual up to which the solution of the reduced system is taken without a correction.
CORRECTED = 1e-13
# Order from which, and share of nonzero entries up to which, systems are factorised as sparse ones
# (measured: below, dense factorisations are as fast or faster).
SPARSE_SIZE = 1500
SPARSE_SHARE = 0.02


def solve_kkt(
    program: ConeProgram, projection: ConeDerivative, rhs: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """Solve J w = v or J'w = v for every element, whether or not J is singular.

    Parameters
    ----------
    program : ConeProgram
    projection : ConeDerivative
        DΠ at z.
    rhs : Tensor, shape (batch, n + m, columns)
    transpose : bool
        Solve with J'.

    Returns
    -------
    solution : Tensor, shape (batch, n + m, columns)
        The solution; the one of least norm where there are many, the least-squares one where
        there is none. Its derivative is that of a regular system.
    residual : Tensor, shape (batch, columns)
        Largest error, relative to the right-hand side; not differentiable.
    """
    return solve_kkt_and_rank(program, projection, rhs, transpose)[:2]


def solve_kkt_and_rank(
    program: ConeProgram, projection: ConeDerivative, rhs: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `solve_kkt`, with a third result: whether each matrix is singular, bool, (batch,)."""
    indices = tuple(index for index, _ in projection.blocks)
    blocks = [block for _, block in projection.blocks]
    kind = _Kind(program, indices, transpose)
    return apply_function(_Solve, program.P, program.A, projection.diagonal, rhs, kind, *blocks)


def kkt_times(
    program: ConeProgram, projection: ConeDerivative, w: Tensor, transpose: bool = False
) -> Tensor:
    """J @ w (or J' @ w) for w of shape (batch, n + m, columns)."""
    return _System(program, projection, transpose).times(w)


@dataclass(frozen=True)
class _Kind:
    """What is no tensor, or not differentiated, about a system."""

    program: ConeProgram
    indices: tuple[Tensor, ...]
    transpose: bool

    def system(self, P: Tensor, A: Tensor, diagonal: Tensor, blocks: tuple) -> _System:
        # With what was computed for it before, unless that is part of a graph.
        program = self.program
        tracked = P.requires_grad or A.requires_grad or transforming()
        if tracked or P is not program.P or A is not program.A:
            empty = diagonal.new_zeros((diagonal.shape[0], 0))
            program = ConeProgram(program.structure, P, empty, A, empty)
        pairs = list(zip(self.indices, blocks, strict=True))
        return _System(program, ConeDerivative(diagonal, pairs), self.transpose)


@dataclass(frozen=True)
class _System:
    """J or J' of a batch."""

    program: ConeProgram
    projection: ConeDerivative
    transpose: bool

    @property
    def n(self) -> int:
        return self.program.structure.variables

    def times(self, w: Tensor) -> Tensor:
        """The matrix times w of shape (batch, n + m, columns)."""
        x, z = w[:, : self.n], w[:, self.n :]
        if self.transpose:
            Ax = self.program.A_matmul(x)
            top = self.program.P_matmul(x) + self.program.At_matmul(z)
            return torch.cat([top, self.projection.matmul(Ax + z) - Ax], 1)
        Dz = self.projection.matmul(z)
        top = self.program.P_matmul(x) + self.program.At_matmul(Dz - z)
        return torch.cat([top, self.program.A_matmul(x) + Dz], 1)

    def matrix(self) -> Tensor:
        """The matrices themselves, shape (batch, n + m, n + m)."""
        matrix = _assemble(self.program.dense_P, self.program.dense_A, self.projection)
        return matrix.mT if self.transpose else matrix

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """By factorisation, and what is left of rhs.

        NaN or inaccurate where the matrix is singular.
        """
        if self.is_sparse:
            w = sparse_solve(self.program, self.projection, self.transpose, rhs)
            return w, rhs - self.times(w)
        core = self.core()
        w = core.solve(rhs, self.transpose)
        error = rhs - self.times(w)
        if core.parts is not None and bool((error.abs().amax((1, 2)) > CORRECTED).any()):
            correction = core.solve(error, self.transpose)
            w = torch.where(torch.isfinite(correction), w + correction, w)
            error = rhs - self.times(w)
        return w, error

    def core(self) -> _Core:
        """The factorised system: the one of the last call, if it has the same matrix."""
        known = self.program.__dict__.get("_core")
        if known is None or not known.belongs_to(self.projection):
            known = _Core.of(self)
            self.program.__dict__["_core"] = known
        return known

    def least_norm(self, rhs: Tensor) -> Tensor:
        """The least-squares solution of least norm."""
        if self.is_sparse:
            return sparse_least_norm(self.program, self.projection, self.transpose, rhs)
        return least_norm(self.matrix(), rhs)

    @property
    def is_sparse(self) -> bool:
        """Whether sparse factorisations, one by one, are faster than dense ones."""
        structure = self.program.structure
        size = structure.variables + structure.rows
        blocks = sum(index.numel() * index.shape[1] for index, _ in self.projection.blocks)
        entries = structure.P.nnz + 2 * structure.A.nnz + structure.rows + blocks
        return size >= SPARSE_SIZE and entries <= SPARSE_SHARE * size**2

    def select(self, index: Tensor) -> _System:
        pairs = [(rows, block[index]) for rows, block in self.projection.blocks]
        derivative = ConeDerivative(self.projection.diagonal[index], pairs)
        return _System(self.program.select(index), derivative, self.transpose)


def _assemble(P: Tensor, A: Tensor, projection: ConeDerivative) -> Tensor:
    """[[P, A'(DΠ - I)], [A, DΠ]], shape (batch, n + m, n + m)."""
    (batch, m), n = projection.diagonal.shape, P.shape[1]
    cross = projection.matmul(A) - A  # (DΠ - I) A
    out = P.new_zeros((batch, n + m, n + m))
    out[:, :n, :n] = P
    out[:, :n, n:] = cross.mT
    out[:, n:, :n] = A
    projection.write(out[:, n:, n:])
    return out


@dataclass(frozen=True)
class _Core:
    """J factorised, without the variables T and rows E if some are eliminated.

    In J w = v, with parts named after the variables and rows (`declarative_cvx.elimination`),
        dt = (v_E - A_E dx) / c,   dz_E = (p dt - v_T) / c,
    and in J'w = v
        w_t = -(v_E + A_E w_x) / c,   w_E = (v_T - p w_t) / c;
    what is left has P + A_E' (p / c^2) A_E in the place of P.
    """

    factors: Factors
    projection: ConeDerivative
    parts: Parts | None
    places: tuple[Tensor, ...] = ()  # of E, T, X, R in the whole system
    order: Tensor | None = None  # of the whole system in (T, X, E, R)

    @classmethod
    def of(cls, system: _System) -> _Core:
        program, n = system.program, system.n
        elimination = program.structure.elimination
        if elimination is None:
            matrix = _assemble(program.dense_P, program.dense_A, system.projection)
            return cls(Factors.of(matrix), system.projection, None)
        E, T, X, R, rows, variables = elimination.index(program.P.device)
        parts = Parts.of(program)
        matrix = _assemble(parts.P, parts.A_R, system.projection.without(len(E), R))
        places, order = (n + E, T, X, n + R), torch.cat([variables, n + rows])
        return cls(Factors.of(matrix), system.projection, parts, places, order)

    def belongs_to(self, projection: ConeDerivative) -> bool:
        """Whether this is the factorised Jacobian for a DΠ, of which only 0 and 1 recur."""
        if self.projection is projection:
            return True
        return not projection.blocks and torch.equal(projection.diagonal, self.projection.diagonal)

    def solve(self, rhs: Tensor, transpose: bool) -> Tensor:
        if self.parts is None or self.order is None:
            return self.factors.solve(rhs, transpose)
        E, T, X, R = (columns(rhs, place) for place in self.places)
        A, p, c = self.parts.A_E, self.parts.p[:, :, None], self.parts.c[:, :, None]
        sign = -1.0 if transpose else 1.0
        top = X + sign * (A.mT @ ((p * E / c - sign * T) / c))
        inner = self.factors.solve(torch.cat([top, R], 1), transpose)
        x, z = inner[:, : X.shape[1]], inner[:, X.shape[1] :]
        t = (sign * E - A @ x) / c
        multiplier = sign * (p * t - T) / c
        return columns(torch.cat([t, x, multiplier, z], 1), self.order)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        P: Tensor, A: Tensor, diagonal: Tensor, rhs: Tensor, kind: _Kind, *blocks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        system = kind.system(P, A, diagonal, blocks)
        # In units of the right-hand side, so that gradients of 1e-12 and 1e+12 are treated alike.
        unit = rhs.abs().amax(1, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        scaled = rhs / unit
        w, error = system.solve(scaled)
        residual = error.abs().amax(1)
        failed = torch.where(~(residual <= FACTORED).all(1))[0]
        if len(failed):
            part = system.select(failed)
            least = part.least_norm(scaled[failed])
            found = (part.times(least) - scaled[failed]).abs().amax(1)
            worse = found > residual[failed]  # False where the factorisation gave NaN
            w = w.index_copy(0, failed, torch.where(worse[:, None], w[failed], least))
            residual = residual.index_copy(0, failed, torch.fmin(found, residual[failed]))
        singular = torch.zeros(len(rhs), dtype=torch.bool, device=rhs.device)
        return w * unit, residual, singular.index_fill(0, failed, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        P, A, diagonal, _, ctx.kind, *blocks = inputs
        w, residual, singular = output
        ctx.mark_non_differentiable(residual, singular)
        ctx.save_for_backward(P, A, diagonal, w, *blocks)
        ctx.save_for_forward(P, A, diagonal, w, *blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        P, A, diagonal, w, *blocks = ctx.saved_tensors
        kind = _Kind(ctx.kind.program, ctx.kind.indices, not ctx.kind.transpose)
        g = apply_function(_Solve, P, A, diagonal, grad, kind, *blocks)[0]
        if not any(ctx.needs_input_grad[:3]) and not any(ctx.needs_input_grad[5:]):
            return None, None, None, g, None, *(None for _ in blocks)
        left, right = (w, g) if ctx.kind.transpose else (g, w)
        dP, dA, dd, dblocks = _bilinear(kind.system(P, A, diagonal, blocks), left, right)
        return dP, dA, dd, g, None, *dblocks

    @staticmethod
    def jvp(ctx: Any, dP: Any, dA: Any, dd: Any, drhs: Any, _: Any, *dblocks: Any) -> Any:
        P, A, diagonal, w, *blocks = ctx.saved_tensors
        rhs = torch.zeros_like(w) if drhs is None else drhs
        rhs = rhs - _change(ctx.kind, (P, A, diagonal, blocks), (dP, dA, dd, dblocks), w)
        return apply_function(_Solve, P, A, diagonal, rhs, ctx.kind, *blocks)[0], None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        P, A, diagonal, rhs, kind, *blocks = inputs
        if all(dim is None for dim in (*in_dims[:3], *in_dims[5:])):
            columns = rhs.movedim(in_dims[3], -1)  # one factorisation, more columns
            flat = columns.flatten(2)
            w, residual, singular = apply_function(_Solve, P, A, diagonal, flat, kind, *blocks)
            shape = columns.shape[2:]
            return (w.unflatten(2, shape), residual.unflatten(1, shape), singular), (3, 2, None)
        size = info.batch_size
        batch = diagonal.shape[1 if in_dims[2] == 0 else 0]
        tensors, dims = (P, A, diagonal, rhs, *blocks), (*in_dims[:4], *in_dims[5:])
        values = [fold(v, dim, size, batch) for v, dim in zip(tensors, dims, strict=True)]
        outputs = apply_function(_Solve, *values[:4], kind, *values[4:])
        return tuple(v.unflatten(0, (size, batch)) for v in outputs), (0, 0, 0)


def _bilinear(
    system: _System, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Gradients of -left' J right with respect to P, A and the parts of DΠ."""
    program, n = system.program, system.n
    left_x, left_z, right_x, right_z = left[:, :n], left[:, n:], right[:, :n], right[:, n:]
    rows, cols = program.structure.P.index(left.device)
    dP = -(left_x[:, rows] * right_x[:, cols]).sum(2)
    rows, cols = program.structure.A.index(left.device)
    cross = system.projection.matmul(right_z) - right_z
    dA = -(cross[:, rows] * left_x[:, cols] + left_z[:, rows] * right_x[:, cols]).sum(2)
    image = program.A_matmul(left_x) + left_z
    dblocks = tuple(
        -(image[:, index] @ right_z[:, index].mT) for index, _ in system.projection.blocks
    )
    return (
        dP if len(program.P) == len(dP) else dP.sum(0, keepdim=True),
        dA if len(program.A) == len(dA) else dA.sum(0, keepdim=True),
        -(image * right_z).sum(2),
        dblocks,
    )


def _change(kind: _Kind, values: tuple, changes: tuple, w: Tensor) -> Tensor:
    """What a change of the matrix, by changes of its parts (None: no change), does to w."""
    system = kind.system(*values)
    P, A, diagonal = (
        torch.zeros_like(v) if d is None else d
        for v, d in zip(values[:3], changes[:3], strict=True)
    )
    blocks = tuple(
        torch.zeros_like(v) if d is None else d for v, d in zip(values[3], changes[3], strict=True)
    )
    change = kind.system(P, A, diagonal, blocks)
    x, z = w[:, : system.n], w[:, system.n :]
    dAx, top = change.program.A_matmul(x), change.program.P_matmul(x)
    if kind.transpose:
        bottom = change.projection.matmul(system.program.A_matmul(x) + z)
        bottom = bottom + system.projection.matmul(dAx) - dAx
        return torch.cat([top + change.program.At_matmul(z), bottom], 1)
    dDz, cross = change.projection.matmul(z), system.projection.matmul(z) - z
    top = top + change.program.At_matmul(cross) + system.program.At_matmul(dDz)
    return torch.cat([top, dAx + dDz], 1)


def fold(value: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """Merge a dimension that vmap added into the batch; values that are shared stay shared."""
    if dim is None:
        if value.shape[0] == 1 and batch != 1:
            return value
        value = value.expand(size, *value.shape)
    else:
        value = value.movedim(dim, 0)
    return value.expand(size, batch, *value.shape[2:]).flatten(0, 1)
