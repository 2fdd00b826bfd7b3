"""One way for every data set: convert case by case into a canonical folder, tell everything that is wrong.

The folder holds `<site>/<case>_image.*` and `<site>/<case>_mask.*`, `manifest.csv`, `prepared.json` (what was made from
what, so that a second call does only what changed) and `prepared.txt` (for people). Files appear whole or not at all,
the manifest last.
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
from typing import Any, Final

from common.console import Screen, counted
from common.datasets import CATALOGUE, fetch_advice
from common.errors import FedsgcgError, Problem, fail
from common.files.errors import disk_advice
from common.files.system import lock
from common.images.folders import by_format, counted_names, look_through
from common.names import printable

FORMAT: Final = 2
"""Raise it when a conversion changes, so that folders made before are made anew."""

RECORD: Final = "prepared.json"
REPORT: Final = "prepared.txt"
COLUMNS: Final = ("site", "image", "mask", "patient_id", "split", "published_split", "original")

Make = Callable[[Path, Path], str]
"""Writes image and mask to two paths; returns a note for people, "" for none."""


@dataclass(frozen=True)
class Work:
    """One case to convert.

    Attributes:
        site: Name of the hospital in the canonical form.
        case: Name of the case, unique within the hospital.
        sources: The files it is made of.
        suffixes: Suffix of the image and of the mask that `make` writes; the mask's is "" when there is none.
        make: The conversion.
        patient: The patient's id.
        split: `train`, `validation`, `test`, or "" for the hash of the patient.
        published: Part of the published split, "" when there is none.
    """

    site: str
    case: str
    sources: tuple[Path, ...]
    suffixes: tuple[str, str]
    make: Make
    patient: str
    split: str = ""
    published: str = ""

    @property
    def image(self) -> str:
        """Path of the image within the folder."""
        return f"{self.site}/{self.case}_image{self.suffixes[0]}"

    @property
    def mask(self) -> str:
        """Path of the mask within the folder, "" for none."""
        return f"{self.site}/{self.case}_mask{self.suffixes[1]}" if self.suffixes[1] else ""


@dataclass
class Found:
    """What a downloaded folder holds.

    Attributes:
        layout: The layout that was recognised, in words.
        work: Cases to convert.
        problems: Missing and extra files.
        notes: What a reader should know.
        torn: Files of a case that lacks another one: neither used nor surplus.
        published: Whether it is a published data set, whose files are known.
    """

    layout: str
    work: list[Work] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    torn: set[Path] = field(default_factory=set)
    published: bool = True

    def missing(self, path: Path, why: str) -> None:
        """Note a file that should be there."""
        action = "Get the file again, or go on without the case."
        self.problems.append(
            Problem("DAT-122", f"no {why}", "the published file", action, str(path))
        )

    def surplus(self, path: Path, why: str) -> None:
        """Note a file that has no place in the data set."""
        action = "It is left out; take it away if it came there by mistake."
        self.problems.append(
            Problem("DAT-123", why, "only files of the data set", action, str(path))
        )

    def extras(
        self, files: Sequence[Path], known: Callable[[Path], bool] = lambda path: False
    ) -> None:
        """Note every image file that no case uses and that is not `known` to have a purpose of its own."""
        used = {path for work in self.work for path in work.sources} | self.torn
        told = {problem.where for problem in self.problems}
        for path in files:
            if path not in used and str(path) not in told and not known(path):
                self.surplus(path, "an image file that belongs to no case")


@dataclass(frozen=True)
class Outcome:
    """What was done.

    Attributes:
        written: Cases converted in this call.
        kept: Cases that an earlier call had converted from the same files.
        counts: (site, published part) -> cases.
        problems: Everything that is wrong, files that could not be converted included.
        notes: What a reader should know.
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
        folder: Where the canonical form goes; empty, new, or made by an earlier call for the same data set.
        found: What the source holds.
        console: Where progress is shown.

    Raises:
        FedsgcgError: DAT-121 for a folder that holds something else or is in use, DAT-125 when no case could be
            converted, DAT-126 when the disk refuses.
    """
    with claimed(folder, name, source) as before:
        problems, notes = list(found.problems), list(found.notes)
        done: dict[str, dict[str, str]] = {}
        rows: list[Work] = []
        kept = 0
        try:
            for work in counted(found.work, console, f"converting {name}"):
                stamp = _stamp(work)
                earlier = before.get(work.image, {})
                if _is_done(folder, work, earlier, stamp):
                    done[work.image], kept = earlier, kept + 1
                else:
                    try:
                        note = _made(folder, work)
                    except FedsgcgError as error:
                        problems += error.problems
                        continue
                    done[work.image] = {"stamp": stamp, "mask": work.mask, "note": note}
                rows.append(work)
        finally:  # also an interrupted call leaves a record of what it made
            _write(
                folder / RECORD,
                json.dumps(_record(name, source, {**before, **done}), indent=1).encode(),
            )
        if not rows:
            raise FedsgcgError(
                Problem("DAT-125", "no usable case", "at least one", where=str(source)), *problems
            )
        _forget(folder, before, done)
        _write(folder / "manifest.csv", _manifest(rows, source))
        counts = Counter((work.site, work.published) for work in rows)
        problems += _miscounts(name, counts)
        told = ((work, done[work.image].get("note", "")) for work in rows)
        notes += [f"{work.site} {work.case}: {note}" for work, note in told if note]
        outcome = Outcome(len(rows) - kept, kept, counts, tuple(problems), tuple(notes))
        _write(folder / REPORT, _report(name, source, found, outcome).encode())
        _write(folder / RECORD, json.dumps(_record(name, source, done), indent=1).encode())
    return outcome


def image_files(source: Path, found: Found) -> list[Path]:
    """Return all image files below a folder, sorted, and note in `found` what else looks like an image there.

    Another format may be all that a hospital of own data has, so it is a problem there; beside a published data set,
    whose files are known, it is worth a note.
    """
    listing = look_through(source)
    if listing.foreign:
        said = counted_names(
            listing.foreign, f"files of formats that are not read ({by_format(listing.foreign)})"
        )
        advice = " ".join(listing.conversions())
        if found.published:
            found.notes.append(f"{said}. {advice}")
        else:
            found.problems.append(
                Problem("DAT-119", said, "NIfTI or 2-D pictures", advice, str(source))
            )
    if listing.ghosts:
        found.notes.append(
            counted_names(listing.ghosts, "hidden files called like images are passed over")
        )
    for folder, why in listing.closed:
        action = "Give this user the right to read it, then call again."
        found.problems.append(
            Problem("DAT-122", f"no way into the folder: {why}", "", action, str(folder))
        )
    for folder in listing.loops:
        found.problems.append(
            Problem("DAT-123", "a folder that leads back into itself", "", "", str(folder))
        )
    return listing.images


def absent(name: str, source: Path | None, found: str) -> FedsgcgError:
    """Return the error for a data set that is not where it was looked for; it says what to fetch."""
    expected = (
        "\n    ".join(CATALOGUE[name].layouts)
        if name in CATALOGUE
        else "a CSV file or one folder a hospital"
    )
    return fail(
        "DAT-120",
        where=str(source or name),
        found=found,
        expected=expected,
        action=fetch_advice(name),
    )


@contextmanager
def claimed(folder: Path, name: str, source: Path) -> Iterator[dict[str, dict[str, str]]]:
    """Hold an output folder for one call and yield what an earlier call had made there.

    Raises:
        FedsgcgError: DAT-121 when the folder holds something else, overlaps the source or is in use; DAT-126 when it
            cannot be made; CFG-008 where its file system offers no locks.
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
        if not (folder / RECORD).exists():  # from now on an interrupted call is known to be ours
            _write(folder / RECORD, json.dumps(_record(name, source, {})).encode())
        yield before


