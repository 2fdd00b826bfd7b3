"""Prediction: labels of nested structures, confidence, geometry of results, files and models."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load, save

import fedsgcg.common.run_folder
import fedsgcg.server.records.model_card
import fedsgcg.server.records.results
from fedsgcg.clients.evaluation import post_process, structure_masks
from fedsgcg.clients.predict import model as models
from fedsgcg.clients.predict.confidence import SHRINKAGE, Gaussians
from fedsgcg.clients.predict.files import Job, check_output, jobs_of_images
from fedsgcg.clients.predict.model import Model, load_model
from fedsgcg.clients.predict.overlay import chosen_slice, overlay
from fedsgcg.clients.predict.predictor import (
    Prediction,
    Predictor,
    class_map,
    label_values,
    probabilities,
)
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.images.read import Volume, affine_as, read_volume, write_volume
from fedsgcg.common.images.write import mask_bytes, wide_bytes, write_like
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.deploy.cli.site import main
from fedsgcg.server.records.checkpoint import Best


def code_of(call, *arguments, **keywords):
    with pytest.raises(FedsgcgError) as caught:
        call(*arguments, **keywords)
    return caught.value.code


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


# geometry


@pytest.mark.parametrize(
    "codes", [("L", "P", "S"), ("R", "A", "S"), ("P", "S", "L"), ("I", "R", "A")]
)
def test_what_is_written_lies_where_its_image_lies(codes, tmp_path):
    rng = np.random.default_rng(1)
    array = rng.integers(0, 100, (3, 4, 5)).astype(np.int16)
    canonical = np.diag([-0.7, -0.8, 3.0, 1.0])
    canonical[:3, 3] = 11, -7, 5
    source = tmp_path / "image.nii.gz"
    write_volume(source, array, affine_as(codes, canonical, array.shape))
    stored = nib.load(source)
    stored.header.set_qform(stored.affine, 1)
    stored.header.set_sform(stored.affine, 4)
    stored.header["scl_slope"], stored.header["descrip"] = 1.0, b"T2"
    nib.save(nib.Nifti1Image(np.asarray(stored.dataobj), None, stored.header), source)
    volume = read_volume(source)
    labels = (volume.array > 50).astype(np.uint8)
    write_like(tmp_path / "mask.nii.gz", labels, volume)
    written, image = nib.load(tmp_path / "mask.nii.gz"), nib.load(source)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(image.dataobj) > 50)
    np.testing.assert_array_equal(written.affine, image.affine)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 4)
    assert written.header.get_xyzt_units() == image.header.get_xyzt_units()
    assert written.get_data_dtype() == np.uint8
    maps = np.stack([volume.array / 100, volume.array / 200]).astype(np.float32)
    write_like(tmp_path / "p.nii", maps, volume)
    both = nib.load(tmp_path / "p.nii")
    assert both.shape == (*image.shape, 2)
    np.testing.assert_allclose(both.get_fdata()[..., 1], image.get_fdata() / 200, rtol=1e-6)
    once = (tmp_path / "mask.nii.gz").read_bytes()
    write_like(tmp_path / "mask.nii.gz", labels, volume)
    assert (tmp_path / "mask.nii.gz").read_bytes() == once


def test_masks_of_pictures_keep_their_values(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "m.png").write_bytes(mask_bytes(labels))
    np.testing.assert_array_equal(read_volume(tmp_path / "m.png", mask=True).array[0], labels)
    (tmp_path / "w.png").write_bytes(wide_bytes(labels.astype(np.int32) * 100))
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "w.png")), labels.astype(int) * 100
    )


# files


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return paths


def test_a_folder_gives_its_images_and_passes_over_masks_and_results(tmp_path):
    touch(
        *(
            tmp_path / name
            for name in (
                "a_image.nii.gz",
                "a_mask.nii.gz",
                "b.png",
                "sub/c.nii",
                "sub/c_Segmentation.nii",
                "b_overlay.png",
                "b_probability_cup.png",
                "a_confidence.nii.gz",
                ".hidden.png",
                "note.txt",
            )
        )
    )
    jobs, skipped = jobs_of_images([tmp_path])
    assert [(job.name, job.suffix) for job in jobs] == [
        ("a", ".nii.gz"),
        ("b", ".png"),
        ("sub/c", ".nii"),
    ]
    assert skipped.texts() == [
        "5 files named like masks or results: "
        "a_confidence.nii.gz, a_mask.nii.gz, b_overlay.png, ...",
        "1 hidden files named like images: .hidden.png",
    ]


def test_images_of_one_name_get_results_of_their_own(tmp_path):
    paths = touch(
        tmp_path / "p1/t2.nii.gz",
        tmp_path / "p2/t2.nii.gz",
        tmp_path / "p1/t2.png",
        tmp_path / "o.png",
    )
    jobs, _ = jobs_of_images(paths)
    there = tmp_path.name
    assert [job.name for job in jobs] == [f"{there}_p1_t2", "p2_t2", f"{there}_p1_t2_2", "o"]
    deep, _ = jobs_of_images(touch(tmp_path / "p1/anat/t2.nii", tmp_path / "p2/anat/t2.nii"))
    assert [job.name for job in deep] == ["p1_anat_t2", "p2_anat_t2"]
    assert code_of(jobs_of_images, [tmp_path / "gone.nii"]) == "MOD-809"
    (tmp_path / "empty").mkdir()
    assert code_of(jobs_of_images, [tmp_path / "empty"]) == "MOD-809"


def test_nothing_is_written_over_unless_asked_and_never_an_input(tmp_path):
    image, mask = touch(tmp_path / "x.nii.gz", tmp_path / "x_mask.nii.gz")
    job = Job(image, "x")
    assert code_of(check_output, tmp_path, [job], ["_mask"], overwrite=False) == "MOD-808"
    check_output(tmp_path, [job], ["_mask"], overwrite=True)
    touch(tmp_path / "[eye]_probability_cup.png")
    eye = Job(tmp_path / "[eye].png", "[eye]")
    assert code_of(check_output, tmp_path, [eye], ["_probability"], overwrite=False) == "MOD-808"
    check_output(tmp_path, [eye], ["_mask"], overwrite=False)
    own = replace(job, mask=mask)
    assert code_of(check_output, tmp_path, [own], ["_mask"], overwrite=True) == "MOD-808"
    (tmp_path / "file").write_bytes(b"")
    assert (
        code_of(check_output, tmp_path / "file/sub", [job], ["_mask"], overwrite=True) == "MOD-808"
    )


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


# models


def store(folder, *overrides):
    """Write a model folder as the coordinator does, with random weights and prototypes."""
    plan = Plan.from_tree(
        compose(["network.base_width=4", "data.image_size=32", f"output={folder}", *overrides])
    )
    folder.mkdir()
    state = build_network(plan.network, 3, 2, 5).state_dict()
    weights = Weights.from_state({name: tensor.numpy() for name, tensor in state.items()})
    card = fedsgcg.server.records.model_card.model_card(
        plan, Best(1, 0.5, weights), ["A"], prototypes=True
    )
    fedsgcg.server.records.results.write_model(Disk(), plan, weights, card)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, plan.network.num_features))
    statistics = ClassStatistics.from_features(features, rng.integers(0, 2, 50), 2)
    fedsgcg.server.records.results.write_prototypes(
        Disk(), plan, statistics, Identity("run", "", 1, plan.digest())
    )
    return folder


@pytest.fixture
def stored(tmp_path):
    """A small model of volumes."""
    return store(tmp_path / "m")


def change(folder, **fields):
    card = json.loads((folder / "model.json").read_text())
    for name, value in fields.items():
        keys = name.split("__")
        place = card
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
    (folder / "model.json").write_text(json.dumps(card))


def test_a_model_is_read_from_its_folder_or_any_of_its_files(stored):
    for path in (stored, stored / "model.json", stored / "model.safetensors"):
        model = load_model(path)
        assert isinstance(model, Model)
        assert model.normalize
        assert model.prototypes.mean.shape == (2, 8)
        assert (model.data.image_size, list(model.data.structures)) == (32, ["gland"])
    assert fedsgcg.common.run_folder.SCHEMA_VERSION == models.VERSION
    change(stored, normalize=False)
    assert not load_model(stored).normalize


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("MOD-802", {"schema_version": "2"}),
        ("MOD-801", {"schema_version": None}),
        ("MOD-801", {"labels": {}}),
        ("MOD-805", {"labels": {"background": [0], "cup": [1]}}),
        ("MOD-805", {"structures": {"gland": ["cup"]}}),
        ("MOD-805", {"preprocessing__stack": 2}),
        ("MOD-805", {"preprocessing__image_size": "large"}),
        ("MOD-804", {"network__out_channels": 3}),
        ("MOD-804", {"network__in_channels": 1}),
        (
            "MOD-804",
            {
                "labels": {"background": [0], "gland": [1], "x": [2]},
                "classes": ["background", "gland", "x"],
            },
        ),
        ("MOD-804", {"network__base_width": 8}),
        ("MOD-802", {"network__depth": 8}),
        ("MOD-803", {"digest": "0" * 64}),
        ("MOD-801", {"weights": "gone.safetensors"}),
        ("MOD-807", {"plan": "0" * 64}),
    ],
)
def test_a_model_whose_parts_do_not_belong_together_is_refused(code, fields, stored):
    change(stored, **fields)
    assert code_of(load_model, stored) == code


def test_damaged_and_missing_files_of_a_model_are_refused(stored, tmp_path):
    assert code_of(load_model, tmp_path / "nowhere") == "MOD-801"
    weights = (stored / "model.safetensors").read_bytes()
    state = load(weights)
    name = "decoder.head.weight"
    (stored / "model.safetensors").write_bytes(save({**state, name: state[name] + 1}))
    assert code_of(load_model, stored) == "MOD-803", "one weight changed"
    (stored / "model.safetensors").write_bytes(weights[:100])
    assert code_of(load_model, stored) == "MOD-801"
    (stored / "model.safetensors").write_bytes(weights)
    (stored / "prototypes.arrow").write_bytes(b"no Arrow")
    assert code_of(load_model, stored) == "MOD-807"
    (stored / "prototypes.arrow").unlink()
    assert load_model(stored).prototypes is None
    (stored / "model.json").write_text("{")
    assert code_of(load_model, stored) == "MOD-801"


def test_a_picture_for_a_model_of_volumes_is_refused_and_a_volume_is_not(stored, tmp_path):
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(tmp_path / "p.png")
    predictor = Predictor(load_model(stored), torch.device("cpu"), 4)
    assert code_of(predictor.predict, tmp_path / "p.png") == "MOD-806"
    write_volume(
        tmp_path / "v.nii.gz", np.arange(3 * 20 * 24).reshape(3, 20, 24).astype(np.int16), np.eye(4)
    )
    found = predictor.predict(tmp_path / "v.nii.gz")
    assert found.labels.shape == found.volume.array.shape
    assert (found.probability, found.confidence) == (None, None)


@pytest.mark.parametrize("stack", [1, 3])
def test_a_model_predicts_the_kinds_it_was_trained_on_whatever_its_stack(tmp_path, stack):
    """Pictures ignore `data.stack`: the default of 3 must not make a model of pictures useless."""
    folder = store(tmp_path / "m", f"data.stack={stack}")
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(tmp_path / "p.png")
    write_volume(
        tmp_path / "v.nii.gz", np.arange(3 * 20 * 24).reshape(3, 20, 24).astype(np.int16), np.eye(4)
    )
    nib.save(
        nib.Nifti1Image(
            np.arange(480).reshape(4, 10, 12).astype(np.int16), np.diag([4.0, 1, 1, 1])
        ),
        tmp_path / "s.nii",
    )
    images = {"picture": "p.png", "axial volume": "v.nii.gz", "sagittal volume": "s.nii"}
    card = json.loads((folder / "model.json").read_text())
    for kind, own in images.items():
        (folder / "model.json").write_text(json.dumps(card | {"kinds": [kind]}))
        predictor = Predictor(load_model(folder), torch.device("cpu"), 4)
        found = predictor.predict(tmp_path / own)
        assert found.labels.shape == (
            found.volume.array.shape if kind != "picture" else (1, 32, 32)
        )
        for other in set(images.values()) - {own}:
            assert code_of(predictor.predict, tmp_path / other) == "MOD-806"
    del card["kinds"]  # a model from before
    (folder / "model.json").write_text(json.dumps(card))
    assert ("picture" in load_model(folder).kinds) == (stack == 1)
    assert "sagittal volume" in load_model(folder).kinds


def test_predictions_do_not_depend_on_the_batch(stored, tmp_path):
    rng = np.random.default_rng(0)
    write_volume(
        tmp_path / "v.nii.gz", rng.integers(0, 99, (7, 30, 34)).astype(np.int16), np.eye(4)
    )
    model, device = load_model(stored), torch.device("cpu")
    gaussians = Gaussians.of(model.prototypes, device)
    one, many = (
        Predictor(model, device, n, True, gaussians).predict(tmp_path / "v.nii.gz") for n in (1, 16)
    )
    np.testing.assert_allclose(one.probability, many.probability, atol=1e-5)
    np.testing.assert_allclose(one.confidence, many.confidence, atol=1e-4)
    assert ((one.confidence >= 0) & (one.confidence <= 1)).all()
    np.testing.assert_array_equal(one.labels, one.classes)


@pytest.mark.parametrize("features", ["projection", "bottleneck"])
def test_confidence_works_with_every_representation(features, tmp_path):
    model = load_model(
        store(tmp_path / "m", f"network.features={features}", "network.projection=6")
    )
    write_volume(
        tmp_path / "v.nii.gz", np.arange(3 * 20 * 24).reshape(3, 20, 24).astype(np.int16), np.eye(4)
    )
    gaussians = Gaussians.of(model.prototypes, torch.device("cpu"))
    found = Predictor(model, torch.device("cpu"), 4, False, gaussians).predict(
        tmp_path / "v.nii.gz"
    )
    assert found.confidence.shape == found.labels.shape
    assert (found.confidence > 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.png", "--batch", "0"], "--batch"),
        (["x.png", "--site", "A"], "--data"),
        ([], "MOD-809"),
        (["gone.png"], "MOD-809"),
        (["--data", "gone"], "DAT-101"),
    ],
)
def test_calls_that_cannot_work_are_refused_with_words(
    arguments, words, stored, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(stored), *arguments, "-o", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_confidence_without_prototypes_is_refused_before_any_work(stored, tmp_path, capsys):
    (stored / "prototypes.arrow").unlink()
    write_volume(
        tmp_path / "v.nii.gz", np.arange(3 * 20 * 24).reshape(3, 20, 24).astype(np.int16), np.eye(4)
    )
    call = ["predict", str(stored), str(tmp_path / "v.nii.gz"), "-o", str(tmp_path / "out")]
    assert main([*call, "--confidence"]) == 2
    assert "MOD-807" in capsys.readouterr().err
    assert main(call) == 0


# what real folders hold


def nifti():
    """Bytes of a small volume with a header of its own."""
    array = np.random.default_rng(0).normal(100, 20, (20, 24, 3)).astype(np.float32)
    image = nib.Nifti1Image(array, np.diag([-0.8, -0.8, 3, 1]))
    image.header["descrip"] = b"scanner"
    return image.to_bytes()


def predicted(stored, folder, out, *more):
    return main(
        [
            "predict",
            str(stored),
            str(folder),
            "-o",
            str(out),
            "--device",
            "cpu",
            "--threads",
            "1",
            *more,
        ]
    )


def test_files_whose_names_lie_about_gzip_are_predicted_like_the_others(stored, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    packed = gzip.compress(nifti())
    for name, content in {
        "a.nii.gz": packed,
        "b.nii.gz": nifti(),
        "c.nii": packed,
        "D.Nii.Gz": nifti(),
    }.items():
        (folder / name).write_bytes(content)
    (folder / "e.nii.gz").write_bytes(packed[:100])
    assert predicted(stored, folder, out, "--probability") == 3
    told = capsys.readouterr().out
    assert "4 of 5 images predicted" in told
    assert "[DAT-103]" in told
    masks = [
        nib.load(out / name)
        for name in ("a_mask.nii.gz", "b_mask.nii.gz", "c_mask.nii", "D_mask.nii.gz")
    ]
    for mask in masks:
        np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(masks[0].dataobj))
        assert mask.header["descrip"].item() == b"scanner"
        assert mask.shape == (20, 24, 3)


def test_whatever_one_image_does_the_others_are_predicted(stored, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.nii", "b.nii", "c.nii"):
        (folder / name).write_bytes(nifti())
    real = Predictor.predict

    def odd(self, path):
        if path.name == "b.nii":
            raise KeyError("a bug of a library")
        return real(self, path)

    monkeypatch.setattr(Predictor, "predict", odd)
    assert predicted(stored, folder, out) == 3
    assert sorted(path.name for path in out.iterdir()) == ["a_mask.nii", "c_mask.nii"]
    told = capsys.readouterr().out
    assert "[MOD-810]" in told
    assert "KeyError: 'a bug of a library'" in told
    assert "b.nii" in told


def test_an_image_that_is_called_image_writes_inside_the_folder(stored, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "deep" / "masks"
    folder.mkdir()
    for name in ("_image.nii", "__image.nii.gz"):
        (folder / name).write_bytes(nifti())
    for image in folder.iterdir():
        assert predicted(stored, image, out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["__mask.nii.gz", "_image_mask.nii"]
    assert [path.name for path in out.parent.iterdir()] == ["masks"]


def test_results_outside_the_folder_are_refused(tmp_path):
    job = Job(tmp_path / "x.nii", "../x")
    assert code_of(check_output, tmp_path / "out", [job], ["_mask"], overwrite=True) == "MOD-808"
    assert not (tmp_path / "out").exists()


def test_names_without_utf8_and_names_that_are_too_long(stored, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in (os.fsdecode(b"M\xfcller.nii"), "x" * 249 + ".nii"):
        (folder / name).write_bytes(nifti())
    assert predicted(stored, folder, out) == 3
    told = capsys.readouterr().out
    assert "M%FCller.nii" in told
    assert "Shorten the name" in told
    assert [os.fsencode(path.name) for path in out.iterdir()] == [b"M\xfcller_mask.nii"]


def test_a_linked_patient_is_predicted_and_other_formats_are_counted(tmp_path):
    touch(
        tmp_path / "data/a.nii",
        tmp_path / "data/b.mha",
        tmp_path / "data/._a.nii",
        tmp_path / "elsewhere/P2/c.nii",
    )
    (tmp_path / "data/P2").symlink_to(tmp_path / "elsewhere/P2")
    jobs, skipped = jobs_of_images([tmp_path / "data"])
    assert [job.name for job in jobs] == ["P2/c", "a"]
    first, second = skipped.texts()
    assert first.startswith(
        "1 files in unsupported formats (.mha 1): b.mha. Convert it with SimpleITK"
    )
    assert second == "1 hidden files named like images: ._a.nii"
    (tmp_path / "only").mkdir()
    touch(tmp_path / "only/x.dcm")
    with pytest.raises(FedsgcgError, match="dcm2niix"):
        jobs_of_images([tmp_path / "only"])
