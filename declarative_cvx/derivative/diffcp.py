"""The derivative that the package diffcp computes (Agrawal et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch

from declarative_cvx.derivative.base import Adjoint, Derivative
from declarative_cvx.epigraph import Epigraph
from declarative_cvx.host import Element, HostProgram
from declarative_cvx.program import ConeProgram, Point, Structure

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Diffcp(Derivative):
    """Derivative of the homogeneous self-dual embedding, one element at a time, on the CPU.

    It is applied to the solution that is given, whoever found it; a quadratic objective is
    rewritten with a second-order cone first. Two faults of the package are avoided: upstream
    gradients are scaled to size one (it takes those near 1e-9 for zero), and its iterative
    solver, which stops early on dense problems without saying so, is not used. It has no power
    cone. It can be differentiated once.
    """

    name: ClassVar[str] = "diffcp"

    def obstacle(self, structure: Structure) -> str | None:
        if "power" in structure.cone.kinds:
            return 'diffcp has no derivative for the power cone; use derivative="implicit"'
        return None

    def adjoint(self, program: ConeProgram, point: Point, grads: Point) -> Adjoint:
        if not program.batch:
            return Adjoint(grads[0], grads[1], grads[0].new_zeros(0))
        host = HostProgram.of(program)
        x, y, s = (v.detach().cpu().numpy() for v in point)
        grad_x, grad_y, grad_s = (g.detach().cpu().numpy() for g in grads)
        results = [
            _adjoint_element(host.element(i), (x[i], y[i], s[i]), (grad_x[i], grad_y[i], grad_s[i]))
            for i in range(host.batch)
        ]
        device = program.q.device
        q, b, residual = (
            torch.as_tensor(np.stack(column), device=device)
            for column in zip(*results, strict=True)
        )
        return Adjoint(q, b, residual)


def _adjoint_element(element: Element, point: _Arrays, grads: _Arrays) -> _Arrays:
    """Gradients with respect to q and b, and the residual, for one program."""
    if element.P.nnz == 0:
        return _adjoint_linear(element, point, grads)
    epigraph = Epigraph.of(element)
    new_rows = np.zeros(epigraph.factor.shape[0] + 2)
    grad_x, grad_y, grad_s = grads
    extended = (
        np.append(grad_x, 0.0),
        np.insert(grad_y, epigraph.at, new_rows),
        np.insert(grad_s, epigraph.at, new_rows),
    )
    q, b, residual = _adjoint_linear(epigraph.element, epigraph.extend(*point), extended)
    return q[:-1], epigraph.drop_rows(b), residual


def _adjoint_linear(element: Element, point: _Arrays, grads: _Arrays) -> _Arrays:
    """The same for a program with a linear objective, by diffcp's dense linear system."""
    from diffcp import _diffcp

    x, y, s = point
    grad_x, grad_y, grad_s = grads
    cones = _cones(element)
    embedding = sp.bmat(
        [
            [None, element.A.T, element.q[:, None]],
            [-element.A, None, element.b[:, None]],
            [-element.q[None, :], -element.b[None, :], None],
        ]
    ).toarray()
    matrix = _diffcp.M_dense(embedding, cones, x, y - s, 1.0)
    projection = _diffcp.dprojection(y - s, cones, True)
    scale_grad = -(x @ grad_x + y @ grad_y + s @ grad_s)
    rhs = np.concatenate([grad_x, projection.rmatvec(grad_y + grad_s) - grad_s, [scale_grad]])
    unit = np.abs(rhs).max()
    if unit == 0:
        return np.zeros_like(x), np.zeros_like(y), np.zeros(())
    r = _diffcp._solve_adjoint_derivative_dense(matrix, matrix.T, rhs / unit)
    residual = np.abs(matrix.T @ r - rhs / unit).max()
    r = r * unit
    grad_q = x * r[-1] - r[: x.size]
    grad_b = y * r[-1] - r[x.size : -1]
    return grad_q, grad_b, np.asarray(residual)


def _cones(element: Element) -> list[Any]:
    from diffcp import cones

    cone = element.cone
    sizes = {"z": cone.zero, "l": cone.nonneg, "q": list(cone.soc), "s": list(cone.psd)}
    return cones.parse_cone_dict_cpp(cones.parse_cone_dict({**sizes, "ep": cone.exp}))
