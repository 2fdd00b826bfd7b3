"""What a study folder holds, read with suspicion: a report must come out of a partial, degraded or failed study too.

A file that is absent leaves a gap that the page names; a file that cannot be read becomes a problem in the banner.
Pictures and ledgers lie at the sites; they are read only where the site's folder is on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common.errors import CODES, Problem, fail
from server.report.labels import Label, folder_of, labels_of, read_label
from server.report.reader import Reader, Tree
from server.report.tables import Row, methods_of

Key = tuple[str, str, int, str]  # label, held-out hospital, seed, the one hospital that trained
ALL_SITES = "all-sites"
DONE = ("completed", "degraded")
REASONS = 3  # problems of a run that the banner spells out


@dataclass(frozen=True)
class Cell:
    """One federation of the study.

    Attributes:
        method: Label of what is compared.
        heldout: Held-out hospital, "" for none.
        seed: Seed.
        folder: Where it lies, or would lie.
        status: completed, degraded, failed, interrupted (started, never ended) or missing.
        reason: Why it is not completed, in words; "" if unknown.
        model: What `model.json` says, {} if absent.
        outcome: What `outcome.json` says, {} if absent.
        seconds: Wall-clock time, NaN if unknown.
        trained_on: The one hospital that trained, "" when all did.
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
        """Label, held-out hospital, seed, the one hospital that trained."""
        return self.method, self.heldout, self.seed, self.trained_on

    @property
    def label(self) -> str:
        """Label, held-out hospital and seed for a reader."""
        alone = f" · {self.trained_on} alone" if self.trained_on else ""
        return f"{self.method} · {self.heldout or 'no hospital'} held out · seed {self.seed}{alone}"


