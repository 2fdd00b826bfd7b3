"""An image and its mask: what is refused, and masks that lie in the same space."""

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.read import (
    Volume,
    affine_as,
    check_geometry,
    check_image,
    read_volume,
    write_volume,
)


def volume(shape=(4, 5, 6), affine=None, value=0.0, picture=False):
    array = np.full(shape, value, np.float32)
    array.flat[0] += 1
    affine = np.diag([-1.0, -1.0, 3.0, 1.0]) if affine is None else affine
    return Volume(array, affine, (3.0, 1.0, 1.0), picture)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    image = volume()
    image.array[1, 2, 3] = bad
    with pytest.raises(FedsgcgError, match="1 of 120 values") as caught:
        check_image(image, "case")
    assert caught.value.code == "DAT-107"


def test_a_constant_image_is_refused():
    image = volume()
    image.array[:] = 5
    with pytest.raises(FedsgcgError, match="every value is 5") as caught:
        check_image(image, "case")
    assert caught.value.code == "DAT-108"
    check_image(volume(), "case")


def test_masks_of_another_shape_are_refused():
    with pytest.raises(FedsgcgError) as caught:
        check_geometry(volume(), volume((4, 6, 5)), "case")
    found = caught.value.problems[0].found
    assert (caught.value.code, found) == ("DAT-104", "a volume of 5x6x4")
    with pytest.raises(FedsgcgError, match="DAT-104"):
        check_geometry(volume((1, 5, 6), picture=True), volume((1, 5, 6)), "case")


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ((0, 3, 0.05), True),  # a twentieth of a voxel: rounding
        ((0, 3, 0.5), False),  # half a voxel
        ((2, 2, -3.0), False),  # slices upside down
        ((0, 0, -1.03), False),  # spacing 3 % off: adds up over the rows
        ((0, 0, 1.0), False),  # left and right swapped
    ],
)
def test_masks_at_another_position_are_refused(change, fine):
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    affine[change[0], change[1]] = change[2]
    if fine:
        check_geometry(volume(), volume(affine=affine), "case")
    else:
        with pytest.raises(FedsgcgError) as caught:
            check_geometry(volume(), volume(affine=affine), "case")
        assert caught.value.code == "DAT-105"


def test_a_mask_saved_with_other_axes_over_the_same_space_is_fine(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    canonical = np.diag([-1.0, -2.0, 3.0, 1.0])
    for name, codes in (("image", ("L", "P", "S")), ("mask", ("S", "R", "A"))):
        write_volume(tmp_path / f"{name}.nii.gz", array, affine_as(codes, canonical, array.shape))
    image, mask = (
        read_volume(tmp_path / "image.nii.gz"),
        read_volume(tmp_path / "mask.nii.gz", mask=True),
    )
    check_geometry(image, mask, "case")
    np.testing.assert_array_equal(image.array, mask.array)
