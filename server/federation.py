"""The round loop: whom to ask, what a round is, when it counts, and a truthful end.

Own loop on Flower's `push_messages` and `pull_messages`: `Strategy.start` knows neither quorum, deadline nor resume
(stack.md 1.3 and 3.5). A round counts when its checkpoint is on the disk; `completed` means that every planned round
met its quorum and nothing went less than well.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from flwr.serverapp import Grid

from common.errors import FedsgcgError, Problem
from common.files.disk import Disk
from common.machine import arithmetic_of
from common.networks import build_network
from common.seeding import stream_seed
from common.settings.plan import Plan
from common.statistics import ClassStatistics
from common.wire.messages import AMPLITUDES, STATISTICS, TRAIN, Request
from common.wire.payload import Identity, Weights
from server.aggregation.amplitudes import check_consent, merge_amplitudes, sharing_level
from server.aggregation.merge import merge_moments, merge_statistics, merge_weights
from server.aggregation.prototypes import PrototypeMemory, evaluation_rows, prototype_rows
from server.records import results
from server.records.checkpoint import Best, RoundRecord
from server.records.events import EventLog, OnEvent, ignore_event
from server.records.journal import Journal
from server.records.model_card import IN_CHANNELS, model_card
from server.selection import best_so_far, source_score
from server.sites.departures import check_departures, departed, departure_note
from server.sites.enrolment import Cohort
from server.sites.problems import heldout_unanswered, too_few_classes
from server.sites.replies import (
    Collected,
    Judged,
    Row,
    admitted,
    judged_rows,
    mean_loss,
    moments_of,
    site_rows,
    statistics_of,
    validation_of,
    validation_rows,
)
from server.sites.requests import SiteRequests, identity_of

Status = Literal["completed", "degraded", "failed"]
NO_VALIDATION: Final = "raise data.validation_fraction, or take federation.selection=last"


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


def run_federation(
    grid: Grid, plan: Plan, on_event: OnEvent = ignore_event, disk: Disk | None = None
) -> Outcome:
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
            with suppress(
                FedsgcgError
            ):  # a full disk may refuse this too; the caller gets the outcome anyway
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
        self._plan, self._journal, self._log, self._disk = plan, journal, log, disk
        self._cohort = Cohort(grid, plan, disk)
        self._asking = SiteRequests(grid, plan, self._cohort, log, self._note)
        self._memory = PrototypeMemory(plan.prototypes)
        self._amplitudes = b""
        self._described: list[Collected] = []  # answers to the last pass after a merge

    def run(self, began: float) -> Outcome:
        """Enrol the sites, do the rounds that are not done yet, choose the model and have it judged."""
        self._disk.discard(Path(self._plan.output) / "outcome.json")
        state = self._start()
        self._amplitudes = self._shared_amplitudes()
        for number in range(state.round + 1, self._plan.federation.rounds + 1):
            state = self._round(state, number)
        digest = self._finish(state)
        outcome = Outcome(
            "degraded" if self.notes else "completed", state.round, digest, tuple(self.notes)
        )
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
            "machine": arithmetic_of(self._plan.site.threads),
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
        for problem in record.notes if record else ():
            self._note(problem)
        state = self._drop_departed(
            record or RoundRecord(identity_of(self._plan, 0), initial_weights(self._plan))
        )
        self._cohort.wait()
        self._log.emit("sites.enrolled", sites=sorted(self._cohort.members))
        for problem in (*self._cohort.absent(), *self._cohort.unlike(), *self._cohort.changes):
            self._note(problem)
        return state

    def _drop_departed(self, state: RoundRecord) -> RoundRecord:
        """Go on without the sites that have left for good, their statistics taken out of what is remembered.

        The choice by source validation starts anew with them gone: earlier scores counted their validation cases.

        Raises:
            FedsgcgError: CFG-001 when the run cannot be without them, SRV-402 when `departed.json` is damaged.
        """
        gone = departed(Path(self._plan.output))
        check_departures(self._plan, gone)
        self._cohort.departed = frozenset(gone)
        known = {note.where for note in state.notes if note.code == "RND-407"}
        fresh = [site for site in sorted(gone) if site not in known]
        for site in fresh:
            self._note(departure_note(site, state.round))
            self._log.emit("site.left", site=site, code="RND-407")
        best = None if fresh else state.best
        return replace(state, parts=self._memory.without(state.parts, fresh), best=best)

    def _shared_amplitudes(self) -> bytes:
        """Collect what the sites share of their amplitudes; nothing with `method.ram.sharing=local`.

        Raises:
            FedsgcgError: ROL-202 for every site whose own file does not allow it, RND-402 without the quorum.
        """
        level = sharing_level(self._plan)
        if not level:
            return b""
        check_consent(level, self._cohort.members, self._cohort.training)
        identity = identity_of(self._plan, 0)
        collected = self._asking.collect(AMPLITUDES, Request(identity))
        return merge_amplitudes(
            self._plan, [(part.reply.site, part.reply.amplitudes) for part in admitted(collected)]
        )

    def _round(self, state: RoundRecord, number: int) -> RoundRecord:
        """Do one round from the state after the round before, and make it durable."""
        self._log.round = number
        self._log.emit("round.started")
        self._cohort.poll()
        for change in self._cohort.changes:
            self._note(change)
        identity, parts = identity_of(self._plan, number), state.parts
        before: list[Collected] = []
        if self._plan.described_before(number):
            before = self._asking.collect(
                STATISTICS, Request(identity, state.weights, options={"classes": True})
            )
            parts = self._memory.update(parts, statistics_of(before))
        prototypes = self._memory.prototypes(parts)
        # A site that takes its own part out of the prototypes must know whether they hold it: only we do.
        options = (
            {"held": sorted(part.digest() for part in parts.values())}
            if prototypes is not None
            else {}
        )
        request = Request(identity, state.weights, prototypes, options, self._amplitudes)
        trained = self._asking.collect(TRAIN, request)
        self._note_classes(number, prototypes, before or trained)
        merged, after = self._recalibrated(identity, admitted(trained))
        fresh = (
            statistics_of(after)
            if self._plan.described_after_merge
            else statistics_of(before or trained)
        )
        if not before:
            parts = self._memory.update(parts, fresh)
            prototypes = self._memory.prototypes(parts)
        rows = site_rows(number, trained, before, after)
        if prototypes is not None:
            rows += prototype_rows(
                self._memory, prototypes, fresh, list(self._plan.data.classes), number
            )
        score = source_score([validation_of(part.reply) for part in admitted(trained)])
        record = RoundRecord(
            identity=identity,
            weights=merged,
            parts=parts,
            # What the sites measured this round is the model they received: that of the round before.
            best=best_so_far(state.best, number - 1, score, state.weights),
        )
        rows += self._heldout_curve(record)
        record = replace(record, notes=tuple(self.notes), rows=tuple(rows))
        self._journal.commit_round(record)
        self._log.emit(
            "round.done",
            loss=mean_loss(trained),
            validation_dice=score,
            validation_round=number - 1,
        )
        return record

    def _recalibrated(
        self, identity: Identity, trained: list[Collected]
    ) -> tuple[Weights, list[Collected]]:
        """Merge the weights, have the same sites measure BatchNorm's moments under them, and put the pooled ones in.

        Returns:
            The model, and the answers, which hold the class statistics of `memory=restart` too; nothing is asked with
            `federation.norm_policy=average` or for a network without BatchNorm.
        """
        merged = merge_weights([self._weighted(part) for part in trained])
        if not self._plan.recalibrates:
            return merged, []
        options = {"moments": True, "classes": self._plan.described_after_merge}
        request = Request(identity, merged, options=options)
        # A site that was late or refused is not asked: its deadline has passed once already.
        collected = self._asking.collect(
            STATISTICS, request, {part.answer.site for part in trained}
        )
        moments = merge_moments(moments_of(collected), self._plan.federation.weighting)
        self._described = collected
        return moments.put_into(merged), collected

    def _note_classes(
        self, number: int, prototypes: ClassStatistics | None, described: list[Collected]
    ) -> None:
        """Note too few classes for the contrastive loss, once and not in every round."""
        described = described if statistics_of(described) else self._described
        problem = too_few_classes(self._plan, number, prototypes, described)
        if problem and problem.code not in {note.code for note in self.notes}:
            self._note(problem)

    def _finish(self, state: RoundRecord) -> str:
        """Score the last model, choose one, have it judged at the held-out site, and write it all; returns its hash."""
        plan, last = self._plan, self._plan.federation.rounds
        validation = self._asking.evaluate("validation", self._cohort.asked, state.weights, last)
        score = source_score([part.validation for part in validation])
        self._log.emit("validation.done", round=last, validation_dice=score)
        best = best_so_far(state.best, last, score, state.weights)
        chosen = Best(last, float("nan") if score is None else score, state.weights)
        if plan.federation.selection == "source_validation" and best is not None:
            chosen = best
        elif plan.federation.selection == "source_validation":
            self._note(Problem("RND-405", where="source validation", action=NO_VALIDATION))
        rows = self._journal.rows() + validation_rows(last + 1, validation)
        prototypes, shift = self._prototypes_of(chosen)
        rows += shift
        results.write_rounds(self._disk, plan, rows)
        results.write_prototypes(self._disk, plan, prototypes, identity_of(plan, chosen.round))
        kinds = self._cohort.kinds()
        card = model_card(
            plan, chosen, self._trained(rows), prototypes=prototypes is not None, kinds=kinds
        )
        results.write_model(self._disk, plan, chosen.weights, card)
        judged = self._judge(chosen)
        results.write_rounds(self._disk, plan, rows + judged_rows(plan, chosen.round, judged, rows))
        if not plan.heldout:
            if chosen.round != last:
                validation = self._asking.evaluate(
                    "validation", self._cohort.asked, chosen.weights, chosen.round
                )
            judged = [*validation, *judged]
        results.write_results(self._disk, plan, [row for part in judged for row in part.cases])
        return chosen.weights.digest()

    def _prototypes_of(self, chosen: Best) -> tuple[ClassStatistics | None, list[Row]]:
        """Have the sites describe the chosen model under the normalisation of evaluation.

        The prototypes that training used are of an earlier model or of BatchNorm's training mode; who uses the model
        needs those of its predictions. With all sites under one normalisation, the between-site trace is the domain
        shift that the model has left: with batch moments each site would be normalised by its own.

        Returns:
            The prototypes, and the rows of their shift; None and no row for a method without statistics.
        """
        if not self._plan.method.statistics:
            return None, []
        identity = identity_of(self._plan, self._plan.federation.rounds)
        options = {"classes": True, "norm_mode": "running"}
        fresh = statistics_of(
            self._asking.collect(STATISTICS, Request(identity, chosen.weights, options=options))
        )
        prototypes = merge_statistics(fresh, self._plan.prototypes.weighting)
        return prototypes, evaluation_rows(
            self._memory, fresh, list(self._plan.data.classes), chosen.round
        )

    def _trained(self, rows: list[Row]) -> list[str]:
        """Sites that the model learned from: those that train now, and those that did before they left for good."""
        gave = {
            row["site"] for row in rows if row["phase"] == "train" and row["metric"] == "examples"
        }
        return sorted({*self._cohort.training, *(self._cohort.departed & gave)})

    def _judge(self, chosen: Best) -> list[Judged]:
        """Have a model evaluated at the held-out site and the observers; raises RND-403 without the former's answer."""
        heldout = self._plan.heldout
        nodes = self._cohort.of_role("heldout") | self._cohort.of_role("observer")
        judged = self._asking.evaluate("test", nodes, chosen.weights, chosen.round)
        if heldout and heldout not in {part.site for part in judged}:
            reason = next(
                (note for note in reversed(self.notes) if note.where.endswith(heldout)), None
            )
            raise heldout_unanswered(self._plan, reason)
        for part in judged:
            event = "heldout.done" if part.site == heldout else "observer.done"
            self._log.emit(event, site=part.site, dice=part.dice)
        return judged

    def _heldout_curve(self, record: RoundRecord) -> list[Row]:
        """Evaluate at the held-out site for the curve alone; the value is recorded and chooses nothing."""
        federation = self._plan.federation
        ends_here = (
            record.round == federation.rounds and federation.selection == "last"
        )  # judged in a moment anyway
        if not federation.heldout_every or record.round % federation.heldout_every or ends_here:
            return []
        judged = self._asking.evaluate(
            "test", self._cohort.of_role("heldout"), record.weights, record.round
        )
        for part in judged:
            self._log.emit("heldout.done", site=part.site, dice=part.dice)
        return judged_rows(self._plan, record.round, judged)

    def _weighted(self, part: Collected) -> tuple[str, Weights, float]:
        reply = part.reply
        if reply.weights is None:
            raise AssertionError("an admitted payload of a training round has weights")
        equal = self._plan.federation.weighting == "sites"
        return reply.site, reply.weights, 1.0 if equal else reply.metrics["examples"]

    def _note(self, problem: Problem) -> None:
        if problem not in self.notes:
            self.notes.append(problem)


def initial_weights(plan: Plan) -> Weights:
    """Return the model that round 1 starts from, a function of the plan alone."""
    seed = stream_seed(plan.seed, "initial weights")
    network = build_network(plan.network, IN_CHANNELS, plan.data.out_channels, seed)
    return Weights.from_state(
        {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    )
