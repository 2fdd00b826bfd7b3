"""The files of one hospital: which cases there are, whose they are, and in which split. No pixel is read here.

A data root holds either `manifest.csv` (`site,image,mask[,patient_id,split]`, other columns ignored, paths relative to
the root) or one folder a site with `<case>_image.<suffix>` and `<case>_mask.<suffix>` inside.

Splits go by patient. Where the manifest names none, a patient's split follows from a hash of the patient's id alone, so
that adding or removing cases never moves another patient.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from clients.cache import cache_error, cache_folder, locked
from common.datasets import fetch_advice
from common.errors import FedsgcgError, Problem, fail
from common.imaging import suffix_of
from common.plan import DataSettings, SiteSettings
from common.system import expand

SPLITS = ("train", "validation", "test")
COLUMNS = ("site", "image", "mask")


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
    """

    name: str
    cases: tuple[CaseFile, ...]
    quarantined: tuple[Problem, ...]


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
        if not root.is_dir():
            action = f"Set data.root to the prepared folder. {fetch_advice(data.name)}"
            raise fail("DAT-101", found="no such folder", expected="a folder", action=action, where=str(root))
        return root
    if data.name != "synthetic":
        found, action = "data.root is empty", f"Set data.root=<prepared folder>. {fetch_advice(data.name)}"
        raise fail("DAT-101", found=found, expected="a folder", action=action, where=data.name)
    return _synthetic(cache_folder(cache))


def discover_sites(root: Path) -> tuple[str, ...]:
    """Return the names of the hospitals below a data root, sorted.

    Raises:
        FedsgcgError: DAT-101 when the root or its manifest cannot be used.
    """
    return tuple(sorted({case.site for case in _listed(Path(root))[0]}))


def open_site(root: Path, name: str, data: DataSettings) -> Site:
    """List the cases of one hospital.

    Args:
        root: Data root.
        name: The hospital.
        data: Not needed to list files; part of the signature so that a site is always opened for given settings.

    Raises:
        FedsgcgError: DAT-101 when the manifest cannot be used; DAT-102 when the hospital has no case at all.
    """
    cases, problems = _listed(Path(root))
    mine = [case for case in cases if case.site == name]
    if not mine:
        known = ", ".join(sorted({case.site for case in cases})) or "no site at all"
        action = f"Check the site column or folder names for data set {data.name!r}."
        raise fail("DAT-102", found="no case is listed", expected=f"one of: {known}", action=action, where=name)
    kept, missing = _existing(_named(mine))
    kept, mixed = _one_split_each(kept)
    listed = [problem for site, problem in problems if site == name]
    return Site(name, tuple(sorted(kept, key=lambda case: case.name)), (*listed, *missing, *mixed))


def split_of(patient: str, validation_fraction: float) -> str:
    """Return `train` or `validation` for a patient, from the hash of its id alone."""
    return "validation" if _uniform(patient) < validation_fraction else "train"


def splits(cases: Sequence[CaseFile], validation_fraction: float, *, heldout: bool) -> tuple[str, ...]:
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
    from common.phantoms import VERSION, write_hospitals

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


def _listed(root: Path) -> tuple[list[CaseFile], list[tuple[str, Problem]]]:
    """Return all cases of a root and, with their site, the lines that were left out."""
    if not root.is_dir():
        raise fail("DAT-101", found="no such folder", expected="a data root", action="Set data.root.", where=str(root))
    manifest = root / "manifest.csv"
    return _from_manifest(root, manifest) if manifest.is_file() else (_from_folders(root), [])


def _from_manifest(root: Path, manifest: Path) -> tuple[list[CaseFile], list[tuple[str, Problem]]]:
    """Read `manifest.csv`; all unusable lines are reported in one error, a repeated image is left out."""
    rows = _rows(manifest)
    wrong = [
        Problem("DAT-101", where=f"{manifest}, line {line}", **said) for line, row in rows for said in _mistakes(row)
    ]
    if wrong:
        raise FedsgcgError(*wrong)
    cases: list[CaseFile] = []
    repeated: list[tuple[str, Problem]] = []
    seen: dict[tuple[str, str], int] = {}
    for line, row in rows:
        first = seen.setdefault((row["site"], row["image"]), line)
        if first != line:
            where = f"{manifest}, line {line}"
            repeated.append(
                (row["site"], Problem("DAT-101", f"the image of line {first} again", "each image once", where=where))
            )
            continue
        image = root / row["image"]
        mask = root / row["mask"] if row["mask"] else None
        patient, split = row.get("patient_id", ""), row.get("split", "") or None
        cases.append(CaseFile(row["site"], _stem(row["image"]), image, mask, patient, split))
    return cases, repeated


