"""A limit on how often the server's log repeats a message.

Whoever reaches the public port can cause messages, and the log keeps a few files only. Messages
with the same text before their values are inserted count as one kind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

MOST: Final = 60
"""Messages of one kind in one period."""

PERIOD_S: Final = 60.0
MOST_KINDS: Final = 1000
HEAD: Final = 40
"""Characters of a text that decide its kind, for messages without values to insert."""

MOST_CHARACTERS: Final = 4000
"""Longest message; a longer one is cut."""


class NoiseLimit(logging.Filter):
    """Drops repetitions; the first message of the next period says how many.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._start = clock()
        self._seen: dict[tuple[str, int, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write the message; may append a count of dropped ones to it."""
        kind = (record.name, record.levelno, str(record.msg)[:HEAD])
        with self._lock:
            dropped = self._next_period() if self._clock() - self._start >= PERIOD_S else 0
            if kind not in self._seen and len(self._seen) >= MOST_KINDS:
                kind = ("", 0, "")
            self._seen[kind] = self._seen.get(kind, 0) + 1
            write = self._seen[kind] <= MOST
        text = record.getMessage()
        if dropped or len(text) > MOST_CHARACTERS:
            note = f" ({dropped} repetitions of earlier messages were left out)" if dropped else ""
            record.msg, record.args = text[:MOST_CHARACTERS] + note, ()
        return write

    def _next_period(self) -> int:
        dropped = sum(max(0, count - MOST) for count in self._seen.values())
        self._start = self._clock()
        self._seen.clear()
        return dropped
