"""`fedsgcg status`: sites online, current round, late sites, estimated time left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.run_folder import paths
from fedsgcg.deploy.coordinator.control import RunState, control_of
from fedsgcg.deploy.coordinator.project import Kit
from fedsgcg.deploy.coordinator.serve import presence
from fedsgcg.server.sites.departures import departed

LATE_FACTOR: Final = 2.0
"""A site is late after twice its median time, or twice that of all sites in its first round."""

STYLES: Final = {
    "online": "green",
    "offline": "red",
    "never connected": "yellow",
    "not registered": "red",
}


@dataclass
class SiteProgress:
    """Progress of one site, from the run's events.

    Attributes:
        answers: Seconds from the start of a round to the site's answer, for each round.
        last_round: Round of its last answer.
        code: Error code of its last answer, "" when the answer was accepted.
        asked: Whether its answer in the current round is pending.
    """

    answers: list[float] = field(default_factory=list)
    last_round: int = 0
    code: str = ""
    asked: bool = False


@dataclass
class RunProgress:
    """Progress of a run, from its `events.jsonl`.

    Attributes:
        sites: Progress by site.
        round: Current round, or the last one.
        rounds: Rounds of the plan.
        started: Start of the current round (seconds since 1970), 0 before the first.
        seconds: Duration of each completed round.
        ended: Final status, "" while the run is in progress.
        done: Number of completed rounds.
    """

    sites: dict[str, SiteProgress] = field(default_factory=dict)
    round: int = 0
    rounds: int = 0
    started: float = 0.0
    seconds: list[float] = field(default_factory=list)
    ended: str = ""
    done: int = 0

    def take(self, event: dict[str, Any]) -> None:
        """Update the progress with one event."""
        name = str(event.get("event"))
        when = float(event.get("time", 0.0))
        self.round = int(event.get("round", 0))
        self.rounds = int(event.get("rounds", 0))
        if name == "run.started":
            self.ended = ""
            self.done = self.round
            self.started = 0.0
        elif name == "sites.enrolled":
            names = [str(site) for site in event.get("sites", [])]
            self.sites = {site: self.sites.get(site, SiteProgress()) for site in names}
        elif name == "round.started":
            self.started = when
            for progress in self.sites.values():
                progress.asked = True
        elif name == "round.reply":
            self._reply(event, when)
        elif name in ("round.screened", "site.paused"):
            site = str(event.get("site"))
            self.sites.setdefault(site, SiteProgress()).code = str(event.get("code", ""))
        elif name in ("round.done", "round.void"):
            self.seconds.append(when - self.started)
            self.done = self.round
            for progress in self.sites.values():
                progress.asked = False
        elif name == "run.finished":
            self.ended = str(event.get("status"))

    def late(self, now: float) -> list[str]:
        """Return the sites that take much longer in this round than usual."""
        all_answers = [s for progress in self.sites.values() for s in progress.answers]
        if self.ended or not self.started or not all_answers:
            return []
        waited = now - self.started
        return [
            site
            for site, progress in sorted(self.sites.items())
            if progress.asked and waited > LATE_FACTOR * median(progress.answers or all_answers)
        ]

    def left(self) -> str:
        """Return an estimate of the time left, from the last rounds."""
        if self.ended or not self.seconds:
            return ""
        seconds = median(self.seconds[-5:]) * (self.rounds - self.done)
        if seconds >= 90:
            return f"about {seconds / 60:.0f} min left"
        return f"about {seconds:.0f} s left"

    def _reply(self, event: dict[str, Any], when: float) -> None:
        progress = self.sites.setdefault(str(event.get("site")), SiteProgress())
        progress.asked = False
        progress.last_round = self.round
        progress.code = str(event.get("code", ""))
        if event.get("accepted"):
            progress.answers.append(when - self.started)


def read_progress(folder: Path) -> RunProgress:
    """Read the progress of the run in a folder; a partly written last line is ignored."""
    found = RunProgress()
    path = folder / paths.EVENTS
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.take(json.loads(line))
        except ValueError:
            break  # the last line is still being written
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
