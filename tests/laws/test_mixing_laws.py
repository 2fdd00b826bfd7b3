"""Properties of the space in which RAM mixes an image with its partners."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.clients.data.slices import STEPS, Slices
from fedsgcg.clients.data.store import SliceTable
from fedsgcg.clients.methods.amplitude import mix_amplitude, window_amplitudes
from fedsgcg.clients.methods.partners import BankMixer, LocalMixer, SummaryMixer
from fedsgcg.common.images.read import KINDS, PICTURE
from fedsgcg.common.settings.plan import RamSettings
from fedsgcg.common.wire.amplitudes import GREY_LEVEL, AmplitudeBank, AmplitudeSummary
from tests.support.textures import SIDE, textures

laws = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
sharings = st.sampled_from(["local", "summary", "bank"])
spaces = st.sampled_from(["picture", "volume"])


def table_of(images, space):
    """A table of one case with the slices (M, S, S) in [-1, 1]."""
    count, side = len(images), images.shape[-1]
    stored = np.rint(np.clip(images, -1, 1)[:, None] * STEPS).astype(np.int16)
    label = np.zeros((count, side, side), np.uint8)
    kind, spacing = (PICTURE, None) if space == "picture" else (KINDS[0], (1.0, 1.0, 1.0))
    slices = Slices(stored, label, label, label, np.ones((count, 2), np.bool_), spacing, kind=kind)
    return SliceTable(
        np.zeros(count, np.int64), np.arange(count), np.ones(count, np.bool_), 1, [slices]
    )


def mixer_of(sharing, space, images, rng):
    """A mixer whose partners are slices (M, S, S): its own, or those of another site."""
    offset = {"picture": 1.0, "volume": 0.0}[space]
    if sharing == "local":
        return LocalMixer([table_of(images, space)], RamSettings(), rng)
    channels = torch.from_numpy(images).float()[:, None].expand(-1, 3, -1, -1)
    windows = window_amplitudes(channels + offset).numpy()
    if sharing == "bank":
        bank = AmplitudeBank(windows, ("B",) * len(windows), space)
        return BankMixer(bank.encode(), "A", space, RamSettings(), rng)
    shared = AmplitudeSummary.from_amplitudes(windows, images.shape[-1], space, ("B",))
    return SummaryMixer(shared.encode(), replace(shared, sites=()), "A", RamSettings(), rng)


@pytest.mark.parametrize("sharing", ["local", "bank"])
@pytest.mark.parametrize(("space", "wanted"), [("picture", -0.2935), ("volume", 0.5495)])
def test_a_constant_picture_is_mixed_in_grey_levels(sharing, space, wanted):
    """Grey 160.14 and 20.02 at r = 0.5 give 90.08 (-0.2935); |0.256| and |-0.843| give 0.5495."""
    own, partner = torch.full((1, 3, SIDE, SIDE), 0.256), np.full((1, SIDE, SIDE), -0.843)
    mixer = mixer_of(sharing, space, partner, np.random.default_rng(0))
    partners, _ = mixer.draw((1,))
    mixed = mixer.mix(own, partners, torch.tensor([0.5]))
    np.testing.assert_allclose(mixed.numpy(), wanted, rtol=0, atol=1e-4)


@given(seeds, st.floats(0, 1))
@laws
def test_a_picture_is_mixed_as_in_grey_levels_of_0_to_255(seed, share):
    rng = np.random.default_rng(seed)
    own, partner = (torch.from_numpy(rng.uniform(-1, 1, (2, 1, 3, SIDE, SIDE))).float()).unbind(0)
    ratio = torch.tensor([share], dtype=torch.float32)
    grey = mix_amplitude((own.double() + 1) * 127.5, (partner.double() + 1) * 127.5, ratio.double())
    wanted = grey.clamp(0, 255) / 127.5 - 1
    found = LocalMixer([table_of(np.zeros((1, SIDE, SIDE)), "picture")], RamSettings(), rng).mix(
        own, partner, ratio
    )
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)


@given(seeds, st.floats(0, 1))
@laws
def test_pictures_and_volumes_agree_where_both_images_have_the_same_mean(seed, share):
    rng = np.random.default_rng(seed)
    own, partner = (
        torch.from_numpy(textures(rng, 1)).float().expand(1, 3, -1, -1) for _ in range(2)
    )
    partner = partner - partner.mean() + own.mean()
    ratio = torch.tensor([share], dtype=torch.float32)
    found = [
        LocalMixer([table_of(np.zeros((1, SIDE, SIDE)), space)], RamSettings(), rng).mix(
            own, partner, ratio
        )
        for space in ("picture", "volume")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)


@given(seeds, sharings, spaces)
@laws
def test_the_whole_own_share_changes_nothing_and_no_mixture_leaves_the_range(seed, sharing, space):
    rng = np.random.default_rng(seed)
    mixer = mixer_of(sharing, space, textures(rng, 5, contrast=0.4), rng)
    images = torch.from_numpy(textures(rng, 4, contrast=0.4)).float()[:, None].expand(-1, 3, -1, -1)
    partners, ratio = mixer.draw((4,))
    torch.testing.assert_close(
        mixer.mix(images, partners, torch.ones(4)), images, rtol=0, atol=1e-6
    )
    mixed = mixer.mix(images, partners, ratio)
    assert mixed.isfinite().all()
    assert mixed.abs().max() <= 1


@given(seeds, spaces, st.floats(0, 1))
@laws
def test_an_image_mixed_with_itself_stays_as_it_is(seed, space, share):
    rng = np.random.default_rng(seed)
    images = textures(rng, 1)
    ratio = torch.tensor([share], dtype=torch.float32)
    for sharing in ("local", "bank", "summary"):
        mixer = mixer_of(sharing, space, images, rng)
        itself = torch.from_numpy(images).float().expand(1, 3, -1, -1)
        mixed = mixer.mix(itself, mixer.draw((1,))[0], ratio)
        # A summary omits amplitudes below its floor, which are invisible in images of 8 bits or
        # more.
        torch.testing.assert_close(
            mixed, itself, rtol=0, atol=GREY_LEVEL if sharing == "summary" else 1e-4
        )
