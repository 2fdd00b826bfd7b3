"""The typed settings are the only place of a default; YAML files have what a choice changes."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from fedsgcg.common.settings.choices import BASES, CONFIGS
from fedsgcg.common.settings.compose import chosen, compose
from fedsgcg.common.settings.defaults import NOT_SETTINGS, typed_defaults
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.run import RunSettings


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


DEFAULT_FILES = {f"{group}/{name}" for group, name in BASES.items() if name} | {
    f"{group}/{name}" for group, name in chosen([]).items() if name
}


@pytest.mark.parametrize("name", ["run", *sorted(DEFAULT_FILES)])
def test_no_file_of_a_default_choice_repeats_a_typed_default(name: str) -> None:
    tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) or {}
    tree.pop("defaults", None)
    group = name.partition("/")[0]
    typed = dict(leaves(typed_defaults()))
    values = dict(leaves(tree, "" if group == "run" else f"{group}."))
    assert {key for key, value in values.items() if key in typed and typed[key] == value} == set()


def test_every_setting_without_a_file_has_its_typed_default() -> None:
    typed = dict(leaves(typed_defaults()))
    composed = dict(leaves(compose([])))
    in_files = set()
    for name in DEFAULT_FILES:
        tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) or {}
        in_files |= {key for key, _ in leaves(tree, f"{name.partition('/')[0]}.")}
    assert {key: value for key, value in composed.items() if key not in in_files} == {
        key: value for key, value in typed.items() if key not in in_files
    }


def test_a_user_can_set_what_a_plan_or_a_run_has_but_for_what_a_study_fills_in() -> None:
    names = {*Plan.__dataclass_fields__, *RunSettings.__dataclass_fields__}
    assert set(compose([])) == names - set(NOT_SETTINGS)


def test_the_output_of_a_run_is_empty_by_default() -> None:
    assert compose([])["output"] == RunSettings().output == ""
