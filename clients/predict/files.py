"""Which images to predict, what their results are called, and writing these whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from clients.data.case_files import discover_sites, open_site
from common.errors import FedsgcgError, Problem, fail
from common.files.errors import disk_advice
from common.images.folders import Listing, by_format, counted_names, look_through, stem_of
from common.images.read import VOLUME_SUFFIXES, suffix_of
from common.names import printable
from common.settings.plan import DataSettings

RESULT: Final = re.compile(
    r".*_(mask|segmentation|probability(_.*)?|confidence|overlay)", re.IGNORECASE
)
"""Names of masks and of results: in a folder of images they are no images."""

SHOWN: Final = 5


@dataclass(frozen=True)
class Job:
    """One image to predict.

    Attributes:
        image: The file.
        name: Path of its results below the output folder, without ending.
        mask: Its true mask, None when it is not scored.
        site: Name of its hospital, "" for an image that was named on the command line.
        case: Name of the case.
    """

    image: Path
    name: str
    mask: Path | None = None
    site: str = ""
    case: str = ""

    @property
    def suffix(self) -> str:
        """Suffix of the results: that of a volume, else PNG."""
        suffix = suffix_of(self.image)
        return suffix if suffix in VOLUME_SUFFIXES else ".png"

    @property
    def shown(self) -> str:
        """What a line on the console calls it."""
        return printable(f"{self.site} {self.case}" if self.site else self.image.name)

    def result(self, folder: Path, ending: str) -> Path:
        """Path of one kind of result: `_mask`, `_overlay`, and so on."""
        return folder / f"{self.name}{ending}{'.png' if ending == '_overlay' else self.suffix}"


@dataclass
class Passed:
    """What lies in the folders that were named and is not predicted.

    Attributes:
        results: Files that are masks or results by their names.
        folders: What else each folder holds.
    """

    results: list[Path] = field(default_factory=list)
    folders: list[Listing] = field(default_factory=list)

    def words(self) -> list[str]:
        """One sentence for each kind of file that is there, with how to convert other formats."""
        said = []
        if self.results:
            said.append(
                counted_names(self.results, "files that are masks or results by their names")
            )
        if foreign := [path for found in self.folders for path in found.foreign]:
            advice = " ".join(
                dict.fromkeys(text for found in self.folders for text in found.conversions())
            )
            what = f"files of formats that are not read ({by_format(foreign)})"
            said.append(f"{counted_names(foreign, what)}. {advice}")
        if ghosts := [path for found in self.folders for path in found.ghosts]:
            said.append(counted_names(ghosts, "hidden files called like images"))
        said += [
            f"{printable(str(path))} cannot be read ({why})"
            for found in self.folders
            for path, why in found.closed
        ]
        return said + [
            f"{printable(str(path))} leads back into itself"
            for found in self.folders
            for path in found.loops
        ]


def jobs_of_images(images: Sequence[Path], jobs: Sequence[Job] = ()) -> tuple[list[Job], Passed]:
    """Add the images that were named to some jobs; folders are looked through (`common.images.folders`).

    Returns:
        All jobs, each with a name of its own, and what was passed over.

    Raises:
        FedsgcgError: MOD-809 for a path that is not there, or when there is no image at all.
    """
    found, passed = list(jobs), Passed()
    for path in images:
        if _kind(path) == "folder":
            inside = look_through(path)
            passed.folders.append(inside)
            kept = [file for file in inside.images if not RESULT.fullmatch(stem_of(file))]
            passed.results += [file for file in inside.images if file not in set(kept)]
            found += [
                Job(file, (file.parent.relative_to(path) / stem_of(file)).as_posix())
                for file in kept
            ]
        else:
            found.append(Job(path, stem_of(path)))
    if not found:
        where = ", ".join(map(str, images))
        said = "; ".join(["no image file", *passed.words()])
        raise fail("MOD-809", where=where, found=said, expected="NIfTI volumes or pictures")
    return _distinct(found), passed


def _kind(path: Path) -> str:
    """Return `folder` or `file`; raises MOD-809 for what is neither, or cannot be looked at."""
    expected = "an image or a folder of images"
    try:
        return "folder" if stat.S_ISDIR(path.stat().st_mode) else "file"
    except FileNotFoundError as error:
        raise fail("MOD-809", where=str(path), found="no such file", expected=expected) from error
    except OSError as error:
        found, action = str(error.strerror or error), disk_advice(error, "name another path.")
        raise fail(
            "MOD-809", where=str(path), found=found, expected=expected, action=action
        ) from error


def jobs_of_data(root: Path, data: DataSettings, site: str | None, split: str | None) -> list[Job]:
    """List the cases of a prepared folder with their masks.

    Args:
        root: Folder with `manifest.csv` or one folder a hospital.
        data: The model's data settings.
        site: The one hospital wanted, None for all.
        split: Only cases that the manifest puts there, None for all.

    Raises:
        FedsgcgError: DAT-101 or DAT-102 when the folder or the hospital cannot be used, MOD-809 without a case.
    """
    jobs = []
    for name in [site] if site else discover_sites(root):
        for case in open_site(root, name, data).cases:
            if split is None or case.split == split:
                jobs.append(
                    Job(
                        case.image,
                        f"{name}/{Path(case.name).name or 'case'}",
                        case.mask,
                        name,
                        case.name,
                    )
                )
    if not jobs:
        found = f"no case of split {split}" if split else "no case"
        raise fail("MOD-809", where=str(root), found=found, expected="cases to predict")
    return jobs


def check_output(
    folder: Path, jobs: Sequence[Job], endings: Sequence[str], *, overwrite: bool
) -> None:
    """Refuse before any work what could not be written, or would be written over.

    Raises:
        FedsgcgError: MOD-808 for results that are there already, that would lie outside the folder, or that are the
            images or masks themselves.
    """
    if outside := [
        job for job in jobs if ".." in Path(job.name).parts or Path(job.name).is_absolute()
    ]:
        found, expected = f"results called {outside[0].name!r}", "a name inside the folder"
        raise fail(
            "MOD-808",
            where=str(outside[0].image),
            found=found,
            expected=expected,
            action="Rename the image.",
        )
    inputs = {path.resolve() for job in jobs for path in (job.image, job.mask) if path is not None}
    targets = [path for job in jobs for ending in endings for path in _targets(folder, job, ending)]
    own = [path for path in targets if path.resolve() in inputs]
    there = [] if overwrite else [path for path in targets if os.path.lexists(path)]
    problems = [
        Problem(
            "MOD-808",
            "it is one of the images or masks",
            "another folder",
            "Choose another DIR.",
            str(path),
        )
        for path in own[:SHOWN]
    ]
    if there and not own:
        found = f"{len(there)} results are there already"
        action = "Choose another DIR, or write over them with --overwrite."
        problems += [Problem("MOD-808", found, "a folder without them", action, str(there[0]))]
    if problems:
        raise FedsgcgError(*problems)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(folder, error) from error


def _targets(folder: Path, job: Job, ending: str) -> list[Path]:
    """Return what one kind of result is called; of a picture's probabilities those that are there."""
    if ending == "_probability" and job.suffix == ".png":
        place = folder / job.name
        return sorted(place.parent.glob(f"{glob.escape(place.name)}{ending}_*.png"))
    return [job.result(folder, ending)]


