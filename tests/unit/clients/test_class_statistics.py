"""Class statistics of a site: over every training pixel, without changing the model."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import CaseStore, open_store
from fedsgcg.clients.methods.class_statistics import (
    batch_statistics,
    patients_per_class,
    site_statistics,
    statistics_mode,
)
from fedsgcg.clients.training import weights_of
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from tests.support import sites

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("features") / "data")


def opened(root: Path, *overrides: str) -> tuple[Plan, CaseStore, nn.Module]:
    plan = sites.plan_of(root, root.parent, *overrides)
    store = open_store(
        open_site(root, "North", plan.data), plan.data, root.parent / "cache", heldout=False
    )
    return plan, store, build_network(plan.network, 3, plan.data.out_channels, 0)


def described(plan: Plan, store: CaseStore, network: nn.Module, seed: int = 0) -> ClassStatistics:
    return site_statistics(
        network, [store.slices("train")], plan, CPU, [np.random.default_rng(seed)]
    )


@pytest.mark.parametrize("mode", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
def test_the_pass_changes_neither_weights_nor_buffers_nor_mode(root, mode, training):
    plan, store, network = opened(root, f"prototypes.norm_mode={mode}")
    before = weights_of(network.train(training)).digest()
    modes = [
        (module.training, getattr(module, "track_running_stats", None))
        for module in network.modules()
    ]
    described(plan, store, network)
    assert weights_of(network).digest() == before
    assert [
        (m.training, getattr(m, "track_running_stats", None)) for m in network.modules()
    ] == modes
    assert all(module.training is training for module in network.modules())


def test_the_mode_is_put_back_after_an_error(root):
    _, _, network = opened(root)
    with pytest.raises(RuntimeError), statistics_mode(network, "batch"):
        network(torch.zeros(1, 7, 32, 32))
    assert all(m.track_running_stats for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_running_mode_equals_the_pooled_pixels_computed_at_once(root):
    plan, store, network = opened(root, "prototypes.norm_mode=running")
    table = store.slices("train")
    images, labels = table.stack(np.arange(len(table)))
    with torch.no_grad():
        _, maps = network.eval()(torch.from_numpy(images))
    pixels = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).double().numpy()
    pixels /= np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-12)
    expected = ClassStatistics.from_features(pixels, labels.reshape(-1), 2)
    found = described(plan, store, network)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-6)
    np.testing.assert_allclose(found.covariance, expected.covariance, atol=1e-6)
    assert found.count.sum() == labels.size


def test_batch_mode_describes_the_training_forward_pass(root):
    plan, store, network = opened(
        root, "method.batch_size=64"
    )  # one batch: nothing depends on the order
    table = store.slices("train")
    images, labels = table.stack(np.arange(len(table)))
    with torch.no_grad():
        _, maps = network.train()(torch.from_numpy(images))
    expected = batch_statistics(maps, torch.from_numpy(labels), plan)
    found = described(plan, store, opened(root)[2])
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-5)
    running = described(opened(root, "prototypes.norm_mode=running")[0], store, opened(root)[2])
    assert np.abs(running.mean - expected.mean).max() > 1e-3


def test_raw_features_are_described_where_the_loss_uses_raw_ones(root):
    plan, store, network = opened(root, "prototypes.normalize=false")
    lengths = []
    for statistics in (described(opened(root)[0], store, network), described(plan, store, network)):
        second = np.trace(statistics.scatter, axis1=1, axis2=2) + statistics.count * (
            statistics.mean**2
        ).sum(1)
        lengths.append(
            second.sum() / statistics.count.sum()
        )  # mean squared length of a pixel's feature
    assert lengths[0] == pytest.approx(
        1.0, abs=1e-2
    )  # a pixel without any active channel keeps length 0
    assert abs(lengths[1] - 1.0) > 0.1


def test_ignored_pixels_are_not_counted(root):
    plan, _, _ = opened(root)
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, 0] = 255
    labels[0, 1] = 1
    found = batch_statistics(torch.rand(1, 8, 4, 4), labels, plan)
    assert found.count.tolist() == [8, 4]


def test_patients_are_counted_not_cases_nor_slices(root, tmp_path):
    copy = sites.hospitals(tmp_path / "data")
    with (copy / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows[:3]:
        row["patient_id"] = "the-same"  # three of North's four cases belong to one patient
    with (copy / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    plan, store, _ = opened(copy, "data.validation_fraction=0")
    assert len([case for case in store.cases if case.split == "train"]) == 4
    assert patients_per_class([store], plan.data.num_classes).tolist() == [2, 2]
    assert patients_per_class([store], 3).tolist() == [2, 2, 0]


def test_patients_are_those_whose_training_slices_hold_the_class_and_no_image_is_read(
    root, monkeypatch
):
    plan, store, _ = opened(root)
    table = store.slices("train")
    _, labels = table.stack(np.arange(len(table)))
    patients = np.array([store.cases[index].patient for index in table.case_of])
    expected = [len(set(patients[(labels == value).any(axis=(1, 2))])) for value in range(2)]

    def unread(*_):
        raise AssertionError("images are not needed")

    monkeypatch.setattr(type(table), "stack", unread)
    assert patients_per_class([store], plan.data.num_classes).tolist() == expected
    first = store.stored[int(table.case_of[0])]
    vanished = replace(
        first, label=np.zeros_like(first.label)
    )  # the structure was lost when the slices were resized
    stored = tuple(vanished if slices is first else slices for slices in store.stored)
    assert patients_per_class([replace(store, stored=stored)], 2).tolist() == [
        expected[0],
        expected[1] - 1,
    ]
