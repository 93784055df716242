"""Problems 1 to 42 of the collection of Hock and Schittkowski, with parameters in their data.

W. Hock, K. Schittkowski, "Test Examples for Nonlinear Programming Codes", Lecture Notes in
Economics and Mathematical Systems 187, Springer 1981. Starts and optimal values are theirs; where
a start lies on a saddle or leads to another minimum it is moved. Left out are the problems that
are convex by CVXPY's rules.
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np

from nonconvex_collection.problem import Built, Collector

PROBLEMS = Collector()
_ROOT2, _ROOT3 = np.sqrt(2.0), np.sqrt(3.0)


def cube(x: cp.Expression) -> cp.Expression:
    """The third power of numbers of any sign; CVXPY's own is meant for nonnegative ones."""
    return cp.multiply(x, cp.square(x))


def _valley(x: cp.Variable, steepness: cp.Parameter, end: float | cp.Parameter) -> cp.Expression:
    return steepness * (x[1] - x[0] ** 2) ** 2 + (end - x[0]) ** 2


@PROBLEMS.add((100.0, 1.0), ([-2.0, 1.0],), 0.0, answer=lambda s, a: ([a, a**2],))
def hs1() -> Built:
    x, s, a = cp.Variable(2), cp.Parameter(nonneg=True), cp.Parameter()
    return cp.Problem(cp.Minimize(_valley(x, s, a)), [x[1] >= -1.5]), [s, a], [x]


def _cubic_valley(s: float, floor: float) -> tuple[np.ndarray]:
    # at x[1] = floor: 2 s x^3 + (1 - 2 s floor) x - 1 = 0, the largest root
    roots = np.roots([2 * s, 0.0, 1 - 2 * s * floor, -1.0])
    return (np.array([roots.real.max(), floor]),)


@PROBLEMS.add((100.0, 1.5), ([1.3, 1.6],), 0.0504261879, answer=_cubic_valley)
def hs2() -> Built:
    x, s, floor = cp.Variable(2), cp.Parameter(nonneg=True), cp.Parameter()
    return cp.Problem(cp.Minimize(_valley(x, s, 1)), [x[1] >= floor]), [s, floor], [x]


@PROBLEMS.add((1.0, 0.0), ([1.125, 0.125],), 8 / 3, answer=lambda a, b: ([a, b],))
def hs4() -> Built:
    x, a, b = cp.Variable(2), cp.Parameter(), cp.Parameter()
    return cp.Problem(cp.Minimize(cube(x[0] + 1) / 3 + x[1]), [x[0] >= a, x[1] >= b]), [a, b], [x]


def _sine_minimum(a: float, b: float) -> tuple[np.ndarray]:
    # stationary: cos(sum) + 2 difference = a and cos(sum) - 2 difference = -b
    total, difference = -np.arccos((a - b) / 2), (a + b) / 4
    return (np.array([total + difference, total - difference]) / 2,)


@PROBLEMS.add((1.5, 2.5), ([0.0, 0.0],), -_ROOT3 / 2 - np.pi / 3, answer=_sine_minimum)
def hs5() -> Built:
    x, a, b = cp.Variable(2), cp.Parameter(), cp.Parameter()
    loss = cp.nlp.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - a * x[0] + b * x[1] + 1
    rows = [x >= np.array([-1.5, -3.0]), x <= np.array([4.0, 3.0])]
    return cp.Problem(cp.Minimize(loss), rows), [a, b], [x]


@PROBLEMS.add((1.0, 10.0), ([-1.2, 1.0],), 0.0, answer=lambda a, c: ([a, a**2],))
def hs6() -> Built:
    x, a, c = cp.Variable(2), cp.Parameter(), cp.Parameter()
    return cp.Problem(cp.Minimize((a - x[0]) ** 2), [c * (x[1] - x[0] ** 2) == 0]), [a, c], [x]


@PROBLEMS.add((4.0, 1.0), ([2.0, 2.0],), -_ROOT3, answer=lambda a, b: ([0.0, np.sqrt(a - b**2)],))
def hs7() -> Built:
    x, a, b = cp.Variable(2), cp.Parameter(), cp.Parameter()
    rows = [(b + x[0] ** 2) ** 2 + x[1] ** 2 == a]
    return cp.Problem(cp.Minimize(cp.log(1 + x[0] ** 2) - x[1]), rows), [a, b], [x]


def _crossing(total: float, product: float) -> tuple[np.ndarray]:
    plus, minus = np.sqrt(total + 2 * product), np.sqrt(total - 2 * product)
    return (np.array([plus + minus, plus - minus]) / 2,)


