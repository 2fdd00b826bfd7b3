"""Small messages that announce much: refused before memory is allocated, at either end."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.message_sizes import (
    amplitude_bytes,
    reply_sizes,
    request_sizes,
)
from fedsgcg.common.wire.arrow import open_bounded
from fedsgcg.common.wire.messages import (
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from fedsgcg.common.wire.payload import Weights, encode_cases
from fedsgcg.common.wire.sizes import MOST_EXTRA_BYTES, Sizes
from tests.support import bombs
from tests.support.plans import small_plan

MEASURED = """
import json, resource, sys
from tests.support import bombs
from fedsgcg.common.errors import FedsgcgError

def read(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

payloads = {}
for kind, decode in bombs.DECODERS.items():
    decode(bombs.honest()[kind])  # import and allocate what any payload needs
    for codec in ("zstd", "lz4"):
        payloads[kind, codec] = bombs.compressed(kind, codec)
limit = read("VmSize") + 3 * bombs.LARGE
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # the machine survives a failure
for (kind, codec), data in payloads.items():
    open("/proc/self/clear_refs", "w").write("5")
    before, code = read("VmRSS"), ""
    try:
        bombs.DECODERS[kind](data)
    except (FedsgcgError, MemoryError) as error:
        code = getattr(error, "code", "MemoryError")
    print(json.dumps([kind, codec, len(data), code, read("VmHWM") - before]))
"""


@pytest.mark.attack("compression")
def test_row_10_a_compressed_stream_allocates_almost_nothing() -> None:
    """Row 10: 256 MB of zeros in less than 1.5 MB are refused with less than 4 MB of memory."""
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(bombs.DECODERS)
    for kind, codec, size, code, growth in found:
        assert size < bombs.LARGE // 180, (kind, codec)
        assert code == "PAY-105", (kind, codec)
        assert growth < 4 * 2**20, (kind, codec)


@pytest.mark.parametrize("kind", bombs.DECODERS)
@pytest.mark.attack("compression")
def test_row_10_a_compressed_stream_is_refused_however_small(kind: str) -> None:
    """Row 10: compression itself is refused, not a ratio."""
    with pytest.raises(FedsgcgError, match="compressed"):
        bombs.DECODERS[kind](bombs.of_zeros(kind, "zstd", 1))


@pytest.mark.parametrize("kind", bombs.DECODERS)
def test_row_10_old_marks_of_compression_and_several_batches_are_refused(kind: str) -> None:
    """Row 10: other ways to make a stream grow."""
    with pytest.raises(FedsgcgError, match="PAY-105"):
        bombs.DECODERS[kind](bombs.with_custom_metadata(kind))
    reader = pa.ipc.open_stream(bombs.honest()[kind])
    (batch,) = reader.read_all().to_batches()
    with pytest.raises(FedsgcgError, match="second message"):
        bombs.DECODERS[kind](bombs.stream(reader.schema, batch, batch))


def test_row_10_a_dictionary_is_refused() -> None:
    """Row 10: a column of references to one long text."""
    column = pa.array(["x" * 1000] * 50).dictionary_encode()
    batch = pa.record_batch([column], names=["case"])
    with pytest.raises(FedsgcgError, match="PAY-105"):
        open_bounded(bombs.stream(batch.schema, batch), 10**6, "test").table()


@pytest.mark.parametrize("place", [b"\x01", b"\x04"])
def test_row_9_a_batch_that_states_more_rows_than_its_bytes_is_refused(place: bytes) -> None:
    """Row 9: the number of rows in the metadata is checked against the body."""
    batch = pa.record_batch([pa.array(np.arange(5, dtype=np.int64))], names=["x"])
    data = bombs.stream(batch.schema, batch)
    stated = (5).to_bytes(8, "little")
    assert data.count(stated) >= 2  # of the batch and of its column
    lying = data.replace(stated, place + b"\0\0\0\0\0\0\x0f")
    with pytest.raises(FedsgcgError, match="PAY-105"):
        open_bounded(lying, 10**6, "test").table()


@pytest.mark.attack("large-parts")
def test_row_10_repeated_rows_are_refused() -> None:
    """Row 10: 20,000 rows for one case, which would each become a row of the results."""
    with pytest.raises(FedsgcgError, match="more than once"):
        bombs.DECODERS["cases"](bombs.repeated(20_000))


def weights() -> Weights:
    return Weights((("w", (3, 2)), ("b", (1,))), np.arange(7, dtype=np.float32), (("n", 3),))


def reply_with(name: str, value: str | bytes) -> RecordDict:
    records = encode_reply(Reply(bombs.IDENTITY, "A", weights()))
    records["message"][name] = value
    return records


LARGE_PARTS = {
    "details": json.dumps({"data": "0" * 5 * 10**7}),
    "layout": " " * 10**8,
    "site": "<h1>" * 10**6,
    "error": "E" * 1000,
    "identity": "0" * 10**5,
    "cases": b"0" * 10**8,
    "statistics": b"0" * 10**7,
    "moments": b"0" * 10**7,
    "amplitudes": b"0",
}


@pytest.mark.parametrize("part", LARGE_PARTS)
@pytest.mark.attack("large-parts")
def test_row_9_a_part_beyond_the_plan_is_refused_by_its_size(
    part: str, tmp_path: pytest.TempPathFactory
) -> None:
    """Row 9: limits come from the reader's plan; this plan shares no amplitudes at all."""
    sizes = reply_sizes(small_plan(tmp_path), weights=7)
    with pytest.raises(FedsgcgError, match="PAY-105"):
        decode_reply(reply_with(part, LARGE_PARTS[part]), sizes)


def test_row_9_a_hospital_refuses_a_request_beyond_its_plan(
    tmp_path: pytest.TempPathFactory,
) -> None:
    """Row 9: the coordinator's messages are bounded in the same way."""
    sizes = request_sizes(small_plan(tmp_path))
    request = encode_request(Request(bombs.IDENTITY, weights()))
    assert decode_request(request, sizes).identity == bombs.IDENTITY
    for part in ("options", "statistics", "amplitudes", "layout"):
        records = encode_request(Request(bombs.IDENTITY, weights()))
        records["message"][part] = " " * 10**8 if part in ("options", "layout") else b"0" * 10**8
        with pytest.raises(FedsgcgError, match="PAY-105"):
            decode_request(records, sizes)


def test_row_12_unknown_parts_are_refused() -> None:
    """Row 12: a field or record that no version of the format has."""
    with pytest.raises(FedsgcgError, match="PAY-106"):
        decode_reply(reply_with("extra", b"0"))
    records = encode_reply(Reply(bombs.IDENTITY, "A"))
    records["more"] = ConfigRecord({"x": 1})
    with pytest.raises(FedsgcgError, match="PAY-106"):
        decode_reply(records)


def test_row_9_more_weights_than_the_network_are_refused() -> None:
    """Row 9: the size of the model that was sent bounds the one that comes back."""
    records = encode_reply(Reply(bombs.IDENTITY, "A", weights()))
    records["weights"] = ArrayRecord({"values": Array(np.zeros(10**6, np.float32))})
    with pytest.raises(FedsgcgError, match="PAY-105"):
        decode_reply(records, Sizes(weights=7))


@pytest.mark.parametrize("shape", ["(100000000000000,)", "(8,)", "(6,)", "(-7,)", "(2**62, 4)"])
def test_row_9_an_array_header_must_state_the_bytes_that_follow(shape: str) -> None:
    """Row 9: NumPy would allocate 373 GiB before it looks for the data."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (117 - len(header)) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\x00" * 28
    array = Array(dtype="float32", shape=(7,), stype="numpy.ndarray", data=data)
    records = encode_reply(Reply(bombs.IDENTITY, "A", weights()))
    records["weights"] = ArrayRecord({"values": array})
    with pytest.raises(FedsgcgError, match="PAY-106"):
        decode_reply(records)


@pytest.mark.parametrize("shape", [[2**32, 2**32], [-7, -1], [10**30, 0]])
def test_row_9_a_layout_is_multiplied_without_overflow(shape: list[int]) -> None:
    """Row 9: 2^32 times 2^32 is 0 in 64 bits, the size of an empty array."""
    layout = json.dumps({"layout": [["w", shape]], "counters": {}})
    empty = np.zeros(7 if shape[0] < 0 else 0, np.float32)
    if shape[1] == 0:
        assert Weights.decode(layout, empty).values.size == 0
        return
    with pytest.raises(FedsgcgError, match="PAY-103"):
        Weights.decode(layout, empty)


@pytest.mark.parametrize("part", ["details", "layout", "identity"])
def test_row_10_deep_nesting_is_refused(part: str) -> None:
    """Row 10: brackets in brackets exhaust the stack of the JSON reader."""
    deep = "[" * 4000 if part == "identity" else "[" * 10**5
    with pytest.raises(FedsgcgError, match="PAY-106"):
        decode_reply(reply_with(part, deep))


def test_the_limits_fit_the_largest_honest_payloads(tmp_path: pytest.TempPathFactory) -> None:
    plan = small_plan(tmp_path)
    structures = list(plan.data.structures)
    rows = [bombs.case_row(f"{k:08x}", name) for k in range(2000) for name in structures]
    sizes = reply_sizes(plan)
    sent = replace_cases(encode_cases(rows))
    assert decode_reply(sent, sizes).cases == encode_cases(rows)
    assert len(bombs.DECODERS["cases"](encode_cases(rows), len(structures))) == len(rows)  # type: ignore[call-arg]
    assert amplitude_bytes(plan, 3) == 0
    assert sizes.bytes_of("details") < MOST_EXTRA_BYTES


def replace_cases(cases: bytes) -> RecordDict:
    return encode_reply(Reply(bombs.IDENTITY, "A", weights(), cases=cases))
