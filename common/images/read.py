"""Reads NIfTI volumes in one canonical orientation, and 2-D pictures without a change of axes.

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

import gzip
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.images.formats import conversion_advice
from fedsgcg.common.images.pixels import picture_pixels

Array = NDArray[Any]
nib: Any = nibabel  # untyped

VOLUME_SUFFIXES = (".nii.gz", ".nii")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PLANES = {"axial": ("L", "P", "S"), "coronal": ("L", "I", "P"), "sagittal": ("P", "I", "L")}
"""Plane of the slices -> directions of columns, rows and slices (nibabel's axis codes)."""

THICK = 2**0.5
"""Ratio of voxel sizes from which an axis counts as clearly the longest.

It lies between the ratios that scanners use, so that the rounding of a header does not decide.
"""

MILLIMETRES = {"meter": 1e3, "micron": 1e-3}
"""Millimetres per unit of length of a header; the default unit is mm."""

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
        source: nibabel class and header of the NIfTI file, for writing results; None for a picture.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    is_picture: bool
    is_eight_bit: bool = False
    plane: str = "axial"
    has_size: bool = True
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


def suffix_of(path: Path) -> str:
    """Return the supported image suffix of a path in lower case, e.g. `.nii.gz`, or ""."""
    name = path.name.lower()
    return next(
        (suffix for suffix in (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES) if name.endswith(suffix)), ""
    )


def read_volume(path: Path, *, mask: bool = False) -> Volume:
    """Read a NIfTI volume or a 2-D picture.

    Args:
        path: `.nii`, `.nii.gz`, `.png`, `.jpg`, `.tif` or `.bmp`.
        mask: Whether the values are labels: a palette picture then gives its indices, and a colour
            picture with equal channels one channel.

    Raises:
        FedsgcgError: DAT-103 if the file is missing, damaged or of an unknown format; DAT-106 if it
            has more dimensions than a volume or a picture; DAT-116 for a mask in a format that
            changes values.
    """
    suffix = suffix_of(path)
    if not suffix:
        found, action = f"suffix {path.suffix!r}", conversion_advice(path)
        raise fail(
            "DAT-103",
            found=found,
            expected="NIfTI or a 2-D picture",
            action=action,
            where=str(path),
        )
    try:
        return _read_nifti(path) if suffix in VOLUME_SUFFIXES else _read_picture(path, mask)
    except FedsgcgError:
        raise
    except FileNotFoundError as error:
        raise _unreadable("no such file", path) from error
    # On damaged bytes the readers raise almost anything, even SyntaxError; one file must not stop a
    # site.
    except Exception as error:
        raise _unreadable(f"{type(error).__name__}: {error}", path) from error


def _unreadable(found: str, path: Path) -> FedsgcgError:
    action = "Export the file again from its source; the case is left out until then."
    return fail("DAT-103", found=found, expected="a complete image", action=action, where=str(path))


def to_native(array: Array, volume: Volume) -> Array:
    """Map a canonical (Z, Y, X) array to the axes (i, j, k) of the file of `volume`.

    The array of a picture, whose axes never change, is returned unchanged.
    """
    if volume.is_picture:
        return array
    return _from_canonical(array, volume.affine, volume.plane)


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


def write_volume(path: Path, array: Array, affine: NDArray[np.float64]) -> None:
    """Write an axial (Z, Y, X) array as `.nii.gz` in the orientation of the file's `affine`.

    The bytes depend only on the content (no time stamp), so that equal images have equal hashes.
    """
    image = nib.Nifti1Image(np.ascontiguousarray(_from_canonical(array, affine, "axial")), affine)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


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
        action = "Draw the mask on this image, or resample it."
        raise fail("DAT-104", found=_by(got), expected=_by(wanted), action=action, where=where)
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


def _largest_distance(
    first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, ...]
) -> float:
    """Return the largest distance in mm between corresponding corners of two (Z, Y, X) grids."""
    z, y, x = (size - 1 for size in shape)
    corners = np.array([(i, j, k, 1.0) for i in (0, x) for j in (0, y) for k in (0, z)]).T
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())


def _by(shape: tuple[int, ...]) -> str:
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


def _from_canonical(array: Array, affine: NDArray[np.float64], plane: str) -> Array:
    """Map (Z, Y, X) axes to the (i, j, k) of a file; the inverse of `_to_canonical`."""
    change = _change(_ornt(PLANES[plane]), nib.io_orientation(affine))
    return np.asarray(nib.apply_orientation(array.transpose(2, 1, 0), change))


