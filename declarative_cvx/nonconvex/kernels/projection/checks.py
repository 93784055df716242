"""Numbers that a projection refuses, named by their index."""

from __future__ import annotations

import torch
from torch import Tensor

from declarative_cvx.errors import ParameterError


def check_finite(
    x: Tensor,  # (*batch, n)
    total: Tensor,  # of any shape, not finite if an entry of x is not
) -> None:
    """Refuse points with entries that are not numbers or infinite."""
    if bool(total.isfinite().all()):
        return
    bad = ~x.isfinite()
    if bool(bad.any()):
        *element, entry = _first(bad)
        raise ParameterError(
            f"x is {float(x[bad][0])} at entry {entry} of {_element(element)}, "
            f"{int(bad.sum())} such entries in all. A projection needs finite numbers; "
            "look for the operation that produced them."
        )


def check_radius(
    radius: Tensor,  # (*batch, 1)
) -> None:
    """Refuse radii that are not positive and finite."""
    good = (radius > 0) & (radius < torch.inf)
    if not bool(good.all()):
        *element, _ = _first(~good)
        raise ParameterError(
            f"radius is {float(radius[~good][0])} for {_element(element)} (in {radius.dtype}); it "
            "must be positive and finite. Make it so, for example by softplus."
        )


def check_order(
    lower: Tensor,  # (*batch, n)
    upper: Tensor,  # (*batch, n)
) -> None:
    """Refuse boxes that are empty, and bounds that are not numbers."""
    bad = ~(lower <= upper)
    if bool(bad.any()):
        *element, entry = _first(bad)
        low, high = float(lower[bad][0]), float(upper[bad][0])
        raise ParameterError(
            f"lower is {low} and upper is {high} at entry {entry} of {_element(element)}; lower "
            "must not exceed upper. Exchange them, or check where they come from."
        )


def _first(bad: Tensor) -> list[int]:
    """Index of the first True."""
    return bad.nonzero()[0].tolist()


def _element(index: list[int]) -> str:
    return f"batch element {tuple(index)}" if index else "the point"
