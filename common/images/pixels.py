"""Reads pictures as a viewer shows them, by photometric meaning, palette and orientation.

Legend: H, W = rows, columns; C = channels; Z = pages of a TIFF.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedsgcg.common.errors import fail
from fedsgcg.common.images.formats import PICTURES, TIFF
from fedsgcg.common.images.stack import is_slices, spacing_of, volume_of_stack
from fedsgcg.common.images.volume import Volume

Array = NDArray[Any]

LOSSY: Final = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
"""Formats (Pillow's names) that change pixel values, which are the labels of a mask."""

LOSSY_TIFF: Final = (6, 7, 33003, 33004, 33005, 34712, 34892, 50001, 50002)
"""TIFF compressions that change pixel values: JPEG, JPEG 2000, WebP, JPEG XL."""

PLAIN: Final = (1, 8, 32946)
"""TIFF compressions that tifffile reads without an extra package: none and deflate."""

MOST_DEFLATE: Final = 1032
"""Largest factor by which deflate, the compression of PNG, shrinks data."""

PLAIN_MODES: Final = ("L", "I", "F", "1", "RGB", "RGBA", "LA")
"""Modes of Pillow whose pixels are used without conversion."""

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE = range(4)
"""Values of TIFF's tag PhotometricInterpretation."""

ORIENTATION: Final = 274
"""Number of TIFF's orientation tag."""


@dataclass(frozen=True)
class _Pages:
    """Pixels of a file: (H, W) or (H, W, C) of a picture, (Z, H, W) of a stack of pages.

    Attributes:
        pixels: The values.
        is_stack: Whether they are slices.
        spacing: (sz, sy, sx) in mm of a stack, None if the file does not state it.
    """

    pixels: Array
    is_stack: bool = False
    spacing: tuple[float, float, float] | None = None


def read(path: Path, *, mask: bool = False) -> Volume:
    """Read a picture as (C, H, W) with C 1 or 3, or a TIFF of several pages as a volume.

    An alpha channel is dropped.

    Args:
        path: PNG, JPEG, BMP or TIFF.
        mask: Whether the values are labels: a palette picture then gives its indices instead of
            colours, a colour picture with equal channels one channel, and a format that changes
            values is an error.

    Raises:
        FedsgcgError: DAT-106 for a TIFF of several pictures, DAT-116 for a mask in a lossy format.
    """
    if path.suffix.lower() not in TIFF.suffixes:
        return picture_of(_pillow_pixels(path, mask), path, mask=mask)
    pages = _tiff_pixels(path, mask)
    if pages.is_stack:
        return volume_of_stack(pages.pixels, pages.spacing)
    return picture_of(pages.pixels, path, mask=mask)


def shape(path: Path) -> tuple[int, ...]:
    """Return (X, Y, Z) of a TIFF of several pages from its tags, (X, Y) of a picture."""
    import tifffile

    if path.suffix.lower() not in TIFF.suffixes:
        with Image.open(path) as picture:
            return picture.size
    with tifffile.TiffFile(path) as file:
        series = _largest_page(file.series, path)
        sizes = tuple(int(size) for size in series.shape)
        stack = len(sizes) == 3 and is_slices(str(series.axes))
        return sizes[::-1] if stack else (int(series.keyframe.imagewidth),) * 2


def picture_of(pixels: Array, path: Path, *, mask: bool, form: str = PICTURES.name) -> Volume:
    """Return pixels (H, W) or (H, W, C) as a picture; an alpha channel is dropped.

    Raises:
        FedsgcgError: DAT-106 for other shapes, or for a mask in colours.
    """
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
        array,
        np.eye(4),
        (1.0, 1.0, 1.0),
        is_picture=True,
        is_eight_bit=pixels.dtype == np.uint8,
        form=form,
    )


def _pillow_pixels(path: Path, mask: bool, page: int = 0) -> Array:
    """Return the pixels of one page as Pillow decodes it."""
    content = path.read_bytes()
    # Pillow asks for as many bytes as a chunk announces: from memory it gets what there is.
    with Image.open(io.BytesIO(content)) as opened:
        if mask and opened.format in LOSSY:
            raise _lossy(path, str(opened.format))
        if page:
            opened.seek(page)
        _check_size(opened, len(content))
        opened.load()
        # Cameras store the rotation as a tag; viewers and annotation tools apply it.
        picture = ImageOps.exif_transpose(opened)
        plain = picture.mode in PLAIN_MODES or picture.mode.startswith("I;16")
        if plain or (mask and picture.mode == "P"):
            return np.asarray(picture)
        return np.asarray(picture.convert("RGB"))


