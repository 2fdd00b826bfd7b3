"""Properties of the wire format: exact round trips, and error codes for any invalid bytes."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import Reply, decode_reply, encode_reply
from fedsgcg.common.wire.payload import (
    CASES_KIND,
    CASES_SCHEMA,
    DISTANCES,
    Identity,
    Weights,
    decode_cases,
    decode_statistics,
    encode_cases,
    encode_statistics,
)
from fedsgcg.server.sites.exchange import read_answer

FEW = settings(max_examples=80, deadline=None)
CODES = {"PAY-103", "PAY-105", "PAY-106", "PAY-107", "PAY-120"}
IDENTITY = Identity("run", "H 4", 12, "0" * 64)
TEXT = st.text(max_size=30)
ANY = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def any_statistics(draw) -> ClassStatistics:  # type: ignore[no-untyped-def]
    classes, features = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    scatter = draw(hnp.arrays(np.float64, (classes, features, features), elements=ANY))
    scatter = np.triu(scatter) + np.triu(scatter, 1).transpose(0, 2, 1)
    count = draw(hnp.arrays(np.float64, classes, elements=ANY))
    return ClassStatistics(
        count, draw(hnp.arrays(np.float64, (classes, features), elements=ANY)), scatter
    )


@FEW
@given(any_statistics(), st.builds(Identity, TEXT, TEXT, st.integers(0, 10**6), TEXT))
def test_statistics_survive_to_the_last_bit(
    statistics: ClassStatistics, identity: Identity
) -> None:
    back, stated = decode_statistics(encode_statistics(statistics, identity))
    assert stated == identity
    for name in ("count", "mean", "scatter"):
        np.testing.assert_array_equal(getattr(back, name), getattr(statistics, name))


@FEW
@given(
    st.lists(
        st.tuples(TEXT, hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=3)),
        max_size=5,
        unique_by=lambda x: x[0],
    ),
    st.dictionaries(TEXT, st.integers(0, 2**40), max_size=3),
    st.integers(0, 2**32),
)
def test_weights_survive_to_the_last_bit(entries, counters, seed) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in entries}
    state |= {f"{name}#": np.asarray(value, np.int64) for name, value in counters.items()}
    weights = Weights.from_state(state)
    back = Weights.decode(weights.encode_layout(), weights.values)
    assert back.digest() == weights.digest()
    assert list(back.to_state()) == list(state)
    for name, array in back.to_state().items():
        np.testing.assert_array_equal(array, state[name])


def reply() -> Reply:
    rng = np.random.default_rng(0)
    weights = Weights(
        (("w", (3, 2)), ("b", (1,))), rng.normal(size=7).astype(np.float32), (("n", 3),)
    )
    features = rng.normal(size=(20, 3))
    row = dict.fromkeys(DISTANCES, float("nan")) | dict.fromkeys(f"{name}_mm" for name in DISTANCES)
    row |= {"case": "a1", "structure": "gland", "dice": 0.5, "unit": "pixel"}
    row |= {"empty_prediction": True, "empty_truth": False}
    return Reply(
        IDENTITY,
        "A",
        weights,
        ClassStatistics.from_features(features, np.repeat([0, 1], 10), 2),
        {"examples": 3.0, "loss": 0.1},
        encode_cases([row]),
        {"withheld": ["gland"]},
    )


def test_a_whole_reply_survives() -> None:
    sent = reply()
    back = decode_reply(encode_reply(sent))
    assert back.weights is not None
    assert sent.weights is not None
    assert back.weights.digest() == sent.weights.digest()
    assert (back.identity, back.site, back.metrics, back.details) == (
        sent.identity,
        sent.site,
        sent.metrics,
        sent.details,
    )
    (row,) = decode_cases(back.cases)
    assert row["case"] == "a1"
    assert np.isnan(row["hd95"])
    assert row["hd95_mm"] is None


DECODERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "statistics": (decode_statistics, encode_statistics(reply().statistics, IDENTITY)),  # type: ignore[arg-type]
    "cases": (decode_cases, reply().cases),
}


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.row(10)
def test_mutated_bytes_raise_a_code_or_decode_to_something(kind: str, data: st.DataObject) -> None:
    decode, honest = DECODERS[kind]
    changed = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(changed) - 1))
        changed[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    code = "PAY-106"
    try:
        decode(bytes(changed[:cut]))
    except FedsgcgError as error:
        code = error.code
    assert code in CODES


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=150, deadline=None)
@given(noise=st.binary(max_size=200))
def test_random_bytes_raise_a_code(kind: str, noise: bytes) -> None:
    decode, honest = DECODERS[kind]
    for data in (noise, honest[:40] + noise):
        with pytest.raises(FedsgcgError) as caught:
            decode(data)
        assert caught.value.code in CODES


class Envelope:
    """A Flower message as far as reading an answer needs one."""

    def __init__(self, content: RecordDict) -> None:
        self.content = content

    def has_error(self) -> bool:
        return False


SCALARS = st.one_of(
    TEXT, st.binary(max_size=40), st.integers(-(2**40), 2**40), st.floats(), st.booleans()
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["identity", "layout", "statistics", "site", "error", "cases", "details", "options"]
        ),
        SCALARS,
    ),
    st.booleans(),
)
@pytest.mark.row(10)
def test_no_message_whatever_gets_past_reading_as_an_exception(entries, with_rest: bool) -> None:  # type: ignore[no-untyped-def]
    records = encode_reply(reply()) if with_rest else RecordDict({"message": ConfigRecord({})})
    for name, value in entries.items():
        records["message"][name] = value
    answer = read_answer(Envelope(records), "A")  # type: ignore[arg-type]
    assert (answer.reply is None) != (answer.problem is None)


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="float32", shape=(7,), stype="numpy.ndarray", data=b"not an array"),
        Array(
            dtype="object",
            shape=(1,),
            stype="numpy.ndarray",
            data=b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O', }",
        ),
        Array(np.zeros(7)),  # float64
        Array(np.zeros((7, 1), np.float32)),
        Array(np.zeros(6, np.float32)),
    ],
)
@pytest.mark.row(6, 8, 11)
def test_an_array_that_is_not_the_layouts_is_refused(array: Array) -> None:
    records = encode_reply(reply())
    records["weights"] = ArrayRecord({"values": array})
    answer = read_answer(Envelope(records), "A")  # type: ignore[arg-type]
    assert answer.problem is not None
    assert answer.problem.code in CODES


@pytest.mark.row(9)
def test_a_header_with_a_false_size_is_refused_before_memory_is_allocated() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000,), }"
    header += b" " * (117 - len(header)) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\x00" * 28
    records = encode_reply(reply())
    records["weights"] = ArrayRecord(
        {"values": Array(dtype="float32", shape=(7,), stype="numpy.ndarray", data=data)}
    )
    answer = read_answer(Envelope(records), "A")  # type: ignore[arg-type]
    assert answer.problem is not None
    assert answer.problem.code in CODES


@pytest.mark.row(12)
def test_another_schema_version_is_named() -> None:
    data = encode_statistics(ClassStatistics.empty(2, 3), IDENTITY)
    assert data.count(b"schema_version") == 1
    at = data.index(b"schema_version")
    value = (
        data.rindex(b"1", 0, at)
        if b"1" in data[at - 16 : at]
        else data.index(b"1", at + len(b"schema_version"))
    )
    changed = data[:value] + b"2" + data[value + 1 :]
    with pytest.raises(FedsgcgError) as caught:
        decode_statistics(changed)
    assert caught.value.code in {"PAY-107", "PAY-106"}


@pytest.mark.row(12)
def test_cases_of_another_version_are_refused_with_what_to_do() -> None:
    """A hospital with an older release sends no `hd95_max`."""
    kept = [field for field in CASES_SCHEMA if not field.name.startswith("hd95_max")]
    schema = pa.schema(kept, metadata={"schema_version": "1", "kind": CASES_KIND})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(schema.empty_table())
    with pytest.raises(FedsgcgError) as caught:
        decode_cases(bytes(sink.getvalue()))
    assert caught.value.code == "PAY-107"
    assert "version 1" in str(caught.value)
    assert "same fedsgcg release" in str(caught.value)


def test_every_figure_of_a_case_states_its_meaning_and_unit() -> None:
    for field in CASES_SCHEMA:
        words = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        assert words["description"], field.name
        if pa.types.is_floating(field.type):
            unit = (
                "mm"
                if field.name.endswith("_mm")
                else "1"
                if field.name.startswith("dice")
                else "pixel"
            )
            assert words["unit"] == unit, field.name
