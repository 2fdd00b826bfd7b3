"""The console: data verbatim, nothing lost if it is narrow, closed or ASCII, and progress."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from fedsgcg.common import console as consoles
from fedsgcg.common.console import WITHOUT_TERMINAL, Screen, progress_bar, run_command

ROOT = Path(__file__).resolve().parents[3]


def screen(sink, terminal, monkeypatch):
    """A console that believes it is a terminal, or not."""
    monkeypatch.setattr(sink, "isatty", lambda: terminal)
    for name, value in (("CI", ""), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    return Screen(sink, 100)


@pytest.mark.parametrize("terminal", [True, False])
def test_every_item_comes_once_in_order_and_progress_is_shown(terminal, monkeypatch):
    monkeypatch.setattr(consoles, "QUIET_S", 0.0)
    sink = io.StringIO()
    console = screen(sink, terminal, monkeypatch)
    assert list(consoles.counted([3, 1, 2], console, "converting")) == [3, 1, 2]
    shown = sink.getvalue()
    assert "converting" in shown
    assert ("3/3" if terminal else "2 of 3") in shown


def test_a_pipe_is_not_flooded():
    sink = io.StringIO()
    console = Screen(sink)
    assert sum(consoles.counted(range(1000), console, "converting")) == 499500
    assert sink.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_the_steps_of_long_work_are_shown(terminal, monkeypatch):
    monkeypatch.setattr(consoles, "QUIET_S", 0.0)
    sink = io.StringIO()
    console = screen(sink, terminal, monkeypatch)
    with consoles.steps_of(console, "making the report") as tell:
        tell("curves")
        if terminal:
            console.print("something else")  # makes the spinner draw itself
    assert ("making the report" if terminal else "making the report: curves\n") in sink.getvalue()


def test_short_work_says_nothing_in_a_pipe():
    sink = io.StringIO()
    with consoles.steps_of(Screen(sink), "making the report") as tell:
        for number in range(100):
            tell(str(number))
    assert sink.getvalue() == ""


DATA = "AB:CD:ab: [final] [/x] [red]r[/red] :smile: 0.812 'q' https://x.y C:\\z [POL-705]"


class Gone(io.StringIO):
    """A stream whose reader has gone or whose disk is full."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("terminal", [True, False])
def test_data_is_shown_to_the_letter_in_lines_cells_titles_and_spinners(terminal, monkeypatch):
    sink = io.StringIO()
    monkeypatch.setattr(sink, "isatty", lambda: terminal)
    screen = Screen(sink, 300)
    table = Table(DATA, title=DATA)
    table.add_row(DATA)
    screen.print(DATA)
    screen.print(table)
    with screen.status(DATA), screen.status(DATA):
        pass
    with progress_bar(screen) as bar:
        bar.add_task(DATA, total=None)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sink.getvalue())
    assert shown.count(DATA) >= (6 if terminal else 4)
    assert shown.count("AB:CD") == shown.count(DATA)


@given(
    words=st.lists(st.text("ab:.[]/-0123456789", min_size=1, max_size=30), min_size=1, max_size=8),
    width=st.integers(1, 60),
)
def test_no_console_is_too_narrow_for_a_word_or_a_number(words, width):
    sink = io.StringIO()
    table = Table(*words)
    table.add_row(*words)
    screen = Screen(sink, width)
    screen.print(table)
    screen.print(" ".join(words))
    shown = sink.getvalue()
    assert all(shown.count(word) >= 3 for word in words)
    assert " ".join(words) in shown.splitlines()


@pytest.mark.parametrize(
    ("columns", "width"),
    [("0", WITHOUT_TERMINAL), ("x", WITHOUT_TERMINAL), ("", WITHOUT_TERMINAL), ("40", 40)],
)
def test_a_width_that_makes_no_sense_is_not_believed(columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert Screen(io.StringIO()).width == width
    assert run_command(lambda console: console.print("shown") or 0) == 0
    consoles.print_error("an error")
    assert capsys.readouterr() == ("shown\n", "an error\n")


@pytest.mark.row(70)
def test_control_characters_do_not_reach_the_terminal():
    sink = io.StringIO()
    Screen(sink, 80).print("a\x1b[31mb\x07\tc\nd")
    assert sink.getvalue().split() == ["a?[31mb?", "c", "d"]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_work_goes_on_when_its_messages_cannot_be_written(number, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone(number))
    assert run_command(lambda console: console.print("lost") or 3) == 3
    assert ("Output is lost" in capsys.readouterr().err) == (number != errno.EPIPE)


DRAW = (
    f"{sys.executable} -c 'import sys; from fedsgcg.common.console import run_command as r; "
    'sys.exit(r(lambda c: [c.print("0.81 ± 0.02 – Zürich \\udcff") for _ in range(9000)] and 3))\''
)


@pytest.mark.parametrize(
    ("shell", "shown"),
    [
        (f"PYTHONIOENCODING=ascii {DRAW}", b"0.81 +- 0.02 - Z\\xfcrich \\udcff\n"),
        (f"PYTHONIOENCODING=latin-1 {DRAW}", "0.81 ± 0.02 - Zürich \\udcff\n".encode("latin-1")),
        (f"PYTHONIOENCODING=utf-8 {DRAW}", "0.81 ± 0.02 – Zürich \\udcff\n".encode()),
        (f"{DRAW} >&-", b""),
        (f"{DRAW} >&- 2>&- <&-", b""),
        (f"{DRAW} > /dev/full", b""),
        (f"PYTHONUNBUFFERED=1 {DRAW} | true; exit ${{PIPESTATUS[0]}}", b""),
        (f"{DRAW} | head -n 1 > /dev/null; exit ${{PIPESTATUS[0]}}", b""),
    ],
)
def test_the_exit_code_is_that_of_the_work_whatever_becomes_of_its_messages(shell, shown):
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith(shown)
    assert b"Traceback" not in done.stderr


def test_a_file_that_is_opened_later_does_not_get_the_number_of_a_closed_stream(tmp_path):
    kept = str(tmp_path / "kept")
    work = f"open({kept!r}, 'w').fileno() > 2 and __import__('os').system('echo stray') or 0"
    start = "import sys; from fedsgcg.common.console import run_command as r; "
    code = f"{start}sys.exit(r(lambda c: {work}))"
    subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$1" >&- 2>&- <&-', "-", code],
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    assert (tmp_path / "kept").read_text() == ""
