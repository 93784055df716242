"""Which solvers are tried on a program, in which order, and what counts as solved."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.backends.base import Answer, Backend
from declarative_cvx.backends.base import Point as HostPoint
from declarative_cvx.backends.table import installed
from declarative_cvx.cone_solution import Attempt, ConeSolution
from declarative_cvx.elimination import extend, reduce, restrict
from declarative_cvx.errors import BackendError, nearest
from declarative_cvx.host import HostProgram
from declarative_cvx.kkt import has_sparse_systems
from declarative_cvx.program import ConeProgram, Point, Structure
from declarative_cvx.refinement import LARGE, NEARLY, newton_step, refine, refine_ray
from declarative_cvx.residuals import (
    Residuals,
    conditions,
    infeasibility,
    residuals,
    scales,
    unboundedness,
)
from declarative_cvx.scaling import Scaling
from declarative_cvx.status import Status

# Largest relative residual of a solution that counts as one, and largest relative violation of a
# certificate, unless the solver was asked for less.
ACCEPTED = 1e-7
CERTIFIED = 1e-6
# Largest residual of a solution that no other solver is asked to improve upon.
PRECISE = 1e-9
# Answers with smaller residuals than this are taken as they are.
REFINED = 1e-13
# Where all cones are polyhedral, elements with smaller residuals than this are refined together,
# in so many Newton steps at most.
NEARLY_SOLVED = 1e-6
TOGETHER = 3


def automatic(
    structure: Structure, options: Mapping[str, Any] | None = None
) -> tuple[Backend, ...]:
    """Solvers for ``solver="auto"``, best first: by capabilities and size.

    `options` are those that every solver has (the fields of `Backend`).

    Small programs go to the batched solver, large ones to the sparse interior-point method; the
    first-order method is the last resort because it returns something for every problem.
    """
    small = structure.variables + structure.rows <= LARGE
    names = ("Moreau", "Clarabel", "SCS") if small else ("Clarabel", "Moreau", "SCS")
    common = {field.name for field in dataclasses.fields(Backend)} - {"settings"}
    for option in options or {}:
        if option not in common:
            raise BackendError(
                f'solver="auto" has no option {option!r}. {nearest(option, common)} Name a solver '
                "to use its own options."
            )
    available = installed()
    candidates = [available[name](**options or {}) for name in names if name in available]
    able = [backend for backend in candidates if backend.obstacle(structure) is None]
    return tuple(stage for backend in able for stage in backend.stages(structure))


def require_capable(backend: Backend, structure: Structure) -> None:
    """Refuse a solver that cannot take programs of this structure, naming those that can."""
    obstacle = backend.obstacle(structure)
    if obstacle is None:
        return
    able = [name for name, cls in installed().items() if cls().obstacle(structure) is None]
    raise BackendError(f"{obstacle}. Solvers that do: {', '.join(able)}.")


def solve(
    program: ConeProgram, backends: Sequence[Backend], start: ConeSolution | None = None
) -> ConeSolution:
    """Solve a batch with the first solver; send what it does not settle to the next.

    Parameters
    ----------
    program : ConeProgram
    backends : sequence of Backend
        Each able to take the program.
    start : ConeSolution, optional
        Where to start, element by element; elements it did not solve start cold. One of another
        batch size or on another device is ignored.

    Returns
    -------
    ConeSolution
        On the program's device, verified. Residuals are those of the scaled program.
    """
    scaling, program = Scaling.scaled(program.detach())
    if start is not None and (start.x.shape, start.x.device) != (program.q.shape, program.q.device):
        start = None
    if start is not None:
        x, y, s = scaling.point(start.x, start.y, start.s)
        start = replace(start, x=x, y=y, s=s)
    solution, pending = None, torch.arange(program.batch, device=program.q.device)
    for backend, largest in _turns(backends):
        attempt = _attempt(program.select(pending), backend, start, pending, largest)
        settled = _settled(attempt)
        if solution is None:
            solution = attempt
        else:
            better = _better(solution, attempt, pending)
            solution = solution.merge(attempt, pending, torch.where(better)[0])
        if bool(settled.all()):
            break
        pending = pending[~settled]
    assert solution is not None
    if scaling.trivial:
        return solution
    x, y, s = scaling.restore(solution.x, solution.y, solution.s)
    return replace(solution, x=x, y=y, s=s)


def _better(known: ConeSolution, attempt: ConeSolution, at: Tensor) -> Tensor:
    """Which answers of an attempt on some elements replace what is known, bool."""
    before, after = known.residuals.worst[at], attempt.residuals.worst
    closer = ~(after >= before) | torch.isnan(before)
    return torch.where(known.solved[at], attempt.solved & closer, _is_final(attempt) | closer)


def _settled(attempt: ConeSolution) -> Tensor:
    """Which elements need no other solver, bool."""
    precise = attempt.solved & (attempt.residuals.worst <= PRECISE)
    return precise if bool(precise.all()) else precise | (_is_final(attempt) & ~attempt.solved)


def _is_final(attempt: ConeSolution) -> Tensor:
    codes = [status.value for status in Status if status.final]
    return torch.isin(attempt.status, torch.tensor(codes, device=attempt.status.device))


def _turns(backends: Sequence[Backend]) -> list[tuple[Backend, bool]]:
    """Solvers in the order in which they are tried, and whether in units of the largest entries.

    Several solvers get a second turn in those units: data of widely mixed sizes may suit the one
    or the other.
    """
    turns = [(backend, False) for backend in backends]
    return turns + [(backend, True) for backend in backends] if len(backends) > 1 else turns


def _attempt(
    program: ConeProgram,
    backend: Backend,
    start: ConeSolution | None,
    elements: Tensor,
    largest: bool,
) -> ConeSolution:
    """One solver's verified work on the program.

    `elements` are its places in the whole batch; `largest` has the solver see the program in units
    of its largest entries.
    """
    began = time.perf_counter()
    if largest:
        units = Scaling.of(program, largest=True)
        answer, point = _ask(units.apply(program), backend, None)
        point = units.restore(*point)
    else:
        answer, point = _ask(program, backend, _point(program, start, elements))
    claimed = torch.from_numpy(answer.codes).to(program.q.device)
    refined, found = _refine(program, claimed, point, backend.refine)
    (x, y, s), found = _closer(program, (refined, found), point)
    status = _verify(program, claimed, found, x, y, max(ACCEPTED, 10 * backend.tol))
    seconds = time.perf_counter() - began
    done = Attempt(backend.name, elements, status, answer.said, answer.iterations, seconds)
    return ConeSolution(x, y, s, status, torch.zeros_like(status), found, (done,))


def _ask(program: ConeProgram, backend: Backend, start: HostPoint | None) -> tuple[Answer, Point]:
    """A solver's answer to the reduced program, and its point as one of the program itself."""
    reduced = reduce(program)
    host = HostProgram.of(reduced)
    try:
        answer = backend.solve(host, start)
    except Exception as error:  # whatever a solver raises must not cost the next one its turn
        answer = Answer.failure(host, f"{error!r}")
    return answer, _extend(program, reduced, answer)


