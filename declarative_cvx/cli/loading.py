"""A user's file that builds a problem."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from declarative_cvx.errors import SpecificationError

DEFAULT = "build"
NAMES = ("problem", "parameters", "values", "variables")


def load(target: str) -> Callable[..., Any]:
    """The function named by ``FILE.py`` or ``FILE.py:function``.

    Raises
    ------
    SpecificationError
        If there is no such file or function, or the file cannot be run.
    """
    path, _, name = target.rpartition(":") if ".py:" in target else (target, "", "")
    module = _imported(Path(path))
    found = getattr(module, name or DEFAULT, None)
    if not callable(found):
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        known = f"It has {', '.join(own)}." if own else "It has no functions."
        raise SpecificationError(
            f"{path} has no function {name or DEFAULT!r}. {known} Write {path}:FUNCTION, a "
            f"function that returns ({', '.join(NAMES[:3])})."
        )
    return found  # type: ignore[no-any-return]


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise SpecificationError(f"there is no file {str(path)!r}.")
    # By its name, so that the process that measures can import it too.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        return importlib.import_module(path.stem)
    except Exception as error:
        raise SpecificationError(
            f"{path} cannot be run: {type(error).__name__}: {error}"
        ) from error


def built(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """(problem, parameters, values, variables or None) that a function returns."""
    found = function(*arguments)
    if isinstance(found, Mapping):
        unknown = set(found) - set(NAMES)
        missing = set(NAMES[:3]) - set(found)
        if unknown or missing:
            wrong = f"unknown {sorted(unknown)}" if unknown else f"missing {sorted(missing)}"
            raise SpecificationError(f"{function.__name__}() returned a dict: {wrong}.")
        return tuple(found.get(name) for name in NAMES)
    if not isinstance(found, tuple) or len(found) not in (3, 4):
        raise SpecificationError(
            f"{function.__name__}() returned {type(found).__name__}, but a tuple or dict of "
            f"{', '.join(NAMES[:3])} and, if wanted, variables is expected."
        )
    return (*found, None)[:4]
