"""The settings: every group composes, every mistake is named at once, and the public option list is frozen."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import FedsgcgError
from common.plan import Plan
from common.settings import GROUPS, choices_of, compose, join

FROZEN = Path(__file__).with_name("options.txt")


def flatten(tree: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in tree.items():
        if isinstance(value, dict) and (prefix + name) not in ("data.classes", "data.structures"):
            names += flatten(value, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def test_the_option_list_is_the_frozen_one() -> None:
    names = "\n".join(sorted(flatten(join()))) + "\n"
    assert names == FROZEN.read_text(), (
        "the public options changed: write the new list to options.txt and the CHANGELOG"
    )


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in GROUPS for name in choices_of(group)])
def test_every_choice_of_every_group_is_a_valid_plan(choice: str) -> None:
    assert Plan.from_tree(join([choice])).digest()


def test_all_mistakes_are_named_at_once_with_the_nearest_known_setting() -> None:
    with pytest.raises(FedsgcgError) as caught:
        join(["roundz=3", "metod=sgcg", "data=promise13", "federation.round_deadline=3", "seed"])
    text = str(caught.value)
    assert len(caught.value.problems) >= 2
    assert "promise12" in text
    with pytest.raises(FedsgcgError) as caught:
        join(["roundz=3", "metod=sgcg", "federation.round_deadline=3"])
    assert len(caught.value.problems) == 3
    for hint in ("federation.rounds", "method", "federation.round_deadline_s"):
        assert hint in str(caught.value)


def test_all_wrong_values_are_named_at_once_with_what_was_expected() -> None:
    tree = join(
        ["prototypes.temperature=-1", "method.batch_size=many", "data.image_size=50", "prototypes.memory=forever"]
    )
    with pytest.raises(FedsgcgError) as caught:
        Plan.from_tree(tree)
    places = {problem.where for problem in caught.value.problems}
    assert places == {"prototypes.temperature", "method.batch_size", "data.image_size", "prototypes.memory"}
    assert "cumulative | discount | lagged | restart" in str(caught.value)


def test_command_line_beats_experiment_beats_group() -> None:
    assert compose(["data=promise12"])["data"]["image_size"] == 128
    assert compose(["data=promise12", "experiment=demo"])["data"]["image_size"] == 48
    assert compose(["data=promise12", "experiment=demo", "data.image_size=96"])["data"]["image_size"] == 96


def test_flower_run_config_carries_the_tree_unchanged() -> None:
    tree = join(["data=spinegm", "heldout=UCL", "seed=7"])
    assert join(run_config={"config-json": json.dumps(tree)}) == tree
    assert join(run_config={"overrides": "data=spinegm heldout=UCL seed=7"}) == tree


def test_two_sources_of_settings_at_once_are_refused() -> None:
    with pytest.raises(FedsgcgError, match="CFG-001"):
        join(run_config={"config-json": "{}", "overrides": "seed=1"})


def test_plan_survives_its_own_tree_and_ignores_places_in_its_digest() -> None:
    plan = Plan.from_tree(join(["heldout=B"]))
    assert Plan.from_tree(plan.to_tree()) == plan
    elsewhere = Plan.from_tree(join(["heldout=B", "data.root=/elsewhere", "site.home=/h", "device=cpu", "output=/o"]))
    assert elsewhere.digest() == plan.digest()
    assert Plan.from_tree(join(["heldout=C"])).digest() != plan.digest()
    assert Plan.from_tree(join(["heldout=B", "prototypes.temperature=1"])).digest() != plan.digest()
