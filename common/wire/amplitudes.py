"""Amplitudes of images that sites may share for RAM across hospitals, with consent.

`summary`: the number of images and, per frequency of the window, the sums of log amplitudes and of
products of two channels' log amplitudes; additive over sites, without phase. `bank`: the window
amplitudes of single images, which describe single patients. See docs/explanation/ram-dsir.md,
"Federated". Pure NumPy and PyArrow.

Legend: M images, C channels, P = C(C + 1)/2 pairs of channels, S side of an image, b half window; a
window is (C, 2, b + 1, b + 1), with rows of frequency 0 to b, then rows of 0 to -b, as in
`clients.methods.amplitude`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.common.errors import fail
from fedsgcg.common.wire.arrow import Stream, open_bounded
from fedsgcg.common.wire.payload import UNREADABLE

KIND: Final = "fedsgcg.amplitudes"
SCHEMA_VERSION: Final = "2"
"""2: products of channels, the mixing space and the sites of a summary; without empty slices."""
GREY_LEVEL: Final = 2 / 255
"""One step of an 8-bit image on the scale [-1, 1]."""

OFFSETS: Final = {"picture": 1.0, "volume": 0.0}
"""Offset that is added to an image in [-1, 1] before its amplitudes are computed.

RAM-DSIR mixes pictures in [0, 255] and then scales them to [-1, 1], and mixes volumes in [-1, 1]. A
common factor does not change a mixture, so [0, 2] is equivalent to [0, 255]. An offset does: it
changes the amplitude of frequency zero.
"""
MAX_WINDOWS: Final = 1 << 16
MAX_VALUES: Final = 1 << 26
MAX_BYTES: Final = 2**29
"""Bytes of encoded amplitudes: `MAX_VALUES` float64 values."""

MAX_CHANNELS: Final = 16
MAX_IMAGES: Final = 1 << 40
MAX_LOG: Final = 32.0
"""Bound of log amplitudes: a side of 2**15 reaches 22, and the smallest floor is 1e-2."""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def amplitude_floor(side: int) -> float:
    """Return the root mean square amplitude of 8-bit rounding at a frequency of an S x S image.

    The rounding error of a pixel has variance GREY_LEVEL^2 / 12, and its DFT S^2 times that. A
    smaller amplitude is not signal, but its logarithm would be an outlier.
    """
    return side * GREY_LEVEL / math.sqrt(12)


def shows_something(amplitudes: npt.NDArray[np.floating], side: int) -> npt.NDArray[np.bool_]:
    """Return (M,) whether all channels of an image have a signal in the window.

    Only frequencies other than zero count, and only amplitudes above those of rounding. A constant
    slice, at the end of a volume or outside the body, has no amplitude to mix, and the logarithm of
    its floor would be an outlier by several standard deviations.

    Args:
        amplitudes: (M, C, 2, b+1, b+1).
        side: S.
    """
    power = np.square(amplitudes.astype(np.float64))
    power[..., 0, 0] = 0.0
    frequencies = 2 * power.shape[-1] ** 2 - 2
    if not frequencies:  # a window of frequency zero alone
        return np.ones(len(power), np.bool_)
    mean = power.sum(axis=(-3, -2, -1)) / frequencies
    return np.asarray((mean > amplitude_floor(side) ** 2).all(axis=1))


def same_amplitude(half: int, side: int) -> npt.NDArray[np.bool_]:
    """Return (b+1, b+1) whether the two halves of a window hold the same amplitude.

    Row 0 is in both halves; rows k and -k of column 0 are conjugate. If the window reaches S/2 of
    an even side, the same holds for its last row and column: S/2 and -S/2 are one frequency.
    """
    own = (2 * np.arange(half + 1)) % side == 0
    return np.asarray(own[:, None] | own[None, :])


@dataclass(frozen=True, eq=False)
class AmplitudeSummary:
    """Additive moments of the log amplitudes of M images with a signal (`shows_something`).

    Attributes:
        count: M.
        first: (C, 2, b+1, b+1) float64, sum of log amplitudes.
        second: (P, 2, b+1, b+1), sum of the products of two channels' log amplitudes at one
            frequency, the pairs in the order of `np.triu_indices(C)`.
        side: S.
        space: Key of `OFFSETS`.
        sites: Names of the included sites, sorted; may be empty in a site's own summary.
    """

    count: float
    first: Doubles
    second: Doubles
    side: int
    space: str = "volume"
    sites: tuple[str, ...] = ()

    @classmethod
    def from_amplitudes(
        cls, amplitudes: Floats, side: int, space: str = "volume", sites: tuple[str, ...] = ()
    ) -> AmplitudeSummary:
        """Summarise (M, C, 2, b+1, b+1) amplitudes of S x S images, without those of no signal."""
        shown = amplitudes[shows_something(amplitudes, side)].astype(np.float64)
        logs = np.log(np.maximum(shown, amplitude_floor(side)))
        left, right = np.triu_indices(amplitudes.shape[1])
        products = (logs[:, left] * logs[:, right]).sum(axis=0)
        return cls(float(len(logs)), logs.sum(axis=0), products, side, space, sites)

    def __add__(self, other: AmplitudeSummary) -> AmplitudeSummary:
        """Pool the images of two sites.

        Raises:
            ValueError: Windows, sides or spaces that differ.
        """
        self._check_like(other)
        return AmplitudeSummary(
            count=self.count + other.count,
            first=self.first + other.first,
            second=self.second + other.second,
            side=self.side,
            space=self.space,
            sites=tuple(sorted({*self.sites, *other.sites})),
        )

    def without(self, part: AmplitudeSummary) -> AmplitudeSummary:
        """Remove the images of one site.

        Raises:
            ValueError: As `__add__`.
        """
        self._check_like(part)
        return AmplitudeSummary(
            count=self.count - part.count,
            first=self.first - part.first,
            second=self.second - part.second,
            side=self.side,
            space=self.space,
            sites=tuple(site for site in self.sites if site not in part.sites),
        )

    @property
    def layout(self) -> tuple[tuple[int, ...], int, str]:
        """Shape of the window, side and space; they must be equal for summaries to be added."""
        return self.first.shape, self.side, self.space

    @property
    def mean(self) -> Doubles:
        """(C, 2, b+1, b+1) mean log amplitude."""
        return self.first / max(self.count, 1.0)

    @property
    def covariance(self) -> Doubles:
        """(2, b+1, b+1, C, C) covariance of the channels' log amplitudes at each frequency."""
        mean = np.moveaxis(self.mean, 0, -1)
        return _square(self.second) / max(self.count, 1.0) - mean[..., :, None] * mean[..., None, :]

    @property
    def deviation(self) -> Doubles:
        """(C, 2, b+1, b+1) standard deviation of the log amplitudes."""
        variance = np.diagonal(self.covariance, axis1=-2, axis2=-1)
        return np.asarray(np.sqrt(np.maximum(np.moveaxis(variance, -1, 0), 0.0)))

    def encode(self) -> bytes:
        """Write the summary as an Arrow stream with one row: (C + P, 2, b+1, b+1)."""
        facts = {
            "count": repr(self.count),
            "channels": str(len(self.first)),
            "sites": json.dumps(self.sites),
            "side": str(self.side),
            "space": self.space,
        }
        return _encode("summary", np.concatenate([self.first, self.second])[None], facts, [""])

    @classmethod
    def decode(cls, data: bytes) -> AmplitudeSummary:
        """Read a stream of `encode`.

        Raises:
            FedsgcgError: PAY-106 or PAY-107 for anything else, STA-201 for impossible moments.
        """
        windows, metadata, _ = _decode("summary", data, np.float64)
        try:
            count = float(metadata["count"])
            channels = int(metadata["channels"])
            side = int(metadata["side"])
            sites = tuple(str(site) for site in json.loads(metadata["sites"]))
        except (KeyError, ValueError, TypeError) as error:
            expected = "the number of images, channels and pixels of a side, and the sites"
            raise fail(
                "PAY-106", found="a summary without complete metadata", expected=expected
            ) from error
        rows = channels + channels * (channels + 1) // 2
        if not (0 < channels <= MAX_CHANNELS and windows.shape[:2] == (1, rows) and side > 0):
            found = f"sums of shape {windows.shape} for {channels} channels and a side of {side}"
            raise fail(
                "PAY-106",
                found=found,
                expected="one row: the sums of the channels and of their pairs",
            )
        first, second = np.split(windows[0].astype(np.float64, copy=False), [channels])
        summary = cls(count, first, second, side, _space(metadata), sites)
        if not summary._is_possible():
            raise fail(
                "STA-201",
                found=f"moments that {count!r} images cannot have",
                expected="finite sums of logarithms and of their products",
            )
        return summary

    def _is_possible(self) -> bool:
        if not (0 <= self.count <= MAX_IMAGES and self.count.is_integer()):
            return False
        most = MAX_LOG * self.count
        # These comparisons are also false for values that are not finite.
        sums_fit = (np.abs(self.first) <= most).all()
        products_fit = (np.abs(self.second) <= MAX_LOG * most).all()
        if not (sums_fit and products_fit):
            return False
        first = np.moveaxis(self.first, 0, -1)
        squares = self.count * _square(self.second)
        spread = np.linalg.eigvalsh(squares - first[..., :, None] * first[..., None, :])
        size = np.maximum(np.trace(squares, axis1=-2, axis2=-1), 1.0)
        return bool((spread >= -1e-9 * size[..., None]).all())

    def _check_like(self, other: AmplitudeSummary) -> None:
        if self.layout != other.layout:
            raise ValueError(f"amplitude summaries: found {other.layout}, expected {self.layout}")


