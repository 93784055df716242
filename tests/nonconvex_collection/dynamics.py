"""Paths, motions, networks and chains: problems with an equation for every step or node."""

from __future__ import annotations

import cvxpy as cp
import numpy as np

from nonconvex_collection.problem import Arrays, Built, Collector

PROBLEMS = Collector()


def _straight(start: list[float], goal: list[float], count: int) -> np.ndarray:
    return np.linspace(start, goal, count + 2)[1:-1]


# Paths around obstacles


def _path(count: int, obstacles: int) -> Built:
    """Shortest sum of squared steps with every way point outside of circles."""
    at, ends = cp.Variable((count, 2)), cp.Parameter((2, 2))
    centre, r = cp.Parameter((obstacles, 2)), cp.Parameter(obstacles, nonneg=True)
    loss = cp.sum_squares(at[1:] - at[:-1])
    loss += cp.sum_squares(at[0] - ends[0]) + cp.sum_squares(at[-1] - ends[1])
    rows = [
        cp.sum((at - np.ones((count, 1)) @ centre[i : i + 1]) ** 2, axis=1) >= r[i] ** 2
        for i in range(obstacles)
    ]
    return cp.Problem(cp.Minimize(loss), rows), [ends, centre, r], [at]


@PROBLEMS.add(
    ([[-2.0, 0.0], [2.0, 0.3]], [[0.1, -0.2]], [0.8]),
    (_straight([-2, 0.7], [2, 1], 8),),
    1.8723358528,
)
def path_around_a_circle() -> Built:
    return _path(8, 1)


@PROBLEMS.add(
    ([[-2.0, 0.0], [2.5, 0.3]], [[-0.8, -0.3], [1.0, 0.6]], [0.7, 0.6]),
    (_straight([-2, 0], [2.5, 0.3], 12) + np.linspace(0.7, -0.7, 12)[:, None] * [0, 1],),
    1.65401379686,
)
def path_between_two_circles() -> Built:
    return _path(12, 2)


# Motions


def _cannon(goal: np.ndarray, g: float) -> Arrays:
    far = np.hypot(*goal)
    time = np.sqrt(2 * far / g)
    return np.array([goal[0] / time, goal[1] / time + g * time / 2]), time


@PROBLEMS.add(
    ([3.0, 1.0], 9.81),
    ([3.0, 5.0], 1.0),
    9.81 * (1 + np.sqrt(10)),
    answer=_cannon,
)
def slowest_throw_that_reaches() -> Built:
    speed, time, goal, g = cp.Variable(2), cp.Variable(nonneg=True), cp.Parameter(2), cp.Parameter()
    rows = [speed[0] * time == goal[0], speed[1] * time - g / 2 * time**2 == goal[1]]
    return cp.Problem(cp.Minimize(cp.sum_squares(speed)), rows), [goal, g], [speed, time]


