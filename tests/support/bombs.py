"""Small payloads that would need far more memory than they have bytes."""

import numpy as np
import pyarrow as pa

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.amplitudes import AmplitudeBank, AmplitudeSummary
from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.common.wire.payload import (
    CASES_SCHEMA,
    Identity,
    decode_cases,
    decode_statistics,
    encode_cases,
    encode_statistics,
)

IDENTITY = Identity("run", "D", 3, "0" * 64)
LARGE = 2**28
"""Bytes that each compressed bomb holds; its own size is below 80 kB."""

DECODERS = {
    "statistics": decode_statistics,
    "cases": decode_cases,
    "moments": NormMoments.decode,
    "summary": AmplitudeSummary.decode,
    "bank": AmplitudeBank.decode,
}


def honest() -> dict[str, bytes]:
    """One valid payload for each decoder."""
    window = np.ones((2, 3, 2, 3, 3), np.float32)
    return {
        "statistics": encode_statistics(ClassStatistics.empty(3, 4), IDENTITY),
        "cases": encode_cases([case_row("a", "gland")]),
        "moments": NormMoments.empty({"norm": 4}).encode(IDENTITY),
        "summary": AmplitudeSummary.from_amplitudes(10 * window, 32).encode(),
        "bank": AmplitudeBank(window, ("A", "B")).encode(),
    }


def case_row(case: str, structure: str) -> dict[str, object]:
    """A row of per-case results with the required columns."""
    return {"case": case, "structure": structure, "dice": 0.5, "unit": "pixel"}


def stream(schema: pa.Schema, *batches: pa.RecordBatch, codec: str | None = None) -> bytes:
    """An Arrow stream with these batches."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def zeros(field: pa.Field, rows: int) -> pa.Array:
    """A column of zeros, without touching the memory."""
    kind = field.type
    if pa.types.is_fixed_size_list(kind):
        values = zeros(pa.field("", kind.value_type), rows * kind.list_size)
        return pa.FixedSizeListArray.from_arrays(values, kind.list_size)
    if pa.types.is_list(kind):
        return pa.ListArray.from_arrays(np.zeros(rows + 1, np.int32), pa.array([], pa.float64()))
    buffers = [None, pa.py_buffer(np.zeros(rows + 1, np.int64))]
    if pa.types.is_string(kind):
        buffers.append(pa.py_buffer(b""))
    return pa.Array.from_buffers(kind, rows, buffers)


def of_zeros(kind: str, codec: str | None, rows: int) -> bytes:
    """A stream of `rows` rows of zeros with the schema and metadata of an honest payload."""
    schema = pa.ipc.open_stream(honest()[kind]).schema if kind != "statistics" else wide_schema()
    columns = [zeros(field, rows) for field in schema]
    return stream(schema, pa.record_batch(columns, schema=schema), codec=codec)


def wide_schema() -> pa.Schema:
    """Schema of statistics with 2,048 channels: 17 MB in a row."""
    return pa.ipc.open_stream(encode_statistics(ClassStatistics.empty(1, 2048), IDENTITY)).schema


def compressed(kind: str, codec: str) -> bytes:
    """About `LARGE` bytes of zeros, compressed."""
    bytes_of_row = {"statistics": 2**24, "cases": 128, "moments": 24, "summary": 1300, "bank": 220}
    return of_zeros(kind, codec, LARGE // bytes_of_row[kind])


def with_custom_metadata(kind: str) -> bytes:
    """A batch whose message carries metadata, in which old versions state a compression."""
    table = pa.ipc.open_stream(honest()[kind]).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches():
            writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    return bytes(sink.getvalue())


def repeated(rows: int) -> bytes:
    """Rows of one case and structure, `rows` times."""
    table = pa.Table.from_pylist([case_row("a", "gland")] * rows, schema=CASES_SCHEMA)
    return stream(CASES_SCHEMA, *table.combine_chunks().to_batches())