def _read_nifti(path: Path) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file into canonical orientation."""
    content = _bytes(path)
    image = _nifti_image(content)
    array = _three_dimensions(image, path)
    unit = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    affine = np.diag([unit, unit, unit, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or _is_flat(affine):
        raise ValueError("the header has no usable affine (voxel to mm)")
    codes = nib.io_orientation(affine)
    if np.isnan(codes).any():
        raise ValueError("the header's affine has no orientation")
    has_size = _has_size(image, content, array.shape)
    sizes = nib.affines.voxel_sizes(affine) if has_size else np.ones(3)
    by_axis = {int(axis): float(size) for axis, size in zip(codes[:, 0], sizes, strict=True)}
    lengths = {int(axis): length for axis, length in zip(codes[:, 0], array.shape, strict=True)}
    plane = _plane(by_axis, lengths)
    columns, rows, slices = (int(axis) for axis in _ornt(PLANES[plane])[:, 0])
    return Volume(
        np.ascontiguousarray(_to_canonical(array, affine, plane)),
        affine,
        (by_axis[slices], by_axis[rows], by_axis[columns]),
        is_picture=False,
        plane=plane,
        has_size=has_size,
        source=(type(image), image.header.copy()),
    )


def open_nifti(path: Path) -> Any:
    """Return the nibabel image of a file; compression is recognised by content, not by name.

    Raises:
        ValueError: The content is not NIfTI.
    """
    return _nifti_image(_bytes(path))


def _nifti_image(content: bytes) -> Any:
    header_size = set()
    if len(content) >= 4:
        header_size = {struct.unpack(order + "i", content[:4])[0] for order in "<>"}
    if not header_size & {348, 540}:
        raise ValueError("not a NIfTI file" if content else "the file is empty")
    return (nib.Nifti1Image if 348 in header_size else nib.Nifti2Image).from_bytes(content)


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


def _has_size(image: Any, content: bytes, shape: tuple[int, ...]) -> bool:
    """Whether a header has the voxel size: an sform, or sizes above zero.

    The sizes are taken from the file's bytes, because nibabel replaces zero by one.
    """
    if int(image.header["sform_code"]) > 0:
        return True
    header = image.header.structarr
    stored = np.frombuffer(content[: header.nbytes], header.dtype)[0]["pixdim"]
    pairs = zip(np.abs(stored[1:4]), shape, strict=True)
    return all(np.isfinite(size) and (size > 0 or length == 1) for size, length in pairs)


def _bytes(path: Path) -> bytes:
    """Return the bytes of a file, decompressed to the end so that gzip's checksum is verified."""
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    parts, total = [], 0
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
        while part := stream.read(2**22):
            parts.append(part)
            total += len(part)
            if total > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes")
    return b"".join(parts)


def _three_dimensions(image: Any, path: Path) -> NDArray[np.float32]:
    """Return the scaled voxels as (i, j, k) float32; trailing axes of length one are dropped."""
    shape = tuple(int(size) for size in image.shape)
    dtype = image.get_data_dtype()
    core = list(shape)
    while len(core) > 3 and core[-1] == 1:
        core.pop()
    coloured = dtype.fields is not None
    if len(core) > 3 or coloured:
        found = f"shape {_by(shape)}" + (" of colour voxels" if coloured else "")
        action = "Save one time point, echo or channel as a 3-D file and list that in the manifest."
        raise fail("DAT-106", found=found, expected="3 dimensions", action=action, where=str(path))
    too_large = np.prod([float(size) for size in core]) * 4 > MAX_BYTES
    if not core or 0 in core or too_large or dtype.kind == "c":
        raise ValueError(f"shape {shape} of {dtype}")
    array: NDArray[np.float32] = np.asarray(
        image.get_fdata(dtype=np.float32, caching="unchanged"), dtype=np.float32
    )
    return array.reshape([*core, *([1] * (3 - len(core)))])


def _read_picture(path: Path, mask: bool) -> Volume:
    """Read a picture as (C, H, W) with C 1 or 3; an alpha channel is dropped."""
    pixels = picture_pixels(path, mask=mask)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4):
        found = f"shape {pixels.shape}"
        action = "Save one page as a grey or colour picture."
        raise fail(
            "DAT-106",
            found=found,
            expected="one grey or colour picture",
            action=action,
            where=str(path),
        )
    channels = 1 if pixels.shape[2] < 3 else 3
    pixels = pixels[:, :, :channels]
    if mask and channels == 3:
        if (pixels != pixels[:, :, :1]).any():
            action = "Save the mask as grey values or as a palette picture."
            raise fail(
                "DAT-106",
                found="a mask in colours",
                expected="one value per pixel",
                action=action,
                where=str(path),
            )
        pixels = pixels[:, :, :1]
    array = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    return Volume(
        array, np.eye(4), (1.0, 1.0, 1.0), is_picture=True, is_eight_bit=pixels.dtype == np.uint8
    )
