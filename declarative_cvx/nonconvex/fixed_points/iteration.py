"""Fixed points of a batch of maps: by plain iteration, by acceleration, by Newton's method.

Which of them is decided while solving, from the rate that is observed:

1. Plain (Picard) iteration, the cheapest where it contracts quickly.
2. Acceleration. Slow convergence is mostly the work of few directions, such as the Perron vector of
   a nonnegative matrix. The next iterate is taken from the affine hull of the last few, at the
   point where the residual is orthogonal to it (Anderson's method of type I; Fang and Saad 2009,
   "Two classes of multisecant methods for nonlinear acceleration"). Maps are given as
   ``outer(inner(x))``, and only ``inner`` is known by secants: where it is affine and ``outer`` an
   activation, the slope of the activation is exact, and no secant of it has to be forgotten.
3. Newton's method with a line search, for elements with many slow directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from declarative_cvx.nonconvex.fixed_points.map import FixedPointMap, max_norm

METHODS = ("auto", "picard", "anderson", "newton")

# Plain steps before the rate is judged, and more of them to come that make acceleration worthwhile.
JUDGED, SLOW = 3, 50
# Accelerated steps between two looks at the residuals.
CHUNK = 4
# A residual that grew by this factor sends an element back to its best iterate.
WORSE = 2.0
# Rounding, in units of eps, below which no residual is asked for; what is enough before float64
# takes over a slow system in float32, and how much closer it then has to come: the error of a slow
# system is a large multiple of its residual.
ROUNDING, HANDED_OVER, CLOSER, SMALLEST = 4, 1e-4, 1e-3, 1e-13
# Newton steps, and shortest step, as a power of 1/2, of the line search.
NEWTON_STEPS, HALVINGS = 50, 7
# Newton steps in a row without progress of any element after which there is none to come.
FUTILE = 4


@dataclass(frozen=True, eq=False)
class Found:
    """Where the iteration ended.

    Attributes
    ----------
    x : Tensor, shape (batch, n)
        The best iterate of each element.
    residual : Tensor, shape (batch,)
        As the map measures it; infinite if never finite.
    iterations : Tensor of int64, shape (batch,)
        Evaluations of the map.
    slow : bool
        Whether plain iteration was given up; otherwise all elements are solved.
    q : Tensor or None
        If at hand, ``inner(x)``, or, of maps that contract, one whose image x is.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor
    slow: bool
    q: Tensor | None = None

    def masked(self, tol: float) -> Tensor:
        """The iterates, NaN where the residual is larger."""
        if not self.slow:
            return self.x
        return torch.where((self.residual <= tol)[:, None], self.x, torch.nan)


def iterate(
    problem: FixedPointMap,
    start: Tensor,
    tol: float,
    max_iters: int,
    method: str = "auto",
    depth: int = 0,
    tol_if_slow: float = 0.0,
    warm: bool = False,
) -> Found:
    """Solve ``x = outer(inner(x))`` for each element.

    Parameters
    ----------
    problem : FixedPointMap
    start : Tensor, shape (batch, n)
    tol : float
        Relative residual to reach.
    max_iters : int
        Evaluations of the map.
    method : {"auto", "picard", "anderson", "newton"}, optional
        Where to begin, or, for "picard", also to end.
    depth : int, optional
        Plain steps that end the iteration, if known: taken however small the residual is.
    tol_if_slow : float, optional
        Residual that is enough if plain iteration is slow, if larger.
    warm : bool, optional
        Whether the start may be a solution.
    """
    run = _Run(problem, start, tol, max_iters, warm)
    if not len(start):
        return run.found(slow=False)
    if method in ("auto", "picard"):
        done = run.plainly(depth, patient=method == "picard")
        if done or method == "picard":
            return run.found(slow=not done)
    run.tol = max(tol, tol_if_slow)
    run.individually()
    if method != "newton":
        run.accelerate()
    if problem.direct:
        run.newton()
    return run.best()


def solve_map(
    problem: FixedPointMap,
    start: Tensor,
    tol: float,
    max_iters: int,
    method: str = "auto",
    depth: int = 0,
    warm: bool = False,
) -> Found:
    """`iterate` in the type of `start`; what is slow in float32 is finished in float64."""
    reachable = ROUNDING * torch.finfo(start.dtype).eps
    rough, slow_enough = max(tol, reachable), 0.0
    if start.dtype != torch.float64 and problem.widens:
        slow_enough = HANDED_OVER
    found = iterate(problem, start, rough, max_iters, method, depth, slow_enough, warm)
    if not slow_enough or (not found.slow and tol >= reachable):
        return found
    after = method if method in ("picard", "newton") or not found.slow else "anderson"
    fine = iterate(
        problem.double(), found.x.double(), max(CLOSER * tol, SMALLEST), max_iters, after
    )
    return replace(
        fine,
        x=fine.x.to(start.dtype),
        iterations=fine.iterations + found.iterations,
        slow=True,
        q=None,
    )


