"""Reads and writes NIfTI-1 and NIfTI-2 files (`.nii`, `.nii.gz`) with nibabel."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.errors import fail
from fedsgcg.common.images.volume import MAX_BYTES, Volume, by, from_canonical, volume_of

Array = NDArray[Any]
nib: Any = nibabel  # untyped

MILLIMETRES = {"meter": 1e3, "micron": 1e-3}
"""Millimetres per unit of length of a header; the default unit is mm."""


def read(path: Path, *, mask: bool = False) -> Volume:
    """Read a NIfTI file into canonical orientation; `mask` makes no difference."""
    content = _bytes(path)
    image = _nifti_image(content)
    array = three_dimensions(image, path)
    unit = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    affine = np.diag([unit, unit, unit, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
    has_size = _has_size(image, content, array.shape)
    source = (type(image), image.header.copy())
    return volume_of(array, affine, has_size=has_size, form="NIfTI", source=source)


def shape(path: Path) -> tuple[int, ...]:
    """Return the (i, j, k) shape from the header."""
    found: tuple[int, ...] = nib.load(path).shape
    return found[:3]


def write_volume(path: Path, array: Array, affine: NDArray[np.float64]) -> None:
    """Write an axial (Z, Y, X) array as `.nii.gz` in the orientation of the file's `affine`.

    The bytes depend only on the content (no time stamp), so that equal images have equal hashes.
    """
    image = nib.Nifti1Image(np.ascontiguousarray(from_canonical(array, affine, "axial")), affine)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


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


def three_dimensions(image: Any, path: Path) -> NDArray[np.float32]:
    """Return the scaled voxels as (i, j, k) float32; trailing axes of length one are dropped."""
    shape = tuple(int(size) for size in image.shape)
    dtype = image.get_data_dtype()
    core = list(shape)
    while len(core) > 3 and core[-1] == 1:
        core.pop()
    coloured = dtype.fields is not None
    if len(core) > 3 or coloured:
        found = f"shape {by(shape)}" + (" of colour voxels" if coloured else "")
        action = "Save one time point, echo or channel as a 3-D file and list that in the manifest."
        raise fail("DAT-106", found=found, expected="3 dimensions", action=action, where=str(path))
    too_large = np.prod([float(size) for size in core]) * 4 > MAX_BYTES
    if not core or 0 in core or too_large or dtype.kind == "c":
        raise ValueError(f"shape {shape} of {dtype}")
    array: NDArray[np.float32] = np.asarray(
        image.get_fdata(dtype=np.float32, caching="unchanged"), dtype=np.float32
    )
    return array.reshape([*core, *([1] * (3 - len(core)))])
