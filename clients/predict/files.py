"""The images to predict, the names of their results, and writing results atomically."""

from __future__ import annotations

import glob
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from fedsgcg.clients.data.case_files import discover_sites, open_site
from fedsgcg.clients.predict.outputs import mask_suffix, result_suffix
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.errors import disk_advice
from fedsgcg.common.images.dicom import is_picture
from fedsgcg.common.images.folders import Listing, by_format, counted_names, look_through, stem_of
from fedsgcg.common.images.layers import plain
from fedsgcg.common.names import number_of, printable
from fedsgcg.common.settings.plan import DataSettings

RESULT: Final = re.compile(
    r".*_(mask(_.*)?|segmentation|probability(_.*)?|confidence|overlay)", re.IGNORECASE
)
"""Names of masks and results, which are skipped in a folder of images."""

MAX_SHOWN: Final = 5


@dataclass(frozen=True)
class Job:
    """One image to predict.

    Attributes:
        image: The file, or the folder of a DICOM series.
        name: Path of its results relative to the output folder, without suffix.
        mask: Its true mask, None if it is not scored.
        site: Name of its hospital, "" for an image from the command line.
        case: Name of the case.
        structures: (name, mask file) if each structure has a mask file of its own.
        out: Key of `clients.predict.outputs.OUT_FORMATS`.
    """

    image: Path
    name: str
    mask: Path | None = None
    site: str = ""
    case: str = ""
    structures: tuple[tuple[str, Path], ...] = ()
    out: str = "same"

    @property
    def suffix(self) -> str:
        """Suffix of the mask."""
        return mask_suffix(self.image, self.out)

    @property
    def masks(self) -> tuple[Path, ...]:
        """The true mask's files: none, one, or one for each structure."""
        if self.structures:
            return tuple(path for _, path in self.structures)
        return () if self.mask is None else (self.mask,)

    @property
    def shown(self) -> str:
        """Name of the image on the console."""
        if self.site:
            return printable(f"{self.site} {self.case}")
        return printable(self.image.name)

    def result(self, folder: Path, ending: str) -> Path:
        """Return the path of one result; `ending` is `_mask`, `_overlay` and so on."""
        suffix = result_suffix(self.image, self.out, ending)
        return folder / f"{self.name}{ending}{suffix}"


@dataclass
class Skipped:
    """Files of the given folders that are not predicted.

    Attributes:
        results: Files that are masks or results by their names.
        folders: The listing of each folder.
    """

    results: list[Path] = field(default_factory=list)
    folders: list[Listing] = field(default_factory=list)

    def texts(self) -> list[str]:
        """Return one text for each reason, with advice on converting other formats."""
        texts = []
        if self.results:
            texts.append(counted_names(self.results, "file", "named like masks or results"))
        if foreign := [path for found in self.folders for path in found.foreign]:
            advice = " ".join(
                dict.fromkeys(text for found in self.folders for text in found.conversions())
            )
            formats = f"in unsupported formats ({by_format(foreign)})"
            texts.append(f"{counted_names(foreign, 'file', formats)}. {advice}")
        if ghosts := [path for found in self.folders for path in found.ghosts]:
            texts.append(counted_names(ghosts, "hidden file", "named like images"))
        texts += [
            f"{printable(str(path))} cannot be read ({why})"
            for found in self.folders
            for path, why in found.closed
        ]
        texts += [
            f"{printable(str(path))} links back to a parent folder"
            for found in self.folders
            for path in found.loops
        ]
        return texts


def jobs_of_images(
    images: Sequence[Path], jobs: Sequence[Job] = (), structures: Sequence[str] = ()
) -> tuple[list[Job], Skipped]:
    """Add jobs for the given images; folders are searched (`common.images.folders`).

    Args:
        images: Images and folders of them.
        jobs: Jobs that are there already.
        structures: The model's structures: `1_cup.png` next to `1.png`, and files of a folder
            `cup`, are masks.

    Returns:
        All jobs, with unique names, and the skipped files.

    Raises:
        FedsgcgError: MOD-809 for a path that does not exist, or when there is no image.
    """
    found, skipped = list(jobs), Skipped()
    for path in images:
        if _kind(path) == "folder":
            inside = look_through(path)
            skipped.folders.append(inside)
            images = _images_in(inside, path)
            named = {(image.parent, stem_of(image)) for image in images}
            masks = {
                image
                for image in images
                if _is_result(image, path) or _is_structure(image, path, named, structures)
            }
            kept = [image for image in images if image not in masks]
            skipped.results += [image for image in images if image in masks]
            found += [Job(image, _mirrored(image, path)) for image in kept]
        else:
            found.append(Job(path, stem_of(path)))
    if not found:
        where = ", ".join(map(str, images))
        nothing = "; ".join(["no image file", *skipped.texts()])
        raise fail("MOD-809", where=where, found=nothing, expected="volumes or pictures")
    return _distinct(found), skipped


def _images_in(inside: Listing, folder: Path) -> list[Path]:
    """Return the images of a folder: files, folders with a series, and pictures of DICOM."""
    images = list(inside.images)
    for place, files in inside.series.items():
        own = [file for file in files if not RESULT.fullmatch(stem_of(file))]
        if own and is_picture(own[0]):
            images += own
        elif own:
            images.append(place)
        images += [file for file in files if file not in own]
    return sorted(images)


def _is_result(image: Path, folder: Path) -> bool:
    """Whether an image, or a folder below `folder` that contains it, has the name of a mask."""
    if image == folder:
        return False
    above = [place.name for place in image.parents if place.is_relative_to(folder)][:-1]
    return any(RESULT.fullmatch(name) for name in (stem_of(image), *above))


