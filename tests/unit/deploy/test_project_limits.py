"""Limits of the hospitals in the project file reach the coordinator's app."""

import json
from pathlib import Path

import pytest
import yaml

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.coordinator.project import project_text, read_project

LIMITS = {"North": {"patients": 300, "slices": 9000}, "all": {"slices": 20000}}


def write(folder: Path, limits: object) -> Path:
    path = folder / "project.yaml"
    tree = {"name": "p", "server": "fed.example.org:8443", "sites": ["North", "South"]}
    path.write_text(yaml.safe_dump({**tree, "limits": limits}))
    return path


def test_limits_are_part_of_the_plan_that_the_app_gets(tmp_path: Path) -> None:
    """Row 4: what bounds a site comes from the coordinator's own file."""
    project = read_project(write(tmp_path, LIMITS))
    tree = json.loads(json.dumps(project.settings()))  # as `config-json` carries it
    federation = Plan.from_tree({**tree, "output": "runs"}).federation
    assert federation.limit("North") == {"patients": 300, "slices": 9000}
    assert federation.limit("South") == {"patients": 100_000, "slices": 20000}
    (tmp_path / "again.yaml").write_text(project_text(project))
    assert read_project(tmp_path / "again.yaml") == project


@pytest.mark.parametrize(
    "limits",
    [
        {"Nroth": {"slices": 9}},
        {"North": {"images": 9}},
        {"North": {"slices": 0}},
        {"North": 9},
        ["North"],
    ],
)
def test_limits_that_mean_nothing_are_refused(limits: object, tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError) as caught:
        read_project(write(tmp_path, limits))
    assert {problem.code for problem in caught.value.problems} == {"DEP-602"}


@pytest.mark.row(4)
@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({}, "North, South"),
        ({"North": {"patients": 300, "slices": 9000}}, "South"),
        ({"all": {"slices": 9000}}, "North, South"),
        ({"all": {"slices": 9000}, "South": {"patients": 3}}, "North"),
        ({"all": {"patients": 300, "slices": 9000}}, ""),
    ],
)
@pytest.mark.attack("too-many-examples")
def test_sites_without_numbers_are_named_before_a_study(
    limits: object, named: str, tmp_path: Path
) -> None:
    """Row 4: without numbers of the coordinator a site may claim a million slices."""
    warning = read_project(write(tmp_path, limits)).missing_limits()
    assert (warning is None) == (not named)
    if warning:
        assert warning.code == "DEP-617"
        assert f"no numbers for {named}:" in warning.found
        assert f"limits: {{{named.partition(',')[0]}: " in warning.action
