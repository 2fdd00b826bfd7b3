"""Differential privacy: what a patient can change, the distribution of the noise, valid results."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from fedsgcg.clients.methods.private_statistics import (
    UNIT,
    contribution,
    contribution_size,
    noisy_statistics,
    sensitivity,
    valid_statistics,
)
from fedsgcg.common.differential_privacy.noise import GRID, Noise
from fedsgcg.common.statistics import ClassStatistics

K, A = 3, 4
ANY = st.floats(allow_nan=True, allow_infinity=True, width=64)
FINITE = st.floats(-1e6, 1e6)


def patient(seed: int, pixels: int, classes: int) -> ClassStatistics:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(pixels, A)) + 3 * rng.normal(size=A)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return ClassStatistics.from_features(features, rng.integers(0, classes, pixels), K)


@st.composite
def hospital(draw: st.DrawFn) -> list[ClassStatistics]:
    """Patients with a few pixels, down to one, in one to K classes."""
    each = st.builds(patient, st.integers(0, 10**6), st.integers(1, 30), st.integers(1, K))
    return draw(st.lists(each, max_size=5))


@settings(max_examples=60, deadline=None)
@given(hospital(), st.integers(0, 10**6), st.integers(1, 30), st.integers(1, K), st.booleans())
def test_adding_or_removing_a_patient_moves_the_sums_by_at_most_the_sensitivity(
    others, seed, pixels, classes, means_only
):
    size = contribution_size(K, A, means_only)
    before = sum((contribution(each, means_only) for each in others), np.zeros(size, np.int64))
    moved = before + contribution(patient(seed, pixels, classes), means_only) - before
    assert moved.shape == (size,)
    assert int(moved @ moved) <= UNIT**2  # in grid steps: exact integers


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, K, elements=st.sampled_from([0.0, 1.0, 1e9])),
    arrays(np.float64, (K, A), elements=FINITE),
    arrays(np.float64, (K, A, A), elements=ANY),
    st.booleans(),
)
def test_even_impossible_statistics_of_a_patient_cannot_exceed_the_sensitivity(
    count, mean, scatter, means_only
):
    with np.errstate(all="ignore"):
        whole = contribution(ClassStatistics(count, mean, scatter), means_only)
    assert sum(int(value) ** 2 for value in whole) <= UNIT**2


def test_the_sensitivity_is_reached_up_to_rounding():
    rows = np.zeros((K, A))
    rows[:, 0] = 1.0  # one pixel of each class, along one axis
    whole = contribution(ClassStatistics.from_features(rows, np.arange(K), K))
    assert np.sqrt(whole @ whole) > UNIT - 3 * K
    assert sensitivity(K) == pytest.approx(3.0)
    assert sensitivity(2, means_only=True) == pytest.approx(2.0)


@pytest.mark.parametrize("sigma", [1, 7])
def test_integers_have_the_discrete_gaussian_distribution(sigma):
    drawn = Noise.seeded(0, "distribution", sigma).integers(sigma, 20_000)
    reach = 4 * sigma
    support = np.arange(-60 * sigma, 60 * sigma + 1)
    weights = np.exp(-(support.astype(float) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    inside = np.abs(support) <= reach
    counts = Counter(drawn)
    observed = [counts[value] for value in range(-reach, reach + 1)]
    expected = len(drawn) * weights[inside]
    keep = expected >= 5
    observed_kept = np.array(observed, float)[keep]
    rest = len(drawn) - observed_kept.sum(), len(drawn) - expected[keep].sum()
    found = [*observed_kept, rest[0]], [*expected[keep], rest[1]]
    assert stats.chisquare(*found).pvalue > 1e-3


def test_normals_have_the_normal_distribution_and_rounded_values_a_grid():
    noise = Noise.seeded(0, "normals")
    assert stats.kstest(noise.normals(50_000), "norm").pvalue > 1e-3
    values = noise.rounded(np.full(50_000, 5.0), 2.0)
    assert stats.kstest((values - 5.0) / 2.0, "norm").pvalue > 1e-3
    steps = values / (2.0 / GRID)
    assert np.array_equal(steps, np.rint(steps))


def test_only_seeded_noise_can_be_repeated():
    def draw(noise: Noise) -> list[int]:
        return noise.integers(1000, 8)

    assert draw(Noise.seeded(1, "a")) == draw(Noise.seeded(1, "a"))
    assert draw(Noise.seeded(1, "a")) != draw(Noise.seeded(2, "a"))
    assert draw(Noise.from_entropy()) != draw(Noise.from_entropy())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 100))
def test_uniform_integers_stay_below_their_limit(limit, seed):
    assert 0 <= Noise.seeded(seed, "below").below(limit) < limit


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, K, elements=st.floats(-50, 200)),
    arrays(np.float64, (K, A), elements=st.floats(-300, 300)),
    arrays(np.float64, (K, A, A), elements=st.floats(-300, 300)),
    st.booleans(),
)
def test_whatever_the_noise_the_statistics_are_possible(count, first, second, means_only):
    found = valid_statistics(count, first, second, 2.0, means_only=means_only)
    assert ((found.count == 0) | (found.count >= 2)).all()
    assert np.array_equal(found.count, np.rint(found.count))
    square = np.square(found.mean).sum(axis=1)
    trace = np.trace(found.covariance, axis1=1, axis2=2)
    assert (square + trace <= 1 + 1e-9).all()
    assert np.linalg.eigvalsh(found.covariance).min() >= -1e-9
    assert np.array_equal(found.scatter, found.scatter.transpose(0, 2, 1))


def test_without_noise_to_speak_of_the_statistics_are_those_of_equal_patients():
    patients = [patient(seed, 400, K) for seed in range(40)]
    sums = sum(contribution(each) for each in patients)
    found = noisy_statistics(sums, (K, A), 0.01, Noise.seeded(0, "small"), 1)
    mean = np.mean([each.mean for each in patients], axis=0)
    products = [
        each.covariance + each.mean[:, :, None] * each.mean[:, None, :] for each in patients
    ]
    covariance = np.mean(products, axis=0) - mean[:, :, None] * mean[:, None, :]
    assert found.count.tolist() == [40, 40, 40]
    assert np.abs(found.mean - mean).max() < 0.01
    assert np.abs(found.covariance - covariance).max() < 0.01


def test_the_noise_of_the_sums_has_the_stated_deviation():
    size = contribution_size(K, A)
    multiplier, step = 2.0, sensitivity(K) / UNIT
    drawn = np.array(Noise.seeded(3, "std").integers(math.ceil(multiplier * UNIT), 40 * size))
    # 3 standard errors of a standard deviation
    allowed = 3 / math.sqrt(2 * drawn.size)
    assert np.std(drawn * step) == pytest.approx(multiplier * sensitivity(K), rel=allowed)
