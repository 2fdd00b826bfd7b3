"""Every aggregation rule in a real federation of five hospitals: it completes, and it learns."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.aggregation import AGGREGATOR_NAMES
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small

pytestmark = pytest.mark.slow

HOSPITALS = ("A", "B", "C", "D", "E", "F")  # F is held out: krum needs five for one broken one
METHODS = ("source", "sgcg")
"""Method of every other rule; unit tests have FedProx and SCAFFOLD with every method."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    return write_hospitals(folder, sites=HOSPITALS, cases_per_site=2, shape=(4, 40, 40))


@pytest.mark.parametrize("rule", AGGREGATOR_NAMES)
def test_every_rule_learns(rule: str, root: Path, tmp_path: Path) -> None:
    method = METHODS[AGGREGATOR_NAMES.index(rule) % 2]
    texts = (
        *(f"federation.aggregator={rule}", f"method={method}", "heldout=F"),
        *("method.learning_rate=0.01", "method.batch_size=2", "data.validation_fraction=0.5"),
        *("method.steps_per_round=3", "federation.screening=off"),
    )
    (cell,) = small.plan(root, tmp_path / "run", *texts).cells
    run_cell_in_process(cell.tree)
    outcome = cell.outcome()
    assert outcome["status"] == "completed", outcome["problems"]
    rows = pq.read_table(cell.folder / "rounds.parquet").to_pylist()
    loss = {
        number: [
            row["value"]
            for row in rows
            if (row["round"], row["metric"]) == (number, "loss_supervised")
        ]
        for number in (1, 3)
    }
    assert len(loss[1]) == len(loss[3]) == 5
    assert sum(loss[3]) < sum(loss[1])
    weights = [row["value"] for row in rows if row["metric"] == "aggregation_weight"]
    weighs = rule in ("feddg_ga", "fedce")
    assert len(weights) == (15 if weighs else 0)
    assert sum(weights) == pytest.approx(3 if weighs else 0)
