"""The spinal cords of the Grey Matter Challenge as their repository has them (BIDS).

Cord and grey matter are two binary labels of the first run of each session; the hospital is known
by the subject. As in the shared copy, a case has the slices with both labels and 128 x 128 voxels
about the cord; nothing is resampled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import nibabel
import numpy as np

from fedsgcg.common.errors import fail
from fedsgcg.common.images.folders import without_suffix
from fedsgcg.deploy.prepare.conversion import Found, Work

nib: Any = nibabel  # untyped

SITES: Final = {
    "sub-10062": "CEITEC",
    "sub-9669": "Juntendo",
    "sub-9709": "Milan",
    "sub-9584": "NWU",
    "sub-9604": "Philips",
    "sub-9418": "UCL",
}
"""Subject -> hospital, of those whose images and labels are in the repository."""

IMAGE: Final = re.compile(r"(sub-\d+)(Ses\d+)?_run-1_T2starw")
LABELS: Final = ("_seg-manual", "_gmseg-manual")
SIDE: Final = 128


def find(files: Sequence[Path], found: Found) -> None:
    """Add the cases of the repository to `found`; nothing if it is another folder.

    Args:
        files: All image files of the folder.
        found: Gets the cases, missing files and notes.
    """
    by_name = {without_suffix(path.name): path for path in files}
    named = [name for name in by_name if any(name.endswith(end) for end in LABELS)]
    if not named:
        return
    found.layout = "BIDS of github.com/sct-pipeline/gm-challenge-data"
    for name, path in sorted(by_name.items()):
        match = IMAGE.fullmatch(name)
        site = SITES.get(match[1], "") if match else ""
        masks = [by_name.get(f"{name}{end}") for end in LABELS]
        if not match or not site:
            continue
        for end, mask in zip(LABELS, masks, strict=True):
            if mask is None:
                found.missing(path, f"label {end[1:]} of {name}")
        if all(mask is not None for mask in masks):
            sources = (path, *(mask for mask in masks if mask is not None))
            case = f"{match[1]}{match[2] or ''}"
            make = partial(_make, sources)
            suffixes = (".nii.gz", ".nii.gz")
            found.work.append(Work(site, case, sources, suffixes, make, patient=match[1]))
    found.torn |= set(files) - {path for work in found.work for path in work.sources}
    found.notes.append(
        "the second runs, subjects without an image, and hospitals without both labels are not used"
    )


def _make(sources: Sequence[Path], to_image: Path, to_mask: Path) -> str:
    """Join the two labels and cut out the cord."""
    image, *labels = (nib.load(path) for path in sources)
    cord, grey = (np.asarray(label.dataobj) > 0 for label in labels)
    for label, mask in zip(labels, (cord, grey), strict=True):
        same = mask.shape == image.shape and np.allclose(label.affine, image.affine, atol=1e-3)
        if not same:
            raise fail(
                "DAT-105",
                found=f"{label.get_filename()} on another grid",
                expected="the grid of the image",
                action="Get the files again.",
                where=str(sources[0]),
            )
    through = int(np.argmax(image.header.get_zooms()[:3]))
    plane = tuple(axis for axis in range(3) if axis != through)
    both = np.flatnonzero(cord.any(plane) & grey.any(plane))
    if not both.size:
        raise fail(
            "DAT-125",
            found="no slice with both labels",
            expected="cord and grey matter",
            action="Get the files again.",
            where=str(sources[0]),
        )
    cut = [slice(None)] * 3
    cut[through] = slice(int(both[0]), int(both[-1]) + 1)
    for axis in plane:
        inside = np.flatnonzero(cord.any(tuple(other for other in range(3) if other != axis)))
        middle = (int(inside[0]) + int(inside[-1])) // 2
        start = min(max(0, middle - SIDE // 2), max(0, cord.shape[axis] - SIDE))
        cut[axis] = slice(start, start + SIDE)
    kept = image.slicer[tuple(cut)]
    joined = np.where(grey, 2, cord).astype(np.uint8)[tuple(cut)]
    nib.save(kept, to_image)
    nib.save(nib.Nifti1Image(joined, kept.affine), to_mask)
    return ""
