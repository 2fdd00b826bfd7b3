"""Merging the sites' class statistics.

Sums are computed in float64 and in the order of the sites' names, so that the result does not
depend on the order of arrival, not even in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np
import numpy.typing as npt

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.aggregation.parts import sorted_by_site


def merge_statistics(
    parts: Sequence[tuple[str, ClassStatistics]], weighting: str = "pixels", trimmed: int = 0
) -> ClassStatistics:
    """Pool the sites' class statistics (docs/explanation/sgcg.md, "Statistics").

    Args:
        parts: (site, statistics) of each admitted payload.
        weighting: `pixels` pools over all pixels; `sites` gives every site that has seen a class
            the same weight in it, while the counts remain those of all pixels; `median` is
            `middle`.
        trimmed: Sites left out of each class (`without_farthest`).

    Raises:
        ValueError: No part, a duplicate site, different shapes, or an unknown weighting.
    """
    statistics = without_farthest([part for _, part in sorted_by_site(parts)], trimmed)
    pooled = reduce(add, statistics)
    if weighting == "pixels":
        return pooled
    if weighting == "median":
        return middle(statistics)
    if weighting != "sites":
        raise ValueError(f"weighting: found {weighting!r}, expected pixels, sites or median")
    equal = reduce(add, [part.weighted_equally() for part in statistics])
    pixels_per_site = np.divide(
        pooled.count, equal.count, out=np.zeros_like(pooled.count), where=equal.count > 0
    )
    return ClassStatistics(pooled.count, equal.mean, equal.scatter * pixels_per_site[:, None, None])


def without_farthest(parts: Sequence[ClassStatistics], trimmed: int) -> list[ClassStatistics]:
    """Leave out, in each class, the sites whose statistics are farthest from the middle.

    The distance is |mean - m|^2 + (r - q)^2, where r is the root of the covariance's trace, and m
    and q are the medians of the means and of r over the sites that have seen the class. Of S such
    sites at most (S - 1) // 2 are left out; of equal distances that of the later name. As long as
    no more than these are broken, the middle is among the values of the others, and no part that is
    kept is farther from it than the farthest of the others.

    The result is pooled exactly, so it stays symmetric and positive semi-definite. It is no longer
    the statistics of all pixels: those of the trimmed sites are missing, a site cannot be removed
    from it by subtraction, and one site's numbers may decide whether those of another count.

    Args:
        parts: Statistics of each site, in the order of their names.
        trimmed: Most sites to leave out of each class; with 0 the parts are returned as they are.
    """
    if not trimmed or not parts:
        return list(parts)
    kept = np.ones((len(parts), parts[0].num_classes))
    for k in range(parts[0].num_classes):
        seen = [s for s, part in enumerate(parts) if part.count[k] > 0]
        number = min(trimmed, (len(seen) - 1) // 2)
        if number > 0:
            distances = _from_middle([parts[s] for s in seen], k)
            for position in np.argsort(distances, kind="stable")[-number:]:
                kept[seen[position], k] = 0.0
    return [part.scaled(keep) for part, keep in zip(parts, kept, strict=True)]


def _from_middle(parts: Sequence[ClassStatistics], k: int) -> npt.NDArray[np.float64]:
    means = np.stack([part.mean[k] for part in parts])
    roots = np.sqrt([max(float(np.trace(part.covariance[k])), 0.0) for part in parts])
    offset = np.square(means - np.median(means, axis=0)).sum(axis=1)
    return np.asarray(offset + np.square(roots - np.median(roots)))


def middle(parts: Sequence[ClassStatistics]) -> ClassStatistics:
    """Return the median of the sites' class means, with a covariance from their middle.

    Each entry of a class mean is the median over the sites that have seen the class. The covariance
    is that of the site whose covariance has the median trace; of an even number of sites the mean
    of the two middle ones. As long as fewer than half of the sites are broken, every entry of the
    mean and the trace are between values of the others. The counts are those of all pixels.

    Source: coordinate-wise median, Yin et al. 2018 (arXiv 1803.01498).

    Args:
        parts: Statistics of each site, in the order of their names.
    """
    pooled = reduce(add, parts)
    mean, covariance = pooled.mean.copy(), pooled.covariance.copy()
    for k in range(pooled.num_classes):
        seen = [part for part in parts if part.count[k] > 0]
        if seen:
            mean[k] = np.median([part.mean[k] for part in seen], axis=0)
            order = np.argsort([np.trace(part.covariance[k]) for part in seen], kind="stable")
            chosen = {int(order[(len(seen) - 1) // 2]), int(order[len(seen) // 2])}
            covariance[k] = np.mean([seen[s].covariance[k] for s in sorted(chosen)], axis=0)
    return ClassStatistics(pooled.count, mean, covariance * pooled.count[:, None, None])
