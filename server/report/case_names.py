"""Names of cases: only a hospital's own `aliases.csv` says which case an alias is."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsgcg.common.errors import fail
from fedsgcg.server.report.sections.overlays import OverlayBlock
from fedsgcg.server.report.sections.results import CaseRow


@dataclass(frozen=True)
class CaseNames:
    """Names of cases that are known on this machine.

    Attributes:
        names: Name of a case by its alias.
        files: The files that say so.
    """

    names: dict[str, str]
    files: tuple[str, ...]


def read_case_names(given: Sequence[Path]) -> CaseNames:
    """Read files with aliases that a user has named.

    The files in a simulation's own folder are not read by themselves: a report is made to be
    shown to others.

    Raises:
        FedsgcgError: MON-910 if a file cannot be read.
    """
    names: dict[str, str] = {}
    files: dict[str, None] = {}
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
