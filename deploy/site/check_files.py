"""The doctor for a hospital's files: one verdict a file, each with its repair. Nothing of it leaves the hospital.

Files are read as training would read them; on top come the questions that only the whole collection answers: does a
spacing stand out, is the same image there twice, is one person behind two ids.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np

from clients.data.case_files import CaseFile, Site, open_site, splits
from clients.data.slices import class_indices
from clients.data.store import main_kind, other_kind_problem
from clients.guard.policy import only_inside_data_root
from clients.guard.site_file import SiteFile
from common.errors import CODES, FedsgcgError, Problem
from common.images.contents import content_hash
from common.images.read import PICTURE, Volume, check_geometry, check_image, read_volume
from common.settings.plan import DataSettings

Verdict = Literal["ok", "warn", "fail"]
SPACING_RATIO = 2.0
"""How many times the site's median a voxel's side may be before it stands out."""
SMALLEST_MM, LARGEST_MM = 0.01, 100.0
"""Sides of a voxel outside these come from a wrong unit, not from a scanner."""

nib: Any = nibabel


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: `files`, `site`, `device`, `disk`, `clock` or `link`.
        name: Case, folder or question.
        verdict: `ok`, `warn` (it works, but look at it) or `fail` (it does not work).
        found: What was there.
        action: How to mend it.
        code: Error code, "" when all is well.
    """

    area: str
    name: str
    verdict: Verdict
    found: str = ""
    action: str = ""
    code: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding with the sentence of its code."""
        return asdict(self) | {"meaning": CODES.get(self.code, "")}

    @classmethod
    def of(cls, area: str, problem: Problem, verdict: Verdict = "fail") -> Finding:
        """Turn a problem into a finding."""
        found = problem.found + (f"; expected {problem.expected}" if problem.expected else "")
        return cls(area, problem.where, verdict, found, problem.action, problem.code)


@dataclass(frozen=True)
class Seen:
    """What is remembered of a readable case.

    Attributes:
        case: Its files.
        split: Where it would go.
        axes: Axis codes of the file, e.g. RAS; "" for a picture.
        spacing: (sz, sy, sx) in mm; None for a picture and where the header gives no size.
        kind: One of `common.images.read.KINDS`.
        content: Hash of the pixels in canonical orientation.
        voxels: Number of voxels.
        empty: Whether the mask holds no declared structure.
    """

    case: CaseFile
    split: str
    axes: str
    spacing: tuple[float, float, float] | None
    kind: str
    content: str
    voxels: int
    empty: bool


def examine_files(
    policy: SiteFile, data: DataSettings, *, heldout: bool, progress: Callable[[int, int], None]
) -> tuple[list[Finding], list[Seen]]:
    """Look at every file of a site.

    Args:
        policy: The site's settings.
        data: Classes, structures and sizes of the federation.
        heldout: Whether the site is only evaluated.
        progress: Called with (cases done, all cases).

    Returns:
        The findings, one or more a case, and what was seen of the readable cases.
    """
    try:
        site = only_inside_data_root(open_site(Path(policy.data_root), policy.site, data), policy)
    except FedsgcgError as error:
        return [Finding.of("files", problem) for problem in error.problems], []
    findings = [Finding.of("files", problem) for problem in site.quarantined]
    findings += [Finding.of("files", note, "warn") for note in site.notes]
    seen: list[Seen] = []
    parts = splits(site.cases, data.validation_fraction, heldout=heldout)
    for number, (case, split) in enumerate(zip(site.cases, parts, strict=True)):
        try:
            seen.append(_look(case, split, data))
        except FedsgcgError as error:
            findings += [
                Finding.of("files", replace(problem, where=case.name)) for problem in error.problems
            ]
        progress(number + 1, len(site.cases))
    whole = [*_other_kind(seen), *_empty(seen), *_spacing(seen), *_twice(seen), *_same_person(seen)]
    known = {finding.name for finding in whole}
    fine = [
        Finding("files", one.case.name, "ok", _words(one))
        for one in seen
        if one.case.name not in known
    ]
    return [*findings, *whole, *fine, *_floor(seen, site, policy, heldout)], seen


def _look(case: CaseFile, split: str, data: DataSettings) -> Seen:
    """Read one case as training would; raises what is wrong with it."""
    if case.mask is None:
        problem = Problem(
            "DAT-112",
            "an image alone",
            "an image and its mask",
            "Draw a mask, or leave the case out.",
        )
        raise FedsgcgError(problem)
    image, mask = read_volume(case.image), read_volume(case.mask, mask=True)
    check_image(image, case.name)
    check_geometry(image, mask, case.name)
    truth = class_indices(mask.array, data.classes, case.name, data.label_tolerance)
    wanted = sorted({index for group in data.structure_classes().values() for index in group})
    return Seen(
        case,
        split,
        _axes(image),
        image.millimetres,
        image.kind,
        content_hash(image),
        int(image.array.size),
        not np.isin(truth, wanted).any(),
    )


def _axes(image: Volume) -> str:
    """Axis codes of the file, "" for a picture; an unusual order is fine, training turns it."""
    return "" if image.is_picture else "".join(nib.aff2axcodes(image.affine))


def _words(one: Seen) -> str:
    if one.spacing is None:
        return f"{one.split}, {one.kind}"
    return (
        f"{one.split}, {one.kind}, {'x'.join(f'{side:.3g}' for side in one.spacing)} mm {one.axes}"
    )


def _other_kind(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield the cases that are left out because most are of another kind."""
    kind = main_kind([one.kind for one in seen])
    for one in seen:
        if one.kind != kind:
            yield Finding.of("files", other_kind_problem(one.case.name, one.kind, kind))


