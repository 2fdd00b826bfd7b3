"""Curves, ledgers, departures and text of the report, against hand-computed values."""

from __future__ import annotations

import json
import math

import pytest

from fedsgcg.server.report.figures.drawing import colour, marker
from fedsgcg.server.report.format import show, show_bytes, show_interval, show_seconds
from fedsgcg.server.report.intervals import Interval
from fedsgcg.server.report.reader import Reader
from fedsgcg.server.report.rounds import curves, departures, steps_by_federation
from fedsgcg.server.report.sections.panels import shift_figures, training_figures
from fedsgcg.server.report.study_files import Cell
from fedsgcg.server.report.summary import headline, join_words, settings_text

NAN = float("nan")


def entry(metric, value, number=1, seed=0, site="A", cls="", method="sgcg", heldout="HK"):
    return {
        "method": method,
        "heldout": heldout,
        "seed": seed,
        "round": number,
        "phase": "train",
    } | {
        "site": site,
        "cls": cls,
        "metric": metric,
        "value": value,
    }


class TestSteps:
    def test_are_those_of_one_hospital_in_a_round(self):
        federations = {"source": "by_site", "source pooled": "pooled"}
        rows = [
            entry("steps", steps, number, site=site, method=method)
            for number in (1, 2)
            for method, site, steps in (
                ("source", "A", 21.0),
                ("source", "B", 36.0),
                ("source pooled", "pooled", 109.0),
            )
        ]
        rows += [entry("steps", 9999.0, method="another"), entry("loss", 5.0, method="source")]
        assert steps_by_federation(rows, federations) == {"by_site": "21 to 36", "pooled": "109"}

    def test_are_not_listed_if_all_took_the_same(self):
        rows = [entry("steps", 5.0, method=method) for method in ("sgcg", "sgcg pooled")]
        assert steps_by_federation(rows, {"sgcg": "by_site", "sgcg pooled": "pooled"}) == {}
        assert steps_by_federation([], {"sgcg": "by_site"}) == {}


class TestTraining:
    def test_a_held_out_hospital_that_was_judged_only_at_the_end_has_no_curve(self):
        def panel(*judged):
            rows = [entry("loss_supervised", 1.0 / n, n) for n in (1, 2, 3)]
            rows += [
                entry(f"heldout_{name}", 0.5, n, site="HK")
                for n in judged
                for name in ("dice", "asd")
            ]
            (found,) = training_figures(rows, ["sgcg"])
            return found

        followed, at_the_end = panel(1, 3), panel(3)
        assert (followed.heldout, at_the_end.heldout) == (True, False)
        assert followed.drawing.height > at_the_end.drawing.height  # no axes for the distance

    def test_a_followed_distance_says_of_how_many_evaluations_it_is_no_mean(self):
        rows = [entry("loss_supervised", 1.0 / n, n) for n in (1, 2, 3)]
        rows += [
            entry(f"heldout_{name}", 0.5, n, site="HK")
            for n in (1, 2, 3)
            for name in ("dice", "asd")
        ]
        (panel,) = training_figures(rows, ["sgcg"])
        assert panel.detail == ""
        rows += [
            entry("heldout_asd_left_out", value, n, site="HK") for n, value in ((1, 3.0), (2, 1.0))
        ]
        (panel,) = training_figures(rows, ["sgcg"])
        assert panel.detail == "ASD without up to 3 evaluations with an empty mask"

    def test_a_total_loss_of_another_size_does_not_flatten_the_supervised_ones(self):
        def scale(weight):
            rows = [entry("loss_supervised", 1.0 / n, n) for n in (1, 2, 3)]
            rows += [entry("loss", weight / n, n) for n in (1, 2, 3)]
            (panel,) = training_figures(rows, ["sgcg"])
            return panel.drawing.figure.axes[0].get_yscale()

        assert (scale(2.0), scale(20.0)) == ("linear", "log")


def test_thirty_six_methods_have_a_marker_and_colour_of_their_own():
    assert len({(marker(index), colour(index)) for index in range(36)}) == 36


class TestCurves:
    def test_sites_count_the_same_then_seeds(self):
        rows = [
            entry("loss", 1.0, site="A"),
            entry("loss", 2.0, site="B"),
            entry("loss", 4.5, site="A", seed=1),
        ]
        curve = curves(rows, "loss")["HK", "sgcg", ""]
        assert (curve.mean[0], curve.low[0], curve.high[0], curve.seeds) == (3.0, 1.5, 4.5, 2)

    def test_validation_belongs_to_the_round_before(self):
        rows = [
            entry("validation_dice", 0.1, 1),
            entry("validation_dice", 0.6, 2),
            entry("loss", 1.0, 2),
        ]
        assert curves(rows, "validation_dice")["HK", "sgcg", ""].rounds.tolist() == [0, 1]
        assert curves(rows, "loss")["HK", "sgcg", ""].rounds.tolist() == [2]

    def test_classes_and_folds_are_kept_apart_and_undefined_values_left_out(self):
        rows = [
            entry("between_site_trace", 1.0, site="", cls="a"),
            entry("between_site_trace", 2.0, site="", cls="b", heldout="UCL"),
            entry("between_site_trace", None, 2, site="", cls="a"),
            entry("between_site_trace", NAN, 3, site="", cls="a"),
        ]
        found = curves(rows, "between_site_trace")
        assert found.keys() == {("HK", "sgcg", "a"), ("UCL", "sgcg", "b")}
        assert found["HK", "sgcg", "a"].rounds.tolist() == [1]


