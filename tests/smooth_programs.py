"""Problems of Hock and Schittkowski as torch functions, with parameters among their numbers.

Values are those of W. Hock and K. Schittkowski, "Test Examples for Nonlinear Programming Codes",
1981, or their closed forms; each case's `data` are the published numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from declarative_cvx.nonconvex.minimization.program import NonlinearProgram

Function = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Case:
    """A problem with published data, start and value."""

    name: str
    start: list[float]
    data: list[float]
    value: float
    objective: Function
    equality: Function | None = None
    inequality: Function | None = None
    lower: list[float] | None = None
    upper: list[float] | None = None

    def program(self, data: Tensor | None = None) -> NonlinearProgram:
        """With data of shape (batch, parameters); the published ones if there are none."""
        values = torch.tensor([self.data], dtype=torch.float64) if data is None else data

        def bound(numbers: list[float] | None) -> Tensor | None:
            return None if numbers is None else torch.tensor([numbers], dtype=torch.float64)

        return NonlinearProgram(
            len(self.start), self.objective, self.equality, self.inequality,
            bound(self.lower), bound(self.upper), tuple(values.unbind(1)), len(values),
        )  # fmt: skip

    @property
    def first(self) -> Tensor:
        """The start, shape (1, n)."""
        return torch.tensor([self.start], dtype=torch.float64)


def rows(*entries: Tensor) -> Tensor:
    return torch.stack(entries)


def banana(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
    """Rosenbrock's function of any number of variables."""
    return (p[0] * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def _equations_78(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
    return rows((x**2).sum() - p[0], x[1] * x[2] - p[1] * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1)


def _objective_104(x: Tensor, p: tuple[Tensor, ...]) -> Tensor:
    return p[0] * (x[0] / x[6]) ** 0.67 + p[0] * (x[1] / x[7]) ** 0.67 + 10 - x[0] - x[1]


CASES = [
    Case("HS1", [-2, 1], [100.0], 0.0, banana, lower=[-inf, -1.5]),
    Case("HS4", [1.125, 0.125], [1.0], 8 / 3, lambda x, p: (x[0] + p[0]) ** 3 / 3 + x[1],
         lower=[1, 0]),
    Case("HS5", [0, 0], [1.5, 2.5], -sqrt(3) / 2 - torch.pi / 3,
         lambda x, p: torch.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - p[0] * x[0] + p[1] * x[1] + 1,
         lower=[-1.5, -3], upper=[4, 3]),
    Case("HS6", [-1.2, 1], [10.0, 1.0], 0.0, lambda x, p: (p[1] - x[0]) ** 2,
         lambda x, p: rows(p[0] * (x[1] - x[0] ** 2))),
    Case("HS7", [2, 2], [1.0, 4.0], -sqrt(3), lambda x, p: torch.log(p[0] + x[0] ** 2) - x[1],
         lambda x, p: rows((1 + x[0] ** 2) ** 2 + x[1] ** 2 - p[1])),
    Case("HS10", [-10, 10], [3.0, 1.0], -1.0, lambda x, p: x[0] - x[1],
         inequality=lambda x, p: rows(p[0] * x[0] ** 2 - 2 * x[0] * x[1] + x[1] ** 2 - p[1])),
    Case("HS11", [4.9, 0.1], [5.0, 25.0], -8.498464223,
         lambda x, p: (x[0] - p[0]) ** 2 + x[1] ** 2 - p[1],
         inequality=lambda x, p: rows(x[0] ** 2 - x[1])),
    Case("HS12", [0, 0], [7.0, 25.0], -30.0,
         lambda x, p: 0.5 * x[0] ** 2 + x[1] ** 2 - x[0] * x[1] - p[0] * x[0] - 7 * x[1],
         inequality=lambda x, p: rows(4 * x[0] ** 2 + x[1] ** 2 - p[1])),
    Case("HS14", [2, 2], [2.0, 1.0], 9 - 2.875 * sqrt(7),
         lambda x, p: (x[0] - p[0]) ** 2 + (x[1] - 1) ** 2,
         lambda x, p: rows(x[0] - 2 * x[1] + p[1]),
         lambda x, p: rows(x[0] ** 2 / 4 + x[1] ** 2 - 1)),
    Case("HS16", [-2, 1], [100.0, 1.0], 0.25, banana,
         inequality=lambda x, p: rows(-x[0] - x[1] ** 2, -p[1] * x[0] ** 2 - x[1]),
         lower=[-0.5, -inf], upper=[0.5, 1]),
    Case("HS22", [2, 2], [2.0, 2.0], 1.0, lambda x, p: (x[0] - p[0]) ** 2 + (x[1] - 1) ** 2,
         inequality=lambda x, p: rows(x[0] + x[1] - p[1], x[0] ** 2 - x[1])),
    Case("HS24", [1, 0.5], [3.0, 6.0], -1.0,
         lambda x, p: ((x[0] - p[0]) ** 2 - 9) * x[1] ** 3 / (27 * sqrt(3)),
         inequality=lambda x, p: rows(
             x[1] - x[0] / sqrt(3), -x[0] - sqrt(3) * x[1], x[0] + sqrt(3) * x[1] - p[1]),
         lower=[0, 0]),
    Case("HS27", [2, 2, 2], [0.01, 1.0], 0.04,
         lambda x, p: p[0] * (x[0] - 1) ** 2 + (x[1] - x[0] ** 2) ** 2,
         lambda x, p: rows(x[0] + x[2] ** 2 + p[1])),
    Case("HS29", [1, 1, 1], [48.0, 2.0], -16 * sqrt(2), lambda x, p: -x[0] * x[1] * x[2],
         inequality=lambda x, p: rows(x[0] ** 2 + p[1] * x[1] ** 2 + 4 * x[2] ** 2 - p[0])),
    Case("HS35", [0.5, 0.5, 0.5], [3.0, 8.0], 1 / 9,
         lambda x, p: (9 - p[1] * x[0] - 6 * x[1] - 4 * x[2] + 2 * x[0] ** 2 + 2 * x[1] ** 2
                       + x[2] ** 2 + 2 * x[0] * x[1] + 2 * x[0] * x[2]),
         inequality=lambda x, p: rows(x[0] + x[1] + 2 * x[2] - p[0]), lower=[0, 0, 0]),
    Case("HS39", [2, 2, 2, 2], [1.0], -1.0, lambda x, p: -x[0],
         lambda x, p: rows(x[1] - p[0] * x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2)),
    Case("HS40", [0.8] * 4, [1.0], -0.25, lambda x, p: -x.prod(),
         lambda x, p: rows(
             x[0] ** 3 + x[1] ** 2 - p[0], x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1])),
    Case("HS43", [0, 0, 0, 0], [8.0, 10.0, 5.0], -44.0,
         lambda x, p: (x[0] ** 2 + x[1] ** 2 + 2 * x[2] ** 2 + x[3] ** 2
                       - 5 * x[0] - 5 * x[1] - 21 * x[2] + 7 * x[3]),
         inequality=lambda x, p: rows(
             (x**2).sum() + x[0] - x[1] + x[2] - x[3] - p[0],
             x[0] ** 2 + 2 * x[1] ** 2 + x[2] ** 2 + 2 * x[3] ** 2 - x[0] - x[3] - p[1],
             2 * x[0] ** 2 + x[1] ** 2 + x[2] ** 2 + 2 * x[0] - x[1] - x[3] - p[2])),
    Case("HS60", [2, 2, 2], [1.0, 4.0], 0.03256820025,
         lambda x, p: (x[0] - p[0]) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4,
         lambda x, p: rows(x[0] * (1 + x[1] ** 2) + x[2] ** 4 - p[1] - 3 * sqrt(2)),
         lower=[-10] * 3, upper=[10] * 3),
    Case("HS63", [2, 2, 2], [56.0, 25.0], 961.7151721,
         lambda x, p: 1000 - x[0] ** 2 - 2 * x[1] ** 2 - x[2] ** 2 - x[0] * x[1] - x[0] * x[2],
         lambda x, p: rows(8 * x[0] + 14 * x[1] + 7 * x[2] - p[0], (x**2).sum() - p[1]),
         lower=[0, 0, 0]),
    Case("HS65", [-5, 5, 0], [10.0, 48.0], 0.9535288567,
         lambda x, p: (x[0] - x[1]) ** 2 + (x[0] + x[1] - p[0]) ** 2 / 9 + (x[2] - 5) ** 2,
         inequality=lambda x, p: rows((x**2).sum() - p[1]),
         lower=[-4.5, -4.5, -5], upper=[4.5, 4.5, 5]),
    Case("HS71", [1, 5, 5, 1], [1.0, 40.0, 25.0], 17.0140173,
         lambda x, p: x[0] * x[3] * (x[0] + x[1] + x[2]) + p[0] * x[2],
         lambda x, p: rows((x**2).sum() - p[1]), lambda x, p: rows(p[2] - x.prod()),
         lower=[1] * 4, upper=[5] * 4),
    Case("HS76", [0.5] * 4, [5.0, 4.0], -4.681818181,
         lambda x, p: (x[0] ** 2 + 0.5 * x[1] ** 2 + x[2] ** 2 + 0.5 * x[3] ** 2 - x[0] * x[2]
                       + x[2] * x[3] - x[0] - 3 * x[1] + x[2] - x[3]),
         inequality=lambda x, p: rows(
             x[0] + 2 * x[1] + x[2] + x[3] - p[0], 3 * x[0] + x[1] + 2 * x[2] - x[3] - p[1],
             1.5 - x[1] - 4 * x[2]),
         lower=[0] * 4),
    Case("HS77", [2] * 5, [1.0, 8.0], 0.24150513,
         lambda x, p: ((x[0] - p[0]) ** 2 + (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2
                       + (x[3] - 1) ** 4 + (x[4] - 1) ** 6),
         lambda x, p: rows(x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2 * sqrt(2),
                           x[1] + x[2] ** 4 * x[3] ** 2 - p[1] - sqrt(2))),
    Case("HS78", [-2, 1.5, 2, -1, -1], [10.0, 5.0], -2.91970041, lambda x, p: x.prod(),
         _equations_78),
    Case("HS79", [2] * 5, [1.0, 2.0], 0.0787768209,
         lambda x, p: ((x[0] - p[0]) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2
                       + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4),
         lambda x, p: rows(x[0] + x[1] ** 2 + x[2] ** 3 - 2 - 3 * sqrt(2),
                           x[1] - x[2] ** 2 + x[3] + 2 - 2 * sqrt(2), x[0] * x[4] - p[1])),
    Case("HS80", [-2, 2, 2, -1, -1], [10.0, 5.0], 0.0539498478,
         lambda x, p: torch.exp(x.prod()), _equations_78,
         lower=[-2.3, -2.3, -3.2, -3.2, -3.2], upper=[2.3, 2.3, 3.2, 3.2, 3.2]),
    Case("HS100", [1, 2, 0, 4, 0, 1, 1], [127.0, 10.0], 680.6300573,
         lambda x, p: ((x[0] - p[1]) ** 2 + 5 * (x[1] - 12) ** 2 + x[2] ** 4 + 3 * (x[3] - 11) ** 2
                       + 10 * x[4] ** 6 + 7 * x[5] ** 2 + x[6] ** 4 - 4 * x[5] * x[6]
                       - 10 * x[5] - 8 * x[6]),
         inequality=lambda x, p: rows(
             2 * x[0] ** 2 + 3 * x[1] ** 4 + x[2] + 4 * x[3] ** 2 + 5 * x[4] - p[0],
             7 * x[0] + 3 * x[1] + 10 * x[2] ** 2 + x[3] - x[4] - 282,
             23 * x[0] + x[1] ** 2 + 6 * x[5] ** 2 - 8 * x[6] - 196,
             4 * x[0] ** 2 + x[1] ** 2 - 3 * x[0] * x[1] + 2 * x[2] ** 2 + 5 * x[5] - 11 * x[6])),
    Case("HS104", [6, 3, 0.4, 0.2, 6, 6, 1, 0.5], [0.4, 0.0588], 3.9511634396, _objective_104,
         inequality=lambda x, p: rows(
             p[1] * x[4] * x[6] + 0.1 * x[0] - 1, p[1] * x[5] * x[7] + 0.1 * (x[0] + x[1]) - 1,
             4 * x[2] / x[4] + 2 * x[2] ** -0.71 / x[4] + p[1] * x[2] ** -1.3 * x[6] - 1,
             4 * x[3] / x[5] + 2 * x[3] ** -0.71 / x[5] + p[1] * x[3] ** -1.3 * x[7] - 1,
             _objective_104(x, p) - 4.2),
         lower=[0.1] * 8, upper=[10] * 8),
]  # fmt: skip
