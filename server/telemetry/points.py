"""Turns a run folder into curves: settings once, points by round, final figures by hospital."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any, Final

from fedsgcg.server.telemetry.follow import FollowedRun

SEPARATOR: Final = "/"
HIDDEN: Final = ("site", "output", "run", "shard", "config_dir", "data.root")
"""Settings that are not shown: places on this machine."""


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes:
        tag: Name of the curve: parts of a name, `("train", "loss", "Hospital A")`.
        step: Round.
        value: Value.
        time: Seconds since 1970.
    """

    tag: tuple[str, ...]
    step: int
    value: float
    time: float


@dataclass(frozen=True)
class Run:
    """What a tracker shows of a federation besides its curves.

    Attributes:
        name: Name of the federation.
        folder: Folder relative to that of the study, with `/`.
        started: Time of the first event, which tells a run from an earlier one in its folder.
        settings: Hyper-parameters, by the name of the setting.
    """

    name: str
    folder: str
    started: float
    settings: Mapping[str, Any]


class FollowedPoints(FollowedRun):
    """Collects the points of one run folder.

    Attributes:
        started: Time of the first event, 0 before.
        points: Points that nobody has taken yet.
        status: Final status, "" before.
        chosen: Settings that the source hospitals chose, `name=value` with spaces in between.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.started = 0.0
        self.points: list[Point] = []
        self.status = ""
        self.chosen = ""
        self._time = 0.0
        self._round = 0

    def restart(self) -> None:
        """Start with no point."""
        self.started, self.points, self.status, self._round = 0.0, [], "", 0
        self.chosen = ""

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        name = event.get("event")
        self._time = float(event["time"])
        self._round = max(self._round, int(event.get("round", 0)))
        self.started = self.started or self._time
        self.chosen = str(event.get("chosen", self.chosen))
        if name == "round.done":
            self._add(("mean", "loss"), self._round, event.get("loss"))
            received = int(event.get("validation_round", 0))
            self._add(("mean", "validation_dice"), received, event.get("validation_dice"))
        elif name == "validation.done":
            self._add(("mean", "validation_dice"), self._round, event.get("validation_dice"))
        self.status = str(event.get("status")) if name == "run.finished" else ""

    def take_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the rows of rounds."""
        for row in rows:
            parts = (row["phase"], row["metric"], row["cls"], row["site"])
            self._add(tuple(str(part) for part in parts if part), int(row["round"]), row["value"])

    def take_results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the results."""
        found: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for row in rows:
            if row["dice"] is not None:
                found["final", "dice", str(row["structure"]), str(row["site"])].append(row["dice"])
        for tag, values in found.items():
            self._add(tag, self._round, fsum(values) / len(values))

    def _add(self, tag: tuple[str, ...], step: int, value: object) -> None:
        if isinstance(value, (int, float)):
            self.points.append(Point(tag, step, float(value), self._time))


def hyper_parameters(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the settings of a federation without places on this machine."""
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if full in HIDDEN:
            continue
        if isinstance(value, Mapping) and value:
            yield from hyper_parameters(value, f"{full}.")
        elif isinstance(value, (bool, int, float, str)):
            yield full, value
        else:
            yield full, str(value)
