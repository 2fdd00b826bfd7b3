"""Sites that are missing, late or duplicated, at enrolment and in the rounds."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedsgcg.common.errors import CODES
from fedsgcg.common.wire.messages import ENROL, EVALUATE, STATISTICS, TRAIN, Reply, Request
from fedsgcg.server.sites.enrolment import UNUSABLE
from tests.support.plans import small_plan
from tests.support.scripted_grid import FLOWER_ERROR, SILENCE, ScriptedGrid
from tests.support.scripted_run import ALL, run, silent, status_of

# Enrolment


@pytest.mark.row(25)
def test_too_few_sites_at_the_deadline_are_named(tmp_path: Path) -> None:
    outcome, grid = run(small_plan(tmp_path), ("A", "D"))
    assert outcome.status == "failed"
    (problem,) = outcome.failure
    assert problem.code == "RND-401"
    assert "missing: B, C" in problem.found
    assert "1 training site (A), the quorum of 3 is not met" in problem.found
    assert not [sent for sent in grid.sent if sent.kind == TRAIN]
    assert status_of(tmp_path)["status"] == "failed"
    assert status_of(tmp_path)["error"] == "RND-401"


def test_a_quorum_goes_on_without_the_missing_and_says_so(tmp_path: Path) -> None:
    outcome, _ = run(small_plan(tmp_path, federation__quorum=2), ("A", "C", "D"))
    assert outcome.status == "degraded"
    assert outcome.rounds_done == 3
    assert [(problem.code, problem.where) for problem in outcome.problems] == [("RND-404", "B")]


def test_a_missing_heldout_site_is_named(tmp_path: Path) -> None:
    outcome, _ = run(small_plan(tmp_path), ("A", "B", "C"))
    assert outcome.failure[0].code == "RND-401"
    assert "missing: D" in outcome.failure[0].found
    assert "the held-out site D" in outcome.failure[0].expected


def test_a_heldout_name_that_no_site_has_is_refused_at_once(tmp_path: Path) -> None:
    outcome, grid = run(small_plan(tmp_path, heldout="DD"))
    assert outcome.failure[0].code == "CFG-002"
    assert "'D'" in outcome.failure[0].action
    assert grid.sent == []


def test_the_name_of_a_site_is_taken_once(tmp_path: Path) -> None:
    def impostor(
        grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply
    ) -> object:
        return replace(reply, site="A") if site == "E" else reply

    outcome, grid = run(small_plan(tmp_path), (*ALL, "E"), script=impostor)
    assert outcome.status == "completed"
    # One of the two that call themselves A was taken, whoever came first; the other was never asked
    # again.
    asked = Counter(sent.site for sent in grid.sent if sent.kind == TRAIN)
    assert asked["A"] + asked["E"] == 3
    assert 0 in (asked["A"], asked["E"])


def test_a_site_that_the_plan_does_not_know_is_never_asked_to_train(tmp_path: Path) -> None:
    outcome, grid = run(small_plan(tmp_path), (*ALL, "X"))
    assert outcome.status == "completed"
    assert {sent.kind for sent in grid.sent if sent.site == "X"} == {ENROL}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda r: replace(r, details=r.details | {"roles": ["heldout"]}), "ROL-201"),
        (lambda r: replace(r, details=r.details | {"roles": "train"}), "ROL-201"),
        (lambda r: replace(r, details=r.details | {"cases": {"train": 0}}), "TRN-302"),
        (lambda r: replace(r, details=r.details | {"slices": {}}), "PAY-110"),
        (lambda r: replace(r, details=r.details | {"slices": {"train": -5}}), "PAY-110"),
        (lambda r: replace(r, details=r.details | {"slices": {"train": 10**15}}), "PAY-111"),
        (lambda r: replace(r, identity=replace(r.identity, plan="other")), "PAY-120"),
        (lambda r: Reply(r.identity, r.site, error="DAT-102"), "DAT-102"),
        (lambda r: replace(r, details=[1]), "PAY-106"),
    ],
)
@pytest.mark.attack("no-slices", "too-many-examples")
def test_a_site_that_cannot_take_part_is_refused_with_its_reason(
    change, code: str, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return change(reply) if (site, kind) == ("B", ENROL) else reply

    outcome, _ = run(small_plan(tmp_path / "all"), script=script)
    if code in UNUSABLE:  # a site without a case is not waited for; see test_rounds_messages
        assert outcome.status == "degraded"
        assert [problem.code for problem in outcome.problems] == [code]
    else:
        assert outcome.failure[0].code == "RND-401"
        assert f"{code} {CODES[code]}" in outcome.failure[0].found
    outcome, grid = run(small_plan(tmp_path / "quorum", federation__quorum=2), script=script)
    assert outcome.status == "degraded"
    assert "B" not in {sent.site for sent in grid.sent if sent.kind != ENROL}


def test_without_names_everyone_who_comes_takes_part(tmp_path: Path) -> None:
    outcome, grid = run(small_plan(tmp_path, data__sites=[]), ("A", "B", "D"))
    assert outcome.status == "completed"
    assert {sent.site for sent in grid.sent if sent.kind == TRAIN} == {"A", "B"}


def test_a_site_that_comes_late_joins_in_the_next_round(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__quorum=2)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind == TRAIN and request.identity.round == 2:
            grid.nodes[999] = "C"
        return reply

    outcome, grid = run(plan, ("A", "B", "D"), script=script)
    assert outcome.status == "degraded"
    trained = {(sent.site, sent.request.identity.round) for sent in grid.sent if sent.kind == TRAIN}
    assert {number for site, number in trained if site == "C"} == {3}


# Rounds


@pytest.mark.row(24)
def test_a_site_that_misses_a_round_is_named_and_asked_again(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__quorum=2)
    outcome, grid = run(plan, script=silent("B", TRAIN, range(2, 3)))
    assert outcome.status == "degraded"
    assert [(problem.code, problem.where) for problem in outcome.problems] == [
        ("RND-404", "round 2, B")
    ]
    assert [
        sent.request.identity.round for sent in grid.sent if (sent.site, sent.kind) == ("B", TRAIN)
    ] == [1, 2, 3]
    rows = pq.read_table(tmp_path / "rounds.parquet").to_pylist()
    trained = {(row["site"], row["round"]) for row in rows if row["metric"] == "loss"}
    assert ("B", 2) not in trained
    assert ("B", 3) in trained


@pytest.mark.row(19, 21)
def test_a_late_reply_is_never_merged(tmp_path: Path) -> None:
    """B's reply to round 1 is there only when round 2 is under way."""
    plan = small_plan(tmp_path / "late", federation__quorum=2)
    held: list[Reply] = []

    def late(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if (site, kind) != ("B", TRAIN):
            return reply
        held.append(reply)
        return SILENCE if request.identity.round == 1 else held[0]

    outcome, _ = run(plan, script=late)
    without, _ = run(
        small_plan(tmp_path / "without", federation__quorum=2), script=silent("B", TRAIN)
    )
    assert outcome.digest == without.digest
    assert [problem.code for problem in outcome.problems] == ["RND-404", "PAY-120", "PAY-120"]


@pytest.mark.parametrize("fault", [SILENCE, FLOWER_ERROR])
@pytest.mark.row(5)
def test_below_the_quorum_the_run_stops_and_goes_on_later(fault: object, tmp_path: Path) -> None:
    whole, _ = run(small_plan(tmp_path / "whole"))

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return fault if (site, kind, request.identity.round) == ("B", TRAIN, 2) else reply

    plan = small_plan(tmp_path / "cut")
    outcome, _ = run(plan, script=script)
    assert outcome.status == "failed"
    assert outcome.rounds_done == 1
    assert [problem.code for problem in outcome.failure] == ["RND-402"]
    assert "B: " in outcome.failure[0].found
    assert outcome.failure[0].where == "round 2"
    assert status_of(tmp_path / "cut")["rounds_done"] == 1
    assert not (tmp_path / "cut" / "results.parquet").exists()
    again, grid = run(plan)
    assert (again.status, again.digest) == ("completed", whole.digest)
    assert {sent.request.identity.round for sent in grid.sent if sent.kind == TRAIN} == {2, 3}
    for name in (
        "results.parquet",
        "rounds.parquet",
        "model.safetensors",
        "model.json",
        "prototypes.arrow",
    ):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
            name
        )


