"""Robust means, fits of nonlinear models, and factorisations."""

from __future__ import annotations

from collections.abc import Callable

import cvxpy as cp
import numpy as np
from scipy.optimize import brentq

from declarative_cvx.atoms import (
    cauchy,
    geman_mcclure,
    pseudo_huber,
    truncated_quadratic,
    tukey,
    welsch,
)
from nonconvex_collection.geometry import normal
from nonconvex_collection.problem import Arrays, Built, Collector

PROBLEMS = Collector()


# Robust means (DDN 5.1): value and slope of each penalty, with r = z / alpha

_SAMPLE, _SCALE = [0.1, 0.35, -0.2, 0.25, 0.05, 3.0, 2.7], 0.8
Formula = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
_PENALTIES: dict[str, tuple[Callable, Formula, Formula]] = {
    "quadratic": (
        lambda z, a: cp.square(z) / (2 * a),
        lambda z, r, a: z**2 / (2 * a),
        lambda z, r, a: z / a,
    ),
    "pseudo_huber": (
        pseudo_huber,
        lambda z, r, a: a**2 * (np.sqrt(1 + r**2) - 1),
        lambda z, r, a: z / np.sqrt(1 + r**2),
    ),
    "huber": (
        lambda z, a: cp.huber(z, a) / 2,
        lambda z, r, a: np.where(abs(r) < 1, z**2 / 2, a * abs(z) - a**2 / 2),
        lambda z, r, a: np.clip(z, -a, a),
    ),
    "welsch": (
        welsch,
        lambda z, r, a: 1 - np.exp(-(r**2) / 2),
        lambda z, r, a: r / a * np.exp(-(r**2) / 2),
    ),
    "cauchy": (
        cauchy,
        lambda z, r, a: a**2 / 2 * np.log1p(r**2),
        lambda z, r, a: z / (1 + r**2),
    ),
    "geman_mcclure": (
        geman_mcclure,
        lambda z, r, a: z**2 / (2 * (1 + r**2)),
        lambda z, r, a: z / (1 + r**2) ** 2,
    ),
    "tukey": (
        tukey,
        lambda z, r, a: a**2 / 6 * (1 - np.maximum(1 - r**2, 0) ** 3),
        lambda z, r, a: z * np.maximum(1 - r**2, 0) ** 2,
    ),
    "truncated_quadratic": (
        truncated_quadratic,
        lambda z, r, a: np.minimum(z**2, a**2) / 2,
        lambda z, r, a: np.where(abs(r) < 1, z, 0),
    ),
}


def _add_robust_mean(name: str) -> None:
    atom, value, slope = _PENALTIES[name]
    convex = name in ("quadratic", "pseudo_huber", "huber")
    smooth = name != "truncated_quadratic"

    def statement() -> Built:
        u, x, a = cp.Variable(), cp.Parameter(7), cp.Parameter(pos=True)
        return cp.Problem(cp.Minimize(cp.sum(atom(u - x, a)))), [x, a], [u]

    def answer(x: np.ndarray, a: float) -> Arrays:
        def total(u: float) -> float:
            return float(np.sum(slope(u - x, (u - x) / a, a)))

        return (brentq(total, -0.5, 2.0 if convex else 0.6, xtol=1e-16, rtol=1e-15),)

    z = answer(np.array(_SAMPLE), _SCALE)[0] - np.array(_SAMPLE)
    PROBLEMS.add(
        (_SAMPLE, _SCALE),
        (0.2,),
        np.sum(value(z, z / _SCALE, _SCALE)),
        name=f"robust_mean_{name}",
        answer=answer,
        convex=convex,
        dnlp=smooth,
        note="" if smooth else "the penalty has a kink",
    )(statement)


for _name in _PENALTIES:
    _add_robust_mean(_name)


# Robust and nonlinear fits

_TIMES = np.arange(10) / 3


@PROBLEMS.add(
    (0.5 + 0.8 * _TIMES + 0.1 * normal(11, 10) + 3 * (np.arange(10) == 6), 0.6),
    ([0.3, 1.0],),
    1.07983409604,
)
def robust_line() -> Built:
    u, y, a = cp.Variable(2), cp.Parameter(10), cp.Parameter(pos=True)
    residual = (u[0] + u[1] * _TIMES - y) / a
    return cp.Problem(cp.Minimize(cp.sum(1 - cp.exp(-(residual**2) / 2)))), [y, a], [u]


