"""Checks of a site's files: a verdict for each file, with its fix. Nothing of it leaves the site.

Files are read as training reads them. Checks across all files follow: voxel sizes that stand out,
duplicate images, and patient ids that may belong to one person.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedsgcg.clients.data.case_files import CaseFile, Site, open_site, splits, unvalidated
from fedsgcg.clients.data.slices import read_case, read_without_mask
from fedsgcg.clients.data.store import main_kind, other_kind_problem
from fedsgcg.clients.guard.policy import only_inside_data_root
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.clients.guard.site_secret import split_salt
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.contents import content_hash
from fedsgcg.common.images.read import PICTURE, Volume
from fedsgcg.common.names import number_of
from fedsgcg.common.settings.plan import DataSettings
from fedsgcg.deploy.site.findings import Finding, Verdict

SPACING_RATIO = 2.0
"""Largest ratio between a voxel's side and the site's median, in either direction."""
SMALLEST_MM, LARGEST_MM = 0.01, 100.0
"""A voxel side outside this range is a wrong unit, not a scanner's resolution."""

nib: Any = nibabel


@dataclass(frozen=True)
class Seen:
    """Properties of a readable case.

    Attributes:
        case: Its files.
        split: The split to which it would belong.
        axes: Axis codes of the file, e.g. RAS; "" for a picture.
        spacing: (sz, sy, sx) in mm; None for a picture or a header without a voxel size.
        kind: One of `common.images.read.KINDS`.
        content: Hash of the pixels in canonical orientation.
        voxels: Number of voxels.
        slices: Number of slices.
        empty: Whether the mask contains no declared structure.
        shape: Slices, rows, columns; of a picture channels, rows, columns.
        pixels: Pixels of each class, in the order of the classes; all 0 without a mask.
        colour: Whether it is a picture with colours.
    """

    case: CaseFile
    split: str
    axes: str
    spacing: tuple[float, float, float] | None
    kind: str
    content: str
    voxels: int
    slices: int
    empty: bool
    shape: tuple[int, ...] = ()
    pixels: tuple[int, ...] = ()
    colour: bool = False


Look = Callable[[CaseFile, Volume, NDArray[np.uint8]], None]
"""Called with a readable case, its image and its class indices (Z, Y, X)."""


def examine_files(
    policy: SiteFile,
    data: DataSettings,
    *,
    heldout: bool,
    progress: Callable[[int, int], None],
    target: bool = False,
) -> tuple[list[Finding], list[Seen]]:
    """Check every file of a site.

    Args:
        policy: The site's settings.
        data: Classes, structures and sizes of the federation.
        heldout: Whether the site is only evaluated.
        progress: Called with (cases done, all cases).
        target: Whether the site trains without its masks, which are then not read.

    Returns:
        The findings, one or more per case, and the properties of the readable cases.
    """
    try:
        listed = open_site(Path(policy.data_root), policy.site, data, masks=not target)
        site = only_inside_data_root(listed, policy)
    except FedsgcgError as error:
        return [Finding.of("files", problem) for problem in error.problems], []
    parts = _splits(site, policy, heldout, target)
    findings, seen = examine_cases(site, parts, data, masks=not target, progress=progress)
    unnamed = _without_patient_id(policy.patient_floor, seen)
    patients = [case.patient for case in site.cases]
    bare = unvalidated(site.name, parts, patients, policy.validation_fraction)
    if not target:  # a hospital without labels is not meant to validate
        findings += [Finding.of("site", problem, "note") for problem in bare]
    return [*findings, *unnamed, *_floor(seen, site, policy, heldout)], seen


def examine_cases(
    site: Site,
    parts: Sequence[str],
    data: DataSettings,
    *,
    masks: bool,
    progress: Callable[[int, int], None],
    look: Look | None = None,
) -> tuple[list[Finding], list[Seen]]:
    """Read the cases of a hospital as training does, and compare them with each other.

    Args:
        site: The hospital.
        parts: The split of each case.
        data: Classes, structures and sizes.
        masks: Whether masks may be read.
        progress: Called with (cases done, all cases).
        look: Called with each readable case; its pixels are not kept.

    Returns:
        The findings, one or more per case, and the properties of the readable cases.
    """
    findings = [Finding.of("files", problem) for problem in site.quarantined]
    findings += [Finding.of("files", note, "warn") for note in site.notes]
    seen: list[Seen] = []
    for number, (case, split) in enumerate(zip(site.cases, parts, strict=True)):
        try:
            seen.append(_read_case(case, split, data, masks=masks, look=look))
        except FedsgcgError as error:
            findings += [
                Finding.of("files", replace(problem, where=case.name)) for problem in error.problems
            ]
        progress(number + 1, len(site.cases))
    across = [
        *_other_kind(seen),
        *grey_and_colour({site.name: seen}),
        *_empty(seen),
        *_spacing(seen),
        *_duplicates(seen),
        *_same_person(seen),
    ]
    reported = {finding.name for finding in across}
    fine = [
        Finding("files", one.case.name, "ok", _summary(one))
        for one in seen
        if one.case.name not in reported
    ]
    return [*findings, *across, *fine], seen


