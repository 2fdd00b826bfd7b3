"""Sweeps: which labels share a line, what stands beside them, and what is said of it."""

from __future__ import annotations

import pytest

from fedsgcg.server.report.differences import CaseValues, compare_on_average
from fedsgcg.server.report.figures.plots import is_logarithmic
from fedsgcg.server.report.labels import labels_of
from fedsgcg.server.report.sections.claims import claim_sentence
from fedsgcg.server.report.sections.papers import layouts_of, paper_tables
from fedsgcg.server.report.sections.sweeps import sweep_sections, sweeps_of
from tests.unit.report.test_tables import row

NAN = float("nan")


class TestSweeps:
    def test_only_labels_that_differ_in_nothing_else_share_a_line(self):
        rows = [
            {"method": f"{t} {s}", "trains": t, "federation": f, "setting": s}
            for t, f, s in [
                ("sgcg", "by_site", "p.weight=1"),
                ("sgcg", "by_site", "p.weight=0.01"),
                ("sgcg", "pooled", "p.weight=1"),
                ("sgcg", "by_site", "p.weight=1 p.tau=2"),
                ("sgcg", "by_site", "p.weight=5 p.tau=2"),
            ]
        ]
        (weight,) = sweeps_of(labels_of(rows), {})
        assert weight.name == "p.weight"
        assert [list(line) for line in weight.all_lines()] == [["0.01", "1"], ["1", "5"]]
        assert weight.numbers

    def test_the_label_without_the_sweep_is_at_its_own_value(self):
        labels = labels_of(
            [{"method": "sgcg"}, {"method": "sgcg weight=0.01"}, {"method": "sgcg weight=1"}]
        )
        (sweep,) = sweeps_of(
            labels, {"sgcg": {"prototypes": {"weight": 0.1}, "method": {"name": "sgcg"}}}
        )
        (line,) = sweep.all_lines()
        assert list(line) == ["0.01", "0.1", "1"]
        assert line["0.1"] == "sgcg"
        (alone,) = sweeps_of(labels, {})
        assert list(alone.all_lines()[0]) == ["0.01", "1"]

    def test_words_are_no_numbers_and_one_value_is_no_sweep(self):
        (sweep,) = sweeps_of(
            labels_of([{"method": "sgcg memory=a"}, {"method": "sgcg memory=b"}]), {}
        )
        assert not sweep.numbers
        assert sweeps_of(labels_of([{"method": "sgcg memory=a"}, {"method": "source"}]), {}) == []

    @pytest.mark.parametrize("words", ["0.1 1", "lagged restart"])
    def test_methods_without_the_setting_are_shown_as_well(self, words):
        first, second = words.split()
        dice = {
            "source": 0.5,
            "source pooled": 0.9,
            f"sgcg weight={first}": 0.625,
            f"sgcg weight={second}": 0.75,
        }
        rows = [
            row(method, case=f"c{n}", dice=value)
            for method, value in dice.items()
            for n in range(3)
        ]
        labels = labels_of(rows)
        sections = sweep_sections(
            sweeps_of(labels, {}),
            labels,
            CaseValues(rows),
            ["gland"],
            {},
            "the hospitals’ own validation cases",
        )
        (section,) = sections
        alt = section.panels[0].drawing.alt
        assert "Dice over the hospitals’ own validation cases by weight" in alt
        assert (
            f"{first}: 0.625, {second}: 0.750; source 0.500." in alt
        )  # another federation is no baseline
        assert [line.title for line in section.baselines] == (
            ["source"] if words == "0.1 1" else []
        )

    def test_a_mean_distance_over_some_of_the_cases_is_marked(self):
        lost = lambda method, n: NAN if method == "sgcg weight=1" and n else 2.0  # noqa: E731
        names = ("source", "sgcg weight=1", "sgcg weight=2")
        rows = [
            row(name, case=f"c{n}", dice=0.5, asd=lost(name, n)) for name in names for n in range(4)
        ]
        labels, values = labels_of(rows), CaseValues(rows)
        (section,) = sweep_sections(sweeps_of(labels, {}), labels, values, ["gland"], {})
        assert section.note == (
            "If one mask is empty there is no distance; the ASD is then the mean over the other "
            "evaluations (sgcg weight=1: mean over 1 of 4)."
        )
        assert [[cell.note for cell in line.cells] for line in section.rows] == [
            ["", "mean over 1 of 4"],
            ["", ""],
        ]
        (claim,) = compare_on_average(values, [("sgcg weight=1", "source")], ["gland"], ["asd"])
        assert (claim.cases, claim.scored) == (1, 4)
        assert "1 of 4 cases" in claim_sentence(claim, several=False)
        (table,) = [
            t
            for t in paper_tables(layouts_of(values, ["gland"], ["HK"], None), labels, {})
            if t.title.startswith("ASD")
        ]
        notes = [line.cells[0].notes for line in table.groups[0].rows]
        assert [note for note in notes if note] == []  # only the label without a sweep stands there
        assert values.left_out("sgcg weight=1", "gland", "asd", ("HK", "HK")) == (3, 4)

    def test_an_axis_is_logarithmic_when_its_values_span_decades(self):
        assert is_logarithmic([0.01, 0.1, 1])
        assert not is_logarithmic([1, 2, 3])
        assert not is_logarithmic([0, 0.1, 100])
        assert not is_logarithmic([5.0])
