"""Tests of paired differences: Wilcoxon's signed-rank test with exact tails, and Holm's correction for many tests.

The signed-rank test asks whether differences lie symmetrically around zero. Differences of exactly zero are handled by
Pratt's rule (Pratt 1959): they take part in the ranking and are then set aside, so that many ties with zero do not make
the rest look larger than it is. Equal sizes share the mean of their ranks. The tails come from the distribution over
all signs of the ranks at hand, which stays exact with ties and zeros; only large samples use the normal approximation.

Legend: n pairs, r ranks of the differences that are not zero, m tests of one family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EXACT_UP_TO = 200  # differences; above, the normal tail differs by a few per cent of p at most
ALPHA = 0.05
_DECIMALS = 12  # 0.3 - 0.2 and 0.2 - 0.1 are the same difference; rounding of binary fractions must not break the tie


@dataclass(frozen=True)
class SignedRank:
    """Outcome of a signed-rank test.

    Attributes:
        statistic: Sum of the ranks of positive differences.
        p: Two-sided p value; NaN without a pair, 1 when every difference is zero.
        pairs: Pairs n, zeros included.
        zeros: Pairs without a difference.
        exact: Whether the tail is exact.
    """

    statistic: float
    p: float
    pairs: int
    zeros: int
    exact: bool

    @property
    def smallest_p(self) -> float:
        """Smallest p that so many differences could give at all: every sign the same (n = 5 cannot go below 0.0625)."""
        return min(1.0, 2.0 ** (1 - (self.pairs - self.zeros))) if self.pairs else math.nan


def signed_rank(differences: npt.ArrayLike) -> SignedRank:
    """Test whether paired differences are symmetric around zero (Wilcoxon 1945, zeros by Pratt 1959), two-sided.

    Args:
        differences: (n,) one difference a case; values that are not finite are left out.
    """
    values = np.asarray(differences, dtype=np.float64).reshape(-1)
    values = np.round(values[np.isfinite(values)], _DECIMALS)
    if not values.size:
        return SignedRank(0.0, math.nan, 0, 0, exact=True)
    ranks = _midranks(np.abs(values))
    kept = values != 0
    statistic = float(ranks[values > 0].sum())
    zeros, exact = int((~kept).sum()), int(kept.sum()) <= EXACT_UP_TO
    p = (_exact_p if exact else _normal_p)(ranks[kept], statistic) if kept.any() else 1.0
    return SignedRank(statistic, p, values.size, zeros, exact)


def _midranks(sizes: Floats) -> Floats:
    """Ranks from 1; equal sizes share the mean of their ranks."""
    _, where, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[where])


def _exact_p(ranks: Floats, statistic: float) -> float:
    """Tail over all 2^n signs, by adding one rank after the other to the distribution of the sum."""
    doubled = np.rint(2 * ranks).astype(np.int64)  # midranks are halves
    chance = np.zeros(int(doubled.sum()) + 1)
    chance[0] = 1.0
    for rank in doubled:
        moved = np.zeros_like(chance)
        moved[rank:] = chance[: chance.size - rank]
        chance = (chance + moved) / 2
    place = round(2 * statistic)
    return min(1.0, 2 * float(min(chance[: place + 1].sum(), chance[place:].sum())))


def _normal_p(ranks: Floats, statistic: float) -> float:
    """Normal tail with the mean and variance of the ranks at hand (exact under ties and zeros)."""
    deviation = abs(statistic - ranks.sum() / 2) / math.sqrt(float((ranks**2).sum()) / 4)
    return math.erfc(deviation / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979), in the given order.

    The chance of one or more false claims in the family stays below the level, whatever the dependence between tests.

    Args:
        p_values: One a test; NaN (no test possible) stays NaN and does not count.
    """
    corrected = [math.nan] * len(p_values)
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for step, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - step) * p))
        corrected[place] = largest
    return corrected