def _splits(site: Site, policy: SiteFile, heldout: bool, target: bool) -> tuple[str, ...]:
    """Return the split of every case as in training: by the site's own fraction and secret."""
    salt = split_salt(policy)
    fraction = policy.validation_fraction
    return splits(site.cases, fraction, heldout=heldout, salt=salt, target=target)


def _read_case(
    case: CaseFile, split: str, data: DataSettings, *, masks: bool, look: Look | None
) -> Seen:
    """Read one case as training does; raises an error with what is wrong with it."""
    if not masks and split != "test":
        image, truth = read_without_mask(case)
        empty = False
    else:
        image, truth = read_case(case, data)
        wanted = sorted({index for group in data.structure_classes().values() for index in group})
        empty = not np.isin(truth, wanted).any()
    if look is not None:
        look(case, image, truth)
    counts = np.bincount(truth.ravel(), minlength=data.num_classes)[: data.num_classes]
    return Seen(
        case=case,
        split=split,
        axes=_axes(image),
        spacing=image.millimetres,
        kind=image.kind,
        content=content_hash(image),
        voxels=int(image.array.size),
        slices=1 if image.is_picture else len(image.array),
        empty=empty,
        shape=tuple(image.array.shape),
        pixels=tuple(int(count) for count in counts),
        colour=image.is_picture and len(image.array) > 1,
    )


def _axes(image: Volume) -> str:
    """Return the file's axis codes, "" for a picture; any order is valid, training reorients it."""
    return "" if image.is_picture else "".join(nib.aff2axcodes(image.affine))


def _summary(one: Seen) -> str:
    if one.spacing is None:
        return f"{one.split}, {one.kind}"
    return f"{one.split}, {one.kind}, {_sides(one.spacing)} mm {one.axes}"


def _sides(spacing: Sequence[float]) -> str:
    return "x".join(f"{side:.3g}" for side in spacing)


