"""The files of one hospital: which cases there are, whose they are, and in which split. No pixel is read here.

A data root holds either `manifest.csv` (`clients.data.manifest`: `site,image,mask[,patient_id,split]`, other columns
ignored, paths relative to the root) or one folder a site with `<case>_image.<suffix>` and `<case>_mask.<suffix>` inside
(`common.images.folders`: links are followed; what is not used is counted in `Site.notes`).

Splits go by patient. Where the manifest names none, a patient's split follows from a hash of the patient's id alone, so
that adding or removing cases never moves another patient.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from clients.data.cache import cache_error, cache_folder, locked
from clients.data.manifest import SPLITS, Row, is_folder_name, read_manifest
from common.datasets import fetch_advice
from common.errors import FedsgcgError, Problem, fail
from common.files.system import expand
from common.images.folders import (
    Listing,
    by_format,
    counted_names,
    is_file,
    look_through,
    stem_of,
    subfolders,
    without_suffix,
)
from common.names import alike, printable, spelled
from common.settings.federation import SiteSettings
from common.settings.plan import DataSettings

__all__ = [
    "SPLITS",
    "CaseFile",
    "Site",
    "discover_sites",
    "ensure_data",
    "open_site",
    "resolve_cache",
    "split_of",
    "splits",
    "survey",
]


@dataclass(frozen=True)
class CaseFile:
    """One case on disk.

    Attributes:
        site: Name of the hospital.
        name: Name of the case, unique within the hospital.
        image: Image file.
        mask: Mask file, None when the case has none.
        patient: The patient's id; the case name where the manifest has none.
        split: `train`, `validation` or `test` when the manifest says so, else None.
    """

    site: str
    name: str
    image: Path
    mask: Path | None
    patient: str
    split: str | None


@dataclass(frozen=True)
class Site:
    """One hospital: its cases sorted by name, and what had to be left out.

    Attributes:
        name: Name of the hospital.
        cases: Cases whose files exist.
        quarantined: One problem for each case that was left out.
        notes: Files of its folder that are no case of any kind: other formats, masks without an image, hidden files.
    """

    name: str
    cases: tuple[CaseFile, ...]
    quarantined: tuple[Problem, ...]
    notes: tuple[Problem, ...] = ()


@dataclass
class _Listed:
    """What a data root lists.

    Attributes:
        cases: All cases of the hospitals that were asked for.
        problems: (hospital, problem) of lines that were left out.
        notes: (folder, problem) of files that are not used.
        closed: Hospital -> why its folder cannot be listed.
    """

    cases: list[CaseFile] = field(default_factory=list)
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    notes: list[tuple[str, Problem]] = field(default_factory=list)
    closed: dict[str, Problem] = field(default_factory=dict)


def resolve_cache(site: SiteSettings) -> Path:
    """Return the cache folder of a site: its setting, or $FEDSGCG_CACHE, or ~/.cache/fedsgcg."""
    return cache_folder(site.cache)


def ensure_data(data: DataSettings, cache: str) -> Path:
    """Return the data root; makes the synthetic hospitals below the cache folder on first use.

    Args:
        data: `root` names the folder; "" with `name=synthetic` asks for the synthetic hospitals.
        cache: Cache folder, "" for the default.

    Raises:
        FedsgcgError: DAT-101 when the folder does not exist or none is named; DAT-113 when it cannot be made.
    """
    if data.root:
        root = expand(data.root, "data.root")
        if not _is_folder(root):
            action = f"Set data.root to the prepared folder. {fetch_advice(data.name)}"
            raise fail(
                "DAT-101",
                found="no such folder",
                expected="a folder",
                action=action,
                where=str(root),
            )
        return root
    if data.name != "synthetic":
        found, action = (
            "data.root is empty",
            f"Set data.root=<prepared folder>. {fetch_advice(data.name)}",
        )
        raise fail("DAT-101", found=found, expected="a folder", action=action, where=data.name)
    return _synthetic(cache_folder(cache))


def discover_sites(root: Path, wanted: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of the hospitals below a data root, sorted.

    Args:
        root: Data root.
        wanted: The hospitals that are needed, none for all: a folder that cannot be read stops only who needs it.

    Raises:
        FedsgcgError: DAT-101 when the root, its manifest or a hospital's folder cannot be used.
    """
    listed = _listed(Path(root))
    if closed := [
        problem for name, problem in sorted(listed.closed.items()) if not wanted or name in wanted
    ]:
        raise FedsgcgError(*closed)
    return tuple(sorted({case.site for case in listed.cases}))


