"""The papers' tables: printed rows, ours beside them, and the ablation, checked by hand."""

from __future__ import annotations

import pytest

from fedsgcg.server.report.differences import CaseValues
from fedsgcg.server.report.labels import labels_of
from fedsgcg.server.report.sections.papers import (
    ablation_tables,
    layouts_of,
    paper_notes,
    paper_tables,
)
from fedsgcg.server.report.sections.published import published_for, published_tables
from fedsgcg.server.report.tables import merge_models
from tests.unit.report.test_tables import row

NAN = float("nan")
PUBLISHED = published_tables()


def metric_of(table):
    return table.title.partition(",")[0].lower()


class TestPublished:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_every_row_has_every_domain_and_structure(self, name):
        table = PUBLISHED[name]
        for rows in table.rows.values():
            for entry in rows:
                assert len(entry.values) == len(table.domains)
                assert {len(domain) for domain in entry.values} == {len(table.structures)}

    def test_averages_that_do_not_follow_from_their_row_are_marked(self):
        # Recomputed by hand from the printed rows.
        prostate = {entry.method: entry for entry in PUBLISHED["prostate"].rows["dice"]}
        assert prostate["SgCG"].recomputed == pytest.approx(88.31333, abs=1e-4)
        assert prostate["Source"].recomputed == pytest.approx(84.07, abs=0.01)
        assert {name for name, entry in prostate.items() if entry.printed_otherwise} >= {
            "SgCG",
            "Source",
            "BigAug",
        }
        fundus = {entry.method: entry for entry in PUBLISHED["fundus"].rows["asd"]}
        assert fundus["DoFE"].recomputed == pytest.approx(11.33125)
        assert [name for name, entry in fundus.items() if entry.printed_otherwise] == ["DoFE"]
        assert not any(entry.printed_otherwise for entry in PUBLISHED["fundus"].rows["dice"])

    def test_only_the_same_data_and_structures_have_printed_rows(self):
        assert published_for("fundus", ["disc", "cup"]) is PUBLISHED["fundus"]
        assert published_for("fundus_paper", ["cup", "disc"]) is PUBLISHED["fundus"]
        assert published_for("fundus", ["cup"]) is None
        assert published_for("promise12", ["prostate"]) is None
        assert published_for("prostates", ["prostate"]) is None

    def test_sites_find_their_domain_by_any_usual_name(self):
        fundus, prostate = PUBLISHED["fundus"], PUBLISHED["prostate"]
        assert [
            fundus.domain_of(site)
            for site in ("Drishti-GS", "RIM_ONE", "refuge-train", "Domain4", "refuge")
        ] == [
            *(0, 1, 2, 3),
            None,
        ]
        assert [
            prostate.domain_of(site) for site in ("RUNMC", "ISBI_1.5", "isbi", "hk", "elsewhere")
        ] == [
            0,
            1,
            0,
            5,
            None,
        ]


