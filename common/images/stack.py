"""TIFF of several pages as a volume: the pages are axial slices from feet to head.

TIFF states no orientation. The voxel size comes from ImageJ's fields (`spacing`, `unit` and the
resolution) or OME's (`PhysicalSizeX` and so on); without one a volume has no voxel size.

Legend: Z, Y, X = pages, rows, columns.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.images.volume import Volume, from_canonical, volume_of

Array = NDArray[Any]

SLICES: Final = "ZIQ"
"""Names of tifffile for an axis of slices, or of pages without a meaning."""

MILLIMETRES: Final = {
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", r"\u00b5m"), 1e-3),
    **dict.fromkeys(("cm", "centimeter"), 10.0),
    **dict.fromkeys(("nm", "nanometer"), 1e-6),
    **dict.fromkeys(("inch", "in"), 25.4),
    "m": 1e3,
}


def is_slices(axes: str) -> bool:
    """Whether axes, as tifffile names them, are slices of grey values."""
    return len(axes) == 3 and axes[0] in SLICES and axes[1:] == "YX"


def volume_of_stack(pixels: Array, spacing: tuple[float, float, float] | None) -> Volume:
    """Return pages (Z, Y, X) as an axial volume with spacing (sz, sy, sx) in mm, None = unknown."""
    z, y, x = spacing or (1.0, 1.0, 1.0)
    affine = np.diag([-x, -y, z, 1.0])
    return volume_of(
        pixels.transpose(2, 1, 0),
        affine,
        has_size=spacing is not None,
        plane="axial",
        form="TIFF stack",
    )


def spacing_of(file: Any, page: Any) -> tuple[float, float, float] | None:
    """Return (sz, sy, sx) in mm of an open `tifffile.TiffFile`, None if it does not state it."""
    sizes: list[float] | None = None
    if file.is_ome:
        sizes = _ome(str(file.ome_metadata))
    elif file.is_imagej:
        fields = file.imagej_metadata or {}
        unit = MILLIMETRES.get(str(fields.get("unit", "")).lower())
        pixels = [_per_unit(page, name) for name in ("YResolution", "XResolution")]
        if unit and "spacing" in fields and all(pixels):
            sizes = [float(fields["spacing"]) * unit, *(unit / one for one in pixels if one)]
    if sizes is None or not all(np.isfinite(size) and size > 0 for size in sizes):
        return None
    return (sizes[0], sizes[1], sizes[2])


def write(path: Path, labels: Array, volume: Volume) -> None:
    """Write a canonical array (Z, Y, X) as pages with the voxel size of its image (for ImageJ)."""
    import tifffile

    pages = from_canonical(labels, volume.affine, volume.plane).transpose(2, 1, 0)
    kind = np.uint8 if pages.max(initial=0) < 256 else np.uint16
    fields: dict[str, Any] = {"axes": "ZYX"}
    resolution = None
    if volume.millimetres is not None:
        sizes = np.linalg.norm(volume.affine[:3, :3], axis=0)
        fields |= {"spacing": float(sizes[2]), "unit": "mm"}
        resolution = (1 / float(sizes[0]), 1 / float(sizes[1]))
    # Without `datetime` the bytes depend only on the content.
    tifffile.imwrite(path, pages.astype(kind), imagej=True, resolution=resolution, metadata=fields)


def _ome(text: str) -> list[float] | None:
    sizes = []
    for axis in "ZYX":
        size = re.search(rf'PhysicalSize{axis}="([^"]+)"', text)
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', text)
        factor = MILLIMETRES.get(unit[1].lower() if unit else "µm")
        if size is None or factor is None:
            return None
        sizes.append(float(size[1]) * factor)
    return sizes


def _per_unit(page: Any, name: str) -> float:
    """Return the pixels per unit of length of a resolution tag, 0 without one."""
    tag = page.tags.get(name)
    if tag is None:
        return 0.0
    top, bottom = tag.value
    return float(top) / float(bottom) if bottom else 0.0
