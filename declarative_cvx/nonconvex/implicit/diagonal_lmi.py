"""Linear matrix inequalities in a diagonal matrix S > 0, solved through CVXPY."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.linalg

# Order up to which an interior-point method is fast (0.3 s; at twice that, 50 s against 2 s).
SMALL = 40

_EXACT: dict[str, Any] = {"solver": cp.CLARABEL}
_FIRST_ORDER: dict[str, Any] = {"solver": cp.SCS, "eps": 1e-5, "max_iters": 5000}

Form = Callable[[cp.Expression, np.ndarray], cp.Expression]


def lyapunov_scaling(
    M: np.ndarray,  # (n, n)
) -> np.ndarray | None:
    """D > 0 for which ||diag(d) M diag(d)^-1||_2 is small: S - M'SM > 0 with S = diag(d)^2 if < 1.

    Returns
    -------
    array, shape (n,), or None
        A proposal, to be verified; None if there can be none or the solver gave up.
    """
    if max(abs(np.linalg.eigvals(M))) >= 1:
        return None
    balanced, balance = _balanced(M)
    if np.linalg.norm(balanced, 2) < 1:
        return 1 / balance
    return _scaling(M, lambda S, N: S - N.T @ S @ N)


def monotone_scaling(
    M: np.ndarray,  # (n, n)
) -> np.ndarray | None:
    """D > 0 for which diag(d) (I - M) diag(d)^-1 has a positive definite symmetric part.

    Then S (I - M) + (I - M)'S > 0 with S = diag(d)^2. Returns as `lyapunov_scaling` does.
    """
    eigenvalues = np.linalg.eigvals(M)
    if max(eigenvalues.real[abs(eigenvalues.imag) == 0], default=0) >= 1 or max(np.diag(M)) >= 1:
        return None
    balanced, balance = _balanced(M)
    if np.linalg.eigvalsh((balanced + balanced.T) / 2)[-1] < 1:
        return 1 / balance
    return _scaling(M, lambda S, N: 2 * S - S @ N - N.T @ S)


def _scaling(M: np.ndarray, form: Form) -> np.ndarray | None:
    """sqrt(s) for the s <= 1 with which the least eigenvalue of the form is greatest."""
    balanced, balance = _balanced(M)
    n = len(M)
    s, least = cp.Variable(n, nonneg=True), cp.Variable()
    matrix = form(cp.diag(s), balanced)
    problem = cp.Problem(
        cp.Maximize(least), [(matrix + matrix.T) / 2 - least * np.eye(n) >> 0, s <= 1]
    )
    with warnings.catch_warnings():
        # Its answer is verified by those who asked for it.
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        try:
            problem.solve(**(_EXACT if n <= SMALL else _FIRST_ORDER))
        except cp.error.SolverError:
            return None
    if s.value is None or not np.all(s.value > 0):
        return None
    return np.sqrt(s.value) / balance


def _balanced(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """T^-1 M T with rows and columns of similar norms, and the diagonal of T."""
    balanced, (balance, _) = scipy.linalg.matrix_balance(M, permute=False, separate=True)
    return balanced, balance
