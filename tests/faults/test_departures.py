"""A site leaves a run permanently: it is not expected, cannot enrol, and is not remembered."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import ENROL, EVALUATE, STATISTICS, TRAIN, Reply, Request
from fedsgcg.common.wire.payload import decode_statistics
from fedsgcg.server.aggregation.class_statistics import merge_statistics
from fedsgcg.server.aggregation.prototypes import PrototypeMemory
from fedsgcg.server.federation import Outcome, run_federation
from fedsgcg.server.records.checkpoint import RoundRecord
from fedsgcg.server.records.journal import Journal
from fedsgcg.server.sites.departures import check_departures, declare, departed
from tests.support.plans import small_plan
from tests.support.scripted_grid import SILENCE, ScriptedGrid, honest_reply

ALL = ("A", "B", "C", "D")
MEMORIES = ["cumulative", "discount", "lagged", "restart", "overlay", "momentum"]


class Stopped(BaseException):
    """The coordinator's process is ended."""


def run(plan: Plan, sites: tuple[str, ...] = ALL, **grid: object) -> tuple[Outcome, ScriptedGrid]:
    found = ScriptedGrid(plan, sites, **grid)  # type: ignore[arg-type]
    return run_federation(found, plan), found


def run_until(plan: Plan, number: int, **grid: object) -> None:
    """Run and stop when a round is done."""

    def stop(event: dict[str, object]) -> None:
        if event["event"] == "round.done" and event["round"] == number:
            raise Stopped

    with pytest.raises(Stopped):
        run_federation(ScriptedGrid(plan, ALL, **grid), plan, stop)  # type: ignore[arg-type]


def leaves(plan: Plan, *sites: str) -> None:
    declare(plan, sites, Disk())


def last_record(plan: Plan) -> RoundRecord:
    with Journal.of_plan(plan) as journal:
        found = journal.resume()
    assert found is not None
    return found


def notes(outcome: Outcome) -> list[tuple[str, str]]:
    return [(problem.code, problem.where) for problem in outcome.problems]


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_run_goes_on_without_the_site_and_says_so(memory: str, tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=4, prototypes__memory=memory)
    run_until(plan, 2)
    leaves(plan, "C")
    outcome, grid = run(plan)
    assert (outcome.status, outcome.rounds_done) == ("degraded", 4)
    (note,) = outcome.problems
    assert (note.code, note.where) == ("RND-407", "C")
    assert "gone from round 3 on" in note.found
    assert "learned in rounds 1 to 2" in note.found
    received = Counter(sent.kind for sent in grid.sent if sent.site == "C")
    assert received == {ENROL: 1}, "its node may ask to enrol, but it is asked for nothing"
    asked = {sent.site for sent in grid.sent if sent.kind in (TRAIN, STATISTICS)}
    assert asked == {"A", "B"}
    assert "C" not in last_record(plan).parts
    written = json.loads((tmp_path / "outcome.json").read_text())
    assert set(written["sites"]) == {"A", "B", "D"}
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["protocol"]["trained"] == ["A", "B", "C"], "the weights did learn from it"


def means_without(plan: Plan, site: str, last: int) -> np.ndarray:
    """Means of the prototypes after some rounds, as if a site had sent no statistics.

    They are computed from what scripted sites send.
    """
    memory, record = PrototypeMemory(plan.prototypes), last_record(plan)
    parts: dict[str, ClassStatistics] = {}
    for number in range(1, last + 1):
        request = Request(replace(record.identity, round=number), record.weights)
        sent = {name: honest_reply(plan, name, TRAIN, request).statistics for name in ALL[:3]}
        parts = memory.update(
            parts,
            [(name, part) for name, part in sent.items() if part is not None and name != site],
        )
    found = memory.prototypes(parts)
    assert found is not None
    return found.mean


