"""Curves, ledgers, overlays, figures and text of the report, against hand-computed values."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.server.report.figures import drawing as figures
from fedsgcg.server.report.figures.overlays import (
    Images,
    choose_cases,
    contour_path,
    crop_box,
    interval_bar,
    overlay,
)
from fedsgcg.server.report.format import show, show_bytes, show_interval, show_seconds
from fedsgcg.server.report.intervals import Interval
from fedsgcg.server.report.reader import Picture, Reader
from fedsgcg.server.report.rounds import Curve, curves, departures, steps_by_federation
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


def picture(case="a", dice=0.5, size=(20, 30), truth=None, prediction=None):
    blank = np.zeros(size, np.uint8)
    truth, prediction = (blank if mask is None else mask for mask in (truth, prediction))
    return Picture(case, dice, 3, np.full(size, 90, np.uint8), truth, prediction, ("gland",))


def points(path):
    return [
        np.array([list(map(float, p.split())) for p in part.split("L")])
        for part in re.findall(r"M([^Z]*)Z", path)
    ]


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

    def test_are_not_told_where_all_took_the_same(self):
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
        assert (followed["marks"]["heldout"], at_the_end["marks"]["heldout"]) == (True, False)
        assert followed["drawing"].height > at_the_end["drawing"].height  # no axes for the distance

    def test_a_followed_distance_says_of_how_many_evaluations_it_is_no_mean(self):
        rows = [entry("loss_supervised", 1.0 / n, n) for n in (1, 2, 3)]
        rows += [
            entry(f"heldout_{name}", 0.5, n, site="HK")
            for n in (1, 2, 3)
            for name in ("dice", "asd")
        ]
        (panel,) = training_figures(rows, ["sgcg"])
        assert panel["detail"] == ""
        rows += [
            entry("heldout_asd_left_out", value, n, site="HK") for n, value in ((1, 3.0), (2, 1.0))
        ]
        (panel,) = training_figures(rows, ["sgcg"])
        assert panel["detail"] == "ASD without up to 3 evaluations with an empty mask"


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
        assert panel["shares"][0]["share"] == "1.0 %"
        final = {"between_site_trace_evaluation": 30.0, "within_site_trace_evaluation": 70.0}
        rows += [entry(name, value, 2, site="", cls="a") for name, value in final.items()]
        (panel,) = shift_figures(rows, ["sgcg"])
        assert panel["shares"][0]["share"] == "30.0 %"


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


class TestOverlays:
    @given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 9), st.integers(1, 9))
    def test_law_outline_of_a_rectangle_ends_at_its_pixels_and_encloses_their_area(
        self, top, left, height, width
    ):
        mask = np.zeros((16, 16), bool)
        mask[top : top + height, left : left + width] = True
        (outline,) = points(contour_path(mask, 10.0))
        x, y = outline[:, 0] / 10, outline[:, 1] / 10
        assert (x.min(), x.max(), y.min(), y.max()) == (left, left + width, top, top + height)
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        assert area == pytest.approx(
            height * width - 0.5
        )  # each of the four corners is cut by a triangle of 1/8

    def test_a_ring_has_two_outlines_and_nothing_has_none(self):
        ring = np.ones((7, 7), bool)
        ring[3, 3] = False
        assert len(points(contour_path(ring, 1.0))) == 2
        assert contour_path(np.zeros((5, 5), bool), 1.0) == ""

    def test_worst_median_best(self):
        cases = [
            picture(name, dice)
            for name, dice in zip("abcde", (0.5, 0.9, 0.1, 0.7, NAN), strict=True)
        ]
        assert choose_cases({"sgcg": cases}) == [("worst", "c"), ("median", "a"), ("best", "b")]
        assert choose_cases({"sgcg": cases[:2]}) == [("worst", "a"), ("best", "b")]
        assert choose_cases({"sgcg": cases[:1]}) == [("worst", "a")]
        assert choose_cases({}) == choose_cases({"sgcg": []}) == []

    def test_no_method_chooses_alone(self):
        ours = [picture(name, dice) for name, dice in zip("abc", (0.9, 0.5, 0.4), strict=True)]
        theirs = [
            picture(name, dice) for name, dice in zip("abcd", (0.1, 0.6, 0.8, 0.0), strict=True)
        ]
        # Means 0.5, 0.55, 0.6; d is judged by one method only.
        assert choose_cases({"sgcg": ours, "source": theirs}) == [
            ("worst", "a"),
            ("median", "b"),
            ("best", "c"),
        ]

    def test_crop_holds_every_mask_and_stays_in_the_picture(self):
        truth, prediction = np.zeros((100, 120), np.uint8), np.zeros((100, 120), np.uint8)
        truth[2:30, 90:119] = 1
        prediction[40:45, 80:85] = 2
        top, bottom, left, right = crop_box(
            [picture(size=(100, 120), truth=truth, prediction=prediction)]
        )
        assert 0 <= top <= 2
        assert 45 <= bottom <= 100
        assert 0 <= left <= 80
        assert 119 <= right <= 120
        assert bottom - top == right - left
        assert crop_box([picture(size=(100, 120))]) == (0, 100, 0, 120)

    def test_truth_and_prediction_differ_by_more_than_colour_and_labels_are_escaped(self):
        mask = np.zeros((20, 30), np.uint8)
        mask[5:9, 5:9] = 1
        images = Images()
        text = str(
            overlay(picture(truth=mask, prediction=mask), (0, 20, 0, 30), '<script> "x"', images)
        )
        assert "<script" not in text
        assert text.count('class="truth"') == text.count('class="prediction p0"') == 1
        root = ET.fromstring(text)
        assert root.attrib["viewBox"] == "0 0 320 213"
        image = ET.fromstring(str(images.markup))
        assert root.find("use").attrib["href"] == f"#{image.attrib['id']}"
        assert base64.b64decode(image.attrib["href"].partition(",")[2]).startswith(b"\xff\xd8\xff")

    def test_the_same_slice_stands_in_the_page_once(self):
        images, box = Images(), (0, 20, 0, 30)
        texts = [str(overlay(picture(), box, name, images)) for name in ("source", "sgcg")]
        other = str(overlay(picture(size=(22, 30)), (0, 22, 0, 30), "x", images))
        assert str(images.markup).count("<image") == 2
        assert all("#slice-0" in text for text in texts)
        assert "#slice-1" in other

    def test_an_interval_bar_lies_on_its_side_of_zero(self):
        root = ET.fromstring(str(interval_bar(Interval(0.2, 0.1, 0.3), 0.3)))
        bar = root.findall("line")[1].attrib
        assert (
            60
            < float(bar["x1"])
            < float(root.find("circle").attrib["cx"])
            < float(bar["x2"])
            == 114.0
        )
        assert interval_bar(Interval(0.2, NAN, NAN), 0.3) == ""


class TestFigures:
    curve = Curve(
        np.arange(1.0, 6),
        np.linspace(1, 0.2, 5),
        np.linspace(0.9, 0.1, 5),
        np.linspace(1.1, 0.3, 5),
        2,
    )

    def drawings(self):
        line = figures.Line(self.curve, 0)
        yield figures.case_panel(
            {"source": {"a": 0.5, "b": 0.8}, "sgcg": {"a": 0.6, "$x_1$": 0.7}},
            (0.4, 1),
            "alt",
            "Dice",
        )
        yield figures.case_panel({"source": {}, "sgcg": {"a": NAN}}, (0.4, 1), "alt", "Dice")
        other = figures.Line(self.curve, 1, ":", False)
        yield figures.curve_panel([[line], [other]], ("a", "b"), [(0, 1), (0, 1)], "alt")
        yield figures.curve_panel(
            [[line], [other], []], ("a", "b", "c"), [(0, 1), (0, 1), (0, 2)], "alt"
        )
        yield figures.shift_panel([line], figures.log_span_of([line]), "alt")
        yield figures.shift_panel([], figures.log_span_of([]), "alt")

    def test_light_and_dark_are_the_same_drawing_in_other_colours(self):
        back = {dark: light for light, dark in figures.DARK.items()}
        assert len(back) == len(figures.DARK)
        assert not set(back) & set(figures.DARK)
        for drawing in self.drawings():
            light, dark = (
                base64.b64decode(uri.partition(",")[2]).decode()
                for uri in (drawing.light, drawing.dark)
            )
            assert ET.fromstring(light).attrib["viewBox"] == f"0 0 {drawing.width} {drawing.height}"
            assert not [colour for colour in figures.DARK if colour in dark]
            assert re.sub("|".join(back), lambda match: back[match.group()], dark) == light
            assert "<text" not in light  # glyphs as paths: no font needed

    def test_the_same_data_give_the_same_bytes(self):
        assert list(self.drawings()) == list(self.drawings())
        first, second = next(iter(self.drawings())), next(iter(self.drawings()))
        assert first.png() == second.png()

    def test_global_style_is_left_alone(self):
        before = dict(figures.mpl.rcParams)
        list(self.drawings())
        assert dict(figures.mpl.rcParams) == before

    def test_axes_hold_every_line(self):
        line = figures.Line(self.curve, 0)
        low, high = figures.span_of([line])
        assert low < 0.1
        assert high > 1.1
        assert figures.span_of([line], floor=0.1, ceiling=1.1) == (0.1, 1.1)
        assert figures.span_of([]) == pytest.approx((-0.06, 1.06))
        assert figures.log_span_of([line]) == pytest.approx((0.1 / 1.6, 1.1 * 1.6))


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
