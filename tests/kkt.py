"""Optimality conditions and certificates of cone programs, by formulas of their own.

How far a point is from a cone K is measured as the smallest t >= 0 for which v + t e lies in K,
for a fixed point e inside K. It is zero exactly on K, of the order of the Euclidean distance
elsewhere, and needs only a test of membership, not a projection.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from declarative_cvx.cones import Cone
from declarative_cvx.host import Element

Member = Callable[[np.ndarray], bool]


def _shift_needed(v: np.ndarray, inside: np.ndarray, member: Member) -> float:
    """Smallest t >= 0 with v + t * inside in the cone, by bisection."""
    if member(v):
        return 0.0
    low, high = 0.0, 1e-12 * max(1.0, np.abs(v).max())
    while not member(v + high * inside):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if member(v + middle * inside) else (middle, high)
    return high


def _in_exp(v: np.ndarray) -> bool:
    x, y, z = v
    if y > 0 and z > 0:
        return bool(x <= y * np.log(z / y))
    return bool(y == 0 and x <= 0 and z >= 0)


def _in_dual_exp(v: np.ndarray) -> bool:
    u, v_, w = v
    if u < 0 and w > 0:
        return bool(np.log(-u) + v_ / u <= 1 + np.log(w))
    return bool(u == 0 and v_ >= 0 and w >= 0)


def _in_power(alpha: float) -> Member:
    def member(v: np.ndarray) -> bool:
        x, y, z = v
        return bool(x >= 0 and y >= 0 and x**alpha * y ** (1 - alpha) >= abs(z))

    return member


def _in_dual_power(alpha: float) -> Member:
    inner = _in_power(alpha)
    return lambda v: inner(v / np.array([alpha, 1 - alpha, 1.0]))


def _matrix(v: np.ndarray, k: int) -> np.ndarray:
    """Symmetric matrix whose lower triangle, by columns and scaled, is v."""
    out = np.zeros((k, k))
    position = 0
    for col in range(k):
        for row in range(col, k):
            out[row, col] = out[col, row] = v[position] / (1 if row == col else np.sqrt(2))
            position += 1
    return out


def distance(cone: Cone, v: np.ndarray, dual: bool = False) -> float:
    """How far v is from the product cone, or from its dual."""
    worst = [0.0]
    zero, rest = v[: cone.zero], v[cone.zero :]
    if not dual:
        worst.extend(np.abs(zero))
    orthant, rest = rest[: cone.nonneg], rest[cone.nonneg :]
    worst.extend(-orthant)
    for dim in cone.soc:
        piece, rest = rest[:dim], rest[dim:]
        worst.append(np.linalg.norm(piece[1:]) - piece[0])
    for k in cone.psd:
        piece, rest = rest[: k * (k + 1) // 2], rest[k * (k + 1) // 2 :]
        worst.append(-np.linalg.eigvalsh(_matrix(piece, k))[0])
    inside = np.array([-1.0, 1.0, 1.0])
    for _ in range(cone.exp):
        piece, rest = rest[:3], rest[3:]
        worst.append(_shift_needed(piece, inside, _in_dual_exp if dual else _in_exp))
    inside = np.array([1.0, 1.0, 0.0])
    for alpha in cone.power:
        piece, rest = rest[:3], rest[3:]
        member = _in_dual_power(alpha) if dual else _in_power(alpha)
        worst.append(_shift_needed(piece, inside, member))
    assert rest.size == 0
    return float(max(worst))


def _size(*arrays: np.ndarray) -> float:
    return max([1e-3, *(float(np.abs(array).max()) for array in arrays if array.size)])


def violations(program: Element, x: np.ndarray, y: np.ndarray, s: np.ndarray) -> dict[str, float]:
    """Relative violation of each optimality condition of a cone program."""
    P = program.P.toarray()
    P = P + np.triu(P, 1).T
    A = program.A.toarray()
    b, q = program.b, program.q
    primal_scale = _size(b, s, A * x)
    dual_scale = _size(q, A.T * y, P * x)
    return {
        "A x + s = b": np.abs(A @ x + s - b).max(initial=0) / primal_scale,
        "P x + q + A'y = 0": np.abs(P @ x + q + A.T @ y).max(initial=0) / dual_scale,
        "s in K": distance(program.cone, s) / primal_scale,
        "y in K*": distance(program.cone, y, dual=True) / _size(y),
        "s'y = 0": abs(s @ y) / _size(s * y, q * x, b * y, x * (P @ x)),
    }


def infeasibility_violation(program: Element, y: np.ndarray) -> float:
    """How far y is from b'y < 0, A'y = 0, y in K*; infinite if b'y >= 0."""
    gain = -(program.b @ y)
    if not gain > 0:
        return np.inf
    return max(np.abs(program.A.T @ y).max(), distance(program.cone, y, dual=True)) / gain


def unboundedness_violation(program: Element, x: np.ndarray) -> float:
    """How far x is from q'x < 0, P x = 0, -A x in K; infinite if q'x >= 0."""
    gain = -(program.q @ x)
    if not gain > 0:
        return np.inf
    P = program.P.toarray()
    P = P + np.triu(P, 1).T
    return max(np.abs(P @ x).max(), distance(program.cone, -(program.A @ x))) / gain
