"""Writes the figures of the page as files: one SVG and one PNG each, with descriptive names.

Files whose name starts with `overlays` show the hospitals' own images; all others show only
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedsgcg.common.files.disk import Disk
from fedsgcg.server.report.figures.files import FigureFile
from fedsgcg.server.report.sections.elements import TitledDrawing, titled_drawings
from fedsgcg.server.report.sections.page import Page

LONGEST = 80
TITLES = {
    "cases": "Dice of every case",
    "convergence": "Training, round by round",
    "shift": "Shift between hospitals, by class",
    "hospitals": "Distances between hospitals",
    "tsne": "Pixel features (t-SNE)",
    "likeness": "Similarity of the classes",
    "sweep": "Swept setting",
    "overlays": "Worst, median and best case",
    "federation": "Cost of federation",
    "privacy": "Privacy",
}
"""Title of a figure, before those under which the page shows it."""


def page_drawings(page: Page) -> dict[str, Iterable[TitledDrawing]]:
    """Every figure of the page with its titles, by the first part of the names of its files."""
    figures, comparisons = page.figures, page.comparisons
    return {
        "cases": titled_drawings(figures.cases),
        "convergence": titled_drawings(figures.training),
        "shift": titled_drawings(figures.shift, with_detail=True),
        "tsne": figures.tsne.drawings if figures.tsne else (),
        "likeness": figures.similarity.drawings,
        "sweep": (drawing for sweep in comparisons.sweeps for drawing in sweep.drawings),
        "overlays": (((block.site,), block.sheet) for block in figures.overlays if block.sheet),
        "federation": comparisons.federation.drawings if comparisons.federation else (),
        "privacy": comparisons.privacy.drawings if comparisons.privacy else (),
    }


def gallery(drawings: Mapping[str, Iterable[TitledDrawing]]) -> dict[str, FigureFile]:
    """Return every figure by the name of its files, without the extension.

    Args:
        drawings: Figures with their titles, by the first part of the name (`page_drawings`).
    """
    files: dict[str, FigureFile] = {}
    for name, titled in drawings.items():
        for titles, drawing in titled:
            title = " · ".join(filter(None, [TITLES[name], *titles]))
            files[_free_name(_slug([name, *titles]), files)] = FigureFile(drawing, title)
    return files


def write_gallery(folder: Path, figures: Mapping[str, FigureFile], disk: Disk) -> None:
    """Write each figure as SVG and PNG; a figure whose SVG is unchanged is skipped.

    Raises:
        FedsgcgError: SRV-401 when a file cannot be written.
    """
    for stem, figure in figures.items():
        text = figure.svg()
        svg, png = folder / f"{stem}.svg", folder / f"{stem}.png"
        if png.is_file() and svg.is_file() and svg.read_bytes() == text:
            continue
        disk.write(png, figure.png())
        disk.write(svg, text)  # written last: an unchanged SVG implies a complete pair


def _slug(words: list[str]) -> str:
    plain = [
        re.sub(r"[^a-z0-9.]+", "-", word.partition(":")[0].lower()).strip("-.") for word in words
    ]
    return "-".join(word for word in dict.fromkeys(plain) if word)[:LONGEST].strip("-.")


def _free_name(stem: str, taken: Mapping[str, FigureFile]) -> str:
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
