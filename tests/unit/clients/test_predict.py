"""Prediction: labels of nested structures, probabilities, confidence and overlays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fedsgcg.clients.confidence import SHRINKAGE, Gaussians
from fedsgcg.clients.evaluation import post_process, structure_masks
from fedsgcg.clients.predict.overlay import chosen_slice, overlay
from fedsgcg.clients.predict.predictor import Prediction, class_map, label_values, probabilities
from fedsgcg.common.images.read import Volume
from fedsgcg.common.statistics import ClassStatistics

# labels


def nested(make_data, **changes):
    return make_data("fundus", image_size=32, **changes)


def test_nested_structures_become_the_label_of_the_innermost_one(make_data):
    data = nested(make_data, classes={"background": [7], "rim": [4, 5], "cup": [9]})
    disc = np.zeros((1, 6, 6), bool)
    disc[0, 1:5, 1:5] = True
    cup = np.zeros_like(disc)
    cup[0, 2:4, 2:4] = True
    classes = class_map(np.stack([disc, cup]), torch.zeros(1, 2, 6, 6), (6, 6), data)
    labels = label_values(data)[classes]
    assert labels.dtype == np.uint8
    assert labels[0].tolist() == [
        [7, 7, 7, 7, 7, 7],
        [7, 4, 4, 4, 4, 7],
        [7, 4, 9, 9, 4, 7],
        [7, 4, 9, 9, 4, 7],
        [7, 4, 4, 4, 4, 7],
        [7, 7, 7, 7, 7, 7],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_labels_give_back_exactly_the_structures_that_are_scored(seed, make_data):
    """With three nested structures and a separate one, the label map keeps all masks."""
    data = make_data(
        "synthetic",
        classes={"background": [0], "a": [1], "b": [2], "c": [3], "d": [4]},
        structures={
            "outer": ["a", "b", "c"],
            "inner": ["c"],
            "middle": ["b", "c"],
            "beside": ["d"],
        },
    )
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 5, (3, 9, 9)).astype(np.uint8)
    masks = post_process(
        structure_masks(classes, data), replace(data, fill_holes=False), is_picture=False
    )
    misleading = torch.tensor(
        rng.normal(size=(3, 5, 9, 9))
    )  # each structure stands for one class: nothing to choose
    drawn = class_map(masks, misleading, (9, 9), data)
    np.testing.assert_array_equal(structure_masks(drawn, data), masks)


def test_a_structure_of_several_classes_takes_the_likeliest_of_them(make_data):
    data = make_data(
        "synthetic",
        classes={"background": [0], "a": [1], "b": [2]},
        structures={"both": ["a", "b"]},
    )
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 0] = 9.0  # background is not asked: the mask has decided
    logits[0, 2, 0] = torch.tensor([1.0, -1.0, 2.0, 5.0])
    masks = np.array([[[[True, True, True, False]]]])
    assert class_map(masks, logits, (1, 4), data).tolist() == [[[2, 1, 2, 0]]]


def test_of_overlapping_structures_that_are_not_nested_the_smaller_is_drawn_on_top(make_data):
    classes = {"background": [0], "a": [1], "b": [2]}
    for structures in ({"a": ["a"], "b": ["b"]}, {"b": ["b"], "a": ["a"]}):
        data = make_data("fundus", classes=classes, structures=structures)
        large, small = np.ones((1, 1, 5), bool), np.array([[[False, True, False, False, False]]])
        masks = np.stack([large if name == "a" else small for name in structures])
        assert class_map(masks, torch.zeros(1, 2, 1, 5), (1, 5), data).tolist() == [
            [[1, 2, 1, 1, 1]]
        ]


def test_label_values_get_the_smallest_type_that_holds_them(make_data):
    def kind(*values):
        classes = {str(value): [value] for value in values}
        return label_values(make_data(classes=classes, structures={"one": [str(values[1])]})).dtype

    assert (kind(0, 255), kind(0, 256), kind(-1, 1), kind(0, 40000)) == (
        "uint8",
        "int16",
        "int16",
        "int32",
    )


# probability


def test_probabilities_of_structures(make_data):
    logits = torch.tensor([[[[1.0]], [[2.0]], [[0.5]]]])
    shares = np.exp([1.0, 2.0, 0.5]) / np.exp([1.0, 2.0, 0.5]).sum()
    found = probabilities(logits, (2, 2), make_data("spinegm"))
    assert found.shape == (2, 1, 2, 2)
    np.testing.assert_allclose(found[0], shares[1] + shares[2], rtol=1e-6)
    np.testing.assert_allclose(found[1], shares[2], rtol=1e-6)
    sigmoid = probabilities(logits[:, :2], (1, 1), make_data("fundus"))
    np.testing.assert_allclose(sigmoid.reshape(-1), 1 / (1 + np.exp([-1.0, -2.0])), rtol=1e-6)


# confidence


def test_distances_follow_the_documented_formula():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 3))
    labels = rng.integers(0, 2, 400)
    statistics = ClassStatistics.from_features(features, labels, 2)
    queries = rng.normal(size=(1, 3, 2, 2)).astype(np.float32)
    gaussians = Gaussians.of(statistics, torch.device("cpu"))
    found = gaussians.squared_distance(torch.tensor(queries), normalize=False).numpy()
    for k in range(2):
        covariance = statistics.covariance[k]
        shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / 3 * np.eye(3)
        for y in range(2):
            for x in range(2):
                away = queries[0, :, y, x] - statistics.mean[k]
                assert found[0, k, y, x] == pytest.approx(
                    away @ np.linalg.inv(shrunk) @ away, rel=1e-4
                )
    assert gaussians.confidence(torch.tensor(3.0)).item() == pytest.approx(0.5), "d^2 = A"
    assert gaussians.confidence(torch.tensor(0.0)).item() == 1


def test_features_of_unit_length_are_compared_at_unit_length():
    statistics = ClassStatistics.from_features(np.eye(3)[[0, 1, 2, 0, 1, 2]], np.zeros(6, int), 1)
    gaussians = Gaussians.of(statistics, torch.device("cpu"))
    query = torch.tensor([3.0, 4.0, 0.0]).reshape(1, 3, 1, 1)
    once = gaussians.squared_distance(query, normalize=True)
    assert torch.equal(once, gaussians.squared_distance(7 * query, normalize=True))
    torch.testing.assert_close(once, gaussians.squared_distance(query / 5, normalize=False))


def test_a_singular_covariance_and_a_class_nobody_has_seen_stay_usable():
    features = np.zeros((10, 4))
    features[:, 0] = np.arange(10)  # one direction alone
    labels = np.array([0] * 8 + [1] * 2)
    features[labels == 1] = 2.0  # a class whose pixels are all equal
    gaussians = Gaussians.of(
        ClassStatistics.from_features(features, labels, 3), torch.device("cpu")
    )
    found = gaussians.squared_distance(torch.full((1, 4, 1, 1), 2.0), normalize=False).reshape(-1)
    assert torch.isfinite(found[:2]).all()
    assert found[1] == 0
    assert torch.isinf(found[2])
    assert gaussians.confidence(found[2]).item() == 0


# overlays


def test_the_slice_that_is_shown():
    masks = np.zeros((1, 5, 4, 4), bool)
    assert chosen_slice(masks, None)[0] == 2
    masks[0, 1:4, 0, 0] = True
    assert chosen_slice(masks, None)[0] == 2
    truth = masks.copy()
    assert chosen_slice(masks, truth)[0] == 2
    truth[0, 3, :2] = True
    assert chosen_slice(masks, truth)[0] == 3


def test_an_overlay_shows_image_prediction_truth_and_confidence(tmp_path):
    masks = np.zeros((2, 1, 40, 30), bool)
    masks[0, 0, 5:20, 5:20] = True
    volume = Volume(np.zeros((1, 40, 30), np.float32), np.eye(4), (1.0, 1.0, 1.0), is_picture=True)
    display = np.full((1, 40, 30), 90, np.uint8)
    one = Prediction(volume, display, masks, masks[0].astype(np.uint8), masks[0].astype(np.uint8))
    plain = overlay(one, ["disc", "cup"], "x")
    (tmp_path / "plain.png").write_bytes(plain)
    picture = np.asarray(Image.open(tmp_path / "plain.png").convert("RGB")).astype(int)
    assert (abs(picture - [0x56, 0xB4, 0xE9]).sum(2) < 30).sum() > 100, (
        "the first structure's colour"
    )
    assert (abs(picture - [0xD5, 0x5E, 0x00]).sum(2) < 30).sum() == 0, "no truth, no truth's colour"
    (tmp_path / "both.png").write_bytes(
        overlay(
            replace(one, confidence=np.full((1, 40, 30), 0.5, np.float32)),
            ["disc", "cup"],
            "x",
            masks,
        )
    )
    wide = np.asarray(Image.open(tmp_path / "both.png").convert("RGB")).astype(int)
    assert wide.shape[1] == 2 * picture.shape[1]
    assert (abs(wide - [0xD5, 0x5E, 0x00]).sum(2) < 30).sum() > 100
