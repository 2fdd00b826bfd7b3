"""Reads an image of any format of the table (`common.images.formats`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.errors import is_lost
from fedsgcg.common.images.formats import (
    DICOM,
    FORMATS,
    PICTURE_SUFFIXES,
    PICTURES,
    VOLUME_SUFFIXES,
    conversion_advice,
    format_of,
    suffix_of,
)
from fedsgcg.common.images.layers import Layers
from fedsgcg.common.images.nifti import open_nifti, write_volume
from fedsgcg.common.images.volume import (
    KINDS,
    MAX_BYTES,
    PICTURE,
    PLANES,
    Volume,
    affine_as,
    check_geometry,
    check_image,
    to_native,
)

__all__ = [
    "KINDS",
    "MAX_BYTES",
    "PICTURE",
    "PICTURE_SUFFIXES",
    "PLANES",
    "VOLUME_SUFFIXES",
    "Volume",
    "affine_as",
    "check_geometry",
    "check_image",
    "open_nifti",
    "read_volume",
    "segments_of",
    "segments_together",
    "slices_in",
    "suffix_of",
    "to_native",
    "write_volume",
]


def read_volume(path: Path, *, mask: bool = False, series: str = "") -> Volume:
    """Read a volume or a 2-D picture.

    Args:
        path: A file of a format of the table, or a folder with one DICOM series.
        mask: Whether the values are labels: a palette picture then gives its indices, a colour
            picture with equal channels one channel, and a DICOM segmentation the numbers of its
            segments on its own grid.
        series: Number or description of a DICOM series in a folder with several; no other format
            has it.

    Raises:
        FedsgcgError: DAT-103 if the file is missing, damaged or of an unknown format; DAT-106 if it
            has more dimensions than a volume or a picture; DAT-116 for a mask in a format that
            changes values; DAT-160 if the library of the format is not installed; DAT-161 to
            DAT-164, DAT-166 and DAT-169 for a DICOM series, a segmentation or an ANALYZE pair that
            cannot be used.
    """
    form = format_of(path)
    if form is None:
        found = "a folder without images" if path.is_dir() else f"suffix {path.suffix!r}"
        expected = ", ".join(one.name for one in FORMATS)
        action = conversion_advice(path)
        raise fail("DAT-103", found=found, expected=expected, action=action, where=str(path))
    try:
        options = {"series": series} if series and form is DICOM else {}
        read: Volume = form.reader.read(path, mask=mask, **options)
    except FedsgcgError:
        raise
    except FileNotFoundError as error:
        raise _unreadable("no such file", path) from error
    # On damaged bytes the readers raise almost anything, even SyntaxError; one file must not stop a
    # site.
    except Exception as error:
        raise _unreadable(f"{type(error).__name__}: {error}", path, lost=is_lost(error)) from error
    return read


def segments_of(path: Path, image: Volume) -> Layers | None:
    """Return the segments of DICOM segmentations on the grid of their image; None for other files.

    Args:
        path: A segmentation, or a folder with one or several of the same image.
        image: The image.

    Raises:
        FedsgcgError: DAT-103 for a damaged segmentation, DAT-105, DAT-160 or DAT-164 for one that
            cannot be used with the image, DAT-198 for several that draw the same structure.
    """
    if format_of(path) is not DICOM:
        return None
    from fedsgcg.common.images import dicom

    try:
        found = dicom.segmentations_in(path)
    except FedsgcgError:
        raise
    except Exception as error:  # as in `read_volume`
        raise _unreadable(f"{type(error).__name__}: {error}", path, lost=is_lost(error)) from error
    return segments_together(found, image) if found else None


def segments_together(paths: Sequence[Path], image: Volume) -> Layers:
    """Return the segments of one or several DICOM segmentations of an image, as `segments_of`."""
    from fedsgcg.common.images import segmentation

    try:
        return segmentation.read_together(paths, image)
    except FedsgcgError:
        raise
    except Exception as error:  # as in `read_volume`
        raise _unreadable(
            f"{type(error).__name__}: {error}", paths[0], lost=is_lost(error)
        ) from error


def slices_in(path: Path) -> int:
    """Return the number of slices of an image from its header; 0 for a damaged one.

    The shortest side of a volume counts as the number of its slices.
    """
    form = format_of(path)
    if form is None:
        return 0
    if form is PICTURES:
        return 1
    try:
        sides: tuple[int, ...] = form.reader.shape(path)
    except Exception:  # as in `read_volume`
        return 0
    return min(sides) if len(sides) == 3 else 1


def _unreadable(found: str, path: Path, *, lost: bool = False) -> FedsgcgError:
    action = "Export the file again from its source; the case is left out until then."
    if lost:
        action = "The disk or the network folder failed. Call again when the file can be read."
    return fail("DAT-103", found=found, expected="a complete image", action=action, where=str(path))
