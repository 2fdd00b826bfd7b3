"""The console's progress: what counts as done, and the time that is left."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from fedsgcg.common.console import Screen
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.progress import Progress


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return Cell("sgcg", "West", 0, {"output": str(tmp_path), "federation": {"rounds": 4}})


def tell(cell: Cell, event: str, number: int, **facts: Any) -> None:
    with (cell.folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "round": number, "rounds": 4, **facts}) + "\n")


def progress(*cells: Cell) -> Progress:
    return Progress(cells, Screen(io.StringIO()))


def test_a_resumed_cell_counts_the_rounds_of_this_call_alone(cell: Cell) -> None:
    tell(cell, "run.started", 0)
    tell(cell, "round.done", 1, loss=1.0)
    tell(cell, "round.started", 2)  # the first call is interrupted here
    shown = progress(cell)
    (state,) = shown.states
    assert (state.done_before, state.status, shown.time_left()) == (
        1,
        "waiting",
        "estimating the time left",
    )
    tell(cell, "run.started", 1)
    tell(cell, "round.started", 2)
    tell(cell, "round.done", 2, loss=0.5)
    state.read_events()
    shown.started = time.monotonic() - 20
    assert shown.time_left() == "about 40 s left"  # one round in 20 s, two to go


def test_a_cell_that_failed_asks_for_no_more_time(cell: Cell, tmp_path: Path) -> None:
    second = Cell(
        "sgcg", "East", 0, {"output": str(tmp_path / "second"), "federation": {"rounds": 4}}
    )
    second.folder.mkdir()
    tell(cell, "round.done", 1)
    shown = progress(cell, second)
    tell(cell, "run.started", 1)
    tell(cell, "run.finished", 1, status="failed")
    tell(second, "run.started", 0)
    tell(second, "round.done", 3)
    for state in shown.states:
        state.read_events()
    shown.started = time.monotonic() - 30
    assert shown.time_left() == "about 10 s left"
    assert [state.ended for state in shown.states] == [True, False]
