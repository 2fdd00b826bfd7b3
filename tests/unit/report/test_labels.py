"""Labels: what they tell, their order, colours and pairs, and hospitals that trained alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.server.report.differences import CaseValues
from fedsgcg.server.report.labels import (
    Label,
    figure_groups,
    label_colours,
    label_order,
    labels_of,
    main_pairs,
    read_label,
)
from fedsgcg.server.report.sections.claims import federation_pairs
from fedsgcg.server.report.tables import heldout_rows, merge_models, methods_of, summary_rows
from tests.support.report_study import ARMS, label_of
from tests.unit.report.test_tables import row

NAN = float("nan")
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


class TestLabels:
    def test_columns_define_what_a_label_is(self):
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
    def test_without_columns_the_parts_of_the_label_define_it(self, name, expected):
        assert read_label({"method": name}) == expected
        assert (
            read_label({"method": name, "trains": None, "federation": None, "setting": None})
            == expected
        )

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


def test_variants_are_compared_with_their_method_and_the_baseline_however_many_there_are():
    rows = [{"method": "source", "trains": "source"}, {"method": "sgcg", "trains": "sgcg"}]
    rows += [{"method": f"sgcg_{name}", "trains": "sgcg"} for name in "abcdefg"]
    labels = labels_of(rows)
    assert main_pairs(labels) == [
        ("sgcg", "source"),
        *((f"sgcg_{name}", part) for name in "abcdefg" for part in ("sgcg", "source")),
    ]
    assert len(set(label_colours(labels).values())) == 9
