"""Plans that cannot be differentially private as they are, and what a whole run costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from fedsgcg.common.differential_privacy.accounting import Spending, epsilon_of
from fedsgcg.common.errors import Problem
from fedsgcg.common.settings.plan import Plan

PER_PATIENT: Final = ("source", "sgcg")
"""Methods whose loss can be computed for one patient alone."""
RULES: Final = (
    *("fedavg", "fedavgm", "fedadam", "fedyogi"),
    *("trimmed_mean", "median", "norm_clipping", "krum"),
)
"""Aggregation rules that use nothing but the sites' weights."""
FRESH: Final = ("restart", "lagged", "cumulative", "discount", "momentum")
"""Memories whose statistics are one pass over the patients; the site adds nothing of its own."""
FEW_SITES: Final = 30
"""Training hospitals below which central noise hides nobody at a useful accuracy."""


def dp_problems(plan: Plan) -> Iterator[Problem]:
    """Yield what in a plan contradicts its differential privacy, and a run that costs too much."""
    dp = plan.privacy.dp
    if not dp.channels and not dp.central_noise:
        return
    if plan.network.norm == "batch" or plan.network.is_own:
        found = (
            f"network.norm={plan.network.norm}" if not plan.network.is_own else plan.network.name
        )
        expected = "the built-in network with a normalisation of each slice by itself"
        yield Problem("PRV-971", found, expected, "set network.norm=group", "network.norm")
    yield from _misfits(plan)
    if not dp.channels:
        return
    cost = epsilon_of(planned(plan), dp.delta)
    if cost > dp.epsilon:
        found = f"a run of {plan.federation.rounds} rounds costs epsilon = {cost:.3g}"
        expected = f"at most privacy.dp.epsilon={dp.epsilon:g} at delta={dp.delta:g}"
        action = (
            "raise privacy.dp.weights_noise or privacy.dp.statistics_noise, lower "
            "federation.rounds, method.steps_per_round or privacy.dp.sampling_rate, or allow more"
        )
        yield Problem("PRV-974", found, expected, action, "privacy.dp")


def planned(plan: Plan) -> list[Spending]:
    """Return what one site releases in a whole run of a plan."""
    dp, rounds = plan.privacy.dp, plan.federation.rounds
    spent = []
    if dp.weights:
        spent.append(round_spending(plan, rounds))
    if dp.statistics and plan.method.statistics:
        releases = sum(
            plan.described_before(number) or plan.described_in_training(number)
            for number in range(1, rounds + 1)
        )
        # One more of the selected model, after the last round.
        spent.append(Spending(dp.statistics_noise, 1.0, releases + 1))
    return spent


def round_spending(plan: Plan, rounds: int = 1) -> Spending:
    """Return what the training of some rounds costs."""
    dp = plan.privacy.dp
    return Spending(dp.weights_noise, dp.sampling_rate, rounds * steps_of_round(plan))


def steps_of_round(plan: Plan) -> int:
    """Return the training steps of a private round; the number does not depend on the data."""
    method = plan.method
    return method.steps_per_round or method.local_epochs * math.ceil(
        1 / plan.privacy.dp.sampling_rate
    )


def _misfits(plan: Plan) -> Iterator[Problem]:
    """Yield PRV-972 for every setting that lets a patient out without noise."""
    dp = plan.privacy.dp
    federation, method = plan.federation, plan.method
    checks: list[tuple[bool, str, object, str]] = []
    if dp.channels:
        # A validation score is computed from patients, too.
        last = federation.selection == "last"
        checks += [
            (last, "federation.selection", federation.selection, "last"),
            (
                federation.aggregator in RULES,
                "federation.aggregator",
                federation.aggregator,
                " | ".join(RULES),
            ),
        ]
    if dp.weights:
        alone = method.name in PER_PATIENT
        checks.append((alone, "method.name", method.name, " | ".join(PER_PATIENT)))
    if dp.statistics:
        checks += [
            (plan.unit_features, "prototypes.normalize", False, "true, which bounds a patient"),
            (
                plan.prototypes.memory in FRESH,
                "prototypes.memory",
                plan.prototypes.memory,
                " | ".join(FRESH),
            ),
        ]
        expected = "false: the statistics of projections have no noise"
        where = "method.segclr.global_negatives"
        checks.append((not method.describes_projections, where, True, expected))
        fitted = method.sgcg.recalibration
        expected = "0: its features have no bound"
        checks.append((not fitted, "method.sgcg.recalibration", fitted, expected))
    if dp.central_noise:
        equal = federation.aggregator == "fedavg" and federation.weighting == "sites"
        found = f"{federation.aggregator}, {federation.weighting}"
        checks.append((equal, "federation.weighting", found, "fedavg with weighting=sites"))
    for holds, where, value, expected in checks:
        if not holds:
            yield Problem("PRV-972", f"{where}={value}", expected, f"set {where} so", where)