@PROBLEMS.add(
    (25.0, 9.0), ([4.0, 1.5],), -1.0, answer=_crossing, unique=False, note="as many rows as entries"
)
def hs8() -> Built:
    x, total, product = cp.Variable(2), cp.Parameter(), cp.Parameter()
    rows = [x[0] ** 2 + x[1] ** 2 == total, x[0] * x[1] == product]
    return cp.Problem(cp.Minimize(-1), rows), [total, product], [x]


@PROBLEMS.add((4.0, 3.0), ([-2.0, -3.0],), -0.5, unique=False)
def hs9() -> Built:
    x, a, b = cp.Variable(2), cp.Parameter(), cp.Parameter()
    loss = cp.multiply(cp.nlp.sin(np.pi * x[0] / 12), cp.nlp.cos(np.pi * x[1] / 16))
    return cp.Problem(cp.Minimize(loss), [a * x[0] - b * x[1] == 0]), [a, b], [x]


@PROBLEMS.add((3.0, 1.0), ([-1.0, 2.0],), -1.0)
def hs10() -> Built:
    x, a, c = cp.Variable(2), cp.Parameter(), cp.Parameter()
    rows = [-a * x[0] ** 2 + 2 * (x[0] * x[1]) - x[1] ** 2 + c >= 0]
    return cp.Problem(cp.Minimize(x[0] - x[1]), rows), [a, c], [x]


@PROBLEMS.add(([-7.0, -7.0], 25.0), ([0.0, 0.0],), -30.0)
def hs12() -> Built:
    x, slope, c = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    loss = x[0] ** 2 / 2 + x[1] ** 2 - x[0] * x[1] + slope @ x
    return cp.Problem(cp.Minimize(loss), [4 * x[0] ** 2 + x[1] ** 2 <= c]), [slope, c], [x]


@PROBLEMS.add(
    (100.0, 1.0, 0.5), ([0.4, 2.5],), 306.5, answer=lambda s, c, right: ([right, c / right],)
)
def hs15() -> Built:
    x, s, c, right = cp.Variable(2), cp.Parameter(nonneg=True), cp.Parameter(), cp.Parameter()
    rows = [x[0] * x[1] >= c, x[0] + x[1] ** 2 >= 0, x[0] <= right]
    return cp.Problem(cp.Minimize(_valley(x, s, 1)), rows), [s, c, right], [x]


@PROBLEMS.add((100.0, 0.5), ([0.2, 0.5],), 0.25, answer=lambda s, right: ([right, right**2],))
def hs16() -> Built:
    x, s, right = cp.Variable(2), cp.Parameter(nonneg=True), cp.Parameter()
    rows = [x[0] + x[1] ** 2 >= 0, x[0] ** 2 + x[1] >= 0, x[0] >= -0.5, x[0] <= right, x[1] <= 1]
    return cp.Problem(cp.Minimize(_valley(x, s, 1)), rows), [s, right], [x]


@PROBLEMS.add(
    (0.01, 25.0),
    ([2.0, 2.0],),
    5.0,
    answer=lambda w, c: ([np.sqrt(c / np.sqrt(w)), np.sqrt(c * np.sqrt(w))],),
)
def hs18() -> Built:
    x, w, c = cp.Variable(2, bounds=[np.array([2, 0]), 50]), cp.Parameter(), cp.Parameter()
    rows = [x[0] * x[1] >= c, cp.sum_squares(x) >= 25]
    return cp.Problem(cp.Minimize(w * x[0] ** 2 + x[1] ** 2), rows), [w, c], [x]


def _two_circles(near: float, far: float) -> tuple[np.ndarray]:
    # |x - (5, 5)|^2 = far and |x - (6, 5)|^2 = near
    right = 5.5 + (far - near) / 2
    return (np.array([right, 5 - np.sqrt(far - (right - 5) ** 2)]),)


@PROBLEMS.add((82.81, 100.0), ([14.35, 2.0],), -6961.81381, answer=_two_circles)
def hs19() -> Built:
    x, near, far = cp.Variable(2, bounds=[np.array([13, 0]), 100]), cp.Parameter(), cp.Parameter()
    rows = [cp.sum_squares(x - 5) >= far, cp.sum_squares(x - np.array([6, 5])) <= near]
    return cp.Problem(cp.Minimize(cp.sum(cube(x - np.array([10, 20])))), rows), [near, far], [x]


@PROBLEMS.add(
    (100.0, 1.0),
    ([0.1, 1.0],),
    81.5 - 25 * _ROOT3,
    answer=lambda s, c: ([0.5, np.sqrt(c - 0.25)],),
)
def hs20() -> Built:
    x, s, c = cp.Variable(2), cp.Parameter(nonneg=True), cp.Parameter()
    rows = [x[0] + x[1] ** 2 >= 0, x[0] ** 2 + x[1] >= 0, cp.sum_squares(x) >= c]
    rows += [x[0] >= -0.5, x[0] <= 0.5]
    return cp.Problem(cp.Minimize(_valley(x, s, 1)), rows), [s, c], [x]