def _rows(manifest: Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, row) of a manifest with surrounding blanks removed."""
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, {key: (row[key] or "").strip() for key in row if key}) for row in reader]
            columns = [name or "" for name in reader.fieldnames or []]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise fail("DAT-101", found=str(error), expected="a CSV file in UTF-8", where=str(manifest)) from error
    if missing := [name for name in COLUMNS if name not in columns]:
        found = "columns " + (", ".join(columns) or "none")
        raise fail(
            "DAT-101",
            found=found,
            expected="columns " + ", ".join(COLUMNS),
            action=f"Add {', '.join(missing)}.",
            where=str(manifest),
        )
    return rows


def _mistakes(row: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield what makes one line of the manifest unusable."""
    if not _is_folder_name(row["site"]):
        yield {"found": f"site {row['site']!r}", "expected": "a name without slashes that does not begin with a dot"}
    if not row["image"]:
        yield {"found": "no image", "expected": "a path relative to the data folder"}
    for column in ("image", "mask"):
        if _escapes(row[column]):
            yield {"found": f"{column} {row[column]!r}", "expected": "a path inside the data folder"}
    if row.get("split", "") not in ("", *SPLITS):
        yield {"found": f"split {row['split']!r}", "expected": ", ".join(SPLITS) + " or nothing"}


def _escapes(path: str) -> bool:
    """Whether a path of the manifest leads out of the root; links that the hospital placed inside are followed."""
    normal = os.path.normpath(path.replace("\\", "/"))
    return bool(path) and (
        "\0" in path or normal.startswith(("..", "/")) or PurePosixPath(normal).parts[0].endswith(":")
    )


def _is_folder_name(name: str) -> bool:
    """Whether a site's name can be the name of a folder."""
    return bool(name) and not name.startswith(".") and not any(char in name for char in "/\\\0") and name.isprintable()


def _from_folders(root: Path) -> list[CaseFile]:
    """List `<site>/<case>_image.*` with the `<case>_mask.*` beside it."""
    cases = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and _is_folder_name(path.name)):
        files = sorted(path for path in folder.iterdir() if suffix_of(path))
        masks = {_without_suffix(path.name): path for path in files}
        for image in files:
            stem = _without_suffix(image.name)
            if stem.endswith("_image"):
                name = stem.removesuffix("_image")
                cases.append(CaseFile(folder.name, name, image, masks.get(f"{name}_mask"), "", None))
    if not cases:
        expected = "manifest.csv, or <site>/<case>_image.nii.gz with <case>_mask.nii.gz"
        action = "Convert a downloaded data set or your own images: fedsgcg data prepare NAME SOURCE -o FOLDER."
        raise fail("DAT-101", found="neither manifest nor images", expected=expected, action=action, where=str(root))
    return cases


def _without_suffix(name: str) -> str:
    """Return a file name without its image suffix."""
    suffix = suffix_of(Path(name))
    return name[: -len(suffix)] if suffix else name


def _stem(image: str) -> str:
    """Return the case name of an image path: the file's name without suffix and `_image`."""
    return _without_suffix(PurePosixPath(image).name).removesuffix("_image")


def _named(cases: Sequence[CaseFile]) -> list[CaseFile]:
    """Give every case a name of its own and a patient; cases that share a file name take their folders' names too."""
    common = Counter(case.name for case in cases)
    named = []
    for case in cases:
        name = case.name
        if common[name] > 1:
            name = "_".join([*case.image.parts[-3:-1], _without_suffix(case.image.name)])
        named.append(replace(case, name=name, patient=case.patient or name))
    twice = {name for name, count in Counter(case.name for case in named).items() if count > 1}
    return [replace(case, name=case.image.as_posix()) if case.name in twice else case for case in named]


def _existing(cases: Sequence[CaseFile]) -> tuple[list[CaseFile], list[Problem]]:
    """Leave out cases whose image or mask file is not there."""
    kept, problems = [], []
    for case in cases:
        gone = next((path for path in (case.image, case.mask) if path is not None and not path.is_file()), None)
        if gone is None:
            kept.append(case)
        else:
            action = "Restore the file or take the case out of the manifest."
            problems.append(Problem("DAT-103", f"no such file: {gone}", "a file", action, where=case.name))
    return kept, problems


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
            problems.append(Problem("DAT-111", found, "one split a patient", action, where=case.name))
        else:
            kept.append(replace(case, split=next(iter(known), None)))
    return kept, problems
