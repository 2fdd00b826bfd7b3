"""The files of one hospital: its cases, their patients and their splits; reads no pixels.

A data root contains either `manifest.csv` (`clients.data.manifest`:
`site,image,mask[,patient_id,split]`, other columns ignored, paths relative to the root) or one
folder per site with `<case>_image.<suffix>` and `<case>_mask.<suffix>` (`common.images.folders`:
links are followed; unused files are reported in `Site.notes`).

Splits are by patient. If the manifest does not state one, a patient's split follows from a hash of
the patient's id only, so that adding or removing cases never moves another patient.
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

from fedsgcg.clients.data.cache import cache_error, cache_folder, locked
from fedsgcg.clients.data.manifest import Row, is_folder_name, read_manifest
from fedsgcg.common.datasets import fetch_advice
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.system import expand
from fedsgcg.common.images.folders import (
    Listing,
    by_format,
    counted_names,
    is_file,
    look_through,
    stem_of,
    subfolders,
    without_suffix,
)
from fedsgcg.common.names import alike, printable, spelled
from fedsgcg.common.settings.federation import SiteSettings
from fedsgcg.common.settings.plan import DataSettings

__all__ = [
    "CaseFile",
    "Site",
    "data_warnings",
    "discover_sites",
    "ensure_data",
    "open_site",
    "resolve_cache",
    "split_of",
    "splits",
]


@dataclass(frozen=True)
class CaseFile:
    """One case on disk.

    Attributes:
        site: Name of the hospital.
        name: Name of the case, unique within the hospital.
        image: Image file.
        mask: Mask file, None when the case has none.
        patient: The patient's id; the case name if the manifest has none, so that every case
            counts as a patient.
        split: `train`, `validation` or `test` if the manifest states it, else None.
        has_patient: Whether the manifest states the patient's id.
    """

    site: str
    name: str
    image: Path
    mask: Path | None
    patient: str
    split: str | None
    has_patient: bool = True


@dataclass(frozen=True)
class Site:
    """One hospital: its cases sorted by name, and the problems of cases that were left out.

    Attributes:
        name: Name of the hospital.
        cases: Cases whose files exist.
        quarantined: One problem for each case that was left out.
        notes: Problems of unused files in its folder: other formats, masks without an image, hidden
            files.
    """

    name: str
    cases: tuple[CaseFile, ...]
    quarantined: tuple[Problem, ...]
    notes: tuple[Problem, ...] = ()


@dataclass
class _Listed:
    """The content of a data root.

    Attributes:
        cases: All cases of the requested hospitals.
        problems: (hospital, problem) of manifest lines that were left out.
        notes: (folder, problem) of unused files.
        closed: Hospital -> problem, if its folder cannot be listed.
    """

    cases: list[CaseFile] = field(default_factory=list)
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    notes: list[tuple[str, Problem]] = field(default_factory=list)
    closed: dict[str, Problem] = field(default_factory=dict)


def resolve_cache(site: SiteSettings) -> Path:
    """Return the cache folder of a site: its setting, $FEDSGCG_CACHE or ~/.cache/fedsgcg."""
    return cache_folder(site.cache)


def ensure_data(data: DataSettings, cache: str) -> Path:
    """Return the data root; on first use, create the synthetic hospitals in the cache folder.

    Args:
        data: `root` names the folder; "" with `name=synthetic` selects the synthetic hospitals.
        cache: Cache folder, "" for the default.

    Raises:
        FedsgcgError: DAT-101 when the folder does not exist or is not set; DAT-113 when it cannot
            be created.
    """
    if data.root:
        root = expand(data.root, "data.root")
        if not _is_folder(root):
            action = f"Set data.root to the prepared folder. {fetch_advice(data.name)}"
            raise fail(
                "DAT-101",
                found=f"no such folder{_looked_in(root)}",
                expected="a folder",
                action=action,
                where=str(root),
            )
        return root
    if data.name != "synthetic":
        raise fail(
            "DAT-101",
            found="data.root is empty",
            expected="a folder",
            action=f"Set data.root=<prepared folder>. {fetch_advice(data.name)}",
            where=data.name,
        )
    return _synthetic(cache_folder(cache))


def discover_sites(root: Path, wanted: Collection[str] = ()) -> tuple[str, ...]:
    """Return the sorted names of the hospitals in a data root.

    Args:
        root: Data root.
        wanted: The hospitals that are needed, empty for all. An unreadable folder of another
            hospital is ignored.

    Raises:
        FedsgcgError: DAT-101 when the root, its manifest or a hospital's folder cannot be used.
    """
    listed = _list_root(Path(root))
    closed = [
        problem for name, problem in sorted(listed.closed.items()) if not wanted or name in wanted
    ]
    if closed:
        raise FedsgcgError(*closed)
    return tuple(sorted({case.site for case in listed.cases}))


def open_site(root: Path, name: str, data: DataSettings, *, masks: bool = True) -> Site:
    """List the cases of one hospital.

    Args:
        root: Data root.
        name: The hospital.
        data: Settings of the data set; its name is part of an error.
        masks: Whether its masks may be read. If not, no case has one (their files may be missing),
            except those that the manifest assigns to `test`, which are only evaluated.

    Raises:
        FedsgcgError: DAT-101 when the manifest or the hospital's folder cannot be used; DAT-102
            when the hospital has no case.
    """
    listed = _list_root(Path(root), only=name)
    if name in listed.closed:
        raise FedsgcgError(listed.closed[name])
    mine = [case for case in listed.cases if case.site == name]
    notes = tuple(problem for folder, problem in listed.notes if folder == name)
    if not mine:
        names = sorted({case.site for case in _list_root(Path(root)).cases})
        expected = f"one of: {', '.join(names) or '(no site has a case)'}"
        action = f"Check the site column or folder names for data set {data.name!r}."
        problem = Problem("DAT-102", "no case is listed", expected, action, where=name)
        raise FedsgcgError(problem, *notes)
    if not masks:
        mine = [case if case.split == "test" else replace(case, mask=None) for case in mine]
    kept, missing = _without_missing_files(_with_unique_names(mine))
    kept, mixed = _one_split_per_patient(kept)
    left_out = [problem for site, problem in listed.problems if site == name]
    cases = tuple(sorted(kept, key=lambda case: case.name))
    return Site(name, cases, (*left_out, *missing, *mixed), notes)


def data_warnings(root: Path, sites: Sequence[str]) -> list[Problem]:
    """Return warnings about the data of some hospitals, to be shown before a study starts.

    These are DAT-119 for unused files, in a hospital's folder or in one that belongs to no
    hospital, and DAT-118 for names that look alike.
    """
    listed = _list_root(Path(root))
    hospitals = {case.site for case in listed.cases}
    notes = [
        problem for folder, problem in listed.notes if folder in sites or folder not in hospitals
    ]
    return [*alike_hospitals(sites), *notes]


def alike_hospitals(names: Sequence[str]) -> list[Problem]:
    """Return DAT-118 for hospitals whose names differ only in Unicode form or case."""
    action = "Rename one of them, or put their cases under one name if they are one hospital."
    return [
        Problem(
            "DAT-118",
            " and ".join(map(spelled, group)),
            "clearly different names",
            action,
            group[0],
        )
        for group in alike(names)
    ]


def split_of(patient: str, validation_fraction: float, salt: bytes = b"") -> str:
    """Return `train` or `validation` for a patient, based only on the hash of its id.

    The hash of an id is the same everywhere, so that splits can be reproduced; with a salt nobody
    else can compute it.
    """
    return "validation" if _uniform(patient, salt) < validation_fraction else "train"


def splits(
    cases: Sequence[CaseFile],
    validation_fraction: float,
    *,
    heldout: bool,
    salt: bytes = b"",
    target: bool = False,
) -> tuple[str, ...]:
    """Return the split of every case of one hospital.

    A split in the manifest takes precedence. Otherwise all cases of a held-out or observing
    hospital are `test`, and those of a training hospital are `train` or `validation` by the hash of
    the patient. If no patient would be in `train` (likely with one or two patients), the patient
    with the largest hash is. All cases of a hospital of the setting `unlabelled` (`target`) are
    `train`: a validation case would need a mask.
    """
    if target:
        return tuple(case.split or "train" for case in cases)
    if heldout:
        return tuple(case.split or "test" for case in cases)
    chosen = [case.split or split_of(case.patient, validation_fraction, salt) for case in cases]
    free = [case.patient for case in cases if case.split is None]
    if "train" not in chosen and free:
        last = max(free, key=lambda patient: (_uniform(patient, salt), patient))
        chosen = [
            "train" if case.split is None and case.patient == last else split
            for case, split in zip(cases, chosen, strict=True)
        ]
    return tuple(chosen)


def _synthetic(cache: Path) -> Path:
    """Create the synthetic hospitals once, atomically."""
    from fedsgcg.common.images.phantoms import VERSION, write_hospitals

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


def _uniform(patient: str, salt: bytes) -> float:
    """Return a number in [0, 1) that depends only on the patient's id and the salt.

    `person` separates this use of the hash from others. Its value was chosen among a few so that
    the hospitals of PROMISE12 and of the demo get close to 20 % validation patients; with a dozen
    patients a hash can easily select none or half.
    """
    digest = hashlib.blake2b(patient.encode(), digest_size=8, key=salt, person=b"patient").digest()
    return int.from_bytes(digest, "big") / 2**64


def _list_root(root: Path, only: str = "") -> _Listed:
    """List a data root; with folders per site, only the hospital `only` if it is given."""
    if not _is_folder(root):
        raise fail(
            "DAT-101",
            found=f"no such folder{_looked_in(root)}",
            expected="a data root",
            action="Set data.root.",
            where=str(root),
        )
    manifest = root / "manifest.csv"
    try:
        return _from_manifest(root, manifest) if manifest.is_file() else _from_folders(root, only)
    except OSError as error:
        raise _unreadable(root, error.strerror or type(error).__name__) from error


def _looked_in(path: Path) -> str:
    """Return where a relative path was looked for, "" for an absolute one."""
    return "" if path.is_absolute() else f", looked for in {Path.cwd()}"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _unreadable(path, error.strerror or type(error).__name__) from error


def _unreadable(folder: Path, why: str) -> FedsgcgError:
    """Return the error for an unreadable folder."""
    expected = "a folder that this user can read"
    action = (
        "Give this user read permission for it (and search permission for every folder above it), "
        "or remove it from the data."
    )
    return fail("DAT-101", found=why, expected=expected, action=action, where=str(folder))


def _from_manifest(root: Path, manifest: Path) -> _Listed:
    """Read `manifest.csv`; report all unusable lines in one error and leave out repeated images."""
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
            found, action = f"the image of line {first} again", "Remove the line."
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
    """Yield (found, expected) for everything that makes a line of the manifest unusable."""
    yield from row.mistakes()
    for column, path in (("image", row.image), ("mask", row.mask)):
        if _escapes(path):
            yield f"{column} {path!r}", "a path inside the data folder"


def _escapes(path: str) -> bool:
    """Return whether a manifest path leaves the data root; links inside the root are allowed."""
    normal = os.path.normpath(path.replace("\\", "/"))
    return bool(path) and (
        "\0" in path
        or normal.startswith(("..", "/"))
        or PurePosixPath(normal).parts[0].endswith(":")
    )


def _from_folders(root: Path, only: str) -> _Listed:
    """List `<site>/<case>_image.*` with `<case>_mask.*` in the same folder."""
    listed = _Listed()
    for folder in subfolders(root):
        name = printable(folder.name)
        if is_folder_name(name) and (not only or name == only):
            _list_folder(name, folder, listed)
    if only:
        return listed
    loose = look_through(root, deep=False)
    if unused := _unused([], loose.images, loose):
        listed.notes.append(("", _note(root, unused, loose)))
    if not listed.cases and not listed.closed:
        found = "; ".join(
            ["neither manifest nor images", *(problem.found for _, problem in listed.notes)]
        )
        expected = "manifest.csv, or <site>/<case>_image.nii.gz with <case>_mask.nii.gz"
        action = (
            "Convert a downloaded data set or your own images with "
            "`fedsgcg data prepare NAME SOURCE -o FOLDER`."
        )
        action = " ".join([action, *dict.fromkeys(problem.action for _, problem in listed.notes)])
        raise fail("DAT-101", found=found, expected=expected, action=action, where=str(root))
    return listed


def _list_folder(name: str, folder: Path, listed: _Listed) -> None:
    """List the cases and the unused files of one hospital's folder."""
    found = look_through(folder)
    if found.closed and found.closed[0][0] == folder:
        (listed.closed[name],) = _unreadable(*found.closed[0]).problems
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
    if unused := _unused(sorted(used), found.images, found):
        listed.notes.append((name, _note(folder, unused, found)))


