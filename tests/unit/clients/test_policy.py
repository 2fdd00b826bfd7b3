"""What a hospital's own file allows, refuses and makes stricter."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.approval import approve, bundle_of_folder
from fedsgcg.clients.guard.policy import (
    NODE_KEY,
    apply_policy,
    check_sharing,
    is_inside,
    only_inside_data_root,
    policy_of,
)
from fedsgcg.clients.guard.site_file import SiteFile, write_site_file
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Reply, Request, decode_reply, encode_request
from fedsgcg.deploy.certificates import make_site_key
from tests.conftest import REPOSITORY
from tests.support import sites


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("policy") / "data")


def policy_for(root: Path, folder: Path, **changes: object) -> SiteFile:
    make_site_key(folder, "North")
    facts = {
        "site": "North",
        "project": "test",
        "server": "127.0.0.1:1",
        "ca": str(folder / "ca.crt"),
        "key": str(folder / "site.key"),
        "data_root": str(root),
        "home": str(folder / "home"),
        "cache": str(root.parent / "cache"),
        "approved": str(folder / "approved.json"),
        "patient_floor": 1,
        "min_pixels": 1,
        "device": "cpu",
        **changes,
    }
    return SiteFile(**facts)


def asked_of(root: Path, folder: Path, *overrides: str) -> Plan:
    """A coordinator's plan, which names no folder."""
    tree = sites.tree_of(root, folder, "heldout=South", *overrides)
    tree["data"]["root"] = ""
    return Plan.from_tree(tree)


def answer(
    policy: SiteFile, folder: Path, plan: Plan, kind: str = wire.ENROL, **request: object
) -> Reply:
    """Ask the app of a node whose config names the site file."""
    path = folder / "site.yaml"
    write_site_file(path, policy)
    approve(bundle_of_folder(REPOSITORY), Path(policy.approved), "test")
    weights = None if kind == wire.ENROL else sites.weights(plan)
    content = encode_request(Request(sites.identity(plan), weights, **request))
    return decode_reply(
        sites.ask(plan.to_tree(), kind, content, {"site": policy.site, NODE_KEY: str(path)})
    )


def refused(policy: SiteFile, plan: Plan) -> list[tuple[str, str]]:
    with pytest.raises(FedsgcgError) as caught:
        apply_policy(plan, policy)
    return [(problem.code, problem.where) for problem in caught.value.problems]


def test_without_a_site_file_nothing_changes(root, tmp_path):
    plan = sites.plan_of(root, tmp_path)
    assert apply_policy(plan, policy_of({"site": "North"})) is plan


def test_folders_device_roles_and_threads_are_the_sites(root, tmp_path):
    policy = policy_for(
        root,
        tmp_path,
        roles=("heldout",),
        threads=2,
        sharing=("weights", "statistics", "amplitude_bank"),
    )
    obeyed = apply_policy(asked_of(root, tmp_path, "site.home='/elsewhere'"), policy)
    assert obeyed.site.shares == ("amplitude_bank",)
    assert apply_policy(asked_of(root, tmp_path), policy_for(root, tmp_path)).site.shares == ()
    assert obeyed.data.root == str(root)
    assert (obeyed.site.home, obeyed.site.cache) == (policy.home, policy.cache)
    assert (obeyed.site.roles, obeyed.site.threads, obeyed.site.device) == (("heldout",), 2, "cpu")


@pytest.mark.parametrize(("asked", "own", "holds"), [(1, 50, 50), (70, 50, 70), (50, 50, 50)])
@pytest.mark.row(59)
def test_floors_only_get_stricter(root, tmp_path, asked, own, holds):
    plan = asked_of(root, tmp_path, f"privacy.min_patients={asked}", f"privacy.min_pixels={asked}")
    privacy = apply_policy(
        plan, policy_for(root, tmp_path, patient_floor=own, min_pixels=own)
    ).privacy
    assert (privacy.min_patients, privacy.min_pixels) == (holds, holds)


@pytest.mark.row(66)
def test_a_class_needs_more_pixels_than_features(root, tmp_path):
    plan = asked_of(root, tmp_path, "privacy.min_pixels=1")
    privacy = apply_policy(plan, policy_for(root, tmp_path, min_pixels=1)).privacy
    assert privacy.min_pixels == plan.network.num_features + 1


def test_a_site_can_demand_shrinkage(root, tmp_path):
    policy = policy_for(root, tmp_path, demands=("shrinkage",))
    with pytest.raises(FedsgcgError) as caught:
        apply_policy(asked_of(root, tmp_path), policy)
    assert caught.value.code == "PRV-951"
    assert apply_policy(asked_of(root, tmp_path, "privacy.shrinkage=true"), policy)


@pytest.mark.row(58)
def test_a_data_folder_outside_the_sites_own_is_refused(root, tmp_path):
    policy = policy_for(root, tmp_path)
    plan = asked_of(root, tmp_path)
    for place in ("/etc", str(root.parent), str(root / ".." / "elsewhere")):
        assert refused(policy, replace(plan, data=replace(plan.data, root=place))) == [
            ("POL-702", "data.root")
        ]
    link = tmp_path / "link"
    link.symlink_to("/etc")
    assert not is_inside(link, tmp_path)
    within = replace(plan, data=replace(plan.data, root=str(root / "North")))
    assert apply_policy(within, policy).data.root == str(root)


def test_a_setting_that_is_not_on_the_list_must_be_as_it_was_shipped(root, tmp_path):
    policy = policy_for(
        root,
        tmp_path,
        coordinator_may_set=("data.*", "network.*", "privacy.*", "federation.*", "heldout"),
    )
    plan = asked_of(root, tmp_path, "method.batch_size=8")
    assert apply_policy(plan, policy).method == plan.method
    faster = asked_of(root, tmp_path, "method.batch_size=8", "method.learning_rate=0.5", "seed=7")
    assert refused(policy, faster) == [("POL-703", "method.learning_rate"), ("POL-703", "seed")]


