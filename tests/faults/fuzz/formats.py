"""The image formats that are fuzzed, each through the reader that training and prediction use."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.read import read_volume
from tests.faults.fuzz import mutations
from tests.faults.fuzz.mutations import Mutation
from tests.faults.fuzz.target import Target, file_target
from tests.support.dicoms import write_series
from tests.support.formats import WITHOUT_ORIENTATION, WRITERS

NATIVE: Final = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
AFFINE: Final = np.diag([1.5, 0.5, 3.0, 1.0])
COST: Final = 2.0


def both(path: Path) -> object:
    """Read a file as an image and as a mask."""
    with contextlib.suppress(FedsgcgError):  # colours are no labels
        read_volume(path, mask=True)
    return read_volume(path)


def format_targets(folder: Path) -> list[Target]:
    """Return a target for each format: volumes, their headers, series and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    nrrd_head = mutations.text_head_of(b"\n\n")
    meta_head = mutations.text_head_of(b"ElementDataFile = LOCAL\n")
    head_only = mutations.text_head_of(b"\0")
    return [
        volume(folder, "nifti", "a.nii", mutations.bytes_of),
        volume(folder, "nifti-gz", "a.nii.gz", mutations.gzip_of),
        volume(folder, "metaimage", "a.mha", meta_head),
        volume(folder, "metaimage-header", "a.mhd", head_only),
        volume(folder, "nrrd", "a.nrrd", nrrd_head),
        volume(folder, "nrrd-header", "a.nhdr", nrrd_head),
        volume(folder, "nifti-pair", "pair.hdr", mutations.bytes_of),
        volume(folder, "analyze", "a.hdr", mutations.bytes_of),
        volume(folder, "tiff-stack", "a.tif", mutations.bytes_of),
        dicom(folder / "dicom"),
        *pictures(folder / "pictures"),
    ]


def volume(folder: Path, name: str, file: str, mutate: Mutation) -> Target:
    """One file of an honest image is changed; files that belong to it stay as they are."""
    path = folder / name / file
    path.parent.mkdir()
    {**WRITERS, **WITHOUT_ORIENTATION}[file](path, NATIVE, AFFINE)
    honest = path.read_bytes()

    def decode(data: bytes) -> object:
        path.write_bytes(data)
        return both(path)

    return Target(name, (honest,), decode, mutate, COST)


def dicom(folder: Path) -> Target:
    """One slice of a series is changed."""
    write_series(folder, NATIVE, AFFINE)
    path = sorted(folder.iterdir())[0]

    def decode(data: bytes) -> object:
        path.write_bytes(data)
        return both(folder)

    return Target("dicom", (path.read_bytes(),), decode, mutations.bytes_of, COST)


def pictures(folder: Path) -> list[Target]:
    """Return the targets of grey and colour pictures."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    found = []
    for suffix in (".png", ".tif", ".bmp", ".jpg"):
        seeds = []
        for shape in ((9, 11), (9, 11, 3)):
            path = folder / f"honest{suffix}"
            Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(path)
            seeds.append(path.read_bytes())
        mutate = mutations.png_of if suffix == ".png" else mutations.bytes_of
        name = {".tif": "tiff"}.get(suffix, suffix[1:])
        found.append(file_target(folder, name, suffix, tuple(seeds), both, mutate, COST))
    return found