def _unused(used: Sequence[Path], images: Sequence[Path], found: Listing) -> list[str]:
    """Describe the unused files that look like images, one text for each reason."""
    left = [path for path in images if path not in set(used)]
    masks = [path for path in left if without_suffix(path.name).endswith("_mask")]
    others = [path for path in left if path not in set(masks)]
    texts = []
    if found.foreign:
        formats = f"files in unsupported formats ({by_format(found.foreign)})"
        texts.append(counted_names(found.foreign, formats))
    if masks:
        texts.append(counted_names(masks, "masks without an image"))
    if others:
        texts.append(counted_names(others, "images that are not named <site>/<case>_image"))
    if found.ghosts:
        texts.append(counted_names(found.ghosts, "hidden files named like images"))
    texts += [f"{printable(path.name)} cannot be read ({why})" for path, why in found.closed]
    texts += [f"{printable(path.name)} links back to a parent folder" for path in found.loops]
    return texts


def _note(folder: Path, unused: Sequence[str], found: Listing) -> Problem:
    expected = "<site>/<case>_image.* with <case>_mask.*"
    action = " ".join([*found.conversions(), "Files that are not images of the study can stay."])
    return Problem("DAT-119", "; ".join(unused), expected, action, str(folder))


def _with_unique_names(cases: Sequence[CaseFile]) -> list[CaseFile]:
    """Give every case a unique name and a patient; add folder names to repeated file names."""
    common = Counter(case.name for case in cases)
    named = []
    for case in cases:
        name = case.name
        if common[name] > 1:
            name = printable("_".join([*case.image.parts[-3:-1], without_suffix(case.image.name)]))
        named.append(
            replace(case, name=name, patient=case.patient or name, has_patient=bool(case.patient))
        )
    twice = {name for name, count in Counter(case.name for case in named).items() if count > 1}
    return [
        replace(case, name=printable(case.image.as_posix())) if case.name in twice else case
        for case in named
    ]


