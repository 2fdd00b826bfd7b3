"""What a finished cell does not need any more: what it would go on from, and the pictures behind the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

RESUME: Final = ("journal/checkpoint-*.safetensors", "journal/rounds/*.arrow", "sites/*/state/*")
"""Files of a cell that only an unfinished one goes on from; `rounds.parquet` holds the figures of its rounds."""

PICTURES: Final = ("sites/*/pictures.arrow", "sites/*/features.arrow")
"""Files of a cell from which the report draws; without them a report that is made again has no overlays."""


@dataclass(frozen=True)
class Freed:
    """Files that were removed.

    Attributes:
        files: Number of files.
        size: Their bytes.
    """

    files: int = 0
    size: int = 0

    def __add__(self, other: Freed) -> Freed:
        return Freed(self.files + other.files, self.size + other.size)

    def __str__(self) -> str:
        return f"{self.files} files, {self.size / 1e6:.1f} MB"


def is_finished(cell: Path) -> bool:
    """Whether a cell's federation ran to its end and its results are there."""
    try:
        status = json.loads((cell / "outcome.json").read_bytes()).get("status")
    except (OSError, ValueError, AttributeError):
        return False
    return status in ("completed", "degraded") and (cell / "results.parquet").is_file()


def finished_cells(run: Path) -> list[Path]:
    """Folders of the finished cells below a run folder, also of those that chose a setting."""
    return sorted(path.parent for path in run.rglob("outcome.json") if is_finished(path.parent))


def remove(cell: Path, patterns: tuple[str, ...], *, dry_run: bool = False) -> Freed:
    """Remove files of a finished cell.

    Args:
        cell: Its folder.
        patterns: `RESUME` or `PICTURES`.
        dry_run: Only count them.
    """
    freed = Freed()
    for path in sorted(
        path for pattern in patterns for path in cell.glob(pattern) if path.is_file()
    ):
        freed += Freed(1, path.stat().st_size)
        if not dry_run:
            path.unlink()
    return freed
