"""Settings: every group composes, mistakes are reported at once, public options are fixed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedsgcg.clients.methods import METHODS
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.networks import NETWORKS
from fedsgcg.common.settings.compose import GROUPS, MAPS, choices_of, compose, join, nearest
from fedsgcg.common.settings.plan import METHOD_NAMES, NETWORK_NAMES, Plan

FROZEN = Path(__file__).with_name("options.txt")


def flatten(tree: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in tree.items():
        if isinstance(value, dict) and (prefix + name) not in MAPS:
            names += flatten(value, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def test_the_option_list_is_the_frozen_one() -> None:
    names = "\n".join(sorted(flatten(join()))) + "\n"
    assert names == FROZEN.read_text(), (
        "the public options changed: write the new list to options.txt and the CHANGELOG"
    )


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group in GROUPS for name in choices_of(group)]
)
def test_every_choice_of_every_group_is_a_valid_plan(choice: str) -> None:
    assert Plan.from_tree(join([choice])).digest()


@pytest.mark.row(52)
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


@pytest.mark.row(52)
def test_all_wrong_values_are_named_at_once_with_what_was_expected() -> None:
    tree = join(
        [
            "prototypes.temperature=-1",
            "method.batch_size=many",
            "data.image_size=50",
            "prototypes.memory=forever",
        ]
    )
    with pytest.raises(FedsgcgError) as caught:
        Plan.from_tree(tree)
    places = {problem.where for problem in caught.value.problems}
    assert places == {
        "prototypes.temperature",
        "method.batch_size",
        "data.image_size",
        "prototypes.memory",
    }
    assert "cumulative | discount | lagged | restart" in str(caught.value)


@pytest.mark.row(53)
def test_command_line_beats_experiment_beats_group() -> None:
    assert compose(["data=promise12"])["data"]["image_size"] == 128
    assert compose(["data=promise12", "experiment=demo"])["data"]["image_size"] == 48
    assert (
        compose(["data=promise12", "experiment=demo", "data.image_size=96"])["data"]["image_size"]
        == 96
    )


def test_flower_run_config_carries_the_tree_unchanged() -> None:
    tree = join(["data=spinegm", "heldout=UCL", "seed=7"])
    assert join(run_config={"config-json": json.dumps(tree)}) == tree
    assert join(run_config={"overrides": "data=spinegm heldout=UCL seed=7"}) == tree


@pytest.mark.row(53)
def test_two_sources_of_settings_at_once_are_refused() -> None:
    with pytest.raises(FedsgcgError, match="CFG-001"):
        join(run_config={"config-json": "{}", "overrides": "seed=1"})


def test_plan_survives_its_own_tree_and_ignores_places_in_its_digest() -> None:
    plan = Plan.from_tree(join(["heldout=B"]))
    assert Plan.from_tree(plan.to_tree()) == plan
    elsewhere = Plan.from_tree(
        join(["heldout=B", "data.root=/elsewhere", "site.home=/h", "device=cpu", "output=/o"])
    )
    assert elsewhere.digest() == plan.digest()
    assert Plan.from_tree(join(["heldout=C"])).digest() != plan.digest()
    assert Plan.from_tree(join(["heldout=B", "prototypes.temperature=1"])).digest() != plan.digest()


def refused(*overrides: str) -> FedsgcgError:
    with pytest.raises(FedsgcgError) as caught:
        Plan.from_tree(join(overrides))
    assert {problem.code for problem in caught.value.problems} == {"CFG-001"}
    return caught.value


@pytest.mark.parametrize(
    "value",
    [
        "/tmp/My Data (1)",
        "/tmp/lr=1,2",
        "/x/{site}",
        "/a[b]",
        "/it's",
        '/say "hi"',
        "/a:b%c",
        "/${x}",
        "/tmp/Zürich",
    ],
)
@pytest.mark.parametrize("key", ["data.root", "output", "site.home", "site.cache"])
def test_a_folder_is_taken_to_the_letter(key: str, value: str) -> None:
    tree: Any = join([f"{key}={value}"])
    for part in key.split("."):
        tree = tree[part]
    assert tree == value


def test_quotes_about_a_whole_value_are_not_part_of_it_and_the_home_folder_is_put_in() -> None:
    tree = join(
        [
            "output='a b'",
            'data.root="~/x"',
            "site.home=~/homes/{site}",
            "run=~y",
            "heldout=St. Mary, (2)",
        ]
    )
    home = str(Path.home())
    assert (tree["output"], tree["data"]["root"], tree["site"]["home"]) == (
        "a b",
        f"{home}/x",
        f"{home}/homes/{{site}}",
    )
    assert (tree["run"], tree["heldout"]) == ("~y", "St. Mary, (2)")
    assert join(run_config={"overrides": "output='/tmp/a b'"})["output"] == "/tmp/a b"


@pytest.mark.parametrize(
    "text", ["data.sites=[A", "data.sites=A,B", "data.name=a (b", "seed=${nope}", "data.name=a:{b"]
)
def test_a_value_that_cannot_be_read_names_its_argument_and_no_library(text: str) -> None:
    (problem,) = refused("federation.rounds=3", text).problems
    key, _, value = text.partition("=")
    assert (problem.where, problem.found, problem.expected) == (key, text, "name=value")
    assert f"'{key}=\"{value}\"'" in problem.action
    assert "hydra" not in str(problem).lower()


def test_an_open_quote_in_a_line_of_overrides_is_refused() -> None:
    with pytest.raises(FedsgcgError, match="close every quote"):
        join(run_config={"overrides": "output='a"})


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("+data.root=/x", "write data.root=/x"),
        ("++seed=3", "write seed=3"),
        ("+experiment=demo", "write experiment=demo"),
        ("~data.root", "data.root=VALUE"),
        ("~data", "data=VALUE"),
        ("+federation.round=3", "did you mean 'federation.rounds'?"),
    ],
)
def test_settings_can_be_changed_not_added_nor_removed(text: str, instead: str) -> None:
    (problem,) = refused(text).problems
    assert instead in problem.action


def test_a_setting_given_twice_is_refused_with_both_values() -> None:
    error = refused(
        "federation.rounds=2", "seed=1", "federation.rounds=3", "data=synthetic", "data=promise12"
    )
    assert [problem.found for problem in error.problems] == [
        "federation.rounds=2 and federation.rounds=3",
        "data=synthetic and data=promise12",
    ]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("method.lr", "method.learning_rate"),
        ("prototypes.temp", "prototypes.temperature"),
        ("federation.deadline", "federation.join_deadline_s"),
        ("method.temperature", "prototypes.temperature"),
        ("data.augmentation.rotate", "data.augmentation.rotate_degrees"),
        ("data.augmentation.blur", "data.augmentation.intensity.blur"),
        ("rounds", "federation.rounds"),
        ("federation.round", "federation.rounds"),
        ("lr", "method.learning_rate"),
        ("batch", "method.batch_size"),
        ("deadline", "federation.join_deadline_s"),
        ("method.epochs", "method.local_epochs"),
    ],
)
def test_the_setting_that_was_probably_meant_is_named(given: str, meant: str) -> None:
    assert f"did you mean {meant!r}?" in str(refused(f"{given}=1"))


def test_without_a_near_name_the_settings_of_the_group_are_listed() -> None:
    found = str(refused("privacy.zzz=1"))
    assert "settings of privacy: " in found
    assert "min_patients, min_pixels" in found


def test_types_are_named_in_words() -> None:
    error = refused(
        *(
            "data.sites=3",
            "seed=a",
            "method.learning_rate=b",
            "data.fill_holes=2",
            "data.name=[a]",
            "data.classes=4",
        )
    )
    assert {problem.where: problem.expected for problem in error.problems} == {
        "data.sites": "a list such as [A,B]",
        "seed": "a whole number",
        "method.learning_rate": "a number",
        "data.fill_holes": "true or false",
        "data.name": "text",
        "data.classes": "names and values such as {A: 1}",
    }


def test_the_names_that_a_plan_accepts_are_those_that_exist() -> None:
    assert set(NETWORKS) == set(NETWORK_NAMES)
    assert set(METHODS) == set(METHOD_NAMES)
    assert "unet" in str(refused("network.name=vnet"))
    assert "source | ram | sgcg | ram_sgcg" in str(refused("method.name=sgcq"))
    plan = Plan.from_tree(join())
    with pytest.raises(FedsgcgError, match="name"):
        dataclasses.replace(plan, network=dataclasses.replace(plan.network, name="vnet"))


@pytest.mark.parametrize("key", ["data.sites", "observers"])
def test_names_of_hospitals_stay_as_they_are_written(key: str) -> None:
    text = (
        "[010, NO,12:30,1_000,1e3,1.10,yes,2021-01-01,null,true,St. Mary,"
        '"A, B",\'it"s\',"say \\"hi\\"",K\u00f6ln]'
    )
    tree: Any = join([f"{key}={text}"])
    for part in key.split("."):
        tree = tree[part]
    names = [
        "010",
        "NO",
        "12:30",
        "1_000",
        "1e3",
        "1.10",
        "yes",
        "2021-01-01",
        "null",
        "true",
        "St. Mary",
    ]
    assert tree == [*names, "A, B", 'it"s', 'say "hi"', "K\u00f6ln"]
    assert join([f"{key}=[]"])["data" if key == "data.sites" else key] in (join()["data"], [])


@pytest.mark.parametrize("text", ["[A", "[A,]", "A,B", "[A,,B]", "[[A],B]", '["A]'])
def test_a_list_of_names_that_is_none_is_refused(text: str) -> None:
    refused(f"data.sites={text}")


def test_a_name_given_twice_in_braces_is_refused() -> None:
    (problem,) = refused("data.classes={background:[0],gland:[1],gland:[2]}").problems
    assert "gland twice" in problem.found
    assert join(["data.classes={background:[0],gland:[1]}"])["data"]["classes"] == {
        "background": [0],
        "gland": [1],
    }
    refused("data.augmentation={flip:0.5,flip:0.1}")


def test_text_that_is_no_utf8_is_refused() -> None:
    assert "UTF-8" in str(refused("data.root=/data/M\udcfcller"))


def test_a_name_in_another_unicode_form_is_shown_letter_by_letter() -> None:
    hint = nearest("Z\u00fcrich", ["Zu\u0308rich", "Bern"])
    assert "Zu\\u0308rich, not Z\\u00fcrich" in hint
