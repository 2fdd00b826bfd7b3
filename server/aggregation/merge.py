"""Merging the sites' weights, class statistics and BatchNorm moments.

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

Legend: P floating-point weights, S sites, K classes, A feature channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np

from common.statistics import ClassStatistics
from common.wire.norm_moments import NormMoments
from common.wire.payload import Weights

Part = TypeVar("Part", bound=tuple[Any, ...])


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
    ordered = _by_site(parts)
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


def merge_statistics(
    parts: Sequence[tuple[str, ClassStatistics]], weighting: str = "pixels"
) -> ClassStatistics:
    """Pool the sites' class statistics (docs/explanation/sgcg.md, "Statistics").

    Args:
        parts: (site, statistics) of each admitted payload.
        weighting: `pixels` pools over all pixels; `sites` gives every site that has seen a class
            the same weight in it, while the counts remain those of all pixels.

    Raises:
        ValueError: No part, a duplicate site, different shapes, or an unknown weighting.
    """
    statistics = [part for _, part in _by_site(parts)]
    pooled = reduce(add, statistics)
    if weighting == "pixels":
        return pooled
    if weighting != "sites":
        raise ValueError(f"weighting: found {weighting!r}, expected pixels or sites")
    equal = reduce(add, [part.weighted_equally() for part in statistics])
    pixels_per_site = np.divide(
        pooled.count, equal.count, out=np.zeros_like(pooled.count), where=equal.count > 0
    )
    return ClassStatistics(pooled.count, equal.mean, equal.scatter * pixels_per_site[:, None, None])


def merge_moments(
    parts: Sequence[tuple[str, NormMoments]], weighting: str = "samples"
) -> NormMoments:
    """Pool the sites' moments of the inputs of the merged model's BatchNorm layers.

    Args:
        parts: (site, moments) of each admitted payload.
        weighting: `samples` pools over all values; `sites` gives every site the same weight.

    Raises:
        ValueError: No part, a duplicate site, different layers, or an unknown weighting.
    """
    moments = [part for _, part in _by_site(parts)]
    if weighting == "sites":
        mean_count = np.mean([part.count for part in moments], axis=0)
        moments = [part.weighted_equally(mean_count) for part in moments]
    elif weighting != "samples":
        raise ValueError(f"weighting: found {weighting!r}, expected samples or sites")
    return reduce(add, moments)


def _by_site(parts: Sequence[Part]) -> list[Part]:
    ordered = sorted(parts, key=lambda part: str(part[0]))
    sites = [part[0] for part in ordered]
    if not sites:
        raise ValueError("found nothing to merge, expected at least one site")
    if len(set(sites)) != len(sites):
        raise ValueError(f"found a site twice in {sites}, expected each once")
    return ordered
