"""What a slice of the cache holds, for small volumes, pictures and real images."""

import csv

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fedsgcg.clients.data.case_files import discover_sites
from fedsgcg.common.images.read import read_volume
from tests.support.cases import ramp, store_of, three_cases, write_case


@pytest.fixture
def one(tmp_path, make_data):
    """A hospital with three cases of known pixels."""
    return three_cases(tmp_path, make_data)


# what a slice is


def test_a_stack_holds_the_neighbours_and_repeats_the_outermost_slice(one):
    table = store_of(*one).slices("train")
    images, labels = table.stack([0, 1, 3])
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == np.float32
    assert labels.dtype == np.uint8
    image, mask = ramp()
    scaled = image / 399 * 2 - 1  # the largest value is 300 + 99
    for row, (z, neighbours) in enumerate([(0, (0, 0, 1)), (1, (0, 1, 2)), (3, (2, 3, 3))]):
        for channel, neighbour in enumerate(neighbours):
            np.testing.assert_allclose(images[row, channel], scaled[neighbour], atol=2e-5)
        np.testing.assert_array_equal(labels[row], mask[z])


def test_stack_one_repeats_the_slice(one, make_data):
    data = make_data(image_size=32, intensity="minmax", validation_fraction=0.0, stack=1)
    images, _ = store_of(one[0], data, one[2]).slices("train").stack([0])
    np.testing.assert_array_equal(images[0, 0], images[0, 2])
    np.testing.assert_allclose(images[0, 1], ramp()[0][0] / 399 * 2 - 1, atol=2e-5)


def test_table_knows_the_case_and_the_foreground_of_each_slice(one, make_data):
    store = store_of(*one)
    table = store.slices("train")
    assert len(table) == 12
    assert table.case_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert table.z_of.tolist() == [0, 1, 2, 3] * 3
    assert table.has_foreground.tolist() == [False, True, True, False] * 3
    assert len(store.slices("validation")) == len(store.slices("test")) == 0
    only = store_of(
        one[0],
        make_data(
            image_size=32, intensity="minmax", validation_fraction=0.0, train_slices="foreground"
        ),
        one[2],
    )
    chosen = only.slices("train")
    assert chosen.z_of.tolist() == [1, 2] * 3
    # Neighbours that are not in the table are still seen.
    np.testing.assert_array_equal(chosen.stack([0])[0], table.stack([1])[0])


def test_foreground_means_the_declared_structures_alone(one, make_data):
    """A class that belongs to no structure is learned but does not count as foreground."""
    data = make_data(
        image_size=32,
        classes={"background": [0], "bladder": [1], "gland": [2]},
        structures={"gland": ["gland"]},
    )
    image, mask = ramp()
    mask[3, 0, 0] = 2
    write_case(one[0] / "S", "d", image, mask)
    store = store_of(one[0], data, one[2], heldout=True)
    assert [case.has_foreground for case in store.cases] == [False, False, False, True]
    assert store.slices("test").has_foreground.tolist() == [False] * 15 + [True]


def test_case_facts(one):
    store = store_of(*one, heldout=True)
    first = store.cases[0]
    assert store.site == "S"
    assert (first.index, first.name, first.patient, first.split, first.num_slices) == (
        0,
        "a",
        "a",
        "test",
        4,
    )
    assert first.native_shape == (4, 32, 32)
    assert first.spacing == pytest.approx((3.0, 2.0, 1.0))
    assert not first.is_picture
    assert len({case.alias for case in store.cases}) == 3
    assert all(case.alias != "a" and len(case.alias) == 10 for case in store.cases)


def test_native_truth_and_image_keep_their_size(tmp_path, make_data):
    rng = np.random.default_rng(0)
    image, mask = (
        rng.integers(0, 500, (3, 40, 56)).astype(np.int16),
        rng.integers(0, 2, (3, 40, 56)).astype(np.uint8),
    )
    write_case(tmp_path / "S", "a", image, mask, ("P", "S", "R"))
    data = make_data(image_size=32, intensity="minmax")
    store = store_of(tmp_path, data, tmp_path / "cache", heldout=True)
    np.testing.assert_array_equal(store.truth(store.cases[0]), mask)
    np.testing.assert_allclose(
        store.image(store.cases[0]), (image - image.min()) / np.ptp(image), atol=1 / 254
    )
    assert store.slices("test").stack([0])[0].shape == (1, 3, 32, 32)


