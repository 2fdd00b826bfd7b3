"""The hospital's app, called as by Flower: enrolment, allowed requests and replies."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.clients.guard import ledger
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Reply, Request, decode_reply, encode_request
from fedsgcg.common.wire.norm_moments import norm_layers
from fedsgcg.common.wire.payload import decode_cases
from tests.support import sites


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("app") / "data")


def federation(root: Path, folder: Path, *overrides: str) -> Plan:
    return sites.plan_of(
        root, folder, "heldout=South", f"site.cache={root.parent / 'cache'}", *overrides
    )


def asked(plan: Plan, kind: str, site: str, round_number: int = 1, **request) -> Reply:
    weights = None if kind == wire.ENROL else sites.weights(plan)
    return sites.answer(
        plan, kind, Request(sites.identity(plan, round_number), weights, **request), site
    )


def test_a_site_enrols_with_its_cases_counted_by_split(root, tmp_path):
    plan = federation(root, tmp_path, "data.validation_fraction=0.6")
    reply = asked(plan, wire.ENROL, "North", 0)
    assert reply.error == ""
    assert reply.site == reply.details["site"] == "North"
    assert reply.details["roles"] == ["train", "unlabelled", "heldout", "observer"]
    counts = reply.details["cases"]
    assert counts["train"] + counts["validation"] == 4
    assert counts["train"] >= 1
    assert counts["validation"] >= 1
    assert reply.details["slices"]["train"] == 4 * counts["train"]
    assert reply.details["patients"] == counts
    assert asked(plan, wire.ENROL, "South", 0).details["cases"] == {
        "train": 0,
        "validation": 0,
        "test": 4,
    }


def test_a_site_reports_that_its_data_changed_and_never_their_paths(root, tmp_path):
    told = [
        asked(federation(root, tmp_path / name), wire.ENROL, "North", 0).details["data"]
        for name in ("a", "b")
    ]
    assert len(told[0]) == 16
    assert told[0] == told[1]
    copy = tmp_path / "elsewhere"
    shutil.copytree(root, copy)
    assert (
        asked(sites.plan_of(copy, tmp_path / "c", "heldout=South"), wire.ENROL, "North", 0).details[
            "data"
        ]
        == told[0]
    )
    resplit = federation(root, tmp_path, "data.validation_fraction=0.6")
    assert asked(resplit, wire.ENROL, "North", 0).details["data"] != told[0]
    shutil.copy(copy / "North/North-001_mask.nii.gz", copy / "North/North-002_mask.nii.gz")
    changed = asked(
        sites.plan_of(copy, tmp_path / "c", "heldout=South"), wire.ENROL, "North", 0
    ).details["data"]
    assert changed not in told


def test_the_aliases_are_explained_at_the_site_only(root, tmp_path):
    plan = federation(root, tmp_path)
    rows = decode_cases(asked(plan, wire.EVALUATE, "South", options={"split": "test"}).cases)
    with (tmp_path / "run/sites/South/aliases.csv").open() as file:
        names = {row["alias"]: row["case"] for row in csv.DictReader(file)}
    assert sorted(names[row["case"]] for row in rows) == [
        f"South-00{number}" for number in (1, 2, 3, 4)
    ]


def test_training_replies_with_weights_statistics_and_figures(root, tmp_path):
    plan = federation(root, tmp_path, "data.validation_fraction=0.6", "prototypes.memory=lagged")
    reply = asked(plan, wire.TRAIN, "North", 2)
    assert reply.error == ""
    assert reply.weights is not None
    assert reply.weights.layout == sites.weights(plan).layout
    assert reply.weights.digest() != sites.weights(plan).digest()
    assert reply.statistics is not None
    assert reply.statistics.count.sum() == reply.metrics["examples"] * 32 * 32
    assert set(reply.metrics) == {
        *(
            "examples",
            "steps",
            "loss",
            "loss_supervised",
            "loss_contrast",
            "learning_rate",
            "seconds",
        ),
        *("validation_dice", "validation_cases", "micro_batches"),
    }
    assert 0 <= reply.metrics["validation_dice"] <= 1


def test_statistics_describe_the_received_model_not_the_trained_one(root, tmp_path):
    plan = federation(root, tmp_path, "prototypes.memory=restart", "method.learning_rate=0.05")
    lagged = federation(root, tmp_path, "prototypes.memory=lagged", "method.learning_rate=0.05")
    received = asked(plan, wire.STATISTICS, "North", 2).statistics
    trained = asked(lagged, wire.TRAIN, "North", 2).statistics
    assert received is not None
    assert trained is not None
    np.testing.assert_array_equal(received.mean, trained.mean)


@pytest.mark.parametrize(
    "memory", ["lagged", "restart", "cumulative", "discount", "momentum", "overlay"]
)
def test_the_untrained_model_of_round_1_is_not_described(root, tmp_path, memory):
    """Round 2 would use prototypes of an untrained network, and `cumulative` would keep them."""
    plan = federation(root, tmp_path, f"prototypes.memory={memory}")
    assert asked(plan, wire.TRAIN, "North", 1).statistics is None


def test_moments_are_measured_on_request_alone_or_with_the_classes(root, tmp_path):
    plan = federation(root, tmp_path)
    given = sites.weights(plan)
    alone = asked(plan, wire.STATISTICS, "North", options={"moments": True})
    both = asked(plan, wire.STATISTICS, "North", options={"moments": True, "classes": True})
    assert alone.statistics is None
    assert alone.moments is not None
    assert both.moments is not None
    assert dict(alone.moments.layers) == norm_layers(given)
    np.testing.assert_array_equal(alone.moments.mean, both.moments.mean)
    only = asked(plan, wire.STATISTICS, "North")
    assert only.moments is None
    assert only.statistics is not None
    assert both.statistics is not None
    assert only.statistics.digest() == both.statistics.digest()


def test_the_chosen_model_is_described_as_evaluation_sees_it(root, tmp_path):
    plan = federation(root, tmp_path)
    in_training = asked(plan, wire.STATISTICS, "North").statistics
    found = asked(
        plan, wire.STATISTICS, "North", options={"classes": True, "norm_mode": "running"}
    ).statistics
    expected = asked(
        federation(root, tmp_path, "prototypes.norm_mode=running"), wire.STATISTICS, "North"
    ).statistics
    assert found is not None
    assert found.digest() == expected.digest() != in_training.digest()


def test_with_restart_the_training_reply_has_no_statistics(root, tmp_path):
    plan = federation(root, tmp_path, "prototypes.memory=restart")
    assert asked(plan, wire.TRAIN, "North").statistics is None
    only = asked(plan, wire.STATISTICS, "North")
    assert only.statistics is not None
    assert only.weights is None


def test_source_sends_no_statistics_and_a_site_without_validation_no_dice(root, tmp_path):
    plan = federation(root, tmp_path, "method=source", "data.validation_fraction=0")
    reply = asked(plan, wire.TRAIN, "North")
    assert reply.statistics is None
    assert "validation_dice" not in reply.metrics


def test_the_same_request_gives_the_same_weights(root, tmp_path):
    plan = federation(root, tmp_path)
    replies = [asked(plan, wire.TRAIN, "North") for _ in range(2)]
    digests = {reply.weights.digest() for reply in replies if reply.weights}
    assert len(digests) == 1


def test_prototypes_guide_the_round_after_the_warm_up(root, tmp_path):
    plan = federation(root, tmp_path)
    prototypes = asked(plan, wire.STATISTICS, "North").statistics
    assert asked(plan, wire.TRAIN, "North", 1, prototypes=prototypes).metrics["loss_contrast"] == 0
    assert asked(plan, wire.TRAIN, "North", 2, prototypes=prototypes).metrics["loss_contrast"] > 0


def test_evaluation_splits_by_role(root, tmp_path):
    plan = federation(root, tmp_path, "data.validation_fraction=0.6")
    heldout = asked(plan, wire.EVALUATE, "South", options={"split": "test"})
    rows = decode_cases(heldout.cases)
    assert len(rows) == 4
    assert heldout.metrics["dice"] == pytest.approx(np.mean([row["dice"] for row in rows]))
    assert heldout.weights is None
    assert heldout.statistics is None
    assert (tmp_path / "run/sites/South/pictures.arrow").exists()
    source = asked(plan, wire.EVALUATE, "North", options={"split": "validation"})
    assert source.error == ""
    assert not (tmp_path / "run/sites/North/pictures.arrow").exists()


@pytest.mark.parametrize("kind", [wire.TRAIN, wire.STATISTICS])
@pytest.mark.parametrize("role", ["heldout", "observer"])
def test_a_site_that_does_not_train_refuses_training_and_statistics(root, tmp_path, kind, role):
    plan = federation(root, tmp_path)
    if role == "observer":
        plan = replace(plan, heldout="", observers=("South",))
    assert asked(plan, kind, "South") == Reply(sites.identity(plan), "South", error="ROL-201")


@pytest.mark.parametrize(
    ("site", "split"), [("North", "test"), ("South", "validation"), ("North", "train")]
)
def test_a_split_that_the_role_forbids_is_refused(root, tmp_path, site, split):
    assert (
        asked(federation(root, tmp_path), wire.EVALUATE, site, options={"split": split}).error
        == "ROL-201"
    )


def test_a_site_refuses_a_role_that_its_own_settings_do_not_accept(root, tmp_path):
    plan = federation(root, tmp_path, "site.roles=[train]")
    assert asked(plan, wire.EVALUATE, "South", options={"split": "test"}).error == "ROL-201"
    assert asked(plan, wire.TRAIN, "North").error == ""


@pytest.mark.parametrize("part", ["plan", "heldout"])
def test_a_request_of_another_plan_is_refused(root, tmp_path, part):
    plan = federation(root, tmp_path)
    other = replace(sites.identity(plan), **{part: "other"})
    assert sites.answer(plan, wire.TRAIN, Request(other, sites.weights(plan)), "North") == Reply(
        other, "North", error="PAY-120"
    )


def test_a_request_without_weights_is_refused(root, tmp_path):
    plan = federation(root, tmp_path)
    reply = sites.answer(plan, wire.TRAIN, Request(sites.identity(plan)), "North")
    assert (reply.error, reply.weights) == ("PAY-106", None)


def test_partition_k_is_the_kth_site_by_name(root, tmp_path):
    plan = federation(root, tmp_path)
    request = encode_request(Request(sites.identity(plan, 0)))
    for number, name in enumerate(sites.SITES):
        node = {"partition-id": number, "num-partitions": 2}
        assert decode_reply(sites.ask(plan.to_tree(), wire.ENROL, request, node)).site == name
    beyond = decode_reply(sites.ask(plan.to_tree(), wire.ENROL, request, {"partition-id": 2}))
    assert (beyond.error, beyond.site) == ("DAT-101", "")
    unknown = decode_reply(sites.ask(plan.to_tree(), wire.ENROL, request, {"site": "Nowhere"}))
    assert (unknown.error, unknown.site) == ("DAT-101", "")


def test_the_deployed_app_reads_its_settings_from_the_run_config(root, tmp_path):
    plan = federation(root, tmp_path)
    request = encode_request(Request(sites.identity(plan, 0)))
    run_config = {"config-json": json.dumps(plan.to_tree()), "overrides": ""}
    assert (
        decode_reply(sites.ask(None, wire.ENROL, request, {"site": "North"}, run_config)).details[
            "site"
        ]
        == "North"
    )


def test_a_home_of_the_sites_own_holds_its_ledger(root, tmp_path):
    plan = federation(root, tmp_path, f"site.home='{tmp_path}/homes/{{site}}'")
    asked(plan, wire.ENROL, "North", 0)
    asked(plan, wire.TRAIN, "North")
    asked(
        plan, wire.EVALUATE, "North", options={"split": "test"}
    )  # refused, and entered all the same
    path = tmp_path / "homes/North/ledger.jsonl"
    assert ledger.verify(path) == 3
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["query.enrol", "train", "evaluate"]
    assert not (tmp_path / "run").exists()


def test_the_floors_act_on_what_a_site_sends(root, tmp_path):
    plan = federation(root, tmp_path, "privacy.min_patients=5")  # North has four patients
    reply = asked(plan, wire.STATISTICS, "North")
    assert reply.statistics is not None
    assert reply.statistics.count.tolist() == [0, 0]
    assert reply.details["withheld"] == ["background", "gland"]
