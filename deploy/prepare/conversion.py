"""Convert a data set case by case into a canonical folder, and report every problem.

The folder contains `<site>/<case>_image.*` and `<site>/<case>_mask.*` or one mask a structure
(`<case>_mask_<structure>.*`); an image of DICOM is a folder. It also contains `manifest.csv`,
`prepared.json` (the sources of each case, so that a second call converts only what changed) and
`prepared.txt` (a report for people). Files are written atomically, the manifest after all images.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from fedsgcg.common.console import Screen, counted, silent
from fedsgcg.common.datasets import CATALOGUE, fetch_advice
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files import atomic
from fedsgcg.common.files.errors import disk_advice
from fedsgcg.common.files.system import lock
from fedsgcg.common.images.folders import Listing, by_format, counted_names, look_through
from fedsgcg.common.names import number_of, printable

FORMAT: Final = 4
"""Raise it when a conversion changes, so that existing folders are converted again."""

RECORD: Final = "prepared.json"
REPORT: Final = "prepared.txt"
COLUMNS: Final = ("patient_id", "split", "published_split", "original")
"""Columns of the manifest after `site`, `image`, and `mask` or one `mask_<structure>` for each."""

FOLDER: Final = "/"
"""Suffix of a mask that is a folder with several DICOM segmentations."""

Make = Callable[..., str]
"""Writes the image and its masks to paths; returns a note for the user, "" for none."""


class Collector(Protocol):
    """Collects what the masks of all cases have; a case that is kept is not read again."""

    def take(self) -> dict[str, Any]:
        """Return what the case that was just converted has, as JSON."""

    def restore(self, record: Mapping[str, Any]) -> None:
        """Add what a case of an earlier call has."""


@dataclass(frozen=True)
class Work:
    """One case to convert.

    Attributes:
        site: Name of the site in the canonical form.
        case: Name of the case, unique within the site.
        sources: The files from which it is made.
        suffixes: Suffixes of the image, "" for a folder, and of the mask, "" for no mask, `FOLDER`
            for a folder.
        make: The conversion.
        patient: The patient's id.
        split: `train`, `validation`, `test`, or "" to split by the hash of the patient.
        published: Part of the published split, "" when there is none.
        structures: (name, suffix) of each mask, if every structure has a mask of its own.
        labels: Collects the label values of own data.
    """

    site: str
    case: str
    sources: tuple[Path, ...]
    suffixes: tuple[str, str]
    make: Make
    patient: str
    split: str = ""
    published: str = ""
    structures: tuple[tuple[str, str], ...] = ()
    labels: Collector | None = None

    @property
    def image(self) -> str:
        """Path of the image within the folder."""
        return f"{self.site}/{self.case}_image{self.suffixes[0]}"

    @property
    def masks(self) -> dict[str, str]:
        """Column of the manifest -> path of the mask within the folder; empty for no mask."""
        start = f"{self.site}/{self.case}_mask"
        if self.structures:
            return {f"mask_{name}": f"{start}_{name}{end}" for name, end in self.structures}
        end = "" if self.suffixes[1] == FOLDER else self.suffixes[1]
        return {"mask": f"{start}{end}"} if self.suffixes[1] else {}

    @property
    def outputs(self) -> list[str]:
        """Paths of the image and the masks within the folder."""
        return [self.image, *self.masks.values()]


@dataclass
class Found:
    """Contents of a source folder.

    Attributes:
        layout: Description of the recognised layout.
        work: Cases to convert.
        problems: Missing and surplus files.
        notes: Notes for the user.
        torn: Files of incomplete cases: neither used nor surplus.
        published: Whether it is a published data set, whose files are known.
    """

    layout: str
    work: list[Work] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    torn: set[Path] = field(default_factory=set)
    published: bool = True

    def missing(self, path: Path, why: str) -> None:
        """Record a missing file."""
        action = "Get the file again, or continue without the case."
        self.problems.append(
            Problem("DAT-122", f"no {why}", "the published file", action, str(path))
        )

    def surplus(self, path: Path, why: str) -> None:
        """Record a file that does not belong to the data set."""
        action = "The file is not used; remove it if it is there by mistake."
        self.problems.append(
            Problem("DAT-123", why, "only files of the data set", action, str(path))
        )

    def extras(
        self, files: Sequence[Path], known: Callable[[Path], bool] = lambda path: False
    ) -> None:
        """Record every image file that no case uses, except `known` files of another purpose."""
        used = {path for work in self.work for path in work.sources} | self.torn
        reported = {problem.where for problem in self.problems}
        for path in files:
            if path not in used and str(path) not in reported and not known(path):
                self.surplus(path, "an image file that belongs to no case")


@dataclass(frozen=True)
class Outcome:
    """Result of a conversion.

    Attributes:
        written: Cases converted in this call.
        kept: Cases that an earlier call had converted from the same files.
        counts: (site, published part) -> cases.
        problems: All problems, including files that could not be converted.
        notes: Notes for the user.
    """

    written: int
    kept: int
    counts: Mapping[tuple[str, str], int]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def convert(name: str, source: Path, folder: Path, found: Found, console: Screen) -> Outcome:
    """Convert every case that can be converted and write the manifest.

    Args:
        name: Name of the data set.
        source: The downloaded folder.
        folder: Output folder: new, empty, or made by an earlier call for the same data set.
        found: Contents of the source.
        console: Console for progress messages.

    Raises:
        FedsgcgError: DAT-121 for an output folder with other contents or in use, DAT-125 when no
            case could be converted, DAT-126 when the output cannot be written.
    """
    with claimed(folder, name, source) as before:
        problems = list(found.problems)
        notes = list(found.notes)
        done: dict[str, dict[str, Any]] = {}
        rows: list[Work] = []
        kept = 0
        try:
            for work in counted(found.work, console, f"converting {source.name}"):
                stamp = _stamp(work)
                earlier = before.get(work.image, {})
                if _is_done(folder, work, earlier, stamp):
                    done[work.image] = earlier
                    kept += 1
                    if work.labels is not None:
                        work.labels.restore(earlier.get("labels", {}))
                else:
                    try:
                        note = _made(folder, work)
                    except FedsgcgError as error:
                        problems += error.problems
                        if work.labels is not None:
                            work.labels.take()
                        continue
                    done[work.image] = {"stamp": stamp, "files": work.outputs, "note": note}
                    if work.labels is not None:
                        done[work.image]["labels"] = work.labels.take()
                rows.append(work)
        finally:  # an interrupted call also records what it has made
            record = _record(name, source, {**before, **done})
            write_file(folder / RECORD, json.dumps(record, indent=1).encode())
        if not rows:
            raise FedsgcgError(
                Problem("DAT-125", "no usable case", "at least one", where=str(source)), *problems
            )
        _remove_stale(folder, before, done)
        write_file(folder / "manifest.csv", _manifest(rows, source))
        counts = Counter((work.site, work.published) for work in rows)
        problems += miscounts(name, counts)
        for work in rows:
            if note := done[work.image].get("note", ""):
                notes.append(f"{work.site} {work.case}: {note}")
        outcome = Outcome(len(rows) - kept, kept, counts, tuple(problems), tuple(notes))
        write_file(folder / REPORT, _report(name, source, found, outcome).encode())
        write_file(folder / RECORD, json.dumps(_record(name, source, done), indent=1).encode())
    return outcome


def image_files(source: Path, found: Found) -> list[Path]:
    """Return all image files in a folder, sorted; DICOM is a problem, as in `search` the others."""
    listing = search(source, found)
    if listing.series:
        names = counted_names(listing.series, "folder", "of DICOM files")
        advice = "Download the files that the data set is published with."
        found.problems.append(Problem("DAT-119", names, "one file a case", advice, str(source)))
    return listing.images


def search(source: Path, found: Found, step: Callable[[str], None] = silent) -> Listing:
    """Return the images in a folder, and record in `found` what else looks like one.

    Files of an unsupported format are a problem for own data, where a hospital may have no others.
    For a published data set, whose files are known, they are only a note.

    Args:
        source: The folder.
        found: Collects problems and notes.
        step: Called with what is done.
    """
    listing = look_through(source, step=step)
    if listing.foreign:
        names = counted_names(
            listing.foreign,
            "file",
            f"of formats that are not read ({by_format(listing.foreign)})",
        )
        advice = " ".join(listing.conversions())
        if found.published:
            found.notes.append(f"{names}. {advice}")
        else:
            found.problems.append(
                Problem("DAT-119", names, "NIfTI or 2-D pictures", advice, str(source))
            )
    if listing.ghosts:
        found.notes.append(
            counted_names(listing.ghosts, "hidden file", "named like images, skipped")
        )
    for folder, why in listing.closed:
        action = "Give this user permission to read it, then call again."
        found.problems.append(
            Problem("DAT-122", f"a folder that cannot be read: {why}", "", action, str(folder))
        )
    for folder in listing.loops:
        found.problems.append(
            Problem("DAT-123", "a folder that leads back into itself", "", "", str(folder))
        )
    return listing


def absent(name: str, source: Path | None, found: str) -> FedsgcgError:
    """Return the error for a data set that was not found; it says what to download."""
    expected = "a CSV file or one folder per hospital"
    if name in CATALOGUE:
        expected = "\n    ".join(CATALOGUE[name].layouts)
    return fail(
        "DAT-120",
        where=str(source or name),
        found=found,
        expected=expected,
        action=fetch_advice(name),
    )


@contextmanager
def claimed(folder: Path, name: str, source: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """Lock an output folder and yield what an earlier call made there.

    Raises:
        FedsgcgError: DAT-121 when the folder has other contents, overlaps the source or is in use;
            DAT-126 when it cannot be made; CFG-008 when its file system offers no locks.
    """
    before = _earlier(folder, name, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".prepare.lock").open("a")
    except OSError as error:
        raise _refused(folder, error) from error
    with handle:
        try:
            free = lock(handle, action="Choose a folder on a local disk with -o.")
        except OSError as error:
            raise _refused(folder, error) from error
        if not free:
            action = "Wait for the other call, then call again."
            raise fail(
                "DAT-121", where=str(folder), found="another call is writing to it", action=action
            )
        if not (folder / RECORD).exists():
            # Marks the folder as made by fedsgcg, so that an interrupted call can be repeated.
            write_file(folder / RECORD, json.dumps(_record(name, source, {})).encode())
        yield before


def _earlier(folder: Path, name: str, source: Path) -> dict[str, dict[str, Any]]:
    """Return what an earlier call recorded; a folder with other contents is an error (DAT-121)."""
    here, there = folder.resolve(), source.resolve()
    action = "Choose another folder with -o."
    if here == there or there in here.parents or here in there.parents:
        expected = "a folder outside the source"
        raise fail(
            "DAT-121",
            where=str(folder),
            found=f"it overlaps {source}",
            expected=expected,
            action=action,
        )
    if not folder.exists() or (
        folder.is_dir() and not [path for path in folder.iterdir() if path.name != ".prepare.lock"]
    ):
        return {}
    try:
        record = json.loads((folder / RECORD).read_text())
        made = str(record["dataset"])
        files = dict(record["files"]) if record["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = "a file" if folder.is_file() else "files that fedsgcg did not prepare"
        expected = "a new or empty folder"
        raise fail(
            "DAT-121", where=str(folder), found=found, expected=expected, action=action
        ) from error
    if made != name:
        raise fail(
            "DAT-121",
            where=str(folder),
            found=f"data set {made}",
            expected=f"data set {name}",
            action=action,
        )
    return files


def _record(name: str, source: Path, files: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dataset": name,
        "format": FORMAT,
        "source": str(source.resolve()),
        "files": dict(files),
    }


def _stamp(work: Work) -> str:
    """Return what a converted case depends on: path, size and modification time of its files."""
    facts = []
    for path in work.sources:
        try:
            status = path.stat()
            facts.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        except OSError:  # reported when the file is read
            facts.append([str(path), 0, 0])
    return json.dumps(facts)


def _is_done(folder: Path, work: Work, before: Mapping[str, Any], stamp: str) -> bool:
    same = before.get("stamp") == stamp and before.get("files") == work.outputs
    return same and all((folder / name).exists() for name in work.outputs)


def _made(folder: Path, work: Work) -> str:
    """Convert one case; its files get their final names when all are complete."""
    paths = [folder / name for name in work.outputs]
    partial_files = [path.with_name(f".{os.getpid()}.{path.name}") for path in paths]
    try:
        paths[0].parent.mkdir(exist_ok=True)
        note = work.make(*partial_files)
        for partial_file, path in zip(partial_files, paths, strict=True):
            if path.is_dir():
                _remove(path)  # a folder does not replace another one
            partial_file.replace(path)
        return note
    except OSError as error:
        raise _refused(paths[0], error) from error
    finally:
        for partial_file in partial_files:
            _remove(partial_file)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_stale(
    folder: Path, before: Mapping[str, Mapping[str, Any]], done: Mapping[str, Mapping[str, Any]]
) -> None:
    """Remove files that an earlier call made and this one does not list."""
    wanted = {name for facts in done.values() for name in facts["files"]}
    for facts in before.values():
        for name in facts["files"]:
            if name not in wanted:
                _remove(folder / name)


def _manifest(rows: Sequence[Work], source: Path) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    masks = list(dict.fromkeys(title for work in rows for title in work.masks)) or ["mask"]
    writer.writerow(["site", "image", *masks, *COLUMNS])
    for work in sorted(rows, key=lambda row: (row.site, row.case)):
        original = work.sources[0]
        place = original.relative_to(source) if original.is_relative_to(source) else original
        writer.writerow(
            [
                work.site,
                work.image,
                *(work.masks.get(title, "") for title in masks),
                work.patient,
                work.split,
                work.published,
                printable(place.as_posix()),
            ]
        )
    return sink.getvalue().encode()


def miscounts(name: str, counts: Mapping[tuple[str, str], int]) -> Iterator[Problem]:
    """Compare the converted cases with the published numbers."""
    data_set = CATALOGUE.get(name)
    if data_set is None:
        return
    for hospital in data_set.hospitals:
        parts = {"": hospital.train}
        if hospital.test:
            parts = {"train": hospital.train, "test": hospital.test}
        for part, wanted in parts.items():
            if (got := counts.get((hospital.name, part), 0)) != wanted:
                where = f"{hospital.name} ({hospital.source})"
                if part:
                    where += f", {part}"
                expected = f"{number_of(wanted, 'case')} ({data_set.counted})"
                action = (
                    "See the missing, surplus and unusable files. "
                    "Results are not comparable with published ones."
                )
                yield Problem("DAT-124", number_of(got, "case"), expected, action, where)


def _report(name: str, source: Path, found: Found, outcome: Outcome) -> str:
    data_set = CATALOGUE.get(name)
    lines = [
        f"data set: {name}",
        f"source: {printable(str(source))}",
        f"layout: {printable(found.layout)}",
    ]
    if data_set:
        lines += [f"terms: {data_set.terms}", f"cite: {data_set.cite}"]
    lines += ["", "cases:"]
    for (site, part), count in sorted(outcome.counts.items()):
        lines.append(f"  {site} {part}".rstrip() + f": {count}")
    if outcome.notes:
        lines += ["", *(f"note: {note}" for note in outcome.notes)]
    lines += ["", *(str(problem) for problem in outcome.problems)]
    if not outcome.problems:
        lines.append("no problems")
    return "\n".join(lines) + "\n"


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically; raises DAT-126."""
    try:
        atomic.write_file(path, content)
    except OSError as error:
        raise _refused(path, error) from error


def copy_or_link(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file that needs no change, or link to it."""
    if link:
        target.symlink_to(source.resolve())
    else:
        shutil.copyfile(source, target)


def _refused(path: Path, error: OSError) -> FedsgcgError:
    found = f"{type(error).__name__}: {error.strerror or error}"
    action = disk_advice(error, "choose another folder with -o.")
    return fail(
        "DAT-126",
        where=str(path),
        found=found,
        expected="a writable folder",
        action=action,
    )
