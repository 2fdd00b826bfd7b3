"""One way to look through a folder of images, for study, check, predict and prepare alike.

Links to folders and files are followed, because shared storage is full of them; a folder that leads back into itself is
entered once. Hidden files and folders and the `__MACOSX` of an archive are not images, but what looks like one there is
counted. Nothing is passed over without a word: `Listing` has a place for every kind.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.images.formats import FOREIGN, foreign_suffix
from common.images.read import suffix_of
from common.names import printable

NAMED = 3
"""File names that a sentence names before it only counts."""


@dataclass
class Listing:
    """What a folder holds, below it included.

    Attributes:
        images: Image files of formats that are read, sorted.
        foreign: Image files of formats that are not read.
        ghosts: Hidden files that are called like images, most of them a Mac's `._name`, which hold no pixel.
        closed: Folders that could not be looked into, with the reason.
        loops: Folders that lead back to one that they lie in.
    """

    images: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    ghosts: list[Path] = field(default_factory=list)
    closed: list[tuple[Path, str]] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)

    def conversions(self) -> list[str]:
        """How to convert the files of other formats, each way once."""
        return list(dict.fromkeys(FOREIGN[foreign_suffix(path)] for path in self.foreign))


def look_through(folder: Path, *, deep: bool = True) -> Listing:
    """List what lies in a folder and, unless `deep` is false, below it; an unreadable folder is noted."""
    found = Listing()
    _enter(folder, (), found, deep)
    return found


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, links to folders included, sorted; raises OSError when it cannot be read."""
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if not _is_hidden(entry.name) and _is_folder(entry)
        )


def stem_of(path: Path) -> str:
    """Return the name of an image without its suffix and `_image`; never empty, whatever the file is called."""
    plain = without_suffix(path.name)
    return plain.removesuffix("_image") or plain


def without_suffix(name: str) -> str:
    """Return a file name without its image suffix; one that is nothing but a suffix stays whole."""
    suffix = suffix_of(Path(name))
    return (name[: -len(suffix)] if suffix else name) or name


def counted_names(paths: Iterable[Path], what: str) -> str:
    """Say how many files of a kind there are and name the first, e.g. `4 masks without an image: a, b, c, ...`."""
    names = [printable(path.name) for path in paths]
    return f"{len(names)} {what}: {', '.join(names[:NAMED])}" + (
        ", ..." if len(names) > NAMED else ""
    )


def by_format(paths: Sequence[Path]) -> str:
    """Say which other formats there are, e.g. `.mha 2, .nrrd 1`."""
    counts = Counter(foreign_suffix(path) for path in paths)
    return ", ".join(f"{suffix} {count}" for suffix, count in sorted(counts.items()))


def is_file(path: Path) -> bool:
    """Whether there is such a file; unlike `Path.is_file` also of a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _enter(folder: Path, above: tuple[str, ...], found: Listing, deep: bool) -> None:
    real = os.path.realpath(folder)
    if real in above:
        found.loops.append(folder)
        return
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        found.closed.append((folder, error.strerror or type(error).__name__))
        return
    for entry in entries:
        path = Path(entry.path)
        if _is_folder(entry):
            if deep and not _is_hidden(entry.name):
                _enter(path, (*above, real), found, deep)
        elif _is_hidden(entry.name):
            found.ghosts += [path] if suffix_of(path) else []
        elif suffix_of(path):
            found.images.append(path)
        elif foreign_suffix(path):
            found.foreign.append(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
