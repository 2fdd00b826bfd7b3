"""What RAM may share of a site's images beside weights and class statistics, where the site agrees (methods.md 2.8).

`summary`: per frequency of the window and channel the number of images, the sum of their log amplitudes and of its
square: additive over sites, without phase. `bank`: the window amplitudes of single images, a signal of single patients.
Pure NumPy and PyArrow.

Legend: M images, C channels, b half window; a window is (C, 2, b + 1, b + 1) as `common.amplitude` lays it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.errors import fail
from common.payload import SCHEMA_VERSION

KIND: Final = "fedsgcg.amplitudes"
FLOOR: Final = 1e-6
"""Smallest amplitude before the logarithm: that of an image without any signal at a frequency."""
MAX_WINDOWS: Final = 1 << 16
MAX_VALUES: Final = 1 << 26

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AmplitudeSummary:
    """Additive moments of the log amplitudes of M images.

    Attributes:
        count: M.
        first: (C, 2, b+1, b+1) float64, sum of log amplitudes.
        second: The same shape, sum of their squares.
    """

    count: float
    first: npt.NDArray[np.float64]
    second: npt.NDArray[np.float64]

    @classmethod
    def from_amplitudes(cls, amplitudes: Floats) -> AmplitudeSummary:
        """Summarise (M, C, 2, b+1, b+1) window amplitudes."""
        logs = np.log(np.maximum(amplitudes.astype(np.float64), FLOOR))
        return cls(float(len(logs)), logs.sum(axis=0), np.square(logs).sum(axis=0))

    def __add__(self, other: AmplitudeSummary) -> AmplitudeSummary:
        """Pool the images of two sites."""
        return AmplitudeSummary(self.count + other.count, self.first + other.first, self.second + other.second)

    def without(self, part: AmplitudeSummary) -> AmplitudeSummary:
        """Take the images of one site out again."""
        return AmplitudeSummary(self.count - part.count, self.first - part.first, self.second - part.second)

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean log amplitude."""
        return self.first / max(self.count, 1.0)

    @property
    def deviation(self) -> npt.NDArray[np.float64]:
        """Standard deviation of the log amplitudes; rounding below zero counts as zero."""
        variance = self.second / max(self.count, 1.0) - np.square(self.mean)
        return np.asarray(np.sqrt(np.maximum(variance, 0.0)))

    def encode(self) -> bytes:
        """Lay the summary out as an Arrow stream of two rows."""
        return _encode("summary", np.stack([self.first, self.second]), {"count": repr(self.count)}, ["", ""])

    @classmethod
    def decode(cls, data: bytes) -> AmplitudeSummary:
        """Read what `encode` wrote.

        Raises:
            FedsgcgError: PAY-106 or PAY-107 for anything else, STA-201 for moments that cannot be.
        """
        windows, metadata, _ = _decode("summary", data, np.float64)
        try:
            count = float(metadata["count"])
        except (KeyError, ValueError) as error:
            raise fail("PAY-106", found="a summary without a count", expected="the number of images") from error
        if len(windows) != 2:
            raise fail("PAY-106", found=f"{len(windows)} rows", expected="two: sums of logarithms and of their squares")
        first, second = windows
        spread = count * second - np.square(first)
        sound = np.isfinite(count) and count >= 1 and count.is_integer() and np.isfinite(windows).all()
        if not sound or (second < 0).any() or (spread < -1e-9 * np.maximum(count * second, 1.0)).any():
            found = f"moments of {count!r} images that no set of images has"
            raise fail("STA-201", found=found, expected="finite sums of logarithms and of their squares")
        return cls(count, first, second)


def encode_bank(amplitudes: Floats, owners: list[str]) -> bytes:
    """Lay (M, C, 2, b+1, b+1) float32 window amplitudes and the site of each out as an Arrow stream."""
    return _encode("bank", amplitudes, {}, owners)


def decode_bank(data: bytes) -> tuple[Floats, list[str]]:
    """Read what `encode_bank` wrote: amplitudes and the site of each.

    Raises:
        FedsgcgError: PAY-106 or PAY-107 for anything else, STA-201 for amplitudes that are negative or not finite.
    """
    windows, _, owners = _decode("bank", data, np.float32)
    if not np.isfinite(windows).all() or (windows < 0).any():
        raise fail("STA-201", found="negative amplitudes, or not finite", expected="finite numbers of zero or more")
    return windows.astype(np.float32, copy=False), owners


def _encode(level: str, windows: npt.NDArray[np.floating], facts: dict[str, str], owners: list[str]) -> bytes:
    flat = np.ascontiguousarray(windows).reshape(len(windows), -1)
    kind = pa.float64() if windows.dtype == np.float64 else pa.float32()
    shape = ",".join(str(size) for size in windows.shape[1:])
    metadata = {"schema_version": SCHEMA_VERSION, "kind": KIND, "level": level, "shape": shape, **facts}
    fields = [pa.field("site", pa.string()), pa.field("window", pa.list_(kind, flat.shape[1]))]
    schema = pa.schema(fields, metadata=metadata)
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(owners, pa.string()), values], schema=schema))
    return bytes(sink.getvalue())


def _decode(
    level: str, data: bytes, dtype: type[np.floating]
) -> tuple[npt.NDArray[np.floating], dict[str, str], list[str]]:
    try:
        with pa.ipc.open_stream(pa.BufferReader(data)) as reader:
            metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
            if (metadata.get("kind"), metadata.get("level")) != (KIND, level):
                raise fail("PAY-106", found=f"a payload of kind {metadata.get('kind')!r}", expected=f"a {level}")
            if metadata.get("schema_version") != SCHEMA_VERSION:
                raise fail("PAY-107", found=f"version {metadata.get('schema_version')}", expected=SCHEMA_VERSION)
            table = reader.read_all()
            table.validate(full=True)  # Arrow does not look at offsets and lengths by itself
        shape = tuple(int(size) for size in metadata["shape"].split(","))
        wanted = len(shape) == 4 and shape[1] == 2 and min(shape) > 0 and table.num_rows * np.prod(shape) <= MAX_VALUES
        if not wanted or not 0 < table.num_rows <= MAX_WINDOWS or any(part.null_count for part in table.columns):
            raise fail("PAY-106", found=f"{table.num_rows} windows of shape {shape}", expected="(C, 2, b+1, b+1)")
        flat = table["window"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        windows = np.asarray(flat, dtype=dtype).reshape(table.num_rows, *shape)
        owners = [str(name) for name in table["site"].to_pylist()]
    except (pa.ArrowException, ValueError, KeyError, OSError, OverflowError, AttributeError) as error:
        raise fail("PAY-106", found=f"{len(data)} bytes that are no amplitudes", expected=f"a {level}") from error
    return windows, metadata, owners
