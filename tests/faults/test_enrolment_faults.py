"""Enrolment of sites that lie about who they are or what they have, and the text that they send."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.common.images.contents import CONTENT_HASHES
from fedsgcg.common.names import SHOWN, is_site_text, site_text
from fedsgcg.common.wire.messages import ENROL, EVALUATE, TRAIN, Reply, Request
from fedsgcg.common.wire.payload import encode_cases
from fedsgcg.server.federation import run_federation
from tests.support.plans import small_plan
from tests.support.scripted_grid import ScriptedGrid, case_rows
from tests.support.scripted_run import ALL, run

MARK = "Jane Doe"
HOSTILE = f"<script>alert('{MARK}')</script>\x1b[2J\x1b]0;{MARK}\x07\r\nadmitted: all\n" * 16_000


def authenticated(grid: ScriptedGrid) -> ScriptedGrid:
    """Register every node under the name of its site, as a SuperLink with keys does."""
    grid.names = dict(grid.nodes)
    return grid


@given(st.text(max_size=300))
def test_text_of_a_site_is_short_printable_ascii(text: str) -> None:
    shown = site_text(text)
    assert len(shown) <= SHOWN
    assert all(" " <= char <= "~" for char in shown)
    assert site_text(shown) == shown
    assert is_site_text(text) == (bool(text) and shown == text)


@pytest.mark.parametrize("value", [None, 3, b"x", ["x"]])
def test_what_is_no_text_is_dropped(value: object) -> None:
    assert site_text(value) == ""
    assert not is_site_text(value)


@pytest.mark.parametrize("error", ["DAT-102", "SITE-500"])
@pytest.mark.attack("other-name")
def test_an_error_in_another_sites_name_does_not_make_it_unusable(
    error: str, tmp_path: Path
) -> None:
    """Row 70 and 56: the name registered for the key counts, not the one that is stated."""
    plan = small_plan(tmp_path, federation__quorum=2)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return Reply(reply.identity, "B", error=error) if site == "C" else reply

    grid = authenticated(ScriptedGrid(plan, ALL, script))
    outcome = run_federation(grid, plan)
    assert [(note.code, note.where) for note in outcome.problems] == [(error, "C")]
    assert {sent.site for sent in grid.sent if sent.kind == TRAIN} == {"A", "B"}


def test_a_node_without_a_registered_name_cannot_enrol(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return replace(reply, site="B") if site == "X" else reply

    grid = authenticated(ScriptedGrid(plan, (*ALL, "X"), script))
    (stranger,) = [node for node, site in grid.nodes.items() if site == "X"]
    grid.names[stranger] = ""
    outcome = run_federation(grid, plan)
    assert outcome.status == "completed"
    assert {sent.kind for sent in grid.sent if sent.site == "X"} == {ENROL}
    assert {sent.site for sent in grid.sent if sent.kind == TRAIN} == {"A", "B", "C"}


TEXTS = {
    "name": lambda r: replace(r, site=HOSTILE),
    "name in an error": lambda r: Reply(r.identity, HOSTILE, error="DAT-102"),
    "error code": lambda r: Reply(r.identity, r.site, error=HOSTILE),
    "data": lambda r: replace(r, details=r.details | {"data": HOSTILE}),
    "roles": lambda r: replace(r, details=r.details | {"roles": [HOSTILE]}),
    "kinds": lambda r: replace(r, details=r.details | {"kinds": [HOSTILE]}),
    "colour": lambda r: replace(r, details=r.details | {"colour": HOSTILE}),
    "problems": lambda r: replace(r, details=r.details | {"problems": [{"code": HOSTILE}]}),
    "images": lambda r: replace(
        r, details=r.details | {CONTENT_HASHES: {HOSTILE: {HOSTILE: [HOSTILE, HOSTILE]}}}
    ),
    "own images": lambda r: replace(
        r, details=r.details | {CONTENT_HASHES: {r.site: {HOSTILE: ["0" * 32, "train"]}}}
    ),
    "metric": lambda r: replace(r, metrics={HOSTILE: 1.0}),
}


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("place", TEXTS)
@pytest.mark.attack("hostile-text")
def test_a_megabyte_of_markup_gets_nowhere(
    place: str, names: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Row 68 and 70: HTML, terminal controls and newlines in every text of an enrolment."""
    plan = small_plan(tmp_path, federation__quorum=2, federation__rounds=1)
    events: list[dict[str, object]] = []

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        return TEXTS[place](reply) if (site, kind) == ("B", ENROL) else reply

    grid = ScriptedGrid(plan, ALL, script)
    outcome = run_federation(authenticated(grid) if names else grid, plan, events.append)
    assert outcome.status in ("completed", "degraded")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shown = capfd.readouterr()
    everything = [shown.out + shown.err, repr(outcome), json.dumps(events)]
    everything += [content.decode(errors="replace") for content in files.values()]
    printable = "".join(char for char in HOSTILE if " " <= char <= "~")
    for text in everything:
        assert printable[: SHOWN + 1] not in text
        assert "\x1b[2J" not in text
        assert "\nadmitted: all" not in text
    assert len(files[tmp_path / "outcome.json"]) < 10_000


@pytest.mark.parametrize("column", ["case", "unit"])
@pytest.mark.attack("hostile-text")
def test_text_in_the_results_of_a_case_is_refused(column: str, tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=1, observers=["C"])

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if (site, kind) != ("C", EVALUATE):
            return reply
        rows = case_rows(plan, site, request.weights)
        rows[0][column] = HOSTILE
        return replace(reply, cases=encode_cases(rows))

    outcome, _ = run(plan, script=script)
    assert [note.code for note in outcome.problems] == ["PAY-106"]
    assert MARK.encode() not in b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("kind", ["patients", "cases", "slices"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.attack("too-many-examples")
def test_a_site_that_declares_more_than_its_limit_is_refused(
    kind: str, split: str, tmp_path: Path
) -> None:
    """Row 4: the bound comes from the coordinator, not from the site that it bounds."""
    limits = {"B": {"patients": 60, "slices": 500}}
    plan = small_plan(tmp_path, federation__quorum=2, federation__limits=limits)

    def script(grid: ScriptedGrid, site: str, what: str, request: Request, reply: Reply) -> object:
        if what != ENROL or site not in "BC":
            return reply
        counts = {**reply.details[kind], split: 501}
        return replace(reply, details=reply.details | {kind: counts})

    outcome, _ = run(plan, script=script)
    (problem,) = outcome.problems
    assert (problem.code, problem.where) == ("PAY-111", "B")
    assert "raise federation.limits" in problem.action


def test_without_limits_of_the_coordinator_there_are_finite_ones(tmp_path: Path) -> None:
    federation = small_plan(tmp_path).federation
    assert federation.limit("anybody") == {"patients": 100_000, "slices": 1_000_000}
    limits = {"all": {"slices": 900}, "B": {"patients": 7}}
    stated = small_plan(tmp_path, federation__limits=limits).federation
    assert stated.limit("A") == {"patients": 100_000, "slices": 900}
    assert stated.limit("B") == {"patients": 7, "slices": 900}
