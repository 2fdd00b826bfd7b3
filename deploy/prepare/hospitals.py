"""Assigns cases to hospitals by a table or by their names (`data prepare --hospitals`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fedsgcg.clients.data.manifest import COLUMNS, is_folder_name, read_columns
from fedsgcg.common.errors import Problem, fail
from fedsgcg.common.images.folders import counted_names, stem_of, without_suffix
from fedsgcg.common.names import printable
from fedsgcg.common.settings.data import SPLITS
from fedsgcg.deploy.prepare.layouts import Line

TITLES: Final = {
    "case": ("case", "name", "image", "file", "id", "patient", "patient_id", "subject"),
    "site": COLUMNS["site"],
    "patient_id": COLUMNS["patient_id"],
    "split": COLUMNS["split"],
}
"""Column of the table -> accepted titles; `patient_id` and `split` may be missing."""

SITE: Final = "{site}"
FEWEST, MOST = 2, 40
"""Number of hospitals that names may suggest."""


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    site: str
    patient: str = ""
    split: str = ""


def assign(lines: Sequence[Line], hospitals: str, source: Path) -> tuple[list[Line], list[Problem]]:
    """Return the cases with their hospitals, and a problem for those without one.

    Args:
        lines: The cases.
        hospitals: A CSV file with the columns `case` and `site`, or a pattern such as `{site}_*`
            for the names of the cases.
        source: Where the cases are, for a problem.

    Raises:
        FedsgcgError: DAT-129 for a pattern without `{site}` or a file that does not exist, DAT-101
            for a table that cannot be used.
    """
    table = Path(hospitals)
    if table.is_file():
        return _by_table(lines, table)
    if SITE not in hospitals:
        raise fail(
            "DAT-129",
            found=repr(hospitals),
            expected="a CSV file with the columns case and site, or a pattern with {site}",
            action="Correct the path, or write for example --hospitals '{site}_*'.",
            where="--hospitals",
        )
    pattern = re.compile(
        "".join(
            {SITE: "(?P<site>.+?)", "*": ".*", "?": "."}.get(part) or re.escape(part)
            for part in re.split(r"(\{site\}|[*?])", hospitals, maxsplit=0)
            if part
        )
    )
    found: list[Line] = []
    without: list[Line] = []
    for line in lines:
        match = pattern.fullmatch(_name(line))
        if match and is_folder_name(match["site"]):
            found.append(replace(line, site=match["site"]))
        else:
            without.append(line)
    action = "Change the pattern, or use a table with the columns case and site."
    return found, _left_out(without, hospitals, f"names like {hospitals}", action)


def _by_table(lines: Sequence[Line], table: Path) -> tuple[list[Line], list[Problem]]:
    entries, problems = _entries(table)
    found: list[Line] = []
    without: list[Line] = []
    used: set[str] = set()
    for line in lines:
        key = next((key for key in _keys(line) if key in entries), None)
        if key is None:
            without.append(line)
            continue
        used.add(key)
        entry = entries[key]
        found.append(
            replace(
                line,
                site=entry.site,
                patient=entry.patient or line.patient,
                person="" if entry.patient else line.person,
                split=entry.split or line.split,
            )
        )
    action = "Add a line with its hospital, or leave the case out."
    problems += _left_out(without, str(table), "a line for each case", action)
    if idle := sorted(entries.keys() - used):
        problems.append(
            Problem(
                "DAT-129",
                counted_names(map(Path, idle), "line", "whose case is not in the folder"),
                "names of cases, as in the folder",
                "Correct the names; the other lines are used.",
                str(table),
            )
        )
    return found, problems


def _entries(table: Path) -> tuple[dict[str, Entry], list[Problem]]:
    """Return name of the case in lower case -> its line; unusable lines are problems."""
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    for number, cells in read_columns(table, TITLES, ("case", "site")):
        key = without_suffix(Path(cells["case"].replace("\\", "/")).name).lower()
        where = f"{table}, line {number}"
        entry = Entry(cells["site"], cells["patient_id"], cells["split"].lower())
        mistake = ""
        if not is_folder_name(entry.site):
            mistake, expected = f"site {entry.site!r}", "a name without slashes"
        elif entry.split not in ("", *SPLITS):
            mistake, expected = f"split {cells['split']!r}", ", ".join(SPLITS) + " or nothing"
        elif entries.get(key, entry) != entry:
            mistake, expected = f"{cells['case']!r} again, with another hospital", "a case once"
        if mistake:
            problems.append(Problem("DAT-129", mistake, expected, "Correct the line.", where))
        else:
            entries[key] = entry
    return entries, problems


def _name(line: Line) -> str:
    return line.name or stem_of(line.image)


def _keys(line: Line) -> list[str]:
    """Return the names by which a table may call a case: its own, its file's, its patient's."""
    names = (_name(line), stem_of(line.image), without_suffix(line.image.name), line.patient)
    return [name.lower() for name in names if name]


def _left_out(lines: Sequence[Line], where: str, expected: str, action: str) -> list[Problem]:
    if not lines:
        return []
    names = counted_names((Path(_name(line)) for line in lines), "case", "without a hospital")
    return [Problem("DAT-129", names, expected, action, where)]


def suggestion(lines: Iterable[Line]) -> str:
    """Return how the names of cases suggest hospitals, "" if they do not.

    They do if each starts with a word of letters that at least two share: `RUNMC_01`, `UCL-3`.
    """
    names = [_name(line) for line in lines]
    for sign in "_-":
        words = [name.partition(sign)[0] for name in names if sign in name]
        counts = Counter(words)
        if (
            len(words) == len(names)
            and FEWEST <= len(counts) <= MOST
            and min(counts.values()) >= 2
            and not any(word.isdigit() for word in counts)
        ):
            shown = ", ".join(f"{printable(word)} {n}" for word, n in counts.most_common(4))
            more = ", ..." if len(counts) > 4 else ""
            return f"--hospitals '{SITE}{sign}*' would give {shown}{more}"
    return ""