def _other_kind(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield the cases that are left out because most cases are of another kind."""
    kind = main_kind([one.kind for one in seen])
    for one in seen:
        if one.kind != kind:
            yield Finding.of("files", other_kind_problem(one.case.name, one.kind, kind))


def grey_and_colour(seen: Mapping[str, Sequence[Seen]]) -> Iterator[Finding]:
    """Yield one warning if some pictures have colours and others are grey.

    Args:
        seen: Hospital -> its readable cases.
    """
    counts = {
        site: Counter("colour" if one.colour else "grey" for one in cases if one.kind == PICTURE)
        for site, cases in seen.items()
    }
    if len({name for found in counts.values() for name in found}) < 2:
        return
    texts = [
        f"{site} " + " and ".join(f"{number} {name}" for name, number in sorted(found.items()))
        for site, found in counts.items()
        if found
    ]
    action = (
        "Use pictures of one sort. Otherwise the grey values count as red, green and blue, and a "
        "network can tell the hospitals apart by their colour."
    )
    yield Finding("files", "colours", "warn", ", ".join(texts), action, "DAT-192")


def _empty(seen: Sequence[Seen]) -> Iterator[Finding]:
    action = (
        "The case is used as one without the structure (a true negative); "
        "if its mask was never drawn, leave the case out."
    )
    for one in seen:
        if one.empty:
            yield Finding(
                "files",
                one.case.name,
                "warn",
                "no declared structure in the mask",
                action,
                "DAT-110",
            )


def _spacing(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield cases whose voxel size is missing, implausible or far from the site's median."""
    sized = []
    for one in seen:
        if one.spacing is None:
            if one.kind != PICTURE:
                found = "the header gives no voxel size"
                action = "Correct the voxel size in the header; until then distances are in voxels."
                yield Finding("files", one.case.name, "warn", found, action, "SITE-510")
        elif not all(SMALLEST_MM <= side <= LARGEST_MM for side in one.spacing):
            found = f"a voxel of {_sides(one.spacing)} mm"
            action = "Check the unit of length (xyzt_units) and the voxel size in the header."
            yield Finding("files", one.case.name, "warn", found, action, "SITE-510")
        else:
            sized.append((one, one.spacing))
    if not sized:
        return
    usual = [statistics.median(spacing[axis] for _, spacing in sized) for axis in range(3)]
    for one, spacing in sized:
        for axis, side in enumerate(spacing):
            ratio = side / usual[axis]
            if not 1 / SPACING_RATIO <= ratio <= SPACING_RATIO:
                found = f"{side:.3g} mm along {'ZYX'[axis]}, the others about {usual[axis]:.3g} mm"
                action = (
                    "Check the header. Correct the voxel size, "
                    "or leave the case out if it has another protocol."
                )
                yield Finding("files", one.case.name, "warn", found, action, "SITE-510")
                break


def _duplicates(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield images with identical pixels; in different splits or patients they are a data leak."""
    by_content: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        by_content[one.content].append(one)
    action = "Remove one of the two; the second is left out of training and evaluation."
    for first, *others in by_content.values():
        group = [first, *others]
        leaks = (
            len({one.split for one in group}) > 1 or len({one.case.patient for one in group}) > 1
        )
        verdict: Verdict = "fail" if leaks else "warn"
        for one in others:
            found = f"the same pixels as {first.case.name}"
            if leaks:
                found += f", in another {'split' if one.split != first.split else 'patient'}"
            yield Finding("files", one.case.name, verdict, found, action, "SITE-511")


def _same_person(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield patients whose ids differ only in spelling, e.g. `P-01` and `p1`.

    They may be one person in two splits.
    """
    by_person: dict[str, dict[str, Seen]] = defaultdict(dict)
    for one in seen:
        by_person[plain_id(one.case.patient)].setdefault(one.case.patient, one)
    for spellings in by_person.values():
        first, *others = spellings.values()
        for one in others:
            apart = " and is in another split" if one.split != first.split else ""
            found = f"patient {one.case.patient!r} looks like {first.case.patient!r}{apart}"
            action = "Write a patient's id the same way everywhere in manifest.csv."
            yield Finding("files", one.case.name, "warn", found, action, "SITE-512")


def _without_patient_id(patient_floor: int, seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield one finding if cases have no patient id, so that each counts as a patient."""
    missing = [one for one in seen if not one.case.has_patient]
    if not missing:
        return
    found = (
        f"{len(missing)} of {number_of(len(seen), 'case')} without patient_id: each is one patient"
    )
    action = (
        "If a person has several cases, write patient_id in manifest.csv. Otherwise that person "
        "may be in training and validation, and counts several times towards patient_floor "
        f"({patient_floor})."
    )
    yield Finding("site", "patient_id", "warn", found, action, "SITE-519")


def plain_id(patient: str) -> str:
    """Return a patient's id without case, punctuation and leading zeros."""
    parts = re.findall(r"[a-z]+|\d+", patient.casefold())
    return " ".join((part.lstrip("0") or "0") if part.isdigit() else part for part in parts)


def _floor(seen: Sequence[Seen], site: Site, policy: SiteFile, heldout: bool) -> Iterator[Finding]:
    """Yield the numbers of cases and patients, and whether they reach the site's own floor."""
    counts = {
        split: len({one.case.patient for one in seen if one.split == split})
        for split in dict.fromkeys(one.split for one in seen)
    }
    patients = ", ".join(f"{count} {split}" for split, count in sorted(counts.items()))
    listed = len(site.cases) + len(site.quarantined)
    training = counts.get("train", 0)
    slices = sum(one.slices for one in seen if one.split == "train")
    if not seen:
        found = f"0 of {listed} usable"
        yield Finding("site", "cases", "fail", found, "Correct at least one case.", "DAT-102")
    elif not heldout and training < policy.patient_floor:
        found = f"{number_of(training, 'training patient')}, the floor is {policy.patient_floor}"
        action = "Add patients: below the floor nothing of this site's training leaves."
        yield Finding("site", "patients", "warn", found, action, "SITE-513")
    elif not heldout and slices < policy.round_slices:
        found = f"{number_of(slices, 'training slice')}, a round needs {policy.round_slices}"
        action = "Add cases, or lower round_slices: below it this site cannot train."
        yield Finding("site", "slices", "warn", found, action, "SITE-513")
    else:
        found = f"{len(seen)} of {listed} usable; patients: {patients}"
        yield Finding("site", "cases", "ok", found)
