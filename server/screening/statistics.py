"""Screens of the class statistics and of the moments of BatchNorm layers.

The distance of a class mean is |mean - m| / s, where m is the coordinate-wise median of the other
sites' means, and s^2 the median of their traces or the site's own trace if that is larger, but at
most `OWN_SPREAD`^2 times theirs: a hospital whose images vary more is no further away. It is
compared with a fixed limit, with the distances of the other sites, and with the site's own in its
first rounds: a mean that moves slowly is found when it has moved `DRIFT_FACTOR` times its first
distance. A class seen in n pixels has limits larger by 1 + 3 / sqrt(n), because its mean is known
less exactly.

| code | found |
| --- | --- |
| STA-211 | a class mean or spread far from the other sites' or from the site's first rounds |
| STA-212 | moments of a BatchNorm layer far from the other sites' |

With fewer than two other sites nothing is compared. Pure NumPy. Legend: S sites, K classes,
A feature channels, L layers, P channels of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.server.screening.history import WARMUP, History
from fedsgcg.server.screening.scores import OTHERS, Array, Finding, is_excessive

Statistics = Sequence[tuple[str, ClassStatistics]]
Moments = Sequence[tuple[str, NormMoments]]

DISTANCE: Final = 3.0
"""Limit of the distance of a class mean, in within-class standard deviations."""

DRIFT: Final = 2.0
"""The same for a site that was closer in its first rounds."""

RELATIVE: Final = 6.0
"""A distance must also exceed the median of the others' distances by this factor."""

DRIFT_FACTOR: Final = 5.0
"""A distance must also exceed the median of the site's first distances by this factor."""

SPREAD_FACTOR: Final = 8.0
"""Factor by which the root of a class's trace must exceed the median of the others."""

OWN_SPREAD: Final = 4.0
"""Largest root of a site's own trace, relative to the others', that counts for its distance."""

LAYER_DISTANCE: Final = 4.0
"""Limit of the root mean square distance of a layer's means, in standard deviations."""

VARIANCE_FACTOR: Final = 1e3
"""Factor by which a channel's variance must differ from the median of the others."""

LEAST_VARIANCE: Final = 1e-5
"""BatchNorm's epsilon: smaller variances do not differ for the network."""


def screen_statistics(parts: Statistics, history: History) -> tuple[list[Finding], History]:
    """Compare the class statistics of a round with each other and with the sites' first rounds.

    Args:
        parts: (site, statistics) that are valid by themselves (`server.admission`).
        history: What is known from earlier rounds, of statistics taken in the same way.

    Returns:
        At most one finding per site, and the history with the distances of the others.
    """
    known = dict(sorted(parts))
    found = {finding.site: finding for finding in _copied(known)}
    left = {site: part for site, part in known.items() if site not in found}
    found |= {finding.site: finding for finding in _distant(left)}
    left = {site: part for site, part in known.items() if site not in found}
    found |= {finding.site: finding for finding in _drifted(left, history)}
    left = {site: part for site, part in known.items() if site not in found}
    if len(left) > OTHERS:
        shifts = {site: tuple(_distances(left, site).tolist()) for site in left}
        history = history.with_first("shifts", shifts)
    return [found[site] for site in sorted(found)], history


def screen_moments(parts: Moments) -> list[Finding]:
    """Compare the moments of the merged model's BatchNorm layers with each other."""
    known = dict(sorted(parts))
    if len(known) <= OTHERS:
        return []
    return [
        Finding(site, "STA-212", detail)
        for site in known
        if (detail := _strange_layer(known, site))
    ]


def _copied(known: Mapping[str, ClassStatistics]) -> Iterator[Finding]:
    """Equal statistics count once; those of a site that withholds everything are no copy."""
    owners: dict[str, str] = {}
    for site, part in known.items():
        owner = owners.setdefault(part.digest(), site)
        if owner != site and part.count.any():
            detail = f"the class statistics of {owner} as well"
            yield Finding(site, "PAY-116", detail, counts=False)


def _distant(known: Mapping[str, ClassStatistics]) -> Iterator[Finding]:
    for site, part in known.items():
        for k in np.flatnonzero(part.count > 0):
            others = _others(known, site, int(k))
            if len(others) < OTHERS:
                continue
            distance, usual = _distance(part, others, int(k))
            roots = [_log_root(other, int(k)) for other in others]
            if distance > max(DISTANCE, RELATIVE * usual) * _allowance(part.count[k]):
                detail = f"class {k}: a mean {distance:.3g} standard deviations from the others'"
                yield Finding(site, "STA-211", detail)
                break
            if is_excessive(_log_root(part, int(k)), roots, SPREAD_FACTOR):
                detail = f"class {k}: a far larger spread than that of the others"
                yield Finding(site, "STA-211", detail)
                break


