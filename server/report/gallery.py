"""Writes the figures of the page as files: one SVG and one PNG each, with descriptive names.

Files whose name starts with `overlays` show the hospitals' own images; all others show only
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsgcg.common.files.disk import Disk
from fedsgcg.server.report.figures.drawing import Drawing

SECTIONS = {
    "case_panels": "cases",
    "training": "convergence",
    "shift": "shift",
    "tsne": "tsne",
    "similarity": "likeness",
    "sweeps": "sweep",
    "overlays": "overlays",
    "federation": "federation",
}
LONGEST = 80


def gallery(content: Mapping[str, Any]) -> dict[str, Drawing]:
    """Return every figure of the page by the name of its files, without the extension.

    Args:
        content: Content of the page (`server.report.build.contents`).
    """
    files: dict[str, Drawing] = {}
    for section, name in SECTIONS.items():
        for words, drawing in _drawings(content.get(section), [name]):
            files[_free_name(_slug(words), files)] = drawing
    return files


def write_gallery(folder: Path, figures: Mapping[str, Drawing], disk: Disk) -> None:
    """Write each figure as SVG and PNG; a figure whose SVG is unchanged is skipped.

    Raises:
        FedsgcgError: SRV-401 when a file cannot be written.
    """
    for stem, drawing in figures.items():
        svg, png = folder / f"{stem}.svg", folder / f"{stem}.png"
        if png.is_file() and svg.is_file() and svg.read_bytes() == drawing.svg:
            continue
        disk.write(png, drawing.png())
        disk.write(svg, drawing.svg)  # written last: an unchanged SVG implies a complete pair


def _drawings(part: Any, words: list[str]) -> Iterator[tuple[list[str], Drawing]]:
    """Every drawing below a part of the page, with the titles that lead to it."""
    if isinstance(part, Mapping):
        own = [
            str(part[key])
            for key in ("kind", "name", "title")
            if isinstance(part.get(key), str) and part[key]
        ]
        found = []
        if isinstance(part.get("detail"), str) and isinstance(part.get("method"), str):
            found = [part["detail"]]
        if isinstance(part.get("drawing"), Drawing):
            yield [*words, *own, *found], part["drawing"]
        for value in part.values():
            if isinstance(value, (Mapping, list)):
                yield from _drawings(value, [*words, *own])
    elif isinstance(part, list):
        for entry in part:
            yield from _drawings(entry, words)


def _slug(words: list[str]) -> str:
    plain = [
        re.sub(r"[^a-z0-9.]+", "-", word.partition(":")[0].lower()).strip("-.") for word in words
    ]
    return "-".join(word for word in dict.fromkeys(plain) if word)[:LONGEST].strip("-.")


def _free_name(stem: str, taken: Mapping[str, Drawing]) -> str:
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
