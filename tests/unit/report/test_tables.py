"""Means and paired differences, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from fedsgcg.server.report.differences import CaseValues, compare_on_average, paired_differences
from fedsgcg.server.report.tables import (
    AVERAGE,
    best_methods,
    distance_unit,
    heldout_rows,
    methods_of,
    other_rows,
    summary_rows,
)

NAN = float("nan")


def row(
    method="sgcg",
    heldout="HK",
    seed=0,
    site=None,
    case="a",
    structure="gland",
    dice=0.5,
    asd=2.0,
    **more,
):
    empty = math.isnan(asd)
    base = {
        "method": method,
        "heldout": heldout,
        "seed": seed,
        "site": site or heldout,
        "case": case,
    }
    base |= {
        "structure": structure,
        "dice": dice,
        "asd": asd,
        "assd": asd,
        "hd95": 3 * asd,
        "unit": "pixel",
    }
    base |= {
        "asd_mm": None,
        "assd_mm": None,
        "hd95_mm": None,
        "empty_prediction": empty,
        "empty_truth": False,
    }
    return base | more


class TestSummary:
    def test_seeds_are_averaged_per_case_before_cases(self):
        rows = [
            row(case="a", seed=0, dice=0.2),
            row(case="a", seed=1, dice=0.4),
            row(case="b", seed=0, dice=0.9),  # one seed only: counts as one case all the same
        ]
        (found,) = summary_rows(rows)
        assert found["dice_mean"] == pytest.approx((0.3 + 0.9) / 2)
        assert found["dice_sd"] == pytest.approx(np.std([0.3, 0.9], ddof=1))
        assert (found["cases"], found["seeds"], found["evaluations"]) == (2, [0, 1], 3)
        assert (found["dice_low"], found["dice_high"]) == (
            0.0,
            1.0,
        )  # two cases say almost nothing: 0.6 ± 3.8

    def test_distances_of_empty_masks_are_left_out_and_counted_while_dice_counts(self):
        rows = [
            row(case="a", dice=0.0, asd=NAN),
            row(case="b", dice=0.8, asd=1.0),
            row(case="c", dice=0.7, asd=3.0),
        ]
        (found,) = summary_rows(rows)
        assert (
            found["asd_mean"],
            found["hd95_mean"],
            found["asd_excluded"],
            found["dice_excluded"],
        ) == (
            2.0,
            6.0,
            1,
            0,
        )
        assert found["dice_mean"] == pytest.approx(0.5)

    def test_a_null_distance_is_undefined(self):
        (found,) = summary_rows([row(asd_mm=None) | {"asd": None, "assd": None, "hd95": None}])
        assert math.isnan(found["asd_mean"])
        assert found["asd_excluded"] == 1

    def test_both_masks_empty_is_counted(self):
        (found,) = summary_rows(
            [row(dice=1.0, asd=0.0, empty_prediction=True, empty_truth=True), row(case="b")]
        )
        assert found["both_empty"] == 1
        assert found["asd_excluded"] == 0

    def test_average_lets_every_hospital_count_the_same(self):
        rows = [row(heldout="HK", case=str(case), dice=0.9) for case in range(9)] + [
            row(heldout="UCL", dice=0.5)
        ]
        *hospitals, average = summary_rows(rows)
        assert [found["site"] for found in hospitals] == ["HK", "UCL"]
        assert average["site"] == average["heldout"] == AVERAGE
        assert average["dice_mean"] == pytest.approx(0.7)
        assert average["dice_sd"] == pytest.approx(np.std([0.9, 0.5], ddof=1))
        assert (average["hospitals"], average["cases"]) == (2, 10)

    def test_equal_aliases_at_two_hospitals_are_two_cases(self):
        assert summary_rows([row(heldout="HK"), row(heldout="UCL")])[-1]["cases"] == 2

    def test_reads_an_arrow_table(self):
        rows = [row(), row(case="b")]
        assert summary_rows(pa.Table.from_pylist(rows)) == summary_rows(rows)

    def test_millimetres_only_when_every_distance_has_them(self):
        mm = {"asd_mm": 1.0, "assd_mm": 1.0, "hd95_mm": 2.0}
        assert distance_unit([row(**mm), row(case="b", asd=NAN)]) == "mm"
        assert distance_unit([row(**mm), row(case="b")]) == "pixel"
        (found,) = summary_rows([row(**mm)])
        assert (found["unit"], found["asd_mean"], found["dice_mean"]) == ("mm", 1.0, 0.5)

    def test_observers_are_kept_apart(self):
        rows = [row(), row(site="watcher", dice=0.1)]
        assert [found["site"] for found in summary_rows(rows)] == ["HK"]
        assert [found["site"] for found in other_rows(rows)] == ["watcher"]

    def test_without_a_held_out_hospital_every_evaluation_is_shown(self):
        rows = [row(heldout="", site="HK"), row(heldout="", site="UCL")]
        assert heldout_rows(rows) == rows
        assert other_rows(rows) == []

    def test_the_baseline_comes_first(self):
        assert methods_of([row("sgcg"), row("ram"), row("source")]) == ["source", "ram", "sgcg"]


class TestDifferences:
    def differences(self, rows, metric="dice"):
        return {d.site: d for d in paired_differences(rows, "sgcg", "source") if d.metric == metric}

    def test_pairs_by_case_and_seed(self):
        rows = [
            row("sgcg", case="a", seed=0, dice=0.8),
            row("sgcg", case="a", seed=1, dice=0.9),
            row("sgcg", case="b", seed=0, dice=0.5),
            row("sgcg", case="only here", dice=0.1),
            row("source", case="a", seed=0, dice=0.7),
            row("source", case="a", seed=1, dice=0.6),
            row("source", case="b", seed=0, dice=0.5),
            row("source", case="b", seed=1, dice=0.1),  # sgcg has no seed 1 for b
        ]
        found = self.differences(rows)["HK"]
        assert found.cases == 2
        assert found.interval.mean == pytest.approx(((0.1 + 0.3) / 2 + 0.0) / 2)
        assert found.seeds == pytest.approx({0: 0.05, 1: 0.3})

    def test_pairing_removes_what_cases_share(self):
        hard = np.random.default_rng(0).uniform(0.2, 0.8, 20)
        rows = [row("source", case=str(i), dice=d) for i, d in enumerate(hard)]
        rows += [row("sgcg", case=str(i), dice=d + 0.02) for i, d in enumerate(hard)]
        found = self.differences(rows)["HK"].interval
        assert (found.low, found.high) == pytest.approx((0.02, 0.02))
        assert found.excludes_zero

    def test_a_pair_with_an_undefined_distance_is_left_out(self):
        rows = [row("sgcg", asd=1.0), row("source", asd=NAN, dice=0.0)]
        assert self.differences(rows, "asd")["HK"].cases == 0
        assert self.differences(rows, "asd")["HK"].sentence == "no case in common"

    def test_average_counts_hospitals_the_same(self):
        rows = [row("sgcg", "HK", case=str(i), dice=0.6) for i in range(4)] + [
            row("sgcg", "UCL", dice=0.9)
        ]
        rows += [row("source", "HK", case=str(i), dice=0.5) for i in range(4)] + [
            row("source", "UCL", dice=0.6)
        ]
        found = self.differences(rows)[AVERAGE]
        assert found.interval.mean == pytest.approx(0.2)
        assert (found.cases, found.groups) == (5, 2)

    @pytest.mark.parametrize(
        ("metric", "change", "word"),
        [
            ("dice", 0.1, "better"),
            ("dice", -0.1, "worse"),
            ("asd", 0.1, "worse"),
            ("asd", -0.1, "better"),
        ],
    )
    def test_sentence_knows_which_direction_is_good(self, metric, change, word):
        places = [
            {"heldout": h, "seed": seed, "case": c}
            for h in ("HK", "UCL")
            for seed in range(4)
            for c in "ab"
        ]
        rows = [row("source", **place, **{metric: 0.5}) for place in places]
        rows += [row("sgcg", **place, **{metric: 0.5 + change}) for place in places]
        found = self.differences(rows, metric)
        assert found[AVERAGE].corrected == pytest.approx(12 * 2 / 2**8)
        (alone,) = compare_on_average(CaseValues(rows), [("sgcg", "source")], ["gland"], [metric])
        assert alone.sentence == f"sgcg is {word}: the difference holds"
        assert found["HK"].sentence.startswith(
            "no difference shown: 4 trainings are too few for a test"
        )

    def test_sentence_without_a_difference_or_an_interval(self):
        rows = [
            row(m, seed=s, case=c, dice=0.5)
            for m in ("source", "sgcg")
            for s in (0, 1)
            for c in "ab"
        ]
        changed = [
            {**r, "dice": 0.6 if r["case"] == "a" else 0.4} if r["method"] == "sgcg" else r
            for r in rows
        ]
        assert (
            self.differences(changed)["HK"].sentence
            == "no difference shown: the interval includes zero"
        )
        other = [r for r in rows if (r["method"] == "sgcg") == (r["case"] == "a")]
        assert self.differences(other)["HK"].sentence == "no case in common"
        one = [r for r in rows if r["case"] == "a"]
        assert (
            self.differences(one)["HK"].sentence
            == "no verdict: one case in common gives no interval"
        )


def test_best_is_highest_dice_and_lowest_distance_and_nobody_in_a_tie_of_all():
    rows = [
        {"method": m, "dice_mean": d, "asd_mean": a}
        for m, d, a in (("x", 0.8, 1.0), ("y", 0.9, 3.0), ("z", 0.9, NAN))
    ]
    assert best_methods(rows, "dice") == {"y", "z"}
    assert best_methods(rows, "asd") == {"x"}
    assert best_methods(rows[1:], "dice") == set()
    assert best_methods(rows[1:], "asd") == set()
