"""Checks before the start: what could only fail later is refused at once, all of it together."""

from pathlib import Path

import pytest
import torch

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.preflight import check_plan, inspect_machine

SITES = "data.sites=[North,South,West]"


def plan_of(*overrides: str) -> Plan:
    return Plan.from_tree(compose([SITES, *overrides]))


def problems_of(*overrides: str, device: str = "cpu") -> dict[str, str]:
    """Where -> code of everything that is refused."""
    with pytest.raises(FedsgcgError) as caught:
        check_plan(plan_of(*overrides), device)
    return {problem.where: problem.code for problem in caught.value.problems}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("heldout=South", "federation.quorum=2"),
        ("heldout=South", "observers=[North]", "federation.quorum=1"),
        ("site.home=/homes/{site}",),
        ("site.home=/home", "data.sites=[North]"),
        ("federation.selection=source_validation",),
        ("method.precision=float32",),
    ],
)
def test_a_plan_that_can_run_is_accepted(overrides: tuple[str, ...]) -> None:
    check_plan(plan_of(*overrides), "cpu")


def test_a_quorum_counts_training_sites_only() -> None:
    assert problems_of("heldout=South", "observers=[North]", "federation.quorum=2") == {
        "federation.quorum": "CFG-001"
    }
    assert problems_of("federation.quorum=4") == {"federation.quorum": "CFG-001"}


def test_observers_exist_and_are_not_held_out() -> None:
    with pytest.raises(FedsgcgError, match="did you mean 'South'"):
        check_plan(plan_of("observers=[Sout]"), "cpu")
    assert problems_of("heldout=South", "observers=[South]") == {"observers": "CFG-001"}
    assert problems_of("heldout=Soth") == {"heldout": "CFG-002"}


def test_somebody_must_train() -> None:
    assert problems_of("heldout=South", "observers=[North,West]", "federation.quorum=1") == {
        "observers": "CFG-003"
    }


def test_several_sites_do_not_share_a_home() -> None:
    assert problems_of("site.home=/home") == {"site.home": "CFG-001"}


def test_a_model_is_not_chosen_on_validation_cases_that_nobody_has(tmp_path: Path) -> None:
    wish = ("federation.selection=source_validation", "data.validation_fraction=0", "heldout=South")
    assert problems_of(*wish) == {"federation.selection": "CFG-001"}
    lines = [
        "site,image,mask,split",
        *(f"{site},{site}.png,{site}_m.png,train" for site in ("North", "West")),
    ]
    for name in ("North", "West", "South"):
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}_m.png").touch()
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join([*lines, "South,South.png,South_m.png,validation"]))
    assert problems_of(*wish, f"data.root={tmp_path}") == {
        "federation.selection": "CFG-001"
    }  # South does not train
    manifest.write_text(
        "\n".join([*lines, "South,South.png,South_m.png,test"]).replace(
            "West_m.png,train", "West_m.png,validation"
        )
    )
    check_plan(plan_of(*wish, f"data.root={tmp_path}"), "cpu")


def test_what_the_device_does_not_have_is_refused() -> None:
    assert problems_of("method.precision=bf16") == {"method.precision": "CFG-004"}
    assert problems_of("site.device=cuda") == {"site.device": "CFG-004"}
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        check_plan(plan_of("method.precision=bf16"), "cuda")


def test_all_problems_are_listed_at_once() -> None:
    found = problems_of(
        *("federation.quorum=9", "observers=[Nroth]", "site.home=/h", "method.precision=bf16"),
        *("federation.selection=source_validation", "data.validation_fraction=0"),
    )
    assert set(found) == {
        "federation.quorum",
        "observers",
        "site.home",
        "method.precision",
        "federation.selection",
    }


def test_a_negative_number_of_cores_is_refused() -> None:
    with pytest.raises(FedsgcgError, match="ray.cpus"):
        inspect_machine(-1)
    assert inspect_machine(3).cpus == 3
    assert inspect_machine().cpus >= 1
