"""Robust merges: independent of order, FedAvg without trimming, unmoved by a broken minority."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.class_statistics import merge_statistics, without_farthest
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.robust import clipped_mean, coordinate_median, trimmed_mean

FEW = settings(max_examples=60, deadline=None)
SIZE = 5
NUMBERS = st.floats(-1e6, 1e6, width=32)
VALUES = hnp.arrays(np.float32, SIZE, elements=NUMBERS)
SHARES = st.integers(1, 10**6).map(float)
SITES = st.lists(st.tuples(VALUES, SHARES), min_size=1, max_size=7)
ANY = st.floats(-1e9, 1e9, width=32)  # what admission lets through

Parts = list[tuple[str, Weights, float]]


def weights(values: npt.ArrayLike) -> Weights:
    layout = (("x", (SIZE - 1,)), ("bn.running_var", (1,)))
    return Weights(layout, np.asarray(values, np.float32), (("steps", 3),))


def named(sites: list[tuple[npt.NDArray[np.float32], float]]) -> Parts:
    return [(f"site {k}", weights(values), share) for k, (values, share) in enumerate(sites)]


START = weights(np.zeros(SIZE))
RULES = {
    "trimmed": lambda parts: trimmed_mean(parts, 1),
    "trimmed by two": lambda parts: trimmed_mean(parts, 2),
    "median": coordinate_median,
    "clipped": lambda parts: clipped_mean(START, parts, 1.5),
}


@pytest.mark.parametrize("rule", RULES)
@FEW
@given(SITES, st.randoms(use_true_random=False))
def test_order_of_arrival_changes_no_bit(rule: str, sites, rng) -> None:  # type: ignore[no-untyped-def]
    parts = named(sites)
    shuffled = parts.copy()
    rng.shuffle(shuffled)
    one, other = RULES[rule](parts), RULES[rule](shuffled)
    assert one.values.tobytes() == other.values.tobytes()
    assert one.counters == other.counters == (("steps", 3),)


@FEW
@given(SITES)
def test_nothing_trimmed_and_nothing_clipped_is_fedavg(sites) -> None:  # type: ignore[no-untyped-def]
    parts = named(sites)
    expected = merge_weights(parts).values.tobytes()
    assert trimmed_mean(parts, 0).values.tobytes() == expected
    norms = [np.linalg.norm(values[: SIZE - 1].astype(np.float64)) for values, _ in sites]
    if max(norms) < 1e29 * np.median(norms):  # not where most sites did not move at all
        assert clipped_mean(START, parts, 1e30).values.tobytes() == expected
    if len(parts) <= 2:  # nobody knows which of two is broken
        assert trimmed_mean(parts, 5).values.tobytes() == expected


@FEW
@given(SITES, st.integers(1, 3))
def test_a_trimmed_mean_by_brute_force(sites, tolerated: int) -> None:  # type: ignore[no-untyped-def]
    parts = named(sites)
    dropped = min(tolerated, (len(parts) - 1) // 2)
    found = trimmed_mean(parts, tolerated).values
    for k in range(SIZE):
        kept = sorted(((float(v[k]), s) for v, s in sites), key=lambda pair: pair[0])
        kept = kept[dropped : len(kept) - dropped]
        values = {value for value, _ in kept}
        assert min(values) <= found[k] <= max(values)
        if len({float(v[k]) for v, _ in sites}) == len(sites):  # no tie of different weights
            mean = sum(v * s for v, s in kept) / sum(s for _, s in kept)
            np.testing.assert_allclose(found[k], np.float32(mean), rtol=1e-5, atol=1e-2)


@FEW
@given(SITES)
def test_a_median_is_that_of_numpy(sites) -> None:  # type: ignore[no-untyped-def]
    values = np.stack([value for value, _ in sites]).astype(np.float64)
    found = coordinate_median(named(sites)).values
    np.testing.assert_allclose(found, np.median(values, axis=0), rtol=1e-6, atol=1e-6)


@FEW
@given(
    st.lists(st.tuples(VALUES, SHARES), min_size=2, max_size=5),
    st.data(),
)
@pytest.mark.attack("broken-minority")
def test_a_broken_minority_cannot_leave_the_range_of_the_others(honest, data) -> None:  # type: ignore[no-untyped-def]
    """The breakdown point: of 2 f + 1 sites any f may send anything, with any weight."""
    most = len(honest) - 1
    broken = data.draw(
        st.lists(
            st.tuples(hnp.arrays(np.float32, SIZE, elements=ANY), st.just(1e9)),
            min_size=1,
            max_size=most,
        )
    )
    own = np.stack([values for values, _ in honest])
    parts = named([*broken, *honest])
    for merged in (trimmed_mean(parts, len(broken)), coordinate_median(parts)):
        assert (merged.values >= own.min(axis=0)).all()
        assert (merged.values <= own.max(axis=0)).all()


@FEW
@given(
    hnp.arrays(np.float32, (3, SIZE), elements=st.floats(-10, 10, width=32)),
    st.floats(1.0, 1e8),
)
@pytest.mark.attack("broken-minority")
def test_a_clipped_site_moves_the_model_by_no_more_than_its_share(honest, factor) -> None:  # type: ignore[no-untyped-def]
    far = np.concatenate([np.full(SIZE - 1, factor), [0.0]])
    parts = named([(values, 1.0) for values in honest] + [(far.astype(np.float32), 1.0)])
    merged = clipped_mean(START, parts, 1.5).values.astype(np.float64)
    norms = [float(np.linalg.norm(w.values[: SIZE - 1].astype(np.float64))) for _, w, _ in parts]
    limit = 1.5 * float(np.median(norms))
    others = clipped_mean(START, parts, 1.5).values  # same call: no hidden state
    assert others.tobytes() == merged.astype(np.float32).tobytes()
    share = np.linalg.norm(merged[: SIZE - 1])
    assert share <= (sum(sorted(min(n, limit) for n in norms)) / 4) * (1 + 1e-5) + 1e-6


def test_a_clipped_mean_by_hand() -> None:
    """Norms 3, 4 and 100, median 4, limit 8: the last update is scaled by 0.08."""
    moved = {"A": 3.0, "B": 4.0, "C": 100.0}
    parts = [(site, weights([x, 0, 0, 0, x]), 1.0) for site, x in moved.items()]
    merged = clipped_mean(START, parts, 2.0).values
    np.testing.assert_allclose(merged, [5.0, 0, 0, 0, 5.0], rtol=1e-6)


@pytest.mark.parametrize(
    "bad", [lambda p: trimmed_mean(p, -1), lambda p: clipped_mean(START, p, 0.5)]
)
def test_impossible_settings_are_refused(bad) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="expected"):
        bad(named([(np.zeros(SIZE, np.float32), 1.0)]))


CLASSES, WIDTH = 2, 3


def statistics(seed: int, shift: float = 0.0, scale: float = 1.0) -> ClassStatistics:
    rng = np.random.default_rng(seed)
    features = shift + scale * rng.normal(size=(40, WIDTH))
    return ClassStatistics.from_features(features, np.repeat([0, 1], 20), CLASSES)


def parts_of(*found: ClassStatistics) -> list[tuple[str, ClassStatistics]]:
    return [(f"site {k}", part) for k, part in enumerate(found)]


def test_the_farthest_site_is_left_out_of_its_class_alone() -> None:
    far, near = statistics(3), statistics(4)
    mean = far.mean.copy()
    mean[1] += 50.0
    far = ClassStatistics(far.count, mean, far.scatter)
    merged = merge_statistics(parts_of(statistics(1), far, near, statistics(2)), trimmed=1)
    three = merge_statistics(parts_of(statistics(1), near, statistics(2)))
    np.testing.assert_array_equal(merged.mean[1], three.mean[1])
    np.testing.assert_array_equal(merged.scatter[1], three.scatter[1])
    assert merged.count.tolist() == [60.0, 60.0]  # one of four in either class


@pytest.mark.parametrize("weighting", ["pixels", "sites"])
@FEW
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.floats(-1e5, 1e5),
    st.floats(0.0, 1e4),
    st.randoms(use_true_random=False),
)
@pytest.mark.attack("broken-minority")
def test_broken_statistics_stay_within_the_others_reach(  # type: ignore[no-untyped-def]
    weighting: str, seed: int, broken: int, shift: float, scale: float, rng
) -> None:
    honest = [statistics(seed + k) for k in range(broken + 1)]
    wrong = [statistics(seed + 50 + k, shift, scale) for k in range(broken)]
    parts = parts_of(*wrong, *honest)
    merged = merge_statistics(parts, weighting, trimmed=broken)
    shuffled = parts.copy()
    rng.shuffle(shuffled)
    assert merge_statistics(shuffled, weighting, trimmed=broken).digest() == merged.digest()
    # Honest means differ by less than 3, and the median is among them.
    assert np.abs(merged.mean).max() < 12.0
    assert np.linalg.eigvalsh(merged.scatter).min() >= -1e-9 * np.abs(merged.scatter).max()


@FEW
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_nothing_trimmed_is_exact_pooling(seed: int, sites: int) -> None:
    found = [statistics(seed + k) for k in range(sites)]
    assert merge_statistics(parts_of(*found), trimmed=0).digest() == (
        merge_statistics(parts_of(*found)).digest()
    )
    if sites <= 2:
        few = without_farthest(found, 3)
        assert [part.digest() for part in few] == [part.digest() for part in found]


@FEW
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.floats(-1e5, 1e5),
    st.floats(0.0, 1e4),
    st.randoms(use_true_random=False),
)
def test_a_broken_minority_cannot_move_the_median_out_of_the_others_range(  # type: ignore[no-untyped-def]
    seed: int, broken: int, shift: float, scale: float, rng
) -> None:
    honest = [statistics(seed + k) for k in range(broken + 1)]
    wrong = [statistics(seed + 50 + k, shift, scale) for k in range(broken)]
    parts = parts_of(*wrong, *honest)
    merged = merge_statistics(parts, "median")
    shuffled = parts.copy()
    rng.shuffle(shuffled)
    assert merge_statistics(shuffled, "median").digest() == merged.digest()
    means = np.stack([part.mean for part in honest])
    assert (merged.mean >= means.min(0) - 1e-12).all()
    assert (merged.mean <= means.max(0) + 1e-12).all()
    traces = [np.trace(part.covariance, axis1=1, axis2=2) for part in honest]
    found = np.trace(merged.covariance, axis1=1, axis2=2)
    assert (found >= np.min(traces, 0) - 1e-9).all()
    assert (found <= np.max(traces, 0) + 1e-9).all()
    assert np.linalg.eigvalsh(merged.scatter).min() >= -1e-9 * np.abs(merged.scatter).max()
    assert merged.count.tolist() == [20.0 * len(parts)] * CLASSES


def test_the_median_of_three_sites_by_hand_and_of_a_class_that_one_has_not_seen() -> None:
    means = np.array([[[0.0, 9.0]], [[2.0, 5.0]], [[8.0, 1.0]]])
    traces = np.array([1.0, 6.0, 2.0])
    parts = [
        ClassStatistics(np.array([10.0]), mean, np.eye(2)[None] * 10.0 * trace / 2)
        for mean, trace in zip(means, traces, strict=True)
    ]
    merged = merge_statistics(parts_of(*parts), "median")
    np.testing.assert_allclose(merged.mean, [[2.0, 5.0]])
    np.testing.assert_allclose(merged.covariance, np.eye(2)[None])
    absent = ClassStatistics(np.array([0.0]), np.full((1, 2), 1e9), np.zeros((1, 2, 2)))
    with_absent = merge_statistics(parts_of(*parts, absent), "median")
    assert with_absent.digest() == merged.digest()
