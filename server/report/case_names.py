"""Names of cases: only a hospital's own `aliases.csv` says which case an alias is."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import fail
from fedsgcg.server.report.reader import Reader
from fedsgcg.server.report.sections.overlays import OverlayBlock
from fedsgcg.server.report.sections.results import CaseRow
from fedsgcg.server.report.study_files import StudyFiles

FILE: Final = "aliases.csv"
"""Name of the file in a hospital's own folder."""


@dataclass(frozen=True)
class CaseNames:
    """Names of cases that are known on this machine.

    Attributes:
        names: Name of a case by its alias.
        files: The files that say so, relative to the study if they are in it.
    """

    names: dict[str, str]
    files: tuple[str, ...]


def read_case_names(study: StudyFiles, reader: Reader, given: Sequence[Path] = ()) -> CaseNames:
    """Read the aliases of the hospitals whose folders are in the study, and the given files.

    Raises:
        FedsgcgError: MON-910 if a given file cannot be read; a damaged one of the study becomes a
            problem of the page.
    """
    names: dict[str, str] = {}
    files: dict[str, None] = {}
    for cell in study.cells:
        for path in sorted(cell.folder.glob(f"sites/*/{FILE}")):
            try:
                found = dict(_rows(path))
            except (OSError, ValueError, csv.Error):
                reader.note_damaged(path)
                continue
            if not found.keys() <= names.keys():
                files[path.relative_to(study.folder).as_posix()] = None
                names |= found
    for path in given:
        try:
            names |= dict(_rows(path))
        except (OSError, ValueError, csv.Error) as error:
            raise fail(
                "MON-910",
                where=str(path),
                found=getattr(error, "strerror", None) or str(error),
                expected="a CSV file with the columns alias and case",
                action="Name the file aliases.csv of the hospital's own folder.",
            ) from error
        files[str(path)] = None
    return CaseNames(names, tuple(files))


def linked_cases(
    cases: Sequence[CaseRow], blocks: Sequence[OverlayBlock], names: Mapping[str, str]
) -> list[CaseRow]:
    """Return cases with their names and links to their pictures, as far as there are any."""
    anchors = {
        (block.site, case.case): case.anchor
        for block in blocks
        for case in (*block.cases, *block.others)
    }
    return [
        replace(row, anchor=anchors.get((row.site, row.case), ""), name=names.get(row.case, ""))
        for row in cases
    ]


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if not {"alias", "case"} <= set(table.fieldnames or ()):
            raise ValueError("no columns alias and case")
        for row in table:
            yield str(row["alias"]), str(row["case"])
