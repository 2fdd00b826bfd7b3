"""Plans that an aggregation rule cannot serve, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsgcg.common.errors import Problem
from fedsgcg.common.settings.dp_rules import dp_problems
from fedsgcg.common.settings.plan import Plan

WHERE = "federation.aggregator"


def rule_problems(
    plan: Plan, training: Sequence[str], *, has_batch_norm: bool | None = None
) -> Iterator[Problem]:
    """Yield CFG-020 for everything in a plan that its aggregation rule cannot serve.

    A plan that contradicts its own differential privacy gives PRV codes (`dp_rules`).

    Args:
        plan: The plan.
        training: The training sites.
        has_batch_norm: Whether the network has BatchNorm layers; None = as its settings state,
            which do not describe a network by import path.
    """
    yield from dp_problems(plan)
    federation = plan.federation
    if federation.aggregator == "fedbn":
        known = plan.network.norm == "batch" or plan.network.is_own
        if not (known if has_batch_norm is None else has_batch_norm):
            found = "fedbn with a network that has no BatchNorm layers"
            action = "set network.norm=batch, or federation.aggregator=fedavg, which is the same"
            yield Problem("CFG-020", found, "BatchNorm layers", action, WHERE)
    # With one owner of all data there is nobody to compare, and the rule returns its model.
    if federation.aggregator == "krum" and federation.ownership == "by_site":
        needed = 2 * federation.tolerated + 3
        if len(training) < needed:
            found = f"krum with {len(training)} training hospitals"
            expected = f"{needed} or more for federation.tolerated={federation.tolerated}"
            action = (
                "set federation.aggregator=median or trimmed_mean, which need three hospitals for "
                "one broken one, or train on more hospitals"
            )
            yield Problem("CFG-020", found, expected, action, WHERE)
        elif federation.krum.selected > len(training) - federation.tolerated:
            found = f"{federation.krum.selected} models of {len(training)} hospitals"
            expected = f"at most {len(training) - federation.tolerated}, without the broken ones"
            where = "federation.krum.selected"
            yield Problem("CFG-020", found, expected, "lower it", where)
