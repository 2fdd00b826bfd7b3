"""Intervals of a mean: hand-computed ends, laws, and coverage in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedsgcg.server.report.intervals import (
    Component,
    combined_interval,
    component_of,
    mean_interval,
)

NAN = float("nan")
VALUES = st.lists(st.integers(-800, 800).map(lambda n: n / 8), min_size=2, max_size=12)
# A simulated coverage of 0.945 has a standard error of 0.004; the bounds allow three of them.
TRIALS = 3000
PROMISED = 0.93
SAMPLES = {
    "normal": (lambda rng, n: rng.normal(0.8, 0.05, n), 0.8),
    "beta, skewness -0.65": (lambda rng, n: rng.beta(8, 2, n), 0.8),
    "one minus beta, skewness -1.4": (lambda rng, n: 1 - rng.beta(1.2, 8, n), 1 - 1.2 / 9.2),
    "one minus lognormal, skewness -1.75": (
        lambda rng, n: 1 - 0.08 * rng.lognormal(0, 0.5, n),
        1 - 0.08 * math.exp(0.125),
    ),
    "exponential, skewness 2": (lambda rng, n: rng.exponential(1.0, n), 1.0),
}


def coverage(draw, mean, sizes):
    """Share of intervals that hold the mean that every group has."""
    rng = np.random.default_rng(11)
    found = [mean_interval([draw(rng, size) for size in sizes]) for _ in range(TRIALS)]
    return float(np.mean([interval.low <= mean <= interval.high for interval in found]))


def _noncentral(freedom):
    """Noncentrality for which Student's t exceeds its 97.5 % quantile in 80 %, by bisection."""
    quantile = stats.t.ppf(0.975, freedom)
    return optimize.brentq(lambda nc: stats.nct.sf(quantile, freedom, nc) - 0.8, 0.1, 60)


class TestCoverage:
    @pytest.mark.parametrize("name", SAMPLES)
    def test_of_twelve_cases(self, name):
        assert PROMISED <= coverage(*SAMPLES[name], [12]) <= 0.975

    @pytest.mark.parametrize(("size", "low"), [(5, 0.90), (30, 0.94)])
    @pytest.mark.parametrize("name", SAMPLES)
    def test_of_five_and_thirty_cases(self, name, size, low):
        assert low <= coverage(*SAMPLES[name], [size]) <= 0.98

    @pytest.mark.parametrize("sizes", [[5, 5, 5, 5], [30, 5, 5, 8], [12, 1, 12]])
    def test_of_several_hospitals(self, sizes):
        assert 0.93 <= coverage(*SAMPLES["one minus beta, skewness -1.4"], sizes) <= 0.98

    def test_a_percentile_bootstrap_would_fail(self):
        """The test has power: a percentile bootstrap covers 84 % of means of five normal cases."""
        rng = np.random.default_rng(0)
        counts, hits = rng.multinomial(5, [0.2] * 5, 1000) / 5, 0
        for _ in range(1000):
            low, high = np.quantile(counts @ rng.normal(size=5), [0.025, 0.975])
            hits += low <= 0 <= high
        assert hits / 1000 == pytest.approx(0.84, abs=3 * math.sqrt(0.84 * 0.16 / 1000))


