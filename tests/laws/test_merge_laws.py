"""Properties of merging: independent of order, idempotent, bounded and equal to pooling."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.class_statistics import merge_statistics
from fedsgcg.server.aggregation.fedavg import merge_weights

FEW = settings(max_examples=60, deadline=None)
SIZE = 5
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = hnp.arrays(np.float32, SIZE, elements=NUMBERS)
SHARES = st.one_of(st.integers(1, 10**9).map(float), st.floats(1e-3, 1e6))
PARTS = st.lists(st.tuples(VALUES, SHARES, st.integers(0, 10**6)), min_size=1, max_size=6)


def weights(values: npt.NDArray[np.float32], steps: int = 0) -> Weights:
    return Weights((("x", (SIZE,)),), values, (("steps", steps),))


def named(
    parts: list[tuple[npt.NDArray[np.float32], float, int]],
) -> list[tuple[str, Weights, float]]:
    return [
        (f"site {k}", weights(values, steps), share)
        for k, (values, share, steps) in enumerate(parts)
    ]


@FEW
@given(PARTS, st.randoms(use_true_random=False))
@pytest.mark.row(49)
def test_order_of_arrival_changes_no_bit_of_the_model(parts, rng) -> None:  # type: ignore[no-untyped-def]
    sites = named(parts)
    shuffled = sites.copy()
    rng.shuffle(shuffled)
    one, other = merge_weights(sites), merge_weights(shuffled)
    assert one.values.tobytes() == other.values.tobytes()
    assert one.counters == other.counters


@FEW
@given(PARTS)
def test_a_merged_weight_is_between_those_of_the_sites(parts) -> None:  # type: ignore[no-untyped-def]
    merged = merge_weights(named(parts)).values
    own = np.stack([values for values, _, _ in parts])
    assert (merged >= own.min(axis=0)).all()
    assert (merged <= own.max(axis=0)).all()


@FEW
@given(VALUES, st.lists(SHARES, min_size=1, max_size=6))
def test_sites_that_agree_are_merged_to_what_they_agree_on(values, shares) -> None:  # type: ignore[no-untyped-def]
    merged = merge_weights(
        [(f"site {k}", weights(values), share) for k, share in enumerate(shares)]
    )
    np.testing.assert_array_equal(merged.values, values)


@FEW
@given(PARTS)
def test_weighted_mean_in_exact_arithmetic(parts) -> None:  # type: ignore[no-untyped-def]
    from fractions import Fraction

    merged = merge_weights(named(parts)).values
    total = sum(Fraction(share) for _, share, _ in parts)
    for k in range(SIZE):
        terms = [Fraction(float(values[k])) * Fraction(share) for values, share, _ in parts]
        exact = sum(terms, Fraction(0)) / total
        size = max(abs(Fraction(float(values[k]))) for values, _, _ in parts)
        # one float32 rounding of the result, and float64 round-off relative to the largest site
        assert abs(Fraction(float(merged[k])) - exact) <= abs(exact) * Fraction(
            1, 2**23
        ) + size * Fraction(1, 2**48) + (Fraction(1, 2**149))


@st.composite
def labelled_sites(draw) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:  # type: ignore[no-untyped-def]
    sites = []
    for _ in range(draw(st.integers(1, 5))):
        n = draw(st.integers(0, 12))
        features = draw(hnp.arrays(np.float64, (n, 3), elements=st.floats(-100, 100)))
        sites.append(
            (features, draw(hnp.arrays(np.int64, n, elements=st.sampled_from([0, 1, 2, 255]))))
        )
    return sites


def statistics(sites) -> list[tuple[str, ClassStatistics]]:  # type: ignore[no-untyped-def]
    return [(f"site {k}", ClassStatistics.from_features(x, y, 3)) for k, (x, y) in enumerate(sites)]


@FEW
@given(labelled_sites())
def test_merged_statistics_equal_those_of_all_pixels_together(sites) -> None:  # type: ignore[no-untyped-def]
    merged = merge_statistics(statistics(sites))
    features, labels = np.concatenate([x for x, _ in sites]), np.concatenate([y for _, y in sites])
    for k in range(3):
        own = features[labels == k]
        assert merged.count[k] == len(own)
        if len(own):
            np.testing.assert_allclose(merged.mean[k], own.mean(axis=0), atol=1e-9)
            np.testing.assert_allclose(merged.covariance[k], np.cov(own.T, bias=True), atol=1e-8)


@FEW
@given(labelled_sites())
def test_equal_sites_are_a_mean_of_means_and_of_second_moments(sites) -> None:  # type: ignore[no-untyped-def]
    merged = merge_statistics(statistics(sites), "sites")
    for k in range(3):
        own = [x[y == k] for x, y in sites if (y == k).any()]
        assert merged.count[k] == sum(len(part) for part in own)
        if own:
            mean = np.mean([part.mean(axis=0) for part in own], axis=0)
            second = np.mean([part.T @ part / len(part) for part in own], axis=0)
            np.testing.assert_allclose(merged.mean[k], mean, atol=1e-9)
            np.testing.assert_allclose(
                merged.covariance[k], second - np.outer(mean, mean), atol=1e-7
            )


@FEW
@given(labelled_sites(), st.sampled_from(["pixels", "sites"]), st.randoms(use_true_random=False))
def test_order_of_arrival_changes_no_bit_of_the_statistics(sites, weighting, rng) -> None:  # type: ignore[no-untyped-def]
    parts = statistics(sites)
    shuffled = parts.copy()
    rng.shuffle(shuffled)
    one, other = merge_statistics(parts, weighting), merge_statistics(shuffled, weighting)
    for name in ("count", "mean", "scatter"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


@FEW
@given(labelled_sites(), st.sampled_from(["pixels", "sites"]))
@pytest.mark.row(13)
def test_merged_scatter_is_symmetric_and_has_no_negative_variance(sites, weighting) -> None:  # type: ignore[no-untyped-def]
    merged = merge_statistics(statistics(sites), weighting)
    assert (merged.scatter == merged.scatter.transpose(0, 2, 1)).all()
    assert np.linalg.eigvalsh(merged.scatter).min() >= -1e-8 * max(
        1.0, float(np.abs(merged.scatter).max())
    )
