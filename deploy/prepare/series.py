"""Finds DICOM series and the segmentations that refer to them, wherever an export has put them.

An archive writes a study with all its series into one folder, or each series into its own. A
segmentation names its series, so that localizers and other series of the study need not be removed.
The first folder below the source is the hospital, the second one the patient; identifiers of
patients are not read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.errors import Problem
from fedsgcg.common.images.dicom import SEGMENTATIONS
from fedsgcg.common.images.dicom_file import opened
from fedsgcg.common.images.extras import library
from fedsgcg.common.images.folders import counted_names
from fedsgcg.common.images.formats import DICOM
from fedsgcg.common.names import number_of, printable
from fedsgcg.deploy.prepare.layouts import Layout, Line

CONTOURS: Final = "1.2.840.10008.5.1.4.1.1.481.3"
"""SOP class of RT Structure Set Storage."""

TAGS: Final = (
    *("SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Rows"),
    *("ReferencedSeriesSequence", "ImagePositionPatient"),
)


@dataclass
class _Export:
    """What a folder has.

    Attributes:
        series: SeriesInstanceUID -> its images.
        titles: SeriesInstanceUID -> description and number.
        segmentations: (file, series that it refers to).
        contours: RT structure sets.
        damaged: (file, reason).
    """

    series: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    titles: dict[str, str] = field(default_factory=dict)
    segmentations: list[tuple[Path, list[str]]] = field(default_factory=list)
    contours: list[Path] = field(default_factory=list)
    damaged: list[tuple[Path, str]] = field(default_factory=list)


def recognise(source: Path, series: Mapping[Path, Sequence[Path]]) -> Layout | None:
    """Return a case for each series with a segmentation; None if no file is a segmentation.

    Args:
        source: The folder.
        series: Folder -> its files of DICOM (`common.images.folders.Listing.series`).

    Raises:
        FedsgcgError: DAT-160 without pydicom.
    """
    if not series:
        return None
    export = _read([path for paths in series.values() for path in paths])
    layout = Layout("DICOM series with segmentations that refer to them")
    layout.problems += [
        Problem("DAT-103", why, "a DICOM file", "Export it again.", str(path))
        for path, why in export.damaged
    ]
    if export.contours:
        layout.problems.append(
            Problem(
                "DAT-128",
                counted_names(export.contours, "RT structure sets"),
                "DICOM segmentations",
                "Convert each with plastimatch: plastimatch convert --input RTSTRUCT.dcm "
                "--referenced-ct SERIES --output-prefix MASKS --prefix-format nrrd, and list the "
                "masks in manifest.csv.",
                str(source),
            )
        )
    if not export.segmentations:
        return layout if export.contours else None
    drawn: dict[str, list[Path]] = defaultdict(list)
    for path, named in export.segmentations:
        here = [uid for uid in named if uid in export.series]
        if not named:
            here = _only_series_near(path, export)
        if len(here) == 1:
            drawn[here[0]].append(path)
        else:
            layout.problems.append(_unknown(path, named))
    for uid, paths in sorted(drawn.items(), key=lambda item: item[1][0]):
        if len(paths) == 1:
            layout.lines.append(_line(source, export.series[uid], paths[0]))
        else:
            layout.problems.append(_several(paths))
    _note_others(layout, export, set(drawn))
    return layout


def _read(paths: Sequence[Path]) -> _Export:
    """Read the headers of all files; only paths and identifiers of series are kept."""
    pydicom: Any = library("pydicom", DICOM.name)
    export = _Export()
    for path in paths:
        try:
            with opened(path) as file:
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
            uid = str(header.get("SeriesInstanceUID", ""))
            kind = header.get("SOPClassUID", "")
            named = [
                str(one.SeriesInstanceUID) for one in header.get("ReferencedSeriesSequence", [])
            ]
        except Exception as error:  # on damaged bytes pydicom raises almost anything
            export.damaged.append((path, f"{type(error).__name__}: {error}"))
            continue
        if kind in SEGMENTATIONS:
            export.segmentations.append((path, list(dict.fromkeys(named))))
        elif kind == CONTOURS:
            export.contours.append(path)
        elif header.get("Rows"):
            export.series[uid].append(path)
            title = f"{header.get('SeriesDescription', '')} {header.get('SeriesNumber', '')}"
            export.titles.setdefault(uid, title.strip() or "without a description")
    return export


def _only_series_near(path: Path, export: _Export) -> list[str]:
    """Return the series in the folder of a segmentation that names none, if it is the only one."""
    return [
        uid
        for uid, files in export.series.items()
        if any(file.parent in (path.parent, *path.parent.iterdir()) for file in files[:1])
    ]


def _line(source: Path, files: Sequence[Path], segmentation: Path) -> Line:
    folder = files[0].parent
    parts = folder.relative_to(source).parts
    return Line(
        printable(parts[0]) if parts else "",
        folder,
        segmentation,
        patient=printable("_".join(parts[:2])) if len(parts) > 1 else "",
        name=printable(parts[1] if len(parts) > 1 else folder.name),
        files=tuple(files),
    )


def _unknown(path: Path, named: Sequence[str]) -> Problem:
    found = f"it refers to series {named[0]}, which is not here" if named else "it names no series"
    if len(named) > 1:
        found = f"it refers to {number_of(len(named), 'series').removesuffix('s')} or none here"
    return Problem(
        "DAT-164",
        found,
        "one series of this folder",
        "Export the series that it was drawn on as well; export both again if their identifiers "
        "were replaced separately.",
        str(path),
    )


def _several(paths: Sequence[Path]) -> Problem:
    return Problem(
        "DAT-162",
        counted_names(paths, "segmentations of one series"),
        "one segmentation, with a segment for each structure",
        "Keep the final one here and move the others away.",
        str(paths[0]),
    )


def _note_others(layout: Layout, export: _Export, drawn: set[str]) -> None:
    """Note the series without a segmentation, by their descriptions."""
    titles = Counter(export.titles[uid] for uid in export.series if uid not in drawn)
    if titles:
        shown = ", ".join(f"{printable(title)} ({n})" for title, n in titles.most_common(4))
        more = ", ..." if len(titles) > 4 else ""
        layout.notes.append(
            f"{titles.total()} series without a segmentation, not used: {shown}{more}"
        )
