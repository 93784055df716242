"""Problems 104 to 114 of the collection of Hock and Schittkowski, with parameters in their data.

Source and conventions are those of `hock_schittkowski`.
"""

from __future__ import annotations

import cvxpy as cp
import numpy as np

from nonconvex_collection.hock_schittkowski import cube
from nonconvex_collection.problem import Built, Collector

PROBLEMS = Collector()


@PROBLEMS.add(
    (0.0588, 4.0, 4.2), ([6.0, 3.0, 0.4, 0.2, 6.0, 6.0, 1.0, 0.5],), 3.9511634396, unique=False
)
def hs104() -> Built:
    x = cp.Variable(8, bounds=[0.1, 10])
    rate, load, top = (cp.Parameter(nonneg=True) for _ in range(3))
    ratio = cp.multiply(cp.power(x[:2], 0.67), cp.power(x[6:], -0.67))
    loss = 0.4 * cp.sum(ratio) + 10 - x[0] - x[1]
    flow = rate * cp.multiply(x[4:6], x[6:])
    rows = [1 - flow[0] - 0.1 * x[0] >= 0, 1 - flow[1] - 0.1 * x[0] - 0.1 * x[1] >= 0]
    held = (load * x[2:4] + 2 * cp.power(x[2:4], -0.71)) / x[4:6]
    rows += [held + rate * cp.multiply(cp.power(x[2:4], -1.3), x[6:]) <= 1]
    return cp.Problem(cp.Minimize(loss), [*rows, loss >= 0.1, loss <= top]), [rate, load, top], [x]


@PROBLEMS.add(
    ([833.33252, 1250.0, 2500.0], 0.0025),
    ([5000.0, 5000.0, 5000.0, 200.0, 350.0, 150.0, 225.0, 425.0],),
    7049.2480205,
)
def hs106() -> Built:
    low, high = np.array([100, 1000, 1000] + 5 * [10]), np.array(3 * [10000] + 5 * [1000])
    x, heat, scale = cp.Variable(8, bounds=[low, high]), cp.Parameter(3), cp.Parameter()
    rows = [scale * (x[3] + x[5]) <= 1, scale * (x[4] + x[6] - x[3]) <= 1]
    rows += [0.01 * (x[7] - x[4]) <= 1]
    rows += [x[0] * x[5] - heat[0] * x[3] - 100 * x[0] + 83333.333 >= 0]
    rows += [x[1] * x[6] - x[1] * x[3] - heat[1] * (x[4] - x[3]) >= 0]
    rows += [x[2] * x[7] - x[2] * x[4] + heat[2] * x[4] - 1250000 >= 0]
    return cp.Problem(cp.Minimize(cp.sum(x[:3])), rows), [heat, scale], [x]


@PROBLEMS.add(
    ([3000.0, 2000.0], [0.4, 0.4, 0.8], [0.2, 0.2, -0.337]),
    ([0.8, 0.8, 0.2, 0.2, 1.0454, 1.0454, 1.0454, 0.0, 0.0],),
    5055.01144732,
    note="power flow between three buses",
)
def hs107() -> Built:
    x = cp.Variable(9, bounds=[np.r_[0, 0, -np.inf, -np.inf, 3 * [0.90909], 2 * [-np.inf]], None])
    price, active, reactive = cp.Parameter(2), cp.Parameter(3), cp.Parameter(3)
    c, d = 48.4 / 50.176 * np.sin(0.25), 48.4 / 50.176 * np.cos(0.25)
    volt, angle = x[4:7], cp.hstack([0, -x[7], -x[8]])
    rows = [volt <= 1.0909]
    for i in range(3):
        real, other = active[i] + 2 * c * volt[i] ** 2, reactive[i] + 2 * d * volt[i] ** 2
        for j in {0, 1, 2} - {i}:
            sine, cosine = cp.nlp.sin(angle[i] - angle[j]), cp.nlp.cos(angle[i] - angle[j])
            both = volt[i] * volt[j]
            real -= cp.multiply(both, d * sine + c * cosine)
            other += cp.multiply(both, c * sine - d * cosine)
        rows += [real == x[i], other == x[2 + i]] if i < 2 else [real == 0, other == 0]
    loss = price @ x[:2] + 1000 * cube(x[0]) + 2000 / 3 * cube(x[1])
    return cp.Problem(cp.Minimize(loss), rows), [price, active, reactive], [x]


@PROBLEMS.add((2.0, 10.0), ([9.0] * 10,), -45.77846971)
def hs110() -> Built:
    x, a, b = cp.Variable(10, bounds=[2.001, 9.999]), cp.Parameter(), cp.Parameter()
    loss = cp.sum(cp.log(x - a) ** 2 + cp.log(b - x) ** 2) - cp.exp(0.2 * cp.sum(cp.log(x)))
    return cp.Problem(cp.Minimize(loss)), [a, b], [x]


