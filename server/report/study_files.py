"""Reads a study folder: a partial, degraded or failed study gives a report too.

A missing file leaves a marked gap in the page; an unreadable file becomes a problem in the banner.
Pictures and ledgers are stored at the sites; they are read only if the site's folder is on this
machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedsgcg.common.errors import CODES, Problem, fail
from fedsgcg.common.run_folder import paths
from fedsgcg.server.report.labels import BEST_SINGLE, Label, labels_of, read_label
from fedsgcg.server.report.reader import Reader, Tree
from fedsgcg.server.report.tables import Row, methods_of

Key = tuple[str, str, int, str]  # label, held-out hospital, seed, the one hospital that trained
DONE = ("completed", "degraded")
REASONS = 3  # most problems of a run that the banner lists


@dataclass(frozen=True)
class Cell:
    """One federation of the study.

    Attributes:
        method: Its label.
        heldout: Held-out hospital, "" for none.
        seed: Seed.
        folder: Its folder, which need not exist.
        status: completed, degraded, failed, interrupted (started, never ended) or missing.
        reason: Why it is not completed, as text; "" if unknown.
        model: Content of `model.json`, {} if absent.
        outcome: Content of `outcome.json`, {} if absent.
        seconds: Wall-clock time, NaN if unknown.
        trained_on: The only hospital that trained, "" if all did.
    """

    method: str
    heldout: str
    seed: int
    folder: Path
    status: str
    reason: str
    model: Tree
    outcome: Tree
    seconds: float
    trained_on: str = ""

    @property
    def key(self) -> Key:
        """Label, held-out hospital, seed, and the only hospital that trained."""
        return self.method, self.heldout, self.seed, self.trained_on

    @property
    def label(self) -> str:
        """Label, held-out hospital and seed as text."""
        alone = f" · {self.trained_on} alone" if self.trained_on else ""
        return f"{self.method} · {self.heldout or 'no hospital'} held out · seed {self.seed}{alone}"


@dataclass(frozen=True)
class StudyFiles:
    """A study as found on disk.

    Attributes:
        folder: The study folder, or the folder of a single run.
        tree: Content of `study.yaml`, {} if absent.
        cells: Every cell that was planned or found, in order.
        results: Rows of `results.parquet`.
        rounds: Rows of `rounds.parquet`.
        adapted: Rows of every run's `adapted.parquet`.
        problems: Problems of unreadable files.
    """

    folder: Path
    tree: Tree
    cells: tuple[Cell, ...]
    results: list[Row]
    rounds: list[Row]
    adapted: list[Row]
    problems: tuple[Problem, ...]

    @property
    def settings(self) -> dict[str, Tree]:
        """Resolved settings by label."""
        found = self.tree.get("settings", {})
        if not isinstance(found, dict):
            return {}
        return {str(name): tree for name, tree in found.items() if isinstance(tree, dict)}

    @property
    def labels(self) -> dict[str, Label]:
        """Parsed labels by name, in order, from the columns of the tables if they have them."""
        rows = {str(row["method"]): row for table in (self.rounds, self.results) for row in table}
        named = dict.fromkeys([*(cell.method for cell in self.cells), *rows])
        return labels_of(rows.get(name) or self._settings_row(name) for name in named)

    def _settings_row(self, label: str) -> Row:
        """Columns of a label without any row, from its settings."""
        tree = self.settings.get(label, {})
        parts = {name: tree.get(name) for name in ("method", "federation")}
        trains, federation = (part if isinstance(part, dict) else {} for part in parts.values())
        own = {
            "trains": trains.get("name"),
            "federation": federation.get("ownership"),
            "setting": tree.get("setting"),
        }
        return {"method": label} | own

    @property
    def status(self) -> str:
        """Status of the study: completed, degraded, incomplete or failed."""
        states = {cell.status for cell in self.cells}
        if not states or states.isdisjoint(DONE):
            return "failed" if "failed" in states else "incomplete"
        if states <= {"completed"}:
            return "completed"
        return "degraded" if states <= set(DONE) else "incomplete"


RESULT_COLUMNS = (
    "method",
    "heldout",
    "seed",
    "site",
    "case",
    "structure",
    "dice",
    "asd",
    "assd",
    "hd95",
)
ROUND_COLUMNS = ("method", "heldout", "seed", "round", "phase", "site", "cls", "metric", "value")
CELL_NAME = re.compile(r"(-?\d+)(?:-(.+))?")  # <seed>[-<trained_on>]


def read_study(folder: Path) -> tuple[StudyFiles, Reader]:
    """Read a study folder or the folder of a single run.

    Returns:
        The study, and the reader for the files of the sites.

    Raises:
        FedsgcgError: SRV-402 when the folder contains neither a study nor a run.
    """
    reader = Reader(folder)
    tree = reader.tree(folder / paths.STUDY)
    names = {
        paths.label_folder(str(name)): str(name)
        for name in tree.get("methods") or []
        if isinstance(name, str)
    }
    found = {_key_of(path, folder, names): path for path in _cell_folders(folder)}
    wanted = [key for key in _wanted(tree) if key not in found]
    if not tree and not found and not (folder / paths.RESULTS).is_file():
        raise fail(
            "SRV-402",
            found="no study.yaml and no run",
            expected="the folder of a study or of a run",
            action="pass the folder printed by `fedsgcg study` or `fedsgcg simulate`",
            where=str(folder),
        )
    keyed = dict.fromkeys(wanted, None) | found
    results = _all_rows(reader, folder, found, paths.RESULTS, RESULT_COLUMNS)
    rounds = _all_rows(reader, folder, found, paths.ROUNDS, ROUND_COLUMNS)
    with_results = {_key(row) for row in results if row.get("federation") != BEST_SINGLE}
    for key in sorted(with_results - keyed.keys()):
        keyed[key] = None
    cells = [
        _cell(
            reader,
            key,
            path or cell_folder(folder, key),
            found=path is not None,
            has_results=key in with_results,
        )
        for key, path in keyed.items()
    ]
    order = {
        name: place
        for place, name in enumerate(methods_of([{"method": cell.method} for cell in cells]))
    }
    cells.sort(key=lambda cell: (order[cell.method], *cell.key[1:]))
    _check_seals(reader, folder)
    adapted = [
        row
        for path in found.values()
        for row in reader.rows(path / paths.ADAPTED, (*RESULT_COLUMNS, "adapt"))
    ]
    problems = tuple(reader.problems)
    return StudyFiles(folder, tree, tuple(cells), results, rounds, adapted, problems), reader


def changed_files(folder: Path) -> list[Problem]:
    """Return SRV-403 for every file that is not the one of the seal of its cell or its study."""
    reader = Reader(folder)
    _check_seals(reader, folder)
    return reader.problems


def _check_seals(reader: Reader, folder: Path) -> None:
    if (folder / paths.STUDY).is_file():
        reader.check_seal(folder, paths.SEALED_TABLES)
    for path in _cell_folders(folder):
        reader.check_seal(path, paths.SEALED)


def cell_folder(study: Path, key: Key) -> Path:
    """Return the folder of a cell of a study."""
    return study / paths.cell_path(*key)


def reason_of(code: str) -> str:
    """Return an error code with its sentence."""
    return f"{code} {CODES[code]}" if code in CODES else code


def _cell_folders(folder: Path) -> Iterator[Path]:
    """Folders of cells: the folder itself for a single run, else <method>/<fold>/<seed>."""
    marks = (paths.MODEL_CARD, paths.EVENTS, paths.RESULTS, paths.JOURNAL)
    if not (folder / paths.STUDY).is_file() and any(
        (folder / mark).exists() for mark in (paths.MODEL_CARD, paths.JOURNAL)
    ):
        yield folder
        return
    for path in sorted(folder.glob("*/*/*")):
        if CELL_NAME.fullmatch(path.name) and any((path / mark).exists() for mark in marks):
            yield path


def _key_of(path: Path, folder: Path, names: Mapping[str, str]) -> Key:
    """Return the key of the cell in a folder.

    Args:
        path: Folder of the cell.
        folder: Folder of the study; the same for a single run.
        names: Labels of the study by the name of their folder.
    """
    if path == folder:
        reader = Reader(folder)
        model = reader.tree(path / paths.MODEL_CARD)
        events = reader.lines(path / paths.EVENTS)
        rows = reader.rows(path / paths.RESULTS, RESULT_COLUMNS)
        for entry in (*rows[:1], *events[:1], model):
            if {"method", "heldout", "seed"} <= set(entry) and isinstance(entry["method"], str):
                return _key(entry)
        return "run", "", 0, ""
    fold, name = path.parent.name, CELL_NAME.fullmatch(path.name)
    seed, alone = name.groups() if name else ("0", None)
    label = path.parents[1].name
    return (
        names.get(label, label.replace(",", " ")),
        "" if fold == paths.ALL_SITES else fold,
        int(seed),
        alone or "",
    )


def _key(entry: Mapping[str, Any]) -> Key:
    return (
        str(entry["method"]),
        str(entry["heldout"]),
        int(entry["seed"]),
        str(entry.get("trained_on") or ""),
    )


def _wanted(tree: Tree) -> list[Key]:
    """Planned cells: every label with every fold and seed.

    A label whose hospitals train alone has one cell per training hospital.
    """
    axes = [tree.get(name, []) for name in ("methods", "heldout", "seeds")]
    if not all(isinstance(axis, list) for axis in axes):
        return []
    sites = _training_sites(tree)
    keys: list[Key] = []
    for method, heldout, seed in product(*axes):
        trained_on = [""]
        if read_label({"method": method}).federation == "local":
            trained_on = [site for site in sites if site != str(heldout)]
        keys += [(str(method), str(heldout), int(seed), site) for site in trained_on]
    return keys


def _training_sites(tree: Tree) -> list[str]:
    """Sites in the settings of any label, without observers.

    The settings of a label whose hospitals train alone do not list all sites.
    """
    settings = tree.get("settings")
    entries = settings.values() if isinstance(settings, dict) else []
    trees = [entry for entry in entries if isinstance(entry, dict)]
    named = [
        tree.get("sites"),
        *(part.get("sites") for part in (t.get("data") for t in trees) if isinstance(part, dict)),
    ]
    watching = {str(name) for t in trees for name in t.get("observers") or []}
    return sorted(
        {str(site) for sites in named if isinstance(sites, list) for site in sites} - watching
    )


def _all_rows(
    reader: Reader, folder: Path, found: Mapping[Key, Path], name: str, columns: Sequence[str]
) -> list[Row]:
    """Rows of the study's file and of cells missing from it (an interrupted study)."""
    rows = reader.rows(folder / name, columns)
    held = {_key(row) for row in rows}
    for key, path in found.items():
        if key not in held and path != folder:
            rows += reader.rows(path / name, columns)
    return rows


