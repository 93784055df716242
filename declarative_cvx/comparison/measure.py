"""Run one solver and derivative on a batch, and judge what comes out."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from declarative_cvx.comparison.candidate import Candidate
from declarative_cvx.comparison.row import NAN, Row, Timing
from declarative_cvx.errors import DeclarativeError
from declarative_cvx.layer import DeclarativeLayer
from declarative_cvx.nonconvex.torch_problem import TorchProblem
from declarative_cvx.solution import Solution
from declarative_cvx.status import Status

# Share of a batch's largest entry below which an element's own size does not count in an error.
_SMALL = 1e-3
FINAL = [int(status) for status in Status if status.final]


@dataclass(frozen=True)
class Work:
    """A layer's problem and the values to solve it for.

    Attributes
    ----------
    problem : cvxpy.Problem or TorchProblem
    parameters, variables : list or None
        As the layer takes them; None for a torch problem, and for all of its variables.
    values : list of Tensor
    ranks : list of int
        Numbers of dimensions of one element's values.
    options : dict
        Further arguments of `DeclarativeLayer`.
    """

    problem: cp.Problem | TorchProblem
    parameters: list[cp.Parameter] | None
    variables: list[Any] | None
    values: list[Tensor]
    ranks: list[int]
    options: dict[str, Any]

    def layer(self, candidate: Candidate) -> DeclarativeLayer:
        return DeclarativeLayer(
            self.problem,
            self.parameters,
            self.variables,
            solver=candidate.solver,  # type: ignore[arg-type]  # an object of the right kind
            derivative=candidate.derivative,
            on_failure="nan",
            on_irregular="ignore",
            **self.options,
        )


@dataclass(frozen=True)
class Reference:
    """What right is.

    Attributes
    ----------
    solution : tuple of Tensor
        One for each variable, (batch, *shape), NaN for elements without a solution.
    gradients : tuple of Tensor
        One for each parameter, (batch, *shape): of the sum of all variables' entries, weighted by
        the cosines of 0, 1, 2, ... in each variable.
    codes : Tensor of int64, shape (batch,)
        Statuses; others are compared with those that are final.
    regular : Tensor of bool, shape (batch,)
        Elements whose gradient counts.
    residual : float
        The largest residual of a solved element; NaN if the reference was given.
    """

    solution: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    codes: Tensor
    regular: Tensor
    residual: float


def weighted_sum(variables: Sequence[Tensor]) -> Tensor:
    """The loss whose gradients are compared; elements that were not solved count zero."""
    terms = []
    for value in variables:
        flat = value.reshape(len(value), -1)
        weights = torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device))
        terms.append((torch.nan_to_num(flat) * weights).sum())
    return torch.stack(terms).sum()


def batched(work: Work) -> Work:
    """The same work with a batch dimension at every value, so that every gradient has one."""
    pairs = list(zip(work.values, work.ranks, strict=True))
    batch = next((len(v) for v, rank in pairs if v.dim() > rank), 1)
    values = [
        (v if v.dim() > rank else v.expand(batch, *v.shape)).detach().contiguous()
        for v, rank in pairs
    ]
    return replace(work, values=values)


def reference_of(work: Work) -> Reference:
    """The library's own answer, refined and verified."""
    layer = work.layer(Candidate("auto", "auto"))
    leaves = [value.clone().requires_grad_() for value in work.values]
    solution = layer.solve(*leaves)
    gradients = _gradients(weighted_sum(solution.variables), leaves)
    worst = solution.residuals.worst[solution.solved]
    return Reference(
        tuple(value.detach() for value in solution.variables),
        gradients,
        solution.codes,
        solution.derivative.regular & solution.solved,
        _largest(worst),
    )


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not loss.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def measure(
    work: Work, candidate: Candidate, reference: Reference, repeats: int, seconds: float | None
) -> Row:
    """All numbers of one row; an error of the library, a solver or torch becomes its failure.

    Parameters
    ----------
    repeats : int
        Timed calls after the first one, which is not timed.
    seconds : float or None
        No further call is begun after so long.
    """
    began = time.perf_counter()
    try:
        layer = work.layer(candidate.limited(seconds))
        before = _memory_mark(work)
        solution, gradients, _ = _pass_over(layer, work)
        memory = _memory_since(work, before)
        times = []
        for _ in range(repeats):
            times.append(_pass_over(layer, work)[2])
            if seconds is not None and time.perf_counter() - began > seconds:
                break
    except DeclarativeError as error:
        return Row(candidate, failure=" ".join(str(error).split()))
    except Exception as error:  # of a solver: the other rows are to be had all the same
        return Row(candidate, failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
    forward, backward = (Timing.of(part) for part in zip(*times, strict=True))
    row = _judged(candidate, solution, gradients, reference)
    return replace(row, forward=forward, backward=backward, memory=memory)


def _pass_over(
    layer: DeclarativeLayer, work: Work
) -> tuple[Solution, tuple[Tensor, ...], tuple[float, float]]:
    """A solution, gradients, and the seconds of forward and backward pass."""
    leaves = [value.clone().requires_grad_() for value in work.values]
    _wait(work)
    began = time.perf_counter()
    solution = layer.solve(*leaves)
    loss = weighted_sum(solution.variables)
    _wait(work)
    between = time.perf_counter()
    gradients = _gradients(loss, leaves)
    _wait(work)
    return solution, gradients, (between - began, time.perf_counter() - between)


def _judged(
    candidate: Candidate,
    solution: Solution,
    gradients: tuple[Tensor, ...],
    reference: Reference,
) -> Row:
    solved, found = solution.solved, solution.residuals
    both = solved & (reference.codes == int(Status.OPTIMAL))
    # What the reference could not settle is no measure.
    known = torch.isin(reference.codes, reference.codes.new_tensor(FINAL))
    residuals = (found.primal, found.dual, found.gap, found.cone)
    primal, dual, gap, cone = (_largest(v[solved]) for v in residuals)
    pairs = list(zip(solution.variables, reference.solution, strict=True))
    by_parameter = list(zip(gradients, reference.gradients, strict=True))
    return Row(
        candidate,
        status=dict(Counter(status.name for status in solution.status)),
        agrees=bool((solution.codes == reference.codes)[known].all()),
        objective=float(solution.value.detach()[solved].double().mean()),
        primal=primal,
        dual=dual,
        gap=gap,
        cone=cone,
        solution_error=_worst(_error(a, b, both) for a, b in pairs),
        gradient_error=_worst(_error(a, b, both & reference.regular) for a, b in by_parameter),
        irregular=int((~solution.derivative.regular & solved).sum()),
        iterations=float(statistics.median(solution.iterations)),
    )


def _error(found: Tensor, right: Tensor, which: Tensor) -> float:
    """Largest difference in the elements named, relative to the element's largest entry.

    Where all entries of all elements are zero, there is nothing that it could be relative to.
    """
    found, right = (v.detach().double().reshape(len(v), -1)[which] for v in (found, right))
    if not found.numel():
        return NAN
    size = right.abs().amax(1, keepdim=True)
    size = torch.maximum(size, _SMALL * size.amax())
    size = torch.where(size > 0, size, 1.0)
    difference = (found - right).abs() / size
    return float(difference.nan_to_num(torch.inf).max())


def _worst(errors: Iterable[float]) -> float:
    """The largest error; NaN if there was nothing to compare."""
    return max((error for error in errors if not math.isnan(error)), default=NAN)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else NAN


# --- the machine ---------------------------------------------------------------------------------


def _wait(work: Work) -> None:
    """Wait for the device, whose work goes on in the background."""
    if work.values and work.values[0].is_cuda:
        torch.cuda.synchronize(work.values[0].device)


def _memory_mark(work: Work) -> float:
    """Bytes in use, from where the peak is counted."""
    if work.values and work.values[0].is_cuda:
        device = work.values[0].device
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak (Linux)
        return _linux_memory("VmRSS")
    except OSError:
        return _resident_peak()


def _memory_since(work: Work, before: float) -> float:
    if work.values and work.values[0].is_cuda:
        return torch.cuda.max_memory_allocated(work.values[0].device) - before
    try:
        return max(_linux_memory("VmHWM") - before, 0.0)
    except OSError:
        return max(_resident_peak() - before, 0.0)


def _linux_memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _resident_peak() -> float:
    """Largest memory of the process so far: a peak below an earlier one is not seen."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