class _Run:
    """The state of an iteration: of all elements, and of those still at work.

    x, q = inner(x) and f = outer(q) are those of the elements at work, whose places are `at`.
    """

    def __init__(
        self, problem: FixedPointMap, start: Tensor, tol: float, max_iters: int, warm: bool
    ) -> None:
        self._whole, self._problem = problem, problem
        self.tol, self._max_iters, self._warm = tol, max_iters, warm
        self._start = start
        kind = torch.finfo(start.dtype)
        # Where x = 0 solves, an iteration from elsewhere ends when it is small beside its start.
        floor = (kind.eps * max_norm(start)).clamp(min=kind.tiny) if warm else kind.tiny
        self._floor: Tensor | float = floor
        self._floors: Tensor | float = floor
        self._doubtful = warm  # whether x = 0 may not solve
        self._count = 0
        self._move(start)

    def found(self, slow: bool) -> Found:
        """Where all elements are."""
        x = self._x
        if not slow and self._problem.contracts:
            x = self._f  # nearer by what the map contracts: the residual is a bound of its own
        elif x is self._start:
            x = x.clone()  # an output that is an input is more than torch's functions can follow
        residual = self._residuals() if self._last is None else self._last
        counts = torch.full((len(x),), self._count, dtype=torch.int64, device=x.device)
        if slow:
            residual = residual.nan_to_num(nan=math.inf)
        return Found(x, residual, counts, slow, self._q)

    def best(self) -> Found:
        """The best iterate of each element."""
        return Found(self._best, self._residual, self._iterations, slow=True)

    def individually(self) -> None:
        """From now on elements take different ways."""
        now = self.found(slow=True)
        self._best, self._residual, self._iterations = now.x, now.residual, now.iterations
        self._at = torch.arange(len(now.x), device=now.x.device)

    def _move(self, x: Tensor) -> None:
        self._x, self._q = x, self._problem.inner(x)
        self._f = self._problem.outer(self._q)
        self._count += 1
        self._last: Tensor | None = None

    def _residuals(self) -> Tensor:
        if self._doubtful and bool((max_norm(self._f) < self._floor).any()):
            self._settle_floors()
        self._last = self._problem.relative(self._x, self._f, self._floor)
        return self._last

    def _settle_floors(self) -> None:
        """No floor where x = 0 does not solve: iterates are small there, the start was far off."""
        zero = self._whole.outer(self._whole.inner(torch.zeros_like(self._start)))
        least = torch.finfo(zero.dtype).tiny
        self._floors = torch.where(max_norm(zero) == 0, self._floors, least)
        self._floor = self._floors if len(self._x) == len(zero) else self._floors[self._at]
        self._doubtful = False

    def plainly(self, depth: int, patient: bool) -> bool:
        """Plain steps; whether all elements were solved."""
        steps, judged = 1, max(JUDGED, depth)
        previous: Tensor | float = math.inf
        if depth:
            self._advance(min(depth + self._warm, self._max_iters) - 1)
        elif not self._warm and self._max_iters > judged:
            self._advance(1)
            previous = self._residuals().amax()
            self._advance(1)
        while True:
            worst = float(self._residuals().amax())
            done = worst <= self.tol
            left = _remaining(worst, float(previous), steps, self.tol)
            slow = not patient and self._count > judged and not left <= SLOW
            if done or slow or self._count >= self._max_iters:
                break
            # A look costs about a step: the next one is taken when the end may be in sight.
            steps = int(max(1, min(left, self._count, self._max_iters - self._count)))
            previous = worst
            self._advance(steps)
        return done

    def _advance(self, steps: int) -> None:
        for _ in range(steps):
            self._move(self._f)

    def look(self) -> tuple[Tensor, Tensor]:
        """Take note of better iterates; the residuals before and now of those at work."""
        before, now = self._residual[self._at], self._residuals()
        better = now < before
        kept = torch.where(better[:, None], self._x, self._best[self._at])
        self._best = self._best.index_copy(0, self._at, kept)
        least = torch.where(better, now, before)
        self._residual = self._residual.index_copy(0, self._at, least)
        self._iterations = self._iterations.index_fill(0, self._at, self._count)
        return before, now

    def _keep(self, mask: Tensor) -> Tensor | None:
        """Go on with these elements only: their places among those at work; None is all."""
        if bool(mask.all()):
            return None
        index = torch.nonzero(mask)[:, 0]
        self._problem, self._at = self._problem.select(index), self._at[index]
        if isinstance(self._floor, Tensor):
            self._floor = self._floor[index]
        self._x, self._q, self._f = self._x[index], self._q[index], self._f[index]
        return index

    def _unsolved(self) -> Tensor:
        return ~(self._residual[self._at] <= self.tol)

    def _return(self, mask: Tensor) -> None:
        """Back to the best iterate where asked for, and a plain step from there."""
        x = torch.where(mask[:, None], self._best[self._at], self._x)
        q = self._problem.inner(x)
        self._x, self._q, self._f = x, q, self._problem.outer(q)
        self._count += 1

    def accelerate(self) -> None:
        """Accelerated steps, until what is left is better left to Newton's method."""
        self._keep(self._unsolved())
        history = _History(self._x, self._problem.memory)
        strikes = torch.zeros_like(self._at)
        limit = self._problem.cost(self._x.shape[1]) if self._problem.direct else math.inf
        while len(self._at) and self._count < self._max_iters:
            for _ in range(min(CHUNK, self._max_iters - self._count)):
                x, q = self._x, self._q
                self._move(history.propose(self._problem, x, q, self._f - x))
                history.add(self._x - x, self._q - q)
            before, now = self.look()
            worse = ~(now <= WORSE * before)
            if bool(worse.any()):
                self._return(worse)
                history.forget(worse)
            struck = worse | ~(_all_remaining(now, before, CHUNK, self.tol) <= limit)
            strikes = torch.where(struck, strikes + 1, 0)
            stays = self._unsolved()
            if self._problem.direct:
                stays &= strikes < 2
            index = self._keep(stays)
            if index is not None:
                strikes = strikes[index]
                history.select(index)

    def newton(self) -> None:
        """Newton steps for what is left."""
        self._at = torch.nonzero(~(self._residual <= self.tol))[:, 0]
        self._problem, floors = self._whole.select(self._at), self._floors
        self._floor = floors[self._at] if isinstance(floors, Tensor) else floors
        if len(self._at):
            self._move(self._best[self._at])
        futile = 0
        for _ in range(NEWTON_STEPS):
            if not len(self._at) or self._count >= self._max_iters or futile == FUTILE:
                return
            size = self._distance()
            self._search(self._problem.newton(self._x, self._q, self._f - self._x))
            before, now = self.look()
            nearer = (now < before) | (self._distance() < size / 2)
            futile = 0 if bool(nearer.any()) else futile + 1
            self._keep(self._unsolved())

    def _search(self, d: Tensor) -> None:
        """The longest of the steps d, d/2, d/4, ... that lowers the residual; else a plain one.

        Lower relative to the map's own measure, or in the max norm: far from the solution single
        components may have to become worse.
        """
        before, size, (x, plain) = self._residuals(), self._distance(), (self._x, self._f)
        found = torch.zeros_like(before, dtype=torch.bool)
        kept: tuple[Tensor, ...] = (self._x, self._q, self._f)
        for k in range(HALVINGS + 1):
            trial = x + d / 2**k if k < HALVINGS else plain
            self._move(trial)
            good = (self._residuals() < before) | (self._distance() < size)
            new = ((good | (k == HALVINGS)) & ~found)[:, None]
            now = (self._x, self._q, self._f)
            kept = tuple(torch.where(new, b, a) for a, b in zip(kept, now, strict=True))
            found |= good
            if bool(found.all()):
                break
        self._x, self._q, self._f = kept

    def _distance(self) -> Tensor:
        return max_norm(self._f - self._x)


