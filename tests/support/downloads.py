"""Small files for tests, in the layouts and with the names of the published data sets."""

from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from fedsgcg.deploy.prepare.fundus import PUBLISHED


def picture(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Write a picture and return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)
    return pixels


def disc_mask(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """Return a filled circle (H, W)."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2)


def grey_mask(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """Return grey values as the release and REFUGE have them: cup 0, disc 128, background 255."""
    inner, outer = disc_mask(shape, centre, radius / 2), disc_mask(shape, centre, radius)
    return np.where(inner, 0, np.where(outer, 128, 255)).astype(np.uint8)


def colours(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return random colours (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def released(
    root: Path, side: int, names: dict[tuple[str, str], Iterable[str]] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write the released fundus layout; returns image and grey mask of each case."""
    made = {}
    for (domain, part), cases in (names or PUBLISHED).items():
        for case in sorted(cases):
            folder = root / domain / part / "ROIs"
            image = picture(folder / "image" / f"{case}.png", colours((side, side), len(made)))
            mask = picture(
                folder / "mask" / f"{case}.png",
                grey_mask((side, side), (side / 2, side / 2), side / 4),
            )
            made[case] = (image, mask)
    return made


def volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> np.ndarray:
    """Write (i, j, k) voxels as NIfTI and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(
        nib.Nifti1Image(array, np.diag([-0.5, -0.5, 3.0, 1.0]) if affine is None else affine), path
    )
    return array


def scan(seed: int, shape: tuple[int, int, int] = (24, 20, 5)) -> tuple[np.ndarray, np.ndarray]:
    """Return a random image and a mask with labels 1 and 2, as (i, j, k)."""
    image = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    mask[8:16, 6:14, 1:4] = 1
    mask[10:14, 8:12, 2] = 2
    return image, mask


def gm_challenge(root: Path) -> dict[str, np.ndarray]:
    """Write sct-pipeline/gm-challenge-data: BIDS, two labels of the first run of each session.

    Returns:
        Case -> its mask (i, j, k): 1 cord, 2 grey matter.
    """
    made = {}
    for number, subject in enumerate(("sub-9418", "sub-9709Ses1", "sub-9709Ses2", "sub-9605")):
        image, _ = scan(number, (150, 140, 8))
        cord, grey = np.zeros((2, 150, 140, 8), np.uint8)
        cord[100:120, 60:75, 1:7], grey[105:112, 64:70, 2:6] = 1, 1
        affine = np.diag([0.5, 0.5, 3.0, 1.0])
        stem = f"{subject}_run-1_T2starw"
        if subject != "sub-9605":  # its image is not in the repository
            volume(root / subject / "anat" / f"{stem}.nii.gz", image, affine)
            volume(root / subject / "anat" / f"{subject}_run-2_T2starw.nii.gz", image, affine)
        labels = root / "derivatives" / "labels" / subject / "anat"
        volume(labels / f"{stem}_seg-manual.nii.gz", cord, affine)
        volume(labels / f"{stem}_gmseg-manual.nii.gz", grey, affine)
        (labels / f"{stem}_seg-manual.json").write_text("{}")
        made[subject] = np.where(grey, 2, cord)
    (root / "participants.tsv").write_text("participant_id\tsex\tage\nsub-9418\tm\t31\n")
    return made
