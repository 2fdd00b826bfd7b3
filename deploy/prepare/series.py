"""Finds DICOM series and the segmentations that refer to them, wherever an export has put them.

An archive writes a study with all its series into one folder, or each series into its own. A
segmentation names its series, so that localizers and other series of the study need not be removed.
Several segmentations of one series are its mask together if they have different structures.
The first folder below the source is the hospital, the second one the patient, unless the headers
say that folders have the same patient (`deploy.prepare.patients`).
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.console import silent
from fedsgcg.common.errors import Problem
from fedsgcg.common.images.dicom import SEGMENTATIONS
from fedsgcg.common.images.dicom_file import opened
from fedsgcg.common.images.extras import library
from fedsgcg.common.images.folders import counted_names
from fedsgcg.common.images.formats import DICOM
from fedsgcg.common.names import printable
from fedsgcg.deploy.prepare.layouts import Layout, Line

CONTOURS: Final = "1.2.840.10008.5.1.4.1.1.481.3"
"""SOP class of RT Structure Set Storage."""

TAGS: Final = (
    *("SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Rows"),
    *("ReferencedSeriesSequence", "ImagePositionPatient", "PatientID"),
    "ReferencedFrameOfReferenceSequence",
)


@dataclass
class _Export:
    """What a folder has.

    Attributes:
        series: SeriesInstanceUID -> its images.
        titles: SeriesInstanceUID -> description and number.
        people: SeriesInstanceUID -> PatientID.
        segmentations: (file, series that it refers to).
        contours: RT structure set -> the series that it refers to, "" if it does not say it.
        damaged: (file, reason).
    """

    series: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    titles: dict[str, str] = field(default_factory=dict)
    people: dict[str, str] = field(default_factory=dict)
    segmentations: list[tuple[Path, list[str]]] = field(default_factory=list)
    contours: dict[Path, str] = field(default_factory=dict)
    damaged: list[tuple[Path, str]] = field(default_factory=list)


def recognise(
    source: Path, series: Mapping[Path, Sequence[Path]], step: Callable[[str], None] = silent
) -> Layout | None:
    """Return a case for each series with a segmentation; None if no file is a segmentation.

    Args:
        source: The folder.
        series: Folder -> its files of DICOM (`common.images.folders.Listing.series`).
        step: Called with what is done.

    Raises:
        FedsgcgError: DAT-160 without pydicom.
    """
    if not series:
        return None
    export = _read([path for paths in series.values() for path in paths], step)
    layout = Layout("DICOM series with segmentations that refer to them")
    layout.problems += [
        Problem("DAT-103", why, "a DICOM file", "Export it again.", str(path))
        for path, why in export.damaged
    ]
    if export.contours:
        layout.problems.append(
            Problem(
                "DAT-128",
                counted_names(export.contours, "RT structure set"),
                "DICOM segmentations",
                _conversion(export, source),
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
        line = _line(source, export.series[uid], paths)
        layout.lines.append(replace(line, person=export.people[uid]))
    _note_others(layout, export, set(drawn))
    return layout


def _read(paths: Sequence[Path], step: Callable[[str], None]) -> _Export:
    """Read the headers of all files; only paths and identifiers of series are kept."""
    pydicom: Any = library("pydicom", DICOM.name)
    export = _Export()
    for number, path in enumerate(paths, 1):
        step(f"DICOM header {number} of {len(paths)}")
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
            export.contours[path] = _contoured(header)
        elif header.get("Rows"):
            export.series[uid].append(path)
            title = f"{header.get('SeriesDescription', '')} {header.get('SeriesNumber', '')}"
            export.titles.setdefault(uid, title.strip() or "without a description")
            export.people.setdefault(uid, str(header.get("PatientID") or "").strip())
    return export


def _contoured(header: Any) -> str:
    """Return the series of an RT structure set, "" if its header names none or several."""
    named = {
        str(series.SeriesInstanceUID)
        for frame in header.get("ReferencedFrameOfReferenceSequence", [])
        for study in frame.get("RTReferencedStudySequence", [])
        for series in study.get("RTReferencedSeriesSequence", [])
    }
    return named.pop() if len(named) == 1 else ""


def _conversion(export: _Export, source: Path) -> str:
    """Return the command that converts the first RT structure set, and where its masks go."""
    path, uid = min(export.contours.items())
    files = export.series.get(uid, [])
    series = files[0].parent if files else path.parent
    command = [
        *("plastimatch", "convert", "--input", str(path), "--referenced-ct", str(series)),
        *("--output-prefix", str(path.with_suffix("")), "--prefix-format", "nrrd"),
    ]
    return (
        f"Convert each with plastimatch (https://plastimatch.org): {shlex.join(command)}. It "
        "writes a mask a structure; name them in a manifest.csv with the columns site, image (the "
        f"folder of the series) and mask_<structure>, in {source}."
    )


def _only_series_near(path: Path, export: _Export) -> list[str]:
    """Return the series in the folder of a segmentation that names none, if it is the only one."""
    near = {path.parent, *path.parent.iterdir()}
    return [uid for uid, files in export.series.items() if files[0].parent in near]


def _line(source: Path, files: Sequence[Path], segmentations: Sequence[Path]) -> Line:
    folder = files[0].parent
    parts = folder.relative_to(source).parts
    return Line(
        printable(parts[0]) if parts else "",
        folder,
        segmentations[0],
        patient=printable("_".join(parts[:2])) if len(parts) > 1 else "",
        name=printable(parts[1] if len(parts) > 1 else folder.name),
        files=tuple(files),
        segmentations=tuple(segmentations) if len(segmentations) > 1 else (),
    )


def _unknown(path: Path, named: Sequence[str]) -> Problem:
    found = f"it refers to series {named[0]}, which is not here" if named else "it names no series"
    if len(named) > 1:
        found = f"it refers to {len(named)} series, several or none of them here"
    return Problem(
        "DAT-164",
        found,
        "one series of this folder",
        "Export the series that it was drawn on as well; export both again if their identifiers "
        "were replaced separately.",
        str(path),
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
