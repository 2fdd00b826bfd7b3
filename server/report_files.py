"""What a study folder holds, read with suspicion: a report must come out of a partial, degraded or failed study too.

A file that is absent leaves a gap that the page names; a file that cannot be read becomes a problem in the banner.
Pictures and ledgers lie at the sites; they are read only where the site's folder is on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from common.errors import CODES, Problem, fail
from server.report_tables import Row, methods_of

Tree = dict[str, Any]
Key = tuple[str, str, int]
ALL_SITES = "all-sites"
DONE = ("completed", "degraded")
REASONS = 3  # problems of a run that the banner spells out


@dataclass(frozen=True)
class Cell:
    """One federation of the study.

    Attributes:
        method: Method.
        heldout: Held-out hospital, "" for none.
        seed: Seed.
        folder: Where it lies, or would lie.
        status: completed, degraded, failed, interrupted (started, never ended) or missing.
        reason: Why it is not completed, in words; "" if unknown.
        model: What `model.json` says, {} if absent.
        outcome: What `outcome.json` says, {} if absent.
        seconds: Wall-clock time, NaN if unknown.
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

    @property
    def key(self) -> Key:
        """Method, held-out hospital, seed."""
        return self.method, self.heldout, self.seed

    @property
    def label(self) -> str:
        """Method, held-out hospital and seed for a reader."""
        return f"{self.method} · {self.heldout or 'no hospital'} held out · seed {self.seed}"


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
        """Resolved settings by method."""
        found = self.tree.get("settings", {})
        return (
            {str(name): tree for name, tree in found.items() if isinstance(tree, dict)}
            if isinstance(found, dict)
            else {}
        )

    @property
    def status(self) -> str:
        """One word for all cells: completed, degraded, incomplete or failed."""
        states = {cell.status for cell in self.cells}
        if not states or states.isdisjoint(DONE):
            return "failed" if "failed" in states else "incomplete"
        if states <= {"completed"}:
            return "completed"
        return "degraded" if states <= set(DONE) else "incomplete"


@dataclass(frozen=True)
class Picture:
    """One slice of one case, with truth and prediction.

    Attributes:
        case: Alias of the case.
        dice: Dice of the case, mean over structures.
        z: Slice number.
        image: (H, W) uint8.
        truth: (H, W) uint8, bit s set where structure s is true.
        prediction: (H, W) uint8, likewise.
        structures: Names of the bits.
    """

    case: str
    dice: float
    z: int
    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.uint8]
    prediction: npt.NDArray[np.uint8]
    structures: tuple[str, ...]