def _earlier(folder: Path, name: str, source: Path) -> dict[str, dict[str, str]]:
    """Return what an earlier call recorded; refuse a folder that is not ours to write to."""
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
    """What the converted case depends on: place, size and time of change of its files."""
    facts = []
    for path in work.sources:
        try:
            status = path.stat()
            facts.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        except OSError:  # it is told when the file is read
            facts.append([str(path), 0, 0])
    return json.dumps(facts)


def _is_done(folder: Path, work: Work, before: Mapping[str, str], stamp: str) -> bool:
    same = before.get("stamp") == stamp and before.get("mask") == work.mask
    return same and all((folder / name).is_file() for name in (work.image, work.mask) if name)


def _made(folder: Path, work: Work) -> str:
    """Convert one case; its two files get their names when both are complete."""
    image, mask = folder / work.image, folder / (work.mask or f"{work.image}.none")
    halves = [path.with_name(f".{os.getpid()}.{path.name}") for path in (image, mask)]
    try:
        image.parent.mkdir(exist_ok=True)
        note = work.make(*halves)
        for half, path in zip(halves, (image, mask), strict=True):
            if half.exists():
                half.replace(path)
        return note
    except OSError as error:
        raise _refused(image, error) from error
    finally:
        for half in halves:
            half.unlink(missing_ok=True)


