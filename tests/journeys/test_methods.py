"""Every method of the papers trains a federation that segments better than chance."""

import json

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

pytestmark = pytest.mark.slow

OLD = ("source", "ram", "sgcg", "ram_sgcg")  # their journeys are in test_variants
CHANCE = 0.1
"""The best constant prediction marks every pixel and has a Dice below 0.05 in each case."""
EPISODIC = ("method.learning_rate=1e-2", "method.steps_per_round=24")  # Dice alone starts slowly
# Hard views take more steps to learn, and with BatchNorm still more.
HARD = ("method.learning_rate=1e-2", "method.steps_per_round=32", "network.norm=instance")
SPECIAL = {
    "bigaug": HARD,
    "gin": HARD,
    "harmofl": ("method.ram.sharing=summary", "adapt.by=[amplitude]"),
    "elcfs": (*EPISODIC, "method.ram.sharing=summary"),
    "saml": (*EPISODIC, "method.saml.second_order=false"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return write_hospitals(folder, sites=("A", "B", "C"), cases_per_site=4, shape=(3, 40, 40))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OLD])
def test_a_federation_of_the_method_ends_above_chance(root, tmp_path, name):
    asked = [
        f"data.root={root}",
        f"output={tmp_path / 'run'}",
        f"site.cache={tmp_path / 'cache'}",
        "data.sites=[A,B,C]",
        *sites.SMALL,
        "federation.rounds=2",
        "heldout=C",
        f"method={name}",
        "method.steps_per_round=16",
        "method.learning_rate=5e-3",
        "site.shares=[amplitude_summary]",
        *SPECIAL.get(name, ()),
    ]
    tree = compose(list({text.partition("=")[0]: text for text in asked}.values()))
    run_in_process(build_server_app(tree), build_client_app(tree), Plan.from_tree(tree).members())
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["status"] == "completed"
    rows = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    dice = [row["dice"] for row in rows]
    assert sum(dice) / len(dice) > CHANCE, (name, dice)
