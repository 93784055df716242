"""`declarative_cvx.implicit` is `declarative_cvx.nonconvex.implicit`, by a shorter name."""

import sys

from declarative_cvx.nonconvex import implicit

sys.modules[__name__] = implicit
