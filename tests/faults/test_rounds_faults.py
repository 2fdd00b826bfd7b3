"""Sites that are missing, late, duplicated or in the wrong role, and runs that stop and resume."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fedsgcg.common.errors import CODES, FedsgcgError
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import ENROL, EVALUATE, STATISTICS, TRAIN, Reply, Request
from fedsgcg.common.wire.payload import encode_cases
from fedsgcg.server.federation import Outcome, run_federation
from fedsgcg.server.records.journal import Journal
from fedsgcg.server.sites.enrolment import UNUSABLE
from tests.support.plans import small_plan
from tests.support.scripted_grid import (
    FLOWER_ERROR,
    SILENCE,
    Script,
    ScriptedGrid,
    case_rows,
    honest_reply,
    score_of,
)

ALL = ("A", "B", "C", "D")


def run(plan: Plan, sites: tuple[str, ...] = ALL, **grid: object) -> tuple[Outcome, ScriptedGrid]:
    found = ScriptedGrid(plan, sites, **grid)  # type: ignore[arg-type]
    return run_federation(found, plan), found


def silent(site: str, kind: str, rounds: range = range(0, 99)) -> Script:
    """A script in which one site does not answer one kind of message in some rounds."""
    return lambda grid, name, what, request, reply: (
        SILENCE if (name, what) == (site, kind) and request.identity.round in rounds else reply
    )


def status_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "outcome.json").read_text())
    return found


def test_the_outcome_says_on_which_processor_and_torch_its_hash_was_made(tmp_path: Path) -> None:
    outcome, _ = run(small_plan(tmp_path, site__threads=2))
    found = status_of(tmp_path)
    assert found["digest"] == outcome.digest != ""
    machine = found["machine"]
    assert isinstance(machine, dict)
    assert set(machine) == {"cpu", "capability", "torch", "threads"}
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 2
    assert machine["capability"] == torch.backends.cpu.get_cpu_capability()  # type: ignore[no-untyped-call]
    model = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    assert machine["cpu"]
    assert not model or model[0].endswith(machine["cpu"])


# Roles


@pytest.mark.parametrize("memory", ["lagged", "restart", "cumulative", "discount"])
def test_the_heldout_site_gets_no_contributing_message(memory: str, tmp_path: Path) -> None:
    plan = small_plan(
        tmp_path, prototypes__memory=memory, observers=["C"], federation__heldout_every=1
    )
    outcome, grid = run(plan)
    assert outcome.status == "completed"
    received = {site: Counter(sent.kind for sent in grid.sent if sent.site == site) for site in ALL}
    assert received["D"] == {ENROL: 1, EVALUATE: 3}  # two for the curve, one at the end
    assert received["C"] == {ENROL: 1, EVALUATE: 1}
    # After each of three merges BatchNorm's moments, at the end the chosen model's statistics.
    assert received["A"] == received["B"] == {ENROL: 1, TRAIN: 3, EVALUATE: 1, STATISTICS: 4}
    splits = {
        (sent.site, sent.request.options["split"]) for sent in grid.sent if sent.kind == EVALUATE
    }
    assert splits == {("A", "validation"), ("B", "validation"), ("C", "test"), ("D", "test")}


def test_what_the_heldout_site_answers_changes_nothing_but_its_results(tmp_path: Path) -> None:
    def flattering(
        grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply
    ) -> object:
        if site != "D" or kind != EVALUATE:
            return reply
        rows = [row | {"dice": 1.0} for row in case_rows(grid.plan, site, request.weights)]  # type: ignore[arg-type]
        return replace(
            reply,
            cases=encode_cases(rows),
            metrics={"validation_dice": 1.0, "validation_cases": 9.0},
        )

    settings = {"federation__selection": "source_validation", "federation__heldout_every": 1}
    honest, _ = run(small_plan(tmp_path / "one", **settings))
    flattered, _ = run(small_plan(tmp_path / "two", **settings), script=flattering)
    assert honest.digest == flattered.digest
    dice = pq.read_table(tmp_path / "two" / "results.parquet")["dice"].to_pylist()
    assert dice == [1.0, 1.0]


def test_prototypes_go_to_training_sites_and_to_nobody_else(tmp_path: Path) -> None:
    for memory, first in (
        ("restart", 2),
        ("lagged", 3),
    ):  # the first trained model is that of round 1
        _, grid = run(small_plan(tmp_path / memory, prototypes__memory=memory))
        trained = [sent for sent in grid.sent if sent.kind == TRAIN]
        assert len(trained) == 9
        for sent in trained:
            assert (sent.request.prototypes is not None) == (sent.request.identity.round >= first)
        assert all(sent.request.prototypes is None for sent in grid.sent if sent.kind != TRAIN)


def test_restart_without_a_pass_after_the_merge_asks_before_the_round(tmp_path: Path) -> None:
    for name, changes in {
        "average": {"federation__norm_policy": "average"},
        "running": {"prototypes__norm_mode": "running"},
    }.items():
        _, grid = run(small_plan(tmp_path / name, prototypes__memory="restart", **changes))
        asked = [
            s
            for s in grid.sent
            if s.kind == STATISTICS and s.site == "A" and not s.request.options.get("moments")
        ]
        trained = {
            s.request.identity.round: s.request
            for s in grid.sent
            if s.kind == TRAIN and s.site == "A"
        }
        assert [s.request.identity.round for s in asked] == [
            2,
            3,
            3,
        ]  # before rounds 2 and 3, and the chosen model
        for sent in asked[:2]:
            now = trained[sent.request.identity.round]
            assert sent.request.weights is not None
            assert now.weights is not None
            assert sent.request.weights.digest() == now.weights.digest()
        assert trained[1].prototypes is None
        assert trained[2].prototypes is not None


def test_a_site_learns_whether_its_own_part_is_in_the_prototypes(tmp_path: Path) -> None:
    plan = small_plan(
        tmp_path, prototypes__memory="overlay", federation__rounds=4, federation__quorum=2
    )
    _, grid = run(plan, script=silent("B", TRAIN, range(3, 4)))
    held = {
        s.request.identity.round: s.request.options.get("held")
        for s in grid.sent
        if s.kind == TRAIN
    }
    assert {number: len(parts or []) for number, parts in held.items()} == {1: 0, 2: 0, 3: 3, 4: 2}
    sent = {
        site: honest_reply(plan, site, TRAIN, s.request).statistics
        for s in grid.sent
        for site in ALL[:3]
        if s.kind == TRAIN and s.request.identity.round == 3
    }
    assert held[4] == sorted(sent[site].digest() for site in ("A", "C"))


# Enrolment


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
        (lambda r: replace(r, identity=replace(r.identity, plan="other")), "PAY-120"),
        (lambda r: Reply(r.identity, r.site, error="DAT-102"), "DAT-102"),
        (lambda r: replace(r, details=[1]), "PAY-106"),
    ],
)
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


# Choosing and judging


def test_the_chosen_model_is_the_best_on_source_validation(tmp_path: Path) -> None:
    plan = small_plan(
        tmp_path / "run", federation__rounds=5, federation__selection="source_validation"
    )
    outcome, grid = run(plan)
    models = {s.request.identity.round - 1: s.request.weights for s in grid.sent if s.kind == TRAIN}
    final = next(
        s.request
        for s in grid.sent
        if s.kind == EVALUATE and s.request.options["split"] == "validation"
    )
    models[5] = final.weights
    scores = {
        number: score_of(model) for number, model in models.items() if number and model is not None
    }
    best = max(scores, key=lambda number: scores[number])
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    assert card["selected_round"] == best
    assert card["validation_dice"] == pytest.approx(scores[best])
    chosen = models[best]
    assert chosen is not None
    assert outcome.digest == chosen.digest()
    judged = [s for s in grid.sent if s.site == "D" and s.kind == EVALUATE]
    assert [s.request.weights.digest() for s in judged if s.request.weights is not None] == [
        outcome.digest
    ]


def test_validation_dice_of_a_round_is_that_of_the_model_it_received(tmp_path: Path) -> None:
    _, grid = run(small_plan(tmp_path))
    rows = pq.read_table(tmp_path / "rounds.parquet").to_pylist()
    stated = {
        row["round"]: row["value"]
        for row in rows
        if (row["metric"], row["site"]) == ("validation_dice", "A")
    }
    received = {
        s.request.identity.round: score_of(s.request.weights) for s in grid.sent if s.kind == TRAIN
    }  # type: ignore[arg-type]
    final = next(s.request.weights for s in grid.sent if s.kind == EVALUATE)
    assert stated == pytest.approx(received | {4: score_of(final)})  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", [SILENCE, FLOWER_ERROR])
def test_a_heldout_site_that_does_not_answer_fails_the_run_which_can_be_finished_later(
    fault: object, tmp_path: Path
) -> None:
    plan = small_plan(tmp_path)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return fault if (site, kind) == ("D", EVALUATE) else reply

    outcome, _ = run(plan, script=script)
    assert outcome.status == "failed"
    assert [problem.code for problem in outcome.failure] == ["RND-403"]
    assert outcome.rounds_done == 3
    again, grid = run(plan)
    assert again.status == "completed"
    assert TRAIN not in {sent.kind for sent in grid.sent}


def test_a_missing_observer_only_degrades(tmp_path: Path) -> None:
    outcome, _ = run(small_plan(tmp_path, observers=["C"]), script=silent("C", EVALUATE))
    assert outcome.status == "degraded"
    assert {row["site"] for row in pq.read_table(tmp_path / "results.parquet").to_pylist()} == {"D"}


def test_without_a_heldout_site_the_source_validation_is_the_result(tmp_path: Path) -> None:
    outcome, _ = run(small_plan(tmp_path, heldout=""))
    assert outcome.status == "completed"
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {row["site"] for row in rows} == set(ALL)
    assert {(row["method"], row["heldout"], row["seed"]) for row in rows} == {("sgcg", "", 0)}


def test_source_without_statistics_has_no_prototypes(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, method__name="source", method__statistics=False)
    outcome, grid = run(plan)
    assert outcome.status == "completed"
    assert all(sent.request.prototypes is None for sent in grid.sent)
    assert not (tmp_path / "prototypes.arrow").exists()
    metrics = {row["metric"] for row in pq.read_table(tmp_path / "rounds.parquet").to_pylist()}
    assert "between_site_trace" not in metrics
    assert {
        "loss",
        "validation_dice",
        "examples",
        "bytes_up",
        "bytes_down",
        "heldout_dice",
    } <= metrics


# The run folder


def test_a_second_process_on_the_run_folder_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    with Journal.of_plan(plan):
        with pytest.raises(FedsgcgError) as caught:
            run(plan)
        assert caught.value.code == "CFG-006"
        assert not (tmp_path / "events.jsonl").exists()
        assert not (tmp_path / "outcome.json").exists()


def test_other_settings_are_refused_on_a_used_folder(tmp_path: Path) -> None:
    run(small_plan(tmp_path))
    before = (tmp_path / "outcome.json").read_bytes()
    with pytest.raises(FedsgcgError) as caught:
        run(small_plan(tmp_path, seed=5))
    assert caught.value.code == "CFG-005"
    assert "seed=5" in str(caught.value)
    assert (tmp_path / "outcome.json").read_bytes() == before


def test_a_damaged_checkpoint_costs_one_round_and_is_told(tmp_path: Path) -> None:
    first, _ = run(small_plan(tmp_path))
    path = tmp_path / "journal" / "checkpoint-00003.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    events: list[dict[str, object]] = []
    plan = small_plan(tmp_path)
    grid = ScriptedGrid(plan, ALL)
    again = run_federation(grid, plan, events.append)
    assert again.digest == first.digest
    assert {sent.request.identity.round for sent in grid.sent if sent.kind == TRAIN} == {3}
    assert [
        str(event["where"]).rpartition("/")[2]
        for event in events
        if event["event"] == "journal.damaged"
    ] == [path.name]


def test_events_are_lines_of_json_in_order(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    plan = small_plan(tmp_path, federation__rounds=2)
    run_federation(ScriptedGrid(plan, ALL), plan, heard.append)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert lines == heard
    names = [line["event"] for line in lines if line["event"] != "round.reply"]
    rounds = ["round.started", "round.done"] * 2
    wanted = [
        "run.started",
        "sites.enrolled",
        *rounds,
        "validation.done",
        "heldout.done",
        "run.finished",
    ]
    assert names == wanted
    assert Counter(line["site"] for line in lines if line["event"] == "round.reply") == {
        "A": 2,
        "B": 2,
        "C": 2,
    }
    assert {(line["method"], line["heldout"], line["seed"], line["rounds"]) for line in lines} == {
        ("sgcg", "D", 0, 2)
    }
    assert all(np.isfinite(line["time"]) for line in lines)
