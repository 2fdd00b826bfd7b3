"""Reads what was appended to the event log of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.run_folder import paths

LONGEST_LINE: Final = 1 << 20
"""Bytes of a line of an event log; longer ones are counted as unreadable."""

CHUNK: Final = 1 << 24
"""Bytes of an event log that are read at a time."""


class EventTail:
    """The end of the event log of a run folder.

    Args:
        folder: The run folder; it need not exist yet.

    Attributes:
        unreadable: Number of lines that are no event.
        files: Number of log files read so far: more than 1 after the log was replaced, for example
            by a study that was run again.
    """

    def __init__(self, folder: Path) -> None:
        self.unreadable = 0
        self.files = 0
        self._path = folder / paths.EVENTS
        self._position = 0
        self._identity = (0, 0)

    def poll(self) -> Iterator[dict[str, Any]]:
        """Yield the events that were appended since the last call."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                identity = (facts.st_dev, facts.st_ino)
                if identity != self._identity or facts.st_size < self._position:
                    self._identity, self._position = identity, 0
                    self.files += 1
                file.seek(self._position)
                while data := file.read(CHUNK):
                    complete, newline, rest = data.rpartition(b"\n")
                    if not newline and len(rest) < CHUNK:
                        return
                    taken = complete + newline if newline else rest
                    self._position += len(taken)
                    file.seek(self._position)
                    yield from self._parsed(taken)
        except OSError:
            return  # the folder was moved or its disk is away; it may come back

    def _parsed(self, data: bytes) -> Iterator[dict[str, Any]]:
        for line in data.splitlines():
            try:
                if len(line) > LONGEST_LINE:
                    raise ValueError
                event = json.loads(line)
                if not isinstance(event, dict):
                    raise ValueError
                int(event.get("round", 0)), int(event.get("rounds", 0)), float(event["time"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                self.unreadable += 1
            else:
                yield event
