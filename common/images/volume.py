"""Images in one canonical orientation, and the checks that they can be used.

Legend: Z, Y, X = slices, rows, columns of a volume; C = colour channels of a picture (1 or 3); H, W
= rows, columns.

The canonical orientation of a volume is the radiological display of the plane in which it was
acquired. Z is the axis with clearly the longest voxels, or the axis from feet to head if no axis
is. Axial slices go from inferior to superior, rows from anterior to posterior, columns from right
to left ("LPS" in nibabel's codes, with the axes in the order Z, Y, X); for coronal and sagittal
slices see `PLANES`. Axes are only permuted and flipped, never resampled, so that `to_native` is the
exact inverse. Lengths are in mm whatever the unit of the header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.errors import FedsgcgError, fail

Array = NDArray[Any]
nib: Any = nibabel  # untyped

PLANES = {"axial": ("L", "P", "S"), "coronal": ("L", "I", "P"), "sagittal": ("P", "I", "L")}
"""Plane of the slices -> directions of columns, rows and slices (nibabel's axis codes)."""

THICK = 2**0.5
"""Ratio of voxel sizes from which an axis counts as clearly the longest.

It lies between the ratios that scanners use, so that the rounding of a header does not decide.
"""

PICTURE = "picture"
KINDS = (*(f"{plane} volume" for plane in PLANES), PICTURE)
"""Kinds of image; a data set and a model are of one kind (`Volume.kind`)."""

# A damaged header can announce any size; a clinical volume is far smaller.
MAX_BYTES = 2**32
# A tenth of a voxel: far above the rounding of a header, far below a shift that affects a contour.
GEOMETRY_TOLERANCE = 0.1


@dataclass(frozen=True)
class Volume:
    """An image in canonical orientation.

    Attributes:
        array: (Z, Y, X) float32 of a volume, (C, H, W) float32 of a picture.
        affine: (4, 4) affine of the file on disk (voxel -> mm); identity for a picture.
        spacing: (sz, sy, sx) in mm of the canonical array; ones for a picture, or if the header
            has no voxel size.
        is_picture: Whether it is a 2-D picture, which has no spacing.
        is_eight_bit: Whether it is a picture with 8 bits per channel, i.e. values from 0 to 255.
        plane: Key of `PLANES`; without meaning for a picture.
        has_size: Whether the header of a volume has the voxel size.
        form: Name of the file's format (`common.images.formats`), "" for an array.
        source: What the writer of the format needs to write a result like the file: nibabel class
            and header of a NIfTI file or an ANALYZE pair, `common.images.dicom.Source` of a series.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    is_picture: bool
    is_eight_bit: bool = False
    plane: str = "axial"
    has_size: bool = True
    form: str = ""
    source: Any = None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return PICTURE if self.is_picture else f"{self.plane} volume"

    @property
    def millimetres(self) -> tuple[float, float, float] | None:
        """(sz, sy, sx) in mm; None for a picture, or if the header has no voxel size."""
        return self.spacing if self.has_size and not self.is_picture else None

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """(4, 4) affine that maps (x, y, z) of the canonical array to mm."""
        native_shape = to_native(np.empty(self.array.shape, np.bool_), self).shape
        turn = _change(nib.io_orientation(self.affine), _ornt(PLANES[self.plane]))
        change = nib.orientations.inv_ornt_aff(turn, native_shape)
        return np.asarray(self.affine @ change, dtype=np.float64)


def volume_of(
    array: Array,
    affine: NDArray[np.float64],
    *,
    has_size: bool = True,
    plane: str = "",
    form: str = "",
    source: Any = None,
) -> Volume:
    """Return a volume in canonical orientation.

    Args:
        array: (i, j, k) voxels in the axes of the file.
        affine: (4, 4), voxel -> mm in nibabel's directions (x to the right, y to the front, z up).
        has_size: Whether the header has the voxel size.
        plane: Plane of the slices (key of `PLANES`); "" to find it from the voxel size.
        form: Name of the file's format.
        source: What the writer of the format needs to write a result like the file.

    Raises:
        ValueError: The affine is not finite, or its axes do not span a volume.
    """
    if not np.isfinite(affine).all() or _is_flat(affine):
        raise ValueError("the header has no usable affine (voxel to mm)")
    codes = nib.io_orientation(affine)
    if np.isnan(codes).any():
        raise ValueError("the header's affine has no orientation")
    sizes = nib.affines.voxel_sizes(affine) if has_size else np.ones(3)
    by_axis = {int(axis): float(size) for axis, size in zip(codes[:, 0], sizes, strict=True)}
    lengths = {int(axis): length for axis, length in zip(codes[:, 0], array.shape, strict=True)}
    plane = plane or _plane(by_axis, lengths)
    columns, rows, slices = (int(axis) for axis in _ornt(PLANES[plane])[:, 0])
    return Volume(
        np.ascontiguousarray(_to_canonical(array, affine, plane), dtype=np.float32),
        affine,
        (by_axis[slices], by_axis[rows], by_axis[columns]),
        is_picture=False,
        plane=plane,
        has_size=has_size,
        form=form,
        source=source,
    )


def to_native(array: Array, volume: Volume) -> Array:
    """Map a canonical (Z, Y, X) array to the axes (i, j, k) of the file of `volume`.

    The array of a picture, whose axes never change, is returned unchanged.
    """
    if volume.is_picture:
        return array
    return from_canonical(array, volume.affine, volume.plane)


def to_canonical_like(array: Array, volume: Volume) -> Array:
    """Map (i, j, k) axes of the file of `volume` to its canonical (Z, Y, X)."""
    return _to_canonical(array, volume.affine, volume.plane)


def affine_as(
    codes: tuple[str, str, str], affine: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Return the affine of a file with axes `codes`, e.g. ("R", "A", "S"), for an axial array.

    Args:
        codes: nibabel axis codes of the file, first axis first.
        affine: (4, 4) affine of the canonical array, (x, y, z) -> mm.
        shape: (Z, Y, X) of the canonical array.
    """
    change = nib.orientations.inv_ornt_aff(
        _change(_ornt(PLANES["axial"]), _ornt(codes)), shape[::-1]
    )
    return np.asarray(affine @ change, dtype=np.float64)


def check_image(volume: Volume, where: str) -> None:
    """Check that an image can be scaled.

    Raises:
        FedsgcgError: DAT-107 for NaN or infinite values, DAT-108 if all values are equal.
    """
    finite = np.isfinite(volume.array)
    if not finite.all():
        found = f"{int((~finite).sum())} of {finite.size} values are NaN or infinite"
        raise fail(
            "DAT-107",
            found=found,
            expected="finite values",
            action="Export the image again.",
            where=where,
        )
    if volume.array.min() == volume.array.max():
        found = f"every value is {volume.array.flat[0]:g}"
        raise fail(
            "DAT-108",
            found=found,
            expected="an image with contrast",
            action="Check the export.",
            where=where,
        )


def check_geometry(image: Volume, mask: Volume, where: str) -> None:
    """Check that a mask covers the same space as its image.

    Both are compared in canonical orientation: a mask that was saved with other axes is accepted.

    Raises:
        FedsgcgError: DAT-104 for another shape, DAT-105 if a corner is more than a tenth of a voxel
            away.
    """
    kept = -2 if image.is_picture else -3
    wanted, got = image.array.shape[kept:], mask.array.shape[kept:]
    if wanted != got or image.is_picture != mask.is_picture:
        raise _other_shape(image, mask, where)
    if image.is_picture:
        return
    away = _largest_distance(image.canonical_affine, mask.canonical_affine, image.array.shape)
    if away > GEOMETRY_TOLERANCE * min(image.spacing):
        action = "Check origin, spacing and orientation of the mask's header."
        raise fail(
            "DAT-105",
            found=f"{away:.3g} mm apart",
            expected="equal affines",
            action=action,
            where=where,
        )


def _other_shape(image: Volume, mask: Volume, where: str) -> FedsgcgError:
    """Return DAT-104; a colour picture that was saved as a volume of three slices is named."""
    found, expected = (_shown_shape(one) for one in (mask, image))
    action = "Draw the mask on this image, or resample it."
    colours = {3, 4} & set(to_native(image.array, image).shape[2:]) if not image.is_picture else ()
    if colours and to_native(mask.array, mask).shape[-1] == 1:
        expected += f" of {image.form or 'volume'} with {colours.pop()} slices"
        action = (
            "If the image is a colour picture whose channels were saved as the third axis, save "
            "it as PNG: in a volume the third axis is space. Otherwise draw the mask on each slice."
        )
    return fail("DAT-104", found=found, expected=expected, action=action, where=where)


def _shown_shape(image: Volume) -> str:
    """Return the size of an image as its file has it: slices last."""
    if image.is_picture:
        return f"a picture of {by(image.array.shape[-2:])}"
    return f"a volume of {by(to_native(image.array, image).shape)}"


def _largest_distance(
    first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, ...]
) -> float:
    """Return the largest distance in mm between corresponding corners of two (Z, Y, X) grids."""
    z, y, x = (size - 1 for size in shape)
    corners = np.array([(i, j, k, 1.0) for i in (0, x) for j in (0, y) for k in (0, z)]).T
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())


