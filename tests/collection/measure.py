"""How far the library's answer to a problem is from the exact one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from collection.problem import Exact, Problem, Values
from declarative_cvx import DeclarativeLayer, IrregularWarning, Solution
from declarative_cvx.canonical import canonicalize

# What every problem must meet, and what those meet whose cones are (not) polyhedral or quadratic.
BOUND = 1e-6
BOUND_ALGEBRAIC = 1e-10
BOUND_TRANSCENDENTAL = 1e-8
# The effect of a parameter is its gradient times its size. Effects this much smaller than the
# largest one, or than the terms of the loss, are compared with those.
SMALLEST_EFFECT = 1e-4


@dataclass(frozen=True)
class Measurement:
    """One run of the library at default settings.

    Attributes
    ----------
    name, group : str
    variables, rows : int
        Of the cone program.
    bound : float
        What the errors must not exceed.
    solution_error, gradient_error : float
        Relative errors, the largest over outputs and parameters; NaN where nothing is exact.
    solver : str
    regular : bool
        What the library says of the derivative.
    expected_regular : bool
    warned : bool
        Whether the backward pass warned that there is no derivative.
    seconds : float
        For the layer, its solution and the backward pass.
    """

    name: str
    group: str
    variables: int
    rows: int
    bound: float
    solution_error: float
    gradient_error: float
    solver: str
    regular: bool
    expected_regular: bool
    warned: bool
    seconds: float

    @property
    def marked(self) -> bool:
        """Whether the library says of the derivative what is so."""
        return self.regular == self.expected_regular == (not self.warned)

    def within(self, bound: float | None = None) -> bool:
        """Whether both errors are within the problem's bound, or the given one."""
        bound = self.bound if bound is None else bound
        return not max(self.solution_error, np.nan_to_num(self.gradient_error)) > bound


def relative(found: np.ndarray, exact: np.ndarray, floor: float = 0.0) -> float:
    """Largest difference over largest entry, which is at least `floor`; one if that is zero."""
    size = max(np.abs(exact).max(initial=0), floor)
    worst = np.abs(found - exact).max(initial=0) / (size or 1.0)
    return float("inf") if worst != worst else float(worst)


def symmetric(problem: Problem) -> list[bool]:
    """Which parameters move within the symmetric matrices only."""
    _, parameters, _ = problem.build()
    names = ("symmetric", "PSD", "NSD")
    return [any(parameter.attributes[name] for name in names) for parameter in parameters]


def gradient_error(problem: Problem, weights: Values, found: Values, exact: Exact) -> float:
    """Relative error of the gradients, or at a kink distance from the valid ones."""
    pairs = symmetric(problem)

    def tangent(gradients: Values) -> list[np.ndarray]:
        return [(g + g.T) / 2 if s else g for g, s in zip(gradients, pairs, strict=True)]

    found, right = tangent(found), tangent(exact.gradients)
    if exact.others is not None:
        other = tangent(exact.others)
        along = np.concatenate([(b - a).ravel() for a, b in zip(right, other, strict=True)])
        gone = np.concatenate([(f - a).ravel() for a, f in zip(right, found, strict=True)])
        share = float(np.clip(along @ gone / (along @ along), 0, 1))
        right = [a + share * (b - a) for a, b in zip(right, other, strict=True)]
    sizes = [max(np.abs(value).max(initial=0), 1e-300) for value in problem.values]
    terms = [np.abs(w * out).max(initial=0) for w, out in zip(weights, exact.outputs, strict=True)]
    effects = [np.abs(g).max(initial=0) * v for g, v in zip(right, sizes, strict=True)]
    floor = SMALLEST_EFFECT * max(effects + terms)
    return max(
        (relative(f, g, floor / v) for f, g, v in zip(found, right, sizes, strict=True)),
        default=0.0,
    )


def measure(problem: Problem) -> Measurement:
    """Solve and differentiate at default settings, by `solve` and by a call, and compare."""
    weights = problem.weights()
    exact = None if problem.oracle is None else problem.oracle(problem.values, weights)
    built, parameters, variables = problem.build()
    began = time.perf_counter()
    layer = DeclarativeLayer(built, parameters, variables, gp=problem.gp)
    solutions: list[Solution] = []

    def solve(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        solutions.append(layer.solve(*tensors))
        return solutions[0].variables

    passes = [_pass(problem, weights, exact, solve)]
    seconds = time.perf_counter() - began
    passes.append(_pass(problem, weights, exact, layer))
    solution = solutions[0]
    canonical = canonicalize(built, parameters, gp=problem.gp, canon_backend=None)
    cone, shape = canonical.structure.cone, canonical.structure.A.shape
    warned = {found.warned for found in passes}
    return Measurement(
        name=problem.name,
        group=problem.group,
        variables=shape[1],
        rows=shape[0],
        bound=BOUND_TRANSCENDENTAL if cone.exp or cone.power else BOUND_ALGEBRAIC,
        solution_error=max(found.solution_error for found in passes),
        gradient_error=float(np.max([found.gradient_error for found in passes])),
        solver=solution.backend[0],
        regular=bool(solution.derivative.regular[0]),
        expected_regular=problem.regular,
        warned=warned == {True} or (len(warned) == 2 and problem.regular),
        seconds=seconds,
    )


class _Pass(NamedTuple):
    """Errors of one forward and backward pass, and whether it warned."""

    solution_error: float
    gradient_error: float
    warned: bool


def _pass(
    problem: Problem,
    weights: Values,
    exact: Exact | None,
    layer: Callable[..., tuple[torch.Tensor, ...]],
) -> _Pass:
    tensors = [torch.tensor(value, requires_grad=True) for value in problem.values]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = layer(*tensors)
        terms = zip(weights, found, strict=True)
        torch.stack([(torch.tensor(w) * out).sum() for w, out in terms]).sum().backward()
    warned = any(issubclass(w.category, IrregularWarning) for w in caught)
    outputs = tuple(out.detach().numpy() for out in found)
    gradients = tuple(t.grad.numpy() for t in tensors)
    if exact is None:
        finite = all(np.isfinite(g).all() for g in gradients)
        error = problem.suboptimality(problem.values, outputs)
        return _Pass(error, float("nan") if finite else np.inf, warned)
    error = max(map(relative, outputs, exact.outputs))
    return _Pass(error, gradient_error(problem, weights, gradients, exact), warned)
