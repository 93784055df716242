"""Linear systems with the Jacobian of the optimality conditions, differentiable at will.

J = [[P, A'(DΠ - I)], [A, DΠ]] (see `declarative_cvx.optimality`) and its transpose are what Newton
steps, gradients and directional derivatives of a solution have to be solved with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.condensed import Core
from declarative_cvx.cones import ConeDerivative
from declarative_cvx.least_squares import FACTORED, INFLATED, least_norm
from declarative_cvx.program import ConeProgram, Structure
from declarative_cvx.sparse_kkt import sparse_least_norm, sparse_solve
from declarative_cvx.transforms import apply_function, recording, transforming

# Residual, relative to the solution, up to which it is taken without a correction.
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
        there is none. (Where J is singular because of free variables only, they are put to zero,
        which is the solution of J'w = v of least norm.) Its derivative is that of a regular system.
    residual : Tensor, shape (batch, columns)
        Largest error, relative to the right-hand side; not differentiable.
    """
    return solve_kkt_and_rank(program, projection, rhs, transpose)[:2]


def solve_regular_kkt(program: ConeProgram, projection: ConeDerivative, rhs: Tensor) -> Tensor:
    """As `solve_kkt`, unchecked: NaN or inaccurate where J is singular.

    The factors are kept for the systems to come.
    """
    return System(program, projection).unchecked(rhs)


