"""Pictures of comparisons."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from declarative_cvx.comparison.row import Row
from declarative_cvx.errors import DeclarativeError

# Where an error of zero is drawn.
_ROUNDING = 1e-16
_MARKERS = "osD^vP*X<>hp"


def draw_errors(rows: Sequence[Row], title: str, accuracy: float, path: Path) -> Path:
    """Time against gradient error.

    The colour is the solver's, the shape the derivative's; small for answers as they come, hollow
    where a status is not the reference's.
    """
    figure, axes = _pyplot().subplots(figsize=(9, 5), layout="constrained")
    shown = [row for row in rows if not row.failure and math.isfinite(row.gradient_error)]
    if not shown:
        raise DeclarativeError("There is nothing to draw: no row has a gradient to compare.")
    colors = _styles([_solver(row) for row in shown])
    shapes = _styles([row.derivative for row in shown])
    for row in shown:
        color = colors[_solver(row)][0]
        face = color if row.agrees else "none"
        axes.scatter(
            row.seconds * 1e3,
            max(row.gradient_error, _ROUNDING),
            color=face,
            edgecolor=color,
            linewidth=1.5,
            marker=shapes[row.derivative][1],
            s=90 if _refined(row) else 30,
            alpha=0.8,
            zorder=3,
        )
    axes.axhspan(_ROUNDING / 4, accuracy, color="tab:green", alpha=0.07, zorder=0)
    axes.text(0.99, accuracy, f"right to {accuracy:.0e} ", ha="right", va="top",
              transform=axes.get_yaxis_transform(), color="tab:green")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="forward and backward pass, milliseconds (median)")
    axes.set(ylabel="largest relative error of the gradient")
    figure.suptitle(title)
    _label_times(axes.xaxis)
    axes.grid(alpha=0.3, which="major")
    handles = _legend(shown, colors, shapes)
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _saved(figure, path)


def _legend(
    rows: Sequence[Row], colors: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Sequence[Any]:
    """What colours, shapes, sizes and fillings mean, as far as there is a difference."""
    line = functools.partial(_pyplot().Line2D, [], [], linestyle="none", marker="o", color="0.4")
    found = [line(color=color, label=label) for label, (color, _) in colors.items()]
    if len(shapes) > 1:
        found += [line(marker=m, label=f"{name} derivative") for name, (_, m) in shapes.items()]
    if not all(_refined(row) for row in rows):
        found += [line(markersize=9, label="refined"), line(markersize=5, label="as it comes")]
    if not all(row.agrees for row in rows):
        found.append(line(markerfacecolor="none", label="other statuses"))
    return found


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], name: str, path: Path
) -> Path:
    """Time and gradient error of every solver against what was varied.

    Parameters
    ----------
    curves : mapping of str to sequence of (float, float, float)
        For each label the points: value, seconds, gradient error.
    name : str
        What was varied.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    styles = _styles(list(curves))
    for label, points in curves.items():
        color, marker = styles[label]
        values, seconds, errors = zip(*points, strict=True)
        line = {"color": color, "marker": marker, "label": label, "markersize": 5}
        left.plot(values, [s * 1e3 for s in seconds], **line)
        right.plot(values, [max(e, _ROUNDING) for e in errors], **line)
    left.set(ylabel="forward and backward pass, milliseconds (median)")
    right.set(ylabel="largest relative error of the gradient")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.grid(alpha=0.3, which="major")
    _label_times(left.yaxis)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    return _saved(figure, path)


def _solver(row: Row) -> str:
    return row.candidate.label_without("refine")


def _refined(row: Row) -> bool:
    return bool(getattr(row.candidate.solver, "refine", True))


def _label_times(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 of every decade."""
    import matplotlib.ticker as ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _styles(labels: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """A colour and a marker for each label, no two alike for a good many."""
    colors = _pyplot().get_cmap("tab10").colors
    unique = list(dict.fromkeys(labels))
    return {
        label: (colors[i % len(colors)], _MARKERS[(i + i // len(colors)) % len(_MARKERS)])
        for i, label in enumerate(unique)
    }


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg", force=False)
        import matplotlib.pyplot as plt
    except ImportError:
        raise DeclarativeError(
            "Pictures need matplotlib, which is not installed: pip install 'declarative_cvx[plots]'"
        ) from None
    return plt


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
    return path