class TestMean:
    def test_symmetric_values_have_student_s_interval(self):
        values = [1.0, 2.0, 3.0, 4.0, 5.0]
        found = mean_interval([values])
        half = 2.7764451 * math.sqrt(2.5 / 5)  # t with 4 degrees of freedom; variance 10 / 4
        assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half))

    def test_skewed_values_by_hand(self):
        """0, 0, 0, 4: mean 1, s^2 = 4, se = 1, third central moment 6, A = 6 / 16.

        The quantile of t with 3 degrees of freedom is 3.1824463.
        """
        found = mean_interval([[0.0, 0.0, 0.0, 4.0]])
        skewness, quantile = 0.375, 3.1824463
        upper = -3 / skewness * (np.cbrt(1 + skewness * (-quantile - skewness / 6)) - 1)
        assert upper == pytest.approx(
            8 * 1.600790, abs=1e-4
        )  # 1 - 0.375 * 3.2449463 = -0.2168549, its cube root -0.600790
        assert (found.low, found.high) == pytest.approx((1 - quantile, 1 + upper), abs=1e-6)

    def test_two_groups_follow_welch_and_satterthwaite(self):
        first, second = [1.0, 3.0], [10.0, 10.5, 11.0]
        variances = [2.0 / 2, 0.25 / 3]
        freedom = sum(variances) ** 2 / (variances[0] ** 2 / 1 + variances[1] ** 2 / 2)
        half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(variances)) / 2
        found = mean_interval([first, second])
        assert (found.mean, found.low, found.high) == pytest.approx(
            (6.25, 6.25 - half, 6.25 + half)
        )

    def test_a_single_case_takes_the_variance_of_the_others(self):
        found = mean_interval([[1.0, 3.0], [10.0]])
        half = stats.t.ppf(0.975, (2 / 2 + 2) ** 2 / ((2 / 2) ** 2 + 2**2)) * math.sqrt(1 + 2) / 2
        assert (found.mean, found.high - found.mean) == pytest.approx((6.0, half))

    def test_equal_values_have_an_interval_of_zero_width_exactly(self):
        found = mean_interval([[0.1] * 7, [0.1] * 3])
        assert (found.low, found.high) == (found.mean, found.mean) == (0.1, 0.1)

    def test_no_value_and_one_value(self):
        for empty in ([], [[]], [[NAN, float("inf")]]):
            found = mean_interval(empty)
            assert all(map(math.isnan, (found.mean, found.low, found.high)))
        for single, mean in ([[4.0]], 4.0), ([[4.0], [6.0]], 5.0):
            found = mean_interval(single)
            assert found.mean == mean
            assert math.isnan(found.low)
            assert not found.excludes_zero

    def test_undefined_values_change_nothing(self):
        assert mean_interval([[1.0, NAN, 2.0, 5.0]]) == mean_interval([[1.0, 2.0, 5.0]])

    def test_groups_are_given_and_not_drawn(self):
        found = mean_interval([[0.0] * 5, [10.0] * 5])
        assert (found.low, found.high) == (5.0, 5.0)

    def test_level_widens_the_interval(self):
        values = [np.arange(15.0)]
        narrow, wide = mean_interval(values, level=0.5), mean_interval(values, level=0.99)
        assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high

    def test_ends_stay_within_the_bounds(self):
        values = [0.99, 0.7, 0.98, 0.97]
        found = mean_interval([values], bounds=(0.0, 1.0))
        assert (found.low, found.high) == (mean_interval([values]).low, 1.0)
        assert mean_interval([values]).high > 1

    @settings(max_examples=100, deadline=None)
    @given(VALUES, st.floats(-50, 50), st.floats(0.1, 10))
    def test_law_shift_and_scale_move_the_interval_along(self, values, shift, scale):
        before, after = mean_interval([values]), mean_interval([np.array(values) * scale + shift])
        expected = [end * scale + shift for end in (before.mean, before.low, before.high)]
        width = after.high - after.low
        assert [after.mean, after.low, after.high] == pytest.approx(
            expected, abs=1e-6 + 1e-6 * width
        )

    @settings(max_examples=100, deadline=None)
    @given(VALUES)
    def test_law_a_mirror_mirrors_and_student_s_interval_is_within(self, values):
        found, mirrored = mean_interval([values]), mean_interval([[-value for value in values]])
        width = 1e-9 * (1 + found.high - found.low)
        assert [mirrored.low, mirrored.high] == pytest.approx([-found.high, -found.low], abs=width)
        half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
        assert found.low <= found.mean - half * (1 - 1e-6) + 1e-9
        assert found.high >= found.mean + half * (1 - 1e-6) - 1e-9


class TestCombined:
    def test_components_add_up(self):
        parts = [component_of([1.0, 2.0, 3.0]), component_of([0.0, 4.0])]
        assert parts == [Component(1 / 3, 2.0), Component(4.0, 1.0)]
        freedom = (13 / 3) ** 2 / ((1 / 3) ** 2 / 2 + 16)
        half = stats.t.ppf(0.975, freedom) * math.sqrt(13 / 3)
        found = combined_interval(2.0, parts)
        assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))

    @pytest.mark.parametrize("size", [2, 4, 12, 200])
    def test_a_detectable_mean_is_detected_in_four_of_five_samples(self, size):
        rng = np.random.default_rng(size)
        least = 3.0 * _noncentral(size - 1) / math.sqrt(size)
        samples = rng.normal(least, 3.0, (20_000, size))
        error = samples.std(axis=1, ddof=1) / math.sqrt(size)
        found = samples.mean(axis=1) > stats.t.ppf(0.975, size - 1) * error
        assert found.mean() == pytest.approx(0.8, abs=0.012)  # four standard errors
        unit = combined_interval(0.0, [Component(9.0 / size, size - 1.0)])
        assert unit.detectable == pytest.approx(least, rel=1e-6)

    def test_without_a_component_the_ends_are_unknown(self):
        assert math.isnan(combined_interval(1.0, []).low)
