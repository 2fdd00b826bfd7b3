"""Figures of sweeps, federations, pixel features and class similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from fedsgcg.server.report.figures.drawing import (
    INK,
    MUTED,
    RULE,
    STYLE,
    WIDTH,
    Drawing,
    canvas_of,
    colour,
    finish,
    marker,
    plain_axes,
)
from fedsgcg.server.report.intervals import Interval

DASHES = ("-", "--", "-.", ":")
WIDE = 20.0  # ratio of largest to smallest value from which an axis is logarithmic
GREY = -1  # colour index of a baseline
LEVEL_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (1.5, 3))
STRONGEST = 0.55  # highest opacity of a matrix cell, so that its number stays readable


@dataclass(frozen=True)
class Point:
    """One value of a swept setting.

    Attributes:
        value: The value as text.
        number: The value as a number; NaN for text.
        intervals: Interval of each metric that is drawn.
        usual: Whether this is the setting of the runs that did not sweep it.
    """

    value: str
    number: float
    intervals: tuple[Interval, ...]
    usual: bool = False


@dataclass(frozen=True)
class Series:
    """One line of a sweep, or the rows of one label group.

    Attributes:
        title: Its name.
        colour: Index into the palette.
        points: Its points, in order.
    """

    title: str
    colour: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Dot:
    """One row of a dot figure.

    Attributes:
        title: Name at the left.
        interval: Mean and interval.
        colour: Index into the palette, or `GREY`.
        gap: Whether there is a gap above it.
        usual: Whether this is the setting of the runs that did not sweep it.
    """

    title: str
    interval: Interval
    colour: int
    gap: bool = False
    usual: bool = False


@mpl.rc_context(STYLE)
def sweep_panel(
    series: Sequence[Series],
    name: str,
    labels: Sequence[str],
    alt: str,
    levels: Sequence[Sequence[Interval]] = (),
) -> Drawing:
    """Draw metrics over a numeric setting: means joined by lines, intervals as bars.

    A ring marks the usual value.

    Args:
        series: Lines, every point with a number.
        name: Name of the setting.
        labels: Name of each metric, from the top.
        alt: Alternative text.
        levels: Intervals of each metric of the baselines, which do not have the setting; each is a
            grey horizontal line, dashed as in `LEVEL_DASHES`.
    """
    one = 150
    gap = 14
    foot = 48
    height = foot + len(labels) * (one + gap)
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    numbers = sorted({point.number for line in series for point in line.points})
    shared: Axes | None = None
    for place, label in enumerate(labels):
        base = foot + (len(labels) - 1 - place) * (one + gap)
        axes = figure.add_axes(
            (66 / WIDTH, base / height, (WIDTH - 82) / WIDTH, one / height), sharex=shared
        )
        shared = shared or axes
        plain_axes(axes)
        for order, line in enumerate(series):
            _sweep_line(axes, line, place, order, _nudge(numbers, order, len(series)))
        for dash, level in zip(LEVEL_DASHES, levels, strict=False):
            axes.axhline(
                level[place].mean, color=MUTED, linewidth=1.4, linestyle=(0, dash), zorder=1
            )
        axes.set_ylabel(label, color=MUTED)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_label_coords(-50 / (WIDTH - 82), 0.5)
        axes.tick_params(labelbottom=place == len(labels) - 1)
    _value_axis(axes, numbers)
    axes.set_xlabel(name, color=MUTED)
    return finish(figure, height, alt)


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Whether the values of a setting cover a range so wide that their axis is logarithmic."""
    return len(numbers) > 1 and min(numbers) > 0 and max(numbers) / min(numbers) >= WIDE


def _nudge(numbers: Sequence[float], order: int, lines: int) -> tuple[float, float]:
    """Return (factor, offset) that separates lines on the value axis."""
    step = 0.012 * (order - (lines - 1) / 2)
    if is_logarithmic(numbers):
        return (max(numbers) / min(numbers)) ** step, 0.0
    return 1.0, step * (max(numbers) - min(numbers))


def _sweep_line(
    axes: Axes, line: Series, metric: int, order: int, nudge: tuple[float, float]
) -> None:
    known = [point for point in line.points if math.isfinite(point.intervals[metric].mean)]
    x = np.array([point.number * nudge[0] + nudge[1] for point in known])
    y = np.array([point.intervals[metric].mean for point in known])
    ink, sign = colour(line.colour), marker(line.colour)
    axes.plot(
        x, y, DASHES[order % len(DASHES)], color=ink, linewidth=1.8, marker=sign, markersize=6
    )
    for place, point in zip(x, known, strict=True):
        interval = point.intervals[metric]
        if math.isfinite(interval.low):
            axes.plot(
                [place, place], [interval.low, interval.high], color=ink, linewidth=1.4, alpha=0.75
            )
        if point.usual:
            axes.plot(
                [place],
                [interval.mean],
                "o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=INK,
            )