def _extend(program: ConeProgram, reduced: ConeProgram, answer: Answer) -> Point:
    """A solver's answer to the reduced program as one to the program itself."""
    device = program.q.device
    x, y, s = (torch.as_tensor(v, device=device) for v in (answer.x, answer.y, answer.s))
    if not {Status.UNBOUNDED, Status.INFEASIBLE} & set(answer.status):
        return extend(program, (x, y, s))
    codes = torch.from_numpy(answer.codes).to(device)
    rays = (codes == int(Status.UNBOUNDED), codes == int(Status.INFEASIBLE))
    at = torch.where(rays[0])[0]
    if len(at):
        x = x.index_copy(0, at, refine_ray(reduced.select(at), x[at]))
    return extend(program, (x, y, s), rays)


def _refine(
    program: ConeProgram, claimed: Tensor, came: Point, wanted: bool
) -> tuple[Point, Residuals]:
    """Polish what may be solutions, if wanted; certificates stay."""
    candidates = (claimed != int(Status.UNBOUNDED)) & (claimed != int(Status.INFEASIBLE))
    together = wanted and _is_refined_together(program)
    if together:
        came = _into_cones(program, candidates, came)
    sizes, violations = scales(program, *came), conditions(program, *came)
    program.forget("absolute")  # as large as the data, and matrices are to be factorised
    found = residuals(program, *came, sizes, violations)
    if not wanted or not bool((found.worst > REFINED).any()):
        return came, found
    if together:
        came, found = _refine_together(program, candidates, came, sizes, violations, found)
    worth = candidates & (found.worst > (NEARLY if together else REFINED))
    if not bool(worth.any()):
        return came, found
    at = torch.where(worth)[0]
    part = program.select(at)
    x, y, s = (v[at] for v in came)
    refined = refine(part, x, y, s, scale=torch.cat(sizes, 1)[at])
    after = residuals(part, *refined)
    better = after.worst < found.worst[at]
    x, y, s = (
        old.index_copy(0, at[better], new[better]) for old, new in zip(came, refined, strict=True)
    )
    return (x, y, s), found.merge(after.select(better), at[better])