def _drifted(known: Mapping[str, ClassStatistics], history: History) -> Iterator[Finding]:
    for site, part in known.items():
        first = history.of(site).shifts
        if len(first) < WARMUP:
            continue
        now = _distances(known, site)
        beginning = np.array(first)
        for k in np.flatnonzero(np.isfinite(now) & np.isfinite(beginning).any(axis=0)):
            usual = float(np.nanmedian(beginning[:, k]))
            if now[k] > max(DRIFT, DRIFT_FACTOR * usual) * _allowance(part.count[k]):
                detail = (
                    f"class {k}: a mean {now[k]:.3g} standard deviations from the others', "
                    f"{usual:.2g} in its first rounds"
                )
                yield Finding(site, "STA-211", detail)
                break


def _distances(known: Mapping[str, ClassStatistics], site: str) -> Array:
    """(K,) distances of a site's class means, NaN for a class without two other sites."""
    part = known[site]
    found = np.full(part.num_classes, math.nan)
    for k in np.flatnonzero(part.count > 0):
        others = _others(known, site, int(k))
        if len(others) >= OTHERS:
            found[k], _ = _distance(part, others, int(k))
    return found


def _others(known: Mapping[str, ClassStatistics], site: str, k: int) -> list[ClassStatistics]:
    return [part for name, part in known.items() if name != site and part.count[k] > 0]


def _distance(
    part: ClassStatistics, others: Sequence[ClassStatistics], k: int
) -> tuple[float, float]:
    """The distance of a class mean, and the median of the same distances of the others."""
    means = np.stack([other.mean[k] for other in others])
    middle = np.median(means, axis=0)
    trace = float(np.median([np.trace(other.covariance[k]) for other in others]))
    own = min(float(np.trace(part.covariance[k])), OWN_SPREAD**2 * trace)
    # Classes without any spread must not make every difference infinite.
    scale = math.sqrt(max(own, trace, 1e-6 * float(middle @ middle), np.finfo(np.float64).tiny))
    usual = float(np.median(np.linalg.norm(means - middle, axis=1)))
    return float(np.linalg.norm(part.mean[k] - middle)) / scale, usual / scale


def _log_root(part: ClassStatistics, k: int) -> float:
    """Logarithm of the root of a class's trace, with the length of its mean as a floor."""
    length = 1e-6 * float(part.mean[k] @ part.mean[k])
    trace = float(np.trace(part.covariance[k]))
    return 0.5 * math.log(max(trace, length, np.finfo(np.float64).tiny))


def _allowance(pixels: float) -> float:
    return 1.0 + 3.0 / math.sqrt(max(float(pixels), 1.0))


def _strange_layer(known: Mapping[str, NormMoments], site: str) -> str:
    part, others = known[site], [other for name, other in known.items() if name != site]
    means, logs = np.stack([other.mean for other in others]), np.stack(_log_variances(others))
    middle, log_variance = np.median(means, axis=0), np.median(logs, axis=0)
    variance = np.exp(log_variance)
    own = _by_layer(part, np.square(part.mean - middle) / variance)
    usual = np.median(
        [_by_layer(part, np.square(mean - middle) / variance) for mean in means], axis=0
    )
    for layer, distance, limit in zip(
        part.layers, own, np.maximum(LAYER_DISTANCE, RELATIVE * usual), strict=True
    ):
        if distance > limit:
            return f"{layer}: means {distance:.3g} standard deviations from the others'"
    ratio = np.abs(_log_variances([part])[0] - log_variance)
    usual = np.median(np.abs(logs - log_variance), axis=0)
    if (over := ratio > np.maximum(math.log(VARIANCE_FACTOR), RELATIVE * usual)).any():
        return f"a variance {math.exp(min(float(ratio[over].max()), 700.0)):.3g} times the others'"
    return ""


def _log_variances(parts: Sequence[NormMoments]) -> list[Array]:
    return [np.log(np.maximum(part.variance, LEAST_VARIANCE)) for part in parts]


def _by_layer(moments: NormMoments, squares: Array) -> Array:
    """(L,) roots of the means of squares (P,) over the channels of each layer."""
    channels = np.array(list(moments.layers.values()))
    starts = np.concatenate([[0], np.cumsum(channels)[:-1]])
    return np.asarray(np.sqrt(np.add.reduceat(squares, starts) / channels))
