"""`fedsgcg status`: sites online, current round, late sites, estimated time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Final

from rich.table import Table
from rich.text import Text

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.coordinator.control import RunState, control_of
from fedsgcg.deploy.coordinator.project import Kit
from fedsgcg.deploy.coordinator.serve import presence
from fedsgcg.server.records.progress import RunProgress, SiteProgress
from fedsgcg.server.records.tail import EventTail
from fedsgcg.server.sites.departures import departed

STYLES: Final = {
    "online": "green",
    "offline": "red",
    "never connected": "yellow",
    "not registered": "red",
}


def read_progress(folder: Path) -> RunProgress:
    """Read the progress of the run in a folder; lines that are no event are ignored."""
    found = RunProgress()
    for event in EventTail(folder).poll():
        found.take(event)
    return found


def status_kit(path: Path, console: Screen) -> int:
    """Show the connected sites and the progress of the run.

    Returns:
        0; 1 when the server does not answer or the last run failed.
    """
    kit = Kit.at(path)
    project = kit.project()
    run = kit.last_run() if kit.last_run_file.exists() else None
    state: RunState | None = None
    statuses: dict[str, str] = {}
    problem = ""
    try:
        with control_of(kit) as control:
            statuses = dict(presence(control.nodes(), project.sites))
            state = control.run(run.run_id) if run else None
    except FedsgcgError as error:
        problem = str(error)
    progress = read_progress(Path(run.folder)) if run else RunProgress()
    console.print(Text.assemble((project.name, "bold"), f" at {project.server}"))
    if problem:
        console.print(problem, style="red")
    gone = departed(Path(run.folder)) if run else {}
    console.print(_table(project.sites, statuses, progress, gone))
    console.print(_summary(run.run_id if run else 0, state, progress))
    if run:
        console.print(f"run folder: {run.folder}")
    return 1 if problem or progress.ended == "failed" else 0


def _table(
    sites: tuple[str, ...],
    statuses: dict[str, str],
    progress: RunProgress,
    gone: Mapping[str, str],
) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("site", "connection", "last answer", "usual time", ""):
        table.add_column(title, justify="right" if title == "usual time" else "left")
    late = progress.late(time.time())
    for site in sites:
        status = statuses.get(site, "unknown")
        line = progress.sites.get(site, SiteProgress())
        if site in gone:
            note = Text(f"left for good on {gone[site][:10]}", style="yellow")
        elif line.code:
            note = Text(line.code, style="red")
        elif site in late:
            note = Text("late", style="yellow")
        else:
            note = Text("working" if line.asked else "", style="cyan")
        answer = f"round {line.last_round}" if line.last_round else "–"
        usual = f"{median(line.answers):.0f} s" if line.answers else "–"
        style = STYLES.get(status, "dim")
        table.add_row(Text(site), Text(status, style=style), answer, usual, note)
    return table


def _summary(run_id: int, state: RunState | None, progress: RunProgress) -> str:
    """Return the progress of the run in one line."""
    if not run_id:
        return "No run has been started: fedsgcg run KIT"
    done, rounds = progress.done, progress.rounds
    if progress.ended:
        return f"run {run_id}: {progress.ended} after {done} of {rounds} rounds"
    if state is not None and state.over:
        text = f"run {run_id}: {state.ending} after {done} of {rounds or '?'} rounds"
        return f"{text}; resume it with fedsgcg resume KIT"
    if not progress.round:
        return f"run {run_id}: waiting for the sites"
    text = f"run {run_id}: round {progress.round} of {rounds}"
    waiting = [site for site, line in sorted(progress.sites.items()) if line.asked]
    if waiting:
        text += f", waiting for {', '.join(waiting)}"
    return f"{text}; {progress.left() or 'estimating the time left'}"
