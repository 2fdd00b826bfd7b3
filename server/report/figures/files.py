"""Figures as files: the drawing of the page below a title, as SVG and as PNG for print."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from xml.sax.saxutils import escape

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsgcg.server.report.figures.drawing import INK, STYLE, Drawing

PNG_DPI: Final = 300
"""Dots per inch of a figure that is printed at its size on the page; journals ask for 300."""

TITLE_SIZE: Final = 13.5
LINE: Final = 19
"""Height of a line of the title in CSS pixels."""

MARGIN: Final = 8
LETTER: Final = 7.6
"""Mean width of a letter of the title in CSS pixels, to break long titles."""


@dataclass(frozen=True)
class FigureFile:
    """A figure with its title.

    Attributes:
        drawing: The drawing of the page.
        title: Title; long ones are broken.
    """

    drawing: Drawing
    title: str

    @property
    def lines(self) -> list[str]:
        """Lines of the title."""
        width = max(20, int((self.drawing.width - 2 * MARGIN) / LETTER))
        return textwrap.wrap(self.title, width)

    @property
    def head(self) -> int:
        """Height of the title in CSS pixels; 0 without one."""
        return len(self.lines) * LINE + MARGIN if self.lines else 0

    def svg(self) -> bytes:
        """Return the SVG: the title as text, and the drawing of the page unchanged below it."""
        width, height = self.drawing.width, self.drawing.height + self.head
        lines = "".join(
            f'<text x="{MARGIN}" y="{(number + 1) * LINE - 2}">{escape(line)}</text>'
            for number, line in enumerate(self.lines)
        )
        # Matplotlib's sizes are in points, which are a third more than pixels.
        inner = re.sub(
            r'(width|height)="([\d.]+)pt"', r'\1="\2"', self.drawing.svg.decode(), count=2
        )
        inner = inner.replace("<svg ", f'<svg y="{self.head}" ', 1)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f"<title>{escape(self.title)}</title><desc>{escape(self.drawing.alt)}</desc>"
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
            f'<g font-family="DejaVu Sans, Verdana, sans-serif" font-size="{TITLE_SIZE}" '
            f'font-weight="bold" fill="{INK}">{lines}</g>'
            f"{inner}</svg>"
        ).encode()

    def png(self) -> bytes:
        """Return the PNG on white ground with `PNG_DPI`."""
        image = io.BytesIO()
        with mpl.rc_context(STYLE), _titled(self.drawing, self.lines, self.head) as figure:
            raster: Any = FigureCanvasAgg(figure)
            options = {"compress_level": 3, "dpi": (PNG_DPI, PNG_DPI)}
            raster.print_png(image, metadata={"Software": None}, pil_kwargs=options)
        return image.getvalue()


@contextmanager
def _titled(drawing: Drawing, lines: list[str], head: int) -> Iterator[Figure]:
    """Yield the figure with room for its title at the top; everything else keeps its size."""
    figure, height = drawing.figure, drawing.height
    share = height / (height + head)
    places = [(axes, axes.get_position(original=True)) for axes in figure.axes]
    texts = [(text, text.get_position()) for text in figure.texts]
    size, dpi = figure.get_size_inches().copy(), figure.get_dpi()
    ground = figure.patch.get_alpha()
    try:
        figure.set_size_inches(size[0], size[1] / share)
        for axes, box in places:
            axes.set_position((box.x0, box.y0 * share, box.width, box.height * share))
        for text, (x, y) in texts:
            text.set_position((x, y * share))
        added = [
            figure.text(
                MARGIN / drawing.width,
                1 - ((number + 1) * LINE - 2) / (height + head),
                line,
                fontsize=TITLE_SIZE,
                fontweight="bold",
                color=INK,
            )
            for number, line in enumerate(lines)
        ]
        figure.patch.set_alpha(1)
        figure.patch.set_facecolor("white")
        figure.set_dpi(PNG_DPI)
        yield figure
        for text in added:
            text.remove()
    finally:
        figure.set_size_inches(*size)
        figure.set_dpi(dpi)
        figure.patch.set_alpha(ground)
        for axes, box in places:
            axes.set_position(box)
        for text, place in texts:
            text.set_position(place)
