"""Codecs: exact or telescoping round trips, refused bytes, bounded memory."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.wire import codecs
from fedsgcg.common.wire.codecs import decode_values, encode_rounded, encode_values

Floats = npt.NDArray[np.float32]

ANY = st.integers(0, 2**32 - 1)
"""Every bit pattern of a float32: NaN, infinities, -0 and subnormal numbers included."""
FINITE = st.floats(-1e6, 1e6, width=32)


def pairs(elements: st.SearchStrategy, kind: type = np.float32) -> st.SearchStrategy:
    shape = st.integers(0, 40)
    return shape.flatmap(
        lambda n: st.tuples(*(hnp.arrays(kind, n, elements=elements) for _ in range(2)))
    )


@given(pairs(ANY, np.uint32))
def test_lossless_returns_every_bit(both: tuple[npt.NDArray[np.uint32], ...]) -> None:
    values, reference = (part.view(np.float32) for part in both)
    back = decode_values(encode_values(values, reference), reference, "lossless")
    assert back.view(np.uint32).tolist() == both[0].tolist()


@given(pairs(FINITE))
def test_rounded_values_are_what_the_receiver_decodes(both: tuple[Floats, Floats]) -> None:
    """Within one rounding to 8 bits of the difference, and the residual is all that is missing."""
    values, reference = both
    coded, received, residual = encode_rounded(values, reference, None)
    assert decode_values(coded, reference, "bf16").tobytes() == received.tobytes()
    assert (residual == values - received).all()
    wanted = np.abs(values.astype(np.float64) - reference)
    # Half a step of 8 bits, and the roundings of three float32 operations.
    bound = wanted * 2.0**-8 + (np.abs(values) + np.abs(reference)) * 2.0**-22 + 1e-38
    kept = values >= 0
    allowed = np.where(kept & (reference >= 0), np.maximum(bound, reference * 2.0**-7), bound)
    assert (np.abs(residual) <= allowed).all()


@given(pairs(st.floats(0, 1e6, width=32)), st.floats(-1e3, 0, width=32))
def test_variances_stay_valid(both: tuple[Floats, Floats], dropped: float) -> None:
    values, reference = both
    residual = np.full_like(values, dropped)
    _, received, _ = encode_rounded(values, reference, residual)
    assert (received >= 0).all()


def test_what_rounding_drops_is_sent_later() -> None:
    """A step of 2^-12 is lost on a weight of 1 without error feedback, and kept with it."""
    reference, truth = np.ones(1, np.float32), 1.0
    residual = None
    for _ in range(64):
        step = np.float32(2**-9 + 2**-18)  # 10 significant bits
        truth += float(step)
        _, received, residual = encode_rounded(reference + step, reference, residual)
        reference = received
    assert abs(float(reference[0]) - truth) <= 2**-17


def test_the_rounding_is_to_nearest_with_ties_to_even() -> None:
    """Neighbours of 1 in bfloat16 are 2^-7 apart."""
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8], np.float32)
    _, received, _ = encode_rounded(values, np.zeros(4, np.float32), None)
    assert received.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


def test_a_change_beyond_bfloat16_is_refused() -> None:
    largest = np.full(1, np.finfo(np.float32).max)
    for values, reference in ((largest, -largest), (largest, np.zeros(1, np.float32))):
        with pytest.raises(FedsgcgError, match="PAY-122"):
            encode_rounded(values, reference, None)


def weights(seed: int, size: int = 3000) -> Floats:
    return np.random.default_rng(seed).normal(0, 0.1, size).astype(np.float32)


REFERENCE = weights(0)
CODED = {
    "lossless": encode_values(REFERENCE + 1e-3 * weights(1), REFERENCE),
    "bf16": encode_rounded(REFERENCE + 1e-3 * weights(1), REFERENCE, None)[0],
}


@pytest.mark.parametrize("codec", CODED)
def test_a_difference_from_other_weights_is_refused(codec: str) -> None:
    with pytest.raises(FedsgcgError, match="PAY-123"):
        decode_values(CODED[codec], weights(2), codec)


@pytest.mark.parametrize(("sent", "plan"), [("lossless", "bf16"), ("bf16", "lossless")])
def test_another_codec_than_the_plans_is_refused(sent: str, plan: str) -> None:
    with pytest.raises(FedsgcgError, match="(?s)PAY-106.*codec"):
        decode_values(CODED[sent], REFERENCE, plan)


@given(st.sampled_from(sorted(CODED)), st.data())
def test_damaged_bytes_are_refused_or_decoded_to_the_same_length(
    codec: str, data: st.DataObject
) -> None:
    damaged = bytearray(CODED[codec])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for candidate in (bytes(damaged), bytes(damaged[:cut])):
        assert decoded(candidate, codec) in ("PAY-106", "PAY-123", len(REFERENCE))


def decoded(data: bytes, codec: str) -> str | int:
    """Return the number of decoded values, or the code of the error."""
    try:
        return len(decode_values(data, REFERENCE, codec))
    except FedsgcgError as error:
        return error.code


@pytest.mark.row(37)
def test_a_plane_that_expands_beyond_the_model_is_refused() -> None:
    """16 MB of zeros are 500 bytes of zstd; the reader has a buffer of P bytes and no more."""
    bomb = pa.Codec("zstd").compress(bytes(2**24), asbytes=True)
    head = codecs._HEAD.pack(b"FSGW", 1, 2, len(REFERENCE), codecs.reference_digest(REFERENCE))
    planes = [bomb, CODED["bf16"][-10:]]
    data = b"".join([head, struct.pack("<2Q", *map(len, planes)), *planes])
    pool = pa.default_memory_pool()
    before = pool.max_memory() or 0
    with pytest.raises(FedsgcgError, match="(?s)PAY-106.*damaged"):
        decode_values(data, REFERENCE, "bf16")
    assert (pool.max_memory() or 0) - before < 2**20
