"""What a site without labels may send, what it counts for, and where it is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import AMPLITUDES, STATISTICS, TRAIN, Reply, Request
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.study.preflight import check_plan
from fedsgcg.server.admission import admit
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.unlabelled import with_labelled_decoder
from fedsgcg.server.federation import initial_weights
from fedsgcg.server.selection import guard_recipients
from fedsgcg.server.sites.replies import expectation_for
from fedsgcg.server.sites.requests import identity_of
from tests.support.plans import small_plan

LAYOUT = (("encoder.w", (2,)), ("decoder.w", (1,)), ("training_heads.projection.w", (1,)))


def plan_with(folder: Path, **changes: Any) -> Plan:
    return small_plan(
        folder,
        method={"name": "segclr", "statistics": False, "unlabelled": "contrast"},
        unlabelled=["C"],
        **changes,
    )


def model(*values: float, steps: int = 0) -> Weights:
    counters = (("encoder.steps", steps), ("decoder.steps", steps))
    return Weights(LAYOUT, np.array(values, np.float32), counters)


def test_the_decoder_is_the_mean_of_the_sites_with_labels_and_the_encoder_of_all() -> None:
    received = model(0, 0, 0, 0)
    parts = [
        ("A", model(1, 1, 1, 1, steps=3), 1.0),
        ("B", model(2, 2, 4, 2, steps=4), 3.0),
        ("C", model(8, 8, 100, 8, steps=9), 4.0),
    ]
    merged = merge_weights(with_labelled_decoder(parts, {"C"}, received))
    # encoder and heads: (1 * 1 + 3 * 2 + 4 * 8) / 8; decoder: (1 * 1 + 3 * 4) / 4
    assert merged.values.tolist() == [4.875, 4.875, 3.25, 4.875]
    assert dict(merged.counters) == {"encoder.steps": 9, "decoder.steps": 4}


def test_without_an_admitted_site_with_labels_the_decoder_stays() -> None:
    parts = [("C", model(8, 8, 100, 8), 4.0)]
    ((_, found, share),) = with_labelled_decoder(parts, {"C"}, model(0, 0, 5, 0))
    assert (found.values.tolist(), share) == ([8, 8, 5, 8], 4.0)


def test_a_merge_without_such_sites_is_unchanged() -> None:
    parts = [("A", model(1, 2, 3, 4), 1.0)]
    assert with_labelled_decoder(parts, set(), model(0, 0, 0, 0)) == parts


def test_the_entries_that_count_are_those_of_the_network(tmp_path: Path) -> None:
    weights = initial_weights(plan_with(tmp_path))
    moved = Weights(weights.layout, weights.values + 1, weights.counters)
    ((_, found, _),) = with_labelled_decoder([("C", moved, 1.0)], {"C"}, weights)
    before, after = weights.to_state(), found.to_state()
    changed = {name.split(".")[0] for name in before if (before[name] != after[name]).any()}
    assert changed == {"encoder", "training_heads"}
    assert {name.split(".")[0] for name in before} == {"encoder", "decoder", "training_heads"}


def test_roles_follow_the_methods_use_of_such_hospitals(tmp_path: Path) -> None:
    plan = plan_with(tmp_path)
    uses = {
        use: replace(plan, method=replace(plan.method, unlabelled=use))
        for use in ("contrast", "leave_out", "labels", "refuse")
    }
    roles = {use: (one.role("C"), one.hides_masks("C")) for use, one in uses.items()}
    assert roles == {
        "contrast": ("unlabelled", True),
        "leave_out": ("observer", True),
        "labels": ("train", False),
        "refuse": ("unlabelled", True),
    }
    assert not any(one.validates("C") for one in uses.values())


def test_it_is_asked_for_weights_and_moments_never_for_amplitudes(tmp_path: Path) -> None:
    plan = plan_with(tmp_path)
    guard_recipients(plan, TRAIN, ["A", "C"])
    guard_recipients(plan, STATISTICS, ["A", "C"])
    with pytest.raises(FedsgcgError) as caught:
        guard_recipients(plan, AMPLITUDES, ["A", "C"])
    assert (caught.value.code, caught.value.problems[0].where) == ("ROL-201", "C")


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({}, ""),
        ({"statistics": True}, "class statistics"),
        ({"metrics": {"validation_dice": 1.0}}, "validation_dice"),
    ],
)
def test_what_is_made_from_masks_is_rejected_from_it_alone(
    tmp_path: Path, sent: dict[str, Any], named: str
) -> None:
    plan = plan_with(tmp_path)
    weights = initial_weights(plan)
    identity = identity_of(plan, 1)
    request = Request(identity, weights)
    statistics = (
        ClassStatistics.empty(2, plan.network.num_features) if sent.get("statistics") else None
    )
    metrics = {"examples": 3.0, **sent.get("metrics", {})}
    for site in ("A", "C"):
        reply = Reply(identity, site, weights, statistics, metrics)
        verdict = admit(reply, expectation_for(plan, TRAIN, site, request, 5, 5))
        refused = site == "C" and bool(named)
        assert verdict.accepted is not refused
        assert verdict.code == ("ROL-212" if refused else "")
        assert named in verdict.detail or not refused


def test_a_method_that_cannot_use_it_is_refused_before_the_start(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, unlabelled=["C"])
    with pytest.raises(FedsgcgError) as caught:
        check_plan(plan, "cpu")
    (problem,) = caught.value.problems
    assert problem.code == "ROL-211"
    assert problem.found == "sgcg with unlabelled=[C]"
    assert "method=segclr" in problem.expected
    assert "method.unlabelled=leave_out" in problem.action
    check_plan(plan_with(tmp_path), "cpu")


@pytest.mark.parametrize(("name", "found"), [("E", "'E'"), ("D", "'D'")])
def test_an_unknown_or_heldout_hospital_is_refused(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(FedsgcgError) as caught:
        check_plan(replace(plan_with(tmp_path), unlabelled=(name,)), "cpu")
    (problem,) = caught.value.problems
    assert (problem.code, problem.where, problem.found) == ("CFG-001", "unlabelled", found)


def test_no_site_with_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError) as caught:
        check_plan(replace(plan_with(tmp_path), unlabelled=("A", "B", "C")), "cpu")
    assert [problem.code for problem in caught.value.problems] == ["CFG-003"]


def test_a_supervised_method_has_no_term_for_it(tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError) as caught:
        small_plan(tmp_path, method__unlabelled="contrast")
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("CFG-001", "method.unlabelled")


def test_a_pool_cannot_be_an_upper_bound(tmp_path: Path) -> None:
    bound = {"name": "source", "statistics": False, "unlabelled": "labels"}
    pooled = {"federation__ownership": "pooled", "method": bound, "unlabelled": ["C"]}
    with pytest.raises(FedsgcgError) as caught:
        small_plan(tmp_path, **pooled)
    assert caught.value.problems[0].where == "federation.ownership"


def test_with_a_pool_the_hospitals_without_labels_are_sites_of_their_own(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, federation__ownership="pooled")
    assert plan.members() == ("C", "D", "pooled")
    assert plan.hospitals_of("pooled") == ("A", "B")
    assert plan.hospitals_of("C") == ("C",)
