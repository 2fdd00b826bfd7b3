"""A difference holds, or has no verdict, as worked out by hand from seeds and hospitals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedsgcg.server.report.differences import CaseValues, compare_everywhere, compare_on_average
from fedsgcg.server.report.sections.claims import claim_row, claim_sentence
from tests.unit.report.test_tables import row

SITES = ("BIDMC", "HK", "RUNMC", "UCL")


class TestDifferences:
    @staticmethod
    def two(gain, sites=SITES, seeds=(0, 1, 2), base=0.5, n=12, **more):
        """Rows of `source` and of `sgcg`, which is better by `gain(site, seed, case)`."""
        found = []
        for site in sites:
            for seed in seeds:
                for i in range(n):
                    about = {"heldout": site, "seed": seed, "case": str(i)} | more
                    found.append(row("source", dice=base + 0.01 * i, **about))
                    found.append(row("sgcg", dice=base + 0.01 * i + gain(site, seed, i), **about))
        return found

    @staticmethod
    def compare(rows, metric="dice"):
        (found,) = compare_on_average(CaseValues(rows), [("sgcg", "source")], ["gland"], [metric])
        return found

    def test_holds_when_interval_and_corrected_test_agree(self):
        gain = {"BIDMC": 0.018, "HK": 0.02, "RUNMC": 0.022, "UCL": 0.02}
        found = self.compare(self.two(lambda site, seed, _: gain[site] + 0.001 * (seed - 1)))
        assert found.holds
        assert found.test.p == pytest.approx(2 / 2**12)  # twelve trainings, not 144 evaluations
        # Four hospitals: mean 0.02, sd 0.00163, se 0.000816, t with 3 degrees 3.182.
        half = 3.1824463 * math.sqrt((2 * 0.002**2) / 3 / 4)
        assert (found.interval.low, found.interval.high) == pytest.approx(
            (0.02 - half, 0.02 + half)
        )
        assert claim_sentence(found, several=False) == (
            "sgcg against source, Dice: +0.020 (95 % interval +0.017 to +0.023; 48 cases; 3 seeds; "
            "corrected p\u00a0<\u00a00.001; higher at 4 of 4 hospitals: RUNMC +0.022, HK +0.020, "
            "UCL +0.020, BIDMC +0.018); the difference holds."
        )

    @pytest.mark.parametrize("seeds", [(0,), (0, 1, 2), tuple(range(9))])
    def test_one_hospital_that_makes_the_difference_is_no_difference(self, seeds):
        """One seed and four hospitals are no claim, whatever the number of seeds."""
        gain = {"BIDMC": 0.297, "HK": -0.006, "RUNMC": -0.036, "UCL": -0.012}
        found = self.compare(
            self.two(lambda site, seed, i: gain[site] + 0.001 * ((seed + i) % 3 - 1), seeds=seeds)
        )
        assert not found.holds
        assert not found.interval.excludes_zero
        text = claim_sentence(found, several=False)
        assert (
            "higher at 1 of 4 hospitals: BIDMC +0.297, HK −0.006, UCL −0.012, RUNMC −0.036" in text
        )
        assert ("no verdict, because with one seed" in text) == (len(seeds) == 1)

    def test_a_difference_that_is_not_shown_says_how_large_it_would_have_to_be(self):
        gain = {"BIDMC": 0.018, "HK": -0.02, "RUNMC": 0.022, "UCL": -0.02}
        found = self.compare(self.two(lambda site, *_: gain[site]))
        # Four hospitals: se 0.0116; the noncentrality of t with 3 degrees for 80 % is 4.256.
        error = np.std(list(gain.values()), ddof=1) / 2
        assert found.detectable == pytest.approx(4.255898863 * error)
        assert "; a true difference below 0.049 would often be missed" in claim_sentence(
            found, several=False
        )

    def test_a_study_that_cannot_show_a_difference_detects_none(self):
        one_seed = self.compare(self.two(lambda site, *_: 0.02 * len(site), seeds=(4,)))
        few = self.compare(self.two(lambda site, *_: 0.02 * len(site), SITES[:2], seeds=(0, 1)))
        assert (one_seed.detectable, few.detectable) == (math.inf, math.inf)
        assert claim_row(few, "", 1.0).detectable == "none"

    def test_one_seed_gives_no_verdict_however_clear_it_looks(self):
        found = self.compare(self.two(lambda *_: 0.02, seeds=(4,)))
        assert (found.interval.excludes_zero, found.test.p, found.holds) == (True, 0.125, False)
        assert found.sentence == "no verdict: with one seed a difference may be chance of training"

    def test_two_models_that_both_miss_the_structure_give_no_verdict(self):
        found = self.compare(self.two(lambda *_: 0.05, base=0.02, n=2))
        assert found.interval.excludes_zero
        assert not found.holds
        assert found.levels == pytest.approx((0.075, 0.025))
        assert found.sentence == (
            "no verdict: both mean Dice are below 0.2, so neither model finds the structure"
        )
        found = self.compare(self.two(lambda *_: 0.3, base=0.02, n=2))
        assert found.holds  # one of them does find it

    def test_few_trainings_can_show_nothing_and_say_what_is_possible(self):
        found = self.compare(self.two(lambda *_: 0.02, sites=("HK", "UCL"), seeds=(0, 1)))
        assert found.interval.excludes_zero
        assert not found.holds
        assert found.sentence == (
            "no difference shown: 4 trainings are too few for a test (p cannot be below 0.12)"
        )

    def test_at_one_hospital_the_units_are_its_seeds_and_cases(self):
        """Seeds 0.09, 0.1, 0.11 and cases twice as far apart, with 2 degrees of freedom each.

        Variances 0.0001 / 3 and 0.0004 / 3.
        """
        found = self.compare(
            self.two(
                lambda _, seed, i: 0.1 + 0.01 * (seed - 1) + 0.02 * (i - 1), sites=("HK",), n=3
            )
        )
        seeds, cases = 0.0001 / 3, 0.0004 / 3
        freedom = (seeds + cases) ** 2 / ((seeds**2 + cases**2) / 2)
        half = stats.t.ppf(0.975, freedom) * math.sqrt(seeds + cases)
        assert (found.interval.mean, found.interval.high) == pytest.approx((0.1, 0.1 + half))
        assert (found.test.units, found.test.p) == (3, 0.25)

    def test_hospitals_that_were_judged_by_the_same_models_share_their_seeds(self):
        """No hospital held out: one training per seed, so three seeds are three units."""
        rows = self.two(
            lambda site, seed, _: 0.1 + 0.01 * (seed - 1) + 0.02 * (site == "HK"),
            sites=("HK", "UCL"),
        )
        rows = [{**entry, "heldout": ""} for entry in rows]
        found = self.compare(rows)
        assert (found.test.units, found.test.p) == (3, 0.25)
        sites, seeds = 0.0002 / 2, 0.0001 / 3
        freedom = (sites + seeds) ** 2 / (sites**2 / 1 + seeds**2 / 2)
        half = stats.t.ppf(0.975, freedom) * math.sqrt(sites + seeds)
        assert (found.interval.mean, found.interval.high) == pytest.approx((0.11, 0.11 + half))

    def test_false_verdicts_are_rare_where_cases_share_a_model(self):
        """No method is better, but each training shifts all its cases."""
        rng = np.random.default_rng(2)
        holds = 0
        for _ in range(60):
            gains = rng.normal(0, 0.03, (4, 3, 1)) + rng.normal(0, 0.01, (4, 3, 12))
            rows = self.two(lambda site, seed, i, gains=gains: gains[SITES.index(site), seed, i])
            holds += self.compare(rows).holds
        assert holds <= 8  # of 60 at 5 %: more than 8 has a chance below 0.5 %

    def test_a_test_alone_is_no_claim(self):
        # Every training gains, but one hospital far more than the others: nothing can be said about
        # another hospital.
        found = self.compare(self.two(lambda site, *_: 0.4 if site == "HK" else 0.02))
        assert found.p < 0.05
        assert not found.holds
        assert found.sentence == (
            "no difference shown: the interval over 4 hospitals includes zero, although the "
            "test alone is significant"
        )

    def test_correction_counts_every_comparison_of_the_table(self):
        rows = self.two(lambda *_: 0.02, sites=("HK", "UCL"))
        table = compare_everywhere(CaseValues(rows), ("sgcg", "source"))
        assert len(table) == 4 * 3  # four metrics; two hospitals and the average
        # The distances are all the same: p = 1 takes part, too.
        assert {entry.family for entry in table} == {12}
        dice = {entry.site: entry for entry in table if entry.metric == "dice"}
        assert dice["average"].corrected == pytest.approx(12 * 2 / 2**6)
        assert dice["HK"].corrected == 1.0

    def test_a_claim_over_some_of_the_hospitals_says_so(self):
        rows = self.two(lambda *_: 0.02, sites=("HK",)) + [row("source", "UCL", dice=0.5)]
        assert "12 cases at 1 of 2 hospitals;" in claim_sentence(self.compare(rows), several=False)

    def test_seeds_of_unequal_places_are_not_averaged(self):
        rows = [row(seed=0, dice=0.4), row(seed=1, dice=0.6), row(heldout="UCL", seed=0, dice=0.8)]
        values = CaseValues(rows)
        assert values.by_seed("sgcg", "gland", "dice") == {0: pytest.approx(0.6)}
        assert values.by_seed("sgcg", "gland", "dice", ("HK", "HK")) == {0: 0.4, 1: 0.6}
