"""Labels, papers' tables, claims, sweeps and federation, against hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedsgcg.deploy.study.grid import folder_name
from fedsgcg.server.report.build import make_report
from fedsgcg.server.report.differences import CaseValues, compare_everywhere, compare_on_average
from fedsgcg.server.report.figures.plots import is_logarithmic
from fedsgcg.server.report.labels import (
    Label,
    figure_groups,
    folder_of,
    label_colours,
    label_order,
    labels_of,
    main_pairs,
    read_label,
)
from fedsgcg.server.report.sections.claims import claim_sentence, federation_pairs, main_claims
from fedsgcg.server.report.sections.papers import (
    ablation_tables,
    layouts_of,
    paper_notes,
    paper_tables,
)
from fedsgcg.server.report.sections.published import published_for, published_tables
from fedsgcg.server.report.sections.sweeps import sweep_sections, sweeps_of
from fedsgcg.server.report.tables import heldout_rows, merge_models, methods_of, summary_rows
from tests.support.report_study import (
    ARMS,
    FUNDUS,
    FUNDUS_SITES,
    ROUNDS,
    collect,
    label_of,
    write_large_study,
)
from tests.unit.report.test_build import Page
from tests.unit.report.test_tables import row

NAN = float("nan")
PUBLISHED = published_tables()
LABELS = labels_of(
    {
        "method": label_of(trains, federation),
        "trains": trains,
        "federation": federation,
        "setting": "",
    }
    for trains in ARMS
    for federation in ("by_site", "pooled", "local")
)


def label_rows(name, **columns):
    return {"method": name, **columns}


class TestLabels:
    def test_columns_tell_what_a_label_is(self):
        found = read_label(
            {
                "method": "x",
                "trains": "ram_sgcg",
                "federation": "pooled",
                "setting": "prototypes.weight=0.5 a.b=c",
            }
        )
        assert found == Label(
            "x", "ram_sgcg", "pooled", (("prototypes.weight", "0.5"), ("a.b", "c"))
        )

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("sgcg", Label("sgcg", "sgcg", "by_site")),
            ("sgcg pooled", Label("sgcg pooled", "sgcg", "pooled")),
            (
                "ram_sgcg weight=0.5",
                Label("ram_sgcg weight=0.5", "ram_sgcg", "by_site", (("weight", "0.5"),)),
            ),
            ("", Label("", "", "by_site")),
        ],
    )
    def test_without_columns_the_words_of_the_label_do(self, name, expected):
        assert read_label({"method": name}) == expected
        assert (
            read_label({"method": name, "trains": None, "federation": None, "setting": None})
            == expected
        )

    def test_the_folder_of_a_label_is_the_one_that_a_study_makes(self):
        for name in ("sgcg", "sgcg pooled", "ram_sgcg weight=0.5 temperature=1", "a/b c"):
            assert folder_of(name) == folder_name(name)

    def test_order_is_that_of_the_ablation_and_numbers_go_by_size(self):
        names = [
            "ram_sgcg weight=10",
            "other",
            "sgcg",
            "ram_sgcg weight=9",
            "ram",
            "ram_sgcg",
            "source pooled",
            "source",
        ]
        assert methods_of([{"method": name} for name in names]) == [
            *(
                "source",
                "source pooled",
                "ram",
                "sgcg",
                "ram_sgcg",
                "ram_sgcg weight=9",
                "ram_sgcg weight=10",
                "other",
            ),
        ]

    @given(st.lists(st.text(alphabet="ab= 1.9", max_size=8), unique=True, max_size=6), st.randoms())
    def test_law_any_names_have_one_order(self, names, random):
        mixed = random.sample(names, len(names))
        assert sorted(mixed, key=label_order) == sorted(names, key=label_order)

    def test_each_part_is_compared_with_the_same_training_without_it(self):
        four = {name: label for name, label in LABELS.items() if label.federation == "by_site"}
        assert main_pairs(four) == [
            ("ram", "source"),
            ("sgcg", "source"),
            *(("ram_sgcg", part) for part in ("ram", "sgcg", "source")),
        ]
        assert len(main_pairs(LABELS)) == 15
        assert all(LABELS[a].federation == LABELS[b].federation for a, b in main_pairs(LABELS))

    def test_without_the_usual_reference_the_first_label_is_it(self):
        assert main_pairs(labels_of([{"method": "fedx"}, {"method": "fedy"}])) == [("fedy", "fedx")]
        assert main_pairs(labels_of([{"method": "sgcg"}])) == []
        swept = labels_of([{"method": f"sgcg weight={value}"} for value in (1, 10, 2)])
        assert main_pairs(swept) == [
            ("sgcg weight=2", "sgcg weight=1"),
            ("sgcg weight=10", "sgcg weight=1"),
        ]

    def test_a_method_has_one_colour_in_every_federation(self):
        colours = label_colours(LABELS)
        assert colours["ram_sgcg"] == colours["ram_sgcg pooled"] == colours["ram_sgcg local"] == 3
        swept = labels_of([{"method": f"sgcg weight={value}"} for value in range(9)])
        (group,) = figure_groups(swept)
        assert (len(group.labels), group.left_out) == (6, 3)
        assert len({label_colours(swept)[name] for name in group.labels}) == 6

    def test_federations_are_compared_in_both_directions_of_interest(self):
        pairs = federation_pairs(
            {name: label for name, label in LABELS.items() if label.trains == "sgcg"}
        )
        assert pairs == [
            ("sgcg", "sgcg pooled"),
            ("sgcg", "sgcg local"),
            ("sgcg pooled", "sgcg local"),
        ]
        assert federation_pairs(labels_of([{"method": "sgcg"}, {"method": "source"}])) == []

    def test_federations_of_a_study_that_sweeps_everywhere_are_compared_at_the_same_value(self):
        rows = [
            {
                "method": f"source {federation} rounds={value}",
                "federation": federation,
                "setting": f"rounds={value}",
            }
            for federation in ("by_site", "pooled")
            for value in (24, 6)
        ]
        pairs = federation_pairs(labels_of({**entry, "trains": "source"} for entry in rows))
        assert pairs == [
            (f"source by_site rounds={n}", f"source pooled rounds={n}") for n in (6, 24)
        ]
        assert federation_pairs(
            labels_of([*rows, {"method": "source"}, {"method": "source pooled"}])
        ) == [("source", "source pooled")]


class TestHospitalsThatTrainedAlone:
    rows = (
        row("sgcg local", case="a", dice=0.2, asd=4.0, trained_on="A"),
        row("sgcg local", case="a", dice=0.0, asd=NAN, trained_on="B"),
        row("sgcg local", case="a", dice=0.7, asd=1.0, seed=1, trained_on="A"),
        row("sgcg", case="a", dice=0.9, trained_on=""),
    )

    def test_their_models_are_averaged_per_case_and_seed(self):
        merged = {
            (entry["method"], entry["seed"]): entry for entry in merge_models(list(self.rows))
        }
        assert len(merged) == 3
        assert merged["sgcg local", 0]["dice"] == pytest.approx(0.1)
        assert merged["sgcg local", 0]["asd"] == 4.0  # the other model has no distance
        assert merged["sgcg", 0] is self.rows[3]

    def test_undefined_distances_of_every_model_are_counted(self):
        found = {entry["method"]: entry for entry in summary_rows(self.rows)}
        local = found["sgcg local"]
        assert local["dice_mean"] == pytest.approx((0.1 + 0.7) / 2)
        assert (local["evaluations"], local["asd_excluded"], local["cases"]) == (3, 1, 1)

    def test_they_are_one_side_of_a_pair(self):
        found = CaseValues(self.rows).difference(("sgcg", "sgcg local"), "gland", "dice")
        assert (found.cases, found.interval.mean) == (
            1,
            pytest.approx(0.8),
        )  # seed 0, which both have

    def test_merging_twice_is_merging_once(self):
        once = heldout_rows(self.rows)
        assert heldout_rows(once) == once


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


class TestPublished:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_every_row_has_every_domain_and_structure(self, name):
        table = PUBLISHED[name]
        for rows in table.rows.values():
            for entry in rows:
                assert len(entry.values) == len(table.domains)
                assert {len(domain) for domain in entry.values} == {len(table.structures)}

    def test_averages_that_do_not_follow_from_their_row_are_told(self):
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
        return next(t for t in paper_tables(layouts, labels, {}) if t["metric"] == metric)

    def test_numbers_are_per_cent_with_their_spread_over_seeds(self):
        (group,) = self.table(self.rows())["groups"]
        source = group["rows"][0]
        # Seeds differ by exactly 0.01: sd = 0.01 / sqrt(2) = 0.71 per cent.
        assert source["label"] == "source"
        assert [cell["sd"] for cell in source["cells"]] == ["± 0.71"] * 3
        noise = sum((i * 7 + 18) % 5 for i in range(12)) / 12 / 10
        assert source["cells"][0]["parts"][0]["text"] == f"{60.5 + noise:.2f}"

    def test_bold_only_where_the_lead_over_every_row_holds(self):
        bold = lambda table: [  # noqa: E731
            (row["label"], place)
            for row in table["groups"][0]["rows"]
            for place, cell in enumerate(row["cells"])
            for part in cell.get("parts", [])
            if part["bold"]
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
        sgcg = self.table(two)["groups"][0]["rows"][1]
        assert sgcg["cells"][1] == {"missing": True}
        assert sgcg["cells"][2]["notes"] == ["1 of 2 hospitals"]
        assert not sgcg["cells"][2]["parts"][0]["bold"]

    @staticmethod
    def printed(rows, name="fundus", sites=("drishti", "refuge_val")):
        published = PUBLISHED[name]
        layouts = layouts_of(
            CaseValues(rows, "pixel"), list(published.structures), sites, published
        )
        tables = paper_tables(layouts, labels_of(rows), {})
        counted = {
            table["metric"]: [
                (
                    entry["label"],
                    [[part["text"] for part in cell["parts"]] for cell in entry["cells"]],
                )
                for group in table["groups"]
                for entry in group["rows"]
                if entry["counted"]
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

    def test_a_row_as_the_papers_count_stands_where_it_changes_a_number(self):
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
        ticks = [entry["ticks"] for entry in table["groups"][0]["rows"]]
        assert ticks == [(False, False), (True, False), (False, True)]
        assert (
            ablation_tables(layouts, labels_of(row for row in rows if row["method"] != "ram"), {})
            == []
        )


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

    def test_the_label_without_the_sweep_stands_at_its_own_value(self):
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
    def test_what_does_not_have_the_setting_stands_beside_it(self, words):
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
        alt = section["panels"][0]["drawing"].alt
        assert "Dice over the hospitals’ own validation cases by weight" in alt
        assert (
            f"{first}: 0.625, {second}: 0.750; source 0.500." in alt
        )  # another federation is no baseline
        assert [line["title"] for line in section["baselines"]] == (
            ["source"] if section["numbers"] else []
        )

    def test_a_mean_distance_over_some_of_the_cases_is_marked(self):
        lost = lambda method, n: NAN if method == "sgcg weight=1" and n else 2.0  # noqa: E731
        names = ("source", "sgcg weight=1", "sgcg weight=2")
        rows = [
            row(name, case=f"c{n}", dice=0.5, asd=lost(name, n)) for name in names for n in range(4)
        ]
        labels, values = labels_of(rows), CaseValues(rows)
        (section,) = sweep_sections(sweeps_of(labels, {}), labels, values, ["gland"], {})
        assert section["note"] == (
            "If one mask is empty there is no distance; the ASD is then the mean over the other "
            "evaluations (sgcg weight=1: mean over 1 of 4)."
        )
        assert [[cell["note"] for cell in line["cells"]] for line in section["rows"]] == [
            ["", "mean over 1 of 4"],
            ["", ""],
        ]
        (claim,) = compare_on_average(values, [("sgcg weight=1", "source")], ["gland"], ["asd"])
        assert (claim.cases, claim.scored) == (1, 4)
        assert "1 of 4 cases" in claim_sentence(claim, several=False)
        (table,) = [
            t
            for t in paper_tables(layouts_of(values, ["gland"], ["HK"], None), labels, {})
            if t["metric"] == "asd"
        ]
        notes = [line["cells"][0]["notes"] for line in table["groups"][0]["rows"]]
        assert [note for note in notes if note] == []  # only the label without a sweep stands there
        assert values.left_out("sgcg weight=1", "gland", "asd", ("HK", "HK")) == (3, 4)

    def test_an_axis_is_logarithmic_when_its_values_span_decades(self):
        assert is_logarithmic([0.01, 0.1, 1])
        assert not is_logarithmic([1, 2, 3])
        assert not is_logarithmic([0, 0.1, 100])
        assert not is_logarithmic([5.0])


SMALL = {
    "sites": ("A", "B"),
    "seeds": (0,),
    "cases": 8,
    "weights": ("0.01", "1"),
    "temperatures": (),
    "memories": ("x",),
}


PLAIN = SMALL | {"weights": (), "memories": (), "arms": ("source", "ram", "sgcg")}
OLD = {
    "arms": ("ram", "sgcg", "ram_sgcg"),
    "federations": ("by_site", "pooled"),
    "memories": (),
    "cases": 3,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_large_study(tmp_path_factory.mktemp("large"), **(SMALL | {"seeds": (0, 1)}))


@pytest.fixture(scope="module")
def html(large):
    return make_report(large).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


class TestWholePage:
    def test_has_a_section_for_every_question(self, page):
        ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        assert ids >= {
            "ablation",
            "differences",
            "sweep-1",
            "sweep-2",
            "federation",
            "features",
            "overlays",
        }
        assert "Swept setting: prototypes.memory" in page.text
        assert "a ring marks the value of the runs without the sweep" in page.text
        assert "Of the 10 nearest neighbours of a pixel" in page.text

    def test_numbers_of_the_local_models_are_those_of_all_of_them(self, large, page):
        rows = [
            r
            for r in pq.read_table(large / "results.parquet").to_pylist()
            if r["method"] == "ram_sgcg local"
        ]
        by_case = {}
        for entry in rows:
            by_case.setdefault((entry["heldout"], entry["case"]), []).append(entry["dice"])
        by_site = {}
        for (site, _), values in by_case.items():
            by_site.setdefault(site, []).append(sum(values) / len(values))
        average = sum(sum(v) / len(v) for v in by_site.values()) / len(by_site)
        assert f"{100 * average:.2f}" in page.text

    def test_finds_the_gain_and_the_cost_that_were_made_up(self, page):
        assert "✓" in page.text
        claims = page.text[page.text.index("Cost of federation") :]
        assert "ram_sgcg against ram_sgcg local, Dice: +0.0" in claims
        assert "trainings are too few for a test among" in claims  # two hospitals and two seeds

    def test_says_that_the_federations_did_not_take_the_same_number_of_steps(self, page):
        claims = page.text[page.text.index("Cost of federation") :]
        assert "The same training three ways" in claims
        assert "steps per round: by_site 28, pooled 84, local 28." in claims

    def test_every_claim_that_is_made_is_in_the_tables_family(self, large):
        rows = pq.read_table(large / "results.parquet").to_pylist()
        claims = main_claims(CaseValues(rows), labels_of(rows), ["prostate"])
        assert len(claims) == 15 * 2
        assert {entry.family for entry in claims} == {30}
        assert all(math.isnan(c.test.p) or c.test.p <= c.corrected <= 1 for c in claims)

    def test_nothing_is_fetched_from_anywhere(self, page):
        for tag, attributes in page.tags:
            for name in ("src", "srcset", "href"):
                value = attributes.get(name)
                assert value is None or value.startswith(("data:image/", "#")), (tag, name)

    def test_references_of_pictures_and_links_exist(self, page):
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert {entry["href"][1:] for entry in (*page.all("use"), *page.all("a"))} <= set(ids)
        assert all(head.get("scope") for head in page.all("th"))
        assert len(page.all("table")) == len(page.all("caption"))

    def test_tables_of_an_older_version_give_the_same_sections(self, tmp_path):
        page = Page(
            make_report(
                write_large_study(tmp_path, **(SMALL | OLD), columns=False, features=False)
            ).read_text()
        )
        ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        assert ids >= {"ablation", "differences", "sweep-1", "federation"}
        assert "No t-SNE: pixel features stay at their hospital" in page.text

    def test_fundus_has_the_printed_rows_beside_ours_in_the_papers_order(self, tmp_path):
        write_large_study(
            tmp_path,
            **(
                PLAIN
                | {
                    "sites": FUNDUS_SITES,
                    "cases": 2,
                    "arms": ("ram", "ram_sgcg"),
                    "federations": ("pooled",),
                }
            ),
            structures=FUNDUS,
            name="fundus",
            features=False,
        )
        page = Page(make_report(tmp_path).read_text())
        heads = (
            "drishti domain 1 rim_one domain 2 refuge_train domain 3 refuge_val domain 4 Average"
        )
        assert heads in page.text
        assert (
            "SgCG printed 86.65 / 95.92 80.40 / 90.39 87.48 / 95.07 86.27 / 94.18 89.55"
            in page.text
        )
        assert (
            "DoFE printed 16.07 / 7.78 13.44 / 17.06 10.12 / 10.75 8.14 / 7.29 11.26 "
            "the row gives 11.33" in page.text
        )
        assert "must not be compared digit by digit" in page.text
        assert "withdrawn" in page.text

    def test_a_label_without_any_cell_and_names_of_hospitals_that_are_markup(self, tmp_path):
        nasty = "<b>x</b> $\\alpha$"
        few = PLAIN | {"sites": (nasty, "B & C"), "federations": ("by_site",), "cases": 3}
        study = write_large_study(tmp_path, **few, skip={"sgcg"}, structures={"<i>": ["<i>"]})
        page = Page(make_report(study).read_text())
        assert "Not complete." in page.text
        assert not {"i", "script"} & {tag for tag, _ in page.tags}
        assert nasty in " ".join(page.words)
        assert all(path.suffix in {".svg", ".png"} for path in (study / "figures").iterdir())

    def test_the_protocol_tells_every_value_of_what_the_methods_do_not_share(self, tmp_path):
        study = write_large_study(
            tmp_path, **(PLAIN | {"federations": ("by_site",)}), features=False
        )
        record = yaml.safe_load((study / "study.yaml").read_text())
        record["settings"]["sgcg"]["federation"]["rounds"] = 24
        record["settings"]["sgcg"]["method"] |= {"steps_per_round": 7}
        (study / "study.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
        text = Page(make_report(study).read_text()).text
        assert f"{ROUNDS} or 24 rounds, hospitals weighted by samples" in text
        assert "1 local epoch or 7 steps per round, batch size 8" in text

    def test_a_cell_of_a_hospital_that_trained_alone_is_named(self, tmp_path):
        study = write_large_study(tmp_path, **(PLAIN | {"federations": ("local",)}), features=False)
        (study / "sgcg,local" / "A" / "0-B" / "outcome.json").unlink()
        (study / "sgcg,local" / "A" / "0-B" / "events.jsonl").unlink()
        (study / "sgcg,local" / "A" / "0-B" / "results.parquet").unlink()
        collect(study)
        text = Page(make_report(study).read_text()).text
        assert "A held out: B alone trained" in text
        assert "sgcg local · A held out · seed 0 · B alone: interrupted" in text


def test_a_page_shows_the_row_as_the_papers_count_and_an_old_table_has_none(tmp_path):
    """The same study twice: with the two columns, and as an older version wrote it."""
    words = {}
    for name in ("new", "old"):
        folder = write_large_study(
            tmp_path / name,
            sites=FUNDUS_SITES,
            structures=FUNDUS,
            name="fundus",
            seeds=(0,),
            cases=3,
            federations=("by_site",),
            arms=("source", "sgcg"),
            weights=(),
            temperatures=(),
            memories=(),
            features=False,
        )
        table = pq.read_table(folder / "results.parquet")
        table = table.drop_columns(["dice_smooth1", "asd_compat"])
        if name == "new":
            lost = np.arange(len(table)) == 0
            asd, dice = (table[column].to_numpy() for column in ("asd", "dice"))
            table = table.append_column("dice_smooth1", pa.array(dice + 0.3 * lost))
            table = table.append_column("asd_compat", pa.array(np.where(lost, 100.0, asd)))
        pq.write_table(table, folder / "results.parquet")
        for path in folder.glob("*/*/*/results.parquet"):
            path.unlink()
        words[name] = Page(make_report(folder).read_text()).text
    assert (
        words["new"].count("computed as in the papers") == 3
    )  # one row each of Dice and ASD, and the note
    assert "computed as in the papers" not in words["old"]


def test_cells_of_an_older_version_join_those_of_this_one(tmp_path):
    from fedsgcg.deploy.study.record import collect as collect_study

    for seed in (0, 1):
        (tmp_path / "sgcg" / "HK" / str(seed)).mkdir(parents=True)
        cell = {"method": ["sgcg"], "seed": [seed], "dice": [0.5]} | (
            {"dice_smooth1": [0.6]} if seed else {}
        )
        pq.write_table(pa.table(cell), tmp_path / "sgcg" / "HK" / str(seed) / "results.parquet")
    collect_study(tmp_path)
    assert pq.read_table(tmp_path / "results.parquet")["dice_smooth1"].to_pylist() == [None, 0.6]
