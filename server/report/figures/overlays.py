"""Overlays: one slice of a case with the contours of truth (solid) and prediction (dashed).

They show patients, so they are drawn only from pictures that are already on this machine. The slice
is a small JPEG that the page contains once; the contours are inline SVG. Truth is red and
predictions are green and blue, as in the papers; the lines also differ in dash, so that they can be
distinguished without colour.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from contourpy import contour_generator
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fedsgcg.server.report.figures.drawing import INK, STYLE, Drawing, finish
from fedsgcg.server.report.intervals import Interval
from fedsgcg.server.report.reader import Picture

Box = tuple[int, int, int, int]
TRUTH = "#ff5a47"  # colours as in templates/style.css
INKS = ("#2ee6a8", "#6cc7ff", "#f0e442", "#e79ac6")
PREDICTIONS = len(INKS)  # number of structure colours
SIDE = 320  # side of the drawn picture in pixels, enough for the widest place on the page


class Images:
    """Slices that overlays refer to; all methods draw their contours on the same picture."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str]] = {}

    def add(self, uri: str, width: str, height: str) -> str:
        """Store a picture and return its name on the page."""
        size = f'width="{width}" height="{height}"'
        markup = f'<image id="{{}}" href="{uri}" {size} preserveAspectRatio="none"/>'
        name = f"slice-{len(self._found)}"
        return self._found.setdefault(markup, (name, markup.format(name)))[0]

    @property
    def markup(self) -> Markup:
        """All pictures, for one place in the page."""
        text = "".join(text for _, text in self._found.values())
        return Markup(text)  # noqa: S704 - built above from base64 data


