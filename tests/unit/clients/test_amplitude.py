"""Amplitude mixing on values computed by hand, at production sizes, and on bad input."""

import math

import numpy as np
import pytest
import torch

from fedsgcg.clients.methods import amplitude
from fedsgcg.clients.methods.amplitude import (
    mix_amplitude,
    mix_window_amplitudes,
    window_amplitudes,
)
from tests.benchmarks.bench_amplitude import numpy_mix, pictures

HALF = torch.tensor([0.5])


def wave(amplitude, offset, phase, side=8):
    """Constant plus one cosine along the columns, (1, 1, side, side) float64."""
    turns = 2 * math.pi * torch.arange(side, dtype=torch.float64) / side
    return (offset + amplitude * torch.cos(turns + phase)).expand(1, 1, side, side)


def test_a_wave_takes_its_partners_height_and_keeps_its_place():
    own, other = wave(2, offset=1, phase=0.3), wave(6, offset=-3, phase=2)
    # r = 0.25: height 0.25 * 2 + 0.75 * 6 = 5; constant 0.25 * 1 + 0.75 * 3 = 2.5, without a sign,
    # because it is an amplitude.
    found = mix_amplitude(own, other, torch.tensor([0.25]), window=0.125)
    torch.testing.assert_close(found, wave(5, offset=2.5, phase=0.3), rtol=0, atol=1e-12)


def test_a_negative_mean_stays_negative():
    found = mix_amplitude(
        wave(2, offset=-1, phase=0), wave(2, offset=3, phase=0), HALF, window=0.125
    )
    torch.testing.assert_close(found, wave(2, offset=-2, phase=0), rtol=0, atol=1e-12)


def test_a_window_below_one_frequency_changes_the_mean_alone():
    own, other = torch.rand(
        2, 1, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert window_amplitudes(own, 0.1).shape == (1, 3, 2, 1, 1)
    shift = 0.5 * (other.mean((2, 3), keepdim=True) - own.mean((2, 3), keepdim=True))
    torch.testing.assert_close(
        mix_amplitude(own, other, HALF, 0.1), own + shift, rtol=0, atol=1e-12
    )


def test_a_wave_outside_the_window_stays():
    own, other = wave(2, offset=1, phase=0.3), wave(6, offset=1, phase=2)
    torch.testing.assert_close(mix_amplitude(own, other, HALF, window=0.1), own, rtol=0, atol=1e-12)


def test_amplitudes_of_a_wave():
    found = window_amplitudes(wave(2, offset=-1, phase=0.7), window=0.25)
    wanted = torch.zeros(1, 1, 2, 3, 3, dtype=torch.float64)
    wanted[0, 0, :, 0] = torch.tensor(
        [64.0, 64.0, 0.0]
    )  # 64 pixels times |-1|; half of the height 2 times 64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_half_sampling_frequency_counts_once():
    board = (
        torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        .repeat(2, 2)
        .expand(1, 1, 4, 4)
    )
    found = mix_amplitude(board, 3 * board, HALF, window=0.5)
    torch.testing.assert_close(found, 2 * board, rtol=0, atol=1e-12)
    assert window_amplitudes(board, 0.5).shape == (1, 1, 2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -1.0, 0.7])
def test_an_empty_slice_has_phase_zero_not_the_phase_of_its_rounding(value, dtype):
    blank = torch.full((1, 1, 33, 48), value, dtype=dtype)
    partner = 0.3 * torch.randn(
        1, 1, 33, 48, generator=torch.Generator().manual_seed(1), dtype=dtype
    )
    found = np.fft.fft2(mix_amplitude(blank, partner, HALF, 0.2).double().numpy())[0, 0]
    wanted = np.fft.fft2(partner.double().numpy())[0, 0]
    near = np.s_[1:7, 1:7]
    np.testing.assert_allclose(found[near], 0.5 * abs(wanted[near]), atol=1e-4)


@pytest.mark.parametrize("by_fft", [False, True])
@pytest.mark.parametrize(("H", "W"), [(256, 256), (255, 255), (256, 192), (97, 130)])
def test_within_two_millionths_of_float64_at_the_products_sizes(H, W, by_fft, monkeypatch):
    monkeypatch.setattr(amplitude, "_uses_fft", lambda images, half, way: by_fft)
    images, partners = pictures(2, H, W, seed=1), pictures(2, H, W, seed=2)
    ratio = torch.tensor([0.1, 0.6])
    wanted = numpy_mix(images.numpy(), partners.numpy(), ratio.numpy(), 0.1)
    assert abs(mix_amplitude(images, partners, ratio).double().numpy() - wanted).max() <= 2e-6


@pytest.mark.parametrize(
    ("side", "window", "forward", "back"),
    [
        (384, 0.1, True, True),
        (256, 0.1, True, False),
        (250, 0.1, True, False),
        (249, 0.1, False, False),
        (255, 0.1, False, False),
        (256, 0.05, False, False),
        (96, 0.5, True, True),
    ],
)
def test_wide_windows_of_widths_without_a_large_prime_take_the_fft(
    side, window, forward, back, monkeypatch
):
    taken = []
    for name in ("rfft", "irfft"):
        real = getattr(torch.fft, name)
        monkeypatch.setattr(
            torch.fft,
            name,
            lambda *a, name=name, real=real, **k: taken.append(name) or real(*a, **k),
        )
    image = pictures(1, side, side, seed=1)
    mix_window_amplitudes(image, window_amplitudes(image, window), HALF, window)
    assert ("rfft" in taken, "irfft" in taken) == (forward, back)


