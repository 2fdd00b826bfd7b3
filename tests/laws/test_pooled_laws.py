"""Pooled and federated training are two settings of one program."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedsgcg.clients.app import build_client_app
from fedsgcg.clients.data.batches import domain_sizes
from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.device import choose_device
from fedsgcg.clients.methods import METHODS
from fedsgcg.clients.methods.class_statistics import (
    batch_statistics,
    site_statistics,
    statistics_batches,
)
from fedsgcg.clients.methods.guidance import Guidance, pixel_features
from fedsgcg.clients.methods.sgcg import labels_at
from fedsgcg.clients.training import learning_rate, round_batches, weights_of
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.federation import POOLED
from fedsgcg.common.settings.plan import MethodSettings, Plan
from fedsgcg.common.sgcg.loss import sgcg_loss
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Request
from fedsgcg.deploy.study.inprocess import run_in_process
from fedsgcg.server.app import build_server_app
from fedsgcg.server.federation import initial_weights
from tests.support import sites
from tests.support.pooled import by_site, pooled

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return sites.hospitals(tmp_path_factory.mktemp("pooled"))


def described(plan, site, **options):
    request = Request(sites.identity(plan), sites.weights(plan), options=options)
    return sites.answer(plan, wire.STATISTICS, request, site).statistics


def test_pooled_statistics_are_the_merged_ones_under_one_normalisation(root, tmp_path):
    together, apart = pooled(root, tmp_path / "p"), by_site(root, tmp_path / "b")
    whole = described(together, POOLED, norm_mode="running")
    parts = [described(apart, name, norm_mode="running") for name in sites.SITES]
    merged = parts[0] + parts[1]
    assert whole.count.tolist() == merged.count.tolist()
    np.testing.assert_allclose(whole.mean, merged.mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(whole.covariance, merged.covariance, rtol=1e-4, atol=1e-7)


def test_the_pass_of_a_pooled_client_sees_the_mixed_batches_of_a_step(root, tmp_path):
    """In a batch of both hospitals BatchNorm normalises the mixture; their shift stays visible."""
    plan = pooled(root, tmp_path, "method.batch_size=64")
    stores = [
        open_store(open_site(root, name, plan.data), plan.data, tmp_path / "c", heldout=False)
        for name in sites.SITES
    ]
    tables = [store.slices("train") for store in stores]
    network = build_network(plan.network, 3, plan.data.out_channels, 3)
    found = site_statistics(
        network, tables, plan, CPU, [np.random.default_rng(k) for k in range(2)]
    )
    stacked = [table.stack(range(len(table))) for table in tables]
    images, labels = (np.concatenate(part) for part in zip(*stacked, strict=True))
    with torch.no_grad():
        _, maps = network.train()(torch.from_numpy(images))
    expected = batch_statistics(maps, torch.from_numpy(labels), plan)
    assert found.count.tolist() == expected.count.tolist()
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-5)
    alone = [
        site_statistics(network, [table], plan, CPU, [np.random.default_rng(0)]) for table in tables
    ]
    assert np.abs((alone[0] + alone[1]).mean - expected.mean).max() > 1e-3


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(2, 6))
def test_every_slice_counts_once_however_unequal_the_hospitals(counts, batch_size):
    tables = [NumberedSlices(np.arange(100 * k, 100 * k + count)) for k, count in enumerate(counts)]
    settings = MethodSettings("source", False, batch_size=batch_size, steps_per_round=7)
    rngs = [np.random.default_rng(k) for k in range(len(tables))]
    batches = list(statistics_batches(tables, settings, rngs))
    counted = [
        image
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
        if label != 255
    ]
    assert sorted(int(image) for image in counted) == sorted(
        int(n) for table in tables for n in table.numbers
    )
    sizes = [
        min(size, count)
        for size, count in zip(domain_sizes(settings, len(tables)), counts, strict=True)
    ]
    for images, _ in batches[:-1]:  # every domain in every batch, in the shares of a step
        found = [
            int(((images >= 100 * k) & (images < 100 * (k + 1))).sum()) for k in range(len(tables))
        ]
        assert all(part >= 1 for part in found)
        assert all(part <= size + 1 for part, size in zip(found, sizes, strict=True))


@dataclasses.dataclass(frozen=True)
class NumberedSlices:
    """A table whose images are their own numbers."""

    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def stack(self, indices):
        chosen = self.numbers[np.asarray(indices)]
        return chosen.astype(np.float32), np.zeros(len(chosen), np.uint8)


@pytest.mark.parametrize("features", ["penultimate", "projection", "bottleneck"])
@pytest.mark.parametrize("form", ["full", "diagonal", "none"])
def test_with_frozen_weights_every_pixel_costs_the_same_at_its_hospital_and_pooled(
    root, tmp_path, features, form
):
    plan = by_site(root, tmp_path, f"network.features={features}", f"prototypes.covariance={form}")
    stores = [
        open_store(open_site(root, name, plan.data), plan.data, tmp_path / "c", heldout=False)
        for name in sites.SITES
    ]
    network = build_network(plan.network, 3, plan.data.out_channels, 3).eval()
    rng = np.random.default_rng(0)
    prototypes = sum(
        (site_statistics(network, [store.slices("train")], plan, CPU, [rng]) for store in stores),
        ClassStatistics.empty(2, plan.network.num_features),
    )
    guidance = Guidance(  # not by `of`: at 2 x 2 pixels the bottleneck has one class alone
        torch.from_numpy(prototypes.mean).float(),
        torch.from_numpy(prototypes.covariance).float(),
        torch.from_numpy(prototypes.count >= plan.prototypes.min_count),
    )

    def pixel_losses(images, labels):
        with torch.no_grad():
            _, maps = network(torch.from_numpy(images))
        small = labels_at(torch.from_numpy(labels), maps.shape[-1], 2).reshape(-1)
        return sgcg_loss(
            pixel_features(maps, True),
            small,
            guidance.mean,
            guidance.covariance,
            temperature=0.5,
            active=guidance.active,
            reduction="none",
            covariance_form=form,
        )

    slices = [store.slices("train").stack(range(len(store.slices("train")))) for store in stores]
    apart = torch.cat([pixel_losses(*part) for part in slices])
    together = pixel_losses(*(np.concatenate(arrays) for arrays in zip(*slices, strict=True)))
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)
    assert apart.max() > 0 or features == "bottleneck"  # at 2 x 2 pixels no gland has the majority


@pytest.mark.parametrize("method", ["source", "ram_sgcg"])
def test_one_hospital_is_the_same_model_pooled_or_by_site(root, tmp_path, method):
    digests = []
    for name, options in (("pooled", ["federation=pooled"]), ("site", ["federation.moments=keep"])):
        tree = sites.tree_of(
            root,
            tmp_path / name,
            *options,
            "data.sites=[North,South]",
            "heldout=South",
            f"method={method}",
            "federation.rounds=2",
        )

        run_in_process(
            build_server_app(tree), build_client_app(tree), Plan.from_tree(tree).members()
        )

        state = load_file(tmp_path / name / "run" / "model.safetensors")
        digests.append({key: array.tobytes() for key, array in state.items()})
    assert digests[0] == digests[1]


def test_one_site_and_one_local_step_a_round_is_the_centralised_step(root, tmp_path):
    """Compare five rounds of one step with five steps of a plain loop, on the same batches."""
    plan = sites.plan_of(
        root,
        tmp_path,
        "method=source",
        "data.sites=[North,South]",
        "heldout=South",
        "federation.rounds=5",
        "method.steps_per_round=1",
        "federation.moments=keep",
    )
    tree = plan.to_tree()

    run_in_process(build_server_app(tree), build_client_app(tree), plan.members())
    found = load_file(Path(plan.output) / "model.safetensors")

    choose_device("cpu", threads=1)
    store = open_store(
        open_site(root, "North", plan.data), plan.data, tmp_path / "cache", heldout=False
    )
    network = build_network(plan.network, 3, plan.data.out_channels, 0)
    start = initial_weights(plan).to_state()
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in start.items()})
    network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1.0)
    method = METHODS["source"](network, plan, 1, CPU)
    for number in range(1, 6):
        (batch,) = round_batches([store.slices("train")], plan, number, ["North"], CPU)
        optimizer.param_groups[0]["lr"] = learning_rate(plan, number, 0.0)
        optimizer.zero_grad()
        method.loss(batch, None)[0].backward()
        optimizer.step()
    for name, array in weights_of(network).to_state().items():
        # The bias before a BatchNorm has a gradient of rounding errors only, which Adam amplifies;
        # the running mean compensates it. Single weights with small gradients are amplified too, so
        # the total change of a tensor is compared: a step more or less, or another rate, changes it
        # by a fifth.
        if name.endswith("weight"):
            assert np.linalg.norm(found[name] - array) <= 0.02 * np.linalg.norm(
                array - start[name]
            ), name


def test_pooled_training_asks_one_site_and_reports_all_cases(root, tmp_path):
    plan = pooled(root, tmp_path)
    assert plan.members() == (POOLED,)
    assert plan.hospitals_of(POOLED) == sites.SITES
    enrolled = sites.answer(plan, wire.ENROL, Request(sites.identity(plan, 0)), POOLED).details
    alone = [
        sites.answer(
            p := by_site(root, tmp_path / name), wire.ENROL, Request(sites.identity(p, 0)), name
        ).details
        for name in sites.SITES
    ]
    for kind in ("cases", "patients", "slices"):
        assert enrolled[kind]["train"] == sum(part[kind]["train"] for part in alone)
