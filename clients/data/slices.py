"""Converts one case's files to canonical slices: read, checked, labelled, scaled and resized.

A slice is resized to its place on a square of `image_size` (`clients.data.frame`), bilinear with
antialiasing and aligned pixel centres. Of a label map, the share of each class is resized and the
largest share wins. What a slice leaves free is as dark as its darkest pixels and background.
`Slices.truth` keeps the native grid for the metrics.

Legend: Z, Y, X = native slices, rows, columns; C = stored channels (3 for a colour picture, else
1); S = image_size; K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from fedsgcg.clients.data.cache import UNLIMITED, Budget
from fedsgcg.clients.data.case_files import CaseFile
from fedsgcg.clients.data.frame import frame_of
from fedsgcg.common.errors import fail
from fedsgcg.common.images.contents import content_hash
from fedsgcg.common.images.layers import Layers, class_map
from fedsgcg.common.images.read import (
    KINDS,
    Volume,
    check_geometry,
    check_image,
    read_volume,
    segments_of,
)
from fedsgcg.common.settings.data import LABEL_TOLERANCE
from fedsgcg.common.settings.plan import DataSettings

# int16 steps per unit of intensity; the rounding error of 1.5e-5 is far below an image's noise.
STEPS = 32767.0
COLOURS = 3  # channels of a colour picture
IGNORED = 255  # label of a pixel without a class
# Shares of a pixel that differ by less count as equal. This is far above the rounding error of
# float64, so that all machines agree.
TIE = 1e-9
FLAT_FLOOR = 0.01
"""Smallest value before the logarithm of `flattened`, as a share of the range."""


@dataclass(frozen=True)
class Slices:
    """The slices of one case.

    Attributes:
        image: (Z, C, S, S) int16, intensity in [-1, 1] times `STEPS`.
        label: (Z, S, S) uint8 class indices.
        truth: (Z, Y, X) uint8 class indices on the native grid.
        display: (Z, Y, X) uint8 native image for display; (Z, Y, X, 3) of a colour picture.
        present: (Z, K) bool, whether a class occurs in the native slice.
        spacing: (sz, sy, sx) in mm; None for a picture or if the header has no voxel size.
        kind: Kind of the image, one of `common.images.read.KINDS`.
        content: Hash of the image's voxels (`common.images.contents`), "" if it was not computed.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    display: NDArray[np.uint8]
    present: NDArray[np.bool_]
    spacing: tuple[float, float, float] | None
    kind: str = KINDS[0]
    content: str = ""


def prepare(
    case: CaseFile, data: DataSettings, budget: Budget = UNLIMITED, *, masks: bool = True
) -> Slices:
    """Read one case and convert it to canonical slices.

    Args:
        case: The case.
        data: Classes and preprocessing.
        budget: Memory that may be used.
        masks: Whether the case needs a mask. Without masks, labels are `IGNORED` for a case that
            has none, except for a test case, which cannot be scored then.

    Raises:
        FedsgcgError: POL-707 when the slices would need more memory than the budget;
            DAT-103 to DAT-109, DAT-112, DAT-115 or DAT-160 to DAT-169 for an unusable case.
    """
    hidden = not masks and not case.masks and case.split != "test"
    image, truth = read_without_mask(case) if hidden else read_case(case, data)
    budget.check_memory(conversion_bytes(image, data), case.name)
    return replace(to_slices(image, truth, data), content=content_hash(image))


