"""One slice of a prediction to look at, as PNG: the image in grey with the outlines of the structures. It stays here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from clients.prediction import Prediction

Mask = NDArray[np.bool_]

TRUTH: Final = "#D55E00"
COLOURS: Final = ("#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#E69F00", "#0072B2")
"""Okabe and Ito: told apart with any colour vision; a truth is dashed as well."""

SMALLEST: Final = 64  # pixels of the smallest side that is shown


def overlay(prediction: Prediction, structures: Sequence[str], title: str, truth: Mask | None = None) -> bytes:
    """Draw one slice with the outlines of every structure, and of the truth where it is known.

    Args:
        prediction: The prediction.
        structures: Names of the S structures.
        title: What stands above it.
        truth: (S, Z, Y, X).

    Returns:
        A PNG.
    """
    z, why = chosen_slice(prediction.masks, truth)
    image, masks = prediction.display[z], prediction.masks[:, z]
    both = [(masks, COLOURS, "solid")] + ([(truth[:, z], (TRUTH,), "dashed")] if truth is not None else [])
    top, bottom, left, right = _frame(np.logical_or.reduce([part.any(0) for part, _, _ in both]))
    figure = Figure(figsize=(6.4, 7.0), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    spacing = prediction.volume.spacing
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, aspect=spacing[1] / spacing[2], interpolation="nearest")
    for part, colours, style in both:
        for index, mask in enumerate(part):
            _outline(axes, mask, colours[index % len(colours)], style)
    axes.set_xlim(left - 0.5, right - 0.5)
    axes.set_ylim(bottom - 0.5, top - 0.5)
    axes.set_axis_off()
    number = "" if len(prediction.display) == 1 else f"\nslice {z + 1} of {len(prediction.display)}, {why}"
    axes.set_title(title + number, fontsize=10, wrap=True)
    lines = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(structures)]
    lines += [Line2D([], [], color=TRUTH, linestyle="dashed", label="truth")] if truth is not None else []
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def chosen_slice(masks: Mask, truth: Mask | None) -> tuple[int, str]:
    """Return the slice with the most wrong pixels, or without a truth the middle one that holds a structure, and why.

    Args:
        masks: (S, Z, Y, X).
        truth: (S, Z, Y, X), None where it is not known.
    """
    if truth is not None and (wrong := (masks != truth).sum((0, 2, 3))).any():
        return int(np.argmax(wrong)), "the one with the most wrong pixels"
    filled = np.flatnonzero(masks.any((0, 2, 3)))
    if filled.size == 0:
        return masks.shape[1] // 2, "the middle of the volume: nothing was found"
    return int(filled[filled.size // 2]), "the middle of what was found"


def _outline(axes: object, mask: Mask, colour: str, style: str) -> None:
    """Draw along the edges of the pixels of a mask (Y, X)."""
    if mask.any():
        padded = np.pad(mask, 1).astype(float)
        rows, columns = (np.arange(size) - 1 for size in padded.shape)
        axes.contour(columns, rows, padded, levels=[0.5], colors=[colour], linestyles=[style], linewidths=1.8)  # type: ignore[attr-defined]


def _frame(marked: Mask) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of a square twice as wide as what is marked; all of a slice without marks."""
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
