"""A study with variants of SgCG, adapted to the unseen hospital, and the same in `predict`."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from fedsgcg.deploy.cli.site import main
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from fedsgcg.server.report.build import make_report
from tests.support import small

pytestmark = pytest.mark.slow
ASKED = (
    "method=sgcg_sites",
    "method.sgcg.between=1",
    "method.sgcg.hard=0.5",
    "method.sgcg.recalibration=300",
    "site.shares=[site_statistics]",
    "prototypes.warmup_rounds=0",
    "federation.ema=0.5",
    "federation.selection=source_validation",
    "data.intensity=flat",
    "data.flat_sigma=8",
    "adapt.by=[batchnorm,prototypes]",
    "adapt.distance=5",
    "adapt.probability=0.6",
    "method.steps_per_round=6",
    "method.learning_rate=1e-2",
    "device=cpu",
    "heldout=West",
)


def dice(rows):
    return sorted(float(row["dice"]) for row in rows)


def test_variants_train_and_adapted_results_stay_apart(hospitals, tmp_path, capsys):
    (cell,) = small.plan(hospitals, tmp_path / "study", "runtime=inprocess", *ASKED).cells
    run_cell_in_process(cell.tree)
    assert json.loads((cell.folder / "outcome.json").read_text())["status"] == "completed"
    rounds = pq.read_table(cell.folder / "rounds.parquet").to_pylist()
    found = {row["metric"] for row in rounds}
    assert {"gradient_cosine", "loss_between", "ema_dice", "head_fitted"} <= found
    plain = pq.read_table(cell.folder / "results.parquet")
    adapted = pq.read_table(cell.folder / "adapted.parquet").to_pylist()
    assert "adapt" not in plain.column_names
    assert {row["site"] for row in adapted} == {"West"}
    for way in ("batchnorm", "prototypes"):
        rows = [row for row in adapted if row["adapt"] == way]
        assert len(rows) == plain.num_rows
        assert dice(rows) != dice(plain.to_pylist()), way
        out = tmp_path / way
        call = ["predict", cell.folder, "--data", hospitals, "--site", "West", "-o", out]
        assert (
            main([*map(str, call), "--adapt", way, "--device", "cpu", "--adapt-share", "0.5"]) == 0
        )
        if way == "batchnorm":
            with (out / "scores.csv").open(newline="") as file:
                assert dice(csv.DictReader(file)) == pytest.approx(dice(rows), abs=1e-12)
    assert "transductive" in capsys.readouterr().out
    page = make_report(cell.folder).read_text()
    assert "Transductive: the images of the held-out hospital were used" in page
    assert page.count("BatchNorm moments</td>") == 1
