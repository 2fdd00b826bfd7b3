"""Sign-flip test and Holm's correction, against hand-computed values and brute force."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.server.report import significance
from fedsgcg.server.report.significance import holm, sign_flips

NAN = float("nan")
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def brute_force(values):
    """Two-sided p by trying all signs."""
    seen = abs(sum(values))
    sums = [
        sum(sign * value for sign, value in zip(signs, values, strict=True))
        for signs in signs_of(len(values))
    ]
    return sum(abs(s) >= seen - 1e-9 for s in sums) / len(sums)


def signs_of(number):
    return product((-1, 1), repeat=number)


class TestSignFlips:
    def test_four_of_one_sign_give_one_in_eight(self):
        found = sign_flips([0.1, 0.2, 0.3, 0.4])
        assert (found.statistic, found.p, found.units, found.zeros) == (
            pytest.approx(1.0),
            0.125,
            4,
            0,
        )
        assert found.smallest_p == found.p

    def test_worked_by_hand_with_one_loss(self):
        # 1 - 2 + 4 + 8 = 11. Sums of 1, 2, 4, 8 with signs are all odd numbers to 15: |sum| >= 11
        # are 11, 13, 15 twice.
        assert sign_flips([1.0, -2.0, 4.0, 8.0]).p == 6 / 16

    def test_one_hospital_that_makes_the_difference_shows_nothing(self):
        # The first outweighs all others together, and they are against it: no choice of signs is
        # nearer to zero.
        assert sign_flips([0.297, -0.006, -0.036, -0.012]).p == 1.0
        thrice = [
            0.297,
            0.29,
            0.30,
            -0.006,
            -0.005,
            -0.007,
            -0.036,
            -0.03,
            -0.04,
            -0.012,
            -0.01,
            -0.014,
        ]
        assert sign_flips(thrice).p >= 0.25

    def test_zeros_change_nothing_but_are_counted(self):
        found = sign_flips([0.0, 1.0, 0.0, 2.0, 3.0])
        assert (found.p, found.units, found.zeros, found.smallest_p) == (0.25, 5, 2, 0.25)

    def test_nothing_and_no_difference(self):
        assert math.isnan(sign_flips([]).p)
        assert math.isnan(sign_flips([NAN, float("inf")]).smallest_p)
        found = sign_flips([0.0, 0.0])
        assert (found.p, found.smallest_p) == (1.0, 1.0)

    def test_rounding_does_not_break_a_tie(self):
        assert sign_flips([0.3 - 0.2, 0.1 - 0.2]).p == 1.0

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(-8, 8).map(lambda n: n / 16), min_size=1, max_size=9))
    def test_law_equals_brute_force(self, values):
        assert sign_flips(values).p == pytest.approx(brute_force(values))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.randoms(use_true_random=False))
    def test_law_order_and_direction_do_not_matter(self, values, random):
        before = sign_flips(values)
        mixed = random.sample(values, len(values))
        assert sign_flips(mixed).p == pytest.approx(before.p)
        assert sign_flips([-value for value in values]).p == pytest.approx(before.p)
        assert before.smallest_p - 1e-12 <= before.p <= 1

    def test_drawn_signs_agree_with_all_signs(self, monkeypatch):
        values = np.random.default_rng(3).normal(0.4, 1, 16)
        exact = sign_flips(values)
        monkeypatch.setattr(significance, "EXACT_UP_TO", 10)
        drawn = sign_flips(values)
        spread = math.sqrt(exact.p * (1 - exact.p) / 2**16)
        assert drawn.p == pytest.approx(exact.p, abs=4 * spread)

    def test_many_units_of_one_sign_have_the_smallest_p_that_can_be_drawn(self):
        found = sign_flips(np.full(40, 0.01))
        assert found.smallest_p == 2.0**-16 <= found.p < 1e-4

    def test_false_alarms_are_as_rare_as_promised(self):
        """Skewed units with exchangeable signs: 5 % of 600 plus three standard errors."""
        rng = np.random.default_rng(5)
        found = [
            sign_flips(rng.choice([-1, 1], 8) * rng.exponential(1, 8)).p <= 0.05 for _ in range(600)
        ]
        assert np.mean(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)


class TestHolm:
    def test_worked_by_hand(self):
        # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; never falling:
        # 0.06 at the end.
        assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
        assert holm([]) == []
        assert holm([0.5]) == [0.5]
        assert holm([0.9, 0.8]) == [1.0, 1.0]

    def test_a_test_that_could_not_be_made_does_not_count(self):
        found = holm([0.01, NAN, 0.04])
        assert found[0] == pytest.approx(0.02)
        assert math.isnan(found[1])
        assert found[2] == pytest.approx(0.04)

    @given(P_VALUES)
    def test_law_never_below_the_raw_value_never_above_one(self, values):
        assert all(p <= corrected <= 1 for p, corrected in zip(values, holm(values), strict=True))
        assert all(
            c <= min(1.0, len(values) * p) for p, c in zip(values, holm(values), strict=True)
        )

    @given(P_VALUES)
    def test_law_smaller_raw_values_stay_smaller(self, values):
        pairs = sorted(zip(values, holm(values), strict=True))
        assert all(a[1] <= b[1] for a, b in zip(pairs, pairs[1:], strict=False))

    @given(P_VALUES, st.randoms(use_true_random=False))
    def test_law_order_does_not_matter(self, values, random):
        order = random.sample(range(len(values)), len(values))
        assert holm([values[i] for i in order]) == [holm(values)[i] for i in order]

    @given(P_VALUES)
    def test_law_the_first_claim_is_bonferronis(self, values):
        assert min(holm(values)) == pytest.approx(min(1.0, len(values) * min(values)))
