"""What is installed here, what works, and what to install for more."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import cvxpy as cp
import threadpoolctl
import torch
from rich.console import Console
from rich.table import Table

from declarative_cvx.backends.base import Backend
from declarative_cvx.backends.table import BACKENDS
from declarative_cvx.cones import KINDS
from declarative_cvx.layer import DeclarativeLayer
from declarative_cvx.nonconvex.nlp_solver import NLP_SOLVERS

# What other packages are for.
EXTRAS = {
    "matplotlib": "pictures: Comparison.plot, the examples",
    "scikit-learn": "estimators, data of the examples",
    "cvxpylayers": "the other side of benchmarks/convex.py",
}


@dataclass(frozen=True)
class Finding:
    """One solver.

    Attributes
    ----------
    solver, package, licence : str
    version : str
        Empty if it is not installed.
    works : str
        "yes", or what went wrong on a problem with two variables.
    takes : str
        Cones, in words.
    quadratic, batched, warm_start : bool
    devices : tuple of str
    install : str
        The command that installs it, if it is missing.
    """

    solver: str
    package: str
    licence: str
    version: str
    works: str
    takes: str
    quadratic: bool
    batched: bool
    warm_start: bool
    devices: tuple[str, ...]
    install: str


def examine(backend: type[Backend]) -> Finding:
    """Look at one solver, and have it solve a small problem."""
    can = backend.capabilities
    installed = backend.is_installed()
    return Finding(
        backend.name,
        can.package,
        can.licence,
        _version(can.package),
        _trial(backend) if installed else "not installed",
        "all" if can.cones >= set(KINDS) else ", ".join(sorted(can.cones)),
        can.quadratic,
        can.batched,
        can.warm_start,
        can.devices,
        "" if installed else backend.how_to_install(),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _trial(backend: type[Backend]) -> str:
    """Whether the solver projects a point onto the nonnegative orthant."""
    x, b = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0])
    layer = DeclarativeLayer(problem, [b], [x], solver=backend())
    solution = layer.solve(torch.tensor([1.0, -1.0], dtype=torch.float64))
    if not bool(solution.solved.all()):
        return solution.describe_failures().splitlines()[0]
    (found,) = solution.variables
    right = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return "yes" if torch.allclose(found, right, atol=1e-6) else f"wrong answer {found.tolist()}"


def environment() -> dict[str, Any]:
    """Versions, devices and threads."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    pools = threadpoolctl.threadpool_info()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cvxpy": cp.__version__,
        "devices": ["cpu", *names],
        "torch_threads": torch.get_num_threads(),
        "blas": {f"{p['internal_api']} ({p['prefix']})": p["num_threads"] for p in pools},
        "missing": {name: use for name, use in EXTRAS.items() if not _version(name)},
    }


def report() -> dict[str, Any]:
    """Everything, as dictionaries and lists."""
    findings = [examine(backend) for backend in BACKENDS.values()]
    nlp = [
        {"solver": name, "package": solver.package, "version": _version(solver.package)}
        for name, solver in NLP_SOLVERS.items()
    ]
    solvers = [asdict(finding) for finding in findings]
    return {**environment(), "solvers": solvers, "nlp_solvers": nlp}


def show(found: dict[str, Any], console: Console) -> None:
    """Print a report for reading."""
    blas = ", ".join(f"{name}: {threads}" for name, threads in found["blas"].items())
    console.print(
        f"Python {found['python']}, torch {found['torch']} ({found['torch_threads']} threads), "
        f"cvxpy {found['cvxpy']}"
    )
    console.print(f"Devices: {', '.join(found['devices'])}")
    console.print(f"Threads of linear algebra: {blas}")
    table = Table(title="Solvers of convex problems")
    for column in ("solver", "version", "works", "cones", "quadratic", "batched", "warm start"):
        table.add_column(column, no_wrap=column == "solver")
    for solver in found["solvers"]:
        style = "" if solver["works"] == "yes" else "red"
        flags = [_word(solver[key]) for key in ("quadratic", "batched", "warm_start")]
        cones = (solver["solver"], solver["version"], solver["works"], solver["takes"])
        table.add_row(*cones, *flags, style=style)
    console.print(table)
    there = [f"{s['solver']} {s['version']}" for s in found["nlp_solvers"] if s["version"]]
    console.print(
        "Problems that are not convex are minimised in torch and need no solver. Other solvers of "
        f"nonlinear programs, by name: {', '.join(there) or 'none installed'}."
    )
    commands = [solver["install"] for solver in found["solvers"] if solver["install"]]
    commands += [
        f"pip install {solver['package']}  # {solver['solver']}, for problems that are not convex"
        for solver in found["nlp_solvers"]
        if not solver["version"]
    ]
    commands += [f"pip install {name}  # {use}" for name, use in found["missing"].items()]
    if commands:
        console.print("For more:")
        for command in commands:
            console.print(f"  {command}", markup=False, highlight=False)


def _word(flag: bool) -> str:
    return "yes" if flag else "no"
