"""Progress over many files: nothing is lost, and something is shown on a terminal and in a log alike."""

import io

import pytest
from rich.console import Console

from common import console as consoles


@pytest.mark.parametrize("terminal", [True, False])
def test_every_item_comes_once_in_order_and_progress_is_shown(terminal, monkeypatch):
    monkeypatch.setattr(consoles, "QUIET_S", 0.0)
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=terminal, width=100)
    assert list(consoles.counted([3, 1, 2], console, "converting")) == [3, 1, 2]
    shown = sink.getvalue()
    assert "converting" in shown
    assert ("3/3" if terminal else "2 of 3") in shown


def test_a_pipe_is_not_flooded():
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=False)
    assert sum(consoles.counted(range(1000), console, "converting")) == 499500
    assert sink.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_the_steps_of_long_work_are_told(terminal, monkeypatch):
    monkeypatch.setattr(consoles, "QUIET_S", 0.0)
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=terminal, width=100)
    with consoles.steps_of(console, "making the report") as tell:
        tell("curves")
        if terminal:
            console.print("something else")  # makes the spinner draw itself
    assert ("making the report" if terminal else "making the report: curves\n") in sink.getvalue()


def test_short_work_says_nothing_in_a_pipe():
    sink = io.StringIO()
    with consoles.steps_of(Console(file=sink, force_terminal=False), "making the report") as tell:
        for number in range(100):
            tell(str(number))
    assert sink.getvalue() == ""
