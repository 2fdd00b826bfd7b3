"""`augmentation=strong`: each change against a loop or its definition, and what all keep."""

from dataclasses import replace
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import interpolate, ndimage

from fedsgcg.clients.data.augment import augment
from fedsgcg.clients.data.draws import Draw
from fedsgcg.clients.data.intensity import (
    CHANGES,
    change_intensities,
    into_range,
    low_resolution,
    raised,
)
from fedsgcg.clients.data.smooth import gaussian_blur, spline_field
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.augmentation import PROBABILITIES, IntensitySettings
from fedsgcg.common.settings.build import build
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.data import AugmentationSettings
from fedsgcg.common.settings.plan import Plan

CERTAIN = IntensitySettings(**dict.fromkeys(PROBABILITIES, 1.0))
seeds = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def slices(seed=0, count=6, side=24):
    """Smooth slices that fill [-1, 1], channels that differ."""
    noise = np.random.default_rng(seed).standard_normal((count, 3, side, side))
    smooth = ndimage.gaussian_filter(noise, (0, 0, 2, 2))
    return torch.from_numpy(smooth / abs(smooth).max((1, 2, 3), keepdims=True)).float()


def only(name, **more):
    return IntensitySettings(**{name: 1.0}, **more)


def changed(images, wanted, seed=0):
    return change_intensities(images, wanted, Draw(len(images), images.device, generator(seed)))


def test_the_order_of_the_settings_is_that_of_the_changes():
    assert tuple(CHANGES) == PROBABILITIES


@pytest.mark.parametrize("name", PROBABILITIES)
def test_every_change_keeps_the_range_and_its_input_and_differs_between_slices(name):
    images = slices(1, 1).repeat(6, 1, 1, 1)
    kept = images.clone()
    found = changed(images, only(name))
    assert torch.equal(images, kept)
    assert found.abs().max() <= 1
    assert found.isfinite().all()
    assert len({one.numpy().tobytes() for one in found}) >= 4
    assert not torch.equal(found, images)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 1.0])
def test_constant_slices_stay_as_they_are(value):
    """Every amount is relative to the deviation of the slice, which is zero."""
    images = torch.full((5, 3, 16, 16), value)
    torch.testing.assert_close(changed(images, CERTAIN), images, atol=2e-6, rtol=0)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_the_generator_alone_decides(seed):
    images = slices(2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = (changed(images, CERTAIN, seed) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, changed(images, CERTAIN, seed + 1))
    assert one.abs().max() <= 1


def test_labels_and_positions_are_not_touched():
    images, labels = slices(), torch.randint(0, 3, (6, 24, 24))
    strong = AugmentationSettings(intensity=CERTAIN)
    found, mapped = augment(images, labels, strong, generator(0))
    assert torch.equal(mapped, labels)
    assert not torch.equal(found, images)


def test_with_positions_the_mask_is_that_of_the_same_draw_without_intensities():
    """Movements come first, so that intensities do not change where anything is."""
    images, labels = slices(), torch.randint(0, 3, (6, 24, 24))
    moves = AugmentationSettings(flip=0.5, rotate_degrees=20, scale=0.2, shift=0.1)
    plain, mask = augment(images, labels, moves, generator(3))
    strong = replace(moves, intensity=CERTAIN)
    found, moved = augment(images, labels, strong, generator(3))
    assert torch.equal(moved, mask)
    expected = Draw(6, images.device, generator(3))
    for _ in range(5):  # flip, angle, size and two shifts
        expected.uniform(0, 1)
    torch.testing.assert_close(found, change_intensities(plain, CERTAIN, expected))


def test_probabilities_are_those_of_the_settings():
    images = slices(3, 1, 8).expand(3000, -1, -1, -1)
    for name in ("brightness", "gamma", "contrast"):
        found = changed(images, IntensitySettings(**{name: 0.3}))
        share = (found != images).flatten(1).any(1).double().mean()
        assert abs(share - 0.3) < 0.04, name


def test_without_any_change_no_number_is_drawn():
    """What a data set names in `data.augmentation` gives the same slices as before the presets."""
    images, labels = slices(), torch.zeros(6, 24, 24).long()
    used, fresh = generator(0), generator(0)
    found, _ = augment(images, labels, AugmentationSettings(), used)
    assert torch.equal(found, images)
    assert torch.equal(used.get_state(), fresh.get_state())


# single changes


@settings(max_examples=20, deadline=None)
@given(seed=seeds, sigma=st.floats(0.3, 1.5))
def test_a_blur_is_the_gaussian_filter_cut_off_at_four_pixels(seed, sigma):
    images = slices(seed % 100, 2)
    sigmas = torch.tensor([sigma, 1e-9]).view(-1, 1, 1, 1)
    found = gaussian_blur(images, sigmas)
    expected = ndimage.gaussian_filter(
        images[0].double().numpy(), (0, sigma, sigma), mode="nearest", radius=(0, 4, 4)
    )
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-5)
    torch.testing.assert_close(found[1], images[1])


