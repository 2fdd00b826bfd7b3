"""Writes the curves of a study to experiment trackers while it runs.

    events.jsonl, journal, results  ->  follow  ->  points  ->  TensorBoard, MLflow

As with the metrics, the run folders are the queue. Every tracker has a thread of its own, which
reads them and writes what is new: a tracker that is slow, hangs or refuses holds up neither a round
nor another tracker. What a tracker already has is asked from itself, so that a study that resumes
appends and repeats nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from fedsgcg.common.errors import Problem
from fedsgcg.server.telemetry.points import FollowedPoints, Point, Run, hyper_parameters

POLL_S: Final = 1.0
CLOSING_S: Final = 60.0
"""Seconds at the end of a study in which a tracker may write the rest."""

RETRY_S: Final = 10.0
"""Seconds until a tracker that refused is tried again."""

MOST_WAITING: Final = 100_000
"""Points of a federation that wait for a tracker; older ones are dropped and counted."""


class Tracker(Protocol):
    """An experiment tracker; every method may raise any exception, and may take long."""

    name: str

    def open(self, run: Run) -> None:
        """Make a run, or continue it."""

    def key(self, tag: tuple[str, ...]) -> str:
        """Return the tracker's name of a curve, different for different curves."""

    def steps(self, run: Run) -> set[tuple[str, int]]:
        """Return (name, step) of all points of an opened run."""

    def write(self, run: Run, points: Sequence[Point]) -> None:
        """Write points of an opened run."""

    def end(self, run: Run, status: str) -> None:
        """Record how a run ended: `completed`, `degraded` or `failed`."""

    def close(self) -> None:
        """Write everything and free all resources."""


class TrackedRun:
    """One federation and what a tracker has of it.

    Args:
        name: Name of the federation.
        path: Its folder relative to that of the study.
        follower: Reads its folder.
        tree: Its settings.
    """

    def __init__(
        self, name: str, path: str, follower: FollowedPoints, tree: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.dropped = 0
        self._path = path
        self._follower = follower
        self._settings = dict(hyper_parameters(tree))
        self._waiting: deque[Point] = deque(maxlen=MOST_WAITING)
        self._run: Run | None = None
        self._written: set[tuple[str, int]] = set()
        self._ended = ""

    def update(self, tracker: Tracker) -> None:
        """Read what is new and write it; what was not written is kept for the next call."""
        try:
            self._update(tracker)
        except BaseException:
            self._run = None  # opened again, and asked what it has of a write that failed
            raise

    def _update(self, tracker: Tracker) -> None:
        follower = self._follower
        follower.poll()
        if not follower.started:
            return
        self.dropped += max(0, len(self._waiting) + len(follower.points) - MOST_WAITING)
        self._waiting.extend(follower.points)
        follower.points.clear()
        if self._run is None or self._run.started != follower.started:
            chosen = (text.partition("=") for text in follower.chosen.split())
            settings = self._settings | {name: value for name, _, value in chosen}
            run = Run(self.name, self._path, follower.started, settings)
            tracker.open(run)
            self._written, self._ended, self._run = tracker.steps(run), "", run
        fresh: dict[tuple[str, int], Point] = {}
        for point in self._waiting:
            key = (tracker.key(point.tag), point.step)
            if key not in self._written:
                fresh[key] = point
        if fresh:
            tracker.write(self._run, list(fresh.values()))
            self._written |= fresh.keys()
        self._waiting.clear()
        if follower.status != self._ended:
            tracker.end(self._run, follower.status)
            self._ended = follower.status


class Tracking:
    """Writes a study to one tracker, from `start` to `stop`.

    Args:
        make: Makes the tracker; called in the thread, because it may read files or a network.
        name: Name of the tracker, for problems.
        runs: The federations.
        warn: Called with each new problem, from the thread or from `stop`.
        closing_s: Seconds that `stop` waits.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        runs: Sequence[TrackedRun],
        warn: Callable[[Problem], None],
        closing_s: float = CLOSING_S,
    ) -> None:
        self._name = name
        self._make = make
        self._runs = runs
        self._warn = warn
        self._closing_s = closing_s
        self._tracker: Tracker | None = None
        self._refused = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracking {name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Write the rest; a tracker that takes longer than allowed is left behind."""
        self._stop.set()
        self._thread.join(self._closing_s)
        action = "the run folder has everything; the same command with the same tracker adds it"
        if self._thread.is_alive():
            found = f"no answer within {self._closing_s:.0f} s"
            self._warn(Problem("MON-913", where=self._name, found=found, action=action))
        elif dropped := sum(run.dropped for run in self._runs):
            found = f"{dropped} points were dropped"
            self._warn(Problem("MON-913", where=self._name, found=found, action=action))

    def _work(self) -> None:
        tried = -RETRY_S
        while not self._stop.wait(POLL_S):
            if not self._refused or time.monotonic() - tried >= RETRY_S:
                tried = time.monotonic()
                self._update()
        self._update()
        if self._tracker is not None:
            self._guarded(self._tracker.close)

    def _update(self) -> None:
        if self._guarded(self._update_all):
            self._refused = ""

    def _update_all(self) -> None:
        if self._tracker is None:
            self._tracker = self._make()
        for run in self._runs:
            run.update(self._tracker)

    def _guarded(self, work: Callable[[], None]) -> bool:
        """Run something of the tracker's library; report an exception once."""
        try:
            work()
        # Any exception of a tracker's library is a warning: a study is worth more than its curves.
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if not self._refused:
                action = "see what it says; the study goes on, and what is missing is tried again"
                self._warn(Problem("MON-912", where=self._name, found=text, action=action))
            self._refused = text
            return False
        return True


def runs_of(study: Path, cells: Sequence[tuple[str, Path, Mapping[str, Any]]]) -> list[TrackedRun]:
    """Return the federations of a study, for one tracker.

    Args:
        study: Folder of the study.
        cells: Name, folder and settings of each federation.
    """
    return [
        TrackedRun(name, folder.relative_to(study).as_posix(), FollowedPoints(folder), tree)
        for name, folder, tree in cells
    ]
