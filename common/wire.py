"""Flower records <-> our requests and replies: the one place that knows how a message is laid out.

A request or reply is a `RecordDict` with at most three records: `weights` (one flat float32 array: a message costs
seconds per array, stack.md 3.3), `message` (identity, layout, Arrow bytes, plain settings) and `metrics`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import fail
from common.payload import Identity, Weights, decode_statistics, encode_statistics
from common.statistics import ClassStatistics

ENROL = "query.enrol"
STATISTICS = "query.statistics"
TRAIN = "train"
EVALUATE = "evaluate"


@dataclass(frozen=True)
class Request:
    """What the coordinator sends.

    Attributes:
        identity: Run, fold, round and plan it belongs to.
        weights: The global model; absent in an enrolment.
        prototypes: Global class statistics; absent while none are known or the method needs none.
        options: Plain settings of this one message, e.g. `{"split": "test"}`.
    """

    identity: Identity
    weights: Weights | None = None
    prototypes: ClassStatistics | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a site sends back.

    Attributes:
        identity: Copied from the request.
        site: Name of the site.
        weights: The locally trained model.
        statistics: Class statistics of the site's pixels.
        metrics: Figures of the round (losses, counts, seconds).
        cases: Arrow bytes of per-case results (`common.payload.encode_cases`).
        details: Plain facts, e.g. of an enrolment.
        error: Error code when the site failed; everything else is then absent.
    """

    identity: Identity
    site: str
    weights: Weights | None = None
    statistics: ClassStatistics | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    cases: bytes = b""
    details: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def encode_request(request: Request) -> RecordDict:
    """Lay a request out as Flower records."""
    records = _payload_records(request.identity, request.weights, request.prototypes)
    records["message"]["options"] = json.dumps(request.options)
    return records


def decode_request(records: RecordDict) -> Request:
    """Read a request; raises PAY-103, PAY-106 or PAY-107 for what is not one."""
    message = _message(records)
    identity = Identity.decode(str(message["identity"]))
    return Request(identity, _weights(records), _statistics(message, identity), json.loads(str(message["options"])))


def encode_reply(reply: Reply) -> RecordDict:
    """Lay a reply out as Flower records."""
    records = _payload_records(reply.identity, reply.weights, reply.statistics)
    message = records["message"]
    message["site"] = reply.site
    message["error"] = reply.error
    message["cases"] = reply.cases
    message["details"] = json.dumps(reply.details)
    if reply.metrics:
        records["metrics"] = MetricRecord({name: float(value) for name, value in reply.metrics.items()})
    return records


def decode_reply(records: RecordDict) -> Reply:
    """Read a reply; raises PAY-103, PAY-106 or PAY-107 for what is not one."""
    message = _message(records)
    identity = Identity.decode(str(message["identity"]))
    metrics = {str(name): _number(value) for name, value in dict(records.get("metrics") or {}).items()}
    return Reply(
        identity=identity,
        site=str(message["site"]),
        weights=_weights(records),
        statistics=_statistics(message, identity),
        metrics=metrics,
        cases=bytes(message["cases"]),
        details=json.loads(str(message["details"])),
        error=str(message["error"]),
    )


def payload_bytes(records: RecordDict) -> dict[str, int]:
    """Bytes of each part of a message, as the ledger and the README's table count them."""
    message = _message(records)
    parts = {name: len(value) for name, value in message.items() if isinstance(value, bytes) and value}
    parts["text"] = sum(len(value.encode()) for value in message.values() if isinstance(value, str))
    if "weights" in records:
        parts["weights"] = sum(len(array.data) for array in records["weights"].values())
    if "metrics" in records:
        parts["metrics"] = 8 * len(records["metrics"])
    return parts


def _payload_records(identity: Identity, weights: Weights | None, statistics: ClassStatistics | None) -> RecordDict:
    message: dict[str, Any] = {"identity": identity.encode()}
    records: dict[str, Any] = {}
    if weights is not None:
        message["layout"] = weights.encode_layout()
        records["weights"] = ArrayRecord({"values": Array(weights.values)})
    if statistics is not None:
        message["statistics"] = encode_statistics(statistics, identity)
    records["message"] = ConfigRecord(message)
    return RecordDict(records)


def _message(records: RecordDict) -> ConfigRecord:
    message = records.get("message")
    if not isinstance(message, ConfigRecord) or "identity" not in message:
        raise fail("PAY-106", found=f"records {sorted(records)}", expected="a record called message with an identity")
    return message


def _weights(records: RecordDict) -> Weights | None:
    if "weights" not in records:
        return None
    message, arrays = _message(records), records["weights"]
    if "layout" not in message or list(arrays) != ["values"]:
        raise fail("PAY-103", found=f"arrays {list(arrays)}", expected="one flat array with its layout")
    return Weights.decode(str(message["layout"]), _array(arrays["values"]))


def _array(array: Array) -> np.ndarray[Any, Any]:
    try:
        return array.numpy()
    except (TypeError, ValueError, EOFError) as error:
        raise fail("PAY-106", found="an array that cannot be read", expected="a float32 array") from error


def _statistics(message: ConfigRecord, identity: Identity) -> ClassStatistics | None:
    if "statistics" not in message:
        return None
    statistics, stated = decode_statistics(bytes(message["statistics"]))  # type: ignore[arg-type]
    if stated != identity:
        raise fail("PAY-120", found=stated.encode(), expected=identity.encode())
    return statistics


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
