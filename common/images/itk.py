"""Reads and writes MetaImage (`.mha`, `.mhd`) and NRRD (`.nrrd`, `.nhdr`) with SimpleITK."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedsgcg.common.errors import fail
from fedsgcg.common.images.extras import library
from fedsgcg.common.images.formats import NRRD, format_of, suffix_of
from fedsgcg.common.images.parts import LARGEST_HEADER, files_of, header_fields
from fedsgcg.common.images.pixels import MOST_DEFLATE
from fedsgcg.common.images.volume import MAX_BYTES, Volume, by, volume_of

Array = NDArray[Any]

LPS_TO_RAS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK and DICOM count x to the left and y to the back, nibabel to the right and to the front."""

LONGEST_FIELD: Final = 240
"""Most characters of a field of an NRRD header; a key with a value (`:=`) may be longer."""

SIZES: Final = ("elementspacing", "elementsize", "spacings", "space directions")
"""Fields of the headers that state the voxel size; without one SimpleITK assumes 1 mm."""


def read(path: Path, *, mask: bool = False) -> Volume:
    """Read a MetaImage or NRRD file into canonical orientation; `mask` makes no difference.

    Raises:
        FedsgcgError: DAT-106 for colour voxels or more than three dimensions, DAT-160 without
            SimpleITK.
        ValueError: The voxels are incomplete, or larger than memory allows.
    """
    sitk = library("SimpleITK", _name(path))
    if absent := [file for file in files_of(path)[1:] if not file.is_file()]:
        raise ValueError(f"no {absent[0].name} with the voxels")
    header = _header(sitk, path)
    size, components = list(header.GetSize()), header.GetNumberOfComponents()
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    if len(size) > 3 or components > 1:
        found = f"shape {by(tuple(header.GetSize()))}"
        if components > 1:
            found += f" with {components} values per voxel"
        action = "Save one time point, echo or channel as a 3-D file and list that in the manifest."
        raise fail("DAT-106", found=found, expected="3 dimensions", action=action, where=str(path))
    voxels = int(np.prod(size, dtype=np.float64))
    if not voxels or voxels * 4 > MAX_BYTES:
        raise ValueError(f"shape {by(tuple(size))}")
    _check_complete(path, voxels)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(plain_reason(error)) from error
    while image.GetDimension() > 3:
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    if image.GetDimension() == 2:
        image = sitk.JoinSeries(image)
    array = sitk.GetArrayFromImage(image)
    if array.dtype.kind == "c":
        raise ValueError("complex values")
    stated = any(name in header_fields(path) for name in SIZES)
    native = array.transpose(2, 1, 0)
    return volume_of(native, _affine(image), has_size=stated, form=_name(path))


def shape(path: Path) -> tuple[int, ...]:
    """Return the (i, j, k) shape from the header."""
    return tuple(_header(library("SimpleITK", _name(path)), path).GetSize()[:3])


def write(path: Path, native: Array, affine: NDArray[np.float64]) -> None:
    """Write voxels (i, j, k), or (i, j, k, S) with S values per voxel, with an affine."""
    sitk = library("SimpleITK", _name(path))
    several = native.ndim == 4
    order = (2, 1, 0, 3) if several else (2, 1, 0)
    voxels = np.ascontiguousarray(native.transpose(order))
    image = sitk.GetImageFromArray(voxels, isVector=several)
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _header(sitk: Any, path: Path) -> Any:
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # they would go to the console unasked
    if not path.is_file():
        raise FileNotFoundError
    if suffix_of(path) in NRRD.suffixes:
        _check_fields(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(plain_reason(error)) from error
    return reader


def _check_fields(path: Path) -> None:
    """Check the lines of an NRRD header, before ITK quotes a wrong one in a buffer of fixed size.

    Raises:
        ValueError: A line is longer than a field can be; the process would end.
    """
    with path.open("rb") as file:
        head = file.read(LARGEST_HEADER)
    for number, line in enumerate(head.splitlines(), 1):
        if not line.strip():
            return
        if len(line) > LONGEST_FIELD and b":=" not in line and not line.startswith(b"#"):
            raise ValueError(f"line {number} of the header has {len(line)} characters")


def plain_reason(error: RuntimeError) -> str:
    """Return the last line of an error of SimpleITK, without names of its sources."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if not last or last.startswith("Reason:"):  # errno of an earlier call, unrelated
        return "the voxels are incomplete or damaged"
    return last.partition("ERROR: ")[2] or last


def _affine(image: Any) -> NDArray[np.float64]:
    """Return the affine (voxel -> mm) in nibabel's directions."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.asarray(LPS_TO_RAS @ affine)


def _name(path: Path) -> str:
    found = format_of(path)
    return found.name if found else "ITK"


def _check_complete(path: Path, voxels: int) -> None:
    """Check, before memory is taken, that the files can contain the voxels.

    ITK fills up what is missing of voxels that are not compressed.

    Raises:
        ValueError: The files are shorter than the voxels, or than deflate can make them.
    """
    fields = header_fields(path)
    encoding = fields.get("encoding", "raw").lower()
    packed = fields.get("compresseddata", "").lower() == "true" or encoding in ("gzip", "gz")
    if not packed and encoding not in ("raw", "ascii", "text", "txt"):
        return
    *_, data = files_of(path)
    stored = data.stat().st_size
    kind = fields.get("elementtype", "") or fields.get("type", "")
    least = voxels * _bytes_of(kind) // (MOST_DEFLATE if packed else 1)
    if stored < least:
        raise ValueError(f"{stored} bytes in {data.name}, {least} for {voxels} voxels: truncated")


def _bytes_of(kind: str) -> int:
    """Return the bytes of a voxel of a type of MetaImage or NRRD; 1 for an unknown one."""
    plain = kind.lower().removeprefix("met_").replace("unsigned ", "u").replace("_", "")
    sizes = {
        2: ("short", "ushort", "int16", "uint16", "signed short", "ushort int", "short int"),
        4: ("int", "uint", "int32", "uint32", "signed int", "float"),
        8: ("double", "int64", "uint64", "longlong", "ulonglong"),
    }
    return next(
        (
            size
            for size, names in sizes.items()
            if plain.removesuffix("t") in names or plain in names
        ),
        1,
    )