def test_the_result_is_not_clipped_and_the_inputs_stay():
    images, partners = 0.9 * pictures(1, 32, 32, seed=1).sign(), torch.ones(1, 3, 32, 32)
    copies = images.clone(), partners.clone()
    assert mix_amplitude(images, partners, torch.zeros(1)).abs().max() > 1
    assert torch.equal(images, copies[0])
    assert torch.equal(partners, copies[1])


def test_memory_order_and_width_of_the_images_do_not_matter():
    images, partners = pictures(2, 24, 32, seed=1), pictures(2, 24, 32, seed=2)
    ratio = torch.tensor([0.2, 0.7])
    wanted = mix_amplitude(images, partners, ratio)
    last = [t.to(memory_format=torch.channels_last) for t in (images, partners)]
    torch.testing.assert_close(mix_amplitude(*last, ratio), wanted, rtol=0, atol=1e-6)
    half = [t.bfloat16() for t in (images, partners)]
    found = mix_amplitude(*half, ratio)
    assert found.dtype == torch.float32
    assert torch.equal(found, mix_amplitude(half[0].float(), half[1].float(), ratio))


def test_neither_autocast_nor_reduced_products_nor_gradients_reach_the_mixing():
    images, partners, ratio = (
        pictures(1, 32, 32, seed=1),
        pictures(1, 32, 32, seed=2),
        torch.tensor([0.3]),
    )
    wanted = mix_amplitude(images, partners, ratio)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = mix_amplitude(images.requires_grad_(), partners, ratio)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, wanted)
    assert not found.requires_grad


GOOD = torch.zeros(2, 3, 20, 16)
RATIO = torch.tensor([0.1, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD[0], GOOD, RATIO), r"images: found shape \(3, 20, 16\)"),
        ((GOOD.int(), GOOD, RATIO), r"images: found torch.int32, expected floats"),
        ((GOOD[:0], GOOD[:0], RATIO), r"images: found shape \(0, 3, 20, 16\)"),
        (
            (GOOD, GOOD.mT, RATIO),
            r"partners: found shape \(2, 3, 16, 20\), expected \(2, 3, 20, 16\)",
        ),
        ((GOOD, GOOD[:1], RATIO), r"partners: found shape \(1, 3, 20, 16\)"),
        ((GOOD, GOOD.int(), RATIO), r"partners: found torch.int32 on cpu, expected floats on cpu"),
        ((GOOD, GOOD.to("meta"), RATIO), r"partners: found torch.float32 on meta"),
        ((GOOD, GOOD, RATIO[:1]), r"ratio: found shape \(1,\), expected \(2\)"),
        ((GOOD, GOOD, RATIO[:, None]), r"ratio: found shape \(2, 1\)"),
        ((GOOD, GOOD, RATIO.int()), r"ratio: found torch.int32"),
        ((GOOD, GOOD, RATIO + 1), r"ratio: found \[1.1\d*, 2.0\], expected shares in \[0, 1\]"),
        ((GOOD, GOOD, RATIO * math.nan), r"ratio: found \[nan, nan\]"),
        ((GOOD, GOOD, RATIO, 0.0), r"window: found 0.0, expected a share in \(0, 0.5\]"),
        ((GOOD, GOOD, RATIO, 0.51), r"window: found 0.51"),
        ((GOOD, GOOD, RATIO, math.nan), r"window: found nan"),
        ((GOOD + math.inf, GOOD, RATIO), r"images: found values that are not finite"),
        ((GOOD, GOOD * math.nan, RATIO), r"partners: found values that are not finite"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mix_amplitude(*arguments)


def test_kept_amplitudes_that_do_not_fit_are_named():
    kept = window_amplitudes(GOOD)
    with pytest.raises(
        ValueError, match=r"amplitudes: found shape \(2, 3, 2, 2, 2\), expected \(2, 3, 2, 4, 4\)"
    ):
        mix_window_amplitudes(GOOD, kept, RATIO, window=0.2)
    with pytest.raises(ValueError, match="amplitudes: found values that are not finite"):
        mix_window_amplitudes(GOOD, kept * math.nan, RATIO)
    with pytest.raises(ValueError, match="window: found 0.6"):
        window_amplitudes(GOOD, 0.6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_without_a_wait():
    images, partners, ratio = (
        pictures(2, 256, 192, seed=1),
        pictures(2, 256, 192, seed=2),
        torch.tensor([0.1, 0.6]),
    )
    there = [t.cuda() for t in (images, partners, ratio)]
    mix_amplitude(*there)  # puts the matrices of this size on the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mix_amplitude(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(
        found.cpu(), mix_amplitude(images, partners, ratio), rtol=0, atol=2e-6
    )
