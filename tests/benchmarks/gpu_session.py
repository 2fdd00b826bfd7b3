"""`make gpu`: what a GPU must show, within a time limit, each part on disk before the next starts.

First the kernels and the training step (`python -m tests.benchmarks gpu`), then a study by `shard=`
in several processes that share the GPU, without Ray. At the deadline the study's processes are
interrupted; the same call, or `fedsgcg study` with the same settings, resumes them.

    python -m tests.benchmarks.gpu_session --seconds 540 --folder runs/gpu -- experiment=promise12 …

`--toy` rehearses all of it on a CPU in about a minute, with small sizes and the synthetic
hospitals.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsgcg.deploy.study.plan import plan_study

BENCHMARKS_SHARE = 0.45
"""Largest share of the time for the benchmarks."""

PROGRAM = "from fedsgcg.deploy.cli.coordinator import run; run()"
"""`fedsgcg` of this checkout, which need not be installed."""

CLOSING_S = 20.0
"""Time in seconds for the study's processes to end after they were interrupted."""

TOY = (
    *("experiment=demo", "method=source,ram_sgcg", "heldout=North,South", "data.image_size=32"),
    *("network.base_width=4", "federation.rounds=2", "method.steps_per_round=2"),
    *("method.batch_size=2", "device=cpu"),
)
"""Settings of the study that `--toy` runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both parts and write `session.json`; returns 0 if both ended by themselves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="name=value", help="settings of the study")
    parser.add_argument("--seconds", type=float, default=540.0, help="time limit of everything")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--processes", type=int, default=4, help="that share the GPU")
    parser.add_argument("--toy", action="store_true", help="rehearse on a CPU")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds - CLOSING_S
    if options.seconds <= CLOSING_S or options.processes < 1:
        parser.error(f"--seconds must exceed {CLOSING_S:g}, --processes must be 1 or more")
    settings = options.settings or list(TOY if options.toy else ("experiment=promise12",))
    options.folder.mkdir(parents=True, exist_ok=True)
    session = Session(options.folder, deadline)
    session.benchmarks(BENCHMARKS_SHARE * options.seconds, toy=options.toy)
    session.study(settings, options.processes)
    return int(any(any(part["exit_codes"]) for part in session.parts))


class Session:
    """Starts the parts, ends them at the deadline, and records how each ended.

    Args:
        folder: Folder of the results.
        deadline: `time.monotonic()` at which the study is interrupted.
    """

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self.deadline = folder, deadline
        self.parts: list[dict[str, Any]] = []

    def benchmarks(self, seconds: float, *, toy: bool) -> None:
        """Run the GPU benchmarks, which write their tables after each part."""
        command = [sys.executable, "-m", "tests.benchmarks", "gpu", "--folder", str(self.folder)]
        command += ["--toy"] if toy else []
        self._run("benchmarks", [command], min(time.monotonic() + seconds, self.deadline))

    def study(self, settings: Sequence[str], processes: int) -> None:
        """Run a study's shards, as many as there are processes, until the deadline."""
        folder = self.folder / "study"
        asked = [*settings, f"output={folder.resolve()}"]
        count = min(processes, len(plan_study(asked).cells))
        command = [sys.executable, "-c", PROGRAM, "study", *asked]
        self._run(
            "study",
            [[*command, f"shard={number}/{count}"] for number in range(1, count + 1)],
            self.deadline,
        )
        cells = plan_study(asked).cells
        self.parts[-1] |= {"cells": len(cells), "done": sum(cell.done for cell in cells)}
        self._write()
        print(f"{self.parts[-1]}\ntables and report: fedsgcg report {folder}", flush=True)

    def _run(self, name: str, commands: Sequence[Sequence[str]], deadline: float) -> None:
        """Run commands at the same time; each has its log, and ends at the deadline."""
        started = time.monotonic()
        logs = [self.folder / f"{name}-{number}.log" for number in range(1, len(commands) + 1)]
        print(f"{name}: {len(commands)} processes, logs {logs[0]} …", flush=True)
        running = [_start(command, log) for command, log in zip(commands, logs, strict=True)]
        codes = [_wait(process, deadline) for process in running]
        seconds = round(time.monotonic() - started, 1)
        self.parts.append({"part": name, "seconds": seconds, "exit_codes": codes})
        self._write()

    def _write(self) -> None:
        (self.folder / "session.json").write_text(json.dumps(self.parts, indent=1) + "\n")


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int:
    """Wait for a process; interrupt it at the deadline, and kill it when that does not help."""
    for limit, number in ((deadline, signal.SIGINT), (deadline + CLOSING_S / 2, signal.SIGKILL)):
        try:
            return process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
