"""Class statistics of feature vectors: count, mean and scatter of every class, pooled exactly.

The sum of two sites' statistics equals, up to rounding, the statistics of all their pixels together
(docs/explanation/sgcg.md, "Statistics"). Pure NumPy in float64: float32 loses a covariance of 1e-4
next to a mean of 1e3.

Legend: K classes incl. background, A feature channels, N pixels; n_k, mu_k, M_k count, mean and
scatter of class k.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BLOCK_ELEMENTS = 1 << 18
"""Elements of a feature block held as float64 at a time (2 MiB)."""


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Count, mean and scatter of K classes; an absent class has count 0 and is the identity of `+`.

    Attributes:
        count: (K,) pixels of each class; fractional after a discount.
        mean: (K, A) mean feature.
        scatter: (K, A, A) sum of (x - mean)(x - mean)^T, exactly symmetric.

    Raises:
        ValueError: An array of another shape or of half precision.
    """

    count: Array
    mean: Array
    scatter: Array

    def __post_init__(self) -> None:
        for name in ("count", "mean", "scatter"):
            object.__setattr__(self, name, _as_float64(name, getattr(self, name)))
        _check_shape("count", self.count, (None,))
        _check_shape("mean", self.mean, (self.count.shape[0], None))
        features = self.mean.shape[1]
        _check_shape("scatter", self.scatter, (self.count.shape[0], features, features))

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return int(self.mean.shape[0])

    @property
    def num_features(self) -> int:
        """A, feature channels."""
        return int(self.mean.shape[1])

    def digest(self) -> str:
        """Return the SHA-256 of these numbers."""
        sha = hashlib.sha256(f"{self.mean.shape}".encode())
        for array in (self.count, self.mean, self.scatter):
            sha.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return sha.hexdigest()

    @property
    def covariance(self) -> Array:
        """(K, A, A) population covariance, scatter / count; zero for an absent class."""
        return self.scatter / np.where(self.count > 0, self.count, 1.0)[:, None, None]

    @classmethod
    def empty(cls, num_classes: int, num_features: int) -> ClassStatistics:
        """Return the statistics of no pixels, the identity of `+`."""
        return cls(
            np.zeros(num_classes),
            np.zeros((num_classes, num_features)),
            np.zeros((num_classes, num_features, num_features)),
        )

    @classmethod
    def from_features(
        cls,
        features: npt.ArrayLike,
        labels: npt.ArrayLike,
        num_classes: int,
        ignore_index: int = 255,
    ) -> ClassStatistics:
        """Compute the statistics of labelled features (SgCG eqs. 1-3), without an N x K x A array.

        Each class is summed relative to the mean of its first block, so that a large offset does
        not cost precision.

        Args:
            features: (N, A) finite floats.
            labels: (N,) integers in [0, K), or `ignore_index`.
            num_classes: K.
            ignore_index: Label of pixels to leave out.

        Raises:
            ValueError: Shapes that do not match, features that are not finite, labels out of range.
        """
        rows, classes = np.asarray(features), np.asarray(labels)
        _check_labelled(rows, classes, num_classes, ignore_index)
        result = cls.empty(num_classes, rows.shape[1])
        for k in range(num_classes):
            members = np.flatnonzero(classes == k) if k != ignore_index else np.empty(0, np.intp)
            if members.size:
                result.count[k] = members.size
                result.mean[k], result.scatter[k] = _moments(rows, members)
        return result

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        """Pool two disjoint sets of pixels; the scatter is M_a + M_b + (n_a n_b / n) d d^T."""
        if (self.num_classes, self.num_features) != (other.num_classes, other.num_features):
            raise ValueError(
                f"other: found mean of shape {other.mean.shape}, expected {self.mean.shape}"
            )
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        delta = other.mean - self.mean
        mean = self.mean + share[:, None] * delta
        # The factor multiplies the product d_i d_j: (c d_i) d_j and (c d_j) d_i differ in the last
        # bit, which would break the symmetry.
        between = (self.count * share)[:, None, None] * (delta[:, :, None] * delta[:, None, :])
        scatter = self.scatter + other.scatter + between
        only_other = self.count == 0
        mean = np.where(only_other[:, None], other.mean, mean)
        scatter = np.where(only_other[:, None, None], other.scatter, scatter)
        only_self = other.count == 0
        mean = np.where(only_self[:, None], self.mean, mean)
        scatter = np.where(only_self[:, None, None], self.scatter, scatter)
        return ClassStatistics(count, mean, scatter)

    def without(self, part: ClassStatistics) -> ClassStatistics:
        """Remove pixels that were pooled; the inverse of `+` up to rounding.

        A class whose last pixel is removed becomes absent.

        Raises:
            ValueError: A part of another shape, or with more pixels of a class than these
                statistics.
        """
        if self.mean.shape != part.mean.shape:
            raise ValueError(
                f"part: found mean of shape {part.mean.shape}, expected {self.mean.shape}"
            )
        if (part.count > self.count).any():
            raise ValueError(
                f"part: found counts {part.count.tolist()}, expected at most {self.count.tolist()}"
            )
        count = self.count - part.count
        left = count > 0
        delta = np.where((part.count > 0)[:, None], part.mean - self.mean, 0.0)
        ratio = np.divide(part.count, count, out=np.zeros_like(count), where=left)
        mean = np.where(left[:, None], self.mean - ratio[:, None] * delta, 0.0)
        between = (self.count * ratio)[:, None, None] * (delta[:, :, None] * delta[:, None, :])
        scatter = np.where(left[:, None, None], self.scatter - part.scatter - between, 0.0)
        return ClassStatistics(count, mean, scatter)

    def scaled(self, factors: npt.ArrayLike) -> ClassStatistics:
        """Scale the count of each class by its own factor (K,), keeping means and covariances."""
        factor = np.asarray(factors, dtype=np.float64)
        return ClassStatistics(self.count * factor, self.mean, self.scatter * factor[:, None, None])

    def discounted(self, factor: float) -> ClassStatistics:
        """Scale all counts (and with them the scatters) by `factor`, keeping means and covariances.

        Raises:
            ValueError: A factor that is negative or not finite.
        """
        if not (np.isfinite(factor) and factor >= 0):
            raise ValueError(f"factor: found {factor!r}, expected a finite number of zero or more")
        return ClassStatistics(self.count * factor, self.mean, self.scatter * factor)

    def weighted_equally(self) -> ClassStatistics:
        """Return the same means and covariances with count 1 for every seen class: equal sites."""
        return ClassStatistics((self.count > 0).astype(np.float64), self.mean, self.covariance)

    def nearest_distance(self) -> Array:
        """Return (K,) distances of each class's mean to the nearest other; NaN without another."""
        present = self.count > 0
        difference = self.mean[:, None] - self.mean[None]
        distance = np.sqrt(np.square(difference).sum(axis=-1))
        distance[:, ~present] = np.inf
        np.fill_diagonal(distance, np.inf)
        nearest = distance.min(axis=1, initial=np.inf)
        found: Array = np.where(present & np.isfinite(nearest), nearest, np.nan)
        return found

    def condition_number(self) -> Array:
        """Return (K,) condition numbers of the covariances.

        A condition number is the largest eigenvalue divided by the smallest one that is larger than
        the rounding error of the largest. It is NaN for an absent class and for a covariance of
        zero.
        """
        values = np.linalg.eigvalsh(self.covariance)
        largest = values[:, -1]
        above = values > largest[:, None] * self.num_features * np.finfo(np.float64).eps
        smallest = np.where(above, values, np.inf).min(axis=1)
        usable = (self.count > 0) & (largest > 0)
        found: Array = np.full_like(largest, np.nan)
        np.divide(largest, smallest, out=found, where=usable)
        return found

    def to_sums(self, reference: npt.ArrayLike | None = None) -> tuple[Array, Array, Array]:
        """Return the additive form: count, sum of x - c and sum of (x - c)(x - c)^T.

        Args:
            reference: c, (K, A), a point known to all, e.g. the last prototypes; None = the origin.

        Returns:
            count (K,), first (K, A), second (K, A, A).
        """
        offset = self.mean - _reference(reference, self.mean.shape)
        offset = np.where(self.count[:, None] > 0, offset, 0.0)
        second = self.scatter + self.count[:, None, None] * (
            offset[:, :, None] * offset[:, None, :]
        )
        return self.count.copy(), self.count[:, None] * offset, second

    @classmethod
    def from_sums(
        cls,
        count: npt.ArrayLike,
        first: npt.ArrayLike,
        second: npt.ArrayLike,
        reference: npt.ArrayLike | None = None,
    ) -> ClassStatistics:
        """Return the statistics of `to_sums`, or of several sites' sums about one reference.

        Raises:
            ValueError: An array of another shape.
        """
        sums = cls(np.asarray(count), np.asarray(first), np.asarray(second))
        centre = _reference(reference, sums.mean.shape)
        seen = sums.count > 0
        offset = np.divide(
            sums.mean, sums.count[:, None], out=np.zeros_like(sums.mean), where=seen[:, None]
        )
        scatter = sums.scatter - sums.count[:, None, None] * (
            offset[:, :, None] * offset[:, None, :]
        )
        scatter = 0.5 * (scatter + scatter.transpose(0, 2, 1))
        mean = np.where(seen[:, None], centre + offset, 0.0)
        return cls(sums.count, mean, np.where(seen[:, None, None], scatter, 0.0))


