"""Moments of the inputs of a network's BatchNorm layers, pooled exactly.

The running moments that FedAvg averages belong to the sites' local weights. These moments are
measured by every site under the merged weights and pooled like class statistics, with the scatter
M_a + M_b + (n_a n_b / n) d^2, so that the merged model is evaluated with its own moments. Pure
NumPy in float64.

Legend: L BatchNorm layers, P channels of all layers, concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.common.errors import fail
from fedsgcg.common.wire.arrow import open_bounded
from fedsgcg.common.wire.payload import SCHEMA_VERSION, UNREADABLE, Identity, Weights

KIND: Final = "fedsgcg.norm_moments"
MEAN, VARIANCE = ".running_mean", ".running_var"
MAX_LAYERS: Final = 4096
MAX_BYTES: Final = 2**22
"""Bytes of encoded moments, enough for 260,000 channels; the U-Net has a few thousand."""

Array = npt.NDArray[np.float64]

_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.string()),
        pa.field("count", pa.float64()),
        pa.field("mean", pa.list_(pa.float64())),
        pa.field("scatter", pa.list_(pa.float64())),
    ]
)


def norm_layers(weights: Weights) -> dict[str, int]:
    """Return the BatchNorm layers of a model with their channels, in the order of its entries."""
    return {
        name.removesuffix(MEAN): shape[0] for name, shape in weights.layout if name.endswith(MEAN)
    }


@dataclass(frozen=True, eq=False)
class NormMoments:
    """Count, mean and scatter of the input of every BatchNorm layer.

    Attributes:
        layers: Name of each layer -> its number of channels, in the order of the arrays.
        count: (L,) values per channel (slices times height times width).
        mean: (P,) mean of each channel.
        scatter: (P,) sum of (x - mean)^2 of each channel.

    Raises:
        ValueError: Arrays whose sizes do not match the layers.
    """

    layers: Mapping[str, int]
    count: Array
    mean: Array
    scatter: Array

    def __post_init__(self) -> None:
        for name in ("count", "mean", "scatter"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        layers = (len(self.layers),)
        channels = (sum(self.layers.values()),)
        expected = (layers, channels, channels)
        found = (self.count.shape, self.mean.shape, self.scatter.shape)
        if found != expected:
            raise ValueError(
                f"count, mean, scatter: found shapes {found}, expected shapes {expected}"
            )

    @classmethod
    def empty(cls, layers: Mapping[str, int]) -> NormMoments:
        """Return the moments of no inputs, the identity of `+`."""
        channels = sum(layers.values())
        return cls(dict(layers), np.zeros(len(layers)), np.zeros(channels), np.zeros(channels))

    @property
    def variance(self) -> Array:
        """(P,) unbiased variance, as in BatchNorm; zero for fewer than two values."""
        degrees = np.maximum(self._by_channel(self.count) - 1.0, 1.0)
        return self.scatter / degrees

    def __add__(self, other: NormMoments) -> NormMoments:
        """Pool two disjoint sets of inputs."""
        if dict(self.layers) != dict(other.layers):
            raise ValueError(f"layers: found {dict(other.layers)}, expected {dict(self.layers)}")
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        delta = other.mean - self.mean
        between = self._by_channel(self.count * share) * np.square(delta)
        return NormMoments(
            self.layers,
            count,
            self.mean + self._by_channel(share) * delta,
            self.scatter + other.scatter + between,
        )

    def weighted_equally(self, count: npt.ArrayLike) -> NormMoments:
        """Return the same mean and variance with another count (L,)."""
        wanted = np.asarray(count, dtype=np.float64)
        ratio = np.divide(wanted, self.count, out=np.zeros_like(self.count), where=self.count > 0)
        return NormMoments(
            self.layers,
            wanted * (self.count > 0),
            self.mean,
            self.scatter * self._by_channel(ratio),
        )

    def put_into(self, weights: Weights) -> Weights:
        """Return the model with these running moments; a layer without inputs keeps its own.

        Raises:
            ValueError: The layers are not those of the model.
        """
        if norm_layers(weights) != dict(self.layers):
            raise ValueError(f"layers: found {dict(self.layers)}, expected {norm_layers(weights)}")
        values = weights.values.copy()
        state = Weights(weights.layout, values, weights.counters).to_state()  # views into `values`
        means, variances = self._split(self.mean), self._split(self.variance)
        for layer, seen in zip(self.layers, self.count > 0, strict=True):
            if seen:
                state[layer + MEAN][:] = means[layer]
                state[layer + VARIANCE][:] = variances[layer]
        return Weights(weights.layout, values, weights.counters)

    def encode(self, identity: Identity) -> bytes:
        """Write the moments as an Arrow IPC stream, one row per layer."""
        means, scatters = self._split(self.mean), self._split(self.scatter)
        rows = {
            "layer": list(self.layers),
            "count": self.count,
            "mean": [means[layer] for layer in self.layers],
            "scatter": [scatters[layer] for layer in self.layers],
        }
        metadata = {"schema_version": SCHEMA_VERSION, "kind": KIND, "identity": identity.encode()}
        table = pa.table(rows, schema=_SCHEMA.with_metadata(metadata))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def decode(cls, data: bytes) -> tuple[NormMoments, Identity]:
        """Read a stream of `encode`.

        Raises:
            FedsgcgError: PAY-105 for more than `MAX_LAYERS` layers or `MAX_BYTES`, PAY-107 for
                another version, PAY-106 for any other data.
        """
        try:
            stream = open_bounded(data, MAX_BYTES, "moments of BatchNorm layers")
            metadata = stream.metadata
            _check_metadata(metadata, stream.schema)
            stated = Identity.decode(metadata["identity"])
            if stream.rows > MAX_LAYERS:
                found, expected = f"{stream.rows} layers", f"at most {MAX_LAYERS}"
                raise fail("PAY-105", found=found, expected=expected)
            table = stream.table()
            if any(column.null_count for column in table.columns):
                raise fail("PAY-106", found="missing values", expected="complete rows")
            names, means, scatters = (
                table[name].to_pylist() for name in ("layer", "mean", "scatter")
            )
            layers = {name: len(mean) for name, mean in zip(names, means, strict=True)}
            if len(layers) != len(names):
                raise fail("PAY-106", found="a layer twice", expected="each layer once")
            moments = cls(layers, table["count"].to_numpy(), _joined(means), _joined(scatters))
        except UNREADABLE as error:
            found = f"{len(data)} bytes that are not moments of BatchNorm layers"
            raise fail("PAY-106", found=found, expected="layer, count, mean, scatter") from error
        return moments, stated

    def _by_channel(self, values: Array) -> Array:
        """Repeat a value per layer (L,) for each of its channels (P,)."""
        return np.repeat(values, list(self.layers.values()))

    def _split(self, values: Array) -> dict[str, Array]:
        """Split an array (P,) into the channels of each layer."""
        if not self.layers:
            return {}
        cuts = np.cumsum(list(self.layers.values()))[:-1]
        return dict(zip(self.layers, np.split(values, cuts), strict=True))


def _joined(rows: list[list[Any]]) -> Array:
    return np.concatenate([np.zeros(0), *(np.asarray(row, dtype=np.float64) for row in rows)])


def _check_metadata(metadata: Mapping[str, str], schema: pa.Schema) -> None:
    if metadata.get("kind") != KIND or not schema.equals(_SCHEMA):
        raise fail("PAY-106", found=f"kind {metadata.get('kind')!r}", expected=KIND)
    if (version := metadata.get("schema_version")) != SCHEMA_VERSION:
        action = "install the same fedsgcg release at every site"
        raise fail(
            "PAY-107",
            found=f"version {version}",
            expected=f"version {SCHEMA_VERSION}",
            action=action,
        )
