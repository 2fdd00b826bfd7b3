"""Requests to the sites: every answer is admitted or rejected, and problems become notes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from flwr.serverapp import Grid

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.heads import without_heads
from fedsgcg.common.settings.message_sizes import reply_sizes
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import AMPLITUDES, DATA, EVALUATE, SUMMARY, TRAIN, Request
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.server.admission import Expectation, Verdict, admit
from fedsgcg.server.records import results
from fedsgcg.server.records.events import EventLog
from fedsgcg.server.selection import guard_recipients
from fedsgcg.server.sites.enrolment import Cohort
from fedsgcg.server.sites.exchange import Answer, OnAnswer, exchange, ignore_answer
from fedsgcg.server.sites.judge import Judge
from fedsgcg.server.sites.problems import quorum_missed
from fedsgcg.server.sites.replies import Collected, Gathered, SiteEvaluation, expectation_for
from fedsgcg.server.sites.secure_sums import SecureSum

EVENT_METRICS: Final = ("loss", "validation_dice", "seconds", "examples")


@dataclass(frozen=True)
class SiteRequests:
    """Sends the requests of one federation to its cohort.

    Attributes:
        grid: Flower's grid.
        plan: The plan.
        cohort: The enrolled sites.
        log: Event log.
        judge: Screens the admitted answers.
        note: Called with every problem.
    """

    grid: Grid
    plan: Plan
    cohort: Cohort
    log: EventLog
    judge: Judge
    note: Callable[[Problem], None]

    def collect(
        self,
        message_type: str,
        request: Request,
        sites: Collection[str] | None = None,
        shifts: Mapping[str, ClassStatistics] | None = None,
    ) -> Gathered:
        """Ask the training sites, admit or reject their answers, and require the quorum.

        A rejected answer counts for the quorum, so that no site can stop a run with one; the caller
        decides what happens with too few admitted answers (`Cohort.fewest_admitted`).

        Args:
            message_type: A contributing message type.
            request: The request.
            sites: The training sites to ask; None asks all.
            shifts: What a single site receives as `Request.shift`; None if all receive the same.

        With secure sums (`server.sites.secure_sums`) weights and statistics arrive as a sum.

        Returns:
            One entry for every site that was asked, admitted or not, and what is to be merged.

        Raises:
            FedsgcgError: RND-402 when fewer than the quorum answered; RND-406 for a site whose data
                changed, with `federation.changed_data=stop`.
        """
        found: dict[str, Collected] = {}

        def receive(answer: Answer) -> None:
            found[answer.site] = part = self._verdict(answer, message_type, request)
            self._report(part, message_type)

        nodes = {
            site: node for site, node in self.cohort.asked.items() if sites is None or site in sites
        }
        quorum = self.cohort.quorum if sites is None else min(self.cohort.quorum, len(nodes))
        sums = self.plan.privacy.secure_sums.enabled and message_type != AMPLITUDES
        secure = self._secure_sum(message_type, request, nodes, quorum) if sums else None
        if secure is not None:
            secure.run()
            found = secure.found
            for part in found.values():
                self._report(part, message_type)
        else:
            asked: Request | dict[str, Request] = request
            if shifts is not None:
                asked = {site: replace(request, shift=shifts.get(site)) for site in nodes}
            self._ask(message_type, nodes, asked, receive, quorum)
        collected = [found[site] for site in sorted(found)]
        self.cohort.leave_out_late(
            part.answer.site for part in collected if part.verdict.code == "RND-404"
        )
        self._compare_data(collected)
        if sum(part.delivered for part in collected) < quorum:
            raise quorum_missed(self.plan, collected, quorum, request.identity.round)
        judged = self.judge.judge(message_type, request, collected)
        return Gathered(judged, judged if secure is None else secure.pooled())

    def _secure_sum(
        self, message_type: str, request: Request, nodes: Mapping[str, int], quorum: int
    ) -> SecureSum:
        def verdict(answer: Answer) -> Collected:
            return self._verdict(answer, message_type, request)

        return SecureSum(
            self.plan,
            self.grid,
            self.cohort,
            self._ask,
            verdict,
            self.note,
            message_type,
            request,
            nodes,
            quorum,
        )

    def _compare_data(self, collected: Collection[Collected]) -> None:
        """Note the sites whose data changed since their last reply.

        Raises:
            FedsgcgError: RND-406 with `federation.changed_data=stop`; the round is not committed.
        """
        problems = [
            problem
            for part in collected
            if part.verdict.accepted
            and (
                problem := self.cohort.changed_data(part.answer.site, part.reply.details.get(DATA))
            )
        ]
        if problems and self.plan.federation.changed_data == "stop":
            raise FedsgcgError(*problems)
        for problem in problems:
            self.note(problem)

    def evaluate(
        self,
        split: str,
        nodes: Mapping[str, int],
        weights: Weights,
        number: int,
        *,
        adapt: str = "",
        prototypes: ClassStatistics | None = None,
        amplitudes: bytes = b"",
    ) -> list[SiteEvaluation]:
        """Have a model evaluated case by case; a missing or unusable answer becomes a note.

        Args:
            split: `validation` or `test`.
            nodes: Site -> node id of the sites to ask.
            weights: The model; its training-only heads are not sent.
            number: Round that produced it.
            adapt: How the sites adapt it to their images first (`adapt.by`); "" = not.
            prototypes: Of the model, for `adapt=prototypes`.
            amplitudes: Of the training sites, for `adapt=amplitude`.
        """
        identity = identity_of(self.plan, number)
        options = {"split": split} | ({"adapt": adapt} if adapt else {})
        request = Request(identity, without_heads(weights), prototypes, options, amplitudes)
        evaluations = []
        # A lost held-out site is waited for; a lost observer is not.
        enough = sum(self.plan.role(site) == "heldout" for site in nodes)
        if split == "validation":
            nodes = {site: node for site, node in nodes.items() if self.plan.validates(site)}
            enough = min(self.cohort.quorum, len(nodes))
        for answer in self._ask(EVALUATE, nodes, request, enough=enough):
            problem = answer.problem
            if answer.reply is not None:
                cases = self.cohort.members[answer.site].count("cases", "validation")
                verdict = admit(answer.reply, Expectation(identity, answer.site, max_cases=cases))
                problem = None if verdict.accepted else Problem(verdict.code, found=verdict.detail)
            try:
                if problem is not None or answer.reply is None:
                    raise FedsgcgError(problem or Problem("PAY-106"))
                rows = results.read_cases(answer.reply.cases, answer.site, self.plan)
                stated = answer.reply.details.get(SUMMARY)
                summary = results.read_summary(stated, answer.site, self.plan)
                evaluations.append(SiteEvaluation(answer.site, answer.reply, rows, summary))
            except FedsgcgError as error:
                where = f"{split} evaluation of round {number}, {answer.site}"
                self.note(replace(error.problems[0], where=where))
        return evaluations

    def _ask(
        self,
        message_type: str,
        nodes: Mapping[str, int],
        request: Request | Mapping[str, Request],
        on_answer: OnAnswer = ignore_answer,
        enough: int | None = None,
    ) -> list[Answer]:
        guard_recipients(self.plan, message_type, nodes)
        deadline_s = self.plan.federation.round_deadline_s
        models = [request] if isinstance(request, Request) else list(request.values())
        weights = models[0].weights if models else None
        return exchange(
            self.grid,
            nodes,
            message_type,
            request,
            deadline_s=deadline_s,
            sizes=reply_sizes(self.plan, weights.values.size if weights else 0),
            folder=Path(self.plan.output),
            enough=enough,
            on_answer=on_answer,
        )

    def _verdict(self, answer: Answer, message_type: str, request: Request) -> Collected:
        """Check one answer; a rejected or missing answer becomes a note."""
        if answer.reply is None:
            problem = answer.problem or Problem("PAY-106")
            verdict = Verdict(answer.site, False, problem.code, problem.found)
        else:
            member = self.cohort.members[answer.site]
            slices, cases = member.slices("train"), member.count("cases", "validation")
            verdict = admit(
                answer.reply,
                expectation_for(self.plan, message_type, answer.site, request, slices, cases),
            )
        if not verdict.accepted:
            self.note(Collected(answer, verdict).problem(request.identity.round))
        return Collected(answer, verdict)

    def _report(self, part: Collected, message_type: str) -> None:
        reply, verdict = part.answer.reply, part.verdict
        if message_type != TRAIN and verdict.accepted:
            return
        figures = {name: reply.metrics.get(name) for name in EVENT_METRICS} if reply else {}
        self.log.emit(
            "round.reply",
            site=verdict.site,
            accepted=verdict.accepted,
            code=verdict.code,
            **figures,
        )


def identity_of(plan: Plan, number: int) -> Identity:
    """Return the identity that every message of a round carries; round 0 precedes the first."""
    return Identity(plan.run, plan.heldout, number, plan.digest())
