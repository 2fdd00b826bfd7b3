"""Run folders: cleaning keeps the results of finished cells; no study uses another's folder."""

import io
import json
from pathlib import Path

import pytest

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.study.cleaning import PICTURES, RESUME, finished_cells, remove
from fedsgcg.deploy.study.record import check_same_study, write_record
from fedsgcg.deploy.study.run import run_study
from tests.support import small

KEPT = (
    "outcome.json",
    "results.parquet",
    "rounds.parquet",
    "model.json",
    "model.safetensors",
    "journal/plan.json",
)
GONE = (
    *(
        "journal/checkpoint-00002.safetensors",
        "journal/checkpoint-00003.safetensors",
        "journal/rounds/00001.arrow",
    ),
    *("sites/A/state/1.safetensors", "sites/A/pictures.arrow", "sites/A/features.arrow"),
)


def cell(run: Path, name: str, status: str) -> Path:
    folder = run / name
    for path in (*KEPT, *GONE, "sites/A/ledger.jsonl"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("12345")
    (folder / "outcome.json").write_text(json.dumps({"status": status}))
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_finished_cells_lose_what_only_unfinished_ones_need(tmp_path: Path) -> None:
    done, degraded = cell(tmp_path, "m/A/0", "completed"), cell(tmp_path, "m/B/0", "degraded")
    failed, open_one = cell(tmp_path, "m/C/0", "failed"), cell(tmp_path, "m/D/0", "completed")
    (open_one / "results.parquet").unlink()
    assert finished_cells(tmp_path) == [done, degraded]
    before = files(failed)
    freed = remove(done, RESUME) + remove(done, PICTURES)
    assert (freed.files, freed.size) == (len(GONE), 5 * len(GONE))
    assert files(done) == {*KEPT, "sites/A/ledger.jsonl"}
    assert remove(done, RESUME).files == 0
    assert files(failed) == before


def test_the_command_says_what_it_frees_and_touches_nothing_on_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = cell(tmp_path, "m/A/0", "completed")
    (tmp_path / "study.yaml").write_text("settings: {}")
    before = files(done)
    assert main(["clean", str(tmp_path), "--dry-run"]) == 0
    assert files(done) == before
    assert "4 files" in capsys.readouterr().out
    assert main(["clean", str(tmp_path)]) == 0
    assert files(done) == {*KEPT, "sites/A/ledger.jsonl"}
    assert main(["clean", str(done)]) == 2
    assert "no study.yaml" in capsys.readouterr().err


def test_another_study_does_not_enter_the_folder_whatever_its_methods(
    hospitals: Path, tmp_path: Path
) -> None:
    first = small.plan(hospitals, tmp_path / "run", "method=source", "heldout=South")
    (tmp_path / "run").mkdir()
    write_record(first)
    check_same_study(
        small.plan(hospitals, tmp_path / "run", "method=sgcg", "heldout=all", "seed=1,2")
    )
    with pytest.raises(FedsgcgError) as caught:
        check_same_study(
            small.plan(hospitals, tmp_path / "run", "method=sgcg", "federation.rounds=7")
        )
    (problem,) = caught.value.problems
    assert (problem.code, problem.found) == ("CFG-005", "federation.rounds=7")


@pytest.mark.slow
def test_a_study_without_a_held_out_hospital_says_so_and_leaves_no_checkpoint(
    hospitals: Path, tmp_path: Path
) -> None:
    stream = io.StringIO()
    study = small.plan(hospitals, tmp_path / "run", "method=source", "federation.rounds=1")
    assert run_study(study, Screen(stream, width=120)) == 0
    assert stream.getvalue().index("No hospital is held out") < stream.getvalue().index("round 1/1")
    (folder,) = finished_cells(tmp_path / "run")
    assert not list(folder.glob("journal/checkpoint-*"))
    assert main(["report", str(tmp_path / "run")]) == 0
    assert run_study(study, Screen(io.StringIO())) == 0, "a finished study is not run again"
