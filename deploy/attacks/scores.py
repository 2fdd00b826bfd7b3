"""How well an attack's scores separate members from others, with intervals.

Legend: M members, N others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
FALSE_POSITIVES: Final = 0.01
DRAWS: Final = 2000
CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Separation:
    """Result of a membership attack.

    Attributes:
        auc: Probability that a member scores higher than another patient; 0.5 = guessing.
        auc_interval: 95 % interval from resampling members and others.
        tpr: Share of the members above the threshold that at most 1 % of the others exceed. With
            fewer than 100 others none may exceed it.
        tpr_interval: 95 % interval of Clopper and Pearson, for a fixed threshold.
        members: M.
        others: N.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]
    members: int
    others: int


def separation(members: Array, others: Array) -> Separation:
    """Return how well scores separate members (M,) from others (N,), 1 or more each."""
    rng = np.random.default_rng(0)
    drawn = [
        auc(rng.choice(members, len(members)), rng.choice(others, len(others)))
        for _ in range(DRAWS)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    allowed = int(FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    caught = int((members > threshold).sum())
    return Separation(
        auc(members, others),
        (float(low), float(high)),
        caught / len(members),
        clopper_pearson(caught, len(members)),
        len(members),
        len(others),
    )


def auc(members: Array, others: Array) -> float:
    """Return the probability that a member scores higher; ties count half (Mann and Whitney)."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    up_to = np.searchsorted(ordered, members, side="right")
    return float((below + up_to).sum() / (2 * len(members) * len(others)))


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a probability."""
    from scipy.stats import beta

    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - tail, hits + 1, trials - hits))
    return low, high


def standardised(scores: Array) -> Array:
    """Return scores about their median, in units of their spread: comparable between hospitals."""
    centre = np.median(scores)
    spread = np.median(np.abs(scores - centre))
    return np.asarray((scores - centre) / (spread if spread > 0 else 1.0))
