"""Problems of `problems.py` with closed forms, differentiated by differences of order eight."""

from __future__ import annotations

import numpy as np
from problems import CASES, Case

from collection.oracles import differences, every_entry, symmetric_pairs
from collection.problem import Collector

PROBLEMS = Collector()

_CURVED = {"soc": "SOCP", "psd": "SDP", "exp": "exp", "power": "power"}
# The closed form of the second holds only where its parameter sums to one.
_LEFT_OUT = ("no_parameters", "log_sum_exp")


def _group(case: Case) -> str:
    curved = [group for cone, group in _CURVED.items() if cone in case.cones]
    if case.gp:
        return "GP"
    if len(curved) > 1:
        return "mixed"
    if curved:
        return curved[0]
    linear = ("linear", "vertex", "best_asset")
    return "LP" if any(part in case.name for part in linear) else "QP"


def _directions(case: Case) -> list:
    """How each parameter can move: only as its attributes allow."""
    out = []
    for parameter in case.build()[1]:
        if any(parameter.attributes[name] for name in ("symmetric", "PSD", "NSD")):
            out.append(symmetric_pairs)
        elif parameter.attributes["diag"]:
            out.append(lambda shape: [np.diag(row) for row in np.eye(shape[0])])
        elif parameter.attributes["sparsity"]:
            pairs = [np.array(p) for p in zip(*parameter.attributes["sparsity"], strict=True)]
            out.append(lambda shape, pairs=pairs: [_unit(shape, pair) for pair in pairs])
        else:
            out.append(every_entry)
    return out


def _unit(shape: tuple[int, ...], pair: np.ndarray) -> np.ndarray:
    direction = np.zeros(shape)
    direction[tuple(pair)] = 1.0
    return direction


for _case in CASES:
    if _case.answer is None or not _case.regular or _case.name in _LEFT_OUT:
        continue
    PROBLEMS.add(
        _group(_case),
        _case.values,
        differences(_case.answer, _directions(_case)),
        name=_case.name,
        gp=_case.gp,
    )(_case.build)