def _empty(seen: Sequence[Seen]) -> Iterator[Finding]:
    action = "Used as a case without the structure (a true negative); if the mask was never drawn, leave the case out."
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
    """Yield cases whose voxel is much larger or smaller than the site's usual one along some axis."""
    for one in seen:
        if one.spacing is None and one.kind != PICTURE:
            action = (
                "Correct the voxel size in the header; distances are in voxels alone until then."
            )
            yield Finding(
                "files", one.case.name, "warn", "the header gives no voxel size", action, "SITE-510"
            )
        elif one.spacing and not all(SMALLEST_MM <= side <= LARGEST_MM for side in one.spacing):
            found = f"a voxel of {'x'.join(f'{side:.3g}' for side in one.spacing)} mm"
            action = "Check the unit of length (xyzt_units) and the voxel size in the header."
            yield Finding("files", one.case.name, "warn", found, action, "SITE-510")
    sized = [
        one
        for one in seen
        if one.spacing and all(SMALLEST_MM <= side <= LARGEST_MM for side in one.spacing)
    ]
    usual = (
        [statistics.median(one.spacing[axis] for one in sized if one.spacing) for axis in range(3)]
        if sized
        else []
    )
    for one in sized:
        for axis, side in enumerate(one.spacing or ()):
            ratio = side / usual[axis]
            if not 1 / SPACING_RATIO <= ratio <= SPACING_RATIO:
                found = f"{side:.3g} mm along {'ZYX'[axis]}, the others about {usual[axis]:.3g} mm"
                action = "Check the header; correct the spacing, or leave the case out if it is another protocol."
                yield Finding("files", one.case.name, "warn", found, action, "SITE-510")
                break


def _twice(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield images whose pixels are there more than once: a leak where they lie in different splits or patients."""
    by_content: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        by_content[one.content].append(one)
    for group in (group for group in by_content.values() if len(group) > 1):
        leaks = (
            len({one.split for one in group}) > 1 or len({one.case.patient for one in group}) > 1
        )
        for one in group[1:]:
            word = "split" if one.split != group[0].split else "patient"
            leak = f", in another {word}" if leaks else ""
            found = f"the same pixels as {group[0].case.name}{leak}"
            action = "Remove one of the two; the second is left out of training and evaluation."
            yield Finding(
                "files", one.case.name, "fail" if leaks else "warn", found, action, "SITE-511"
            )


def _same_person(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield patients whose ids differ only in writing, e.g. `P-01` and `p1`: they may be one person in two splits."""
    by_person: dict[str, dict[str, Seen]] = defaultdict(dict)
    for one in seen:
        by_person[plain_id(one.case.patient)].setdefault(one.case.patient, one)
    for written in (written for written in by_person.values() if len(written) > 1):
        first, *others = written.values()
        for one in others:
            apart = " and in another split" if one.split != first.split else ""
            found = f"patient {one.case.patient!r} looks like {first.case.patient!r}{apart}"
            action = "Write a patient's id the same way everywhere in manifest.csv."
            yield Finding("files", one.case.name, "warn", found, action, "SITE-512")


def plain_id(patient: str) -> str:
    """Return a patient's id without case, punctuation and leading zeros."""
    words = re.findall(r"[a-z]+|\d+", patient.casefold())
    return " ".join(word.lstrip("0") or "0" if word.isdigit() else word for word in words)


def _floor(seen: Sequence[Seen], site: Site, policy: SiteFile, heldout: bool) -> Iterator[Finding]:
    """Say how many patients there are and whether that is enough for the site's own floor."""
    counts = {
        split: len({one.case.patient for one in seen if one.split == split})
        for split in dict.fromkeys(one.split for one in seen)
    }
    told = ", ".join(f"{count} {split}" for split, count in sorted(counts.items())) or "none"
    listed = len(site.cases) + len(site.quarantined)
    training = counts.get("train", 0)
    if not seen:
        yield Finding(
            "site", "cases", "fail", f"0 of {listed} usable", "Mend at least one case.", "DAT-102"
        )
    elif not heldout and training < policy.patient_floor:
        found = f"{training} training patients, the floor is {policy.patient_floor}"
        action = "Add patients: below the floor this site's class statistics are withheld."
        yield Finding("site", "patients", "warn", found, action, "SITE-513")
    else:
        yield Finding("site", "cases", "ok", f"{len(seen)} of {listed} usable; patients: {told}")
