"""Rotations, directions and positions from measurements: problems of vision and robotics."""

from __future__ import annotations

import cvxpy as cp
import numpy as np

from nonconvex_collection.geometry import normal
from nonconvex_collection.problem import Arrays, Built, Collector

PROBLEMS = Collector()
_UPPER = tuple(zip(*np.triu_indices(3), strict=True))


# Eigenvectors and singular vectors


def _last_direction(A: np.ndarray) -> Arrays:
    v = np.linalg.svd(A)[2][-1]
    return (v * np.sign(v[-1]),)


def _first_direction(A: np.ndarray) -> Arrays:
    v = np.linalg.svd(A)[2][0]
    return (v * np.sign(v[-1]),)


_TABLE = normal(1, 8, 3)
_SPREAD = np.linalg.svd(_TABLE)[1] ** 2


@PROBLEMS.add((_TABLE,), ([0.1, 0.1, 1.0],), _SPREAD[-1], answer=_last_direction, unique=False)
def total_least_squares() -> Built:
    v, A = cp.Variable(3), cp.Parameter((8, 3))
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ v)), [cp.sum_squares(v) == 1]), [A], [v]


@PROBLEMS.add((_TABLE,), ([0.1, 0.1, 1.0],), _SPREAD[0], answer=_first_direction, unique=False)
def principal_direction() -> Built:
    v, A = cp.Variable(3), cp.Parameter((8, 3))
    return cp.Problem(cp.Maximize(cp.sum_squares(A @ v)), [cp.sum_squares(v) == 1]), [A], [v]


@PROBLEMS.add((_TABLE,), ([0.1, 0.1, 1.0],), 5.232379751, unique=False)
def nonnegative_principal_direction() -> Built:
    v, A = cp.Variable(3, nonneg=True), cp.Parameter((8, 3))
    return cp.Problem(cp.Maximize(cp.sum_squares(A @ v)), [cp.sum_squares(v) == 1]), [A], [v]


_FACTOR, _RETURNS = np.eye(4) + 0.3 * normal(2, 4, 4), [0.3, 0.5, 0.2, 0.4]


def _best_ratio(L: np.ndarray, mu: np.ndarray) -> Arrays:
    w = np.linalg.solve(L.T @ L, mu)
    return (w / w.sum(),)


@PROBLEMS.add(
    (_FACTOR, _RETURNS),
    ([0.25] * 4,),
    np.linalg.norm(np.linalg.solve(_FACTOR.T, _RETURNS)),
    answer=_best_ratio,
)
def ratio_of_return_and_deviation() -> Built:
    w, L, mu = cp.Variable(4), cp.Parameter((4, 4)), cp.Parameter(4)
    ratio = (mu @ w) / cp.sqrt(cp.sum_squares(L @ w))
    return cp.Problem(cp.Maximize(ratio), [cp.sum(w) == 1]), [L, mu], [w]


# Rotations: Wahba's problem


def _turn(angle: float, axis: list[float]) -> np.ndarray:
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


_SEEN_FROM = normal(3, 3, 5)
_SEEN = (_turn(0.7, [1, -2, 0.5]) @ _SEEN_FROM + 0.1 * normal(4, 3, 5)).round(3)


def _nearest_rotation(A: np.ndarray, B: np.ndarray) -> Arrays:
    U, _, Vt = np.linalg.svd(B @ A.T)
    return (U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt,)


_MISFIT = np.sum((_nearest_rotation(_SEEN_FROM, _SEEN)[0] @ _SEEN_FROM - _SEEN) ** 2)


@PROBLEMS.add((_SEEN_FROM, _SEEN), (np.eye(3),), _MISFIT, answer=_nearest_rotation)
def wahba() -> Built:
    R, A, B = cp.Variable((3, 3)), cp.Parameter((3, 5)), cp.Parameter((3, 5))
    rows = [R[:, i] @ R[:, j] == float(i == j) for i, j in _UPPER]
    return cp.Problem(cp.Minimize(cp.sum_squares(R @ A - B)), rows), [A, B], [R]


@PROBLEMS.add(
    (_SEEN_FROM, _SEEN),
    (np.eye(3),),
    _MISFIT,
    answer=_nearest_rotation,
    independent=False,
    note="the rows of a symmetric equation stand twice",
)
def wahba_with_dependent_rows() -> Built:
    R, A, B = cp.Variable((3, 3)), cp.Parameter((3, 5)), cp.Parameter((3, 5))
    loss = cp.sum_squares(R @ A - B)
    return cp.Problem(cp.Minimize(loss), [R.T @ R - np.eye(3) == 0]), [A, B], [R]