@PROBLEMS.add(
    ([0.0, 0.0, 0.0], [1.0, 1.0, 0.0], 0.6),
    (
        np.c_[
            [0, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 1],
            [0, -0.1, 0, 0.2, 0.5, 0.7, 0.9, 1],
            [0, 0.5, 0.6, 0.9, 1, 0.9, 0.5, 0],
        ],
        [-1.5, 0.6, 1.5, 1.2, 1.1, 1.3, 1.5],
        [-0.6, 0, 0.4, 0.2, -0.2, -0.5, -0.6],
    ),
    17.3011054176,
    note="seven steps of a car into the next lane, the first of them backwards",
)
def car_parking() -> Built:
    state, drive, steer = cp.Variable((8, 3)), cp.Variable(7), cp.Variable(7)
    begin, goal, limit = cp.Parameter(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    heading, h = (state[1:, 2] + state[:-1, 2]) / 2, 0.25
    rows = [state[0] == begin, state[-1] == goal, steer <= limit, steer >= -limit]
    rows += [state[1:, 0] - state[:-1, 0] == h * cp.multiply(drive, cp.nlp.cos(heading))]
    rows += [state[1:, 1] - state[:-1, 1] == h * cp.multiply(drive, cp.nlp.sin(heading))]
    rows += [state[1:, 2] - state[:-1, 2] == 2 * h * cp.multiply(drive, cp.nlp.tan(steer))]
    loss = (
        cp.sum_squares(drive) + cp.sum_squares(steer) + 5 * cp.sum_squares(steer[1:] - steer[:-1])
    )
    problem = cp.Problem(cp.Minimize(loss), rows)
    return problem, [begin, goal, limit], [state, drive, steer]


@PROBLEMS.add(
    (0.3, 4.0, 9.0),
    (
        [0, 0.1, 0.4, 0.3, -0.2, -0.8, -1.2, -0.7, 0.4, 1.6, 2.5, 3, np.pi],
        [0, 0.9, 0.6, -1, -2.3, -2.1, 0, 2.9, 4.5, 3.8, 2.1, 1, 0],
        [3.7, 1.2, -2.2, -4, -3.4, -0.6, 2.6, 4, 3.8, 1.6, -0.4, -2.7],
    ),
    95.0940262745,
    unique=False,
    note="a pendulum swung up in twelve steps with bounded torque, with one swing back",
)
def pendulum_swing_up() -> Built:
    angle, rate, torque = cp.Variable(13), cp.Variable(13), cp.Variable(12)
    step, limit, pull = cp.Parameter(nonneg=True), cp.Parameter(nonneg=True), cp.Parameter()
    pulls = (cp.nlp.sin(angle[1:]) + cp.nlp.sin(angle[:-1])) / 2
    rows = [angle[0] == 0, rate[0] == 0, angle[-1] == np.pi, rate[-1] == 0]
    rows += [angle[1:] - angle[:-1] == step * (rate[1:] + rate[:-1]) / 2]
    rows += [rate[1:] - rate[:-1] == step * (torque - pull * pulls)]
    rows += [torque <= limit, torque >= -limit]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(torque)), rows)
    return problem, [step, limit, pull], [angle, rate, torque]


# Shapes in gravity


@PROBLEMS.add(
    ([2.0, -0.3], 0.5),
    (np.linspace([0, 0], [2, -0.3], 7)[1:-1] - [0, 0.6],),
    -4.29506370699,
    note="six links of given length, least height",
)
def hanging_chain() -> Built:
    at, end, length = cp.Variable((5, 2)), cp.Parameter(2), cp.Parameter(nonneg=True)
    nodes = [np.zeros(2), *(at[i] for i in range(5)), end]
    rows = [cp.sum_squares(nodes[i + 1] - nodes[i]) == length**2 for i in range(6)]
    return cp.Problem(cp.Minimize(cp.sum(at[:, 1])), rows), [end, length], [at]


@PROBLEMS.add(
    (2.0, 1.0),
    (np.linspace(0, 1, 9)[1:-1],),
    1.80712082122,
    note="the fastest descent on a line of eight pieces, from rest",
)
def fastest_descent() -> Built:
    drop, across, down = cp.Variable(7, bounds=[0.01, 5]), cp.Parameter(), cp.Parameter(nonneg=True)
    speed = cp.hstack([0, cp.sqrt(drop), cp.sqrt(down)])
    rise = cp.hstack([drop[0], drop[1:] - drop[:-1], down - drop[-1]])
    time = cp.sqrt((across / 8) ** 2 + rise**2) / (speed[1:] + speed[:-1])
    return cp.Problem(cp.Minimize(cp.sum(time))), [across, down], [drop]


# AC power flow


_LINES = ((0, 1, 1.2, 6.0), (0, 2, 0.8, 5.0), (1, 2, 1.0, 4.5), (2, 3, 1.5, 7.0))


