"""Live progress of a study on the console, read from the cells' `events.jsonl`.

Because it reads files, it works the same for every runtime: cells may run in this process, in Ray
workers, or on a cluster that shares the run folder.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsgcg.common.console import Screen, least_width
from fedsgcg.common.errors import CODES
from fedsgcg.common.run_folder import paths
from fedsgcg.deploy.study.cell import Cell

POLL_S = 0.3
MOST_CELLS = 16
"""Cells in the progress table."""

STYLES = {"running": "cyan", "completed": "green", "waiting": "dim"}
LEFT_ALIGNED = ("method", "held out", "last site", "")
COLUMNS: Mapping[str, Callable[[CellState], RenderableType]] = {
    "method": lambda state: state.cell.method,
    "held out": lambda state: state.cell.heldout or "–",
    "seed": lambda state: str(state.cell.seed),
    "round": lambda state: f"{state.round}/{state.rounds}" if state.round else "–",
    "last site": lambda state: state.site,
    "loss": lambda state: _show(state.loss),
    "Dice (validation)": lambda state: _show(state.dice),
    "Dice (held out)": lambda state: _show(state.heldout_dice),
    "": lambda state: Text(state.status, style=STYLES.get(state.status, "yellow")),
}
COLUMNS_WHERE_NARROW = {
    title: COLUMNS[title] for title in ("held out", "round", "Dice (held out)", "")
}


@dataclass
class CellState:
    """Displayed state of one cell.

    Attributes:
        cell: The cell.
        position: Number of bytes of events.jsonl already read.
        status: `waiting`, `running` or the run's final status.
        round: Current round, or the last one.
        done: Number of completed rounds.
        rounds: Rounds of the plan.
        site: Site of the last event that names one.
        code: Error code of the last event that has one.
        loss: Mean training loss of the last round.
        dice: Dice on the source sites' validation cases.
        dice_round: Round of the model of `dice`: sites evaluate the model that they receive.
        heldout_dice: Dice at the held-out site.
        observer_dice: Dice at the last observer.
        started: Start of the round in progress (seconds since 1970), 0 before the first.
        durations: Seconds of each round that this call completed.
        lines: Lines not printed yet.
        events: Events not passed on yet.
    """

    cell: Cell
    position: int = 0
    status: str = "waiting"
    round: int = 0
    done: int = 0
    rounds: int = 0
    site: str = ""
    code: str = ""
    loss: float = float("nan")
    dice: float = float("nan")
    dice_round: int = 0
    heldout_dice: float = float("nan")
    observer_dice: float = float("nan")
    started: float = 0.0
    durations: list[float] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the cell's run has ended, successfully or not."""
        return self.status not in ("waiting", "running")

    def read_events(self) -> None:
        """Read the events appended since the last call."""
        try:
            with (self.cell.folder / paths.EVENTS).open("rb") as file:
                file.seek(self.position)
                complete, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self.position += len(complete + newline)
        for line in complete.splitlines():
            self.take(json.loads(line))

    def take(self, event: dict[str, Any]) -> None:
        """Update the state with one event."""
        name = event["event"]
        self.events.append(event)
        self.rounds = int(event.get("rounds", self.rounds))
        self.round = int(event.get("round", self.round))
        if name == "round.started":
            self.started = _number(event.get("time"), 0.0)
        if name in ("run.started", "round.done", "round.void"):
            self.done = self.round
        if name in ("round.done", "round.void") and self.started:
            self.durations.append(max(0.0, _number(event.get("time"), 0.0) - self.started))
            self.started = 0.0
        self.site = str(event.get("site", self.site))
        self.code = str(event.get("code", self.code))
        self.loss = _number(event.get("loss"), self.loss)
        self.dice = _number(event.get("validation_dice"), self.dice)
        self.dice_round = int(event.get("validation_round", self.round))
        if name == "run.finished":
            self.status = str(event.get("status", "ended"))
        elif name == "heldout.done":
            self.heldout_dice = _number(event.get("dice"), self.heldout_dice)
        elif name == "observer.done":
            self.observer_dice = _number(event.get("dice"), self.observer_dice)
        else:
            self.status = "running"
        if name in (
            *("round.done", "round.void", "round.screened", "site.paused"),
            "validation.done",
            "heldout.done",
            "observer.done",
            "run.finished",
        ):
            self.lines.append(self.line(name))

    def line(self, event: str) -> str:
        """Return the line of an event for consoles that cannot redraw."""
        head = f"{self.cell.name}  round {self.round}/{self.rounds}"
        if event == "round.done":
            head += f"  loss {_show(self.loss)}"
            if not self.dice_round:
                return head
            return f"{head}  source-validation Dice of round {self.dice_round} {_show(self.dice)}"
        if event == "round.void":
            return f"{head}  void: too few replies were admitted, the previous model is kept"
        if event in ("round.screened", "site.paused"):
            return f"{head}  {self.site}: {self.code} {CODES.get(self.code, '')}"
        if event == "validation.done":
            return f"{head}  source-validation Dice {_show(self.dice)}"
        if event == "observer.done":
            return f"{head}  observer {self.site}  Dice {_show(self.observer_dice)}"
        if event == "heldout.done":
            return f"{head}  held-out Dice {_show(self.heldout_dice)}"
        return f"{head}  {self.status}"


