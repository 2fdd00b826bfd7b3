"""Intensity, labels and size of a slice, against values worked out by hand."""

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsgcg.clients.data.slices import (
    class_indices,
    flattened,
    resize,
    resize_labels,
    scale_intensity,
)
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.read import read_volume
from fedsgcg.common.metrics import segmentation_metrics
from tests.support.cases import ramp, store_of, write_case


@pytest.mark.parametrize("mode", ["percentile", "minmax", "zscore"])
def test_intensity_by_hand(mode):
    array = np.arange(101, dtype=np.float32)
    found = scale_intensity(array, mode)
    if mode == "minmax":
        expected = array / 50 - 1
    elif mode == "percentile":
        expected = np.clip((array - 1) / 98 * 2 - 1, -1, 1)
    else:
        expected = (array - 50) / (3 * np.sqrt((101**2 - 1) / 12))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def scene(side=64, depth=2):
    """Bright tissue with a brighter disc, and noise, all positive."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    disc = (y - side / 2) ** 2 + (x - side / 2) ** 2 < (side / 6) ** 2
    return (100 + 40 * disc + rng.normal(0, 3, (depth, 1, side, side))).astype(np.float32), disc


def test_flat_intensity_is_the_logarithm_minus_its_blur_by_hand():
    image, _ = scene(32)
    low, high = np.percentile(image, (1, 99))
    logarithm = np.log(np.clip(image.astype(np.float64), low, high))
    reach, sigma = 16, 2.0  # four deviations on each side of a mirrored slice
    kernel = np.exp(-0.5 * (np.arange(-8, 9) / sigma) ** 2)
    kernel /= kernel.sum()
    wide = np.pad(logarithm[1, 0], reach, mode="symmetric")
    for axis in (0, 1):
        wide = np.apply_along_axis(lambda line: np.convolve(line, kernel, "same"), axis, wide)
    expected = logarithm[1, 0] - wide[reach:-reach, reach:-reach]
    np.testing.assert_allclose(flattened(image, sigma / 32)[1, 0], expected, atol=1e-5)


def test_flat_intensity_hardly_depends_on_a_coil_and_not_on_a_factor():
    image, disc = scene()
    coil = np.exp(1.5 * (np.mgrid[:64, :64][1] / 63 - 0.5)).astype(np.float32)  # a factor of 4.5
    sigma = 20 / 128
    plain, scaled, uneven = (
        scale_intensity(flattened(one, sigma), "flat") for one in (image, 7 * image, coil * image)
    )
    np.testing.assert_allclose(scaled, plain, atol=1e-3)

    def contrast(found):  # between the disc and its left and right neighbours
        sides = [
            found[..., part][..., ~disc[:, part]].mean() for part in (slice(8, 22), slice(42, 56))
        ]
        return found[..., disc].mean() - np.array(sides)

    assert contrast(plain).min() > 0.5
    np.testing.assert_allclose(contrast(uneven), contrast(plain), atol=0.35)
    assert contrast(scale_intensity(coil * image, "percentile")).min() < 0


def test_flat_intensity_of_dark_and_negative_values_is_finite(tmp_path, make_data):
    image, _ = scene()
    for one in (image - 120, np.where(image > 120, image, 0)):
        found = scale_intensity(flattened(one, 0.1), "flat")
        assert np.isfinite(found).all()
        assert (found.min(), found.max()) == (-1, 1)
    write_case(tmp_path / "V", "a", *ramp())
    keys = {
        store_of(tmp_path, make_data(**changes), tmp_path / "cache", "V", heldout=True).key
        for changes in (
            {},
            {"intensity": "flat"},
            {"intensity": "flat", "flat_sigma": 10.0},
            {"flat_sigma": 10.0},
        )
    }
    assert len(keys) == 3, "the width counts only where it is used"


def test_fixed_intensity_is_the_published_scale_of_pictures(tmp_path, make_data):
    """Grey 64 to 192 becomes -0.498 to 0.506 in any picture; volumes and 16 bits have no scale."""
    (tmp_path / "S").mkdir()
    grey = np.repeat(np.array([[64, 192]], np.uint8), 16, axis=1).repeat(32, axis=0)
    mask = (grey > 100).astype(np.uint8)
    for name, pixels in (("eight", grey), ("sixteen", grey.astype(np.uint16))):
        Image.fromarray(pixels).save(tmp_path / "S" / f"{name}_image.png")
        Image.fromarray(mask).save(tmp_path / "S" / f"{name}_mask.png")
    data = make_data(
        "fundus",
        image_size=32,
        classes={"background": [0], "disc": [1]},
        structures={"disc": ["disc"]},
    )
    assert data.intensity == "fixed"
    store = store_of(tmp_path, data, tmp_path / "cache", heldout=True)
    image = store.slices("test").stack([0])[0][0, 0]
    np.testing.assert_allclose(image[:, [0, -1]], [[-0.498, 0.506]] * 32, atol=5e-4)
    assert [(problem.code, problem.where, problem.found) for problem in store.problems] == [
        ("DAT-115", "sixteen", "a picture that does not have 8 bits")
    ]
    np.testing.assert_allclose(scale_intensity(np.array([0, 255], np.float32), "fixed"), [-1, 1])
    write_case(tmp_path / "V", "a", *ramp())
    with pytest.raises(FedsgcgError, match="a volume"):
        store_of(tmp_path, make_data(intensity="fixed"), tmp_path / "cache", "V", heldout=True)


@pytest.mark.row(42)
def test_an_image_with_a_few_bright_voxels_and_huge_values_still_scales():
    spike = np.zeros(1000, np.float32)
    spike[0] = 7
    np.testing.assert_array_equal(scale_intensity(spike, "percentile"), np.where(spike == 7, 1, -1))
    huge = np.array([-3e38, 0, 3e38], np.float32)
    np.testing.assert_allclose(scale_intensity(huge, "minmax"), [-1, 0, 1])


def test_hot_spots_do_not_flatten_the_rest():
    tissue = np.tile(np.linspace(100, 200, 100, dtype=np.float32), 100)
    hot = tissue.copy()
    hot[:20] = 32000
    assert np.ptp(scale_intensity(hot, "percentile")[20:]) > 1.9


def test_labels_map_to_class_indices_in_order_of_declaration():
    classes = {"background": [0], "rim": [5, 7], "cup": [2]}
    found = class_indices(np.array([[0, 5], [2, 7]], np.float32), classes, "case")
    assert found.tolist() == [[0, 1], [2, 1]]
    with pytest.raises(FedsgcgError, match=r"values 0\.5, 9") as caught:
        class_indices(np.array([0, 9, 0.5], np.float32), classes, "case")
    assert caught.value.code == "DAT-109"


def test_nearly_whole_labels_are_whole_and_errors_print_their_digits():
    """A float array with an integer header is rescaled on saving: label 1 becomes 0.99999994."""
    classes = {"background": [0], "a": [1], "b": [200]}
    raw = np.array([1e-7, 0.99999994, 200.0009, 199.9991], np.float32)
    assert class_indices(raw, classes, "case").tolist() == [0, 1, 2, 2]
    with pytest.raises(FedsgcgError) as caught:
        class_indices(raw[:2], classes, "case", 0.0)
    (problem,) = caught.value.problems
    assert problem.found == "values 1.00000001e-07, 0.99999994"
    assert problem.expected == "values 0, 1, 200, each within 0"
    with pytest.raises(FedsgcgError, match=r"values 0\.998"):
        class_indices(np.array([0.998], np.float32), classes, "case")
    with pytest.raises(FedsgcgError, match="nan"):
        class_indices(np.array([np.nan], np.float32), classes, "case")


@pytest.mark.parametrize(("kind", "labels"), [(np.int32, 6), (np.int16, 3), (np.uint8, 3)])
def test_label_maps_that_were_rescaled_on_saving_are_read(tmp_path, kind, labels):
    array = (np.arange(256) % labels).astype(np.float32).reshape(8, 8, 4)
    affine = np.diag([-0.8, -0.8, 3, 1.0])
    header = nib.Nifti1Image(np.zeros((8, 8, 4), kind), affine).header
    (tmp_path / "m.nii").write_bytes(nib.Nifti1Image(array, affine, header).to_bytes())
    raw = read_volume(tmp_path / "m.nii", mask=True).array
    assert (raw != np.rint(raw)).any()
    classes = {str(value): [value] for value in range(labels)}
    if kind == np.uint8:  # 255 steps for the values 0 to 2: 1 became 0.996, too far for the default
        with pytest.raises(FedsgcgError, match=r"0\.996078491(.|\n)*data\.label_tolerance"):
            class_indices(raw, classes, "case")
    found = class_indices(raw, classes, "case", 0.01 if kind == np.uint8 else 1e-3)
    np.testing.assert_array_equal(found, np.rint(raw))


@pytest.mark.parametrize(("size", "side"), [((64, 64), 32), ((20, 50), 32), ((33, 47), 64)])
def test_resizing_keeps_means_places_and_label_values(size, side):
    image = np.add.outer(np.linspace(0, 1, size[0]), np.linspace(0, 3, size[1])).astype(np.float32)[
        None, None
    ]
    small = resize(image, side)
    assert small.shape == (1, 1, side, side)
    assert small.mean() == pytest.approx(image.mean(), abs=0.01)
    labels = (image[:, 0] > 2).astype(np.uint8) * 3
    mapped = resize_labels(labels, side)
    assert np.unique(mapped).tolist() == [0, 3]
    # Centres are aligned: image and label agree wherever the image is clear of the border value.
    clear = abs(small - 2) > 4 / side + 3 / size[1]
    np.testing.assert_array_equal((small > 2)[clear], (mapped[:, None] == 3)[clear])


def test_downsampling_averages_images_instead_of_skipping_pixels():
    stripes = np.tile((np.arange(128) % 4 == 0).astype(np.float32), (128, 1))[None, None]
    small = resize(stripes, 32)[..., 2:-2]
    np.testing.assert_allclose(small, 0.25, atol=0.05)


def test_a_label_of_a_quarter_of_the_pixels_does_not_become_all_of_them():
    """Nearest-pixel resizing takes the pixels of odd rows and columns and nothing else."""
    labels = np.zeros((1, 4, 4), np.uint8)
    labels[0, 1::2, 1::2] = 1
    np.testing.assert_array_equal(resize_labels(labels, 2), np.zeros((1, 2, 2)))


def test_equal_shares_go_to_the_class_declared_later():
    """At half size a pixel is 1/8, 3/8, 3/8, 1/8 of four rows: an edge in its middle is a tie."""
    rows = np.array(
        [0, 0, 0, 2, 2, 2, 1, 1], np.uint8
    )  # the edges lie in the middle of the new rows 1 and 3
    labels = np.broadcast_to(rows[:, None], (8, 8))[None].copy()
    np.testing.assert_array_equal(resize_labels(labels, 4)[0, :, 0], [0, 2, 2, 1])
    np.testing.assert_array_equal(
        resize_labels(np.ascontiguousarray(labels[:, ::-1]), 4)[0, :, 0], [1, 2, 2, 0]
    )


def test_labels_at_half_the_size_are_the_largest_of_shares_by_hand():
    labels = np.random.default_rng(0).integers(0, 4, (2, 64, 64)).astype(np.uint8)
    weight = np.zeros((32, 64))
    for row in range(32):
        for offset, part in zip(range(-1, 3), (1, 3, 3, 1), strict=True):
            if 0 <= 2 * row + offset < 64:
                weight[row, 2 * row + offset] = part
    weight /= weight.sum(1, keepdims=True)  # what lies outside the slice has no share
    shares = np.stack(
        [weight @ (layer == index) @ weight.T for layer in labels for index in range(4)]
    )
    shares = shares.reshape(2, 4, 32, 32).round(9)
    np.testing.assert_array_equal(resize_labels(labels, 32), 3 - shares[:, ::-1].argmax(1))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(24, 200),
    columns=st.integers(24, 200),
    side=st.sampled_from([32, 48, 64, 96]),
    seed=st.integers(0, 2**32 - 1),
)
def test_labels_are_centred_on_their_image_at_every_factor(rows, columns, side, seed):
    """Rounding at a blob's edge has no direction: over its mirror images the centroid is kept."""
    blob = _blob(rows, columns, np.random.default_rng(seed))
    moved = []
    for axes in ((), (1,), (2,), (1, 2)):
        mirrored = np.ascontiguousarray(np.flip(blob, axes))
        small = resize_labels(mirrored, side)
        np.testing.assert_array_equal(small, np.flip(resize_labels(blob, side), axes))
        moved.append(_centroid(small, rows, columns) - _centroid(mirrored, rows, columns))
    assert np.abs(np.mean(moved, axis=0)).max() < 0.02, "native pixels"
    assert np.abs(moved).max() < 0.3 * max(1, rows / side, columns / side), (
        "less than a third of a new pixel each"
    )