def test_every_orientation_of_one_patient_gives_the_same_slices(tmp_path, make_data):
    rng = np.random.default_rng(1)
    image, mask = (
        rng.integers(0, 500, (4, 32, 32)).astype(np.int16),
        rng.integers(0, 2, (4, 32, 32)).astype(np.uint8),
    )
    for name, codes in (("a", ("L", "P", "S")), ("b", ("R", "A", "S")), ("c", ("S", "L", "A"))):
        write_case(tmp_path / "S", name, image, mask, codes)
    table = store_of(tmp_path, make_data(image_size=32), tmp_path / "cache", heldout=True).slices(
        "test"
    )
    images, labels = table.stack(range(12))
    for start in (4, 8):
        np.testing.assert_array_equal(images[start : start + 4], images[:4])
        np.testing.assert_array_equal(labels[start : start + 4], labels[:4])


def test_pictures_in_grey_and_colour(tmp_path, make_data):
    (tmp_path / "S").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)
    labels = np.zeros((40, 48), np.uint8)
    labels[10:30, 10:30], labels[15:20, 15:20] = 128, 30
    for name, pixels in (("colour", colours), ("grey", colours[..., 0])):
        Image.fromarray(pixels).save(tmp_path / "S" / f"{name}_image.png")
        Image.fromarray(labels).save(tmp_path / "S" / f"{name}_mask.png")
    data = make_data(
        image_size=32,
        intensity="minmax",
        classes={"background": [0], "rim": [128], "cup": [30]},
        structures={"disc": ["rim", "cup"], "cup": ["cup"]},
    )
    store = store_of(tmp_path, data, tmp_path / "cache", heldout=True)
    assert [(c.is_picture, c.spacing, c.num_slices, c.native_shape) for c in store.cases] == [
        (True, None, 1, (1, 40, 48))
    ] * 2
    images, small = store.slices("test").stack([0, 1])
    assert np.ptp(images[0], axis=0).max() > 0.1, "colours stay apart"
    assert np.ptp(images[1], axis=0).max() == 0, "grey is repeated"
    assert np.unique(small).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(
        store.truth(store.cases[0])[0], np.select([labels == 128, labels == 30], [1, 2])
    )


def test_a_hospital_uses_the_kind_that_most_of_its_cases_are(tmp_path, make_data):
    """Two axial volumes, a sagittal one and a picture: one kind is used, the others are named."""
    for name in ("a", "b"):
        write_case(tmp_path / "S", name, *ramp())
    image, mask = ramp()
    for kind, array in (("image", image), ("mask", mask)):
        nifti = nib.Nifti1Image(array, np.diag([3.0, 1.0, 1.0, 1.0]))
        nib.save(nifti, tmp_path / "S" / f"sagittal_{kind}.nii.gz")
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(
        tmp_path / "S" / "p_image.png"
    )
    Image.fromarray(mask[1]).save(tmp_path / "S" / "p_mask.png")
    store = store_of(tmp_path, make_data(image_size=32), tmp_path / "cache", heldout=True)
    assert store.kind == "axial volume"
    assert [case.name for case in store.cases] == ["a", "b"]
    assert [(problem.code, problem.where, problem.found) for problem in store.problems] == [
        ("DAT-117", "p", "a case of kind picture"),
        ("DAT-117", "sagittal", "a case of kind sagittal volume"),
    ]


