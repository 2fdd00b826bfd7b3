"""`flwr run .` works as for any Flower app, offline, on the synthetic default."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of an offline Flower with its own home and ports.

    Its SuperLink is ended by process id afterwards.
    """
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "FEDSGCG_CACHE": str(tmp_path / "cache"),
        "FEDSGCG_HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    yield environment
    for pid in processes_with(f"FLWR_HOME={tmp_path / 'flwr'}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_flwr_run_trains_and_writes_results(flower: dict[str, str], tmp_path: Path) -> None:
    settings = (
        "heldout=West federation.rounds=1 method.steps_per_round=1 "
        "network.base_width=4 data.image_size=32"
    )
    started = flwr(
        flower,
        "run",
        str(ROOT),
        "--federation-config",
        "num-supernodes=4 client-resources-num-cpus=1",
        "--run-config",
        f"overrides='{settings}'",
        "--format",
        "json",
    )
    run_id = json.loads(started)["run-id"]
    assert wait_for_end(flower, str(run_id)) == "finished:completed", flwr(
        flower, "log", str(run_id), "--show"
    )
    (results,) = (tmp_path / "home").rglob("results.parquet")
    table = pq.read_table(results)
    assert set(table["site"].to_pylist()) == {"West"}
    assert json.loads((results.parent / "outcome.json").read_text())["status"] == "completed"


def flwr(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        ["flwr", *arguments], env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for_end(environment: dict[str, str], run_id: str, seconds: float = 240) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        runs = json.loads(flwr(environment, "ls", "--format", "json"))["runs"]
        (status,) = [run["status"] for run in runs if str(run["run-id"]) == run_id]
        if status.startswith("finished"):
            return str(status)
        time.sleep(2)
    return "time ran out"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def processes_with(variable: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]