def open_site(root: Path, name: str, data: DataSettings) -> Site:
    """List the cases of one hospital.

    Args:
        root: Data root.
        name: The hospital.
        data: Not needed to list files; part of the signature so that a site is always opened for given settings.

    Raises:
        FedsgcgError: DAT-101 when the manifest or the hospital's folder cannot be used; DAT-102 when the hospital has
            no case at all.
    """
    listed = _listed(Path(root), only=name)
    if name in listed.closed:
        raise FedsgcgError(listed.closed[name])
    mine = [case for case in listed.cases if case.site == name]
    notes = tuple(problem for folder, problem in listed.notes if folder == name)
    if not mine:
        known = (
            ", ".join(sorted({case.site for case in _listed(Path(root)).cases})) or "no site at all"
        )
        action = f"Check the site column or folder names for data set {data.name!r}."
        nothing = Problem("DAT-102", "no case is listed", f"one of: {known}", action, where=name)
        raise FedsgcgError(nothing, *notes)
    kept, missing = _existing(_named(mine))
    kept, mixed = _one_split_each(kept)
    left_out = [problem for site, problem in listed.problems if site == name]
    cases = tuple(sorted(kept, key=lambda case: case.name))
    return Site(name, cases, (*left_out, *missing, *mixed), notes)


def survey(root: Path, sites: Sequence[str]) -> list[Problem]:
    """Return what a study of some hospitals should say about its folder before it starts; nothing of it stops it.

    That is DAT-119 for files that are not used, in a hospital's folder or in one that is no hospital, and DAT-118 for
    names that look like one.
    """
    listed = _listed(Path(root))
    hospitals = {case.site for case in listed.cases}
    notes = [
        problem for folder, problem in listed.notes if folder in sites or folder not in hospitals
    ]
    return [*alike_hospitals(sites), *notes]


def alike_hospitals(names: Sequence[str]) -> list[Problem]:
    """Return DAT-118 for hospitals whose names differ only in Unicode form or case."""
    action = "Give them clearly different names, or put their cases under one name if they are one hospital."
    return [
        Problem(
            "DAT-118",
            " and ".join(map(spelled, group)),
            "names that people can tell apart",
            action,
            group[0],
        )
        for group in alike(names)
    ]


def split_of(patient: str, validation_fraction: float) -> str:
    """Return `train` or `validation` for a patient, from the hash of its id alone."""
    return "validation" if _uniform(patient) < validation_fraction else "train"


def splits(
    cases: Sequence[CaseFile], validation_fraction: float, *, heldout: bool
) -> tuple[str, ...]:
    """Return the split of every case of one hospital.

    A manifest's split always counts. Otherwise a held-out or observing hospital's cases are all `test`; a training
    hospital's go to `train` or `validation` by the hash of the patient. Should the hash leave a hospital without any
    training patient (likely with one or two patients), the patient with the largest hash trains.
    """
    if heldout:
        return tuple(case.split or "test" for case in cases)
    chosen = [case.split or split_of(case.patient, validation_fraction) for case in cases]
    free = [case.patient for case in cases if case.split is None]
    if "train" not in chosen and free:
        last = max(free, key=lambda patient: (_uniform(patient), patient))
        chosen = [
            "train" if case.split is None and case.patient == last else split
            for case, split in zip(cases, chosen, strict=True)
        ]
    return tuple(chosen)


def _synthetic(cache: Path) -> Path:
    """Write the synthetic hospitals once; a half-written folder is never seen under the final name."""
    from common.images.phantoms import VERSION, write_hospitals

    root = cache / f"synthetic-{VERSION}"
    if (root / "manifest.csv").is_file():
        return root
    with locked(cache / "synthetic.lock"):
        if not (root / "manifest.csv").is_file():
            try:
                folder = Path(tempfile.mkdtemp(prefix="synthetic-", dir=cache))
                shutil.rmtree(root, ignore_errors=True)
                write_hospitals(folder).rename(root)
            except OSError as error:
                raise cache_error(error, cache) from error
    return root


