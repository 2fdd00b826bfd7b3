"""The round loop: whom to ask, what a round is, when it counts, and a truthful end.

Own loop on Flower's `push_messages` and `pull_messages`: `Strategy.start` knows neither quorum, deadline nor resume
(stack.md 1.3 and 3.5). A round counts when its checkpoint is on the disk; `completed` means that every planned round
met its quorum and nothing went less than well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from flwr.serverapp import Grid

from common.errors import FedsgcgError, Problem
from common.networks import build_network
from common.payload import Identity, Weights
from common.plan import Plan
from common.seeding import stream_seed
from common.wire import AMPLITUDES, EVALUATE, STATISTICS, TRAIN, Request
from server import results
from server.admission import Expectation, Verdict, admit
from server.amplitudes import check_consent, merge_amplitudes, sharing_level
from server.checkpoint import Best, RoundRecord
from server.disk import Disk
from server.enrolment import Cohort
from server.exchange import Answer, OnAnswer, exchange, ignore_answer
from server.heldout import better, guard_recipients, source_score
from server.journal import Journal
from server.merge import merge_weights
from server.prototypes import PrototypeMemory, prototype_rows
from server.replies import (
    Collected,
    Judged,
    Row,
    admitted,
    due,
    judged_rows,
    mean_loss,
    site_rows,
    statistics_of,
    validation_of,
    validation_rows,
)
from server.results import EventLog, OnEvent, ignore_event
from server.words import heldout_unanswered, quorum_missed, too_few_classes

Status = Literal["completed", "degraded", "failed"]
NO_VALIDATION: Final = "raise data.validation_fraction, or take federation.selection=last"
EVENT_METRICS: Final = ("loss", "validation_dice", "seconds", "examples")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: `completed`; `degraded` when a site was missed or rejected on the way; `failed` when the run stopped.
        rounds_done: Rounds that count.
        digest: Hash of the selected model, "" when the run failed.
        problems: Everything that went less than well, in order.
        failure: What stopped the run; empty unless it failed.
    """

    status: Status
    rounds_done: int
    digest: str = ""
    problems: tuple[Problem, ...] = ()
    failure: tuple[Problem, ...] = ()


def run_federation(grid: Grid, plan: Plan, on_event: OnEvent = ignore_event, disk: Disk | None = None) -> Outcome:
    """Run one federation to its end, going on from the last done round of the plan's output folder.

    Args:
        grid: Flower's grid.
        plan: The plan; `plan.output` is the run folder.
        on_event: Called with every event.
        disk: The way to the disk.

    Returns:
        The outcome. A run that stopped is `failed` and says why; the same call goes on where it stopped.

    Raises:
        FedsgcgError: CFG-005 or CFG-006 when the run folder is not this run's to use, SRV-401 or SRV-402 when its
            journal cannot be opened.
    """
    began = time.monotonic()
    disk = disk or Disk()
    with Journal.of_plan(plan, disk) as journal:
        federation = Federation(grid, plan, journal, EventLog(plan, on_event), disk)
        try:
            return federation.run(began)
        except FedsgcgError as error:
            problems = (*federation.notes, *error.problems)
            outcome = Outcome("failed", journal.done, "", problems, error.problems)
            with suppress(FedsgcgError):  # a full disk may refuse this too; the caller gets the outcome anyway
                federation.conclude(outcome, began)
            return outcome


