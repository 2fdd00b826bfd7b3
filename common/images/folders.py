"""Lists the images in a folder, in the same way for study, check, predict and prepare.

Links to folders and files are followed, as they are common on shared storage; a link back into a
folder's own path is not. Hidden files and folders and `__MACOSX` are skipped, but hidden files with
the name of an image are listed. `Listing` has a field for each kind, so that no file is ignored
silently.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsgcg.common.images.formats import DICOM, FOREIGN, foreign_suffix, is_dicom, suffix_of
from fedsgcg.common.names import number_of, printable

STEP = 1000
"""Files of a folder after which progress is reported."""

NAMED = 3
"""Number of file names that a message gives before it only counts."""


@dataclass
class Listing:
    """The content of a folder and its subfolders.

    Attributes:
        images: Image files of supported formats, sorted. Of a pair `.hdr` and `.img` only the
            header; files of DICOM are counted by folder.
        series: Folder -> its files of DICOM, sorted.
        foreign: Image files of other formats.
        ghosts: Hidden files with the name of an image, mostly `._name` of macOS, without pixels.
        closed: Folders that could not be read, with the reason.
        loops: Links to a folder that contains them.
    """

    images: list[Path] = field(default_factory=list)
    series: dict[Path, list[Path]] = field(default_factory=dict)
    foreign: list[Path] = field(default_factory=list)
    ghosts: list[Path] = field(default_factory=list)
    closed: list[tuple[Path, str]] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)

    def conversions(self) -> list[str]:
        """Return how to convert the files of other formats, without repetitions."""
        return list(dict.fromkeys(FOREIGN[foreign_suffix(path)] for path in self.foreign))


def look_through(
    folder: Path, *, deep: bool = True, step: Callable[[str], None] = lambda step: None
) -> Listing:
    """List the content of a folder and, if `deep`, of its subfolders; note unreadable ones.

    Args:
        folder: The folder.
        deep: Whether to list its subfolders.
        step: Called with the number of files so far, as text.
    """
    found = Listing()
    _enter(folder, (), found, deep, step)
    return found


def subfolders(folder: Path) -> list[Path]:
    """Return the sorted subfolders, including links; raises OSError if the folder is unreadable."""
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if not _is_hidden(entry.name) and _is_folder(entry)
        )


def stem_of(path: Path) -> str:
    """Return the name of an image without its suffix and `_image`; never empty."""
    plain = without_suffix(path.name)
    return plain.removesuffix("_image") or plain


def without_suffix(name: str) -> str:
    """Return a file name without its image suffix; never empty."""
    suffix = suffix_of(Path(name))
    return name[: len(name) - len(suffix)] or name


def counted_names(paths: Iterable[Path], noun: str, rest: str = "") -> str:
    """Return the number and first names of files: `4 masks without an image: a, b, c, ...`.

    Args:
        paths: The files.
        noun: What one of them is: `mask`; its plural is regular.
        rest: What follows the noun: `without an image`.
    """
    names = [printable(path.name) for path in paths]
    more = ", ..." if len(names) > NAMED else ""
    what = " ".join(filter(None, (number_of(len(names), noun), rest)))
    return f"{what}: {', '.join(names[:NAMED])}{more}"


def by_format(paths: Sequence[Path]) -> str:
    """Return the number of files per format, e.g. `.mha 2, .nrrd 1`."""
    counts = Counter(foreign_suffix(path) for path in paths)
    return ", ".join(f"{suffix} {count}" for suffix, count in sorted(counts.items()))


def is_file(path: Path) -> bool:
    """Whether a file exists; False, unlike `Path.is_file`, for a name that is not valid."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _enter(
    folder: Path,
    above: tuple[str, ...],
    found: Listing,
    deep: bool,
    step: Callable[[str], None],
) -> None:
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
    names = {entry.name for entry in entries}
    for number, entry in enumerate(entries):
        path = Path(entry.path)
        if number % STEP == 0:
            done = len(found.images) + sum(map(len, found.series.values()))
            step(f"{number_of(done, 'image file')} so far")
        if _is_folder(entry):
            if deep and not _is_hidden(entry.name):
                _enter(path, (*above, real), found, deep, step)
        elif _is_hidden(entry.name):
            found.ghosts += [path] if suffix_of(path) else []
        elif suffix := suffix_of(path):
            if suffix in DICOM.suffixes:
                found.series.setdefault(folder, []).append(path)
            elif suffix != ".img" or _partner(entry.name) not in names:
                found.images.append(path)
        elif foreign_suffix(path):
            found.foreign.append(path)
        elif is_dicom(path) and entry.name != "DICOMDIR":
            found.series.setdefault(folder, []).append(path)


def _partner(name: str) -> str:
    """Return the name of the header that belongs to a file `.img`."""
    return f"{name[:-4]}{'.HDR' if name.endswith('.IMG') else '.hdr'}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
