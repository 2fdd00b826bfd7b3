"""Removing a part from pooled statistics is the inverse of adding it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.statistics import ClassStatistics


def described(rng: np.random.Generator, pixels: int, offset: float) -> ClassStatistics:
    features = rng.normal(offset, 1.0, (pixels, 3))
    return ClassStatistics.from_features(features, rng.integers(0, 2, pixels), 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.floats(-5, 5))
def test_law_what_was_added_can_be_removed(seed: int, own: int, others: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    kept, part = described(rng, own, 0.0), described(rng, others, offset)
    back = (kept + part).without(part)
    np.testing.assert_array_equal(back.count, kept.count)
    np.testing.assert_allclose(back.mean, kept.mean, atol=1e-9)
    np.testing.assert_allclose(back.scatter, kept.scatter, atol=1e-7)


def test_what_is_removed_whole_is_absent() -> None:
    part = described(np.random.default_rng(1), 30, 2.0)
    nothing = part.without(part)
    for array in (nothing.count, nothing.mean, nothing.scatter):
        assert not array.any()


def test_two_pixels_by_hand() -> None:
    """Of 0 and 4 the pixel 4 is removed: mean 2 becomes 0, scatter 8 becomes 0."""
    both = ClassStatistics.from_features(np.array([[0.0], [4.0]]), np.array([0, 0]), 1)
    one = ClassStatistics.from_features(np.array([[4.0]]), np.array([0]), 1)
    left = both.without(one)
    assert (left.count[0], left.mean[0, 0], left.scatter[0, 0, 0]) == (1.0, 0.0, 0.0)


def test_more_pixels_than_there_are_cannot_be_removed() -> None:
    rng = np.random.default_rng(2)
    with pytest.raises(ValueError, match="at most"):
        described(rng, 5, 0.0).without(described(rng, 50, 0.0))
