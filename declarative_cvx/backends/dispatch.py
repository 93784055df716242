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
from declarative_cvx.program import ConeProgram, Point, Structure
from declarative_cvx.refinement import LARGE, refine, refine_ray
from declarative_cvx.residuals import Residuals, infeasibility, residuals, scales, unboundedness
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
    solution = _nothing(program)
    pending = torch.arange(program.batch, device=program.q.device)
    for backend, largest in _turns(backends):
        if not len(pending):
            break
        everything = len(pending) == program.batch
        part = program if everything else program.select(pending)
        attempt = _attempt(part, backend, start, pending, largest)
        better, settled = _judge(solution, attempt, pending)
        solution = solution.merge(attempt, pending, torch.where(better)[0])
        pending = pending[~settled]
    x, y, s = scaling.restore(solution.x, solution.y, solution.s)
    return replace(solution, x=x, y=y, s=s)


def _judge(known: ConeSolution, attempt: ConeSolution, at: Tensor) -> tuple[Tensor, Tensor]:
    """Which answers of an attempt on some elements are better, and which elements need no other."""
    codes = [status.value for status in Status if status.final]
    final = torch.isin(attempt.status, torch.tensor(codes, device=attempt.status.device))
    before, after = known.residuals.worst[at], attempt.residuals.worst
    closer = ~(after >= before) | torch.isnan(before)
    better = torch.where(known.solved[at], attempt.solved & closer, final | closer)
    loose = attempt.solved & (after > PRECISE)
    return better, final & ~loose


def _turns(backends: Sequence[Backend]) -> list[tuple[Backend, bool]]:
    """Solvers in the order in which they are tried, and whether in units of the largest entries.

    Several solvers get a second turn in those units: data of widely mixed sizes may suit the one
    or the other.
    """
    turns = [(backend, False) for backend in backends]
    return turns + [(backend, True) for backend in backends] if len(backends) > 1 else turns


def _nothing(program: ConeProgram) -> ConeSolution:
    q, b, batch = program.q, program.b, program.batch
    nan = q.new_full((batch,), torch.nan)
    return ConeSolution(
        x=torch.full_like(q, torch.nan),
        y=torch.full_like(b, torch.nan),
        s=torch.full_like(b, torch.nan),
        status=torch.full((batch,), int(Status.NUMERICAL_ERROR), device=q.device),
        source=torch.zeros(batch, dtype=torch.int64, device=q.device),
        residuals=Residuals(nan, nan, nan, nan),
        attempts=(),
    )


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
    x, y, s, found = _refine(program, answer, point, backend.refine)
    status = _verify(program, answer, found, x, y, max(ACCEPTED, 10 * backend.tol))
    attempt = Attempt(
        backend=backend.name,
        elements=tuple(elements.tolist()),
        status=tuple(Status(code) for code in status.tolist()),
        said=tuple(answer.said),
        iterations=tuple(answer.iterations),
        seconds=time.perf_counter() - began,
    )
    return ConeSolution(x, y, s, status, torch.zeros_like(status), found, (attempt,))


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
    rays = tuple(
        torch.tensor([status is ray for status in answer.status], device=device)
        for ray in (Status.UNBOUNDED, Status.INFEASIBLE)
    )
    if bool(rays[0].any()):
        at = torch.where(rays[0])[0]
        x = x.index_copy(0, at, refine_ray(reduced.select(at), x[at]))
    return extend(program, (x, y, s), (rays[0], rays[1]))


def _refine(
    program: ConeProgram, answer: Answer, came: Point, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Residuals]:
    """Polish what may be solutions, if wanted, where that makes them better; certificates stay."""
    sizes = scales(program, *came)
    found = residuals(program, *came, sizes)
    certificates = (Status.INFEASIBLE, Status.UNBOUNDED)
    claims = [status not in certificates for status in answer.status]
    finite = torch.isfinite(torch.cat(came, 1)).all(1)
    worth = finite & (found.worst > REFINED)
    at = torch.where(torch.tensor(claims, device=finite.device) & worth)[0]
    if not wanted or not len(at):
        return *came, found
    part = program.select(at)
    x, y, s = (v[at] for v in came)
    refined = refine(part, x, y, s, scale=torch.cat(sizes, 1)[at])
    after = residuals(part, *refined)
    better = after.worst < found.worst[at]
    x, y, s = (
        old.index_copy(0, at[better], new[better]) for old, new in zip(came, refined, strict=True)
    )
    return x, y, s, found.merge(after.select(better), at[better])


def _verify(
    program: ConeProgram, answer: Answer, found: Residuals, x: Tensor, y: Tensor, accepted: float
) -> Tensor:
    """Statuses that the numbers bear out, whatever the solver said. Shape (batch,)."""
    claimed = torch.tensor([int(status) for status in answer.status], device=x.device)
    inaccurate = torch.full_like(claimed, int(Status.INACCURATE))
    infeasible = claimed == int(Status.INFEASIBLE)
    unbounded = claimed == int(Status.UNBOUNDED)
    optimal = (found.worst <= accepted) & ~infeasible & ~unbounded
    status = torch.where(claimed == int(Status.OPTIMAL), inaccurate, claimed)
    status = torch.where(optimal, torch.full_like(claimed, int(Status.OPTIMAL)), status)
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