def save(path: Path, into: Callable[[Path], object]) -> None:
    """Write a file that others see whole or not at all; raises MOD-808 when the disk refuses."""
    suffix = suffix_of(path)
    half = path.with_name(f".{os.getpid()}.part{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            into(half)
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)
    except OSError as error:
        raise refused(path, error) from error


def write(path: Path, content: bytes) -> None:
    """Write bytes as `save` does."""
    save(path, lambda half: half.write_bytes(content))


def refused(path: Path, error: OSError) -> FedsgcgError:
    """The error for a disk that refuses."""
    found, expected = (
        f"{type(error).__name__}: {error.strerror or error}",
        "a folder with room that can be written",
    )
    action = disk_advice(error, "choose another DIR.")
    return fail("MOD-808", where=str(path), found=found, expected=expected, action=action)


def _distinct(jobs: Sequence[Job]) -> list[Job]:
    """Give every job a name of its own: its folders' names come before one that several share, and then a number."""
    for depth in (1, 2):
        common = Counter(job.name.lower() for job in jobs)
        jobs = [
            replace(
                job,
                name="_".join([*job.image.absolute().parts[-1 - depth : -1], stem_of(job.image)]),
            )
            if common[job.name.lower()] > 1
            else job
            for job in jobs
        ]
    seen: Counter[str] = Counter()
    numbered = []
    for job in jobs:
        seen[job.name.lower()] += 1
        number = seen[job.name.lower()]
        numbered.append(replace(job, name=f"{job.name}_{number}") if number > 1 else job)
    return numbered
