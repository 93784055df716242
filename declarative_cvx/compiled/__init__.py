"""The compiled part of the package: small dense programs and linear systems, in batches."""

from __future__ import annotations

import importlib.util
from functools import cache

MODULE = "declarative_cvx.compiled._programs"


@cache
def is_available() -> bool:
    """Whether it was compiled when the package was installed."""
    return importlib.util.find_spec(MODULE) is not None
