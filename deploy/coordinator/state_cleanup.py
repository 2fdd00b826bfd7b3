"""What Flower leaves in `state/` when runs have ended, cleared away before the server starts.

Flower 1.41 never removes a run's row, log and context, nor any version of the app that was ever submitted (870 kB in
its database, 1.2 MB unpacked below `flwr/apps`), removes a run's messages and arrays only on some of the ways in which
a run ends, and never gives the room in its database back: the file keeps the size of its fullest moment. Nothing of
that is needed again: a submission brings the app along, and a resume needs our run folder alone.

So, unless a run has not ended yet, everything goes but the hospitals' registrations, the nonces that keep their
requests from being replayed, and the line of the last run, which `fedsgcg status` tells about. With
`deploy.coordinator.superlink`, this module is the only one that knows Flower's server from inside.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

from common.errors import FedsgcgError
from deploy.coordinator.last_run import last_started
from deploy.coordinator.project import Kit

LOG_BYTES: Final = 10_000_000
WORTH_TELLING_BYTES: Final = 100_000

UNFINISHED: Final = """
    SELECT count(*) FROM run LEFT JOIN task ON task.task_id = run.primary_task_id WHERE task.finished_at IS NULL
"""

EMPTIED: Final = (
    *(
        "message_res",
        "message_ins",
        "message",
        "task_message",
        "task_event",
        "task_usage",
        "task_logs",
    ),
    *("object_push_session_pending", "object_push_session_roots", "object_push_sessions"),
    *(
        "run_objects",
        "object_children",
        "objects",
        "compacted_contexts",
        "run_connector",
        "federation_app",
        "fab",
    ),
)
"""Tables of what runs sent and were made of, those that refer to others first."""

RUNS: Final = ("task", "series_runs", "run")
"""Tables of the runs themselves, by `run_id`."""

SERIES: Final = ("series_context", "run_series")
"""Tables of what goes with a run's series, by `series_id`."""


def tidy(kit: Kit) -> str:
    """Clear away what ended runs have left; nobody may be using `state/`.

    Args:
        kit: The coordinator's kit, its server not running.

    Returns:
        What was done, or why it was not, in words; "" when there was nothing worth telling.
    """
    before = size_of(kit.state)
    rotate(kit.state / "runs.log")
    database = kit.state / "superlink.db"
    if database.exists():
        try:
            with closing(sqlite3.connect(database, isolation_level=None)) as connection:
                if connection.execute(UNFINISHED).fetchone()[0]:
                    return ""  # cut off when the server ended; it is stopped first, and cleared away at the next start
                forget_runs(connection, _last_run(kit))
        except sqlite3.Error as error:
            return f"state/superlink.db was not tidied ({error}); it only grows"
    shutil.rmtree(kit.state / "flwr" / "apps", ignore_errors=True)
    freed = before - size_of(kit.state)
    return (
        f"state/: {freed / 1e6:.1f} MB of ended runs cleared away"
        if freed >= WORTH_TELLING_BYTES
        else ""
    )


def forget_runs(connection: sqlite3.Connection, last: int) -> None:
    """Empty Flower's database of runs, all or nothing, and give the room back.

    Args:
        connection: The database, in autocommit mode.
        last: Flower's number of the run whose line stays, 0 for none.
    """
    signed = (
        last - 2**64 if last >= 2**63 else last
    )  # Flower stores unsigned numbers in SQLite's signed integers
    connection.execute("BEGIN IMMEDIATE")
    for table in EMPTIED:
        connection.execute(f"DELETE FROM {table}")  # noqa: S608 (a name of the list above)
    for table in RUNS:
        connection.execute(f"DELETE FROM {table} WHERE run_id != ?", (signed,))  # noqa: S608
    for table in SERIES:
        orphans = "WHERE series_id NOT IN (SELECT series_id FROM series_runs)"
        connection.execute(f"DELETE FROM {table} {orphans}")  # noqa: S608
    connection.execute("COMMIT")
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def rotate(log: Path) -> None:
    """Put a log that has grown large aside, over the one that was put aside before."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _last_run(kit: Kit) -> int:
    try:
        return last_started(kit).run_id
    except FedsgcgError:
        return (
            0  # nothing was submitted with this kit, or its note is damaged; `status` will say so
        )
