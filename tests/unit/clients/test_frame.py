"""The place of a slice on the training slice keeps its shape, and the way back its place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.clients.data.frame import frame_of
from fedsgcg.clients.data.slices import to_slices
from fedsgcg.clients.evaluation import structures_from_logits
from fedsgcg.clients.predict.predictor import as_trained
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.read import Volume
from fedsgcg.common.settings.data import DataSettings

sides = st.integers(1, 400)


def settings(**more) -> DataSettings:
    values = {
        "name": "t",
        "root": "",
        "classes": {"background": [0], "disc": [1]},
        "structures": {"disc": ["disc"]},
        "sites": [],
        "image_size": 64,
    }
    return DataSettings(**(values | more))


def picture(height: int, width: int, channels: int = 1) -> Volume:
    values = np.random.default_rng(0).integers(0, 256, (channels, height, width))
    return Volume(values.astype(np.float32), np.eye(4), (1.0, 1.0, 1.0), True, True)


def disc(height: int, width: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(y + 0.5 - height / 2, x + 0.5 - width / 2) < radius
    return inside.astype(np.uint8)[None]


@given(sides, sides)
def test_a_padded_slice_keeps_its_shape_within_a_pixel_and_touches_two_edges(height, width):
    frame = frame_of((height, width), settings(aspect="pad"))
    assert max(frame.size) == 64
    scale = 64 / max(height, width)
    assert abs(frame.height - height * scale) <= 0.5 or frame.height == 1
    assert abs(frame.width - width * scale) <= 0.5 or frame.width == 1


@given(sides, sides)
def test_what_is_put_into_the_frame_is_what_is_cut_from_it(height, width):
    frame = frame_of((height, width), settings(aspect="pad"))
    inside = np.random.default_rng(0).random((2, *frame.size))
    square = frame.put(inside, -1)
    assert square.shape == (2, 64, 64)
    np.testing.assert_array_equal(frame.cut(torch.from_numpy(square)).numpy(), inside)
    assert (square == -1).sum() == square.size - inside.size


@pytest.mark.parametrize(
    ("native", "steps", "spacing", "expected"),
    [
        ((100, 80), (9.0, 0.5, 0.75), 1.0, (50, 60)),
        ((100, 80), (9.0, 0.5, 0.5), 0.5, (64, 51)),  # 100 x 80 pixels do not fit: 64 x 51.2
        ((10, 10), (9.0, 1.0, 1.0), 0.5, (20, 20)),  # a small slice is not made larger
    ],
)
def test_all_slices_have_pixels_of_the_planned_size_or_fit_by_hand(
    native, steps, spacing, expected
):
    assert frame_of(native, settings(spacing=spacing), steps).size == expected


def test_without_millimetres_a_spacing_is_refused_and_the_shape_counts_in_pixels():
    with pytest.raises(FedsgcgError) as caught:
        frame_of((10, 10), settings(spacing=1.0), None)
    assert caught.value.code == "DAT-190"
    nominal = settings(aspect="pad", spacing_unit="pixel")
    assert frame_of((40, 20), nominal, (1.0, 1.0, 9.0)).size == (64, 32)


def test_a_disc_stays_round_when_padded_and_not_when_squeezed():
    truth = disc(60, 120, 20)
    for aspect, expected in (("pad", (21, 21)), ("squeeze", (43, 21))):
        slices = to_slices(picture(60, 120), truth, settings(aspect=aspect))
        rows, columns = np.nonzero(slices.label[0])
        assert np.ptp(rows) + 1 == pytest.approx(expected[0], abs=1), aspect
        assert np.ptp(columns) + 1 == pytest.approx(expected[1], abs=1), aspect
        margin = slices.image[0, 0, :15] == -32767
        assert margin.all() == (aspect == "pad"), "the margin is as dark as the darkest pixels"


@given(st.sampled_from(["pad", "squeeze"]), st.integers(40, 150), st.integers(40, 150))
def test_a_mask_comes_back_to_its_place_at_native_size(aspect, height, width):
    data = settings(aspect=aspect)
    truth = disc(height, width, 15)
    label = to_slices(picture(height, width), truth, data).label.astype(np.int64)
    logits = 40 * torch.nn.functional.one_hot(torch.from_numpy(label), 2).movedim(-1, 1).float()
    found = structures_from_logits(logits, (height, width), data)[0]
    assert 2 * (found & (truth > 0)).sum() / (found.sum() + truth.sum()) > 0.9
    centre = np.argwhere(found[0]).mean(axis=0)
    assert np.abs(centre + 0.5 - np.array([height, width]) / 2).max() < 0.5


def test_colours_are_converted_for_a_model_of_grey_pictures_by_the_stated_weights():
    image = picture(2, 2, channels=3)
    grey, note = as_trained(image, colour=False)
    expected = 0.299 * image.array[0] + 0.587 * image.array[1] + 0.114 * image.array[2]
    np.testing.assert_allclose(grey.array, expected[None], rtol=1e-6)
    assert "BT.601" in note
    for kept, colour in ((image, True), (image, None), (picture(2, 2), False)):
        assert as_trained(kept, colour=colour) == (kept, "")
    same, note = as_trained(picture(2, 2), colour=True)
    assert same.array.shape == (1, 2, 2)
    assert "red, green and blue" in note
