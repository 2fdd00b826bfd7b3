"""Figures of the report as SVG, each in a light and a dark version.

A figure is drawn once with the light palette on a transparent ground. The dark version is the same
drawing with every colour replaced by its counterpart. Text is drawn as paths, so the page needs no
font. Units are CSS pixels.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedsgcg.server.report.rounds import Curve

INK = "#1c2126"
MUTED = "#59636e"
RULE = "#d3d9df"
# Based on the colours of Okabe and Ito, which remain distinguishable with common forms of colour
# blindness. The second of each pair is for a dark ground.
PALETTE = (
    ("#d55e00", "#e69f00"),
    ("#0072b2", "#56b4e9"),
    ("#009e73", "#2bbf94"),
    ("#b0568c", "#cc79a7"),
    ("#8a6d00", "#f0e442"),
    ("#4d4d4d", "#b8b8b8"),
)
DARK = {INK: "#e8ebee", MUTED: "#9ea8b3", RULE: "#3a424b", **dict(PALETTE)}
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH = 400
FONT = 12.5
STYLE: Any = {
    "font.size": FONT,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "path",
    "svg.hashsalt": "fedsgcg",  # the same data gives the same bytes
    "axes.linewidth": 0.8,
    "text.parse_math": False,  # names come from hospitals and may contain "$"
}
RASTER_ABOVE = 2000  # points of one strip above which they are rasterised, to limit the page size


@dataclass(frozen=True)
class Drawing:
    """One figure for the page.

    Attributes:
        light: SVG as a data URI, for a light page.
        dark: The same for a dark page.
        alt: Alternative text.
        width: Width in CSS pixels.
        height: Height in CSS pixels.
        svg: The light version.
        figure: The figure, for files (`figures.files`).
    """

    light: str
    dark: str
    alt: str
    width: int
    height: int
    svg: bytes
    figure: Figure = field(compare=False, repr=False)


@dataclass(frozen=True)
class Line:
    """One curve of a panel.

    Attributes:
        curve: The values.
        colour: Index into `PALETTE`.
        dash: Matplotlib line style.
        strong: Whether it is a main line (thick, with band) or a companion.
    """

    curve: Curve
    colour: int
    dash: str = "-"
    strong: bool = True


def colour(index: int) -> str:
    """Colour of the index-th method or class on light ground."""
    return PALETTE[index % len(PALETTE)][0]


def marker(index: int) -> str:
    """Marker of the index-th method or class: 36 have a marker and colour of their own."""
    return MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]


@mpl.rc_context(STYLE)
def case_panel(
    strips: Mapping[str, Mapping[str, float]],
    span: tuple[float, float],
    alt: str,
    label: str,
    colours: Mapping[str, int] | None = None,
) -> Drawing:
    """Draw one horizontal strip per method: a point per case, quartile box and median.

    Lines join the same case across methods.

    Args:
        strips: Method -> case -> value, in the order of the methods' colours.
        span: Ends of the value axis, the same for all hospitals.
        alt: Alternative text.
        label: Name of the value axis.
        colours: Colour index of each method; by default its position.
    """
    height = 56 + 44 * len(strips)
    left = 22 + 7.4 * max(map(len, strips))
    figure, axes = canvas_of(height, left=left, right=14, top=4, bottom=46)
    places = {name: -position for position, name in enumerate(strips)}
    _join_cases(axes, list(strips.values()), list(places.values()))
    for position, (name, cases) in enumerate(strips.items()):
        _strip(
            axes,
            np.array([cases[case] for case in sorted(cases)]),
            places[name],
            (colours or {}).get(name, position),
        )
    axes.set_yticks(list(places.values()), list(places))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(0.55 - len(strips), 0.5)
    axes.set_xlim(*span)
    axes.set_xlabel(label, color=MUTED)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.7)
    return finish(figure, height, alt)


def _join_cases(axes: Axes, strips: Sequence[Mapping[str, float]], places: Sequence[float]) -> None:
    lines = []
    for (first, below), (second, above) in pairwise(zip(strips, places, strict=True)):
        shared = sorted(first.keys() & second.keys())
        if len(shared) <= 200:
            lines += [[(first[case], below), (second[case], above)] for case in shared]
    known = [line for line in lines if np.isfinite(line).all()]
    axes.add_collection(LineCollection(known, colors=MUTED, alpha=0.28, linewidths=0.7, zorder=1))


def _strip(axes: Axes, values: np.ndarray[Any, Any], place: float, index: int) -> None:
    values = values[np.isfinite(values)]
    if not values.size:
        return
    # The golden angle gives an even and reproducible spread.
    jitter = 0.13 * np.sin(np.arange(values.size) * 2.399963)
    axes.scatter(
        values,
        place + (jitter if values.size > 1 else 0),
        s=26,
        marker=marker(index),
        color=colour(index),
        alpha=0.62,
        linewidths=0,
        zorder=3,
        rasterized=values.size > RASTER_ABOVE,
    )
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    box = Rectangle(
        (low, place - 0.25),
        high - low,
        0.5,
        fill=False,
        edgecolor=colour(index),
        linewidth=1.2,
        zorder=4,
    )
    axes.add_patch(box)
    axes.plot(
        [middle, middle],
        [place - 0.25, place + 0.25],
        color=INK,
        linewidth=2.4,
        zorder=5,
        solid_capstyle="butt",
    )


@mpl.rc_context(STYLE)
def curve_panel(
    parts: Sequence[Sequence[Line]],
    labels: Sequence[str],
    spans: Sequence[tuple[float, float]],
    alt: str,
    *,
    log: bool = False,
) -> Drawing:
    """Draw stacked axes over the same rounds, e.g. loss above Dice above ASD.

    Args:
        parts: Lines of each axes, from the top.
        labels: Names of the value axes.
        spans: Ends of the value axes.
        alt: Alternative text.
        log: Whether the first axes is logarithmic.
    """
    one = 146 if len(parts) < 3 else 122
    gap = 12
    foot = 44
    height = foot + len(parts) * (one + gap)
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    shared: Axes | None = None
    for place, (lines, label, span) in enumerate(zip(parts, labels, spans, strict=True)):
        base = foot + (len(parts) - 1 - place) * (one + gap)
        box = (62 / WIDTH, base / height, (WIDTH - 76) / WIDTH, one / height)
        axes = figure.add_axes(box, sharex=shared)
        shared = shared or axes
        plain_axes(axes)
        _draw_lines(axes, lines)
        axes.set_ylabel(label, color=MUTED)
        if log and place == 0:
            log_axis(axes)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylim(*span)
        axes.yaxis.set_label_coords(-46 / (WIDTH - 76), 0.5)
        axes.tick_params(labelbottom=place == len(parts) - 1)
    _round_axis(axes)
    return finish(figure, height, alt)


@mpl.rc_context(STYLE)
def shift_panel(lines: Sequence[Line], span: tuple[float, float], alt: str) -> Drawing:
    """Draw the trace of the scatter between and within hospitals by round, with a log axis."""
    height = 250
    figure, axes = canvas_of(height, left=62, right=14, top=10, bottom=44)
    _draw_lines(axes, lines)
    log_axis(axes)
    axes.set_ylim(*span)
    axes.set_ylabel("trace of covariance", color=MUTED)
    axes.yaxis.set_label_coords(-48 / (WIDTH - 76), 0.5)
    _round_axis(axes)
    return finish(figure, height, alt)


def log_axis(axes: Axes) -> None:
    """Make the value axis logarithmic, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def span_of(
    lines: Sequence[Line], *, floor: float | None = None, ceiling: float | None = None
) -> tuple[float, float]:
    """Ends of an axis that contains every line, with a margin, limited to `floor` and `ceiling`."""
    values = [
        part[np.isfinite(part)] for line in lines for part in (line.curve.low, line.curve.high)
    ]
    joined = np.concatenate(values) if values else np.array([0.0, 1.0])
    low, high = float(joined.min()), float(joined.max())
    margin = 0.06 * (high - low) or 0.05
    low, high = low - margin, high + margin
    return (
        low if floor is None else max(low, floor),
        high if ceiling is None else min(high, ceiling),
    )


