"""Requests and replies, and their encoding as Flower records.

A request or reply is a `RecordDict` with at most five records: `weights`, `control_variates` and
`masked` (one flat array each, because every array costs time; docs/explanation/flower.md,
"Behaviour that shaped the code"), `message` (identity, layout, Arrow bytes, plain settings) and
`metrics`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SType

from fedsgcg.common.errors import fail
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.arrow import check_size
from fedsgcg.common.wire.block_means import BlockMeans
from fedsgcg.common.wire.codecs import decode_values
from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.common.wire.payload import (
    HEAD_BYTES,
    Identity,
    Weights,
    decode_statistics,
    encode_statistics,
)
from fedsgcg.common.wire.receipts import HEAD, LONGEST_RECEIPT, RECEIPT
from fedsgcg.common.wire.sizes import MAX_METRICS, Sizes

ENROL = "query.enrol"
STATISTICS = "query.statistics"
AMPLITUDES = "query.amplitudes"
SUM_KEYS = "query.sum_keys"
SUM_SHARES = "query.sum_shares"
SUM_CHECK = "query.sum_check"
SUM_OPEN = "query.sum_open"
TRAIN = "train"
EVALUATE = "evaluate"

HEADERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Versions of NumPy's file format -> reader of the header."""
CONTROL: Final = "control_variates"
"""Record of SCAFFOLD's control variates; also the entry of a site's `sharing` that allows them."""
MASKED: Final = "masked"
"""Record of a site's masked numbers in a secure sum: one flat uint64 array."""
ARRAYS: Final = ("weights", CONTROL, MASKED)
"""Records with one flat array."""
SHARES: Final = "shares"
"""Option of a FedCE request: digest of each merged model -> its weight."""
SUMMARY = "summary"
"""Entry of a reply's details: mean, sd and count of an evaluation without per-case results."""

DATA: Final = "data"
"""Entry of every reply's details: digest of the site's files and splits (row 47)."""


@dataclass(frozen=True)
class Request:
    """A message of the coordinator to a site.

    Attributes:
        identity: Run, fold, round and plan it belongs to.
        weights: The global model; absent in an enrolment.
        prototypes: Global class statistics; absent while none are known or the method needs none.
        options: Plain settings of this message, e.g. `{"split": "test"}`.
        amplitudes: Arrow bytes of the amplitudes that sites share (`common.wire.amplitudes`); empty
            if none are shared.
        control_variates: SCAFFOLD's global control variate (L,), one value per learnable weight.
        shift: What the method needs of the differences between sites (`Plan.shift`): K classes with
            the covariances between the sites; the S K classes of all sites one after the other; or
            the merged statistics of all other sites.
    """

    identity: Identity
    weights: Weights | None = None
    prototypes: ClassStatistics | None = None
    options: dict[str, Any] = field(default_factory=dict)
    amplitudes: bytes = b""
    control_variates: npt.NDArray[np.float32] | None = None
    shift: ClassStatistics | None = None


@dataclass(frozen=True)
class Reply:
    """The answer of a site.

    Attributes:
        identity: Copied from the request.
        site: Name of the site.
        weights: The locally trained model.
        statistics: Class statistics of the site's pixels, or statistics of its slices' projections.
        metrics: Metrics of the round (losses, counts, seconds).
        cases: Arrow bytes of per-case results (`common.wire.payload.encode_cases`).
        details: Plain values, e.g. of an enrolment.
        error: Error code if the site failed; everything else is then absent.
        amplitudes: Arrow bytes of the site's amplitudes (`common.wire.amplitudes`), if its own file
            allows them.
        moments: Moments of the inputs of the model's BatchNorm layers, if requested.
        control_variates: SCAFFOLD's control variate of the site (L,), its mean gradient.
        coded: `weights` as the difference from the request's (`common.wire.codecs`), sent in their
            place; empty without a codec, and after decoding.
        masked: The site's masked numbers (N,) in a secure sum, instead of weights, statistics and
            moments (`common.secure_sums`).
        block_means: What a site sends instead of class statistics with `prototypes.shared=means`; a
            decoded reply has the statistics that are estimated from them as well.
    """

    identity: Identity
    site: str
    weights: Weights | None = None
    statistics: ClassStatistics | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    cases: bytes = b""
    details: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    amplitudes: bytes = b""
    moments: NormMoments | None = None
    control_variates: npt.NDArray[np.float32] | None = None
    coded: bytes = b""
    masked: npt.NDArray[np.uint64] | None = None
    block_means: BlockMeans | None = None


