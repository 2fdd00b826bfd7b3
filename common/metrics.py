"""Dice and surface distances (ASD, ASSD, HD95) of a predicted and a true mask, in 2-D and 3-D.

The definitions, and the results to the last digit, are those of medpy >= 0.5, except `hd95_max`,
which is MONAI's. The surface of a mask is the mask minus its face-connected erosion, everything
outside the array is background, and all surface elements have the same weight. Only surface points
are compared, in a k-d tree, instead of distance maps of the whole image.

Empty masks: both empty give Dice 1 and distances 0; one empty gives Dice 0 and distances NaN.
`dice_smooth1` and `asd_compat` are the variants of published code, only for comparison with printed
tables.

Legend: P prediction, T truth, S(.) surface, d(s, T) distance of a point from the nearest point of
S(T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

Mask = npt.NDArray[np.bool_]
Spacing = Sequence[float] | float | None
EMPTY_DISTANCE = 100.0
"""Distance, in pixels or voxels, that published code assigns to an empty prediction."""


@dataclass(frozen=True)
class Metrics:
    """Metrics of one pair of masks; distances in the unit of the spacing (pixels without one).

    Attributes:
        dice: 2 |P and T| / (|P| + |T|).
        asd: Mean of d(s, T) over the surface of the prediction: one direction.
        assd: Mean over the pooled surface points of both masks.
        hd95: 95th percentile of the pooled distances of both surfaces (medpy).
        hd95_max: Larger of the two directed 95th percentiles, prediction to truth and truth to
            prediction (MONAI, surface-distance); larger than `hd95` where one direction is worse.
        asd_reverse: Mean of d(s, P) over the surface of the truth.
        dice_smooth1: (2 |P and T| + 1) / (|P| + |T| + 1).
    """

    dice: float
    asd: float
    assd: float
    hd95: float
    hd95_max: float
    asd_reverse: float
    dice_smooth1: float

    @property
    def asd_compat(self) -> float:
        """The asd, or `EMPTY_DISTANCE` where it is undefined because one mask is empty."""
        return EMPTY_DISTANCE if np.isnan(self.asd) else self.asd


def segmentation_metrics(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Spacing = None
) -> Metrics:
    """Compute all metrics from one extraction of the surfaces.

    Args:
        prediction: Boolean array, 2-D or 3-D.
        truth: Boolean array of the same shape.
        spacing: Distance of neighbouring elements along each axis; None = 1.

    Raises:
        ValueError: Masks of different shapes, not boolean, or neither 2-D nor 3-D; or a spacing
            that is not positive.
    """
    first, second, scale = _checked(prediction, truth, spacing)
    forward, backward = _surface_distances(first, second, scale)
    pooled = np.concatenate([forward, backward])
    return Metrics(
        dice=_dice(first, second),
        asd=float(forward.mean()),
        assd=float(pooled.mean()),
        hd95=float(np.percentile(pooled, 95)),
        hd95_max=float(max(np.percentile(forward, 95), np.percentile(backward, 95))),
        asd_reverse=float(backward.mean()),
        dice_smooth1=_dice(first, second, smooth=1),
    )


def dice(prediction: npt.ArrayLike, truth: npt.ArrayLike) -> float:
    """Return the Dice coefficient 2 |P and T| / (|P| + |T|); 1 if both masks are empty.

    Raises:
        ValueError: As `segmentation_metrics`.
    """
    first, second, _ = _checked(prediction, truth, None)
    return _dice(first, second)


def average_surface_distance(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Spacing = None
) -> float:
    """Return the mean distance from the predicted surface to the true one; not symmetric.

    Arguments, unit and errors as `segmentation_metrics`.
    """
    first, second, scale = _checked(prediction, truth, spacing)
    if not (first.any() and second.any()):
        return 0.0 if first.any() == second.any() else np.nan
    first, second = _crop(first, second)
    return float(_nearest(_surface_points(first, scale), _surface_points(second, scale)).mean())


def average_symmetric_surface_distance(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Spacing = None
) -> float:
    """Return the mean distance over the surface points of both masks; see `Metrics.assd`."""
    return segmentation_metrics(prediction, truth, spacing).assd


def hausdorff_distance_95(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Spacing = None
) -> float:
    """Return the 95th percentile of the pooled surface distances; see `Metrics.hd95`."""
    return segmentation_metrics(prediction, truth, spacing).hd95


def _dice(first: Mask, second: Mask, smooth: int = 0) -> float:
    total = np.count_nonzero(first) + np.count_nonzero(second) + smooth
    return float((2 * np.count_nonzero(first & second) + smooth) / total) if total else 1.0


def _surface_distances(
    first: Mask, second: Mask, scale: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], ...]:
    """Return the distances of each mask's surface points to the other mask's surface."""
    if not (first.any() and second.any()):
        value: float = 0.0 if first.any() == second.any() else np.nan
        same = np.array([value])
        return same, same
    first, second = _crop(first, second)
    first_points = _surface_points(first, scale)
    second_points = _surface_points(second, scale)
    return _nearest(first_points, second_points), _nearest(second_points, first_points)


def _nearest(
    points: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    tree = cKDTree(targets, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(points)[0], dtype=np.float64)


def _surface_points(mask: Mask, scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the coordinates (points, dimensions) of the mask minus its face-connected erosion."""
    padded = np.pad(mask, 1)
    core = (slice(1, -1),) * mask.ndim
    interior = padded[core].copy()
    for axis in range(mask.ndim):
        for shift in (slice(None, -2), slice(2, None)):
            interior &= padded[(*core[:axis], shift, *core[axis + 1 :])]
    surface = np.flatnonzero(mask & ~interior)
    return np.stack(np.unravel_index(surface, mask.shape), axis=1) * scale


def _crop(first: Mask, second: Mask) -> tuple[Mask, Mask]:
    """Crop both masks to the bounding box of their union."""
    union = first | second
    box = []
    for axis in range(union.ndim):
        others = tuple(other for other in range(union.ndim) if other != axis)
        hits = np.flatnonzero(union.any(axis=others))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return first[tuple(box)], second[tuple(box)]


def _checked(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Spacing
) -> tuple[Mask, Mask, npt.NDArray[np.float64]]:
    first, second = _mask("prediction", prediction), _mask("truth", truth)
    if first.shape != second.shape:
        raise ValueError(
            f"prediction: found shape {first.shape}, expected that of truth, {second.shape}"
        )
    scale = np.ones(first.ndim) if spacing is None else np.asarray(spacing, dtype=np.float64)
    if scale.ndim == 0:
        scale = np.full(first.ndim, scale)
    if scale.shape != (first.ndim,) or not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError(
            f"spacing: found {spacing!r}, expected {first.ndim} finite numbers above zero"
        )
    return first, second, scale


def _mask(name: str, value: npt.ArrayLike) -> Mask:
    array: npt.NDArray[Any] = np.asarray(value)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name}: found shape {array.shape}, expected a 2-D or 3-D mask")
    if array.dtype.kind not in "biu":
        raise ValueError(f"{name}: found dtype {array.dtype}, expected a boolean mask")
    return array if array.dtype == np.bool_ else array != 0
