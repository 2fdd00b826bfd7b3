"""Attacks: the scores by hand, and that each attack finds what is there and nothing that is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.clients.methods.base import segmentation_loss
from fedsgcg.clients.training import weights_of
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.deploy.attacks.inversion import span_of, subtract_rounds
from fedsgcg.deploy.attacks.membership import as_vector, attack_updates, inner_products
from fedsgcg.deploy.attacks.patients import Patient
from fedsgcg.deploy.attacks.scores import auc, clopper_pearson, separation, standardised
from fedsgcg.server.records.received import Received
from tests.support import sites
from tests.support.plans import small_plan

numbers = st.lists(st.integers(-5, 5), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(numbers, numbers)
def test_the_auc_is_the_share_of_pairs_in_the_right_order(members, others):
    expected = np.mean([(a > b) + 0.5 * (a == b) for a in members for b in others])
    assert auc(np.array(members, float), np.array(others, float)) == pytest.approx(expected)


def test_separation_by_hand():
    found = separation(np.array([1.0, 2.0, 3.0, 9.0]), np.array([0.0, 2.5, 4.0]))
    assert found.auc == pytest.approx((1 + 1 + 2 + 3) / 12)
    assert found.tpr == 0.25  # only 9 is above every other
    assert found.auc_interval[0] <= found.auc <= found.auc_interval[1]
    assert (found.members, found.others) == (4, 3)
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert clopper_pearson(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
    many = separation(np.full(10, 98.5), np.arange(100, dtype=float))
    assert many.tpr == 1.0  # one of a hundred others may be above


def test_hospitals_are_comparable_after_standardising():
    found = standardised(np.array([100.0, 102.0, 104.0]))
    assert found.tolist() == [-1.0, 0.0, 1.0]
    assert standardised(np.full(3, 7.0)).tolist() == [0.0, 0.0, 0.0]


def unit(rng: np.random.Generator, number: int, features: int) -> np.ndarray:
    rows = rng.normal(size=(number, features)) + rng.normal(size=features)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.row(66)
@pytest.mark.parametrize("pixels", [3, 6, 400])
def test_few_pixels_are_spanned_by_their_scatter_and_many_span_everything(pixels):
    rng, features = np.random.default_rng(0), 16
    rows, others = unit(rng, pixels, features), unit(rng, 50, features)
    statistics = ClassStatistics.from_features(rows, np.zeros(pixels, int), 1)
    found = span_of(statistics, 0, rows, others)
    assert found.rank == min(pixels - 1, features)
    if pixels < features:
        assert found.outside < 1e-4
        assert found.chance > 0.3
    else:
        assert found.outside < 1e-4
        assert found.chance < 1e-4  # the span is everything and says nothing


def test_statistics_of_few_patients_show_who_is_in_them_and_of_many_hardly():
    def attack(members: int) -> float:
        rng = np.random.default_rng(members)
        own = rng.normal(size=(members + 40, 100))
        inside, outside = own[:members], np.arange(len(own)) >= members
        scores = inner_products(own, outside, inside.mean(axis=0))
        return auc(scores[~outside], scores[outside])

    assert attack(5) > 0.95
    assert attack(5) > attack(2000) > 0.4


def test_absent_classes_say_nothing():
    statistics = ClassStatistics(np.array([2.0, 0.0]), np.ones((2, 3)), np.zeros((2, 3, 3)))
    vector = as_vector(statistics)
    assert np.isnan(vector[len(vector) // 2 :]).all()
    own = np.stack([vector, vector, vector])
    assert np.isfinite(inner_products(own, np.array([False, True, True]), vector)).all()


def patients(number: int, side: int = 32) -> list[Patient]:
    rng, found = torch.Generator().manual_seed(1), []
    for place in range(number):
        images = torch.rand((2, 3, side, side), generator=rng) * 0.4 - 0.6
        labels = torch.zeros((2, side, side), dtype=torch.long)
        low = 6 + 2 * (place % 5)
        labels[:, low : low + 10, 8:20] = 1
        images[:, :, low : low + 10, 8:20] += 0.8
        found.append(Patient("A", place < number // 2, images, labels))
    return found


def plan_with(tmp_path, **changes) -> Plan:
    return small_plan(tmp_path, network__norm="group", **changes)


def test_updates_that_fitted_the_members_are_recognised(tmp_path):
    plan = plan_with(tmp_path)
    own = [
        each if each.member else replace(each, labels=1 - each.labels) for each in patients(8)
    ]  # what fits the members does not fit the others
    network = build_network(plan.network, 3, plan.data.out_channels, 0)
    sent = sites.weights(plan)
    same = attack_updates(plan, [Received("A", "train", 1, sent, sent, None)], own, sent)
    assert same is not None
    assert same.auc == 0.5  # nothing was learned
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    images = torch.cat([each.images for each in own if each.member])
    labels = torch.cat([each.labels for each in own if each.member])
    for _ in range(10):
        optimizer.zero_grad()
        segmentation_loss(network(images)[0], labels, plan.data).backward()
        optimizer.step()
    fitted = weights_of(network)
    found = attack_updates(plan, [Received("A", "train", 1, sent, fitted, None)], own, sent)
    assert found is not None
    assert found.auc == 1.0
    # In a secure sum the reply has no weights, and the merged model is what the coordinator sees.
    masked = plan_with(tmp_path, privacy__secure_sums={"enabled": True})
    summed = attack_updates(masked, [Received("A", "train", 1, sent, None, None)], own, fitted)
    assert summed is not None
    assert summed.auc == 1.0


def test_two_releases_that_differ_by_one_patient_give_it_exactly_unless_they_have_noise(tmp_path):
    own = patients(6)
    plan = plan_with(tmp_path)
    network = build_network(plan.network, 3, plan.data.out_channels, 0).eval()
    found = subtract_rounds(network, own, plan)
    assert found.error < 1e-3
    assert found.exact == 1.0
    dp = {"channels": ["statistics"], "statistics_noise": 4.0}
    noisy = subtract_rounds(network, own, plan_with(tmp_path, privacy__dp=dp))
    assert noisy.exact == 0.0
    assert noisy.error >= 1.0
