"""Polishing a solution to rounding level by Newton steps on the optimality conditions.

Busseti, Moursi and Boyd, "Solution refinement at regular points of conic problems", 2019. The
matrix of a step is the one that the derivative needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from declarative_cvx.cones import ConeDerivative
from declarative_cvx.kkt import System, solve_regular_kkt
from declarative_cvx.least_squares import INFLATED, RANK_TOLERANCE
from declarative_cvx.program import ConeProgram, Point
from declarative_cvx.residuals import conditions

MAX_STEPS = 12
MAX_HALVINGS = 8
# A step is a gain if it reduces the residual by this factor; so many without one end the search,
# where a step by least squares counts twice.
GAIN = 0.5
PATIENCE = 4
# Relative residual at rounding level, and one below which only a clear gain is more than rounding.
ROUNDING = 1e-14
NEARLY = 1e-11
CLEAR_GAIN = 0.1
# By which factor residuals at rounding level differ from step to step.
FLUCTUATION = 4.0
# Longer steps, in units of size one, come from singular matrices.
LARGEST_STEP = 1e30
# Programs with more variables and rows than this are left as they come.
LARGE = 2000


def refine(
    program: ConeProgram, x: Tensor, y: Tensor, s: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Semismooth Newton steps, element by element.

    Each element stops when its residual map is at rounding level or no longer falls.

    Parameters
    ----------
    program : ConeProgram
        In units of size one (`declarative_cvx.scaling`).
    x : Tensor, shape (batch, n)
    y, s : Tensor, shape (batch, m)
        Finite.
    scale : Tensor, shape (batch, n + m)
        Sizes of the terms of the optimality conditions (`declarative_cvx.residuals.scales`).

    Returns
    -------
    x, y, s : Tensor
        Points with s in K, y in K* and s'y = 0 to rounding. The caller compares their residuals
        with those of the points that came.
    """
    here = _Place.of(program, torch.cat([x, s - y], 1), scale)
    here, settled = _steps_together(program, here, scale)
    if bool(settled.all()):
        return _parts(here.point, here.slack)
    best = _Best(torch.cat([here.point, here.slack], 1), here.merit)
    _full_steps(program, here, best, scale, torch.where(~settled)[0])
    _shortened_steps(program, best, scale)
    size = here.point.shape[1]
    return _parts(best.point[:, :size], best.point[:, size:])


def _parts(point: Tensor, slack: Tensor) -> Point:
    """(x, y, s) of points (x, z) and the projections of z."""
    n = point.shape[1] - slack.shape[1]
    return point[:, :n], slack - point[:, n:], slack


@dataclass(frozen=True)
class _Place:
    """Points (x, z) of a batch and what the optimality conditions are there.

    Attributes
    ----------
    point, residual : Tensor, shape (batch, n + m)
    slack : Tensor, shape (batch, m)
        The projection of z.
    projection : ConeDerivative
        Its derivative.
    merit : Tensor, shape (batch,)
        Largest relative residual.
    """

    point: Tensor
    slack: Tensor
    projection: ConeDerivative
    residual: Tensor
    merit: Tensor

    @classmethod
    def of(cls, program: ConeProgram, point: Tensor, scale: Tensor) -> _Place:
        n, cone = program.structure.variables, program.structure.cone
        x, z = point[:, :n], point[:, n:]
        slack, projection = cone.decompose(z)
        residual = torch.cat(conditions(program, x, slack - z, slack), 1)
        return cls(point, slack, projection, residual, (residual / scale).abs().amax(1))

    def select(self, index: Tensor) -> _Place:
        """Those of the elements named by an increasing index tensor."""
        if index.shape[0] == self.merit.shape[0]:
            return self
        point, slack, residual = (v[index] for v in (self.point, self.slack, self.residual))
        return _Place(point, slack, self.projection.select(index), residual, self.merit[index])


def newton_step(program: ConeProgram, point: Point, violations: tuple[Tensor, Tensor]) -> Point:
    """One Newton step for all elements, with factors that the derivative will take over.

    Parameters
    ----------
    program : ConeProgram
        All cones polyhedral.
    point : (x, y, s)
    violations : (Tensor, Tensor)
        Its `declarative_cvx.residuals.conditions`.

    Returns
    -------
    (x, y, s)
        As of `refine`; anything where the Jacobian is singular.
    """
    x, y, s = point
    cone, z = program.structure.cone, s - y
    rhs = torch.cat(violations, 1)[:, :, None]
    step = solve_regular_kkt(program, cone.derivative(z), rhs)[:, :, 0]
    x, z = x - step[:, : x.shape[1]], z - step[:, x.shape[1] :]
    s = cone.project(z)
    return x, s - z, s


@dataclass
class _Best:
    """The best points (x, z, s) so far, shape (batch, n + 2 m), and their merits, (batch,)."""

    point: Tensor
    merit: Tensor

    def offer(self, at: Tensor, place: _Place) -> Tensor:
        """Take what is better; which of the elements `at` gained much from it."""
        known = self.merit[at]
        better = place.merit < known
        point = torch.cat([place.point, place.slack], 1)
        point = torch.where(better[:, None], point, self.point[at])
        self.point = self.point.index_copy(0, at, point)
        self.merit = self.merit.index_copy(0, at, torch.where(better, place.merit, known))
        return place.merit < torch.where(known < NEARLY, CLEAR_GAIN, GAIN) * known