class Reader:
    """Reads files and collects what could not be read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []

    def tree(self, path: Path) -> Tree:
        """Return a YAML or JSON mapping, {} if absent or damaged."""
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
            tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        except (OSError, ValueError, yaml.YAMLError):
            tree = None
        if not isinstance(tree, dict):
            self._damaged(path)
            return {}
        return tree

    def rows(self, path: Path, columns: Sequence[str]) -> list[Row]:
        """Return the rows of a Parquet file, [] if absent, damaged or without the columns."""
        if not path.is_file():
            return []
        try:
            table = pq.ParquetFile(path).read()
        except (OSError, pa.ArrowException):
            self._damaged(path)
            return []
        if missing := sorted(set(columns) - set(table.column_names)):
            self._damaged(path, f"no column {', '.join(missing)}")
            return []
        return list(table.to_pylist())

    def lines(self, path: Path) -> list[Tree]:
        """Return the JSON objects of a file with one a line; a torn line (killed writer) is skipped."""
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError:
            self._damaged(path)
            return []
        return list(_objects(text))

    def pictures(self, path: Path) -> list[Picture]:
        """Return the pictures that a site kept, [] if they are not on this machine."""
        if not path.is_file():
            return []
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            names = _structure_names(table.schema.metadata)
            return [_picture(row, names) for row in table.to_pylist()]
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            self._damaged(path)
            return []

    def _damaged(self, path: Path, found: str = "a file that cannot be read") -> None:
        where = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name
        problem = Problem("SRV-402", found=found, action="run the study again: it makes what is missing", where=where)
        if problem not in self.problems:
            self.problems.append(problem)


RESULT_COLUMNS = ("method", "heldout", "seed", "site", "case", "structure", "dice", "asd", "assd", "hd95")
ROUND_COLUMNS = ("method", "heldout", "seed", "round", "phase", "site", "cls", "metric", "value")


def read_study(folder: Path) -> tuple[StudyFiles, Reader]:
    """Read a study folder or the folder of a single run.

    Returns:
        The study, and the reader for what lies at the sites.

    Raises:
        FedsgcgError: SRV-402 when the folder holds neither a study nor a run.
    """
    reader = Reader(folder)
    tree = reader.tree(folder / "study.yaml")
    found = {_key_of(path, folder): path for path in _cell_folders(folder)}
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
        _cell(reader, key, path or cell_folder(folder, key), found=path is not None, has_results=key in with_results)
        for key, path in keyed.items()
    ]
    order = {name: place for place, name in enumerate(methods_of([{"method": cell.method} for cell in cells]))}
    cells.sort(key=lambda cell: (order[cell.method], cell.heldout, cell.seed))
    return StudyFiles(folder, tree, tuple(cells), results, rounds, tuple(reader.problems)), reader


def cell_folder(study: Path, key: Key) -> Path:
    """Return where a cell of a study lies."""
    method, heldout, seed = key
    return study / method / (heldout or ALL_SITES) / str(seed)


def reason_of(code: str) -> str:
    """Return an error code with its sentence."""
    return f"{code} {CODES[code]}" if code in CODES else code


def _cell_folders(folder: Path) -> Iterator[Path]:
    """Folders that hold a cell: the folder itself for a single run, else <method>/<fold>/<seed>."""
    marks = ("model.json", "events.jsonl", "results.parquet", "journal")
    if not (folder / "study.yaml").is_file() and any((folder / mark).exists() for mark in ("model.json", "journal")):
        yield folder
        return
    for path in sorted(folder.glob("*/*/*")):
        if path.name.lstrip("-").isdigit() and any((path / mark).exists() for mark in marks):
            yield path


def _key_of(path: Path, folder: Path) -> Key:
    if path == folder:
        reader = Reader(folder)
        model, events = reader.tree(path / "model.json"), reader.lines(path / "events.jsonl")
        rows = reader.rows(path / "results.parquet", RESULT_COLUMNS)
        for entry in (*rows[:1], *events[:1], model):
            if {"method", "heldout", "seed"} <= set(entry) and isinstance(entry["method"], str):
                return _key(entry)
        return "run", "", 0
    fold = path.parent.name
    return path.parents[1].name, "" if fold == ALL_SITES else fold, int(path.name)


def _key(entry: Mapping[str, Any]) -> Key:
    return str(entry["method"]), str(entry["heldout"]), int(entry["seed"])


def _wanted(tree: Tree) -> list[Key]:
    """Cells that were asked for: every method with every fold and seed."""
    axes = [tree.get(name, []) for name in ("methods", "heldout", "seeds")]
    if not all(isinstance(axis, list) for axis in axes):
        return []
    return [(str(method), str(heldout), int(seed)) for method, heldout, seed in product(*axes)]


def _all_rows(reader: Reader, folder: Path, found: Mapping[Key, Path], name: str, columns: Sequence[str]) -> list[Row]:
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
    ends = (event for event in reversed(events) if event.get("event") in {"run.started", "run.finished"})
    status = str(outcome.get("status") or next(ends, {}).get("status") or ("completed" if has_results else ""))
    if status not in {*DONE, "failed"}:
        status = "interrupted" if found else "missing"
    return Cell(*key, where, status, _reason(outcome), model, outcome, _seconds(outcome, events))


def _reason(outcome: Tree) -> str:
    """What a cell's outcome says went wrong: the first few problems, each with its sentence."""
    found = outcome.get("problems")
    problems = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    texts = [f"{entry.get('where', '')}: {reason_of(str(entry.get('code', '')))}".lstrip(": ") for entry in problems]
    more = [f"And {len(texts) - REASONS} more."] if len(texts) > REASONS else []
    return " ".join([*texts[:REASONS], *more]) or reason_of(str(outcome.get("error") or ""))


def _seconds(outcome: Tree, events: Sequence[Tree]) -> float:
    """Wall-clock time of a cell: as its outcome states, else from its first to its last event."""
    if isinstance(outcome.get("seconds"), (int, float)):
        return float(outcome["seconds"])
    times = [float(event["time"]) for event in events if isinstance(event.get("time"), (int, float))]
    return max(times) - min(times) if times else float("nan")


def _objects(text: str) -> Iterator[Tree]:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _structure_names(metadata: Mapping[bytes, bytes] | None) -> tuple[str, ...]:
    return tuple(str(name) for name in json.loads((metadata or {}).get(b"structures", b"[]")))


def _picture(row: Row, names: tuple[str, ...]) -> Picture:
    shape = int(row["height"]), int(row["width"])
    image, truth, prediction = (
        np.frombuffer(row[name], np.uint8).reshape(shape) for name in ("image", "truth_mask", "prediction")
    )
    return Picture(str(row["case"]), float(row["dice"]), int(row["z"]), image, truth, prediction, names)