def encode_request(request: Request) -> RecordDict:
    """Encode a request as Flower records."""
    fields: dict[str, str | bytes] = {
        "options": json.dumps(request.options),
        "amplitudes": request.amplitudes,
    }
    if request.shift is not None:
        fields["shift"] = encode_statistics(request.shift, request.identity)
    records = _records(request.identity, request.weights, request.prototypes, fields)
    return _with_control(records, request.control_variates)


def decode_request(records: RecordDict, sizes: Sizes = Sizes()) -> Request:  # noqa: B008 - frozen
    """Decode a request.

    Args:
        records: Flower's records.
        sizes: Sizes that the reader's plan allows; checked before a part is decoded.

    Raises:
        FedsgcgError: PAY-105 for a part that is too large, PAY-103, PAY-106 or PAY-107 for anything
            else that is not a request.
    """
    _check_sizes(records, sizes)
    identity = Identity.decode(_text(records, "identity"))
    options = _facts(records, "options")
    weights, statistics = _weights(records), _statistics(records, identity, sizes)
    amplitudes, control = _bytes(records, "amplitudes"), _control(records)
    shift = _shift(records, identity, sizes)
    return Request(identity, weights, statistics, options, amplitudes, control, shift)


def encode_reply(reply: Reply) -> RecordDict:
    """Encode a reply as Flower records."""
    fields: dict[str, str | bytes] = {
        "site": reply.site,
        "error": reply.error,
        "cases": reply.cases,
        "amplitudes": reply.amplitudes,
        "details": json.dumps(reply.details),
    }
    if reply.moments is not None:
        fields["moments"] = reply.moments.encode(reply.identity)
    if reply.block_means is not None:
        fields["means"] = reply.block_means.encode(reply.identity)
    records = _records(reply.identity, reply.weights, reply.statistics, fields)
    if reply.coded:
        values = np.frombuffer(reply.coded, np.uint8)
        records["weights"] = ArrayRecord({"values": Array(values)})
    if reply.metrics:
        records["metrics"] = MetricRecord(
            {name: float(value) for name, value in reply.metrics.items()}
        )
    if reply.masked is not None:
        records[MASKED] = ArrayRecord({"values": Array(reply.masked)})
    return _with_control(records, reply.control_variates)


def decode_reply(
    records: RecordDict,
    sizes: Sizes = Sizes(),  # noqa: B008 - frozen
    reference: Weights | None = None,
) -> Reply:
    """Decode a reply.

    Args:
        records: Flower's records.
        sizes: Sizes that the reader's plan allows; checked before a part is decoded.
        reference: The weights of the request; needed for weights with a codec.

    Raises:
        FedsgcgError: As `decode_request`; PAY-123 for weights that are coded against others.
    """
    _check_sizes(records, sizes)
    identity = Identity.decode(_text(records, "identity"))
    metrics: Mapping[str, Any] = records.metric_records.get("metrics") or {}
    statistics = _statistics(records, identity, sizes)
    if (means := _block_means(records, identity, sizes)) is not None:
        statistics = means.estimate()
    return Reply(
        identity=identity,
        site=_text(records, "site"),
        weights=_coded_weights(records, sizes.codec, reference),
        statistics=statistics,
        metrics={str(name): _number(value) for name, value in metrics.items()},
        cases=_bytes(records, "cases"),
        amplitudes=_bytes(records, "amplitudes"),
        details=_facts(records, "details"),
        error=_text(records, "error"),
        moments=_moments(records, identity),
        control_variates=_control(records),
        masked=_masked(records),
        block_means=means,
    )