@PROBLEMS.add((0.4 * normal(12, 8) + 5 * (np.arange(8) == 3), 3.0), (0.0, 0.5), 4.53898577327)
def location_and_scale_of_heavy_tails() -> Built:
    at, scale = cp.Variable(), cp.Variable(pos=True)
    y, freedom = cp.Parameter(8), cp.Parameter(pos=True)
    spread = cp.log(1 + ((y - at) / scale) ** 2 / freedom)
    loss = 8 * cp.log(scale) + (freedom + 1) / 2 * cp.sum(spread)
    return cp.Problem(cp.Minimize(loss), [scale >= 1e-3]), [y, freedom], [at, scale]


_WAVE = 1.3 * np.sin(1.7 * _TIMES + 0.4) + 0.2


@PROBLEMS.add(
    (_WAVE + 0.05 * normal(13, 10),), ([1.0, 1.6, 0.5, 0.0],), 0.0414849649972, unique=False
)
def sine_fit() -> Built:
    u, y = cp.Variable(4), cp.Parameter(10)
    wave = u[0] * cp.nlp.sin(u[1] * _TIMES + u[2]) + u[3]
    return cp.Problem(cp.Minimize(cp.sum_squares(wave - y))), [y], [u]


@PROBLEMS.add(
    (_WAVE, 0.05), ([1.0, 1.6, 0.5, 0.0],), 0.167927389427, unique=False, note="frequency penalised"
)
def damped_sine_fit() -> Built:
    u, y, w = cp.Variable(4), cp.Parameter(10), cp.Parameter(nonneg=True)
    wave = cp.multiply(cp.exp(-u[3] * _TIMES), u[0] * cp.nlp.sin(u[1] * _TIMES + u[2]))
    loss = cp.sum_squares(wave - y) + w * cp.sum_squares(u[1:])
    return cp.Problem(cp.Minimize(loss)), [y, w], [u]


@PROBLEMS.add(
    (2.0 * np.exp(-1.1 * _TIMES) + 0.3 + 0.02 * normal(14, 10),),
    ([1.0, 1.0, 0.0],),
    0.00377751200657,
)
def exponential_fit() -> Built:
    u, y = cp.Variable(3), cp.Parameter(10)
    decay = u[0] * cp.exp(-u[1] * _TIMES) + u[2]
    return cp.Problem(cp.Minimize(cp.sum_squares(decay - y))), [y], [u]


@PROBLEMS.add(
    (2 * _TIMES / (0.7 + _TIMES) + 0.03 * normal(15, 10),), ([1.5, 1.0],), 0.00943758253643
)
def saturation_fit() -> Built:
    u, y = cp.Variable(2, bounds=[0.01, 10]), cp.Parameter(10)
    rate = cp.multiply(u[0] * _TIMES, 1 / (u[1] + _TIMES))
    return cp.Problem(cp.Minimize(cp.sum_squares(rate - y))), [y], [u]


@PROBLEMS.add(
    (3 / (1 + np.exp(-2 * (_TIMES - 1.4))) + 0.05 * normal(16, 10), 0.01),
    ([2.0, 1.0, 1.0],),
    0.121335973213,
)
def growth_fit() -> Built:
    u, y, w = cp.Variable(3), cp.Parameter(10), cp.Parameter(nonneg=True)
    curve = u[0] * (1 + cp.nlp.tanh(u[1] * _TIMES - u[2])) / 2
    loss = cp.sum_squares(curve - y) + w * cp.sum_squares(u)
    return cp.Problem(cp.Minimize(loss)), [y, w], [u]


_LIVES = [0.4, 0.9, 1.1, 1.6, 2.3, 0.7]


def _weibull(t: np.ndarray) -> Arrays:
    log = np.log(t)

    def excess(k: float) -> float:
        return float(t**k @ log / np.sum(t**k) - 1 / k - log.mean())

    k = brentq(excess, 0.1, 20.0, xtol=1e-16, rtol=1e-15)
    return k, np.log(np.mean(t**k)) / k


def _weibull_loss(k: float, scale: float) -> float:
    t = np.array(_LIVES)
    return float(np.sum((t / np.exp(scale)) ** k - np.log(k) - (k - 1) * np.log(t) + k * scale))


@PROBLEMS.add(
    (np.log(_LIVES),),
    (1.0, 0.0),
    _weibull_loss(*_weibull(np.array(_LIVES))),
    answer=lambda log: _weibull(np.exp(log)),
)
def weibull_fit() -> Built:
    k, scale, log = cp.Variable(pos=True), cp.Variable(), cp.Parameter(6)
    loss = cp.sum(cp.exp(k * (log - scale)) - (k - 1) * log) + 6 * (k * scale) - 6 * cp.log(k)
    return cp.Problem(cp.Minimize(loss), [k >= 0.01]), [log], [k, scale]


