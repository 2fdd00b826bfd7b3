"""The picture sheet of `fedsgcg data check`: one slice a case with the contours of its mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from fedsgcg.clients.data.case_files import CaseFile
from fedsgcg.clients.data.slices import flattened, scale_intensity
from fedsgcg.common.images.read import Volume
from fedsgcg.common.settings.plan import DataSettings
from fedsgcg.deploy.site.check_files import Finding
from fedsgcg.server.report.figures.overlays import Images, overlay
from fedsgcg.server.report.reader import Picture

MOST: Final = 200
"""Cases of one hospital on the sheet, evenly chosen, so that the page stays usable."""

STYLE: Final = Markup("""
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1d2329; }
table { border-collapse: collapse; margin: 0 0 1.5rem; }
th, td { border-bottom: 1px solid #d5dade; padding: 0.2rem 0.7rem; text-align: left; }
.fail { color: #b3261e; } .warn { color: #8a5a00; } .note { color: #285ea8; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; }
.overlay { display: block; width: 100%; height: auto; background: #000; }
.overlay path { fill: none; stroke-width: 2; stroke: #ff5a47; }
.overlay .halo { stroke: #000; stroke-opacity: 0.4; stroke-width: 4; }
""")


class Sheet:
    """Collects a slice of each case while it is read; pixels are kept as a small JPEG.

    Args:
        data: Classes, structures and the intensity rule.
    """

    def __init__(self, data: DataSettings) -> None:
        self._data = data
        self._images = Images()
        self._figures: dict[str, list[Markup]] = {}
        self._met: dict[str, int] = {}

    def add(self, case: CaseFile, image: Volume, truth: NDArray[np.uint8], *, count: int) -> None:
        """Add the slice of a case with the largest share of structures, or the middle one.

        Args:
            case: The case.
            image: Its image: (Z, Y, X), or (C, Y, X) for a picture.
            truth: Class indices (Z, Y, X).
            count: Cases of the hospital.
        """
        number = self._met.get(case.site, 0)
        self._met[case.site] = number + 1
        if count > MOST and number * MOST // count == (number - 1) * MOST // count:
            return
        masks = self._masks(truth)
        marked = (masks > 0).sum(axis=(1, 2))
        z = int(marked.argmax()) if marked.any() else len(masks) // 2
        pixels = image.array if image.is_picture else image.array[z : z + 1]
        rule = self._rule(image)
        if rule == "flat":
            flat = flattened(pixels[None], self._data.flat_sigma / self._data.image_size)
            pixels = flat[0]
        scaled = scale_intensity(pixels, rule)
        grey = np.rint((scaled.mean(axis=0) + 1) * 127.5).astype(np.uint8)
        height, width = grey.shape
        names = tuple(self._data.structures)[:8]
        picture = Picture(case.name, 0.0, z, grey, masks[z], np.zeros_like(masks[z]), names)
        label = f"{case.site} {case.name}, slice {z}"
        drawn = overlay(picture, (0, height, 0, width), label, self._images)
        caption = f"{case.name}, slice {z + 1} of {len(masks)}"
        caption += "" if marked.any() else ", no structure"
        self._figures.setdefault(case.site, []).append(
            Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(drawn, caption)
        )

    def page(
        self,
        findings: Sequence[Finding],
        tables: Sequence[tuple[str, list[list[str]]]],
        name: str,
    ) -> bytes:
        """Return the page: tables, findings with their repairs, and the slices by hospital."""
        parts = [Markup("<h1>Data check: {}</h1>").format(name)]
        parts.append(Markup("<p>This page shows patients. Keep it where the data are.</p>"))
        parts += [_table(title, rows) for title, rows in tables]
        parts.append(_findings([one for one in findings if one.verdict != "ok"]))
        for site, figures in self._figures.items():
            shown = f"{len(figures)} of {self._met[site]} cases"
            parts.append(Markup("<h2>{} ({})</h2>").format(site, shown))
            parts.append(Markup('<div class="sheet">{}</div>').format(Markup("").join(figures)))
        page = Markup(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Data check: {}</title>'
            "<style>{}</style><svg width='0' height='0' aria-hidden='true'><defs>{}</defs></svg>{}"
            "</html>"
        ).format(name, STYLE, self._images.markup, Markup("").join(parts))
        return page.encode()

    def _masks(self, truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return (Z, Y, X) with bit s where structure s is; more than eight share the last bit."""
        masks = np.zeros(truth.shape, np.uint8)
        for place, group in enumerate(self._data.structure_classes().values()):
            masks[np.isin(truth, group)] |= 1 << min(place, 7)
        return masks

    def _rule(self, image: Volume) -> str:
        fixed = self._data.intensity == "fixed" and not image.is_eight_bit
        return "percentile" if fixed else self._data.intensity


def _table(title: str, rows: Sequence[Sequence[str]]) -> Markup:
    lines = [
        Markup("<tr>{}</tr>").format(
            Markup("").join(Markup(f"<{tag}>{{}}</{tag}>").format(cell) for cell in row)  # noqa: S704
        )
        for tag, row in [("th", rows[0]), *(("td", row) for row in rows[1:])]
    ]
    return Markup("<h2>{}</h2><table>{}</table>").format(title, Markup("").join(lines))


def _findings(findings: Sequence[Finding]) -> Markup:
    if not findings:
        return Markup("<p>No problem was found.</p>")
    rows = [
        Markup('<tr><td class="{0}">{0}</td><td>{1}</td><td>{2}</td><td>{3}</td></tr>').format(
            one.verdict,
            one.name,
            f"[{one.code}] {one.found}" if one.code else one.found,
            one.action,
        )
        for one in findings
    ]
    head = Markup("<tr><th></th><th>what</th><th>found</th><th>what to do</th></tr>")
    return Markup("<h2>Findings</h2><table>{}{}</table>").format(head, Markup("").join(rows))
