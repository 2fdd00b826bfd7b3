"""What a recorded cell keeps, and that every attack runs on it or says why it cannot."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.run_folder import paths
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.attacks.membership import merged_steps
from fedsgcg.deploy.attacks.run import RESULTS, attack_cell, attack_study
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from fedsgcg.server.records.received import FOLDER, Received, read_received
from tests.support import small

TEXTS = (
    *("experiment=attacks", "heldout=East", "federation.rounds=2", "method.steps_per_round=1"),
    *("prototypes.shared=full", "runtime=inprocess", "seed=0"),
)


def finished(hospitals: Path, folder: Path, *more: str) -> Path:
    (cell,) = small.plan(hospitals, folder, *TEXTS, *more).cells
    run_cell_in_process(cell.tree)
    return cell.folder


@pytest.fixture(scope="module")
def recorded(hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cell with the replies of its three hospitals."""
    return finished(hospitals, tmp_path_factory.mktemp("recorded"), "privacy=floors")


@pytest.fixture
def cell(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the cell."""
    shutil.copytree(recorded, tmp_path / "study" / "cell")
    return tmp_path / "study" / "cell"


def trained(found: list[Received]) -> list[Received]:
    return [each for each in found if each.weights is not None]


def test_every_reply_is_kept_with_the_model_that_it_answers(recorded: Path) -> None:
    found = trained(read_received(recorded))
    assert {(each.site, each.round) for each in found} == {
        (site, number) for site in ("North", "South", "West") for number in (1, 2)
    }
    first, second = ([each for each in found if each.round == number] for number in (1, 2))
    assert len({each.sent.digest() for each in first}) == 1
    assert len({each.weights.digest() for each in first if each.weights}) == 3
    # The kept models of round 1 merge to the model that round 2 was sent.
    examples = {
        row["site"]: row["value"]
        for row in small.rounds(recorded / "rounds.parquet")
        if (row["metric"], row["round"], row["phase"]) == ("examples", 1, "train")
    }
    merged = sum(
        examples[each.site] / sum(examples.values()) * each.weights.values.astype(np.float64)
        for each in first
        if each.weights is not None
    )
    assert np.abs(merged - second[0].sent.values).max() < 1e-6
    assert any(each.statistics is not None for each in read_received(recorded))


def test_a_cell_is_attacked_once_and_the_results_are_a_file(cell: Path) -> None:
    steps: list[str] = []
    found = attack_cell(cell, steps.append)
    assert json.loads((cell / RESULTS).read_text()) == json.loads(json.dumps(found, default=float))
    for name in ("membership_model", "membership_update", "membership_statistics"):
        assert 0 <= found[name]["auc"] <= 1
        assert found[name]["members"] > 0
    assert found["difference"]["error"] < 1e-3  # no noise: the patient exactly
    assert [each["pixels"] for each in found["span"]][:1] == [3]
    assert len(steps) == 3  # each slow part is named
    before = (cell / RESULTS).stat().st_mtime_ns
    assert attack_study(cell.parent) == []
    assert (cell / RESULTS).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["cut", "no model", "no replies", "no plan"])
def test_a_cell_that_cannot_be_attacked_says_so_and_stops_no_report(
    cell: Path, damage: str
) -> None:
    replies = sorted((cell / FOLDER).glob("0*.npz"))
    if damage == "cut":
        replies[0].write_bytes(replies[0].read_bytes()[:200])
    elif damage == "no model":
        for path in (cell / FOLDER).glob("model-*"):
            path.unlink()
    elif damage == "no replies":
        for path in replies:
            path.unlink()
    else:
        (cell / FOLDER / "plan.json").write_text("{")
    with pytest.raises(FedsgcgError, match="PRV-981"):
        attack_cell(cell)
    assert [problem.code for problem in attack_study(cell.parent)] == ["PRV-981"]
    assert not (cell / RESULTS).exists()


def test_without_recorded_replies_there_is_nothing_to_attack(cell: Path) -> None:
    shutil.rmtree(cell / FOLDER)
    with pytest.raises(FedsgcgError, match="PRV-981"):
        attack_cell(cell)
    assert attack_study(cell.parent) == []  # a study without privacy.record


@pytest.mark.slow
def test_with_secure_sums_the_steps_of_the_merged_model_are_what_is_seen(
    hospitals: Path, tmp_path: Path
) -> None:
    more = ("privacy=secure_sums", "prototypes.memory=lagged")
    folder = finished(hospitals, tmp_path, *more)
    received = read_received(folder)
    assert trained(received) == []
    assert not any(each.statistics for each in received)
    model = Weights.from_state(load_file(folder / paths.WEIGHTS))
    steps = [each for each in merged_steps(received, model) if each.site == "North"]
    assert [each.round for each in steps] == sorted({each.round for each in received})
    for earlier, later in pairwise(steps):
        assert earlier.weights is not None
        assert earlier.weights.digest() == later.sent.digest()
