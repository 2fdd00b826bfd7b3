"""The prototype memory, policy by policy, against hand-computed numbers."""

import numpy as np
import pytest

from fedsgcg.common.settings.plan import PrototypeSettings
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.aggregation.prototypes import PrototypeMemory, prototype_rows


def of(values: list[float], other: list[float] | None = None) -> ClassStatistics:
    """Statistics of one-channel features of two classes."""
    other = other or []
    labels = [0] * len(values) + [1] * len(other)
    return ClassStatistics.from_features(
        np.array(values + other, float)[:, None], np.array(labels, int), 2
    )


def memory(name: str, **changes: object) -> PrototypeMemory:
    return PrototypeMemory(PrototypeSettings(memory=name, **changes))  # type: ignore[arg-type]


FIRST = [("A", of([0, 2])), ("B", of([4, 6]))]
SECOND = [("B", of([10, 12])), ("A", of([8, 10]))]


def after_two_rounds(policy: PrototypeMemory) -> ClassStatistics:
    found = policy.prototypes(policy.update(policy.update({}, FIRST), SECOND))
    assert found is not None
    return found


def test_cumulative_pools_all_rounds() -> None:
    found = after_two_rounds(memory("cumulative"))
    values = [0, 2, 4, 6, 8, 10, 10, 12]
    assert found.count.tolist() == [8, 0]
    assert found.mean[0, 0] == pytest.approx(np.mean(values))
    assert found.covariance[0, 0, 0] == pytest.approx(np.var(values))


def test_discount_counts_older_pixels_for_less() -> None:
    found = after_two_rounds(memory("discount", discount=0.5))
    weights = [0.5] * 4 + [1.0] * 4
    values = np.array([0, 2, 4, 6, 8, 10, 10, 12.0])
    mean = np.average(values, weights=weights)
    assert found.count.tolist() == [6, 0]
    assert found.mean[0, 0] == pytest.approx(mean)
    assert found.covariance[0, 0, 0] == pytest.approx(
        np.average((values - mean) ** 2, weights=weights)
    )


@pytest.mark.parametrize("name", ["lagged", "restart"])
def test_lagged_and_restart_describe_the_last_statistics_only(name: str) -> None:
    found = after_two_rounds(memory(name))
    assert found.count.tolist() == [4, 0]
    assert found.mean[0, 0] == pytest.approx(10)
    assert found.covariance[0, 0, 0] == pytest.approx(np.var([8, 10, 10, 12]))


def test_momentum_moves_all_sites_together_and_a_departure_starts_it_anew() -> None:
    policy = memory("momentum", momentum=0.25)
    found = after_two_rounds(policy)
    assert found.mean[0, 0] == pytest.approx(3 + 0.25 * (10 - 3))
    once = policy.update({}, FIRST)
    assert policy.without(once, []) == once
    assert policy.without(once, ["A"]) == {}
    anew = policy.prototypes(policy.update(policy.without(once, ["A"]), [("B", of([10, 12]))]))
    assert anew is not None
    assert anew.mean[0, 0] == pytest.approx(11)


def test_with_equal_sites_every_site_weighs_the_same_in_all_rounds_together() -> None:
    policy = memory("cumulative", weighting="sites")
    parts = policy.update(
        policy.update({}, [("A", of([0, 0, 0, 0])), ("B", of([6, 6]))]), [("B", of([8, 8]))]
    )
    found = policy.prototypes(parts)
    assert found is not None
    assert found.count.tolist() == [8, 0]
    assert found.mean[0, 0] == pytest.approx((0 + 7) / 2)


def test_who_leaves_takes_all_rounds_along() -> None:
    policy = memory("cumulative")
    parts = policy.without(policy.update(policy.update({}, FIRST), SECOND), ["B"])
    found = policy.prototypes(parts)
    assert found is not None
    assert found.count.tolist() == [4, 0]
    assert found.mean[0, 0] == pytest.approx(np.mean([0, 2, 8, 10]))
    assert found.covariance[0, 0, 0] == pytest.approx(np.var([0, 2, 8, 10]))
    assert policy.prototypes(policy.without(parts, ["A"])) is None


