"""Stacks of slices as channels: 1, 3 or 5, in training, prediction and networks by import path."""

import json

import numpy as np
import pytest
from PIL import Image

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.slices import STEPS
from fedsgcg.clients.data.store import SliceTable, open_store
from fedsgcg.clients.predict.model import load_model
from fedsgcg.clients.predict.predictor import Predictor
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small
from tests.support.predictions import code_of


def table_of(stack, depth):
    """Return a table of a volume whose slice z has the value z everywhere."""
    from types import SimpleNamespace

    image = np.broadcast_to(np.arange(depth, dtype=np.int16)[:, None, None, None], (depth, 1, 4, 4))
    stored = SimpleNamespace(image=image, label=np.zeros((depth, 4, 4), np.uint8))
    none = np.zeros(depth, np.int64)
    return SliceTable(none, np.arange(depth), none.astype(bool), stack, (stored,))


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
@pytest.mark.parametrize("stack", [1, 3, 5])
def test_the_channels_are_the_neighbours_and_the_outer_slice_again(stack, depth):
    images, _ = table_of(stack, depth).stack(range(depth))
    found = np.rint(images[:, :, 0, 0] * STEPS).astype(int).tolist()
    reach = stack // 2 or 0
    offsets = range(-reach, reach + 1) if reach else (0, 0, 0)
    last = depth - 1
    assert found == [[min(max(z + k, 0), last) for k in offsets] for z in range(depth)]


def test_a_picture_has_no_neighbouring_slices(tmp_path, make_data):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    (tmp_path / "A").mkdir()
    Image.fromarray(pixels).save(tmp_path / "A/a_image.png")
    Image.fromarray((pixels[:, :, 0] > 99).astype(np.uint8)).save(tmp_path / "A/a_mask.png")
    data = make_data(image_size=32, stack=5)
    site = open_site(tmp_path, "A", data)
    assert code_of(open_store, site, data, tmp_path / "cache", heldout=True) == "DAT-130"


def test_another_number_of_slices_is_refused(make_data):
    assert code_of(make_data, stack=4) == "CFG-001"


@pytest.mark.slow
def test_a_model_of_five_slices_trains_predicts_and_says_so(tmp_path):
    write_hospitals(tmp_path / "data", cases_per_site=3, shape=(6, 40, 40), seed=3)
    options = ("runtime=inprocess", "device=cpu", "federation.rounds=2", "data.stack=5")
    (cell,) = small.plan(
        tmp_path / "data", tmp_path / "run", "method=ram_sgcg", "heldout=West", *options
    ).cells
    run_cell_in_process(cell.tree)
    card = json.loads((cell.folder / "model.json").read_text())
    assert card["network"]["in_channels"] == card["input"]["channels"] == 5
    assert card["input"]["channel_meaning"]["volume"] == "slices z-2, z-1, z, z+1, z+2"
    model = load_model(cell.folder)
    image = next((tmp_path / "data/West").glob("*_image.nii.gz"))
    predicted = Predictor(model, "cpu", 4, False, None).predict(image)
    assert predicted.classes.shape == predicted.volume.array.shape
    card["network"]["in_channels"] = 3
    (cell.folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(FedsgcgError) as caught:
        load_model(cell.folder)
    assert caught.value.code == "MOD-804"
