"""Payloads: weights as a flat array with a layout; class statistics and per-case results as Arrow.

They contain no pickles, class names or object arrays, and every decoder checks version, sizes and
types. Pure NumPy and PyArrow: neither torch nor Flower.

Legend: P floating-point weights, K classes, A feature channels, T = A(A+1)/2 entries of a packed
symmetric matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.common.errors import fail
from fedsgcg.common.statistics import ClassStatistics

SCHEMA_VERSION = "1"
STATISTICS_KIND = "fedsgcg.class_statistics"
MAX_CLASSES = 256
MAX_FEATURES = 4096

DISTANCES = ("asd", "assd", "hd95", "hd95_max")
"""Surface distances of a case; each has a column in pixels and one in millimetres (`_mm`)."""

CASES_KIND = "fedsgcg.cases"
CASES_VERSION = "2"
"""2 added hd95_max and hd95_max_mm."""


def _column(name: str, kind: pa.DataType, meaning: str, unit: str = "") -> pa.Field:
    """Return a column with its meaning and unit as metadata, which a Parquet file keeps."""
    metadata = {"description": meaning}
    if unit:
        metadata["unit"] = unit
    return pa.field(name, kind, metadata=metadata)


_MEANINGS = {
    "asd": "mean distance from the predicted surface to the true one",
    "assd": "mean distance over the pooled surface points of both",
    "hd95": "95th percentile of the pooled distances of both surfaces, as in medpy",
    "hd95_max": "larger of the two directed 95th percentiles, as in MONAI",
}
_UNDEFINED = "NaN where one of the two masks is empty"

CASES_SCHEMA = pa.schema(
    [
        _column("case", pa.string(), "alias of the case; the hospital alone knows whose it is"),
        _column("structure", pa.string(), "structure"),
        _column("dice", pa.float64(), "2 |P and T| / (|P| + |T|), 1 where both are empty", "1"),
        *(
            _column(name, pa.float64(), f"{_MEANINGS[name]}; {_UNDEFINED}", "pixel")
            for name in DISTANCES
        ),
        _column(
            "unit",
            pa.string(),
            "unit of asd, assd, hd95, hd95_max and asd_compat: pixel (voxel of a volume)",
        ),
        *(
            _column(
                f"{name}_mm",
                pa.float64(),
                f"{_MEANINGS[name]}; null where the spacing is not real",
                "mm",
            )
            for name in DISTANCES
        ),
        _column("empty_prediction", pa.bool_(), "whether nothing was predicted"),
        _column("empty_truth", pa.bool_(), "whether the truth is empty"),
        _column(
            "dice_smooth1",
            pa.float64(),
            "(2 |P and T| + 1) / (|P| + |T| + 1), for printed tables alone",
            "1",
        ),
        _column(
            "asd_compat",
            pa.float64(),
            "asd, 100 where one mask is empty, for printed tables alone",
            "pixel",
        ),
    ],
    metadata={"schema_version": CASES_VERSION, "kind": CASES_KIND},
)


@dataclass(frozen=True)
class Identity:
    """The run, fold, round and plan that a payload belongs to; both ends compare it first.

    Attributes:
        run: Identifier of the federation run.
        heldout: Name of the fold's held-out site, "" if there is none.
        round: Round number, from 1; 0 before the first round.
        plan: Hash of the plan (`Plan.digest`).
    """

    run: str
    heldout: str
    round: int
    plan: str

    def encode(self) -> str:
        """Return the identity as canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> Identity:
        """Read the JSON of `encode`; raises PAY-106 for anything else."""
        try:
            fields = json.loads(text)
            return cls(
                str(fields["run"]),
                str(fields["heldout"]),
                int(fields["round"]),
                str(fields["plan"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise fail(
                "PAY-106",
                found=f"identity {text[:80]!r}",
                expected="JSON with run, heldout, round, plan",
            ) from error


@dataclass(frozen=True)
class Weights:
    """The state of a network as one flat float32 array, with its layout and integer counters.

    Attributes:
        layout: (name, shape) of every floating-point entry, in the order of `values`.
        values: (P,) float32.
        counters: Integer entries by name (BatchNorm's `num_batches_tracked`).
    """

    layout: tuple[tuple[str, tuple[int, ...]], ...]
    values: npt.NDArray[np.float32]
    counters: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[Any]]) -> Weights:
        """Flatten a state dictionary of NumPy arrays, keeping its order."""
        floating = [
            (name, array)
            for name, array in state.items()
            if np.issubdtype(array.dtype, np.floating)
        ]
        counters = tuple(
            (name, int(array))
            for name, array in state.items()
            if not np.issubdtype(array.dtype, np.floating)
        )
        layout = tuple((name, tuple(int(n) for n in array.shape)) for name, array in floating)
        flat = [np.ascontiguousarray(array, dtype=np.float32).reshape(-1) for _, array in floating]
        values = np.concatenate(flat) if flat else np.zeros(0, np.float32)
        return cls(layout, values, counters)

    def to_state(self) -> dict[str, npt.NDArray[Any]]:
        """Return name -> array (views into `values`), counters as int64 scalars."""
        state: dict[str, npt.NDArray[Any]] = {}
        start = 0
        for name, shape in self.layout:
            size = int(np.prod(shape, dtype=np.int64))
            state[name] = self.values[start : start + size].reshape(shape)
            start += size
        for name, value in self.counters:
            state[name] = np.asarray(value, dtype=np.int64)
        return state

    def digest(self) -> str:
        """Return the model hash: the SHA-256 of layout, values and counters."""
        sha = hashlib.sha256(self.encode_layout().encode())
        sha.update(np.ascontiguousarray(self.values, dtype="<f4").tobytes())
        return sha.hexdigest()

    def encode_layout(self) -> str:
        """Return layout and counters as JSON, to be sent with the flat array."""
        return json.dumps(
            {
                "layout": [[name, list(shape)] for name, shape in self.layout],
                "counters": dict(self.counters),
            }
        )

    @classmethod
    def decode(cls, layout_json: str, values: npt.NDArray[Any]) -> Weights:
        """Join a layout and a flat array.

        Raises:
            FedsgcgError: PAY-103 if their sizes differ, PAY-106 for a layout that cannot be parsed.
        """
        try:
            parsed = json.loads(layout_json)
            layout = tuple(
                (str(name), tuple(int(n) for n in shape)) for name, shape in parsed["layout"]
            )
            counters = tuple((str(name), int(value)) for name, value in parsed["counters"].items())
            np.asarray([value for _, value in counters], dtype=np.int64)  # OverflowError
            if any(size < 0 for _, shape in layout for size in shape):
                raise ValueError("a negative size")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise fail(
                "PAY-106", found="layout that is not JSON", expected="names and shapes"
            ) from error
        wanted = sum(math.prod(shape) for _, shape in layout)  # exact, however large
        if values.ndim != 1 or values.dtype != np.float32 or values.size != wanted:
            raise fail(
                "PAY-103",
                found=f"{values.dtype} array of shape {values.shape}",
                expected=f"float32 of shape ({wanted},)",
            )
        return cls(layout, values, counters)


def encode_statistics(statistics: ClassStatistics, identity: Identity) -> bytes:
    """Write class statistics as an Arrow IPC stream: count, mean (A,), upper scatter (T,)."""
    num_classes, num_features = statistics.mean.shape
    rows, columns = np.triu_indices(num_features)
    packed = statistics.scatter[:, rows, columns]
    schema = _statistics_schema(num_features, identity)
    batch = pa.record_batch(
        [
            pa.array(np.arange(num_classes, dtype=np.int16)),
            pa.array(statistics.count.astype(np.float64)),
            pa.FixedSizeListArray.from_arrays(pa.array(statistics.mean.reshape(-1)), num_features),
            pa.FixedSizeListArray.from_arrays(pa.array(packed.reshape(-1)), packed.shape[1]),
        ],
        schema=schema,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def decode_statistics(data: bytes) -> tuple[ClassStatistics, Identity]:
    """Read a stream of `encode_statistics`.

    Raises:
        FedsgcgError: PAY-107 for another version, PAY-106 for any other data.
    """
    try:
        with pa.ipc.open_stream(pa.BufferReader(data)) as reader:
            metadata = {
                key.decode(): value.decode()
                for key, value in (reader.schema.metadata or {}).items()
            }
            _check_kind(metadata, STATISTICS_KIND)
            num_features = int(metadata["num_features"])
            if not 0 < num_features <= MAX_FEATURES or not reader.schema.equals(
                _statistics_schema(num_features, None)
            ):
                raise fail(
                    "PAY-106",
                    found=f"schema {reader.schema.names}",
                    expected="class, count, mean, scatter_upper",
                )
            table = reader.read_all()
            table.validate(full=True)  # reading alone does not check offsets and lengths
            stated = Identity.decode(metadata["identity"])
        incomplete = any(column.null_count for column in table.columns)
        if incomplete or not 0 < table.num_rows <= MAX_CLASSES:
            raise fail(
                "PAY-106",
                found=f"{table.num_rows} rows",
                expected=f"1 to {MAX_CLASSES} complete rows",
            )
        count = table["count"].to_numpy().astype(np.float64)
        mean = _matrix(table["mean"], num_features)
        packed = _matrix(table["scatter_upper"], num_features * (num_features + 1) // 2)
    except (pa.ArrowException, ValueError, KeyError, OSError, OverflowError) as error:
        raise fail(
            "PAY-106",
            found=f"{len(data)} bytes that are not an Arrow stream",
            expected="class statistics",
        ) from error
    scatter = np.zeros((table.num_rows, num_features, num_features))
    rows, columns = np.triu_indices(num_features)
    scatter[:, rows, columns] = packed
    scatter[:, columns, rows] = packed
    return ClassStatistics(count, mean, scatter), stated


def encode_cases(rows: list[dict[str, Any]]) -> bytes:
    """Write per-case results, a row per case and structure (`CASES_SCHEMA`), as an Arrow stream."""
    table = pa.Table.from_pylist(rows, schema=CASES_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, CASES_SCHEMA) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def decode_cases(data: bytes) -> list[dict[str, Any]]:
    """Read a stream of `encode_cases`; raises PAY-106 or PAY-107 as `decode_statistics`."""
    try:
        with pa.ipc.open_stream(pa.BufferReader(data)) as reader:
            metadata = {
                key.decode(): value.decode()
                for key, value in (reader.schema.metadata or {}).items()
            }
            _check_kind(metadata, CASES_KIND, CASES_VERSION)
            if not reader.schema.equals(CASES_SCHEMA):
                raise fail(
                    "PAY-106",
                    found=f"columns {reader.schema.names}",
                    expected=f"columns {CASES_SCHEMA.names}",
                )
            table = reader.read_all()
            table.validate(full=True)  # reading alone does not check offsets and lengths
            rows: list[dict[str, Any]] = table.to_pylist()
            return rows
    except (pa.ArrowException, ValueError, OSError) as error:
        raise fail(
            "PAY-106",
            found=f"{len(data)} bytes that are not an Arrow stream",
            expected="per-case results",
        ) from error


def _statistics_schema(num_features: int, identity: Identity | None) -> pa.Schema:
    packed = num_features * (num_features + 1) // 2
    fields = [
        pa.field("class", pa.int16()),
        pa.field("count", pa.float64()),
        pa.field("mean", pa.list_(pa.float64(), num_features)),
        pa.field("scatter_upper", pa.list_(pa.float64(), packed)),
    ]
    if identity is None:
        return pa.schema(fields)
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "kind": STATISTICS_KIND,
        "num_features": str(num_features),
        "identity": identity.encode(),
    }
    return pa.schema(fields, metadata=metadata)


def _check_kind(metadata: Mapping[str, str], kind: str, version: str = SCHEMA_VERSION) -> None:
    if metadata.get("kind") != kind:
        raise fail("PAY-106", found=f"kind {metadata.get('kind')!r}", expected=kind)
    if metadata.get("schema_version") != version:
        raise fail(
            "PAY-107",
            found=f"version {metadata.get('schema_version')}",
            expected=f"version {version}",
            action="install the same fedsgcg release at every site",
        )


def _matrix(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.float64]:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float64).reshape(-1, width)