def test_sagittal_acquisitions_are_sliced_as_they_were_acquired(tmp_path, make_data):
    """There are 4 slices of 32 x 32 from right to left; other planes would have 4 x 32 pixels."""
    image, mask = ramp()
    (tmp_path / "S").mkdir()
    for kind, array in (
        ("image", image),
        ("mask", mask),
    ):  # axes: left-right, front-back, feet-head
        nib.save(
            nib.Nifti1Image(array, np.diag([3.0, 1.0, 1.0, 1.0])),
            tmp_path / "S" / f"a_{kind}.nii.gz",
        )
    store = store_of(
        tmp_path, make_data(image_size=32, intensity="minmax"), tmp_path / "cache", heldout=True
    )
    (case,) = store.cases
    assert (store.kind, case.native_shape, case.spacing) == (
        "sagittal volume",
        (4, 32, 32),
        (3.0, 1.0, 1.0),
    )
    # Slices go to the left, rows to the feet, columns to the back; the file has the reverse order.
    np.testing.assert_array_equal(store.truth(case), mask[::-1].transpose(0, 2, 1)[:, ::-1, ::-1])


# real images


@pytest.mark.realdata
def test_prostate_images_have_the_counts_of_their_manifest(real_data, make_data, tmp_path):
    root, data = real_data("promise12"), make_data("promise12", image_size=64)
    rows = {row["image"]: row for row in csv.DictReader((root / "manifest.csv").open())}
    assert discover_sites(root) == ("BIDMC", "HK", "RUNMC", "UCL")
    seen = 0
    for name in discover_sites(root):
        store = store_of(root, data, tmp_path, name, heldout=True)
        assert store.problems == ()
        for case in store.cases:
            row = rows[f"{name}/{case.name}_image.nii.gz"]
            x, y, z = (int(size) for size in row["shape"].split("x"))
            assert case.native_shape == (z, y, x)
            assert case.spacing == pytest.approx(
                [float(s) for s in row["spacing_mm"].split("x")][::-1]
            )
            assert case.patient == row["patient_id"]
            truth = store.truth(case)
            assert int((truth == 1).sum()) == int(row["gland_voxels"])
            assert int(truth.any(axis=(1, 2)).sum()) == int(row["slices_with_gland"])
            seen += 1
    assert seen == len(rows) == 50


@pytest.mark.realdata
def test_spinal_cords_are_nested_and_upright(real_data, make_data, tmp_path):
    root, data = real_data("spinegm"), make_data("spinegm", image_size=64)
    rows = {row["image"]: row for row in csv.DictReader((root / "manifest.csv").open())}
    for name in discover_sites(root):
        store = store_of(root, data, tmp_path, name, heldout=False)
        assert {case.split for case in store.cases} == {"train"}, (
            "one patient a site: the patient trains"
        )
        for case in store.cases:
            row = rows[f"{name}/{case.name}_image.nii.gz"]
            truth = store.truth(case)
            assert int((truth > 0).sum()) == int(row["cord_voxels"])
            assert int((truth == 2).sum()) == int(row["gm_voxels"])
            # A landmark: ventral horns are thicker than dorsal horns, so more grey matter is in
            # front.
            in_front = behind = 0
            for slice_truth in truth:
                rows_of_grey = np.nonzero(slice_truth == 2)[0]
                if len(rows_of_grey):
                    middle = (rows_of_grey.min() + rows_of_grey.max()) / 2
                    in_front, behind = (
                        in_front + (rows_of_grey < middle).sum(),
                        behind + (rows_of_grey > middle).sum(),
                    )
            assert in_front > 1.05 * behind


def test_synthetic_hospitals_open_at_every_site(hospitals, make_data, tmp_path):
    data = make_data(image_size=48)
    for name in discover_sites(hospitals):
        store = store_of(hospitals, data, tmp_path, name)
        assert len(store.cases) == 5
        assert store.problems == ()
        images, labels = store.slices("train").stack([0, 1, 2])
        assert images.min() >= -1
        assert images.max() <= 1
        assert images.std() > 0.2
        case = store.cases[0]
        mask = read_volume(hospitals / name / f"{case.name}_mask.nii.gz", mask=True).array
        np.testing.assert_array_equal(store.truth(case), mask)