def _display(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return images (Z, C, Y, X) in [-1, 1] for display: (Z, Y, X), or (Z, Y, X, 3) in colour."""
    values = np.rint((scaled + 1) * 127.5).astype(np.uint8)
    if values.shape[1] == COLOURS:
        return np.ascontiguousarray(np.moveaxis(values, 1, -1))
    return np.asarray(values[:, 0])


def conversion_bytes(image: Volume, data: DataSettings) -> int:
    """Return an estimate of the memory that the resized slices of an image need.

    Per pixel: float32 before and after clipping and int16 of each channel; a float64 share and its
    float32 copy of each class; of one slice stack at a time.
    """
    slices, channels = (1, len(image.array)) if image.is_picture else (len(image.array), 1)
    return slices * data.image_size**2 * (10 * channels + 12 * data.num_classes)


def to_slices(image: Volume, truth: NDArray[np.uint8], data: DataSettings) -> Slices:
    """Convert an image and its class indices (Z, Y, X) to canonical slices.

    Raises:
        FedsgcgError: DAT-115 when `data.intensity=fixed` and the image has no fixed scale, DAT-190
            with `data.spacing` for an image without a voxel size.
    """
    if data.intensity == "fixed" and not image.is_eight_bit:
        found = "a picture that does not have 8 bits" if image.is_picture else "a volume"
        action = (
            "Set data.intensity=percentile or minmax, or save the picture with 8 bits per channel."
        )
        raise fail(
            "DAT-115",
            found=found,
            expected="a picture with 8 bits per channel (data.intensity=fixed)",
            action=action,
        )
    pixels = image.array[None] if image.is_picture else image.array[:, None]
    if data.intensity == "flat":
        pixels = flattened(pixels, data.flat_sigma / data.image_size)
    scaled = scale_intensity(pixels, data.intensity)
    frame = frame_of(truth.shape[1:], data, image.millimetres)
    small = frame.put(resize(scaled, frame.size), -1)
    hidden = bool((truth == IGNORED).any())
    label = frame.put(resize_labels(truth, frame.size), IGNORED if hidden else 0)
    present = np.stack(
        [(truth == index).any(axis=(1, 2)) for index in range(data.num_classes)], axis=1
    )
    return Slices(
        image=np.rint(np.clip(small, -1, 1) * STEPS).astype(np.int16),
        label=label,
        truth=truth,
        display=_display(scaled),
        present=present,
        spacing=image.millimetres,
        kind=image.kind,
    )


def class_indices(
    raw: NDArray[np.float32],
    classes: dict[str, list[int]],
    where: str,
    tolerance: float = LABEL_TOLERANCE,
) -> NDArray[np.uint8]:
    """Map raw label values to class indices, in the order in which the classes are declared.

    Args:
        raw: Label values of any shape; a value within `tolerance` of an integer counts as that
            integer.
        classes: Class name -> label values.
        where: Name of the case in an error.
        tolerance: Below 0.5 (`data.label_tolerance`).

    Raises:
        FedsgcgError: DAT-109 when a value belongs to no class.
    """
    values, positions = np.unique(raw, return_inverse=True)
    index = {value: number for number, group in enumerate(classes.values()) for value in group}
    labels = [whole_label(float(value), tolerance) for value in values]
    unknown = [
        f"{value:.9g}" for value, label in zip(values, labels, strict=True) if label not in index
    ]
    if unknown:
        found = "values " + ", ".join(unknown[:8]) + (", …" if len(unknown) > 8 else "")
        expected = "values " + ", ".join(map(str, sorted(index)))
        action = "Correct the mask, or declare the value in data.classes."
        if any(label is None for label in labels):
            expected += f", each within {tolerance:g}"
            action = (
                "Save the mask with integer values; if it was rescaled on saving, increase "
                "data.label_tolerance."
            )
        raise fail("DAT-109", found=found, expected=expected, action=action, where=where)
    table = np.array([index[label] for label in labels if label is not None], dtype=np.uint8)
    return np.asarray(table[positions].reshape(raw.shape))


def whole_label(value: float, tolerance: float = LABEL_TOLERANCE) -> int | None:
    """Return the integer within the tolerance of a mask's value, None if there is none."""
    near = round(value) if np.isfinite(value) else 0
    return near if abs(value - near) <= tolerance else None


def scale_intensity(array: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
    """Scale all values of a volume or picture to [-1, 1] and clip.

    Args:
        array: Any shape; finite and, except for `fixed`, not constant.
        mode: The values that map to -1 and 1. `percentile`: the 1st and 99th percentile; `minmax`:
            the extremes; `zscore`: the mean minus and plus three standard deviations; `fixed`: 0
            and 255. For nearly constant images, whose percentiles are equal, `percentile` falls
            back to the extremes. `flat`, of values that were flattened: as `percentile`.
    """
    values = array.astype(np.float64)
    low, high = (0.0, 255.0) if mode == "fixed" else (float(values.min()), float(values.max()))
    if mode in ("percentile", "flat"):
        inner_low, inner_high = (float(value) for value in np.percentile(values, (1, 99)))
        if inner_high > inner_low:
            low, high = inner_low, inner_high
    elif mode == "zscore":
        centre, reach = float(values.mean()), 3 * float(values.std())
        low, high = centre - reach, centre + reach
    return np.clip((values - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)


def flattened(pixels: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Return the logarithm of an image minus its Gaussian blur in each slice.

    The values are cut off at their 1st and 99th percentile. A constant factor does not change the
    result, and a factor that varies slowly over a slice hardly does. Values that are not positive
    have no logarithm, so the smallest is raised to a hundredth of the range. At the edge of a slice
    the image is mirrored.

    Args:
        pixels: (Z, C, Y, X), finite and not constant.
        sigma: Standard deviation of the blur as a share of the height and of the width.
    """
    values = pixels.astype(np.float64)
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    floor = FLAT_FLOOR * (high - low)
    clipped = np.clip(values, low, high) + max(floor - low, 0.0)
    logarithm = np.log(clipped)
    widths = (0, 0, sigma * pixels.shape[-2], sigma * pixels.shape[-1])
    blurred = ndimage.gaussian_filter(logarithm, widths, mode="reflect")
    return np.asarray(logarithm - blurred, np.float32)


def resize(slices: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize images (Z, C, Y, X) to (Z, C, *size), bilinear with antialiasing."""
    images = torch.from_numpy(np.ascontiguousarray(slices, dtype=np.float32))
    return np.asarray(_antialiased(images, size).numpy())


def resize_labels(labels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize label maps (Z, Y, X) to (Z, *size); the largest share of a pixel wins.

    A share is the resized indicator (0 or 1) of a class, so labels stay aligned with their image;
    with an even factor, nearest-neighbour resizing would shift them by half a native pixel. Equal
    shares, which are frequent with even factors, go to the class that is declared later, so that
    background never wins a tie. Shares count as equal within `TIE`. Mirrored labels give mirrored
    results.
    """
    if labels.shape[1:] == size:
        return labels
    found = np.empty((len(labels), *size), np.uint8)
    # One slice and class at a time, so that memory use does not grow with the number of classes.
    for layer, resized in zip(labels, found, strict=True):
        classes = np.unique(layer)
        resized[:] = classes[0]
        most = _share(layer == classes[0], size)
        for index in classes[1:]:
            share = _share(layer == index, size)
            wins = share >= most - TIE
            resized[wins] = index
            most = np.maximum(most, share)
    return found


def _share(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.float64]:
    """Return a mask's (Y, X) share of each pixel of the resized slice."""
    indicator = torch.from_numpy(mask.astype(np.float64))[None, None]
    return np.asarray(_antialiased(indicator, size)[0, 0].numpy())


def _antialiased(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, Y, X) floats to (N, C, *size)."""
    if maps.shape[-2:] == size:
        return maps
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True)


def read_case(case: CaseFile, data: DataSettings) -> tuple[Volume, NDArray[np.uint8]]:
    """Return the image of a case and its class indices (Z, Y, X), checked.

    Raises:
        FedsgcgError: DAT-103 to DAT-109, DAT-112 or DAT-160 to DAT-169 for an unusable case.
    """
    if not case.masks:
        action = "Draw a mask, or remove the case from the manifest."
        raise fail(
            "DAT-112",
            found="an image without a mask",
            expected="an image and its mask",
            action=action,
            where=case.name,
        )
    image = read_volume(case.image)
    truth = read_truth(case.masks, case.structure_names, image, data, case.name)
    check_image(image, case.name)
    return image, truth


def read_without_mask(case: CaseFile) -> tuple[Volume, NDArray[np.uint8]]:
    """Return the image of a case, checked, and labels (Z, Y, X) that are all `IGNORED`.

    Raises:
        FedsgcgError: DAT-103, DAT-106 to DAT-108 or DAT-160 to DAT-169 for an unusable image.
    """
    image = read_volume(case.image)
    check_image(image, case.name)
    depth = 1 if image.is_picture else len(image.array)
    return image, np.full((depth, *image.array.shape[1:]), IGNORED, np.uint8)


def read_truth(
    masks: Sequence[Path],
    structures: Sequence[str],
    image: Volume,
    data: DataSettings,
    where: str,
) -> NDArray[np.uint8]:
    """Return the class indices (Z, Y, X) of a case's mask on the grid of its image.

    Args:
        masks: The mask file: a label map or a DICOM segmentation; or one file a structure.
        structures: The structure of each mask file; empty for a single mask.
        image: The image.
        data: Classes and structures.
        where: Name of the case in an error.

    Raises:
        FedsgcgError: DAT-103 to DAT-106, DAT-109, DAT-116, DAT-160 or DAT-162 to DAT-169
            for a mask that cannot be used.
    """
    groups = data.structure_classes()
    if structures:
        inside = np.stack([read_binary(path, image, where) for path in masks])
        return class_map(Layers(tuple(structures), inside), data.classes, groups, where)
    (path,) = masks
    if (segments := segments_of(path, image)) is not None:
        return class_map(segments, data.classes, groups, where)
    mask = read_volume(path, mask=True)
    check_geometry(image, mask, where)
    return class_indices(mask.array, data.classes, where, data.label_tolerance)


def read_binary(path: Path, image: Volume, where: str) -> NDArray[np.bool_]:
    """Read the mask of one structure on its image's grid: 0 outside and one other value inside.

    Raises:
        FedsgcgError: DAT-103 to DAT-106, DAT-116 or DAT-165 for a mask that cannot be used.
    """
    mask = read_volume(path, mask=True)
    check_geometry(image, mask, where)
    values = np.unique(mask.array)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0) or not np.isfinite(values).all():
        shown = ", ".join(f"{value:.6g}" for value in values[:6])
        raise fail(
            "DAT-165",
            found=f"values {shown} in {path.name}",
            expected="0 and one other value in the mask of one structure",
            action="Export it as a binary mask, or list one mask with all label values.",
            where=where,
        )
    return np.asarray(mask.array != 0)
