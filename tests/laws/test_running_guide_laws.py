"""Memories of the prototypes: parts leave and mix exactly, and online follows the paper."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.clients.methods.guidance import Guidance, pixel_features
from fedsgcg.clients.methods.running_guide import Online, Overlay, build_guide, statistics_to_state
from fedsgcg.common.settings.federation import POOLED
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Request
from fedsgcg.server.aggregation.prototypes import momentum_update
from tests.support import sites
from tests.support.pooled import by_site, pooled

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return sites.hospitals(tmp_path_factory.mktemp("pooled"))


def statistics(seed, count, features=3, classes=2):
    rng = np.random.default_rng(seed)
    return ClassStatistics.from_features(
        rng.normal(size=(count, features)), rng.integers(0, classes, count), classes
    )


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
    after = momentum_update(before, fresh, 0.25)
    delta = fresh.mean - before.mean
    np.testing.assert_allclose(after.mean, before.mean + 0.25 * delta, rtol=1e-12)
    expected = (
        0.75 * before.covariance
        + 0.25 * fresh.covariance
        + 0.1875 * delta[:, :, None] * delta[:, None, :]
    )
    np.testing.assert_allclose(after.covariance, expected, rtol=1e-12)
    assert after.count.tolist() == fresh.count.tolist()
    np.testing.assert_allclose(momentum_update(before, fresh, 1.0).covariance, fresh.covariance)
    absent = ClassStatistics.empty(2, 3)
    np.testing.assert_allclose(momentum_update(before, absent, 0.25).mean, before.mean)
    np.testing.assert_allclose(momentum_update(absent, fresh, 0.25).covariance, fresh.covariance)


def followed(root, tmp_path, memory):
    return by_site(
        root,
        tmp_path,
        f"prototypes.memory={memory}",
        "prototypes.warmup_rounds=0",
        "prototypes.normalize=false",
    )


def test_an_overlay_replaces_the_own_part_and_keeps_the_others_and_the_weight(root, tmp_path):
    plan = followed(root, tmp_path, "overlay")
    sent, others = statistics(0, 60, 8), statistics(1, 90, 8)
    own = statistics(2, 60, 8)
    guide = build_guide(
        others + sent, statistics_to_state(sent), own, plan, 2, CPU, held=[sent.digest()]
    )
    assert isinstance(guide, Overlay)
    maps, labels = torch.randn(1, 8, 4, 4), torch.full((1, 4, 4), 255)
    untouched = guide.after(maps, labels)  # every pixel ignored: nothing is replaced
    expected = others + own
    np.testing.assert_allclose(untouched.mean.numpy(), expected.mean, atol=1e-5)
    labels = torch.randint(0, 2, (1, 4, 4))
    batch = ClassStatistics.from_features(
        pixel_features(maps, False).numpy(), labels.reshape(-1).numpy(), 2
    )
    after = guide.after(maps, labels)
    keep = own.scaled(1 - batch.count / own.count)
    np.testing.assert_allclose(after.mean.numpy(), (others + keep + batch).mean, atol=1e-5)
    np.testing.assert_allclose((keep + batch).count, own.count)


@pytest.mark.parametrize("memory", ["overlay", "online"])
def test_what_the_coordinator_does_not_hold_is_not_taken_out(root, tmp_path, memory):
    """A late or refused contribution must not be subtracted.

    Otherwise there would be 34.9k pixels instead of 45.0k, and a negative eigenvalue.
    """
    plan = followed(root, tmp_path, memory)
    others, sent, own = statistics(0, 450, 8), statistics(1, 100, 8), statistics(2, 100, 8)
    state = statistics_to_state(sent)
    maps, labels = torch.randn(1, 8, 4, 4), torch.full((1, 4, 4), 255)
    refused = build_guide(others, state, own, plan, 2, CPU, held=[others.digest()]).after(
        maps, labels
    )
    held = build_guide(
        others + sent, state, own, plan, 2, CPU, held=[others.digest(), sent.digest()]
    ).after(maps, labels)
    expected = others + own if memory == "overlay" else others
    for guidance in (refused, held):
        np.testing.assert_allclose(guidance.mean.numpy(), expected.mean, atol=1e-5)
        np.testing.assert_allclose(guidance.covariance.numpy(), expected.covariance, atol=1e-5)
        assert np.linalg.eigvalsh(guidance.covariance.numpy().astype(float)).min() > -1e-6


def test_online_is_the_papers_update_batch_by_batch_before_the_loss(root, tmp_path):
    plan = followed(root, tmp_path, "online")
    guide = build_guide(None, {}, None, plan, 1, CPU)
    assert isinstance(guide, Online)
    generator = torch.Generator().manual_seed(0)
    count, mean, covariance = np.zeros(2), np.zeros((2, 8)), np.zeros((2, 8, 8))
    for _ in range(4):
        maps = torch.randn(1, 8, 4, 4, generator=generator)
        labels = torch.randint(0, 2, (1, 4, 4), generator=generator)
        found = guide.after(maps, labels)
        pixels, classes = pixel_features(maps, False).double().numpy(), labels.reshape(-1).numpy()
        for k in range(2):  # eqs. 2-3: m, mu', Sigma' of the batch; w = m / (n + m)
            rows = pixels[classes == k]
            m, w, delta = len(rows), len(rows) / (count[k] + len(rows)), rows.mean(0) - mean[k]
            spread = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / m
            covariance[k] = (
                (1 - w) * covariance[k] + w * spread + w * (1 - w) * np.outer(delta, delta)
            )
            mean[k] += w * delta
            count[k] += m
        np.testing.assert_allclose(found.mean.numpy(), mean, atol=1e-5)
        np.testing.assert_allclose(found.covariance.numpy(), covariance, atol=1e-5)
    again = build_guide(
        None, guide.state(), None, plan, 2, CPU
    )  # the next round goes on from there
    untouched = again.after(maps, torch.full((1, 4, 4), 255))
    np.testing.assert_allclose(untouched.mean.numpy(), mean, atol=1e-5)


def test_online_collects_in_the_warm_up_and_compares_nothing(root, tmp_path):
    plan = by_site(root, tmp_path, "prototypes.memory=online", "prototypes.warmup_rounds=1")
    guide = build_guide(None, {}, None, plan, 1, CPU)
    assert guide.after(torch.rand(1, 8, 4, 4), torch.randint(0, 2, (1, 4, 4))) is None
    assert guide.state()["online.count"].sum() == 16


def test_a_pooled_run_sends_the_sum_of_its_training_batches(root, tmp_path):
    plan = pooled(
        root, tmp_path, "prototypes.memory=online", "method=sgcg", "method.local_epochs=2"
    )
    first = sites.answer(
        plan, wire.TRAIN, Request(sites.identity(plan, 1), sites.weights(plan)), POOLED
    )
    assert first.error == ""
    pixels = 32 * 32 * first.metrics["steps"] * plan.method.batch_size
    assert first.statistics.count.sum() == pixels  # with every step, not once a round
    options = {"held": [first.statistics.digest()]}
    request = Request(sites.identity(plan, 2), first.weights, first.statistics, options)
    second = sites.answer(plan, wire.TRAIN, request, POOLED)
    assert second.statistics.count.sum() == 2 * pixels
    assert second.metrics["loss_contrast"] > 0


def test_the_floor_of_online_compares_distinct_pixels(root, tmp_path):
    floors = ("privacy.min_pixels=100000", "method.local_epochs=30", "method.batch_size=16")
    plan = pooled(root, tmp_path, "prototypes.memory=online", "method=sgcg", *floors)
    reply = sites.answer(
        plan, wire.TRAIN, Request(sites.identity(plan, 1), sites.weights(plan)), POOLED
    )
    assert reply.statistics.count.tolist() == [0, 0]
    assert reply.details["withheld"] == ["background", "gland"]


def test_with_one_active_class_nothing_is_compared(root, tmp_path):
    """The closed form would be q' Sigma q / (2 tau^2): the features would only shrink."""
    plan = by_site(root, tmp_path, "prototypes.warmup_rounds=0")
    both = statistics(0, 500, 8)
    one = both.scaled([1, 0])
    assert Guidance.of(both, plan.prototypes, CPU) is not None
    assert Guidance.of(one, plan.prototypes, CPU) is None
    assert build_guide(one, {}, None, plan, 2, CPU) is None
    assert build_guide(both, {}, None, plan, 2, CPU) is not None
    source = dataclasses.replace(plan, method=dataclasses.replace(plan.method, name="source"))
    assert build_guide(both, {}, None, source, 2, CPU) is None
