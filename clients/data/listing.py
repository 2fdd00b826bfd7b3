"""Lists the cases of a data root: a manifest, or one folder per hospital; reads no pixels.

In a hospital's folder an image is `<case>_image` with a suffix, or a folder of that name with a
DICOM series. Its mask is `<case>_mask` with a suffix, a folder of that name with a DICOM
segmentation or with one file a structure, or files `<case>_mask_<structure>`. In a manifest the
columns `mask_<structure>` name one mask file a structure.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fedsgcg.clients.data.manifest import Row, is_folder_name, read_manifest
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.images.folders import (
    Listing,
    by_format,
    counted_names,
    look_through,
    stem_of,
    subfolders,
    without_suffix,
)
from fedsgcg.common.images.formats import VOLUME_SUFFIXES, format_of, suffix_of
from fedsgcg.common.images.parts import files_of, inside
from fedsgcg.common.names import printable


@dataclass(frozen=True)
class CaseFile:
    """One case on disk.

    Attributes:
        site: Name of the hospital.
        name: Name of the case, unique within the hospital.
        image: Image file, or the folder of a DICOM series.
        mask: Mask file, or the folder of a DICOM segmentation; the first of `structures` if the
            case has one mask file a structure; None when the case has no mask.
        patient: The patient's id; the case name if the manifest has none, so that every case
            counts as a patient.
        split: `train`, `validation` or `test` if the manifest states it, else None.
        has_patient: Whether the manifest states the patient's id.
        structures: (name, mask file) of each structure, if it has a mask file of its own.
    """

    site: str
    name: str
    image: Path
    mask: Path | None
    patient: str
    split: str | None
    has_patient: bool = True
    structures: tuple[tuple[str, Path], ...] = ()

    @property
    def masks(self) -> tuple[Path, ...]:
        """The mask files: none, one, or one for each structure."""
        if self.structures:
            return tuple(path for _, path in self.structures)
        return () if self.mask is None else (self.mask,)

    @property
    def structure_names(self) -> tuple[str, ...]:
        """The structure of each mask file, empty for a single mask."""
        return tuple(name for name, _ in self.structures)

    def files(self) -> list[Path]:
        """Return every file of the case: headers and their data, and the files of folders.

        Raises:
            FedsgcgError: DAT-103 for a header that names its data in a way that is not read.
        """
        return [file for path in (self.image, *self.masks) for file in files_of(path)]


@dataclass
class Listed:
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


def list_root(root: Path, only: str = "") -> Listed:
    """List a data root; with folders per site, only the hospital `only` if it is given."""
    if not is_folder(root):
        raise fail(
            "DAT-101",
            found=f"no such folder{looked_in(root)}",
            expected="a data root",
            action="Set data.root.",
            where=str(root),
        )
    manifest = root / "manifest.csv"
    try:
        return _from_manifest(root, manifest) if manifest.is_file() else _from_folders(root, only)
    except OSError as error:
        raise _unreadable(root, error.strerror or type(error).__name__) from error


def looked_in(path: Path) -> str:
    """Return where a relative path was looked for, "" for an absolute one."""
    return "" if path.is_absolute() else f", looked for in {Path.cwd()}"


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; raises DAT-101 if that cannot be seen."""
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


def _from_manifest(root: Path, manifest: Path) -> Listed:
    """Read `manifest.csv`; report all unusable lines in one error and leave out repeated images."""
    rows = read_manifest(manifest)
    wrong = [
        Problem("DAT-101", found, expected, where=f"{manifest}, line {row.line}")
        for row in rows
        for found, expected in _mistakes(row)
    ]
    if wrong:
        raise FedsgcgError(*wrong)
    listed = Listed()
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
        listed.cases.append(_case_of(row, root))
    return listed


def _case_of(row: Row, root: Path) -> CaseFile:
    """Return the case of a manifest's line."""
    image = root / row.image
    mask = root / row.mask if row.mask else None
    structures = [(name, root / path) for name, path in row.structures]
    if mask is not None and not structures:
        structures = structure_files(mask, stem_of(image))
    if structures:
        mask = structures[0][1]
    return CaseFile(
        row.site,
        stem_of(image),
        image,
        mask,
        row.patient,
        row.split or None,
        structures=tuple(structures),
    )


def _mistakes(row: Row) -> Iterator[tuple[str, str]]:
    """Yield (found, expected) for everything that makes a line of the manifest unusable."""
    yield from row.mistakes()
    masks = [(f"mask_{name}", path) for name, path in row.structures]
    for column, path in (("image", row.image), ("mask", row.mask), *masks):
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


def _from_folders(root: Path, only: str) -> Listed:
    """List the cases of each hospital's folder."""
    listed = Listed()
    for folder in subfolders(root):
        name = printable(folder.name)
        if is_folder_name(name) and (not only or name == only):
            _list_folder(name, folder, listed)
    if only:
        return listed
    loose = look_through(root, deep=False)
    if unused := _unused(set(), loose):
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


def _list_folder(name: str, folder: Path, listed: Listed) -> None:
    """List the cases and the unused files of one hospital's folder."""
    found = look_through(folder)
    if found.closed and found.closed[0][0] == folder:
        (listed.closed[name],) = _unreadable(*found.closed[0]).problems
        return
    named = _named(folder, found)
    parts_of = _structure_masks(named)
    used: set[Path] = set()
    for base, images in named.items():
        if not base.endswith("_image"):
            continue
        masks, structures = _masks_of(base.removesuffix("_image"), named, parts_of)
        files = [*images, *masks, *(path for _, path in structures)]
        used |= set(files)
        case = printable(stem_of(images[0]))
        if len(images) > 1 or len(masks) + bool(structures) > 1:
            listed.problems.append((name, _ambiguous(case, files)))
            continue
        mask = next((path for path in (*masks, *(path for _, path in structures))), None)
        parts = tuple(structures)
        listed.cases.append(CaseFile(name, case, images[0], mask, "", None, structures=parts))
    if unused := _unused(used, found):
        listed.notes.append((name, _note(folder, unused, found)))


