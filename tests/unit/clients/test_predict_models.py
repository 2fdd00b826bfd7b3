"""Models of a prediction: what is read and refused, and results that depend on nothing else."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load, save

import fedsgcg.common.run_folder.tables
from fedsgcg.clients.confidence import Gaussians
from fedsgcg.clients.predict import model as models
from fedsgcg.clients.predict.adapt import check_adapt
from fedsgcg.clients.predict.model import Model, load_model
from fedsgcg.clients.predict.predictor import Predictor
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.read import write_volume
from fedsgcg.common.wire.payload import decode_statistics, encode_statistics
from fedsgcg.deploy.cli.site import main
from tests.support.predictions import code_of, store, write_card


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
    assert fedsgcg.common.run_folder.tables.SCHEMA_VERSION == models.VERSION
    card = json.loads((stored / "model.json").read_text())
    write_card(stored, card | {"normalize": False})
    assert not load_model(stored).normalize


@pytest.mark.parametrize("field", ["labels", "structures", "normalize", "preprocessing"])
@pytest.mark.attack("swapped-card")
def test_a_card_that_was_edited_is_refused(tmp_path, field):
    """Attack: swapped labels, or another preprocessing, in the `model.json` of a real model."""
    folder = store(tmp_path / "m", "data.structures={one: [gland], two: [gland]}")
    card = json.loads((folder / "model.json").read_text())
    swapped = {
        "labels": {name: card["labels"][name][::-1] for name in card["labels"]}
        | {"background": [1], "gland": [0]},
        "structures": {"two": ["gland"], "one": ["gland"]},
        "normalize": not card["normalize"],
        "preprocessing": card["preprocessing"]
        | {"fill_holes": not card["preprocessing"]["fill_holes"]},
    }
    (folder / "model.json").write_text(json.dumps(card | {field: swapped[field]}))
    assert code_of(load_model, folder) == "MOD-811"


@pytest.mark.attack("swapped-card")
def test_the_card_or_prototypes_of_another_run_are_refused(tmp_path):
    """Attack: another run's prototypes, of the same shape and the same plan."""
    one, two = store(tmp_path / "one"), store(tmp_path / "two", "federation.rounds=7")
    load_model(one)
    mine = (one / "prototypes.arrow").read_bytes()
    statistics, identity = decode_statistics(mine)
    moved = replace(statistics, mean=statistics.mean + 1)
    (one / "prototypes.arrow").write_bytes(encode_statistics(moved, identity))
    assert code_of(load_model, one) == "MOD-807"
    (one / "prototypes.arrow").write_bytes(mine)
    (one / "model.json").write_bytes((two / "model.json").read_bytes())
    assert code_of(load_model, one) in ("MOD-811", "MOD-803", "MOD-807")


def test_a_model_of_before_has_no_such_hashes_and_is_read(stored):
    card = json.loads((stored / "model.json").read_text())
    del card["prototypes_sha256"]
    write_card(stored, card)
    path = stored / "model.safetensors"
    path.write_bytes(save(load(path.read_bytes())))
    assert load_model(stored).prototypes is not None


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
        write_card(folder, card | {"kinds": [kind]})
        predictor = Predictor(load_model(folder), torch.device("cpu"), 4)
        found = predictor.predict(tmp_path / own)
        assert found.labels.shape == (
            found.volume.array.shape if kind != "picture" else (1, 32, 32)
        )
        for other in set(images.values()) - {own}:
            assert code_of(predictor.predict, tmp_path / other) == "MOD-806"
    del card["kinds"]  # a model from before
    write_card(folder, card)
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


def test_the_folder_of_a_study_is_answered_with_the_folders_of_its_models(tmp_path):
    cells = [tmp_path / "run" / "sgcg" / site / "0" for site in ("North", "South")]
    for cell in cells:
        cell.parent.mkdir(parents=True)
        store(cell)
    with pytest.raises(FedsgcgError, match="the folder of a study") as caught:
        load_model(tmp_path / "run")
    assert f"for example {cells[0]} (one of 2)" in caught.value.problems[0].action
    with pytest.raises(FedsgcgError, match="no such file or folder") as caught:
        load_model(cells[0].with_name("1"))
    assert caught.value.problems[0].where == str(cells[0].with_name("1"))


def test_the_code_that_a_model_may_run_is_compared_as_a_whole(stored, monkeypatch):
    """A text as `code` is one path: `in` alone would find `lab:Net` inside `lab:Network`."""
    change(stored, network__name="lab:Net", network__feature_channels=8)
    with pytest.raises(FedsgcgError, match="POL-706"):
        fedsgcg.load_model(stored, code="lab:Network")
    with pytest.raises(FedsgcgError, match="CFG-011"):
        fedsgcg.load_model(stored, code="lab:Net")


def test_amplitudes_that_hospitals_share_within_a_federation_are_no_part_of_a_model(stored):
    options = argparse.Namespace(adapt="amplitude", adapt_share=0.5, model=stored)
    with pytest.raises(FedsgcgError) as caught:
        check_adapt(options, load_model(stored))
    (problem,) = caught.value.problems
    assert problem.code == "MOD-820"
    assert "adapt.by=[amplitude]" in problem.action