class TestShift:
    def test_the_share_at_the_end_is_that_under_the_normalisation_of_evaluation(self):
        traces = {"between_site_trace": 1.0, "within_site_trace": 99.0}
        rows = [
            entry(name, value, number, site="", cls="a")
            for name, value in traces.items()
            for number in (1, 2)
        ]
        (panel,) = shift_figures(rows, ["sgcg"])
        assert panel.shares[0].share == "1.0 %"
        final = {"between_site_trace_evaluation": 30.0, "within_site_trace_evaluation": 70.0}
        rows += [entry(name, value, 2, site="", cls="a") for name, value in final.items()]
        (panel,) = shift_figures(rows, ["sgcg"])
        assert panel.shares[0].share == "30.0 %"


class TestDepartures:
    def cell(self, folder):
        return Cell("sgcg", "HK", 0, folder, "completed", "", {}, {}, NAN)

    def test_sums_the_parts_of_a_ledger(self, tmp_path):
        home = tmp_path / "sites" / "A"
        home.mkdir(parents=True)
        lines = [
            {"round": 0, "kind": "query.enrol", "parts": {"text": 10}, "withheld": []},
            {
                "round": 1,
                "kind": "train",
                "parts": {"weights": 1000, "statistics": 50},
                "withheld": ["tumour"],
            },
            {
                "round": 2,
                "kind": "train",
                "parts": {"weights": 1000, "statistics": 50},
                "withheld": [],
            },
        ]
        (home / "ledger.jsonl").write_text(
            "\n".join(map(json.dumps, lines)) + '\n{"round": 3, "par'
        )
        (found,) = departures([self.cell(tmp_path)], [entry("bytes_up", 5)], Reader(tmp_path))
        assert (found.site, found.source, found.messages, found.rounds) == ("A", "ledger", 3, 2)
        assert found.parts == {"text": 10, "weights": 2000, "statistics": 100}
        assert (found.total, found.withheld) == (2110, {"tumour"})
        assert found.per_round("weights") == 1000

    def test_falls_back_on_what_arrived(self, tmp_path):
        rows = [
            entry("bytes_up", 100, 1),
            entry("bytes_up", 50, 2),
            entry("bytes_up", 7, 1, site="B"),
            entry("loss", 1.0),
        ]
        found = departures([self.cell(tmp_path)], rows, Reader(tmp_path))
        assert [(part.site, part.total, part.rounds, part.source) for part in found] == [
            ("A", 150, 2, "coordinator"),
            ("B", 7, 1, "coordinator"),
        ]


class TestWords:
    def test_numbers(self):
        assert show(-0.1234, 2) == "−0.12"
        assert show(0.1234, 3, sign=True) == "+0.123"
        assert show(-0.0001, 3, sign=True) == "+0.000"
        assert show(NAN, 2) == "–"
        assert show_interval(Interval(0, -0.5, 0.25), 2, sign=True) == "−0.50 to +0.25"
        assert show_interval(Interval(0, NAN, NAN), 2) == "–"

    @pytest.mark.parametrize(
        ("size", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1 kB"),
            (12_740_000, "12.7 MB"),
            (999_600, "1 MB"),
            (2.5e9, "2.5 GB"),
            (NAN, "–"),
        ],
    )
    def test_bytes(self, size, text):
        assert show_bytes(size) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(4.4, "4 s"), (89, "1 min"), (3600, "1 h 00 min"), (9900, "2 h 45 min")],
    )
    def test_durations(self, seconds, text):
        assert show_seconds(seconds) == text

    def test_lists(self):
        assert [join_words(words) for words in ([], ["a"], ["a", "b"], "abc")] == [
            "",
            "a",
            "a and b",
            "a, b and c",
        ]

    def test_settings_are_split_into_shared_and_differing(self):
        shared, differing = settings_text(
            {"a": {"x": {"y": 1, "z": 2}}, "b": {"x": {"y": 1, "z": 3}, "w": 4}}
        )
        assert shared == "x.y: 1\n"
        assert differing == [("x.z", ["2", "3"]), ("w", ["–", "4"])]

    def test_headline_never_claims_what_was_not_done(self):
        row = {"method": "sgcg", "heldout": "", "site": "HK", "structure": "gland", "hospitals": 1}
        row |= {"dice_mean": 0.5, "dice_low": NAN, "dice_high": NAN}
        assert "took no part" not in headline([row], [], "gland")
        assert (
            headline([row | {"heldout": "HK"}], [], "gland")
            == "At HK, a hospital that took no part in training, sgcg reaches a mean Dice of 0.500 "
            "for gland."
        )
        better = row | {
            "method": "sgcg weight=1",
            "dice_mean": 0.625,
            "dice_low": 0.5,
            "dice_high": 0.75,
        }
        assert headline([row, better], [], "gland") == (
            "No hospital was held out. On the hospitals' own validation cases, sgcg weight=1 has "
            "the highest mean Dice of the 2 compared: 0.625 (95 % interval 0.500 to 0.750) for "
            "gland; next is sgcg with 0.500. A setting chosen by this result is chosen with "
            "patients of all these hospitals, including any that is held out later."
        )
        average = row | {"heldout": "average", "site": "average", "hospitals": 3}
        assert "over 3 of 4 hospitals" in headline(
            [row | {"heldout": "HK"}, average], [], "gland", 4
        )
        assert headline([], [], "gland") == "No held-out hospital has been evaluated yet."
        assert math.isnan(row["dice_low"])
