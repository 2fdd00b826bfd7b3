"""Properties of class statistics: adding equals pooling for any partition, order or offset."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.statistics import ClassStatistics, between_site_trace, within_site_trace

IGNORE = 255


@st.composite
def labelled(draw, min_pixels=0, max_pixels=60):
    """Features (N, A) with random offset and scale, labels with ignored pixels, and K."""
    N, A, K = (
        draw(st.integers(min_pixels, max_pixels)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 4)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset, scale = draw(st.sampled_from([(0, 1), (10, 0.1), (1000, 1)]))
    labels = rng.integers(0, draw(st.integers(1, K)), N)
    labels[rng.random(N) < draw(st.sampled_from([0, 0.3]))] = IGNORE
    return offset + scale * rng.standard_normal((N, A)), labels, K


def brute_force(features, labels, K):
    """Two-pass definition, class by class, pixel by pixel."""
    A = features.shape[1]
    count, mean, scatter = np.zeros(K), np.zeros((K, A)), np.zeros((K, A, A))
    for k in range(K):
        rows = [x for x, y in zip(features, labels, strict=True) if y == k]
        count[k] = len(rows)
        if rows:
            mean[k] = sum(rows) / len(rows)
            scatter[k] = sum(np.outer(x - mean[k], x - mean[k]) for x in rows)
    return ClassStatistics(count, mean, scatter)


def assert_same(found, wanted, rtol=1e-9, atol=1e-7):
    np.testing.assert_array_equal(found.count, wanted.count)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(found.scatter, wanted.scatter, rtol=rtol, atol=atol)
    np.testing.assert_array_equal(found.scatter, found.scatter.transpose(0, 2, 1))


def assert_identical(found, wanted):
    for name in ("count", "mean", "scatter"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def parts_of(features, labels, K, seed, parts):
    owner = np.random.default_rng(seed).integers(0, parts, len(labels))
    return [
        ClassStatistics.from_features(features[owner == s], labels[owner == s], K, IGNORE)
        for s in range(parts)
    ]


@settings(deadline=None)
@given(labelled())
def test_from_features_equals_the_definition(data):
    assert_same(ClassStatistics.from_features(*data, IGNORE), brute_force(*data))


@settings(deadline=None)
@given(labelled(), st.integers(0, 99), st.integers(1, 6))
def test_adding_any_partition_equals_pooling(data, seed, parts):
    features, labels, K = data
    whole = brute_force(features, labels, K)
    assert_same(sum_of(parts_of(features, labels, K, seed, parts)), whole)


def sum_of(parts):
    return reduce(lambda a, b: a + b, parts)


@settings(deadline=None)
@given(labelled(), st.integers(0, 99), st.permutations(range(5)))
def test_the_order_and_the_tree_of_additions_do_not_matter(data, seed, order):
    parts = parts_of(*data, seed, 5)
    a, b, c, d, e = (parts[i] for i in order)
    assert_same(((a + b) + (c + d)) + e, sum_of(parts))


@settings(deadline=None)
@given(labelled())
def test_nothing_is_the_exact_identity(data):
    statistics = ClassStatistics.from_features(*data, IGNORE)
    nothing = ClassStatistics.empty(statistics.num_classes, statistics.num_features)
    assert_identical(statistics + nothing, statistics)
    assert_identical(nothing + statistics, statistics)


@settings(deadline=None)
@given(labelled(min_pixels=1), labelled(min_pixels=1))
@pytest.mark.row(14)
def test_an_absent_class_changes_nothing(one, other):
    A, K = min(one[0].shape[1], other[0].shape[1]), 5
    first = ClassStatistics.from_features(
        one[0][:, :A], np.where(one[1] == IGNORE, IGNORE, 0), K, IGNORE
    )
    second = ClassStatistics.from_features(
        other[0][:, :A], np.where(other[1] == IGNORE, IGNORE, 3), K, IGNORE
    )
    pooled = first + second
    for k, source in ((0, first), (3, second)):
        assert pooled.count[k] == source.count[k]
        np.testing.assert_array_equal(pooled.mean[k], source.mean[k])
        np.testing.assert_array_equal(pooled.scatter[k], source.scatter[k])
    assert not pooled.count[[1, 2, 4]].any()


@settings(deadline=None)
@given(labelled(min_pixels=1), st.floats(-100, 100))
def test_a_shift_moves_the_mean_and_leaves_the_scatter(data, shift):
    features, labels, K = data
    here, there = (
        brute_force(features, labels, K),
        ClassStatistics.from_features(features + shift, labels, K, IGNORE),
    )
    seen = here.count > 0
    np.testing.assert_allclose(there.mean[seen], here.mean[seen] + shift, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(there.scatter, here.scatter, rtol=1e-9, atol=1e-7)


@settings(deadline=None)
@given(labelled(), st.booleans(), st.integers(0, 99))
def test_sums_about_a_reference_come_back(data, with_reference, seed):
    statistics = ClassStatistics.from_features(*data, IGNORE)
    near = statistics.mean + np.random.default_rng(seed).standard_normal(statistics.mean.shape)
    reference = near if with_reference else None
    count, first, second = statistics.to_sums(reference)
    centre = near if with_reference else np.zeros_like(near)
    for k in range(statistics.num_classes):
        rows = data[0][data[1] == k] - centre[k]
        np.testing.assert_allclose(first[k], rows.sum(0), rtol=1e-8, atol=1e-7)
        np.testing.assert_allclose(second[k], rows.T @ rows, rtol=1e-8, atol=1e-7)
    back = ClassStatistics.from_sums(count, first, second, reference)
    scale = 1 if with_reference else 1 + np.abs(second).max(initial=0)
    assert_same(back, statistics, atol=1e-9 * scale + 1e-7)


@settings(deadline=None)
@given(labelled(), st.integers(0, 99))
def test_sums_of_sites_about_one_reference_add_up(data, seed):
    parts = parts_of(*data, seed, 3)
    reference = parts[0].mean + 0.5
    sums = [part.to_sums(reference) for part in parts]
    added = ClassStatistics.from_sums(
        *(sum(column) for column in zip(*sums, strict=True)), reference
    )
    scale = max(np.abs(s[2]).max(initial=0) for s in sums)
    assert_same(added, sum_of(parts), atol=1e-9 * scale + 1e-7)


@settings(deadline=None)
@given(labelled(), st.floats(0.01, 1), st.integers(0, 99))
def test_a_discount_equals_scaled_counts(data, factor, seed):
    old, fresh, _ = parts_of(*data, seed, 3)
    faded = old.discounted(factor)
    np.testing.assert_array_equal(faded.count, old.count * factor)
    np.testing.assert_allclose(faded.covariance, old.covariance, rtol=1e-12, atol=1e-15)
    pooled = faded + fresh
    total = faded.count + fresh.count
    for k in np.flatnonzero(total):
        mean = (faded.count[k] * old.mean[k] + fresh.count[k] * fresh.mean[k]) / total[k]
        np.testing.assert_allclose(pooled.mean[k], mean, rtol=1e-12, atol=1e-9)


@settings(deadline=None)
@given(labelled(min_pixels=1))
@pytest.mark.row(14)
def test_a_class_seen_by_one_pixel_has_that_mean_and_no_scatter(data):
    features, _, K = data
    statistics = ClassStatistics.from_features(features[:1], np.array([K - 1]), K)
    np.testing.assert_allclose(statistics.mean[K - 1], features[0], rtol=1e-15)
    np.testing.assert_allclose(statistics.scatter, 0, atol=1e-20)
    assert statistics.count[K - 1] == 1


@settings(deadline=None)
@given(labelled(), st.integers(0, 99))
def test_covariances_are_population_ones_and_positive(data, seed):
    pooled = sum_of(parts_of(*data, seed, 4))
    for k in range(pooled.num_classes):
        rows = data[0][data[1] == k]
        if len(rows):
            np.testing.assert_allclose(
                pooled.covariance[k],
                np.cov(rows.T, bias=True).reshape(pooled.covariance[k].shape),
                rtol=1e-8,
                atol=1e-9,
            )
        assert np.linalg.eigvalsh(pooled.scatter[k])[0] >= -1e-10 * (
            1 + np.trace(pooled.scatter[k])
        )


@settings(deadline=None)
@given(labelled(), st.integers(0, 99))
def test_total_variance_is_within_plus_between(data, seed):
    parts = parts_of(*data, seed, 3)
    between, within = between_site_trace(parts), within_site_trace(parts)
    pooled = sum_of(parts)
    seen = pooled.count > 0
    total = np.trace(pooled.covariance, axis1=1, axis2=2)
    np.testing.assert_allclose((between + within)[seen], total[seen], rtol=1e-8, atol=1e-9)
    assert np.isnan(between[~seen]).all()
    assert (between[seen] >= 0).all()


@settings(deadline=None)
@given(labelled())
def test_identical_sites_have_no_shift(data):
    statistics = ClassStatistics.from_features(*data, IGNORE)
    shift = between_site_trace([statistics, statistics])
    np.testing.assert_allclose(shift[statistics.count > 0], 0, atol=1e-18)


def test_between_site_trace_by_hand():
    sites = [
        ClassStatistics([n], [[m, 0.0]], np.zeros((1, 2, 2))) for n, m in ((1.0, 0.0), (3.0, 4.0))
    ]
    # mean 3; 1/4 * 9 + 3/4 * 1 = 3
    np.testing.assert_allclose(between_site_trace(sites), [3.0])


def test_equal_weighting_gives_every_site_the_same_say():
    big = ClassStatistics([1000, 0], [[0.0], [0.0]], [[[2000.0]], [[0.0]]])
    small = ClassStatistics([10, 5], [[1.0], [7.0]], [[[10.0]], [[5.0]]])
    pooled = big.weighted_equally() + small.weighted_equally()
    np.testing.assert_allclose(pooled.mean, [[0.5], [7.0]])
    np.testing.assert_allclose(pooled.covariance[:, 0, 0], [(2 + 1) / 2 + 0.25, 1.0])
    np.testing.assert_array_equal(pooled.count, [2, 1])


def test_the_pairwise_rule_by_hand():
    # {0, 2} and {4}: mean 2, scatter 4 + 0 + 4 = 8
    pooled = ClassStatistics([2], [[1.0]], [[[2.0]]]) + ClassStatistics([1], [[4.0]], [[[0.0]]])
    assert (pooled.count[0], pooled.mean[0, 0], pooled.scatter[0, 0, 0]) == (3, 2, 8)


def test_counts_stay_exact_beyond_what_float32_can_count():
    one = ClassStatistics([1], [[0.0]], [[[0.0]]])
    assert (ClassStatistics([2**24], [[0.0]], [[[0.0]]]) + one).count[0] == 2**24 + 1


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 99))
@pytest.mark.row(15)
def test_hundreds_of_merges_far_from_the_origin_keep_eight_digits(seed):
    rng = np.random.default_rng(seed)
    features = 1e3 + 1e-2 * (
        rng.standard_normal((1200, 3)) + np.repeat(rng.standard_normal((300, 3)), 4, axis=0)
    )
    one_by_one = ClassStatistics.empty(1, 3)
    for rows in features.reshape(300, 4, 3):
        one_by_one = one_by_one + ClassStatistics.from_features(rows, np.zeros(4, np.int64), 1)
    shifted = features - 1e3
    exact = (shifted - shifted.mean(0)).T @ (shifted - shifted.mean(0))
    assert np.linalg.norm(one_by_one.scatter[0] - exact) <= 1e-8 * np.linalg.norm(exact)
    np.testing.assert_array_equal(one_by_one.scatter[0], one_by_one.scatter[0].T)


def test_a_class_larger_than_a_block_is_summed_over_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    features, labels = 100 + rng.standard_normal((50, 3)).astype(np.float32), rng.integers(0, 2, 50)
    monkeypatch.setattr("fedsgcg.common.statistics.BLOCK_ELEMENTS", 12)
    assert_same(
        ClassStatistics.from_features(features, labels, 2),
        brute_force(features.astype(np.float64), labels, 2),
    )


@pytest.mark.parametrize(
    ("count", "mean", "scatter", "message"),
    [
        ([[1.0]], [[0.0]], [[[0.0]]], r"count: found shape \(1, 1\), expected \(any\)"),
        ([1.0], [[0.0], [1.0]], [[[0.0]]], r"mean: found shape \(2, 1\), expected \(1, any\)"),
        ([1.0], [[0.0, 1.0]], [[[0.0]]], r"scatter: found shape \(1, 1, 1\), expected \(1, 2, 2\)"),
        ([1.0], np.zeros((1, 1), np.float16), [[[0.0]]], "mean: found dtype float16"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(count, mean, scatter, message):
    with pytest.raises(ValueError, match=message):
        ClassStatistics(count, mean, scatter)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.ones((3, 2)), np.zeros(4, int), r"labels: found shape \(4,\), expected \(3\)"),
        (np.ones(3), np.zeros(3, int), r"features: found shape \(3,\), expected \(any, any\)"),
        (np.ones((3, 2)), np.array([0, 2, 1]), "labels: found 2, expected 0 to 1 or 255"),
        (np.ones((3, 2)), np.array([0, -1, 1]), "labels: found -1"),
        (np.array([[1.0, np.nan]]), np.zeros(1, int), "features: found values that are not finite"),
        (np.ones((3, 2)), np.zeros(3), "labels: found dtype float64"),
        (np.ones((3, 2), int), np.zeros(3, int), "features: found dtype int64"),
    ],
)
def test_bad_pixels_are_refused_by_name(features, labels, message):
    with pytest.raises(ValueError, match=message):
        ClassStatistics.from_features(features, labels, 2)


def test_parts_that_do_not_fit_are_refused():
    one, other = ClassStatistics.empty(2, 3), ClassStatistics.empty(2, 4)
    with pytest.raises(ValueError, match=r"other: found mean of shape \(2, 4\), expected \(2, 3\)"):
        one + other
    with pytest.raises(ValueError, match="parts: found none"):
        between_site_trace([])
    with pytest.raises(ValueError, match=r"parts: found shape \(2, 4\)"):
        between_site_trace([one, other])
    with pytest.raises(ValueError, match="reference: found shape"):
        one.to_sums(np.zeros((1, 3)))
    for factor in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="factor: found"):
            one.discounted(factor)
