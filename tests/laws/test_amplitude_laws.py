"""Properties of RAM's amplitude mixing, checked against the full spectrum in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.clients.methods import amplitude
from fedsgcg.clients.methods.amplitude import (
    mix_amplitude,
    mix_window_amplitudes,
    window_amplitudes,
)

WINDOWS = (0.01, 0.1, 0.2, 0.34, 0.49, 0.5)
laws = settings(deadline=None, max_examples=60)


@st.composite
def problems(draw, most=13):
    """Images, partners, ratio and window; even and odd sides, square or not, any window."""
    B, C, H, W = (draw(st.integers(1, top)) for top in (3, 2, most, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    images, partners = torch.randn(2, B, C, H, W, generator=generator, dtype=torch.float64)
    ratio = torch.tensor(
        draw(st.lists(st.floats(0, 1), min_size=B, max_size=B)), dtype=torch.float64
    )
    return images, partners, ratio, draw(st.sampled_from(WINDOWS))


def centred(images):
    return np.fft.fftshift(np.fft.fft2(images.double().numpy()), axes=(-2, -1))


def in_window(H, W, window):
    """(H, W) bool on the centred spectrum: RAM-DSIR's rows [H//2 - b, H//2 + b] and columns."""
    b = int(np.floor(min(H, W) * window))
    return (abs(np.arange(H) - H // 2) <= b)[:, None] & (abs(np.arange(W) - W // 2) <= b)


def brute_force(images, partners, ratio, window):
    spectrum, inside = centred(images), in_window(*images.shape[-2:], window)
    r = ratio.double().numpy()[:, None, None, None]
    mixed = r * abs(spectrum) + (1 - r) * abs(centred(partners))
    changed = np.where(inside, mixed, abs(spectrum)) * np.exp(1j * np.angle(spectrum))
    return torch.from_numpy(np.fft.ifft2(np.fft.ifftshift(changed, axes=(-2, -1))).real)


def window_of_spectrum(images, window):
    H, W = images.shape[-2:]
    b = int(np.floor(min(H, W) * window))
    rows = np.stack([np.arange(b + 1), -np.arange(b + 1)])
    return torch.from_numpy(
        abs(np.fft.fft2(images.numpy()))[..., rows[:, :, None] % H, np.arange(b + 1) % W]
    )


def close(found, wanted, error=1e-9):
    torch.testing.assert_close(found, wanted, rtol=0, atol=error)


@laws
@given(problems())
def test_equals_the_whole_spectrum_mixed_in_float64(problem):
    close(mix_amplitude(*problem), brute_force(*problem))


@laws
@given(problems(), st.booleans())
def test_rows_by_fft_and_by_products_mean_the_same(problem, by_fft):
    images, _, _, window = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amplitude, "_uses_fft", lambda images, half, way: by_fft)
        close(mix_amplitude(*problem), brute_force(*problem))
        close(window_amplitudes(images, window), window_of_spectrum(images, window))


@settings(deadline=None, max_examples=30)
@given(problems(most=40), st.sampled_from([0.1, 0.3, 1.0]))
def test_float32_stays_within_its_rounding(problem, scale):
    images, partners, ratio, window = problem
    images, partners = (scale * t.clamp(-3, 3) / 3 for t in (images, partners))
    found = mix_amplitude(images.float(), partners.float(), ratio.float(), window)
    assert found.dtype == torch.float32
    spectrum = abs(centred(images))
    # The phase of a frequency is accurate to eps * |x| / |F|, which limits the mixed amplitude.
    worst = (abs(centred(partners)) / spectrum).max() * np.sqrt(images[0, 0].numel())
    close(found.double(), brute_force(images, partners, ratio, window), error=1e-6 * (2 + worst))


@laws
@given(problems())
def test_amplitudes_inside_are_the_mixture_and_outside_the_own_and_every_phase_is_kept(problem):
    images, partners, ratio, window = problem
    after, before, other = (centred(t) for t in (mix_amplitude(*problem), images, partners))
    inside = np.broadcast_to(in_window(*images.shape[-2:], window), after.shape)
    r = np.broadcast_to(ratio.numpy()[:, None, None, None], after.shape)
    np.testing.assert_allclose(after[~inside], before[~inside], rtol=0, atol=1e-9)
    wanted = r * abs(before) + (1 - r) * abs(other)
    np.testing.assert_allclose(abs(after)[inside], wanted[inside], rtol=0, atol=1e-9)
    turned = after * before.conj()  # real and positive where the phase is the same
    np.testing.assert_allclose(turned, abs(turned), rtol=0, atol=1e-7)


@laws
@given(problems())
def test_window_amplitudes_are_those_of_the_spectrum(problem):
    images, _, _, window = problem
    close(window_amplitudes(images, window), window_of_spectrum(images, window))


@laws
@given(problems())
def test_ratio_one_changes_nothing_at_all(problem):
    images, partners, ratio, window = problem
    assert torch.equal(mix_amplitude(images, partners, torch.ones_like(ratio), window), images)


@laws
@given(problems())
def test_ratio_zero_takes_over_the_partners_amplitudes(problem):
    images, partners, ratio, window = problem
    mixed = mix_amplitude(images, partners, torch.zeros_like(ratio), window)
    close(window_amplitudes(mixed, window), window_amplitudes(partners, window))


@laws
@given(problems())
def test_an_image_is_its_own_neutral_partner(problem):
    images, _, ratio, window = problem
    close(mix_amplitude(images, images.clone(), ratio, window), images)


@laws
@given(problems())
def test_the_result_moves_on_a_line_with_the_ratio(problem):
    images, partners, ratio, window = problem
    r = ratio[:, None, None, None]
    whole = mix_amplitude(images, partners, torch.zeros_like(ratio), window)
    close(mix_amplitude(*problem), r * images + (1 - r) * whole)


@laws
@given(problems(), st.integers(0, 99))
def test_linear_in_the_partners_amplitudes(problem, seed):
    images, partners, ratio, window = problem
    generator = torch.Generator().manual_seed(seed)
    first = window_amplitudes(partners, window)
    second = window_amplitudes(
        torch.randn(images.shape, generator=generator, dtype=torch.float64), window
    )
    apart = [mix_window_amplitudes(images, a, ratio, window) for a in (first, second)]
    close(
        mix_window_amplitudes(images, (first + 3 * second) / 4, ratio, window),
        (apart[0] + 3 * apart[1]) / 4,
    )


@laws
@given(problems(), st.floats(0.1, 10))
def test_scales_with_images_and_partners_together(problem, scale):
    images, partners, ratio, window = problem
    close(
        mix_amplitude(scale * images, scale * partners, ratio, window),
        scale * mix_amplitude(*problem),
        error=1e-8,
    )


@laws
@given(problems(), st.integers(0, 12), st.integers(0, 12))
def test_moves_with_the_image_and_not_with_the_partner(problem, down, right):
    images, partners, ratio, window = problem
    mixed = mix_amplitude(*problem)
    moved = mix_amplitude(
        images.roll((down, right), (-2, -1)), partners.roll((right, down), (-2, -1)), ratio, window
    )
    close(moved, mixed.roll((down, right), (-2, -1)))


@laws
@given(problems())
def test_turning_the_image_by_transposition_turns_the_result(problem):
    """Rows and columns are computed in different ways and mean the same."""
    images, partners, ratio, window = problem
    close(mix_amplitude(images.mT, partners.mT, ratio, window), mix_amplitude(*problem).mT)


@laws
@given(problems())
def test_a_batch_is_its_images_and_channels_one_by_one(problem):
    images, partners, ratio, window = problem
    whole = mix_amplitude(*problem)
    for i in range(images.shape[0]):
        for c in range(images.shape[1]):
            one = np.s_[i : i + 1, c : c + 1]
            close(
                whole[one],
                mix_amplitude(images[one], partners[one], ratio[i : i + 1], window),
                error=1e-12,
            )


@laws
@given(problems())
def test_kept_amplitudes_give_the_same_as_the_partner_itself(problem):
    images, partners, ratio, window = problem
    kept = window_amplitudes(partners, window)
    assert torch.equal(mix_window_amplitudes(images, kept, ratio, window), mix_amplitude(*problem))
