"""Compare solvers and derivatives on one problem."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor
from tqdm import tqdm

from declarative_cvx.comparison.candidate import Candidate, Solver, candidates
from declarative_cvx.comparison.comparison import Comparison, described, sorted_rows
from declarative_cvx.comparison.measure import Reference, Work, batched, measure, reference_of
from declarative_cvx.comparison.row import Row
from declarative_cvx.comparison.sweep import Sweep, Variation, read_variation
from declarative_cvx.comparison.worker import Worker
from declarative_cvx.errors import ParameterError, SpecificationError
from declarative_cvx.nonconvex.torch_problem import TorchProblem
from declarative_cvx.status import Status

Builder = Callable[[Any], tuple[Any, ...]]


def compare(
    problem: cp.Problem | TorchProblem | Builder,
    parameters: Sequence[cp.Parameter] | None = None,
    values: Sequence[Any] | None = None,
    variables: Sequence[Any] | None = None,
    *,
    solvers: Sequence[Solver] | None = None,
    derivatives: Sequence[str] | None = None,
    reference: Sequence[Any] | None = None,
    repeats: int = 5,
    time_limit: float | None = 60.0,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    progress: bool = True,
    **options: Any,
) -> Comparison | Sweep:
    """Time, accuracy and gradients of every solver and derivative on a problem of yours.

    Parameters
    ----------
    problem : cvxpy.Problem, TorchProblem or callable
        Callable for a sweep over sizes: from a size to (problem, parameters, values) or
        (problem, parameters, values, variables).
    parameters : sequence of cvxpy.Parameter
        None for a TorchProblem, which names its own.
    values : sequence of Tensor or array
        One for each parameter, shaped like it or with a batch dimension in front.
    variables : sequence of cvxpy.Variable (of str for a TorchProblem), optional
        Those whose errors and gradients are compared; by default all of the problem.
    solvers : sequence of str, Backend, Minimizer or NLPSolver, optional
        By default "auto" and every solver that is installed and takes such problems, each with
        the library's refinement and, cone solvers, as it comes (``refine=False``).
    derivatives : sequence of str, optional
        By default all that there are.
    reference : sequence of Tensor or array, optional
        The right values of the variables, ``(batch, *shape)``, NaN where there is no solution. By
        default they are computed to rounding by the library's own refinement, as the gradients
        always are. Of a problem with several minima it is that where ``solver="auto"`` ends:
        another one counts as an error, whatever its objective, which is in the table.
    repeats : int
        Timed calls of each.
    time_limit : float or None
        Seconds for each row, after which no further call is begun. Rows are measured in a process
        of their own, which may die, and which is stopped half a minute later if a call is still
        going on. None measures in this process, without a limit.
    sweep : mapping, optional
        What to vary: one of ``{"batch": [1, 16, 256]}``, ``{"tol": [1e-4, 1e-8]}`` (of solvers
        given or taken as objects) and ``{"size": [...]}`` (with a callable `problem`).
    progress : bool
        Show a progress bar on the standard error.
    **options
        Further arguments of `DeclarativeLayer`, such as ``gp=True``.

    Returns
    -------
    Comparison or Sweep
        A Sweep if `sweep` was given.

    Raises
    ------
    SpecificationError, ParameterError, BackendError
        Before anything is measured. What a solver raises becomes its row.

    Examples
    --------
    >>> import cvxpy as cp, declarative_cvx as dcx
    >>> x, b = cp.Variable(3), cp.Parameter(3)
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0])
    >>> found = dcx.compare(problem, [b], [[1.0, -1.0, 2.0]], solvers=["scs", "ecos"])
    >>> solver = found.best(accuracy=1e-6)
    """
    if repeats < 1:
        raise SpecificationError(f"repeats must be at least 1, got {repeats!r}.")
    if not (time_limit is None or time_limit > 0):
        raise SpecificationError(f"time_limit must be positive or None, got {time_limit!r}.")
    shared = _Shared(solvers, derivatives, reference, repeats, time_limit, progress, options)
    if sweep is None:
        return shared.compare(*_given(problem, parameters, values), variables)
    variation = read_variation(sweep, problem)
    found = []
    for value in variation.values:
        if variation.name == "size":
            assert callable(problem)
            found.append(shared.compare(*_built(problem, value), label=str(value)))
        else:
            found.append(
                shared.compare(
                    *_given(problem, parameters, values), variables, variation, value, str(value)
                )
            )
    return Sweep(variation.name, tuple(variation.values), tuple(found))


def _given(problem: Any, parameters: Any, values: Any) -> tuple[Any, Any, Any]:
    if not isinstance(problem, cp.Problem | TorchProblem):
        raise SpecificationError(
            f"problem must be a cvxpy.Problem or a TorchProblem, got {type(problem).__name__}; a "
            'callable is for sweep={"size": [...]}.'
        )
    if values is None or (parameters is None and isinstance(problem, cp.Problem)):
        raise SpecificationError("compare needs parameters=[...] and values=[...].")
    return problem, parameters, values


def _built(build: Builder, size: Any) -> tuple[Any, Any, Any, Any]:
    """Problem, parameters, values and variables of a size."""
    built = tuple(build(size))
    if len(built) not in (3, 4):
        raise SpecificationError(
            f"the callable returned {len(built)} things for {size!r}, but (problem, parameters, "
            "values) or (problem, parameters, values, variables) is expected."
        )
    return (*_given(*built[:3]), built[3] if len(built) == 4 else None)


class _Shared:
    """What all comparisons of one call have in common."""

    def __init__(
        self,
        solvers: Sequence[Solver] | None,
        derivatives: Sequence[str] | None,
        reference: Sequence[Any] | None,
        repeats: int,
        time_limit: float | None,
        progress: bool,
        options: dict[str, Any],
    ) -> None:
        self._solvers, self._derivatives, self._reference = solvers, derivatives, reference
        self._repeats, self._time_limit = repeats, time_limit
        self._progress, self._options = progress, options

    def compare(
        self,
        problem: cp.Problem | TorchProblem,
        parameters: Sequence[cp.Parameter] | None,
        values: Sequence[Any],
        variables: Sequence[Any] | None,
        variation: Variation | None = None,
        value: Any = None,
        label: str = "",
    ) -> Comparison:
        if isinstance(problem, TorchProblem):
            named = list(problem.parameter_shapes.items())
            chosen = variables
        else:
            named = [(parameter.name(), parameter.shape) for parameter in parameters or ()]
            chosen = problem.variables() if variables is None else variables
            # Without what solving it has left behind, which other processes cannot read.
            problem = cp.Problem(problem.objective, problem.constraints)
        work = Work(
            problem,
            None if parameters is None else list(parameters),
            None if chosen is None else list(chosen),
            _tensors(values, [name for name, _ in named]),
            [len(shape) for _, shape in named],
            self._options,
        )
        spec = work.layer(Candidate("auto", "auto")).spec
        listed = candidates(spec, self._solvers, self._derivatives)
        work = batched(work)
        if variation is not None:
            work, listed = variation.apply(value, work, listed)
        right, words = self._right(work)
        rows = self._rows(work, listed, right, label)
        first = work.values[0] if work.values else torch.empty(0)
        return Comparison(
            sorted_rows(rows), len(right.codes), words, described(first.device, first.dtype)
        )

    def _right(self, work: Work) -> tuple[Reference, str]:
        """The reference and what it is, in words."""
        found = reference_of(work)
        solved = int((found.codes == int(Status.OPTIMAL)).sum())
        words = (
            f"Errors are relative to this library's refined answer, largest residual "
            f"{found.residual:.0e}; it solved {solved} of {len(found.codes)} elements, "
            f"{int(found.regular.sum())} of which have a derivative."
        )
        if self._reference is None:
            return found, words
        given = tuple(torch.as_tensor(v, dtype=torch.float64) for v in self._reference)
        if len(given) != len(found.solution):
            raise ParameterError(
                f"reference has {len(given)} entries, but one for each of the "
                f"{len(found.solution)} variables is expected."
            )
        for at, (mine, theirs) in enumerate(zip(found.solution, given, strict=True)):
            if mine.shape != theirs.shape:
                raise ParameterError(
                    f"reference[{at}] has shape {tuple(theirs.shape)}, but that of the "
                    f"variable with the batch, {tuple(mine.shape)}, is expected."
                )
        solution = tuple(v.to(found.codes.device) for v in given)
        there = torch.stack([torch.isfinite(v.reshape(len(v), -1)).all(1) for v in solution]).all(0)
        codes = torch.where(there, int(Status.OPTIMAL), found.codes)
        words = "Solution errors are relative to the reference that was given. " + words
        return Reference(solution, found.gradients, codes, found.regular, float("nan")), words

    def _rows(
        self, work: Work, listed: Sequence[Candidate], right: Reference, label: str
    ) -> list[Row]:
        bar = tqdm(listed, desc=label or None, file=sys.stderr, disable=not self._progress)
        with bar:
            if self._time_limit is not None:
                with Worker(work, right, self._repeats, self._time_limit) as worker:
                    if worker.can_start():
                        return [worker.measure(c) for c in _shown(bar)]
            limit = self._time_limit
            return [measure(work, c, right, self._repeats, limit) for c in _shown(bar)]


def _shown(bar: Any) -> Any:
    for candidate in bar:
        bar.set_postfix_str(candidate.label, refresh=True)
        yield candidate


def _tensors(values: Sequence[Any], names: Sequence[str]) -> list[Tensor]:
    """The values as tensors of floating-point numbers."""
    if len(values) != len(names):
        raise ParameterError(
            f"values has {len(values)} entries, but one for each parameter is expected: "
            f"{', '.join(names)}."
        )
    found = []
    for at, (value, name) in enumerate(zip(values, names, strict=True)):
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ParameterError(
                f"values[{at}], for {name!r}, is no tensor or array: {error}."
            ) from None
        found.append(tensor if tensor.is_floating_point() else tensor.double())
    return found