class AmplitudeSampler:
    """Draws log-normal window amplitudes with the mean and channel covariance of a summary.

    Frequencies are drawn independently, channels jointly, as neighbouring slices of a stack are
    alike. A frequency that the window holds twice, as itself or as its conjugate, is drawn once. An
    amplitude above that of any possible image, as in the long tail of frequency zero, is limited to
    S^2 times the largest value.
    """

    def __init__(self, summary: AmplitudeSummary) -> None:
        values, vectors = np.linalg.eigh(summary.covariance)
        self._root = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
        self._mean = summary.mean
        self._same = same_amplitude(self._mean.shape[-1] - 1, summary.side)
        self._most = math.log(summary.side**2 * (1.0 + OFFSETS[summary.space]))

    def draw(self, count: int, rng: np.random.Generator) -> Doubles:
        """Return (count, C, 2, b+1, b+1) amplitudes."""
        noise = rng.standard_normal((count, *self._mean.shape))
        logs = self._mean + np.einsum("hijcp,mphij->mchij", self._root, noise)
        amplitudes = np.exp(np.minimum(logs, self._most))
        amplitudes[:, :, 1, self._same] = amplitudes[:, :, 0, self._same]
        return np.asarray(amplitudes)


@dataclass(frozen=True, eq=False)
class AmplitudeBank:
    """Window amplitudes of single images.

    Attributes:
        windows: (M, C, 2, b+1, b+1) float32.
        owners: The site of each, M names.
        space: Key of `OFFSETS`.
    """

    windows: Floats
    owners: tuple[str, ...]
    space: str = "volume"

    def without(self, site: str) -> AmplitudeBank:
        """Return the bank without the images of one site."""
        kept = [owner != site for owner in self.owners]
        owners = tuple(owner for owner in self.owners if owner != site)
        return AmplitudeBank(self.windows[kept], owners, self.space)

    def encode(self) -> bytes:
        """Write the bank as an Arrow stream with M rows."""
        return _encode("bank", self.windows, {"space": self.space}, list(self.owners))

    @classmethod
    def decode(cls, data: bytes) -> AmplitudeBank:
        """Read a stream of `encode`.

        Raises:
            FedsgcgError: PAY-106 or PAY-107 for anything else, STA-201 for amplitudes that are
                negative or not finite.
        """
        windows, metadata, owners = _decode("bank", data, np.float32)
        if not np.isfinite(windows).all() or (windows < 0).any():
            raise fail(
                "STA-201",
                found="amplitudes that are negative or not finite",
                expected="finite numbers of zero or more",
            )
        return cls(windows.astype(np.float32, copy=False), tuple(owners), _space(metadata))