class TestPaperTables:
    @staticmethod
    def rows():
        found = []
        for method, gain in (("source", 0.0), ("sgcg", 0.05), ("ram", 0.0501)):
            for site in ("HK", "UCL"):
                for seed in (0, 1):
                    for i in range(12):
                        noise = 0.001 * ((i * 7 + len(method) * 3) % 5)
                        found.append(
                            row(
                                method,
                                site,
                                seed,
                                case=str(i),
                                dice=0.6 + gain + noise + 0.01 * seed,
                            )
                        )
        return found

    def table(self, rows, metric="dice", sites=("HK", "UCL")):
        labels = labels_of(rows)
        layouts = layouts_of(CaseValues(rows), ["gland"], sites, None)
        return next(t for t in paper_tables(layouts, labels, {}) if metric_of(t) == metric)

    def test_numbers_are_per_cent_with_their_spread_over_seeds(self):
        (group,) = self.table(self.rows()).groups
        source = group.rows[0]
        # Seeds differ by exactly 0.01: sd = 0.01 / sqrt(2) = 0.71 per cent.
        assert source.label == "source"
        assert [cell.sd for cell in source.cells] == ["± 0.71"] * 3
        noise = sum((i * 7 + 18) % 5 for i in range(12)) / 12 / 10
        assert source.cells[0].numbers[0].text == f"{60.5 + noise:.2f}"

    def test_bold_only_where_the_lead_over_every_row_holds(self):
        bold = lambda table: [  # noqa: E731
            (row.label, place)
            for row in table.groups[0].rows
            for place, cell in enumerate(row.cells)
            for number in (cell.numbers if cell else ())
            if number.bold
        ]
        assert bold(self.table(self.rows())) == []  # ram and sgcg cannot be told apart
        two = [entry for entry in self.rows() if entry["method"] != "ram"]
        assert (
            bold(self.table(two)) == []
        )  # two hospitals and two seeds are four trainings: p is 0.125 at least
        many = [{**entry, "seed": seed} for entry in two if entry["seed"] == 0 for seed in range(5)]
        assert bold(self.table(many)) == [
            ("sgcg", 2)
        ]  # ten trainings on average, five at each hospital
        assert bold(self.table(two, "asd")) == []

    def test_no_average_leads_that_lacks_a_hospital(self):
        two = [
            e
            for e in self.rows()
            if e["method"] != "ram" and (e["method"], e["heldout"]) != ("sgcg", "UCL")
        ]
        sgcg = self.table(two).groups[0].rows[1]
        assert sgcg.cells[1] is None
        assert sgcg.cells[2].notes == ("1 of 2 hospitals",)
        assert not sgcg.cells[2].numbers[0].bold

    @staticmethod
    def printed(rows, name="fundus", sites=("drishti", "refuge_val")):
        published = PUBLISHED[name]
        layouts = layouts_of(
            CaseValues(rows, "pixel"), list(published.structures), sites, published
        )
        tables = paper_tables(layouts, labels_of(rows), {})
        counted = {
            metric_of(table): [
                (
                    entry.label,
                    [[number.text for number in cell.numbers] for cell in entry.cells],
                )
                for group in table.groups
                for entry in group.rows
                if entry.counted
            ]
            for table in tables
        }
        return counted, paper_notes(published, tables)

    @staticmethod
    def fundus_rows(compatible=True, empties=1):
        """Two cases at two hospitals; the prediction of one cup is empty in the label `sgcg`."""
        found = []
        for method in ("source", "sgcg"):
            for site in ("drishti", "refuge_val"):
                for case in ("a", "b"):
                    for structure in ("cup", "disc"):
                        lost = empties and (method, site, case, structure) == (
                            "sgcg",
                            "drishti",
                            "a",
                            "cup",
                        )
                        own = {"dice": 0.0, "asd": NAN} if lost else {"dice": 0.8, "asd": 10.0}
                        counts = {"dice_smooth1": 0.01, "asd_compat": 100.0} if lost else {}
                        counts = {"dice_smooth1": own["dice"], "asd_compat": own["asd"]} | counts
                        more = own | (counts if compatible else {})
                        found.append(row(method, site, case=case, structure=structure, **more))
        return found

    def test_a_row_as_the_papers_count_is_shown_where_it_changes_a_number(self):
        counted, notes = self.printed(self.fundus_rows())
        # sgcg, cup at drishti: Dice (0.01 + 0.80) / 2, ASD (100 + 10) / 2; source counts the same
        # both ways: no row.
        assert counted["dice"] == [
            ("sgcg", [["40.50", "80.00"], ["80.00", "80.00"], ["60.25", "80.00"]])
        ]
        assert counted["asd"] == [
            ("sgcg", [["55.00", "10.00"], ["10.00", "10.00"], ["32.50", "10.00"]])
        ]
        assert [note for note in notes if "computed as in the papers" in note] == [
            "A row “computed as in the papers” uses Dice (2 I + 1) / (P + G + 1) with I pixels in "
            "both, P predicted and G true; a distance of 100 pixels where one mask is empty; it is "
            "shown if that changes a number."
        ]

    def test_no_row_as_the_papers_count_without_a_difference_or_without_the_columns(self):
        some_without = [
            {
                name: value
                for name, value in entry.items()
                if name not in ("dice_smooth1", "asd_compat")
            }
            if entry["case"] == "b"
            else entry
            for entry in self.fundus_rows()
        ]
        for rows in (self.fundus_rows(empties=0), self.fundus_rows(compatible=False), some_without):
            counted, notes = self.printed(rows)
            assert counted == {"dice": [], "asd": []}
            assert not any("computed as in the papers" in note for note in notes)

    def test_printed_prostate_dice_is_plain_and_gets_no_such_row(self):
        rows = [
            entry | {"structure": "prostate"}
            for entry in self.fundus_rows()
            if entry["structure"] == "cup"
        ]
        rows = [
            entry
            | {name: {"drishti": "BMC"}.get(entry[name], "HK") for name in ("site", "heldout")}
            for entry in rows
        ]
        counted, _ = self.printed(rows, "prostate", ("BMC", "HK"))
        assert counted["dice"] == []
        assert counted["asd"] == [("sgcg", [["55.00"], ["10.00"], ["32.50"]])]

    def test_models_of_single_hospitals_are_averaged_in_these_columns_too(self):
        rows = [
            row(
                "local", case="a", trained_on=site, dice=0.5, dice_smooth1=smooth, asd_compat=compat
            )
            for site, smooth, compat in (("A", 0.2, 100.0), ("B", 0.4, 3.0))
        ]
        (merged,) = merge_models(rows)
        assert merged["dice_smooth1"] == pytest.approx(0.3)
        assert merged["asd_compat"] == 51.5

    def test_ablation_needs_three_arms_and_ticks_their_parts(self):
        rows = self.rows()
        layouts = layouts_of(CaseValues(rows), ["gland"], ["HK", "UCL"], None)
        (table,) = ablation_tables(layouts, labels_of(rows), {})
        ticks = [entry.parts for entry in table.groups[0].rows]
        assert ticks == [(False, False), (True, False), (False, True)]
        assert (
            ablation_tables(layouts, labels_of(row for row in rows if row["method"] != "ram"), {})
            == []
        )
