"""Merging the sites' class statistics.

Sums are computed in float64 and in the order of the sites' names, so that the result does not
depend on the order of arrival, not even in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.aggregation.parts import sorted_by_site


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
    statistics = [part for _, part in sorted_by_site(parts)]
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
