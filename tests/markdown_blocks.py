"""The Python blocks of a Markdown file, and a run of all of them in order."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def python_blocks(text: str) -> Iterator[tuple[int, str]]:
    """(number of lines before the code, code) of each Python block."""
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start(1)].count("\n"), match[1]


def run_blocks(path: Path) -> dict[str, Any]:
    """What the blocks of a file have defined, run one after the other in one namespace."""
    namespace: dict[str, Any] = {}
    for before, code in python_blocks(path.read_text(encoding="utf-8")):
        # Blank lines in front, so that a traceback shows the line numbers of the file.
        exec(compile("\n" * before + code, str(path), "exec"), namespace)
    return namespace


def promises(text: str) -> list[str]:
    """What comments after a ``print`` say that it prints, up to an ellipsis."""
    code = "".join(code for _, code in python_blocks(text))
    comments = re.findall(r"^ *print\(.*\)  # (.+)$", code, re.MULTILINE)
    return [comment.split("...")[0].strip() for comment in comments]
