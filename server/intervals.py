"""Bootstrap intervals of a mean over cases, drawn anew within each hospital.

They say how much the choice of cases matters, not how much training at random matters (that is what the seeds show).

Legend: R resamples, n cases of one hospital.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
NAN = float("nan")
_BLOCK = 4_000_000  # random indices drawn at once: 32 MB
_KEPT = 200_000  # largest draw that is kept for the next interval over groups of the same sizes


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; NaN where it cannot be known.

    Attributes:
        mean: Mean of the group means.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether both ends lie on the same side of zero; False when an end is unknown."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(
    values_by_group: Sequence[npt.ArrayLike], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean of group means, drawing within each group.

    Args:
        values_by_group: One array (n,) a hospital; values that are not finite are left out, empty groups too.
        resamples: Number of resamples R.
        level: Share of resampled means inside the interval.
        seed: Seed of the draw; groups of equal sizes are drawn alike, so that methods are compared on the same draws.

    Returns:
        Mean and interval; all NaN without a value, ends NaN when no group has two values.
    """
    groups = [
        array[np.isfinite(array)] for array in (np.asarray(g, dtype=np.float64).reshape(-1) for g in values_by_group)
    ]
    groups = [group for group in groups if group.size]
    if not groups:
        return Interval(NAN, NAN, NAN)
    mean = float(np.mean([group.mean() for group in groups]))
    if max(group.size for group in groups) < 2:
        return Interval(mean, NAN, NAN)
    draws = np.mean(_draws(groups, resamples, seed), axis=0)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _draws(groups: Sequence[Floats], resamples: int, seed: int) -> list[Floats]:
    """Resampled means (R,) of every group."""
    if max(group.size for group in groups) * resamples > _KEPT:
        rng = np.random.default_rng(seed)
        return [_resampled_means(group, resamples, rng) for group in groups]
    counts = _counts(tuple(group.size for group in groups), resamples, seed)
    # Offsets from the first value keep the mean of a constant sample exact.
    return [
        np.asarray(part.astype(np.float64) @ (group - group[0]) / group.size + group[0])
        for part, group in zip(counts, groups, strict=True)
    ]


@lru_cache(maxsize=24)
def _counts(sizes: tuple[int, ...], resamples: int, seed: int) -> tuple[npt.NDArray[np.float32], ...]:
    """How often each case is drawn, (R, n) a group: the same for all values over groups of these sizes."""
    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        drawn = rng.integers(0, size, (resamples, size)) + size * np.arange(resamples)[:, None]
        found.append(
            np.bincount(drawn.reshape(-1), minlength=resamples * size).reshape(resamples, size).astype(np.float32)
        )
    return tuple(found)


def _resampled_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return the means (R,) of `resamples` draws with replacement, in blocks that bound the memory."""
    offset, rows = values[0], max(1, _BLOCK // values.size)
    shifted = values - offset
    parts = [
        shifted[rng.integers(0, values.size, (min(rows, resamples - start), values.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.asarray(np.concatenate(parts) + offset)
