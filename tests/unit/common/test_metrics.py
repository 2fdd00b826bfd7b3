"""Metrics against hand-computed values and, on random masks, against medpy."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from medpy.metric import binary

from fedsgcg.common.metrics import (
    average_surface_distance,
    average_symmetric_surface_distance,
    dice,
    hausdorff_distance_95,
    segmentation_metrics,
)

SHAPES = st.one_of(
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6),
)


@st.composite
def pairs(draw):
    shape = draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.05, 0.3, 0.6, 0.95, 1.0]))
    spacing = draw(st.one_of(st.none(), st.tuples(*[st.floats(0.1, 5)] * len(shape))))
    return (
        rng.random(shape) < share,
        rng.random(shape) < draw(st.sampled_from([0.05, 0.5, 1.0])),
        spacing,
    )


def mask(shape, *points):
    array = np.zeros(shape, bool)
    for point in points:
        array[point] = True
    return array


def larger_directed_percentile(prediction, truth, spacing):
    """Compare all pairs of surface elements, without a tree or a library."""
    scale = np.ones(prediction.ndim) if spacing is None else np.array(spacing)
    first, second = (np.argwhere(surface(array)) * scale for array in (prediction, truth))
    distance = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    return max(percentile_95(distance.min(1)), percentile_95(distance.min(0)))


def surface(array):
    """Elements with a face neighbour that is background or outside."""
    found = np.zeros_like(array)
    for place in np.argwhere(array):
        for axis, step in product(range(array.ndim), (-1, 1)):
            other = place.copy()
            other[axis] += step
            inside = 0 <= other[axis] < array.shape[axis]
            if not inside or not array[tuple(other)]:
                found[tuple(place)] = True
    return found


def percentile_95(values):
    """Linear between the two order statistics next to place 0.95 (n - 1)."""
    ordered, place = sorted(values), 0.95 * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@settings(max_examples=200, deadline=None)
@given(pairs())
@pytest.mark.row(71)
def test_all_figures_equal_medpy(pair):
    prediction, truth, spacing = pair
    assume(prediction.any() and truth.any())
    found = segmentation_metrics(prediction, truth, spacing)
    assert found.dice == pytest.approx(binary.dc(prediction, truth), abs=1e-12)
    assert found.asd == pytest.approx(binary.asd(prediction, truth, spacing), abs=1e-10)
    assert found.asd_reverse == pytest.approx(binary.asd(truth, prediction, spacing), abs=1e-10)
    assert found.assd == pytest.approx(binary.assd(prediction, truth, spacing), abs=1e-10)
    assert found.hd95 == pytest.approx(binary.hd95(prediction, truth, spacing), abs=1e-10)
    assert found.hd95_max == pytest.approx(
        larger_directed_percentile(prediction, truth, spacing), abs=1e-10
    )


@settings(max_examples=50, deadline=None)
@given(pairs())
def test_each_function_gives_what_the_joint_one_gives(pair):
    prediction, truth, spacing = pair
    joint = segmentation_metrics(prediction, truth, spacing)
    alone = (
        dice(prediction, truth),
        average_surface_distance(prediction, truth, spacing),
        average_symmetric_surface_distance(prediction, truth, spacing),
        hausdorff_distance_95(prediction, truth, spacing),
        average_surface_distance(truth, prediction, spacing),
    )
    np.testing.assert_allclose(
        alone, (joint.dice, joint.asd, joint.assd, joint.hd95, joint.asd_reverse), rtol=1e-12
    )


@settings(max_examples=50, deadline=None)
@given(pairs(), st.floats(0.1, 10))
def test_distances_scale_with_the_spacing_and_assd_is_symmetric(pair, factor):
    prediction, truth, _ = pair
    assume(prediction.any() and truth.any())
    one, other = (
        segmentation_metrics(prediction, truth),
        segmentation_metrics(truth, prediction, factor),
    )
    assert other.assd == pytest.approx(factor * one.assd)
    assert other.hd95 == pytest.approx(factor * one.hd95)
    assert other.asd_reverse == pytest.approx(factor * one.asd)
    assert other.dice == one.dice


@pytest.mark.row(71)
def test_two_single_pixels_three_and_four_apart():
    found = segmentation_metrics(mask((8, 8), (1, 1)), mask((8, 8), (4, 5)))
    assert (found.dice, found.asd, found.assd, found.hd95, found.asd_reverse) == (0, 5, 5, 5, 5)


def test_two_single_voxels_with_anisotropic_spacing():
    found = segmentation_metrics(
        mask((3, 4, 4), (0, 0, 0)), mask((3, 4, 4), (2, 3, 0)), (2.0, 1.0, 0.5)
    )
    assert found.asd == found.hd95 == 5.0  # sqrt((2 * 2)^2 + 3^2)


def test_touching_boxes():
    left, right = np.zeros((3, 6), bool), np.zeros((3, 6), bool)
    left[:, 0:2], right[:, 2:4] = True, True
    found = segmentation_metrics(left, right)
    # No pixel of a 3 x 2 box is interior: columns 0 and 1 against columns 2 and 3, at distances 2,
    # 1.
    assert found.dice == 0
    assert found.asd == found.assd == found.asd_reverse == 1.5
    assert found.hd95 == 2


def test_a_dot_inside_a_square_is_not_symmetric():
    dot, square = mask((5, 5), (2, 2)), np.ones((5, 5), bool)
    found = segmentation_metrics(dot, square)
    assert found.dice == pytest.approx(2 / 26)
    assert found.asd == 2  # the dot is two pixels away from the rim
    # the 16 rim pixels: four at 2, eight at sqrt 5, four at sqrt 8
    rim = [2] * 4 + [math.sqrt(5)] * 8 + [math.sqrt(8)] * 4
    assert found.asd_reverse == pytest.approx(sum(rim) / 16)
    assert found.assd == pytest.approx((sum(rim) + 2) / 17)


def test_the_two_forms_of_hd95_by_hand():
    """A row of 20 pixels against its first 19: one of the 20 predicted pixels is at distance 1.

    Pooled, place 0.95 * 38 = 36.1 of 39 sorted distances is 0. Directed, place 0.95 * 19 = 18.05 of
    20 lies 0.05 of the way from the 19th distance, 0, to the 20th, 1; the other direction is 0.
    """
    prediction, truth = np.ones((1, 20), bool), np.ones((1, 20), bool)
    truth[0, 19] = False
    found = segmentation_metrics(prediction, truth)
    assert (found.hd95, found.hd95_max) == (0, pytest.approx(0.05))
    swapped = segmentation_metrics(truth, prediction)
    assert (swapped.hd95, swapped.hd95_max) == (found.hd95, found.hd95_max)


@pytest.mark.row(71)
def test_a_mask_at_the_edge_has_a_surface_there():
    full, ring = np.ones((4, 4), bool), np.ones((4, 4), bool)
    ring[1:3, 1:3] = False
    assert segmentation_metrics(full, ring).asd == 0  # the surface of the full image is its rim
    assert segmentation_metrics(full, mask((4, 4), (0, 0))).asd == pytest.approx(
        sum(math.hypot(y, x) for y in range(4) for x in range(4) if y in (0, 3) or x in (0, 3)) / 12
    )


def test_the_interior_is_no_surface_even_where_a_corner_is_missing():
    plus = mask((3, 3), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1))
    # Face-connected erosion leaves the centre, whose diagonal neighbours are background.
    assert average_surface_distance(plus, mask((3, 3), (1, 1))) == 1


def test_what_published_code_counts_by_hand():
    """P has 3 elements, T has 4, two are in both: (2 * 2 + 1) / (3 + 4 + 1)."""
    prediction, truth = (
        mask((2, 4), (0, 0), (0, 1), (0, 2)),
        mask((2, 4), (0, 1), (0, 2), (1, 1), (1, 2)),
    )
    found = segmentation_metrics(prediction, truth)
    assert (found.dice, found.dice_smooth1) == (4 / 7, 5 / 8)
    assert (
        found.asd_compat == found.asd == 1 / 3
    )  # of the three predicted elements one lies a step away
    empty = np.zeros((2, 4), bool)
    for one in (segmentation_metrics(prediction, empty), segmentation_metrics(empty, prediction)):
        assert (one.dice, one.dice_smooth1, one.asd_compat) == (0, 1 / 4, 100)
        assert math.isnan(one.asd)
    both = segmentation_metrics(empty, empty)
    assert (both.dice_smooth1, both.asd_compat) == (1, 0)
    assert segmentation_metrics(truth, truth).dice_smooth1 == 1
    assert segmentation_metrics(prediction, empty, spacing=0.5).asd_compat == 100


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
@pytest.mark.row(71)
def test_empty_masks(shape):
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    both = segmentation_metrics(empty, empty)
    assert (both.dice, both.asd, both.assd, both.hd95, both.hd95_max, both.asd_reverse) == (
        1,
        0,
        0,
        0,
        0,
        0,
    )
    for one in (segmentation_metrics(empty, full), segmentation_metrics(full, empty)):
        assert one.dice == 0
        assert all(
            math.isnan(value)
            for value in (one.asd, one.assd, one.hd95, one.hd95_max, one.asd_reverse)
        )
    assert math.isnan(average_surface_distance(empty, full))
    assert average_surface_distance(empty, empty) == 0
    assert (dice(empty, empty), dice(empty, full)) == (1, 0)


def test_integer_masks_count_what_is_not_zero():
    assert dice(np.array([[0, 2], [1, 0]]), np.array([[0, 1], [1, 0]], np.uint8)) == 1


def test_results_are_plain_floats():
    found = segmentation_metrics(np.eye(4, dtype=bool), np.ones((4, 4), bool))
    assert {type(value) for value in vars(found).values()} == {float}


@pytest.mark.parametrize(
    ("prediction", "truth", "spacing", "message"),
    [
        (
            np.ones((2, 3), bool),
            np.ones((3, 2), bool),
            None,
            r"prediction: found shape \(2, 3\).*\(3, 2\)",
        ),
        (np.ones(3, bool), np.ones(3, bool), None, "2-D or 3-D"),
        (np.ones((2, 2, 2, 2), bool), np.ones((2, 2, 2, 2), bool), None, "2-D or 3-D"),
        (np.ones((2, 2)), np.ones((2, 2), bool), None, "prediction: found dtype float64"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, -1), "spacing"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 0), "spacing"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, np.inf), "spacing"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 1, 1), "spacing: found.*expected 2"),
    ],
)
def test_bad_input_is_refused_by_name(prediction, truth, spacing, message):
    with pytest.raises(ValueError, match=message):
        segmentation_metrics(prediction, truth, spacing)