def choose_cases(pictures: Mapping[str, Sequence[Picture]]) -> list[tuple[str, str]]:
    """Return (rank, case) of the worst, the median and the best case, or of fewer cases.

    Args:
        pictures: Pictures of each method. Cases are ranked by their mean Dice over the methods. A
            case without a picture of some method is used only if no case has pictures of all
            methods.
    """
    dice = _dice(pictures)
    most = max((len(values) for values in dice.values()), default=0)
    complete = {case: values for case, values in dice.items() if len(values) == most}
    ordered = _ordered(complete)
    places: dict[str, int] = {}
    if ordered:
        places = {"worst": 0, "median": (len(ordered) - 1) // 2, "best": len(ordered) - 1}
    chosen: dict[str, str] = {}
    for rank in ("worst", "best", "median"):
        if rank in places:
            chosen.setdefault(ordered[places[rank]], rank)
    ranks = {rank: case for case, rank in chosen.items()}
    return [(rank, ranks[rank]) for rank in ("worst", "median", "best") if rank in ranks]


def ranked_cases(
    pictures: Mapping[str, Sequence[Picture]], shown: set[str]
) -> list[tuple[str, str]]:
    """Return (place, case) of every case that is not shown yet, lowest mean Dice first.

    Args:
        pictures: Pictures of each method.
        shown: Cases to leave out.
    """
    ordered = _ordered(_dice(pictures))
    places = [(f"{number} of {len(ordered)}", case) for number, case in enumerate(ordered, 1)]
    return [(place, case) for place, case in places if case not in shown]


def all_cases(pictures: Mapping[str, Sequence[Picture]]) -> list[str]:
    """Return the cases with a picture, sorted."""
    return sorted({picture.case for found in pictures.values() for picture in found})


def _dice(pictures: Mapping[str, Sequence[Picture]]) -> dict[str, dict[str, float]]:
    """Return the Dice of each case with each method, without undefined ones."""
    dice: dict[str, dict[str, float]] = {}
    for name, found in pictures.items():
        for picture in found:
            if np.isfinite(picture.dice):
                dice.setdefault(picture.case, {}).setdefault(name, picture.dice)
    return dice


def _ordered(dice: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the cases by their mean Dice over methods, lowest first."""
    mean = {case: sum(values.values()) / len(values) for case, values in dice.items()}
    return sorted(mean, key=lambda case: (mean[case], case))


def crop_box(pictures: Sequence[Picture]) -> Box:
    """Return (top, bottom, left, right) of a square around all masks, with a margin.

    The pictures show one slice with several predictions. The full slice is returned if all masks
    are empty.
    """
    height, width = pictures[0].truth.shape
    marked = np.zeros((height, width), dtype=bool)
    for picture in pictures:
        if picture.truth.shape == (height, width):
            marked |= (picture.truth | picture.prediction) > 0
    if not marked.any():
        return 0, height, 0, width
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    side = max(int(1.7 * max(np.ptp(rows), np.ptp(columns))) + 1, min(48, height, width))
    top, bottom = _range((int(rows[0]) + int(rows[-1])) // 2, side, height)
    left, right = _range((int(columns[0]) + int(columns[-1])) // 2, side, width)
    return top, bottom, left, right


def _range(centre: int, side: int, length: int) -> tuple[int, int]:
    side = min(side, length)
    start = min(max(centre - side // 2, 0), length - side)
    return start, start + side


def overlay(picture: Picture, box: Box, label: str, images: Images) -> Markup:
    """Draw a picture, cropped to `box`, with every structure's contours.

    Args:
        picture: Slice, truth and prediction.
        box: Part of the slice to show (`crop_box`).
        label: Text for screen readers; plain text, escaped here.
        images: Store of the slices.
    """
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    scale = SIDE / max(height, width)
    size = f"{width * scale:.0f}", f"{height * scale:.0f}"
    lines = []
    for bit in range(max(1, len(picture.structures))):
        for masks, name in (
            (picture.truth, "truth"),
            (picture.prediction, f"prediction p{bit % PREDICTIONS}"),
        ):
            path = contour_path(((masks[top:bottom, left:right] >> bit) & 1).astype(bool), scale)
            if path:
                lines.append(f'<path class="halo" d="{path}"/><path class="{name}" d="{path}"/>')
    return Markup(
        '<svg class="overlay" role="img" aria-label="{label}" viewBox="0 0 {width} {height}">'
        '<use href="#{image}"/>{lines}</svg>'
    ).format(
        label=label,
        width=size[0],
        height=size[1],
        image=images.add(jpeg(picture.image[top:bottom, left:right], scale), *size),
        lines=Markup("".join(lines)),  # noqa: S704 - built above from numbers
    )


Row = tuple[str, Sequence[Picture | None]]  # rank, the case's picture with each method


@mpl.rc_context(STYLE)
def overlay_sheet(rows: Sequence[Row], methods: Sequence[str], alt: str) -> Drawing:
    """Draw cases in rows and methods in columns, as one figure for a file.

    Args:
        rows: Rank and pictures of each case, in the order of the methods; each row has at least one
            picture.
        methods: Name of each column.
        alt: Alternative text.
    """
    side = 150
    left = 64
    top = 26
    width, height = left + side * len(methods), top + side * len(rows)
    figure = Figure(figsize=(width / 72, height / 72))
    for row, (rank, pictures) in enumerate(rows):
        box = crop_box([picture for picture in pictures if picture is not None])
        for column, picture in enumerate(pictures):
            place = left + side * column, height - top - side * (row + 1)
            axes = figure.add_axes(
                (
                    (place[0] + 3) / width,
                    (place[1] + 3) / height,
                    (side - 6) / width,
                    (side - 6) / height,
                )
            )
            axes.set_axis_off()
            if row == 0:
                axes.set_title(methods[column], fontsize=11, color=INK)
            if picture is not None:
                _draw_slice(axes, picture, box)
        figure.text(
            6 / width, (height - top - side * (row + 0.5)) / height, rank, color=INK, va="center"
        )
    return finish(figure, height, alt, width)


def _draw_slice(axes: Axes, picture: Picture, box: Box) -> None:
    top, bottom, left, right = box
    axes.imshow(picture.image[top:bottom, left:right], cmap="gray", vmin=0, vmax=255)
    for bit in range(max(1, len(picture.structures))):
        for masks, ink, dash in (
            (picture.truth, TRUTH, "-"),
            (picture.prediction, INKS[bit % PREDICTIONS], "--"),
        ):
            mask = (masks[top:bottom, left:right] >> bit) & 1
            if mask.any() and not mask.all():
                axes.contour(mask, levels=[0.5], colors=[ink], linestyles=[dash], linewidths=[1.2])


def contour_path(mask: npt.NDArray[np.bool_], scale: float) -> str:
    """Return the outline of a mask (H, W) as SVG path data.

    Pixel (y, x) is the square from (x, y) to (x + 1, y + 1).
    """
    padded = np.pad(mask, 1).astype(np.float64)
    parts = []
    for line in contour_generator(z=padded).lines(0.5):
        # Padding shifts by one pixel, the centre of a pixel by half a pixel.
        points = (np.asarray(line) - 0.5) * scale
        text = "L".join(f"{x:.1f} {y:.1f}" for x, y in points[:-1])
        parts.append(f"M{text}Z")
    return "".join(parts)


def jpeg(image: npt.NDArray[np.uint8], scale: float) -> str:
    """Return an image (H, W) or (H, W, 3), scaled, as a data URI."""
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def interval_bar(interval: Interval, span: float) -> Markup:
    """Draw an interval as a bar with its mean, on an axis from -span to +span."""
    if not np.isfinite(interval.low) or span <= 0:
        return Markup("")
    low, mean, high = (
        60 + 54 * max(-1.0, min(1.0, value / span))
        for value in (interval.low, interval.mean, interval.high)
    )
    return Markup(
        '<svg class="interval" aria-hidden="true" viewBox="0 0 120 16" width="120" height="16">'
        '<line class="zero" x1="60" y1="0" x2="60" y2="16"/>'
        '<line class="bar" x1="{low}" y1="8" x2="{high}" y2="8"/>'
        '<circle cx="{mean}" cy="8" r="3.6"/></svg>'
    ).format(low=f"{low:.1f}", mean=f"{mean:.1f}", high=f"{high:.1f}")
