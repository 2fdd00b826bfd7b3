"""Reads and writes pairs `.hdr` and `.img`, of ANALYZE 7.5, SPM or NIfTI, with nibabel.

ANALYZE has no position and no reliable orientation: its field `orient` is written and read in
contradicting ways. Only the common value 0 is read (rows of transverse slices, x to the left as
SPM reads it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.errors import fail
from fedsgcg.common.images.formats import ANALYZE
from fedsgcg.common.images.nifti import MILLIMETRES, three_dimensions
from fedsgcg.common.images.parts import other_half
from fedsgcg.common.images.volume import Volume, volume_of

Array = NDArray[Any]
nib: Any = nibabel  # untyped


def read(path: Path, *, mask: bool = False) -> Volume:
    """Read a pair by either of its files; `mask` makes no difference.

    Raises:
        FedsgcgError: DAT-169 for an ANALYZE header with another orientation, DAT-106 for more
            than three dimensions.
    """
    header = _header(path)
    if not other_half(header).is_file():
        raise ValueError(f"no {other_half(header).name} with the voxels")
    image = nib.load(header)
    unit = 1.0
    if isinstance(image, nib.Nifti1Pair):  # NIfTI-2 too
        unit = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    else:
        _check_orient(image.header, path)
    voxels = three_dimensions(image, path)
    affine = np.diag([unit, unit, unit, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
    sizes = np.abs(np.asarray(image.header["pixdim"][1:4], np.float64))
    stated = bool(np.isfinite(sizes).all() and (sizes > 0).all())
    source = (type(image), image.header.copy())
    return volume_of(voxels, affine, has_size=stated, form=ANALYZE.name, source=source)


def shape(path: Path) -> tuple[int, ...]:
    """Return the (i, j, k) shape from the header."""
    found: tuple[int, ...] = nib.load(_header(path)).shape
    return found[:3]


def write(path: Path, native: Array, volume: Volume) -> None:
    """Write voxels (i, j, k) as a pair with the header of the image's pair."""
    kind, like = volume.source
    header = like.copy()
    stored = native.astype(np.int32) if native.dtype.name in ("uint16", "int64") else native
    header.set_data_dtype(stored.dtype)
    nib.save(kind(np.ascontiguousarray(stored), None, header), path)


def _header(path: Path) -> Path:
    header = path if path.suffix.lower() == ".hdr" else other_half(path)
    if not header.is_file():
        raise ValueError(f"no {header.name} with the header")
    return header


def _check_orient(header: Any, path: Path) -> None:
    stored = header["orient"].item() if "orient" in header else b""
    orient = stored[0] if isinstance(stored, bytes) and stored else 0
    if orient not in (0, ord("0")):
        raise fail(
            "DAT-169",
            found=f"ANALYZE with orient {orient}",
            expected="orient 0 (transverse)",
            action="Convert it with the program that wrote it, or with SPM or FSL "
            "(fslchfiletype NIFTI_GZ IN OUT), and check left and right in a viewer.",
            where=str(path),
        )
