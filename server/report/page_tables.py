"""The tables of the page for other programs: as CSV and as LaTeX, as the page shows them.

They are read from the page itself, so that a number of a file is one of the page. Measurements
with all digits are in `results.parquet` and in `tables/summary.csv`.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

from fedsgcg.common.files.disk import Disk, refusals
from fedsgcg.server.report.export import FOLDER, escaped

VOID: Final = {"br", "img", "input", "link", "meta", "source"}
SIGNS: Final = {
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "…": r"\ldots{}",
    "≥": r"$\geq$",
    "Σ": r"$\Sigma$",
}


@dataclass
class PageTable:
    """A table of the page.

    Attributes:
        name: Name of its files, without the extension.
        caption: Its caption.
        heads: Heads of the columns.
        rows: Cells of each row.
        groups: Title of the group of each row, "" if the table has none.
    """

    name: str
    caption: str = ""
    heads: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def csv(self) -> bytes:
        """Return the table as CSV in UTF-8, with the group as first column if there are groups."""
        grouped = any(self.groups)
        sink = io.StringIO()
        table = csv.writer(sink, lineterminator="\n")
        table.writerow([*(["Group"] if grouped else []), *map(_harmless, self.heads)])
        for group, cells in zip(self.groups, self.rows, strict=True):
            table.writerow(map(_harmless, [*([group] if grouped else []), *cells]))
        return sink.getvalue().encode()

    def latex(self) -> bytes:
        """Return the table in LaTeX (package `booktabs`)."""
        width = max([len(self.heads), *map(len, self.rows)], default=0)
        lines = [
            f"% {self.caption}",
            rf"\begin{{tabular}}{{{'l' * width}}}",
            r"\toprule",
            " & ".join(map(_latex, self.heads)) + r" \\",
        ]
        if not any(self.groups):
            lines.append(r"\midrule")
        last = ""
        for group, cells in zip(self.groups, self.rows, strict=True):
            if group != last:
                lines.append(r"\midrule")
                lines.append(rf"\multicolumn{{{width}}}{{l}}{{{_latex(group)}}} \\")
                last = group
            lines.append(" & ".join(map(_latex, cells)) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""]).encode()


class _Reader(HTMLParser):
    """Collects the tables that have `data-file`.

    Parts of a cell in `small` follow its text in parentheses. What is drawn, and what is marked
    with `data-page-only`, is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[PageTable] = []
        self._open: list[str] = []
        self._table: PageTable | None = None
        self._cells: list[str] = []
        self._parts: list[tuple[str, bool]] = []
        self._group = ""
        self._is_group = False
        self._is_caption = False
        self._in_cell = False
        self._in_head = False
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if self._hidden:
            self._hidden += tag not in VOID
            return
        if tag == "table" and found.get("data-file"):
            self._table = PageTable(str(found["data-file"]))
            self.tables.append(self._table)
        elif self._table is None:
            return
        elif tag == "svg" or "data-page-only" in found:
            self._hidden = 1
        elif tag == "caption":
            self._is_caption = True
        elif tag in ("thead", "tbody"):
            self._in_head, self._group = tag == "thead", ""
        elif tag == "tr":
            self._cells, self._is_group = [], "group" in (found.get("class") or "").split()
        elif tag in ("th", "td"):
            self._in_cell, self._parts = True, []
        elif tag in ("small", "div") and self._in_cell:
            self._parts.append(("", tag == "small"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing: an element without content."""

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._hidden -= 1
            return
        table = self._table
        if table is None:
            return
        if tag == "table":
            self._table = None
        elif tag == "caption":
            self._is_caption = False
        elif tag in ("th", "td"):
            self._in_cell = False
            self._cells.append(_joined(self._parts))
        elif tag == "small" and self._in_cell:
            self._parts.append(("", False))
        elif tag == "tr" and self._is_group:
            self._group = " ".join(self._cells)
        elif tag == "tr" and self._in_head:
            table.heads = self._cells
        elif tag == "tr":
            table.rows.append(self._cells)
            table.groups.append(self._group)

    def handle_data(self, data: str) -> None:
        if self._table is None or self._hidden:
            return
        if self._is_caption:
            self._table.caption = " ".join(f"{self._table.caption} {data}".split())
        elif self._in_cell:
            if not self._parts:
                self._parts.append(("", False))
            text, small = self._parts[-1]
            self._parts[-1] = (text + data, small)


def page_tables(html: str) -> list[PageTable]:
    """Return the tables of a page that have files."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.tables


def write_page_tables(study: Path, html: str, disk: Disk) -> None:
    """Write each table of the page as CSV and LaTeX into the folder `tables` of a study.

    Raises:
        FedsgcgError: SRV-401 when the folder cannot be written.
    """
    folder = study / FOLDER
    tables = page_tables(html)
    if not tables:
        return
    with refusals(folder):
        disk.make_folder(folder)
    for table in tables:
        disk.write(folder / f"{table.name}.csv", table.csv())
        disk.write(folder / f"{table.name}.tex", table.latex())


def _joined(parts: list[tuple[str, bool]]) -> str:
    found = [(" ".join(text.split()), small) for text, small in parts]
    main = " ".join(text for text, small in found if text and not small)
    more = "; ".join(text for text, small in found if text and small)
    if not more:
        return main
    return f"{main} ({more})" if main else more


def _harmless(text: str) -> str:
    """Return a cell that a spreadsheet does not take for a formula: names come from hospitals."""
    signed = text[1:2].isdigit() or text[1:2] == "."
    return f"'{text}" if text[:1] in ("=", "@") or (text[:1] in ("+", "-") and not signed) else text


def _latex(text: str) -> str:
    text = escaped(text)
    for sign, command in SIGNS.items():
        text = text.replace(sign, command)
    return text