@settings(max_examples=20, deadline=None)
@given(seed=seeds, count=st.integers(1, 24))
@example(seed=0, count=17)  # the centre of the middle pixel is the border of two pixels
def test_a_low_resolution_is_nearest_sampling_and_cubic_convolution(seed, count):
    side = 24
    image = np.random.default_rng(seed).standard_normal((side, side))

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    rows = np.zeros((side, side))
    for pixel in range(side):
        place = Fraction(2 * pixel + 1, 2) * count / side - Fraction(1, 2)
        for coarse in range(floor(place) - 1, floor(place) + 3):
            inside = min(max(coarse, 0), count - 1)
            rows[pixel, floor(Fraction(2 * inside + 1, 2) * side / count)] += kernel(place - coarse)
    found = low_resolution(torch.from_numpy(image)[None, None], torch.tensor([count]))
    np.testing.assert_allclose(found[0, 0].numpy(), rows @ image @ rows.T, atol=1e-9)


def test_the_full_resolution_changes_nothing():
    images = slices().double()
    torch.testing.assert_close(low_resolution(images, torch.full((6,), 24)), images)


def test_exponents_bend_the_curve_between_the_ends_of_a_slices_range():
    images = slices()
    found = raised(images, torch.full((6, 1, 1, 1), 2.0))
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    share = (images - low) / (high - low)
    torch.testing.assert_close(found, share.square() * (high - low) + low)
    torch.testing.assert_close(raised(images, torch.ones(6, 1, 1, 1)), images)


@pytest.mark.parametrize("name", ["gamma", "inverted_gamma"])
def test_an_exponent_keeps_mean_deviation_and_order(name):
    images = slices() / 4  # far from the ends of the range, so that nothing is scaled
    found = changed(images, only(name))
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(
            moment(found, (1, 2, 3)), moment(images, (1, 2, 3)), atol=1e-5, rtol=1e-5
        )
    for one, other in zip(images, found, strict=True):
        order = one.flatten().argsort()
        assert (other.flatten()[order].diff() >= -1e-6).all()


def test_contrast_spreads_about_the_mean_within_its_factors():
    images = slices(0, 1).repeat(400, 1, 1, 1) / 8
    found = changed(images, only("contrast"))
    centred = images - images.mean((1, 2, 3), keepdim=True)
    moved = found - images.mean((1, 2, 3), keepdim=True)
    middle = centred.abs() < centred.abs().amax((1, 2, 3), keepdim=True) / 3  # never cut off
    factors = torch.stack(
        [
            (m[k] * c[k]).sum() / (c[k] ** 2).sum()
            for m, c, k in zip(moved, centred, middle, strict=True)
        ]
    )
    assert 0.5 <= factors.min() < 0.55
    assert 1.9 < factors.max() <= 2.0001
    assert 0.4 < (factors < 1).double().mean() < 0.6
    wider = found.amax((1, 2, 3)) > images.amax((1, 2, 3)) + 1e-6
    assert 0.1 < wider.double().mean() < 0.4, "half of the factors above 1 keep the range"


def test_noise_and_offsets_are_relative_to_the_deviation_of_a_slice():
    images = slices(0, 1, 32).repeat(300, 1, 1, 1) / 10
    deviation = images[0].std(correction=0)
    noise = (changed(images, only("noise", noise_deviation=0.4)) - images).std((1, 2, 3))
    assert noise.max() / deviation < 0.42
    assert abs(noise.mean() / deviation - 0.2) < 0.02
    offsets = (changed(images, only("brightness")) - images)[:, 0, 0, 0] / deviation
    assert abs(offsets.std() - 0.5) < 0.08
    assert abs(offsets.mean()) < 0.1


