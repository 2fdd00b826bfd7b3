"""Count and mean of random blocks of each class's pixels, from which a covariance is estimated.

After FedCOF (Goswami et al., 2024), which estimates a class covariance from the means of clients.
Means of hospitals differ because hospitals differ, so here a site divides its own pixels of a class
at random into B blocks. The blocks' means then vary by chance alone, as the pixels do divided by
the block's size: with n_b pixels and mean m_b in block b and m = sum n_b m_b / n,

    S = sum_b n_b (m_b - m)(m_b - m)^T / (B - 1)

has the expectation of the sample covariance of the pixels (divisor n - 1), whatever their
distribution, because a block is a sample without replacement. Its rank is at most B - 1 per site.
For features of unit length the trace of a covariance is 1 - |m|^2 exactly, and S is scaled to it.

Pure NumPy and PyArrow. Legend: K classes, B blocks, A feature channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.common.errors import fail
from fedsgcg.common.names import MAX_CLASSES
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.arrow import open_bounded
from fedsgcg.common.wire.payload import (
    HEAD_BYTES,
    MAX_FEATURES,
    SCHEMA_VERSION,
    UNREADABLE,
    Identity,
)

KIND: Final = "fedsgcg.block_means"
MAX_BLOCKS: Final = 1024
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BlockMeans:
    """Block means of the classes of a site.

    Attributes:
        count: (K, B) pixels of each block.
        mean: (K, B, A) mean feature of each block, zero for an empty one.
        unit_norm: Whether the features have unit length.
    """

    count: Array
    mean: Array
    unit_norm: bool

    def __post_init__(self) -> None:
        if self.count.ndim != 2 or self.mean.shape[:2] != self.count.shape or self.mean.ndim != 3:
            raise ValueError(
                f"found count {self.count.shape} and mean {self.mean.shape}, "
                "expected (K, B) and (K, B, A)"
            )

    @property
    def pixels(self) -> Array:
        """(K,) pixels of each class."""
        total: Array = self.count.sum(axis=1)
        return total

    def estimate(self) -> ClassStatistics:
        """Return class statistics with the covariance estimated from the blocks."""
        total = self.pixels
        mean = np.einsum("kb,kba->ka", self.count, self.mean)
        mean /= np.where(total > 0, total, 1.0)[:, None]
        offset = self.mean - mean[:, None]
        filled = (self.count > 0).sum(axis=1)
        covariance = np.einsum("kb,kba,kbc->kac", self.count, offset, offset)
        covariance /= np.maximum(filled - 1, 1)[:, None, None]
        covariance = (covariance + covariance.transpose(0, 2, 1)) / 2
        if self.unit_norm:
            covariance *= self._to_unit_trace(mean, covariance)[:, None, None]
        return ClassStatistics(total, mean, covariance * total[:, None, None])

    def without(self, hidden: npt.NDArray[np.bool_]) -> BlockMeans:
        """Return the same with the classes `hidden` (K,) as absent."""
        return replace(
            self,
            count=np.where(hidden[:, None], 0.0, self.count),
            mean=np.where(hidden[:, None, None], 0.0, self.mean),
        )

    def encode(self, identity: Identity) -> bytes:
        """Write an Arrow IPC stream, one row per class and block."""
        blocks, features = self.mean.shape[1:]
        schema = _schema(features).with_metadata(
            {
                "schema_version": SCHEMA_VERSION,
                "kind": KIND,
                "blocks": str(blocks),
                "num_features": str(features),
                "unit_norm": str(int(self.unit_norm)),
                "identity": identity.encode(),
            }
        )
        columns = [
            pa.array(self.count.reshape(-1).astype(np.float64)),
            pa.FixedSizeListArray.from_arrays(pa.array(self.mean.reshape(-1)), features),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return bytes(sink.getvalue())

    @classmethod
    def decode(cls, data: bytes, most_bytes: int) -> tuple[BlockMeans, Identity]:
        """Read a stream of `encode`.

        Raises:
            FedsgcgError: PAY-105 for more bytes than `most_bytes`, PAY-107 for another version,
                PAY-106 for any other data.
        """
        try:
            stream = open_bounded(data, most_bytes, "block means")
            metadata = stream.metadata
            if metadata.get("kind") != KIND:
                raise fail("PAY-106", found=f"kind {metadata.get('kind')!r}", expected=KIND)
            if (version := metadata.get("schema_version")) != SCHEMA_VERSION:
                found, expected = f"version {version}", f"version {SCHEMA_VERSION}"
                raise fail("PAY-107", found=found, expected=expected)
            blocks, features = int(metadata["blocks"]), int(metadata["num_features"])
            if not (0 < blocks <= MAX_BLOCKS and 0 < features <= MAX_FEATURES):
                raise fail("PAY-106", found=f"{blocks} blocks of {features} channels")
            if stream.rows % blocks or not 0 < stream.rows // blocks <= MAX_CLASSES:
                raise fail("PAY-106", found=f"{stream.rows} rows of {blocks} blocks")
            if not stream.schema.equals(_schema(features)):
                raise fail("PAY-106", found="another schema", expected="count, mean")
            table = stream.table()
            if any(column.null_count for column in table.columns):
                raise fail("PAY-106", found="missing values", expected="complete rows")
            count = table["count"].to_numpy().astype(np.float64).reshape(-1, blocks)
            flat = table["mean"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            mean = np.asarray(flat, dtype=np.float64).reshape(-1, blocks, features)
            means = cls(count, mean, metadata["unit_norm"] == "1")
            return means, Identity.decode(metadata["identity"])
        except UNREADABLE as error:
            found = f"{len(data)} bytes that are not block means"
            raise fail("PAY-106", found=found, expected="count, mean") from error

    def _to_unit_trace(self, mean: Array, covariance: Array) -> Array:
        """Return (K,) factors that give each covariance the trace of unit-length features."""
        room = np.maximum(1.0 - np.square(mean).sum(axis=1), 0.0)
        trace = np.trace(covariance, axis1=1, axis2=2)
        factors: Array = np.zeros_like(room)
        np.divide(room, trace, out=factors, where=trace > 0)
        return factors


def block_means_bytes(num_classes: int, num_features: int, blocks: int) -> int:
    """Return the bytes that encoded block means may have."""
    return HEAD_BYTES + num_classes * blocks * 8 * (1 + num_features)


def _schema(num_features: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("count", pa.float64()),
            pa.field("mean", pa.list_(pa.float64(), num_features)),
        ]
    )