def _log_threshold(b: np.ndarray, w: float, eps: float) -> Arrays:
    root = np.sqrt(np.maximum((b + eps) ** 2 - 4 * w, 0))
    return (np.where(b > w / eps, (b - eps + root) / 2, 0.0),)


def _log_penalised(b: np.ndarray, w: float, eps: float) -> float:
    (x,) = _log_threshold(b, w, eps)
    return float(np.sum((x - b) ** 2 / 2 + w * np.log(x + eps)))


_SIGNAL = [2.0, 1.5, 0.1, -0.4]


@PROBLEMS.add(
    (_SIGNAL, 0.3, 0.5),
    ([1.0] * 4,),
    _log_penalised(np.array(_SIGNAL), 0.3, 0.5),
    answer=_log_threshold,
)
def logarithmic_penalty() -> Built:
    x, b = cp.Variable(4, nonneg=True), cp.Parameter(4)
    w, eps = cp.Parameter(nonneg=True), cp.Parameter(pos=True)
    loss = cp.sum_squares(x - b) / 2 + w * cp.sum(cp.log(x + eps))
    return cp.Problem(cp.Minimize(loss)), [b, w, eps], [x]


@PROBLEMS.add(([1.0, 1.5, 0.8], [1.0, 1.2, 3.0], 4.0), ([1.5, 2.0, 0.5],), 1.01186853574)
def shares_of_sigmoid_gains() -> Built:
    x, gain, middle = cp.Variable(3, nonneg=True), cp.Parameter(3), cp.Parameter(3)
    budget = cp.Parameter()
    value = gain @ cp.nlp.tanh(x - middle)
    return cp.Problem(cp.Maximize(value), [cp.sum(x) <= budget]), [gain, middle, budget], [x]


def _haverly(inlet: float, need: float, demand: float) -> Arrays:
    # nothing but the second product, of pool at quality `inlet` and of the stream of quality 2
    direct = demand * (need - inlet) / (2 - inlet)
    pool = demand - direct
    return np.array([0.0, pool]), np.array([0.0, pool]), np.array([0.0, direct]), inlet


@PROBLEMS.add(
    (1.0, 1.5, 200.0),
    ([10.0, 90.0], [10.0, 90.0], [10.0, 90.0], 1.2),
    -400.0,
    answer=_haverly,
    independent=False,
    note="Haverly's pooling problem; a row on flows that vanish is implied by their bounds",
)
def pooling_of_streams() -> Built:
    bought, pooled, direct = (cp.Variable(2, nonneg=True) for _ in range(3))
    quality, inlet, need, demand = cp.Variable(), *(cp.Parameter() for _ in range(3))
    rows = [cp.sum(bought) == cp.sum(pooled)]
    rows += [quality * cp.sum(pooled) == 3 * bought[0] + inlet * bought[1]]
    made, mixed = pooled + direct, quality * pooled + 2 * direct
    rows += [mixed[0] <= 2.5 * made[0], mixed[1] <= need * made[1]]
    rows += [made[0] <= 100, made[1] <= demand]
    cost = np.array([6, 16]) @ bought + 10 * cp.sum(direct) - np.array([9, 15]) @ made
    variables = [bought, pooled, direct, quality]
    return cp.Problem(cp.Minimize(cost), rows), [inlet, need, demand], variables


# Products of unknowns


_SENSING = normal(17, 10, 4)
_INTENSITY = (_SENSING @ np.array([1.0, -0.5, 0.7, 0.3])) ** 2 + 0.05 * normal(18, 10)


@PROBLEMS.add((_SENSING, _INTENSITY), ([0.8, -0.3, 0.5, 0.5],), 0.0383854662274, unique=False)
def phase_retrieval() -> Built:
    x, A, b = cp.Variable(4), cp.Parameter((10, 4)), cp.Parameter(10)
    return cp.Problem(cp.Minimize(cp.sum_squares((A @ x) ** 2 - b))), [A, b], [x]


_POSITIVE = np.array([[1.0, 0.4, 2.1], [0.9, 0.5, 1.7], [2.2, 0.7, 3.9], [0.3, 0.2, 0.8]])


