"""Each limit of admission is where it is said to be: the last value passes, the next does not."""

from dataclasses import replace

import numpy as np
import pytest

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.admission import (
    MAX_COUNT,
    MAX_LOSS,
    MAX_WEIGHT,
    METRIC_RANGES,
    SYMMETRY,
    UNIT_NORM,
    admit,
)
from tests.unit.server.test_admission import EXPECTED, Sent, statistics, values

UNBOUNDED = replace(EXPECTED, max_examples=0)
LIMITS = {**METRIC_RANGES, "loss": (-MAX_LOSS, MAX_LOSS), "loss_dice": (-MAX_LOSS, MAX_LOSS)}


@pytest.mark.parametrize("name", sorted(LIMITS))
@pytest.mark.parametrize("end", [0, 1])
def test_a_metric_at_its_limit_is_admitted_and_beyond_it_is_not(name: str, end: int) -> None:
    limit = LIMITS[name][end]
    beyond = np.nextafter(limit, (-np.inf, np.inf)[end])
    others = {} if name == "examples" else {"examples": 12.0}
    if name == "examples":  # whole numbers above zero
        limit, beyond = (1.0, 0.0) if end == 0 else (limit, limit + 1)
    assert admit(Sent(metrics={**others, name: limit}), UNBOUNDED).accepted
    rejected = admit(Sent(metrics={**others, name: float(beyond)}), UNBOUNDED)
    assert rejected.code == ("PAY-110" if (name, end) == ("examples", 0) else "PAY-112")


@pytest.mark.attack("huge-weights")
def test_a_weight_at_its_limit_is_admitted_and_beyond_it_is_not() -> None:
    limit = np.float32(MAX_WEIGHT)
    beyond = np.nextafter(limit, np.float32(np.inf))
    for sign in (1, -1):
        assert admit(Sent(weights=values(sign * limit, 0, 0, 0, 0, 0)), EXPECTED).accepted
        rejected = admit(Sent(weights=values(sign * beyond, 0, 0, 0, 0, 0)), EXPECTED)
        assert rejected.code == "PAY-112"


@pytest.mark.parametrize("count", [0.0, MAX_COUNT])
def test_a_pixel_count_at_its_limit_is_admitted(count: float) -> None:
    absent = np.array([count, 20.0, 20.0])
    found = replace(statistics(), count=absent)
    assert admit(Sent(statistics=found), EXPECTED).accepted


@pytest.mark.parametrize(("excess", "accepted"), [(0.5 * UNIT_NORM, True), (2 * UNIT_NORM, False)])
def test_the_squared_length_of_features_has_the_stated_tolerance(
    excess: float, accepted: bool
) -> None:
    found = with_scatter(np.zeros((4, 4)), np.array([np.sqrt(1.0 + excess), 0, 0, 0]))
    assert admit(Sent(statistics=found), EXPECTED).accepted is accepted


@pytest.mark.parametrize("scale", [1e-12, 1.0])
@pytest.mark.parametrize(("share", "accepted"), [(0.5, True), (2.0, False)])
def test_the_tolerance_of_symmetry_is_relative_to_the_largest_entry(
    scale: float, share: float, accepted: bool
) -> None:
    scatter = scale * np.eye(4)
    scatter[0, 1] += share * SYMMETRY * scale
    found = with_scatter(scatter, np.zeros(4))
    assert admit(Sent(statistics=found), EXPECTED).accepted is accepted


@pytest.mark.parametrize("scale", [1e-12, 1.0])
@pytest.mark.parametrize(("negative", "accepted"), [(1e-6, True), (1e-3, False)])
def test_the_tolerance_of_a_negative_eigenvalue_is_relative_to_the_trace(
    scale: float, negative: float, accepted: bool
) -> None:
    scatter = scale * np.diag([1.0, 1.0, 1.0, -negative])
    found = with_scatter(scatter, np.zeros(4))
    assert admit(Sent(statistics=found), EXPECTED).accepted is accepted


def with_scatter(scatter: np.ndarray, mean: np.ndarray) -> ClassStatistics:
    """Statistics in which class 0 has a given scatter and mean."""
    honest = statistics()
    scatters, means = honest.scatter.copy(), honest.mean.copy()
    scatters[0], means[0] = scatter, mean
    return replace(honest, scatter=scatters, mean=means)
