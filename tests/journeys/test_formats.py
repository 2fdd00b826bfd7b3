"""A study on MetaImage and DICOM gives the model of the same study on NIfTI."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedsgcg.common.images import segmentation
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.images.read import read_volume, segments_of
from fedsgcg.deploy.cli.site import main
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small
from tests.support.formats import write_dicom, write_itk

pytestmark = pytest.mark.slow


def voxels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def as_metaimage(source: Path, target: Path) -> None:
    """The layout of the PROMISE12 challenge: a header, its `.raw`, and a mask of the same kind."""
    for path in sorted(source.glob("*.nii.gz")):
        write_itk(target / path.name.replace(".nii.gz", ".mhd"), *voxels(path))


def as_dicom(source: Path, target: Path) -> None:
    """A folder of slices for each image, and a DICOM segmentation."""
    for path in sorted(source.glob("*_image.nii.gz")):
        case = path.name.removesuffix("_image.nii.gz")
        write_dicom(target / f"{case}_image", *voxels(path))
        mask = read_volume(source / f"{case}_mask.nii.gz", mask=True)
        image = read_volume(target / f"{case}_image")
        segmentation.write(
            target / f"{case}_mask.dcm",
            mask.array.astype(np.uint8),
            ["background", "gland"],
            image,
            model="drawn by hand",
        )


def scores(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def model_of(root: Path, output: Path) -> Path:
    quick = ("federation.rounds=2", "method.steps_per_round=3", "device=cpu")
    (cell,) = small.plan(
        root, output, "runtime=inprocess", "method=sgcg", "heldout=West", *quick
    ).cells
    run_cell_in_process(cell.tree)
    return cell.folder


def test_the_same_images_in_other_formats_give_the_same_model_and_a_mask_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nifti, mixed = tmp_path / "nifti", tmp_path / "mixed"
    write_hospitals(nifti, cases_per_site=3, shape=(5, 40, 40), seed=3)
    (nifti / "manifest.csv").unlink()
    for site in ("North", "South", "East", "West"):
        (mixed / site).mkdir(parents=True)
    as_metaimage(nifti / "North", mixed / "North")
    for site in ("East", "West"):
        as_dicom(nifti / site, mixed / site)
    shutil.copytree(nifti / "South", mixed / "South", dirs_exist_ok=True)
    cells = [model_of(root, tmp_path / root.name / "run") for root in (nifti, mixed)]
    first, second = (json.loads((cell / "model.json").read_text()) for cell in cells)
    assert first["digest"] == second["digest"]
    assert second["input"]["images"] == ["volume"]

    out = tmp_path / "out"
    call = [cells[1], "--data", mixed, "--site", "West", "-o", out, "--device", "cpu"]
    assert main(["predict", *map(str, call)]) == 0
    call = [cells[0], "--data", nifti, "--site", "West", "-o", tmp_path / "n", "--device", "cpu"]
    assert main(["predict", *map(str, call)]) == 0
    found, wanted = (scores(folder / "scores.csv") for folder in (out, tmp_path / "n"))
    assert [row["dice"] for row in found] == [row["dice"] for row in wanted]
    for one, other in zip(found, wanted, strict=True):  # headers round the spacing differently
        assert float(one["assd_mm"]) == pytest.approx(float(other["assd_mm"]), rel=1e-5)
    capsys.readouterr()
    for image in sorted((mixed / "West").glob("*_image")):
        case = image.name.removesuffix("_image")
        layers = segments_of(out / f"West/{case}_mask.dcm", read_volume(image))
        mask = read_volume(tmp_path / f"n/West/{case}_mask.nii.gz", mask=True).array
        assert layers is not None
        np.testing.assert_array_equal(layers.masks[0], mask == 1)
