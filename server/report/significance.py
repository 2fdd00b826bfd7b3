"""Tests of paired differences: exact sign flips of whole trainings, and Holm's correction for many tests.

All cases that one pair of trained models judged share these models, so they are no independent evidence on the methods:
whichever model came out better by chance is better at most of them. The unit is therefore the training (one held-out
hospital and seed). Were the two methods alike, their names could be exchanged at any training: its difference would
change its sign and be as likely. The p value is the share of all choices of signs with a sum at least as far from zero
(Fisher 1935). No normal values are assumed. With n units it cannot fall below 2^(1-n): 0.125 for four.

Legend: n units, m tests of one family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EXACT_UP_TO = 16  # units, 65,536 choices of signs; above, as many are drawn
ALPHA = 0.05
_DECIMALS = 12  # 0.3 - 0.2 and 0.2 - 0.1 are the same difference; rounding of binary fractions must not break the tie
_DRAWS = 2**EXACT_UP_TO


@dataclass(frozen=True)
class SignFlips:
    """Outcome of a sign-flip test.

    Attributes:
        statistic: Sum of the units' values.
        p: Two-sided p value; NaN without a unit, 1 when every value is zero.
        units: Units n, zeros included.
        zeros: Units without a difference.
    """

    statistic: float
    p: float
    units: int
    zeros: int

    @property
    def exact(self) -> bool:
        """Whether all choices of signs were looked at."""
        return self.units - self.zeros <= EXACT_UP_TO

    @property
    def smallest_p(self) -> float:
        """Smallest p that so many units could give at all: every sign the same (4 units cannot go below 0.125)."""
        return (
            min(1.0, max(2.0 ** (1 - (self.units - self.zeros)), 1 / _DRAWS))
            if self.units
            else math.nan
        )


def sign_flips(values: npt.ArrayLike) -> SignFlips:
    """Test whether values are as likely with the other sign, two-sided.

    Args:
        values: (n,) what each unit adds to the statistic: a training's difference times its weight in the mean. Values
            that are not finite are left out.
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
    """Sums (2^n,) over all choices of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _drawn_sums(values: Floats) -> Floats:
    """Sums over signs drawn at random, the observed choice among them, which keeps the test valid."""
    rng, sums = np.random.default_rng(0), np.zeros(_DRAWS)
    for value in values:
        signs = rng.integers(0, 2, _DRAWS, dtype=np.int8)
        signs[0] = 1
        sums += np.where(signs == 1, value, -value)
    return sums


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
