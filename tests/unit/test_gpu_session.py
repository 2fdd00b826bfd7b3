"""The GPU session keeps its time limit and records how each process ended."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks import gpu_session
from tests.benchmarks.gpu_session import Session

READY = "print('ready', flush=True); time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); " + READY
INTERRUPTIBLE = "import signal, time; signal.signal(signal.SIGINT, lambda *_: exit(130)); " + READY


def test_processes_end_at_the_deadline_whether_they_listen_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "CLOSING_S", 0.5)
    session = Session(tmp_path, 0.0)
    commands = [[sys.executable, "-c", program] for program in ("", INTERRUPTIBLE, DEAF)]
    session._run("part", commands, time.monotonic() + 5)
    (part,) = json.loads((tmp_path / "session.json").read_text())
    assert part["exit_codes"] == [0, 130, -signal.SIGKILL]
    assert (tmp_path / "part-2.log").read_text() == "ready\n"
