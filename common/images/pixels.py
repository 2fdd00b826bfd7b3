"""Pixels of 2-D picture files as a viewer shows them: photometric meaning, palette and orientation.

Legend: H, W = rows, columns; C = channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import fail

Array = NDArray[Any]

LOSSY: Final = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
"""Formats (Pillow's names) that change pixel values: harmless in a photograph, but the values of a mask are labels."""
LOSSY_TIFF: Final = (6, 7, 33003, 33004, 33005, 34712, 34892, 50001, 50002)
"""TIFF compressions that do: JPEG, JPEG 2000, WebP, JPEG XL."""

PLAIN: Final = (1, 8, 32946)
"""TIFF compressions that tifffile reads without an extra package: none and deflate."""
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE = range(4)
ORIENTATION: Final = 274


def picture_pixels(path: Path, *, mask: bool) -> Array:
    """Return the pixels of a picture as (H, W) or (H, W, C); more axes where a file holds a stack of pages.

    Args:
        path: PNG, JPEG, BMP or TIFF.
        mask: The file holds label values: a palette picture gives its indices instead of colours, and a format that
            changes values is refused.

    Raises:
        FedsgcgError: DAT-106 for a TIFF of several pictures, DAT-116 for a mask in a lossy format.
    """
    tiff = path.suffix.lower() in (".tif", ".tiff")
    return _tiff_pixels(path, mask) if tiff else _pillow_pixels(path, mask)


def _pillow_pixels(path: Path, mask: bool, page: int = 0) -> Array:
    """Return the pixels of one page as Pillow decodes it."""
    with Image.open(path) as opened:
        if mask and opened.format in LOSSY:
            raise _lossy(path, str(opened.format))
        if page:
            opened.seek(page)
        opened.load()
        picture = ImageOps.exif_transpose(
            opened
        )  # cameras store the turn apart; people see and draw the turned one
        if picture.mode in ("L", "I", "F", "1", "RGB", "RGBA", "LA") or picture.mode.startswith(
            "I;16"
        ):
            return np.asarray(picture)
        return (
            np.asarray(picture)
            if mask and picture.mode == "P"
            else np.asarray(picture.convert("RGB"))
        )


def _tiff_pixels(path: Path, mask: bool) -> Array:
    """Return the pixels of the picture of a TIFF: its largest page, of which the others must be smaller copies."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = _whole_picture(file.series, path)
            page = series.keyframe
            kind = BLACK_IS_ZERO if page.photometric is None else int(page.photometric)
            if mask and page.compression in LOSSY_TIFF:
                raise _lossy(
                    path,
                    f"TIFF with {getattr(page.compression, 'name', page.compression)} compression",
                )
            plain = page.compression in PLAIN and kind in (
                WHITE_IS_ZERO,
                BLACK_IS_ZERO,
                RGB,
                PALETTE,
            )
            if not plain and len(series.pages) == 1:
                # Pillow knows more compressions and colour spaces; of grey values it turns all but those of 16 bits.
                pixels = _pillow_pixels(path, mask, page.index)
                return (
                    _inverted(pixels, 16)
                    if kind == WHITE_IS_ZERO and pixels.dtype == np.uint16
                    else pixels
                )
            pixels, tag = np.asarray(series.asarray()), page.tags.get(ORIENTATION)
            pixels = _as_shown(
                pixels, kind, int(page.bitspersample), None if mask else page.colormap
            )
            return _turned(_channels_last(pixels, str(series.axes)), int(tag.value) if tag else 1)
    except tifffile.TiffFileError as error:
        raise ValueError(str(error)) from error


def _whole_picture(found: Any, path: Path) -> Any:
    """Return the series of pages that is the picture; thumbnails and previews of it are passed over."""
    sizes = [(int(one.keyframe.imagelength), int(one.keyframe.imagewidth)) for one in found]
    height, width = size = max(sizes, key=lambda size: size[0] * size[1])
    # A thumbnail's sides are rounded to pixels.
    copies = [
        bool(one.keyframe.is_reduced)
        or (small != size and abs(small[0] - small[1] * height / width) <= 1)
        for one, small in zip(found, sizes, strict=True)
    ]
    if copies.count(False) > 1:
        shapes = ", ".join(f"{one[0]}x{one[1]}" for one in sizes[:8])
        action = "Save the page that is the picture as a file of its own."
        raise fail(
            "DAT-106",
            found=f"pages of {shapes}",
            expected="one picture",
            action=action,
            where=str(path),
        )
    return found[sizes.index(size)]


def _as_shown(pixels: Array, kind: int, bits: int, palette: Array | None) -> Array:
    """Return stored values as they are shown: black is zero, and a palette's colours where one is given."""
    if kind == WHITE_IS_ZERO:
        return _inverted(pixels, bits)
    if kind == PALETTE and palette is not None:
        return np.moveaxis((palette >> 8).astype(np.uint8)[:, pixels.astype(np.intp)], 0, -1)
    return pixels


def _inverted(pixels: Array, bits: int) -> Array:
    """Return values whose white is zero with black as zero."""
    if pixels.dtype == np.bool_:
        return ~pixels
    if pixels.dtype.kind != "u":
        raise ValueError(f"white is zero with values of type {pixels.dtype}")
    return np.asarray(pixels.dtype.type(2**bits - 1) - pixels)


def _channels_last(pixels: Array, axes: str) -> Array:
    """Return (H, W) or (H, W, C); of a stack of pages with one axis more than a picture has."""
    coloured = pixels.ndim > len(axes)  # a palette's colours have come as a last axis
    if coloured or pixels.ndim == 2 or axes.endswith("S"):
        return pixels
    return (
        pixels.transpose(1, 2, 0)
        if pixels.ndim == 3 and axes.startswith("S")
        else pixels[..., None]
    )


def _turned(pixels: Array, orientation: int) -> Array:
    """Turn (H, W) or (H, W, C) pixels as the orientation tag of TIFF and EXIF (1 to 8) says they are to be seen."""
    flipped = {2: pixels[:, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1)}
    turns = {3: 2, 6: -1, 8: 1}  # quarter turns against the clock
    if orientation == 7:
        return pixels[::-1, ::-1].swapaxes(0, 1)
    return (
        np.rot90(pixels, turns[orientation])
        if orientation in turns
        else flipped.get(orientation, pixels)
    )


def _lossy(path: Path, kind: str) -> Exception:
    action = "Export the mask as PNG, TIFF without JPEG, or NIfTI from where it was drawn."
    return fail("DAT-116", found=kind, expected="a lossless format", action=action, where=str(path))
