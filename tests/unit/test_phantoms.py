"""Synthetic hospitals: reproducible, readable, alike in anatomy and unlike in looks."""

import csv

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.imaging import check_geometry, check_image, read_volume
from common.phantoms import SCANNERS, SITES, make_patient, write_hospitals


def test_the_folder_has_the_layout_that_a_hospital_would_bring(hospitals):
    rows = list(csv.DictReader((hospitals / "manifest.csv").open()))
    assert sorted({row["site"] for row in rows}) == list(SITES)
    assert len(rows) == 20
    assert len({row["patient_id"] for row in rows}) == 20
    for row in rows:
        image, mask = read_volume(hospitals / row["image"]), read_volume(hospitals / row["mask"], mask=True)
        check_image(image, row["image"])
        check_geometry(image, mask, row["image"])
        assert np.unique(mask.array).tolist() == [0, 1]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    options = {"sites": ["A"], "cases_per_site": 2, "shape": (4, 24, 24)}
    folders = [write_hospitals(tmp_path / name, seed=seed, **options) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    one, two, other = ([path.read_bytes() for path in sorted(folder.rglob("*.nii.gz"))] for folder in folders)
    assert one == two
    assert all(left != right for left, right in zip(one, other, strict=True))


def test_a_patient_does_not_depend_on_how_many_there_are(tmp_path):
    few = write_hospitals(tmp_path / "few", sites=["A"], cases_per_site=1, shape=(4, 24, 24))
    many = write_hospitals(tmp_path / "many", sites=["A", "B"], cases_per_site=3, shape=(4, 24, 24))
    name = "A/A-001_image.nii.gz"
    assert (few / name).read_bytes() == (many / name).read_bytes()


def test_hospitals_differ_in_file_orientation_matrix_and_voxel_size(hospitals):
    first = [nib.load(sorted((hospitals / site).glob("*_image.nii.gz"))[0]) for site in SITES]
    assert ["".join(nib.aff2axcodes(image.affine)) for image in first] == ["LPS", "RAS", "PSL", "LAS"]
    shapes = {read_volume(sorted((hospitals / site).glob("*_image.nii.gz"))[0]).array.shape for site in SITES}
    assert len(shapes) == len(SITES)


@pytest.mark.parametrize("scanner", SCANNERS)
def test_the_gland_is_one_piece_of_believable_size_that_differs_between_patients(scanner):
    volumes = []
    for number in range(6):
        _, mask, affine = make_patient(scanner, (12, 80, 80), np.random.default_rng(number))
        assert ndimage.label(mask)[1] == 1
        assert not mask[[0, -1]].any(), "the gland ends within the image"
        volumes.append(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)
    assert 8 < min(volumes)
    assert max(volumes) < 90, "cm3; published glands have 15 to 315"
    assert np.std(volumes) > 2


def test_hospitals_look_different_and_one_shows_the_gland_the_other_way_round():
    """Contrast of the gland's outer zone against its inner zone: bright at three scanners, dark at the fourth."""

    def contrast(scanner):
        ratios = []
        for number in range(5):
            image, mask, _ = make_patient(scanner, (12, 80, 80), np.random.default_rng(number))
            z = mask.sum(axis=(1, 2)).argmax()
            rows, columns = np.nonzero(mask[z])
            low, high = np.quantile(rows, (0.3, 0.8))
            middle = abs(columns - columns.mean()) < 0.25 * np.ptp(columns)
            values = image[z][rows, columns].astype(float)
            ratios.append(values[(rows > high) & middle].mean() / values[(rows < low) & middle].mean())
        return np.mean(ratios)

    found = [contrast(scanner) for scanner in SCANNERS]
    assert min(found[:3]) > 1.15
    assert found[3] < 0.97
