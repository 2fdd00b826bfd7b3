"""Data that are nearly canonical already: own images by a CSV or one folder a hospital, and the two shared copies.

Every pair is read and checked (readable, finite, mask on its image, whole label values); good ones are copied.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from clients.site import SPLITS
from clients.slices import whole_label
from common.datasets import CATALOGUE
from common.errors import Problem, fail
from common.imaging import check_geometry, check_image, read_volume, suffix_of
from deploy.prepare.conversion import Found, Work, absent, image_files, take

COLUMNS: Final = {
    "site": ("site", "hospital", "centre", "center", "institution"),
    "image": ("image", "img", "scan", "image_path"),
    "mask": ("mask", "label", "segmentation", "seg", "mask_path"),
    "patient_id": ("patient_id", "patient", "subject", "subject_id"),
    "split": ("split", "set", "part"),
}
"""What a column means -> names it may have, in any case and order; other columns are passed over."""

MAX_LABELS: Final = 64
"""More different values than this in a mask: it is no label map."""


PIECES: Final = "; where every structure is in one piece, add largest_component: true (a second part is lost with it)"
"""What to say of post-processing, which is off unless the data settings ask for it."""


@dataclass(frozen=True)
class Line:
    """One case of a CSV or of a folder."""

    site: str
    image: Path
    mask: Path | None
    patient: str = ""
    split: str = ""
    name: str = ""


class Labels:
    """Label values seen in the masks of a data set, and those that are allowed (None = all whole numbers).

    Attributes:
        seen: Value -> number of masks that hold it.
        allowed: Values that a mask may hold.
    """

    def __init__(self, allowed: frozenset[int] | None) -> None:
        self.seen: Counter[int] = Counter()
        self.allowed = allowed

    def check(self, values: Sequence[float], where: str) -> None:
        """Take in the values of one mask; raises DAT-109 for values that are not allowed or no labels."""
        labels = {value: whole_label(value) for value in values}
        allowed = range(256) if self.allowed is None else self.allowed
        odd = [value for value, label in labels.items() if label not in allowed]
        if odd or len(values) > MAX_LABELS:
            found = "values " + ", ".join(f"{value:.9g}" for value in (odd or values)[:8])
            expected = "whole numbers from 0 to 255, one a class"
            if self.allowed is not None:
                expected = "values " + ", ".join(map(str, sorted(self.allowed)))
            raise fail("DAT-109", found=found, expected=expected, action="Correct the mask.", where=where)
        self.seen.update({label for label in labels.values() if label is not None})

    def advice(self) -> str:
        """Say how to declare the values in the data settings."""
        if not self.seen:
            return ""
        values = sorted(self.seen)
        groups = [f"{'background' if not value else f'class_{value}'}: [{value}]" for value in values]
        return f"label values {', '.join(map(str, values))}; declare them: classes: {{{', '.join(groups)}}}" + PIECES


def find(name: str, source: Path, *, link: bool) -> tuple[Found, Labels]:
    """List the cases of a CSV, of a folder with `manifest.csv`, or of one folder a hospital.

    Args:
        name: `promise12`, `spinegm`, or `manifest` for own data.
        source: CSV file or folder.
        link: Link to the files instead of copying them.

    Returns:
        The cases, and the label values that the conversion will have seen.

    Raises:
        FedsgcgError: DAT-120 when there is neither, saying what is needed.
    """
    table = source if source.is_file() else source / "manifest.csv"
    labels = Labels({"promise12": frozenset({0, 1}), "spinegm": frozenset({0, 1, 2})}.get(name))
    files = [] if source.is_file() else image_files(source)
    if table.is_file():
        found = Found(f"table {table}")
        lines = _from_table(name, table, found)
    else:
        found = Found(f"one folder a hospital below {source}")
        lines = _from_folders(files, source, found)
    if not lines:
        raise absent(name, source, f"{len(files)} image files, no table and no <site>/<case>_image.*")
    for line in _named(lines):
        gone = [path for path in (line.image, line.mask) if path is not None and not path.is_file()]
        for path in gone:
            found.missing(path, "such file")
        if gone:
            found.torn |= {path for path in (line.image, line.mask) if path is not None}
        else:
            found.work.append(_work(line, labels, link=link))
    if name in CATALOGUE or table.is_file():
        found.extras(files, lambda path: "preview" in str(path.relative_to(source)))
    return found, labels


def _from_table(name: str, table: Path, found: Found) -> list[Line]:
    rows = _rows(name, table)
    lines = []
    seen: set[tuple[str, str]] = set()
    for number, row in rows:
        where = f"{table}, line {number}"
        if wrong := _mistake(row):
            found.problems.append(Problem("DAT-125", *wrong, "Correct the line.", where))
        elif (row["site"], row["image"]) in seen:
            found.surplus(Path(where), "an image that an earlier line has")
        else:
            seen.add((row["site"], row["image"]))
            image, mask = table.parent / row["image"], table.parent / row["mask"] if row["mask"] else None
            lines.append(Line(row["site"], image, mask, row["patient_id"], row["split"]))
    return lines


def _rows(name: str, table: Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, meaning -> text) of a table whose columns come in any order and separator."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise absent(name, table, f"a table that cannot be read: {error}") from error
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
    known = _columns([title or "" for title in reader.fieldnames or []])
    if missing := [meaning for meaning in ("site", "image", "mask") if meaning not in known]:
        raise absent(name, table, f"columns {head.strip()!r}: none for {', '.join(missing)}")
    rows = []
    for row in reader:
        rows.append(
            (reader.line_num, {meaning: (row.get(known.get(meaning, "")) or "").strip() for meaning in COLUMNS})
        )
    return rows


def _columns(titles: Sequence[str]) -> dict[str, str]:
    """Return meaning -> title of the column."""
    by_word = {title.strip().lower().replace(" ", "_"): title for title in reversed(titles)}
    pairs = [(meaning, word) for meaning, words in COLUMNS.items() for word in reversed(words) if word in by_word]
    return {meaning: by_word[word] for meaning, word in pairs}


def _mistake(row: Mapping[str, str]) -> tuple[str, str] | None:
    """Return what was found and expected where a line cannot be used."""
    site = row["site"]
    if not site or site.startswith(".") or set(site) & set("/\\\0") or not site.isprintable():
        return f"site {site!r}", "a name without slashes that does not begin with a dot"
    if not row["image"]:
        return "no image", "a path"
    if row["split"] not in ("", *SPLITS):
        return f"split {row['split']!r}", ", ".join(SPLITS) + " or nothing"
    return None


def _from_folders(files: Sequence[Path], source: Path, found: Found) -> list[Line]:
    """List `<site>/<case>_image.*` with the `<case>_mask.*` beside it."""
    stems = {path.parent / path.name[: -len(suffix_of(path))]: path for path in files if path.parent.parent == source}
    lines, masks = [], set()
    for stem, path in stems.items():
        if stem.name.endswith("_image"):
            mask = stems.get(stem.with_name(stem.name.removesuffix("_image") + "_mask"))
            masks.add(mask)
            if mask is None:
                found.missing(path, "mask beside the image")
            lines.append(Line(path.parent.name, path, mask))
    if lines:
        for path in files:
            if path not in masks and path not in {line.image for line in lines}:
                found.surplus(path, "neither an image nor a mask of a case")
    return lines


def _named(lines: Sequence[Line]) -> list[Line]:
    """Give every case of a hospital a name of its own: its file's, with its folders' where several share one."""
    plain = [replace(line, name=_stem(line.image)) for line in lines]
    for depth in (1, 2):
        counts = Counter((line.site, line.name.lower()) for line in plain)
        plain = [
            replace(line, name="_".join([*line.image.parts[-1 - depth : -1], _stem(line.image)]))
            if counts[line.site, line.name.lower()] > 1
            else line
            for line in plain
        ]
    counts = Counter()
    numbered = []
    for line in plain:
        counts[line.site, line.name.lower()] += 1
        number = counts[line.site, line.name.lower()]
        numbered.append(replace(line, name=f"{line.name}_{number}") if number > 1 else line)
    return numbered


def _stem(path: Path) -> str:
    suffix = suffix_of(path)
    return (path.name[: -len(suffix)] if suffix else path.name).removesuffix("_image")


def _work(line: Line, labels: Labels, *, link: bool) -> Work:
    sources = (line.image,) if line.mask is None else (line.image, line.mask)
    suffixes = (suffix_of(line.image), suffix_of(line.mask) if line.mask else "")
    make = partial(_make, line, labels, link)
    patient = line.patient or f"{line.site}-{line.name}"
    return Work(line.site, line.name, sources, suffixes, make, patient=patient, split=line.split)


def _make(line: Line, labels: Labels, link: bool, to_image: Path, to_mask: Path) -> str:
    """Read and check the pair, then take both files as they are."""
    image = read_volume(line.image)
    check_image(image, str(line.image))
    if line.mask is not None:
        mask = read_volume(line.mask, mask=True)
        check_geometry(image, mask, str(line.image))
        labels.check(np.unique(mask.array).tolist(), str(line.mask))
        take(line.mask, to_mask, link=link)
    take(line.image, to_image, link=link)
    return "" if line.mask is not None else "no mask: not usable for training or evaluation"