class _History:
    """The last few changes of x and of q, of norm 1."""

    def __init__(self, x: Tensor, memory: int) -> None:
        batch, n = x.shape
        self._X, self._Q = x.new_zeros(batch, memory, n), x.new_zeros(batch, memory, n)
        self._ridge = (
            10 * torch.finfo(x.dtype).eps * torch.eye(memory, dtype=x.dtype, device=x.device)
        )
        self._next = 0

    def propose(self, problem: FixedPointMap, x: Tensor, q: Tensor, r: Tensor) -> Tensor:
        """The image of the point of the affine hull whose residual is orthogonal to it."""
        J = self._X - problem.outer_changes(q, self._Q)
        products = self._X @ torch.cat([J, r[:, None]], 1).mT
        matrix = products[:, :, :-1] + self._ridge
        weights = torch.linalg.solve_ex(matrix, products[:, :, -1:])[0].mT
        weights = torch.where(weights.isfinite().all(2, keepdim=True), weights, 0.0)
        return problem.outer(q + (weights @ self._Q)[:, 0])

    def add(self, dx: Tensor, dq: Tensor) -> None:
        size = torch.linalg.vector_norm(dx, dim=1, keepdim=True)
        inverse = 1 / size.clamp(min=torch.finfo(dx.dtype).tiny)
        self._X[:, self._next], self._Q[:, self._next] = dx * inverse, dq * inverse
        self._next = (self._next + 1) % self._X.shape[1]

    def forget(self, mask: Tensor) -> None:
        self._X[mask], self._Q[mask] = 0.0, 0.0

    def select(self, index: Tensor) -> None:
        self._X, self._Q = self._X[index], self._Q[index]


def _remaining(now: float, before: float, steps: int, tol: float) -> float:
    """Steps to go at the rate of the last ones."""
    if now <= tol:
        return 0.0
    if not now < before:
        return math.inf
    if before == math.inf:
        return 1.0
    return math.ceil(steps * math.log(now / tol) / math.log(before / now))


def _all_remaining(now: Tensor, before: Tensor, steps: int, tol: float) -> Tensor:
    """The same for each element."""
    left = steps * torch.log(now / tol) / torch.log(before / now)
    return torch.where(now <= tol, 0.0, torch.where(now < before, left, math.inf))