def _forget(
    folder: Path, before: Mapping[str, Mapping[str, str]], done: Mapping[str, Mapping[str, str]]
) -> None:
    """Remove what an earlier call made and this one no longer lists."""
    wanted = {name for image, facts in done.items() for name in (image, facts["mask"])}
    for image, facts in before.items():
        for name in (image, facts.get("mask", "")):
            if name and name not in wanted:
                (folder / name).unlink(missing_ok=True)


def _manifest(rows: Sequence[Work], source: Path) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(COLUMNS)
    for work in sorted(rows, key=lambda row: (row.site, row.case)):
        original = work.sources[0]
        place = original.relative_to(source) if original.is_relative_to(source) else original
        writer.writerow(
            [
                work.site,
                work.image,
                work.mask,
                work.patient,
                work.split,
                work.published,
                printable(place.as_posix()),
            ]
        )
    return sink.getvalue().encode()


def _miscounts(name: str, counts: Mapping[tuple[str, str], int]) -> Iterator[Problem]:
    """Compare the converted cases with the published numbers."""
    data_set = CATALOGUE.get(name)
    if data_set is None:
        return
    for hospital in data_set.hospitals:
        parts = (
            {"train": hospital.train, "test": hospital.test}
            if hospital.test
            else {"": hospital.train}
        )
        for part, wanted in parts.items():
            if (got := counts.get((hospital.name, part), 0)) != wanted:
                where = f"{hospital.name} ({hospital.source})" + (f", {part}" if part else "")
                expected = f"{wanted} cases ({data_set.counted})"
                action = "See the missing, extra and unusable files. Results are not comparable with published ones."
                yield Problem("DAT-124", f"{got} cases", expected, action, where)


def _report(name: str, source: Path, found: Found, outcome: Outcome) -> str:
    data_set = CATALOGUE.get(name)
    lines = [
        f"data set: {name}",
        f"source: {printable(str(source))}",
        f"layout: {printable(found.layout)}",
    ]
    lines += [f"terms: {data_set.terms}", f"cite: {data_set.cite}"] if data_set else []
    lines += ["", "cases:"]
    lines += [
        f"  {site} {part}".rstrip() + f": {count}"
        for (site, part), count in sorted(outcome.counts.items())
    ]
    lines += ["", *(f"note: {note}" for note in outcome.notes)] if outcome.notes else []
    lines += (
        ["", *(str(problem) for problem in outcome.problems)]
        if outcome.problems
        else ["", "nothing is wrong"]
    )
    return "\n".join(lines) + "\n"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
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
        expected="a folder that can be written",
        action=action,
    )
