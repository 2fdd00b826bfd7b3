"""Overlays of the report: the cases of each hospital, the same slice with every label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from markupsafe import Markup

from fedsgcg.server.report.figures.drawing import Drawing
from fedsgcg.server.report.figures.overlays import (
    Images,
    all_cases,
    choose_cases,
    crop_box,
    overlay,
    overlay_sheet,
    ranked_cases,
)
from fedsgcg.server.report.format import DASH, show
from fedsgcg.server.report.labels import Group
from fedsgcg.server.report.reader import Picture, Reader
from fedsgcg.server.report.study_files import DONE, Cell, StudyFiles


@dataclass(frozen=True)
class OverlayImage:
    """The contours of one label on a slice.

    Attributes:
        method: The label.
        drawing: The picture as SVG, empty without a picture.
        dice: Dice of the case, mean over structures, as shown; "" without a picture.
    """

    method: str
    drawing: Markup
    dice: str


@dataclass(frozen=True)
class OverlayGroup:
    """Images of one group of labels.

    Attributes:
        title: What the labels have in common, "" if there is only one group.
        images: One image per label.
    """

    title: str
    images: tuple[OverlayImage, ...]


@dataclass(frozen=True)
class OverlayCase:
    """One case with every label.

    Attributes:
        rank: worst, median or best, else its place among the cases.
        case: Alias of the case.
        name: Its name at the hospital, "" if it is not known on this machine.
        anchor: Its place on the page.
        z: Index of the slice.
        mean: Dice of the case, mean over labels, as shown.
        groups: The images.
    """

    rank: str
    case: str
    name: str
    anchor: str
    z: int
    mean: str
    groups: tuple[OverlayGroup, ...]


@dataclass(frozen=True)
class OverlayBlock:
    """The chosen cases of one hospital.

    Attributes:
        site: The hospital.
        seed: Seed of the shown models.
        cases: Worst, median and best case.
        others: Further cases, lowest Dice first.
        left_out: Number of cases that are not shown.
        alone: Hospitals that trained alone and whose models are shown.
        sheet: The same cases as one figure for a file, None without a picture of the first group.
    """

    site: str
    seed: int
    cases: tuple[OverlayCase, ...]
    others: tuple[OverlayCase, ...]
    left_out: int
    alone: tuple[str, ...]
    sheet: Drawing | None


MOST_OVERLAYS = 12  # most labels of one case
MOST_FURTHER = 120  # most drawings besides the worst, median and best cases, to limit the page size


def overlay_blocks(
    study: StudyFiles,
    reader: Reader,
    groups: Sequence[Group],
    images: Images,
    names: Mapping[str, str],
) -> list[OverlayBlock]:
    """One block per hospital: worst, median and best case, then others, with every label.

    Args:
        study: The study.
        reader: Reader of the hospitals' files.
        groups: Labels by figure.
        images: Store of the slices.
        names: Name of a case by its alias, as far as known.
    """
    wanted = [name for group in groups for name in group.labels][:MOST_OVERLAYS]
    blocks: list[OverlayBlock] = []
    places = {
        path.parent.name
        for cell in study.cells
        for path in cell.folder.glob("sites/*/pictures.arrow")
    }
    further = MOST_FURTHER // (max(1, len(places)) * max(1, len(wanted)))
    for fold in sorted({cell.heldout for cell in study.cells}):
        ready = [
            cell
            for cell in study.cells
            if cell.heldout == fold and cell.status in DONE and cell.method in wanted
        ]
        for site in sorted(
            {
                path.parent.name
                for cell in ready
                for path in cell.folder.glob("sites/*/pictures.arrow")
            }
        ):
            shown = _one_seed([cell for cell in ready if _picture_path(cell, site).is_file()])
            pictures = {cell.method: reader.pictures(_picture_path(cell, site)) for cell in shown}
            chosen = choose_cases(pictures)
            rest = ranked_cases(pictures, {case for _, case in chosen})
            draw = partial(_overlay_cases, pictures, groups, images, names, f"case-{len(blocks)}")
            cases, others = draw(chosen), draw(rest[:further])
            if cases:
                blocks.append(
                    OverlayBlock(
                        site=site,
                        seed=shown[0].seed,
                        cases=cases,
                        others=others,
                        left_out=len(rest) - len(others),
                        alone=tuple(sorted({cell.trained_on for cell in shown if cell.trained_on})),
                        sheet=_sheet(pictures, groups[0].labels, site),
                    )
                )
    return blocks


def _sheet(
    pictures: Mapping[str, Sequence[Picture]], methods: Sequence[str], site: str
) -> Drawing | None:
    """The same cases as one figure for a file, with the methods of the first group.

    None without a picture of these methods.
    """
    rows = []
    for rank, case in choose_cases(pictures):
        found = [
            next((p for p in pictures.get(name, ()) if p.case == case), None) for name in methods
        ]
        rows += [(rank, found)] if any(picture is not None for picture in found) else []
    alt = f"Worst, median and best case at {site} with each method."
    return overlay_sheet(rows, methods, alt) if rows else None


def _one_seed(cells: Sequence[Cell]) -> list[Cell]:
    """One cell per label, with the seed that most labels have.

    Of hospitals that trained alone, the first is used.
    """
    by_seed: dict[int, dict[str, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.key):
        by_seed.setdefault(cell.seed, {}).setdefault(cell.method, cell)
    return list(by_seed[min(by_seed, key=lambda seed: (-len(by_seed[seed]), seed))].values())


def _picture_path(cell: Cell, site: str) -> Path:
    return cell.folder / "sites" / site / "pictures.arrow"


def _overlay_cases(
    pictures: Mapping[str, Sequence[Picture]],
    groups: Sequence[Group],
    images: Images,
    names: Mapping[str, str],
    anchor: str,
    chosen: Sequence[tuple[str, str]],
) -> tuple[OverlayCase, ...]:
    order = {case: place for place, case in enumerate(all_cases(pictures))}
    cases = []
    for rank, case in chosen:
        versions = {
            name: next((p for p in found if p.case == case), None)
            for name, found in pictures.items()
        }
        present = [picture for picture in versions.values() if picture is not None]
        box = crop_box(present)
        rows = []
        for group in groups:
            drawn = tuple(
                _overlay_image(name, versions.get(name), box, (rank, case), images)
                for name in group.labels
            )
            rows.append(OverlayGroup(group.title, drawn))
        known = [picture.dice for picture in present if math.isfinite(picture.dice)]
        mean = show(float(np.mean(known)), 3) if known else DASH
        place = f"{anchor}-{order[case]}"
        name = names.get(case, "")
        cases.append(OverlayCase(rank, case, name, place, present[0].z, mean, tuple(rows)))
    return tuple(cases)


def _overlay_image(
    name: str,
    picture: Picture | None,
    box: tuple[int, int, int, int],
    what: tuple[str, str],
    images: Images,
) -> OverlayImage:
    if picture is None:
        return OverlayImage(name, Markup(""), "")
    label = f"{what[0]} case {what[1]}, {name}: contours of truth (solid) and prediction (dashed)"
    return OverlayImage(name, overlay(picture, box, label, images), show(picture.dice, 3))
