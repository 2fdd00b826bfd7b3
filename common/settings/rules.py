"""Plans that an aggregation rule cannot serve, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsgcg.common.errors import Problem
from fedsgcg.common.settings.aggregation import VALIDATED
from fedsgcg.common.settings.plan import Plan

WHERE = "federation.aggregator"


def rule_problems(
    plan: Plan, training: Sequence[str], *, has_batch_norm: bool | None = None
) -> Iterator[Problem]:
    """Yield CFG-020 or CFG-042 for everything in a plan that its aggregation rule cannot serve.

    Args:
        plan: The plan.
        training: The training sites.
        has_batch_norm: Whether the network has BatchNorm layers; None = as its settings state,
            which do not describe a network by import path.
    """
    federation = plan.federation
    yield from _hospital_problems(plan, training)
    if federation.aggregator == "fedbn":
        known = plan.network.norm == "batch" or plan.network.is_own
        if not (known if has_batch_norm is None else has_batch_norm):
            found = "fedbn with a network that has no BatchNorm layers"
            action = "set network.norm=batch, or federation.aggregator=fedavg, which is the same"
            yield Problem("CFG-020", found, "BatchNorm layers", action, WHERE)
    if federation.ema and federation.aggregator == "fedbn":
        found = "federation.ema with fedbn, whose BatchNorm layers stay at the sites"
        expected = "federation.ema=0: each site would normalise the average by layers of one round"
        yield Problem("CFG-020", found, expected, "set one of the two", "federation.ema")
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


def _hospital_problems(plan: Plan, training: Sequence[str]) -> Iterator[Problem]:
    """Yield CFG-042 for a rule that cannot use one of the training hospitals."""
    rule, federation = plan.federation.aggregator, plan.federation
    if federation.ownership != "by_site":
        return  # with one client every rule returns its model
    sites = dict.fromkeys([*training, *(site for site in plan.unlabelled if plan.trains(site))])
    blind = [site for site in sites if not plan.validates(site)]
    if rule in VALIDATED and blind:
        found = f"{rule} with {', '.join(blind)}, whose masks are not for training"
        expected = "validation cases at every training hospital, from which the weights follow"
        action = "set federation.aggregator=fedavg, or leave unlabelled empty"
        yield Problem("CFG-042", found, expected, action, WHERE)
    unlabelled = [site for site in sites if plan.role(site) == "unlabelled"]
    if rule == "krum" and unlabelled:
        found = f"krum with {', '.join(unlabelled)}, which trains without masks"
        expected = "models that were trained alike: krum takes the one nearest to the others"
        action = "set federation.aggregator=median or trimmed_mean, or leave unlabelled empty"
        yield Problem("CFG-042", found, expected, action, WHERE)
