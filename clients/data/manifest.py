"""Reads the table of cases, for `data.root/manifest.csv` and for `fedsgcg data prepare`.

Spreadsheet programs write CSV in many ways, all of which are read: commas, semicolons or tabs (also
with a first line `sep=;`), UTF-8 with or without a byte order mark or UTF-16, titles in any case
and order, empty rows at the end, backslashes in paths.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import fail
from fedsgcg.common.images.folders import is_file
from fedsgcg.common.settings.data import SPLITS

REQUIRED: Final = ("site", "image", "mask")
COLUMNS: Final = {
    "site": ("site", "hospital", "centre", "center", "institution"),
    "image": ("image", "img", "scan", "image_path"),
    "mask": ("mask", "label", "segmentation", "seg", "mask_path"),
    "patient_id": ("patient_id", "patient", "subject", "subject_id"),
    "split": ("split", "set", "part"),
}
"""Column -> accepted titles, in any case and order; other columns are ignored."""

STRUCTURE: Final = "mask_"
"""Start of the titles of columns with one mask file a structure, e.g. `mask_cup`.

They are other columns in a table that has a column for whole masks.
"""


@dataclass(frozen=True)
class Row:
    """One line of the table, with whitespace around cells removed.

    Attributes:
        line: Line number in the file; the title line is 1.
        site: Name of the hospital.
        image: Path of the image, with slashes.
        mask: Path of the mask, "" for none.
        patient: The patient's id, "" if there is none.
        split: `train`, `validation`, `test`, or "".
        structures: (name, path) of each column `mask_<name>` with a path, which is the mask of one
            structure.
        surplus: Cells beyond the last title, as caused by an unquoted comma.
    """

    line: int
    site: str
    image: str
    mask: str
    patient: str
    split: str
    surplus: tuple[str, ...] = ()
    structures: tuple[tuple[str, str], ...] = ()

    def mistakes(self) -> Iterator[tuple[str, str]]:
        """Yield (found, expected) for every mistake in the line; files are not checked."""
        if self.surplus:
            yield (
                f"more cells than titles: {', '.join(map(repr, self.surplus))}",
                "quotes around a cell with commas",
            )
        if not is_folder_name(self.site):
            yield f"site {self.site!r}", "a name without slashes that does not start with a dot"
        if not self.image:
            yield "no image", "a path relative to the data folder"
        if self.split not in ("", *SPLITS):
            yield f"split {self.split!r}", ", ".join(SPLITS) + " or nothing"


def read_manifest(table: Path) -> list[Row]:
    """Read the rows of a table; empty rows are skipped.

    Raises:
        FedsgcgError: DAT-101 for an unreadable table or a missing column.
    """
    lines = _cells(_text(table), table)
    titles = next((cells for _, cells in lines if any(cells)), [])
    structures = _structures(titles)
    needed = [name for name in REQUIRED if name != "mask" or not structures]
    place = _columns(titles, COLUMNS, needed, table)
    return [
        _row(number, cells, place, structures, len(titles), table.parent)
        for number, cells in lines
        if any(cells) and cells is not titles
    ]


def read_columns(
    table: Path, columns: Mapping[str, Sequence[str]], required: Sequence[str]
) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, column -> cell) of every row that is not empty.

    Args:
        table: A CSV file.
        columns: Column -> accepted titles, in lower case with underscores.
        required: Columns that must be there; the cells of others may be "".

    Raises:
        FedsgcgError: DAT-101 for an unreadable table or a missing column.
    """
    lines = _cells(_text(table), table)
    titles = next((cells for _, cells in lines if any(cells)), [])
    place = _columns(titles, columns, required, table)
    return [
        (number, {name: cells[at] if 0 <= at < len(cells) else "" for name, at in place.items()})
        for number, cells in lines
        if any(cells) and cells is not titles
    ]


def is_folder_name(name: str) -> bool:
    """Return whether a hospital's name can be the name of a folder."""
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
        line = content.count(10, 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02X} in line {line} is not UTF-8"
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
    """Return (line number, cells) of every line; the title line shows the separator."""
    first, _, rest = text.partition("\n")
    skipped = 0
    if first.strip().strip('"').lower().startswith("sep="):
        # Excel's separator hint is skipped; the title line shows the separator as well.
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
        raise fail(
            "DAT-101",
            found=f"{error}, line {reader.line_num + skipped}",
            expected="a CSV file",
            action="Close every quote, or save the table again.",
            where=str(table),
        ) from error
    return lines


def _columns(
    titles: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    needed: Sequence[str],
    table: Path,
) -> dict[str, int]:
    """Return the position of each column, -1 if it is missing.

    Raises:
        FedsgcgError: DAT-101 when a column is missing, or two have the same title.
    """
    names = [title.lower().replace(" ", "_") for title in titles]
    places = {
        column: next((names.index(name) for name in known if name in names), -1)
        for column, known in columns.items()
    }
    if missing := [column for column in needed if places[column] < 0]:
        shown = ", ".join(title for title in titles if title) or "none"
        found = f"columns {shown}: none for {', '.join(missing)}"
        expected = "columns " + ", ".join(REQUIRED if columns is COLUMNS else needed)
        action = f"Add {', '.join(missing)}."
        raise fail("DAT-101", found=found, expected=expected, action=action, where=str(table))
    used = [place for place in places.values() if place >= 0]
    if twice := [titles[place] for place in used if names.count(names[place]) > 1]:
        found, action = f"two columns called {', '.join(twice)}", "Remove one of them."
        raise fail(
            "DAT-101", found=found, expected="every title once", action=action, where=str(table)
        )
    return places


def _structures(titles: Sequence[str]) -> dict[str, int]:
    """Return structure -> position of its column of mask files; {} if a column has whole masks."""
    names = [title.lower().replace(" ", "_") for title in titles]
    if set(names) & set(COLUMNS["mask"]):
        return {}
    return {
        titles[place][len(STRUCTURE) :]: place
        for place, name in enumerate(names)
        if name.startswith(STRUCTURE) and name != STRUCTURE
    }


def _row(
    number: int,
    cells: Sequence[str],
    place: dict[str, int],
    structures: dict[str, int],
    width: int,
    folder: Path,
) -> Row:
    text = {column: cells[at] if 0 <= at < len(cells) else "" for column, at in place.items()}
    return Row(
        number,
        text["site"],
        _with_slashes(text["image"], folder),
        _with_slashes(text["mask"], folder),
        text["patient_id"],
        text["split"].lower(),
        tuple(cell for cell in cells[width:] if cell),
        tuple(
            (name, _with_slashes(cells[at], folder))
            for name, at in structures.items()
            if at < len(cells) and cells[at]
        ),
    )


def _with_slashes(path: str, folder: Path) -> str:
    """Replace the backslashes of a Windows path, unless a file of that exact name exists."""
    return path if "\\" not in path or is_file(folder / path) else path.replace("\\", "/")
