"""Whether derivatives are worked on as sparse or as full matrices."""

from __future__ import annotations

from declarative_cvx.nonconvex.minimization.conjugate_gradients import is_large
from declarative_cvx.nonconvex.minimization.evaluation import row_count
from declarative_cvx.nonconvex.minimization.program import NonlinearProgram

# Entries of a batch that sparse matrices have to save: their operations are more, and cost more
# for each entry (both measured).
_WORTHWHILE, _DEARER = 90_000, 2


def sparse_is_faster(program: NonlinearProgram, batch: int) -> bool:
    """Whether sparse matrices save enough of the work on full ones."""
    if is_large(program) or program.separated is None:
        return False
    least = _WORTHWHILE / batch
    full = full_entries(program)
    return full >= least and full - _DEARER * sparse_entries(program) >= least


def entries(program: NonlinearProgram) -> float:
    """Numbers of an element that are worked on at once."""
    return sparse_entries(program) if program.sparse else full_entries(program)


def full_entries(program: NonlinearProgram) -> int:
    """Entries of Jacobian and Hessian."""
    return program.variables * (program.variables + row_count(program))


def sparse_entries(program: NonlinearProgram) -> float:
    """Those that are not zero everywhere, and those of factors; infinite where these are full."""
    assert program.separated is not None
    sparse = program.separated.sparse
    if sparse.plan is None:
        return float("inf")
    return len(sparse.jacobian.places) + len(sparse.hessian.places) + sparse.plan.elimination.size