def _cell(reader: Reader, key: Key, where: Path, *, found: bool, has_results: bool) -> Cell:
    model = reader.tree(where / paths.MODEL_CARD)
    outcome = reader.tree(where / paths.OUTCOME)
    events = reader.lines(where / paths.EVENTS)
    ends = (
        event for event in reversed(events) if event.get("event") in {"run.started", "run.finished"}
    )
    status = str(
        outcome.get("status")
        or next(ends, {}).get("status")
        or ("completed" if has_results else "")
    )
    if status not in {*DONE, "failed"}:
        status = "interrupted" if found else "missing"
    method, heldout, seed, trained_on = key
    return Cell(
        method,
        heldout,
        seed,
        where,
        status,
        _reason(outcome),
        model,
        outcome,
        _seconds(outcome, events),
        trained_on,
    )


def _reason(outcome: Tree) -> str:
    """The first few problems of a cell's outcome, each with its sentence."""
    found = outcome.get("problems")
    problems = (
        [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    )
    texts = [
        f"{entry.get('where', '')}: {reason_of(str(entry.get('code', '')))}".lstrip(": ")
        for entry in problems
    ]
    more = [f"And {len(texts) - REASONS} more."] if len(texts) > REASONS else []
    return " ".join([*texts[:REASONS], *more]) or reason_of(str(outcome.get("error") or ""))


def _seconds(outcome: Tree, events: Sequence[Tree]) -> float:
    """Wall-clock time of a cell: from its outcome, else between its first and last event."""
    if isinstance(outcome.get("seconds"), (int, float)):
        return float(outcome["seconds"])
    times = [
        float(event["time"]) for event in events if isinstance(event.get("time"), (int, float))
    ]
    return max(times) - min(times) if times else float("nan")
