"""Smooth nonconvex problems of 1 to 200 variables, to be timed: `benchmarks/nonconvex.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np

Arrays = list[np.ndarray]
Built = tuple[cp.Problem, list[cp.Parameter], list[cp.Variable]]


@dataclass(frozen=True)
class Case:
    """A problem to time, and values of its parameters that batches are scattered around.

    Attributes
    ----------
    name : str
    build : callable
        The problem, with starting values, its parameters and its variables.
    data : list of array
    spread : float
        Standard deviation of the scatter, relative to each parameter's mean size.
    """

    name: str
    build: Callable[[], Built]
    data: Arrays
    spread: float = 0.05

    @property
    def size(self) -> int:
        return sum(variable.size for variable in self.build()[2])

    def batch(self, count: int) -> Arrays:
        """Parameter values of a batch; those of its elements do not depend on its size."""
        rngs = [np.random.default_rng((i, len(self.name))) for i in range(count)]
        return [np.stack([self._scattered(value, rng) for rng in rngs]) for value in self.data]

    def _scattered(self, value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        unit = self.spread * np.abs(value).mean()
        return value + unit * rng.uniform(-1, 1, value.shape)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def quartic() -> Case:
    """A double well, tilted: one variable."""

    def build() -> Built:
        u, depth, tilt = cp.Variable(value=1.0), cp.Parameter(), cp.Parameter()
        return cp.Problem(cp.Minimize(u**4 / 4 - depth * u**2 / 2 + tilt * u)), [depth, tilt], [u]

    return Case("quartic", build, [np.array(1.5), np.array(0.2)])


def hock_schittkowski_71() -> Case:
    """The classic of IPOPT's manual."""

    def build() -> Built:
        x = cp.Variable(4, bounds=[1, 5], value=np.array([1.0, 5.0, 5.0, 1.0]))
        least, square = cp.Parameter(), cp.Parameter()
        rows = [cp.prod(x) >= least, cp.sum_squares(x) == square]
        cost = x[0] * x[3] * cp.sum(x[:3]) + x[2]
        return cp.Problem(cp.Minimize(cost), rows), [least, square], [x]

    return Case("Hock-Schittkowski 71", build, [np.array(25.0), np.array(40.0)])


def source_localisation() -> Case:
    """A source in the plane from its distances to six anchors, robustly."""
    anchors = 3 * _normal(0, 6, 2)

    def build() -> Built:
        x, ranges = cp.Variable(2, value=np.array([0.5, 0.5])), cp.Parameter(6)
        away = cp.sum((np.ones((6, 1)) @ cp.reshape(x, (1, 2), order="C") - anchors) ** 2, axis=1)
        error = cp.sqrt(away + 1e-3) - ranges
        return cp.Problem(cp.Minimize(cp.sum(cp.log(1 + error**2)))), [ranges], [x]

    return Case("source localisation", build, [np.linalg.norm(anchors - [1.0, -0.5], axis=1)])


def robust_fit() -> Case:
    """A curve of six coefficients through forty points under the Welsch penalty."""
    basis = np.vander(np.linspace(-1, 1, 40), 6)
    data = basis @ _normal(1, 6) + 0.05 * _normal(2, 40) + 3 * (np.arange(40) % 9 == 4)

    def build() -> Built:
        u, y = cp.Variable(6, value=np.linalg.lstsq(basis, data, rcond=None)[0]), cp.Parameter(40)
        return cp.Problem(cp.Minimize(cp.sum(1 - cp.exp(-((basis @ u - y) ** 2) / 2)))), [y], [u]

    return Case("robust fit", build, [data])


def bilinear_fit() -> Case:
    """Two linear factors whose product fits thirty numbers; one factor has length one."""
    left, right = _normal(3, 30, 3), _normal(4, 30, 4)
    a, b = np.array([0.8, 0.6, 0.0]), np.array([0.5, -1.0, 0.8, 1.2])
    data = (left @ a) * (right @ b) + 0.05 * _normal(5, 30)

    def build() -> Built:
        u, v, y = cp.Variable(3, value=a + 0.3), cp.Variable(4, value=b - 0.3), cp.Parameter(30)
        loss = cp.sum_squares(cp.multiply(left @ u, right @ v) - y)
        return cp.Problem(cp.Minimize(loss), [cp.sum_squares(u) == 1]), [y], [u, v]

    return Case("bilinear fit", build, [data])


