"""The judge of `make nemesis` on pauses (I11), and on whether a run exercised what it promised."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.nemesis import checker, coverage, schedule
from tests.nemesis.faults import FAULTS
from tests.nemesis.history import Checkpoint, History, Sent, Study

SITES = ["A", "B", "C"]
OK, REFUSED, SILENT = "ok", "PAY-101", ""


def identity(number: int) -> dict[str, Any]:
    return {"run": "r", "fold": "D", "round": number, "plan": "p"}


def sent(number: int, poison: str = "", twice: bool = False) -> Sent:
    """A training reply."""
    entries = {
        "message/identity": json.dumps(json.dumps(identity(number))).encode(),
        "message/error": b'""',
    }
    return Sent(Path("reply"), entries, "train", poison, twice)


def study(
    folder: Path,
    rounds: Sequence[dict[str, str]],
    paused: dict[int, dict[str, int]] | None = None,
    **facts: Any,
) -> Study:
    """A study of which site -> answer of each round is known; round n is at time 10 n.

    Args:
        folder: For the rows of the journal.
        rounds: Site -> OK, SILENT, or the code of its refusal.
        paused: Round -> site -> last round of the pause that begins after it.
        facts: Of `history.jsonl`.
    """
    events: list[dict[str, Any]] = [{"event": "run.started", "round": 0, "time": 0.0}]
    (folder / "journal/rounds").mkdir(parents=True)
    for number, answers in enumerate(rounds, start=1):
        events.append({"event": "round.started", "round": number, "time": 10.0 * number})
        for site, answer in answers.items():
            if answer != SILENT:
                facts_of = {"site": site, "accepted": answer == OK, "code": answer}
                events.append(reply_event(number) | facts_of)
        for site, until in (paused or {}).get(number, {}).items():
            until_event = {"event": "site.paused", "site": site, "until": until}
            events.append(until_event | {"round": number, "time": 10.0 * number + 8})
        events.append({"event": "round.done", "round": number, "time": 10.0 * number + 9})
        write_rows(folder, number, [site for site, answer in answers.items() if answer == OK])
    first = Checkpoint(folder / "c", {}, {"identity": json.dumps(identity(1))})
    outcome = {"status": "completed", "digest": "d", "problems": [], "rounds_done": len(rounds)}
    return Study(folder, [first], events, outcome, {"study": "0", "simulated": "", **facts})


def reply_event(number: int) -> dict[str, Any]:
    return {"event": "round.reply", "round": number, "time": 10.0 * number + 5}


def write_rows(folder: Path, number: int, sites: Sequence[str]) -> None:
    rows = [{"phase": "train", "metric": "examples", "site": site} for site in sites]
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in COLUMNS}
    path = folder / "journal/rounds" / f"{number:05d}.arrow"
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


COLUMNS = ("phase", "metric", "site")


def history(
    *studies: Study,
    by_site: dict[str, list[Sent]] | None = None,
    lines: Sequence[dict[str, Any]] = (),
    **promise: Any,
) -> History:
    facts = {"training": SITES, "heldout": "D", "promise": promise}
    known = {site: (by_site or {}).get(site, []) for site in (*SITES, "D")}
    return History(Path(), facts, list(studies), known, list(lines))


def answers(*of_b: str) -> list[dict[str, str]]:
    """Rounds in which B gives some answers and the others are honest."""
    return [{"A": OK, "B": answer, "C": OK} for answer in of_b]


@pytest.mark.parametrize(
    ("of_b", "paused", "holds"),
    [
        ((REFUSED,) * 3, {3: 6}, True),
        ((REFUSED,) * 3 + (SILENT,) * 3 + (OK,), {3: 6}, True),
        # After a pause one refusal is enough; an accepted reply in between starts over.
        ((REFUSED,) * 3 + (SILENT,) * 3 + (REFUSED,), {3: 6, 7: 10}, True),
        ((REFUSED,) * 3 + (SILENT,) * 3 + (OK, REFUSED), {3: 6, 8: 11}, False),
        ((REFUSED, SILENT, REFUSED, REFUSED), {4: 7}, True),
        ((REFUSED, OK, REFUSED, REFUSED), {4: 7}, False),
        ((REFUSED, REFUSED), {2: 5}, False),
        ((OK,), {1: 4}, False),
        ((REFUSED,) * 3, {3: 5}, False),
        ((REFUSED,) * 3 + (OK,), {3: 6}, False),
    ],
)
def test_i11_a_pause_is_earned_and_kept(
    tmp_path: Path, of_b: tuple[str, ...], paused: dict[int, int], holds: bool
) -> None:
    pauses = {number: {"B": until} for number, until in paused.items()}
    one = study(tmp_path, answers(*of_b), pauses)
    found = list(checker.deserved(one, history(one)))
    assert (not found) == holds, found
    assert {violation.invariant for violation in found} <= {"I11"}


def test_i11_a_paused_site_that_sends_a_reply_is_found(tmp_path: Path) -> None:
    one = study(tmp_path, answers(*(REFUSED,) * 3, *(SILENT,) * 3), {3: {"B": 6}})
    assert list(checker.deserved(one, history(one, by_site={"B": [sent(3), sent(7)]}))) == []
    found = list(checker.deserved(one, history(one, by_site={"B": [sent(5)]})))
    assert [violation.found for violation in found] == ["B is paused in round 5 and took part"]


def test_i11_a_round_that_was_repeated_counts_once(tmp_path: Path) -> None:
    one = study(tmp_path, answers(REFUSED, REFUSED), {2: {"B": 5}})
    again = [event for event in one.events if event["round"] == 1]
    one.events[1:1] = again
    assert [violation.invariant for violation in checker.deserved(one, history(one))] == ["I11"]


def made(fault: str, effect: bool = True) -> dict[str, Any]:
    return {"event": "fault.over", "fault": fault, "effect": effect, "study": "0"}


def missing(history: History) -> set[str]:
    return {violation.where for violation in coverage.promised(history)}


def test_a_fault_counts_when_it_was_made_and_had_its_effect() -> None:
    promise = {"faults": ("1 % loss", "100 kB/s", "site suspended")}
    lines = [made("1 % loss"), made("100 kB/s", effect=False)]
    assert missing(history(lines=lines, **promise)) == {"100 kB/s", "site suspended"}


def test_a_bad_reply_counts_when_it_was_refused_and_a_double_one_when_it_counts_once(
    tmp_path: Path,
) -> None:
    promise = {"replies": ("NaN in a weight", schedule.TWICE)}
    rounds = [{"A": OK, "B": REFUSED, "C": OK}]
    one = study(tmp_path / "a", rounds)
    replies = {"A": [sent(1, twice=True)], "B": [sent(1, "NaN in a weight")]}
    assert missing(history(one, by_site=replies, **promise)) == set()
    assert missing(history(one, **promise)) == set(promise["replies"])
    admitted = study(tmp_path / "b", [dict.fromkeys(SITES, OK)])
    write_rows(admitted.folder, 1, ["A", "A", "B", "C"])
    assert missing(history(admitted, by_site=replies, **promise)) == set(promise["replies"])


def test_a_partition_counts_when_the_others_finished_three_rounds_and_the_site_came_back(
    tmp_path: Path,
) -> None:
    lines = [{"event": "cut", "site": "B", "time": 19.0}]
    lines += [{"event": "cut.over", "site": "B", "time": 50.0}]

    def seen(name: str, *of_b: str) -> bool:
        one = study(tmp_path / name, answers(*of_b))
        return not missing(history(one, lines=lines, outcomes=(schedule.OTHERS,)))

    assert seen("back", OK, SILENT, SILENT, SILENT, OK)
    assert not seen("gone", OK, SILENT, SILENT, SILENT, SILENT)
    assert not seen("two", OK, OK, SILENT, SILENT, OK)


def test_a_pause_counts_when_the_site_was_merged_after_it(tmp_path: Path) -> None:
    def seen(name: str, *of_b: str) -> bool:
        one = study(tmp_path / name, answers(*of_b), {3: {"B": 6}})
        return not missing(history(one, outcomes=(schedule.PAUSE,)))

    refused = ((REFUSED,) * 3) + ((SILENT,) * 3)
    assert seen("back", *refused, OK)
    assert not seen("gone", *refused, REFUSED)


def test_a_completed_study_counts_with_a_fault_and_the_simulations_model(tmp_path: Path) -> None:
    def seen(name: str, lines: Sequence[dict[str, Any]], simulated: str) -> bool:
        one = study(tmp_path / name, answers(OK), simulated=simulated)
        return not missing(history(one, lines=lines, outcomes=(schedule.COMPLETED,)))

    assert seen("same", [made("1 % loss")], "d")
    assert not seen("other", [made("1 % loss")], "e")
    assert not seen("untouched", [], "d")


def test_a_degraded_study_counts_with_a_reason_and_a_resume_with_a_second_start(
    tmp_path: Path,
) -> None:
    wanted = (schedule.DEGRADED, schedule.RESUMED)
    one = study(tmp_path, answers(OK))
    one.outcome["status"] = "degraded"
    assert missing(history(one, outcomes=wanted)) == set(wanted)
    one.outcome["problems"] = [{"code": "RND-402"}]
    one.events.append({"event": "run.started", "round": 1, "time": 20.0})
    assert missing(history(one, outcomes=wanted)) == set()


@pytest.mark.parametrize("seconds", [90.0, 600.0])
def test_a_run_promises_what_its_acts_contain(seconds: float) -> None:
    acts, promise = schedule.acts(random.Random(0), FAULTS, seconds, 20.0)
    steps = [step for act in acts[:2] for step in act.steps]
    assert {step.fault for step in steps if step.fault} <= set(promise.faults)
    assert {step.replies for step in steps if step.replies} <= set(promise.replies)
    assert {*promise.faults} <= {*FAULTS}
    assert {*promise.replies} <= {*schedule.BAD_REPLIES}
    named = {name for group in schedule.HARMLESS for name in group}
    assert named | {*schedule.SINGLE, schedule.PARTITION, schedule.PAUSED} == {*FAULTS}
    if seconds >= schedule.LONG_S:
        assert {*promise.faults} == {*FAULTS}
        assert {*promise.replies} == {*schedule.BAD_REPLIES}
