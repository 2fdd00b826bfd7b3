"""FedDG-GA: more weight for the sites that lose most when the models are merged.

The generalisation gap of a site is the loss of the merged model minus that of its own model, both
on its validation cases: g_s = loss(x; s) - loss(x_s; s). With the Dice loss it is the Dice of its
own model minus that of the merged one. Every round

    a_s <- clip(a_s + d g_s / (D max|g|), 0, 1), then divided by the sum;   a_s = 1/D at first
    d = step (1 - (i - 1) / decay_rounds) in the i-th update, at least 0

for the D sites, and the models are merged with the weights a_s. Where all gaps are equal nobody is
treated worse than the others, and the weights stay; so does that of a site without a gap, which did
not take part in the round before or whose validation is withheld. A site moves its weight by at
most d/D in a round, whatever it states.

The published code multiplies by 1/3 for its three sites, here 1/D; it decays the first step too,
here the first step is `step`. Source: Zhang et al. 2023 (CVPR), "Federated Domain Generalization
with Generalization Adjustment". State: `weight/<site>`, `trained/<site>` (1,) float64, the last
being the validation Dice of the site's own model of the round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedsgcg.common.settings.aggregation import FedDGGASettings
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.parts import (
    MergeContext,
    Parts,
    entry,
    number_of,
    numbers_by_site,
    sorted_by_site,
)
from fedsgcg.server.aggregation.site_weights import merge_with
from fedsgcg.server.records.checkpoint import AggregatorState


def feddg_ga(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the mean of the models with the adjusted weights, and these."""
    del previous
    known = numbers_by_site(state, "weight")
    trained = numbers_by_site(state, "trained")
    sites = sorted({*known, *(site for site, _, _ in parts)})
    equal = 1.0 / len(sites)
    weights = _normalised({site: known.get(site, equal) for site in sites})
    gaps = {}
    for site, metrics in sorted(context.metrics.items()):
        gap = trained.get(site, math.nan) - metrics.get("validation_dice", math.nan)
        if math.isfinite(gap):
            gaps[site] = gap
    weights = adjusted(weights, gaps, step_of(context.settings.feddg_ga, context.number - 1))
    own = {
        site: metrics["validation_dice_trained"]
        for site, metrics in context.metrics.items()
        if math.isfinite(metrics.get("validation_dice_trained", math.nan))
    }
    after = {entry("weight", site): number_of(value) for site, value in weights.items()}
    after |= {entry("trained", site): number_of(value) for site, value in sorted(own.items())}
    return merge_with(sorted_by_site(parts), weights), after


def step_of(settings: FedDGGASettings, update: int) -> float:
    """Return d in an update, counted from 1; zero after `decay_rounds` of them."""
    return settings.step * min(max(1.0 - (update - 1) / settings.decay_rounds, 0.0), 1.0)


def adjusted(
    weights: Mapping[str, float], gaps: Mapping[str, float], step: float
) -> dict[str, float]:
    """Return the weights (sum 1) after an update; unchanged where all gaps are equal.

    Args:
        weights: Weights of the D sites, with the sum 1.
        gaps: Generalisation gaps of those sites that have one.
        step: d.
    """
    values = list(gaps.values())
    if not values or max(values) == min(values):
        return dict(weights)
    scale = step / (len(weights) * max(abs(value) for value in values))
    moved = {
        site: min(max(weight + scale * gaps.get(site, 0.0), 0.0), 1.0)
        for site, weight in weights.items()
    }
    return _normalised(moved) if any(moved.values()) else dict(weights)


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    return {site: weight / total for site, weight in weights.items()}