@pytest.mark.parametrize("memory", ["cumulative", "discount"])
def test_what_is_left_is_what_the_others_sent_in_all_rounds(memory: str, tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=3, prototypes__memory=memory)
    run_until(plan, 2)
    leaves(plan, "C")
    _, grid = run(plan)
    first = next(sent for sent in grid.sent if sent.kind == TRAIN)
    assert first.request.prototypes is not None
    np.testing.assert_allclose(
        first.request.prototypes.mean, means_without(plan, "C", 2), rtol=1e-12, atol=1e-15
    )
    stored = PrototypeMemory(plan.prototypes).prototypes(last_record(plan).parts)
    assert stored is not None
    np.testing.assert_allclose(stored.mean, means_without(plan, "C", 3), rtol=1e-12, atol=1e-15)


def test_momentum_starts_anew_once(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=5, prototypes__memory="momentum")
    run_until(plan, 2)
    leaves(plan, "C")
    run_until(plan, 3)
    _, grid = run(plan)
    assert all(sent.request.prototypes is not None for sent in grid.sent if sent.kind == TRAIN)
    fresh = small_plan(tmp_path / "fresh", federation__rounds=5, prototypes__memory="momentum")
    run_until(fresh, 2)
    leaves(fresh, "C")
    _, grid = run(fresh)
    given = {
        sent.request.identity.round: sent.request.prototypes
        for sent in grid.sent
        if sent.kind == TRAIN
    }
    assert [number for number, prototypes in given.items() if prototypes is None] == [3]


def test_later_calls_know_it_and_two_sites_may_leave_one_after_the_other(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=4)
    run_until(plan, 1)
    leaves(plan, "C")
    first = departed(tmp_path)
    run_until(plan, 2)
    leaves(plan, "C", "B")
    assert departed(tmp_path)["C"] == first["C"]
    outcome, grid = run(plan)
    assert notes(outcome) == [("RND-407", "C"), ("RND-407", "B")]
    assert [problem.found.partition(" on")[0] for problem in outcome.problems] == [
        "gone from round 2",
        "gone from round 3",
    ]
    assert {sent.site for sent in grid.sent if sent.kind == TRAIN} == {"A"}


