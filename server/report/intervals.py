"""Skewness-corrected Student's t intervals of a mean, over cases, or over hospitals and seeds.

A percentile bootstrap of n cases is too narrow by sqrt((n - 1) / n), and because it uses the normal
quantile instead of Student's: a nominal 95 % interval covers 84 % at 5 normal cases and 91 % at 12.
Dice is skewed as well (a few cases fail), which costs a plain t interval another 2 to 4 points.
Hall's transformation removes the skewness term of the studentised mean without resampling:

    T = t + A t^2 / 3 + A^2 t^3 / 27 + A / 6,   t = (mean - mu) / se,   A = skewness of the mean.

It is monotone in t, so the ends follow from the quantiles of t (Hall 1992, "On the removal of
skewness by transformation"). Each end is at least as far out as Student's, because the skewness
estimated from few cases may have the wrong sign. Degrees of freedom of several groups follow Welch
and Satterthwaite. Coverage of nominal 95 % intervals in 40,000 simulations:

    cases   normal   1 - beta (skewness -1.4)   exponential (2)     percentile bootstrap, normal
      5      96.3             93.4                   91.6               84.3
     12      95.7             95.0                   94.1               90.7
     30      95.5             95.8                   95.7               93.0

Legend: n cases of one group, G groups, v variance of a mean, df degrees of freedom, A skewness of a
mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import nctdtrinc, stdtrit

Floats = npt.NDArray[np.float64]
Bounds = tuple[float, float]

LEVEL = 0.95
POWER = 0.8
NAN = float("nan")
UNBOUNDED: Bounds = (-math.inf, math.inf)
_FLAT = 1e-6
"""Skewness of a mean below which the correction is under a millionth of the standard error."""


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; NaN if unknown.

    Attributes:
        mean: Mean of the group means.
        low: Lower end.
        high: Upper end.
        detectable: Smallest true mean, as a distance from zero, for which the interval of such a
            sample excludes zero with a probability of `POWER`.
    """

    mean: float
    low: float
    high: float
    detectable: float = NAN

    @property
    def excludes_zero(self) -> bool:
        """Whether both ends are on the same side of zero; False if an end is unknown."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Component:
    """One independent source of variance of a mean.

    Attributes:
        variance: Its contribution to the variance of the mean.
        freedom: Degrees of freedom of this estimate.
    """

    variance: float
    freedom: float


def mean_interval(
    values_by_group: Sequence[npt.ArrayLike], *, level: float = LEVEL, bounds: Bounds = UNBOUNDED
) -> Interval:
    """Skewness-corrected t interval of the mean of group means.

    The groups are fixed and the cases within them are a sample. A group with a single case uses the
    pooled variance of the others.

    Args:
        values_by_group: One array (n,) per hospital; values that are not finite and empty groups
            are ignored.
        level: Nominal coverage.
        bounds: Smallest and largest possible mean; the ends stay within.

    Returns:
        Mean and interval; all NaN without a value, ends NaN if no group has two values.
    """
    arrays = (np.asarray(values, dtype=np.float64).reshape(-1) for values in values_by_group)
    groups = [array[np.isfinite(array)] for array in arrays]
    groups = [group for group in groups if group.size]
    if not groups:
        return Interval(NAN, NAN, NAN)
    mean = float(np.mean([group.mean() for group in groups]))
    if max(group.size for group in groups) < 2:
        return Interval(mean, NAN, NAN)
    # Offsets from the first value keep the spread of a constant sample exactly zero.
    shifted = [group - group[0] for group in groups]
    parts = _within(shifted)
    error = math.sqrt(math.fsum(part.variance for part in parts))
    skewness = 0.0
    if error > 0:
        skewness = math.fsum(_third_moment(part / error) / part.size**2 for part in shifted)
    scaled = [Component(part.variance / len(groups) ** 2, part.freedom) for part in parts]
    return combined_interval(mean, scaled, skewness=skewness, level=level, bounds=bounds)


def component_of(values: npt.ArrayLike) -> Component:
    """Variance of the mean of at least two independent values (n,)."""
    sample = np.asarray(values, dtype=np.float64).reshape(-1)
    return Component(float((sample - sample[0]).var(ddof=1)) / sample.size, float(sample.size - 1))


def combined_interval(
    mean: float,
    components: Sequence[Component],
    *,
    skewness: float = 0.0,
    level: float = LEVEL,
    bounds: Bounds = UNBOUNDED,
) -> Interval:
    """Interval of a mean whose variance is a sum of independent components.

    Degrees of freedom follow Welch and Satterthwaite.

    Args:
        mean: The mean.
        components: Sources of its variance; without any, the ends are unknown.
        skewness: Skewness A of the mean, 0 for Student's interval.
        level: Nominal coverage.
        bounds: Smallest and largest possible mean; the ends stay within.
    """
    if not components:
        return Interval(mean, NAN, NAN)
    variance = math.fsum(part.variance for part in components)
    if variance <= 0:
        return Interval(mean, mean, mean, 0.0)
    freedom = 1 / math.fsum((part.variance / variance) ** 2 / part.freedom for part in components)
    quantile = float(stdtrit(freedom, (1 + level) / 2))
    error = math.sqrt(variance)
    low = mean - error * max(quantile, _unskewed(quantile, skewness))
    high = mean + error * max(quantile, -_unskewed(-quantile, skewness))
    # The probability of the other end excluding zero is far below 1e-3 and left out.
    least = error * float(nctdtrinc(freedom, 1 - POWER, quantile))
    return Interval(mean, min(mean, max(low, bounds[0])), max(mean, min(high, bounds[1])), least)


def _within(groups: Sequence[Floats]) -> list[Component]:
    """Variance of each group's mean; a single case uses the pooled variance of the other groups."""
    several = [group for group in groups if group.size > 1]
    freedom = sum(group.size - 1 for group in several)
    pooled = math.fsum(float(group.var(ddof=1)) * (group.size - 1) for group in several) / freedom
    return [
        component_of(group) if group.size > 1 else Component(pooled, float(freedom))
        for group in groups
    ]


def _third_moment(values: Floats) -> float:
    return float(((values - values.mean()) ** 3).mean())


def _unskewed(value: float, skewness: float) -> float:
    """Inverse of Hall's transformation: the studentised mean t whose T is `value`."""
    if abs(skewness) < _FLAT:
        return value
    return 3 / skewness * (float(np.cbrt(1 + skewness * (value - skewness / 6))) - 1)