def test_the_sites_threads_cannot_be_asked_for(root, tmp_path):
    policy = policy_for(root, tmp_path, threads=2)
    assert refused(policy, asked_of(root, tmp_path, "site.threads=4")) == [
        ("POL-703", "site.threads")
    ]
    assert apply_policy(asked_of(root, tmp_path, "site.threads=2"), policy).site.threads == 2


@pytest.mark.row(59)
def test_statistics_that_the_site_does_not_share_are_refused_at_once_and_at_the_door(
    root, tmp_path
):
    policy = policy_for(root, tmp_path, sharing=("weights",))
    assert refused(policy, asked_of(root, tmp_path)) == [("POL-704", "sharing")]
    assert apply_policy(asked_of(root, tmp_path, "method=source"), policy).method.name == "source"
    with pytest.raises(FedsgcgError, match="POL-704"):
        check_sharing({"weights": 4, "statistics": 8, "text": 2}, ("weights",))
    with pytest.raises(FedsgcgError, match="amplitudes"):
        check_sharing({"weights": 4, "amplitudes": 8}, ("weights", "statistics"))
    check_sharing({"amplitudes": 8, "text": 2}, ("weights", "amplitude_summary"))
    check_sharing(
        {"moments": 8, "text": 2}, ("weights",)
    )  # running moments are entries of the weights
    with pytest.raises(FedsgcgError, match="POL-704"):
        check_sharing({"moments": 8, "text": 2}, ("statistics",))
    check_sharing({"weights": 4, "cases": 8, "metrics": 8, "text": 2}, ("weights",))


@pytest.mark.row(58)
def test_a_link_out_of_the_data_folder_leaves_the_case_out(root, tmp_path):
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    secret = tmp_path / "secret.nii.gz"
    image = copy / "North/North-001_image.nii.gz"
    image.rename(secret)
    image.symlink_to(secret)
    policy = policy_for(copy, tmp_path)
    site = open_site(copy, "North", asked_of(root, tmp_path).data)
    assert len(site.cases) == 4
    kept = only_inside_data_root(site, policy)
    assert [case.name for case in kept.cases] == ["North-002", "North-003", "North-004"]
    assert [(problem.code, problem.where) for problem in kept.quarantined] == [
        ("POL-702", "North-001")
    ]
    assert only_inside_data_root(site, None) is site


def test_a_file_of_another_site_is_refused(root, tmp_path):
    write_site_file(tmp_path / "site.yaml", policy_for(root, tmp_path))
    with pytest.raises(FedsgcgError, match="POL-701"):
        policy_of({"site": "South", NODE_KEY: str(tmp_path / "site.yaml")})


def test_the_coordinator_gets_the_code_and_the_site_the_words(root, tmp_path):
    plan = asked_of(root, tmp_path)
    wanted = replace(plan, data=replace(plan.data, root="/etc/patients"))
    reply = answer(policy_for(root, tmp_path), tmp_path, wanted)
    assert reply == Reply(sites.identity(wanted), "North", error="POL-702")
    (line,) = ledger.entries(tmp_path / "home/ledger.jsonl")
    assert "/etc/patients" in line["note"]
    assert "/etc/patients" in (tmp_path / "home/errors.log").read_text()


def test_a_node_with_a_site_file_trains_on_its_own_data_under_its_own_floors(root, tmp_path):
    plan = asked_of(root, tmp_path)
    strict = asked_of(root, tmp_path, "privacy.min_patients=5")
    reply = answer(policy_for(root, tmp_path), tmp_path, strict, wire.STATISTICS)
    assert reply.error == ""
    assert reply.statistics is not None
    assert reply.statistics.count.tolist() == [0, 0]
    assert (tmp_path / "home/ledger.jsonl").is_file()
    open_to_all = answer(policy_for(root, tmp_path / "b"), tmp_path, plan, wire.STATISTICS)
    assert open_to_all.statistics is not None
    assert open_to_all.statistics.count.sum() > 0


def test_a_role_that_the_site_does_not_take_is_refused(root, tmp_path):
    reply = answer(
        policy_for(root, tmp_path, roles=("heldout",)),
        tmp_path,
        asked_of(root, tmp_path),
        wire.TRAIN,
    )
    assert reply.error == "ROL-201"


def test_code_that_is_not_approved_does_no_work(root, tmp_path):
    policy = policy_for(root, tmp_path)
    plan = asked_of(root, tmp_path)
    write_site_file(tmp_path / "site.yaml", policy)
    content = encode_request(Request(sites.identity(plan)))
    node = {"site": "North", NODE_KEY: str(tmp_path / "site.yaml")}
    assert decode_reply(sites.ask(plan.to_tree(), wire.ENROL, content, node)).error == "POL-705"


@pytest.mark.parametrize("role", ["train", "unlabelled"])
def test_scaffold_is_refused_at_enrolment_without_the_sites_consent(
    root: Path, tmp_path: Path, role: str
) -> None:
    """Also by a hospital without masks, whose mean gradient leaves like that of the others."""
    names = ("method=segclr", "unlabelled=[North]") if role == "unlabelled" else ("method=source",)
    plan = asked_of(root, tmp_path, "federation.aggregator=scaffold", *names)
    with pytest.raises(FedsgcgError, match="mean gradient"):
        apply_policy(plan, policy_for(root, tmp_path / "no"))
    allowed = policy_for(root, tmp_path / "yes", sharing=("weights", "control_variates"))
    assert apply_policy(plan, allowed).federation.aggregator == "scaffold"