def _check_size(picture: Image.Image, size: int) -> None:
    """Check, before memory is taken, that a PNG can hold the pixels that it announces.

    Raises:
        ValueError: More pixels than `size` bytes of deflate can hold, at one bit for each.
    """
    width, height = picture.size
    if picture.format == "PNG" and width * height > 8 * MOST_DEFLATE * size:
        raise ValueError(f"announces {width}x{height} pixels, in {size} bytes")


def _tiff_pixels(path: Path, mask: bool) -> _Pages:
    """Return a TIFF's largest page or its stack; other pages must be smaller copies of it."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = _largest_page(file.series, path)
            page = series.keyframe
            kind = BLACK_IS_ZERO if page.photometric is None else int(page.photometric)
            if mask and page.compression in LOSSY_TIFF:
                name = getattr(page.compression, "name", page.compression)
                raise _lossy(path, f"TIFF with {name} compression")
            known = kind in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE)
            plain = page.compression in PLAIN and known
            stack = is_slices(str(series.axes)) and len(series.shape) == 3
            if not plain and len(series.pages) == (series.shape[0] if stack else 1):
                # Pillow reads more compressions and colour spaces. It inverts white-is-zero grey
                # values except those of 16 bits.
                layers = [_pillow_pixels(path, mask, one.index) for one in series.pages]
                pixels = np.stack(layers) if stack else layers[0]
                inverted = kind == WHITE_IS_ZERO and pixels.dtype == np.uint16
                shown = _inverted(pixels, 16) if inverted else pixels
            else:
                palette = None if mask else page.colormap
                bits = int(page.bitspersample)
                shown = _as_shown(np.asarray(series.asarray()), kind, bits, palette)
                tag = page.tags.get(ORIENTATION)
                shown = _upright(shown, str(series.axes), int(tag.value) if tag else 1)
            if stack and shown.ndim == 3:
                return _Pages(shown, True, spacing_of(file, page))
            return _Pages(shown)
    except tifffile.TiffFileError as error:
        raise ValueError(str(error)) from error


def _largest_page(found: Any, path: Path) -> Any:
    """Return the largest series of pages; the others must be its thumbnails or previews."""
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
        action = "Save the right page as a separate file."
        raise fail(
            "DAT-106",
            found=f"pages of {shapes}",
            expected="one picture",
            action=action,
            where=str(path),
        )
    return found[sizes.index(size)]


def _as_shown(pixels: Array, kind: int, bits: int, palette: Array | None) -> Array:
    """Return stored values as they are displayed: black is zero, and a palette gives colours."""
    if kind == WHITE_IS_ZERO:
        return _inverted(pixels, bits)
    if kind == PALETTE and palette is not None:
        return np.moveaxis((palette >> 8).astype(np.uint8)[:, pixels.astype(np.intp)], 0, -1)
    return pixels


def _inverted(pixels: Array, bits: int) -> Array:
    """Return white-is-zero values as black-is-zero values."""
    if pixels.dtype == np.bool_:
        return ~pixels
    if pixels.dtype.kind != "u":
        raise ValueError(f"white is zero with values of type {pixels.dtype}")
    return np.asarray(pixels.dtype.type(2**bits - 1) - pixels)


def _upright(pixels: Array, axes: str, orientation: int) -> Array:
    """Return (H, W), (H, W, C) or (Z, H, W) pixels, turned by the orientation tag."""
    if pixels.ndim == 3 and is_slices(axes):
        return np.stack([_turned(page, orientation) for page in pixels])
    return _turned(_channels_last(pixels, axes), orientation)


def _channels_last(pixels: Array, axes: str) -> Array:
    """Return (H, W) or (H, W, C); a stack of pages has one more axis."""
    coloured = pixels.ndim > len(axes)  # a palette's colours are the last axis
    if coloured or pixels.ndim == 2 or axes.endswith("S"):
        return pixels
    if pixels.ndim == 3 and axes.startswith("S"):
        return pixels.transpose(1, 2, 0)
    return pixels[..., None]


def _turned(pixels: Array, orientation: int) -> Array:
    """Apply the orientation tag of TIFF and EXIF (1 to 8) to (H, W) or (H, W, C) pixels."""
    flipped = {2: pixels[:, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1)}
    turns = {3: 2, 6: -1, 8: 1}  # quarter turns, counterclockwise
    if orientation == 7:
        return pixels[::-1, ::-1].swapaxes(0, 1)
    if orientation in turns:
        return np.rot90(pixels, turns[orientation])
    return flipped.get(orientation, pixels)


def _lossy(path: Path, kind: str) -> Exception:
    action = "Export the mask again, as PNG, TIFF without JPEG, or NIfTI."
    return fail("DAT-116", found=kind, expected="a lossless format", action=action, where=str(path))
