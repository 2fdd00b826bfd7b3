"""Rules in the round loop: state survives a stop, what is sent, who may take part."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.settings.rules import rule_problems
from fedsgcg.common.wire.learnable import learnable
from fedsgcg.common.wire.messages import (
    SHARES,
    TRAIN,
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.common.wire.sizes import Sizes
from fedsgcg.server.admission import Expectation, admit
from fedsgcg.server.records.checkpoint import decode_checkpoint
from tests.support.plans import small_plan
from tests.support.scripted_grid import ScriptedGrid
from tests.support.scripted_run import run

STATEFUL = ("fedavgm", "fedadam", "fedyogi", "scaffold", "feddg_ga", "fedce")
IDENTITY = Identity("run", "D", 1, "plan")
MODEL = Weights((("w", (3,)), ("bn.running_mean", (2,))), np.zeros(5, np.float32))
CONTROL = np.arange(3, dtype=np.float32)


def stopping(number: int):  # type: ignore[no-untyped-def]
    """A script in which the coordinator fails before a round is complete."""

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind == TRAIN and request.identity.round == number and site == "B":
            raise fail("SRV-401", found="the disk is full", expected="space")
        return reply

    return script


def checkpoint(folder: Path) -> Path:
    return max((folder / "journal").glob("checkpoint-*.safetensors"))


@pytest.mark.parametrize("rule", STATEFUL)
def test_a_run_that_stopped_ends_with_the_same_bytes(rule: str, tmp_path: Path) -> None:
    whole, cut = (
        small_plan(tmp_path / name, federation__aggregator=rule, federation__rounds=4)
        for name in ("whole", "cut")
    )
    wanted, _ = run(whole)
    assert wanted.status == "completed", wanted.problems
    for number in (2, 3):
        assert run(cut, script=stopping(number))[0].status == "failed"
    found, _ = run(cut, shuffle=1)
    assert found.digest == wanted.digest
    state = decode_checkpoint(checkpoint(tmp_path / "cut"))[0].aggregator_state
    assert state
    assert checkpoint(tmp_path / "cut").read_bytes() == checkpoint(tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("rule", STATEFUL)
def test_a_site_that_leaves_takes_its_part_of_the_state_with_it(rule: str, tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__aggregator=rule, federation__quorum=2)
    assert run(plan, script=stopping(3))[0].status == "failed"
    before = decode_checkpoint(checkpoint(tmp_path))[0].aggregator_state
    (tmp_path / "departed.json").write_text('{"B": "2026-01-01T00:00:00+00:00"}')
    outcome, _ = run(plan, ("A", "C", "D"))
    assert outcome.rounds_done == 3, outcome.problems
    after = decode_checkpoint(checkpoint(tmp_path))[0].aggregator_state
    assert {name for name in before if not name.endswith("/B")} == set(after)


def test_the_sites_receive_what_their_rule_needs_and_nothing_else(tmp_path: Path) -> None:
    for rule in ("fedavg", "scaffold", "fedce"):
        _, grid = run(small_plan(tmp_path / rule, federation__aggregator=rule))
        requests = {
            sent.request.identity.round: sent.request for sent in grid.sent if sent.kind == TRAIN
        }
        first, second = requests[1], requests[2]
        assert first.control_variates is None
        assert SHARES not in first.options
        assert (second.control_variates is not None) == (rule == "scaffold")
        assert (SHARES in second.options) == (rule == "fedce")
        assert second.weights is not None
        if second.control_variates is not None:
            assert second.control_variates.shape == (int(learnable(second.weights).sum()),)
        if rule == "fedce":
            assert sum(second.options[SHARES].values()) == pytest.approx(1.0)
            assert not any(site in str(second.options[SHARES]) for site in ("A-", "site"))


def test_control_variates_survive_the_wire_and_only_flat_floats_within_the_limit_do() -> None:
    request = Request(IDENTITY, MODEL, control_variates=CONTROL)
    reply = Reply(IDENTITY, "A", MODEL, control_variates=CONTROL)
    for encode, decode, message in (
        (encode_request, decode_request, request),
        (encode_reply, decode_reply, reply),
    ):
        back = decode(encode(message))  # type: ignore[operator]
        assert back.control_variates.tobytes() == CONTROL.tobytes()
        assert decode(encode(replace(message, control_variates=None))).control_variates is None  # type: ignore[operator]
        for wrong, code in (
            (CONTROL.reshape(3, 1), "PAY-103"),
            (CONTROL.astype(np.float64), "PAY-103"),
            (np.zeros(10**5, np.float32), "PAY-105"),
        ):
            with pytest.raises(FedsgcgError) as caught:
                decode(encode(replace(message, control_variates=wrong)), Sizes(weights=5))  # type: ignore[operator]
            assert caught.value.code == code


@pytest.mark.parametrize(
    ("control", "detail"),
    [
        (None, "no control variates"),
        (np.zeros(5, np.float32), "shape (5,) instead of (3,)"),
        (np.array([0, np.inf, 0], np.float32), "not finite"),
        (np.array([0, -2e6, 0], np.float32), "larger than 1e+06"),
    ],
)
def test_impossible_control_variates_are_rejected(control, detail: str) -> None:  # type: ignore[no-untyped-def]
    due = Expectation(IDENTITY, "A", MODEL, control_variates=True)
    good = Reply(IDENTITY, "A", MODEL, metrics={"examples": 3.0}, control_variates=CONTROL)
    assert admit(good, due).accepted
    verdict = admit(replace(good, control_variates=control), due)
    assert verdict.code == "PAY-121"
    assert detail in verdict.detail
    unused = replace(due, control_variates=False)
    assert admit(replace(good, control_variates=control), unused).accepted


def test_a_site_without_control_variates_is_left_out_of_the_round(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__aggregator="scaffold", federation__quorum=2)
    outcome, _ = run(
        plan,
        script=lambda grid, site, kind, request, reply: (
            replace(reply, control_variates=None) if site == "B" and kind == TRAIN else reply
        ),
    )
    assert outcome.status == "degraded"
    assert {problem.code for problem in outcome.problems} == {"PAY-121", "RND-422"}  # a pause
    state = decode_checkpoint(checkpoint(tmp_path))[0].aggregator_state
    assert {name for name in state if name.startswith("control/")} == {"control/A", "control/C"}


@pytest.mark.parametrize(
    ("changes", "training", "found"),
    [
        ({"aggregator": "krum"}, "ABCD", "krum with 4 training hospitals"),
        ({"aggregator": "krum"}, "ABCDE", ""),
        ({"aggregator": "krum", "tolerated": 2}, "ABCDEF", "krum with 6 training hospitals"),
        ({"aggregator": "krum", "krum": {"selected": 5}}, "ABCDE", "5 models of 5 hospitals"),
        ({"aggregator": "krum", "ownership": "pooled"}, "A", ""),
        ({"aggregator": "fedbn"}, "AB", ""),
        ({"aggregator": "median"}, "A", ""),
    ],
)
def test_a_plan_that_a_rule_cannot_serve_is_refused(
    changes: dict[str, object], training: str, found: str, tmp_path: Path
) -> None:
    plan = small_plan(tmp_path, **{f"federation__{name}": v for name, v in changes.items()})
    problems = list(rule_problems(plan, list(training)))
    assert [problem.code for problem in problems] == (["CFG-020"] if found else [])
    assert all(found in problem.found for problem in problems)


def test_fedbn_needs_batch_norm_and_the_coordinator_looks_at_the_model(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, federation__aggregator="fedbn", network__norm="group")
    assert [problem.code for problem in rule_problems(plan, ["A"])] == ["CFG-020"]
    outcome, grid = run(plan)
    assert [problem.code for problem in outcome.failure] == ["CFG-020"]
    assert not [sent for sent in grid.sent if sent.kind == TRAIN]