def _value_axis(axes: Axes, numbers: Sequence[float]) -> None:
    if is_logarithmic(numbers):
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_apart(numbers)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _apart(numbers: Sequence[float]) -> list[float]:
    """Values whose tick labels do not overlap, including the first and the last."""
    scale = np.log(numbers) if is_logarithmic(numbers) else np.array(numbers)
    span = float(scale[-1] - scale[0]) or 1.0
    kept = [0]
    for place in range(1, len(numbers)):
        if (scale[place] - scale[kept[-1]]) / span > 0.09:
            kept.append(place)
    if kept[-1] != len(numbers) - 1:
        kept[-1 if len(kept) > 1 else len(kept) :] = [len(numbers) - 1]
    return [numbers[place] for place in kept]


@mpl.rc_context(STYLE)
def dot_panel(dots: Sequence[Dot], label: str, alt: str) -> Drawing:
    """Draw one row per label: mean as a mark, interval as a bar; a ring marks the usual setting.

    Args:
        dots: Rows, from the top.
        label: Name of the value axis.
        alt: Alternative text.
    """
    place = 0.0
    places = [place]
    for dot in dots[1:]:
        place -= 1.6 if dot.gap else 1.0
        places.append(place)
    height = round(58 + 30 * (1 - place))
    left = min(0.55 * WIDTH, 24 + 7.4 * max(len(dot.title) for dot in dots))
    figure, axes = canvas_of(height, left=left, right=16, top=6, bottom=46)
    for dot, row in zip(dots, places, strict=True):
        ink, sign = MUTED, "o"
        if dot.colour != GREY:
            ink, sign = colour(dot.colour), marker(dot.colour)
        if math.isfinite(dot.interval.low):
            axes.plot(
                [dot.interval.low, dot.interval.high],
                [row, row],
                color=ink,
                linewidth=3,
                solid_capstyle="butt",
            )
        axes.plot([dot.interval.mean], [row], sign, color=ink, markersize=9)
        if dot.usual:
            axes.plot(
                [dot.interval.mean],
                [row],
                "o",
                markersize=17,
                markerfacecolor="none",
                markeredgecolor=INK,
            )
    axes.set_yticks(places, [_short(dot.title) for dot in dots])
    axes.set_ylim(place - 0.6, 0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label, color=MUTED)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.7)
    axes.grid(axis="y", visible=False)
    return finish(figure, height, alt)


def _short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


@mpl.rc_context(STYLE)
def scatter_panel(
    points: npt.NDArray[np.float64], kinds: npt.NDArray[np.int64], alt: str, names: Sequence[str]
) -> Drawing:
    """Draw points of a plane, one colour and marker per kind.

    Args:
        points: (N, 2).
        kinds: (N,) index of each point's kind.
        alt: Alternative text.
        names: Name of each kind.
    """
    side = 330
    figure, axes = canvas_of(side, left=6, right=6, top=6, bottom=6, width=side)
    # Drawn in random order, so that no kind covers the others.
    order = np.random.default_rng(0).permutation(len(points))
    for part in np.array_split(order, max(1, min(40, len(points)))):
        for kind in np.unique(kinds[part]):
            chosen = part[kinds[part] == kind]
            axes.plot(
                *points[chosen].T,
                marker(int(kind)),
                color=colour(int(kind)),
                markersize=3.6,
                alpha=0.62,
                markeredgewidth=0,
                linestyle="none",
                rasterized=True,
            )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(RULE)
    return finish(figure, side, f"{alt} Kinds: {', '.join(names)}.", side)


@mpl.rc_context(STYLE)
def matrix_panel(values: npt.NDArray[np.float64], names: Sequence[str], alt: str) -> Drawing:
    """Draw a matrix of numbers in [0, 1], with the numbers; larger numbers have a darker ground.

    Args:
        values: (K, K); NaN for a class without a pixel.
        names: Name of each class.
        alt: Alternative text.
    """
    longest = max(len(_short(name, 14)) for name in names)
    size = 46
    wide = max(52, 10 + 7.6 * longest)
    left = 24 + 7.4 * longest
    width = round(left + wide * len(names) + 12)
    height = round(34 + size * len(names) + 6)
    figure, axes = canvas_of(height, left=left, right=12, top=34, bottom=6, width=width)
    for row, column in np.ndindex(values.shape):
        value = float(values[row, column])
        strength = STRONGEST * max(0.0, min(1.0, value)) if math.isfinite(value) else 0.0
        axes.add_patch(
            Rectangle(
                (column, -row - 1),
                1,
                1,
                facecolor=colour(1),
                alpha=strength,
                edgecolor="none",
                zorder=1,
            )
        )
        axes.add_patch(
            Rectangle((column, -row - 1), 1, 1, fill=False, edgecolor=RULE, linewidth=0.8, zorder=2)
        )
        text = f"{value:.2f}" if math.isfinite(value) else "–"
        axes.text(column + 0.5, -row - 0.5, text, ha="center", va="center", color=INK, zorder=3)
    axes.set_xlim(0, len(names))
    axes.set_ylim(-len(names), 0)
    axes.set_yticks(
        [-place - 0.5 for place in range(len(names))], [_short(name, 14) for name in names]
    )
    axes.set_xticks(
        [place + 0.5 for place in range(len(names))], [_short(name, 14) for name in names]
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=INK)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return finish(figure, height, alt, width)