def payload_bytes(records: RecordDict) -> dict[str, int]:
    """Return the bytes of each part of a message, as listed in the ledger."""
    message = _message(records)
    parts = {
        name: len(value) for name, value in message.items() if isinstance(value, bytes) and value
    }
    parts["text"] = sum(len(value.encode()) for value in message.values() if isinstance(value, str))
    for name in ARRAYS:
        if arrays := records.array_records.get(name):
            parts[name] = sum(len(array.data) for array in arrays.values())
    if metrics := records.metric_records.get("metrics"):
        parts["metrics"] = 8 * len(metrics)
    return parts


def _records(
    identity: Identity,
    weights: Weights | None,
    statistics: ClassStatistics | None,
    fields: dict[str, str | bytes],
) -> RecordDict:
    message = ConfigRecord({"identity": identity.encode(), **fields})
    records = RecordDict()
    if weights is not None:
        message["layout"] = weights.encode_layout()
        records["weights"] = ArrayRecord({"values": Array(weights.values)})
    if statistics is not None:
        message["statistics"] = encode_statistics(statistics, identity)
    records["message"] = message
    return records


def _check_sizes(records: RecordDict, sizes: Sizes) -> None:
    """Raise PAY-105 for a part that is larger than the plan allows, PAY-106 for an unknown one."""
    message = _message(records)
    unknown = set(records) - {"message", *ARRAYS, "metrics", HEAD, RECEIPT}
    unknown |= {name for name in message if sizes.bytes_of(name) < 0}
    if unknown:
        raise fail("PAY-106", found=f"{len(unknown)} unknown parts", expected="a known message")
    for name, value in message.items():
        if isinstance(value, str | bytes):
            check_size(value, sizes.bytes_of(name), name)
    for name in (HEAD, RECEIPT):
        for value in (records.config_records.get(name) or {}).values():
            check_size(value if isinstance(value, str | bytes) else "", LONGEST_RECEIPT, name)
    for name in ARRAYS:
        for array in (records.array_records.get(name) or {}).values():
            most = 8 * sizes.masked if name == MASKED else 4 * sizes.weights
            check_size(array.data, HEAD_BYTES + most, name)
    number = len(records.metric_records.get("metrics") or ())
    if number > MAX_METRICS:
        found = f"{number} metrics"
        raise fail("PAY-105", found=found, expected=f"at most {MAX_METRICS}")


def _message(records: RecordDict) -> ConfigRecord:
    message = records.config_records.get("message")
    if message is None:
        raise fail(
            "PAY-106", found=f"records {sorted(records)}", expected="a record called message"
        )
    return message


def _text(records: RecordDict, name: str) -> str:
    value = _message(records).get(name)
    if not isinstance(value, str):
        raise fail(
            "PAY-106", found=f"{name} of type {type(value).__name__}", expected=f"{name} as text"
        )
    return value


def _facts(records: RecordDict, name: str) -> dict[str, Any]:
    try:
        facts = json.loads(_text(records, name))
    except (ValueError, RecursionError) as error:
        raise fail(
            "PAY-106", found=f"{name} that is not JSON", expected=f"{name} as a JSON object"
        ) from error
    if not isinstance(facts, dict):
        raise fail(
            "PAY-106",
            found=f"{name} of type {type(facts).__name__}",
            expected=f"{name} as a JSON object",
        )
    return facts


def _bytes(records: RecordDict, name: str) -> bytes:
    value = _message(records).get(name)
    if not isinstance(value, bytes):
        raise fail(
            "PAY-106", found=f"{name} of type {type(value).__name__}", expected=f"{name} as bytes"
        )
    return value


def _weights(records: RecordDict) -> Weights | None:
    values = _flat(records, "weights")
    return None if values is None else Weights.decode(_text(records, "layout"), values)


def _coded_weights(records: RecordDict, codec: str, reference: Weights | None) -> Weights | None:
    values = _flat(records, "weights")
    if codec == "none" or values is None:
        return _weights(records)
    if values.dtype != np.uint8 or reference is None:
        raise fail("PAY-106", found=f"{values.dtype} weights", expected=f"weights in codec {codec}")
    decoded = decode_values(values.tobytes(), reference.values, codec)
    return Weights.decode(_text(records, "layout"), decoded)


