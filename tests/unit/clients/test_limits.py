"""A site's limits on disk, memory and time, checked before anything is built."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from fedsgcg.clients.data.cache import Budget, cache_files
from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.guard.limits import GIGA, beyond_limits, memory_bytes, step_bytes
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.base import bounds_of
from fedsgcg.common.settings.choices import choices_of
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from tests.support import sites
from tests.unit.clients.test_policy import answer, asked_of, policy_for, refused


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("limits") / "data")


def plan_with(*overrides: str) -> Plan:
    return Plan.from_tree({**compose(list(overrides)), "output": ""})


BEYOND = {
    "data.image_size": ("max_image_size", 1040),
    "method.batch_size": ("max_batch_size", 257),
    "method.local_epochs": ("max_epochs", 101),
    "method.steps_per_round": ("max_steps", 50_001),
    "federation.rounds": ("max_rounds", 5001),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_setting_beyond_the_sites_limit_is_refused_with_both_numbers(
    name: str, root: Path, tmp_path: Path
) -> None:
    limit, value = BEYOND[name]
    policy = policy_for(root, tmp_path, max_memory_gb=1e6)
    (problem,) = beyond_limits(plan_with(f"{name}={value}"), policy)
    assert (problem.code, problem.where, problem.found) == ("POL-707", name, str(value))
    assert f"{getattr(policy, limit)} ({limit} of site.yaml)" in problem.expected
    assert not list(beyond_limits(plan_with(f"{name}={value}"), replace(policy, **{limit: value})))


@pytest.mark.parametrize("experiment", choices_of("experiment"))
def test_the_default_limits_allow_every_experiment_on_a_machine_of_16_gb(
    experiment: str, root: Path, tmp_path: Path
) -> None:
    policy = policy_for(root, tmp_path, max_memory_gb=12.0)
    for method in ("source", "ram_sgcg"):
        plan = plan_with(f"experiment={experiment}", f"method={method}")
        assert list(beyond_limits(plan, policy)) == []


def test_a_step_beyond_the_memory_is_refused_and_a_split_one_is_not(
    root: Path, tmp_path: Path
) -> None:
    """16 slices of 1,024 pixels with 32 channels: 16 * 2^20 * 32 * 200 bytes, about 107 GB."""
    plan = plan_with("data.image_size=1024", "method.batch_size=16", "network.base_width=32")
    assert step_bytes(plan, 16) == 16 * 2**20 * 32 * 200
    policy = policy_for(root, tmp_path, max_memory_gb=100)
    (problem,) = beyond_limits(plan, policy)
    assert "107.4 GB" in problem.found
    assert "max_memory_gb" in problem.expected
    split = replace(plan, site=replace(plan.site, micro_batches=2))
    assert list(beyond_limits(split, policy)) == []
    assert list(beyond_limits(plan, replace(policy, device="cuda"))) == []
    assert 0 < memory_bytes(replace(policy, max_memory_gb=0)) < 2**50


@pytest.mark.attack("costly-settings")
def test_row_i10_an_image_size_of_8192_is_refused_before_anything_is_read(
    root: Path, tmp_path: Path
) -> None:
    """I10: it made an 18 GB cache and 21 GB of memory; neither program nor site accept it."""
    with pytest.raises(FedsgcgError, match="at most 2048"):
        plan_with("data.image_size=8192")
    policy = policy_for(root, tmp_path, cache=str(tmp_path / "cache"))
    plan = asked_of(root, tmp_path, "data.image_size=2048")
    assert ("POL-707", "data.image_size") in refused(policy, plan)
    assert answer(policy, tmp_path, plan).error == "POL-707"
    assert not (tmp_path / "cache").exists()


def open_with(root: Path, cache: Path, budget: Budget, size: int = 32) -> int:
    data = sites.plan_of(root, cache, f"data.image_size={size}").data
    store = open_store(open_site(root, "North", data), data, cache, heldout=False, budget=budget)
    return len(store.cases)


def test_a_cache_beyond_the_budget_is_refused_and_leaves_nothing(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedsgcgError, match="POL-707") as caught:
        open_with(root, tmp_path, Budget(cache_bytes=20_000))
    assert "max_cache_gb of site.yaml" in str(caught.value)
    assert not list((tmp_path / "slices").glob("*.[at]*"))


def test_the_slice_files_unused_for_longest_make_room(root: Path, tmp_path: Path) -> None:
    """Requests of many image sizes, one after another, do not fill the disk."""
    assert open_with(root, tmp_path, Budget()) == 4
    (first,) = cache_files(tmp_path)
    size = first.stat().st_size
    budget = Budget(cache_bytes=2.5 * size)
    for side in (48, 32, 48, 64):
        assert open_with(root, tmp_path, budget, side) == 4
        assert sum(cache_files(tmp_path).values()) <= budget.cache_bytes
    assert not first.exists()


def test_an_image_that_needs_more_memory_than_allowed_is_refused_not_left_out(
    root: Path, tmp_path: Path
) -> None:
    """A larger limit must work at once, so the refusal may not be stored as a problem of a case."""
    with pytest.raises(FedsgcgError, match="max_memory_gb"):
        open_with(root, tmp_path, Budget(memory_bytes=10_000))
    assert open_with(root, tmp_path, Budget()) == 4


@pytest.mark.attack("costly-settings")
def test_every_setting_that_costs_something_has_an_upper_bound() -> None:
    plan = plan_with()
    bounds = {
        f"{name}.{field}"
        for name in ("data", "network", "method", "federation", "site")
        for field in bounds_of(type(getattr(plan, name)))
    }
    numbers = {
        f"{name}.{field.name}"
        for name in ("data", "network", "method", "federation", "site")
        for field in fields(getattr(plan, name))
        if type(getattr(getattr(plan, name), field.name)) is int
    }
    harmless = {
        *("data.stack", "federation.quorum", "federation.heldout_every"),
        *("federation.tolerated", "network.projection_stride"),
    }
    assert numbers - bounds - harmless == {"site.feature_samples"}  # 0 to 300 in its own check
    for name in sorted(bounds):
        section, field = name.split(".")
        value = getattr(getattr(plan, section), field)
        if isinstance(value, tuple):
            continue
        most = int(bounds_of(type(getattr(plan, section)))[field])
        with pytest.raises(FedsgcgError, match=f"at most {most}"):
            replace(getattr(plan, section), **{field: type(value)(16 * most)})


def test_limits_are_positive(root: Path, tmp_path: Path) -> None:
    names = [field.name for field in fields(SiteFile) if field.name.startswith("max_")]
    assert len(names) == 8
    for name in names:
        with pytest.raises(FedsgcgError, match=name):
            policy_for(root, tmp_path, **{name: -1})
    assert GIGA == 1e9
