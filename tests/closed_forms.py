"""Solutions, duals and optimal values in closed form, for torch to differentiate.

Outputs are those of the cases of the same names in `problems`, then the optimal value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from problems import Case, case_named, solve_qp_by_enumeration
from torch import Tensor

Outputs = tuple[Tensor, ...]


# Samples with more active constraints than the first one has.
SEEDS = {"inequality_qp_with_psd_parameter": 3}


def values_of(case: Case) -> tuple[np.ndarray, ...]:
    return case.draw(SEEDS.get(case.name, 0))


def symmetric(C: Tensor) -> Tensor:
    return (C + C.mT) / 2


def _equality_qp(A: Tensor, b: Tensor, c: Tensor) -> Outputs:
    multiplier = torch.linalg.solve(A @ A.T, -(A @ c) - b)
    x = -c - A.T @ multiplier
    return x, multiplier, x @ x / 2 + c @ x


G = torch.tensor(
    [[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64
)


def _inequality_qp(P: Tensor, q: Tensor, h: Tensor) -> Outputs:
    """The active set is that of the sample; around it the problem is an equality QP."""
    sample = values_of(case_named("inequality_qp_with_psd_parameter"))
    _, found = solve_qp_by_enumeration(2 * sample[0], sample[1], np.array(G.tolist()), sample[2])
    active = np.flatnonzero(found).tolist()
    assert active
    P, rows = symmetric(P), G[active]
    corner = torch.zeros((len(active), len(active)), dtype=torch.float64)
    kkt = torch.cat([torch.cat([2 * P, rows.T], 1), torch.cat([rows, corner], 1)])
    solution = torch.linalg.solve(kkt, torch.cat([-q, h[active]]))
    x = solution[:3]
    place = torch.eye(4, dtype=torch.float64)[:, active]
    return x, place @ solution[3:], x @ P @ x + q @ x


def _vertex(A: Tensor, b: Tensor, c: Tensor) -> Outputs:
    x = torch.linalg.solve(A, b)
    return x, torch.linalg.solve(A.T, -c), c @ x


def _ball(c: Tensor, r: Tensor) -> Outputs:
    norm = (c * c).sum().sqrt()
    return -r * c / norm, norm[None], c, -r * norm


def _outside_a_ball(v: Tensor, r: Tensor) -> Outputs:
    norm = (v * v).sum().sqrt()
    return v * r / norm, (norm - r) ** 2


def _positive_part(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric(C))
    return (vectors * values.clamp(min=0)) @ vectors.T


def _nearest_psd(C: Tensor) -> Outputs:
    negative = _positive_part(-C)
    return _positive_part(C), negative, (negative**2).sum() / 2


def _smallest_eigenvalue(C: Tensor) -> Outputs:
    C = symmetric(C)
    values, vectors = torch.linalg.eigh(C)
    vector, eye = vectors[:, :1], torch.eye(len(C), dtype=C.dtype)
    return vector @ vector.T, C - values[0] * eye, values[0]


def _psd_ball(C: Tensor) -> Outputs:
    negative = _positive_part(-C)
    norm = (negative**2).sum().sqrt()
    return negative / norm, -norm


def _exponential(a: Tensor, b: Tensor) -> Outputs:
    e = torch.exp(a / b)
    return b * e, -e, (a / b - 1) * e, torch.ones_like(a), b * e


def _three_norm(c: Tensor) -> Outputs:
    x = c.sign() * c.abs().sqrt()
    size = (c.abs() ** 1.5).sum()
    return x / size ** (1 / 3), size ** (2 / 3)


def _geometric_mean(p: Tensor, q: Tensor, b: Tensor) -> Outputs:
    x, y = 0.3 * b / p, 0.7 * b / q
    z = x**0.3 * y**0.7
    return x, y, z, z / b, z


def _psd_diagonal(c: Tensor, b: Tensor) -> Outputs:
    X = torch.stack([torch.stack([0.4 * b, c]), torch.stack([c, 0.6 * b])])
    return X, (0.4 * b) ** 0.4 * (0.6 * b) ** 0.6


def _inverse(S: Tensor) -> Outputs:
    S = symmetric(S)
    return torch.linalg.inv(S), -torch.logdet(S) - 3


def _entropy(p: Tensor) -> Outputs:
    return p / p.sum(), -torch.log(p.sum()) - 1 + p.sum()


def _logarithms(w: Tensor, r: Tensor) -> Outputs:
    x = r * torch.sqrt(w / w.sum())
    return x, w @ torch.log(x)


def _rectangle(a: Tensor, p: Tensor, q: Tensor) -> Outputs:
    return torch.sqrt(a * q / p), torch.sqrt(a * p / q), 2 * torch.sqrt(a * p * q)


FORMS: dict[str, Callable[..., Outputs]] = {
    "linear_program_vertex": _vertex,
    "equality_constrained_qp": _equality_qp,
    "inequality_qp_with_psd_parameter": _inequality_qp,
    "linear_over_a_ball_with_dual": _ball,
    "ball_projection_with_quadratic_objective": _outside_a_ball,
    "nearest_psd_matrix_with_dual": _nearest_psd,
    "smallest_eigenvalue_of_order_3": _smallest_eigenvalue,
    "linear_over_psd_matrices_in_a_ball": _psd_ball,
    "softmax_as_entropy_maximisation": lambda c: (torch.softmax(c, 0), torch.logsumexp(c, 0)),
    "exponential_cone_with_duals": _exponential,
    "relative_entropy_projection": _entropy,
    "logarithms_over_a_ball": _logarithms,
    "linear_over_the_ball_of_the_3_norm": _three_norm,
    "weighted_geometric_mean_under_a_budget": _geometric_mean,
    "geometric_mean_of_a_psd_diagonal": _psd_diagonal,
    "inverse_as_log_determinant": _inverse,
    "cheapest_rectangle_of_given_area": _rectangle,
}
