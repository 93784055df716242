"""States on kinks of their activation, where the derivatives on the two sides differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from declarative_cvx.irregular import complain
from declarative_cvx.nonconvex.fixed_points.settings import Settings
from declarative_cvx.nonconvex.fixed_points.solution import KINK
from declarative_cvx.nonconvex.implicit.activations import Activation
from declarative_cvx.nonconvex.implicit.adjoint import each_slice
from declarative_cvx.nonconvex.implicit.product import affine, sizes_of_terms
from declarative_cvx.transforms import apply_function


def kinked_at(phi: Activation, x: Tensor, c: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Elements whose state x lies on a kink of phi, bool, (batch,)."""
    x, c, *matrices = (v.detach() for v in (x, c, *matrices))
    return _kinked(phi, affine(x, matrices, c), x, c, matrices)


def _kinked(phi: Activation, z: Tensor, x: Tensor, c: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Elements whose state lies, to rounding, where the slope of phi jumps, bool, (batch,)."""
    if not (phi.componentwise and phi.piecewise_linear):
        return torch.zeros_like(z[:, 0], dtype=torch.bool)
    kind = torch.finfo(z.dtype)
    reach = (kind.eps * (c.abs() + sizes_of_terms(x, matrices))).clamp(min=kind.tiny)
    if phi.positively_homogeneous:
        return (z.abs() <= reach).any(1)
    return (phi.slope(z + reach) != phi.slope(z - reach)).any(1)


def _far_from_kinks(phi: Activation, z: Tensor) -> bool:
    """Whether a look that costs little says so."""
    if not (phi.componentwise and phi.piecewise_linear):
        return True
    size, kind = z.abs(), torch.finfo(z.dtype)
    reach = (kind.eps * size.amax(1)).clamp(min=kind.tiny)
    return phi.positively_homogeneous and bool((size.amin(1) > reach).all())


class KinkComplaint(torch.autograd.Function):
    """Looks for elements on a kink, also from inside vmap."""

    @staticmethod
    def forward(
        z: Tensor, x: Tensor, c: Tensor, solved: Tensor, phi: Any, settings: Settings, *rest: Tensor
    ) -> Tensor:
        if not _far_from_kinks(phi, z):
            at = torch.nonzero(_kinked(phi, z, x, c, rest) & solved)[:, 0].tolist()
            complain(at, [KINK] * len(at), settings.on_irregular)
        return z.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        size = info.batch_size
        if any(dim is not None for dim in in_dims[6:]):
            for one in each_slice(size, in_dims, *inputs):
                apply_function(KinkComplaint, *one)
            return inputs[0].new_zeros(()), None
        folded = (
            v.expand(size, *v.shape) if dim is None else v.movedim(dim, 0)
            for v, dim in zip(inputs[:4], in_dims, strict=False)
        )
        return apply_function(KinkComplaint, *(v.flatten(0, 1) for v in folded), *inputs[4:]), None
