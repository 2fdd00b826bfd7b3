"""A method and a network by import path: the documentation's example in a study and at a site."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedsgcg.clients.guard.policy import apply_policy
from fedsgcg.clients.methods import method_class
from fedsgcg.clients.predict.model import load_model
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small
from tests.unit.clients.test_policy import asked_of, policy_for

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-method.md"


@pytest.fixture
def my_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module of the documentation, on the path of Python; importable as `my_lab`."""
    folder = tmp_path / "lab"
    folder.mkdir()
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code
    (folder / "my_lab.py").write_text(code[1])
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_lab", raising=False)
    return folder / "my_lab.py"


OWN = ("method=my_lab:Smooth", "network=my_lab:SmallNet", "network.options={width: 4}")


def test_the_example_of_the_documentation_is_a_study(
    my_lab: Path, hospitals: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    texts = ["method=my_lab:Smooth,sgcg", *OWN[1:], "heldout=South", "federation.rounds=2"]
    study = small.plan(hospitals, output, *texts)
    assert [cell.method for cell in study.cells] == ["Smooth", "sgcg"]
    for cell in study.cells:
        run_cell_in_process(cell.tree)
        assert cell.done
    smooth, contrast = study.cells
    figures = {row["metric"] for row in pq.read_table(smooth.folder / "rounds.parquet").to_pylist()}
    assert {"loss_smooth", "loss_supervised"} <= figures
    card = json.loads((contrast.folder / "model.json").read_text())
    assert card["network"]["options"] == {"width": 4}
    assert load_model(contrast.folder, ["my_lab:SmallNet"]).prototypes.mean.shape == (2, 4)
    with pytest.raises(FedsgcgError, match="POL-706"):
        load_model(contrast.folder)


def test_own_options_change_the_plan_and_the_seed_the_weights(my_lab: Path) -> None:
    from fedsgcg.common.networks import build_network

    plan = Plan.from_tree(join(OWN))
    assert (plan.network.num_features, plan.recalibrates) == (4, True)
    assert Plan.from_tree(join([*OWN, "method.options={weight: 0.5}"])).digest() != plan.digest()
    first, same, other = (
        build_network(plan.network, 3, 2, seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(first[name].equal(same[name]) for name in first)
    assert not first["head.weight"].equal(other["head.weight"])


def test_traits_are_in_the_plan_and_compared_with_the_class(my_lab: Path) -> None:
    my_lab.write_text(my_lab.read_text() + "\n\nclass Pull(Smooth):\n    contrasts = True\n")
    plan = Plan.from_tree(join(["method=my_lab:Pull"]))
    assert (plan.method.traits, plan.method.contrasts, plan.method.statistics) == (
        ("contrasts",),
        True,
        True,
    )
    assert method_class(plan.method).__name__ == "Pull"
    other = dataclasses.replace(plan.method, name="my_lab:Smooth")
    with pytest.raises(FedsgcgError, match="CFG-011"):
        method_class(other)


def test_a_plan_is_read_without_the_class(my_lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = json.dumps(Plan.from_tree(join(OWN)).to_tree())
    monkeypatch.delitem(sys.modules, "my_lab")
    my_lab.unlink()
    assert Plan.from_tree(join(run_config={"config-json": sent})).network.num_features == 4
    assert "my_lab" not in sys.modules


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("method=no_such_lab:X", "No module named"),
        ("method=my_lab:Nothing", "Nothing"),
        ("method=my_lab:torch", "a module"),
        ("network=my_lab:Smooth", "not a Module"),
        ("network=my_lab:OneAnswer", "Tensor from forward"),
        ("network=my_lab:WrongCount", "num_features 3, but 4"),
        ("network=my_lab:Small", "logits"),
        ("network=my_lab:Picky", "TypeError"),
    ],
)
def test_what_does_not_keep_the_contract_says_what_was_found(
    my_lab: Path, text: str, found: str
) -> None:
    my_lab.write_text(
        my_lab.read_text()
        + """

class OneAnswer(SmallNet):
    def forward(self, images):
        return super().forward(images)[0]


class WrongCount(SmallNet):
    def __init__(self, i, o):
        super().__init__(i, o, 4)
        self.num_features = 3


class Small(SmallNet):
    def forward(self, images):
        logits, features = super().forward(images)
        return logits[..., ::2, ::2], features


class Picky(SmallNet):
    def __init__(self, i, o, *, must):
        super().__init__(i, o)
"""
    )
    with pytest.raises(FedsgcgError) as caught:
        join([text])
    (problem,) = caught.value.problems
    assert problem.code == "CFG-011"
    assert found in problem.found


def test_a_class_that_is_no_method_is_refused_before_the_start(
    my_lab: Path, hospitals: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedsgcgError, match=r"clients\.methods\.Source"):
        small.plan(hospitals, tmp_path / "run", "method=my_lab:SmallNet", "heldout=South")


def test_the_restoration_decoder_needs_the_shipped_network(my_lab: Path) -> None:
    with pytest.raises(FedsgcgError, match=r"method\.ram\.restoration"):
        Plan.from_tree(join(["method=ram", *OWN[1:]]))
    assert Plan.from_tree(join(["method=ram", "method.ram.restoration=0", *OWN[1:]])).method.mixes


def test_a_hospital_runs_only_code_that_it_allows(
    my_lab: Path, hospitals: Path, tmp_path: Path
) -> None:
    policy = policy_for(hospitals, tmp_path)
    plan = asked_of(hospitals, tmp_path, *OWN)
    with pytest.raises(FedsgcgError) as caught:
        apply_policy(plan, policy)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [
        ("POL-706", "method.name"),
        ("POL-706", "network.name"),
    ]
    allowed = dataclasses.replace(policy, code=("my_lab:Smooth", "my_lab:SmallNet"))
    assert apply_policy(plan, allowed).method.name == "my_lab:Smooth"
    inside = asked_of(hospitals, tmp_path, "method=fedsgcg.clients.methods.sgcg:SgCG")
    assert apply_policy(inside, policy).method.contrasts
    assert apply_policy(plan, None) is plan
