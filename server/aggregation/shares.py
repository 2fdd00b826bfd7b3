"""A bound on one site's share of a weighted mean (`federation.most_share`).

Weights follow from numbers that the sites state, within limits that the coordinator states. A site
near its limit may still outweigh all others.

Legend: S sites.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedsgcg.server.aggregation.parts import Parts


def with_bounded_shares(parts: Parts, most: float) -> Parts:
    """Return parts whose FedAvg weights are bounded; with `most=1` the same ones.

    Args:
        parts: (site, weights, FedAvg weight) of each admitted payload.
        most: Largest share of one site.
    """
    if most >= 1:
        return parts
    weights = bounded([weight for _, _, weight in parts], most)
    return [
        (site, model, float(weight))
        for (site, model, _), weight in zip(parts, weights, strict=True)
    ]


def bounded(weights: Sequence[float], most: float) -> npt.NDArray[np.float64]:
    """Lower the largest weights until none is more than a share of their sum.

    The others keep their weights. Where the sites are too few for the bound, so that
    S * most <= 1, all get the smallest weight.

    Args:
        weights: (S,), positive.
        most: Largest share, above 0.

    Returns:
        The weights (S,), in the same order.
    """
    given = np.asarray(weights, dtype=np.float64)
    falling = np.sort(given)[::-1]
    for lowered in range(given.size):
        # With k weights lowered to t: t = most * (k * t + the sum of the others).
        room = 1.0 - lowered * most
        if room <= 0:
            break
        limit = most * falling[lowered:].sum() / room
        if falling[lowered] <= limit:
            return given if lowered == 0 else np.minimum(given, limit)
    return np.full(given.shape, falling[-1])
