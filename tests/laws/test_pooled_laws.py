"""Pooled and federated are two settings of one program (architecture.md section 5)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from clients.app import build_client_app
from clients.cases import open_store
from clients.device import choose_device
from clients.features import site_statistics
from clients.methods import METHODS
from clients.methods.guidance import Guidance, pixel_features
from clients.methods.sgcg import labels_at
from clients.overlay import Overlay, build_guide
from clients.site import open_site
from clients.training import learning_rate, round_batches, weights_of
from common import wire
from common.networks import build_network
from common.plan import POOLED, Plan
from common.sgcg import sgcg_loss
from common.statistics import ClassStatistics
from common.wire import Request
from deploy.inprocess import run_in_process
from server.app import build_server_app
from server.prototypes import moved
from server.rounds import initial_weights
from tests import sites

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return sites.hospitals(tmp_path_factory.mktemp("pooled"))


def pooled(root: Path, folder: Path, *overrides: str):
    return sites.plan_of(root, folder, "federation=pooled", "data.sites=[North,South]", *overrides)


def by_site(root: Path, folder: Path, *overrides: str):
    return sites.plan_of(root, folder, "data.sites=[North,South]", *overrides)


def statistics(seed, count, features=3, classes=2):
    rng = np.random.default_rng(seed)
    return ClassStatistics.from_features(rng.normal(size=(count, features)), rng.integers(0, classes, count), classes)


def test_pooled_statistics_are_the_merged_ones(root, tmp_path):
    together, apart = pooled(root, tmp_path / "p"), by_site(root, tmp_path / "b")
    given_weights = sites.weights(together)
    whole = sites.answer(together, wire.TRAIN, Request(sites.identity(together), given_weights), POOLED).statistics
    parts = [
        sites.answer(apart, wire.TRAIN, Request(sites.identity(apart), given_weights), name).statistics
        for name in sites.SITES
    ]
    merged = parts[0] + parts[1]
    assert whole.count.tolist() == merged.count.tolist()
    np.testing.assert_allclose(whole.mean, merged.mean, rtol=1e-12)
    np.testing.assert_allclose(whole.scatter, merged.scatter, rtol=1e-10)


@pytest.mark.parametrize("features", ["penultimate", "projection", "bottleneck"])
@pytest.mark.parametrize("form", ["full", "diagonal", "none"])
def test_with_frozen_weights_every_pixel_costs_the_same_at_its_hospital_and_pooled(root, tmp_path, features, form):
    plan = by_site(root, tmp_path, f"network.features={features}", f"prototypes.covariance={form}")
    stores = [
        open_store(open_site(root, name, plan.data), plan.data, tmp_path / "c", heldout=False) for name in sites.SITES
    ]
    network = build_network(plan.network, 3, plan.data.out_channels, 3).eval()
    rng = np.random.default_rng(0)
    prototypes = sum(
        (site_statistics(network, store.slices("train"), plan, CPU, rng) for store in stores),
        ClassStatistics.empty(2, plan.network.num_features),
    )
    guidance = Guidance.of(prototypes, plan.prototypes, CPU)

    def pixel_losses(images, labels):
        with torch.no_grad():
            _, maps = network(torch.from_numpy(images))
        small = labels_at(torch.from_numpy(labels), maps.shape[-1], 2).reshape(-1)
        return sgcg_loss(
            pixel_features(maps, True), small, guidance.mean, guidance.covariance,
            temperature=0.5, active=guidance.active, reduction="none", covariance_form=form,
        )  # fmt: skip

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
            root, tmp_path / name, *options, "data.sites=[North,South]", "heldout=South", f"method={method}",
            "federation.rounds=2",
        )  # fmt: skip

        run_in_process(build_server_app(tree), build_client_app(tree), Plan.from_tree(tree).members())

        state = load_file(tmp_path / name / "run" / "model.safetensors")
        digests.append({key: array.tobytes() for key, array in state.items()})
    assert digests[0] == digests[1]


def test_one_site_and_one_local_step_a_round_is_the_centralised_step(root, tmp_path):
    """Five rounds of one step against five steps of Adam in a plain loop, on the same batches and rates."""
    plan = sites.plan_of(
        root, tmp_path, "method=source", "data.sites=[North,South]", "heldout=South", "federation.rounds=5",
        "method.steps_per_round=1", "federation.moments=keep",
    )  # fmt: skip
    tree = plan.to_tree()

    run_in_process(build_server_app(tree), build_client_app(tree), plan.members())
    found = load_file(Path(plan.output) / "model.safetensors")

    choose_device("cpu", threads=1)
    store = open_store(open_site(root, "North", plan.data), plan.data, tmp_path / "cache", heldout=False)
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
        # The bias before a BatchNorm has no gradient but rounding, which Adam blows up; its running mean takes it out.
        if name.endswith("weight"):
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


def test_pooled_training_asks_one_site_and_reports_all_cases(root, tmp_path):
    plan = pooled(root, tmp_path)
    assert plan.members() == (POOLED,)
    assert plan.hospitals_of(POOLED) == sites.SITES
    enrolled = sites.answer(plan, wire.ENROL, Request(sites.identity(plan, 0)), POOLED).details
    alone = [
        sites.answer(p := by_site(root, tmp_path / name), wire.ENROL, Request(sites.identity(p, 0)), name).details
        for name in sites.SITES
    ]
    for kind in ("cases", "patients", "slices"):
        assert enrolled[kind]["train"] == sum(part[kind]["train"] for part in alone)


# memory of the prototypes


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_a_part_that_leaves_leaves_the_others(seed, first, second):
    one, two = statistics(seed, first), statistics(seed + 1, second)
    left = (one + two).without(two)
    assert left.count.tolist() == one.count.tolist()
    np.testing.assert_allclose(left.mean, one.mean, atol=1e-9)
    np.testing.assert_allclose(left.scatter, one.scatter, atol=1e-8)
    nothing = one.without(one)
    assert nothing.count.sum() == 0
    assert (nothing.mean == 0).all()


def test_more_than_there_is_cannot_leave():
    with pytest.raises(ValueError, match="at most"):
        statistics(0, 5).without(statistics(1, 50))
    with pytest.raises(ValueError, match="shape"):
        statistics(0, 5).without(statistics(1, 5, features=4))


def test_momentum_is_the_mixture_of_both_whatever_the_counts():
    before, fresh = statistics(0, 50), statistics(1, 5000)
    after = moved(before, fresh, 0.25)
    delta = fresh.mean - before.mean
    np.testing.assert_allclose(after.mean, before.mean + 0.25 * delta, rtol=1e-12)
    expected = 0.75 * before.covariance + 0.25 * fresh.covariance + 0.1875 * delta[:, :, None] * delta[:, None, :]
    np.testing.assert_allclose(after.covariance, expected, rtol=1e-12)
    assert after.count.tolist() == fresh.count.tolist()
    np.testing.assert_allclose(moved(before, fresh, 1.0).covariance, fresh.covariance)
    absent = ClassStatistics.empty(2, 3)
    np.testing.assert_allclose(moved(before, absent, 0.25).mean, before.mean)
    np.testing.assert_allclose(moved(absent, fresh, 0.25).covariance, fresh.covariance)


def test_an_overlay_replaces_the_own_part_and_keeps_the_others_and_the_weight(root, tmp_path):
    plan = by_site(
        root, tmp_path, "prototypes.memory=overlay", "prototypes.warmup_rounds=0", "prototypes.normalize=false"
    )
    sent, others = statistics(0, 60, 8), statistics(1, 90, 8)
    own = statistics(2, 60, 8)
    guide = build_guide(others + sent, sent, own, plan, 2, CPU)
    assert isinstance(guide, Overlay)
    maps, labels = torch.randn(1, 8, 4, 4), torch.full((1, 4, 4), 255)
    untouched = guide.after(maps, labels)  # every pixel ignored: nothing is replaced
    expected = others + own
    np.testing.assert_allclose(untouched.mean.numpy(), expected.mean, atol=1e-5)
    labels = torch.randint(0, 2, (1, 4, 4))
    batch = ClassStatistics.from_features(pixel_features(maps, False).numpy(), labels.reshape(-1).numpy(), 2)
    after = guide.after(maps, labels)
    keep = own.scaled(1 - batch.count / own.count)
    np.testing.assert_allclose(after.mean.numpy(), (others + keep + batch).mean, atol=1e-5)
    np.testing.assert_allclose((keep + batch).count, own.count)


def test_a_contribution_that_was_refused_is_not_taken_out(root, tmp_path):
    plan = by_site(root, tmp_path, "prototypes.memory=overlay", "prototypes.warmup_rounds=0")
    guide = build_guide(statistics(0, 10, 8), statistics(1, 500, 8), statistics(2, 10, 8), plan, 2, CPU)
    assert isinstance(guide, Guidance)
    assert not isinstance(build_guide(None, None, None, plan, 2, CPU), Guidance)
    source = dataclasses.replace(plan, method=dataclasses.replace(plan.method, name="source"))
    assert build_guide(statistics(0, 10, 8), None, None, source, 2, CPU) is None