def by(shape: tuple[int, ...]) -> str:
    """Return a shape as text, e.g. 12x80x80."""
    return "x".join(map(str, shape))


def _ornt(codes: tuple[str, ...]) -> Array:
    """Return nibabel's orientation array of axis codes."""
    return np.asarray(nib.orientations.axcodes2ornt(codes))


def _change(start: Array, target: Array) -> Array:
    """Return the permutation and flips from one orientation to another."""
    return np.asarray(nib.orientations.ornt_transform(start, target))


def _to_canonical(array: Array, affine: NDArray[np.float64], plane: str) -> Array:
    """Map the (i, j, k) axes of a file to (Z, Y, X)."""
    change = _change(nib.io_orientation(affine), _ornt(PLANES[plane]))
    return np.asarray(nib.apply_orientation(array, change)).transpose(2, 1, 0)


def from_canonical(array: Array, affine: NDArray[np.float64], plane: str) -> Array:
    """Map (Z, Y, X) axes to the (i, j, k) of a file; the inverse of `_to_canonical`."""
    change = _change(_ornt(PLANES[plane]), nib.io_orientation(affine))
    return np.asarray(nib.apply_orientation(array.transpose(2, 1, 0), change))


def _is_flat(affine: NDArray[np.float64]) -> bool:
    """Whether voxels have no volume: an axis has length 0, or the three axes are coplanar."""
    volume = abs(np.linalg.det(affine[:3, :3]))
    return bool(volume <= 1e-6 * np.prod(np.linalg.norm(affine[:3, :3], axis=0)))


def _plane(sizes: Mapping[int, float], lengths: Mapping[int, int]) -> str:
    """Return the plane of the slices.

    Args:
        sizes: Voxel size along each axis of the body (0 left-right, 1 front-back, 2 feet-head).
        lengths: Number of voxels along each; a volume with one slice has that slice's plane.
    """
    across = {axis: plane for plane, codes in PLANES.items() for axis in (int(_ornt(codes)[2, 0]),)}
    single = [axis for axis, length in lengths.items() if length == 1]
    if len(single) == 1:
        return across[single[0]]
    longest = max(sizes, key=lambda axis: sizes[axis])
    others = [size for axis, size in sizes.items() if axis != longest]
    return across[longest] if sizes[longest] > THICK * max(others) else "axial"
