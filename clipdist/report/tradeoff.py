"""Draw what interpolated models reach on a target set against what they keep of another one, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

SIZE, DPI = (6.4, 4.4), 150  # inches
LINE, QUIET, BEST = "#0b63ce", "#5c6472", "#c9500c"
Point = tuple[float, float, str]  # x, y, what stands beside it


def tradeoff_figure(points: Sequence[Point], best: int, x_title: str, y_title: str) -> Figure:
    """Return the curve through the points in their order, each named, the best one marked; `savefig` writes it.

    Args:
        best: the index of the one that is marked.
    """
    with rc_context({"font.size": 10, "axes.edgecolor": QUIET, "axes.labelcolor": QUIET, "text.parse_math": False}):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color="#d8dce4", linewidth=0.8)
        axes.set_axisbelow(True)
        x, y, names = zip(*points)
        axes.plot(x, y, color=LINE, marker="o", markersize=4, linewidth=1.5)
        axes.plot(x[best], y[best], color=BEST, marker="*", markersize=13, linestyle="none")
        for where, name in zip(zip(x, y), names):
            axes.annotate(name, where, xytext=(4, 4), textcoords="offset points", fontsize=8, color=QUIET)
        axes.margins(0.08)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
    return figure
