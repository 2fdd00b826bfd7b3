"""The files of one image: a header and its data, or all files of a folder.

The name of a data file is taken from the header of MetaImage (`ElementDataFile`) and NRRD (`data
file`), and is the other half of an ANALYZE pair.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import fail
from fedsgcg.common.images.formats import suffix_of

LARGEST_HEADER: Final = 2**16
"""Bytes within which a text header ends; the voxels may follow in the same file."""


def files_of(path: Path) -> list[Path]:
    """Return the files of an image, the one that names it first; they need not exist.

    Raises:
        FedsgcgError: DAT-103 for a header that names its data in a way that is not read.
    """
    suffix = suffix_of(path)
    if suffix in (".hdr", ".img"):
        return [path, other_half(path)]
    if suffix in (".mhd", ".nhdr"):
        return [path, *_detached(path, suffix)]
    return inside(path) if not suffix and path.is_dir() else [path]


def inside(folder: Path) -> list[Path]:
    """Return the files in a folder, sorted; hidden ones and those of subfolders are left out."""
    try:
        with os.scandir(folder) as entries:
            names = [one.name for one in entries if not one.name.startswith(".") and one.is_file()]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def other_half(path: Path) -> Path:
    """Return the data of an ANALYZE header, or the header of its data."""
    halves = {".hdr": ".img", ".img": ".hdr", ".HDR": ".IMG", ".IMG": ".HDR"}
    return path.with_suffix(halves.get(path.suffix, ".img"))


def header_fields(path: Path) -> dict[str, str]:
    """Return the fields of a MetaImage or NRRD header, names in lower case; {} without a file."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_HEADER).decode("latin-1")
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition("=" if "=" in line.partition(":")[0] else ":")
        if not line.strip() and fields:
            break  # NRRD: the voxels follow
        if value and not line.startswith("#"):
            fields[name.strip().lower()] = value.strip()
        if "elementdatafile" in fields:
            break  # MetaImage: the voxels follow
    return fields


def _detached(path: Path, suffix: str) -> list[Path]:
    """Return the data file that a header names."""
    fields: Mapping[str, str] = header_fields(path)
    names = ("elementdatafile",) if suffix == ".mhd" else ("data file", "datafile")
    data = next((fields[name] for name in names if name in fields), "")
    if not data or data.upper() == "LOCAL":
        return []
    if data.split()[0].upper() == "LIST" or "%" in data:
        kind = "mha" if suffix == ".mhd" else "nrrd"
        raise fail(
            "DAT-103",
            found=f"data in several files ({data})",
            expected="one data file",
            action='Save it as one file with SimpleITK: python -c "import SimpleITK as s; '
            f"s.WriteImage(s.ReadImage('{path.name}'), 'OUT.{kind}')\".",
            where=str(path),
        )
    return [path.parent / data.replace("\\", "/")]
