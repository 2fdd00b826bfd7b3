"""FedAvg: merging the sites' weights and the moments of their BatchNorm layers.

Sums are computed in float64 and in the order of the sites' names, so that the result does not
depend on the order of arrival, not even in the last bit. Memory: one float64 array besides the
inputs.

Each entry of a network's state is merged as follows:

| entry | merge |
| --- | --- |
| convolution weights and biases | weighted mean |
| normalisation `weight` and `bias` (scale and offset) | weighted mean |
| BatchNorm running moments, `norm_policy=average` | weighted mean (no between-site variance) |
| BatchNorm running moments, `norm_policy=recalibrate` | pooled by `merge_moments` |
| BatchNorm `num_batches_tracked` (a counter) | largest of the sites |

With `recalibrate` every site measures the moments under the merged weights.

Legend: P floating-point weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np

from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.parts import sorted_by_site
from fedsgcg.server.aggregation.shares import bounded


def merge_weights(parts: Sequence[tuple[str, Weights, float]]) -> Weights:
    """Return the weighted mean of the sites' models (FedAvg).

    Args:
        parts: (site, weights, FedAvg weight) of each admitted payload, with positive weights and
            equal layouts.

    Returns:
        Weights with values (P,) float32; each value is between the smallest and the largest of the
        sites.

    Raises:
        ValueError: No part, a duplicate site, different layouts, or a FedAvg weight that is not
            positive.
    """
    ordered = sorted_by_site(parts)
    _, first, _ = ordered[0]
    names = [name for name, _ in first.counters]
    total = np.zeros(first.values.size, np.float64)
    for site, weights, share in ordered:
        if weights.layout != first.layout or [name for name, _ in weights.counters] != names:
            raise ValueError(f"layout of {site} differs from that of {ordered[0][0]}")
        if not (np.isfinite(share) and share > 0):
            raise ValueError(f"FedAvg weight of {site}: found {share}, expected a positive number")
        total += weights.values * np.float64(share)
    total /= sum(share for _, _, share in ordered)
    counters = [dict(weights.counters) for _, weights, _ in ordered]
    largest = tuple((name, max(counter[name] for counter in counters)) for name in names)
    return Weights(first.layout, total.astype(np.float32), largest)


def merge_moments(
    parts: Sequence[tuple[str, NormMoments]], weighting: str = "samples", most_share: float = 1.0
) -> NormMoments:
    """Pool the sites' moments of the inputs of the merged model's BatchNorm layers.

    Args:
        parts: (site, moments) of each admitted payload.
        weighting: `samples` pools over all values; `sites` gives every site the same weight.
        most_share: Largest share of one site in the number of values (`shares.bounded`); 1 = any.

    Raises:
        ValueError: No part, a duplicate site, different layers, or an unknown weighting.
    """
    moments = [part for _, part in sorted_by_site(parts)]
    if weighting == "sites":
        mean_count = np.mean([part.count for part in moments], axis=0)
        moments = [part.weighted_equally(mean_count) for part in moments]
    elif weighting != "samples":
        raise ValueError(f"weighting: found {weighting!r}, expected samples or sites")
    if most_share < 1:
        moments = _with_bounded_counts(moments, most_share)
    return reduce(add, moments)


def _with_bounded_counts(moments: Sequence[NormMoments], most: float) -> list[NormMoments]:
    """Bound the share of each site in the values of each layer (S, L) that a site has seen."""
    counts = np.stack([part.count for part in moments])
    for layer in counts.T:  # a view: the counts are lowered in place
        seen = layer > 0
        if seen.any():
            layer[seen] = bounded(layer[seen], most)
    return [part.weighted_equally(count) for part, count in zip(moments, counts, strict=True)]
