"""``python -m declarative_cvx``."""

import sys

from declarative_cvx.cli import main

if __name__ == "__main__":
    sys.exit(main())
