"""Each limit of admission is where it is said to be: the last value passes, the next does not."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.admission import (
    MAX_COUNT,
    MAX_LOSS,
    MAX_WEIGHT,
    METRIC_RANGES,
    SYMMETRY,
    UNIT_NORM,
    Expectation,
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


@pytest.mark.row(17)
@pytest.mark.attack("zeros")
def test_a_model_that_has_shrunk_to_nothing_is_refused() -> None:
    """Row 17: a model of zeros may be no further from the received one than honest updates are."""
    expected = replace(EXPECTED, reference=values(3, 4, 0, 0, 9, 9))
    assert admit(Sent(weights=values(0.00306, 0.00408, 0, 0, 0, 0)), expected).accepted
    for numbers in ((0, 0, 0, 0, 9, 9), (0.00294, 0.00392, 0, 0, 9, 9)):  # moments do not count
        verdict = admit(Sent(weights=values(*numbers)), expected)
        assert (verdict.code, "weights of norm" in verdict.detail) == ("PAY-112", True)
    assert admit(Sent(weights=values(0, 0, 0, 0, 0, 0)), EXPECTED).accepted  # as it was received


@dataclass(frozen=True)
class Measured(Sent):
    moments: NormMoments | None = None


@pytest.mark.parametrize(
    ("count", "accepted"), [(2.0, True), (1.0, False), (2.5, False), (2.0**53, True)]
)
def test_moments_are_of_two_values_or_more(count: float, accepted: bool) -> None:
    """Row 13: an unbiased variance needs two values."""
    layout = (("bn.running_mean", (1,)), ("bn.running_var", (1,)))
    model = Weights(layout, np.zeros(2, np.float32))
    expected = Expectation(EXPECTED.identity, "A", measured=model)
    moments = NormMoments({"bn": 1}, np.array([count]), np.zeros(1), np.ones(1))
    verdict = admit(Measured(weights=None, moments=moments), expected)
    assert (verdict.accepted, verdict.code) == (accepted, "" if accepted else "STA-202")
    bounded = replace(expected, max_pixels=count)
    assert admit(Measured(weights=None, moments=moments), bounded).accepted == accepted
    fewer = replace(expected, max_pixels=count - 1)
    assert admit(Measured(weights=None, moments=moments), fewer).code == "STA-202"
