"""Fills DoFE's pool in a model from the hospitals' class statistics (`common.domain_pool`).

A hospital's place has the mean and covariance of all its pixel features, the exact sum over its
classes. Pure NumPy in float64. Legend: A feature channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.learnable import POOL
from fedsgcg.common.wire.payload import Weights

RIDGE: Final = 1e-3
"""Share of the mean variance that is added to every variance."""
LEAST_VARIANCE: Final = 1e-4

Floats = npt.NDArray[np.float64]


def with_pool(weights: Weights, parts: Mapping[str, ClassStatistics]) -> Weights:
    """Return a model with the hospitals' features in its pool; the same one if it has no pool.

    Args:
        weights: The model.
        parts: Class statistics by hospital; without any the pool stays as it is.
    """
    found = {site: part for site, part in sorted(parts.items()) if part.count.sum() > 0}
    names = [name for name, _ in weights.layout if name.startswith(POOL)]
    if not names or not found:
        return weights
    filled = Weights(weights.layout, weights.values.copy(), weights.counters)
    state = filled.to_state()  # views into the values
    pool = {name.removeprefix(POOL): state[name] for name in names}
    for array in pool.values():
        array[...] = 0.0
    for place, part in zip(range(len(pool["used"])), found.values(), strict=False):
        mean, covariance = of_all_classes(part)
        root = np.linalg.cholesky(covariance)
        pool["used"][place] = 1.0
        pool["mean"][place] = mean
        pool["whitening"][place] = np.linalg.inv(root)
        pool["offset"][place] = -np.log(np.diag(root)).sum()
    return filled


def of_all_classes(part: ClassStatistics) -> tuple[Floats, Floats]:
    """Return mean (A,) and covariance (A, A), made definite, of all pixels of a hospital."""
    share = part.count / part.count.sum()
    mean = share @ part.mean
    offset = part.mean - mean
    within = part.scatter.sum(axis=0) / part.count.sum()
    covariance = within + np.einsum("k,ka,kb->ab", share, offset, offset)
    least = max(RIDGE * float(np.trace(covariance)) / len(mean), LEAST_VARIANCE)
    return mean, covariance + least * np.eye(len(mean))