def _named(folder: Path, found: Listing) -> dict[str, list[Path]]:
    """Return name without suffix -> the files in a folder, and its subfolders with a series."""
    here = [path for path in found.images if path.parent == folder]
    here += found.series.get(folder, [])
    here += [path for path in found.series if path.parent == folder]
    here += sorted({path.parent for path in found.images if path.parent.parent == folder})
    named: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(set(here)):
        base = without_suffix(path.name) if suffix_of(path) else path.name
        named[base].append(path)
    # Folders of pictures are cases of no convention, unless they are a mask's structures.
    return {
        base: paths
        for base, paths in named.items()
        if base.endswith("_mask") or not all(_holds_pictures(path, found) for path in paths)
    }


def _holds_pictures(path: Path, found: Listing) -> bool:
    return path not in found.series and not suffix_of(path) and path.is_dir()


def _structure_masks(named: Mapping[str, Sequence[Path]]) -> dict[str, list[tuple[str, Path]]]:
    """Return case -> (structure, file) of all files `<case>_mask_<structure>`, found in one pass.

    `a_mask_b_mask_c` may be structure `b_mask_c` of `a`, or `c` of `a_mask_b`.
    """
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for base, paths in named.items():
        for match in re.finditer("(?=_mask_)", base):
            case, structure = base[: match.start()], base[match.start() + len("_mask_") :]
            found[case] += [(structure, path) for path in paths]
    return found


def _masks_of(
    case: str,
    named: Mapping[str, Sequence[Path]],
    parts_of: Mapping[str, Sequence[tuple[str, Path]]],
) -> tuple[list[Path], list[tuple[str, Path]]]:
    """Return the mask files of a case, and the masks of its structures."""
    structures = list(parts_of.get(case, ()))
    masks = []
    for path in named.get(f"{case}_mask", ()):
        if parts := structure_files(path, case):
            structures += parts
        else:
            masks.append(path)
    return masks, structures


def structure_files(path: Path, case: str = "") -> list[tuple[str, Path]]:
    """Return (structure, file) of a folder with one mask file a structure; [] for anything else.

    A structure's name is the file's, without `<case>_` before it.
    """
    if suffix_of(path) or not path.is_dir():
        return []
    files = [file for file in inside(path) if suffix_of(file) and format_of(file) is not None]
    data = {part for file in files for part in files_of(file)[1:]}
    if all(suffix_of(file) == ".dcm" for file in files):
        return []
    return [
        (without_suffix(file.name).removeprefix(f"{case}_").removeprefix("mask_"), file)
        for file in files
        if file not in data or suffix_of(file) == ".hdr"
    ]


def _ambiguous(case: str, files: Sequence[Path]) -> Problem:
    return Problem(
        "DAT-167",
        ", ".join(printable(path.name) for path in files[:6]),
        "one image, and one mask or one mask file a structure",
        "Keep one of them: which one is right cannot be seen from the names.",
        where=case,
    )


def mixed_formats(cases: Sequence[CaseFile]) -> list[Problem]:
    """Return DAT-168 if the volumes of a hospital have several formats."""
    counts = Counter(
        form.name
        for case in cases
        if (suffix_of(case.image) or case.image.is_dir())
        and (form := format_of(case.image)) is not None
        and form.suffixes[0] in VOLUME_SUFFIXES
    )
    if len(counts) < 2:
        return []
    found = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    action = (
        "All are used. If one was converted from another, check left and right and the voxel size "
        "in a viewer, above all for ANALYZE, which has no orientation."
    )
    return [Problem("DAT-168", found, "one format", action, cases[0].site)]


def _unused(used: set[Path], found: Listing) -> list[str]:
    """Describe the unused files that look like images, one text for each reason."""
    left = [path for path in found.images if not {path, path.parent} & used]
    masks = [path for path in left if without_suffix(path.name).endswith("_mask")]
    others = [path for path in left if path not in set(masks)]
    series = [
        folder
        for folder, files in found.series.items()
        if folder not in used and not set(files) <= used
    ]
    texts = []
    if found.foreign:
        formats = f"in unsupported formats ({by_format(found.foreign)})"
        texts.append(counted_names(found.foreign, "file", formats))
    if masks:
        texts.append(counted_names(masks, "mask", "without an image"))
    if others:
        texts.append(counted_names(others, "image", "not named <site>/<case>_image"))
    if series:
        texts.append(counted_names(series, "folder", "of DICOM files not named <case>_image"))
    if found.ghosts:
        texts.append(counted_names(found.ghosts, "hidden file", "named like images"))
    texts += [f"{printable(path.name)} cannot be read ({why})" for path, why in found.closed]
    texts += [f"{printable(path.name)} links back to a parent folder" for path in found.loops]
    return texts


def _note(folder: Path, unused: Sequence[str], found: Listing) -> Problem:
    expected = "<site>/<case>_image.* with <case>_mask.*"
    advice = found.conversions()
    if found.series:
        advice.append("Name the folder of each series <case>_image (docs: reference/formats).")
    action = " ".join([*advice, "Files that are not images of the study can stay."])
    return Problem("DAT-119", "; ".join(unused), expected, action, str(folder))
