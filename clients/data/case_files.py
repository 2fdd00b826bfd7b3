"""The files of one hospital: its cases, their patients and their splits; reads no pixels.

A data root contains either `manifest.csv` (`clients.data.manifest`:
`site,image,mask[,patient_id,split]`, other columns ignored, paths relative to the root) or one
folder per site (`clients.data.listing`) with `<case>_image.<suffix>` and `<case>_mask.<suffix>`
(`common.images.folders`: links are followed; unused files are reported in `Site.notes`).

Splits are by patient. What the manifest does not state is decided by `splits`: the patients with
the smallest hashes validate, as many as come closest to the share. A new patient moves at most one
other patient, and a new image of a known patient moves nobody.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsgcg.clients.data.cache import cache_error, cache_folder, digest, locked
from fedsgcg.clients.data.listing import CaseFile, is_folder, list_root, looked_in, mixed_formats
from fedsgcg.common.datasets import fetch_advice
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.system import expand
from fedsgcg.common.images.folders import is_file, without_suffix
from fedsgcg.common.images.parts import files_of
from fedsgcg.common.names import alike, number_of, printable, spelled
from fedsgcg.common.settings.federation import SiteSettings
from fedsgcg.common.settings.plan import DataSettings

__all__ = [
    "CaseFile",
    "Site",
    "content_of",
    "data_warnings",
    "discover_sites",
    "ensure_data",
    "open_site",
    "resolve_cache",
    "splits",
    "unvalidated",
    "validation_patients",
]


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
        if not is_folder(root):
            action = f"Set data.root to the prepared folder. {fetch_advice(data.name)}"
            raise fail(
                "DAT-101",
                found=f"no such folder{looked_in(root)}",
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
    listed = list_root(Path(root))
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
    listed = list_root(Path(root), only=name)
    if name in listed.closed:
        raise FedsgcgError(listed.closed[name])
    mine = [case for case in listed.cases if case.site == name]
    notes = tuple(problem for folder, problem in listed.notes if folder == name)
    if not mine:
        notes += tuple(problem for site, problem in listed.problems if site == name)
        names = sorted({case.site for case in list_root(Path(root)).cases})
        expected = f"one of: {', '.join(names) or '(no site has a case)'}"
        action = f"Check the site column or folder names for data set {data.name!r}."
        problem = Problem("DAT-102", "no case is listed", expected, action, where=name)
        raise FedsgcgError(problem, *notes)
    if not masks:
        mine = [
            case if case.split == "test" else replace(case, mask=None, structures=())
            for case in mine
        ]
    kept, missing = _without_missing_files(_with_unique_names(mine))
    kept, mixed = _one_split_per_patient(kept)
    left_out = [problem for site, problem in listed.problems if site == name]
    cases = tuple(sorted(kept, key=lambda case: case.name))
    notes = (*notes, *mixed_formats(cases))
    return Site(name, cases, (*left_out, *missing, *mixed), notes)


def data_warnings(root: Path, sites: Sequence[str]) -> list[Problem]:
    """Return warnings about the data of some hospitals, to be shown before a study starts.

    These are DAT-119 for unused files, in a hospital's folder or in one that belongs to no
    hospital, DAT-168 for a hospital's volumes of several formats, and DAT-118 for names that look
    alike.
    """
    listed = list_root(Path(root))
    hospitals = {case.site for case in listed.cases}
    notes = [
        problem for folder, problem in listed.notes if folder in sites or folder not in hospitals
    ]
    mixed = [
        problem
        for site in sites
        for problem in mixed_formats([case for case in listed.cases if case.site == site])
    ]
    return [*alike_hospitals(sites), *notes, *mixed]


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


def validation_patients(
    patients: Collection[str],
    fraction: float,
    salt: bytes = b"",
    *,
    train: int = 0,
    validation: int = 0,
) -> frozenset[str]:
    """Return the patients that validate: the share of all, as near as whole patients allow.

    They are the patients with the smallest hashes, in any order of the arguments. Which ones these
    are must not depend on an earlier split, so that a split can be reproduced; with every new
    patient at most one known patient changes sides, and only if the new one takes its place or the
    number of validation patients rises. At least one patient trains.

    Args:
        patients: The patients without a stated split.
        fraction: The share, in [0, 1).
        salt: The site's secret; without it the hashes are the same everywhere.
        train: Further patients, whose stated split is `train`.
        validation: Further patients, whose stated split is `validation`.
    """
    ordered = sorted(set(patients), key=lambda patient: (_uniform(patient, salt), patient))
    wanted = math.ceil(fraction * (len(ordered) + train + validation) - 0.5) - validation
    most = len(ordered) if train else len(ordered) - 1
    return frozenset(ordered[: max(0, min(wanted, most))])


def hashed_validation(
    patients: Collection[str], fraction: float, *, train: int = 0
) -> frozenset[str]:
    """Return the patients that validate by `data.split=hash`: those whose hash is below the share.

    No patient ever moves, but of a dozen patients a hash can easily select none or half. If all
    would validate and no other patient trains, the one with the largest hash does.
    """
    chosen = {patient for patient in patients if _uniform(patient, b"") < fraction}
    if chosen and not train and chosen == set(patients):
        chosen.remove(max(chosen, key=lambda patient: (_uniform(patient, b""), patient)))
    return frozenset(chosen)


def splits(
    cases: Sequence[CaseFile],
    validation_fraction: float,
    *,
    heldout: bool,
    salt: bytes = b"",
    target: bool = False,
    rule: str = "share",
) -> tuple[str, ...]:
    """Return the split of every case of one hospital.

    A split in the manifest takes precedence. Otherwise all cases of a held-out or observing
    hospital are `test`, and those of a training hospital are `train` or `validation`
    (`validation_patients`). All cases of a hospital of the setting `unlabelled` (`target`) are
    `train`: a validation case would need a mask.

    Args:
        cases: The cases of the hospital.
        validation_fraction: Share of its patients that is kept for validation.
        heldout: Whether it is held out or observes.
        salt: The site's secret, empty in a simulation.
        target: Whether it is one of `unlabelled`.
        rule: `data.split`.
    """
    if target:
        return tuple(case.split or "train" for case in cases)
    if heldout:
        return tuple(case.split or "test" for case in cases)
    stated = {
        split: {case.patient for case in cases if case.split == split}
        for split in ("train", "validation")
    }
    free = {case.patient for case in cases if case.split is None}
    if rule == "hash":
        chosen = hashed_validation(free, validation_fraction, train=len(stated["train"]))
    else:
        chosen = validation_patients(
            free,
            validation_fraction,
            salt,
            train=len(stated["train"]),
            validation=len(stated["validation"]),
        )
    return tuple(
        case.split or ("validation" if case.patient in chosen else "train") for case in cases
    )


def unvalidated(
    site: str, parts: Sequence[str], patients: Sequence[str], fraction: float
) -> list[Problem]:
    """Return DAT-193 if a hospital trains and has no validation patient, as with one patient.

    Args:
        site: The hospital.
        parts: The split of each case.
        patients: The patient of each case.
        fraction: Share of its patients that is kept for validation; 0 wants none.
    """
    if "train" not in parts or "validation" in parts or not fraction:
        return []
    number = len({one for one, part in zip(patients, parts, strict=True) if part == "train"})
    found = f"{number_of(number, 'training patient')}, none for validation"
    expected = f"{fraction:.0%} of the patients, as near as whole patients allow"
    action = (
        "The hospital trains and is left out of validation curves; add patients, or state "
        "`validation` in the column split of manifest.csv."
    )
    return [Problem("DAT-193", found, expected, action, site)]


def content_of(paths: Sequence[Path], hashes: Mapping[Path, str]) -> str:
    """Return one hash of an image, or of the masks of a case; "" for none.

    Args:
        paths: The image, or the masks.
        hashes: File -> hash of its content, for all files of the case.

    Returns:
        Of a single file its hash, otherwise a digest of all names and hashes.
    """
    files = [file for path in paths for file in files_of(path)]
    if len(files) == 1:
        return hashes[files[0]]
    if not files:
        return ""
    return digest(json.dumps([[file.name, hashes[file]] for file in files]).encode(), 16)


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

    `person` separates this use of the hash from others.
    """
    digest = hashlib.blake2b(patient.encode(), digest_size=8, key=salt, person=b"patient").digest()
    return int.from_bytes(digest, "big") / 2**64


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
    """Leave out cases of whose image or mask a file does not exist."""
    kept, problems = [], []
    for case in cases:
        try:
            gone = next((path for path in case.files() if not is_file(path)), None)
        except FedsgcgError as error:
            problems += [replace(problem, where=case.name) for problem in error.problems]
            continue
        if gone is None and not files_of(case.image):
            gone = case.image
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
