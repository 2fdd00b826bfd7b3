"""What the coordinator remembers between rounds, policy by policy, against numbers worked out by hand."""

import numpy as np
import pytest

from common.plan import PrototypeSettings
from common.statistics import ClassStatistics
from server.prototypes import PrototypeMemory, prototype_rows


def of(values: list[float], other: list[float] | None = None) -> ClassStatistics:
    """Statistics of one-channel features of two classes."""
    other = other or []
    labels = [0] * len(values) + [1] * len(other)
    return ClassStatistics.from_features(np.array(values + other, float)[:, None], np.array(labels, int), 2)


def memory(name: str, **changes: object) -> PrototypeMemory:
    return PrototypeMemory(PrototypeSettings(memory=name, **changes))  # type: ignore[arg-type]


FIRST = [("A", of([0, 2])), ("B", of([4, 6]))]
SECOND = [("B", of([10, 12])), ("A", of([8, 10]))]


def after_two_rounds(policy: PrototypeMemory) -> ClassStatistics:
    once = policy.update(None, FIRST)
    twice = policy.update(once, SECOND)
    assert twice is not None
    return twice


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
    assert found.covariance[0, 0, 0] == pytest.approx(np.average((values - mean) ** 2, weights=weights))


@pytest.mark.parametrize("name", ["lagged", "restart"])
def test_lagged_and_restart_describe_the_last_statistics_only(name: str) -> None:
    found = after_two_rounds(memory(name))
    assert found.count.tolist() == [4, 0]
    assert found.mean[0, 0] == pytest.approx(10)
    assert found.covariance[0, 0, 0] == pytest.approx(np.var([8, 10, 10, 12]))


@pytest.mark.parametrize("name", ["cumulative", "discount", "lagged", "restart"])
def test_a_round_without_statistics_keeps_what_was_known(name: str) -> None:
    policy = memory(name)
    assert policy.update(None, []) is None
    once = policy.update(None, FIRST)
    assert policy.update(once, []) is once


@pytest.mark.parametrize("name", ["cumulative", "discount", "lagged", "restart"])
def test_order_of_arrival_changes_no_bit(name: str) -> None:
    policy = memory(name, weighting="sites")
    parts = [(site, of(list(np.random.default_rng(k).normal(size=5)), [float(k)])) for k, site in enumerate("ABCD")]
    one, other = policy.update(of([1, 2]), parts), policy.update(of([1, 2]), parts[::-1])
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
    assert memory("lagged", weighting="sites").shift(parts)["between_site_trace"][0] == pytest.approx(4)
    assert memory("lagged").shift(parts)["between_site_trace"][0] < 1


def test_rows_name_classes_and_leave_out_what_nobody_has_seen() -> None:
    policy = memory("lagged")
    prototypes = policy.update(None, FIRST)
    assert prototypes is not None
    rows = prototype_rows(policy, prototypes, FIRST, ["background", "gland"], 7)
    found = {(row["metric"], row["cls"]): row["value"] for row in rows}
    assert found == pytest.approx(
        {
            ("prototype_count", "background"): 4,
            ("prototype_count", "gland"): 0,
            ("between_site_trace", "background"): 4,
            ("within_site_trace", "background"): 1,
        }
    )
    assert {(row["round"], row["phase"], row["site"]) for row in rows} == {(7, "merge", "")}
