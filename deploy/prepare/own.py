"""Own images, and the shared copies of PROMISE12 and SpineGM: lists the cases and their labels.

Own images are listed in a CSV file, have one folder per site, or are in a layout that is
recognised (`layouts`, `series`, `pairs`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from fedsgcg.clients.data.case_files import alike_hospitals
from fedsgcg.clients.data.listing import list_root, structure_files
from fedsgcg.clients.data.manifest import read_manifest
from fedsgcg.common.console import silent
from fedsgcg.common.datasets import CATALOGUE, PROMISE12, SPINEGM
from fedsgcg.common.errors import CODES, FedsgcgError, Problem
from fedsgcg.common.images.folders import (
    STEP,
    Listing,
    counted_names,
    is_file,
    stem_of,
    without_suffix,
)
from fedsgcg.common.images.formats import suffix_of
from fedsgcg.common.images.parts import inside
from fedsgcg.common.names import number_of, printable
from fedsgcg.deploy.prepare import challenge, pairs, series, spinegm
from fedsgcg.deploy.prepare.cases import named, work_of
from fedsgcg.deploy.prepare.conversion import Found, absent, search
from fedsgcg.deploy.prepare.hospitals import assign, suggestion
from fedsgcg.deploy.prepare.labels import Labels
from fedsgcg.deploy.prepare.layouts import Layout, Line, recognise
from fedsgcg.deploy.prepare.patients import one_patient, with_person

MOST_REASONS: Final = 12
"""Problems that are named if a folder has no case."""


def find(
    name: str,
    source: Path,
    *,
    link: bool,
    hospitals: str = "",
    channel: str = "",
    step: Callable[[str], None] = silent,
) -> tuple[Found, Labels]:
    """List the cases of a CSV file, of a folder with `manifest.csv`, or of a folder without one.

    Args:
        name: `promise12`, `spinegm`, or `manifest` for own data.
        source: CSV file or folder.
        link: Link to the files instead of copying them.
        hospitals: Table or pattern that assigns the cases to hospitals
            (`deploy.prepare.hospitals`); "" if the folders do.
        channel: Name or number of the channel of a folder of nnU-Net; "" = the first one.
        step: Called with what is done.

    Returns:
        The cases, and the label values, which the conversion fills in.

    Raises:
        FedsgcgError: DAT-120 when there is no case; the error says what is needed.
    """
    table = source if source.is_file() else source / "manifest.csv"
    labels = Labels({"promise12": frozenset({0, 1}), "spinegm": frozenset({0, 1, 2})}.get(name))
    listed = table.is_file()
    layout = f"table {table}" if listed else f"one folder per hospital in {source}"
    found = Found(layout, published=listed or name in CATALOGUE)
    listing = Listing() if source.is_file() else search(source, found, step)
    files = listing.images
    if listed:
        lines = _from_table(name, table, found)
    else:
        lines = _from_folders(listing, source, found, own=name not in CATALOGUE)
    if not lines and not listed and name == PROMISE12.name:
        lines = challenge.find(files, found)
    if not lines and not listed and name == SPINEGM.name:
        spinegm.find(files, found)
    if not lines and not listed and name not in CATALOGUE:
        lines = _recognised(listing, source, labels, found, channel, step)
    if not lines and not found.work:
        (nothing,) = absent(name, source, _nothing(listing, listed)).problems
        raise FedsgcgError(nothing, *found.problems[:MOST_REASONS])
    _report_series(listing, lines, source, found)
    if name not in CATALOGUE:
        lines = with_person(lines, step, stated=listed)
    if hospitals or name not in CATALOGUE:
        lines = _with_hospitals(lines, hospitals, source, found)
        lines, notes = one_patient(lines, table.parent if listed else source)
        found.notes += notes
    found.notes += [
        f"{p.where}: {CODES[p.code]} {p.found}. {p.action}" for p in alike_hospitals(_sites(lines))
    ]
    lines = _one_way(lines, found)
    for number, line in enumerate(named(lines), 1):
        if number % STEP == 0:
            step(f"files of case {number} of {len(lines)}")
        paths = (line.image, *line.masks, *line.files)
        gone = [path for path in paths if not is_file(path) and not path.is_dir()]
        for path in gone:
            found.missing(path, "such file")
        if gone:
            found.torn |= set(paths)
        else:
            found.work.append(work_of(line, labels, link=link))
    if name in CATALOGUE or table.is_file():
        found.extras(files, lambda path: "preview" in str(path.relative_to(source)))
    return found, labels


def _report_series(listing: Listing, lines: Sequence[Line], source: Path, found: Found) -> None:
    """Record the folders of DICOM files of which no case uses a file."""
    used = {path for line in lines for path in (line.image, *line.masks, *line.files)}
    idle = [folder for folder, files in listing.series.items() if not {folder, *files} & used]
    if idle and not any(line.files for line in lines):
        names = counted_names(idle, "folder", "of DICOM files")
        action = (
            "Name the folder of each series <case>_image, its mask <case>_mask, or export DICOM "
            "segmentations, which say to which series they belong."
        )
        found.problems.append(Problem("DAT-119", names, "cases with masks", action, str(source)))


def _recognised(
    listing: Listing,
    source: Path,
    labels: Labels,
    found: Found,
    channel: str,
    step: Callable[[str], None],
) -> list[Line]:
    """List the cases of a layout of other tools, of a DICOM export, or by the files' names."""
    known: tuple[Callable[[], Layout | None], ...] = (
        partial(recognise, source, listing.images, channel),
        partial(series.recognise, source, listing.series, step),
        partial(pairs.recognise, source, listing.images),
    )
    for layout in (make() for make in known):
        if layout is not None and (lines := _adopt(layout, labels, found)):
            return lines
    return []


