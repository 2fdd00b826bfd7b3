"""Progress of a run and of its sites, computed from the run's events."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

LATE_FACTOR: Final = 2.0
"""A site is late after twice its median time, or twice that of all sites in its first round."""


@dataclass
class SiteProgress:
    """Progress of one site, from the run's events.

    Attributes:
        answers: Seconds from the start of a round to the site's answer, for each round.
        last_round: Round of its last answer.
        code: Error code of its last answer, "" when the answer was accepted.
        asked: Whether its answer in the current round is pending.
        paused_until: Last round in which it is not asked after rejections, 0 for none.
    """

    answers: list[float] = field(default_factory=list)
    last_round: int = 0
    code: str = ""
    asked: bool = False
    paused_until: int = 0


@dataclass
class RunProgress:
    """Progress of a run, from its `events.jsonl`.

    Attributes:
        sites: Progress by site.
        training: The sites that train.
        needed: Training sites that must answer in a round: the quorum; 0 = not known.
        round: Current round, or the last one.
        rounds: Rounds of the plan.
        started: Start of the current round (seconds since 1970), 0 before the first.
        seconds: Duration of each completed round.
        ended: Final status, "" while the run is in progress.
        done: Number of completed rounds.
    """

    sites: dict[str, SiteProgress] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)
    needed: int = 0
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
            self.training = [str(site) for site in event.get("training", names)]
            self.needed = int(event.get("needed", 0))
        elif name == "round.started":
            self.started = when
            for site, progress in self.sites.items():
                # A held-out hospital or an observer is not asked to train.
                progress.asked = site in self.training and progress.paused_until < self.round
        elif name == "round.reply":
            self._reply(event, when)
        elif name in ("round.screened", "site.paused"):
            progress = self.sites.setdefault(str(event.get("site")), SiteProgress())
            progress.code = str(event.get("code", ""))
            progress.paused_until = int(event.get("until", progress.paused_until))
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

    def seconds_left(self) -> float | None:
        """Return an estimate of the time left, from the last rounds; None without any."""
        if self.ended or not self.seconds:
            return None
        return median(self.seconds[-5:]) * (self.rounds - self.done)

    def left(self) -> str:
        """Return the estimate of the time left as text."""
        seconds = self.seconds_left()
        if seconds is None:
            return ""
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