def _closer(
    program: ConeProgram, refined: tuple[Point, Residuals], came: Point
) -> tuple[Point, Residuals]:
    """The points that came instead where refinement, or a way into the cones, led away."""
    point, found = refined
    poor = torch.where(found.worst > PRECISE)[0]
    if not len(poor) or point is came:
        return refined
    x, y, s = (v[poor] for v in came)
    before = residuals(program.select(poor), x, y, s)
    better = before.worst < found.worst[poor]
    at = poor[better]
    x, y, s = (new.index_copy(0, at, old[at]) for new, old in zip(point, came, strict=True))
    return (x, y, s), found.merge(before.select(better), at)


def _is_refined_together(program: ConeProgram) -> bool:
    """Whether all cones are polyhedral and systems dense, so that factors serve several times."""
    structure = program.structure
    return structure.cone.kinds <= {"zero", "nonneg"} and not has_sparse_systems(structure)


def _into_cones(program: ConeProgram, candidates: Tensor, point: Point) -> Point:
    """Points with s in K, y in K* and s'y = 0 (Moreau's decomposition of s - y)."""
    x, y, s = point
    z = s - y
    slack = program.structure.cone.project(z)
    if bool(candidates.all()):
        return x, slack - z, slack
    mask = candidates[:, None]
    return x, torch.where(mask, slack - z, y), torch.where(mask, slack, s)


def _refine_together(
    program: ConeProgram,
    candidates: Tensor,
    point: Point,
    sizes: tuple[Tensor, Tensor],
    violations: tuple[Tensor, Tensor],
    found: Residuals,
) -> tuple[Point, Residuals]:
    """Newton steps of all elements at once, as long as those that are nearly solved gain by them.

    With the factors that a backward pass needs anyway. Elements keep their points where these
    are better.
    """
    for _ in range(TOGETHER):
        worst = found.worst
        worth = candidates & (worst > REFINED) & (worst < NEARLY_SOLVED)
        if not bool(worth.any()):
            break
        moved = newton_step(program, point, violations)
        violations = conditions(program, *moved)
        after = residuals(program, *moved, sizes, violations)
        better = candidates & (after.worst < worst)
        x, y, s = (
            torch.where(better[:, None], new, old) for new, old in zip(moved, point, strict=True)
        )
        point = (x, y, s)
        found = after.where(better, found)
        if not bool((worth & (after.worst < worst / 2)).any()):
            break
    return point, found


def _verify(
    program: ConeProgram, claimed: Tensor, found: Residuals, x: Tensor, y: Tensor, accepted: float
) -> Tensor:
    """Statuses that the numbers bear out, whatever the solver said. Shape (batch,)."""
    optimal = torch.full_like(claimed, int(Status.OPTIMAL))
    good = found.worst <= accepted
    if bool((good & (claimed == optimal)).all()):
        return optimal
    inaccurate = torch.full_like(claimed, int(Status.INACCURATE))
    infeasible = claimed == int(Status.INFEASIBLE)
    unbounded = claimed == int(Status.UNBOUNDED)
    status = torch.where(claimed == optimal, inaccurate, claimed)
    status = torch.where(good & ~infeasible & ~unbounded, optimal, status)
    if infeasible.any():
        status = torch.where(
            infeasible & ~(infeasibility(program, y) <= max(accepted, CERTIFIED)),
            inaccurate,
            status,
        )
    if unbounded.any():
        status = torch.where(
            unbounded & ~(unboundedness(program, x) <= max(accepted, CERTIFIED)), inaccurate, status
        )
    return status


def _point(program: ConeProgram, start: ConeSolution | None, elements: Tensor) -> HostPoint | None:
    if start is None:
        return None
    solved = start.solved[elements][:, None]
    point = restrict(program, (start.x[elements], start.y[elements], start.s[elements]))
    x, y, s = (torch.where(solved, v, torch.nan).cpu().numpy() for v in point)
    return HostPoint(x, y, s) if np.isfinite(x).any() else None
