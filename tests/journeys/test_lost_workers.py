"""A cell whose worker is killed is resumed once from its last round, and reported in a sentence."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ray import exceptions as ray

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.deploy.study.lost_workers import as_lost, lost_worker, raise_lost_workers, reasons
from fedsgcg.deploy.study.run import error_text
from tests.support import small


@pytest.mark.slow
@pytest.mark.row(28)
def test_a_killed_worker_is_resumed_once_and_reported_in_one_sentence(
    hospitals: Path, tmp_path: Path
) -> None:
    arguments = small.overrides(
        hospitals,
        tmp_path / "run",
        "method=source",
        "heldout=North,South",
        "federation.rounds=12",
        "ray.cpus=1",
    )
    study = subprocess.Popen(
        small.command("study", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        cell = _with_rounds_behind_it(tmp_path / "run", study)
        worker = int((cell / "journal/lock").read_text())
        assert worker != study.pid
        os.kill(worker, signal.SIGKILL)
        told, errors = study.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            study.kill()
        study.wait()
    assert study.returncode == 0, told + errors
    assert "Traceback" not in told + errors
    lines = [line for line in told.splitlines() if "lost its worker" in line]
    assert len(lines) == 1
    assert "killed or crashed" in lines[0]
    assert f"source · {cell.parent.name} · seed 0" in lines[0]
    events = [json.loads(line) for line in (cell / "events.jsonl").read_text().splitlines()]
    done = [event["round"] for event in events if event["event"] == "round.done"]
    assert done[-1] == 12
    # The kill can fall between a round's checkpoint and its event, so only the start is certain.
    started = [event["round"] for event in events if event["event"] == "round.started"]
    assert started.count(1) == 1  # what was done before the kill is not done again


def _with_rounds_behind_it(folder: Path, study: "subprocess.Popen[str]") -> Path:
    """Wait for a cell that has a checkpoint and has not ended."""
    end = time.monotonic() + 300
    while time.monotonic() < end and study.poll() is None:
        for path in folder.glob("*/*/*/journal/checkpoint-*.safetensors"):
            cell = path.parents[1]
            if not (cell / "outcome.json").exists() and not (cell / "results.parquet").exists():
                return cell
        time.sleep(0.02)
    raise AssertionError("no cell was under way")


LOST = (
    ray.OutOfMemoryError("Task was killed due to the node running low on memory"),
    ray.NodeDiedError("the node died"),
    ray.LocalRayletDiedError(),
    ray.WorkerCrashedError(),
    ray.ActorDiedError(),
    ray.ActorUnavailableError("away", None),
    ray.OwnerDiedError("ab", None, ""),
    ray.ObjectLostError("ab", None, ""),
    ray.RpcError("no answer"),
)


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_every_kind_of_lost_worker_is_a_sentence_and_not_a_trace(error: Exception) -> None:
    assert lost_worker(error)
    found = as_lost(error)
    assert found is not None
    assert found.code == "RND-410"
    assert error_text(error) == str(found)
    assert "Traceback" not in error_text(error)
    wrapped = RuntimeError("Simulation Runtime crashed.")
    wrapped.__cause__ = error
    assert lost_worker(wrapped) == lost_worker(error)


@pytest.mark.parametrize(
    "error", [ValueError("x"), fail("TRN-301"), ray.TaskCancelledError(), ray.OutOfDiskError("")]
)
def test_a_fault_of_the_cell_itself_is_not_tried_again(error: Exception) -> None:
    assert as_lost(error) is None


def test_the_reasons_cover_what_this_ray_has() -> None:
    """A newer Ray may have more errors of dead processes and machines."""
    found = [
        kind
        for kind in vars(ray).values()
        if isinstance(kind, type) and issubclass(kind, ray.RayError)
    ]
    named = [
        kind
        for kind in found
        if any(word in kind.__name__ for word in ("Died", "Crashed", "OutOfMemory"))
    ]
    assert named
    assert all(issubclass(kind, tuple(kind for kind, _ in reasons())) for kind in named)


def test_a_loss_that_flower_only_logs_takes_the_place_of_the_missing_answer() -> None:
    def lose(*errors: Exception) -> None:
        with raise_lost_workers():
            for error in errors:
                logging.getLogger("flwr").error(error)
            raise fail("RND-402")

    with pytest.raises(FedsgcgError, match="RND-410"):
        lose(ValueError("something else"), ray.ActorDiedError())
    with pytest.raises(FedsgcgError, match="RND-402") as caught:
        lose(ValueError("something else"))
    assert as_lost(caught.value) is None
