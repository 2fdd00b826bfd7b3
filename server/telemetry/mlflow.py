"""Runs for MLflow: the study is a run, its federations are its child runs (extra `mlflow`)."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from fedsgcg.server.telemetry.points import SEPARATOR, Point, Run

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

ENVIRONMENT: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Variables that the user may set: no usage statistics, no messages, no minutes of retries."""

SQLITE: Final = "sqlite:///"
EXPERIMENT: Final = "fedsgcg"
KEY: Final = "fedsgcg.key"
FOLDER: Final = "fedsgcg.run"
STARTED: Final = "fedsgcg.started"
PARENT: Final = "mlflow.parentRunId"

LONGEST_KEY: Final = 250
LONGEST_VALUE: Final = 6000
METRICS: Final = 500
PARAMETERS: Final = 100
"""MLflow's limits: characters of names and values, entries of one request."""

NOT_ALLOWED: Final = re.compile(r"[^\w\-. ]|^\.+$|^ | $")
"""What a part of a name may not have; `:` and `/` have a meaning here or there."""

STATUS: Final = {"completed": "FINISHED", "degraded": "FINISHED", "failed": "FAILED"}


class MLflow:
    """Writes to an MLflow store.

    Args:
        uri: `sqlite:///FILE` or the address of a tracking server.
        study: Name of the study.
        artifacts: Address of the folder for files of an experiment that is made.
    """

    name = "mlflow"

    def __init__(self, uri: str, study: str, artifacts: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if uri.startswith(SQLITE):
            check_sqlite(uri.removeprefix(SQLITE))
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = self._experiment_id(artifacts)
        self._parent = self._find_or_make(study, {}, 0.0).info.run_id
        self._runs: dict[str, str] = {}
        self._ended: dict[str, str] = {}
        self._client.update_run(self._parent, status="RUNNING")

    def open(self, run: Run) -> None:
        """Make the child run with its parameters, or continue it."""
        tags = {PARENT: self._parent, FOLDER: run.folder, STARTED: f"{run.started:.3f}"}
        found = self._find_or_make(run.name, tags, run.started)
        self._runs[run.folder] = found.info.run_id
        self._client.update_run(found.info.run_id, status="RUNNING")
        from mlflow.entities import Param

        fresh = [
            Param(key, str(value)[:LONGEST_VALUE])
            for name, value in run.settings.items()
            if (key := self.key((name,))) not in found.data.params
        ]
        for start in range(0, len(fresh), PARAMETERS):
            self._client.log_batch(
                found.info.run_id, params=fresh[start : start + PARAMETERS], synchronous=True
            )

    def key(self, tag: tuple[str, ...]) -> str:
        """Return the parts with slashes; other characters as `:HEX:`, a long name with a hash."""
        text = SEPARATOR.join(NOT_ALLOWED.sub(_escaped, part) for part in tag)
        if len(text) <= LONGEST_KEY:
            return text
        digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return f"{text[: LONGEST_KEY - 17].rstrip(' ./')}-{digest}"

    def steps(self, run: Run) -> set[tuple[str, int]]:
        """Ask for the history of every metric of the run."""
        identifier = self._runs[run.folder]
        found = self._client.get_run(identifier).data.metrics
        return {
            (name, metric.step)
            for name in found
            for metric in self._client.get_metric_history(identifier, name)
        }

    def write(self, run: Run, points: Sequence[Point]) -> None:
        """Write points in batches."""
        from mlflow.entities import Metric

        metrics = [
            Metric(self.key(point.tag), point.value, round(1000 * point.time), point.step)
            for point in points
        ]
        for start in range(0, len(metrics), METRICS):
            self._client.log_batch(
                self._runs[run.folder], metrics=metrics[start : start + METRICS], synchronous=True
            )

    def end(self, run: Run, status: str) -> None:
        """Set the status of the child run."""
        self._ended[run.folder] = status
        if status in STATUS:
            self._client.set_terminated(self._runs[run.folder], STATUS[status])

    def close(self) -> None:
        """Set the status of the study."""
        states = {STATUS.get(self._ended.get(folder, "")) for folder in self._runs}
        status = next((one for one in ("FAILED", None) if one in states), "FINISHED")
        self._client.set_terminated(self._parent, status or "KILLED")

    def _experiment_id(self, artifacts: str) -> str:
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(EXPERIMENT):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(EXPERIMENT, artifacts))
        except MlflowException:
            found = self._client.get_experiment_by_name(EXPERIMENT)  # another process was first
            if found is None:
                raise
            return str(found.experiment_id)

    def _find_or_make(self, name: str, tags: dict[str, str], started: float) -> MlflowRun:
        """Return the run with these tags; of two processes that make it at once, both get one."""
        key = sha256(repr((name, sorted(tags.items()))).encode("utf-8", "surrogatepass"))
        known = key.hexdigest()[:32]
        if found := self._with(known):
            return found[0]
        made = self._client.create_run(
            self._experiment,
            start_time=round(1000 * started) or None,
            tags={KEY: known} | {tag: value[:LONGEST_VALUE] for tag, value in tags.items()},
            run_name=name,
        )
        first = next(iter(self._with(known)), made)
        if first.info.run_id != made.info.run_id:
            self._client.delete_run(made.info.run_id)
        return first

    def _with(self, known: str) -> list[MlflowRun]:
        """Return the runs with a key, in an order that all processes share."""
        found = self._client.search_runs([self._experiment], f"tags.`{KEY}` = '{known}'")
        return sorted(found, key=lambda run: str(run.info.run_id))


def check_sqlite(path: str) -> None:
    """Open a database for writing; MLflow itself would try for two minutes.

    Raises:
        sqlite3.Error: For a file that is no database or cannot be written.
    """
    with closing(sqlite3.connect(path)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("PRAGMA schema_version").fetchone()
        database.rollback()


def _escaped(found: re.Match[str]) -> str:
    return "".join(f":{ord(char):X}:" for char in found[0])