def _rank_one(V: np.ndarray) -> Arrays:
    U, s, Wt = np.linalg.svd(V)
    sign = np.sign(U[0, 0])
    return sign * U[:, 0], sign * s[0] * Wt[0]


@PROBLEMS.add(
    (_POSITIVE,),
    ([0.5] * 4, [1.0] * 3),
    np.sum(np.linalg.svd(_POSITIVE)[1][1:] ** 2),
    answer=_rank_one,
)
def nonnegative_factors_of_rank_one() -> Built:
    w, h, V = cp.Variable(4, nonneg=True), cp.Variable(3, nonneg=True), cp.Parameter((4, 3))
    outer = cp.reshape(w, (4, 1), order="F") @ cp.reshape(h, (1, 3), order="F")
    return cp.Problem(cp.Minimize(cp.sum_squares(V - outer)), [cp.sum_squares(w) == 1]), [V], [w, h]


_PARTS = np.array([[0.5, 0.0], [0.3, 0.1], [0.0, 0.5], [0.0, 0.4], [0.2, 0.0]])
_MIXED = _PARTS @ np.array([[1.0, 0.3, 2.0, 0.0], [0.2, 1.5, 0.7, 1.0]]) + 0.03 * normal(19, 5, 4)


@PROBLEMS.add(
    (_MIXED.round(4), 0.1),
    (_PARTS.clip(0.1) / _PARTS.clip(0.1).sum(0), [[1.0, 0.4, 1.8, 0.1], [0.3, 1.4, 0.8, 0.9]]),
    0.713216639068,
    unique=False,
    note="the parts may be exchanged",
)
def nonnegative_factors_of_rank_two() -> Built:
    W, H = cp.Variable((5, 2), nonneg=True), cp.Variable((2, 4), nonneg=True)
    V, w = cp.Parameter((5, 4)), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(V - W @ H) + w * cp.sum_squares(H)
    return cp.Problem(cp.Minimize(loss), [cp.sum(W, axis=0) == 1]), [V, w], [W, H]


_KNOWN = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0]])
_FILLED = np.outer([1.0, -0.5, 0.8, 1.2], [0.6, 1.0, -0.7, 0.9]) + 0.05 * normal(20, 4, 4)


@PROBLEMS.add((_FILLED.round(4),), ([0.5] * 4, [0.5] * 4), 0.00985126520728, unique=False)
def completion_of_rank_one() -> Built:
    u, v, M = cp.Variable(4), cp.Variable(4), cp.Parameter((4, 4))
    outer = cp.reshape(u, (4, 1), order="F") @ cp.reshape(v, (1, 4), order="F")
    loss = cp.sum_squares(cp.multiply(_KNOWN, outer - M))
    return cp.Problem(cp.Minimize(loss), [cp.sum_squares(u) == 1]), [M], [u, v]


_LEFT, _RIGHT = normal(21, 9, 2), normal(22, 9, 3)
_BILINEAR = (_LEFT @ [1.0, 0.6]) * (_RIGHT @ [0.5, -1.0, 0.8]) + 0.05 * normal(23, 9)


@PROBLEMS.add((_BILINEAR, 1.0), ([1.0, 0.0], [0.5, -0.5, 0.5]), 0.0175555122196)
def bilinear_fit() -> Built:
    a, b, y, unit = cp.Variable(2), cp.Variable(3), cp.Parameter(9), cp.Parameter()
    loss = cp.sum_squares(cp.multiply(_LEFT @ a, _RIGHT @ b) - y)
    return cp.Problem(cp.Minimize(loss), [a[0] == unit]), [y, unit], [a, b]


@PROBLEMS.add(
    (np.array([0.1, 0.9, 0.2, 0.8]), 0.01),
    ([[1.5, -1.0], [1.0, -1.5]], [-0.5, 0.5], [1.5, -1.5]),
    0.0223146553721,
    unique=False,
    note="a network with two hidden units that learns the exclusive or",
)
def small_network() -> Built:
    W, b, v = cp.Variable((2, 2)), cp.Variable(2), cp.Variable(2)
    y, decay = cp.Parameter(4), cp.Parameter(nonneg=True)
    inputs = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) @ W
    hidden = cp.nlp.tanh(inputs + np.ones((4, 1)) @ cp.reshape(b, (1, 2), order="F"))
    weights = cp.sum_squares(W) + cp.sum_squares(b) + cp.sum_squares(v)
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(hidden @ v - y) + decay * weights)),
        [y, decay],
        [
            W,
            b,
            v,
        ],
    )
