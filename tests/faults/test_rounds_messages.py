"""Messages of degraded and failed runs: codes with their sentences, and no false claim."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fedsgcg.common.errors import CODES, FedsgcgError
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import ENROL, EVALUATE, TRAIN, Reply, Request
from fedsgcg.common.wire.payload import encode_cases
from fedsgcg.server.app import report_outcome
from fedsgcg.server.federation import Outcome, run_federation
from fedsgcg.server.report.sections.cases import case_lines, left_out_sentence
from fedsgcg.server.sites.enrolment import UNUSABLE
from tests.support.plans import small_plan
from tests.support.scripted_grid import SILENCE, Script, ScriptedGrid

ALL = ("A", "B", "C", "D")


def run(
    plan: Plan, sites: tuple[str, ...] = ALL, **grid: object
) -> tuple[Outcome, list[dict], ScriptedGrid]:
    found = ScriptedGrid(plan, sites, **grid)  # type: ignore[arg-type]
    heard: list[dict] = []
    return run_federation(found, plan, heard.append), heard, found


def failing(code: str, *sites: str, kind: str = ENROL) -> Script:
    return lambda grid, site, what, request, reply: (
        Reply(request.identity, site, error=code) if site in sites and what == kind else reply
    )


def detailed(**details: dict[str, object]) -> Script:
    """A script in which sites add to what they tell at the enrolment."""
    return lambda grid, site, kind, request, reply: (
        replace(reply, details=reply.details | details[site])
        if kind == ENROL and site in details
        else reply
    )


# Prototypes that the sites' floors withhold


def withholding(*hidden: int, sites: tuple[str, ...] = ("A", "B", "C"), until: int = 99) -> Script:
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if reply.statistics is None or site not in sites or request.identity.round > until:
            return reply
        keep = np.array([index not in hidden for index in range(2)], dtype=np.float64)
        kept = ClassStatistics(
            reply.statistics.count * keep,
            reply.statistics.mean * keep[:, None],
            reply.statistics.scatter * keep[:, None, None],
        )
        names = [list(grid.plan.data.classes)[index] for index in hidden]
        return replace(
            reply,
            statistics=kept,
            details=reply.details | {"withheld": [*names, "Jane Doe", 7, [1]]},
        )

    return script


def test_every_contrastive_method_says_so(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, method__name="ram_sgcg")
    outcome, _, _ = run(plan, script=withholding(1))
    assert [problem.code for problem in outcome.problems] == ["STA-203"]


@pytest.mark.parametrize("memory", ["lagged", "restart", "cumulative", "discount"])
@pytest.mark.parametrize(
    ("hidden", "active"), [((0, 1), "0 of 2 classes have"), ((1,), "1 of 2 classes has")]
)
def test_a_contrastive_loss_without_prototypes_is_reported_once(
    memory, hidden, active, tmp_path: Path
) -> None:
    outcome, _, _ = run(
        small_plan(tmp_path, prototypes__memory=memory), script=withholding(*hidden)
    )
    assert outcome.status == "degraded"
    (problem,) = outcome.problems
    names = "background, gland" if len(hidden) == 2 else "gland"
    # Round 1 is the warm-up; its statistics come after its merge, or with the training of round 2.
    first = 2 if memory == "restart" else 3
    assert (problem.code, problem.where) == ("STA-203", f"round {first}")
    assert problem.found.startswith(active)
    assert problem.found.endswith("; ".join(f"{site} withholds {names}" for site in "ABC"))
    assert "privacy.min_patients (" in problem.action
    assert "privacy.min_pixels (" in problem.action


def test_it_is_reported_once_over_a_resume(tmp_path: Path) -> None:
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind == TRAIN and request.identity.round == 3:
            return SILENCE
        return withholding(0, 1)(grid, site, kind, request, reply)

    assert run(small_plan(tmp_path), script=script)[0].status == "failed"
    again, _, _ = run(small_plan(tmp_path), script=withholding(0, 1, sites=("A",)))
    assert [(problem.code, problem.where) for problem in again.problems] == [("STA-203", "round 2")]


@pytest.mark.parametrize(
    ("changes", "script"),
    [
        ({}, withholding(1, sites=("A", "B"))),  # one site's class is enough
        ({}, withholding(0, 1, until=0)),
        ({"prototypes__warmup_rounds": 3}, withholding(0, 1)),  # no round comes after the warm-up
        ({"prototypes__weight": 0.0}, withholding(0, 1)),  # the loss is off by the plan
        ({"method__name": "source"}, withholding(0, 1)),
        (
            {"prototypes__warmup_rounds": 0},
            withholding(1, until=0),
        ),  # round 1 has no prototypes by design
    ],
)
def test_it_is_not_reported_where_it_is_not_true(changes, script, tmp_path: Path) -> None:
    assert run(small_plan(tmp_path, **changes), script=script)[0].status == "completed"


# Sites without a usable case


@pytest.mark.parametrize("code", UNUSABLE)
@pytest.mark.parametrize("sites", [["A", "B", "C", "D"], []])
def test_a_site_without_a_case_does_not_stop_the_others(
    code: str, sites: list[str], tmp_path: Path
) -> None:
    outcome, _, grid = run(small_plan(tmp_path, data__sites=sites), script=failing(code, "B"))
    assert outcome.status == "degraded"
    assert [(problem.code, problem.where) for problem in outcome.problems] == [(code, "B")]
    assert {sent.site for sent in grid.sent if sent.kind == TRAIN} == {"A", "C"}


def test_one_site_that_is_left_is_enough_and_none_is_not(tmp_path: Path) -> None:
    outcome, _, grid = run(small_plan(tmp_path / "one"), script=failing("DAT-102", "B", "C"))
    assert outcome.status == "degraded"
    assert {sent.site for sent in grid.sent if sent.kind == TRAIN} == {"A"}
    outcome, _, _ = run(small_plan(tmp_path / "none"), script=failing("DAT-102", "A", "B", "C"))
    assert [problem.code for problem in outcome.failure] == ["RND-401"]


def test_a_silent_site_counts_although_another_has_no_case(tmp_path: Path) -> None:
    outcome, _, _ = run(small_plan(tmp_path), ("A", "B", "D"), script=failing("DAT-102", "B"))
    (problem,) = outcome.failure
    assert problem.code == "RND-401"
    assert "1 training site (A), the quorum of 2 is not met; missing: C" in problem.found
    assert f"refused: B: DAT-102 {CODES['DAT-102']}" in problem.found
    assert "start C" in problem.action


def test_a_quorum_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    outcome, _, _ = run(small_plan(tmp_path, federation__quorum=3), script=failing("DAT-102", "B"))
    assert [problem.code for problem in outcome.failure] == ["RND-401"]


# Wording


def test_a_heldout_site_that_cannot_be_used_is_named_as_the_reason(tmp_path: Path) -> None:
    outcome, _, _ = run(small_plan(tmp_path), script=failing("DAT-102", "D"))
    (problem,) = outcome.failure
    assert f"the held-out site D cannot be used: DAT-102 {CODES['DAT-102']}" in problem.found
    assert "3 training sites (A, B, C), the quorum is met" in problem.found
    assert "missing" not in problem.found
    assert f"{tmp_path}/sites/D/errors.log at the site" in problem.action
    assert "federation.quorum" not in problem.action


def test_a_lost_quorum_says_why_and_where_to_look(tmp_path: Path) -> None:
    outcome, _, _ = run(small_plan(tmp_path), script=failing("TRN-301", "B", kind=TRAIN))
    (problem,) = outcome.failure
    assert problem.code == "RND-402"
    assert problem.found == f"2 admitted; B: TRN-301 {CODES['TRN-301']}"
    assert f"{tmp_path}/sites/B/errors.log at the site" in problem.action


def test_a_lost_evaluation_says_why_and_where_to_look(tmp_path: Path) -> None:
    outcome, _, _ = run(small_plan(tmp_path), script=failing("DAT-113", "D", kind=EVALUATE))
    (problem,) = outcome.failure
    assert problem.code == "RND-403"
    assert problem.found == f"DAT-113 {CODES['DAT-113']}"
    assert f"{tmp_path}/sites/D/errors.log at the site" in problem.action


def test_a_failure_is_raised_and_not_logged_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = small_plan(tmp_path)
    outcome, _, _ = run(plan, ("A",))
    with caplog.at_level(logging.DEBUG), pytest.raises(FedsgcgError) as caught:
        report_outcome(outcome, plan)
    assert caught.value.code == "RND-401"
    assert caplog.records == []


# Events and rows


def test_the_validation_dice_of_an_event_says_whose_it_is(tmp_path: Path) -> None:
    _, heard, _ = run(small_plan(tmp_path))
    done = [event for event in heard if event["event"] == "round.done"]
    assert [(event["round"], event["validation_round"]) for event in done] == [
        (1, 0),
        (2, 1),
        (3, 2),
    ]
    (closing,) = [event for event in heard if event["event"] == "validation.done"]
    assert closing["round"] == 3
    rows = pq.read_table(tmp_path / "rounds.parquet").to_pylist()
    last = [row["value"] for row in rows if (row["metric"], row["round"]) == ("validation_dice", 4)]
    assert last == pytest.approx(
        [closing["validation_dice"]] * 3
    )  # a scripted site's score is the model's alone
    metadata = pq.read_schema(tmp_path / "rounds.parquet").metadata
    assert b"that of round r-1" in metadata[b"validation_dice"]


@pytest.mark.parametrize("heldout", ["D", ""])
def test_an_observer_is_not_called_held_out(heldout: str, tmp_path: Path) -> None:
    plan = small_plan(tmp_path, heldout=heldout, observers=["C"], federation__heldout_every=1)
    _, heard, _ = run(plan)
    assert {event["site"] for event in heard if event["event"] == "heldout.done"} == (
        {heldout} - {""}
    )
    (observed,) = [event for event in heard if event["event"] == "observer.done"]
    assert (observed["site"], 0 <= observed["dice"] <= 1) == ("C", True)
    rows = pq.read_table(tmp_path / "rounds.parquet").to_pylist()
    found = sorted(
        (row["phase"], row["metric"], row["site"], row["round"])
        for row in rows
        if "_dice" in row["metric"]
    )
    judged = [entry for entry in found if entry[0] != "train"]
    curve = [("heldout", "heldout_dice", "D", number) for number in (1, 2, 3)] if heldout else []
    assert judged == [*curve, ("observer", "observer_dice", "C", 3)]


# Choosing by source validation


def unvalidated(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
    if kind == EVALUATE and request.options["split"] == "validation":
        return replace(reply, cases=encode_cases([]), metrics={})
    kept = {
        name: value for name, value in reply.metrics.items() if not name.startswith("validation")
    }
    return replace(reply, metrics=kept)


def test_a_selection_without_validation_cases_is_reported(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__selection="source_validation")
    outcome, heard, _ = run(plan, script=unvalidated)
    assert outcome.status == "degraded"
    assert [problem.code for problem in outcome.problems] == ["RND-405"]
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["selected_round"] == 3
    assert card["validation_dice"] is None
    words = "the model of the last round, because no site has a validation case to choose by"
    assert card["protocol"]["selection"] == words
    (closing,) = [event for event in heard if event["event"] == "validation.done"]
    assert closing["validation_dice"] is None


def test_the_last_model_needs_no_validation(tmp_path: Path) -> None:
    outcome, _, _ = run(small_plan(tmp_path), script=unvalidated)
    assert outcome.status == "completed"
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["protocol"]["selection"] == "the model of the last round"


# Cases


def test_a_case_with_an_empty_mask_is_used_and_flagged_in_every_role(tmp_path: Path) -> None:
    problems = [{"code": "DAT-103"}, {"code": "DAT-110"}, {"code": "DAT-103"}, {"code": "Jane Doe"}]
    sites = {site: {"problems": problems} for site in ("A", "C", "D")}
    run(small_plan(tmp_path, observers=["C"]), script=detailed(**sites))
    census = json.loads((tmp_path / "outcome.json").read_text())["sites"]
    for site in ("A", "C", "D"):
        assert census[site]["left_out"] == {"DAT-103": 2}
        assert census[site]["flagged"] == {"DAT-110": 1}


def test_the_model_says_what_its_training_images_were(tmp_path: Path) -> None:
    """What the held-out site has, and what is no kind, does not count."""
    stated = {
        "A": ["picture"],
        "B": ["axial volume", "Jane Doe"],
        "C": "picture",
        "D": ["sagittal volume"],
    }
    run(
        small_plan(tmp_path),
        script=detailed(**{site: {"kinds": kinds} for site, kinds in stated.items()}),
    )
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["kinds"] == ["axial volume", "picture"]
    assert card["input"]["images"] == ["picture", "volume"]
    assert card["input"]["colour"] is False, "not reported"
    assert card["protocol"]["images"] == "axial volumes, pictures"


def facts(
    role: str, cases: int, left_out: dict[str, int], flagged: dict[str, int]
) -> dict[str, object]:
    return {"role": role, "cases": {"train": cases}, "left_out": left_out, "flagged": flagged}


def test_a_hospital_has_one_line_for_each_role_that_differs() -> None:
    held = {
        "sites": {
            "West": facts("heldout", 2, {"DAT-103": 2}, {"DAT-110": 1}),
            "East": facts("train", 3, {}, {}),
        }
    }
    trained = {"sites": {"West": facts("train", 1, {"DAT-103": 2, "DAT-104": 1}, {})}}
    same = {"sites": {"East": facts("heldout", 3, {}, {})}}
    reason = f"DAT-103 {CODES['DAT-103']}".rstrip(".")
    shape = f"DAT-104 {CODES['DAT-104']}".rstrip(".")
    text = f"2 usable cases, 2 left out (2 × {reason}); 1 with an empty mask"
    assert case_lines([held]) == ["East: 3 usable cases", f"West: {text}"]
    assert case_lines([held, trained, same, trained]) == [
        "East: 3 usable cases",
        f"West (training): 1 usable case, 3 left out (2 × {reason}; 1 × {shape})",
        f"West (held out): {text}",
    ]


def test_the_banner_counts_a_case_once() -> None:
    one = {
        "sites": {
            "West": facts("heldout", 2, {"DAT-103": 2}, {}),
            "East": facts("train", 2, {"DAT-104": 1}, {}),
        }
    }
    more = {"sites": {"West": facts("train", 2, {"DAT-103": 2, "DAT-108": 1}, {})}}
    assert left_out_sentence([one, more, one]) == "4 cases were left out at East and West."
    single = {
        "sites": {
            "East": facts("train", 2, {"DAT-104": 1}, {}),
            "West": facts("train", 2, {}, {"DAT-110": 1}),
        }
    }
    assert left_out_sentence([single]) == "1 case was left out at East."
    assert (
        left_out_sentence([{}, {"sites": "?"}, {"sites": {"East": facts("train", 2, {}, {})}}])
        == ""
    )


# Hospitals whose images are of different kinds


def test_hospitals_with_images_of_different_kinds_are_named(tmp_path: Path) -> None:
    kinds = {
        "A": {"kinds": ["axial volume"]},
        "B": {"kinds": ["axial volume"]},
        "D": {"kinds": ["picture"]},
    }
    outcome, _, _ = run(small_plan(tmp_path / "mixed"), script=detailed(**kinds))
    (problem,) = outcome.problems
    assert (outcome.status, problem.code, problem.where) == ("degraded", "DAT-117", "images")
    assert problem.found == "axial volume at A; axial volume at B; picture at D"
    same = {site: {"kinds": ["axial volume"]} for site in "ABCD"}
    assert run(small_plan(tmp_path / "same"), script=detailed(**same))[0].status == "completed"


def test_three_hospitals_that_fail_alike_point_at_the_coordinators_message(tmp_path: Path) -> None:
    everyone = failing("SITE-500", "A", "B", "C", kind=TRAIN)
    outcome, _, _ = run(small_plan(tmp_path / "all"), script=everyone)
    (problem,) = outcome.failure
    assert problem.code == "RND-402"
    assert "what this coordinator sends" in problem.action
    assert "errors.log at the site" not in problem.action
    outcome, _, _ = run(small_plan(tmp_path / "enrol"), script=failing("SITE-500", "A", "B", "C"))
    assert "what this coordinator sends" in outcome.failure[0].action
    alone = failing("SITE-500", "B", kind=TRAIN)
    outcome, _, _ = run(small_plan(tmp_path / "one"), script=alone)
    assert "sites/B/errors.log at the site" in outcome.failure[0].action
