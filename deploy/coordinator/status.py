"""`fedsgcg status`: who is there, which round, who is late, how long it will take."""

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

from common.console import Screen
from common.errors import FedsgcgError
from deploy.coordinator.control import RunState, control_of
from deploy.coordinator.last_run import last_started
from deploy.coordinator.project import Kit
from deploy.coordinator.serve import presence
from server.sites.departures import departed

LATE_FACTOR: Final = 2.0
"""A site is late when it has taken twice its own usual time, or the others' in its first round."""

STYLES: Final = {
    "online": "green",
    "offline": "red",
    "never came": "yellow",
    "not registered": "red",
}


@dataclass
class SiteLine:
    """What the run's events say of one site.

    Attributes:
        answers: Seconds from the start of a round to its answer, round by round.
        last_round: Round of its last answer.
        code: Code of its last answer, "" when it was accepted.
        asked: Whether it has been asked in the round under way and has not answered.
    """

    answers: list[float] = field(default_factory=list)
    last_round: int = 0
    code: str = ""
    asked: bool = False


@dataclass
class Standing:
    """Where a run stands, read from its `events.jsonl`.

    Attributes:
        sites: Lines by site.
        round: Round under way, or the last.
        rounds: Rounds of the plan.
        started: When the round under way began (seconds since 1970), 0 before the first.
        seconds: Duration of each done round.
        ended: Status at the end, "" while it runs.
        done: Rounds that count.
    """

    sites: dict[str, SiteLine] = field(default_factory=dict)
    round: int = 0
    rounds: int = 0
    started: float = 0.0
    seconds: list[float] = field(default_factory=list)
    ended: str = ""
    done: int = 0

    def take(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        name, when = str(event.get("event")), float(event.get("time", 0.0))
        self.round, self.rounds = int(event.get("round", 0)), int(event.get("rounds", 0))
        if name == "run.started":
            self.ended, self.done, self.started = "", self.round, 0.0
        elif name == "sites.enrolled":
            self.sites = {
                str(site): self.sites.get(str(site), SiteLine()) for site in event.get("sites", [])
            }
        elif name == "round.started":
            self.started = when
            for line in self.sites.values():
                line.asked = True
        elif name == "round.reply":
            self._reply(event, when)
        elif name == "round.done":
            self.seconds.append(when - self.started)
            self.done = self.round
            for line in self.sites.values():
                line.asked = False
        elif name == "run.finished":
            self.ended = str(event.get("status"))

    def late(self, now: float) -> list[str]:
        """Sites that take much longer in this round than they, or the others, usually do."""
        usual_of_all = [seconds for line in self.sites.values() for seconds in line.answers]
        if self.ended or not self.started or not usual_of_all:
            return []
        waited = now - self.started
        return [
            site
            for site, line in sorted(self.sites.items())
            if line.asked and waited > LATE_FACTOR * median(line.answers or usual_of_all)
        ]

    def left(self) -> str:
        """Estimate of the time that is left, from the last rounds."""
        if self.ended or not self.seconds:
            return ""
        seconds = median(self.seconds[-5:]) * (self.rounds - self.done)
        return (
            f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
        )

    def _reply(self, event: dict[str, Any], when: float) -> None:
        line = self.sites.setdefault(str(event.get("site")), SiteLine())
        line.asked, line.last_round, line.code = False, self.round, str(event.get("code", ""))
        if event.get("accepted"):
            line.answers.append(when - self.started)


def standing(folder: Path) -> Standing:
    """Read where the run of a folder stands; lines that are cut off are left out."""
    found = Standing()
    path = folder / "events.jsonl"
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.take(json.loads(line))
        except ValueError:
            break  # the last line, while it is being written
    return found


def status_kit(path: Path, console: Screen) -> int:
    """Show who is there and where the run stands.

    Returns:
        0; 1 when the server does not answer or the last run failed.
    """
    kit = Kit.at(path)
    project = kit.project()
    state: RunState | None = None
    there: dict[str, str] = {}
    trouble = ""
    started = last_started(kit) if (kit.state / "run.json").exists() else None
    try:
        with control_of(kit) as control:
            there = dict(presence(control.nodes(), project.sites))
            state = control.run(started.run_id) if started else None
    except FedsgcgError as error:
        trouble = str(error)
    now = standing(Path(started.folder)) if started else Standing()
    console.print(Text.assemble((project.name, "bold"), f" at {project.server}"))
    if trouble:
        console.print(trouble, style="red")
    gone = departed(Path(started.folder)) if started else {}
    console.print(_table(project.sites, there, now, gone))
    console.print(_sentence(started.run_id if started else 0, state, now))
    if started:
        console.print(f"run folder: {started.folder}")
    return 1 if trouble or now.ended == "failed" else 0


def _table(
    sites: tuple[str, ...], there: dict[str, str], now: Standing, gone: Mapping[str, str]
) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("site", "server sees it", "last answer", "usual time", ""):
        table.add_column(title, justify="right" if title == "usual time" else "left")
    late = now.late(time.time())
    for site in sites:
        word = there.get(site, "unknown")
        line = now.sites.get(site, SiteLine())
        note = Text(line.code or ("late" if site in late else "working" if line.asked else ""))
        note.stylize("red" if line.code else "yellow" if site in late else "cyan")
        if site in gone:
            note = Text(f"left for good on {gone[site][:10]}", style="yellow")
        answer = f"round {line.last_round}" if line.last_round else "–"
        usual = f"{median(line.answers):.0f} s" if line.answers else "–"
        table.add_row(Text(site), Text(word, style=STYLES.get(word, "dim")), answer, usual, note)
    return table


def _sentence(run_id: int, state: RunState | None, now: Standing) -> str:
    """Say in one line where the run stands."""
    if not run_id:
        return "No run has been started: fedsgcg run KIT"
    if now.ended:
        return f"run {run_id}: {now.ended} after {now.done} of {now.rounds} rounds"
    if state is not None and state.over:
        words = f"run {run_id}: {state.ending} after {now.done} of {now.rounds or '?'} rounds"
        return words + "; fedsgcg resume KIT goes on"
    if not now.round:
        return f"run {run_id}: waiting for the sites"
    waiting = [site for site, line in sorted(now.sites.items()) if line.asked]
    words = f"run {run_id}: round {now.round} of {now.rounds}"
    words += f", waiting for {', '.join(waiting)}" if waiting else ""
    return f"{words}; {now.left() or 'estimating the time left'}"
