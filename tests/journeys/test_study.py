"""A study run to its end, and one interrupted and called again: the same hash everywhere."""

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fedsgcg.common.console import Screen
from fedsgcg.deploy.study.preflight import Machine
from fedsgcg.deploy.study.run import run_study
from fedsgcg.deploy.study.runtimes import run_cell_in_process, run_cell_on_ray
from tests.support import small

pytestmark = pytest.mark.slow


def test_study_runs_every_cell_and_a_second_call_does_nothing(
    hospitals: Path, tmp_path: Path
) -> None:
    arguments = small.overrides(
        hospitals,
        tmp_path / "run",
        "method=source,sgcg",
        "heldout=East,South",
        "seed=0",
        "federation.rounds=2",
    )
    first = small.run("study", *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = small.table(tmp_path / "run" / "results.parquet")
    sites = sorted({row["heldout"] for row in rows})
    assert {(row["method"], row["heldout"]) for row in rows} == {
        (m, s) for m in ("source", "sgcg") for s in sites
    }
    assert all(row["site"] == row["heldout"] for row in rows)
    assert len(sites) >= 2
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    stamps = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/*/*/results.parquet")
    }
    second = small.run("study", *arguments)
    assert second.returncode == 0, second.stderr
    assert "0 to do" in second.stdout
    assert stamps == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/*/*/results.parquet")
    }


def test_killed_study_called_again_ends_with_the_same_table(
    hospitals: Path, tmp_path: Path
) -> None:
    folds = "heldout=East,North,South"
    axes = ("method=sgcg", folds, "seed=0", "federation.rounds=4", "ray.cpus=1")
    whole = small.run("study", *small.overrides(hospitals, tmp_path / "whole", *axes))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    cut = tmp_path / "cut"
    arguments = small.overrides(hospitals, cut, *axes)
    process = subprocess.Popen(
        small.command("study", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        # Somewhere in the second cell or later: one cell is done, another has rounds behind it.
        wait_for(
            lambda: len(list(cut.glob("*/*/*/results.parquet"))) >= 1 and has_open_rounds(cut),
            process,
        )
    finally:
        kill_session(process)
    left = [
        path.parent
        for path in cut.glob("*/*/*/journal")
        if not (path.parent / "results.parquet").exists()
    ]
    assert left, "the study ended before it could be interrupted"
    again = small.run("study", *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert small.table(cut / "results.parquet") == small.table(
        tmp_path / "whole" / "results.parquet"
    )
    for path in (tmp_path / "whole").glob("*/*/*/outcome.json"):
        other = cut / path.relative_to(tmp_path / "whole")
        assert json.loads(other.read_text())["digest"] == json.loads(path.read_text())["digest"]


@pytest.mark.row(49)
def test_both_runtimes_and_any_number_of_actors_give_the_same_model(
    hospitals: Path, tmp_path: Path
) -> None:
    hashes, machines = {}, []
    for name, machine in (
        ("inprocess", None),
        ("one actor", Machine(1, 0)),
        ("two actors", Machine(2, 0)),
    ):
        study = small.plan(
            hospitals,
            tmp_path / name.replace(" ", "-"),
            "method=sgcg",
            "heldout=South",
            "federation.rounds=2",
        )
        (cell,) = study.cells
        if machine is None:
            run_cell_in_process(cell.tree)
        else:
            run_cell_on_ray(cell.tree, machine)
        hashes[name] = cell.outcome()["digest"]
        machines.append(cell.outcome()["machine"])
    assert len(set(hashes.values())) == 1, hashes
    assert machines[1:] == machines[:-1], (
        "equal hashes are promised for one processor, torch and number of threads"
    )


def test_another_seed_gives_another_model(hospitals: Path, tmp_path: Path) -> None:
    hashes = set()
    for seed in (0, 1):
        (cell,) = small.plan(
            hospitals, tmp_path / str(seed), "heldout=South", f"seed={seed}", "federation.rounds=1"
        ).cells
        run_cell_in_process(cell.tree)
        hashes.add(cell.outcome()["digest"])
    assert len(hashes) == 2


def test_second_process_on_the_same_folder_is_refused_and_named(
    hospitals: Path, tmp_path: Path
) -> None:
    arguments = small.overrides(
        hospitals, tmp_path / "run", "method=source", "heldout=South", "federation.rounds=40"
    )
    first = subprocess.Popen(
        small.command("study", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: has_open_rounds(tmp_path / "run"), first)
        second = small.run("study", *arguments)
    finally:
        kill_session(first)
    assert second.returncode == 2
    assert "CFG-006" in second.stderr
    assert str(first.pid) in second.stderr


def test_same_folder_with_other_settings_is_refused_and_the_difference_named(
    hospitals: Path, tmp_path: Path
) -> None:
    study = small.plan(
        hospitals, tmp_path / "run", "method=source", "heldout=South", "federation.rounds=1"
    )
    assert run_study(study, Screen(io.StringIO())) == 0
    done = small.run(
        "study",
        *small.overrides(
            hospitals, tmp_path / "run", "method=source", "heldout=South", "federation.rounds=2"
        ),
    )
    assert done.returncode == 2
    assert "CFG-005" in done.stderr
    assert "federation.rounds" in done.stderr


@pytest.mark.parametrize(
    ("argument", "code", "hint"),
    [
        ("heldout=Soth", "CFG-002", "South"),
        ("data.sites=[South]", "CFG-003", "two or more"),
        ("device=cuda", "CFG-004", "no CUDA device"),
        ("method=sgcgg", "CFG-001", "sgcg"),
        ("seed=one", "CFG-001", "whole number"),
        ("runtime=fast", "CFG-001", "inprocess"),
        ("data.root=/nowhere", "DAT-101", "/nowhere"),
    ],
)
def test_bad_command_line_says_what_was_found_and_expected(
    hospitals: Path, tmp_path: Path, argument: str, code: str, hint: str
) -> None:
    if code == "CFG-004":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    done = small.run(
        "simulate", *small.overrides(hospitals, tmp_path / "run", "heldout=South", argument)
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert code in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def has_open_rounds(folder: Path) -> bool:
    """Whether a cell without results has a round behind it."""
    return any(
        not (path.parents[1] / "results.parquet").exists()
        for path in folder.glob("*/*/*/journal/checkpoint-*.safetensors")
    )


def wait_for(condition: object, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until the condition holds; fail when the process ends first or time runs out."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended first, exit code {process.returncode}"
        assert time.monotonic() < end, "time ran out"
        time.sleep(0.02)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the process and everything it started (Ray's daemons share its session)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == process.pid:
                os.kill(int(stat.parent.name), signal.SIGKILL)