def log_span_of(lines: Sequence[Line]) -> tuple[float, float]:
    """Ends of a logarithmic axis that contains every positive value of the lines."""
    values = [part[part > 0] for line in lines for part in (line.curve.low, line.curve.high)]
    joined = np.concatenate(values) if values else np.zeros(0)
    if not joined.size:
        return 0.1, 1.0
    return float(joined.min()) / 1.6, float(joined.max()) * 1.6


def _draw_lines(axes: Axes, lines: Sequence[Line]) -> None:
    for line in lines:
        ink, data = colour(line.colour), line.curve
        if line.strong and data.seeds > 1:
            axes.fill_between(data.rounds, data.low, data.high, color=ink, alpha=0.18, linewidth=0)
        has_marker = line.strong or data.rounds.size == 1
        axes.plot(
            data.rounds,
            data.mean,
            line.dash,
            color=ink,
            linewidth=1.9 if line.strong else 1.2,
            marker=marker(line.colour) if has_marker else None,
            markevery=max(1, data.rounds.size // 6),
            markersize=4.5,
            markeredgewidth=0,
        )


def _round_axis(axes: Axes) -> None:
    axes.set_xlabel("round", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def canvas_of(
    height: float, *, left: float, right: float, top: float, bottom: float, width: float = WIDTH
) -> tuple[Figure, Axes]:
    """Return a figure with one axes at fixed margins (CSS pixels), so that panels align."""
    figure = Figure(figsize=(width / 72, height / 72))
    box = (
        left / width,
        bottom / height,
        (width - left - right) / width,
        (height - top - bottom) / height,
    )
    axes = figure.add_axes(box)
    plain_axes(axes)
    return figure, axes


def plain_axes(axes: Axes) -> None:
    """Apply the report's style to axes: two thin spines, light horizontal grid, muted labels."""
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(RULE)
    axes.tick_params(which="both", color=RULE, labelcolor=MUTED, labelsize=FONT - 0.5)
    axes.grid(axis="y", color=RULE, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def finish(figure: Figure, height: int, alt: str, width: int = WIDTH) -> Drawing:
    """Return the drawing of a finished figure."""
    figure.patch.set_alpha(0)
    stream = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = _lean(stream.getvalue())
    dark = re.sub("|".join(DARK), lambda match: DARK[match.group()], text)
    return Drawing(data_uri(text), data_uri(dark), alt, width, height, text.encode(), figure)


def _lean(svg: str) -> str:
    """Remove what a browser does not need, and digits below 1/100 pixel.

    Removed are the prologue, metadata, comments and white space between tags.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match.group()), svg)
    return re.sub(r">\s+<", "><", svg).strip()


def data_uri(svg: str) -> str:
    """Return an SVG as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
