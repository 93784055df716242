"""Which solvers are tried on a program, in which order, and what counts as solved."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declarative_cvx.backends.base import Answer, Backend
from declarative_cvx.backends.base import Point as HostPoint
from declarative_cvx.backends.bounds import find_infinite, inserted, without
from declarative_cvx.backends.certificates import sharpen_infeasibility, sharpen_unboundedness
from declarative_cvx.backends.dual_active_set import ROWS, VARIABLES
from declarative_cvx.backends.table import BACKENDS, installed
from declarative_cvx.backends.turns import PRECISE, Turn, is_final, turns
from declarative_cvx.backends.verification import verify
from declarative_cvx.cone_solution import Attempt, ConeSolution
from declarative_cvx.cones import POLYHEDRAL
from declarative_cvx.elimination import extend, reduce, restrict
from declarative_cvx.errors import BackendError, MissingBackendError, nearest
from declarative_cvx.host import HostProgram
from declarative_cvx.interior_steps import NEAR, interior_steps, takes_interior_steps
from declarative_cvx.kkt import has_sparse_systems, project_at
from declarative_cvx.program import ConeProgram, Point, Structure
from declarative_cvx.refinement import LARGE, NEARLY, newton_step, refine, refine_ray
from declarative_cvx.residuals import (
    Residuals,
    conditions,
    residuals,
    scales,
)
from declarative_cvx.scaling import Scaling
from declarative_cvx.status import Status

# Answers with smaller residuals than this are taken as they are.
REFINED = 1e-13
# Residual from which on a point is far from all solutions: Newton's method seldom leads there, and
# another solver's turn costs less.
HOPELESS = 0.5
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
    names = ["Moreau", "Clarabel", "SCS"] if small else ["Clarabel", "Moreau", "SCS"]
    if structure.variables <= VARIABLES and structure.rows <= ROWS:
        names.insert(0, "DualActiveSet")
    common = {field.name for field in dataclasses.fields(Backend)} - {"settings"}
    for option in options or {}:
        if option not in common:
            raise BackendError(
                f'solver="auto" has no option {option!r}. {nearest(option, common)} Name a solver '
                "to use its own options."
            )
    candidates: list[Backend] = []
    for name in names:
        with suppress(MissingBackendError):
            candidates.append(BACKENDS[name](**options or {}))
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
    scaling, whole = Scaling.scaled(program.detach())
    program = reduce(whole)
    if start is not None and (start.x.shape, start.x.device) != (whole.q.shape, whole.q.device):
        start = None
    if start is not None:
        x, y, s = restrict(whole, scaling.point(start.x, start.y, start.s))
        start = replace(start, x=x, y=y, s=s)
    solution, batch = None, torch.arange(program.batch, device=program.q.device)
    for turn in turns(backends, program.structure.cone):
        pending = turn.elements(solution, batch)
        if solution is not None and not len(pending):
            break
        attempt = _attempt(program.select(pending), turn, start, pending)
        if solution is None:
            solution = attempt
        else:
            better = _better(solution, attempt, pending)
            solution = solution.merge(attempt, pending, torch.where(better)[0])
    assert solution is not None
    found = extend(whole, (solution.x, solution.y, solution.s), solution.rays)
    return solution.placed(*scaling.restore(*found))


def _better(known: ConeSolution, attempt: ConeSolution, at: Tensor) -> Tensor:
    """Which answers of an attempt on some elements replace what is known, bool."""
    before, after = known.residuals.worst[at], attempt.residuals.worst
    closer = ~(after >= before) | torch.isnan(before)
    return torch.where(known.solved[at], attempt.solved & closer, is_final(attempt) | closer)


def _attempt(
    program: ConeProgram, turn: Turn, start: ConeSolution | None, elements: Tensor
) -> ConeSolution:
    """One solver's verified work on the program, whose places in the whole batch are given."""
    began, backend = time.perf_counter(), turn.backend
    answer, point = _ask(program, turn, None if turn.largest else _point(program, start, elements))
    claimed = torch.from_numpy(answer.codes).to(program.q.device)
    farthest = math.inf if turn.alone else HOPELESS
    (x, y, s), found = _refine(program, claimed, point, backend.refine, farthest)
    status = verify(program, claimed, found, (x, y, s), turn.accepted)
    seconds = time.perf_counter() - began
    done = Attempt(backend.name, elements, status, answer.said, answer.iterations, seconds)
    return ConeSolution(x, y, s, status, torch.zeros_like(status), found, (done,))


