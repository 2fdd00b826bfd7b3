"""The round loop of a federation.

The loop uses Flower's `push_messages` and `pull_messages` directly, because `Strategy.start` has no
quorum, deadline or resume (docs/explanation/flower.md, "Behaviour that shaped the code"). A round
is complete when its checkpoint is on disk. The status `completed` means that every planned round
met its quorum without any problem.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
from flwr.serverapp import Grid

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.files.seals import SEAL
from fedsgcg.common.heads import build_trained, state_of, without_heads
from fedsgcg.common.machine import arithmetic_of
from fedsgcg.common.run_folder import paths
from fedsgcg.common.seeding import stream_seed
from fedsgcg.common.settings.adaptation import AMPLITUDE, PROTOTYPES
from fedsgcg.common.settings.federation import SITE_STATISTICS
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.rules import rule_problems
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import AMPLITUDES, STATISTICS, TRAIN, Request
from fedsgcg.common.wire.norm_moments import norm_layers
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.server.aggregation.aggregators import AGGREGATORS, additions
from fedsgcg.server.aggregation.amplitudes import (
    check_consent,
    merge_amplitudes,
    sharing_level,
    usable_amplitudes,
)
from fedsgcg.server.aggregation.central_noise import few_sites, noise_of_round, noisy_mean
from fedsgcg.server.aggregation.domain_pool import with_pool
from fedsgcg.server.aggregation.fedavg import merge_moments
from fedsgcg.server.aggregation.moving_average import with_average, without_average
from fedsgcg.server.aggregation.parts import MergeContext, numbers_by_site, without_sites
from fedsgcg.server.aggregation.prototypes import PrototypeMemory, prototype_rows, shift_rows
from fedsgcg.server.aggregation.shares import with_bounded_shares
from fedsgcg.server.aggregation.unlabelled import with_labelled_decoder
from fedsgcg.server.candidates import Candidates
from fedsgcg.server.records import results
from fedsgcg.server.records.checkpoint import AggregatorState, Best, RoundRecord
from fedsgcg.server.records.events import EventLog, OnEvent, ignore_event
from fedsgcg.server.records.journal import Journal
from fedsgcg.server.records.model_card import model_card
from fedsgcg.server.records.received import RecordingGrid
from fedsgcg.server.screening.history import VOID_ROUNDS
from fedsgcg.server.selection import best_so_far, source_score
from fedsgcg.server.sites.departures import check_departures, departed, departure_note
from fedsgcg.server.sites.enrolment import Cohort
from fedsgcg.server.sites.judge import Judge
from fedsgcg.server.sites.problems import (
    heldout_unanswered,
    no_negatives,
    quorum_missed,
    too_few_classes,
    training_sites,
)
from fedsgcg.server.sites.replies import (
    Collected,
    Gathered,
    Row,
    SiteEvaluation,
    adapted_rows,
    admitted,
    epsilon_rows,
    evaluation_rows,
    mean_loss,
    moments_of,
    row,
    site_rows,
    stated_rows,
    statistics_of,
    summed_rows,
    validation_of,
    validation_rows,
)
from fedsgcg.server.sites.requests import SiteRequests, identity_of

Status = Literal["completed", "degraded", "failed"]
REFUSED: Final = ("POL-721", "POL-724")
"""Codes with which a site refuses to evaluate a model; asking it again changes nothing."""
NO_VALIDATION: Final = "raise data.validation_fraction, or set federation.selection=last"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: `completed`; `degraded` when a reply was missing or rejected; `failed` when the run
            stopped.
        rounds_done: Number of completed rounds.
        digest: Hash of the selected model, "" when the run failed.
        problems: All problems of the run, in order.
        failure: The problems that stopped the run; empty unless it failed.
    """

    status: Status
    rounds_done: int
    digest: str = ""
    problems: tuple[Problem, ...] = ()
    failure: tuple[Problem, ...] = ()


