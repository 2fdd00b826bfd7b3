"""Figure of accuracy against what it costs: one point per training, with intervals both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedsgcg.server.report.figures.drawing import (
    INK,
    MARKERS,
    MUTED,
    RULE,
    STYLE,
    Drawing,
    canvas_of,
    colour,
    finish,
)
from fedsgcg.server.report.figures.plots import is_logarithmic
from fedsgcg.server.report.intervals import Interval

PLOT = 210  # height of the axes in CSS pixels
FOOT = 50
ROW = 20  # of the legend


@dataclass(frozen=True)
class Trade:
    """One training.

    Attributes:
        title: Its name in the legend.
        colour: Index into the palette, the same in all panels of a figure.
        cost: Position on the horizontal axis, with interval.
        gain: Position on the vertical axis, with interval.
    """

    title: str
    colour: int
    cost: Interval
    gain: Interval


@dataclass(frozen=True)
class Mark:
    """A line across the axes.

    Attributes:
        value: Where it is.
        title: What it means.
    """

    value: float
    title: str


@mpl.rc_context(STYLE)
def trade_off_panel(
    trades: Sequence[Trade],
    cost: str,
    gain: str,
    alt: str,
    level: Mark | None = None,
    limit: Mark | None = None,
) -> Drawing:
    """Draw trainings by cost and gain, each with its own colour and mark.

    Args:
        trades: The trainings, all with a finite cost and gain.
        cost: Name of the horizontal axis; it is logarithmic if the costs are far apart.
        gain: Name of the vertical axis.
        alt: Alternative text.
        level: A horizontal line: the gain without any cost.
        limit: A vertical line: the cost that is none.
    """
    rows = (len(trades) + 1) // 2
    legend = ROW * rows + 8
    height = FOOT + PLOT + legend
    figure, axes = canvas_of(height, left=62, right=16, top=legend, bottom=FOOT)
    for trade in trades:
        _draw(axes, trade)
    if level is not None:
        axes.axhline(level.value, color=MUTED, linewidth=1.4, linestyle=(0, (6, 3)), zorder=1)
        _name(axes, level.title, (1.0, level.value), axes.get_yaxis_transform(), "right")
    if limit is not None:
        axes.axvline(limit.value, color=MUTED, linewidth=1.2, linestyle=(0, (1.5, 3)), zorder=1)
        _name(axes, limit.title, (limit.value, 0.0), axes.get_xaxis_transform(), "left")
    _axes(axes, [trade.cost.mean for trade in trades])
    axes.set_xlabel(cost, color=MUTED)
    axes.set_ylabel(gain, color=MUTED)
    drawn = axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2,
        frameon=False,
        labelcolor=INK,
        handletextpad=0.3,
        columnspacing=1.4,
        labelspacing=0.3,
        borderaxespad=0.2,
    )
    drawn.set_in_layout(False)
    return finish(figure, height, alt)


def _draw(axes: Axes, trade: Trade) -> None:
    ink, marker = colour(trade.colour), MARKERS[trade.colour % len(MARKERS)]
    x, y = trade.cost, trade.gain
    if math.isfinite(y.low):
        axes.plot([x.mean, x.mean], [y.low, y.high], color=ink, linewidth=1.6, alpha=0.75)
    if math.isfinite(x.low):
        axes.plot([x.low, x.high], [y.mean, y.mean], color=ink, linewidth=1.6, alpha=0.75)
    axes.plot([x.mean], [y.mean], marker, color=ink, markersize=8, label=trade.title, zorder=4)


def _name(axes: Axes, text: str, place: tuple[float, float], transform: object, side: str) -> None:
    axes.annotate(
        text,
        place,
        xycoords=transform,  # type: ignore[arg-type]
        xytext=(-3 if side == "right" else 4, 3),
        textcoords="offset points",
        ha=side,
        va="bottom",
        color=MUTED,
        fontsize=STYLE["font.size"] - 1.5,
    )


def _axes(axes: Axes, costs: Sequence[float]) -> None:
    axes.margins(0.08, 0.1)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=RULE, linewidth=0.6, alpha=0.7)
    if not is_logarithmic(costs):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return
    axes.set_xscale("log")
    subs = (1.0,) if max(costs) / min(costs) > 300 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
