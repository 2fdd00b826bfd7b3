"""Held-out sites and observers: they add nothing to the model, and judge the chosen one."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedsgcg.common.wire.messages import ENROL, EVALUATE, STATISTICS, TRAIN, Reply, Request
from fedsgcg.common.wire.payload import encode_cases
from tests.support.plans import small_plan
from tests.support.scripted_grid import (
    FLOWER_ERROR,
    SILENCE,
    ScriptedGrid,
    case_rows,
    honest_reply,
    score_of,
)
from tests.support.scripted_run import ALL, run, silent

# Roles


@pytest.mark.parametrize("memory", ["lagged", "restart", "cumulative", "discount"])
@pytest.mark.row(72)
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
            metrics={"validation_dice": 1.0, "validation_cases": 0.0},
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
