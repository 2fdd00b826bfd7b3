"""Judging a round's admitted answers against each other, and sites by their rejections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from fedsgcg.common.errors import Problem
from fedsgcg.common.settings.federation import TRAINING
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import TRAIN, Request
from fedsgcg.server.admission import Verdict
from fedsgcg.server.records.events import EventLog
from fedsgcg.server.screening.history import History
from fedsgcg.server.screening.scores import Finding
from fedsgcg.server.screening.statistics import screen_moments, screen_statistics
from fedsgcg.server.screening.weights import Model, screen_models
from fedsgcg.server.sites.enrolment import Cohort
from fedsgcg.server.sites.replies import (
    REJECTIONS,
    Collected,
    admitted,
    moments_of,
    statistics_of,
)

COUNTED: Final = (*REJECTIONS, "TRN-301")
"""Beginnings of the codes that count towards a pause: a rejection, or a loss that is not finite."""


@dataclass
class Judge:
    """Applies the screens to a round's answers, and pauses sites that are rejected repeatedly.

    Args:
        plan: The plan.
        cohort: The enrolled sites.
        log: Event log.
        note: Called with every problem.

    Attributes:
        history: What is remembered about the sites; changed during a round.
    """

    plan: Plan
    cohort: Cohort
    log: EventLog
    note: Callable[[Problem], None]
    history: History = field(default_factory=History)
    _rejected: set[str] = field(default_factory=set)
    _accepted: set[str] = field(default_factory=set)

    def start(self, history: History, number: int) -> None:
        """Start a round with the history after the previous one; paused sites are not asked."""
        self.history = history
        self._rejected, self._accepted = set(), set()
        self.cohort.paused = frozenset(history.paused(number))

    def judge(
        self, message_type: str, request: Request, collected: Sequence[Collected]
    ) -> list[Collected]:
        """Screen the answers to a contributing message; findings become notes and events.

        Returns:
            The answers; with `federation.screening=reject`, those with findings are rejected.
        """
        rejects = self.plan.federation.screening == "reject"
        found = {}
        if self.plan.federation.screening != "off":
            found = {finding.site: finding for finding in self._findings(request, collected)}
        for finding in found.values():
            self._report(finding, request.identity.round, rejects)
        judged = [
            self._rejection(part, found[part.answer.site])
            if rejects and part.answer.site in found
            else part
            for part in collected
        ]
        uncounted = {site for site, finding in found.items() if not finding.counts}
        codes = {part.answer.site: part.verdict.code for part in judged}
        rejected = {site for site, code in codes.items() if code.startswith(COUNTED)}
        self._rejected |= rejected - uncounted
        if message_type == TRAIN:
            self._accepted |= {part.answer.site for part in admitted(judged)}
        return judged

    def finish(self, number: int, void: bool) -> History:
        """Return the history after a round, in which sites may have been paused."""
        may_pause = len(self.cohort.asked) - self.cohort.fewest_admitted
        accepted = self._accepted - self._rejected
        history, paused = self.history.counted(number, accepted, self._rejected, may_pause)
        for site in paused:
            until = history.of(site).paused_until
            action = "ask the site what happened; it is asked again after the pause"
            found = f"not asked in rounds {number + 1} to {until}"
            self.note(Problem("RND-422", where=site, found=found, action=action))
            self.log.emit("site.paused", site=site, code="RND-422", until=until)
        self.history = replace(history, void_rounds=history.void_rounds + 1 if void else 0)
        return self.history

    def _findings(self, request: Request, collected: Sequence[Collected]) -> list[Finding]:
        """Findings in an order that does not matter: each site has at most one."""
        findings: dict[str, Finding] = {}
        models = [self._model(part) for part in admitted(collected)]
        # Sites without labels train other weights with another loss: they are compared among
        # themselves.
        for role in TRAINING:
            known = [one for one in models if one is not None and self.plan.role(one.site) == role]
            if known and request.weights is not None:
                found, self.history = screen_models(known, request.weights, self.history)
                findings |= {finding.site: finding for finding in found}
        left = [(s, part) for s, part in statistics_of(collected) if s not in findings]
        # The closing pass has BatchNorm in another mode than the passes of the rounds.
        closing = "norm_mode" in request.options
        found, history = screen_statistics(left, History() if closing else self.history)
        self.history = self.history if closing else history
        findings |= {finding.site: finding for finding in found}
        moments = [(s, part) for s, part in moments_of(collected) if s not in findings]
        findings |= {finding.site: finding for finding in screen_moments(moments)}
        return list(findings.values())

    def _model(self, part: Collected) -> Model | None:
        reply = part.reply
        if reply.weights is None:
            return None
        examples = reply.metrics.get("examples", 1.0)
        method = self.plan.method
        steps = 1.0 if method.steps_per_round else math.ceil(examples / method.batch_size)
        return Model(part.answer.site, reply.weights, steps, examples)

    def _report(self, finding: Finding, number: int, rejects: bool) -> None:
        where = f"round {number}, {finding.site}"
        self.note(Problem(finding.code, where=where, found=finding.detail))
        self.log.emit("round.screened", site=finding.site, code=finding.code, rejected=rejects)

    def _rejection(self, part: Collected, finding: Finding) -> Collected:
        verdict = Verdict(finding.site, False, finding.code, finding.detail)
        return Collected(part.answer, verdict)
