"""The resident of a hospital that records every reply before it leaves, and may be malicious.

`KIT/nemesis.json` says what is wrong with its replies: `poison` is a key of `POISONS`, `duplicate`
sends each reply to `train` twice. Records are in `KIT/sent` (`tests.nemesis.recorder`).
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import Context, Message

from fedsgcg.common.wire.messages import Reply, decode_reply, encode_reply
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.site import resident
from tests.nemesis.recorder import record

push_message = resident.push_message


def _values(change: Callable[[Any], Any]) -> Callable[[Reply], Reply]:
    def poison(reply: Reply) -> Reply:
        assert reply.weights is not None
        values = change(reply.weights.values.copy()).astype(np.float32)
        return replace(reply, weights=Weights(reply.weights.layout, values, reply.weights.counters))

    return poison


def _first(value: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[0] = value
        return values

    return change


def _metrics(**changes: float) -> Callable[[Reply], Reply]:
    return lambda reply: replace(reply, metrics=reply.metrics | changes)


def _counters(reply: Reply) -> Reply:
    assert reply.weights is not None
    counters = tuple((name, 2**63 - 1) for name, _ in reply.weights.counters)
    return replace(reply, weights=Weights(reply.weights.layout, reply.weights.values, counters))


def _earlier_round(reply: Reply) -> Reply:
    identity = replace(reply.identity, round=reply.identity.round - 1)
    return replace(reply, identity=identity, statistics=None)


def _impossible_statistics(reply: Reply) -> Reply:
    assert reply.statistics is not None
    return replace(reply, statistics=replace(reply.statistics, scatter=-reply.statistics.scatter))


def _impossible_moments(reply: Reply) -> Reply:
    assert reply.moments is not None
    return replace(reply, moments=replace(reply.moments, mean=reply.moments.mean * 1e40))


POISONS: Final[dict[str, Callable[[Reply], Reply]]] = {
    "NaN in a weight": _values(_first(float("nan"))),
    "infinite weight": _values(_first(float("inf"))),
    "weights of 3e38": _values(lambda values: np.full_like(values, 3e38)),
    "10^15 examples": _metrics(examples=1e15),
    "no example": _metrics(examples=0.0),
    "counters of 2^63 - 1": _counters,
    "reply of an earlier round": _earlier_round,
    "negative covariance": _impossible_statistics,
    "moments of 1e40": _impossible_moments,
}
"""Replies that must be rejected: each breaks a rule that honest hospitals never break."""


def push(client: Any, message: Message, context: Context) -> None:
    """Record a reply, changed as the kit's `nemesis.json` says, and send it."""
    kit = Path(sys.argv[1]).parent
    facts = json.loads((kit / "nemesis.json").read_text())
    kind = str(message.metadata.message_type)
    poison = ""
    if name := facts.get("poison"):
        reply = decode_reply(message.content)
        if has_part(reply, name):
            poison = name
            message.content = encode_reply(POISONS[name](reply))
    # The record is no part of the hospital: a full disk there must not concern it.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    twice = kind == "train" and bool(facts.get("duplicate"))
    record(kit / "sent", message.content, kind, poison, twice)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    push_message(client, message, context)
    if twice:
        try:
            push_message(client, message, context)
        except Exception as error:  # the SuperNode or the server may refuse it
            print(f"the duplicate was refused: {type(error).__name__}", flush=True)


def has_part(reply: Reply, poison: str) -> bool:
    """Whether a reply has the part that a poison changes."""
    parts = {"negative covariance": reply.statistics, "moments of 1e40": reply.moments}
    return not reply.error and parts.get(poison, reply.weights) is not None


def main() -> int:
    """Run the resident."""
    resident.push_message = push
    return resident.main()
