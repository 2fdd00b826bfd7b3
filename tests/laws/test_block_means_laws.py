"""Class statistics estimated from block means: exact means, an unbiased covariance, fewer bytes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.block_means import BlockMeans, block_means_bytes
from fedsgcg.common.wire.payload import Identity, encode_statistics

IDENTITY = Identity("run", "South", 2, "plan")


def blocks_of(features: np.ndarray, block: np.ndarray, blocks: int, unit: bool = False):
    """One class; blocks by number."""
    parts = ClassStatistics.from_features(features, block, blocks)
    return BlockMeans(parts.count[None], parts.mean[None], unit)


def test_over_all_partitions_the_mean_estimate_is_the_sample_covariance():
    """Brute force: 6 points into 2 blocks of given sizes, every way to choose them."""
    points = np.random.default_rng(0).normal(size=(6, 3)) * [1, 2, 3]
    for size in (1, 2, 3):
        found = []
        for chosen in itertools.combinations(range(6), size):
            block = np.isin(np.arange(6), chosen).astype(int)
            found.append(blocks_of(points, block, 2).estimate().covariance[0])
        assert np.allclose(np.mean(found, axis=0), np.cov(points.T), atol=1e-12)


def test_on_gaussians_the_estimate_is_unbiased():
    rng = np.random.default_rng(1)
    root = np.array([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.4]])
    covariance, mean = root @ root.T, np.array([3.0, -1.0, 0.0])
    found = np.array(
        [
            blocks_of(rng.normal(size=(60, 3)) @ root.T + mean, rng.integers(0, 5, 60), 5)
            .estimate()
            .covariance[0]
            for _ in range(3000)
        ]
    )
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - covariance) < 4 * error).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 10**6))
def test_count_and_mean_are_exact_and_the_covariance_is_possible(pixels, blocks, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(pixels, 3)) + rng.normal(size=3)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found = blocks_of(features, rng.integers(0, blocks, pixels), blocks, unit=True).estimate()
    assert found.count.tolist() == [pixels]
    assert np.allclose(found.mean[0], features.mean(axis=0), atol=1e-12)
    assert np.linalg.eigvalsh(found.covariance[0]).min() > -1e-12
    trace = np.trace(found.covariance[0]) + found.mean[0] @ found.mean[0]
    # Unit features have |mean|^2 + trace = 1; two equal block means show no direction.
    assert trace <= 1 + 1e-9
    assert trace == pytest.approx(1.0) or np.allclose(found.covariance, 0)


def example(classes: int = 2, blocks: int = 4, features: int = 32) -> BlockMeans:
    rng = np.random.default_rng(0)
    count = rng.integers(1, 99, (classes, blocks)).astype(float)
    return BlockMeans(count, rng.normal(size=(classes, blocks, features)), True)


def test_a_stream_is_read_back_exactly_and_is_smaller_than_the_full_form():
    means = example()
    data = means.encode(IDENTITY)
    found, identity = BlockMeans.decode(data, block_means_bytes(2, 32, 4))
    assert identity == IDENTITY
    assert np.array_equal(found.count, means.count)
    assert np.array_equal(found.mean, means.mean)
    assert found.unit_norm
    full = len(encode_statistics(means.estimate(), IDENTITY))
    assert 8 * 2 * 4 * 33 <= len(data) < full / 2


def test_damaged_or_oversized_streams_are_refused():
    data = example().encode(IDENTITY)
    for wrong in (b"", data[:-9], data[:100], b"x" * 200):
        with pytest.raises(FedsgcgError) as caught:
            BlockMeans.decode(wrong, 10**6)
        assert caught.value.code == "PAY-106"
    with pytest.raises(FedsgcgError) as caught:
        BlockMeans.decode(data, 100)
    assert caught.value.code == "PAY-105"


def test_a_withheld_class_is_absent():
    found = example().without(np.array([False, True])).estimate()
    assert found.count[1] == 0
    assert not found.mean[1].any()
    assert not found.scatter[1].any()
    assert found.count[0] > 0
