"""Exceptions and warnings of the library.

Every message names the thing that is wrong (its name, index and value), what was
expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeclarativeError(Exception):
    """Base class of every error that the library raises on purpose."""


class SpecificationError(DeclarativeError, ValueError):
    """The problem, or the way a layer is built from it, cannot be accepted."""


class ParameterError(DeclarativeError, ValueError):
    """A tensor passed for a parameter has the wrong shape, type or values."""


class BackendError(DeclarativeError, ValueError):
    """A solver or derivative is unknown, misconfigured or cannot take the problem."""


class MissingBackendError(BackendError, ImportError):
    """A solver is known to the library but its Python package is not installed."""


class SolveError(DeclarativeError, RuntimeError):
    """A solver did not return a verified solution for some element of the batch."""


class DerivativeModeError(DeclarativeError, NotImplementedError):
    """A way of differentiating was asked for that would give a wrong number."""


class IrregularError(DeclarativeError, ArithmeticError):
    """A gradient was asked for where the solution map has no derivative."""


class IrregularWarning(UserWarning):
    """A gradient was asked for where the solution map has no derivative.

    What is returned for such an element is a one-sided derivative (of a constraint that is active
    with a zero multiplier) or the least-squares solution of the adjoint system.
    """


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Sentence naming the candidate closest to a misspelt name, then all of them.

    Parameters
    ----------
    name : str
        What was given.
    candidates : iterable of str
        What would have been right.
    """
    known = sorted(candidates)
    by_lower = {candidate.lower(): candidate for candidate in known}
    match = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    hint = f"Did you mean {by_lower[match[0]]!r}? " if match else ""
    return f"{hint}Known: {', '.join(known)}."
