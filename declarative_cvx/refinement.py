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
from declarative_cvx.least_squares import RANK_TOLERANCE
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
    best = _Best(torch.cat([here.point, here.slack], 1), here.merit)
    _full_steps(program, here, best, scale)
    _shortened_steps(program, best, scale)
    x, z, slack = best.point.split([x.shape[1], s.shape[1], s.shape[1]], 1)
    return x, slack - z, slack


@dataclass(frozen=True)
class _Place:
    """Points (x, z) of a batch and what the optimality conditions are there.

    Attributes
    ----------
    point, residual : Tensor, shape (batch, n + m)
    slack : Tensor, shape (batch, m)
        The projection of z.
    projection : ConeDerivative or None
        If it was asked for.
    merit : Tensor, shape (batch,)
        Largest relative residual.
    """

    point: Tensor
    slack: Tensor
    projection: ConeDerivative | None
    residual: Tensor
    merit: Tensor

    @classmethod
    def of(
        cls, program: ConeProgram, point: Tensor, scale: Tensor, differentiate: bool = True
    ) -> _Place:
        n, cone = program.structure.variables, program.structure.cone
        x, z = point[:, :n], point[:, n:]
        slack, projection = cone.decompose(z) if differentiate else (cone.project(z), None)
        residual = torch.cat(conditions(program, x, slack - z, slack), 1)
        return cls(point, slack, projection, residual, (residual / scale).abs().amax(1))

    def select(self, index: Tensor) -> _Place:
        """Those of the elements named by an increasing index tensor."""
        if len(index) == len(self.merit):
            return self
        point, slack, residual = (v[index] for v in (self.point, self.slack, self.residual))
        projection = None if self.projection is None else self.projection.select(index)
        return _Place(point, slack, projection, residual, self.merit[index])

    def system(self, program: ConeProgram) -> System:
        """The linear system of a Newton step from here."""
        if self.projection is not None:
            return System(program, self.projection)
        z = self.point[:, program.structure.variables :]
        return System(program, program.structure.cone.derivative(z))


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


def _full_steps(program: ConeProgram, here: _Place, best: _Best, scale: Tensor) -> None:
    """Newton's method without a line search.

    Where pieces of the cones change (active sets), the residual may rise before it falls to zero,
    so an element is given up only after several steps without a gain.
    """
    at = torch.where(best.merit > ROUNDING)[0]
    here, idle = here.select(at), torch.zeros_like(at)
    search = _Search(program.select(at), here, scale[at], at, idle, here.merit)
    for _ in range(MAX_STEPS):
        if not len(search.at):
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
    system: System | None = None  # to be used once more

    def step(self, best: _Best) -> Tensor:
        """A step of all elements; which of them are worth another."""
        before, expected, again = self.here, self.expected, self.system is not None
        direction, failed = self._direction()
        moved = _is_moderate(direction)
        direction = torch.where(moved[:, None], direction, 0.0)
        point, last = before.point - direction, again or bool((expected <= ROUNDING).all())
        self.here = _Place.of(self.program, point, self.scale, differentiate=not last)
        gained, merit = best.offer(self.at, self.here), best.merit[self.at]
        nearly = merit < NEARLY
        wasted = ~gained & nearly if again else torch.where(gained, 0, 1 + failed.long())
        self.idle = torch.where(gained, 0, self.idle + wasted)
        patience = torch.where(nearly, 1, PATIENCE)
        go_on = (merit > torch.where(nearly & (expected <= ROUNDING), torch.inf, ROUNDING)) & (
            self.idle < patience
        )
        if again:
            self._return(before, go_on & ~(self.here.merit < before.merit))
        self._look_ahead(before, failed, go_on)
        return go_on & moved

    def _look_ahead(self, before: _Place, failed: Tensor, go_on: Tensor) -> None:
        """Keep the matrix if it is good for another step; what to expect of that step."""
        merit, gain = self.here.merit, self.here.merit / before.merit
        enough = (merit * gain <= ROUNDING) | (merit < NEARLY)
        if bool(((enough & ~failed) | ~go_on).all()):
            self.expected = merit * gain
        else:
            self.system, self.expected = None, merit * gain**2

    def narrow(self, go_on: Tensor) -> None:
        """Leave the elements that are done, unless that would cost more than taking them along."""
        count = int(go_on.sum())
        if count == len(go_on) or (count and self.system is not None):
            return
        keep = torch.where(go_on)[0]
        self.here, self.expected = self.here.select(keep), self.expected[keep]
        self.at, self.idle, self.scale = self.at[keep], self.idle[keep], self.scale[keep]
        self.program, self.system = self.program.select(keep), None

    def _direction(self) -> tuple[Tensor, Tensor]:
        """Newton direction, with the last matrix if there is one, and where it is least squares."""
        residual = self.here.residual[:, :, None]
        if self.system is not None:
            direction = self.system.core().solve(residual)
            failed = torch.zeros_like(self.at, dtype=torch.bool)
        else:
            system = self.here.system(self.program)
            direction, _, failed = system.solve_any(residual, exactly=False)
            self.system = None if system.is_sparse else system
        return direction[:, :, 0], failed

    def _return(self, before: _Place, worse: Tensor) -> None:
        """Go back where a step with an old matrix led away."""
        if bool(worse.any()):
            point = torch.where(worse[:, None], before.point, self.here.point)
            self.here = _Place.of(self.program, point, self.scale)


def _shortened_steps(program: ConeProgram, best: _Best, scale: Tensor) -> None:
    """Newton's method from the best point, each step halved until the residual falls."""
    at, size = torch.where(best.merit > NEARLY)[0], scale.shape[1]
    for _ in range(MAX_STEPS):
        if not len(at):
            return
        part, sizes = program.select(at), scale[at]
        here = _Place.of(part, best.point[at, :size], sizes)
        residual = here.residual[:, :, None]
        direction = here.system(part).solve_any(residual, exactly=False)[0][:, :, 0]
        direction = torch.where(_is_moderate(direction)[:, None], direction, 0.0)
        for halving in range(MAX_HALVINGS):
            trial = here.point - direction / 2**halving
            best.offer(at, _Place.of(part, trial, sizes, differentiate=False))
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
