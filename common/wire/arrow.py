"""Arrow streams from another machine: sizes are checked before anything is decoded.

An Arrow stream may be compressed, and 80 kB of it may announce 2 GB. A compressed buffer is
decompressed when its record batch is read, before any check on the table. So the metadata of the
messages are read first: the stream must hold its schema and at most one batch, without compression
or dictionaries, whose buffers are inside the received bytes and do not overlap. What is decoded
afterwards is never larger than what was received.

The metadata are a flatbuffer, read here by the layout in Arrow's `Message.fbs` and `Schema.fbs`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from fedsgcg.common.errors import fail

VERSION: Final = 4
"""`MetadataVersion.V5`. Older versions may mark compression elsewhere."""

RECORD_BATCH: Final = 3
"""`MessageHeader.RecordBatch`."""

LENGTH, NODES, BUFFERS, COMPRESSION = 0, 1, 2, 3  # fields of `RecordBatch`
MESSAGE_VERSION, HEADER_TYPE, HEADER, BODY_LENGTH, CUSTOM_METADATA = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Stream:
    """An Arrow stream whose sizes were checked and whose content is not decoded yet.

    Attributes:
        schema: Columns, with the metadata.
        rows: Number of rows that the batch states.
    """

    schema: pa.Schema
    rows: int
    _batch: pa.Message | None

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the schema as text; raises UnicodeDecodeError for other bytes."""
        stated = self.schema.metadata or {}
        return {key.decode(): value.decode() for key, value in stated.items()}

    def table(self) -> pa.Table:
        """Decode the rows; the caller has checked `schema` and `rows`.

        Raises:
            pyarrow.ArrowException, OSError: Offsets or lengths that are not valid.
        """
        if self._batch is None:
            return self.schema.empty_table()
        batch = pa.ipc.read_record_batch(self._batch, self.schema)
        table = pa.Table.from_batches([batch])
        table.validate(full=True)  # reading alone does not check offsets and lengths
        return table


def open_bounded(data: bytes, most_bytes: int, what: str) -> Stream:
    """Check the sizes of an Arrow stream without decoding its rows.

    Args:
        data: The received bytes.
        most_bytes: Bytes that the stream may have.
        what: Name of the payload, for the error.

    Raises:
        FedsgcgError: PAY-105 for a stream that is longer than `most_bytes`, compressed, or larger
            inside than outside.
        pyarrow.ArrowException, OSError, struct.error: Bytes that are not an Arrow stream.
    """
    check_size(data, most_bytes, what)
    reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(data))
    messages = _messages(reader)
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise pa.ArrowInvalid("no schema")
    schema = pa.ipc.read_schema(first)
    batch, rows = None, 0
    for message in messages:
        if batch is not None or message.type != "record batch":
            raise _unbounded(what, f"a second message of type {message.type!r}")
        batch, rows = message, _rows_of(message, what)
    return Stream(schema, rows, batch)


def check_size(data: bytes | str, most_bytes: int, what: str) -> None:
    """Raise PAY-105 for a part of a message that is larger than its limit."""
    if len(data) > most_bytes:
        found, expected = f"{what} of {len(data)} bytes", f"at most {most_bytes} bytes"
        raise fail("PAY-105", found=found, expected=expected)


def _messages(reader: pa.ipc.MessageReader) -> Iterator[pa.Message]:
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _rows_of(message: pa.Message, what: str) -> int:
    """Return the rows of a batch; raises PAY-105 unless it is decoded without growing."""
    root = _Table.root(message.metadata.to_pybytes())
    body = root.signed64(BODY_LENGTH)
    version, kind = root.number(MESSAGE_VERSION, "<h"), root.number(HEADER_TYPE, "<B")
    if version != VERSION or kind != RECORD_BATCH or root.has(CUSTOM_METADATA):
        raise _unbounded(what, "a batch in an old or extended format")
    batch = root.child(HEADER)
    if batch.has(COMPRESSION):
        raise _unbounded(what, "a compressed batch")
    rows, end = batch.signed64(LENGTH), 0
    for offset, length in batch.pairs(BUFFERS):
        if offset < end or length < 0:
            raise _unbounded(what, "buffers that overlap")
        end = offset + length
    # A column whose type needs no buffer, or a list of width zero, could state any length.
    longest = max((length for length, _ in batch.pairs(NODES)), default=0)
    if not 0 <= rows <= 8 * body or end > body or longest > 8 * body:
        raise _unbounded(what, f"{rows} rows in {body} bytes")
    return rows


def _unbounded(what: str, found: str) -> Exception:
    return fail("PAY-105", found=f"{what}: {found}", expected="one uncompressed batch")


@dataclass(frozen=True)
class _Table:
    """A table of a flatbuffer; a read outside the buffer raises `struct.error`."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, _unpack("<I", data, 0)[0])

    def _field(self, number: int) -> int:
        """Position of a field, 0 if the table does not have it."""
        slots = self.at - int(_unpack("<i", self.data, self.at)[0])
        slot = 4 + 2 * number
        if slot >= _unpack("<H", self.data, slots)[0]:
            return 0
        offset = int(_unpack("<H", self.data, slots + slot)[0])
        return self.at + offset if offset else 0

    def has(self, number: int) -> bool:
        return self._field(number) != 0

    def number(self, number: int, kind: str) -> int:
        """A scalar in the format of `struct`, 0 if absent."""
        at = self._field(number)
        return int(_unpack(kind, self.data, at)[0]) if at else 0

    def signed64(self, number: int) -> int:
        return self.number(number, "<q")

    def child(self, number: int) -> _Table:
        at = self._field(number)
        return _Table(self.data, at + int(_unpack("<I", self.data, at)[0]))

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """A vector of structs of two signed 64-bit numbers."""
        field = self._field(number)
        if not field:
            return []
        at = field + int(_unpack("<I", self.data, field)[0])
        count = int(_unpack("<I", self.data, at)[0])
        if count > len(self.data) // 16:
            raise struct.error("a vector longer than its buffer")
        flat = _unpack(f"<{2 * count}q", self.data, at + 4)
        return list(zip(flat[::2], flat[1::2], strict=True))


def _unpack(kind: str, data: bytes, at: int) -> tuple[int, ...]:
    if at < 0:  # `unpack_from` would count from the end
        raise struct.error("a position before the buffer")
    return struct.unpack_from(kind, data, at)