def between_site_trace(parts: Sequence[ClassStatistics]) -> Array:
    """Return the trace of the between-site covariance of each class, sum_s w_s |mu_s - mu|^2.

    It measures the domain shift in feature space (docs/explanation/sgcg.md, "Statistics").

    Args:
        parts: The statistics of each site, at least one.

    Returns:
        (K,) trace with w_s = n_s / n; NaN for a class that no site has seen.

    Raises:
        ValueError: No parts, or parts of different shapes.
    """
    weight, mean = _weights_and_means(parts)
    centre = np.einsum("sk,ska->ka", weight, mean)
    return np.asarray(np.einsum("sk,ska->k", weight, (mean - centre) ** 2))


def between_covariance(parts: Sequence[ClassStatistics]) -> Array:
    """Return (K, A, A) covariances of the sites' means, sum_s w_s (mu_s - mu)(mu_s - mu)^T.

    Their traces are those of `between_site_trace`; zero for a class that no site has seen.
    Arguments and errors as there.
    """
    _weights_and_means(parts)
    points = [ClassStatistics(p.count, p.mean, np.zeros_like(p.scatter)) for p in parts]
    return functools.reduce(operator.add, points).covariance


def within_site_trace(parts: Sequence[ClassStatistics]) -> Array:
    """Return (K,) traces of the within-site covariance, sum_s w_s tr Sigma_s.

    Arguments and errors as `between_site_trace`.
    """
    weight, _ = _weights_and_means(parts)
    traces = np.stack([np.trace(part.covariance, axis1=1, axis2=2) for part in parts])
    return np.asarray(np.einsum("sk,sk->k", weight, traces))