def run_federation(
    grid: Grid, plan: Plan, on_event: OnEvent = ignore_event, disk: Disk | None = None
) -> Outcome:
    """Run one federation, resuming after the last completed round in the plan's output folder.

    Args:
        grid: Flower's grid.
        plan: The plan; `plan.output` is the run folder.
        on_event: Called with every event.
        disk: Disk access; tests pass one that fails.

    Returns:
        The outcome. A run that stopped is `failed` with the reason; the same call resumes it.

    Raises:
        FedsgcgError: CFG-005 or CFG-006 when the run folder belongs to another plan or process,
            CFG-032 for a plan that a study has not filled in, SRV-401 or SRV-402 when its journal
            cannot be opened.
    """
    start = time.monotonic()
    disk = disk or Disk()
    if plan.data.plan == "auto":
        expected = "fixed: a run has its settings before the sites enrol"
        raise fail("CFG-032", where="data.plan", found="auto", expected=expected)
    with Journal.of_plan(plan, disk) as journal:
        if plan.privacy.record:
            grid = RecordingGrid(grid, Path(plan.output), plan, disk)
        federation = Federation(grid, plan, journal, EventLog(plan, on_event), disk)
        try:
            return federation.run(start)
        except FedsgcgError as error:
            problems = (*federation.notes, *error.problems)
            outcome = Outcome("failed", journal.done, "", problems, error.problems)
            # A full disk may refuse this write too; the caller gets the outcome in any case.
            with suppress(FedsgcgError):
                federation.conclude(outcome, start)
            return outcome