def _admittance() -> tuple[np.ndarray, np.ndarray]:
    Y = np.zeros((4, 4), complex)
    for i, j, g, b in _LINES:
        for k, m in ((i, j), (j, i)):
            Y[k, k] += g - 1j * b
            Y[k, m] -= g - 1j * b
    return Y.real, Y.imag


def _polar_balance(volt: cp.Expression, angle: cp.Expression) -> tuple[cp.Expression, ...]:
    """Active and reactive power into the network at each of four buses."""
    G, B = _admittance()
    active, reactive = [], []
    for i in range(4):
        gap = angle[i] - angle
        cosine, sine = cp.nlp.cos(gap), cp.nlp.sin(gap)
        current = cp.multiply(volt, cp.multiply(G[i], cosine) + cp.multiply(B[i], sine))
        other = cp.multiply(volt, cp.multiply(G[i], sine) - cp.multiply(B[i], cosine))
        active.append(volt[i] * cp.sum(current))
        reactive.append(volt[i] * cp.sum(other))
    return cp.hstack(active), cp.hstack(reactive)


@PROBLEMS.add(
    ([0.5, -0.9, -0.4], [0.1, -0.4, -0.2]),
    (np.ones(3), np.zeros(3)),
    0.0,
    unique=False,
    note="as many equations as unknowns; the solution of high voltage",
)
def power_flow_of_four_buses() -> Built:
    volt, angle = cp.Variable(3), cp.Variable(3)
    p, q = cp.Parameter(3), cp.Parameter(3)
    active, reactive = _polar_balance(cp.hstack([1, volt]), cp.hstack([0, angle]))
    rows = [active[1:] == p, reactive[1:] == q]
    return cp.Problem(cp.Minimize(0), rows), [p, q], [volt, angle]


@PROBLEMS.add(
    ([1.0, 1.4], [0.7, 0.5], [0.2, 0.1], 1.05),
    (np.ones(4), np.zeros(4), [0.7, 0.7], [0.3, 0.3]),
    1.84454637056,
)
def optimal_power_flow_of_four_buses() -> Built:
    volt, angle = cp.Variable(4, bounds=[0.9, None]), cp.Variable(4)
    p, q = cp.Variable(2, nonneg=True), cp.Variable(2)
    price, load, other, top = *(cp.Parameter(2) for _ in range(3)), cp.Parameter()
    active, reactive = _polar_balance(volt, angle)
    rows = [active == cp.hstack([p, -load]), reactive == cp.hstack([q, -other])]
    rows += [angle[0] == 0, volt <= top]
    loss = price @ p + 0.5 * cp.sum_squares(p) + 0.1 * cp.sum_squares(q)
    return cp.Problem(cp.Minimize(loss), rows), [price, load, other, top], [volt, angle, p, q]


@PROBLEMS.add(
    ([0.9, 0.6], [0.4, 0.3], 1.05),
    (np.ones(4), np.zeros(4), [0.7, 0.7], [0.3, 0.3]),
    1.66857956859,
    note="least losses, in real and imaginary parts of the voltages",
)
def least_losses_of_four_buses() -> Built:
    G, B = _admittance()
    e, f = cp.Variable(4), cp.Variable(4)
    p, q = cp.Variable(2), cp.Variable(2)
    load, other, top = cp.Parameter(2), cp.Parameter(2), cp.Parameter(nonneg=True)
    real, imaginary = G @ e - B @ f, G @ f + B @ e
    rows = [cp.multiply(e, real) + cp.multiply(f, imaginary) == cp.hstack([p, -load])]
    rows += [cp.multiply(f, real) - cp.multiply(e, imaginary) == cp.hstack([q, -other])]
    rows += [f[0] == 0, e[0] == 1, e**2 + f**2 <= top**2]
    loss = cp.sum(p) + 0.05 * cp.sum_squares(p) + 0.01 * cp.sum_squares(q)
    return cp.Problem(cp.Minimize(loss), rows), [load, other, top], [e, f, p, q]
