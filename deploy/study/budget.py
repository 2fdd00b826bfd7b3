"""Fair budgets: how many steps each cell of a study takes, derived before anything trains.

The measure of a fold is the federation of all its training hospitals with the cell's own settings.
With `budget=steps` a cell takes as many steps one after the other as that federation, where the
hospital with most steps counts; with `budget=slices` its hospitals together train on as many slices
as those of the federation, up to half a batch per round. The number of rounds is the same for all,
and with it the schedule of the learning rate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsgcg.clients.data.batches import slices_in, steps_of
from fedsgcg.clients.data.case_files import open_site, resolve_cache
from fedsgcg.clients.data.store import open_store
from fedsgcg.common.settings.plan import MethodSettings, Plan

Clients = Sequence[Sequence[range]]
"""Per client one range for each of its hospitals, as long as the hospital has slices."""
MOST_STEPS = 1_000_000
"""Most steps of a round, as of `method.steps_per_round`."""

_COUNTED: dict[tuple[object, ...], int] = {}


def budgeted(tree: Mapping[str, Any], hospitals: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's settings with the steps per round that its budget allows.

    Args:
        tree: Resolved settings of the cell.
        hospitals: `data.sites`, `observers` and `unlabelled` of its fold, by those names.
    """
    if tree.get("budget", "rounds") == "rounds":
        return dict(tree)
    plan = Plan.from_tree(tree)
    measure = _federation(tree, hospitals)
    method, rounds = plan.method, plan.federation.rounds
    clients = _clients(plan)
    if plan.federation.ownership != "by_site":
        steps = matching_steps(_clients(measure), clients, measure.method, plan.budget)
        method = replace(method, steps_per_round=steps)
    longest, slices = amounts(clients, method)
    return {
        **tree,
        "method": {**tree["method"], "steps_per_round": method.steps_per_round},
        "planned_steps": rounds * longest,
        "planned_slices": rounds * slices,
    }


def matching_steps(measure: Clients, clients: Clients, method: MethodSettings, budget: str) -> int:
    """Return the steps per round of `clients` that match the round of another federation.

    Args:
        measure: Clients of that federation.
        clients: Clients that get the steps.
        method: Batch sizes and passes, the same for both.
        budget: `steps` or `slices`.
    """
    longest, slices = amounts(measure, method)
    if budget == "steps":
        return longest

    def taken(steps: int) -> int:
        return amounts(clients, replace(method, steps_per_round=steps))[1]

    above = max(1, bisect_left(range(MOST_STEPS + 1), slices, lo=1, key=taken))
    return min((max(1, above - 1), above), key=lambda steps: abs(taken(steps) - slices))


def amounts(clients: Clients, method: MethodSettings) -> tuple[int, int]:
    """Return the steps of a round at the client with most of them, and the slices of all."""
    steps = [steps_of(tables, method) for tables in clients]
    taken = [slices_in(tables, method, own) for tables, own in zip(clients, steps, strict=True)]
    return max(steps), sum(taken)


def _federation(tree: Mapping[str, Any], hospitals: Mapping[str, Any]) -> Plan:
    """Return the plan of the federation that is the measure of a cell."""
    own = {**tree, "observers": hospitals["observers"], "unlabelled": hospitals["unlabelled"]}
    own["data"] = {**tree["data"], "sites": hospitals["sites"]}
    own["federation"] = {**tree["federation"], "ownership": "by_site"}
    return Plan.from_tree(own)


def _clients(plan: Plan) -> list[list[range]]:
    """Return the clients of a federation that train, with the number of slices of each hospital."""
    training = [site for site in plan.members() if plan.trains(site)]
    return [
        [range(_training_slices(plan, name)) for name in plan.hospitals_of(site)]
        for site in training
    ]


def _training_slices(plan: Plan, hospital: str) -> int:
    """Return the number of training slices of a hospital, from its slice cache."""
    masks, target = not plan.hides_masks(hospital), hospital in plan.unlabelled
    key = (plan.data.root, hospital, repr(plan.data), plan.site.cache, masks, target)
    if key not in _COUNTED:
        site = open_site(Path(plan.data.root), hospital, plan.data, masks=masks)
        cache = resolve_cache(plan.site)
        store = open_store(site, plan.data, cache, heldout=False, target=target, masks=masks)
        _COUNTED[key] = len(store.slices("train"))
    return _COUNTED[key]