@dataclass(frozen=True)
class StudyFiles:
    """A study as found on disk.

    Attributes:
        folder: The study folder, or the folder of a single run.
        tree: What `study.yaml` says, {} if absent.
        cells: Every cell that was asked for or found, in order.
        results: Rows of `results.parquet`.
        rounds: Rows of `rounds.parquet`.
        problems: Files that could not be read.
    """

    folder: Path
    tree: Tree
    cells: tuple[Cell, ...]
    results: list[Row]
    rounds: list[Row]
    problems: tuple[Problem, ...]

    @property
    def settings(self) -> dict[str, Tree]:
        """Resolved settings by label."""
        found = self.tree.get("settings", {})
        return (
            {str(name): tree for name, tree in found.items() if isinstance(tree, dict)}
            if isinstance(found, dict)
            else {}
        )

    @property
    def labels(self) -> dict[str, Label]:
        """What is compared, by label, in order; told by the tables where they have the columns."""
        told = {str(row["method"]): row for rows in (self.rounds, self.results) for row in rows}
        return labels_of(
            told.get(cell.method) or self._settings_row(cell.method) for cell in self.cells
        )

    def _settings_row(self, label: str) -> Row:
        """What the settings say about a label without any row."""
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
        """One word for all cells: completed, degraded, incomplete or failed."""
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
        The study, and the reader for what lies at the sites.

    Raises:
        FedsgcgError: SRV-402 when the folder holds neither a study nor a run.
    """
    reader = Reader(folder)
    tree = reader.tree(folder / "study.yaml")
    names = {
        folder_of(str(name)): str(name)
        for name in tree.get("methods") or []
        if isinstance(name, str)
    }
    found = {_key_of(path, folder, names): path for path in _cell_folders(folder)}
    wanted = [key for key in _wanted(tree) if key not in found]
    if not tree and not found and not (folder / "results.parquet").is_file():
        raise fail(
            "SRV-402",
            found="no study.yaml and no run",
            expected="the folder of a study or of a run",
            action="give the folder that `fedsgcg study` or `fedsgcg simulate` printed",
            where=str(folder),
        )
    keyed = dict.fromkeys(wanted, None) | found
    results = _all_rows(reader, folder, found, "results.parquet", RESULT_COLUMNS)
    rounds = _all_rows(reader, folder, found, "rounds.parquet", ROUND_COLUMNS)
    with_results = {_key(row) for row in results}
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
    return StudyFiles(folder, tree, tuple(cells), results, rounds, tuple(reader.problems)), reader


def cell_folder(study: Path, key: Key) -> Path:
    """Return where a cell of a study lies."""
    method, heldout, seed, trained_on = key
    return (
        study
        / folder_of(method)
        / (heldout or ALL_SITES)
        / (f"{seed}-{trained_on}" if trained_on else str(seed))
    )


def reason_of(code: str) -> str:
    """Return an error code with its sentence."""
    return f"{code} {CODES[code]}" if code in CODES else code


def _cell_folders(folder: Path) -> Iterator[Path]:
    """Folders that hold a cell: the folder itself for a single run, else <method>/<fold>/<seed>."""
    marks = ("model.json", "events.jsonl", "results.parquet", "journal")
    if not (folder / "study.yaml").is_file() and any(
        (folder / mark).exists() for mark in ("model.json", "journal")
    ):
        yield folder
        return
    for path in sorted(folder.glob("*/*/*")):
        if CELL_NAME.fullmatch(path.name) and any((path / mark).exists() for mark in marks):
            yield path


def _key_of(path: Path, folder: Path, names: Mapping[str, str]) -> Key:
    """What a cell's folder says that it is; `names` are the labels of the study by the name of their folder."""
    if path == folder:
        reader = Reader(folder)
        model, events = reader.tree(path / "model.json"), reader.lines(path / "events.jsonl")
        rows = reader.rows(path / "results.parquet", RESULT_COLUMNS)
        for entry in (*rows[:1], *events[:1], model):
            if {"method", "heldout", "seed"} <= set(entry) and isinstance(entry["method"], str):
                return _key(entry)
        return "run", "", 0, ""
    fold, name = path.parent.name, CELL_NAME.fullmatch(path.name)
    seed, alone = name.groups() if name else ("0", None)
    label = path.parents[1].name
    return (
        names.get(label, label.replace(",", " ")),
        "" if fold == ALL_SITES else fold,
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
    """Cells that were asked for: every label with every fold and seed, and every training hospital where one trains."""
    axes = [tree.get(name, []) for name in ("methods", "heldout", "seeds")]
    if not all(isinstance(axis, list) for axis in axes):
        return []
    sites = _training_sites(tree)
    return [
        (str(method), str(heldout), int(seed), trained)
        for method, heldout, seed in product(*axes)
        for trained in (
            _alone(sites, str(heldout))
            if read_label({"method": method}).federation == "local"
            else [""]
        )
    ]


def _alone(sites: Sequence[str], heldout: str) -> list[str]:
    return [site for site in sites if site != heldout]


def _training_sites(tree: Tree) -> list[str]:
    """Every site that any label's settings name, less observers: a label of hospitals that train alone names few."""
    settings = tree.get("settings")
    trees = (
        [entry for entry in settings.values() if isinstance(entry, dict)]
        if isinstance(settings, dict)
        else []
    )
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
    """Rows of the study's file, and of the cells that it does not hold yet (a study that was stopped)."""
    rows = reader.rows(folder / name, columns)
    held = {_key(row) for row in rows}
    for key, path in found.items():
        if key not in held and path != folder:
            rows += reader.rows(path / name, columns)
    return rows


def _cell(reader: Reader, key: Key, where: Path, *, found: bool, has_results: bool) -> Cell:
    model, outcome = reader.tree(where / "model.json"), reader.tree(where / "outcome.json")
    events = reader.lines(where / "events.jsonl")
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
    reason, seconds = _reason(outcome), _seconds(outcome, events)
    return Cell(method, heldout, seed, where, status, reason, model, outcome, seconds, trained_on)


def _reason(outcome: Tree) -> str:
    """What a cell's outcome says went wrong: the first few problems, each with its sentence."""
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
    """Wall-clock time of a cell: as its outcome states, else from its first to its last event."""
    if isinstance(outcome.get("seconds"), (int, float)):
        return float(outcome["seconds"])
    times = [
        float(event["time"]) for event in events if isinstance(event.get("time"), (int, float))
    ]
    return max(times) - min(times) if times else float("nan")
