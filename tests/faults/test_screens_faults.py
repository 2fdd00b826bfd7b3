"""Replies that are valid by themselves but far from the others': warned of, rejected, paused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.common.errors import CODES
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import EVALUATE, STATISTICS, TRAIN, Reply, Request
from fedsgcg.common.wire.norm_moments import MEAN, VARIANCE
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.class_statistics import merge_statistics
from fedsgcg.server.aggregation.fedavg import merge_moments, merge_weights
from fedsgcg.server.federation import Outcome, run_federation
from fedsgcg.server.records.checkpoint import decode_checkpoint
from tests.support.plans import small_plan
from tests.support.scripted_grid import SILENCE, ScriptedGrid, honest_reply
from tests.support.scripted_run import ALL, run

Bend = Callable[[Plan, Reply, Request], Reply]


def scaled(factor: float) -> Bend:
    def bend(plan: Plan, reply: Reply, request: Request) -> Reply:
        start, state = request.weights.to_state(), reply.weights.to_state()
        for name in state:
            if not name.endswith((MEAN, VARIANCE)) and state[name].ndim:
                state[name] = start[name] + np.float32(factor) * (state[name] - start[name])
        return replace(reply, weights=Weights.from_state(state))

    return bend


def with_values(reply: Reply, values: np.ndarray) -> Reply:
    weights = replace(reply.weights, values=values.astype(np.float32))
    return replace(reply, weights=weights)


def copied(plan: Plan, reply: Reply, request: Request) -> Reply:
    return replace(reply, weights=honest_reply(plan, "A", TRAIN, request).weights)


def copied_with_noise(plan: Plan, reply: Reply, request: Request) -> Reply:
    other = honest_reply(plan, "A", TRAIN, request).weights
    noise = np.random.default_rng(0).normal(scale=1e-7, size=other.values.size)
    return with_values(replace(reply, weights=other), other.values + noise)


def zeros(plan: Plan, reply: Reply, request: Request) -> Reply:
    return with_values(reply, np.zeros_like(reply.weights.values))


def first_model(plan: Plan, reply: Reply, request: Request) -> Reply:
    """The model that the coordinator sent in the first round."""
    from fedsgcg.server.federation import initial_weights

    return replace(reply, weights=initial_weights(plan))


def with_statistics(**changes: Callable[[ClassStatistics], np.ndarray]) -> Bend:
    def bend(plan: Plan, reply: Reply, request: Request) -> Reply:
        found = {name: change(reply.statistics) for name, change in changes.items()}
        return replace(reply, statistics=replace(reply.statistics, **found))

    return bend


def statistics_of_another(plan: Plan, reply: Reply, request: Request) -> Reply:
    return replace(reply, statistics=honest_reply(plan, "A", TRAIN, request).statistics)


def with_metric(name: str, value: float) -> Bend:
    return lambda plan, reply, request: replace(reply, metrics=reply.metrics | {name: value})


def raised_counter(plan: Plan, reply: Reply, request: Request) -> Reply:
    """The next honest increment would be beyond the fixed bound of before."""
    counters = tuple((name, 2**53) for name, _ in reply.weights.counters)
    return replace(reply, weights=replace(reply.weights, counters=counters))


SCREENED: dict[str, tuple[Bend, str]] = {
    "Row 17: update x100": (scaled(100), "PAY-113"),
    "Row 17: update x1e6": (scaled(1e6), "PAY-113"),
    "Row 17: flipped and x100": (scaled(-100), "PAY-113"),
    "Row 17: zeros": (zeros, "PAY-113"),
    "Row 17: free rider": (scaled(0), "PAY-115"),
    "Row 17: nearly the received model": (scaled(1e-5), "PAY-115"),
    "Row 17: copy of another site": (copied, "PAY-116"),
    "Row 17: copy with noise": (copied_with_noise, "PAY-116"),
    "Row 17: model of an earlier round": (first_model, "PAY-116"),
    "Row 16: statistics of another site": (statistics_of_another, "PAY-116"),
    "Row 16: moved prototypes": (with_statistics(mean=lambda s: s.mean + 5.0), "STA-211"),
    "Row 16: scatter blown up": (with_statistics(scatter=lambda s: 1e4 * s.scatter), "STA-211"),
}

REFUSED: dict[str, tuple[Bend, str]] = {
    "Row 16: mean of 1e6 without unit length": (
        with_statistics(mean=lambda s: s.mean + 1e6),
        "STA-201",
    ),
    "Row 4: more pixels than the slices have": (
        with_statistics(
            count=lambda s: s.count * 1e4,
            scatter=lambda s: s.scatter * 1e4,
        ),
        "STA-201",
    ),
    "Row 4: more validation cases than enrolled": (with_metric("validation_cases", 3), "PAY-111"),
    "Row 2: a counter that leaves no room": (raised_counter, "PAY-112"),
}
SETTINGS = {
    "federation__norm_policy": "average",
    "prototypes__memory": "lagged",
    "prototypes__normalize": False,
}


def attacked(
    folder: Path, bend: Bend, rounds: range = range(2, 3), **changes: object
) -> tuple[Outcome, dict[str, Reply], list[dict[str, object]]]:
    """Run two rounds in which B misbehaves in the second; returns also its honest replies."""
    plan = small_plan(folder, **{"federation__rounds": 2, **SETTINGS, **changes})
    last: dict[str, Reply] = {}
    events: list[dict[str, object]] = []

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind != TRAIN:
            return reply
        if site == "B" and request.identity.round in rounds:
            reply = bend(plan, reply, request)
        last[site] = reply
        return reply

    return run_federation(ScriptedGrid(plan, ALL, script), plan, events.append), last, events


def merged(replies: dict[str, Reply], *sites: str) -> str:
    parts = [(site, replies[site].weights, replies[site].metrics["examples"]) for site in sites]
    return merge_weights(parts).digest()


@pytest.mark.parametrize("attack", SCREENED)
@pytest.mark.attack("scaled-update", "zeros", "free-rider", "copied-update", "shifted-means")
def test_a_screened_reply_is_rejected_and_the_others_make_the_model(
    attack: str, tmp_path: Path
) -> None:
    bend, code = SCREENED[attack]
    outcome, replies, events = attacked(tmp_path, bend, federation__screening="reject")
    assert outcome.status == "degraded"
    assert [(note.code, note.where) for note in outcome.problems] == [(code, "round 2, B")]
    assert outcome.digest == merged(replies, "A", "C")
    screened = [event for event in events if event["event"] == "round.screened"]
    assert [(one["site"], one["code"], one["rejected"]) for one in screened] == [("B", code, True)]
    (listed,) = json.loads((tmp_path / "outcome.json").read_text())["problems"]
    assert listed["code"] == code


@pytest.mark.parametrize("attack", SCREENED)
def test_a_warning_keeps_the_reply_and_says_so(attack: str, tmp_path: Path) -> None:
    bend, code = SCREENED[attack]
    outcome, replies, events = attacked(tmp_path, bend)
    assert outcome.status == "degraded"
    assert [(note.code, note.where) for note in outcome.problems] == [(code, "round 2, B")]
    assert outcome.digest == merged(replies, "A", "B", "C")
    assert [event["rejected"] for event in events if event["event"] == "round.screened"] == [False]


def test_nothing_is_compared_without_screening(tmp_path: Path) -> None:
    outcome, replies, _ = attacked(tmp_path, scaled(100), federation__screening="off")
    assert outcome.status == "completed"
    assert outcome.digest == merged(replies, "A", "B", "C")


@pytest.mark.parametrize("attack", REFUSED)
@pytest.mark.parametrize("screening", ["off", "warn"])
@pytest.mark.attack("counter-overflow", "shifted-means", "pixel-counts", "validation-cases")
def test_a_value_out_of_range_is_rejected_whatever_the_screening(
    attack: str, screening: str, tmp_path: Path
) -> None:
    bend, code = REFUSED[attack]
    outcome, replies, _ = attacked(tmp_path, bend, federation__screening=screening)
    assert [(note.code, note.where) for note in outcome.problems] == [(code, "round 2, B")]
    assert outcome.digest == merged(replies, "A", "C")


def test_moments_far_from_the_others_are_rejected(tmp_path: Path) -> None:
    """Row 16: BatchNorm moments that silence a layer."""
    plan = small_plan(tmp_path, federation__rounds=1, federation__screening="reject")
    sent: dict[str, Reply] = {}

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind == TRAIN:
            sent[site] = reply
        if kind != STATISTICS or not request.options.get("moments"):
            return reply
        sent[f"{site} moments"] = reply
        blown = replace(reply.moments, scatter=reply.moments.scatter * 1e7)
        return replace(reply, moments=blown) if site == "B" else reply

    outcome, _ = run(plan, script=script)
    assert [(note.code, note.where) for note in outcome.problems] == [("STA-212", "round 1, B")]
    parts = [(site, sent[site].weights, sent[site].metrics["examples"]) for site in "ABC"]
    moments = merge_moments([(site, sent[f"{site} moments"].moments) for site in "AC"])
    assert outcome.digest == moments.put_into(merge_weights(parts)).digest()


def test_the_last_pass_is_screened_as_well(tmp_path: Path) -> None:
    """Row 16: prototypes that are poisoned only for the file that leaves with the model."""
    plan = small_plan(tmp_path, federation__rounds=1, federation__screening="reject", **SETTINGS)
    sent: dict[str, ClassStatistics] = {}

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind != STATISTICS:
            return reply
        sent[site] = reply.statistics
        moved = replace(reply.statistics, mean=reply.statistics.mean + 5.0)
        return replace(reply, statistics=moved) if site == "C" else reply

    outcome, _ = run(plan, script=script)
    assert [note.code for note in outcome.problems] == ["STA-211"]
    from fedsgcg.common.wire.payload import decode_statistics

    found, _ = decode_statistics((tmp_path / "prototypes.arrow").read_bytes())
    assert found.digest() == merge_statistics([(site, sent[site]) for site in "AB"]).digest()


def bad(*sites: str, rounds: range = range(99), kind: str = TRAIN) -> Callable[..., object]:
    """A script in which some sites send models that are not finite."""

    def script(grid: ScriptedGrid, site: str, what: str, request: Request, reply: Reply) -> object:
        if what != kind or site not in sites or request.identity.round not in rounds:
            return reply
        return with_values(reply, reply.weights.values * np.float32(np.nan))

    return script


def test_one_bad_reply_ends_no_study_that_needs_every_site(tmp_path: Path) -> None:
    """Row 1, without a quorum: a rejected answer is an answer."""
    outcome, _ = run(small_plan(tmp_path), script=bad("B", rounds=range(2, 3)))
    assert outcome.status == "degraded"
    assert outcome.rounds_done == 3
    assert [(note.code, note.where) for note in outcome.problems] == [("PAY-101", "round 2, B")]


@pytest.mark.attack("nothing-admitted")
def test_a_round_in_which_nothing_was_admitted_is_void(tmp_path: Path) -> None:
    """Row 5: the previous model is kept, and the run goes on."""
    plan = small_plan(tmp_path, federation__norm_policy="average")
    models: dict[int, Weights] = {}

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind == TRAIN:
            models[request.identity.round] = request.weights
        return bad("A", "B", "C", rounds=range(2, 3))(grid, site, kind, request, reply)

    events: list[dict[str, object]] = []
    outcome = run_federation(ScriptedGrid(plan, ALL, script), plan, events.append)
    assert (outcome.status, outcome.rounds_done) == ("degraded", 3)
    codes = [note.code for note in outcome.problems]
    assert codes == ["PAY-101", "PAY-101", "PAY-101", "RND-421"]
    assert models[3].digest() == models[2].digest() != models[1].digest()
    assert [event["round"] for event in events if event["event"] == "round.void"] == [2]


def test_moments_of_nobody_make_a_round_void(tmp_path: Path) -> None:
    """Row 5, in the pass after the merge: weights without their moments are no model."""
    plan = small_plan(tmp_path)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        late = request.identity.round == 2 and request.options.get("moments")
        return replace(reply, moments=None) if kind == STATISTICS and late else reply

    outcome, grid = run(plan, script=script)
    assert (outcome.status, outcome.rounds_done) == ("degraded", 3)
    assert outcome.problems[-1].code == "RND-421"
    sent = {one.request.identity.round: one.request for one in grid.sent if one.kind == TRAIN}
    assert sent[3].weights.digest() == sent[2].weights.digest()


def test_void_rounds_in_a_row_stop_the_run_and_it_resumes(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=5)
    outcome, grid = run(plan, script=bad("A", "B", "C", rounds=range(2, 99)))
    assert [problem.code for problem in outcome.failure] == ["RND-402"]
    asked = {sent.request.identity.round for sent in grid.sent if sent.kind == TRAIN}
    assert asked == {1, 2, 3, 4}
    outcome, _ = run(plan)
    assert (outcome.status, outcome.rounds_done) == ("degraded", 5)


def test_a_quorum_of_admitted_replies_is_required_where_it_was_set(tmp_path: Path) -> None:
    outcome, _ = run(
        small_plan(tmp_path, federation__quorum=3), script=bad("B", rounds=range(2, 3))
    )
    assert [note.code for note in outcome.problems] == ["PAY-101", "RND-421"]


@pytest.mark.attack("endless-rejections")
def test_three_rejections_in_a_row_pause_a_site(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=10)
    events: list[dict[str, object]] = []
    grid = ScriptedGrid(plan, ALL, bad("B"))
    outcome = run_federation(grid, plan, events.append)
    asked = [
        sent.request.identity.round for sent in grid.sent if (sent.site, sent.kind) == ("B", TRAIN)
    ]
    assert asked == [1, 2, 3, 7]  # the first rejection after a pause is the last one
    pauses = [note for note in outcome.problems if note.code == "RND-422"]
    assert [(note.where, note.found) for note in pauses] == [
        ("B", "not asked in rounds 4 to 6"),
        ("B", "not asked in rounds 8 to 10"),
    ]
    told = [event for event in events if event["event"] == "site.paused"]
    assert [(event["round"], event["until"]) for event in told] == [(3, 6), (7, 10)]
    validated = {sent.site for sent in grid.sent if sent.kind == EVALUATE}
    assert "B" not in validated


def test_a_site_that_recovers_is_not_paused(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=7)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        recovered = request.identity.round % 3 == 0
        return reply if recovered else bad("B")(grid, site, kind, request, reply)

    outcome, _ = run(plan, script=script)
    assert [note.code for note in outcome.problems] == ["PAY-101"] * 5


def test_pauses_leave_as_many_sites_as_the_quorum(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=5, federation__quorum=2)
    outcome, grid = run(plan, script=bad("B", "C", rounds=range(2, 5)))
    assert [problem.code for problem in outcome.failure] == ["RND-402"]
    paused = [note.where for note in outcome.problems if note.code == "RND-422"]
    assert paused == ["B"], "without C the quorum of two could not be met"


def test_a_resumed_run_judges_as_an_uninterrupted_one(tmp_path: Path) -> None:
    changes = {"federation__rounds": 8, "federation__screening": "reject", **SETTINGS}

    def script(stop: int) -> Callable[..., object]:
        def answer(
            grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply
        ) -> object:
            number = request.identity.round
            if kind == TRAIN and number == stop:
                return SILENCE
            if kind == TRAIN and site == "B" and number in (4, 5, 6):
                return scaled(30)(grid.plan, reply, request)
            return reply

        return answer

    one, other = (
        small_plan(tmp_path / name, **changes) for name in ("interrupted", "uninterrupted")
    )
    for number in (3, 5):
        stopped, _ = run(one, script=script(stop=number))
        assert [problem.code for problem in stopped.failure] == ["RND-402"]
    resumed, _ = run(one, script=script(stop=0))
    whole, _ = run(other, script=script(stop=0))
    assert resumed.digest == whole.digest
    assert resumed.problems == whole.problems
    assert [note.code for note in whole.problems] == ["PAY-113"] * 3 + ["RND-422"]
    name = "journal/checkpoint-00008.safetensors"
    found = [decode_checkpoint(Path(plan.output) / name)[0].history for plan in (one, other)]
    assert found[0] == found[1]
    assert found[0].of("B").paused_until == 9


def test_every_code_of_a_screen_is_in_the_catalogue() -> None:
    assert {code for _, code in (*SCREENED.values(), *REFUSED.values())} <= set(CODES)
