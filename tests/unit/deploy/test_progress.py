"""The console's progress: what counts as done, and the time that is left."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from fedsgcg.common.console import Screen
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.progress import Progress, makespan
from fedsgcg.deploy.study.progress_view import progress_view


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
    assert shown.time_left() == "about 50 s left"  # one round in 20 s, two and a half to go


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
    # Two cells with 3 rounds of 10 s each run now; the third one's 4 rounds start after them;
    # and half a round is the evaluation of each.
    shown.at_once = 2
    assert shown.time_left() == "about 80 s left"


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
    assert shown.time_left() == "about 15 s left"
    assert [state.ended for state in shown.states] == [True, False]


def test_the_start_up_of_the_first_round_is_not_counted_for_every_round(cell: Cell) -> None:
    shown = progress(cell)
    (state,) = shown.states
    add(cell, 100, "run.started", 0)
    add(cell, 101, "sites.enrolled", 0, sites=["A", "B", "C", "West"], training=["A", "B", "C"])
    add(cell, 110, "round.started", 1)
    add(cell, 130, "round.reply", 1, site="A", accepted=True, seconds=20.0)  # 15 s of it once
    state.read_events()
    assert shown.time_left(130) == "estimating the time left"
    add(cell, 135, "round.reply", 1, site="B", accepted=True, seconds=5.0)
    add(cell, 140, "round.reply", 1, site="C", accepted=True, seconds=5.0)
    add(cell, 142, "round.done", 1, loss=0.5)
    state.read_events()
    assert shown.time_left(142) == "about 60 s left"  # 32 s - 15 s, three rounds and a half
    add(cell, 142, "round.started", 2)
    add(cell, 158, "round.done", 2, loss=0.4)
    state.read_events()
    assert shown.time_left(158) == "about 40 s left"  # the second round alone
    add(cell, 158, "round.started", 3)
    state.read_events()
    assert shown.time_left(162) == "about 36 s left"  # a round in progress counts down
    assert shown.time_left(500) == "about 24 s left"  # but not further than to its end
    add(cell, 174, "round.done", 3, loss=0.4)
    add(cell, 190, "round.done", 4, loss=0.4)
    add(cell, 193, "run.finished", 4, status="completed")
    state.read_events()
    assert state.closing == 3.0
    other = progress(Cell("sgcg", "East", 0, cell.tree | {"output": "nowhere"}))
    shown.states.append(other.states[0])
    assert shown.time_left(193) == "about 67 s left"  # 4 rounds of 16 s, and 3 s


def test_hospitals_that_work_at_the_same_time_are_not_taken_for_ones_in_turn(cell: Cell) -> None:
    shown = progress(cell)
    (state,) = shown.states
    add(cell, 0, "run.started", 0)
    add(cell, 0, "sites.enrolled", 0, sites=["A", "B"], training=["A", "B"])
    add(cell, 0, "round.started", 1)
    add(cell, 10, "round.reply", 1, site="A", accepted=True, seconds=9.0)
    add(cell, 11, "round.reply", 1, site="B", accepted=True, seconds=10.0)
    state.read_events()
    assert shown.time_left(11) == "estimating the time left"
    add(cell, 12, "round.done", 1)
    state.read_events()
    assert shown.time_left(12) == "about 42 s left"


@given(
    running=st.lists(st.integers(0, 9), max_size=4),
    waiting=st.lists(st.integers(0, 9), max_size=8),
    more=st.integers(0, 3),
)
def test_the_last_cell_ends_when_a_clock_says_so(
    running: list[int], waiting: list[int], more: int
) -> None:
    at_once = len(running) + more
    lanes, queue, clock = list(running), list(waiting), 0
    while lanes or queue:  # second by second: a free place takes the next cell
        lanes = [left for left in lanes if left]
        while queue and len(lanes) < max(1, at_once):
            lanes += [left] if (left := queue.pop(0)) else []
        if lanes:
            lanes = [left - 1 for left in lanes]
            clock += 1
    assert makespan(running, waiting, at_once) == clock


def test_a_pipe_gets_one_line_a_round_with_what_was_rejected(cell: Cell) -> None:
    sink = io.StringIO()
    with Progress([cell], Screen(sink)):
        add(cell, 0, "run.started", 0)
        add(cell, 0, "sites.enrolled", 0, sites=["A", "B"], training=["A", "B"])
        for number in (1, 2):
            add(cell, number, "round.started", number)
            add(cell, number, "round.reply", number, site="A", accepted=True)
            code = "PAY-112" if number == 2 else ""
            add(cell, number, "round.reply", number, site="B", accepted=not code, code=code)
            add(cell, number, "round.done", number, loss=0.5)
    lines = sink.getvalue().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["round 1/4", "round 2/4"]
    assert ("PAY-112" in lines[0], "B: PAY-112" in lines[1]) == (False, True)


def test_a_line_that_is_no_event_and_a_log_of_a_new_run_do_not_end_the_progress(
    cell: Cell,
) -> None:
    path = cell.folder / "events.jsonl"
    start = '{"time": 0, "event": "run.started", "round": 3, "rounds": 4}\n'
    path.write_text(start + 99 * '[1]\n{"rou\n')
    shown = progress(cell)
    (state,) = shown.states
    path.unlink()
    add(cell, 1, "run.started", 0)
    add(cell, 2, "round.started", 1)
    state.read_events()
    assert (state.status, state.progress.round, state.progress.done) == ("running", 1, 0)


NAMES = [
    "Île-de-Ré",
    "北京大学第一医院",
    "A hospital with a name that is very much longer than a line",
]


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 120])
def test_every_hospital_is_one_line_on_a_terminal_of_any_width(cell: Cell, columns: int) -> None:
    shown = progress(cell)
    (state,) = shown.states
    now = time.time()
    add(cell, now, "run.started", 0)
    add(cell, now, "sites.enrolled", 0, sites=[*NAMES, "West"], training=NAMES)
    add(cell, now, "round.started", 1)
    add(cell, now + 9, "round.reply", 1, site=NAMES[0], accepted=True, seconds=8.25, loss=0.5)
    add(cell, now + 9, "round.reply", 1, site=NAMES[1], accepted=False, code="PAY-112")
    state.read_events()
    sink = io.StringIO()
    screen = Screen(sink, columns)
    screen.print(progress_view(shown.states, screen, 65.0, shown.time_left()))
    lines = sink.getvalue().splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= columns
    for start in ("Île-de-Ré", "北京大学", "A hospi"):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert "0 of 1 cells done" in lines[0]
    for text in ("PAY-112", "held out", "answered", "work"):
        assert text in sink.getvalue()
    assert ("8.2 s" in sink.getvalue()) == (columns >= 60)
    assert ("0.500" in sink.getvalue()) == (columns >= 40)


@pytest.mark.parametrize(
    ("environment", "redraws"),
    [({}, True), ({"CI": "true"}, False), ({"CI": "false"}, True), ({"TERM": "dumb"}, False)],
)
def test_only_a_terminal_that_can_redraw_does(
    environment: dict[str, str], redraws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"CI": "", "TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    sink = io.StringIO()
    monkeypatch.setattr(sink, "isatty", lambda: True)
    assert Screen(sink, 80).redraws == redraws
