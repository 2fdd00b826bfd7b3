"""Every command starts fast, prints its version, and ends cleanly when it is stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedsgcg.common.console import EVENTS_VERSION, run_command
from fedsgcg.common.run_folder.events import STUDY_EVENTS, wrong_fields
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.cli import coordinator as cli
from fedsgcg.deploy.cli import site as site_cli
from fedsgcg.deploy.cli.dry_run import models_in_checkpoint, training_steps
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small
from tests.support.plans import small_plan

HEAVY = ("torch", "flwr", "ray", "nibabel", "hydra", "scipy", "sklearn", "matplotlib")


@pytest.mark.parametrize("module", ["fedsgcg.deploy.cli.coordinator", "fedsgcg.deploy.cli.site"])
def test_help_loads_nothing_heavy(module: str) -> None:
    code = f"import sys; sys.argv = ['x', '--help']; import {module}\n"
    code += f"try: {module}.main()\nexcept SystemExit: pass\n"
    code += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "COMMAND" in done.stdout


@pytest.mark.parametrize("main", [cli.main, site_cli.main])
def test_the_version_is_printed_with_those_of_its_libraries(
    main, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("fedsgcg")
    assert "torch" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_own_code(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def work(console: object) -> int:
        os.kill(os.getpid(), number)
        return 0

    assert run_command(work, "Interrupted. Go on.") == code
    assert "Interrupted. Go on." in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_sigterm_ends_a_study_that_the_same_command_goes_on_with(
    hospitals: Path, tmp_path: Path
) -> None:
    texts = small.overrides(
        hospitals, tmp_path / "run", "method=source", "heldout=South", "federation.rounds=200"
    )
    process = subprocess.Popen(
        small.command("study", *texts, "runtime=inprocess"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "round 1/" not in (line := process.stdout.readline()):
        assert line, "the study ended before its first round"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    assert "resumes after the last completed round" in err
    assert "Traceback" not in out + err


def test_a_dry_run_names_the_cells_and_the_disk_and_writes_nothing(
    hospitals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = small.overrides(
        hospitals, tmp_path / "run", "method=source,sgcg", "heldout=all", "seed=range(2)"
    )
    assert cli.main(["study", "--dry-run", *texts]) == 0
    out = capsys.readouterr().out
    assert "source: 8 cells, 8 to do" in out
    assert "MB of models" in out
    # 16 cells of 3 training sites, 3 rounds of 2 steps
    assert " 288 training steps" in out
    assert not (tmp_path / "run").exists()


def test_the_estimated_steps_are_those_that_training_takes(hospitals: Path, tmp_path: Path) -> None:
    """In epochs the steps depend on the slices, which the estimate counts in the headers."""
    texts = ("heldout=South", "method=source", "method.steps_per_round=0", "method.batch_size=4")
    for ownership in ("by_site", "pooled"):
        (cell,) = small.plan(
            hospitals, tmp_path / ownership, *texts, f"federation={ownership}"
        ).cells
        run_cell_in_process(cell.tree)
        rows = pq.read_table(cell.folder / "rounds.parquet", filters=[("metric", "=", "steps")])
        assert training_steps(Plan.from_tree(cell.tree)) == sum(rows["value"].to_pylist())


@pytest.mark.parametrize(
    ("rule", "models"), [("fedavg", 1), ("scaffold", 4), ("fedadam", 5), ("fedavgm", 3)]
)
def test_a_checkpoint_holds_the_model_and_the_state_of_the_rule(
    tmp_path: Path, rule: str, models: int
) -> None:
    """Three of four hospitals train; moments have twice the precision of a model."""
    assert models_in_checkpoint(small_plan(tmp_path, federation__aggregator=rule)) == models


def test_quiet_prints_problems_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings", "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["settings", "-q", "seeed=1"]) == 2
    assert "CFG-001" in capsys.readouterr().err


def test_json_puts_events_and_nothing_else_on_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["settings", "--json", "seed=4"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["settings"]["seed"] == 4
    assert cli.main(["settings", "--json", "seeed=1"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["event"], found["code"]) == ("error", "CFG-001")


@pytest.mark.slow
def test_a_study_prints_its_rounds_as_json_lines(hospitals: Path, tmp_path: Path) -> None:
    texts = small.overrides(
        hospitals, tmp_path / "run", "method=source", "heldout=South", "federation.rounds=1"
    )
    done = small.run("study", "--json", *texts, "runtime=inprocess")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    names = [event["event"] for event in events]
    assert (names[0], names[-1]) == ("study.started", "study.finished")
    assert {"run.started", "round.done", "heldout.done", "run.finished"} <= set(names)
    assert events[-1]["status"] == "completed"
    assert {event.pop("version") for event in events} == {EVENTS_VERSION}
    of_run = [event for event in events if event.pop("cell", None) == "source · South · seed 0"]
    assert len(of_run) == len(events) - 2
    for event in of_run:
        assert wrong_fields(event) == [], event
    for event in (events[0], events[-1]):
        assert set(event) == {"event", *STUDY_EVENTS[event["event"]].fields}
    log = (tmp_path / "run" / "source" / "South" / "0" / "events.jsonl").read_text()
    assert of_run == [json.loads(line) for line in log.splitlines()]  # there is no other source
    assert "report:" in done.stderr


def test_verbose_shows_where_an_error_arose(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings", "-v", "seeed=1"]) == 2
    assert "Traceback" in capsys.readouterr().err
