"""With frozen weights, each site's loss against the pooled prototypes equals the pooled loss.

This makes the federated contrastive term exact ("Federated" in docs/explanation/sgcg.md): hospitals
never see each other's pixels, and yet each of their pixels has the loss it would have if all images
lay in one place.
"""

from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.methods import Guidance
from fedsgcg.clients.methods import base as supervised
from fedsgcg.clients.methods.class_statistics import batch_statistics, site_statistics
from fedsgcg.clients.methods.guidance import pixel_features
from fedsgcg.clients.methods.sgcg import class_balanced_mean, contrast_loss
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.sgcg.loss import sgcg_loss
from fedsgcg.common.statistics import ClassStatistics
from tests.support import sites

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("laws")
    return sites.plan_of(
        folder / "data", folder, "prototypes.warmup_rounds=0", "prototypes.norm_mode=running"
    )


def maps_and_labels(seed: int, batch: int, ignored: float) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    maps = np.maximum(rng.normal(0.3, 1, (batch, 8, 4, 4)), 0).astype(np.float32)
    labels = rng.integers(0, 2, (batch, 4, 4))
    labels[rng.random(labels.shape) < ignored] = 255
    return torch.from_numpy(maps), torch.from_numpy(labels)


def per_pixel(
    maps: torch.Tensor, labels: torch.Tensor, guidance: Guidance, plan: Plan
) -> torch.Tensor:
    return sgcg_loss(
        pixel_features(maps, plan.prototypes.normalize),
        labels.reshape(-1),
        guidance.mean,
        guidance.covariance,
        temperature=plan.prototypes.temperature,
        active=guidance.active,
        reduction="none",
    )


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**31), min_size=2, max_size=5, unique=True),
    sizes=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_each_sites_per_pixel_loss_is_the_pooled_one(plan, seeds, sizes, ignored):
    parts = [maps_and_labels(seed, size, ignored) for seed, size in zip(seeds, sizes, strict=False)]
    merged = reduce(add, [batch_statistics(maps, labels, plan) for maps, labels in parts])
    federated = Guidance.from_prototypes(merged, plan.prototypes, 1, CPU)

    maps, labels = (
        torch.cat([maps for maps, _ in parts]),
        torch.cat([labels for _, labels in parts]),
    )
    pixels = pixel_features(maps, True).double().numpy()
    pooled = Guidance.from_prototypes(
        ClassStatistics.from_features(pixels, labels.reshape(-1).numpy(), 2),
        plan.prototypes,
        1,
        CPU,
    )
    assert (federated is None) == (pooled is None)
    assume(federated is not None)  # nearly all pixels ignored: fewer than two classes are left
    at_sites = torch.cat([per_pixel(own, own_labels, federated, plan) for own, own_labels in parts])
    np.testing.assert_allclose(
        at_sites.numpy(), per_pixel(maps, labels, pooled, plan).numpy(), rtol=1e-4, atol=1e-5
    )


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=2, max_size=4, unique=True))
def test_site_means_weighted_by_their_pixels_are_the_pooled_mean(plan, seeds):
    parts = [maps_and_labels(seed, 2, 0.2) for seed in seeds]
    merged = reduce(add, [batch_statistics(maps, labels, plan) for maps, labels in parts])
    guidance = Guidance.from_prototypes(merged, plan.prototypes, 1, CPU)
    assert guidance is not None
    losses = [
        contrast_loss(maps, labels, guidance, plan.prototypes, 2).item() for maps, labels in parts
    ]
    pixels = [int((labels != 255).sum()) for _, labels in parts]
    maps, labels = (
        torch.cat([maps for maps, _ in parts]),
        torch.cat([labels for _, labels in parts]),
    )
    pooled = contrast_loss(maps, labels, guidance, plan.prototypes, 2).item()
    assert np.average(losses, weights=pixels) == pytest.approx(pooled, rel=1e-4, abs=1e-6)


def test_it_holds_for_the_real_network_on_real_files(plan):
    root = sites.hospitals(Path(plan.data.root), cases=3)
    network = build_network(plan.network, 3, plan.data.out_channels, 7)
    cache = Path(plan.site.cache)
    tables = [
        open_store(open_site(root, name, plan.data), plan.data, cache, heldout=False).slices(
            "train"
        )
        for name in sites.SITES
    ]
    merged = reduce(
        add,
        [
            site_statistics(network, [table], plan, CPU, [np.random.default_rng(0)])
            for table in tables
        ],
    )

    maps, labels = [], []
    with torch.no_grad():
        for table in tables:
            images, truth = table.stack(np.arange(len(table)))
            maps.append(network.eval()(torch.from_numpy(images))[1])
            labels.append(torch.from_numpy(truth).long())
    pixels = pixel_features(torch.cat(maps), True).double().numpy()
    pooled = ClassStatistics.from_features(pixels, torch.cat(labels).reshape(-1).numpy(), 2)
    federated, central = (
        Guidance.from_prototypes(part, plan.prototypes, 1, CPU) for part in (merged, pooled)
    )
    assert federated is not None
    assert central is not None
    for own, own_labels in zip(maps, labels, strict=True):
        here, there = (
            per_pixel(own, own_labels, guidance, plan) for guidance in (federated, central)
        )
        np.testing.assert_allclose(here.numpy(), there.numpy(), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), channels=st.integers(2, 4))
def test_ignored_pixels_have_no_influence_on_the_supervised_loss(seed, channels):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, channels, 4, 4, generator=generator)
    labels = torch.randint(0, channels, (2, 4, 4), generator=generator)
    ignored = torch.rand(2, 4, 4, generator=generator) < 0.4
    labels[ignored] = 255
    other = torch.where(
        ignored.unsqueeze(1), torch.randn(logits.shape, generator=generator) * 9, logits
    )
    assert supervised.softmax_loss(other, labels).item() == pytest.approx(
        supervised.softmax_loss(logits, labels).item(), rel=1e-5
    )
    structures = {str(index): [index] for index in range(channels)}
    assert supervised.sigmoid_loss(other, labels, structures).item() == pytest.approx(
        supervised.sigmoid_loss(logits, labels, structures).item(), rel=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_dice_loss_is_between_zero_and_one_and_zero_for_the_truth(seed):
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.rand(2, 2, 4, 4, generator=generator) < 0.5).float()
    valid = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    guess = torch.rand(truth.shape, generator=generator)
    assert 0 <= supervised.dice_loss(guess, truth, valid).item() <= 1
    assert supervised.dice_loss(truth, truth, valid).item() == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=30),
    seed=st.integers(0, 2**31),
)
def test_the_class_balanced_mean_equals_brute_force(values, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 255], len(values))
    active = rng.random(3) < 0.7
    means = [
        np.mean(np.array(values)[labels == k])
        for k in range(3)
        if active[k] and (labels == k).any()
    ]
    found = class_balanced_mean(
        torch.tensor(values, dtype=torch.float64), torch.tensor(labels), torch.tensor(active)
    )
    assert found.item() == pytest.approx(np.mean(means) if means else 0.0, abs=1e-9)
