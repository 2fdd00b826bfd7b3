"""Fréchet distance between normal distributions: values by hand, and the laws of a distance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from fedsgcg.common.frechet import class_distances, frechet_distances, mean_distance_to_others
from fedsgcg.common.statistics import ClassStatistics


@st.composite
def distributions(draw, number=3):
    """Means and covariances of any rank, zero included, of very different sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(1, 5))
    means, covariances = [], []
    for _ in range(number):
        factor = rng.normal(size=(size, draw(st.integers(0, size)))) * 10 ** rng.uniform(-3, 3)
        means.append(rng.normal(size=size) * 10 ** rng.uniform(-3, 3))
        covariances.append(factor @ factor.T)
    return np.array(means), np.array(covariances)


@settings(max_examples=60)
@given(distributions())
def test_law_it_is_a_distance(given_ones):
    distances = frechet_distances(*given_ones)
    assert (distances == distances.T).all()
    assert (distances >= 0).all()
    assert (np.diag(distances) == 0).all()
    a, b, c = distances[0, 1], distances[1, 2], distances[0, 2]
    assert c <= (a + b) * (1 + 1e-9)


@settings(max_examples=40)
@given(distributions(1))
def test_law_equal_distributions_have_distance_zero_up_to_rounding(given_one):
    means, covariances = (np.repeat(array, 2, axis=0) for array in given_one)
    scale = np.sqrt(np.trace(covariances[0])) + 1e-300
    assert frechet_distances(means, covariances)[0, 1] <= 1e-7 * scale


@settings(max_examples=40)
@given(distributions(2))
def test_law_it_is_the_formula_where_that_is_well_conditioned(given_two):
    means, covariances = given_two
    covariances = covariances + np.eye(means.shape[1]) * np.abs(covariances).max(initial=1.0)
    root = sqrtm(covariances[0])
    cross = np.real(np.trace(sqrtm(root @ covariances[1] @ root)))
    square = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances.sum(axis=0)) - 2 * cross
    scale = np.trace(covariances.sum(axis=0)) + np.sum((means[0] - means[1]) ** 2)
    found = frechet_distances(means, covariances)[0, 1] ** 2
    assert found == pytest.approx(square, abs=1e-9 * scale)


def test_values_by_hand():
    # Diagonal covariances: the sum of (s1 - s2)^2 over the axes; here (2 - 1)^2 + (3 - 5)^2 = 5,
    # and 3^2 + 4^2 between the means.
    covariances = [np.diag([4.0, 9.0]), np.diag([1.0, 25.0])]
    assert frechet_distances([[0, 0], [3, 4]], covariances)[0, 1] == pytest.approx(np.sqrt(30))
    # Commuting covariances have the same axes: turned together, nothing changes.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = [turn @ spread @ turn.T for spread in covariances]
    assert frechet_distances(np.zeros((2, 2)), turned)[0, 1] == pytest.approx(np.sqrt(5))
    # Singular covariances on orthogonal axes share nothing: tr S1 + tr S2.
    flat = [np.diag([4.0, 0.0]), np.diag([0.0, 9.0])]
    assert frechet_distances(np.zeros((2, 2)), flat)[0, 1] == pytest.approx(np.sqrt(13))
    # A point has the distance sqrt(tr S) from a distribution around it.
    point = [np.zeros((2, 2)), np.diag([4.0, 9.0])]
    assert frechet_distances(np.zeros((2, 2)), point)[0, 1] == pytest.approx(np.sqrt(13))


def test_classes_that_a_site_has_not_seen_are_not_known():
    def of(values, labels):
        return ClassStatistics.from_features(np.array(values, float)[:, None], labels, 2)

    parts = [of([0, 2], [0, 0]), of([4, 6, 9], [0, 0, 1]), of([7, 9], [0, 0])]
    found = class_distances(parts)
    assert found[0] == pytest.approx(np.array([[0, 4, 7], [4, 0, 3], [7, 3, 0]]))
    means = mean_distance_to_others(found)
    assert means[0] == pytest.approx([5.5, 3.5, 5.0])
    assert np.isnan(means[1]).all()
    broken = frechet_distances([[0.0], [np.inf]], [[[1.0]], [[1.0]]])
    assert np.isnan(broken[1]).all()
    assert broken[0, 0] == 0
