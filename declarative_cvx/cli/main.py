"""Commands and their options."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from declarative_cvx._version import __version__
from declarative_cvx.cli import demo, doctor
from declarative_cvx.cli.loading import built, load
from declarative_cvx.comparison import Comparison, Sweep, compare
from declarative_cvx.errors import BackendError, DeclarativeError

# Exit codes: a right answer was found, none was, the command was wrong.
RIGHT, WRONG, MISUSED = 0, 1, 2
FORMATS = ("table", "markdown", "json", "html")

_EXAMPLES = """examples:
  declarative-cvx doctor
  declarative-cvx compare portfolio.py
  declarative-cvx compare portfolio.py:daily --solvers scs,clarabel --batch 256 --plot errors.png
  declarative-cvx compare portfolio.py --sweep batch=1,16,256 --format markdown --output table.md
  declarative-cvx demo

exit codes: 0 a solver is right (doctor: all installed ones work), 1 none is, 2 wrong usage
"""

_FILE_HELP = """FILE.py holds a function build() (or another, named after a colon) that returns
(problem, parameters, values) or (problem, parameters, values, variables), or a dict of these:

  import cvxpy as cp, numpy as np

  def build():
      x, b = cp.Variable(3), cp.Parameter(3)
      problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x >= 0])
      return problem, [b], [np.random.default_rng(0).normal(size=(16, 3))]

With --sweep size=10,100 it is called with the size.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except DeclarativeError as error:
        print(f"declarative-cvx: {' '.join(str(error).split())}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="declarative-cvx",
        description="Optimisation problems as PyTorch layers: what is installed, which solver.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("doctor", help="what is installed and works, and what is missing")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)
    command = commands.add_parser(
        "compare",
        help="which solver is right and fastest on a problem of yours",
        epilog=_FILE_HELP,
        formatter_class=raw,
    )
    _add_compare_options(command)
    command.set_defaults(run=_compare)
    command = commands.add_parser("demo", help="what the library does, in half a minute")
    command.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw the comparison into a file"
    )
    command.set_defaults(run=_demo)
    return parser


def _add_compare_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("file", metavar="FILE.py[:FUNCTION]", help="where the problem is built (see below)")
    add("--solvers", type=_names, help="names with commas; default: all that are installed")
    add("--derivatives", type=_names, help="names with commas; default: all")
    add("--batch", type=int, metavar="N", help="repeat the values until there are N elements")
    add("--repeats", type=int, default=5, metavar="N", help="timed calls of each (default: 5)")
    add("--time-limit", type=float, default=60.0, metavar="S",
        help="seconds a row (default: 60); 0 is none, and no process for each row")  # fmt: skip
    add("--accuracy", type=float, default=1e-6, help="what counts as right (default: 1e-6)")
    add("--sweep", type=_sweep, metavar="WHAT=A,B,..", help="vary batch, tol or size")
    add("--format", choices=FORMATS, default="table", help="default: table")
    add("--output", type=Path, metavar="PATH", help="write the table into a file")
    add("--plot", type=Path, metavar="PATH", help="draw a picture into a file")
    add("--gp", action="store_true", help="read the problem as a geometric program")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names separated by commas are expected")
    return names


def _sweep(text: str) -> dict[str, list[float]]:
    name, _, values = text.partition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form batch=1,16,256") from None
    return {name: [int(v) if v == int(v) else v for v in numbers]}


def _doctor(options: argparse.Namespace) -> int:
    found = doctor.report()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        doctor.show(found, Console())
    broken = [s for s in found["solvers"] if s["version"] and s["works"] != "yes"]
    return WRONG if broken else RIGHT


def _compare(options: argparse.Namespace) -> int:
    function = load(options.file)
    given: dict[str, Any] = {
        "solvers": options.solvers,
        "derivatives": options.derivatives,
        "repeats": options.repeats,
        "time_limit": options.time_limit or None,
        "progress": sys.stderr.isatty(),
        **({"gp": True} if options.gp else {}),
    }
    sweep = options.sweep
    if sweep is None and options.batch is not None:
        sweep = {"batch": [options.batch]}
    if sweep is not None and "size" in sweep:
        found = compare(lambda size: built(function, size), sweep=sweep, **given)
    else:
        found = compare(*built(function), sweep=sweep, **given)
    if isinstance(found, Sweep) and len(found.values) == 1:
        found = found.comparisons[0]
    _write(found, options)
    return _verdict(found, options.accuracy)


def _write(found: Comparison | Sweep, options: argparse.Namespace) -> None:
    renderings = {
        "table": found.__str__,
        "markdown": found.to_markdown,
        "json": found.to_json,
        "html": found._repr_html_,
    }
    text = renderings[options.format]()
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n")
    if options.plot is not None:
        found.plot(options.plot)


def _verdict(found: Comparison | Sweep, accuracy: float) -> int:
    """Say which solver to use, on the standard error: the standard output is the table."""
    comparisons = {"": found} if isinstance(found, Comparison) else {
        f"{found.name} = {value}: ": one
        for value, one in zip(found.values, found.comparisons, strict=True)
    }  # fmt: skip
    code = RIGHT
    for prefix, comparison in comparisons.items():
        try:
            row = comparison.best_row(accuracy)
        except BackendError as error:
            print(f"{prefix}{error}", file=sys.stderr)
            code = WRONG
            continue
        print(
            f"{prefix}fastest that is right to {accuracy:.0e}: {row.solver}, derivative "
            f"{row.derivative}, {row.seconds * 1e3:.1f} ms",
            file=sys.stderr,
        )
    return code


def _demo(options: argparse.Namespace) -> int:
    console = Console()
    found = demo.run(console)
    console.print(found.table(console.width))
    if options.plot is not None:
        found.plot(options.plot)
    return _verdict(found, 1e-6)
