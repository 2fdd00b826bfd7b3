"""Models that the coordinator derives from the last rounds: an average, a fitted output layer.

Each is validated by the training sites and replaces the selected model only if it is better; with
`federation.selection=last` the average is the last model. The held-out hospital has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedsgcg.common.errors import Problem
from fedsgcg.common.settings.plan import SGCG, Plan
from fedsgcg.common.wire.messages import STATISTICS, Request
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_moments
from fedsgcg.server.aggregation.moving_average import average_of
from fedsgcg.server.aggregation.prototypes import PrototypeMemory
from fedsgcg.server.aggregation.recalibration import recalibrated
from fedsgcg.server.records.checkpoint import Best, RoundRecord
from fedsgcg.server.selection import source_score
from fedsgcg.server.sites.enrolment import Cohort
from fedsgcg.server.sites.replies import Row, moments_of, row, statistics_of
from fedsgcg.server.sites.requests import SiteRequests, identity_of


@dataclass(frozen=True)
class Candidates:
    """The candidates of one federation.

    Attributes:
        plan: The plan.
        cohort: The enrolled sites.
        requests: Requests to them.
        memory: How class statistics are merged.
        note: Called with every problem.
    """

    plan: Plan
    cohort: Cohort
    requests: SiteRequests
    memory: PrototypeMemory
    note: Callable[[Problem], None]

    def choose(self, state: RoundRecord, selected: Best) -> tuple[Best, list[Row]]:
        """Return the model to evaluate, and the rows on what was tried.

        Args:
            state: State after the last round.
            selected: The model that `federation.selection` chose among the rounds.
        """
        chosen, averaged = self._averaged(state, selected)
        chosen, fitted = self._fitted(chosen)
        return chosen, averaged + fitted

    def _averaged(self, state: RoundRecord, selected: Best) -> tuple[Best, list[Row]]:
        """Choose between the selected model and the average over the rounds (`federation.ema`)."""
        average = average_of(state.aggregator_state, state.weights)
        if average is None:
            return selected, []
        last = state.round
        average = self._with_own_moments(average, last)
        score = self._validated(average, last)
        found = [] if score is None else [row(last, "merge", "", "ema_dice", score)]
        wins = score is not None and not score <= selected.score  # an unknown score is worse
        if self.plan.federation.selection == "last" or wins:
            return Best(last, float("nan") if score is None else score, average), found
        return selected, found

    def _with_own_moments(self, average: Weights, number: int) -> Weights:
        """Return the average with BatchNorm's moments measured under it, as after every merge."""
        if not self.plan.recalibrates:
            return average
        request = Request(identity_of(self.plan, number), average, options={"moments": True})
        parts = moments_of(self.requests.collect(STATISTICS, request))
        if not parts:
            return average
        return merge_moments(parts, self.plan.federation.weighting).put_into(average)

    def _fitted(self, selected: Best) -> tuple[Best, list[Row]]:
        """Choose between a model and the same with a fitted output layer (CCVR).

        Returns:
            The model, and the rows of both validations and the decision (1 = fitted).
        """
        plan = self.plan
        if plan.method.name not in SGCG or not plan.method.sgcg.recalibration:
            return selected, []
        options = {"classes": True, "norm_mode": "running", "raw": True}
        identity = identity_of(plan, plan.federation.rounds)
        request = Request(identity, selected.weights, options=options)
        fresh = statistics_of(self.requests.collect(STATISTICS, request))
        if not fresh:
            self.note(Problem("STA-214", where="the fit of the output layer"))
            return selected, []
        fitted = recalibrated(selected.weights, self.memory.merged(fresh), plan)
        before, after = (self._validated(w, selected.round) for w in (selected.weights, fitted))
        if before is None or after is None:
            action = "raise data.validation_fraction, or set method.sgcg.recalibration=0"
            self.note(Problem("RND-405", where="the fit of the output layer", action=action))
            return selected, []
        figures = {
            "head_dice_before": before,
            "head_dice_fitted": after,
            "head_fitted": float(after > before),
        }
        found = [row(selected.round, "merge", "", name, value) for name, value in figures.items()]
        if after > before:
            return replace(selected, weights=fitted, score=after), found
        return selected, found

    def _validated(self, weights: Weights, number: int) -> float | None:
        """Return the source-validation Dice of a model; None without a validation case."""
        evaluated = self.requests.evaluate("validation", self.cohort.asked, weights, number)
        return source_score([part.validation for part in evaluated])
