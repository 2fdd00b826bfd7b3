"""Text of the report on the choice of settings and on mixing, and the metadata of its files."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fedsgcg.common.run_folder.tables import RESULTS_SCHEMA
from fedsgcg.deploy.study.record import collect
from fedsgcg.server.report.differences import CaseValues, compare_on_average
from fedsgcg.server.report.protocol import protocol_box
from fedsgcg.server.report.sections.results import result_tables
from fedsgcg.server.report.study_files import StudyFiles, read_study
from fedsgcg.server.report.summary import headline
from fedsgcg.server.report.tables import summary_rows
from fedsgcg.server.sites.replies import SiteEvaluation, evaluation_rows
from tests.support.report_study import write_study
from tests.unit.report.test_tables import row

SMALL = {
    "sites": ("HK", "UCL"),
    "methods": ("ram", "source"),
    "seeds": (0,),
    "cases": 3,
    "pictures": False,
}


def study_of(folder, change=None):
    """A small study whose `study.yaml` was changed."""
    write_study(folder, **SMALL)
    tree = yaml.safe_load((folder / "study.yaml").read_text())
    if change:
        change(tree)
        (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return read_study(folder)[0]


def lines(study: StudyFiles, topic: str) -> str:
    return "; ".join(dict(protocol_box(study)).get(topic, []))


def mixing(sharing, ownership="by_site"):
    def change(tree):
        for method, part in tree["settings"].items():
            part["method"] |= {"name": method, "ram": {"sharing": sharing}}
            part["federation"] |= {"ownership": ownership}

    return change


@pytest.mark.parametrize(
    ("sharing", "ownership", "said"),
    [
        ("local", "by_site", True),
        ("local", "local", True),
        ("local", "pooled", False),
        ("summary", "by_site", False),
    ],
)
def test_mixing_within_a_hospital_is_said_not_to_be_the_published_method(
    tmp_path, sharing, ownership, said
):
    words = lines(study_of(tmp_path, mixing(sharing, ownership)), "Training")
    sentence = (
        "ram: an image is mixed only with images of the same hospital (method.ram.sharing=local)"
    )
    assert (sentence in words) == said
    assert "source: an image" not in words


def test_a_protocol_says_whose_patients_chose_the_settings(tmp_path):
    words = lines(study_of(tmp_path / "plain"), "Choice of settings")
    assert "was chosen with patients of hospitals that are held out here" in words
    entry = {
        "method": "sgcg",
        "heldout": "HK",
        "seed": 0,
        "settings": "weight=1",
        "scores": {"weight=1": 0.5},
    }
    record = {"words": "chosen by the sources of each fold", "chosen": [entry]}
    nested = study_of(tmp_path / "nested", lambda tree: tree.update(selection=record))
    words = lines(nested, "Choice of settings")
    assert words.startswith("chosen by the sources of each fold")
    assert (
        "sgcg, HK held out, seed 0: weight=1 (mean Dice at the left-out source hospitals: "
        "weight=1 0.500)" in words
    )
    assert "patients of hospitals that are held out here" not in words


def test_a_best_value_says_whose_patients_chose_it():
    names = ("sgcg weight=1", "sgcg weight=2")
    rows = [
        row(name, heldout="", site="HK", case=c, dice=0.5 + 0.1 * place)
        for place, name in enumerate(names)
        for c in "ab"
    ]
    text = headline(summary_rows(rows), [], "gland")
    assert "sgcg weight=2 has the highest mean Dice of the 2 compared" in text
    assert text.endswith(
        "A setting chosen by this result is chosen with patients of all these hospitals, including "
        "any that is held out later."
    )


def test_results_keep_what_their_columns_mean_in_which_unit(tmp_path):
    pq.write_table(RESULTS_SCHEMA.empty_table(), tmp_path / "results.parquet")
    schema = pq.read_schema(tmp_path / "results.parquet")
    units = {field.name: (field.metadata or {}).get(b"unit", b"").decode() for field in schema}
    assert {units[name] for name in ("asd", "assd", "hd95", "hd95_max", "asd_compat")} == {"pixel"}
    assert {units[f"{name}_mm"] for name in ("asd", "assd", "hd95", "hd95_max")} == {"mm"}
    assert b"as in MONAI" in schema.field("hd95_max").metadata[b"description"]


def test_results_of_an_older_version_are_read_and_joined_with_new_ones(tmp_path):
    write_study(tmp_path, **SMALL)
    path = tmp_path / "source" / "HK" / "0" / "results.parquet"
    table = pq.read_table(path).drop_columns(["hd95_max", "hd95_max_mm"])
    bare = pa.schema([field.remove_metadata() for field in table.schema])
    pq.write_table(table.cast(bare), path)
    collect(tmp_path)
    rows = read_study(tmp_path)[0].results
    known = {(entry["method"], entry["heldout"]): entry["hd95_max"] for entry in rows}
    assert known["source", "HK"] is None
    assert known["ram", "HK"] > 0
    units = {
        field.name: (field.metadata or {}).get(b"unit")
        for field in pq.read_schema(tmp_path / "results.parquet")
    }
    assert units["hd95_max"] == b"pixel"


def test_a_column_that_older_results_lack_is_not_shown_as_undefined(tmp_path):
    study = study_of(tmp_path)
    old = [
        {name: value for name, value in entry.items() if "hd95_max" not in name}
        for entry in study.results
    ]
    for rows, number in ((study.results, 5), (old, 4)):
        (table,) = result_tables(summary_rows(rows), study, ["prostate"])
        assert len(table.metrics) == number
    titles = [part.title for part in table.metrics]
    assert titles == ["Dice", "ASD, pixel", "ASSD, pixel", "HD95, pixel"]


class Plan:
    heldout = "HK"


def test_a_round_s_mean_distance_counts_what_it_leaves_out():
    cases = [row(asd=math.nan, dice=0.0), row(case="b", asd=1.0), row(case="c", asd=3.0)]
    rows = evaluation_rows(Plan(), 4, [SiteEvaluation("HK", None, cases)])
    found = {entry["metric"]: entry["value"] for entry in rows}
    assert (found["heldout_asd"], found["heldout_asd_left_out"]) == (2.0, 1.0)
    rows = evaluation_rows(Plan(), 4, [SiteEvaluation("HK", None, cases[1:])])
    assert "heldout_asd_left_out" not in {entry["metric"] for entry in rows}


def test_the_headline_names_the_direction_at_every_hospital_and_gives_no_verdict_with_one_seed():
    """One seed and four hospitals, one of which makes the difference: no claim."""
    gain = {"BIDMC": 0.297, "HK": -0.006, "RUNMC": -0.036, "UCL": -0.012}
    rows = [row("source", site, case=c, dice=0.5) for site in gain for c in "abcde"]
    rows += [row("sgcg", site, case=c, dice=0.5 + gain[site]) for site in gain for c in "abcde"]
    claims = compare_on_average(CaseValues(rows), [("sgcg", "source")], ["gland"], ["dice"])
    text = headline(summary_rows(rows), claims, "gland", 4)
    assert (
        "That is +0.061 against source on the same cases (95 % interval −0.191 to +0.312; "
        "corrected p\u00a01.00; " in text
    )
    assert "higher at 1 of 4 hospitals: BIDMC +0.297, HK −0.006, UCL −0.012, RUNMC −0.036)" in text
    assert text.endswith("no verdict: with one seed a difference may be chance of training.")
