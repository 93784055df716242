"""Problems 44 to 114 of the collection of Hock and Schittkowski, with parameters in their data.

Source and conventions are those of `hock_schittkowski`.
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np

from nonconvex_collection.hock_schittkowski import cube
from nonconvex_collection.problem import Built, Collector

PROBLEMS = Collector()
_ROOT2 = np.sqrt(2.0)


@PROBLEMS.add(
    ([8.0, 12.0, 12.0], [8.0, 8.0, 5.0]),
    ([0.1, 2.0, 0.1, 2.0],),
    -15.0,
    answer=lambda a, b: ([0.0, a[2] / 4, 0.0, b[1] / 2],),
)
def hs44() -> Built:
    x, a, b = cp.Variable(4, nonneg=True), cp.Parameter(3), cp.Parameter(3)
    loss = x[0] - x[1] - x[2] - x[0] * x[2] + x[0] * x[3] + x[1] * x[2] - x[1] * x[3]
    rows = [np.array([[1, 2], [4, 1], [3, 4]]) @ x[:2] <= a]
    rows += [np.array([[2, 1], [1, 2], [1, 1]]) @ x[2:] <= b]
    return cp.Problem(cp.Minimize(loss), rows), [a, b], [x]


@PROBLEMS.add(([1.0, 2.0, 3.0, 4.0, 5.0],), ([0.5] * 5,), 1.0, answer=lambda top: (top,))
def hs45() -> Built:
    x, top = cp.Variable(5, nonneg=True), cp.Parameter(5)
    return cp.Problem(cp.Minimize(2 - cp.prod(x) / 120), [x <= top]), [top], [x]


def _angles(a: float, b: float) -> tuple[np.ndarray]:
    x = b * np.array([1 / 3, 1 / 6, 1 / 6])
    return (np.r_[x, np.arcsin(np.sqrt(x / a)), np.pi / 2],)


@PROBLEMS.add(
    (4.2, 7.2),
    ([1.0, 1.0, 1.0, 0.509717, 0.509717, 0.509717, 0.985111],),
    -3.456,
    answer=_angles,
    unique=False,
)
def hs56() -> Built:
    x, a, b = cp.Variable(7), cp.Parameter(), cp.Parameter()
    rows = [x[:3] == a * cp.nlp.sin(x[3:6]) ** 2]
    rows += [x[0] + 2 * x[1] + 2 * x[2] == b * cp.nlp.sin(x[6]) ** 2]
    return cp.Problem(cp.Minimize(-(x[0] * x[1] * x[2])), rows), [a, b], [x]


_WEEKS = np.repeat(
    np.arange(8, 43, 2), [2, 4, 4, 3, 3, 2, 3, 3, 3, 3, 2, 3, 2, 1, 2, 2, 1, 1]
).astype(float)
_CHLORINE = [
    *(0.49, 0.49, 0.48, 0.47, 0.48, 0.47, 0.46, 0.46, 0.45, 0.43, 0.45, 0.43, 0.43, 0.44, 0.43),
    *(0.43, 0.46, 0.45, 0.42, 0.42, 0.43, 0.41, 0.41, 0.40, 0.42, 0.40, 0.40, 0.41, 0.40, 0.41),
    *(0.41, 0.40, 0.40, 0.40, 0.38, 0.41, 0.40, 0.40, 0.41, 0.38, 0.40, 0.40, 0.39, 0.39),
]


@PROBLEMS.add((_CHLORINE, 0.09), ([0.42, 1.3],), 0.02845966972)
def hs57() -> Built:
    x, seen, c = cp.Variable(2), cp.Parameter(44), cp.Parameter()
    decay = cp.exp(-x[1] * (_WEEKS - 8))
    rows = [0.49 * x[1] - x[0] * x[1] >= c, x[0] >= 0.4, x[1] >= -4]
    loss = cp.sum_squares(seen - x[0] - cp.multiply(0.49 - x[0], decay))
    return cp.Problem(cp.Minimize(loss), rows), [seen, c], [x]


@PROBLEMS.add((1.0, 4 + 3 * _ROOT2), ([2.0, 2.0, 2.0],), 0.03256820025)
def hs60() -> Built:
    x, a, c = cp.Variable(3, bounds=[-10, 10]), cp.Parameter(), cp.Parameter()
    loss = (x[0] - a) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4
    rows = [cp.multiply(x[0], 1 + x[1] ** 2) + x[2] ** 4 == c]
    return cp.Problem(cp.Minimize(loss), rows), [a, c], [x]


@PROBLEMS.add(([-33.0, 16.0, -24.0], 7.0, 11.0), ([1.0, -1.0, 1.0],), -143.6461422)
def hs61() -> Built:
    x, slope, a, b = cp.Variable(3), cp.Parameter(3), cp.Parameter(), cp.Parameter()
    rows = [3 * x[0] - 2 * x[1] ** 2 == a, 4 * x[0] - x[2] ** 2 == b]
    loss = np.array([4, 2, 2]) @ x**2 + slope @ x
    return cp.Problem(cp.Minimize(loss), rows), [slope, a, b], [x]


@PROBLEMS.add(([255.0, 280.0, 290.0], 0.03), ([0.7, 0.2, 0.1],), -26272.51448)
def hs62() -> Built:
    x, worth, c = cp.Variable(3, bounds=[0, 1]), cp.Parameter(3), cp.Parameter(nonneg=True)
    above = cp.hstack([cp.sum(x), x[1] + x[2], x[2]]) + c
    below = above - cp.multiply(np.array([0.91, 0.93, 0.87]), x)
    loss = -32.174 * (worth @ (cp.log(above) - cp.log(below)))
    return cp.Problem(cp.Minimize(loss), [cp.sum(x) == 1]), [worth, c], [x]


@PROBLEMS.add((56.0, 25.0), ([2.0, 2.0, 2.0],), 961.7151721)
def hs63() -> Built:
    x, a, b = cp.Variable(3, nonneg=True), cp.Parameter(), cp.Parameter()
    loss = 1000 - np.array([1, 2, 1]) @ x**2 - x[0] * x[1] - x[0] * x[2]
    rows = [8 * x[0] + 14 * x[1] + 7 * x[2] == a, cp.sum_squares(x) == b]
    return cp.Problem(cp.Minimize(loss), rows), [a, b], [x]


@PROBLEMS.add(
    ([5.0, 20.0, 10.0], [50000.0, 72000.0, 144000.0], [4.0, 32.0, 120.0]),
    ([1.0, 1.0, 1.0],),
    6299.842428,
)
def hs64() -> Built:
    x, a = cp.Variable(3, bounds=[1e-5, None]), cp.Parameter(3)
    b, c = cp.Parameter(3, nonneg=True), cp.Parameter(3, nonneg=True)
    loss = a @ x + cp.sum(b / x)
    return cp.Problem(cp.Minimize(loss), [cp.sum(c / x) <= 1]), [a, b, c], [x]


@PROBLEMS.add((1e-4, 1.0, 1.0), ([1.0, 1.0, 1.0, 1.0],), -0.92042500364)
def hs68() -> Built:
    x = cp.Variable(4, bounds=[np.array([1e-4, 0, 0, 0]), np.array([100, 100, 2, 2])])
    a, b, d = (cp.Parameter(nonneg=True) for _ in range(3))
    growth, shift = cp.exp(x[0]) - 1, d * np.sqrt(24)
    gain = cp.multiply(b * growth - x[2], x[3]) / (growth + x[3])
    rows = [x[2] == 2 * cp.nlp.normcdf(-x[1])]
    rows += [x[3] == cp.nlp.normcdf(-x[1] + shift) + cp.nlp.normcdf(-x[1] - shift)]
    return cp.Problem(cp.Minimize((24 * a - gain) / x[0]), rows), [a, b, d], [x]


@PROBLEMS.add((25.0, 40.0), ([1.0, 5.0, 5.0, 1.0],), 17.0140172891520542)
def hs71() -> Built:
    x, a, b = cp.Variable(4, bounds=[1, 5]), cp.Parameter(), cp.Parameter()
    loss = cp.multiply(x[0] * x[3], cp.sum(x[:3])) + x[2]
    rows = [cp.prod(x) >= a, cp.sum_squares(x) == b]
    return cp.Problem(cp.Minimize(loss), rows), [a, b], [x]


@PROBLEMS.add(([1.0] * 4, [0.0401, 0.010085]), ([1.0, 1.0, 1.0, 1.0],), 727.679357790)
def hs72() -> Built:
    x = cp.Variable(4, bounds=[0.001, 1e5 * np.array([4, 3, 2, 1])])
    price, top = cp.Parameter(4), cp.Parameter(2)
    A = np.array([[4, 2.25, 1, 0.25], [0.16, 0.36, 0.64, 0.64]])
    return cp.Problem(cp.Minimize(1 + price @ x), [A @ (1 / x) <= top]), [price, top], [x]


@PROBLEMS.add(([24.55, 26.75, 39.0, 40.5], 21.0, 1.645), ([1.0, 1.0, 1.0, 1.0],), 29.894378)
def hs73() -> Built:
    x, price = cp.Variable(4, nonneg=True), cp.Parameter(4)
    protein, sure = cp.Parameter(), cp.Parameter(nonneg=True)
    deviation = cp.sqrt(np.array([0.28, 0.19, 20.5, 0.62]) @ x**2)
    rows = [np.array([2.3, 5.6, 11.1, 1.3]) @ x >= 5, cp.sum(x) == 1]
    rows += [np.array([12, 11.9, 41.8, 52.1]) @ x >= protein + sure * deviation]
    return cp.Problem(cp.Minimize(price @ x), rows), [price, protein, sure], [x]


def _two_generators(reach: float) -> Built:
    x = cp.Variable(4, bounds=[np.array([0, 0, -reach, -reach]), np.r_[1200, 1200, reach, reach]])
    load, phase, sin = cp.Parameter(3), cp.Parameter(), cp.nlp.sin
    gap, price = x[2] - x[3], cp.Parameter(2)
    loss = price @ x[:2] + 1e-6 * cube(x[0]) + 2e-6 / 3 * cube(x[1])
    rows = [x[3] - x[2] + reach >= 0, x[2] - x[3] + reach >= 0]
    rows += [1000 * sin(-x[2] - phase) + 1000 * sin(-x[3] - phase) + load[0] == x[0]]
    rows += [1000 * sin(x[2] - phase) + 1000 * sin(gap - phase) + load[1] == x[1]]
    rows += [1000 * sin(x[3] - phase) + 1000 * sin(-gap - phase) + load[2] == 0]
    return cp.Problem(cp.Minimize(loss), rows), [price, load, phase], [x]


_GRID = ([3.0, 2.0], [894.8, 894.8, 1294.8], 0.25)


@PROBLEMS.add(_GRID, ([680.0, 1030.0, 0.12, -0.4],), 5126.4981)
def hs74() -> Built:
    return _two_generators(0.55)


@PROBLEMS.add(_GRID, ([700.0, 900.0, 0.1, -0.3],), 5174.41269538)
def hs75() -> Built:
    return _two_generators(0.48)


@PROBLEMS.add((2 * _ROOT2, 8 + _ROOT2), ([2.0] * 5,), 0.24150513)
def hs77() -> Built:
    x, a, b = cp.Variable(5), cp.Parameter(), cp.Parameter()
    loss = (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2
    loss += (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6
    rows = [cp.multiply(x[0] ** 2, x[3]) + cp.nlp.sin(x[3] - x[4]) == a]
    rows += [x[1] + cp.multiply(x[2] ** 4, x[3] ** 2) == b]
    return cp.Problem(cp.Minimize(loss), rows), [a, b], [x]


def _product_rows(x: cp.Variable, a: cp.Parameter, b: cp.Parameter) -> list[cp.Constraint]:
    rows = [cp.sum_squares(x) == a, x[1] * x[2] == 5 * (x[3] * x[4])]
    return [*rows, cube(x[0]) + cube(x[1]) == b]


@PROBLEMS.add((10.0, -1.0), ([-2.0, 1.5, 2.0, -1.0, -1.0],), -2.91970041, unique=False)
def hs78() -> Built:
    x, a, b = cp.Variable(5), cp.Parameter(), cp.Parameter()
    loss = x[0] * x[1] * x[2] * x[3] * x[4]
    return cp.Problem(cp.Minimize(loss), _product_rows(x, a, b)), [a, b], [x]


@PROBLEMS.add(([2 + 3 * _ROOT2, -2 + 2 * _ROOT2, 2.0],), ([2.0] * 5,), 0.0787768209)
def hs79() -> Built:
    x, c = cp.Variable(5), cp.Parameter(3)
    loss = (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2
    loss += (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4
    rows = [x[0] + x[1] ** 2 + cube(x[2]) == c[0], x[1] - x[2] ** 2 + x[3] == c[1]]
    return cp.Problem(cp.Minimize(loss), [*rows, x[0] * x[4] == c[2]]), [c], [x]


_REACH = np.array([2.3, 2.3, 3.2, 3.2, 3.2])


@PROBLEMS.add((10.0, -1.0), ([-2.0, 2.0, 2.0, -1.0, -1.0],), 0.0539498478, unique=False)
def hs80() -> Built:
    x, a, b = cp.Variable(5, bounds=[-_REACH, _REACH]), cp.Parameter(), cp.Parameter()
    loss = cp.exp(x[0] * x[1] * x[2] * x[3] * x[4])
    return cp.Problem(cp.Minimize(loss), _product_rows(x, a, b)), [a, b], [x]


@PROBLEMS.add((0.5, 10.0, -1.0), ([-2.0, 2.0, 2.0, -1.0, -1.0],), 0.0539498478, unique=False)
def hs81() -> Built:
    x, w = cp.Variable(5, bounds=[-_REACH, _REACH]), cp.Parameter(nonneg=True)
    a, b = cp.Parameter(), cp.Parameter()
    loss = cp.exp(x[0] * x[1] * x[2] * x[3] * x[4]) - w * (cube(x[0]) + cube(x[1]) + 1) ** 2
    return cp.Problem(cp.Minimize(loss), _product_rows(x, a, b)), [w, a, b], [x]


@PROBLEMS.add(
    ([5.3578547, 0.8356891, 37.293239], [92.0, 110.0, 20.0]),
    ([78.0, 33.0, 27.0, 27.0, 27.0],),
    -30665.53867,
)
def hs83() -> Built:
    x = cp.Variable(5, bounds=[np.array([78, 33, 27, 27, 27]), np.array([102, 45, 45, 45, 45])])
    price, limit = cp.Parameter(3), cp.Parameter(3)
    loss = price[0] * x[2] ** 2 + price[1] * (x[0] * x[4]) + price[2] * x[0] - 40792.141
    first = 0.0056858 * x[1] * x[4] + 0.0006262 * x[0] * x[3] - 0.0022053 * x[2] * x[4]
    second = 0.0071317 * x[1] * x[4] + 0.0029955 * x[0] * x[1] + 0.0021813 * x[2] ** 2
    third = 0.0047026 * x[2] * x[4] + 0.0012547 * x[0] * x[2] + 0.0019085 * x[2] * x[3]
    y = cp.hstack([85.334407 + first, 80.51249 + second, 9.300961 + third])
    rows = [y[0] >= 0, y[0] <= limit[0], y[1] >= 90, y[1] <= limit[1], y[2] >= limit[2]]
    return cp.Problem(cp.Minimize(loss), [*rows, y[2] <= 25]), [price, limit], [x]


@PROBLEMS.add((2.07, 1.0), ([5.54, 4.4, 12.02, 11.82, 0.702, 0.852],), 135.075962829)
def hs93() -> Built:
    x, rating, rise = cp.Variable(6, nonneg=True), cp.Parameter(), cp.Parameter()
    core = cp.multiply(x[0] * x[3], x[0] + x[1] + x[2])
    wire = cp.multiply(x[1] * x[2], x[0] + 1.57 * x[1] + x[3])
    heat = cp.multiply(core, x[4] ** 2), cp.multiply(wire, x[5] ** 2)
    loss = 0.0204 * core + 0.0187 * wire + 0.0607 * heat[0] + 0.0437 * heat[1]
    rows = [0.001 * cp.prod(x) >= rating, 0.00062 * heat[0] + 0.00058 * heat[1] <= rise]
    return cp.Problem(cp.Minimize(loss), rows), [rating, rise], [x]


@PROBLEMS.add(([4.97, -1.88, -29.08, -78.02],), ([0.01] * 6,), 0.0156195252424)
def hs95() -> Built:
    x = cp.Variable(6, bounds=[0, np.array([0.31, 0.046, 0.068, 0.042, 0.028, 0.0134])])
    low = cp.Parameter(4)
    A = np.array(
        [
            [17.1, 38.2, 204.2, 212.3, 623.4, 1495.5],
            [17.9, 36.8, 113.9, 169.7, 337.8, 1385.2],
            [0, -273, 0, -70, -819, 0],
            [159.9, -311, 0, 587, 391, 2198],
        ]
    )
    pairs = cp.hstack([x[i] * x[j] for i, j in ((0, 2), (2, 4), (3, 4), (3, 5), (4, 5), (0, 5))])
    Q = np.array(
        [
            [-169, -3580, -3810, -18500, -24300, 0],
            [-139, 0, -2450, -16600, -17200, 0],
            [0, 0, 26000, 0, 0, 0],
            [0, 0, 0, 0, 0, -14000],
        ]
    )
    loss = np.array([4.3, 31.8, 63.3, 15.8, 68.5, 4.7]) @ x
    return cp.Problem(cp.Minimize(loss), [A @ x + Q @ pairs >= low]), [low], [x]


@PROBLEMS.add(
    (32.0, [100.0, 1.0]),
    ([0.5] * 7,),
    -831.079892,
    note="height and speed in thousands, objective in millions of the original's units",
)
def hs99() -> Built:
    x, gravity, goal = cp.Variable(7, bounds=[0, 1.58]), cp.Parameter(), cp.Parameter(2)
    span = np.diff([0, 25, 50, 100, 150, 200, 290, 380])
    thrust = np.array([50, 50, 75, 75, 75, 100, 100])
    way = (thrust * span) @ cp.nlp.cos(x) / 1000
    height = speed = 0
    for i in range(7):
        rate = (thrust[i] * cp.nlp.sin(x[i]) - gravity) / 1000
        height += span[i] ** 2 / 2 * rate + span[i] * speed
        speed += span[i] * rate
    rows = [height == goal[0], speed == goal[1]]
    return cp.Problem(cp.Minimize(-(way**2)), rows), [gravity, goal], [x]


@PROBLEMS.add(([10.0, 12.0, 11.0], [127.0, 282.0, 196.0]), ([1.0, 2, 0, 4, 0, 1, 1],), 680.6300573)
def hs100() -> Built:
    x, ends, c = cp.Variable(7), cp.Parameter(3), cp.Parameter(3)
    loss = (x[0] - ends[0]) ** 2 + 5 * (x[1] - ends[1]) ** 2 + 3 * (x[3] - ends[2]) ** 2
    loss += x[2] ** 4 + 10 * x[4] ** 6 + 7 * x[5] ** 2 + x[6] ** 4
    loss += -4 * x[5] * x[6] - 10 * x[5] - 8 * x[6]
    rows = [2 * x[0] ** 2 + 3 * x[1] ** 4 + x[2] + 4 * x[3] ** 2 + 5 * x[4] <= c[0]]
    rows += [7 * x[0] + 3 * x[1] + 10 * x[2] ** 2 + x[3] - x[4] <= c[1]]
    rows += [23 * x[0] + x[1] ** 2 + 6 * x[5] ** 2 - 8 * x[6] <= c[2]]
    mixed = 4 * x[0] ** 2 + x[1] ** 2 - 3 * x[0] * x[1]
    rows += [mixed + 2 * x[2] ** 2 + 5 * x[5] - 11 * x[6] <= 0]
    return cp.Problem(cp.Minimize(loss), rows), [ends, c], [x]
