"""FedCE: more weight for the sites that contribute most.

A site's contribution has two parts. Its *novelty* is 1 minus the cosine of its update to the
weighted sum of the others' updates, with the mean of the cosines over all rounds so far. Its *need*
is the validation loss, at the site, of the merged model without the site,
(x - w_s x_s) / (1 - w_s), i.e. 1 minus the Dice that the site states. Each part is divided by its
sum over the sites; the weight is their mean (`mode=plus`) or their product divided by its sum
(`times`).

The others' consensus has the weights of FedAvg. As long as no site has stated a Dice (in the first
round, or where validation is withheld everywhere) the models are merged as in FedAvg; a single site
without one has the mean need of the others. A site can raise its weight by stating a low Dice;
novelty is computed here.

Source: Jiang et al. 2023 (CVPR), "Fair Federated Medical Image Segmentation via Client Contribution
Estimation". State: `cosines/<site>` (2,) float64, sum and number; `weight/<site>` (1,) float64 and
`digest/<site>` (32,) uint8 of the models merged last, from which a site knows its own weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.parts import (
    MergeContext,
    Parts,
    by_site,
    entry,
    number_of,
    numbers_by_site,
    sorted_by_site,
)
from fedsgcg.server.aggregation.site_weights import merge_with
from fedsgcg.server.records.checkpoint import AggregatorState
from fedsgcg.server.screening.weights import Model, Updates

Array = npt.NDArray[np.float64]


def fedce(
    previous: Weights, parts: Parts, state: AggregatorState, context: MergeContext
) -> tuple[Weights, AggregatorState]:
    """Return the mean of the models with the weights of their contributions, and these."""
    ordered = sorted_by_site(parts)
    sites = [site for site, _, _ in ordered]
    shares = np.array([share for _, _, share in ordered]) / sum(share for _, _, share in ordered)
    updates = Updates.of([Model(site, weights) for site, weights, _ in ordered], previous)
    cosines = {site: np.asarray(value) for site, value in by_site(state, "cosines").items()}
    for site, cosine in zip(sites, consensus_cosines(updates.gram, shares), strict=True):
        cosines[site] = cosines.get(site, np.zeros(2)) + np.array([cosine, 1.0])
    novelty = np.array([1.0 - cosines[site][0] / cosines[site][1] for site in sites])
    needs = stated_needs(sites, context.metrics)
    weights = shares
    if needs is not None:
        weights = contributions(novelty, needs, context.settings.fedce.mode)
    named = dict(zip(sites, weights.tolist(), strict=True))
    after = {entry("cosines", site): value for site, value in sorted(cosines.items())}
    for site, model, _ in ordered:
        after[entry("weight", site)] = number_of(named[site])
        after[entry("digest", site)] = np.frombuffer(bytes.fromhex(model.digest()), np.uint8)
    return merge_with(ordered, named), after


def consensus_cosines(gram: Array, shares: Array) -> Array:
    """Return (S,) the cosine of each update to the weighted sum of the others'.

    Args:
        gram: (S, S) inner products of the updates.
        shares: (S,) weights.

    Returns:
        Cosines in [-1, 1]; 1, i.e. nothing new, where one of the two is zero or there is no other.
    """
    others = np.broadcast_to(shares, gram.shape) * (1.0 - np.eye(len(shares)))
    inner = np.einsum("st,st->s", others, gram)
    square = np.maximum(np.einsum("st,tu,su->s", others, gram, others), 0.0)
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0) * square)
    cosines: Array = np.divide(inner, norms, out=np.ones_like(inner), where=norms > 0)
    return np.asarray(np.clip(cosines, -1.0, 1.0))


def stated_needs(sites: Sequence[str], metrics: Mapping[str, Mapping[str, float]]) -> Array | None:
    """Return (S,) the validation loss without each site; None if no site states its Dice."""
    dice = [metrics.get(site, {}).get("validation_dice_without", math.nan) for site in sites]
    needs = 1.0 - np.array(dice)
    known = np.isfinite(needs)
    return np.where(known, needs, needs[known].mean()) if known.any() else None


def contributions(novelty: Array, needs: Array, mode: str) -> Array:
    """Return (S,) weights with the sum 1."""
    first, second = _shares(novelty), _shares(needs)
    return (first + second) / 2.0 if mode == "plus" else _shares(first * second)


def merged_shares(state: AggregatorState) -> dict[str, float]:
    """Return digest -> relative weight of the models that were merged last."""
    weights = numbers_by_site(state, "weight")
    total = math.fsum(weights.values())
    return {
        bytes(digest).hex(): weights[site] / total
        for site, digest in by_site(state, "digest").items()
    }


def _shares(values: Array) -> Array:
    """Divide by the sum; equal shares where it is zero."""
    total = values.sum()
    return values / total if total > 0 else np.full_like(values, 1.0 / len(values))