def _is_structure(
    image: Path, folder: Path, named: Collection[tuple[Path, str]], structures: Sequence[str]
) -> bool:
    """Whether an image has the name of another one with a structure, or is in a structure's folder.

    Args:
        image: The image.
        folder: The folder that was given; its own name says nothing.
        named: (folder, name) of all images.
        structures: The model's structures.
    """
    known = {plain(name) for name in structures}
    if image.parent != folder and plain(image.parent.name) in known:
        return True
    stem = stem_of(image)
    return any(
        plain(stem[place:]) in known and (image.parent, stem[:place]) in named
        for place, char in enumerate(stem)
        if char in " _-."
    )


def _mirrored(image: Path, folder: Path) -> str:
    """Return the path of an image's results below the output folder, like its path in `folder`."""
    if image == folder:
        return stem_of(folder.absolute())
    return (image.parent.relative_to(folder) / stem_of(image)).as_posix()


def _kind(path: Path) -> str:
    """Return `folder` or `file`; raises MOD-809 for a missing or inaccessible path."""
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
        root: Folder with `manifest.csv` or one folder per hospital.
        data: The model's data settings.
        site: Name of the hospital, None for all.
        split: Only cases of this split in the manifest, None for all.

    Raises:
        FedsgcgError: DAT-101 or DAT-102 when the folder or the hospital cannot be used, MOD-809
            without a case.
    """
    jobs = []
    for name in [site] if site else discover_sites(root):
        for case in open_site(root, name, data).cases:
            if split is None or case.split == split:
                result = f"{name}/{Path(case.name).name or 'case'}"
                jobs.append(Job(case.image, result, case.mask, name, case.name, case.structures))
    if not jobs:
        found = f"no case of split {split}" if split else "no case"
        raise fail("MOD-809", where=str(root), found=found, expected="cases to predict")
    return jobs


def check_output(
    folder: Path,
    jobs: Sequence[Job],
    endings: Sequence[str],
    *,
    overwrite: bool,
    is_own: Callable[[Job], bool] = lambda job: False,
) -> None:
    """Check before any work that all results can be written without overwriting files.

    Args:
        folder: The output folder.
        jobs: The images.
        endings: Endings of the results, e.g. `_mask`.
        overwrite: Whether existing results may be replaced.
        is_own: Whether existing results of an image belong to the run that is resumed.

    Raises:
        FedsgcgError: MOD-808 for results that already exist, that would be outside the folder, or
            that would replace the images or masks.
    """
    for job in jobs:
        if ".." in Path(job.name).parts or Path(job.name).is_absolute():
            raise fail(
                "MOD-808",
                where=str(job.image),
                found=f"results called {job.name!r}",
                expected="a name inside the folder",
                action="Rename the image.",
            )
    inputs = {path.resolve() for job in jobs for path in (job.image, *job.masks)}
    targets = {
        path: job for job in jobs for ending in endings for path in _targets(folder, job, ending)
    }
    own = [path for path in targets if path.resolve() in inputs]
    existing = [
        path
        for path, job in targets.items()
        if not overwrite and os.path.lexists(path) and not is_own(job)
    ]
    problems = [
        Problem(
            "MOD-808",
            "one of the images or masks",
            "another folder for the results",
            "Choose another DIR.",
            str(path),
        )
        for path in own[:MAX_SHOWN]
    ]
    if existing and not own:
        found = f"{number_of(len(existing), 'result')} of an earlier call"
        action = (
            "Choose another DIR, replace them with --overwrite, or continue an interrupted run "
            "of the same model with --resume."
        )
        problems += [Problem("MOD-808", found, "a folder without them", action, str(existing[0]))]
    if problems:
        raise FedsgcgError(*problems)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


def _targets(folder: Path, job: Job, ending: str) -> list[Path]:
    """Return the paths of one kind of result; for a picture's probabilities those that exist."""
    if ending == "_probability" and job.suffix == ".png":
        place = folder / job.name
        return sorted(place.parent.glob(f"{glob.escape(place.name)}{ending}_*.png"))
    return [job.result(folder, ending)]


def save(path: Path, into: Callable[[Path], object]) -> None:
    """Write a file atomically, with a data file that its format puts next to it.

    A header refers to its data by name, so they are written under their final names in a folder of
    their own, and the header is moved last.

    Raises:
        FedsgcgError: MOD-808 when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
            into(Path(folder) / path.name)
            made = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
            for file in made:
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise write_error(path, error) from error


def write(path: Path, content: bytes) -> None:
    """Write bytes like `save`."""
    save(path, lambda temporary: temporary.write_bytes(content))


def write_error(path: Path, error: OSError) -> FedsgcgError:
    """Return MOD-808 for a file system error."""
    found = f"{type(error).__name__}: {error.strerror or error}"
    expected = "a writable folder with free space"
    action = disk_advice(error, "choose another DIR.")
    return fail("MOD-808", where=str(path), found=found, expected=expected, action=action)


def _distinct(jobs: Sequence[Job]) -> list[Job]:
    """Make names unique: prefix repeated names with folder names, then append numbers."""
    for depth in (1, 2):
        common = Counter(job.name.lower() for job in jobs)
        jobs = [_with_folders(job, depth) if common[job.name.lower()] > 1 else job for job in jobs]
    seen: Counter[str] = Counter()
    numbered = []
    for job in jobs:
        seen[job.name.lower()] += 1
        number = seen[job.name.lower()]
        unique = replace(job, name=f"{job.name}_{number}") if number > 1 else job
        numbered.append(unique)
    return numbered


def _with_folders(job: Job, depth: int) -> Job:
    """Prefix a job's name with the last `depth` folders of its image."""
    folders = job.image.absolute().parts[-1 - depth : -1]
    return replace(job, name="_".join([*folders, stem_of(job.image)]))
