"""Write the tables of README.md that follow from the code.

``python docs/make_tables.py`` rewrites README.md; with ``--check`` it only says whether the
tables are up to date, and exits with 1 if they are not.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from declarative_cvx.backends import BACKENDS, Backend
from declarative_cvx.cones import KINDS

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- solvers:begin -->", "<!-- solvers:end -->"
HEADINGS = (
    "Solver", "Cones", "Quadratic objective", "Batch in one call", "Warm start", "Devices",
    "Licence",
)  # fmt: skip


def solver_table() -> str:
    """The solvers of the library and what they can do, as a Markdown table."""
    rows = [_row(backend) for backend in BACKENDS.values()]
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(backend: type[Backend]) -> tuple[str, ...]:
    able = backend.capabilities
    cones = [kind for kind in KINDS if kind in able.cones]
    return (
        f"`{backend.__name__}`",
        "all" if len(cones) == len(KINDS) else ", ".join(cones),
        "as it is" if able.quadratic else "rewritten",
        _yes(able.batched),
        _yes(able.warm_start),
        ", ".join(able.devices),
        able.licence,
    )


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def with_tables(text: str) -> str:
    """The text of README.md with its tables replaced by those that the code gives.

    Raises
    ------
    ValueError
        If the text does not hold each marker once.
    """
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"README.md must hold {marker} once, holds it {text.count(marker)}x.")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{solver_table()}\n{END}", text)


def main() -> int:
    """Check or write README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    new = with_tables(text)
    if text == new:
        return 0
    if check:
        print("README.md is out of date; run: python docs/make_tables.py", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