@pytest.mark.parametrize("name", ["cumulative", "discount", "lagged", "restart", "momentum"])
def test_a_round_without_statistics_keeps_means_and_covariances(name: str) -> None:
    policy = memory(name, discount=0.5)
    assert policy.prototypes(policy.update({}, [])) is None
    before = policy.update({}, FIRST)
    one, other = policy.prototypes(before), policy.prototypes(policy.update(before, []))
    assert one is not None
    assert other is not None
    assert other.count.tolist() == [2 if name == "discount" else 4, 0]
    np.testing.assert_array_equal(other.mean, one.mean)
    np.testing.assert_allclose(other.covariance, one.covariance, rtol=1e-15)


def test_a_site_counts_once_a_round() -> None:
    with pytest.raises(ValueError, match="a site twice"):
        memory("lagged").update({}, [*FIRST, FIRST[0]])


@pytest.mark.parametrize("name", ["cumulative", "discount", "lagged", "restart"])
def test_order_of_arrival_changes_no_bit(name: str) -> None:
    policy = memory(name, weighting="sites")
    parts = [
        (site, of(list(np.random.default_rng(k).normal(size=5)), [float(k)]))
        for k, site in enumerate("ABCD")
    ]
    before = {"B": of([1, 2])}
    one, other = (policy.prototypes(policy.update(before, fresh)) for fresh in (parts, parts[::-1]))
    assert one is not None
    assert other is not None
    for field in ("count", "mean", "scatter"):
        assert getattr(one, field).tobytes() == getattr(other, field).tobytes()


def test_shift_splits_the_pooled_variance_into_between_and_within() -> None:
    shift = memory("lagged").shift(FIRST)
    # site means 1 and 5, pooled mean 3; each site's variance is 1
    assert shift["between_site_trace"][0] == pytest.approx(4)
    assert shift["within_site_trace"][0] == pytest.approx(1)
    assert np.isnan(shift["between_site_trace"][1])


def test_shift_with_equal_sites_does_not_depend_on_their_sizes() -> None:
    parts = [("A", of([0, 2] * 50)), ("B", of([4, 6]))]
    assert memory("lagged", weighting="sites").shift(parts)["between_site_trace"][
        0
    ] == pytest.approx(4)
    assert memory("lagged").shift(parts)["between_site_trace"][0] < 1


def test_rows_name_classes_and_leave_out_what_nobody_has_seen() -> None:
    policy = memory("lagged")
    prototypes = policy.prototypes(policy.update({}, FIRST))
    assert prototypes is not None
    rows = prototype_rows(policy, prototypes, FIRST, ["background", "gland"], 7)
    # Means 1 and 5, both with variance 1: the distance of each site from the other is 4.
    pairs = [row for row in rows if row.get("other")]
    assert [(row["site"], row["other"], row["cls"], row["metric"]) for row in pairs] == [
        ("A", "B", "background", "pair_distance")
    ]
    assert pairs[0]["value"] == pytest.approx(4)
    rows = [row for row in rows if row not in pairs]
    apart = {(row["site"], row["cls"]): row["value"] for row in rows if row["site"]}
    assert apart == pytest.approx({("A", "background"): 4, ("B", "background"): 4})
    rows = [row for row in rows if not row["site"]]
    found = {(row["metric"], row["cls"]): row["value"] for row in rows}
    assert found == pytest.approx(
        {
            ("prototype_count", "background"): 4,
            ("prototype_count", "gland"): 0,
            ("prototype_condition", "background"): 1,
            ("between_site_trace", "background"): 4,
            ("within_site_trace", "background"): 1,
        }
    )
    assert {(row["round"], row["phase"], row["site"]) for row in rows} == {(7, "merge", "")}
