"""Projections onto curved sets, alignment, and the two-branch example.

DDN: "Deep Declarative Networks: A New Hope".
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np
from scipy.optimize import brentq

from nonconvex_collection.problem import Arrays, Built, Collector

PROBLEMS = Collector()
_ROOT2 = np.sqrt(2.0)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers, rounded so that they can be read."""
    return np.random.default_rng(seed).standard_normal(shape).round(3)


# Spheres and ellipsoids (DDN 5.2)

_POINT = [0.6, -1.1, 0.3, 0.9, -0.2]


def _onto_sphere(x: np.ndarray, r: float) -> Arrays:
    return (r * x / np.linalg.norm(x),)


@PROBLEMS.add(
    (_POINT, 2.0), ([1.0] * 5,), (2 - np.linalg.norm(_POINT)) ** 2 / 2, answer=_onto_sphere
)
def sphere_projection() -> Built:
    u, x, r = cp.Variable(5), cp.Parameter(5), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(u - x) / 2
    return cp.Problem(cp.Minimize(loss), [cp.sum_squares(u) == r**2]), [x, r], [u]


def _onto_quadric(x: np.ndarray, w: np.ndarray, low: float, high: float) -> np.ndarray:
    """Nearest u = x / (1 + m w) with sum(w u**2) == 1, for m in a range."""

    def excess(m: float) -> float:
        return float(np.sum(w * (x / (1 + m * w)) ** 2)) - 1

    m = brentq(excess, low, high, xtol=1e-16, rtol=1e-15)
    for _ in range(3):
        m += excess(m) / (2 * np.sum(w**2 * x**2 / (1 + m * w) ** 3))
    return x / (1 + m * w)


def _distance(x: list[float], u: np.ndarray) -> float:
    return float(np.sum((np.array(x) - u) ** 2)) / 2


_AXES = [1.0, 0.25, 4.0]
_OUTSIDE, _INSIDE = [1.5, -2.5, 0.8], [0.2, 0.3, 0.3]


def _from_outside(x: np.ndarray, w: np.ndarray) -> Arrays:
    return (_onto_quadric(x, w, 0.0, 1e3),)


def _from_inside(x: np.ndarray, w: np.ndarray) -> Arrays:
    return (_onto_quadric(x, w, -(1 - 1e-9) / w.max(), 0.0),)


def _quadric() -> Built:
    u, x, w = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x) / 2), [w @ u**2 == 1]), [x, w], [u]


@PROBLEMS.add(
    (_OUTSIDE, _AXES),
    ([1.0, -1.0, 0.2],),
    _distance(_OUTSIDE, *_from_outside(np.array(_OUTSIDE), np.array(_AXES))),
    answer=_from_outside,
)
def ellipsoid_projection_from_outside() -> Built:
    return _quadric()


@PROBLEMS.add(
    (_INSIDE, _AXES),
    ([0.1, 0.1, 0.5],),
    _distance(_INSIDE, *_from_inside(np.array(_INSIDE), np.array(_AXES))),
    answer=_from_inside,
)
def ellipsoid_projection_from_inside() -> Built:
    return _quadric()


_SADDLE, _SIGNS = [0.9, 0.7, 1.6], [1.0, 2.0, -1.0]


def _onto_hyperboloid(x: np.ndarray, w: np.ndarray) -> Arrays:
    return (_onto_quadric(x, w, -(1 - 1e-9) / w.max(), 1 - 1e-9),)


@PROBLEMS.add(
    (_SADDLE, _SIGNS),
    ([1.0, 1.0, 1.4],),
    _distance(_SADDLE, *_onto_hyperboloid(np.array(_SADDLE), np.array(_SIGNS))),
    answer=_onto_hyperboloid,
)
def hyperboloid_projection() -> Built:
    return _quadric()


def _onto_turned(x: np.ndarray, A: np.ndarray) -> Arrays:
    w, V = np.linalg.eigh(A.T @ A)
    return (V @ _onto_quadric(V.T @ x, w, 0.0, 1e3),)


_TURNED = [[1.0, 0.3, 0.0], [-0.2, 0.8, 0.4], [0.1, 0.0, 1.5]]


@PROBLEMS.add(
    (_OUTSIDE, _TURNED),
    ([1.0, -1.0, 0.2],),
    _distance(_OUTSIDE, *_onto_turned(np.array(_OUTSIDE), np.array(_TURNED))),
    answer=_onto_turned,
)
def turned_ellipsoid_projection() -> Built:
    u, x, A = cp.Variable(3), cp.Parameter(3), cp.Parameter((3, 3))
    rows = [cp.sum_squares(A @ u) == 1]
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x) / 2), rows), [x, A], [u]


def _onto_parabola(x: np.ndarray, a: float) -> Arrays:
    # nearest (t, a t^2): 2 a^2 t^3 + (1 - 2 a x1) t - x0 = 0
    roots = np.roots([2 * a**2, 0.0, 1 - 2 * a * x[1], -x[0]])
    t = roots.real.max()
    return (np.array([t, a * t**2]),)


