"""What a terminal shows of a study: a bar, the cells, and the hospitals of those that run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Final, TypeVar

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsgcg.common.console import UNSEEN, Screen, least_width

if TYPE_CHECKING:
    from fedsgcg.deploy.study.progress import CellState

Row = TypeVar("Row")
Columns = Mapping[str, Callable[[Row], RenderableType]]

MOST_CELLS: Final = 16
"""Cells in the table."""

FEWEST_ROWS: Final = 3
"""Rows of each table on a terminal that is too low for all."""

AROUND: Final = 6
"""Lines of a terminal that are not rows: summary, bar, titles, prompt."""

NAME_COLUMNS: Final = (None, 24, 16)
"""Columns to which names are cut when a table is wider than the terminal; None = not at all."""

SHORTEST_NAME: Final = 8

BAR_COLUMNS: Final = 60

STYLES: Final = {"running": "cyan", "completed": "green", "waiting": "dim"}
LEFT_ALIGNED: Final = ("method", "held out", "hospital", "")


class Line:
    """One hospital of a running cell.

    Args:
        state: The cell.
        site: The hospital.
        now: Seconds since 1970.
    """

    def __init__(self, state: CellState, site: str, now: float) -> None:
        self.state = state
        self.name = site
        self.site = state.progress.sites[site]
        self._now = now

    @property
    def doing(self) -> Text:
        """What the hospital does, or what became of its last answer."""
        progress, site = self.state.progress, self.site
        if self.name == self.state.cell.heldout:
            return Text("held out", style="dim")
        if self.name not in progress.training:
            return Text("observes", style="dim")
        if site.paused_until >= progress.round > 0:
            return Text(f"paused to round {site.paused_until}", style="yellow")
        if site.asked and progress.started:
            waited = f"{max(0.0, self._now - progress.started):.0f} s"
            if self.name in progress.late(self._now):
                return Text(f"late, {waited}", style="yellow")
            return Text(f"working, {waited}", style="cyan")
        if site.code:
            return Text(site.code, style="red")
        return Text("answered" if site.last_round else "joined", style="green")


def _round(state: CellState) -> str:
    progress = state.progress
    return f"{progress.round}/{progress.rounds}" if progress.round else "–"


CELLS: Columns[CellState] = {
    "method": lambda state: state.cell.method,
    "held out": lambda state: state.cell.heldout or "–",
    "seed": lambda state: str(state.cell.seed),
    "round": _round,
    "loss": lambda state: shown(state.loss),
    "Dice (validation)": lambda state: shown(state.dice),
    "Dice (held out)": lambda state: shown(state.heldout_dice),
    "": lambda state: Text(state.status, style=STYLES.get(state.status, "yellow")),
}
HOSPITALS: Columns[Line] = {
    "hospital": lambda line: line.name,
    "": lambda line: line.doing,
    "trains for": lambda line: _seconds(line.site.seconds),
    "loss": lambda line: shown(line.site.loss),
    "Dice (validation)": lambda line: shown(line.site.dice),
}


def _without(columns: Columns[Row], *titles: str) -> Columns[Row]:
    return {title: show for title, show in columns.items() if title not in titles}


CELL_COLUMNS: Final = (
    CELLS,
    _without(CELLS, "loss", "seed"),
    _without(CELLS, "loss", "seed", "Dice (validation)"),
    _without(CELLS, "loss", "seed", "Dice (validation)", "Dice (held out)"),
    _without(CELLS, "method", "loss", "seed", "Dice (validation)", "Dice (held out)"),
)
"""Columns of the cells, from the widest terminal to the narrowest."""

HOSPITAL_COLUMNS: Final = (
    HOSPITALS,
    _without(HOSPITALS, "Dice (validation)"),
    _without(HOSPITALS, "Dice (validation)", "trains for"),
    _without(HOSPITALS, "Dice (validation)", "trains for", "loss"),
)
"""Columns of the hospitals, likewise."""


def progress_view(
    states: Sequence[CellState], console: Screen, took: float, left: str
) -> RenderableType:
    """Return what the terminal shows, in its width and height.

    Args:
        states: The cells.
        console: The terminal.
        took: Seconds since the start.
        left: Time left, as text.
    """
    rounds = sum(state.progress.rounds for state in states) or 1
    done = sum(state.progress.done for state in states)
    finished = sum(state.ended for state in states)
    minutes, seconds = divmod(int(took), 60)
    facts = (f"{finished} of {len(states)} cells done", f"{minutes}:{seconds:02d}", left)
    line = " · ".join(facts)
    head = Text(line if cell_len(line) <= console.width else "\n".join(facts))
    bar = Table.grid()
    bar.add_row(
        ProgressBar(total=rounds, completed=done, width=min(BAR_COLUMNS, console.width - 1))
    )
    # Running cells come first; a study may have hundreds of cells, so the list is limited.
    order = {"running": 0, "waiting": 2}
    ordered = sorted(states, key=lambda state: order.get(state.status, 1))
    now = time.time()
    running = [state for state in ordered if state.status == "running" and state.progress.sites]
    wanted = sum(len(state.progress.sites) + 1 for state in running)
    room = console.height - AROUND
    cells = max(FEWEST_ROWS, min(MOST_CELLS, room - min(wanted, room // 2)))
    parts: list[RenderableType] = [head, bar, _fitting(ordered[:cells], CELL_COLUMNS, console)]
    left_over = max(FEWEST_ROWS, room - min(cells, len(ordered)))
    for state in running:
        lines = [Line(state, site, now) for site in sorted(state.progress.sites)]
        if len(running) > 1:
            name = Text(state.cell.name.translate(UNSEEN), style="bold")
            name.truncate(console.width, overflow="ellipsis")
            parts.append(name)
        parts.append(_fitting(lines[:left_over], HOSPITAL_COLUMNS, console))
        left_over -= len(lines) + 2
        if left_over < FEWEST_ROWS:
            break
    return Group(*parts)


def _fitting(rows: Sequence[Row], choices: Sequence[Columns[Row]], console: Screen) -> Table:
    """Return the table with the most columns that fits, with names that are cut if need be."""
    for columns, longest in (*product(choices, NAME_COLUMNS), (choices[-1], SHORTEST_NAME)):
        table = _table(rows, columns, longest)
        if least_width(console, table) <= console.width:
            break
    return table


def _table(rows: Sequence[Row], columns: Columns[Row], longest: int | None = None) -> Table:
    """Return a table with one line per row; longer cells than `longest` are cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in columns:
        align = "left" if title in LEFT_ALIGNED else "right"
        table.add_column(title, justify=align, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(_cut(show(row), longest) for show in columns.values()))
    return table


def _cut(cell: RenderableType, longest: int | None) -> RenderableType:
    if not isinstance(cell, str):
        return cell
    text = Text(cell.translate(UNSEEN))
    if longest is not None:
        text.truncate(longest, overflow="ellipsis")
    return text


def _seconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f} s"


def shown(value: float) -> str:
    """Return a figure with three decimals, a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"
