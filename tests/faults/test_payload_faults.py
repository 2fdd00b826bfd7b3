"""Bad payloads in a running federation: the site is listed, and the other sites make the model.

No text from a site gets out.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedsgcg.common.errors import CODES
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import STATISTICS, TRAIN, Reply, Request, encode_reply
from fedsgcg.common.wire.payload import Weights, decode_statistics
from fedsgcg.server.aggregation.class_statistics import merge_statistics
from fedsgcg.server.aggregation.fedavg import merge_moments, merge_weights
from fedsgcg.server.federation import initial_weights, run_federation
from tests.support.plans import small_plan
from tests.support.scripted_grid import FLOWER_ERROR, PATIENT, SILENCE, ScriptedGrid, honest_reply

ALL = ("A", "B", "C", "D")


def with_weights(reply: Reply, values: np.ndarray) -> Reply:
    assert reply.weights is not None
    return replace(
        reply,
        weights=Weights(reply.weights.layout, values.astype(np.float32), reply.weights.counters),
    )


def nan(reply: Reply) -> Reply:
    assert reply.weights is not None
    values = reply.weights.values.copy()
    values[17] = np.nan
    return with_weights(reply, values)


def renamed(reply: Reply) -> Reply:
    assert reply.weights is not None
    (name, shape), *rest = reply.weights.layout
    return replace(reply, weights=replace(reply.weights, layout=((name + "x", shape), *rest)))


def negative_scatter(reply: Reply) -> Reply:
    assert reply.statistics is not None
    return replace(reply, statistics=replace(reply.statistics, scatter=-reply.statistics.scatter))


def poisoned_mean(reply: Reply) -> Reply:
    assert reply.statistics is not None
    return replace(reply, statistics=replace(reply.statistics, mean=reply.statistics.mean + 1e6))


def other_round_statistics(reply: Reply) -> RecordDict:
    """Weights of this round beside statistics that state another one."""
    records = encode_reply(reply)
    old = encode_reply(
        replace(reply, identity=replace(reply.identity, round=reply.identity.round - 1))
    )
    records["message"]["statistics"] = old["message"]["statistics"]
    return records


def garbage(reply: Reply) -> RecordDict:
    return RecordDict({"message": ConfigRecord({"identity": PATIENT, "site": PATIENT})})


def truncated(reply: Reply) -> RecordDict:
    records = encode_reply(reply)
    records["message"]["statistics"] = records["message"]["statistics"][:100]  # type: ignore[index]
    return records


def unreadable_details(reply: Reply) -> RecordDict:
    records = encode_reply(reply)
    records["message"]["details"] = "{" + PATIENT
    return records


def with_counters(value: int) -> Callable[[Reply], Reply]:
    """Set every BatchNorm counter to a value."""

    def bend(reply: Reply) -> Reply:
        counters = tuple((name, value) for name, _ in reply.weights.counters)
        return replace(reply, weights=replace(reply.weights, counters=counters))

    return bend


def negative_variance(reply: Reply) -> Reply:
    state = {name: array.copy() for name, array in reply.weights.to_state().items()}
    name = next(name for name in state if name.endswith("running_var"))
    state[name][0] = -1000.0
    return replace(reply, weights=Weights.from_state(state))


def with_metric(name: str, value: float) -> Callable[[Reply], Reply]:
    return lambda reply: replace(reply, metrics=reply.metrics | {name: value})


def with_pixels(value: float) -> Callable[[Reply], Reply]:
    def bend(reply: Reply) -> Reply:
        count = np.full_like(reply.statistics.count, value)
        return replace(reply, statistics=replace(reply.statistics, count=count))

    return bend


FAULTS = {
    "counter beyond int64": (with_counters(2**63 + 5), "PAY-106"),
    "counter near overflow": (with_counters(2**62), "PAY-112"),
    "negative counter": (with_counters(-1), "PAY-112"),
    "finite but huge weights": (
        lambda r: with_weights(r, np.full_like(r.weights.values, 3e38)),
        "PAY-112",
    ),
    "negative variance": (negative_variance, "PAY-112"),
    "huge number of validation cases": (with_metric("validation_cases", 1e300), "PAY-111"),
    "impossible Dice": (with_metric("validation_dice", 1.5), "PAY-112"),
    "huge loss": (with_metric("loss", -1e30), "PAY-112"),
    "loss that is not a number": (with_metric("loss_contrast", float("nan")), "PAY-112"),
    "huge pixel counts": (with_pixels(1.7e308), "STA-201"),
    "pixel counts that are not exact": (with_pixels(2.0**60), "STA-201"),
    "nan": (nan, "PAY-101"),
    "inf": (lambda r: with_weights(r, r.weights.values + np.float32(np.inf)), "PAY-101"),
    "renamed": (renamed, "PAY-103"),
    "short": (
        lambda r: replace(r, weights=Weights((("w", (3,)),), np.zeros(3, np.float32))),
        "PAY-103",
    ),
    "no weights": (lambda r: replace(r, weights=None), "PAY-103"),
    "no count": (lambda r: replace(r, metrics={}), "PAY-110"),
    "negative count": (lambda r: replace(r, metrics=r.metrics | {"examples": -4.0}), "PAY-110"),
    "huge count": (lambda r: replace(r, metrics=r.metrics | {"examples": 1e12}), "PAY-111"),
    "old round": (
        lambda r: replace(r, identity=replace(r.identity, round=r.identity.round - 1)),
        "PAY-120",
    ),
    "other run": (lambda r: replace(r, identity=replace(r.identity, run="x")), "PAY-120"),
    "other site": (lambda r: replace(r, site="A"), "PAY-120"),
    "no statistics": (lambda r: replace(r, statistics=None), "STA-201"),
    "negative scatter": (negative_scatter, "STA-201"),
    "poisoned mean": (poisoned_mean, "STA-201"),
    "mixed rounds": (other_round_statistics, "PAY-120"),
    "statistics of other classes": (
        lambda r: replace(r, statistics=ClassStatistics.empty(5, 8)),
        "STA-201",
    ),
    "garbage": (garbage, "PAY-106"),
    "truncated": (truncated, "PAY-106"),
    "unreadable details": (unreadable_details, "PAY-106"),
    "details of another type": (lambda r: replace(r, details=[PATIENT]), "PAY-106"),
    "its own error": (lambda r: Reply(r.identity, r.site, error="TRN-301"), "TRN-301"),
    "an error we do not know": (lambda r: Reply(r.identity, r.site, error=PATIENT), "SITE-500"),
    "an exception": (lambda r: FLOWER_ERROR, "SITE-500"),
    "silence": (lambda r: SILENCE, "RND-404"),
}


def everything_written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.row(1, 2, 3, 4, 6, 7, 10, 13, 16, 18, 20)
@pytest.mark.attack(
    "counter-overflow",
    "huge-weights",
    "negative-variance",
    "pixel-counts",
    "validation-cases",
    "too-many-examples",
)
def test_a_bad_payload_is_listed_and_touches_nothing(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bend, code = FAULTS[fault]
    settings = {"federation__norm_policy": "average", "prototypes__memory": "lagged"}
    plan = small_plan(tmp_path, federation__rounds=2, federation__quorum=2, **settings)
    honest: dict[str, Reply] = {}

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind != TRAIN or request.identity.round != 2:
            return reply
        if site == "B":
            return bend(reply)
        honest[site] = reply
        return reply

    events: list[dict[str, object]] = []
    outcome = run_federation(ScriptedGrid(plan, ALL, script), plan, events.append)

    assert outcome.status == "degraded"
    assert [(problem.code, problem.where) for problem in outcome.problems] == [(code, "round 2, B")]
    parts = [(site, reply.weights, reply.metrics["examples"]) for site, reply in honest.items()]
    assert sorted(honest) == ["A", "C"]
    assert outcome.digest == merge_weights(parts).digest()  # type: ignore[arg-type]
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["digest"] == outcome.digest
    told = [
        event
        for event in events
        if event["event"] == "round.reply" and (event["site"], event["round"]) == ("B", 2)
    ]
    assert [(event["accepted"], event["code"]) for event in told] == [(False, code)]
    assert PATIENT.encode() not in everything_written(tmp_path)
    captured = capfd.readouterr()
    assert PATIENT not in captured.out + captured.err + repr(events) + repr(outcome)


def lowered(reply: Reply, name: str, value: float) -> Reply:
    assert reply.moments is not None
    changed = np.array(getattr(reply.moments, name))
    changed[0] = value
    return replace(reply, moments=replace(reply.moments, **{name: changed}))


MOMENT_FAULTS = {
    "none": (lambda r: replace(r, moments=None), "STA-202"),
    "nan": (lambda r: lowered(r, "mean", np.nan), "STA-202"),
    "negative variance": (lambda r: lowered(r, "scatter", -1000.0), "STA-202"),
    "no value": (lambda r: lowered(r, "count", 0.0), "STA-202"),
    "beyond float32": (lambda r: lowered(r, "mean", 1e39), "STA-202"),
    "silence": (lambda r: SILENCE, "RND-404"),
}


@pytest.mark.parametrize("fault", MOMENT_FAULTS)
@pytest.mark.row(13)
def test_bad_moments_are_listed_and_the_model_has_those_of_the_others(
    fault: str, tmp_path: Path
) -> None:
    bend, code = MOMENT_FAULTS[fault]
    plan = small_plan(tmp_path, federation__rounds=1, federation__quorum=2)
    trained: dict[str, Reply] = {}
    measured: dict[str, Reply] = {}

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind == TRAIN:
            trained[site] = reply
        elif kind == STATISTICS and request.options.get("moments"):
            measured[site] = reply
            return bend(reply) if site == "B" else reply
        return reply

    outcome = run_federation(ScriptedGrid(plan, ALL, script), plan)
    assert outcome.status == "degraded"
    assert [(problem.code, problem.where) for problem in outcome.problems] == [(code, "round 1, B")]
    merged = merge_weights(
        [(site, r.weights, r.metrics["examples"]) for site, r in trained.items()]
    )  # type: ignore[misc]
    moments = merge_moments([(site, measured[site].moments) for site in ("A", "C")])  # type: ignore[misc]
    assert outcome.digest == moments.put_into(merged).digest()


def test_a_site_whose_training_did_not_count_is_not_asked_for_moments(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=1, federation__quorum=2)
    grid = ScriptedGrid(
        plan,
        ALL,
        lambda grid, site, kind, request, reply: SILENCE if (site, kind) == ("B", TRAIN) else reply,
    )
    run_federation(grid, plan)
    asked = [
        sent.site
        for sent in grid.sent
        if sent.kind == STATISTICS and sent.request.options.get("moments")
    ]
    assert asked == ["A", "C"]


def test_prototypes_are_those_of_the_chosen_model_and_of_the_admitted_sites_alone(
    tmp_path: Path,
) -> None:
    plan = small_plan(tmp_path, federation__rounds=1, federation__quorum=1)
    sent: dict[str, ClassStatistics] = {}
    asked: list[Request] = []

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind != STATISTICS or request.options.get("moments"):
            return reply
        asked.append(request)
        if site == "C":
            return poisoned_mean(reply)
        assert reply.statistics is not None
        sent[site] = reply.statistics
        return reply

    outcome = run_federation(ScriptedGrid(plan, ALL, script), plan)
    assert {request.weights.digest() for request in asked if request.weights} == {outcome.digest}
    assert {request.options["norm_mode"] for request in asked} == {"running"}
    found, _ = decode_statistics((tmp_path / "prototypes.arrow").read_bytes())
    assert found.digest() == merge_statistics(list(sent.items())).digest()


@pytest.mark.parametrize(
    "rows",
    [b"", b"noise", "other structure", "dice of two", "dice missing"],
)
def test_heldout_results_that_cannot_be_are_refused(rows: bytes | str, tmp_path: Path) -> None:
    from fedsgcg.common.wire.payload import encode_cases
    from tests.support.scripted_grid import case_rows

    plan = small_plan(tmp_path, federation__rounds=1)

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if site != "D" or not reply.cases:
            return reply
        if isinstance(rows, bytes):
            return replace(reply, cases=rows)
        bad = case_rows(plan, site, request.weights)  # type: ignore[arg-type]
        bad[0] |= {
            "other structure": {"structure": PATIENT},
            "dice of two": {"dice": 2.0},
            "dice missing": {"dice": None},
        }[rows]
        return replace(reply, cases=encode_cases(bad))

    outcome = run_federation(ScriptedGrid(plan, ALL, script), plan)
    assert outcome.status == "failed"
    assert [problem.code for problem in outcome.failure] == ["RND-403"]
    assert "PAY-106" in outcome.failure[0].found
    assert PATIENT.encode() not in everything_written(tmp_path)
    assert PATIENT not in str(outcome)
    assert not (tmp_path / "results.parquet").exists()
    assert (tmp_path / "model.safetensors").exists()


def test_every_code_that_a_payload_can_get_is_in_the_catalogue() -> None:
    assert {code for _, code in FAULTS.values()} <= set(CODES)


def test_the_honest_script_is_what_an_untouched_round_merges(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__rounds=1, federation__norm_policy="average")
    grid = ScriptedGrid(plan, ALL)
    outcome = run_federation(grid, plan)
    assert outcome.status == "completed"
    trained = [sent for sent in grid.sent if sent.kind == TRAIN]
    assert [sent.site for sent in trained] == ["A", "B", "C"]
    start = initial_weights(plan)
    assert all(
        sent.request.weights is not None and sent.request.weights.digest() == start.digest()
        for sent in trained
    )
    replies = {sent.site: honest_reply(plan, sent.site, TRAIN, sent.request) for sent in trained}
    parts = [(site, reply.weights, reply.metrics["examples"]) for site, reply in replies.items()]
    assert outcome.digest == merge_weights(parts).digest()  # type: ignore[arg-type]
