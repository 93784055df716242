"""What a kernel found, per batch element."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from declarative_cvx.status import Status


@dataclass(frozen=True, eq=False)
class KernelSolution:
    """The answer of one of the fast kernels (pooling, projections, ...) and its quality.

    Attributes
    ----------
    value : Tensor
        What the function returns: differentiable.
    objective : Tensor, shape ``(*batch,)``
        Minimal value of the objective, in the units of the problem.
    status : Tensor of int64, shape ``(*batch,)``
        Codes of `Status`.
    residual : Tensor, shape ``(*batch,)``
        By how much the conditions for a minimum are violated, relative to the size of the terms
        in them.
    gap : Tensor, shape ``(*batch,)``
        Certified bound on how far the objective is above the global minimum, relative to the
        objective's own scale; 0 for an exact method, NaN where nothing is known.
    regular : Tensor of bool, shape ``(*batch,)``
        Whether the solution is differentiable there (a unique minimum away from breakpoints).
    """

    value: Tensor
    objective: Tensor
    status: Tensor
    residual: Tensor
    gap: Tensor
    regular: Tensor

    @property
    def solved(self) -> Tensor:
        """Whether each element's answer was verified, bool, shape ``(*batch,)``."""
        return self.status == int(Status.OPTIMAL)

    def __repr__(self) -> str:
        count, total = int(self.solved.sum()), self.status.numel()
        return (
            f"KernelSolution({count} of {total} solved, "
            f"largest residual {_largest(self.residual)}, largest gap {_largest(self.gap)}, "
            f"{int((~self.regular).sum())} irregular)"
        )


def _largest(values: Tensor) -> str:
    return f"{float(values.max()):.1e}" if values.numel() else "none"
