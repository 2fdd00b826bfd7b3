"""One case's files become canonical slices: read, checked, labelled, scaled and resized.

A slice is resized as a whole to `image_size` squared (images bilinear with antialiasing, labels nearest, pixel centres
aligned). A slice that is not square changes its aspect; `Slices.truth` keeps the native grid for the metrics.

Legend: Z, Y, X = native slices, rows, columns; C = stored channels (3 for a colour picture, else 1); S = image_size;
K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from clients.site import CaseFile
from common.contents import content_hash
from common.errors import fail
from common.imaging import Volume, check_geometry, check_image, read_volume
from common.plan import DataSettings

# int16 steps in one unit of intensity; the rounding error, 1.5e-5, is far below an image's noise.
STEPS = 32767.0


@dataclass(frozen=True)
class Slices:
    """The slices of one case.

    Attributes:
        image: (Z, C, S, S) int16, intensity in [-1, 1] times `STEPS`.
        label: (Z, S, S) uint8 class indices.
        truth: (Z, Y, X) uint8 class indices on the native grid.
        display: (Z, Y, X) uint8 native image for people, colours turned grey.
        present: (Z, K) whether a class occurs in the native slice.
        spacing: (sz, sy, sx) in mm; None for a picture.
        content: Hash of the image's voxels (`common.contents`), "" when it was not asked for.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    display: NDArray[np.uint8]
    present: NDArray[np.bool_]
    spacing: tuple[float, float, float] | None
    content: str = ""


def prepare(case: CaseFile, data: DataSettings) -> Slices:
    """Read one case and bring it into the form of a training slice.

    Raises:
        FedsgcgError: DAT-103 to DAT-109 or DAT-112, naming what is wrong with the case.
    """
    image, mask = _read(case)
    slices = to_slices(image, class_indices(mask.array, data.classes, case.name), data)
    return replace(slices, content=content_hash(image))


def to_slices(image: Volume, truth: NDArray[np.uint8], data: DataSettings) -> Slices:
    """Bring an image and its class indices (Z, Y, X) into the form of a training slice."""
    pixels = image.array[None] if image.is_picture else image.array[:, None]
    scaled = scale_intensity(pixels, data.intensity)
    small = resize(scaled, data.image_size, labels=False)
    label = resize(truth[:, None], data.image_size, labels=True)[:, 0]
    present = np.stack([(truth == index).any(axis=(1, 2)) for index in range(data.num_classes)], axis=1)
    return Slices(
        image=np.rint(np.clip(small, -1, 1) * STEPS).astype(np.int16),
        label=label.astype(np.uint8),
        truth=truth,
        display=np.rint((scaled.mean(axis=1) + 1) * 127.5).astype(np.uint8),
        present=present,
        spacing=None if image.is_picture else image.spacing,
    )


def class_indices(raw: NDArray[np.float32], classes: dict[str, list[int]], where: str) -> NDArray[np.uint8]:
    """Map raw label values to class indices, in the order in which the classes are declared.

    Raises:
        FedsgcgError: DAT-109 when a value is in no class.
    """
    values, positions = np.unique(raw, return_inverse=True)
    index = {float(value): number for number, group in enumerate(classes.values()) for value in group}
    unknown = [f"{value:g}" for value in values if float(value) not in index]
    if unknown:
        found = "values " + ", ".join(unknown[:8]) + (", …" if len(unknown) > 8 else "")
        expected = "values " + ", ".join(f"{value:g}" for value in sorted(index))
        action = "Correct the mask, or declare the value in data.classes."
        raise fail("DAT-109", found=found, expected=expected, action=action, where=where)
    table = np.array([index[float(value)] for value in values], dtype=np.uint8)
    return np.asarray(table[positions].reshape(raw.shape))


def scale_intensity(array: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
    """Scale all values of a volume or picture to [-1, 1] and clip (methods.md 2.3).

    Args:
        array: Any shape; finite and not constant.
        mode: `percentile` maps the 1st and 99th percentile to -1 and 1, `minmax` the extremes, `zscore` the mean
            minus and plus three standard deviations. With nearly constant images, whose percentiles are equal,
            `percentile` falls back to the extremes.
    """
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if mode == "percentile":
        inner_low, inner_high = (float(value) for value in np.percentile(values, (1, 99)))
        low, high = (inner_low, inner_high) if inner_high > inner_low else (low, high)
    elif mode == "zscore":
        centre, reach = float(values.mean()), 3 * float(values.std())
        low, high = centre - reach, centre + reach
    return np.clip((values - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)


def resize(slices: NDArray[Any], side: int, *, labels: bool) -> NDArray[np.float32]:
    """Resize (Z, C, Y, X) slices to (Z, C, side, side); labels take the nearest pixel."""
    tensor = torch.from_numpy(np.ascontiguousarray(slices, dtype=np.float32))
    if tensor.shape[-2:] == (side, side):
        resized = tensor
    elif labels:
        resized = functional.interpolate(tensor, (side, side), mode="nearest-exact")
    else:
        resized = functional.interpolate(tensor, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return np.asarray(resized.numpy())


def _read(case: CaseFile) -> tuple[Volume, Volume]:
    """Read image and mask of a case and check that they belong together."""
    if case.mask is None:
        action = "Draw a mask, or take the case out of the manifest."
        raise fail("DAT-112", found="an image alone", expected="an image and its mask", action=action, where=case.name)
    image, mask = read_volume(case.image), read_volume(case.mask, mask=True)
    check_image(image, case.name)
    check_geometry(image, mask, case.name)
    return image, mask