class Progress:
    """Context manager that shows the cells' progress until it exits."""

    def __init__(self, cells: Sequence[Cell], console: Screen) -> None:
        self.console = console
        self.states = [
            CellState(cell, rounds=int(cell.tree["federation"]["rounds"])) for cell in cells
        ]
        self.started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._live: Live | None = None
        if self._redraws(console):
            self._live = Live(console=console, auto_refresh=False, transient=True)
        for state in self.states:  # events of an earlier call are not shown again
            state.read_events()
            state.durations.clear()
            state.started = 0.0
            state.status = "waiting"
            state.lines.clear()
            state.events.clear()

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

    @staticmethod
    def _redraws(console: Screen) -> bool:
        return console.is_terminal and not console.only_problems

    def time_left(self) -> str:
        """Return an estimate of the time left, from the rounds of all cells in this call.

        It is the median duration of a round times the rounds that are left, divided by the cells
        that run at the same time. The start of Ray and the reading of the data, which happen once,
        do not count.
        """
        durations = [seconds for state in self.states for seconds in state.durations]
        left = sum(max(0, state.rounds - state.done) for state in self.states if not state.ended)
        if not durations:
            return "estimating the time left"
        at_once = max(1, sum(state.status == "running" for state in self.states))
        seconds = median(durations) * left / at_once
        if seconds >= 90:
            return f"about {seconds / 60:.0f} min left"
        return f"about {seconds:.0f} s left"

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._show()

    def _show(self) -> None:
        for state in self.states:
            state.read_events()
            for event in state.events:
                self.console.event(
                    event["event"],
                    cell=state.cell.name,
                    **{k: v for k, v in event.items() if k != "event"},
                )
            state.events.clear()
            if not self._live:
                for line in state.lines:
                    self.console.print(f"{line}  ({self.time_left()})")
            state.lines.clear()
        if self._live:
            self._live.update(self._render(), refresh=True)

    def _render(self) -> RenderableType:
        rounds = sum(state.rounds for state in self.states) or 1
        done = sum(state.done for state in self.states)
        finished = sum(state.ended for state in self.states)
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        head = Text(
            f"{finished} of {len(self.states)} cells done · {minutes}:{seconds:02d} · "
            f"{self.time_left()}"
        )
        # Running cells come first; a study may have hundreds of cells, so the list is limited.
        order = {"running": 0, "waiting": 2}
        states = sorted(self.states, key=lambda state: order.get(state.status, 1))[:MOST_CELLS]
        table = _table(states, COLUMNS)
        if least_width(self.console, table) > self.console.width:
            table = _table(states, COLUMNS_WHERE_NARROW)
        bar = Table.grid()
        bar.add_row(ProgressBar(total=rounds, completed=done, width=60))
        return Group(head, bar, table)


def _table(
    states: Sequence[CellState], columns: Mapping[str, Callable[[CellState], RenderableType]]
) -> Table:
    """Return a table with one line per cell."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in columns:
        table.add_column(title, justify="left" if title in LEFT_ALIGNED else "right")
    for state in states:
        table.add_row(*(show(state) for show in columns.values()))
    return table


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) else otherwise


def _show(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
