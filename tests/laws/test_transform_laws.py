"""BigAug, GIN and TriD: each transform against a loop or its definition, and what they keep."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fedsgcg.clients.data import bigaug
from fedsgcg.clients.data.bigaug import _Chooser, big_augment, places
from fedsgcg.clients.data.gin import (
    Numbers,
    blending_map,
    draw_numbers,
    gin_views,
    random_network,
    widths,
)
from fedsgcg.clients.methods.trid import random_style
from fedsgcg.common.settings.augmentation import BigAugSettings
from tests.laws.test_intensity_laws import generator, seeds, slices

CERTAIN = BigAugSettings(probability=1.0)


def labels_of(images, seed=0):
    """Blobs of the classes 2 and 255."""
    noise = np.random.default_rng(seed).standard_normal((len(images), *images.shape[2:]))
    spots = ndimage.gaussian_filter(noise, (0, 3, 3)) > 0
    return torch.from_numpy(np.where(spots, 255, 2)).long()


# BigAug


def test_bigaug_without_transforms_is_the_slice_itself_and_draws_nothing():
    images, rng = slices(), generator(0)
    found, mapped = big_augment(images, labels_of(images), BigAugSettings(probability=0.0), rng)
    assert found is images
    assert torch.equal(mapped, labels_of(images))
    assert torch.equal(rng.get_state(), generator(0).get_state())


@settings(max_examples=15, deadline=None)
@given(seed=seeds, probability=st.sampled_from([0.5, 1.0]))
def test_bigaug_keeps_range_types_labels_and_input_and_depends_on_the_generator_alone(
    seed, probability
):
    images, amounts = slices(3), BigAugSettings(probability=probability)
    kept, labels = images.clone(), labels_of(images)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = (big_augment(images, labels, amounts, generator(seed)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(images, kept)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert one[0].abs().max() <= 1
    assert (one[0].dtype, one[1].dtype) == (images.dtype, labels.dtype)
    assert set(one[1].unique().tolist()) <= {2, 255}
    assert not torch.equal(one[0], big_augment(images, labels, amounts, generator(seed + 1))[0])


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 1.0])
def test_bigaug_of_a_constant_slice_has_its_perturbation_alone(value):
    images = torch.full((8, 3, 16, 16), value)
    found, _ = big_augment(images, labels_of(images), CERTAIN, generator(0))
    assert found.isfinite().all()
    for one in found:
        assert (one - one.mean()).abs().max() < 1e-5
        assert abs(one.mean() - value) <= 0.1 * abs(value) + 1e-5


def test_bigaug_moves_the_mask_with_the_slice(monkeypatch):
    """Slices that equal their label maps still do so after rotation, scale and deformation."""
    labels = labels_of(slices(0, 16, 48))
    images = (labels == 255).float()[:, None].expand(-1, 3, -1, -1) * 2 - 1
    monkeypatch.setattr(bigaug, "_quality", lambda images, *_: images)
    monkeypatch.setattr(bigaug, "_appearance", lambda images, *_: images)
    moved, mapped = big_augment(images, labels, CERTAIN, generator(1))
    clear = moved[:, 0].abs() > 0.99
    assert clear.float().mean() > 0.6
    assert torch.equal((moved[:, 0] > 0)[clear], (mapped == 255)[clear])
    assert all(not torch.equal(one, other) for one, other in zip(mapped, labels, strict=True))


def test_each_of_the_transforms_is_drawn_for_about_half_of_the_slices():
    draw = _Chooser(torch.zeros(4000, 1, 2, 2), 0.5, generator(0))
    amounts = draw.amount(0.4, 1.6, still=7.0)
    assert abs((amounts == 7).double().mean() - 0.5) < 0.03
    others = amounts[amounts != 7]
    assert 0.4 <= others.min() < 0.41
    assert 1.59 < others.max() <= 1.6


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_an_elastic_deformation_never_folds_and_is_bounded(seed):
    images = torch.zeros(20, 1, 40, 40, dtype=torch.float64)
    draw = _Chooser(images, 1.0, generator(seed))
    x, y = places(images, 0.0499, draw).unbind(1)
    centres = (torch.arange(40.0, dtype=torch.float64) * 2 + 1) / 40 - 1
    assert (x - centres).abs().max() <= 2 * 0.0499
    assert (y - centres[:, None]).abs().max() <= 2 * 0.0499
    across, down = x[:, :-1].diff(dim=2), y[:, :, :-1].diff(dim=1)
    area = across * down - x[:, :, :-1].diff(dim=1) * y[:, :-1].diff(dim=2)
    assert (area > 0).all()


def test_the_sharp_slice_is_the_unsharp_mask_of_the_blurred_one(monkeypatch):
    """With one deviation of 1 pixel and strength 10; blur and noise are switched off."""
    images = slices(4, 2) / 20
    monkeypatch.setattr(bigaug, "BLUR_PIXELS", (1.0, 1.0))
    monkeypatch.setattr(bigaug, "SHARPNESS", (10.0, 10.0))
    monkeypatch.setattr(bigaug, "NOISE", (0.0, 0.0))
    found = bigaug._quality(images, torch.ones(2, 1, 1, 1), _Chooser(images, 1.0, generator(0)))

    def blur(array):
        return ndimage.gaussian_filter(array, (0, 0, 1, 1), mode="nearest", radius=(0, 0, 4, 4))

    once = blur(images.double().numpy())
    sharp = (once + 10 * (once - blur(once))).clip(-1, 1)
    np.testing.assert_allclose(found.numpy(), blur(sharp), atol=1e-4)


# GIN


def numbers_of(count, seed=0, strength=1.0):
    drawn = draw_numbers(count, 3, strength, np.random.default_rng(seed))
    return Numbers(*(torch.from_numpy(one) for one in drawn))


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_a_random_network_is_a_chain_of_convolutions_of_each_slice_alone(seed):
    images, numbers = slices(seed % 100, 3, 12), numbers_of(3, seed)
    found = random_network(images, numbers.weights[:, 0], numbers.small[:, 0])
    for b in range(3):
        maps, weights = images[b : b + 1], numbers.weights[b, 0]
        for layer, (before, after) in enumerate(widths(3)):
            kernel = weights[: 9 * before * after].view(after, before, 3, 3)
            bias = weights[9 * before * after :][:after]
            weights = weights[9 * before * after + after :]
            if numbers.small[b, 0, layer]:
                maps = F.conv2d(maps, kernel[:, :, 1:2, 1:2], bias)
            else:
                maps = F.conv2d(maps, kernel, bias, padding=1)
            maps = F.leaky_relu(maps) if layer < 3 else maps
        assert len(weights) == 0
        torch.testing.assert_close(found[b], maps[0], rtol=1e-3, atol=1e-3)


def test_views_of_zero_strength_are_the_slice_itself():
    images = slices()
    for blend in (False, True):
        for view in gin_views(images, numbers_of(6, strength=0.0), blend=blend):
            torch.testing.assert_close(view, images, atol=1e-6, rtol=0)


def test_a_view_has_the_norm_of_the_slice_and_is_the_mixture_of_both():
    images, numbers = slices() / 20, numbers_of(6)
    mean = images.mean((1, 2, 3), keepdim=True)
    deviation = images.std((1, 2, 3), correction=0, keepdim=True)
    plain = (images - mean) / deviation
    for k, view in enumerate(gin_views(images, numbers, blend=False)):
        share = numbers.share[:, k].view(-1, 1, 1, 1)
        net = random_network(plain, numbers.weights[:, k], numbers.small[:, k])
        mixed = share * net + (1 - share) * plain
        ratio = plain.square().sum((1, 2, 3)).sqrt() / mixed.square().sum((1, 2, 3)).sqrt()
        expected = mixed * ratio.view(-1, 1, 1, 1) * deviation + mean
        torch.testing.assert_close(view, expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_blended_views_are_the_two_views_exchanged_by_the_map():
    images, numbers = slices() / 20, numbers_of(6)
    first, second = gin_views(images, numbers, blend=False)
    one, two = gin_views(images, numbers, blend=True)
    share = blending_map(numbers.control, 24)
    torch.testing.assert_close(one, share * first + (1 - share) * second, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two, share * second + (1 - share) * first, rtol=1e-4, atol=1e-5)
    assert torch.equal(share.amin((1, 2, 3)), torch.zeros(6))
    assert torch.equal(share.amax((1, 2, 3)), torch.ones(6))


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 1.0])
def test_views_of_a_constant_slice_are_that_slice(value):
    images = torch.full((4, 3, 16, 16), value)
    for view in gin_views(images, numbers_of(4), blend=True):
        torch.testing.assert_close(view, images, atol=1e-5, rtol=0)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_views_stay_in_range_and_those_of_a_slice_do_not_depend_on_the_others(seed):
    images, numbers = slices(1), numbers_of(6, seed)
    views = gin_views(images, numbers, blend=True)
    assert all(view.abs().max() <= 1 for view in views)
    part = Numbers(*(one[[4, 1]] for one in numbers))
    for whole, some in zip(views, gin_views(images[[4, 1]], part, blend=True), strict=True):
        torch.testing.assert_close(whole[[4, 1]], some, rtol=1e-4, atol=1e-5)


# TriD


def test_trid_gives_chosen_channels_the_drawn_statistics_and_leaves_the_others():
    maps = torch.randn(3, 4, 8, 8, generator=generator(0), dtype=torch.float64) * 3 + 1
    maps[0, 0] = 5.0  # a constant channel has no pattern
    chosen = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    mean, deviation = (torch.rand(3, 4, generator=generator(seed)) for seed in (1, 2))
    found = random_style(maps, chosen, mean, deviation)
    torch.testing.assert_close(found[chosen == 0], maps[chosen == 0], rtol=0, atol=0)
    torch.testing.assert_close(
        found.mean((2, 3))[chosen > 0], mean.double()[chosen > 0], rtol=1e-6, atol=1e-6
    )
    moves = chosen > 0
    moves[0, 0] = False
    torch.testing.assert_close(
        found.std((2, 3), correction=0)[moves], deviation.double()[moves], rtol=1e-5, atol=1e-6
    )
    assert (found[0, 0] == mean.double()[0, 0]).all()


def test_the_gradient_of_trid_treats_old_statistics_as_constants():
    maps = torch.randn(2, 2, 5, 5, generator=generator(0), dtype=torch.float64, requires_grad=True)
    chosen, new = torch.tensor([[1.0, 0], [1, 1]]), torch.full((2, 2), 0.5)
    random_style(maps, chosen, new, new).sum().backward()
    deviation = maps.detach().var((2, 3), correction=0).add(1e-6).sqrt()
    expected = torch.where(chosen > 0, 0.5 / deviation, 1.0)
    torch.testing.assert_close(maps.grad, expected[:, :, None, None].expand_as(maps))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_transforms_on_the_device_never_wait_for_it():
    images, labels = slices().cuda(), labels_of(slices()).cuda()
    numbers = Numbers(*(one.cuda() for one in numbers_of(6)))
    device = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _ = big_augment(images, labels, CERTAIN, device)
        views = gin_views(images, numbers, blend=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {found.device.type, *(view.device.type for view in views)} == {"cuda"}
