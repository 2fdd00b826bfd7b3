"""Data of ended runs are removed from Flower's real database, and everything else is kept."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.common.constant import SubStatus
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories

from fedsgcg.deploy.coordinator.project import Kit, SubmittedRun
from fedsgcg.deploy.coordinator.state_cleanup import LOG_BYTES, size_of, tidy

NUMBERS = 60_000
"""Numbers of the array that a run has on its way: 240 kB."""


@dataclass
class Server:
    """A coordinator's kit with Flower's real database in it."""

    kit: Kit
    flower: LinkState

    @classmethod
    def at(cls, folder: Path) -> "Server":
        (folder / "state").mkdir(exist_ok=True)
        database = str(folder / "state" / "superlink.db")
        return cls(
            Kit(folder),
            get_objectstore_linkstate_factories(database, get_federation_manager())[1].state(),
        )

    def run(self, number: int, ending: str = SubStatus.COMPLETED) -> int:
        """Submit an app with an array in transit and end the run; "" keeps it running."""
        content = bytes([number]) * 300_000
        digest = self.flower.store_fab(Fab("", content, {}))
        run = self.flower.create_run(
            "fedsgcg/fedsgcg", "0.1.0", digest, {}, "@none/default", None, "me", TaskType.SERVER_APP
        )
        weights = ArrayRecord([np.full(NUMBERS, number, np.float32)])
        self.flower.object_store.preregister(run, get_object_tree(weights))
        for identifier, part in get_all_nested_objects(weights).items():
            self.flower.object_store.put(identifier, part.deflate())
        task = int(self.flower.get_run_info(run_ids=[run])[0].primary_task_id or 0)
        assert self.flower.claim_task(task)
        assert self.flower.activate_task(task)
        self.flower.add_task_log(task, "round 1 done\n" * 50)
        assert not ending or self.flower.finish_task(task, ending, "")
        unpacked = self.kit.state / "flwr" / "apps" / f"fedsgcg.{number}"
        unpacked.mkdir(parents=True)
        (unpacked / "app.py").write_bytes(content)
        self.kit.record_run(SubmittedRun(run, "runs/x", (), digest, 1.5))
        return run

    def rows(self) -> dict[str, int]:
        """Rows of Flower's tables, without those that are empty."""
        with closing(sqlite3.connect(self.kit.state / "superlink.db")) as database:
            names = [
                name
                for (name,) in database.execute(
                    "SELECT name FROM sqlite_master WHERE type = 'table'"
                )
            ]
            found = {
                name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in names
            }
        return {name: count for name, count in found.items() if count}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    found = Server.at(tmp_path)
    node = found.flower.create_node("me", "me", b"key of East", 30.0, name="East")
    assert found.flower.activate_node(node, 30.0)
    return found


def test_ended_runs_go_and_the_hospitals_and_the_last_runs_line_stay(server: Server) -> None:
    registered = server.rows()
    runs = [
        server.run(number, ending)
        for number, ending in enumerate((SubStatus.COMPLETED, SubStatus.FAILED), 1)
    ]
    last = server.run(3, SubStatus.STOPPED)
    before = server.rows()
    assert before["fab"] == before["run"] == 3
    assert before["objects"] >= 3, "Flower keeps what ended runs had on their way"
    size = size_of(server.kit.state)
    assert "MB of ended runs removed" in tidy(server.kit)
    left = dict.fromkeys(
        ("run", "task", "series_runs", "run_series", "series_context", "objectstore_locks"), 1
    )
    assert server.rows() == registered | left
    assert size_of(server.kit.state) < size - 2_000_000
    assert not (server.kit.state / "flwr" / "apps").exists()
    again = Server.at(server.kit.folder)
    assert [node.name for node in again.flower.get_node_info()] == ["East"]
    (known,) = again.flower.get_run_info(run_ids=[*runs, last])
    assert (known.run_id, known.status.sub_status) == (last, SubStatus.STOPPED)


def test_the_next_run_finds_a_database_that_works(server: Server) -> None:
    server.run(1)
    tidy(server.kit)
    again = Server.at(server.kit.folder)
    run = again.run(1)
    assert again.flower.get_run_info(run_ids=[run])[0].status.sub_status == SubStatus.COMPLETED
    assert again.rows()["fab"] == 1


def test_nothing_is_touched_while_a_run_has_not_ended(server: Server) -> None:
    server.run(1)
    server.run(2, ending="")
    before, files = server.rows(), size_of(server.kit.state / "flwr")
    assert tidy(server.kit) == ""
    assert server.rows() == before
    assert size_of(server.kit.state / "flwr") == files


def test_many_runs_take_no_more_room_than_one(server: Server) -> None:
    server.run(1)
    tidy(server.kit)
    room = size_of(server.kit.state)
    for number in range(2, 8):
        server.run(number)
        tidy(server.kit)
    assert size_of(server.kit.state) <= room + 20_000


def test_a_database_that_cannot_be_cleaned_is_reported_and_unchanged(server: Server) -> None:
    server.run(1)
    with closing(sqlite3.connect(server.kit.state / "superlink.db")) as database:
        database.execute("ALTER TABLE run_series RENAME TO renamed")
    before = server.rows()
    assert "could not be cleaned up" in tidy(server.kit)
    assert server.rows() == before


def test_a_new_kit_has_nothing_to_tidy(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    assert tidy(Kit(tmp_path)) == ""


def test_a_log_that_has_grown_large_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    log = tmp_path / "state" / "runs.log"
    log.write_bytes(b"x" * LOG_BYTES)
    tidy(Kit(tmp_path))
    assert log.exists()
    log.write_bytes(b"x" * (LOG_BYTES + 1))
    tidy(Kit(tmp_path))
    assert not log.exists()
    assert (tmp_path / "state" / "runs.log.1").stat().st_size == LOG_BYTES + 1
