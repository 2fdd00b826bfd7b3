"""The page of a large study: every section, its numbers, and studies of older versions."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fedsgcg.server.report.build import make_report
from fedsgcg.server.report.differences import CaseValues
from fedsgcg.server.report.labels import labels_of
from fedsgcg.server.report.sections.claims import main_claims
from tests.support.report_cells import ROUNDS
from tests.support.report_study import FUNDUS, FUNDUS_SITES, collect, write_large_study
from tests.unit.report.test_build import Page

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
                assert value is None or value.startswith(("data:image/", "#", "tables/")), (
                    tag,
                    name,
                )

    def test_references_of_pictures_and_links_exist(self, page):
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        links = [entry["href"] for entry in (*page.all("use"), *page.all("a"))]
        assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
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

    def test_fundus_has_the_printed_rows_and_ours_in_the_papers_order(self, tmp_path):
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
        assert "i" not in {tag for tag, _ in page.tags}
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert nasty in " ".join(page.words)
        assert all(path.suffix in {".svg", ".png"} for path in (study / "figures").iterdir())

    def test_the_protocol_lists_every_value_that_the_methods_do_not_share(self, tmp_path):
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
