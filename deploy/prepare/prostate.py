"""Prostate MRI of six sites in the layout of SAML: full volumes, labels 1 and 2 merged.

See docs/explanation/ram-dsir.md, "Batches and data".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from fedsgcg.common.datasets import PROSTATE
from fedsgcg.common.errors import fail
from fedsgcg.common.images.read import check_image, read_volume, suffix_of, to_native
from fedsgcg.common.images.write import write_native
from fedsgcg.deploy.prepare.conversion import Found, Work, absent, copy_or_link, image_files

FOLDERS: Final = {
    "isbi": "RUNMC",
    "runmc": "RUNMC",
    "isbi15": "BMC",
    "bmc": "BMC",
    "i2cvb": "I2CVB",
    "hcrudb": "I2CVB",
    "ucl": "UCL",
    "bidmc": "BIDMC",
    "hk": "HK",
}
"""Folder name in lower-case letters and digits -> site; the release has both spellings."""

LISTED: Final[dict[str, Sequence[int]]] = {
    "RUNMC": range(30),
    "BMC": range(30),
    "I2CVB": range(19),
    "HK": range(38, 50),
    "UCL": (1, *range(26, 38)),
    "BIDMC": (0, 1, *range(3, 13)),
}
"""Case numbers in the training lists of SAML (commit 3842011), to name the missing cases."""

FILE: Final = re.compile(
    r"(?P<case>case[ _-]?\d+)(?P<mask>[ _-]segmentation)?\.nii(\.gz)?", re.IGNORECASE
)


def find(source: Path, validation_fraction: float, *, link: bool) -> Found:
    """List the cases of the six sites.

    Args:
        source: The folder that was downloaded and unpacked.
        validation_fraction: Unused: there is no published split, so patients are split when a
            study starts.
        link: Link to images instead of copying them.

    Raises:
        FedsgcgError: DAT-120 when no site's folder exists; the error says what to download.
    """
    del validation_fraction
    images: dict[tuple[str, str], Path] = {}
    masks: dict[tuple[str, str], Path] = {}
    found = Found(f"SAML, one folder per site in {source}")
    files = image_files(source, found)
    for path in files:
        site, match = _site_of(path, source), FILE.fullmatch(path.name)
        if site and match:
            key = (site, f"Case{int(''.join(filter(str.isdigit, match['case']))):02d}")
            if (masks if match["mask"] else images).setdefault(key, path) != path:
                found.surplus(path, f"a second file of {site} {key[1]}")
    if not images and not masks:
        raise absent(
            "prostate",
            source,
            f"{len(files)} image files, none named CaseNN in a folder of a known site",
        )
    for key in sorted(images.keys() | masks.keys()):
        site, case = key
        if key not in images:
            found.missing(masks[key], f"image for the mask of {site} {case}")
        elif key not in masks:
            found.missing(images[key], f"mask for the image of {site} {case}")
        else:
            found.work.append(_work(site, case, images[key], masks[key], link=link))
    _name_missing(source, set(images), found)
    found.extras(files)
    return found


def _name_missing(source: Path, images: set[tuple[str, str]], found: Found) -> None:
    """Record every missing site, and the missing cases of sites with fewer than published."""
    for hospital in PROSTATE.hospitals:
        name = hospital.name
        present = {case for site, case in images if site == name}
        if not present:
            found.missing(source / name, f"folder of {name}, in the release {hospital.source}")
        elif len(present) < hospital.train:
            for number in LISTED[name]:
                if (case := f"Case{number:02d}") not in present:
                    found.missing(
                        source / name / f"{case}.nii.gz",
                        f"{case}, which is in SAML's list of {name}",
                    )


def _site_of(path: Path, source: Path) -> str:
    """Return the site of a file, from the nearest parent folder with a known name; "" for none."""
    names = (
        "".join(filter(str.isalnum, part.lower()))
        for part in reversed(path.relative_to(source).parts[:-1])
    )
    return next((FOLDERS[name] for name in names if name in FOLDERS), "")


def _work(site: str, case: str, image: Path, mask: Path, *, link: bool) -> Work:
    suffixes = (suffix_of(image), ".nii.gz")
    make = partial(_make, image, mask, link)
    # Every site numbers its cases from 00; the site's name makes patient ids and splits unique.
    return Work(site, case, (image, mask), suffixes, make, patient=f"{site}-{case}")


def _make(image: Path, mask: Path, link: bool, to_image: Path, to_mask: Path) -> str:
    """Check the pair, copy the image unchanged, and merge the labels on the image's grid."""
    scan, drawn = read_volume(image), read_volume(mask, mask=True)
    check_image(scan, str(image))
    values = np.unique(drawn.array)
    if not set(values.tolist()) <= {0.0, 1.0, 2.0}:
        found = "values " + ", ".join(f"{value:g}" for value in values[:8])
        raise fail(
            "DAT-109",
            found=found,
            expected="0, 1 and 2",
            action="Get the mask again.",
            where=str(mask),
        )
    if not values.any():
        raise fail(
            "DAT-125",
            found="an empty mask",
            expected="a prostate",
            action="Check the mask.",
            where=str(mask),
        )
    voxels, grid = to_native(drawn.array, drawn), to_native(scan.array, scan)
    if voxels.shape != grid.shape:
        found, expected = ("x".join(map(str, array.shape)) for array in (voxels, grid))
        raise fail(
            "DAT-104",
            found=found,
            expected=expected,
            action="Get both files again.",
            where=str(mask),
        )
    copy_or_link(image, to_image, link=link)
    # SAML's code ignores headers: voxel (i, j, k) of the mask belongs to voxel (i, j, k) of the
    # image.
    write_native(to_mask, (voxels > 0).astype(np.uint8), image)
    if np.allclose(drawn.affine, scan.affine, atol=1e-3):
        return ""
    return (
        "the headers of image and mask differ; voxels were matched by index, as in the code of SAML"
    )
