"""Every aggregation rule in a real federation: it completes, and it learns."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.aggregation import AGGREGATOR_NAMES
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small

pytestmark = pytest.mark.slow

HOSPITALS = ("A", "B", "C", "D", "E", "F")  # F is held out
TRAINING = {"krum": HOSPITALS[:5]}  # it needs five for one broken one; the others have three
METHODS = ("source", "sgcg")
"""Method of every other rule; unit tests have FedProx and SCAFFOLD with every method."""
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tree]:
    """The settings of both methods, composed once."""
    folder = tmp_path_factory.mktemp("rules")
    root = write_hospitals(folder, sites=HOSPITALS, cases_per_site=2, shape=(4, 40, 40))
    texts = (
        *("method.learning_rate=0.01", "method.batch_size=2", "data.validation_fraction=0.5"),
        *("method.steps_per_round=3", "federation.screening=off", "heldout=F"),
    )
    study = small.plan(root, folder / "run", f"method={','.join(METHODS)}", *texts)
    return {cell.tree["method"]["name"]: cell.tree for cell in study.cells}


@pytest.mark.parametrize("rule", AGGREGATOR_NAMES)
def test_every_rule_learns(rule: str, trees: dict[str, Tree], tmp_path: Path) -> None:
    tree = trees[METHODS[AGGREGATOR_NAMES.index(rule) % 2]]
    training = TRAINING.get(rule, HOSPITALS[:3])
    tree = {**tree, "output": str(tmp_path), "data": {**tree["data"], "sites": [*training, "F"]}}
    tree["federation"] = {**tree["federation"], "aggregator": rule}
    run_cell_in_process(tree)
    cell = Cell(rule, "F", 0, tree)
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
    assert len(loss[1]) == len(loss[3]) == len(training)
    assert sum(loss[3]) < sum(loss[1])
    weights = [row["value"] for row in rows if row["metric"] == "aggregation_weight"]
    weighs = rule in ("feddg_ga", "fedce")
    assert len(weights) == (3 * len(training) if weighs else 0)
    assert sum(weights) == pytest.approx(3 if weighs else 0)