def rosenbrock(n: int) -> Case:
    """A curved valley along a chain of variables within bounds."""

    def build() -> Built:
        x, bend = cp.Variable(n, bounds=[-2, 2], value=np.full(n, 0.5)), cp.Parameter(n - 1)
        loss = 10 * cp.sum((x[1:] - cp.multiply(bend, x[:-1] ** 2)) ** 2)
        return cp.Problem(cp.Minimize(loss + cp.sum_squares(1 - x[:-1]))), [bend], [x]

    return Case("Rosenbrock chain", build, [np.ones(n - 1)])


def power_flow() -> Case:
    """Least cost of power in an alternating-current network of four buses."""
    Y = np.zeros((4, 4), complex)
    lines = ((0, 1, 1.2, 6.0), (0, 2, 0.8, 5.0), (1, 2, 1.0, 4.5), (2, 3, 1.5, 7.0))
    for i, j, g, b in lines:
        Y[[i, j], [i, j]] += g - 1j * b
        Y[[i, j], [j, i]] -= g - 1j * b

    def build() -> Built:
        volt = cp.Variable(4, bounds=[0.9, 1.05], value=np.ones(4))
        angle = cp.Variable(4, value=np.zeros(4))
        p, q = cp.Variable(2, nonneg=True, value=[0.7, 0.7]), cp.Variable(2, value=[0.3, 0.3])
        price, load, other = (cp.Parameter(2) for _ in range(3))
        ones = np.ones((4, 1))
        gap = cp.reshape(angle, (4, 1), order="C") @ ones.T - ones @ cp.reshape(
            angle, (1, 4), order="C"
        )
        cosine, sine = cp.nlp.cos(gap), cp.nlp.sin(gap)
        active = (cp.multiply(Y.real, cosine) + cp.multiply(Y.imag, sine)) @ volt
        reactive = (cp.multiply(Y.real, sine) - cp.multiply(Y.imag, cosine)) @ volt
        rows = [cp.multiply(volt, active) == cp.hstack([p, -load]), angle[0] == 0]
        rows += [cp.multiply(volt, reactive) == cp.hstack([q, -other])]
        cost = price @ p + 0.5 * cp.sum_squares(p) + 0.1 * cp.sum_squares(q)
        return cp.Problem(cp.Minimize(cost), rows), [price, load, other], [volt, angle, p, q]

    return Case("AC power flow", build, [np.array(v) for v in ([1, 1.4], [0.7, 0.5], [0.2, 0.1])])


def circle_packing(count: int) -> Case:
    """The smallest circle around circles of given radii, one of them on a line."""
    turn = 2 * np.pi * np.arange(count) / count
    around = 2.6 * np.c_[np.cos(turn), np.sin(turn)] * np.linspace(0.7, 1, count)[:, None]

    def build() -> Built:
        R, at = cp.Variable(value=4.0), cp.Variable((count, 2), value=around)
        r, (i, j) = cp.Parameter(count, nonneg=True), np.triu_indices(count, 1)
        rows = [cp.sum(at**2, axis=1) <= (R - r) ** 2, r <= R]
        rows += [cp.sum((at[i] - at[j]) ** 2, axis=1) >= (r[i] + r[j]) ** 2]
        rows += [at[0, 1] == 0]
        loss = R + 0.01 * cp.sum_squares(at)  # which puts loose ones to their places
        return cp.Problem(cp.Minimize(loss), rows), [r], [R, at]

    return Case("circle packing", build, [np.linspace(0.6, 1.0, count)])


