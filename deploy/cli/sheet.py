"""The picture sheet of `fedsgcg data check`: one slice a case with the contours of its mask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from fedsgcg.clients.data.case_files import CaseFile
from fedsgcg.clients.data.slices import flattened, scale_intensity
from fedsgcg.common.images.read import Volume
from fedsgcg.common.names import number_of
from fedsgcg.common.settings.plan import DataSettings
from fedsgcg.deploy.site.findings import Finding, shortened
from fedsgcg.server.report.figures.overlays import Images, contour_path, jpeg

MOST: Final = 200
"""Cases of one hospital on the sheet, evenly chosen, so that the page stays usable."""

SIDE: Final = 320
"""Longer side of a drawn slice in pixels."""

CLOSEST: Final = 0.4
"""Smallest part of a slice that is shown, relative to its longer side."""

MARGIN: Final = 2.5
"""Shown part relative to the structures."""

INKS: Final = ("#ffb000", "#3ddbd9", "#ff7eb6", "#a6e36e", "#be95ff", "#ff8a65", "#82cfff", "#fff")
"""Colours of the structures; more structures share the last one. Lines also differ in dash."""

DASHES: Final = ("", "7 3", "2 3", "10 3 2 3")

STYLE: Final = Markup("""
:root { --ink: #1d2329; --soft: #5b6670; --line: #dde2e6; --paper: #fff; --page: #f5f7f8; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: var(--ink); background: var(--page);
  font-variant-numeric: tabular-nums; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.lead { color: var(--soft); margin: 0 0 1rem; }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); padding: .45rem .8rem; text-align: left;
  vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.name { white-space: nowrap; } td.say { min-width: 16rem; }
