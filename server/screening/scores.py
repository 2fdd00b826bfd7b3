"""Robust scores: how far a figure is from those of the other sites, and what a screen found.

A screen needs a relative and an absolute reason: a robust z-score alone would fire when few sites
agree by chance, a factor alone when honest sites differ widely. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MAD_TO_SD: Final = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

SD_FLOOR: Final = 0.25
"""Least standard deviation of a logarithm: sites that differ by a quarter are never unusual."""

MOST_Z: Final = 6.0
"""Robust z-score above which a figure is unusual."""

OTHERS: Final = 2
"""Fewest other sites for a comparison: of two sites nobody knows which one is wrong."""


@dataclass(frozen=True)
class Finding:
    """What a screen found in a site's contribution.

    Attributes:
        site: The site.
        code: Error code.
        detail: Figures, for the coordinator's log; never text sent by a site.
        counts: Whether a rejection for it counts towards a pause.
    """

    site: str
    code: str
    detail: str
    counts: bool = True


def excess(value: float, others: Sequence[float]) -> tuple[float, float]:
    """Compare a logarithm with those of the other sites.

    Returns:
        (difference from the median, robust z-score). The standard deviation is 1.4826 times the
        median absolute deviation, at least `SD_FLOOR`.

    Raises:
        ValueError: No other site.
    """
    if not others:
        raise ValueError("others: found none, expected at least one")
    middle = float(np.median(others))
    spread = MAD_TO_SD * float(np.median(np.abs(np.asarray(others) - middle)))
    difference = value - middle
    return difference, difference / max(spread, SD_FLOOR)


def is_excessive(value: float, others: Sequence[float], factor: float) -> bool:
    """Whether a logarithm exceeds the others' by both a factor and `MOST_Z` deviations."""
    difference, score = excess(value, others)
    return difference > float(np.log(factor)) and score > MOST_Z
