"""Smaller weights on the wire: a reply's weights as the difference from the request's.

After a round most bits of a weight equal those of the weight that the site received. A *coded*
array holds the differences as byte planes, each compressed with zstd:

- `lossless`: differences of the float32 bit patterns, read as ordered integers. The decoded weights
  are bit-identical.
- `bf16`: differences rounded to bfloat16. What rounding drops is kept at the site and added to its
  next difference (error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847).

Layout, little-endian: magic, version, codec, number of values P, digest of the reference, then the
size of each plane in bytes, then the planes, most significant byte first. A plane of P bytes is
not compressed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.common.errors import fail

CODECS: Final = ("none", "lossless", "bf16")
VERSION: Final = 1
PLANES: Final = {"lossless": 4, "bf16": 2}
"""Codec -> bytes of a difference."""

LEVEL: Final = 1
"""Of zstd; higher levels win less than 1 % on these planes and cost several times the time."""

_HEAD: Final = struct.Struct("<4sBBQ16s")
_MAGIC: Final = b"FSGW"
_SIGN: Final = np.uint32(0x8000_0000)

Floats = npt.NDArray[np.float32]


def encode_values(values: Floats, reference: Floats) -> bytes:
    """Encode values (P,) without loss, as the difference from a reference (P,)."""
    difference = _ordered(values) - _ordered(reference)  # modulo 2^32
    folded = (difference << np.uint32(1)) ^ _sign_mask(difference)
    return _pack("lossless", folded, reference)


def encode_rounded(
    values: Floats, reference: Floats, residual: Floats | None
) -> tuple[bytes, Floats, Floats]:
    """Encode values (P,) as bfloat16 differences from a reference (P,).

    A value that is not negative stays so, if its reference is not negative either: BatchNorm's
    variances remain valid.

    Args:
        values: The trained weights.
        reference: The weights that the site received.
        residual: What the site's earlier roundings dropped (P,); None for zeros.

    Returns:
        The coded bytes; the weights (P,) that the receiver decodes; the new residual (P,).

    Raises:
        FedsgcgError: PAY-122 if a difference exceeds the range of bfloat16.
    """
    wanted = values if residual is None else values + residual
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = _to_bf16(wanted - reference)
        received = reference + _from_bf16(rounded)
    below = (received < 0) & (values >= 0) & (reference >= 0)
    if below.any():
        toward_zero = (_bits(-reference) >> np.uint32(16)).astype(np.uint16)
        rounded = np.where(below, toward_zero, rounded)
        received = reference + _from_bf16(rounded)
    if not np.isfinite(received).all():
        expected = "finite differences of less than 3.39e38, the range of bfloat16"
        raise fail("PAY-122", found=f"{(~np.isfinite(received)).sum()} others", expected=expected)
    return _pack("bf16", rounded, reference), received, wanted - received


def decode_values(data: bytes, reference: Floats, codec: str) -> Floats:
    """Decode coded values (P,), with memory for the P values of the reference.

    Args:
        data: The coded bytes.
        reference: The weights (P,) of the request that the sender answers.
        codec: The plan's codec, `lossless` or `bf16`.

    Raises:
        FedsgcgError: PAY-106 for bytes that are not coded values of this length and codec, PAY-123
            for a difference from other weights than the reference.
    """
    planes = _planes(data, reference, codec)
    if codec == "bf16":
        return reference + _from_bf16(_joined(planes, np.uint16))
    folded = _joined(planes, np.uint32)
    difference = (folded >> np.uint32(1)) ^ (np.uint32(0) - (folded & np.uint32(1)))
    return _unordered(_ordered(reference) + difference)


def reference_digest(values: Floats) -> bytes:
    """Return 16 bytes that identify the weights which a difference is taken from."""
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()


def _pack(codec: str, numbers: npt.NDArray[np.unsignedinteger], reference: Floats) -> bytes:
    count, width = numbers.size, PLANES[codec]
    raw = np.ascontiguousarray(numbers).astype(numbers.dtype.newbyteorder("<"), copy=False)
    table = raw.view(np.uint8).reshape(count, width)
    planes = [_compressed(table[:, byte].tobytes()) for byte in reversed(range(width))]
    head = _HEAD.pack(_MAGIC, VERSION, CODECS.index(codec), count, reference_digest(reference))
    sizes = struct.pack(f"<{width}Q", *map(len, planes))
    return b"".join([head, sizes, *planes])


def _compressed(plane: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd", LEVEL).compress(plane, asbytes=True)
    return packed if len(packed) < len(plane) else plane


def _planes(data: bytes, reference: Floats, codec: str) -> Sequence[npt.NDArray[np.uint8]]:
    """Return the planes, most significant first, after every check of the head."""
    width, count = PLANES[codec], reference.size
    sizes_at = _HEAD.size + 8 * width
    if len(data) < sizes_at:
        raise _not_coded(f"{len(data)} bytes")
    magic, version, number, stated, digest = _HEAD.unpack_from(data)
    if (magic, version) != (_MAGIC, VERSION):
        raise _not_coded(f"version {version}" if magic == _MAGIC else "another format")
    if number != CODECS.index(codec) or stated != count:
        raise _not_coded(f"{stated} values in codec {number}")
    sizes = struct.unpack_from(f"<{width}Q", data, _HEAD.size)
    if sizes_at + sum(sizes) != len(data) or max(sizes) > count:
        raise _not_coded(f"planes of {sum(sizes)} bytes")
    if digest != reference_digest(reference):
        raise fail("PAY-123", found="a difference from the weights of another request")
    planes, at = [], sizes_at
    for size in sizes:
        planes.append(_expanded(data[at : at + size], count))
        at += size
    return planes


def _expanded(plane: bytes, count: int) -> npt.NDArray[np.uint8]:
    if len(plane) == count:
        return np.frombuffer(plane, np.uint8)
    try:
        # Writes into a buffer of `count` bytes and fails if the stream holds more.
        found = pa.Codec("zstd").decompress(plane, decompressed_size=count, asbytes=True)
    except (OSError, ValueError) as error:
        raise _not_coded("a damaged plane") from error
    if len(found) != count:
        raise _not_coded("a plane of another length")
    return np.frombuffer(found, np.uint8)


def _joined(
    planes: Sequence[npt.NDArray[np.uint8]], kind: type[np.unsignedinteger]
) -> npt.NDArray[np.unsignedinteger]:
    numbers = np.zeros(len(planes[0]), kind)
    for plane in planes:
        numbers = (numbers << kind(8)) | plane
    return numbers


def _not_coded(found: str) -> Exception:
    expected = "weights coded with the plan's federation.codec"
    return fail("PAY-106", found=found, expected=expected)


def _bits(values: Floats) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def _ordered(values: Floats) -> npt.NDArray[np.uint32]:
    """Return the bit patterns as integers in the order of the values: neighbours differ by 1."""
    bits = _bits(values)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _unordered(numbers: npt.NDArray[np.uint32]) -> Floats:
    bits = np.where(numbers & _SIGN, numbers & ~_SIGN, ~numbers)
    return bits.view(np.float32)


def _sign_mask(numbers: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    return np.uint32(0) - (numbers >> np.uint32(31))


def _to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even; the bit patterns."""
    bits = _bits(values)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def _from_bf16(patterns: npt.NDArray[np.unsignedinteger]) -> Floats:
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)
