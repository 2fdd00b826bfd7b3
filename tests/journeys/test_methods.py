"""Every method of the papers trains a federation that segments better than chance."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedsgcg.clients.app import build_client_app
from fedsgcg.clients.methods import METHODS
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.inprocess import run_in_process
from fedsgcg.server.app import build_server_app
from tests.support import sites
from tests.support.methods import Tree, with_method

pytestmark = pytest.mark.slow

OLD = ("source", "ram", "sgcg", "ram_sgcg")  # their journeys are in test_variants
CHANCE = 0.1
"""The best constant prediction marks every pixel and has a Dice below 0.05 in each case."""
PLAIN = ("method.steps_per_round=20", "method.learning_rate=0.01")
EPISODIC = ("method.steps_per_round=24", "method.learning_rate=0.01")  # Dice alone starts slowly
HARD = ("method.steps_per_round=32", "method.learning_rate=0.01")  # hard views take more steps
SPECIAL = {
    "bigaug": (*HARD, "network.norm=instance"),  # and nine transforms with BatchNorm still more
    "gin": HARD,
    "harmofl": (*PLAIN, "method.ram.sharing=summary", "adapt.by=[amplitude]"),
    "elcfs": (*EPISODIC, "method.ram.sharing=summary"),
    "saml": (*EPISODIC, "method.saml.second_order=false"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The settings of all methods, composed once, and a slice cache that they share."""
    folder = tmp_path_factory.mktemp("methods")
    root = write_hospitals(
        folder / "data", sites=("A", "B", "C"), cases_per_site=4, shape=(3, 40, 40)
    )
    places = (f"data.root={root}", f"site.cache={folder / 'cache'}", "data.sites=[A,B,C]")
    small = [text for text in sites.SMALL if not text.startswith("federation.rounds")]
    asked: tuple[str, ...] = ("method=source", "heldout=C", "federation.rounds=2", *places, *small)
    asked += ("data.validation_fraction=0",)  # every patient trains: 64 steps are few
    return compose([*asked, "site.shares=[amplitude_summary]"])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OLD])
def test_a_federation_of_the_method_ends_above_chance(
    tree: Tree, tmp_path: Path, name: str
) -> None:
    own = with_method(tree, name, *SPECIAL.get(name, PLAIN)) | {"output": str(tmp_path)}
    run_in_process(build_server_app(own), build_client_app(own), Plan.from_tree(own).members())
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["status"] == "completed"
    rows: list[dict[str, Any]] = pq.read_table(tmp_path / "results.parquet").to_pylist()
    dice = [row["dice"] for row in rows]
    assert sum(dice) / len(dice) > CHANCE, (name, dice)
