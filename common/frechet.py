"""Fréchet distance (2-Wasserstein distance) between normal distributions.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)

The second part is the squared Bures distance. It equals the least |R1 - R2 U|^2 (Frobenius norm)
over all orthogonal U with R = S^1/2; the best U is that of orthogonal Procrustes. In this form
nothing large cancels, so equal distributions are less than 1e-7 of their standard deviation
apart, and no covariance has to be inverted: singular ones are as good as others.

Sources: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982;
Bhatia, Jain and Lim, "On the Bures-Wasserstein distance between positive definite matrices", 2019,
theorem 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedsgcg.common.statistics import ClassStatistics

Array = npt.NDArray[np.float64]


def frechet_distances(means: npt.ArrayLike, covariances: npt.ArrayLike) -> Array:
    """Return the distance between every two normal distributions.

    Args:
        means: (N, A).
        covariances: (N, A, A), symmetric; eigenvalues below zero count as rounding errors.

    Returns:
        (N, N), symmetric, zero on the diagonal; NaN for a distribution that is not finite.
    """
    centres = np.asarray(means, np.float64)
    spreads = np.asarray(covariances, np.float64)
    finite: npt.NDArray[np.bool_] = np.logical_and(
        np.isfinite(centres).all(axis=1), np.isfinite(spreads).all(axis=(1, 2))
    )
    roots = [
        _root(spread) if known else spread for spread, known in zip(spreads, finite, strict=True)
    ]
    distances = np.zeros((len(centres), len(centres)))
    for one in range(len(centres)):
        for other in range(one):
            value = np.nan
            if finite[one] and finite[other]:
                apart = np.linalg.norm(centres[one] - centres[other])
                value = float(np.hypot(apart, _bures(roots[one], roots[other])))
            distances[one, other] = distances[other, one] = value
    distances[~finite] = np.nan
    distances[:, ~finite] = np.nan
    return distances


def class_distances(parts: Sequence[ClassStatistics]) -> Array:
    """Return the distance between every two sites for each class.

    Args:
        parts: Statistics of S sites.

    Returns:
        (K, S, S); NaN for a site that has not seen a class.
    """
    found = []
    for index in range(parts[0].num_classes):
        seen = np.array([part.count[index] > 0 for part in parts])
        means = np.stack([part.mean[index] for part in parts])
        means[~seen] = np.nan
        found.append(frechet_distances(means, np.stack([p.covariance[index] for p in parts])))
    return np.stack(found)


def mean_distance_to_others(distances: Array) -> Array:
    """Return the mean distance of each site to the others.

    Args:
        distances: (..., S, S) with NaN where a distance is not known.

    Returns:
        (..., S); NaN for a site without a known distance.
    """
    known = np.isfinite(distances) & ~np.eye(distances.shape[-1], dtype=bool)
    number = known.sum(axis=-1)
    total = np.where(known, distances, 0.0).sum(axis=-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _root(covariance: Array) -> Array:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # Roots of rounding errors would be a hundred million times larger than the errors.
    rounding = len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    scaled: Array = vectors * np.sqrt(np.where(values > rounding, values, 0.0))
    return np.asarray(scaled @ vectors.T)


def _bures(one: Array, other: Array) -> float:
    """Return the Bures distance of two covariances from their square roots."""
    left, _, right = np.linalg.svd(other.T @ one)
    return float(np.linalg.norm(one - other @ (left @ right)))