@PROBLEMS.add((1.0, 1.0), ([3.0, 1.0],), 2.0)
def hs23() -> Built:
    x, a, b = cp.Variable(2, bounds=[-50, 50]), cp.Parameter(), cp.Parameter()
    rows = [x[0] + x[1] >= 1, cp.sum_squares(x) >= 1, 9 * x[0] ** 2 + x[1] ** 2 >= 9]
    rows += [x[0] ** 2 - a * x[1] >= 0, x[1] ** 2 - b * x[0] >= 0]
    return cp.Problem(cp.Minimize(cp.sum_squares(x)), rows), [a, b], [x]


@PROBLEMS.add((6.0,), ([1.0, 0.5],), -1.0, answer=lambda c: ([c / 2, c / (2 * _ROOT3)],))
def hs24() -> Built:
    x, c = cp.Variable(2, nonneg=True), cp.Parameter()
    loss = cp.multiply((x[0] - 3) ** 2 - 9, cube(x[1])) / (27 * _ROOT3)
    rows = [x[0] / _ROOT3 >= x[1], x[0] + _ROOT3 * x[1] >= 0, x[0] + _ROOT3 * x[1] <= c]
    return cp.Problem(cp.Minimize(loss), rows), [c], [x]


@PROBLEMS.add(
    (3.0,),
    ([-2.6, 2.0, 2.0],),
    0.0,
    regular=False,
    answer=lambda c: ([1.0, 1.0, 1.0],),
    note="the curvature vanishes along the constraint",
)
def hs26() -> Built:
    x, c = cp.Variable(3), cp.Parameter()
    rows = [cp.multiply(1 + x[1] ** 2, x[0]) + x[2] ** 4 == c]
    return cp.Problem(cp.Minimize((x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4), rows), [c], [x]


@PROBLEMS.add((0.01, 1.0), ([2.0, 2.0, 2.0],), 0.04, answer=lambda w, c: ([-c, c**2, 0.0],))
def hs27() -> Built:
    x, w, c = cp.Variable(3), cp.Parameter(nonneg=True), cp.Parameter()
    loss = w * (x[0] - 1) ** 2 + (x[1] - x[0] ** 2) ** 2
    return cp.Problem(cp.Minimize(loss), [x[0] + x[2] ** 2 + c == 0]), [w, c], [x]


@PROBLEMS.add(
    ([1.0, 2.0, 4.0], 48.0),
    ([1.0, 1.0, 1.0],),
    -16 * _ROOT2,
    answer=lambda w, c: (np.sqrt(c / (3 * w)),),
    unique=False,
)
def hs29() -> Built:
    x, w, c = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    return cp.Problem(cp.Minimize(-(x[0] * x[1] * x[2])), [w @ x**2 <= c]), [w, c], [x]


@PROBLEMS.add(
    (1.0,),
    ([1.1, 0.1, 0.1],),
    1.0,
    answer=lambda c: ([1.0, 0.0, 0.0],),
    regular=False,
    independent=False,
    note="two active rows with one normal",
)
def hs30() -> Built:
    x, c = cp.Variable(3, bounds=[np.array([1, -10, -10]), 10]), cp.Parameter()
    return cp.Problem(cp.Minimize(cp.sum_squares(x)), [x[0] ** 2 + x[1] ** 2 >= c]), [c], [x]


def _hyperbola(w: np.ndarray, c: float) -> tuple[np.ndarray]:
    ratio = (w[1] / w[0]) ** 0.25
    return (np.array([np.sqrt(c) * ratio, np.sqrt(c) / ratio, 0.0]),)


@PROBLEMS.add(([9.0, 1.0, 9.0], 1.0), ([1.0, 1.0, 1.0],), 6.0, answer=_hyperbola)
def hs31() -> Built:
    x = cp.Variable(3, bounds=[np.array([-10, 1, -10]), np.array([10, 10, 1])])
    w, c = cp.Parameter(3, nonneg=True), cp.Parameter()
    return cp.Problem(cp.Minimize(w @ x**2), [x[0] * x[1] >= c]), [w, c], [x]


@PROBLEMS.add(
    (4.0, 0.0),
    ([0.0, 1.0, 3.0],),
    _ROOT2 - 6,
    answer=lambda c, low: ([low, np.sqrt(c / 2 - low**2), np.sqrt(c / 2)],),
)
def hs33() -> Built:
    x, c, low = cp.Variable(3), cp.Parameter(), cp.Parameter()
    loss = cp.multiply(cp.multiply(x[0] - 1, x[0] - 2), x[0] - 3) + x[2]
    rows = [x[2] ** 2 >= x[0] ** 2 + x[1] ** 2, cp.sum_squares(x) >= c]
    rows += [x[0] >= low, x[1:] >= 0, x[2] <= 5]
    return cp.Problem(cp.Minimize(loss), rows), [c, low], [x]


@PROBLEMS.add(
    (72.0, [20.0, 11.0]),
    ([10.0, 10.0, 10.0],),
    -3300.0,
    answer=lambda c, top: ([*top, (c - top[0] - 2 * top[1]) / 2],),
)
def hs36() -> Built:
    x, c, top = cp.Variable(3, nonneg=True), cp.Parameter(), cp.Parameter(2)
    rows = [x[0] + 2 * x[1] + 2 * x[2] <= c, x[:2] <= top, x[2] <= 42]
    return cp.Problem(cp.Minimize(-(x[0] * x[1] * x[2])), rows), [c, top], [x]


@PROBLEMS.add(
    ([1.0, 2.0, 2.0], 72.0),
    ([10.0, 10.0, 10.0],),
    -3456.0,
    answer=lambda w, c: (c / (3 * w),),
)
def hs37() -> Built:
    x, w, c = cp.Variable(3, bounds=[0, 42]), cp.Parameter(3), cp.Parameter()
    loss = -(x[0] * x[1] * x[2])
    return cp.Problem(cp.Minimize(loss), [w @ x <= c, w @ x >= 0]), [w, c], [x]


@PROBLEMS.add(([1.0, 1.0], 10.1), ([-3.0, -1.0, -3.0, -1.0],), 0.0)
def hs38() -> Built:
    x, end, c = cp.Variable(4, bounds=[-10, 10]), cp.Parameter(2), cp.Parameter(nonneg=True)
    loss = 100 * (x[1] - x[0] ** 2) ** 2 + (end[0] - x[0]) ** 2
    loss += 90 * (x[3] - x[2] ** 2) ** 2 + (end[1] - x[2]) ** 2
    loss += c * ((x[1] - 1) ** 2 + (x[3] - 1) ** 2) + 19.8 * cp.multiply(x[1] - 1, x[3] - 1)
    return cp.Problem(cp.Minimize(loss)), [end, c], [x]


def _cusp(a: float, b: float) -> tuple[np.ndarray]:
    # x3 = x4 = 0 on x2 = a x1^3 and x2 = b x1^2
    return (np.array([b / a, b**3 / a**2, 0.0, 0.0]),)


@PROBLEMS.add((1.0, 1.0), ([2.0, 2.0, 2.0, 2.0],), -1.0, answer=_cusp)
def hs39() -> Built:
    x, a, b = cp.Variable(4), cp.Parameter(), cp.Parameter()
    rows = [x[1] - a * cube(x[0]) - x[2] ** 2 == 0, b * x[0] ** 2 - x[1] - x[3] ** 2 == 0]
    return cp.Problem(cp.Minimize(-x[0]), rows), [a, b], [x]


@PROBLEMS.add((1.0, 0.0), ([0.8, 0.8, 0.8, 0.8],), -0.25, unique=False)
def hs40() -> Built:
    x, a, b = cp.Variable(4), cp.Parameter(), cp.Parameter()
    rows = [cube(x[0]) + x[1] ** 2 == a, cp.multiply(x[0] ** 2, x[3]) - x[2] == b]
    rows += [x[3] ** 2 - x[1] == 0]
    return cp.Problem(cp.Minimize(-(x[0] * x[1] * x[2] * x[3])), rows), [a, b], [x]


@PROBLEMS.add(
    ([1.0, 2.0, 2.0], 2.0),
    ([1.0, 1.0, 1.0, 1.0],),
    52 / 27,
    answer=lambda w, top: ([*(top / (3 * w)), top],),
)
def hs41() -> Built:
    x, w, top = cp.Variable(4, nonneg=True), cp.Parameter(3), cp.Parameter()
    rows = [w @ x[:3] == x[3], x[:3] <= 1, x[3] <= top]
    return cp.Problem(cp.Minimize(2 - x[0] * x[1] * x[2]), rows), [w, top], [x]


def _near_circle(target: np.ndarray, first: float, c: float) -> tuple[np.ndarray]:
    end = target[2:]
    return (np.r_[first, target[1], np.sqrt(c) * end / np.linalg.norm(end)],)


@PROBLEMS.add(
    ([1.0, 2.0, 3.0, 4.0], 2.0, 2.0),
    ([1.0, 1.0, 1.0, 1.0],),
    28 - 10 * _ROOT2,
    answer=_near_circle,
)
def hs42() -> Built:
    x, target, first, c = cp.Variable(4), cp.Parameter(4), cp.Parameter(), cp.Parameter()
    rows = [x[0] == first, x[2] ** 2 + x[3] ** 2 == c]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - target)), rows), [target, first, c], [x]