def solve_kkt_and_rank(
    program: ConeProgram, projection: ConeDerivative, rhs: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `solve_kkt`, with a third result: how regular each matrix is, int64, shape (batch,).

    0 is regular, 1 is singular because of free variables only (`free_variables`), 2 is singular.
    """
    constant = projection.is_constant
    indices = tuple(index for index, _ in projection.parts)
    kind = _Kind(program, indices, projection.order, projection if constant else None, transpose)
    blocks = [] if constant else [block for _, block in projection.blocks]
    return apply_function(_Solve, program.P, program.A, projection.diagonal, rhs, kind, *blocks)


def derivative_at(program: ConeProgram, z: Tensor) -> ConeDerivative:
    """DΠ at z (batch, m): the last one, if it was at this point and nothing is recorded."""
    if recording(z):
        return program.structure.cone.derivative(z)
    known = program.__dict__.get("_derivative")
    if known is not None and torch.equal(known[0], z):
        return known[1]
    found = program.structure.cone.derivative(z)
    program.__dict__["_derivative"] = (z, found)
    return found


def project_at(program: ConeProgram, z: Tensor) -> Tensor:
    """Π(z) for finite z (batch, m), whose derivative `derivative_at` will know."""
    nearest, projection = program.structure.cone.decompose(z)
    program.__dict__["_derivative"] = (z, projection)
    return nearest


def free_variables(program: ConeProgram, projection: ConeDerivative) -> Tensor:
    """Variables that no optimality condition contains near z, bool, shape (batch, n).

    An example is a bound on a term of an inactive constraint. J' maps their unit vectors to zero.
    """
    return System(program, projection).core().condensed.free


def kkt_times(
    program: ConeProgram, projection: ConeDerivative, w: Tensor, transpose: bool = False
) -> Tensor:
    """J @ w (or J' @ w) for w of shape (batch, n + m, columns)."""
    return System(program, projection, transpose).times(w)


def has_sparse_systems(structure: Structure, blocks: int = 0) -> bool:
    """Whether systems with so many entries of DΠ in blocks are factorised as sparse ones."""
    size = structure.variables + structure.rows
    entries = structure.P.nnz + 2 * structure.A.nnz + structure.rows + blocks
    return size >= SPARSE_SIZE and entries <= SPARSE_SHARE * size**2


@dataclass(frozen=True)
class _Kind:
    """What is no tensor, or not differentiated, about a system."""

    program: ConeProgram
    indices: tuple[Tensor, ...]
    order: Tensor | None
    constant: ConeDerivative | None  # DΠ, unless it is given by tensors
    transpose: bool

    def system(self, P: Tensor, A: Tensor, diagonal: Tensor, blocks: tuple) -> System:
        # With what was computed for it before, unless that is part of a graph.
        program, constant = self.program, self.constant
        tracked = P.requires_grad or A.requires_grad or transforming()
        if tracked or P is not program.P or A is not program.A:
            program = self._program(P, A)
        if constant is not None and diagonal is constant.diagonal:
            return System(program, constant, self.transpose)
        parts = blocks if constant is None else tuple(part for _, part in constant.parts)
        return System(program, self._projection(diagonal, parts), self.transpose)

    def change(self, P: Tensor, A: Tensor, diagonal: Tensor, blocks: tuple) -> System:
        """The system whose matrix is the change of J for changes of its parts."""
        return System(self._program(P, A), self._projection(diagonal, blocks), self.transpose)

    def _program(self, P: Tensor, A: Tensor) -> ConeProgram:
        empty = P.new_zeros((max(len(P), len(A)), 0))
        return ConeProgram(self.program.structure, P, empty, A, empty)

    def _projection(self, diagonal: Tensor, blocks: tuple) -> ConeDerivative:
        indices = self.indices if blocks else ()
        return ConeDerivative(diagonal, list(zip(indices, blocks, strict=True)), self.order)


@dataclass(frozen=True)
class System:
    """J or J' of a batch."""

    program: ConeProgram
    projection: ConeDerivative
    transpose: bool = False

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

    def unchecked(self, rhs: Tensor) -> Tensor:
        """By factorisation, whatever comes of it."""
        return self.factored(rhs)[0]

    def factored(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """By factorisation, whatever comes of it, and where the matrix is nearly singular.

        The latter is bool, shape (batch,): where only rounding may keep it from being so.
        """
        if self.is_sparse:
            return sparse_solve(self.program, self.projection, self.transpose, rhs)
        condensed = self.core().condensed
        return condensed.solve(rhs, self.transpose), condensed.doubtful

    def solve_any(self, rhs: Tensor, exactly: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Solutions as of `solve_kkt`, their residuals, and which elements had no factorisation.

        By factorisation, corrected once where `exactly` is asked for and something is left.
        Without it, any solution of a singular system that is large and sparse will do.
        """
        # In units of the right-hand side, so that gradients of 1e-12 and 1e+12 are treated alike.
        unit = rhs.abs().amax(1, keepdim=True)
        unit = unit.masked_fill(unit == 0, 1.0)
        scaled = rhs / unit
        w, doubtful = self.factored(scaled)
        residual, size = self._left(w, scaled)
        share = CORRECTED if exactly else FACTORED
        fine = (residual <= share * size.clamp(1.0, FACTORED / share)) & (size <= INFLATED)
        # Where only rounding keeps a matrix from being singular, which of the solutions comes out
        # is a matter of chance.
        doubtful = doubtful & (exactly or not self.is_sparse)
        regular = fine.all(1) > doubtful
        if not bool(regular.all()):
            w, residual, regular = self._improved(w, scaled, doubtful)
        return w * unit, residual, ~regular

    def _left(self, w: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """Largest entries of what w leaves of rhs and of w itself, each (batch, columns)."""
        return (rhs - self.times(w)).abs().amax(1), w.abs().amax(1)

    def _improved(self, w: Tensor, rhs: Tensor, doubtful: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Corrected solutions, or those of least squares; their residuals; which are the former."""
        if not self.is_sparse:
            correction = self.unchecked(rhs - self.times(w))
            w = torch.where(torch.isfinite(correction), w + correction, w)
        residual, size = self._left(w, rhs)
        solved = ((residual <= FACTORED) & (size <= INFLATED)).all(1)
        regular = solved > doubtful
        if bool(regular.all()):
            return w, residual, regular
        failed = torch.where(~regular)[0]
        part, fine = self.select(failed), solved[failed, None]
        least = part.least_norm(rhs[failed])
        found = part._left(least, rhs[failed])[0]
        # False where the factorisation gave NaN
        worse = found > torch.where(fine, FACTORED, residual[failed])
        w = w.index_copy(0, failed, torch.where(worse[:, None], w[failed], least))
        # Inflated answers leave little of rhs even where only rounding keeps the matrix from being
        # singular; what least squares leave tells whether there is a solution.
        found = torch.where(fine & worse, residual[failed], found)
        return w, residual.index_copy(0, failed, found), regular

    def core(self) -> Core:
        """The factorised system: the one of the last call, if it has the same matrix."""
        known = self.program.__dict__.get("_core")
        if known is None or not known.belongs_to(self.projection):
            known = Core.of(self.program, self.projection)
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
        blocks = sum(index.numel() * index.shape[1] for index, _ in self.projection.parts)
        return has_sparse_systems(self.program.structure, blocks)

    def select(self, index: Tensor) -> System:
        """Those of the elements named by an index."""
        return System(self.program.select(index), self.projection.select(index), self.transpose)


def _assemble(P: Tensor, A: Tensor, projection: ConeDerivative) -> Tensor:
    """[[P, A'(DΠ - I)], [A, DΠ]], shape (batch, n + m, n + m)."""
    (batch, m), n = projection.diagonal.shape, P.shape[1]
    out = P.new_zeros((batch, n + m, n + m))
    out[:, :n, :n] = P
    out[:, :n, n:] = projection.minus_identity(A).mT
    out[:, n:, :n] = A
    projection.write(out[:, n:, n:])
    return out


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        P: Tensor, A: Tensor, diagonal: Tensor, rhs: Tensor, kind: _Kind, *blocks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        system = kind.system(P, A, diagonal, blocks)
        w, residual, failed = system.solve_any(rhs)
        if system.is_sparse:
            return w, residual, failed * 2
        free = system.core().condensed.free.any(1)
        return w, residual, free.long().masked_fill(failed, 2)

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
        kind = replace(ctx.kind, transpose=not ctx.kind.transpose)
        g = apply_function(_Solve, P, A, diagonal, grad, kind, *blocks)[0]
        if not any(ctx.needs_input_grad[:3]) and not any(ctx.needs_input_grad[5:]):
            return None, None, None, g, None, *(None for _ in blocks)
        left, right = (w, g) if ctx.kind.transpose else (g, w)
        dP, dA, dd, dblocks = _bilinear(kind.system(P, A, diagonal, blocks), left, right)
        return dP, dA, dd, g, None, *dblocks[: len(blocks)]

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
        if kind.constant is not None:
            blocks = [block for _, block in kind.constant.blocks]
            kind, in_dims = replace(kind, constant=None), (*in_dims, *(None for _ in blocks))
        size = info.batch_size
        batch = diagonal.shape[1 if in_dims[2] == 0 else 0]
        tensors, dims = (P, A, diagonal, rhs, *blocks), (*in_dims[:4], *in_dims[5:])
        values = [fold(v, dim, size, batch) for v, dim in zip(tensors, dims, strict=True)]
        outputs = apply_function(_Solve, *values[:4], kind, *values[4:])
        return tuple(v.unflatten(0, (size, batch)) for v in outputs), (0, 0, 0)


def _bilinear(
    system: System, left: Tensor, right: Tensor
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
        -(image[:, index] @ right_z[:, index].mT) for index, _ in system.projection.parts
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
    change = kind.change(P, A, diagonal, blocks)
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