def test_a_bias_field_is_smooth_the_same_in_all_channels_and_has_the_drawn_extreme():
    images = slices(0, 1, 32).repeat(200, 1, 1, 1) / 20
    deviation = images[0].std(correction=0)
    field = (changed(images, only("bias_field")) - images) / deviation
    torch.testing.assert_close(field[:, 0], field[:, 2], atol=1e-4, rtol=0)
    extreme = field.abs().amax((1, 2, 3))
    assert 0.99 < extreme.min() < 1.3
    assert 4.5 < extreme.max() <= 5.01
    upwards = field.amax((1, 2, 3)) > 0.5
    assert 0.35 < upwards.double().mean() < 0.65
    # The logarithm of a Gaussian is a parabola; its width is from a sixth of a side to a side.
    row = field[:, 0].double().abs()
    bend = row.log().diff(n=2, dim=1)
    clear = (row > 0.3 * extreme[:, None, None]).double()
    inner = (clear[:, :-2] * clear[:, 1:-1] * clear[:, 2:]).bool()
    assert inner.any((1, 2)).double().mean() > 0.9
    assert -1.05 / (32 / 6) ** 2 < bend[inner].min() < -0.5 / (32 / 6) ** 2
    assert -2 / 32**2 < bend[inner].max() < 0


def test_a_slice_that_leaves_the_range_is_scaled_linearly_and_no_other():
    images = torch.tensor([[-1.0, 0.5], [-2.0, 0.0], [0.0, 3.0], [-3.0, 3.0]]).view(4, 1, 1, 2)
    found = into_range(images).view(4, 2)
    expected = torch.tensor([[-1.0, 0.5], [-1.0, 1 / 3], [-0.5, 1.0], [-1.0, 1.0]])
    torch.testing.assert_close(found, expected)


# fields


@settings(max_examples=15, deadline=None)
@given(seed=seeds, cells=st.integers(1, 6), side=st.integers(2, 20))
def test_a_field_is_the_cubic_spline_of_its_control_points(seed, cells, side):
    control = np.random.default_rng(seed).standard_normal((cells + 3, cells + 3))
    knots = np.arange(-3, cells + 4)
    places = (np.arange(side) + 0.5) * cells / side
    basis = interpolate.BSpline.design_matrix(places, knots.astype(float), 3).toarray()
    found = spline_field(torch.from_numpy(control), side)
    np.testing.assert_allclose(found.numpy(), basis @ control @ basis.T, atol=1e-12)
    assert control.min() - 1e-12 <= found.min()
    assert found.max() <= control.max() + 1e-12


# the settings group


def test_the_presets_of_a_data_set():
    strong = []
    for name in ("synthetic", "fundus", "prostate"):
        own = compose([f"data={name}"])["data"]
        assert compose([f"data={name}", "augmentation=default"])["data"] == own
        none = compose([f"data={name}", "augmentation=none"])["data"]["augmentation"]
        assert build(AugmentationSettings, none) == AugmentationSettings(), name
        strong.append(compose([f"data={name}", "augmentation=strong"])["data"]["augmentation"])
    assert strong[1:] == strong[:-1]
    assert all(strong[0]["intensity"][name] > 0 for name in PROBABILITIES)


def test_a_single_value_and_an_own_file_change_a_preset(tmp_path):
    tree = compose(["augmentation=strong", "data.augmentation.intensity.blur=0.5"])
    assert tree["data"]["augmentation"]["intensity"]["blur"] == 0.5
    assert tree["data"]["augmentation"]["intensity"]["noise"] == 0.1
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [strong, _self_]\nintensity: {noise: 0.9}\n")
    tree = compose(["data=promise12", f"augmentation={path}"])
    assert tree["data"]["augmentation"]["intensity"]["noise"] == 0.9
    assert tree["data"]["augmentation"]["intensity"]["blur"] == 0.2


def test_a_preset_given_to_the_section_that_it_sets_is_refused_with_the_right_spelling():
    with pytest.raises(FedsgcgError) as caught:
        compose(["data.augmentation=strong"])
    (problem,) = caught.value.problems
    assert (problem.code, problem.action) == ("CFG-001", "write augmentation=strong")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blur", "1.5"),
        ("blur_pixels", "[1.5,0.3]"),
        ("blur_pixels", "[0.3,5]"),
        ("exponents", "[1.2,1.5]"),
        ("contrast_factors", "[0.5]"),
        ("resolutions", "[0,1]"),
        ("bias_deviations", "[1,50]"),
        ("noise_deviation", "-1"),
    ],
)
def test_amounts_out_of_range_are_refused_with_the_setting(name, value):
    with pytest.raises(FedsgcgError) as caught:
        Plan.from_tree(compose([f"data.augmentation.intensity.{name}={value}"]))
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"data.augmentation.intensity.{name}"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_strong_augmentation_on_the_device_never_waits_for_it():
    images, labels = slices().cuda(), torch.zeros(6, 24, 24).long().cuda()
    device = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _ = augment(images, labels, AugmentationSettings(intensity=CERTAIN), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.device.type == "cuda"