def test_a_missed_site_is_remembered_over_a_resume(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__quorum=2)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        number = request.identity.round
        return SILENCE if kind == TRAIN and ((site, number) == ("B", 1) or number == 3) else reply

    outcome, _ = run(plan, script=script)
    assert outcome.status == "failed"
    again, _ = run(plan)
    assert again.status == "degraded"
    assert [(problem.code, problem.where) for problem in again.problems] == [
        ("RND-404", "round 1, B")
    ]


def test_a_run_that_is_done_evaluates_again_and_trains_no_more(tmp_path: Path) -> None:
    first, _ = run(small_plan(tmp_path))
    again, grid = run(small_plan(tmp_path))
    assert again.digest == first.digest
    assert {sent.kind for sent in grid.sent} == {
        ENROL,
        EVALUATE,
        STATISTICS,
    }  # the last describes the chosen model


@pytest.mark.parametrize("memory", ["lagged", "restart"])
@pytest.mark.parametrize("weighting", ["samples", "sites"])
@pytest.mark.row(49)
def test_order_of_arrival_changes_nothing(memory: str, weighting: str, tmp_path: Path) -> None:
    found = []
    for shuffle in range(3):
        folder = tmp_path / str(shuffle)
        plan = small_plan(folder, prototypes__memory=memory, federation__weighting=weighting)
        outcome, _ = run(plan, shuffle=shuffle)
        files = [
            (folder / name).read_bytes()
            for name in ("results.parquet", "rounds.parquet", "prototypes.arrow")
        ]
        found.append((outcome.status, outcome.digest, files))
    assert found[0] == found[1] == found[2]


def test_fedavg_weighting_matters(tmp_path: Path) -> None:
    samples, _ = run(small_plan(tmp_path / "samples"))
    sites, _ = run(small_plan(tmp_path / "sites", federation__weighting="sites"))
    assert samples.digest != sites.digest