def _blob(rows, columns, rng):
    """A lobed shape (1, Y, X) near the middle, about half as wide as the slice."""
    y = (np.arange(rows) + 0.5)[:, None] / rows - rng.uniform(0.45, 0.55)
    x = (np.arange(columns) + 0.5)[None] / columns - rng.uniform(0.45, 0.55)
    turn = np.arctan2(y, x)
    radius = 0.25 * (
        1 + sum(rng.uniform(-0.1, 0.1) * np.cos(k * turn + rng.uniform(0, 6.3)) for k in (2, 3, 4))
    )
    return (np.hypot(y, x) < radius).astype(np.uint8)[None]


def _centroid(labels, rows, columns):
    """Return the centroid of label 1 in native pixels, from the slice's corner."""
    _, y, x = np.nonzero(labels == 1)
    return np.array(
        [(y + 0.5).mean() * rows / labels.shape[1], (x + 0.5).mean() * columns / labels.shape[2]]
    )


def test_half_size_labels_of_real_prostates_come_back_as_well_as_they_can(real_data):
    """A perfect model at 64 of 128 pixels gets this score; nearest gives 0.962 and 0.298 pixels."""
    scores = []
    for path in sorted(real_data("promise12").glob("*/*_mask.nii.gz")):
        truth = read_volume(path, mask=True).array > 0
        small = torch.from_numpy(resize_labels(truth.astype(np.uint8), 64)).double()[:, None]
        back = torch.nn.functional.interpolate(
            small, truth.shape[1:], mode="bilinear", align_corners=False
        )
        found = segmentation_metrics((back[:, 0] > 0.5).numpy(), truth)
        scores.append((found.dice, found.asd))
    np.testing.assert_allclose(np.mean(scores, axis=0), (0.968, 0.238), atol=5e-4)