def _uniform(patient: str) -> float:
    """Return a number in [0, 1) that depends on the patient's id alone.

    `person` names this use of the hash. Of a few names, this one gives the hospitals of PROMISE12 and of the demo
    shares near the wanted 20 %; for a dozen patients a hash may well give none or half.
    """
    digest = hashlib.blake2b(patient.encode(), digest_size=8, person=b"patient").digest()
    return int.from_bytes(digest, "big") / 2**64


def _listed(root: Path, only: str = "") -> _Listed:
    """List a data root, of the folder layout only one hospital when it is named."""
    if not _is_folder(root):
        raise fail(
            "DAT-101",
            found="no such folder",
            expected="a data root",
            action="Set data.root.",
            where=str(root),
        )
    manifest = root / "manifest.csv"
    try:
        return _from_manifest(root, manifest) if manifest.is_file() else _from_folders(root, only)
    except OSError as error:
        raise _closed(root, error.strerror or type(error).__name__) from error


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _closed(path, error.strerror or type(error).__name__) from error


def _closed(folder: Path, why: str) -> FedsgcgError:
    """Return the error for a folder that cannot be read."""
    expected = "a folder that this user may read"
    action = "Give this user the right to read it (and to enter every folder above it), or take it out of the data."
    return fail("DAT-101", found=why, expected=expected, action=action, where=str(folder))


def _from_manifest(root: Path, manifest: Path) -> _Listed:
    """Read `manifest.csv`; all unusable lines are reported in one error, a repeated image is left out."""
    rows = read_manifest(manifest)
    wrong = [
        Problem("DAT-101", found, expected, where=f"{manifest}, line {row.line}")
        for row in rows
        for found, expected in _mistakes(row)
    ]
    if wrong:
        raise FedsgcgError(*wrong)
    listed = _Listed()
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        first = seen.setdefault((row.site, os.path.normpath(row.image)), row.line)
        if first != row.line:
            found, action = f"the image of line {first} again", "Take the line out."
            problem = Problem(
                "SITE-511", found, "each image once", action, f"{manifest}, line {row.line}"
            )
            listed.problems.append((row.site, problem))
            continue
        image = root / row.image
        mask = root / row.mask if row.mask else None
        listed.cases.append(
            CaseFile(row.site, stem_of(image), image, mask, row.patient, row.split or None)
        )
    return listed


def _mistakes(row: Row) -> Iterator[tuple[str, str]]:
    """Yield (found, expected) of what makes one line of the manifest unusable."""
    yield from row.mistakes()
    for column, path in (("image", row.image), ("mask", row.mask)):
        if _escapes(path):
            yield f"{column} {path!r}", "a path inside the data folder"


def _escapes(path: str) -> bool:
    """Whether a path of the manifest leads out of the root; links that the hospital placed inside are followed."""
    normal = os.path.normpath(path.replace("\\", "/"))
    return bool(path) and (
        "\0" in path
        or normal.startswith(("..", "/"))
        or PurePosixPath(normal).parts[0].endswith(":")
    )


def _from_folders(root: Path, only: str) -> _Listed:
    """List `<site>/<case>_image.*` with the `<case>_mask.*` beside it."""
    listed = _Listed()
    for folder in subfolders(root):
        name = printable(folder.name)
        if is_folder_name(name) and (not only or name == only):
            _take_folder(name, folder, listed)
    if only:
        return listed
    loose = look_through(root, deep=False)
    if words := _unused([], loose.images, loose):
        listed.notes.append(("", _note(root, words, loose)))
    if not listed.cases and not listed.closed:
        found = "; ".join(
            ["neither manifest nor images", *(problem.found for _, problem in listed.notes)]
        )
        expected = "manifest.csv, or <site>/<case>_image.nii.gz with <case>_mask.nii.gz"
        action = "Convert a downloaded data set or your own images: fedsgcg data prepare NAME SOURCE -o FOLDER."
        action = " ".join([action, *dict.fromkeys(problem.action for _, problem in listed.notes)])
        raise fail("DAT-101", found=found, expected=expected, action=action, where=str(root))
    return listed


