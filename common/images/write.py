"""Writes results in the geometry of their image, in its format or another one.

Legend: Z, Y, X = slices, rows, columns of the canonical orientation (`common.images.read`).
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedsgcg.common.images import analyze, itk, stack
from fedsgcg.common.images.formats import ANALYZE, METAIMAGE, NIFTI, NRRD, TIFF, format_of
from fedsgcg.common.images.read import Volume, open_nifti, suffix_of, to_native

Array = NDArray[Any]
nib: Any = nibabel  # untyped

_FIRST = bytes.fromhex("000000 E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7")
PALETTE = (*_FIRST, *(level for value in range(8, 256) for level in 3 * (value,)))
"""Colours of label values in a picture's mask (Okabe and Ito, then grey).

A viewer shows the colours, a program reads the values. All 256 entries are needed: with a shorter
palette the picture is stored with fewer bits, which truncates large values.
"""


def write_like(path: Path, array: Array, volume: Volume) -> None:
    """Write a canonical array in the geometry of its image, in the format of the path's suffix.

    NIfTI from a NIfTI image keeps the header too, and an ANALYZE pair is written with the header of
    its image.

    Args:
        path: Suffix of NIfTI, MetaImage, NRRD, ANALYZE or TIFF.
        array: (Z, Y, X), or (S, Z, Y, X) with one map per structure, which becomes the fourth axis
            or, in MetaImage and NRRD, several values per voxel; its type is kept.
        volume: The image.
    """
    maps = [to_native(part, volume) for part in (array if array.ndim == 4 else array[None])]
    native = np.stack(maps, axis=-1) if array.ndim == 4 else maps[0]
    form = format_of(path)
    if form in (METAIMAGE, NRRD):
        itk.write(path, native, volume.affine)
    elif form is ANALYZE:
        analyze.write(path, native, volume)
    elif form is TIFF:
        stack.write(path, array, volume)
    elif volume.form == NIFTI.name:
        _write(path, native, *volume.source)
    else:
        _write(path, native, nib.Nifti1Image, _header(volume))


def _header(volume: Volume) -> Any:
    """Return a NIfTI header with the geometry of an image of another format."""
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm" if volume.has_size else "unknown")
    header.set_qform(volume.affine, 1)
    header.set_sform(volume.affine, 1)
    return header


def write_native(path: Path, voxels: Array, source: Path) -> None:
    """Write voxels (i, j, k[, s]) with the header and affine of another file."""
    reference = open_nifti(source)
    _write(path, voxels, type(reference), reference.header)


def _write(path: Path, voxels: Array, kind: Any, like: Any) -> None:
    """Write voxels as nibabel class `kind` with a copy of the header `like`.

    The bytes depend only on content and header (no time stamp), so that equal results have equal
    hashes.
    """
    header = like.copy()
    header.set_data_dtype(voxels.dtype)
    header["cal_max"], header["cal_min"] = 0, 0
    image = kind(np.ascontiguousarray(voxels), None, header)
    content = image.to_bytes()
    if suffix_of(path) == ".nii.gz":
        content = gzip.compress(content, 1, mtime=0)
    path.write_bytes(content)


def picture_bytes(array: Array) -> bytes:
    """Return a PNG of (H, W) or (H, W, 3) uint8 values."""
    return _png(Image.fromarray(np.ascontiguousarray(array)))


def mask_bytes(labels: NDArray[np.uint8]) -> bytes:
    """Return a PNG of (H, W) label values with a palette that makes them visible."""
    picture = Image.fromarray(np.ascontiguousarray(labels), mode="P")
    picture.putpalette(PALETTE)
    return _png(picture)


def wide_bytes(labels: NDArray[Any]) -> bytes:
    """Return a 16-bit PNG of (H, W) label values above 255."""
    return _png(Image.fromarray(labels.astype(np.uint16)))


def _png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()
