"""The events of a run, one JSON line each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsgcg.common.files.disk import refusals
from fedsgcg.common.run_folder import paths
from fedsgcg.common.run_folder.tables import cell_of
from fedsgcg.common.settings.plan import Plan
from fedsgcg.server.records.results import _finite

OnEvent = Callable[[dict[str, Any]], None]


def ignore_event(event: dict[str, Any]) -> None:
    """Ignore an event; the default listener."""


class EventLog:
    """Appends events to `events.jsonl`, flushing every line, and passes them to a listener.

    Args:
        plan: The plan; every event contains its method, held-out site, seed and number of rounds.
        on_event: The listener.
    """

    def __init__(self, plan: Plan, on_event: OnEvent = ignore_event) -> None:
        self.round = 0
        self._path = Path(plan.output) / paths.EVENTS
        self._fixed = cell_of(plan) | {"rounds": plan.federation.rounds}
        self._on_event = on_event

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event of the current `round`; NaN and infinity become null. Raises SRV-401."""
        found = {
            "time": round(time.time(), 3),
            "event": event,
            **self._fixed,
            "round": self.round,
            **fields,
        }
        found = {name: _finite(value) for name, value in found.items()}
        with refusals(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        self._on_event(found)
