"""Folders as hospitals and challenges have them, for walks from a folder to a predicted mask.

The volumes are the phantoms of the synthetic hospitals, so that a folder has no patient; names,
folders and headers are those of the real thing.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from fedsgcg.common.images import segmentation
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.images.read import read_volume
from tests.support.dicoms import write_series
from tests.support.formats import write_itk

SITES = ("North", "South", "East")
SHAPE = (6, 48, 48)


def photographs(root: Path, cases: int = 4, side: int = 64) -> Path:
    """Colour photographs of three hospitals with a lesion and a vessel as two binary files.

    Anna has a file next to the photograph for each structure; Berta has folders; Clara too, with
    the name of the structure in the files' names again. The two structures cross.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, : side + 16]
    for site, tint in (("Anna", 200), ("Berta", 170), ("Clara", 220)):
        for case in range(1, cases + 1):
            vessel = abs(y - rng.integers(10, side - 10) - 6 * np.sin(x / 12)) < 3
            centre = rng.integers(16, side - 16, 2)
            lesion = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 90
            image = rng.normal((tint, tint - 70, tint - 80), 8, (*y.shape, 3))
            image[lesion] -= (70, 60, 20)
            image[vessel] -= (10, 70, 60)
            folder = root / site
            names = {
                "Anna": (f"{case}.jpg", f"{case}_lesion.png", f"{case}_vessel.png"),
                "Berta": (f"images/{case}.jpg", f"lesion/{case}.png", f"vessel/{case}.png"),
                "Clara": (
                    f"images/IMG_{case}.jpg",
                    f"lesion/IMG_{case}_lesion.png",
                    f"vessel/IMG_{case}_vessel.png",
                ),
            }[site]
            pixels = (
                image.clip(0, 255).astype(np.uint8),
                lesion.astype(np.uint8) * 255,
                vessel.astype(np.uint8) * 255,
            )
            for name, array in zip(names, pixels, strict=True):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / name, quality=95)
    return root


def phantoms(
    root: Path, cases: int = 3
) -> list[tuple[str, str, np.ndarray, np.ndarray, np.ndarray]]:
    """Return (hospital, case, image, mask, affine) in the axes of the files."""
    write_hospitals(root, sites=SITES, cases_per_site=cases, shape=SHAPE, seed=1)
    found = []
    for path in sorted(root.glob("*/*_image.nii.gz")):
        # A scanner's slices are files of their own, so the third axis has to be the slices.
        image = nib.as_closest_canonical(nib.load(path))
        mask = nib.load(path.with_name(path.name.replace("_image", "_mask")))
        mask = nib.as_closest_canonical(mask)
        voxels = (np.asarray(image.dataobj), np.asarray(mask.dataobj))
        case = path.name.removesuffix("_image.nii.gz")
        found.append((path.parent.name, case, *voxels, image.affine))
    return found


def dicom_export(root: Path, scratch: Path, cases: int = 3) -> Path:
    """One folder a patient with all its series, as an archive exports them, and a DICOM-SEG.

    The T2 series, a localizer and the segmentation are files of one folder.
    """
    for number, (site, case, image, mask, affine) in enumerate(phantoms(scratch, cases)):
        folder = root / site / f"PAT{number:03d}" / "STUDY1"
        own = scratch / "series" / str(number)
        write_series(own, image.astype(np.uint16), affine, number=3, patient=f"ID-{number:04d}")
        volume = read_volume(own)
        folder.mkdir(parents=True)
        labels = scratch / f"{case}.nii.gz"
        nib.save(nib.Nifti1Image(mask, affine), labels)
        segmentation.write(
            folder / "IM0099.dcm",
            read_volume(labels, mask=True).array.astype(np.uint8),
            ["background", "Prostate gland"],
            volume,
            model="drawn by hand",
        )
        for place, path in enumerate(sorted(own.iterdir())):
            path.rename(folder / f"IM{place:04d}.dcm")
        localizer = np.roll(affine[:, [1, 2, 0, 3]], 0) * [1, 1, 4, 1]
        write_series(scratch / "loc", image[:, :, :3].astype(np.uint16), localizer, number=1)
        for place, path in enumerate(sorted((scratch / "loc").iterdir())):
            path.rename(folder / f"LO{place:04d}.dcm")
    return root


def nnunet(root: Path, scratch: Path, cases: int = 3) -> Path:
    """One folder of nnU-Net with the cases of all hospitals, which begin with the hospital."""
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    found = phantoms(scratch, cases)
    for site, case, image, mask, affine in found:
        name = f"{site}_{case}"
        nib.save(nib.Nifti1Image(image, affine), root / "imagesTr" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(mask, affine), root / "labelsTr" / f"{name}.nii.gz")
    content = {
        "channel_names": {"0": "T2"},
        "labels": {"background": 0, "gland": 1},
        "numTraining": len(found),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def challenge(root: Path, scratch: Path, cases: int = 3) -> Path:
    """The training data of PROMISE12 as the challenge has them, and a table of the hospitals.

    Also one case of the test data, which has the name of a training case and no segmentation.
    """
    (root / "training_data").mkdir(parents=True)
    (root / "test_data").mkdir()
    lines = ["case,hospital"]
    for number, (site, _, image, mask, affine) in enumerate(phantoms(scratch, cases)):
        name = f"Case{number:02d}"
        write_itk(root / "training_data" / f"{name}.mhd", image, affine)
        write_itk(root / "training_data" / f"{name}_segmentation.mhd", mask.astype(np.int8), affine)
        lines.append(f"{name},{site}")
        if number == 0:
            write_itk(root / "test_data" / f"{name}.mhd", image[::-1].copy(), affine)
    (root / "hospitals.csv").write_text("\n".join(lines) + "\n")
    return root