class Federation:
    """One federation: its cohort, its journal and its problems so far (`notes`).

    Args:
        grid: Flower's grid.
        plan: The plan.
        journal: Journal of the run folder.
        log: Event log.
        disk: Disk access.
    """

    def __init__(self, grid: Grid, plan: Plan, journal: Journal, log: EventLog, disk: Disk) -> None:
        self.notes: list[Problem] = []
        self._plan = plan
        self._journal = journal
        self._log = log
        self._disk = disk
        self._cohort = Cohort(grid, plan, disk)
        self._judge = Judge(plan, self._cohort, log, self._note)
        self._requests = SiteRequests(grid, plan, self._cohort, log, self._judge, self._note)
        self._memory = PrototypeMemory(plan.prototypes)
        self._candidates = Candidates(plan, self._cohort, self._requests, self._memory, self._note)
        self._amplitudes = b""
        self._after_merge: list[Collected] = []  # answers to the last pass after a merge

    def run(self, start: float) -> Outcome:
        """Enrol the sites, run the remaining rounds, select a model and have it evaluated."""
        for name in (SEAL, paths.OUTCOME):
            self._disk.discard(Path(self._plan.output) / name)
        state = self._start()
        self._judge.start(state.history, state.round + 1)
        if self._plan.shift == "sites":
            sharing = self._cohort.of_role("train")
            less = "method.sgcg.sites=false"
            check_consent(SITE_STATISTICS, self._cohort.members, sharing, less)
        self._amplitudes = self._shared_amplitudes()
        for number in range(state.round + 1, self._plan.federation.rounds + 1):
            state = self._round(state, number)
        digest = self._finish(state)
        outcome = Outcome(
            "degraded" if self.notes else "completed", state.round, digest, tuple(self.notes)
        )
        self.conclude(outcome, start)
        return outcome

    def conclude(self, outcome: Outcome, start: float) -> None:
        """Record the outcome as the last event and the last file.

        Args:
            outcome: The outcome.
            start: `time.monotonic()` at the start of the run.
        """
        code = outcome.failure[0].code if outcome.failure else ""
        self._log.emit("run.finished", status=outcome.status, code=code)
        facts = {
            "status": outcome.status,
            "error": code,
            "rounds_done": outcome.rounds_done,
            "digest": outcome.digest,
            "budget": results.budget_of(self._plan),
            "machine": arithmetic_of(self._plan.site.threads),
            "seconds": round(time.monotonic() - start, 3),
            "problems": [results.problem_fields(problem) for problem in outcome.problems],
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
        self._log.emit(
            "sites.enrolled",
            sites=sorted(self._cohort.members),
            training=sorted(self._cohort.training),
            needed=self._cohort.quorum,
        )
        for problem in (*self._cohort.absent(), *self._cohort.mixed_kinds(), *self._cohort.changes):
            self._note(problem)
        self._check_rule(state.weights)
        if few := few_sites(self._plan, len(self._cohort.training)):
            self._note(few)
        return state

    def _check_rule(self, weights: Weights) -> None:
        """Refuse a plan that the aggregation rule cannot serve; raises CFG-020."""
        norm = bool(norm_layers(weights))
        training = list(self._cohort.training)
        if problems := list(rule_problems(self._plan, training, has_batch_norm=norm)):
            raise FedsgcgError(*problems)

    def _drop_departed(self, state: RoundRecord) -> RoundRecord:
        """Remove the statistics of departed sites from the memory.

        Selection by source validation starts afresh, because earlier scores include the validation
        cases of these sites.

        Raises:
            FedsgcgError: CFG-001 when the run cannot continue without them, SRV-402 when
                `departed.json` is damaged.
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
        return replace(
            state,
            parts=self._memory.without(state.parts, fresh),
            best=best,
            aggregator_state=without_sites(state.aggregator_state, fresh),
            history=state.history.without(fresh),
        )

    def _shared_amplitudes(self) -> bytes:
        """Collect the amplitudes that the sites share; empty with `method.ram.sharing=local`.

        Raises:
            FedsgcgError: ROL-202 for every site whose `site.yaml` does not allow it, RND-402
                without the quorum.
        """
        level = sharing_level(self._plan)
        if not level:
            return b""
        check_consent(level, self._cohort.members, self._cohort.training)
        identity = identity_of(self._plan, 0)
        collected = self._requests.collect(AMPLITUDES, Request(identity))
        answers = admitted(collected.sites)
        parts, problems = usable_amplitudes(
            self._plan, [(part.reply.site, part.reply.amplitudes) for part in answers]
        )
        for problem in problems:
            self._note(problem)
        if len(parts) < self._cohort.fewest_admitted:
            raise quorum_missed(self._plan, collected.sites, self._cohort.fewest_admitted, 0)
        return merge_amplitudes(self._plan, parts)

    def _round(self, state: RoundRecord, number: int) -> RoundRecord:
        """Run one round from the state after the previous one, and commit it."""
        self._log.round = number
        self._log.emit("round.started")
        self._cohort.poll()
        for change in self._cohort.changes:
            self._note(change)
        self._judge.start(state.history, number)
        identity = identity_of(self._plan, number)
        parts = state.parts
        before = Gathered()
        if self._plan.described_before(number):
            before = self._requests.collect(
                STATISTICS,
                Request(identity, state.weights, self._reference(parts), options={"classes": True}),
            )
            parts = self._memory.update(parts, statistics_of(before.parts))
            state = replace(state, weights=with_pool(state.weights, parts))
        prototypes = self._prototypes(parts)
        added = additions(self._plan.federation.aggregator, state.aggregator_state)
        options = dict(added.options)
        if prototypes is not None:
            # A site that subtracts its own part must know whether the prototypes contain it.
            options["held"] = sorted(part.digest() for part in parts.values())
        request = Request(
            identity,
            state.weights,
            prototypes,
            options,
            self._amplitudes,
            added.control_variates,
            self._memory.differences(self._plan.shift, parts),
        )
        trained = self._requests.collect(
            TRAIN, request, self._with_a_term(number), self._negatives(number, parts)
        )
        if self._too_few(trained):
            return self._void(state, number, trained, before)
        self._note_classes(number, prototypes, before.parts or trained.parts)
        merged, aggregator_state = self._merged(state, number, admitted(trained.parts))
        merged, after = self._recalibrated(identity, merged, admitted(trained.sites), parts)
        aggregator_state = with_average(
            aggregator_state, state.aggregator_state, merged, self._plan.federation.ema
        )
        if self._plan.recalibrates and self._too_few(after):
            return self._void(state, number, trained, before, after)
        described = before.parts or trained.parts
        fresh = statistics_of(after.parts if self._plan.described_after_merge else described)
        if not before.sites:
            parts = self._memory.update(parts, fresh)
            prototypes = self._prototypes(parts)
        merged = with_pool(merged, parts)
        check_finite(number, merged, parts)
        rows = site_rows(number, trained.sites, before.sites, after.sites)
        rows += summed_rows(number, trained.parts) + weight_rows(number, aggregator_state)
        if prototypes is not None:
            rows += prototype_rows(
                self._memory, prototypes, fresh, list(self._plan.data.classes), number
            )
        score = source_score([validation_of(part.reply) for part in admitted(trained.parts)])
        record = RoundRecord(
            identity=identity,
            weights=merged,
            parts=parts,
            # The sites validated the model that they received: that of the previous round.
            best=best_so_far(state.best, number - 1, score, state.weights),
            aggregator_state=aggregator_state,
            history=self._judge.finish(number, void=False),
        )
        rows += self._heldout_curve(record)
        record = self._commit(record, rows)
        self._log.emit(
            "round.done",
            loss=mean_loss(trained.parts),
            validation_dice=score,
            validation_round=number - 1,
        )
        return record

    def _prototypes(self, parts: Mapping[str, ClassStatistics]) -> ClassStatistics | None:
        """Return the class statistics of all sites, None without any."""
        return None if self._plan.shift == "others" else self._memory.prototypes(parts)

    def _negatives(
        self, number: int, parts: Mapping[str, ClassStatistics]
    ) -> dict[str, ClassStatistics] | None:
        """Return the other sites' projection statistics by site; None if the plan has none."""
        uses = self._plan.shift == "others" and self._plan.terms(number).contrastive
        if not uses:
            return None
        asked = sorted(self._cohort.training)
        found = self._memory.others(parts, asked)
        known = "PRV-964" in {note.code for note in self.notes}
        first = 2 if self._plan.prototypes.memory == "restart" else 3  # measured in round 2
        if number >= first and len(found) < len(asked) and not known:
            self._note(no_negatives(self._plan, number, [s for s in asked if s not in found]))
        return found

    def _too_few(self, collected: Gathered) -> bool:
        """Whether a round is void.

        Too few answers were admitted, or none of a site with labels, or their sum was not opened.
        """
        sites = [part.answer.site for part in admitted(collected.sites)]
        labelled = any(self._plan.role(site) == "train" for site in sites)
        missing = len(sites) < self._cohort.fewest_admitted
        return missing or not labelled or not collected.parts

    def _reference(self, parts: Mapping[str, ClassStatistics]) -> ClassStatistics | None:
        """Return the common reference of summed statistics; None where none are summed."""
        if not self._plan.privacy.secure_sums.enabled:
            return None
        return self._memory.prototypes(parts)

    def _with_a_term(self, number: int) -> list[str] | None:
        """Sites whose loss has a term in a round; None for all of them."""
        if any(self._plan.terms(number, labelled=False)):
            return None
        return [site for site in self._cohort.training if self._plan.role(site) == "train"]

    def _void(
        self, state: RoundRecord, number: int, trained: Gathered, *others: Gathered
    ) -> RoundRecord:
        """Commit a round whose answers were rejected: model and memory are the previous ones.

        Raises:
            FedsgcgError: RND-402 after `VOID_ROUNDS` such rounds in a row.
        """
        needed = self._cohort.fewest_admitted
        history = self._judge.finish(number, void=True)
        if history.void_rounds >= VOID_ROUNDS:
            raise quorum_missed(self._plan, trained.sites, needed, number)
        found = f"{len(admitted(trained.sites))} admitted"
        expected = training_sites(needed)
        self._note(Problem("RND-421", found, expected, where=f"round {number}"))
        record = replace(state, identity=identity_of(self._plan, number), history=history)
        described = [other.sites for other in others]
        record = self._commit(record, site_rows(number, trained.sites, *described))
        self._log.emit("round.void", code="RND-421")
        return record

    def _commit(self, record: RoundRecord, rows: list[Row]) -> RoundRecord:
        record = replace(record, notes=tuple(self.notes), rows=tuple(rows))
        self._journal.commit_round(record)
        return record

    def _merged(
        self, state: RoundRecord, number: int, trained: list[Collected]
    ) -> tuple[Weights, AggregatorState]:
        """Merge the sites' models by the aggregation rule of the plan."""
        if (dp := self._plan.privacy.dp).central_noise:
            merged = noisy_mean(
                state.weights,
                [self._weighted(part) for part in trained],
                len(self._cohort.training),
                dp.central_clip,
                dp.central_noise,
                noise_of_round(self._plan, number),
            )
            return merged, state.aggregator_state
        rule = AGGREGATORS[self._plan.federation.aggregator]
        unlabelled = self._cohort.of_role("unlabelled")
        weighted = [self._weighted(part) for part in trained]
        parts = with_bounded_shares(weighted, self._plan.federation.most_share)
        parts = with_labelled_decoder(parts, unlabelled, state.weights)
        replies = [part.reply for part in trained]
        context = MergeContext(
            self._plan.federation,
            number,
            {reply.site: reply.metrics for reply in replies},
            {
                reply.site: reply.control_variates
                for reply in replies
                if reply.control_variates is not None
            },
        )
        return rule(state.weights, parts, without_average(state.aggregator_state), context)

    def _recalibrated(
        self,
        identity: Identity,
        merged: Weights,
        trained: list[Collected],
        parts: Mapping[str, ClassStatistics],
    ) -> tuple[Weights, Gathered]:
        """Replace the BatchNorm moments of the merged model by pooled ones.

        The sites whose weights were merged measure the moments under the merged weights. Nothing is
        measured with `federation.norm_policy=average` or for a network without BatchNorm.

        Returns:
            The model, and the answers, which also hold the class statistics of `memory=restart`.
        """
        if not self._plan.recalibrates:
            return merged, Gathered()
        options = {"moments": True, "classes": self._plan.described_after_merge}
        request = Request(identity, merged, self._reference(parts), options=options)
        # A site that missed the deadline or was rejected is not asked again in this round.
        collected = self._requests.collect(
            STATISTICS, request, {part.answer.site for part in trained}
        )
        if self._too_few(collected):
            return merged, collected
        federation = self._plan.federation
        weighting, most_share = federation.weighting, federation.most_share
        if self._plan.privacy.secure_sums.enabled:
            weighting = "samples"  # the sum has the sites' weights already
        moments = merge_moments(moments_of(collected.parts), weighting, most_share)
        self._after_merge = collected.parts
        return moments.put_into(merged), collected

    def _note_classes(
        self, number: int, prototypes: ClassStatistics | None, described: list[Collected]
    ) -> None:
        """Note too few classes for the contrastive loss, once per run."""
        described = described if statistics_of(described) else self._after_merge
        problem = too_few_classes(self._plan, number, prototypes, described)
        if problem and problem.code not in {note.code for note in self.notes}:
            self._note(problem)

    def _finish(self, state: RoundRecord) -> str:
        """Select a model, have it evaluated at the held-out site, and write all results.

        Returns:
            Hash of the selected model.
        """
        plan, last = self._plan, self._plan.federation.rounds
        self._judge.start(state.history, last)
        validation = self._requests.evaluate("validation", self._cohort.asked, state.weights, last)
        score = source_score([part.validation for part in validation])
        self._log.emit("validation.done", round=last, validation_dice=score)
        best = best_so_far(state.best, last, score, state.weights)
        chosen = Best(last, float("nan") if score is None else score, state.weights)
        if plan.federation.selection == "source_validation" and best is not None:
            chosen = best
        elif plan.federation.selection == "source_validation":
            self._note(Problem("RND-405", where="source validation", action=NO_VALIDATION))
        rows = self._journal.rows() + validation_rows(last + 1, validation)
        chosen, tried = self._candidates.choose(state, chosen)
        rows += tried
        prototypes, shift, chosen = self._prototypes_of(chosen)
        rows += shift
        chosen = replace(chosen, weights=without_heads(chosen.weights))
        results.write_rounds(self._disk, plan, rows)
        results.write_prototypes(self._disk, plan, prototypes, identity_of(plan, chosen.round))
        kinds = self._cohort.kinds()
        card = model_card(
            plan,
            chosen,
            self._trained(rows),
            prototypes=prototypes is not None,
            kinds=kinds,
            colour=self._cohort.has_colour(),
        )
        results.write_model(self._disk, plan, chosen.weights, card)
        tested = self._test(chosen)
        rows = rows + evaluation_rows(plan, chosen.round, tested, rows)
        rows += self._test_adapted(chosen, prototypes)
        if not plan.heldout:
            if chosen.round != last:
                validation = self._requests.evaluate(
                    "validation", self._cohort.asked, chosen.weights, chosen.round
                )
            tested = [*validation, *tested]
        rows += stated_rows(plan, chosen.round, tested)
        results.write_rounds(self._disk, plan, rows)
        results.write_results(self._disk, plan, [row for part in tested for row in part.cases])
        return chosen.weights.digest()

    def _prototypes_of(self, chosen: Best) -> tuple[ClassStatistics | None, list[Row], Best]:
        """Collect class statistics of the selected model with BatchNorm in evaluation mode.

        The prototypes used in training belong to an earlier model or to BatchNorm's training mode;
        users of the model need those that match its predictions. With the same normalisation at all
        sites, the between-site trace measures the remaining domain shift of the model. Batch
        moments would normalise every site by its own data.

        Returns:
            The prototypes, the rows of their domain shift, and the model, whose pool of domain
            knowledge (`dofe`) is measured with it; None and no row for a method without class
            statistics.
        """
        if not self._plan.method.statistics or self._plan.method.describes_projections:
            return None, [], chosen
        identity = identity_of(self._plan, self._plan.federation.rounds)
        options = {"classes": True, "norm_mode": "running"}
        request = Request(identity, chosen.weights, options=options)
        collected = self._requests.collect(STATISTICS, request)
        fresh = statistics_of(collected.parts)
        if not fresh:
            self._note(Problem("STA-214", where="the selected model"))
            return None, [], chosen
        prototypes = self._memory.merged(fresh)
        check_finite(chosen.round, chosen.weights, {"": prototypes})
        rows = shift_rows(self._memory, fresh, list(self._plan.data.classes), chosen.round)
        rows += epsilon_rows(identity.round + 1, collected.sites)
        return prototypes, rows, replace(chosen, weights=with_pool(chosen.weights, dict(fresh)))

    def _trained(self, rows: list[Row]) -> list[str]:
        """Sites that the model learned from, including those that trained before they left."""
        contributors = {
            row["site"] for row in rows if row["phase"] == "train" and row["metric"] == "examples"
        }
        labelled = self._cohort.of_role("train")
        return sorted({*labelled, *(self._cohort.departed & contributors)})

    def _test(self, chosen: Best) -> list[SiteEvaluation]:
        """Have a model evaluated at the held-out site, the observers and hospitals without labels.

        Raises:
            FedsgcgError: RND-403 without an answer from the held-out site; its refusal to evaluate
                this model (`REFUSED`) is a note.
        """
        heldout = self._plan.heldout
        nodes = self._cohort.tested
        tested = self._requests.evaluate("test", nodes, chosen.weights, chosen.round)
        if heldout and heldout not in {part.site for part in tested}:
            reason = next(
                (note for note in reversed(self.notes) if note.where.endswith(heldout)), None
            )
            if reason is None or reason.code not in REFUSED:
                raise heldout_unanswered(self._plan, reason)
        for part in tested:
            event = "heldout.done" if part.site == heldout else "observer.done"
            self._log.emit(event, site=part.site, dice=part.dice)
        return tested

    def _test_adapted(self, chosen: Best, prototypes: ClassStatistics | None) -> list[Row]:
        """Have the model evaluated again after its adaptation to each hospital's own images.

        The cases are written to a file of their own, so that no table can take them for results
        without the hospital's images. A missing answer is a note.
        """
        found: list[Row] = []
        rows: list[Row] = []
        for way in self._plan.adapt.by:
            tested = self._requests.evaluate(
                "test",
                self._cohort.tested,
                chosen.weights,
                chosen.round,
                adapt=way,
                prototypes=prototypes if way == PROTOTYPES else None,
                amplitudes=self._amplitudes if way == AMPLITUDE else b"",
            )
            rows += adapted_rows(chosen.round, way, tested)
            found += [{**case, "adapt": way} for part in tested for case in part.cases]
        results.write_adapted(self._disk, self._plan, found)
        return rows

    def _heldout_curve(self, record: RoundRecord) -> list[Row]:
        """Evaluate at the held-out site for the learning curve only, never for selection."""
        federation = self._plan.federation
        # The last model is evaluated after the last round in any case.
        tested_later = record.round == federation.rounds and federation.selection == "last"
        if not federation.heldout_every or record.round % federation.heldout_every or tested_later:
            return []
        tested = self._requests.evaluate(
            "test", self._cohort.of_role("heldout"), record.weights, record.round
        )
        for part in tested:
            self._log.emit("heldout.done", site=part.site, dice=part.dice)
        return evaluation_rows(self._plan, record.round, tested)

    def _weighted(self, part: Collected) -> tuple[str, Weights, float]:
        reply = part.reply
        if reply.weights is None:
            raise AssertionError("an admitted reply of a training round has weights")
        equal = self._plan.federation.weighting == "sites"
        return reply.site, reply.weights, 1.0 if equal else reply.metrics["examples"]

    def _note(self, problem: Problem) -> None:
        if problem not in self.notes:
            self.notes.append(problem)


def weight_rows(number: int, state: AggregatorState) -> list[Row]:
    """Return the sites' weights of a rule that computes its own (phase `merge`)."""
    return [
        row(number, "merge", site, "aggregation_weight", value)
        for site, value in numbers_by_site(state, "weight").items()
    ]


def check_finite(number: int, weights: Weights, parts: Mapping[str, ClassStatistics]) -> None:
    """Check merged results; the ranges of admission make a violation impossible.

    Raises:
        FedsgcgError: STA-213 naming what is not finite.
    """
    statistics = [getattr(p, name) for p in parts.values() for name in ("count", "mean", "scatter")]
    found = {"the weights": [weights.values], "the class statistics": statistics}
    for name, arrays in found.items():
        if not all(np.isfinite(array).all() for array in arrays):
            raise fail("STA-213", where=f"round {number}", found=name)


def initial_weights(plan: Plan) -> Weights:
    """Return the model that round 1 starts from, heads included, a function of the plan alone."""
    seed = stream_seed(plan.seed, "initial weights")
    return Weights.from_state(state_of(build_trained(plan, seed)))
