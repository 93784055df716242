"""The reasons for which x = phi(A x + b) has one solution for every b (IDL 3)."""

from __future__ import annotations

from enum import StrEnum


class Certificate(StrEnum):
    """A condition on A, and on the Lipschitz constant l of phi, that makes A well-posed.

    For blocks of states with different constants l is a diagonal matrix, and l A stands in every
    condition.
    """

    STRICTLY_TRIANGULAR = "strictly triangular"
    INFINITY_NORM = "infinity norm"
    ONE_NORM = "1-norm"
    SPECTRAL_NORM = "2-norm"
    PERRON_FROBENIUS = "Perron-Frobenius"
    TRIANGULAR = "triangular"
    DIAGONAL_LYAPUNOV = "diagonal Lyapunov"
    MONOTONE = "monotone"
    BLOCK_TRIANGULAR = "block triangular"

    @property
    def condition(self) -> str:
        """What holds, as a formula with its source."""
        return _CONDITIONS[self]


_CONDITIONS = {
    Certificate.STRICTLY_TRIANGULAR: "A is strictly triangular after a permutation (IDL 2.2, 3.1)",
    Certificate.INFINITY_NORM: "max_i sum_j |l A_ij| < 1 (IDL eq. 2)",
    Certificate.ONE_NORM: "max_j sum_i |l A_ij| < 1 (IDL eq. 2)",
    Certificate.SPECTRAL_NORM: "the largest singular value of l A is below 1 (IDL eq. 2)",
    Certificate.PERRON_FROBENIUS: (
        "rho(|l A|) < 1, or: ||diag(d) l A diag(d)^-1||_inf < 1 for some d > 0 (IDL 3.2)"
    ),
    Certificate.TRIANGULAR: (
        "A is triangular after a permutation, l A_ii < 1, and phi is nondecreasing (IDL 3.1)"
    ),
    Certificate.DIAGONAL_LYAPUNOV: (
        "S - (l A)' S (l A) is positive definite for some diagonal S > 0 (IDL 3.2)"
    ),
    Certificate.MONOTONE: (
        "S (I - l A) + (I - l A)' S is positive definite for some diagonal S > 0, and phi is "
        "nondecreasing (Revay, Wang and Manchester 2020)"
    ),
    Certificate.BLOCK_TRIANGULAR: (
        "A is block triangular after a permutation and its diagonal blocks are well-posed "
        "(IDL Theorem 1)"
    ),
}
