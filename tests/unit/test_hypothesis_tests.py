"""Signed-rank test and Holm's correction, against values worked out by hand, brute force over all signs, and scipy."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from server import hypothesis_tests
from server.hypothesis_tests import holm, signed_rank

NAN = float("nan")
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def brute_force(differences):
    """Two-sided p by trying all signs of the non-zero differences; Pratt's ranks by counting."""
    sizes = [abs(d) for d in differences]
    ranks = [sum(s < size for s in sizes) + (sum(s == size for s in sizes) + 1) / 2 for size in sizes]
    kept = [(d, rank) for d, rank in zip(differences, ranks, strict=True) if d != 0]
    if not kept:
        return 1.0
    seen = sum(rank for d, rank in kept if d > 0)
    sums = [
        sum(rank for (_, rank), sign in zip(kept, signs, strict=True) if sign)
        for signs in product((0, 1), repeat=len(kept))
    ]
    low, high = (sum(s <= seen for s in sums), sum(s >= seen for s in sums))
    return min(1.0, 2 * min(low, high) / len(sums))


class TestSignedRank:
    def test_five_gains_in_a_row_give_one_in_sixteen(self):
        found = signed_rank([0.1, 0.2, 0.3, 0.4, 0.5])
        assert (found.statistic, found.p, found.pairs, found.zeros) == (15.0, pytest.approx(2 / 32), 5, 0)
        assert found.smallest_p == found.p

    def test_worked_by_hand_with_one_loss(self):
        # Ranks 1..6, the loss has rank 2: T+ = 19; sums >= 19 are 21, 20, 19 in 1 + 1 + 1 ways of 64, doubled.
        assert signed_rank([1.0, -2.0, 3.0, 4.0, 5.0, 6.0]).p == pytest.approx(2 * 3 / 64)

    def test_zeros_are_ranked_and_then_set_aside(self):
        # |d| = 0, 0, 1, 2, 3: the differences keep ranks 3, 4, 5; all positive is 1 of 8, doubled. T+ = 12.
        found = signed_rank([0.0, 0.0, 1.0, 2.0, 3.0])
        assert (found.statistic, found.p, found.zeros) == (12.0, 0.25, 2)

    def test_pratt_is_not_the_same_as_dropping_zeros(self):
        # Losses 2 and 3. Dropped zeros: sums of 1..6 up to 5 are 10 of 64. Ranked zeros: sums of 4..9 up to 11 are 11.
        some = [0.0, 0.0, 0.0, 1.0, -2.0, -3.0, 4.0, 5.0, 6.0]
        assert signed_rank([d for d in some if d]).p == pytest.approx(2 * 10 / 64)
        assert signed_rank(some).p == pytest.approx(2 * 11 / 64)

    def test_nothing_and_no_difference(self):
        assert math.isnan(signed_rank([]).p)
        assert math.isnan(signed_rank([NAN, float("inf")]).smallest_p)
        assert signed_rank([0.0, 0.0]).p == signed_rank([0.0, 0.0]).smallest_p == 1.0

    def test_binary_fractions_do_not_break_a_tie(self):
        assert 0.3 - 0.2 != 0.2 - 0.1
        found = signed_rank([0.3 - 0.2, -(0.2 - 0.1), 0.5])
        assert found == signed_rank([0.1, -0.1, 0.5])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=10))
    def test_law_equals_brute_force_with_ties_and_zeros(self, differences):
        assert signed_rank(differences).p == pytest.approx(brute_force(differences), abs=1e-12)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(3, 50), st.integers(0, 10_000), st.floats(-1, 1))
    def test_equals_scipy_where_there_are_neither_ties_nor_zeros(self, n, seed, shift):
        differences = np.random.default_rng(seed).normal(shift, 1, n)
        expected = stats.wilcoxon(differences, method="exact")
        found = signed_rank(differences)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert min(found.statistic, n * (n + 1) / 2 - found.statistic) == pytest.approx(expected.statistic)

    def test_large_samples_with_zeros_equal_scipys_normal_tail(self, monkeypatch):
        monkeypatch.setattr(hypothesis_tests, "EXACT_UP_TO", 10)
        differences = np.round(np.random.default_rng(1).normal(0.1, 1, 300), 1)
        expected = stats.wilcoxon(differences, zero_method="pratt", method="approx").pvalue
        found = signed_rank(differences)
        assert not found.exact
        assert found.p == pytest.approx(expected, rel=1e-9)

    def test_exact_and_normal_tail_meet_at_the_limit(self):
        differences = np.random.default_rng(3).normal(0.15, 1, hypothesis_tests.EXACT_UP_TO)
        exact = signed_rank(differences)
        normal = stats.wilcoxon(differences, method="approx").pvalue
        assert exact.exact
        assert exact.p == pytest.approx(normal, rel=0.05)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.randoms(use_true_random=False))
    def test_law_order_and_direction_do_not_matter(self, differences, random):
        before = signed_rank(differences)
        mixed = random.sample(differences, len(differences))
        assert signed_rank(mixed).p == pytest.approx(before.p)
        assert signed_rank([-d for d in differences]).p == pytest.approx(before.p)
        assert before.smallest_p - 1e-12 <= before.p <= 1

    def test_false_alarms_are_as_rare_as_promised(self):
        rng = np.random.default_rng(5)
        assert np.mean([signed_rank(rng.normal(0, 1, 12)).p <= 0.05 for _ in range(600)]) <= 0.075


class TestHolm:
    def test_worked_by_hand(self):
        # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; never falling: 0.06 at the end.
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
        assert all(c <= min(1.0, len(values) * p) for p, c in zip(values, holm(values), strict=True))

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