def _weights_and_means(parts: Sequence[ClassStatistics]) -> tuple[Array, Array]:
    """Return w_s = n_s / n (S, K), NaN for unseen classes, and means (S, K, A)."""
    if not parts:
        raise ValueError("parts: found none, expected the statistics of at least one site")
    for part in parts:
        _check_shape("parts", part.mean, parts[0].mean.shape)
    count = np.stack([part.count for part in parts])
    total = count.sum(axis=0)
    weight = np.divide(count, total, out=np.full_like(count, np.nan), where=total > 0)
    return weight, np.stack([part.mean for part in parts])


def _moments(rows: npt.NDArray[Any], members: npt.NDArray[np.intp]) -> tuple[Array, Array]:
    """Return mean (A,) and scatter (A, A) of the rows `members`, about a shift near the mean."""
    blocks = _blocks(rows, members)
    block = next(blocks)
    shift = block.mean(axis=0)
    first = np.zeros_like(shift)
    second = np.zeros((shift.size, shift.size))
    while True:
        block -= shift
        first += block.sum(axis=0)
        second += block.T @ block
        following = next(blocks, None)
        if following is None:
            break
        block = following
    offset = first / members.size
    scatter = second - members.size * np.multiply.outer(offset, offset)
    return shift + offset, 0.5 * (scatter + scatter.T)


def _blocks(rows: npt.NDArray[Any], members: npt.NDArray[np.intp]) -> Iterator[Array]:
    size = max(1, BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, members.size, size):
        yield rows[members[start : start + size]].astype(np.float64)


def _as_float64(name: str, value: npt.ArrayLike) -> Array:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.dtype == np.float16:
        raise ValueError(
            f"{name}: found dtype {array.dtype}, expected float32, float64 or integers"
        )
    return array.astype(np.float64, copy=False)


def _check_shape(name: str, array: npt.NDArray[Any], expected: tuple[int | None, ...]) -> None:
    if array.ndim != len(expected) or any(
        want not in (None, got) for want, got in zip(expected, array.shape, strict=True)
    ):
        text = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name}: found shape {array.shape}, expected ({text})")


def _check_labelled(
    features: npt.NDArray[Any], labels: npt.NDArray[Any], num_classes: int, ignore_index: int
) -> None:
    if features.dtype.kind != "f":
        raise ValueError(f"features: found dtype {features.dtype}, expected floats")
    _check_shape("features", features, (None, None))
    _check_shape("labels", labels, (features.shape[0],))
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels: found dtype {labels.dtype}, expected integers")
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.size:
        raise ValueError(
            f"labels: found {int(wrong[0])}, "
            f"expected 0 to {num_classes - 1} or {ignore_index} (ignore)"
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f"features: found values that are not finite in shape {features.shape}, "
            "expected finite numbers"
        )


def _reference(reference: npt.ArrayLike | None, shape: tuple[int, ...]) -> Array:
    if reference is None:
        return np.zeros(shape)
    array = _as_float64("reference", reference)
    _check_shape("reference", array, shape)
    return array