@PROBLEMS.add(
    ([0.5, 2.0], 1.0),
    ([1.0, 1.0],),
    2 * _distance([0.5, 2.0], *_onto_parabola(np.array([0.5, 2.0]), 1.0)),
    answer=_onto_parabola,
)
def parabola_projection() -> Built:
    u, x, a = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x)), [u[1] == a * u[0] ** 2]), [x, a], [u]


@PROBLEMS.add(([0.4, 0.2, 2.0], 3.0), ([1.2, 1.2, 2.0],), 1.50655064483)
def product_surface_projection() -> Built:
    u, x, c = cp.Variable(3, nonneg=True), cp.Parameter(3), cp.Parameter()
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x)), [cp.prod(u) == c]), [x, c], [u]


# Alignment on the sphere (DDN 4.7.4)

_DIRECTION = [1.0, -2.0, 0.5, 1.5]


@PROBLEMS.add(
    (_DIRECTION,),
    ([1.0, 0.0, 0.0, 0.0],),
    -np.linalg.norm(_DIRECTION),
    answer=lambda x: (x / np.linalg.norm(x),),
)
def alignment_on_the_sphere() -> Built:
    u, x = cp.Variable(4), cp.Parameter(4)
    return cp.Problem(cp.Minimize(-x @ u), [cp.sum_squares(u) == 1]), [x], [u]


@PROBLEMS.add(
    (_DIRECTION,),
    (1.5 * np.array(_DIRECTION) / np.linalg.norm(_DIRECTION),),
    -np.linalg.norm(_DIRECTION),
    answer=lambda x: (1.5 * x / np.linalg.norm(x),),
    unique=False,
    regular=False,
    note="every positive multiple is a solution; the answer is the one of length 1.5, whose "
    "derivative is the pseudo-inverse's, DDN eq. 38",
)
def alignment_of_any_length() -> Built:
    u, x = cp.Variable(4), cp.Parameter(4)
    return cp.Problem(cp.Minimize(-(x @ u) / cp.sqrt(cp.sum_squares(u)))), [x], [u]


def _branches() -> Built:
    u, x = cp.Variable(), cp.Parameter()
    return cp.Problem(cp.Minimize(0), [(u - 1) ** 2 - x**2 == 0]), [x], [u]


@PROBLEMS.add((0.7,), (1.2,), 0.0, answer=lambda x: (1 + x,), unique=False, note="DDN eq. 33")
def upper_of_two_branches() -> Built:
    return _branches()


@PROBLEMS.add((0.7,), (0.8,), 0.0, answer=lambda x: (1 - x,), unique=False, note="DDN eq. 33")
def lower_of_two_branches() -> Built:
    return _branches()


# Outside of circles


@PROBLEMS.add(
    ([0.3, 0.4], [0.0, 0.1], 1.0),
    ([1.0, 1.0],),
    (1 - 0.18**0.5) ** 2,
    answer=lambda x, c, r: (c + r * (x - c) / np.linalg.norm(x - c),),
)
def outside_a_circle() -> Built:
    u, x, c, r = cp.Variable(2), cp.Parameter(2), cp.Parameter(2), cp.Parameter(nonneg=True)
    rows = [cp.sum_squares(u - c) >= r**2]
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x)), rows), [x, c, r], [u]


@PROBLEMS.add(
    ([2.0, 1.0], [0.0, 0.1], 1.0),
    ([0.0, 2.0],),
    0.0,
    answer=lambda x, c, r: (x,),
    note="the constraint is inactive",
)
def far_outside_a_circle() -> Built:
    return outside_a_circle()


