"""Progress of a run and of its sites, computed from the run's events."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Final

LATE_FACTOR: Final = 2.0
"""A site is late after twice its median time, or twice that of all sites in its first round."""

LAST_ROUNDS: Final = 5
"""Rounds from which the time of the next one is estimated."""

IN_TURN: Final = 0.9
"""Part of a site's training time that has passed since the answer before, if sites take turns."""


@dataclass
class SiteProgress:
    """Progress of one site, from the run's events.

    Attributes:
        answers: Seconds from the start of a round to the site's answer, for each round.
        last_round: Round of its last answer.
        code: Error code of its last answer, "" when the answer was accepted.
        asked: Whether its answer in the current round is pending.
        paused_until: Last round in which it is not asked after rejections, 0 for none.
        loss: Mean training loss of its last accepted answer; NaN = not known.
        seconds: Training time of that answer, as the site states it; NaN = not known.
        dice: Dice on its validation cases, of the model that it received; NaN = not known.
    """

    answers: list[float] = field(default_factory=list)
    last_round: int = 0
    code: str = ""
    asked: bool = False
    paused_until: int = 0
    loss: float = math.nan
    seconds: float = math.nan
    dice: float = math.nan


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
        first: Number of entries of `seconds` before the last start.
        arrivals: Answers in the first round of the last start: time, and training time there.
        answered_first: Seconds from the start of that round to its first answer.
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
    first: int = 0
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    answered_first: float = 0.0
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
            self.first = len(self.seconds)
            self.arrivals = []
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

    def round_seconds(self) -> float | None:
        """Return the duration of a usual round; None before anything was measured.

        It is the median of the last rounds since the last start, without the first one, in which
        libraries are loaded and images are read. Until there is a second round, that start-up is
        estimated (`_start_up`) and subtracted from the first.
        """
        durations = self.seconds[self.first :]
        if len(durations) > 1:
            return median(durations[1:][-LAST_ROUNDS:])
        return max(0.0, durations[0] - self._start_up()) if durations else None

    def seconds_left(self) -> float | None:
        """Return an estimate of the time left, from the last rounds; None without any."""
        usual = self.round_seconds()
        return None if self.ended or usual is None else usual * (self.rounds - self.done)

    def left(self) -> str:
        """Return the estimate of the time left as text."""
        seconds = self.seconds_left()
        return "" if seconds is None else time_left(seconds)

    def _intervals(self) -> list[float]:
        """Times of the sites after the first one, if the first round's sites worked in turn.

        They did if the time between two answers is at least what the second one spent training;
        empty if they worked at the same time, or if that is not known.
        """
        pairs = list(pairwise(self.arrivals))
        found = [after - before for (before, _), (after, _) in pairs]
        spent = [seconds for _, (_, seconds) in pairs]
        in_turn = all(gap >= IN_TURN * own for gap, own in zip(found, spent, strict=True))
        return found if in_turn else []

    def _start_up(self) -> float:
        """Return how much longer the first site of a start took than the others usually do."""
        intervals = self._intervals()
        return max(0.0, self.answered_first - median(intervals)) if intervals else 0.0

    def _reply(self, event: dict[str, Any], when: float) -> None:
        progress = self.sites.setdefault(str(event.get("site")), SiteProgress())
        progress.asked = False
        progress.last_round = self.round
        progress.code = str(event.get("code", ""))
        if len(self.seconds) == self.first:
            self.arrivals.append((when, _number(event.get("seconds"), math.inf)))
            if len(self.arrivals) == 1:
                self.answered_first = when - self.started
        if event.get("accepted"):
            progress.answers.append(when - self.started)
            progress.loss = _number(event.get("loss"), progress.loss)
            progress.seconds = _number(event.get("seconds"), progress.seconds)
            progress.dice = _number(event.get("validation_dice"), progress.dice)


def time_left(seconds: float) -> str:
    """Return an estimate as text, to minutes from 90 s on and to hours from 90 min on."""
    if seconds >= 5400:
        return f"about {seconds / 3600:.1f} h left"
    if seconds >= 90:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds:.0f} s left"


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) else otherwise
