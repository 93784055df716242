"""The command line: ``python -m declarative_cvx`` or ``declarative-cvx``."""

from declarative_cvx.cli.main import main

__all__ = ["main"]