def _without_missing_files(cases: Sequence[CaseFile]) -> tuple[list[CaseFile], list[Problem]]:
    """Leave out cases whose image or mask file does not exist."""
    kept, problems = [], []
    for case in cases:
        gone = next(
            (path for path in (case.image, case.mask) if path is not None and not is_file(path)),
            None,
        )
        if gone is None:
            kept.append(case)
        else:
            action = "Restore the file or remove the case from the manifest."
            problems.append(
                Problem(
                    "DAT-103", f"{_file_problem(gone)}: {gone}", "a file", action, where=case.name
                )
            )
    return kept, problems


def _file_problem(path: Path) -> str:
    """Return why a file cannot be used: missing, inaccessible folder, name too long."""
    try:
        path.stat()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", "") or str(error)
    return "not a file"


def _one_split_per_patient(cases: Sequence[CaseFile]) -> tuple[list[CaseFile], list[Problem]]:
    """Leave out patients that the manifest assigns to two splits; complete the others' splits."""
    named: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.split:
            named[case.patient].add(case.split)
    kept, problems = [], []
    for case in cases:
        known = named[case.patient]
        if len(known) > 1:
            found = f"patient {case.patient} in {' and '.join(sorted(known))}"
            action = "Give all cases of the patient the same split in the manifest."
            problems.append(
                Problem("DAT-111", found, "one split per patient", action, where=case.name)
            )
        else:
            kept.append(replace(case, split=next(iter(known), None)))
    return kept, problems