def rotation(q: cp.Variable) -> cp.Expression:
    """Matrix of the rotation by a unit quaternion, (w, x, y, z)."""
    w, x, y, z = q[0], q[1], q[2], q[3]
    rows = [
        [1 - 2 * (y**2 + z**2), 2 * (x * y) - 2 * (w * z), 2 * (x * z) + 2 * (w * y)],
        [2 * (x * y) + 2 * (w * z), 1 - 2 * (x**2 + z**2), 2 * (y * z) - 2 * (w * x)],
        [2 * (x * z) - 2 * (w * y), 2 * (y * z) + 2 * (w * x), 1 - 2 * (x**2 + y**2)],
    ]
    return cp.vstack([cp.hstack(row) for row in rows])


def _quaternion(R: np.ndarray) -> np.ndarray:
    w = np.sqrt(1 + np.trace(R)) / 2
    return np.r_[w, np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) / (4 * w)]


@PROBLEMS.add(
    (_SEEN_FROM, _SEEN),
    ([1.0, 0.1, 0.1, 0.1],),
    _MISFIT,
    answer=lambda A, B: (_quaternion(*_nearest_rotation(A, B)),),
    unique=False,
)
def wahba_by_quaternion() -> Built:
    q, A, B = cp.Variable(4), cp.Parameter((3, 5)), cp.Parameter((3, 5))
    loss = cp.sum_squares(rotation(q) @ A - B)
    return cp.Problem(cp.Minimize(loss), [cp.sum_squares(q) == 1]), [A, B], [q]


@PROBLEMS.add(
    (np.array([[2.0, 0.3], [0.1, 1.5], [0.4, -0.2]]), np.array([1.0, 2.0, 0.5])),
    ([[1.0, 0.0], [0.0, 0.5], [0.0, -1.0]],),
    -1.16156280491,
)
def two_orthonormal_columns() -> Built:
    X, C, w = cp.Variable((3, 2)), cp.Parameter((3, 2)), cp.Parameter(3, nonneg=True)
    rows = [X[:, i] @ X[:, j] == float(i == j) for i, j in ((0, 0), (0, 1), (1, 1))]
    loss = cp.sum(cp.multiply(w, cp.sum(X**2, axis=1))) - cp.sum(cp.multiply(C, X))
    return cp.Problem(cp.Minimize(loss), rows), [C, w], [X]


# Positions


_ANCHORS = np.array([[0.0, 0.0], [4.0, 0.2], [0.5, 3.5], [3.8, 4.1], [2.0, -1.5]])
_RANGES = np.array([2.5, 2.7, 2.3, 3.1, 2.95])


@PROBLEMS.add((_ANCHORS, _RANGES), ([2.0, 2.0],), 0.0493421449863)
def source_from_ranges() -> Built:
    x, A, r = cp.Variable(2), cp.Parameter((5, 2)), cp.Parameter(5)
    away = [cp.sqrt(cp.sum_squares(x - A[i])) for i in range(5)]
    return cp.Problem(cp.Minimize(cp.sum_squares(cp.hstack(away) - r))), [A, r], [x]


@PROBLEMS.add((_ANCHORS, _RANGES), ([2.0, 2.0],), 1.64962881734)
def source_from_squared_ranges() -> Built:
    x, A, r = cp.Variable(2), cp.Parameter((5, 2)), cp.Parameter(5)
    away = cp.hstack([cp.sum_squares(x - A[i]) for i in range(5)])
    return cp.Problem(cp.Minimize(cp.sum_squares(away - r**2))), [A, r], [x]


_OBJECT = np.array(
    [
        [-1.0, -1.0, 0.2],
        [1.0, -1.0, -0.3],
        [1.0, 1.0, 0.5],
        [-1.0, 1.0, 0.0],
        [0.2, 0.3, 1.0],
        [0.5, -0.4, -0.8],
    ]
)


def _image(points: np.ndarray, noise: np.ndarray) -> np.ndarray:
    seen = points @ _turn(0.4, [1, 1, -0.5]).T + np.array([0.2, -0.1, 5.0])
    return (seen[:, :2] / seen[:, 2:] + 0.01 * noise).round(4)


@PROBLEMS.add(
    (_OBJECT, _image(_OBJECT, normal(5, 6, 2))),
    ([1.0, 0.1, 0.1, 0.0], [0.0, 0.0, 4.0]),
    0.000712643108459,
    unique=False,
    note="a quaternion and its negative are one rotation",
)
def perspective_n_point() -> Built:
    q, t = cp.Variable(4), cp.Variable(3)
    P, seen = cp.Parameter((6, 3)), cp.Parameter((6, 2))
    R, loss = rotation(q), 0
    depth = P @ R[2] + t[2]
    for axis in (0, 1):
        loss += cp.sum_squares((P @ R[axis] + t[axis]) / depth - seen[:, axis])
    rows = [cp.sum_squares(q) == 1, depth >= 0.5]
    return cp.Problem(cp.Minimize(loss), rows), [P, seen], [q, t]


