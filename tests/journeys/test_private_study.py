"""A study with differential privacy and attacks: figures, table and budgets from real cells."""

import io
import json
from pathlib import Path

import pytest

from fedsgcg.common.console import Screen
from fedsgcg.deploy.study.run import run_study
from tests.support.small import plan


@pytest.mark.slow
@pytest.mark.row(65)
def test_a_privacy_study_ends_with_epsilons_attacks_and_their_figure(hospitals, tmp_path):
    pytest.importorskip("dp_accounting", reason="needs the extra privacy (dp-accounting)")
    study = plan(
        hospitals,
        tmp_path / "study",
        "experiment=privacy",
        "federation.rounds=2",
        "method.steps_per_round=2",
        "privacy=floors,dp_weak,dp_strong",
        "privacy.min_patients=1",
        "privacy.min_pixels=1",
        "runtime=inprocess",
        "seed=0",
        f"heldout={study_heldout(hospitals)}",
    )
    assert run_study(study, Screen(io.StringIO())) in (0, 3)
    found = {
        row["method"]: max(
            other["value"]
            for other in table_of(study.folder)
            if other["metric"] == "epsilon" and other["method"] == row["method"]
        )
        for row in table_of(study.folder)
        if row["metric"] == "epsilon"
    }
    assert set(found) == {"sgcg privacy=dp_weak", "sgcg privacy=dp_strong"}
    assert found["sgcg privacy=dp_weak"] > found["sgcg privacy=dp_strong"] > 0
    attacks = [json.loads(path.read_text()) for path in study.folder.rglob("attacks.json")]
    assert len(attacks) == 3
    assert all(0 <= each["membership_update"]["auc"] <= 1 for each in attacks)
    page = (study.folder / "report.html").read_text()
    assert 'id="privacy"' in page
    assert "protects nobody" in page
    assert (study.folder / "figures" / "privacy-dice-over-epsilon.svg").is_file()


def study_heldout(hospitals: Path) -> str:
    return sorted(path.name for path in hospitals.iterdir() if path.is_dir())[0]


def table_of(folder: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(folder / "rounds.parquet").to_pylist()
