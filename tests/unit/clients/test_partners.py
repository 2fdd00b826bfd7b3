"""A site's own amplitudes: their summary, and its reuse between rounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.methods import partners
from fedsgcg.clients.methods.amplitude import window_amplitudes
from fedsgcg.clients.methods.partners import own_summary, site_amplitudes
from fedsgcg.common.settings.plan import RamSettings
from fedsgcg.common.wire.amplitudes import (
    AmplitudeBank,
    AmplitudeSampler,
    AmplitudeSummary,
    amplitude_floor,
)
from tests.support import sites

CPU = torch.device("cpu")
SUMMARY = RamSettings(sharing="summary")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixing")
    root = sites.hospitals(folder / "data")
    data = sites.plan_of(root, folder).data
    return [
        open_store(open_site(root, name, data), data, folder / "cache", heldout=False)
        for name in sites.SITES
    ]


def by_force(store, window):
    table = store.slices("train")
    images = torch.from_numpy(table.stack(range(len(table)))[0])
    windows = window_amplitudes(images, window).double().numpy()
    logs = np.log(np.maximum(windows, amplitude_floor(images.shape[-1])))
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    return logs.sum(axis=0), np.stack(
        [(logs[:, one] * logs[:, two]).sum(axis=0) for one, two in pairs]
    )


def test_the_summary_of_a_client_sums_all_training_slices_of_its_hospitals(stores):
    total = own_summary(stores, SUMMARY, CPU)
    (first, second), (more, more_products) = (by_force(store, SUMMARY.window) for store in stores)
    assert total.count == sum(len(store.slices("train")) for store in stores)
    np.testing.assert_allclose(total.first, first + more, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(total.second, second + more_products, rtol=1e-5, atol=1e-3)
    assert site_amplitudes(stores, SUMMARY, "both", 0, CPU) == total.encode()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The store of one hospital with four colour pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (folder / "data" / "Eye").mkdir(parents=True)
    for number in range(4):
        pixels, mask = rng.integers(0, 256, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 1
        Image.fromarray(pixels).save(folder / "data" / "Eye" / f"{number}_image.png")
        Image.fromarray(mask).save(folder / "data" / "Eye" / f"{number}_mask.png")
    data = replace(sites.plan_of(folder / "data", folder, "data.sites=[Eye]").data, stack=1)
    return open_store(
        open_site(folder / "data", "Eye", data), data, folder / "cache", heldout=False
    )


def test_what_a_site_shares_of_pictures_is_taken_in_grey_levels_and_of_volumes_about_zero(
    stores, pictures
):
    for store, space, offset in ((stores[0], "volume", 0.0), (pictures, "picture", 1.0)):
        images = store.slices("train").stack(range(len(store.slices("train"))))[0]
        zero = abs((images.astype(np.float64) + offset).sum(axis=(-2, -1)))
        summary = AmplitudeSummary.decode(site_amplitudes([store], SUMMARY, store.site, 0, CPU))
        wanted = np.log(np.maximum(zero, amplitude_floor(images.shape[-1]))).mean(axis=0)
        assert (summary.space, summary.side) == (space, images.shape[-1])
        np.testing.assert_allclose(summary.mean[:, 0, 0, 0], wanted, rtol=1e-4)
        settings = replace(SUMMARY, sharing="bank", bank_size=len(images))
        bank = AmplitudeBank.decode(site_amplitudes([store], settings, store.site, 0, CPU))
        assert bank.space == space
        np.testing.assert_allclose(bank.windows[:, :, 0, 0, 0], zero, rtol=1e-3)


def test_a_summary_is_computed_once_for_the_same_slices_and_anew_for_others(stores, monkeypatch):
    monkeypatch.setattr(partners, "_CACHE", {})
    store = stores[0]
    known = own_summary([store], SUMMARY, CPU)
    assert (
        own_summary([replace(store)], SUMMARY, CPU) is known
    )  # opened again for the next round's message
    wider = own_summary([store], replace(SUMMARY, window=0.2), CPU)
    assert wider.first.shape != known.first.shape
    fewer = tuple(replace(case, split="test") if case.index == 0 else case for case in store.cases)
    assert own_summary([replace(store, cases=fewer)], SUMMARY, CPU).count < known.count
    shown = replace(
        store.data, train_slices="foreground" if store.data.train_slices == "all" else "all"
    )
    other = replace(store, data=shown)
    assert own_summary([other], SUMMARY, CPU).count == len(other.slices("train"))
    assert own_summary([store], SUMMARY, CPU) is known


def test_the_oldest_summaries_make_room(stores, monkeypatch):
    monkeypatch.setattr(partners, "_CACHE", {})
    monkeypatch.setattr(partners, "MAX_CACHED_SUMMARIES", 1)
    first = own_summary(stores[:1], SUMMARY, CPU)
    own_summary(stores[1:], SUMMARY, CPU)
    again = own_summary(stores[:1], SUMMARY, CPU)
    assert again is not first
    assert again.encode() == first.encode()


def test_channels_of_drawn_amplitudes_are_as_alike_as_those_of_real_partners(stores):
    """Mean correlation of adjacent slices' log amplitudes; 0.20 for separately drawn channels."""
    tables = [store.slices("train") for store in stores]
    images = torch.from_numpy(
        np.concatenate([table.stack(range(len(table)))[0] for table in tables])
    )
    real = window_amplitudes(images, SUMMARY.window).double().numpy()
    drawn = AmplitudeSampler(own_summary(stores, SUMMARY, CPU)).draw(500, np.random.default_rng(0))
    alike = [neighbours(amplitudes, images.shape[-1]) for amplitudes in (real, drawn)]
    assert alike[0] > 0.5
    assert alike[1] == pytest.approx(alike[0], abs=0.02)


def neighbours(amplitudes, side):
    """Mean over the frequencies of the correlation of channels 0 and 1."""
    logs = np.log(np.maximum(amplitudes, amplitude_floor(side)))
    rest = logs - logs.mean(axis=0)
    covariance, (first, second, _) = (rest[:, 0] * rest[:, 1]).mean(axis=0), rest.std(axis=0)
    return (covariance / (first * second)).mean()
