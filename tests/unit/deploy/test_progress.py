"""The console's progress: what counts as done, and the time that is left."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from fedsgcg.common.console import Screen
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.progress import Progress


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return Cell("sgcg", "West", 0, {"output": str(tmp_path), "federation": {"rounds": 4}})


def add(cell: Cell, time: float, event: str, number: int, **facts: Any) -> None:
    line = {"time": time, "event": event, "round": number, "rounds": 4, **facts}
    with (cell.folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def progress(*cells: Cell) -> Progress:
    return Progress(cells, Screen(io.StringIO()))


def test_a_resumed_cell_counts_the_rounds_of_this_call_alone(cell: Cell) -> None:
    add(cell, 0, "run.started", 0)
    add(cell, 100, "round.started", 1)
    add(cell, 400, "round.done", 1, loss=1.0)
    add(cell, 401, "round.started", 2)  # the first call is interrupted here
    shown = progress(cell)
    (state,) = shown.states
    assert (state.status, shown.time_left()) == ("waiting", "estimating the time left")
    add(cell, 1000, "run.started", 1)
    add(cell, 1030, "round.started", 2)  # reading the data took 30 s, which happens once
    add(cell, 1050, "round.done", 2, loss=0.5)
    state.read_events()
    assert shown.time_left() == "about 40 s left"  # one round in 20 s, two to go


def test_cells_that_run_at_the_same_time_share_what_is_left(cell: Cell, tmp_path: Path) -> None:
    cells = [cell]
    for name in ("second", "third"):
        tree = {"output": str(tmp_path / name), "federation": {"rounds": 4}}
        cells.append(Cell("sgcg", name, 0, tree))
        cells[-1].folder.mkdir()
    shown = progress(*cells)
    for one in cells[:2]:
        add(one, 0, "run.started", 0)
        add(one, 5, "round.started", 1)
        add(one, 15, "round.done", 1)
    for state in shown.states:
        state.read_events()
    assert shown.time_left() == "about 50 s left"  # 3 + 3 + 4 rounds of 10 s, two at a time


def test_a_cell_that_failed_asks_for_no_more_time(cell: Cell, tmp_path: Path) -> None:
    second = Cell(
        "sgcg", "East", 0, {"output": str(tmp_path / "second"), "federation": {"rounds": 4}}
    )
    second.folder.mkdir()
    add(cell, 0, "round.done", 1)
    shown = progress(cell, second)
    add(cell, 1, "run.started", 1)
    add(cell, 2, "run.finished", 1, status="failed")
    add(second, 1, "run.started", 0)
    add(second, 2, "round.started", 3)
    add(second, 12, "round.done", 3)
    for state in shown.states:
        state.read_events()
    assert shown.time_left() == "about 10 s left"
    assert [state.ended for state in shown.states] == [True, False]