class Federation:
    """One federation: its cohort, its journal, and what went less than well so far (`notes`).

    Args:
        grid: Flower's grid.
        plan: The plan.
        journal: Journal of the run folder.
        log: Where events go.
        disk: The way to the disk.
    """

    def __init__(self, grid: Grid, plan: Plan, journal: Journal, log: EventLog, disk: Disk) -> None:
        self.notes: list[Problem] = []
        self._grid, self._plan, self._journal, self._log, self._disk = grid, plan, journal, log, disk
        self._cohort = Cohort(grid, plan, disk)
        self._memory = PrototypeMemory(plan.prototypes)
        self._amplitudes = b""

    def run(self, began: float) -> Outcome:
        """Enrol the sites, do the rounds that are not done yet, choose the model and have it judged."""
        self._disk.discard(Path(self._plan.output) / "outcome.json")
        state = self._start()
        self._amplitudes = self._shared_amplitudes()
        for number in range(state.round + 1, self._plan.federation.rounds + 1):
            state = self._round(state, number)
        digest = self._finish(state)
        outcome = Outcome("degraded" if self.notes else "completed", state.round, digest, tuple(self.notes))
        self.conclude(outcome, began)
        return outcome

    def conclude(self, outcome: Outcome, began: float) -> None:
        """Write how the run ended, as the last event and the last file."""
        code = outcome.failure[0].code if outcome.failure else ""
        self._log.emit("run.finished", status=outcome.status, code=code)
        facts = {
            "status": outcome.status,
            "error": code,
            "rounds_done": outcome.rounds_done,
            "digest": outcome.digest,
            "seconds": round(time.monotonic() - began, 3),
            "problems": [results.public(problem) for problem in outcome.problems],
            "sites": self._cohort.census(),
        }
        results.write_outcome(self._disk, self._plan, facts)

    def _start(self) -> RoundRecord:
        record = self._journal.resume()
        self._log.round = self._journal.done
        self._log.emit("run.started")
        for problem in self._journal.damaged:
            self._log.emit("journal.damaged", code=problem.code, where=problem.where)
        self._cohort.wait()
        self._log.emit("sites.enrolled", sites=sorted(self._cohort.members))
        for problem in (*(record.notes if record else ()), *self._cohort.absent(), *self._cohort.changes):
            self._note(problem)
        return record or RoundRecord(self._identity(0), initial_weights(self._plan))

    def _shared_amplitudes(self) -> bytes:
        """Collect what the sites share of their amplitudes; nothing with `method.ram.sharing=local`.

        Raises:
            FedsgcgError: ROL-202 for every site whose own file does not allow it, RND-402 without the quorum.
        """
        level = sharing_level(self._plan)
        if not level:
            return b""
        check_consent(level, self._cohort.members, self._cohort.training)
        identity = self._identity(0)
        collected = self._collect(AMPLITUDES, Request(identity), None)
        return merge_amplitudes(self._plan, [(part.reply.site, part.reply.amplitudes) for part in admitted(collected)])

    def _round(self, state: RoundRecord, number: int) -> RoundRecord:
        """Do one round from the state after the round before, and make it durable."""
        self._log.round = number
        self._log.emit("round.started")
        self._cohort.poll()
        for change in self._cohort.changes:
            self._note(change)
        identity, settings = self._identity(number), self._plan.prototypes
        early: list[Collected] = []
        prototypes = state.prototypes
        if self._plan.method.statistics and settings.memory == "restart":
            early = self._collect(STATISTICS, Request(identity, state.weights), state.weights)
            prototypes = self._memory.update(prototypes, statistics_of(early))
        request = Request(identity, state.weights, prototypes, amplitudes=self._amplitudes)
        trained = self._collect(TRAIN, request, state.weights)
        problem = too_few_classes(self._plan, number, prototypes, early or trained)
        if problem and problem.code not in {note.code for note in self.notes}:  # told once, not in every round
            self._note(problem)
        fresh = statistics_of(early or trained)
        if not early:
            prototypes = self._memory.update(prototypes, fresh)
        rows = site_rows(number, trained, early)
        if prototypes is not None:
            rows += prototype_rows(self._memory, prototypes, fresh, list(self._plan.data.classes), number)
        score = source_score([validation_of(part.reply) for part in admitted(trained)])
        record = RoundRecord(
            identity=identity,
            weights=merge_weights([self._weighted(part) for part in admitted(trained)]),
            prototypes=prototypes,
            # What the sites measured this round is the model they received: that of the round before.
            best=better(state.best, number - 1, score, state.weights),
        )
        rows += self._heldout_curve(record)
        record = replace(record, notes=tuple(self.notes), rows=tuple(rows))
        self._journal.commit_round(record)
        self._log.emit("round.done", loss=mean_loss(trained), validation_dice=score, validation_round=number - 1)
        return record

    def _finish(self, state: RoundRecord) -> str:
        """Score the last model, choose one, have it judged at the held-out site, and write it all; returns its hash."""
        plan, last = self._plan, self._plan.federation.rounds
        validation = self._evaluate("validation", self._cohort.asked, state.weights, last)
        score = source_score([part.validation for part in validation])
        self._log.emit("validation.done", round=last, validation_dice=score)
        best = better(state.best, last, score, state.weights)
        chosen = Best(last, float("nan") if score is None else score, state.weights)
        if plan.federation.selection == "source_validation" and best is not None:
            chosen = best
        elif plan.federation.selection == "source_validation":
            self._note(Problem("RND-405", where="source validation", action=NO_VALIDATION))
        rows = self._journal.rows() + validation_rows(last + 1, validation)
        results.write_rounds(self._disk, plan, rows)
        results.write_prototypes(self._disk, plan, state.prototypes, state.identity)
        card = results.model_card(plan, chosen, list(self._cohort.training), prototypes=state.prototypes is not None)
        results.write_model(self._disk, plan, chosen.weights, card)
        judged = self._judge(chosen)
        results.write_rounds(self._disk, plan, rows + judged_rows(plan, chosen.round, judged, rows))
        if not plan.heldout:
            if chosen.round != last:
                validation = self._evaluate("validation", self._cohort.asked, chosen.weights, chosen.round)
            judged = [*validation, *judged]
        results.write_results(self._disk, plan, [row for part in judged for row in part.cases])
        return chosen.weights.digest()

    def _judge(self, chosen: Best) -> list[Judged]:
        """Have a model evaluated at the held-out site and the observers; raises RND-403 without the former's answer."""
        heldout = self._plan.heldout
        nodes = self._cohort.of_role("heldout") | self._cohort.of_role("observer")
        judged = self._evaluate("test", nodes, chosen.weights, chosen.round)
        if heldout and heldout not in {part.site for part in judged}:
            reason = next((note for note in reversed(self.notes) if note.where.endswith(heldout)), None)
            raise heldout_unanswered(self._plan, reason)
        for part in judged:
            event = "heldout.done" if part.site == heldout else "observer.done"
            self._log.emit(event, site=part.site, dice=part.dice)
        return judged

    def _heldout_curve(self, record: RoundRecord) -> list[Row]:
        """Evaluate at the held-out site for the curve alone; the value is recorded and chooses nothing."""
        federation = self._plan.federation
        ends_here = record.round == federation.rounds and federation.selection == "last"  # judged in a moment anyway
        if not federation.heldout_every or record.round % federation.heldout_every or ends_here:
            return []
        judged = self._evaluate("test", self._cohort.of_role("heldout"), record.weights, record.round)
        for part in judged:
            self._log.emit("heldout.done", site=part.site, dice=part.dice)
        return judged_rows(self._plan, record.round, judged)

    def _collect(self, message_type: str, request: Request, reference: Weights | None) -> list[Collected]:
        """Ask the training sites, admit what they send, and insist on the quorum.

        Returns:
            One entry for every site that was asked, admitted or not, in the order of the names.

        Raises:
            FedsgcgError: RND-402 when fewer than the quorum were admitted.
        """
        found: dict[str, Collected] = {}

        def receive(answer: Answer) -> None:
            found[answer.site] = part = self._verdict(answer, message_type, request.identity, reference)
            self._report(part, message_type)

        self._ask(message_type, self._cohort.asked, request, receive, self._cohort.quorum)
        collected = [found[site] for site in sorted(found)]
        self._cohort.leave_out_late(part.answer.site for part in collected if part.verdict.code == "RND-404")
        if len(admitted(collected)) < self._cohort.quorum:
            raise quorum_missed(self._plan, collected, self._cohort.quorum, request.identity.round)
        return collected

    def _verdict(self, answer: Answer, message_type: str, identity: Identity, reference: Weights | None) -> Collected:
        """Judge one answer; a rejection or a missing answer becomes a note."""
        if answer.reply is None:
            problem = answer.problem or Problem("PAY-106")
            verdict = Verdict(answer.site, False, problem.code, problem.found)
        else:
            slices = self._cohort.members[answer.site].slices("train")
            verdict = admit(answer.reply, due(self._plan, message_type, answer.site, identity, reference, slices))
        if not verdict.accepted:
            self._note(Collected(answer, verdict).problem(identity.round))
        return Collected(answer, verdict)

    def _evaluate(self, split: str, nodes: Mapping[str, int], weights: Weights, number: int) -> list[Judged]:
        """Have a model evaluated case by case; a site without a usable answer becomes a note."""
        identity = self._identity(number)
        judged = []
        # A held-out site that was lost is waited for, an observer is not.
        enough = self._cohort.quorum if split == "validation" else len(set(nodes) - {*self._plan.observers})
        for answer in self._ask(EVALUATE, nodes, Request(identity, weights, options={"split": split}), enough=enough):
            problem = answer.problem
            if answer.reply is not None:
                verdict = admit(answer.reply, Expectation(identity, answer.site))
                problem = None if verdict.accepted else Problem(verdict.code, found=verdict.detail)
            try:
                if problem is not None or answer.reply is None:
                    raise FedsgcgError(problem or Problem("PAY-106"))
                cases = results.read_cases(answer.reply.cases, answer.site, self._plan)
                judged.append(Judged(answer.site, answer.reply, cases))
            except FedsgcgError as error:
                where = f"{split} evaluation of round {number}, {answer.site}"
                self._note(replace(error.problems[0], where=where))
        return judged

    def _ask(
        self,
        message_type: str,
        nodes: Mapping[str, int],
        request: Request,
        on_answer: OnAnswer = ignore_answer,
        enough: int | None = None,
    ) -> list[Answer]:
        guard_recipients(self._plan, message_type, nodes)
        deadline_s = self._plan.federation.round_deadline_s
        return exchange(
            self._grid, nodes, message_type, request, deadline_s=deadline_s, enough=enough, on_answer=on_answer
        )

    def _report(self, part: Collected, message_type: str) -> None:
        reply, verdict = part.answer.reply, part.verdict
        if message_type != TRAIN and verdict.accepted:
            return
        figures = {name: reply.metrics.get(name) for name in EVENT_METRICS} if reply else {}
        self._log.emit("round.reply", site=verdict.site, accepted=verdict.accepted, code=verdict.code, **figures)

    def _weighted(self, part: Collected) -> tuple[str, Weights, float]:
        reply = part.reply
        if reply.weights is None:
            raise AssertionError("an admitted payload of a training round has weights")
        equal = self._plan.federation.weighting == "sites"
        return reply.site, reply.weights, 1.0 if equal else reply.metrics["examples"]

    def _note(self, problem: Problem) -> None:
        if problem not in self.notes:
            self.notes.append(problem)

    def _identity(self, number: int) -> Identity:
        return Identity(self._plan.run, self._plan.heldout, number, self._plan.digest())


def initial_weights(plan: Plan) -> Weights:
    """Return the model that round 1 starts from, a function of the plan alone."""
    seed = stream_seed(plan.seed, "initial weights")
    network = build_network(plan.network, results.IN_CHANNELS, plan.data.out_channels, seed)
    return Weights.from_state({name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()})