.badge { border-radius: 4px; padding: .05rem .45rem; font-size: .8rem; font-weight: 600;
  color: #fff; white-space: nowrap; }
.badge.fail { background: #b3261e; } .badge.warn { background: #8a5a00; }
.badge.note { background: #285ea8; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; margin: 0; padding: .6rem .8rem;
  background: #12161a; color: #eef1f3; border-radius: 8px; position: sticky; top: .5rem; z-index: 1;
  width: fit-content; }
.legend svg { width: 34px; height: 10px; margin-right: .5rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; display: flex; flex-direction: column; }
figure.marked { border-width: 2px; } figure.fail { border-color: #b3261e; }
figure.warn { border-color: #8a5a00; } figure.note { border-color: #285ea8; }
figure svg { display: block; width: 100%; aspect-ratio: 1; background: #000; }
figcaption { padding: .5rem .7rem; overflow-wrap: anywhere; line-height: 1.35; }
figcaption small { color: var(--soft); display: block; }
.sheet path { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke; }
.sheet .halo { stroke: #000; stroke-opacity: .55; stroke-width: 3.6; stroke-dasharray: none; }
@media (max-width: 34rem) { main { padding: 1rem .8rem 3rem; }
  .sheet { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: .6rem; } }
""")


@dataclass(frozen=True)
class Drawn:
    """A drawn slice: the case, its picture, and a caption."""

    case: str
    picture: Markup
    caption: str


class Sheet:
    """Collects a slice of each case while it is read; pixels are kept as a small JPEG.

    Args:
        data: Classes, structures and the intensity rule.
    """

    def __init__(self, data: DataSettings) -> None:
        self._data = data
        self._images = Images()
        self._drawn: dict[str, list[Drawn]] = {}
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
        groups = list(self._data.structure_classes().values())
        masks = np.stack([np.isin(truth, group) for group in groups])
        marked: NDArray[np.bool_] = np.asarray(masks.any(axis=0))
        z = int(marked.sum(axis=(1, 2)).argmax()) if marked.any() else len(truth) // 2
        pixels = image.array if image.is_picture else image.array[z : z + 1]
        rule = self._rule(image)
        if rule == "flat":
            flat = flattened(pixels[None], self._data.flat_sigma / self._data.image_size)
            pixels = flat[0]
        grey = np.rint((scale_intensity(pixels, rule) + 1) * 127.5).astype(np.uint8)
        shown = grey.transpose(1, 2, 0) if len(grey) == 3 else grey[0]
        rows, columns = part = shown_part(marked[z])
        size = f"{shown.shape[1]} × {shown.shape[0]}"
        whole = shown[part].shape == shown.shape
        depth = "" if image.is_picture else f"slice {z + 1} of {len(truth)}, "
        caption = depth + ("" if whole else "a part of ") + size
        caption += "" if marked.any() else ", no structure"
        picture = self._draw(shown[part], masks[:, z, rows, columns], f"{case.site} {case.name}")
        self._drawn.setdefault(case.site, []).append(Drawn(case.name, picture, caption))

    def page(
        self,
        findings: Sequence[Finding],
        tables: Sequence[tuple[str, list[list[str]]]],
        name: str,
    ) -> bytes:
        """Return the page: findings with their repairs, tables, and the slices by hospital."""
        problems = [one for one in findings if one.verdict != "ok"]
        listed = [one for one in shortened(findings, MOST) if one.verdict != "ok"]
        marks: dict[str, list[Finding]] = defaultdict(list)
        for one in problems:
            marks[one.name].append(one)
        parts = [Markup("<h1>Data check: {}</h1>").format(name)]
        lead = "This page shows patients. Keep it where the data are."
        parts.append(Markup('<p class="lead">{}</p>').format(lead))
        parts.append(_findings(listed))
        parts += [_table(title, rows) for title, rows in tables]
        parts.append(Markup("<h2>One slice of each case</h2>"))
        parts.append(self._legend())
        for site, drawn in self._drawn.items():
            met = number_of(self._met[site], "case")
            shown = met if len(drawn) == self._met[site] else f"{len(drawn)} of {met}"
            figures = Markup("").join(
                _figure(one, marks.get(f"{site} {one.case}")) for one in drawn
            )
            parts.append(Markup("<h2>{}, {}</h2>").format(site, shown))
            parts.append(Markup('<div class="sheet">{}</div>').format(figures))
        page = Markup(
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            "<title>Data check: {}</title><style>{}</style></head><body>"
            "<svg width='0' height='0' style='position:absolute' aria-hidden='true'><defs>{}</defs>"
            "</svg><main>{}</main></body></html>"
        ).format(name, STYLE, self._images.markup, Markup("").join(parts))
        return page.encode()

    def _draw(self, shown: NDArray[np.uint8], masks: NDArray[np.bool_], label: str) -> Markup:
        """Return a slice (Y, X) or (Y, X, 3) with the contours of structures (S, Y, X)."""
        height, width = shown.shape[:2]
        scale = SIDE / max(height, width)
        size = f"{width * scale:.0f}", f"{height * scale:.0f}"
        image = self._images.add(jpeg(shown, scale), *size)
        lines = []
        for number, mask in enumerate(masks):
            if path := contour_path(mask, scale):
                lines.append(Markup('<path class="halo" d="{}"/>').format(path))
                lines.append(Markup('<path class="contour" {} d="{}"/>').format(_ink(number), path))
        return Markup(
            '<svg role="img" aria-label="{}" viewBox="0 0 {} {}"><use href="#{}"/>{}</svg>'
        ).format(label, *size, image, Markup("").join(lines))

    def _legend(self) -> Markup:
        line = Markup(
            '<span><svg aria-hidden="true" viewBox="0 0 34 10"><path d="M0 5H34" stroke-width="3" '
            "{}/></svg>{}</span>"
        )
        names = [
            line.format(_ink(number), name) for number, name in enumerate(self._data.structures)
        ]
        return Markup('<p class="legend">{}</p>').format(Markup("").join(names))

    def _rule(self, image: Volume) -> str:
        fixed = self._data.intensity == "fixed" and not image.is_eight_bit
        return "percentile" if fixed else self._data.intensity


def shown_part(marked: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the rows and columns that are shown of a slice (Y, X): all, or around its structures.

    A small structure would not be seen in the whole slice.
    """
    if not marked.any():
        return slice(None), slice(None)
    edges = [np.flatnonzero(marked.any(axis=1 - axis)) for axis in (0, 1)]
    most = max(int(one[-1] - one[0]) + 1 for one in edges)
    side = max(round(CLOSEST * max(marked.shape)), round(MARGIN * most))
    parts = []
    for one, length in zip(edges, marked.shape, strict=True):
        start = min(max(int(one[0] + one[-1] + 1 - side) // 2, 0), max(0, length - side))
        parts.append(slice(start, start + side))
    return parts[0], parts[1]


def _ink(number: int) -> Markup:
    """Return the colour and dash of a structure as attributes."""
    ink = INKS[min(number, len(INKS) - 1)]
    dash = DASHES[number % len(DASHES)]
    return Markup('stroke="{}" stroke-dasharray="{}"').format(ink, dash)


def _figure(drawn: Drawn, findings: Sequence[Finding] | None) -> Markup:
    badges = Markup(" ").join(
        Markup('<span class="badge {0}" title="{2}">{1}</span>').format(
            one.verdict, one.code, one.found
        )
        for one in findings or ()
    )
    return Markup("<figure{}>{}<figcaption>{} {}<small>{}</small></figcaption></figure>").format(
        Markup(' class="marked {}"').format(findings[0].verdict) if findings else "",
        drawn.picture,
        drawn.case,
        badges,
        drawn.caption,
    )


def _table(title: str, rows: Sequence[Sequence[str]]) -> Markup:
    head = Markup("").join(Markup("<th>{}</th>").format(cell) for cell in rows[0])
    lines = [
        Markup("<tr>{}</tr>").format(
            Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row)
        )
        for row in rows[1:]
    ]
    return Markup('<h2>{}</h2><div class="scroll"><table><tr>{}</tr>{}</table></div>').format(
        title, head, Markup("").join(lines)
    )


def _findings(findings: Sequence[Finding]) -> Markup:
    if not findings:
        return Markup("<h2>Findings</h2><p>No problem was found.</p>")
    order: Mapping[str, int] = {"fail": 0, "warn": 1, "note": 2}
    rows = [
        Markup(
            '<tr><td><span class="badge {0}">{0}</span></td><td class="name">{1}</td>'
            '<td class="say">{2}</td><td class="say">{3}</td></tr>'
        ).format(
            one.verdict,
            one.name,
            f"{one.found} [{one.code}]" if one.code else one.found,
            one.action,
        )
        for one in sorted(findings, key=lambda one: order.get(one.verdict, 3))
    ]
    head = Markup("<tr><th></th><th>where</th><th>found</th><th>what to do</th></tr>")
    return Markup('<h2>Findings</h2><div class="scroll"><table>{}{}</table></div>').format(
        head, Markup("").join(rows)
    )
