"""Removes what ended runs have left in `state/`, before the server starts.

Flower 1.41 never removes a run's row, log and context, nor any version of the app that was ever
submitted (870 kB in its database, 1.2 MB unpacked in `flwr/apps`). It removes a run's messages and
arrays only for some endings of a run, and never shrinks its database file. None of this is needed
again: a submission contains the app, and a resume needs only the run folder.

So, unless a run has not ended yet, everything is removed except the sites' registrations, the
nonces that prevent replayed requests, and the row of the last run, which `fedsgcg status` shows.
This module and `deploy.coordinator.superlink` are the only ones that depend on the internals of
Flower's server.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.coordinator.project import Kit

LOG_BYTES: Final = 10_000_000
REPORTED_BYTES: Final = 100_000
"""Less freed space than this is not reported."""

UNFINISHED: Final = """
    SELECT count(*) FROM run LEFT JOIN task ON task.task_id = run.primary_task_id
    WHERE task.finished_at IS NULL
"""

EMPTIED: Final = (
    "message_res",
    "message_ins",
    "message",
    "task_message",
    "task_event",
    "task_usage",
    "task_logs",
    "object_push_session_pending",
    "object_push_session_roots",
    "object_push_sessions",
    "run_objects",
    "object_children",
    "objects",
    "compacted_contexts",
    "run_connector",
    "federation_app",
    "fab",
)
"""Tables of the runs' messages, arrays and apps; a table comes before those it refers to."""

RUNS: Final = ("task", "series_runs", "run")
"""Tables of the runs themselves, by `run_id`."""

SERIES: Final = ("series_context", "run_series")
"""Tables of the runs' series, by `series_id`."""


def tidy(kit: Kit) -> str:
    """Remove what ended runs have left; no process may be using `state/`.

    Args:
        kit: The coordinator's kit, its server not running.

    Returns:
        A line for the user: what was done, or why it was not; "" when there is nothing to report.
    """
    before = size_of(kit.state)
    rotate(kit.state / "runs.log")
    database = kit.state / "superlink.db"
    if database.exists():
        try:
            with closing(sqlite3.connect(database, isolation_level=None)) as connection:
                if connection.execute(UNFINISHED).fetchone()[0]:
                    # A run was interrupted when the server ended. This start stops it, and the
                    # next start removes its data.
                    return ""
                delete_runs(connection, _last_run(kit))
        except sqlite3.Error as error:
            return f"state/superlink.db could not be cleaned up ({error}); it keeps growing"
    shutil.rmtree(kit.state / "flwr" / "apps", ignore_errors=True)
    freed = before - size_of(kit.state)
    if freed < REPORTED_BYTES:
        return ""
    return f"state/: {freed / 1e6:.1f} MB of ended runs removed"


def delete_runs(connection: sqlite3.Connection, last: int) -> None:
    """Delete the runs from Flower's database in one transaction and shrink its file.

    Args:
        connection: The database, in autocommit mode.
        last: Flower's id of the run whose row is kept, 0 for none.
    """
    # Flower stores unsigned 64-bit ids in SQLite's signed integers.
    signed = last - 2**64 if last >= 2**63 else last
    connection.execute("BEGIN IMMEDIATE")
    for table in EMPTIED:
        connection.execute(f"DELETE FROM {table}")  # noqa: S608 (a constant of this module)
    for table in RUNS:
        connection.execute(f"DELETE FROM {table} WHERE run_id != ?", (signed,))  # noqa: S608
    for table in SERIES:
        orphans = "WHERE series_id NOT IN (SELECT series_id FROM series_runs)"
        connection.execute(f"DELETE FROM {table} {orphans}")  # noqa: S608
    connection.execute("COMMIT")
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def rotate(log: Path) -> None:
    """Rename a log that has grown large to `NAME.1`, replacing the previous one."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))


def size_of(folder: Path) -> int:
    """Return the size in bytes of all files in a folder and its subfolders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _last_run(kit: Kit) -> int:
    try:
        return kit.last_run().run_id
    except FedsgcgError:
        return 0  # no run was submitted, or its record is damaged, which `status` reports
