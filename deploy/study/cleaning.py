"""Removes files that a finished cell does not need: resume state, and pictures for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedsgcg.common.names import number_of
from fedsgcg.common.run_folder import paths

RESUME: Final = (
    *("journal/checkpoint-*.safetensors", "journal/checkpoint-*.seal.json"),
    *("journal/rounds/*.arrow", "sites/*/state/*"),
)
"""Files needed only to resume an unfinished cell; `rounds.parquet` keeps the rounds' metrics."""

PICTURES: Final = ("sites/*/pictures.arrow", "sites/*/features.arrow")
"""Files from which the report draws; without them a rebuilt report has no overlays."""


@dataclass(frozen=True)
class Freed:
    """Files that were removed.

    Attributes:
        files: Number of files.
        size: Their size in bytes.
    """

    files: int = 0
    size: int = 0

    def __add__(self, other: Freed) -> Freed:
        return Freed(self.files + other.files, self.size + other.size)

    def __str__(self) -> str:
        return f"{number_of(self.files, 'file')}, {self.size / 1e6:.1f} MB"


def is_finished(cell: Path) -> bool:
    """Return whether a cell's federation has finished and its results exist."""
    try:
        status = json.loads((cell / paths.OUTCOME).read_bytes()).get("status")
    except (OSError, ValueError, AttributeError):
        return False
    return status in ("completed", "degraded") and (cell / paths.RESULTS).is_file()


def finished_cells(run: Path) -> list[Path]:
    """Return the folders of all finished cells in a run folder, inner cells included."""
    return sorted(path.parent for path in run.rglob(paths.OUTCOME) if is_finished(path.parent))


def remove(cell: Path, patterns: tuple[str, ...], *, dry_run: bool = False) -> Freed:
    """Remove files of a finished cell.

    Args:
        cell: Its folder.
        patterns: `RESUME` or `PICTURES`.
        dry_run: Only count them.
    """
    freed = Freed()
    found = [path for pattern in patterns for path in cell.glob(pattern) if path.is_file()]
    for path in sorted(found):
        freed += Freed(1, path.stat().st_size)
        if not dry_run:
            path.unlink()
    return freed