def _upper_crossing(c: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Where circles around (c[0], 0) and (c[1], 0) cross, above the axis."""
    along = (r[0] ** 2 - r[1] ** 2 + c[1] ** 2 - c[0] ** 2) / (2 * (c[1] - c[0]))
    return np.array([along, np.sqrt(r[0] ** 2 - (along - c[0]) ** 2)])


@PROBLEMS.add(
    ([0.1, 0.3], [-0.8, 0.9], [1.0, 1.2]),
    ([0.0, 1.5],),
    np.sum((_upper_crossing(np.array([-0.8, 0.9]), np.array([1.0, 1.2])) - [0.1, 0.3]) ** 2),
    answer=lambda x, c, r: (_upper_crossing(c, r),),
)
def outside_two_circles() -> Built:
    u, x, c, r = cp.Variable(2), cp.Parameter(2), cp.Parameter(2), cp.Parameter(2, nonneg=True)
    rows = [(u[0] - c) ** 2 + u[1] ** 2 >= r**2]
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x)), rows), [x, c, r], [u]


@PROBLEMS.add(([1.0, 2.0], [3.5, 2.5], 0.4), ([1.0, 0.0], [3.0, 1.0]), 3.55652274053)
def distance_of_two_ellipses() -> Built:
    u, v, axes, centre = cp.Variable(2), cp.Variable(2), cp.Parameter(2), cp.Parameter(2)
    tilt = cp.Parameter()
    away = v - centre
    rows = [u[0] ** 2 / 4 + u[1] ** 2 / axes[0] ** 2 == 1]
    rows += [away[0] ** 2 + axes[1] * away[1] ** 2 + tilt * (away[0] * away[1]) == 1]
    return cp.Problem(cp.Minimize(cp.sum_squares(u - v)), rows), [axes, centre, tilt], [u, v]


# Largest and smallest shapes


@PROBLEMS.add(([2.0, 1.5],), ([1.0, 1.0],), 6.0, answer=lambda a: (a / _ROOT2,))
def largest_rectangle_in_an_ellipse() -> Built:
    u, a = cp.Variable(2, nonneg=True), cp.Parameter(2, pos=True)
    return cp.Problem(cp.Maximize(4 * (u[0] * u[1])), [cp.sum((u / a) ** 2) <= 1]), [a], [u]


def _two_in_a_box(side: np.ndarray) -> Arrays:
    r = (side.sum() - np.sqrt(2 * side.prod())) / 2
    return r, np.array([[r, r], side - r])


@PROBLEMS.add(
    ([1.0, 1.2],),
    (0.1, [[0.2, 0.2], [0.8, 0.8]]),
    (2.2 - np.sqrt(2.4)) / 2,
    answer=_two_in_a_box,
    unique=False,
)
def packing_of_two_circles() -> Built:
    return _packing(2)


def _five_in_a_box(side: np.ndarray) -> Arrays:
    # |side / 2 - r| = 2 r from the middle to each corner's circle
    a, b = side / 2
    r = (-(a + b) + np.sqrt((a + b) ** 2 + 2 * (a**2 + b**2))) / 2
    corners = [[r, r], [side[0] - r, r], [r, side[1] - r], side - r]
    return r, np.array([*corners, side / 2])


@PROBLEMS.add(
    ([1.0, 1.05],),
    (0.1, [[0.2, 0.2], [0.8, 0.2], [0.2, 0.8], [0.8, 0.8], [0.5, 0.5]]),
    _five_in_a_box(np.array([1.0, 1.05]))[0],
    answer=_five_in_a_box,
    unique=False,
    independent=False,
    note="twelve active rows of eleven variables",
)
def packing_of_five_circles() -> Built:
    return _packing(5)


def _packing(count: int) -> Built:
    r, at, side = cp.Variable(), cp.Variable((count, 2)), cp.Parameter(2)
    rows = [at >= r]
    rows += [at[i] + r <= side for i in range(count)]
    for i in range(count):
        rows += [cp.sum_squares(at[i] - at[j]) >= 4 * r**2 for j in range(i)]
    return cp.Problem(cp.Maximize(r), rows), [side], [r, at]


def _around_three(r: np.ndarray) -> float:
    """Descartes' circle theorem: the outer circle that touches three touching circles."""
    k = 1 / r
    inner = np.sqrt(k[0] * k[1] + k[1] * k[2] + k[2] * k[0])
    return 1 / (2 * inner - k.sum())


@PROBLEMS.add(
    ([1.0, 1.2, 1.5],),
    (4.0, 1.5, [[0.0, 1.0], [1.0, -1.0]]),
    _around_three(np.array([1.0, 1.2, 1.5])),
    unique=False,
    note="the first centre on the axis takes the rotation away; mirror images remain",
)
def smallest_circle_around_three() -> Built:
    R, x, at, r = cp.Variable(), cp.Variable(), cp.Variable((2, 2)), cp.Parameter(3)
    centres = [cp.hstack([x, 0]), at[0], at[1]]
    rows = [cp.sum_squares(centres[i]) <= (R - r[i]) ** 2 for i in range(3)]
    rows += [R - r >= 0]
    for i in range(3):
        rows += [cp.sum_squares(centres[i] - centres[j]) >= (r[i] + r[j]) ** 2 for j in range(i)]
    return cp.Problem(cp.Minimize(R), rows), [r], [R, x, at]


@PROBLEMS.add(
    (1.0,),
    ([0.6, 0.9, 1.0, 0.9, 0.6], [0.6, 0.4, 0.4, 0.6]),
    0.674981442926,
    note="Graham's hexagon; radii and gaps of angle around one of its corners",
)
def largest_hexagon_of_given_diameter() -> Built:
    r, gap, d = cp.Variable(5, nonneg=True), cp.Variable(4), cp.Parameter(nonneg=True)
    area = cp.sum(cp.multiply(cp.multiply(r[1:], r[:-1]), cp.nlp.sin(gap))) / 2
    rows = [r <= d, gap >= 0.1, cp.sum(gap) <= np.pi]
    for i in range(5):
        for j in range(i):
            across = cp.multiply(r[i] * r[j], cp.nlp.cos(cp.sum(gap[j:i])))
            rows += [r[i] ** 2 + r[j] ** 2 - 2 * across <= d**2]
    return cp.Problem(cp.Maximize(area), rows), [d], [r, gap]
