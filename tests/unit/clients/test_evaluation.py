"""Evaluation: decisions, post-processing and scores, against values worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsgcg.clients.data.store import Case
from fedsgcg.clients.evaluation import (
    CaseResult,
    case_rows,
    dice_from_counts,
    largest_component,
    native_probabilities,
    overlap_counts,
    post_process,
    structure_masks,
    structures_from_logits,
)
from fedsgcg.common.pictures import bit_mask, choose_picture
from fedsgcg.common.settings.plan import DataSettings


def nested(**changes) -> DataSettings:
    settings = DataSettings(
        name="test",
        root="",
        sites=[],
        classes={"background": [0], "white": [1], "grey": [2]},
        structures={"cord": ["white", "grey"], "grey": ["grey"]},
        largest_component=True,
        fill_holes=True,
    )
    return replace(settings, **changes)


def a_case(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] | None = None,
    picture: bool = False,
) -> Case:
    return Case(0, "name", "alias", "patient", "test", shape[0], shape, spacing, picture, True)


def test_softmax_decides_the_largest_class_and_unites_classes_to_structures():
    logits = torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 2.0]])  # class x pixel
    masks = structures_from_logits(logits.view(1, 3, 1, 3), (1, 3), nested())
    # Pixel 0 is white, pixel 1 background, pixel 2 grey.
    assert masks.shape == (2, 1, 1, 3)
    assert masks[0, 0, 0].tolist() == [True, False, True]
    assert masks[1, 0, 0].tolist() == [False, False, True]


def test_sigmoid_decides_each_structure_above_its_threshold():
    below, above = math.log(3.0) - 0.01, math.log(3.0) + 0.01  # probability 0.75 is the threshold
    logits = torch.tensor([[below, above], [above, -1.0]]).view(1, 2, 1, 2)
    masks = structures_from_logits(logits, (1, 2), nested(activation="sigmoid", threshold=0.75))
    assert masks[:, 0, 0].tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_are_brought_to_the_native_size_before_the_decision(activation):
    """Foreground is 0.9 in the left of two pixels, 0.2 in the right; natively 4 times as wide."""
    logits = torch.zeros(1, 2 if activation == "softmax" else 1, 1, 2)
    logits[0, -1, 0] = torch.logit(torch.tensor([0.9, 0.2]))
    data = nested(
        classes={"background": [0], "a": [1]}, structures={"a": ["a"]}, activation=activation
    )
    masks = structures_from_logits(logits, (1, 8), data)
    # Sample j of 8 is at x = (j + 0.5) / 4 - 0.5, clipped to [0, 1]; 0.9 - 0.7 x > 0.5 for x <
    # 0.571.
    expected = [0.9 - 0.7 * min(max((j + 0.5) / 4 - 0.5, 0), 1) > 0.5 for j in range(8)]
    assert masks[0, 0, 0].tolist() == expected
    assert (
        sum(expected) == 4
    )  # the logits 2.197 - 3.584 x are positive up to x = 0.613 and would set one more
    (maps,) = native_probabilities(logits, (1, 8), data)
    np.testing.assert_allclose(maps[-1, 0, 2:6], [0.8125, 0.6375, 0.4625, 0.2875], atol=1e-6)


def test_a_disc_that_the_network_is_sure_of_has_its_area_at_native_size():
    """The published rule on logits of +-20 at 256 pixels, 800 natively, with threshold 0.75.

    At a straight edge between certain pixels the probability falls from 1 to 0 within a pixel, so
    0.75 is a quarter of a pixel inside the edge. Interpolated logits would cross log 3 = 1.1 at
    0.47 of a pixel.
    """
    data = nested(activation="sigmoid", threshold=0.75)
    radius, side, native = 60.0, 256, 800
    y = torch.arange(side) + 0.5 - side / 2
    inside = (torch.hypot(y[:, None], y[None]) < radius)[None, None].expand(1, 2, -1, -1)
    masks = structures_from_logits(inside * 40.0 - 20.0, (native, native), data)
    expected = math.pi * ((radius - 0.25) * native / side) ** 2
    assert masks[0].sum() == pytest.approx(expected, rel=0.003)
    logits = torch.nn.functional.interpolate(
        inside * 40.0 - 20.0, (native, native), mode="bilinear"
    )
    assert (logits[:, 0].sigmoid() > 0.75).sum() > 1.004 * expected, "interpolated logits"


def test_the_largest_component_of_a_volume_joins_by_faces_of_a_picture_by_corners_too():
    mask = np.zeros((1, 4, 4), bool)
    mask[0, 0, 0] = mask[0, 1, 1] = True  # touch by a corner
    mask[0, 3, 1:4] = True
    assert largest_component(mask, 1).sum() == 3
    mask[0, 2, 2] = True  # joins all of them by corners in the plane
    assert largest_component(mask, 3).sum() == 6
    assert largest_component(mask, 1).sum() == 4


def test_post_processing_joins_corners_in_pictures_only():
    masks = np.zeros((1, 1, 4, 4), bool)
    masks[0, 0, [0, 1, 3], [0, 1, 3]] = True  # two pixels that touch by a corner, and one alone
    assert post_process(masks, nested(), is_picture=True).sum() == 2
    assert post_process(masks, nested(), is_picture=False).sum() == 1


def test_components_of_a_volume_reach_through_slices():
    mask = np.zeros((3, 3, 3), bool)
    mask[:, 1, 1] = True
    mask[0, 0, 0] = True  # touches the column by an edge only
    assert largest_component(mask, 1).sum() == 3


def test_a_structure_of_two_parts_keeps_both_unless_the_data_ask_for_the_largest():
    """The lungs of own data: nothing said of post-processing."""
    data = DataSettings("own", "", {"background": [0], "lung": [1]}, {"lung": ["lung"]}, [])
    both = np.zeros((1, 1, 8, 8), bool)
    both[0, 0, 1:7, 0:3] = both[0, 0, 1:6, 5:8] = True
    np.testing.assert_array_equal(post_process(both, data, is_picture=False), both)
    kept = post_process(both, replace(data, largest_component=True), is_picture=False)
    assert (both.sum(), kept.sum()) == (33, 18)


def test_of_equal_components_the_first_is_kept():
    mask = np.zeros((1, 1, 5), bool)
    mask[0, 0, [0, 4]] = True
    assert largest_component(mask, 1)[0, 0].tolist() == [True, False, False, False, False]


def test_holes_are_filled_in_each_slice_by_itself():
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    masks = np.stack([ring, ring])[None]  # a tube: open in three dimensions, a hole in each slice
    assert post_process(masks, nested(), is_picture=False).all()
    assert not post_process(masks, nested(fill_holes=False), is_picture=False)[0, :, 1, 1].any()


def row(*masks: list[int]) -> np.ndarray:
    """Structures (S, 1, 1, X) from rows of zeros and ones."""
    return np.array(masks, bool)[:, None, None]


def test_separate_structures_are_processed_apart_and_the_input_is_left_alone():
    apart = nested(structures={"white": ["white"], "grey": ["grey"]})
    masks = row([1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 1])
    before = masks.copy()
    out = post_process(masks, apart, is_picture=False)
    np.testing.assert_array_equal(out, row([1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]))
    np.testing.assert_array_equal(masks, before)
    off = post_process(masks, nested(largest_component=False, fill_holes=False), is_picture=False)
    np.testing.assert_array_equal(off, before)


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_nested_structure_stays_inside_the_one_around_it(outer_first):
    # The cord has two parts, three and two pixels wide; most grey matter is in the dropped part.
    cord, grey = [1, 1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1, 1]
    kept_cord, kept_grey = [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]
    structures = {"cord": ["white", "grey"], "grey": ["grey"]}
    if outer_first:
        out = post_process(row(cord, grey), nested(structures=structures), is_picture=False)
        np.testing.assert_array_equal(out, row(kept_cord, kept_grey))
    else:
        turned = nested(structures=dict(reversed(structures.items())))
        out = post_process(row(grey, cord), turned, is_picture=False)
        np.testing.assert_array_equal(out, row(kept_grey, kept_cord))


def test_a_filled_hole_of_the_inner_structure_stays_inside_the_outer_one():
    inner = np.ones((5, 5), bool)
    inner[2, 2] = False
    outer = (
        inner.copy()
    )  # sigmoid structures are decided apart: with largest_component alone the hole stays open
    masks = np.stack([outer, inner])[:, None]
    filled = post_process(masks, nested(), is_picture=True)
    assert filled.all()
    kept = post_process(masks, nested(fill_holes=False), is_picture=True)
    np.testing.assert_array_equal(kept, masks)


@pytest.mark.parametrize("picture", [True, False])
def test_an_empty_prediction_stays_empty(picture):
    assert not post_process(np.zeros((2, 3, 4, 4), bool), nested(), is_picture=picture).any()


def test_structure_masks_unite_the_true_classes():
    masks = structure_masks(np.array([[[0, 1, 2]]], np.uint8), nested())
    assert masks[:, 0, 0].tolist() == [[False, True, True], [False, False, True]]


def scored(prediction: np.ndarray, truth: np.ndarray, case: Case, **changes) -> dict:
    data = nested(classes={"background": [0], "a": [1]}, structures={"a": ["a"]}, **changes)
    (row,) = case_rows(
        CaseResult(case, prediction[None], truth[None], truth.astype(np.uint8)), data
    )
    return row


def test_a_score_by_hand_in_pixels_and_millimetres():
    truth, prediction = np.zeros((2, 3, 6), bool), np.zeros((2, 3, 6), bool)
    truth[:, 1, 1] = True
    prediction[:, 1, 3] = True  # the same column, two pixels to the side
    row = scored(prediction, truth, a_case((2, 3, 6), (4.0, 1.0, 0.5)))
    assert row["dice"] == 0.0
    assert (row["asd"], row["assd"], row["hd95"]) == (2.0, 2.0, 2.0)
    assert (row["asd_mm"], row["assd_mm"], row["hd95_mm"]) == (1.0, 1.0, 1.0)
    assert (row["hd95_max"], row["hd95_max_mm"]) == (2.0, 1.0)
    assert (row["unit"], row["case"], row["structure"]) == ("pixel", "alias", "a")
    nominal = scored(prediction, truth, a_case((2, 3, 6), (4.0, 1.0, 0.5)), spacing_unit="pixel")
    assert (nominal["asd"], nominal["asd_mm"]) == (2.0, None)


def test_a_single_slice_is_scored_as_a_plane():
    truth = np.zeros((1, 7, 7), bool)
    truth[0, 1:6, 1:6] = True
    prediction = np.zeros((1, 7, 7), bool)
    prediction[0, 2:5, 2:5] = True
    row = scored(prediction, truth, a_case((1, 7, 7), (9.0, 2.0, 2.0)))
    # The eight pixels of the inner ring are one pixel from the outer ring. In three dimensions the
    # inner pixels would count as surface too and the distance would be zero.
    assert row["asd"] == pytest.approx(1.0)
    assert row["asd_mm"] == pytest.approx(2.0)


def test_empty_masks_are_flagged_and_defined():
    empty, full = np.zeros((2, 3, 3), bool), np.ones((2, 3, 3), bool)
    both = scored(empty, empty, a_case((2, 3, 3)))
    assert (both["dice"], both["asd"], both["empty_prediction"], both["empty_truth"]) == (
        1.0,
        0.0,
        True,
        True,
    )
    one = scored(empty, full, a_case((2, 3, 3)))
    assert (one["dice"], one["empty_prediction"], one["empty_truth"]) == (0.0, True, False)
    assert math.isnan(one["asd"])
    assert math.isnan(one["hd95"])
    # The columns of printed tables: (0 + 1) / (0 + 18 + 1), and 100 pixels even if millimetres are
    # known.
    assert (one["dice_smooth1"], one["asd_compat"]) == (1 / 19, 100.0)
    assert (both["dice_smooth1"], both["asd_compat"]) == (1.0, 0.0)


def test_overlap_counts_and_dice_by_hand():
    labels = torch.tensor([[[0, 1, 2, 255]], [[0, 0, 0, 0]]])
    decided = torch.tensor(
        [[[[0, 1, 1, 1]], [[0, 1, 0, 1]]], [[[0, 0, 0, 0]], [[1, 0, 0, 0]]]]
    ).bool()
    counts = overlap_counts(decided, labels, {"cord": [1, 2], "grey": [2]})
    assert counts[:, 0].tolist() == [
        [2, 0],
        [2, 1],
        [2, 1],
    ]  # both, prediction, truth of the first slice
    values = dice_from_counts(counts.double())
    assert values.tolist() == [
        [1.0, 0.0],
        [1.0, 0.0],
    ]  # the second slice: both empty; only predicted


def test_bits_and_choice_of_a_picture():
    truth = np.zeros((2, 3, 2, 2), bool)
    truth[0, 1] = True
    truth[1, 1, 0, 0] = True
    image = np.zeros((3, 2, 2), np.float32)
    image[1] = [[0.0, 0.5], [1.0, 2.0]]
    classes = np.zeros((3, 2, 2), np.uint8)
    picture = choose_picture(image, classes, np.zeros_like(truth), truth, alias="a", dice=0.25)
    assert picture.z == 1
    assert list(picture.truth_mask) == [3, 1, 1, 1]
    assert list(picture.image) == [0, 128, 255, 255]
    assert (picture.height, picture.width, picture.channels) == (2, 2, 1)
    colours = np.repeat(image[..., None], 3, axis=-1)
    shown = choose_picture(colours, classes, np.zeros_like(truth), truth, alias="a", dice=0.25)
    assert (shown.height, shown.width, shown.channels) == (2, 2, 3)
    assert list(shown.image) == [value for value in (0, 128, 255, 255) for _ in range(3)]
    assert not any(picture.prediction)
    assert bit_mask(np.ones((9, 1, 1), bool))[0, 0] == 255
