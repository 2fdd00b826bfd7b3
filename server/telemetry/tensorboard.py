"""Curves for TensorBoard: `tensorboard --logdir FOLDER` (extra `tensorboard`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsgcg.server.telemetry.points import SEPARATOR, Point, Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PREFIX = "events.out.tfevents."
SETTINGS = "settings/text_summary"


class TensorBoard:
    """Writes event files, one folder for each federation.

    Args:
        folder: Folder of the event files.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}

    def open(self, run: Run) -> None:
        """Remove event files of an earlier run in the same folder, and open a new file."""
        from torch.utils.tensorboard import SummaryWriter

        if old := self._writers.pop(run.folder, None):
            with suppress(OSError, RuntimeError):
                old.close()
        folder = self._folder / run.folder
        for path in folder.glob(f"{PREFIX}*"):
            if any(time < run.started for _, _, time in _points(path)):
                path.unlink()
        known = self.steps(run)
        writer = SummaryWriter(log_dir=str(folder))
        self._writers[run.folder] = writer
        if (SETTINGS, 0) not in known:
            text = json.dumps(run.settings, indent=1, sort_keys=True)
            block = "\n".join(f"    {line}" for line in text.splitlines())
            writer.add_text("settings", block, 0, walltime=run.started)

    def key(self, tag: tuple[str, ...]) -> str:
        """Return the parts with slashes; a slash in a name is written as `%2F`."""
        return SEPARATOR.join(part.replace("%", "%25").replace("/", "%2F") for part in tag)

    def steps(self, run: Run) -> set[tuple[str, int]]:
        """Read the run's event files."""
        files = (self._folder / run.folder).glob(f"{PREFIX}*")
        return {(tag, step) for path in files for tag, step, _ in _points(path)}

    def write(self, run: Run, points: Sequence[Point]) -> None:
        """Write points and flush, so that the browser shows them and a full disk is noticed."""
        writer = self._writers[run.folder]
        for point in points:
            writer.add_scalar(self.key(point.tag), point.value, point.step, walltime=point.time)
        writer.flush()

    def end(self, run: Run, status: str) -> None:
        """Write the table of hyper-parameters with the final figures."""
        if status in ("completed", "degraded"):
            from torch.utils.tensorboard.summary import hparams

            writer = self._writers[run.folder]
            known = {tag for tag, _ in self.steps(run)}
            if any(tag.startswith("_hparams_/") for tag in known):
                return
            final = {tag: math.nan for tag in known if tag.startswith("final/")}
            summaries = hparams(dict(run.settings), final)  # type: ignore[no-untyped-call]
            for summary in summaries:
                writer._get_file_writer().add_summary(summary, 0)  # type: ignore[no-untyped-call]
            writer.flush()

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()


def _points(path: Path) -> Iterator[tuple[str, int, float]]:
    """Yield (tag, step, time) of the points of an event file; a torn end is left out."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    event: Any
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            yield str(value.tag), int(event.step), float(event.wall_time)