def _with_control(records: RecordDict, values: npt.NDArray[np.float32] | None) -> RecordDict:
    if values is not None:
        records[CONTROL] = ArrayRecord({"values": Array(values)})
    return records


def _control(records: RecordDict) -> npt.NDArray[np.float32] | None:
    values = _flat(records, CONTROL)
    if values is not None and (values.ndim != 1 or values.dtype != np.float32):
        found = f"{values.dtype} control variates of shape {values.shape}"
        raise fail("PAY-103", found=found, expected="one flat float32 array")
    return values


def _masked(records: RecordDict) -> npt.NDArray[np.uint64] | None:
    values = _flat(records, MASKED)
    if values is not None and (values.ndim != 1 or values.dtype != np.uint64):
        found = f"{values.dtype} masked numbers of shape {values.shape}"
        raise fail("PAY-103", found=found, expected="one flat uint64 array")
    return values


def _flat(records: RecordDict, name: str) -> np.ndarray[Any, Any] | None:
    """Return the array of a record of `ARRAYS`; None if the message has no such record."""
    arrays = records.array_records.get(name)
    if arrays is None:
        return None
    if list(arrays) != ["values"]:
        raise fail(
            "PAY-103", found=f"arrays {list(arrays)}", expected="one flat array called values"
        )
    try:
        return _array(arrays["values"])
    except Exception as error:
        # NumPy parses an old header as Python: a damaged one may even raise a tokenizer's error.
        raise fail(
            "PAY-106", found="an array that cannot be read", expected="a float32 array"
        ) from error


def _array(array: Array) -> np.ndarray[Any, Any]:
    """Read a NumPy file; its header must state exactly the bytes that follow.

    `numpy.load` allocates what the header states, before it looks for the data.
    """
    data = array.data
    if array.stype != SType.NUMPY:
        raise TypeError(f"an array of type {array.stype!r}")
    stream = io.BytesIO(data)
    read_header = HEADERS[np.lib.format.read_magic(stream)]
    shape, fortran, dtype = read_header(stream)
    stated, held = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if dtype.hasobject or fortran or stated != held or min(shape, default=0) < 0:
        raise ValueError(f"a header of {stated} bytes before {held}")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape).copy()


def _statistics(records: RecordDict, identity: Identity, sizes: Sizes) -> ClassStatistics | None:
    if "statistics" not in _message(records):
        return None
    statistics, stated = decode_statistics(_bytes(records, "statistics"), sizes.statistics)
    if stated != identity:
        raise fail("PAY-120", found=stated.encode(), expected=identity.encode())
    return statistics


def _shift(records: RecordDict, identity: Identity, sizes: Sizes) -> ClassStatistics | None:
    if "shift" not in _message(records):
        return None
    shift, stated = decode_statistics(_bytes(records, "shift"))
    if stated != identity:
        raise fail("PAY-120", found=stated.encode(), expected=identity.encode())
    K, A = sizes.statistics or (1, shift.num_features)
    if shift.num_features != A or shift.num_classes % K:
        found = f"statistics of shape {shift.mean.shape}"
        raise fail("STA-201", found=found, expected=f"({K}, {A}) of one or more sites")
    return shift


def _moments(records: RecordDict, identity: Identity) -> NormMoments | None:
    if "moments" not in _message(records):
        return None
    moments, stated = NormMoments.decode(_bytes(records, "moments"))
    if stated != identity:
        raise fail("PAY-120", found=stated.encode(), expected=identity.encode())
    return moments


def _block_means(records: RecordDict, identity: Identity, sizes: Sizes) -> BlockMeans | None:
    if "means" not in _message(records):
        return None
    means, stated = BlockMeans.decode(_bytes(records, "means"), sizes.bytes_of("means"))
    if stated != identity:
        raise fail("PAY-120", found=stated.encode(), expected=identity.encode())
    if not (np.isfinite(means.count).all() and np.isfinite(means.mean).all()):
        raise fail("STA-201", found="block means that are not finite", expected="finite numbers")
    if (means.count < 0).any() or (means.count % 1 != 0).any():
        raise fail("STA-201", found="a block's pixels below zero or not whole")
    return means


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