def _ask(program: ConeProgram, turn: Turn, start: HostPoint | None) -> tuple[Answer, Point]:
    """A solver's answer to the program, and its point."""
    infinite = find_infinite(program)
    bounded = without(program, infinite)
    units = Scaling.of(bounded, largest=True) if turn.largest else None
    seen = bounded if units is None else units.apply(bounded)
    host = HostProgram.of(seen)
    try:
        answer = turn.backend.solve(host, start)
    except Exception as error:  # whatever a solver raises must not cost the next one its turn
        answer = Answer.failure(host, f"{error!r}")
    device = program.q.device
    x, y, s = (torch.as_tensor(v, device=device) for v in (answer.x, answer.y, answer.s))
    rays = _rays(answer, device)
    if rays is not None:
        x, y = _sharpen(seen, x, y, rays)
    point = (x, y, s) if units is None else units.restore(x, y, s)
    return answer, inserted(program, infinite, point)


def _rays(answer: Answer, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Elements whose x, and whose y, is a certificate and no solution; None if there are none."""
    if not {Status.UNBOUNDED, Status.INFEASIBLE} & set(answer.status):
        return None
    codes = torch.from_numpy(answer.codes).to(device)
    return codes == int(Status.UNBOUNDED), codes == int(Status.INFEASIBLE)


def _sharpen(
    program: ConeProgram, x: Tensor, y: Tensor, rays: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The points with their certificates as sharp as they get."""
    unbounded, infeasible = (torch.where(claimed)[0] for claimed in rays)
    if len(unbounded):
        part = program.select(unbounded)
        ray = sharpen_unboundedness(part, refine_ray(part, x[unbounded]))
        x = x.index_copy(0, unbounded, ray)
    if len(infeasible):
        ray = sharpen_infeasibility(program.select(infeasible), y[infeasible])
        y = y.index_copy(0, infeasible, ray)
    return x, y


def _refine(
    program: ConeProgram, claimed: Tensor, came: Point, wanted: bool, farthest: float
) -> tuple[Point, Residuals]:
    """Polish what may be solutions, if wanted; certificates stay.

    With polyhedral cones, points that are farther away than `farthest` stay, too.
    """
    if not wanted:
        return came, residuals(program, *came)
    candidates = (claimed != int(Status.UNBOUNDED)) & (claimed != int(Status.INFEASIBLE))
    if not program.structure.cone.kinds <= POLYHEDRAL:
        worth = candidates & torch.isfinite(torch.cat(came, 1)).all(1)
        point = _refined(program, worth, came)
        # The backward pass will need the derivative there.
        nearest = project_at(program, point[2] - point[1]) if bool(worth.all()) else None
        found = residuals(program, *point, nearest=nearest)
        return _closer(program, (point, found), came)
    refined = _refine_polyhedral(program, candidates, came, farthest)
    return _closer(program, refined, came)


def _refined(program: ConeProgram, worth: Tensor, came: Point) -> Point:
    """The points that refinement makes of those that are worth it, whatever they were.

    (How far off points near a curved boundary are takes projections to tell, and no solver of
    such programs comes so near that nothing is left to do.)
    """
    at = torch.where(worth)[0]
    if not len(at):
        return came
    part, point = program.select(at), came
    if len(at) < program.batch:
        point = tuple(v[at] for v in came)  # type: ignore[assignment]
    sizes = torch.cat(scales(part, *point), 1)
    part.forget("absolute")  # as large as the data, and matrices are to be factorised
    refined = refine(part, *point, sizes)
    if len(at) == program.batch:
        return refined
    x, y, s = (old.index_copy(0, at, new) for old, new in zip(came, refined, strict=True))
    return x, y, s


def _refine_polyhedral(
    program: ConeProgram, candidates: Tensor, came: Point, farthest: float
) -> tuple[Point, Residuals]:
    """The same for polyhedral cones, whose answers may be right to rounding as they come."""
    together, raw = not has_sparse_systems(program.structure), came
    if together:  # so that factors serve several times
        came = _into_cones(program, candidates, came)
    sizes, violations = scales(program, *came), conditions(program, *came)
    program.forget("absolute")
    found = residuals(program, *came, sizes, violations)
    if not bool((found.worst > REFINED).any()):
        return came, found
    near = candidates & (found.worst < farthest)
    scale = torch.cat(sizes, 1)
    if together:
        came, found = _refine_together(program, candidates, came, sizes, violations, found)
    else:
        came, found = _refine_apart(program, near, (came, found), scale, REFINED)
    if takes_interior_steps(program.structure) and bool((found.worst > PRECISE).any()):
        known = _step_inside(program, candidates, raw, (came, found))
        return _refine_apart(program, near, known, scale, REFINED)
    if together:
        return _refine_apart(program, near, (came, found), scale, NEARLY)
    return came, found


def _refine_apart(
    program: ConeProgram,
    candidates: Tensor,
    known: tuple[Point, Residuals],
    scale: Tensor,
    enough: float,
) -> tuple[Point, Residuals]:
    """Newton steps of those elements whose residuals are not small enough."""
    at = torch.where(candidates & (known[1].worst > enough))[0]
    if not len(at):
        return known
    part = program.select(at)
    x, y, s = (v[at] for v in known[0])
    refined = refine(part, x, y, s, scale=scale[at])
    return _with_better(known, at, refined, residuals(part, *refined))


def _with_better(
    known: tuple[Point, Residuals], at: Tensor, moved: Point, after: Residuals
) -> tuple[Point, Residuals]:
    """What is known, with what came of the elements `at` where it is better."""
    (x, y, s), found = known
    better = (after.worst < found.worst[at]) | torch.isnan(found.worst[at])
    at = at[better]
    x, y, s = (old.index_copy(0, at, v[better]) for old, v in zip((x, y, s), moved, strict=True))
    return (x, y, s), found.merge(after.select(better), at)


def _where(
    chosen: Tensor, new: tuple[Point, Residuals], old: tuple[Point, Residuals]
) -> tuple[Point, Residuals]:
    """New points and their residuals where `chosen` (bool) says so, else the old ones."""
    x, y, s = (
        torch.where(chosen[:, None], v, known) for v, known in zip(new[0], old[0], strict=True)
    )
    return (x, y, s), new[1].where(chosen, old[1])


def _closer(
    program: ConeProgram, refined: tuple[Point, Residuals], came: Point
) -> tuple[Point, Residuals]:
    """The points that came instead where refinement, or a way into the cones, led away."""
    point, found = refined
    poor = torch.where(~(found.worst <= PRECISE))[0]
    if not len(poor) or point is came:
        return refined
    x, y, s = (v[poor] for v in came)
    return _with_better(refined, poor, (x, y, s), residuals(program.select(poor), x, y, s))


def _step_inside(
    program: ConeProgram, candidates: Tensor, raw: Point, known: tuple[Point, Residuals]
) -> tuple[Point, Residuals]:
    """Interior-point steps from the solver's own points, where Newton steps do not settle."""
    at = torch.where(candidates & (known[1].worst > PRECISE))[0]
    if not len(at):
        return known
    x, y, s = (v[at] for v in raw)
    near = torch.where(residuals(program.select(at), x, y, s).worst <= NEAR)[0]
    if not len(near):
        return known
    at, point = at[near], (x[near], y[near], s[near])
    return _with_better(known, at, *interior_steps(program.select(at), point))


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
        point, found = _where(better, (moved, after), (point, found))
        if not bool((worth & (after.worst < worst / 2)).any()):
            break
    return point, found


def _point(program: ConeProgram, start: ConeSolution | None, elements: Tensor) -> HostPoint | None:
    if start is None:
        return None
    solved = start.solved[elements][:, None]
    point = restrict(program, (start.x[elements], start.y[elements], start.s[elements]))
    x, y, s = (torch.where(solved, v, torch.nan).cpu().numpy() for v in point)
    return HostPoint(x, y, s) if np.isfinite(x).any() else None
