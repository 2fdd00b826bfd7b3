"""Reads what was appended to the run folders of a study, or of a kit's federations."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fedsgcg.common.names import printable
from fedsgcg.common.run_folder import paths
from fedsgcg.server.records.tail import EventTail
from fedsgcg.server.telemetry.state import RunMetrics, Sample, states_of

ROUND_ENDS: Final = ("round.done", "round.void")
DEEPEST: Final = 6
"""Folders between the followed folder and a run."""

SETTLED_S: Final = 10.0
"""Age of a folder's last change from which its listing is kept; file systems round to seconds."""


class FollowedRun:
    """Reads what was appended to a run folder and passes it on; a base class.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tail = EventTail(folder)
        self._files = 0
        self._rounds_read = 0
        self._results_time = 0

    @property
    def unreadable(self) -> int:
        """Number of lines that are no event."""
        return self._tail.unreadable

    def restart(self) -> None:
        """Forget everything: the event log is a new one, of a run that was started afresh."""

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event of `events.jsonl`."""

    def take_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the rows of one or more rounds (`common.run_folder.tables.ROWS_SCHEMA`)."""

    def take_results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the results of a finished federation, rows with site, structure and dice."""

    def poll(self) -> None:
        """Take everything that was appended since the last call."""
        for event in self._tail.poll():
            if self._tail.files != self._files:
                self._files = self._tail.files
                self._rounds_read, self._results_time = 0, 0
                self.restart()
            self.take(event)
            if event.get("event") in ROUND_ENDS:
                self._read_round(int(event.get("round", 0)))
            elif event.get("event") == "run.finished":
                self._read_rest()
        self._read_results()

    def _read_round(self, number: int) -> None:
        """Read the rows of a round from the journal, which is removed after the run."""
        if number <= self._rounds_read:
            return
        path = self.folder / paths.JOURNAL / "rounds" / f"{number:05d}.arrow"
        try:
            with pa.memory_map(str(path)) as source:
                rows = pa.ipc.open_file(source).read_all().to_pylist()
        except (OSError, pa.ArrowInvalid):
            return  # read from the run's table at its end
        self._rounds_read = number
        self.take_rows(rows)

    def _read_rest(self) -> None:
        """Read the rounds that were not read from the journal from the run's table."""
        try:
            rows = pq.read_table(self.folder / paths.ROUNDS).to_pylist()
        except (OSError, pa.ArrowInvalid):
            return
        fresh = [row for row in rows if row["round"] > self._rounds_read]
        self.take_rows(fresh)
        self._rounds_read = max((row["round"] for row in fresh), default=self._rounds_read)

    def _read_results(self) -> None:
        path = self.folder / paths.RESULTS
        try:
            changed = path.stat().st_mtime_ns
            if changed == self._results_time:
                return
            columns = ["site", "structure", "dice"]
            self.take_results(pq.read_table(path, columns=columns).to_pylist())
            self._results_time = changed
        except (OSError, pa.ArrowInvalid, KeyError):
            return


class RunFollower(FollowedRun):
    """Computes the metrics of one run folder.

    Args:
        folder: The run folder.
        study: Name of the study.
    """

    def __init__(self, folder: Path, study: str) -> None:
        super().__init__(folder)
        self._study = study
        self.metrics = RunMetrics(study)

    def restart(self) -> None:
        """Start with new metrics."""
        self.metrics = RunMetrics(self._study)

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        self.metrics.take(event)

    def take_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the rows of rounds."""
        self.metrics.take_rows(rows)

    def take_results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the results."""
        self.metrics.take_results(rows)


class Follower:
    """Follows all run folders below a folder; new ones are found at each poll.

    Args:
        folder: Folder of a study, of several studies, or of a kit's runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[Path, RunFollower] = {}
        self._folders = _Folders(folder)

    def poll(self, now: float) -> list[Sample]:
        """Read what is new and return all samples.

        Args:
            now: Seconds since 1970.
        """
        for path in self._folders.new_runs(now):
            self._runs[path] = RunFollower(path, self._study_of(path))
        samples: list[Sample] = []
        studies: dict[str, list[RunFollower]] = {}
        for _, run in sorted(self._runs.items()):
            run.poll()
            samples += run.metrics.samples(now)
            studies.setdefault(self._study_of(run.folder), []).append(run)
        for study, runs in studies.items():
            samples += self._study_samples(study, runs)
        return samples

    def _study_samples(self, study: str, runs: list[RunFollower]) -> Iterator[Sample]:
        expected = _cells_of(self._study_folder(runs[0].folder))
        for state, count in states_of([run.metrics for run in runs], expected).items():
            yield "fedsgcg_cells", (study, state), float(count)
        yield "fedsgcg_unreadable_lines", (study,), float(sum(run.unreadable for run in runs))
        try:
            yield "fedsgcg_disk_free_bytes", (study,), float(shutil.disk_usage(self.folder).free)
        except OSError:
            return  # the folder is away

    def _study_folder(self, run: Path) -> Path:
        """Return the folder above a run that has `study.yaml`, else the followed folder."""
        for parent in (run, *run.parents):
            if (parent / paths.STUDY).is_file():
                return parent
            if parent == self.folder:
                break
        return self.folder

    def _study_of(self, run: Path) -> str:
        return printable(self._study_folder(run).resolve().name)


class _Folders:
    """Finds run folders, not deeper than `DEEPEST`; only folders that changed are listed again.

    Args:
        folder: The followed folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: set[Path] = set()
        self._listed: dict[Path, tuple[int, list[Path]]] = {}

    def new_runs(self, now: float) -> list[Path]:
        """Return the folders with an event log that no earlier call returned.

        Args:
            now: Seconds since 1970.
        """
        found: list[Path] = []
        level = [self._folder]
        for _ in range(DEEPEST):
            below: list[Path] = []
            for path in level:
                if path in self._runs:
                    continue
                if (path / paths.EVENTS).is_file():
                    self._runs.add(path)
                    self._listed.pop(path, None)
                    found.append(path)
                else:
                    below += self._below(path, now)
            level = below
        return found

    def _below(self, path: Path, now: float) -> list[Path]:
        """Return the folders in a folder; listed again if its time of change is another one."""
        try:
            changed = path.stat().st_mtime_ns
            known = self._listed.get(path)
            if known is not None and known[0] == changed:
                return known[1]
            folders = [entry for entry in path.iterdir() if entry.is_dir()]
        except OSError:
            self._listed.pop(path, None)
            return []
        # A change within the clock's resolution of this listing would have the same time.
        settled = now - changed / 1e9 > SETTLED_S
        self._listed[path] = (changed if settled else -1, folders)
        return folders


def _cells_of(folder: Path) -> int:
    """Return the number of federations that `study.yaml` lists; 0 without one."""
    try:
        tree = yaml.safe_load((folder / paths.STUDY).read_text(encoding="utf-8"))
        return len(tree["cells"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        return 0
