"""Measure the whole collection of problems and write docs/accuracy.md.

``python docs/make_accuracy.py`` runs every problem of tests/collection at default settings, each
in a process of its own that may take ``--limit`` seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from collection import PROBLEMS, Measurement, Problem, measure  # noqa: E402

TARGET = ROOT / "docs" / "accuracy.md"
HEADINGS = (
    "Problem", "Group", "Variables x rows", "Solution error", "Gradient error", "Bound", "Solver",
    "Derivative", "Seconds", "Verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A problem that gave no numbers, and why."""

    name: str
    group: str
    reason: str


Result = Measurement | Failure


def _work(names: Sequence[str], results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    chosen = {problem.name: problem for problem in PROBLEMS}
    for name in names:
        try:
            results.put(measure(chosen[name]))
        except Exception as error:  # goes into the table
            text = str(error).splitlines() or [""]
            reason = f"{type(error).__name__}: {text[0][:120]}"
            results.put(Failure(name, chosen[name].group, reason))


def run(problems: Sequence[Problem], limit: float) -> list[Result]:
    """Measure problems one after the other; a process that takes too long is replaced."""
    context = multiprocessing.get_context("spawn")
    found: list[Result] = []
    while len(found) < len(problems):
        left = [problem.name for problem in problems[len(found) :]]
        results = context.Queue()
        worker = context.Process(target=_work, args=(left, results), daemon=True)
        worker.start()
        for name in left:
            try:
                result = _next(results, worker, limit)
            except queue.Empty:
                group = problems[len(found)].group
                reason = f"no answer in {limit:g} s" if worker.is_alive() else "the process died"
                found.append(Failure(name, group, reason))
                worker.kill()
                break
            found.append(result)
            print(f"{len(found):3} of {len(problems)}: {result}", file=sys.stderr, flush=True)
        worker.join(timeout=10)
    return found


def _next(results: multiprocessing.Queue, worker: multiprocessing.Process, limit: float) -> Result:
    for _ in range(int(limit) + 1):
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if not worker.is_alive():
                break
    raise queue.Empty


def verdict(result: Measurement) -> str:
    """What is not as it should be, in words."""
    faults = []
    if not result.solution_error <= result.bound:
        faults.append("solution misses its bound")
    if result.gradient_error > result.bound:
        faults.append("gradient misses its bound")
    if not result.marked:
        faults.append("irregular, not marked" if result.regular else "regular, but marked")
    return "; ".join(faults) or "ok"


def _number(value: float) -> str:
    return "none exact" if value != value else f"{value:.1e}"


def _row(result: Result) -> tuple[str, ...]:
    if isinstance(result, Failure):
        empty = ("",) * (len(HEADINGS) - 3)
        return (f"`{result.name}`", result.group, *empty, f"**failed: {result.reason}**")
    text = verdict(result)
    return (
        f"`{result.name}`",
        result.group,
        f"{result.variables} x {result.rows}",
        _number(result.solution_error),
        _number(result.gradient_error),
        f"{result.bound:.0e}",
        result.solver,
        "regular" if result.regular else "marked",
        f"{result.seconds:.2f}",
        text if text == "ok" else f"**{text}**",
    )


def summary(results: Sequence[Result]) -> str:
    """How many problems are how accurate."""
    done = [result for result in results if isinstance(result, Measurement)]
    failed = len(results) - len(done)
    slopes = [result for result in done if result.gradient_error == result.gradient_error]
    worst = max(done, key=lambda result: result.solution_error)
    steepest = max(slopes, key=lambda result: result.gradient_error)
    irregular = [result for result in done if not result.expected_regular]
    counts = ", ".join(
        f"{sum(result.within(bound) for result in done)} within {bound:.0e}"
        for bound in (1e-6, 1e-8, 1e-10)
    )
    return (
        f"**{len(results)} problems: {counts}; {failed} gave no answer.** "
        f"{sum(result.within() for result in done)} meet their own bound. "
        f"Largest solution error {worst.solution_error:.1e} (`{worst.name}`), largest gradient "
        f"error {steepest.gradient_error:.1e} (`{steepest.name}`). Of {len(irregular)} problems "
        f"without a derivative {sum(result.marked for result in irregular)} are marked; of "
        f"{len(done) - len(irregular)} with one, "
        f"{sum(not r.marked for r in done if r.expected_regular)} are marked wrongly."
    )


EXPLANATION = """\
Every problem runs at default settings, by `layer.solve` and by a call of the layer, of which the
larger errors count: no solver, tolerance or method is chosen. The errors are relative, the largest
entry of the difference over the largest entry of what is exact, and the largest over outputs or
parameters; a parameter whose effect on the loss (gradient times size) is below 1e-4 of the largest
effect, or of the largest term of the loss, is compared with that. The loss is a fixed random linear
function of the outputs. The bound is 1e-8 for programs with exponential or power cones and 1e-10
for the others.

What is exact comes from closed forms differentiated by automatic or eighth-order central
differences, from linear systems of active sets that are proven right, or from Newton's method on
the problem's own optimality conditions and the implicit function theorem. At a kink the gradient
error is the distance to the mean values of the two one-sided gradients; where the solution is not
unique the solution error says how far the answer is from being one, and no gradient is exact.
Seconds are those of building the layer, solving and differentiating, on one core.

The numbers come from

    OMP_NUM_THREADS=1 python docs/make_accuracy.py
"""


def document(results: Sequence[Result]) -> str:
    """The text of docs/accuracy.md."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *map(_row, results)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return f"# Accuracy\n\n{summary(results)}\n\n{EXPLANATION}\n{table}\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one problem")
    limit = parser.parse_args().limit
    TARGET.write_text(document(run(PROBLEMS, limit)), encoding="utf-8")


if __name__ == "__main__":
    main()
