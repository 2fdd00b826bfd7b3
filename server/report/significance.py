"""Tests of paired differences: exact sign flips over trainings, with Holm's correction.

All cases evaluated with one pair of trained models share these models, so they are not independent
evidence on the methods: the model that is better by chance is better on most of them. The unit is
therefore the training (one held-out hospital and seed). If the two methods were equal, their names
could be exchanged in any training, and a difference with the opposite sign would be equally likely.
The p value is the share of all sign assignments whose sum is at least as far from zero (Fisher
1935). No normal distribution is assumed. With n units p cannot be below 2^(1-n): 0.125 for four.

Legend: n units, m tests of one family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EXACT_UP_TO = 16
"""Most units for the exact test with all 65,536 sign assignments; above, as many are drawn."""
ALPHA = 0.05
_DECIMALS = 12
"""Values are rounded so that equal differences such as 0.3 - 0.2 and 0.2 - 0.1 stay tied."""
_DRAWS: int = 2**EXACT_UP_TO


@dataclass(frozen=True)
class SignFlips:
    """Outcome of a sign-flip test.

    Attributes:
        statistic: Sum of the units' values.
        p: Two-sided p value; NaN without a unit, 1 if every value is zero.
        units: Number of units n, including zeros.
        zeros: Units without a difference.
    """

    statistic: float
    p: float
    units: int
    zeros: int

    @property
    def exact(self) -> bool:
        """Whether all sign assignments were enumerated."""
        return self.units - self.zeros <= EXACT_UP_TO

    @property
    def smallest_p(self) -> float:
        """Smallest p possible with this number of units, e.g. 0.125 with four."""
        if not self.units:
            return math.nan
        return min(1.0, max(2.0 ** (1 - (self.units - self.zeros)), 1 / _DRAWS))


def sign_flips(values: npt.ArrayLike) -> SignFlips:
    """Test whether values are equally likely with the opposite sign, two-sided.

    Args:
        values: (n,) contribution of each unit to the statistic: a training's difference times its
            weight in the mean. Values that are not finite are ignored.
    """
    found = np.asarray(values, dtype=np.float64).reshape(-1)
    found = np.round(found[np.isfinite(found)], _DECIMALS)
    if not found.size:
        return SignFlips(0.0, math.nan, 0, 0)
    kept = found[found != 0]
    statistic = float(found.sum())
    sums = _all_sums(kept) if kept.size <= EXACT_UP_TO else _drawn_sums(kept)
    extreme = np.abs(sums) >= abs(statistic) - 10.0**-_DECIMALS * found.size
    return SignFlips(statistic, float(extreme.mean()), found.size, found.size - kept.size)


def _all_sums(values: Floats) -> Floats:
    """Sums (2^n,) over all sign assignments."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _drawn_sums(values: Floats) -> Floats:
    """Sums over random signs; including the observed assignment keeps the test valid."""
    rng = np.random.default_rng(0)
    sums = np.zeros(_DRAWS)
    for value in values:
        signs = rng.integers(0, 2, _DRAWS, dtype=np.int8)
        signs[0] = 1
        sums += np.where(signs == 1, value, -value)
    return sums


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979), in the given order.

    The probability of one or more false claims in the family stays below the level for any
    dependence between the tests.

    Args:
        p_values: One per test; NaN (no test possible) stays NaN and does not count.
    """
    corrected = [math.nan] * len(p_values)
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for step, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - step) * p))
        corrected[place] = largest
    return corrected