def test_a_site_that_leaves_before_the_first_round_gave_nothing(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    leaves(plan, "C")
    outcome, _ = run(plan, ("A", "B", "D"))
    assert notes(outcome) == [("RND-407", "C")]
    assert "it took part in no round" in outcome.problems[0].found
    assert json.loads((tmp_path / "model.json").read_text())["protocol"]["trained"] == ["A", "B"]


def test_the_model_does_not_depend_on_whether_the_site_still_knocks(tmp_path: Path) -> None:
    digests = []
    for name, sites in (("knocks", ALL), ("gone", ("A", "B", "D"))):
        plan = small_plan(tmp_path / name)
        run_until(plan, 1)
        leaves(plan, "C")
        digests.append(run(plan, sites)[0].digest)
    assert digests[0] == digests[1] != ""


def test_a_checkpoint_from_before_the_departure_is_relieved_of_the_site_again(
    tmp_path: Path,
) -> None:
    plan = small_plan(tmp_path, federation__rounds=3, prototypes__memory="cumulative")
    run_until(plan, 1)
    leaves(plan, "C")
    run_until(plan, 2)
    newest = tmp_path / "journal" / "checkpoint-00002.safetensors"
    newest.write_bytes(newest.read_bytes()[:500])
    outcome, _ = run(plan)
    assert notes(outcome) == [("RND-407", "C")]
    assert set(last_record(plan).parts) == {"A", "B"}


def test_a_site_that_leaves_after_the_last_round_is_not_in_the_prototypes_that_are_handed_out(
    tmp_path: Path,
) -> None:
    def no_judgement(
        grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply
    ) -> object:
        return SILENCE if (site, kind) == ("D", EVALUATE) else reply

    plan = small_plan(tmp_path, federation__rounds=2, prototypes__memory="cumulative")
    failed, _ = run(plan, script=no_judgement)
    assert failed.failure[0].code == "RND-403"
    with_it, _ = decode_statistics((tmp_path / "prototypes.arrow").read_bytes())
    leaves(plan, "C")
    outcome, grid = run(plan)
    assert ("RND-407", "C") in notes(outcome)
    assert TRAIN not in {sent.kind for sent in grid.sent}
    described = [sent for sent in grid.sent if sent.kind == STATISTICS]
    assert [sent.site for sent in described] == ["A", "B"]
    parts = [
        (sent.site, honest_reply(plan, sent.site, STATISTICS, sent.request).statistics)
        for sent in described
    ]
    stored, _ = decode_statistics((tmp_path / "prototypes.arrow").read_bytes())
    assert stored.count.sum() == pytest.approx(with_it.count.sum() * 2 / 3)
    assert (
        stored.digest()
        == merge_statistics([(site, part) for site, part in parts if part is not None]).digest()
    )
    assert set(last_record(plan).parts) == {"A", "B", "C"}, (
        "the checkpoint is that of the last round"
    )


def test_the_choice_of_the_model_starts_anew_for_the_site_had_a_say_in_it(tmp_path: Path) -> None:
    def delighted(
        grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply
    ) -> object:
        if (site, kind) == ("C", ENROL):
            cases = {**reply.details["cases"], "validation": 99}
            return replace(reply, details=reply.details | {"cases": cases})
        liked = site == "C" and kind == TRAIN and request.identity.round == 2
        return (
            replace(
                reply, metrics=reply.metrics | {"validation_dice": 1.0, "validation_cases": 99.0}
            )
            if liked
            else reply
        )

    chosen = {}
    for name in ("stays", "leaves"):
        plan = small_plan(
            tmp_path / name, federation__rounds=4, federation__selection="source_validation"
        )
        run_until(plan, 2, script=delighted)
        best = last_record(plan).best
        assert best is not None
        assert best.round == 1
        if name == "leaves":
            leaves(plan, "C")
        run(plan)
        chosen[name] = json.loads((tmp_path / name / "model.json").read_text())["selected_round"]
    assert chosen["stays"] == 1
    assert chosen["leaves"] >= 2


def test_another_missing_site_still_counts_as_missing(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    run_until(plan, 1)
    leaves(plan, "C")
    outcome, _ = run(plan, ("A", "C", "D"))
    (failure,) = outcome.failure
    assert failure.code == "RND-401"
    assert "missing: B" in failure.found
    assert "C" not in failure.found.partition("missing")[2]
    assert "quorum of 2 is not met" in failure.found


# What cannot be


@pytest.mark.parametrize(
    ("sites", "changes", "words"),
    [
        (["Xyz"], {}, "known: A, B, C"),
        (["North"], {"data__sites": ["North", "South", "West"], "heldout": "West"}, ""),
        (
            ["Noth"],
            {"data__sites": ["North", "South", "West"], "heldout": "West"},
            "did you mean 'North'?",
        ),
        (["D"], {}, "held out"),
        (["C"], {"observers": ["C"]}, "an observer"),
        (["A", "B", "C"], {}, "one training site or more"),
        (["C"], {"federation__quorum": 3}, "the quorum of 3 training sites"),
        (["C"], {"federation__quorum": 2}, ""),
    ],
)
def test_only_a_training_site_may_leave_and_somebody_must_stay(
    sites: list[str], changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    plan = small_plan(tmp_path / "run", **changes)
    if not words:
        leaves(plan, *sites)
        assert list(departed(tmp_path / "run")) == sites
        return
    with pytest.raises(FedsgcgError) as caught:
        leaves(plan, *sites)
    assert caught.value.code == "CFG-001"
    assert words in str(caught.value)
    assert "--without" in str(caught.value)
    assert not (tmp_path / "run").exists(), "a refusal writes nothing"


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError) as caught:
        check_departures(small_plan(tmp_path), {"D", "E", "A", "B", "C"})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_file_stops_the_run_and_says_what_to_do(text: str, tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    (tmp_path / "departed.json").write_text(text)
    outcome, grid = run(plan)
    assert (outcome.status, outcome.failure[0].code) == ("failed", "SRV-402")
    assert "--without SITE" in outcome.failure[0].action
    assert grid.sent == []


def test_a_file_that_names_the_heldout_site_stops_the_run(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    (tmp_path / "departed.json").write_text('{"D": "2026-11-22"}')
    outcome, grid = run(plan)
    assert (outcome.status, outcome.failure[0].code) == ("failed", "CFG-001")
    assert grid.sent == []
