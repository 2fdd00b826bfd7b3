"""A sample of one site's pixel features, as an Arrow file that stays at the site.

Unlike class statistics, pixel features describe single pixels of single patients, so they are never
sent. They are written on request, for the t-SNE of a simulation's report.

Legend: N sampled pixels, A feature channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.common.errors import fail
from fedsgcg.common.files.atomic import replaced

FILE: Final = "features.arrow"
KIND: Final = "fedsgcg.feature_samples"
SCHEMA_VERSION: Final = "1"
PIXELS_A_CLASS: Final = 300
"""Most pixels of one class that a site writes: enough for a plot, too few to copy its data."""
MAX_FEATURES: Final = 4096
MAX_PIXELS: Final = 100_000


@dataclass(frozen=True, eq=False)
class FeatureSamples:
    """Features of sampled pixels.

    Attributes:
        features: (N, A) float32, in the representation that the method contrasts.
        classes: (N,) int64 true class indices.
        site: The site whose pixels they are.
        method: Label of the trained method, or "".
    """

    features: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    site: str
    method: str = ""


def sample_pixels(
    classes: npt.NDArray[np.int64], rng: np.random.Generator, most: int = PIXELS_A_CLASS
) -> npt.NDArray[np.int64]:
    """Choose at most `most` pixels of every class, without replacement.

    Args:
        classes: (N,) class indices; negative ones and 255 (ignore) are never chosen.
        rng: Source of randomness.
        most: Most pixels of one class.

    Returns:
        Indices into `classes`, ascending.
    """
    chosen = []
    for label in np.unique(classes[(classes >= 0) & (classes != 255)]):
        members = np.flatnonzero(classes == label)
        chosen.append(rng.choice(members, min(most, members.size), replace=False))
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def write_feature_samples(
    path: Path, features: npt.ArrayLike, classes: npt.ArrayLike, site: str, method: str = ""
) -> None:
    """Write sampled features atomically as an Arrow IPC file.

    Args:
        path: File, `sites/<site>/features.arrow` of a cell.
        features: (N, A) floats.
        classes: (N,) class indices.
        site: Name of the site.
        method: Label of the trained method.

    Raises:
        ValueError: Shapes that do not match, or features that are not finite.
        FedsgcgError: SITE-501 if the site's folder cannot be written.
    """
    rows = np.ascontiguousarray(features, dtype=np.float32)
    labels = np.asarray(classes, dtype=np.int64)
    if rows.ndim != 2 or labels.shape != rows.shape[:1] or not 0 < rows.shape[1] <= MAX_FEATURES:
        raise ValueError(
            f"features: found {rows.shape} with classes {labels.shape}, expected (N, A) and (N,)"
        )
    if not np.isfinite(rows).all():
        raise ValueError("features: found values that are not finite, expected finite ones")
    schema = _schema(rows.shape[1]).with_metadata(
        {"kind": KIND, "schema_version": SCHEMA_VERSION, "site": site, "method": method}
    )
    columns = [
        pa.array(labels),
        pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1]),
    ]
    try:
        with (
            replaced(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_batch(pa.record_batch(columns, schema=schema))
    except OSError as error:
        raise fail(
            "SITE-501",
            where=str(path),
            found=str(error),
            expected="a site folder that can be written",
        ) from error


def read_feature_samples(path: Path) -> FeatureSamples:
    """Read a file of `write_feature_samples`.

    Raises:
        ValueError: Another kind, version or layout, or features that are not finite.
        OSError: The file cannot be read.
        pa.ArrowException: The file is not an Arrow file.
    """
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)  # reading alone does not check offsets and lengths
        metadata = {
            key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()
        }
        _check(table, metadata)
        width = table.schema.field("features").type.list_size
        flat = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        features = np.array(flat, dtype=np.float32).reshape(-1, width)
        classes = np.array(table["class"].to_numpy(), dtype=np.int64)
    if not np.isfinite(features).all():
        raise ValueError("feature samples: found values that are not finite")
    return FeatureSamples(features, classes, metadata.get("site", ""), metadata.get("method", ""))


def _schema(num_features: int) -> pa.Schema:
    return pa.schema(
        [pa.field("class", pa.int64()), pa.field("features", pa.list_(pa.float32(), num_features))]
    )


def _check(table: pa.Table, metadata: dict[str, str]) -> None:
    kind = metadata.get("kind")
    version = metadata.get("schema_version")
    if (kind, version) != (KIND, SCHEMA_VERSION):
        raise ValueError(
            f"feature samples: found kind {kind!r} {version}, expected {KIND} {SCHEMA_VERSION}"
        )
    width = 0
    if "features" in table.column_names:
        width = getattr(table.schema.field("features").type, "list_size", 0)
    if not 0 < width <= MAX_FEATURES or not table.schema.remove_metadata().equals(_schema(width)):
        raise ValueError(
            f"feature samples: found columns {table.column_names}, expected class and features"
        )
    if table.num_rows > MAX_PIXELS or any(column.null_count for column in table.columns):
        raise ValueError(
            f"feature samples: found {table.num_rows} rows, "
            f"expected at most {MAX_PIXELS} without missing values"
        )
