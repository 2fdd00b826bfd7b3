"""Synthetic hospitals: reproducible, readable, alike in anatomy and unlike in looks."""

import csv

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from fedsgcg.common.images.phantoms import SCANNERS, SITES, make_patient, write_hospitals
from fedsgcg.common.images.read import check_geometry, check_image, read_volume


def test_the_folder_has_the_layout_that_a_hospital_would_bring(hospitals):
    rows = list(csv.DictReader((hospitals / "manifest.csv").open()))
    assert sorted({row["site"] for row in rows}) == list(SITES)
    assert len(rows) == 20
    assert len({row["patient_id"] for row in rows}) == 20
    for row in rows:
        image, mask = (
            read_volume(hospitals / row["image"]),
            read_volume(hospitals / row["mask"], mask=True),
        )
        check_image(image, row["image"])
        check_geometry(image, mask, row["image"])
        assert np.unique(mask.array).tolist() == [0, 1]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    options = {"sites": ["A"], "cases_per_site": 2, "shape": (4, 24, 24)}
    folders = [
        write_hospitals(tmp_path / name, seed=seed, **options)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    one, two, other = (
        [path.read_bytes() for path in sorted(folder.rglob("*.nii.gz"))] for folder in folders
    )
    assert one == two
    assert all(left != right for left, right in zip(one, other, strict=True))


def test_a_patient_does_not_depend_on_how_many_there_are(tmp_path):
    few = write_hospitals(tmp_path / "few", sites=["A"], cases_per_site=1, shape=(4, 24, 24))
    many = write_hospitals(tmp_path / "many", sites=["A", "B"], cases_per_site=3, shape=(4, 24, 24))
    name = "A/A-001_image.nii.gz"
    assert (few / name).read_bytes() == (many / name).read_bytes()


def test_hospitals_differ_in_file_orientation_matrix_and_voxel_size(hospitals):
    first = [nib.load(sorted((hospitals / site).glob("*_image.nii.gz"))[0]) for site in SITES]
    assert ["".join(nib.aff2axcodes(image.affine)) for image in first] == [
        "LPS",
        "RAS",
        "PSL",
        "LAS",
    ]
    shapes = {
        read_volume(sorted((hospitals / site).glob("*_image.nii.gz"))[0]).array.shape
        for site in SITES
    }
    assert len(shapes) == len(SITES)


@pytest.mark.parametrize("scanner", SCANNERS)
def test_the_gland_is_one_piece_of_believable_size_that_differs_between_patients(scanner):
    volumes = []
    for number in range(6):
        _, mask, affine = make_patient(scanner, (12, 80, 80), np.random.default_rng(number))
        assert ndimage.label(mask)[1] == 1
        assert not mask[[0, -1]].any(), "the gland ends within the image"
        volumes.append(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)
    assert min(volumes) > 8
    assert max(volumes) < 90, "cm3; published glands have 15 to 315"
    assert np.std(volumes) > 2


def look(image, mask):
    """Describe an image without its anatomy: noise in air, gland contrast, histogram, sharpness."""
    image = image / np.percentile(image, 99)
    air = np.concatenate([image[:, :5, :5].ravel(), image[:, :5, -5:].ravel()])
    ring = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(
        mask, iterations=2
    )
    inside = image[mask > 0].mean()
    edges = np.abs(np.diff(image, axis=2)).mean()
    return np.log(
        [
            air.mean(),
            inside,
            inside / image[ring].mean(),
            *np.percentile(image, (25, 50, 75)),
            edges,
        ]
    )


def test_the_hospital_of_a_patient_can_be_recognised_by_its_images():
    """The patient with the most similar look is from the same hospital: the domains differ."""
    looks, owners = [], []
    for position, scanner in enumerate(SCANNERS):
        for number in range(6):
            image, mask, _ = make_patient(
                scanner, (8, 64, 64), np.random.default_rng([position, number])
            )
            looks.append(look(image.astype(float), mask))
            owners.append(position)
    points = (np.array(looks) - np.mean(looks, 0)) / np.std(looks, 0)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(
        np.full(len(points), np.inf)
    )
    right = np.array(owners)[distance.argmin(axis=1)] == owners
    assert right.mean() >= 0.9