_SCENE = np.array([[-1.0, 4.0], [0.5, 5.0], [1.2, 3.5], [-0.3, 6.0], [0.1, 4.2], [-1.5, 5.5]])
_VIEWS = np.array([[0.0, 0.0, 0.0], [0.5, 1.5, 0.4], [-0.4, -1.8, 0.5], [0.9, 3.0, 1.8]])


def _view(turn: float, along: float, ahead: float) -> np.ndarray:
    across = np.cos(turn) * _SCENE[:, 0] + np.sin(turn) * _SCENE[:, 1] + along
    return across / (-np.sin(turn) * _SCENE[:, 0] + np.cos(turn) * _SCENE[:, 1] + ahead)


@PROBLEMS.add(
    ((np.array([_view(*v) for v in _VIEWS]) + 0.002 * normal(6, 4, 6)).round(4), 1.0),
    (_SCENE.round(0), [0.4, -0.3, 0.8], [1.0, -1.5, 2.5], [0.3, 0.3, 1.5]),
    1.12243550202e-05,
    note="line images of a plane scene; the first camera is the frame, the second gives the scale",
)
def bundle_adjustment() -> Built:
    at, turn, along, ahead = cp.Variable((6, 2)), *(cp.Variable(3) for _ in range(3))
    seen, base = cp.Parameter((4, 6)), cp.Parameter()
    rows = [along[0] == base, at[:, 1] >= 1]
    loss = cp.sum_squares(at[:, 0] / at[:, 1] - seen[0])
    for i in range(3):
        sin, cos = cp.nlp.sin(turn[i]), cp.nlp.cos(turn[i])
        across = cos * at[:, 0] + sin * at[:, 1] + along[i]
        depth = cos * at[:, 1] - sin * at[:, 0] + ahead[i]
        loss += cp.sum_squares(across / depth - seen[1 + i])
        rows += [depth >= 1]
    return cp.Problem(cp.Minimize(loss), rows), [seen, base], [at, turn, along, ahead]


# Inverse kinematics


def _elbow(target: np.ndarray, length: np.ndarray) -> Arrays:
    (a, b), far = length, np.hypot(*target)
    bend = np.arccos((far**2 - a**2 - b**2) / (2 * a * b))
    first = np.arctan2(target[1], target[0]) - np.arctan2(b * np.sin(bend), a + b * np.cos(bend))
    return (np.array([first, bend]),)


@PROBLEMS.add(([1.2, 0.6], [1.0, 0.8]), ([0.0, 1.0],), 0.0, answer=_elbow, unique=False)
def two_link_arm() -> Built:
    joint, target, length = cp.Variable(2), cp.Parameter(2), cp.Parameter(2)
    angle = cp.hstack([joint[0], joint[0] + joint[1]])
    rows = [length @ cp.nlp.cos(angle) == target[0], length @ cp.nlp.sin(angle) == target[1]]
    return cp.Problem(cp.Minimize(0), rows), [target, length], [joint]


@PROBLEMS.add(
    ([1.5, 1.3], [0.2, 0.4, 0.3, 0.1], 0.55), ([0.3, 0.5, 0.4, 0.2],), 0.18075699073, unique=False
)
def four_link_arm_near_rest() -> Built:
    joint, target, rest = cp.Variable(4), cp.Parameter(2), cp.Parameter(4)
    limit = cp.Parameter(nonneg=True)
    angle, length = np.tril(np.ones((4, 4))) @ joint, np.array([0.8, 0.7, 0.5, 0.3])
    rows = [length @ cp.nlp.cos(angle) == target[0], length @ cp.nlp.sin(angle) == target[1]]
    rows += [joint <= limit, joint >= -limit]
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(joint - rest)), rows),
        [target, rest, limit],
        [joint],
    )


@PROBLEMS.add(([1.9, 1.6],), ([0.3, 0.5, 0.4],), 0.239023321466)
def arm_reaching_for_a_distant_point() -> Built:
    joint, target = cp.Variable(3, bounds=[-1.2, 1.2]), cp.Parameter(2)
    angle, length = np.tril(np.ones((3, 3))) @ joint, np.array([0.8, 0.7, 0.5])
    hand = cp.hstack([length @ cp.nlp.cos(angle), length @ cp.nlp.sin(angle)])
    loss = cp.sum_squares(hand - target) + 0.01 * cp.sum_squares(joint)
    return cp.Problem(cp.Minimize(loss)), [target], [joint]