def _adopt(layout: Layout, labels: Labels, found: Found) -> list[Line]:
    """Take over what a recognised layout states."""
    found.layout = layout.title
    found.problems += layout.problems
    found.notes += layout.notes
    labels.names, labels.regions = layout.names, layout.regions
    values = {*layout.names, *(value for group in layout.regions.values() for value in group)}
    if values:
        labels.allowed = frozenset({0, *values})
    return [line for line in layout.lines if line.mask is not None]


def _with_hospitals(
    lines: Sequence[Line], hospitals: str, source: Path, found: Found
) -> list[Line]:
    """Assign the cases to hospitals; those of which none is known are of the source's name."""
    if hospitals:
        kept, problems = assign(lines, hospitals, source)
        found.problems += problems
        if not kept:
            raise FedsgcgError(*problems)
        return kept
    own = printable(source.resolve().name)
    lines = [replace(line, site=line.site or own) for line in lines]
    if len(_sites(lines)) == 1:
        text = suggestion(lines) or "--hospitals TABLE names a CSV file with the columns case, site"
        found.notes.append(f"one hospital, {_sites(lines)[0]}, and a study needs two: {text}")
    return lines


def _one_way(lines: Sequence[Line], found: Found) -> list[Line]:
    """Leave out cases whose masks are given in another way than those of most cases.

    A data set has whole masks or the same structures in every case: a structure without a file may
    not be in the image, or may not have been drawn.
    """
    ways = Counter(frozenset(name for name, _ in line.structures) for line in lines if line.masks)
    if len(ways) < 2:
        return list(lines)
    names = frozenset(name for way in ways for name in way)
    usual = names if frozenset() not in ways else ways.most_common(1)[0][0]
    kept = []
    for line in lines:
        way = frozenset(name for name, _ in line.structures)
        if not line.masks or way == usual:
            kept.append(line)
            continue
        found.torn |= set(line.masks) | {line.image}
        found.problems.append(
            Problem(
                "DAT-165",
                f"masks of {', '.join(sorted(way)) or 'no named structure'}",
                ", ".join(sorted(usual)) or "one mask with all labels, as in other cases",
                "Add the masks that are missing, empty ones if the structure is not in the image.",
                str(line.image),
            )
        )
    return kept


def _nothing(listing: Listing, listed: bool) -> str:
    if listed:
        return "a table without a usable line"
    files = sum(map(len, listing.series.values()))
    dicom = f"{number_of(files, 'DICOM file')} without a segmentation, " if files else ""
    images = number_of(len(listing.images), "image file")
    return f"{dicom}{images}, no table and no <site>/<case>_image.*"


def _sites(lines: Sequence[Line]) -> list[str]:
    return sorted({line.site for line in lines})


def _from_table(name: str, table: Path, found: Found) -> list[Line]:
    try:
        rows = read_manifest(table)
    except FedsgcgError as error:
        (problem,) = error.problems
        raise absent(
            name, table, f"{problem.found}. {problem.action}".removesuffix(". ")
        ) from error
    lines = []
    seen: set[tuple[str, Path]] = set()
    for row in rows:
        where = f"{table}, line {row.line}"
        image = table.parent / row.image
        mask = table.parent / row.mask if row.mask else None
        path = Path(os.path.normpath(image))
        if wrong := next(row.mistakes(), None):
            found.problems.append(Problem("DAT-125", *wrong, "Correct the line.", where))
        elif (row.site, path) in seen:
            found.surplus(Path(where), "an image that an earlier line already lists")
        else:
            seen.add((row.site, path))
            structures = [(part, table.parent / file) for part, file in row.structures]
            if mask is not None and not structures:
                structures = structure_files(mask, stem_of(image))
            if structures:
                mask = structures[0][1]
            lines.append(
                Line(
                    row.site,
                    image,
                    mask,
                    row.patient,
                    row.split,
                    structures=tuple(structures),
                    files=_slices(image),
                )
            )
    return lines


def _from_folders(listing: Listing, source: Path, found: Found, *, own: bool) -> list[Line]:
    """List `<site>/<case>_image.*` with the masks in the same folder."""
    images = [*listing.images, *(listing.series if own else ())]
    at_site = [path for path in images if path.parent.parent == source]
    if not any(stem_of(path) != without_suffix(path.name) for path in at_site):
        return []
    listed = list_root(source)
    lines = [
        Line(
            case.site,
            case.image,
            case.mask,
            structures=case.structures,
            files=_slices(case.image),
        )
        for case in listed.cases
    ]
    found.problems += [problem for _, problem in listed.problems]
    used = {path for line in lines for path in (line.image, *line.masks)}
    for line in lines:
        if line.mask is None:
            found.missing(line.image, "mask next to the image")
    for path in listing.images:
        if not {path, path.parent} & used:
            found.surplus(path, "neither an image nor a mask of a case")
    return lines


def _slices(image: Path) -> tuple[Path, ...]:
    """Return the files of the series in a folder, () for an image file."""
    return tuple(inside(image)) if not suffix_of(image) and image.is_dir() else ()
