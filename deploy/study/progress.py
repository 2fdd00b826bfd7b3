"""Live progress of a study on the console, read from the cells' `events.jsonl`.

Because it reads files, it works the same for every runtime: cells may run in this process, in Ray
workers, or on a cluster that shares the run folder. A terminal shows the cells and the hospitals of
the running ones; elsewhere every round is one line.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any, Final

from rich.live import Live

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import CODES
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.progress_view import progress_view, shown
from fedsgcg.server.records.progress import RunProgress, time_left
from fedsgcg.server.records.tail import EventTail

POLL_S: Final = 0.3
UNTIL_MEASURED: Final = 0.5
"""Rounds that evaluation after the last round takes, before a cell has ended."""

LINES: Final = (
    *("round.done", "round.void", "round.screened", "site.paused", "validation.done"),
    *("heldout.done", "observer.done", "run.finished"),
)
"""Events that are a line on a console that cannot redraw."""


@dataclass
class CellState:
    """Displayed state of one cell.

    Attributes:
        cell: The cell.
        status: `waiting`, `running` or the run's final status.
        progress: Rounds, times and hospitals.
        site: Site of the last event that names one.
        code: Error code of the last event that has one.
        loss: Mean training loss of the last round.
        dice: Dice on the source sites' validation cases.
        dice_round: Round of the model of `dice`: sites evaluate the model that they receive.
        heldout_dice: Dice at the held-out site.
        observer_dice: Dice at the last observer.
        round_end: Time of the end of the last round, 0 before.
        closing: Seconds from the last round to the end of the run; NaN before.
        lines: Lines not printed yet.
        events: Events not passed on yet.
    """

    cell: Cell
    status: str = "waiting"
    progress: RunProgress = field(default_factory=RunProgress)
    site: str = ""
    code: str = ""
    loss: float = float("nan")
    dice: float = float("nan")
    dice_round: int = 0
    heldout_dice: float = float("nan")
    observer_dice: float = float("nan")
    round_end: float = 0.0
    closing: float = float("nan")
    lines: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.progress.rounds = int(self.cell.tree["federation"]["rounds"])
        self._tail = EventTail(self.cell.folder)

    @property
    def ended(self) -> bool:
        """Whether the cell's run has ended, successfully or not."""
        return self.status not in ("waiting", "running")

    def read_events(self) -> None:
        """Read the events appended since the last call."""
        for event in self._tail.poll():
            self.take(event)

    def skip_earlier(self) -> None:
        """Read the events of an earlier call, which are neither shown nor measured again."""
        self.read_events()
        self.progress.first = len(self.progress.seconds)
        self.progress.arrivals.clear()
        self.progress.started = 0.0
        self.closing, self.round_end = math.nan, 0.0
        self.status = "waiting"
        self.lines.clear()
        self.events.clear()

    def take(self, event: dict[str, Any]) -> None:
        """Update the state with one event."""
        name = str(event.get("event"))
        self.events.append(event)
        rounds = self.progress.rounds
        self.progress.take(event)
        self.progress.rounds = self.progress.rounds or rounds
        self.site = str(event.get("site", self.site))
        self.code = str(event.get("code", self.code))
        self.loss = _number(event.get("loss"), self.loss)
        self.dice = _number(event.get("validation_dice"), self.dice)
        self.dice_round = int(event.get("validation_round", self.progress.round))
        if name in ("round.done", "round.void"):
            self.round_end = float(event["time"])
        if name == "run.finished":
            self.status = str(event.get("status", "ended"))
            if self.round_end and self.progress.done == self.progress.rounds:
                self.closing = max(0.0, float(event["time"]) - self.round_end)
        elif name == "heldout.done":
            self.heldout_dice = _number(event.get("dice"), self.heldout_dice)
        elif name == "observer.done":
            self.observer_dice = _number(event.get("dice"), self.observer_dice)
        if name != "run.finished":
            self.status = "running"
        if name in LINES:
            self.lines.append(self.line(name))

    def line(self, event: str) -> str:
        """Return the line of an event for consoles that cannot redraw."""
        head = f"{self.cell.name}  round {self.progress.round}/{self.progress.rounds}"
        if event == "round.done":
            head += f"  loss {shown(self.loss)}"
            if self.dice_round:
                head += f"  source-validation Dice of round {self.dice_round} {shown(self.dice)}"
            return head + "".join(f"  {problem}" for problem in self.rejected())
        if event == "round.void":
            return f"{head}  void: too few replies were admitted, the previous model is kept"
        if event in ("round.screened", "site.paused"):
            return f"{head}  {self.site}: {self.code} {CODES.get(self.code, '')}"
        if event == "validation.done":
            return f"{head}  source-validation Dice {shown(self.dice)}"
        if event == "observer.done":
            return f"{head}  observer {self.site}  Dice {shown(self.observer_dice)}"
        if event == "heldout.done":
            return f"{head}  held-out Dice {shown(self.heldout_dice)}"
        return f"{head}  {self.status}"

    def rejected(self) -> list[str]:
        """Return `site: code` for each site whose answer of the last round was not accepted."""
        return [
            f"{name}: {site.code}"
            for name, site in sorted(self.progress.sites.items())
            if site.code and site.last_round == self.progress.round
        ]

    def seconds_left(self, usual: float, closing: float, now: float) -> float:
        """Return the time that the cell still takes.

        Args:
            usual: Seconds of a round.
            closing: Seconds after the last round.
            now: Seconds since 1970.
        """
        progress = self.progress
        left = usual * max(0, progress.rounds - progress.done)
        if progress.started and progress.round > progress.done:  # a round is in progress
            left -= min(usual, max(0.0, now - progress.started))
        return left + closing


