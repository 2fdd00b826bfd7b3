"""Reads the files of a study folder and collects those that are damaged.

Pictures, sampled features and ledgers are stored at the sites; they are read only if the site's
folder is on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.feature_samples import FeatureSamples, read_feature_samples
from fedsgcg.common.files.seals import broken_seal
from fedsgcg.common.settings.adaptation import WAYS
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import decode_statistics
from fedsgcg.server.report.tables import STATED, Row

Tree = dict[str, Any]
SHOWN = {"loss", "loss_supervised", "validation_dice", "heldout_dice", "heldout_asd", "bytes_up"}
SHOWN |= {"heldout_asd_left_out", *STATED}
SHOWN |= {"site_distance", "between_site_trace", "within_site_trace", "micro_batches"}
SHOWN |= {"seconds", "steps", "epsilon"}
SHOWN |= {"between_site_trace_evaluation", "within_site_trace_evaluation"}
SHOWN |= {f"adapted_dice_{way}" for way in WAYS}


@dataclass(frozen=True)
class Picture:
    """One slice of one case, with truth and prediction.

    Attributes:
        case: Alias of the case.
        dice: Dice of the case, mean over structures.
        z: Slice number.
        image: (H, W) uint8; (H, W, 3) in colour.
        truth: (H, W) uint8, bit s set where structure s is true.
        prediction: (H, W) uint8, likewise.
        structures: Names of the bits.
    """

    case: str
    dice: float
    z: int
    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.uint8]
    prediction: npt.NDArray[np.uint8]
    structures: tuple[str, ...]


class Reader:
    """Reads files and collects the problems of damaged ones (`problems`)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []

    def tree(self, path: Path) -> Tree:
        """Return a YAML or JSON mapping, {} if absent or damaged."""
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
            tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        except (OSError, ValueError, yaml.YAMLError):
            tree = None
        if not isinstance(tree, dict):
            self._damaged(path)
            return {}
        return tree

    def rows(self, path: Path, columns: Sequence[str]) -> list[Row]:
        """Return the rows of a Parquet file, [] if absent, damaged or without the columns."""
        if not path.is_file():
            return []
        try:
            table = pq.ParquetFile(path).read()
        except (OSError, pa.ArrowException):
            self._damaged(path)
            return []
        if missing := sorted(set(columns) - set(table.column_names)):
            self._damaged(path, f"no column {', '.join(missing)}")
            return []
        if "metric" in columns:  # a long study records more than the page shows
            table = table.filter(pc.is_in(table["metric"], pa.array(sorted(SHOWN))))
        return list(table.to_pylist())

    def lines(self, path: Path) -> list[Tree]:
        """Return the JSON objects of a file, one per line; incomplete lines are skipped."""
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError:
            self._damaged(path)
            return []
        return list(_objects(text))

    def pictures(self, path: Path) -> list[Picture]:
        """Return the pictures stored by a site, [] if they are not on this machine."""
        if not path.is_file():
            return []
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            names = _structure_names(table.schema.metadata)
            return [_picture(row, names) for row in table.to_pylist()]
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            self._damaged(path)
            return []

    def features(self, path: Path) -> FeatureSamples | None:
        """Return the pixel features stored by a site, None if they are not on this machine."""
        if not path.is_file():
            return None
        try:
            return read_feature_samples(path)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            self._damaged(path)
            return None

    def prototypes(self, path: Path) -> ClassStatistics | None:
        """Return the global class statistics of a cell, None if it has none."""
        if not path.is_file():
            return None
        try:
            return decode_statistics(path.read_bytes())[0]
        except (OSError, ValueError, FedsgcgError):
            self._damaged(path)
            return None

    def note_damaged(self, path: Path) -> None:
        """Note a file that cannot be read (SRV-402)."""
        self._damaged(path)

    def check_seal(self, folder: Path, names: Sequence[str]) -> None:
        """Note every file of a folder that is not the one of its seal (SRV-403)."""
        for name, found in broken_seal(folder, names).items():
            self._damaged(folder / name, found, "SRV-403", "restore the file, or run it again")

    def _damaged(
        self,
        path: Path,
        found: str = "a file that cannot be read",
        code: str = "SRV-402",
        action: str = "run the study again: it recreates what is missing",
    ) -> None:
        where = (
            path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name
        )
        problem = Problem(code, found=found, action=action, where=where)
        if problem not in self.problems:
            self.problems.append(problem)


def _objects(text: str) -> Iterator[Tree]:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _structure_names(metadata: Mapping[bytes, bytes] | None) -> tuple[str, ...]:
    return tuple(str(name) for name in json.loads((metadata or {}).get(b"structures", b"[]")))


def _picture(row: Row, names: tuple[str, ...]) -> Picture:
    shape = int(row["height"]), int(row["width"])
    truth, prediction = (
        np.frombuffer(row[name], np.uint8).reshape(shape) for name in ("truth_mask", "prediction")
    )
    # Pictures of older studies are grey and do not have the column.
    colours = shape if int(row.get("channels") or 1) == 1 else (*shape, 3)
    image = np.frombuffer(row["image"], np.uint8).reshape(colours)
    return Picture(
        str(row["case"]), float(row["dice"]), int(row["z"]), image, truth, prediction, names
    )
