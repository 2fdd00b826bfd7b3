"""A study with differential privacy and attacks: figures, table and budgets from real cells."""

import io
import json
from pathlib import Path

import pytest

from fedsgcg.common.console import Screen
from fedsgcg.deploy.study.run import run_study
from tests.support.small import plan, rounds


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.row(65)
def test_a_privacy_study_ends_with_epsilons_attacks_and_their_figure(
    hospitals: Path, tmp_path: Path
) -> None:
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
        "heldout=East",
    )
    assert run_study(study, Screen(io.StringIO())) in (0, 3)
    epsilons: dict[str, list[float]] = {}
    for row in rounds(study.folder / "rounds.parquet"):
        if row["metric"] == "epsilon":
            epsilons.setdefault(row["method"], []).append(row["value"])
    assert set(epsilons) == {"sgcg privacy=dp_weak", "sgcg privacy=dp_strong"}
    assert max(epsilons["sgcg privacy=dp_weak"]) > max(epsilons["sgcg privacy=dp_strong"]) > 0
    attacks = [json.loads(path.read_text()) for path in study.folder.rglob("attacks.json")]
    assert len(attacks) == 3
    assert all(0 <= each["membership_update"]["auc"] <= 1 for each in attacks)
    page = (study.folder / "report.html").read_text()
    assert 'id="privacy"' in page
    assert "protects nobody" in page
    assert (study.folder / "figures" / "privacy-dice-over-epsilon.svg").is_file()
