"""The table of cases that hospitals write: one reader for `data.root/manifest.csv` and for `fedsgcg data prepare`.

Spreadsheets write it in many ways: commas, semicolons or tabs (also with a first line `sep=;`), UTF-8 with or without a
byte order mark or UTF-16, titles in any case and order, empty rows at the end, backslashes in paths. All are read.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import fail
from common.images.folders import is_file

SPLITS: Final = ("train", "validation", "test")
NEEDED: Final = ("site", "image", "mask")
COLUMNS: Final = {
    "site": ("site", "hospital", "centre", "center", "institution"),
    "image": ("image", "img", "scan", "image_path"),
    "mask": ("mask", "label", "segmentation", "seg", "mask_path"),
    "patient_id": ("patient_id", "patient", "subject", "subject_id"),
    "split": ("split", "set", "part"),
}
"""What a column means -> titles it may have, in any case and order; other columns are passed over."""


@dataclass(frozen=True)
class Row:
    """One line of the table, blanks around its cells removed.

    Attributes:
        line: Its number in the file, the title line being 1.
        site: Name of the hospital.
        image: Path of the image, with slashes.
        mask: Path of the mask, "" for none.
        patient: The patient's id, "" where there is none.
        split: `train`, `validation`, `test`, or "".
        surplus: Cells beyond the last title; a comma within a cell without quotes makes them.
    """

    line: int
    site: str
    image: str
    mask: str
    patient: str
    split: str
    surplus: tuple[str, ...] = ()

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """Yield (found, expected) for everything that makes the line unusable, wherever its files are."""
        if self.surplus:
            yield (
                f"more cells than titles: {', '.join(map(repr, self.surplus))}",
                "quotes around a cell with commas",
            )
        if not is_folder_name(self.site):
            yield f"site {self.site!r}", "a name without slashes that does not begin with a dot"
        if not self.image:
            yield "no image", "a path relative to the data folder"
        if self.split not in ("", *SPLITS):
            yield f"split {self.split!r}", ", ".join(SPLITS) + " or nothing"


def read_manifest(table: Path) -> list[Row]:
    """Read the rows of a table; empty ones are passed over.

    Raises:
        FedsgcgError: DAT-101 for a table that cannot be read or lacks a column.
    """
    lines = _cells(_text(table), table)
    titles = next((cells for _, cells in lines if any(cells)), [])
    place = _columns(titles, table)
    return [
        _row(number, cells, place, len(titles), table.parent)
        for number, cells in lines
        if any(cells) and cells is not titles
    ]


def is_folder_name(name: str) -> bool:
    """Whether a hospital's name can be the name of a folder."""
    return (
        bool(name)
        and not name.startswith(".")
        and not any(char in name for char in "/\\\0")
        and name.isprintable()
    )


def _text(table: Path) -> str:
    try:
        content = table.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02X} in line {content.count(10, 0, error.start) + 1} is not UTF-8"
        action = "Save it again as 'CSV UTF-8'."
        raise fail(
            "DAT-101", found=found, expected="a CSV file in UTF-8", action=action, where=str(table)
        ) from error
    except OSError as error:
        found = f"{type(error).__name__}: {error.strerror or error}"
        raise fail(
            "DAT-101", found=found, expected="a CSV file in UTF-8", where=str(table)
        ) from error


def _cells(text: str, table: Path) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of every line, with the separator that the title line has most of."""
    first, _, rest = text.partition("\n")
    skipped = 0
    if (
        first.strip().strip('"').lower().startswith("sep=")
    ):  # Excel's own hint; the titles say it as well
        text, skipped = rest, 1
    head = next((line for line in text.splitlines() if line.strip(",;\t \r")), "")
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True
    )
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            lines.append((reader.line_num + skipped, [cell.strip() for cell in cells]))
    except csv.Error as error:
        found, action = (
            f"{error}, line {reader.line_num + skipped}",
            "Close every quote, or save the table again.",
        )
        raise fail(
            "DAT-101", found=found, expected="a CSV file", action=action, where=str(table)
        ) from error
    return lines


def _columns(titles: Sequence[str], table: Path) -> dict[str, int]:
    """Return meaning -> position of the column.

    Raises:
        FedsgcgError: DAT-101 when a column is missing, or two have the same title.
    """
    words = [title.lower().replace(" ", "_") for title in titles]
    places = {
        meaning: next((words.index(word) for word in known if word in words), -1)
        for meaning, known in COLUMNS.items()
    }
    shown = "columns " + (", ".join(title for title in titles if title) or "none")
    if missing := [meaning for meaning in NEEDED if places[meaning] < 0]:
        found, expected = f"{shown}: none for {', '.join(missing)}", "columns " + ", ".join(NEEDED)
        action = f"Add {', '.join(missing)}."
        raise fail("DAT-101", found=found, expected=expected, action=action, where=str(table))
    if twice := [
        titles[place] for place in places.values() if place >= 0 and words.count(words[place]) > 1
    ]:
        found, action = f"two columns called {', '.join(twice)}", "Take one of them out."
        raise fail(
            "DAT-101", found=found, expected="every title once", action=action, where=str(table)
        )
    return places


def _row(number: int, cells: Sequence[str], place: dict[str, int], width: int, folder: Path) -> Row:
    text = {meaning: cells[at] if 0 <= at < len(cells) else "" for meaning, at in place.items()}
    return Row(
        number,
        text["site"],
        _with_slashes(text["image"], folder),
        _with_slashes(text["mask"], folder),
        text["patient_id"],
        text["split"].lower(),
        tuple(cell for cell in cells[width:] if cell),
    )


def _with_slashes(path: str, folder: Path) -> str:
    """Return a path as Windows writes it with slashes, unless there is a file that really has a backslash."""
    return path if "\\" not in path or is_file(folder / path) else path.replace("\\", "/")
