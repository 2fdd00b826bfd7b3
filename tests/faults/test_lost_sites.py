"""Sites that are lost in a round, come back, are too slow, bring other data or another name."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fedsgcg.common.wire.messages import ENROL, TRAIN, Reply, Request
from fedsgcg.server.federation import Outcome, run_federation
from fedsgcg.server.sites import exchange
from tests.support.plans import small_plan
from tests.support.scripted_grid import FLOWER_ERROR, LOST, SILENCE, Script, ScriptedGrid

ALL = ("A", "B", "C", "D")


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LOOK_S", 0.02)


def run(folder: Path, script: Script, **changes: object) -> tuple[Outcome, ScriptedGrid]:
    plan = small_plan(
        folder, **{"federation__rounds": 2, "federation__round_deadline_s": 8.0, **changes}
    )
    grid = ScriptedGrid(plan, ALL, script)
    grid.activated = dict.fromkeys(grid.nodes, "2026-01-01T00:00:00")
    return run_federation(grid, plan), grid


def undisturbed(folder: Path) -> str:
    return run(folder, lambda grid, site, kind, request, reply: reply)[0].digest


def trained(grid: ScriptedGrid) -> Counter[tuple[str, int]]:
    return Counter(
        (sent.site, sent.request.identity.round) for sent in grid.sent if sent.kind == TRAIN
    )


@pytest.mark.row(22)
def test_a_site_that_was_lost_and_is_back_is_asked_again_and_nothing_is_different(
    tmp_path: Path,
) -> None:
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        first = sum(sent.site == "B" and sent.kind == TRAIN for sent in grid.sent) == 1
        return LOST if (site, kind) == ("B", TRAIN) and first else reply

    outcome, grid = run(tmp_path / "lost", script)
    assert (outcome.status, outcome.problems) == ("completed", ())
    assert outcome.digest == undisturbed(tmp_path / "quiet")
    assert trained(grid) == {
        (site, number): 1 + ((site, number) == ("B", 1)) for site in "ABC" for number in (1, 2)
    }


def test_a_site_that_was_restarted_is_asked_again_although_flower_says_nothing(
    tmp_path: Path,
) -> None:
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if (site, kind) != ("B", TRAIN) or trained(grid)[("B", request.identity.round)] > 1:
            return reply
        (node,) = (node for node, name in grid.nodes.items() if name == "B")
        grid.activated[node] = (
            f"2026-01-01T00:00:0{request.identity.round}"  # it died and was started again
        )
        return SILENCE

    outcome, grid = run(tmp_path / "restarted", script)
    assert (outcome.status, outcome.problems) == ("completed", ())
    assert outcome.digest == undisturbed(tmp_path / "quiet")
    assert trained(grid)[("B", 1)] == trained(grid)[("B", 2)] == 2


def test_a_site_that_was_lost_when_it_was_to_enrol_is_asked_again(tmp_path: Path) -> None:
    """As after a restart of the server: it takes nodes for present that are about to start anew."""

    def enrolled(grid: ScriptedGrid, site: str) -> int:
        return sum((sent.site, sent.kind) == (site, ENROL) for sent in grid.sent)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind != ENROL or enrolled(grid, site) > 1 or site not in "BC":
            return reply
        if site == "B":
            return LOST
        (node,) = (node for node, name in grid.nodes.items() if name == "C")
        grid.activated[node] = "2026-01-01T00:00:01"  # Flower says nothing
        return SILENCE

    outcome, grid = run(tmp_path / "lost", script, federation__join_deadline_s=8.0)
    assert (outcome.status, outcome.problems) == ("completed", ())
    assert outcome.digest == undisturbed(tmp_path / "quiet")
    assert [enrolled(grid, site) for site in ALL] == [1, 2, 2, 1]


def test_a_site_that_dies_of_every_enrolment_is_not_asked_for_ever(tmp_path: Path) -> None:
    outcome, grid = run(
        tmp_path,
        lambda grid, site, kind, request, reply: LOST if (site, kind) == ("B", ENROL) else reply,
        federation__join_deadline_s=2.0,
    )
    assert (outcome.status, outcome.failure[0].code) == ("failed", "RND-401")
    assert sum((sent.site, sent.kind) == ("B", ENROL) for sent in grid.sent) == exchange.MOST_TRIES


def test_with_a_quorum_nobody_waits_for_a_lost_site(tmp_path: Path) -> None:
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if (kind, request.identity.round) != (TRAIN, 1):
            return reply
        grid.away = {"B"}  # for the whole of round 1
        return LOST if site == "B" else reply

    outcome, grid = run(tmp_path, script, federation__quorum=2, federation__round_deadline_s=60.0)
    assert outcome.status == "degraded"
    assert [(problem.code, problem.where) for problem in outcome.problems] == [
        ("RND-404", "round 1, B")
    ]
    assert trained(grid)[("B", 1)] == 1
    assert trained(grid)[("B", 2)] == 1


def test_a_site_that_dies_of_every_request_is_given_up(tmp_path: Path) -> None:
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return LOST if (site, kind) == ("B", TRAIN) else reply

    outcome, grid = run(tmp_path, script, federation__round_deadline_s=60.0)
    assert [problem.code for problem in outcome.failure] == ["RND-402"]
    assert trained(grid)[("B", 1)] == exchange.MOST_TRIES


def test_a_site_that_answers_with_a_failure_is_not_asked_again(tmp_path: Path) -> None:
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return FLOWER_ERROR if (site, kind) == ("B", TRAIN) else reply

    outcome, grid = run(tmp_path, script, federation__round_deadline_s=60.0)
    assert [problem.code for problem in outcome.failure] == ["RND-402"]
    assert trained(grid)[("B", 1)] == 1


@pytest.mark.parametrize(("late", "asked"), [("next_round", 2), ("drop", 1)])
def test_what_becomes_of_a_site_that_is_late(late: str, asked: int, tmp_path: Path) -> None:
    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return SILENCE if (site, kind, request.identity.round) == ("B", TRAIN, 1) else reply

    changes = {
        "federation__late": late,
        "federation__quorum": 2,
        "federation__round_deadline_s": 0.3,
    }
    outcome, grid = run(tmp_path, script, **changes)
    assert outcome.status == "degraded"
    assert sum(count for (site, _), count in trained(grid).items() if site == "B") == asked


@pytest.mark.row(47)
def test_a_site_whose_data_changed_is_named_at_the_resume(tmp_path: Path) -> None:
    def data(text: str) -> Script:
        def script(
            grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply
        ) -> object:
            if kind == ENROL:
                reply.details["data"] = text if site == "B" else "same"  # type: ignore[index]
            return reply

        return script

    def cut_off(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        late = (site, kind, request.identity.round) == ("B", TRAIN, 2)
        return SILENCE if late else data("one")(grid, site, kind, request, reply)

    first, _ = run(tmp_path, cut_off, federation__round_deadline_s=0.3)
    assert (first.status, first.rounds_done) == ("failed", 1)
    assert json.loads((tmp_path / "data.json").read_text())["B"] == "one"
    second, _ = run(tmp_path, data("two"), federation__round_deadline_s=0.3)
    changed = [problem for problem in second.problems if problem.code == "RND-406"]
    assert [(problem.where, problem.found) for problem in changed] == [
        ("B", "data two, before one")
    ]
    assert second.status == "degraded"


@pytest.mark.row(47)
@pytest.mark.parametrize("choice", ["warn", "stop"])
@pytest.mark.attack("changed-data")
def test_a_site_whose_data_change_between_two_rounds_is_noticed(
    choice: str, tmp_path: Path
) -> None:
    changed_files: set[str] = set()

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if site == "B" and request.identity.round == 2:
            changed_files.add(site)
        text = "two" if site in changed_files else "one"
        reply.details["data"] = text  # type: ignore[index]
        return reply

    outcome, _ = run(tmp_path, script, federation__changed_data=choice, federation__rounds=3)
    changed = [problem for problem in outcome.problems if problem.code == "RND-406"]
    assert [(one.where, one.found) for one in changed] == [("B", "data two, before one")]
    if choice == "stop":
        assert (outcome.status, outcome.rounds_done) == ("failed", 1)
        assert outcome.failure[0].code == "RND-406"
        outcome, _ = run(  # continues on purpose
            tmp_path, script, federation__changed_data=choice, federation__rounds=3
        )
    assert outcome.rounds_done == 3
    assert outcome.status == ("degraded" if choice == "warn" else "completed")


@pytest.mark.attack("other-name")
def test_a_key_is_valid_for_its_own_hospital_only(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__quorum=2, federation__join_deadline_s=0.3)
    grid = ScriptedGrid(plan, ALL)
    # The node that calls itself C holds the key that was registered for B, whose node is not here.
    grid.nodes = {node: site for node, site in grid.nodes.items() if site != "B"}
    grid.names = {node: {"C": "B"}.get(site, site) for node, site in grid.nodes.items()}
    outcome = run_federation(grid, plan)
    assert {sent.site for sent in grid.sent if sent.kind == TRAIN} == set()
    assert "ROL-201" in str(outcome.failure[0])
    assert outcome.failure[0].code == "RND-401"
