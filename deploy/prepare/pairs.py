"""Finds images and their masks by their names, where no table and no known layout says it.

Image and mask are in one folder (`Case00.mhd` with `Case00_segmentation.mhd`, `image.nii.gz` with
`mask.nii.gz`, `1.jpg` with `1_disc.png` and `1_cup.png`) or in folders next to each other
(`images/1.jpg` with `masks/1.png`, or with `disc/1.png` and `cup/1.png`). What follows the image's
name is the name of a structure, unless it only says that the file is a mask.

The first folder below the source is the hospital, the second one the patient.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import Problem
from fedsgcg.common.images.folders import counted_names, without_suffix
from fedsgcg.common.names import printable
from fedsgcg.deploy.prepare.layouts import Layout, Line, plain_name

_IMAGES: Final = "image images img imgs scan scans photo photos picture pictures volume volumes"
_MASKS: Final = (
    "mask masks label labels seg segs segmentation segmentations gt groundtruth truth manual "
    "annotation annotations"
)
IMAGES: Final = frozenset(_IMAGES.split())
MASKS: Final = frozenset(_MASKS.split())
"""Names of files and folders, in lower case, that say what a file is."""

LEADING: Final = re.compile(rf"({'|'.join(sorted(IMAGES | MASKS))})(?:[ _-]+(?=.)|(?=\d))(.+)")
TRAILING: Final = re.compile(rf"(.+)[ _-]({'|'.join(sorted(IMAGES))})")
SEPARATORS: Final = " _-."


@dataclass
class _Group:
    """The files of one folder, or of folders next to each other.

    Attributes:
        images: Name of the case -> image.
        masks: (name of the case, structure or "", file).
        alone: Masks that belong to no image.
        unused: Files of further folders next to images and masks.
    """

    images: dict[str, Path] = field(default_factory=dict)
    masks: list[tuple[str, str, Path]] = field(default_factory=list)
    alone: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)


def recognise(source: Path, files: Sequence[Path]) -> Layout | None:
    """Return the cases of a folder by the names of its files; None if no image has a mask.

    Args:
        source: The folder.
        files: All image files in it, sorted.
    """
    groups = _groups(files)
    if not any(group.masks for group in groups.values()):
        return None
    layout = Layout("images and masks by their names")
    bare: list[Path] = []
    alone: list[Path] = []
    for home, group in sorted(groups.items()):
        alone += group.alone
        if group.unused:
            text = counted_names(group.unused, "file", "in further folders, not used")
            layout.notes.append(f"{printable(home.name)}: {text}")
        masks: dict[str, list[tuple[str, Path]]] = defaultdict(list)
        for case, role, path in group.masks:
            masks[case].append((role, path))
        if group.images and not group.masks:
            where = printable(home.relative_to(source).as_posix())
            images = counted_names(group.images.values(), "image", "and no mask, not used")
            layout.notes.append(f"{where}: {images}")
            continue
        for case, image in sorted(group.images.items()):
            if case not in masks:
                bare.append(image)
            elif (line := _line(source, home, case, image, masks[case], layout)) is not None:
                layout.lines.append(line)
    for paths, *what in ((bare, "image", "without a mask"), (alone, "mask", "without an image")):
        if paths:
            layout.problems.append(_unpaired(counted_names(paths, *what), source))
    return layout


def _line(
    source: Path,
    home: Path,
    case: str,
    image: Path,
    masks: Sequence[tuple[str, Path]],
    layout: Layout,
) -> Line | None:
    """Return a case; several masks of one structure are a problem."""
    roles = [role for role, _ in masks]
    if len(set(roles)) < len(roles) or (len(roles) > 1 and "" in roles):
        layout.problems.append(
            Problem(
                "DAT-167",
                counted_names((path for _, path in masks), "mask"),
                "one mask, or one mask file a structure",
                "Keep one of them: which one is right cannot be seen from the names.",
                str(image),
            )
        )
        return None
    parts = home.relative_to(source).parts
    structures = tuple(sorted(masks)) if roles != [""] else ()
    return Line(
        printable(parts[0]) if parts else "",
        image,
        masks[0][1],
        patient=printable("_".join(parts[:2])) if len(parts) > 1 else "",
        name=printable(case or home.name),
        structures=structures,
    )


def _unpaired(found: str, source: Path) -> Problem:
    return Problem(
        "DAT-127",
        found,
        "<case>.* with <case>_mask.* or <case>_<structure>.*, or folders images and masks",
        "Rename the files, or list the cases in manifest.csv with the columns site, image, mask.",
        str(source),
    )


def _groups(files: Sequence[Path]) -> dict[Path, _Group]:
    """Return folder -> its images and masks; folders next to each other are one group."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        folders[path.parent].append(path)
    homes = {folder.parent for folder in folders if folder.name.lower() in IMAGES}
    groups: dict[Path, _Group] = defaultdict(_Group)
    roles: dict[Path, list[tuple[str, Path]]] = defaultdict(list)
    for folder, paths in sorted(folders.items()):
        if folder.parent in homes and folder.name.lower() in IMAGES:
            groups[folder.parent].images |= {_plain(path): path for path in paths}
        elif folder.parent in homes:
            roles[folder.parent] += [(_role(folder.name), path) for path in paths]
        elif folder.parent.parent in homes and folder.parent.name.lower() in MASKS:
            roles[folder.parent.parent] += [(_role(folder.name), path) for path in paths]
        else:
            groups[folder] = _in_one_folder(paths)
    for home, masks in roles.items():
        group = groups[home]
        whole = any(role == "" for role, _ in masks)
        for role, path in masks:
            if whole and role:
                group.unused.append(path)  # previews, for example
                continue
            stem = without_suffix(path.name)
            key = _key(stem, group.images) or _key(_plain(path), group.images)
            if key is None:
                group.alone.append(path)
            else:
                group.masks.append((key, role, path))
    return groups