_POTENTIAL = [-6.089, -17.164, -34.054, -5.914, -24.721, -14.986, -24.1, -10.708, -26.662, -22.179]


@PROBLEMS.add(
    (_POTENTIAL, [2.0, 1.0, 1.0]),
    ([-3.0, -2.0, -0.3, -5.0, -0.7, -6.0, -3.0, -4.0, -3.0, -2.0],),
    -47.7610908594,
)
def hs111() -> Built:
    x, potential, atoms = cp.Variable(10, bounds=[-100, 100]), cp.Parameter(10), cp.Parameter(3)
    amount = cp.exp(x)
    loss = cp.sum(cp.multiply(amount, potential + x - cp.log(cp.sum(amount))))
    A = np.array(
        [
            [1, 2, 2, 0, 0, 1, 0, 0, 0, 1],
            [0, 0, 0, 1, 2, 1, 1, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 1, 1, 2, 1],
        ]
    )
    return cp.Problem(cp.Minimize(loss), [A @ amount == atoms]), [potential, atoms], [x]


@PROBLEMS.add(
    ([-14.0, -16.0], [120.0, 40.0, 30.0], [105.0, 12.0]),
    ([2.0, 3, 5, 5, 1, 2, 7, 3, 6, 10],),
    24.3062091,
)
def hs113() -> Built:
    x, slope = cp.Variable(10), cp.Parameter(2)
    curved, straight = cp.Parameter(3), cp.Parameter(2)
    loss = cp.sum_squares(x[:2]) + x[0] * x[1] + slope @ x[:2] + 45
    weight, end = np.array([1, 4, 1, 2, 5, 7, 2, 1]), np.array([10, 5, 3, 1, 0, 11, 10, 7])
    loss += weight @ (x[2:] - end) ** 2
    rows = [3 * (x[0] - 2) ** 2 + 4 * (x[1] - 3) ** 2 + 2 * x[2] ** 2 - 7 * x[3] <= curved[0]]
    rows += [5 * x[0] ** 2 + 8 * x[1] + (x[2] - 6) ** 2 - 2 * x[3] <= curved[1]]
    rows += [(x[0] - 8) ** 2 / 2 + 2 * (x[1] - 4) ** 2 + 3 * x[4] ** 2 - x[5] <= curved[2]]
    rows += [x[0] ** 2 + 2 * (x[1] - 2) ** 2 - 2 * x[0] * x[1] + 14 * x[4] - 6 * x[5] <= 0]
    rows += [4 * x[0] + 5 * x[1] - 3 * x[6] + 9 * x[7] <= straight[0]]
    rows += [10 * x[0] - 8 * x[1] - 17 * x[6] + 2 * x[7] <= 0]
    rows += [-3 * x[0] + 6 * x[1] + 12 * (x[8] - 8) ** 2 - 7 * x[9] <= 0]
    rows += [-8 * x[0] + 2 * x[1] + 5 * x[8] - 2 * x[9] <= straight[1]]
    return cp.Problem(cp.Minimize(loss), rows), [slope, curved, straight], [x]


@PROBLEMS.add(
    ([5.04, 0.035, 10.0, 3.36, 0.063], 1.22),
    ([1745.0, 12000.0, 110.0, 3048.0, 1974.0, 89.2, 92.8, 8.0, 3.6, 145.0],),
    -1768.80696,
    note="an alkylation plant, in units from 1 to 10000",
)
def hs114() -> Built:
    low = np.array([1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 85, 90, 3, 1.2, 145])
    high = np.array([2000, 16000, 120, 5000, 2000, 93, 95, 12, 4, 162])
    x, price, growth = cp.Variable(10, bounds=[low, high]), cp.Parameter(5), cp.Parameter()
    loss = price[:4] @ cp.hstack([x[0], x[1], x[2], x[4]]) - price[4] * (x[3] * x[6])
    dilution, octane = 35.82 - 0.222 * x[9], 3 * x[6] - 133
    made = 1.12 * x[0] + 0.13167 * (x[0] * x[7]) - 0.00667 * cp.multiply(x[0], x[7] ** 2)
    motor = 57.425 + 1.098 * x[7] - 0.038 * x[7] ** 2 + 0.325 * x[5]
    rows = [growth * x[3] == x[0] + x[4], x[0] * x[7] == x[1] + x[4]]
    rows += [98000 * x[2] == cp.multiply(x[5], x[3] * x[8] + 1000 * x[2])]
    for bound, value, slack in ((dilution, x[8], 0.9), (octane, x[9], 0.99)):
        rows += [bound >= slack * value, bound <= value / slack]
    for bound, value in ((made, x[3]), (motor, x[6])):
        rows += [bound >= 0.99 * value, bound <= value / 0.99]
    return cp.Problem(cp.Minimize(loss), rows), [price, growth], [x]
