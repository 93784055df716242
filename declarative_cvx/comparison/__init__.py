"""Which solver to use, whether its answer is right, and whether its gradient is."""

from declarative_cvx.comparison.candidate import Candidate
from declarative_cvx.comparison.compare import compare
from declarative_cvx.comparison.comparison import Comparison
from declarative_cvx.comparison.row import Row, Timing
from declarative_cvx.comparison.sweep import Sweep

__all__ = ["Candidate", "Comparison", "Row", "Sweep", "Timing", "compare"]