def _plain(path: Path) -> str:
    """Return the name of an image without a word that says that it is one."""
    stem = without_suffix(path.name)
    if match := TRAILING.fullmatch(stem.lower()):
        return stem[: match.end(1)]
    if match := LEADING.fullmatch(stem.lower()):
        return stem[match.start(2) :]
    return stem


def _in_one_folder(paths: Sequence[Path]) -> _Group:
    """Pair images and masks of one folder."""
    group = _Group()
    rest: list[tuple[str, Path]] = []
    for path in paths:
        stem = without_suffix(path.name)
        lower = stem.lower()
        leading = LEADING.fullmatch(lower)
        if lower in IMAGES or TRAILING.fullmatch(lower) or (leading and leading[1] in IMAGES):
            group.images["" if lower in IMAGES else _plain(path)] = path
        else:
            rest.append((stem, path))
    for stem, path in sorted(rest, key=lambda one: (len(one[0]), one[0])):
        leading = LEADING.fullmatch(stem.lower())
        name = stem[leading.start(2) :] if leading else stem
        key = _key(name, group.images)
        role = _role(name[len(key or "") :])
        if key is None and not leading:
            group.images[stem] = path
        elif key is None:
            group.alone.append(path)
        elif role.isdigit() and not leading:
            group.images[stem] = path  # the next image of a patient, p1_2 after p1
        else:
            group.masks.append((key, role, path))
    return group


def _key(name: str, images: Mapping[str, Path]) -> str | None:
    """Return the longest name of an image that a mask's name is or starts with."""
    fitting = [key for key in _starts(name) if key in images]
    return max(fitting, key=len, default="" if "" in images else None)


def _starts(name: str) -> Iterable[str]:
    """Yield a name, and its parts before each separator."""
    yield name
    for place, char in enumerate(name):
        if char in SEPARATORS and place:
            yield name[:place]


def _role(text: str) -> str:
    """Return the structure that a name says, "" if it only says that it is a mask."""
    words = [word for word in re.split(r"[ _.-]+", text) if word]
    kept = [word for word in words if word.lower() not in MASKS]
    return plain_name("_".join(kept)) if kept else ""
