"""DoFE's pool: filled from class statistics, used by the network, stored with the model."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from fedsgcg.clients.predict.model import load_model
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.heads import build_trained, state_of
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.learnable import POOL, is_learnable
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.domain_pool import of_all_classes, with_pool
from fedsgcg.server.records import results
from fedsgcg.server.records.checkpoint import Best
from fedsgcg.server.records.model_card import model_card

CHANNELS = 8  # of the penultimate map at base width 4


@pytest.fixture(scope="module")
def plan():
    names = ("data.root=/none", "data.sites=[A,B,C]", "heldout=C", "data.image_size=32")
    tree = compose([*names, "method=dofe", "network.base_width=4"])
    return Plan.from_tree(tree | {"output": "run"})


def described(features, labels):
    """Class statistics of features (N, A) with labels (N,)."""
    parts = [features[labels == k] for k in range(2)]
    count = np.array([len(part) for part in parts], float)
    mean = np.stack([part.mean(0) if len(part) else np.zeros(CHANNELS) for part in parts])
    scatter = [(part - m).T @ (part - m) for part, m in zip(parts, mean, strict=True)]
    return ClassStatistics(count, mean, np.stack(scatter))


def hospital(seed, count=60):
    rng = np.random.default_rng(seed)
    features = rng.normal(rng.normal(size=CHANNELS), 1.0, (count, CHANNELS))
    return features, rng.integers(0, 2, count)


@given(st.integers(0, 1000))
def test_a_place_has_the_moments_of_all_pixels_whatever_their_classes(seed):
    features, labels = hospital(seed)
    mean, covariance = of_all_classes(described(features, labels))
    np.testing.assert_allclose(mean, features.mean(0), atol=1e-12)
    wanted = np.cov(features.T, bias=True)
    wanted += 1e-3 * np.trace(wanted) / CHANNELS * np.eye(CHANNELS)
    np.testing.assert_allclose(covariance, wanted, atol=1e-9)


def test_similarities_are_the_likelihoods_of_the_hospitals(plan):
    network = build_trained(plan, 0)
    parts = {name: described(*hospital(seed)) for name, seed in (("B", 2), ("A", 1))}
    weights = with_pool(Weights.from_state(state_of(network)), parts)
    network.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.to_state().items()})
    codes = torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(3))
    found = network.knowledge.pool(codes)
    likelihood = np.stack(
        [
            multivariate_normal(*of_all_classes(parts[name])).pdf(codes.numpy())
            for name in ("A", "B")
        ],
        axis=1,
    )
    wanted = likelihood / likelihood.sum(1, keepdims=True)
    np.testing.assert_allclose(found[:, :2].numpy(), wanted, atol=1e-4)
    assert not found[:, 2:].any()
    assert not any(is_learnable(name) for name, _ in weights.layout if name.startswith(POOL))


def test_an_empty_pool_changes_nothing_and_a_filled_one_does(plan):
    network = build_trained(plan, 0).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, features = network(images)
        assert torch.equal(network.decoder.head(features), logits)
        before = Weights.from_state(state_of(network))
        assert with_pool(before, {}) is before
        after = with_pool(before, {"A": described(*hospital(1))})
        state = {k: torch.from_numpy(v.copy()) for k, v in after.to_state().items()}
        network.load_state_dict(state)
        other, same = network(images)
    assert torch.equal(same, features)
    assert not torch.allclose(other, logits)


def test_a_model_without_a_pool_is_returned_as_it_is():
    weights = Weights.from_state({"a": np.ones(3, np.float32)})
    assert with_pool(weights, {"A": described(*hospital(1))}) is weights


def test_the_saved_model_holds_the_pool_and_says_so(plan, tmp_path):
    from dataclasses import replace

    own = replace(plan, output=str(tmp_path))
    parts = {name: described(*hospital(seed)) for seed, name in enumerate("AB")}
    weights = with_pool(Weights.from_state(state_of(build_trained(own, 0))), parts)
    card = model_card(own, Best(1, 0.5, weights), ["B", "A"], prototypes=False)
    assert card["domain_pool"] == ["A", "B"]
    results.write_model(Disk(), own, weights, card)
    model = load_model(tmp_path)
    assert model.network.knowledge.pool.used.sum() == 2
    np.testing.assert_array_equal(
        model.network.knowledge.pool.mean.numpy(), weights.to_state()[f"{POOL}mean"]
    )
