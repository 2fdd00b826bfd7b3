"""Properties of summarised amplitudes, of samples drawn from them, and of their messages."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsgcg.clients.methods.amplitude import mix_window_amplitudes, window_amplitudes
from fedsgcg.clients.methods.partners import SummaryMixer
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.plan import RamSettings
from fedsgcg.common.wire.amplitudes import (
    GREY_LEVEL,
    AmplitudeBank,
    AmplitudeSampler,
    AmplitudeSummary,
    amplitude_floor,
    same_amplitude,
    shows_something,
)
from tests.support.textures import SIDE, textures

laws = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)


# what is summarised


def summary_of(images, **facts):
    """Summary of (M, C, S, S) images."""
    windows = window_amplitudes(torch.from_numpy(images).float()).numpy()
    return AmplitudeSummary.from_amplitudes(windows, images.shape[-1], **facts)


def test_one_constant_slice_of_forty_leaves_the_deviation_and_the_mixtures_as_they_are():
    rng = np.random.default_rng(0)
    images = np.repeat(textures(rng, 40)[:, None], 3, axis=1)
    with_one = images.copy()
    with_one[17] = -1.0
    faint = images.copy()
    faint[17] = (
        -1.0 + np.rint(rng.uniform(0, 1, (3, SIDE, SIDE))) * GREY_LEVEL / 2
    )  # rounding alone
    one_channel = images.copy()
    one_channel[17, 0] = -1.0  # the slice before it, in the stack of its neighbour
    rest = summary_of(np.delete(images, 17, axis=0))
    naive = np.log(
        np.maximum(window_amplitudes(torch.from_numpy(with_one).float()).numpy(), 1e-6)
    ).std(axis=0)
    assert naive.mean() > 2, "what the example was: 0.6 became 2.6"
    for spoilt in (with_one, faint, one_channel):
        found = summary_of(spoilt)
        assert found.count == 39
        np.testing.assert_allclose(found.deviation, rest.deviation, atol=1e-6)
    # The logarithm of a Rayleigh amplitude has deviation pi / sqrt(24) = 0.641, as has noise
    # without a floor.
    assert rest.deviation[:, :, 1:, 1:].mean() == pytest.approx(math.pi / math.sqrt(24), abs=0.03)
    own = torch.from_numpy(images).float()
    mixer = SummaryMixer(
        replace(rest, sites=("B",)).encode(), rest, "A", RamSettings(), np.random.default_rng(1)
    )
    mixed = mixer.mix(own, *mixer.draw((40,)))
    assert (mixed.abs() >= 1).float().mean() < 0.03


def test_the_floor_is_what_rounding_to_eight_bits_leaves():
    rng = np.random.default_rng(0)
    smooth = rng.uniform(-1, 1, (200, 1, SIDE, SIDE))
    rounded = np.rint((smooth + 1) * 127.5) / 127.5 - 1
    errors = window_amplitudes(torch.from_numpy(rounded - smooth), 0.5).numpy()
    # 200 images x 17 x 17 x 2 mostly independent frequencies: the mean square is accurate to 1 %.
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(amplitude_floor(SIDE), rel=0.01)


def test_a_site_of_constant_slices_alone_adds_nothing():
    flat = summary_of(np.full((5, 3, SIDE, SIDE), -1.0), sites=("A",))
    some = summary_of(
        np.repeat(textures(np.random.default_rng(0), 4)[:, None], 3, axis=1), sites=("B",)
    )
    assert flat.count == 0
    back = AmplitudeSummary.decode((AmplitudeSummary.decode(flat.encode()) + some).encode())
    np.testing.assert_array_equal(back.covariance, some.covariance)
    assert back.sites == ("A", "B")
    with pytest.raises(FedsgcgError, match="no other site"):
        SummaryMixer((flat + some).encode(), some, "B", RamSettings(), np.random.default_rng(0))
    assert shows_something(np.zeros((2, 3, 2, 1, 1)), SIDE).all(), (
        "a window of frequency zero alone has no rest"
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), seeds)
def test_summaries_add_up_and_come_apart(first, second, channels, seed):
    rng = np.random.default_rng(seed)
    parts = [
        rng.gamma(2.0, 10.0, (count, channels, 2, 3, 3)).astype(np.float32)
        for count in (first, second)
    ]
    one, two = (
        AmplitudeSummary.from_amplitudes(part, SIDE, sites=(n,))
        for part, n in zip(parts, "BA", strict=True)
    )
    whole = AmplitudeSummary.from_amplitudes(np.concatenate(parts), SIDE)
    together = one + two
    assert together.sites == ("A", "B")
    assert together.without(one).sites == ("A",)
    np.testing.assert_allclose(together.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(together.without(one).covariance, two.covariance, atol=1e-10)
    logs = np.log(np.maximum(np.concatenate(parts).astype(np.float64), amplitude_floor(SIDE)))
    np.testing.assert_allclose(whole.mean, logs.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.deviation, logs.std(axis=0), atol=1e-6)
    rest = logs - logs.mean(axis=0)
    wanted = np.einsum("mchij,mdhij->hijcd", rest, rest) / len(logs)
    np.testing.assert_allclose(whole.covariance, wanted, atol=1e-10)
    back = AmplitudeSummary.decode(together.encode())
    assert (back.count, back.side, back.space, back.sites) == (
        together.count,
        SIDE,
        "volume",
        ("A", "B"),
    )
    np.testing.assert_array_equal(back.first, together.first)
    np.testing.assert_array_equal(back.second, together.second)


@given(st.sampled_from([(16, 0.1), (16, 0.5), (15, 0.5), (12, 0.34), (9, 0.2)]), seeds)
@laws
def test_the_two_halves_hold_an_amplitude_twice_exactly_where_they_are_said_to(problem, seed):
    side, window = problem
    images = torch.randn(
        3, 2, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    windows = window_amplitudes(images, window).numpy()
    equal = np.isclose(windows[:, :, 0], windows[:, :, 1], rtol=1e-9, atol=1e-9).all(axis=(0, 1))
    np.testing.assert_array_equal(equal, same_amplitude(windows.shape[-1] - 1, side))


# what is drawn


def test_drawn_amplitudes_deviate_and_go_together_as_the_summary_says():
    """Compare the moments of n = 4,000 draws with the summary.

    The standard error of a deviation is sigma / sqrt(2 n), of a covariance sigma_c sigma_d sqrt((1
    + rho^2) / n), of a mean sigma / sqrt(n). Six of them are allowed for the worst of 9 x 72
    numbers, for any seed.
    """
    rng, draws = np.random.default_rng(0), 4000
    base = textures(rng, 62)
    images = (
        np.stack([base[:-2], base[1:-1] + base[:-2], base[2:] + base[1:-1] + base[:-2]], axis=1) / 3
    )
    summary = summary_of(images)
    logs = np.log(AmplitudeSampler(summary).draw(draws, rng))
    deviation = summary.deviation
    np.testing.assert_array_less(
        abs(logs.mean(axis=0) - summary.mean), 6 * deviation / math.sqrt(draws)
    )
    np.testing.assert_array_less(
        abs(logs.std(axis=0) - deviation), 6 * deviation / math.sqrt(2 * draws)
    )
    assert logs.std(axis=0)[0, 0, 0, 0] == pytest.approx(
        deviation[0, 0, 0, 0], rel=6 / math.sqrt(2 * draws)
    )
    rest = logs - logs.mean(axis=0)
    found = np.einsum("mchij,mdhij->hijcd", rest, rest) / draws
    sigma = np.moveaxis(deviation, 0, -1)
    scale = sigma[..., :, None] * sigma[..., None, :]
    np.testing.assert_array_less(abs(found - summary.covariance), 6 * scale * math.sqrt(2 / draws))
    assert (summary.covariance / scale)[..., 0, 1].mean() > 0.3, "channels that are alike"


@given(st.sampled_from([(32, 0.1), (32, 0.5), (16, 0.5)]), seeds)
@laws
def test_a_drawn_window_is_that_of_a_real_image(problem, seed):
    """A frequency and its conjugate share one amplitude, which the mixed image must have."""
    side, window = problem
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (6, 3, side, side))
    windows = window_amplitudes(torch.from_numpy(images), window).numpy()
    drawn = AmplitudeSampler(
        AmplitudeSummary.from_amplitudes(windows.astype(np.float32), side)
    ).draw(2, rng)
    same = same_amplitude(drawn.shape[-1] - 1, side)
    np.testing.assert_array_equal(drawn[:, :, 0, same], drawn[:, :, 1, same])
    assert (drawn[:, :, 0, ~same] != drawn[:, :, 1, ~same]).all()
    own = torch.from_numpy(images[:2])
    assume(window_amplitudes(own, window).min() > 1e-3)  # a phase that is known
    mixed = mix_window_amplitudes(
        own, torch.from_numpy(drawn), torch.zeros(2, dtype=torch.float64), window
    )
    np.testing.assert_allclose(
        window_amplitudes(mixed, window).numpy(), drawn, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("space", "most"), [("picture", 2 * SIDE**2), ("volume", SIDE**2)])
def test_nothing_is_drawn_that_no_image_can_have(space, most):
    offset = {"picture": 1.0, "volume": 0.0}[space]
    levels = np.random.default_rng(0).choice([0.05, 1.0], (40, 1, 1, 1)) * (1 + offset) - offset
    images = np.clip(levels + np.random.default_rng(1).normal(0, 0.05, (40, 3, SIDE, SIDE)), -1, 1)
    windows = window_amplitudes(torch.from_numpy(images + offset)).numpy().astype(np.float32)
    drawn = AmplitudeSampler(AmplitudeSummary.from_amplitudes(windows, SIDE, space)).draw(
        500, np.random.default_rng(0)
    )
    assert drawn.max() == pytest.approx(most)
    assert drawn.max() <= most * (1 + 1e-9)


def test_channels_that_are_one_are_drawn_as_one():
    rng = np.random.default_rng(0)
    summary = summary_of(np.repeat(textures(rng, 10)[:, None], 3, axis=1))
    drawn = AmplitudeSampler(summary).draw(20, rng)
    np.testing.assert_allclose(drawn[:, 1:], np.repeat(drawn[:, :1], 2, axis=1), rtol=1e-4)


# the wire


def test_amplitudes_that_cannot_be_are_refused():
    good = AmplitudeSummary.from_amplitudes(np.full((3, 2, 2, 2, 2), 2, np.float32), SIDE)
    pair = np.zeros_like(good.second)
    pair[1] = 1.0  # channels that go together more than either varies
    for wrong, code in (
        (replace(good, count=2.5), "STA-201"),
        (replace(good, count=-1.0), "STA-201"),
        (replace(good, count=math.nan), "STA-201"),
        (replace(good, count=0.0), "STA-201"),
        (replace(good, first=good.first + np.inf), "STA-201"),
        (replace(good, first=good.first + 5.0), "STA-201"),
        (replace(good, second=good.second - 1.0), "STA-201"),
        (replace(good, second=good.second + pair), "STA-201"),
        (replace(good, count=1e300), "STA-201"),
        (replace(good, first=good.first * 1e6, second=good.second * 1e12), "STA-201"),
        (replace(good, space="sound"), "PAY-106"),
        (replace(good, side=0), "PAY-106"),
        (replace(good, second=good.second[:2]), "PAY-106"),
    ):
        with pytest.raises(FedsgcgError) as caught:
            AmplitudeSummary.decode(wrong.encode())
        assert caught.value.code == code
    bank = AmplitudeBank(np.ones((2, 1, 2, 2, 2), np.float32), ("A", "A"), "picture")
    back = AmplitudeBank.decode(bank.encode())
    assert (back.owners, back.space) == (("A", "A"), "picture")
    for data in (b"", b"nonsense", bank.encode()[:-40], good.encode()):
        with pytest.raises(FedsgcgError) as caught:
            AmplitudeBank.decode(data)
        assert caught.value.code == "PAY-106"
    with pytest.raises(FedsgcgError) as caught:
        AmplitudeBank.decode(replace(bank, windows=-bank.windows).encode())
    assert caught.value.code == "STA-201"


@pytest.mark.parametrize("kind", [AmplitudeSummary, AmplitudeBank])
def test_amplitudes_of_another_version_are_refused_as_such(kind, monkeypatch):
    windows = np.ones((2, 1, 2, 2, 2), np.float32)
    with monkeypatch.context() as older:
        older.setattr("fedsgcg.common.wire.amplitudes.SCHEMA_VERSION", "1")
        bank = AmplitudeBank(windows, ("A", "A"))
        data = (
            bank if kind is AmplitudeBank else AmplitudeSummary.from_amplitudes(windows, SIDE)
        ).encode()
    with pytest.raises(FedsgcgError) as caught:
        kind.decode(data)
    assert caught.value.code == "PAY-107"


def test_a_summary_stays_as_small_as_it_is_said_to_be():
    """At 256 pixels and three channels: 9 x 2 x 26 x 26 doubles, whatever the number of images."""
    sizes = []
    for count in (2, 50):
        windows = (
            np.random.default_rng(0).gamma(2.0, 100.0, (count, 3, 2, 26, 26)).astype(np.float32)
        )
        sizes.append(len(AmplitudeSummary.from_amplitudes(windows, 256).encode()))
    assert max(sizes) < 9 * 2 * 26 * 26 * 8 + 2000
    assert abs(sizes[0] - sizes[1]) < 64
