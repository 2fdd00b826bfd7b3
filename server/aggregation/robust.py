"""Robust merges of the sites' weights: trimmed mean, median and norm clipping.

They bound what one site can do to the merged model, also where no screen finds it. Each is FedAvg
when nothing is trimmed or clipped. Sums are computed in float64 and in the order of the sites'
names, block by block.

Sources: coordinate-wise trimmed mean and median, Yin et al. 2018 (arXiv 1803.01498); norm clipping,
Sun et al. 2019 (arXiv 1911.07963). Pure NumPy. Legend: S sites, P floating-point weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fedsgcg.common.wire.learnable import learnable
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.parts import Parts, sorted_by_site

BLOCK: Final = 1 << 16
"""Weights of each site that are sorted at a time."""


def trimmed_mean(parts: Parts, tolerated: int) -> Weights:
    """Return the weighted mean of each weight without its smallest and largest values.

    Args:
        parts: (site, weights, FedAvg weight) of each admitted payload, as for `merge_weights`.
        tolerated: Values dropped at either end, at most (S - 1) // 2. As long as no more sites are
            broken, each merged weight is between two values of the others.

    Raises:
        ValueError: As `merge_weights`, or a negative number.
    """
    if tolerated < 0:
        raise ValueError(f"tolerated: found {tolerated}, expected 0 or more")
    merged = merge_weights(parts)
    ordered = sorted_by_site(parts)
    dropped = min(tolerated, (len(ordered) - 1) // 2)
    if not dropped:
        return merged
    shares = np.array([share for _, _, share in ordered])
    values = np.empty_like(merged.values)
    for start in range(0, values.size, BLOCK):
        block = slice(start, start + BLOCK)
        stack = np.stack([weights.values[block] for _, weights, _ in ordered])
        values[block] = _trimmed(stack.astype(np.float64), shares, dropped)
    return replace(merged, values=values)


def coordinate_median(parts: Parts) -> Weights:
    """Return the median of each weight over the sites, all of which have the same FedAvg weight.

    With an even number of sites it is the mean of the two middle values.

    Raises:
        ValueError: As `merge_weights`.
    """
    equal = [(site, weights, 1.0) for site, weights, _ in parts]
    return trimmed_mean(equal, (len(equal) - 1) // 2) if equal else merge_weights(equal)


def clipped_mean(previous: Weights, parts: Parts, clip: float) -> Weights:
    """Return the weighted mean of the sites' models after shortening the largest updates.

    An update longer than `clip` times the median of the updates' norms is shortened to it, so that
    its site's model moves towards the previous one on a straight line. The norms are those of the
    learnable weights, without BatchNorm's running moments.

    Args:
        previous: The model that the sites received.
        parts: (site, weights, FedAvg weight) of each admitted payload.
        clip: Longest update relative to the median, 1 or more.

    Raises:
        ValueError: As `merge_weights`, or `clip` below one.
    """
    if not clip >= 1:
        raise ValueError(f"clip: found {clip!r}, expected 1 or more")
    ordered = sorted_by_site(parts)
    start = previous.values.astype(np.float64)
    moved = learnable(previous)
    norms = [float(np.linalg.norm((weights.values - start)[moved])) for _, weights, _ in ordered]
    limit = clip * float(np.median(norms))
    shortened = [
        (site, _towards(weights, start, limit / norm if norm > limit else 1.0), share)
        for (site, weights, share), norm in zip(ordered, norms, strict=True)
    ]
    return merge_weights(shortened)


def _trimmed(
    stack: npt.NDArray[np.float64], shares: npt.NDArray[np.float64], dropped: int
) -> npt.NDArray[np.float32]:
    """Weighted mean of (S, B) values over S without `dropped` values at either end."""
    order = np.argsort(stack, axis=0, kind="stable")[dropped : len(stack) - dropped]
    kept, weight = np.take_along_axis(stack, order, axis=0), shares[order]
    mean = (kept * weight).sum(axis=0) / weight.sum(axis=0)
    # Rounding must not move the mean out of the range of the values.
    return np.asarray(np.clip(mean, kept[0], kept[-1]), dtype=np.float32)


def _towards(weights: Weights, start: npt.NDArray[np.float64], factor: float) -> Weights:
    if factor == 1.0:
        return weights
    values = start + factor * (weights.values - start)
    return replace(weights, values=values.astype(np.float32))
