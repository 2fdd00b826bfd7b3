"""Laws of the bound on one site's share of a weighted mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.fedavg import merge_moments, merge_weights
from fedsgcg.server.aggregation.shares import bounded, with_bounded_shares

WEIGHTS = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=6)
MOST = st.floats(0.05, 1.0)


@pytest.mark.parametrize(
    ("weights", "most", "expected"),
    [
        ((90, 5, 5), 0.5, (10, 5, 5)),
        ((40, 40, 10, 10), 0.3, (15, 15, 10, 10)),
        ((40, 30, 10, 20), 0.4, (40, 30, 10, 20)),
        ((90, 5, 5), 1.0, (90, 5, 5)),
        ((90, 9, 1), 1 / 3, (1, 1, 1)),
        ((90, 10), 0.4, (10, 10)),
        ((7,), 0.5, (7,)),
    ],
)
def test_shares_by_hand(
    weights: tuple[float, ...], most: float, expected: tuple[float, ...]
) -> None:
    np.testing.assert_allclose(bounded(weights, most), expected, rtol=1e-12)


@pytest.mark.row(4, 17)
@given(WEIGHTS, MOST)
@pytest.mark.attack("one-large-site")
def test_law_no_share_is_above_the_bound_and_no_weight_grows(
    weights: list[float], most: float
) -> None:
    """Row 4: a site that states as many examples as it may must not own the model."""
    found = bounded(weights, most)
    assert found.max() / found.sum() <= max(most, 1 / len(weights)) * (1 + 1e-9)
    assert (found > 0).all()
    assert (found <= np.array(weights)).all()
    # The order of the sites' weights is kept, and those that are not the largest keep theirs.
    lowered = found < np.array(weights)
    if most * len(weights) > 1 + 1e-9:
        np.testing.assert_allclose(found[lowered], found.max(), rtol=1e-9)


@given(WEIGHTS)
def test_law_without_a_bound_nothing_changes(weights: list[float]) -> None:
    model = Weights((("w", (1,)),), np.ones(1, np.float32))
    parts = [(f"{number}", model, weight) for number, weight in enumerate(weights)]
    assert with_bounded_shares(parts, 1.0) is parts
    assert bounded(weights, 1.0).tolist() == weights


def test_a_bounded_site_moves_the_model_by_its_share() -> None:
    def model(value: float) -> Weights:
        return Weights((("w", (1,)),), np.array([value], np.float32))

    parts = [("A", model(1.0), 1e6), ("B", model(0.0), 50.0), ("C", model(0.0), 50.0)]
    assert merge_weights(with_bounded_shares(parts, 0.4)).values[0] == np.float32(0.4)
    assert merge_weights(parts).values[0] > 0.999


def test_pooled_moments_are_bounded_in_each_layer() -> None:
    def moments(count: tuple[float, float], mean: float) -> NormMoments:
        return NormMoments(
            {"a": 1, "b": 1}, np.array(count), np.full(2, mean), np.array(count, float)
        )

    parts = [
        ("A", moments((98, 0), 10.0)),
        ("B", moments((1, 3), 0.0)),
        ("C", moments((1, 1), 4.0)),
    ]
    found = merge_moments(parts, most_share=0.5)
    # Layer a: counts 98, 1, 1 become 2, 1, 1. Layer b, which A has not seen: 3, 1 become 1, 1.
    np.testing.assert_allclose(found.count, [4, 2])
    np.testing.assert_allclose(found.mean, [6, 2])
    # Scatter: each value has a within-site variance of 1, plus the distances of the means.
    np.testing.assert_allclose(found.scatter, [4 + 2 * 16 + 36 + 4, 2 + 2 * 4])
    np.testing.assert_allclose(merge_moments(parts).count, [100, 4])
