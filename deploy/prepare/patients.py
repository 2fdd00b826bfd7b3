"""Finds the images of one patient by their DICOM headers, so that no patient is in two splits.

A patient with two studies may have two folders, and a folder may have several patients. The
header's PatientID decides, but it is only compared: what is written to `manifest.csv` is the name
of a folder, so that the identifier gets into no file that is passed on without the images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.images.dicom_file import opened
from fedsgcg.common.images.extras import library
from fedsgcg.common.images.folders import stem_of
from fedsgcg.common.images.formats import DICOM, suffix_of
from fedsgcg.common.names import number_of, printable
from fedsgcg.deploy.prepare.layouts import Line

FEWEST: Final = 3
"""Folders from which on an identifier that most of a hospital have is none: `ANONYMOUS`."""


def with_person(lines: Sequence[Line], step: Callable[[str], None], *, stated: bool) -> list[Line]:
    """Return the lines, those of DICOM with what their headers say about the patient.

    Args:
        lines: The cases.
        step: Called with what is done.
        stated: Whether a table states the patients, which then decides where it does.
    """
    found = []
    for number, line in enumerate(lines, 1):
        path = _dicom_file(line)
        if path is None or line.person or (stated and line.patient):
            found.append(line)
        else:
            step(f"header of case {number} of {len(lines)}")
            found.append(replace(line, person=_patient_id(path)))
    return found


def one_patient(lines: Sequence[Line], source: Path) -> tuple[list[Line], list[str]]:
    """Give all cases of a person at a hospital one patient, and those of others another one.

    Args:
        lines: The cases with their hospitals. Those without a `person` stay as they are.
        source: The folder of the cases.

    Returns:
        The cases, and notes for the user.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for index, line in enumerate(lines):
        if line.person:
            groups[line.site, line.person].append(index)
            owners[line.site, line.patient].add(line.person)
    placeholders = _placeholders(lines)
    done = list(lines)
    joined: Counter[str] = Counter()
    for (site, person), indices in groups.items():
        if (site, person) in placeholders:
            continue
        names = {lines[index].patient for index in indices}
        own = sorted(name for name in names if name and owners[site, name] == {person})
        patient = own[0] if own else _further([lines[index] for index in indices], source)
        joined[site] += len(names) > 1
        for index in indices:
            done[index] = replace(lines[index], patient=patient)
    notes = [
        f"{site}: most folders have the same PatientID, as after de-identification, so each folder "
        "counts as a patient"
        for site in sorted({site for site, _ in placeholders})
    ]
    notes += [
        f"{site}: {number_of(count, 'patient')} with images in several folders, by PatientID"
        for site, count in sorted(joined.items())
        if count
    ]
    return done, notes


def _placeholders(lines: Sequence[Line]) -> set[tuple[str, str]]:
    """Return (hospital, identifier) that most of a hospital's folders have."""
    folders: dict[str, set[str]] = defaultdict(set)
    having: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line in lines:
        if line.person:
            name = line.patient or str(line.image)
            folders[line.site].add(name)
            having[line.site, line.person].add(name)
    return {
        key
        for key, names in having.items()
        if len(names) >= FEWEST and 2 * len(names) > len(folders[key[0]])
    }


def _further(lines: Sequence[Line], source: Path) -> str:
    """Return a patient for cases whose folders say none, or that of others: marked by a path."""
    first, path = min(
        ((line, _dicom_file(line) or line.image) for line in lines), key=itemgetter(1)
    )
    place = path.relative_to(source) if path.is_relative_to(source) else path
    mark = blake2b(str(place).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return f"{first.patient or first.name or printable(stem_of(first.image))}_{mark}"


def _dicom_file(line: Line) -> Path | None:
    """Return a file of DICOM of a case's image, None if it has another format."""
    if line.files:
        return line.files[0]
    return line.image if suffix_of(line.image) in DICOM.suffixes else None


def _patient_id(path: Path) -> str:
    """Return the PatientID of a file, "" if it has none or cannot be read."""
    pydicom: Any = library("pydicom", DICOM.name)
    try:
        with opened(path) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID") or "").strip()
    except Exception:  # a damaged file is reported when its case is read
        return ""