def ellipsoid_projection(n: int) -> Case:
    """The nearest point of an ellipsoid."""

    def build() -> Built:
        u, x, w = cp.Variable(n, value=np.full(n, 0.3)), cp.Parameter(n), cp.Parameter(n, pos=True)
        return cp.Problem(cp.Minimize(cp.sum_squares(u - x) / 2), [w @ u**2 == 1]), [x, w], [u]

    return Case("ellipsoid projection", build, [_normal(6, n) + 1, np.linspace(0.5, 2, n)])


def factorisation(rows: int, columns: int) -> Case:
    """Nonnegative factors of rank two."""
    rng = np.random.default_rng(7)
    W, H = rng.uniform(0.2, 1, (rows, 2)), rng.uniform(0.2, 1, (2, columns))
    W[: rows // 3, 0], H[1, : columns // 3] = 0, 0
    W /= W.sum(0)

    def build() -> Built:
        left = cp.Variable((rows, 2), nonneg=True, value=W + 0.05)
        right = cp.Variable((2, columns), nonneg=True, value=H + 0.2)
        V = cp.Parameter((rows, columns))
        loss = cp.sum_squares(V - left @ right) + 0.01 * cp.sum_squares(right)
        return cp.Problem(cp.Minimize(loss), [cp.sum(left, axis=0) == 1]), [V], [left, right]

    return Case("nonnegative factors", build, [W @ H])


def path_planning(count: int) -> Case:
    """A path of given way points around two circles."""
    line = np.linspace([-2, 0.1], [2.5, 0.3], count + 2)[1:-1]
    bend = np.sin(np.linspace(0, 2 * np.pi, count))[:, None] * [0, 1.0]

    def build() -> Built:
        at, ends = cp.Variable((count, 2), value=line + bend), cp.Parameter((2, 2))
        centre, r = cp.Parameter((2, 2)), cp.Parameter(2, nonneg=True)
        loss = cp.sum_squares(at[1:] - at[:-1])
        loss += cp.sum_squares(at[0] - ends[0]) + cp.sum_squares(at[-1] - ends[1])
        away = [at - np.ones((count, 1)) @ centre[i : i + 1] for i in range(2)]
        rows = [cp.sum(away[i] ** 2, axis=1) >= r[i] ** 2 for i in range(2)]
        return cp.Problem(cp.Minimize(loss), rows), [ends, centre, r], [at]

    centres = np.array([[-0.8, -0.3], [1.0, 0.6]])
    return Case(
        "path planning",
        build,
        [np.array([[-2.0, 0.1], [2.5, 0.3]]), centres, np.array([0.7, 0.6])],
        spread=0.02,
    )


def swing_up(steps: int) -> Case:
    """Least effort that lifts a pendulum a quarter turn, in steps of time."""

    def build() -> Built:
        angle = cp.Variable(steps + 1, value=np.linspace(0, np.pi / 2, steps + 1))
        rate, torque = (cp.Variable(m, value=np.zeros(m)) for m in (steps + 1, steps))
        pull, limit, h = cp.Parameter(), cp.Parameter(nonneg=True), 2.0 / steps
        pulls = (cp.nlp.sin(angle[1:]) + cp.nlp.sin(angle[:-1])) / 2
        rows = [angle[0] == 0, rate[0] == 0, angle[-1] == np.pi / 2, rate[-1] == 0]
        rows += [angle[1:] - angle[:-1] == h * (rate[1:] + rate[:-1]) / 2]
        rows += [rate[1:] - rate[:-1] == h * (torque - pull * pulls)]
        rows += [torque <= limit, torque >= -limit]
        problem = cp.Problem(cp.Minimize(h * cp.sum_squares(torque)), rows)
        return problem, [pull, limit], [angle, rate, torque]

    return Case("pendulum", build, [np.array(3.0), np.array(3.5)])


CASES = [
    quartic(), source_localisation(), hock_schittkowski_71(), robust_fit(), bilinear_fit(),
    rosenbrock(10), power_flow(), circle_packing(6), ellipsoid_projection(30),
    factorisation(12, 12), path_planning(40), swing_up(65),
]  # fmt: skip
