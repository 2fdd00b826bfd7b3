"""Draws one slice of a prediction as PNG: the grey image with outlines of the structures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fedsgcg.clients.predict.predictor import Prediction

Mask = NDArray[np.bool_]

TRUTH: Final = "#D55E00"
COLOURS: Final = ("#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#E69F00", "#0072B2")
"""Palette of Okabe and Ito, distinguishable with any colour vision; the truth is also dashed."""

SMALLEST: Final = 64  # smallest side of the shown region in pixels


def overlay(
    prediction: Prediction, structures: Sequence[str], title: str, truth: Mask | None = None
) -> bytes:
    """Draw one slice with the outlines of every structure, and of the truth if it is known.

    Args:
        prediction: The prediction.
        structures: Names of the S structures.
        title: Title of the figure.
        truth: (S, Z, Y, X), None if it is not known.

    Returns:
        The PNG's content.
    """
    z, why = chosen_slice(prediction.masks, truth)
    outlines = _outlines(prediction.masks[:, z], structures)
    if truth is not None:
        outlines += [
            _Outline(mask, TRUTH, "dashed", "truth" * (index == 0))
            for index, mask in enumerate(truth[:, z])
        ]
    maps = 1 if prediction.confidence is None else 2
    figure = Figure(figsize=(6.4 * maps, 7.2), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    _panel(
        figure.add_subplot(1, maps, 1), prediction.display[z] / 255, "gray", outlines, prediction
    )
    if prediction.confidence is not None:
        axes = figure.add_subplot(1, maps, maps)
        shown = _panel(axes, prediction.confidence[z], "cividis", outlines, prediction)
        axes.set_title("confidence: closeness to the prototype", fontsize=10)
        figure.colorbar(shown, ax=axes, shrink=0.6)
    if len(prediction.display) > 1:
        title = f"{title}\nslice {z + 1} of {len(prediction.display)}, {why}"
    figure.suptitle(title, fontsize=10)
    lines = [
        Line2D([], [], color=one.colour, linestyle=one.style, label=one.name)
        for one in outlines
        if one.name
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def chosen_slice(masks: Mask, truth: Mask | None) -> tuple[int, str]:
    """Return the slice to draw, and why.

    It is the slice with the most wrong pixels or, without errors or a truth, the middle slice that
    contains a structure.

    Args:
        masks: (S, Z, Y, X).
        truth: (S, Z, Y, X), None if it is not known.
    """
    if truth is not None and (wrong := (masks != truth).sum((0, 2, 3))).any():
        return int(np.argmax(wrong)), "the one with the most wrong pixels"
    filled = np.flatnonzero(masks.any((0, 2, 3)))
    if filled.size == 0:
        return masks.shape[1] // 2, "the middle of the volume: nothing was found"
    return int(filled[filled.size // 2]), "the middle of what was found"


@dataclass(frozen=True)
class _Outline:
    """One mask (Y, X) and the style of its outline; `name` is "" to omit it from the legend."""

    mask: Mask
    colour: str
    style: Literal["solid", "dashed"]
    name: str


def _outlines(masks: Mask, structures: Sequence[str]) -> list[_Outline]:
    """Return the outlines of the predicted structures."""
    pairs = enumerate(zip(masks, structures, strict=True))
    return [
        _Outline(mask, COLOURS[i % len(COLOURS)], "solid", f"{name} (predicted)")
        for i, (mask, name) in pairs
    ]


def _panel(
    axes: Any,
    values: NDArray[Any],
    colours: str,
    outlines: Sequence[_Outline],
    prediction: Prediction,
) -> Any:
    """Draw a slice with values in [0, 1] and outlines along pixel edges."""
    spacing = prediction.volume.spacing
    drawn = axes.imshow(
        values,
        cmap=colours,
        vmin=0,
        vmax=1,
        aspect=spacing[1] / spacing[2],
        interpolation="nearest",
    )
    for one in outlines:
        if one.mask.any():
            padded = np.pad(one.mask, 1).astype(float)
            rows, columns = (np.arange(size) - 1 for size in padded.shape)
            axes.contour(
                columns,
                rows,
                padded,
                levels=[0.5],
                colors=[one.colour],
                linestyles=[one.style],
                linewidths=1.8,
            )
    top, bottom, left, right = _frame(np.logical_or.reduce([one.mask for one in outlines]))
    axes.set_xlim(left - 0.5, right - 0.5)
    axes.set_ylim(bottom - 0.5, top - 0.5)
    axes.set_axis_off()
    return drawn


def _frame(marked: Mask) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of a square twice as wide as the marked region.

    Without marks it is the full slice.
    """
    height, width = marked.shape
    if not marked.any():
        return 0, height, 0, width
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    side = max(2 * int(max(np.ptp(rows), np.ptp(columns))), SMALLEST)
    edges = []
    for places, length in ((rows, height), (columns, width)):
        start = min(max((int(places[0]) + int(places[-1]) - side) // 2, 0), max(length - side, 0))
        edges += [start, min(start + side, length)]
    return edges[0], edges[1], edges[2], edges[3]
