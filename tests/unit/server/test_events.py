"""The table of events: what the coordinator emits is in it, and a wrong event is noticed."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from fedsgcg.common.console import EVENTS_VERSION, Screen
from fedsgcg.common.run_folder.events import EVERY_EVENT, RUN_EVENTS, wrong_fields
from fedsgcg.server.records.events import EventLog
from tests.support.plans import small_plan

ROOT = Path(__file__).resolve().parents[3]
VARIABLE = ("event",)
"""Names of variables that `emit` is called with; their values are constants above the call."""


def emitted() -> dict[str, set[str]]:
    """Event -> names of the fields with which the server's code emits it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "emit":
                names = [each.value for each in ast.walk(node.args[0]) if hasattr(each, "value")]
                if isinstance(node.args[0], ast.Name):
                    assert node.args[0].id in VARIABLE
                    names = ["heldout.done", "observer.done"]
                for name in names:
                    found.setdefault(name, set()).update(key.arg or "*" for key in node.keywords)
    return found


def test_every_event_that_the_code_emits_is_in_the_table_with_its_fields() -> None:
    found = emitted()
    assert set(found) == set(RUN_EVENTS)
    for name, fields in found.items():
        own = set(RUN_EVENTS[name].fields)
        assert fields - {"round", "*"} == own if "*" not in fields else fields - {"*"} < own, name


def test_an_event_of_the_log_fits_the_table_and_a_changed_one_does_not(tmp_path: Path) -> None:
    taken: list[dict[str, Any]] = []
    EventLog(small_plan(tmp_path), taken.append).emit(
        "round.done", loss=float("nan"), validation_dice=0.5, validation_round=1
    )
    (event,) = taken
    assert wrong_fields(event) == []
    assert event["loss"] is None
    assert set(EVERY_EVENT) < set(event)
    for change, wrong in (
        ({"loss": "0.5"}, "loss is '0.5', not number?"),
        ({"round": None}, "round is None, not integer"),
        ({"seed": True}, "seed is True, not integer"),
        ({"more": 1}, "more is not known"),
        ({"event": "round.over"}, "event 'round.over' is not known"),
    ):
        assert wrong_fields(event | change) == [wrong]
    del event["validation_round"]
    assert wrong_fields(event) == ["validation_round is missing"]


def test_a_json_line_is_strict_json_whatever_a_name_or_a_figure_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sys

    name = "M\udcfcller \u2028 \x1b[2J"
    Screen(sys.stderr, events=True).event("done", folder=Path(name), dice=float("inf"), cells=(1,))
    (line,) = capsys.readouterr().out.splitlines()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads(line, parse_constant=refuse)
    assert found["folder"].encode("utf-8").startswith(b"M%FCller")
    assert (found["version"], found["dice"], found["cells"]) == (EVENTS_VERSION, None, [1])
    assert "\x1b" not in line


def test_a_closed_standard_output_does_not_end_a_command() -> None:
    import subprocess
    import sys

    code = """
import sys
from fedsgcg.common.console import Screen, run_command
import argparse
def work(screen):
    for number in range(20000):
        screen.event("round.done", round=number)
    sys.stderr.write("the end\\n")
    return 0
sys.exit(run_command(work, options=argparse.Namespace(json_events=True)))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == "the end\n"
        assert process.wait() == 0
