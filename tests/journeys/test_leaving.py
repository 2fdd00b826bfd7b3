"""A run that is interrupted in any way ends soon, with its exit code and a reusable run folder."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journeys.test_study import has_open_rounds, kill_session, wait_for
from tests.support import small

pytestmark = pytest.mark.slow
SOON_S = 60
IN_PROCESS = "runtime=inprocess"


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Restore the default handler: a shell's background job, and its children, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("runtime", ["inprocess", "ray"])
@pytest.mark.row(51)
def test_interrupted_run_ends_soon_and_frees_its_folder(
    hospitals: Path, tmp_path: Path, runtime: str
) -> None:
    arguments = small.overrides(
        hospitals, tmp_path, "heldout=South", "federation.rounds=200", f"runtime={runtime}"
    )
    process = subprocess.Popen(
        small.command("simulate", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_for(lambda: has_open_rounds(tmp_path), process)
        os.kill(process.pid, signal.SIGINT)
        _, words = process.communicate(timeout=SOON_S)
    finally:
        kill_session(process)
    assert process.returncode == 130, words
    assert b"Interrupted" in words
    lock = next(tmp_path.glob("*/*/*/journal")) / "lock"
    subprocess.run(["flock", "--nonblock", str(lock), "true"], check=True, timeout=10)


def test_hospitals_that_miss_the_deadline_fail_the_run_and_not_the_interpreter(
    hospitals: Path, tmp_path: Path
) -> None:
    slow = ("method.steps_per_round=400", "federation.round_deadline_s=0.5")
    done = small.run("simulate", *small.overrides(hospitals, tmp_path, "heldout=South", *slow))
    assert done.returncode == 1, done.stderr
    assert "RND-402" in done.stdout
    (outcome,) = tmp_path.glob("*/*/*/outcome.json")
    assert json.loads(outcome.read_text())["status"] == "failed"


def test_run_folder_is_never_taken_for_a_study_of_other_images(
    hospitals: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(hospitals, other)
    arguments = ("heldout=South", "federation.rounds=1", IN_PROCESS)
    output = tmp_path / "run"
    assert small.run("simulate", *small.overrides(hospitals, output, *arguments)).returncode == 0
    moved = small.run("simulate", *small.overrides(other, output, *arguments))
    assert moved.returncode == 0, moved.stderr
    assert "0 to do" in moved.stdout, "the same files in another place are the same study"
    images = sorted((other / "East").glob("*_image.nii.gz"))
    shutil.copy(images[0], images[1])
    refused = small.run("simulate", *small.overrides(other, output, *arguments))
    assert refused.returncode == 2, refused.stdout
    assert "CFG-005" in refused.stderr
    assert "other images" in refused.stderr


def test_ray_cluster_that_is_not_there_is_named_at_once(hospitals: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = small.run(
        "study", *small.overrides(hospitals, tmp_path, "heldout=all", "ray.address=127.0.0.1:1")
    )
    assert done.returncode == 2
    assert "CFG-007" in done.stderr
    assert time.monotonic() - started < SOON_S


def test_damaged_record_is_named_and_not_a_traceback(hospitals: Path, tmp_path: Path) -> None:
    arguments = small.overrides(
        hospitals, tmp_path, "heldout=South", "federation.rounds=1", IN_PROCESS
    )
    assert small.run("simulate", *arguments).returncode == 0
    for name in ("study.yaml", "*/*/*/outcome.json"):
        (path,) = tmp_path.glob(name)
        whole = path.read_text()
        path.write_text("{ cut off: [")
        done = small.run("simulate", *arguments)
        assert done.returncode == 2, done.stdout
        assert "SRV-402" in done.stderr
        assert path.name in done.stderr
        assert "Traceback" not in done.stderr
        path.write_text(whole)