def _take_folder(name: str, folder: Path, listed: _Listed) -> None:
    """List the cases of one hospital's folder, and what of it is not used."""
    found = look_through(folder)
    if found.closed and found.closed[0][0] == folder:
        (listed.closed[name],) = _closed(*found.closed[0]).problems
        return
    files = [path for path in found.images if path.parent == folder]
    masks = {without_suffix(path.name): path for path in files}
    used: set[Path] = set()
    for image in files:
        if without_suffix(image.name).endswith("_image"):
            case = stem_of(image)
            mask = masks.get(f"{case.removesuffix('_image')}_mask")
            used |= {image} if mask is None else {image, mask}
            listed.cases.append(CaseFile(name, printable(case), image, mask, "", None))
    if words := _unused(sorted(used), found.images, found):
        listed.notes.append((name, _note(folder, words, found)))


def _unused(used: Sequence[Path], images: Sequence[Path], found: Listing) -> list[str]:
    """Say kind by kind which files that look like images are not used."""
    left = [path for path in images if path not in set(used)]
    masks = [path for path in left if without_suffix(path.name).endswith("_mask")]
    others = [path for path in left if path not in set(masks)]
    words = []
    if found.foreign:
        words.append(
            counted_names(
                found.foreign, f"files of formats that are not read ({by_format(found.foreign)})"
            )
        )
    if masks:
        words.append(counted_names(masks, "masks without an image"))
    if others:
        words.append(counted_names(others, "images that are not called <site>/<case>_image"))
    if found.ghosts:
        words.append(counted_names(found.ghosts, "hidden files called like images"))
    words += [f"{printable(path.name)} cannot be read ({why})" for path, why in found.closed]
    words += [f"{printable(path.name)} leads back into itself" for path in found.loops]
    return words


def _note(folder: Path, words: Sequence[str], found: Listing) -> Problem:
    action = " ".join([*found.conversions(), "What is no image of the study may stay."])
    return Problem(
        "DAT-119", "; ".join(words), "<site>/<case>_image.* with <case>_mask.*", action, str(folder)
    )


def _named(cases: Sequence[CaseFile]) -> list[CaseFile]:
    """Give every case a name of its own and a patient; cases that share a file name take their folders' names too."""
    common = Counter(case.name for case in cases)
    named = []
    for case in cases:
        name = case.name
        if common[name] > 1:
            name = printable("_".join([*case.image.parts[-3:-1], without_suffix(case.image.name)]))
        named.append(replace(case, name=name, patient=case.patient or name))
    twice = {name for name, count in Counter(case.name for case in named).items() if count > 1}
    return [
        replace(case, name=printable(case.image.as_posix())) if case.name in twice else case
        for case in named
    ]


def _existing(cases: Sequence[CaseFile]) -> tuple[list[CaseFile], list[Problem]]:
    """Leave out cases whose image or mask file is not there."""
    kept, problems = [], []
    for case in cases:
        gone = next(
            (path for path in (case.image, case.mask) if path is not None and not is_file(path)),
            None,
        )
        if gone is None:
            kept.append(case)
        else:
            action = "Restore the file or take the case out of the manifest."
            problems.append(
                Problem("DAT-103", f"{_why_gone(gone)}: {gone}", "a file", action, where=case.name)
            )
    return kept, problems


def _why_gone(path: Path) -> str:
    """Say why a file cannot be used: there is none, its folder may not be entered, its name is too long."""
    try:
        path.stat()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", "") or str(error)
    return "not a file"


def _one_split_each(cases: Sequence[CaseFile]) -> tuple[list[CaseFile], list[Problem]]:
    """Leave out every case of a patient whom the manifest puts in two splits; fill in a patient's other cases."""
    named: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.split:
            named[case.patient].add(case.split)
    kept, problems = [], []
    for case in cases:
        known = named[case.patient]
        if len(known) > 1:
            found = f"patient {case.patient} in {' and '.join(sorted(known))}"
            action = "Give all cases of the patient one split in the manifest."
            problems.append(
                Problem("DAT-111", found, "one split a patient", action, where=case.name)
            )
        else:
            kept.append(replace(case, split=next(iter(known), None)))
    return kept, problems