class Progress:
    """Context manager that shows the cells' progress until it exits.

    Args:
        cells: The cells of the study.
        console: Where to show it.
        at_once: Number of cells that the runtime runs at the same time.
    """

    def __init__(self, cells: Sequence[Cell], console: Screen, at_once: int = 1) -> None:
        self.console = console
        self.at_once = at_once
        self.states = [CellState(cell) for cell in cells]
        self.started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._live: Live | None = None
        if console.redraws:
            self._live = Live(console=console, auto_refresh=False, transient=True)
        for state in self.states:
            state.skip_earlier()

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        if self._live:
            self._live.stop()

    def time_left(self, now: float | None = None) -> str:
        """Return an estimate of the time left, from the rounds that this call measured.

        A cell takes its own usual time per round (`RunProgress.round_seconds`); one that has not
        measured any takes that of the cells with its method, or of all cells. Cells that wait start
        in their order as soon as one of those that run at the same time has ended. Evaluation after
        the last round takes as long as in the cells that have ended.

        Args:
            now: Seconds since 1970; the default is the machine's clock.
        """
        now = time.time() if now is None else now
        known: dict[str, list[float]] = {}
        for state in self.states:
            if (seconds := state.progress.round_seconds()) is not None:
                known.setdefault(state.cell.method, []).append(seconds)
        if not known:
            return "estimating the time left"
        everything = median([seconds for found in known.values() for seconds in found])
        ends = [state.closing for state in self.states if not math.isnan(state.closing)]
        closing = median(ends) if ends else UNTIL_MEASURED * everything
        running: list[float] = []
        waiting: list[float] = []
        for state in self.states:
            if state.ended:
                continue
            usual = state.progress.round_seconds()
            if usual is None:
                usual = median(known.get(state.cell.method, [everything]))
            left = state.seconds_left(usual, closing, now)
            (running if state.status == "running" else waiting).append(left)
        return time_left(makespan(running, waiting, self.at_once))

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._show()

    def _show(self) -> None:
        for state in self.states:
            state.read_events()
            for event in state.events:
                facts = {name: value for name, value in event.items() if name != "event"}
                self.console.event(str(event.get("event")), cell=state.cell.name, **facts)
            state.events.clear()
            if not self._live:
                for line in state.lines:
                    self.console.print(f"{line}  ({self.time_left()})")
            state.lines.clear()
        if self._live:
            took = time.monotonic() - self.started
            view = progress_view(self.states, self.console, took, self.time_left())
            self._live.update(view, refresh=True)


def makespan(running: Sequence[float], waiting: Sequence[float], at_once: int) -> float:
    """Return when the last of several jobs ends, if each starts as soon as there is room.

    Args:
        running: Time left of the jobs that run, in seconds.
        waiting: Time of the jobs that wait, in the order of their start, in seconds.
        at_once: Number of jobs that run at the same time; at least as many as run now.
    """
    ends = [*running, *[0.0] * (max(1, at_once) - len(running))]
    heapq.heapify(ends)
    for seconds in waiting:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) else otherwise
