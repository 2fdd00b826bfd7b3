"""Overlays and figures of the report: outlines, chosen cases, light and dark drawings."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsgcg.server.report.figures import drawing as figures
from fedsgcg.server.report.figures.files import FigureFile
from fedsgcg.server.report.figures.overlays import (
    Images,
    choose_cases,
    contour_path,
    crop_box,
    interval_bar,
    overlay,
    ranked_cases,
)
from fedsgcg.server.report.intervals import Interval
from fedsgcg.server.report.reader import Picture
from fedsgcg.server.report.rounds import Curve

NAN = float("nan")


def picture(case="a", dice=0.5, size=(20, 30), truth=None, prediction=None):
    blank = np.zeros(size, np.uint8)
    truth, prediction = (blank if mask is None else mask for mask in (truth, prediction))
    return Picture(case, dice, 3, np.full(size, 90, np.uint8), truth, prediction, ("gland",))


def points(path):
    return [
        np.array([list(map(float, p.split())) for p in part.split("L")])
        for part in re.findall(r"M([^Z]*)Z", path)
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

    def test_further_cases_by_dice(self):
        cases = [
            picture(name, dice) for name, dice in zip("abcd", (0.5, 0.9, 0.1, NAN), strict=True)
        ]
        assert ranked_cases({"sgcg": cases}, {"c"}) == [("2 of 3", "a"), ("3 of 3", "b")]

    def test_a_colour_image_keeps_its_colours(self):
        rgb = np.zeros((20, 30, 3), np.uint8)
        rgb[..., 0] = 200
        blank = np.zeros((20, 30), np.uint8)
        shown = Picture("a", 0.5, 0, rgb, blank, blank, ("disc",))
        images = Images()
        overlay(shown, crop_box([shown]), "a", images)
        (data,) = re.findall(r"base64,([^\"]+)", images.markup)
        with Image.open(io.BytesIO(base64.b64decode(data))) as jpeg:
            assert jpeg.mode == "RGB"
            red, green, _ = jpeg.getpixel((10, 10))
        assert red > 190
        assert green < 10

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

    def test_the_same_slice_is_in_the_page_once(self):
        images, box = Images(), (0, 20, 0, 30)
        texts = [str(overlay(picture(), box, name, images)) for name in ("source", "sgcg")]
        other = str(overlay(picture(size=(22, 30)), (0, 22, 0, 30), "x", images))
        assert str(images.markup).count("<image") == 2
        assert all("#slice-0" in text for text in texts)
        assert "#slice-1" in other

    def test_an_interval_bar_is_on_its_side_of_zero(self):
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
        assert FigureFile(first, "A").png() == FigureFile(second, "A").png()

    def test_a_file_has_its_title_and_300_dpi_and_the_page_stays_as_it_was(self):
        drawing = next(iter(self.drawings()))
        file = FigureFile(
            drawing, "Dice of every case · <A & B>, a hospital with a name that is long"
        )
        before = drawing.figure.get_size_inches().tolist()
        root = ET.fromstring(file.svg())
        lines = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
        assert " ".join(lines) == file.title
        assert len(lines) > 1
        assert root.attrib["viewBox"] == f"0 0 {drawing.width} {drawing.height + file.head}"
        inner = root.findall("{http://www.w3.org/2000/svg}svg")
        assert [part.attrib["width"] for part in inner] == [str(drawing.width)]
        with Image.open(io.BytesIO(file.png())) as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            assert image.size[0] == pytest.approx(drawing.width / 72 * 300, abs=1)
            assert image.size[1] == pytest.approx((drawing.height + file.head) / 72 * 300, abs=1)
        assert file.png() == file.png()
        assert drawing.figure.get_size_inches().tolist() == before

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