def _square(pairs: Doubles) -> Doubles:
    """Unpack (P, 2, b+1, b+1) into symmetric matrices of each frequency, (2, b+1, b+1, C, C)."""
    channels = math.isqrt(2 * len(pairs))
    left, right = np.triu_indices(channels)
    square = np.empty((*pairs.shape[1:], channels, channels))
    square[..., left, right] = square[..., right, left] = np.moveaxis(pairs, 0, -1)
    return square


def _space(metadata: Mapping[str, str]) -> str:
    space = metadata.get("space", "")
    if space not in OFFSETS:
        raise fail(
            "PAY-106", found=f"amplitudes of the space {space!r}", expected=" | ".join(OFFSETS)
        )
    return space


def _encode(
    level: str, windows: npt.NDArray[np.floating], facts: dict[str, str], owners: list[str]
) -> bytes:
    flat = np.ascontiguousarray(windows).reshape(len(windows), -1)
    shape = ",".join(str(size) for size in windows.shape[1:])
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "level": level,
        "shape": shape,
        **facts,
    }
    schema = _schema(flat.shape[1], windows.dtype).with_metadata(metadata)
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(owners, pa.string()), values], schema=schema))
    return bytes(sink.getvalue())


def _decode(
    level: str, data: bytes, dtype: type[np.floating]
) -> tuple[npt.NDArray[np.floating], dict[str, str], list[str]]:
    try:
        stream = open_bounded(data, MAX_BYTES, f"an amplitude {level}")
        metadata = stream.metadata
        if (metadata.get("kind"), metadata.get("level")) != (KIND, level):
            raise fail(
                "PAY-106",
                found=f"a payload of kind {metadata.get('kind')!r}",
                expected=f"a {level}",
            )
        if metadata.get("schema_version") != SCHEMA_VERSION:
            raise fail(
                "PAY-107",
                found=f"version {metadata.get('schema_version')}",
                expected=SCHEMA_VERSION,
            )
        shape = tuple(int(size) for size in metadata["shape"].split(","))
        if not _holds_windows(stream, shape, dtype):
            raise fail(
                "PAY-106",
                found=f"{stream.rows} windows of shape {shape}",
                expected="(C, 2, b+1, b+1)",
            )
        table = stream.table()
        if any(column.null_count for column in table.columns):
            raise fail("PAY-106", found="missing values", expected="complete windows")
        flat = table["window"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        windows = np.asarray(flat, dtype=dtype).reshape(table.num_rows, *shape)
        owners = [str(name) for name in table["site"].to_pylist()]
    except UNREADABLE as error:
        raise fail(
            "PAY-106", found=f"{len(data)} bytes that are not amplitudes", expected=f"a {level}"
        ) from error
    return windows, metadata, owners


def _holds_windows(stream: Stream, shape: tuple[int, ...], dtype: type[np.floating]) -> bool:
    """Whether a stream states windows of an allowed shape, type and number."""
    if len(shape) != 4 or shape[1] != 2 or shape[2] != shape[3] or min(shape) <= 0:
        return False
    size = math.prod(shape)
    if not 0 < stream.rows <= MAX_WINDOWS or stream.rows * size > MAX_VALUES:
        return False
    return bool(stream.schema.equals(_schema(size, dtype)))


def _schema(size: int, dtype: npt.DTypeLike) -> pa.Schema:
    kind = pa.float64() if dtype == np.float64 else pa.float32()
    return pa.schema([pa.field("site", pa.string()), pa.field("window", pa.list_(kind, size))])