def _steps_together(program: ConeProgram, here: _Place, scale: Tensor) -> tuple[_Place, Tensor]:
    """Newton steps of all elements at once, as long as each of them gains much by every one.

    A matrix serves twice if that is expected to lead to rounding level. Returned are the last
    place, and which elements are at their end there: at rounding level, or as near as a step that
    was to lead there has brought them.
    """
    settled, system = here.merit <= ROUNDING, None
    end: Tensor | float = ROUNDING
    for _ in range(MAX_STEPS):
        system = System(program, here.projection) if system is None else system
        found, singular = system.factored(here.residual[:, :, None])
        direction, longest = found[:, :, 0], INFLATED * here.residual.abs().amax(1)
        if not bool(((direction.abs().amax(1) <= longest) > singular).all()):
            break
        there = _Place.of(program, here.point - direction, scale)
        at_end, gain = there.merit <= end, there.merit / here.merit
        if not bool((at_end | (gain <= CLEAR_GAIN)).all()):
            break
        here, settled, expected = there, at_end, there.merit * gain
        if bool(settled.all()):
            break
        if not bool((settled | (expected <= ROUNDING) | (here.merit < NEARLY)).all()):
            system, expected = None, expected * gain
        end = (FLUCTUATION * here.merit).clamp(ROUNDING, NEARLY)
        end = torch.where(expected <= ROUNDING, end, ROUNDING)
    return here, settled


def _full_steps(program: ConeProgram, here: _Place, best: _Best, scale: Tensor, at: Tensor) -> None:
    """Newton's method without a line search, of the elements named.

    Where pieces of the cones change (active sets), the residual may rise before it falls to zero,
    so an element is given up only after several steps without a gain.
    """
    here, idle = here.select(at), torch.zeros_like(at)
    search = _Search(program.select(at), here, scale[at], at, idle, here.merit)
    for _ in range(MAX_STEPS):
        if not search.at.shape[0]:
            return
        search.narrow(search.step(best))


@dataclass
class _Search:
    """Elements on their way: their places, and their numbers of steps without a gain."""

    program: ConeProgram
    here: _Place
    scale: Tensor
    at: Tensor
    idle: Tensor
    expected: Tensor  # merits after the next step

    def step(self, best: _Best) -> Tensor:
        """A step of all elements; which of them are worth another."""
        before = self.here
        direction, failed = _direction(self.program, before)
        moved = _is_moderate(direction)
        point = before.point - direction.masked_fill(~moved[:, None], 0.0)
        self.here = _Place.of(self.program, point, self.scale)
        gained, merit = best.offer(self.at, self.here), best.merit[self.at]
        self.idle = torch.where(gained, 0, self.idle + 1 + failed.long())
        nearly = merit < NEARLY
        at_end = (merit <= ROUNDING) | (nearly & (self.expected <= ROUNDING))
        self.expected = self.here.merit * (self.here.merit / before.merit) ** 2
        return ~at_end & (self.idle < torch.where(nearly, 1, PATIENCE)) & moved

    def narrow(self, go_on: Tensor) -> None:
        """Leave the elements that are done."""
        keep = torch.where(go_on)[0]
        if keep.shape[0] == self.at.shape[0]:
            return
        self.here, self.program = self.here.select(keep), self.program.select(keep)
        self.at, self.idle, self.scale = self.at[keep], self.idle[keep], self.scale[keep]
        self.expected = self.expected[keep]


def _direction(program: ConeProgram, place: _Place) -> tuple[Tensor, Tensor]:
    """Newton direction, and where it is that of least squares."""
    system = System(program, place.projection)
    found, _, failed = system.solve_any(place.residual[:, :, None], exactly=False)
    return found[:, :, 0], failed


def _shortened_steps(program: ConeProgram, best: _Best, scale: Tensor) -> None:
    """Newton's method from the best point, each step halved until the residual falls."""
    at, size = torch.where(best.merit > NEARLY)[0], scale.shape[1]
    for _ in range(MAX_STEPS):
        if not len(at):
            return
        part, sizes = program.select(at), scale[at]
        here = _Place.of(part, best.point[at, :size], sizes)
        direction = _direction(part, here)[0]
        direction = direction.masked_fill(~_is_moderate(direction)[:, None], 0.0)
        for halving in range(MAX_HALVINGS):
            trial = here.point - direction / 2**halving
            best.offer(at, _Place.of(part, trial, sizes))
            if bool((best.merit[at] < here.merit).all()):
                break
        gained = best.merit[at] < GAIN * here.merit
        at = at[gained & (best.merit[at] > NEARLY)]


def _is_moderate(direction: Tensor) -> Tensor:
    """Which steps are finite and lead somewhere, bool, shape (batch,).

    Beyond, LAPACK's eigenvalues of semidefinite cones fail, some with a message on the terminal.
    """
    return direction.abs().amax(1) <= LARGEST_STEP


def refine_ray(program: ConeProgram, x: Tensor) -> Tensor:
    """The nearest directions in which the objective has no curvature: P x = 0.

    Rays of programs whose quadratic objective was rewritten with a cone come back with the
    square root of the solver's accuracy.

    Parameters
    ----------
    program : ConeProgram
    x : Tensor, shape (batch, n)
        Claimed directions of unboundedness.
    """
    if not program.structure.P.nnz or program.structure.variables > LARGE:
        return x
    values, vectors = torch.linalg.eigh(program.dense_P)
    curved = values > RANK_TOLERANCE * values[:, -1:]
    parts = (vectors.mT @ x[:, :, None]) * curved[:, :, None]
    return x - (vectors @ parts)[:, :, 0]
