"""The page: self-contained, escaped, accessible, and made from any state of a study."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fedsgcg.common.errors import CODES, FedsgcgError
from fedsgcg.server.report.build import make_report
from fedsgcg.server.report.tables import summary_rows
from tests.support.report_cells import ROUNDS, STRUCTURES, result_rows, write_cell
from tests.support.report_study import NESTED, SITES, collect, write_study

VOID = {"meta", "img", "source", "br", "link"}
SMALL = {"sites": ("HK", "UCL"), "seeds": (0,), "cases": 4}


class Page(HTMLParser):
    """Reads a page and fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(study):
    return Page(make_report(study).read_text())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def html(study):
    return make_report(study).read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


class TestWholeStudy:
    def test_nothing_is_fetched_from_anywhere(self, html, page):
        for tag, attributes in page.tags:
            for name in ("src", "srcset", "href"):
                value = attributes.get(name)
                assert value is None or value.startswith(("data:image/", "#", "tables/")), (
                    tag,
                    name,
                )
        assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
        assert "url(" not in html
        assert "@import" not in html
        assert "default-src 'none'" in html

    def test_the_only_script_is_the_one_that_the_policy_names(self, html):
        (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert html.count("<script") == 1
        assert f"script-src 'sha256-{digest}'" in html
        assert not re.search(r"\b(fetch|XMLHttpRequest|eval|innerHTML|import)\b", script)

    def test_every_table_is_a_file_too(self, study, page):
        names = [table["data-file"] for table in page.all("table")]
        assert len(set(names)) == len(names)
        for link in page.all("a"):
            if not link["href"].startswith("#"):
                assert (study / link["href"]).is_file()
        with (study / "tables" / "cases.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2 * 4 * 12
        assert min(float(row["Dice"]) for row in rows) == 0.0  # HK's empty prediction
        assert all(row["Remark"] for row in rows if row["ASD"] == "–")
        with (study / "tables" / "results-1.csv").open(newline="") as file:
            assert [row["Method"] for row in csv.DictReader(file)] == ["source", "sgcg"]
        assert r"\toprule" in (study / "tables" / "results-1.tex").read_text()

    def test_every_case_leads_to_its_picture_and_belongs_to_its_hospital(self, page):
        places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        links = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#case-")]
        assert len(links) == 2 * 4 * 12
        assert set(links) <= places
        assert len(set(links)) == 4 * 12
        owners = {tag.get("data-hospital") for _, tag in page.tags if tag.get("data-hospital")}
        assert owners == set(SITES)

    def test_is_small_enough_to_send(self, html):
        assert len(html.encode()) < 6_000_000

    def test_the_same_files_give_the_same_page(self, study, html):
        assert make_report(study).read_text() == html

    def test_can_be_used_without_eyes(self, page):
        assert all(image["alt"] for image in page.all("img"))
        assert all(head.get("scope") for head in page.all("th"))
        assert len(page.all("table")) == len(page.all("caption"))
        assert all(svg.get("aria-hidden") or svg.get("aria-label") for svg in page.all("svg"))
        assert (
            max(
                Counter(
                    attributes["id"] for _, attributes in page.tags if "id" in attributes
                ).values()
            )
            == 1
        )
        targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        inner = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#")]
        assert set(inner) <= targets

    def test_every_figure_has_a_light_and_a_dark_version(self, page):
        assert (
            len(page.all("picture")) == len(page.all("source")) == len(page.all("img")) == 4 + 4 + 4
        )
        assert all("dark" in source["media"] for source in page.all("source"))

    def test_numbers_are_those_of_the_table(self, study, page):
        for row in summary_rows(pq.read_table(study / "results.parquet")):
            assert f"{row['dice_mean']:.3f} ± {row['dice_sd']:.3f}" in page.text
            assert f"{row['dice_low']:.3f} to {row['dice_high']:.3f}" in page.text
            assert f"{row['hd95_mean']:.2f} ± {row['hd95_sd']:.2f}" in page.text
        # HK's empty prediction with source, three seeds: four distances in the table of all
        # metrics, and the ASD in the papers' table, at HK and on average.
        assert (
            page.text.count("mean over 33 of 36")
            == page.text.count("mean over 141 of 144")
            == 4 + 1
        )
        assert "47 of 48" in page.text  # of the pairs that the claims compare

    def test_says_who_trained_and_what_was_asked(self, page):
        assert "HK held out: BIDMC, RUNMC and UCL trained" in page.text
        assert "All 24 runs ended as planned." in page.text
        assert "fedsgcg study data=made-up method=sgcg,source heldout=all" in page.text
        assert "2 h 45 min of run time over all runs" in page.text

    def test_overlays_show_every_case_of_a_hospital_with_each_method(self, page):
        labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
        assert len(labels) == len(SITES) * 12 * 2
        assert "These are the hospitals' own images" in page.text

    def test_every_figure_is_a_file_too(self, study, page):
        files = sorted(path.name for path in (study / "figures").iterdir())
        assert len(files) == 2 * (
            len(page.all("picture")) + len(SITES)
        )  # the overlays are drawn otherwise in the page
        assert "overlays-hk.png" in files
        assert "cases-hk.svg" in files
        assert "convergence-hk-held-out.png" in files
        for path in (study / "figures").iterdir():
            start = path.read_bytes()[:8]
            assert (
                start.startswith(b"<svg")
                if path.suffix == ".svg"
                else start == b"\x89PNG\r\n\x1a\n"
            )

    def test_claims_say_how_large_how_sure_and_whether_they_hold(self, page):
        # One failed case of the reference makes half of the gain, at one hospital.
        assert re.search(
            r"sgcg against source, Dice: \+0\.0\d\d \(95 % interval −0\.0\d\d to \+0\.\d\d\d; "
            r"48 cases; 3 seeds; corrected p <\s0\.001; "
            r"higher at 4 of 4 hospitals: HK \+0\.09\d, .*\); "
            r"no difference shown, because the "
            r"interval over 4 hospitals includes zero, although the test alone is significant; "
            r"a true difference below 0\.\d\d\d would often be missed\.",
            page.text,
        )
        assert "Sgcg is better: the difference holds lower at 4 of 4 hospitals" in page.text
        assert "corrected for the 2 comparisons of the table (Holm)" in page.text

    def test_what_left_is_summed_over_runs(self, page):
        # Each hospital trains in 3 folds x 3 seeds, 20 rounds of 12.74 MB.
        assert f"BIDMC 183 {9 * ROUNDS} 2.29 GB" in page.text


class TestUnfinishedStudies:
    @pytest.mark.row(69)
    def test_missing_and_interrupted_runs_are_marked(self, tmp_path):
        skip = {("sgcg", "HK", 0), ("source", "HK", 0), ("sgcg", "UCL", 0)}
        write_study(tmp_path, **SMALL, skip=skip)
        started = tmp_path / "sgcg" / "HK" / "0"
        started.mkdir(parents=True)
        (started / "events.jsonl").write_text(
            '{"event": "run.started", "time": 1.0}\n{"event": "rou'
        )
        page = page_of(tmp_path)
        assert "Not complete. 1 of 4 runs ended." in page.text
        assert "sgcg · HK held out · seed 0: interrupted" in page.text
        assert "source · HK held out · seed 0: missing" in page.text
        assert "no result" in page.text
        missing = [cell["data-label"] for cell in page.all("td") if cell.get("class") == "missing"]
        # In five metrics and again in the two of the papers' tables, sgcg has neither fold, and
        # source lacks HK. The papers' tables give the average over what is there, and say so.
        assert missing.count("HK") == 2 * (5 + 2)
        assert missing.count("UCL") == 5 + 2
        assert "1 of 2 hospitals" in page.text

    def test_results_of_cells_that_were_not_collected_yet_count(self, tmp_path):
        write_study(tmp_path, **SMALL)
        (tmp_path / "results.parquet").unlink()
        (tmp_path / "rounds.parquet").write_bytes(b"not a table")
        page = page_of(tmp_path)
        assert "0." in page.text.partition("Results")[2]
        assert "SRV-402, rounds.parquet: a file that cannot be read" in page.text
        assert "validation Dice" in " ".join(image["alt"] for image in page.all("img"))

    @pytest.mark.row(69)
    def test_a_failed_study_says_why(self, tmp_path):
        write_study(
            tmp_path, **SMALL, skip={(m, h, 0) for m in ("sgcg", "source") for h in ("HK", "UCL")}
        )
        cell = tmp_path / "source" / "HK" / "0"
        cell.mkdir(parents=True)
        problem = {"code": "RND-401", "where": "join", "found": "1 site"}
        (cell / "outcome.json").write_text(
            json.dumps({"status": "failed", "error": "RND-401", "problems": [problem]})
        )
        (cell / "journal").mkdir()
        page = page_of(tmp_path)
        assert "Failed. 0 of 4 runs ended. There is no reliable result." in page.text
        assert f"join: RND-401 {CODES['RND-401']}" in page.text
        assert "No held-out hospital has been evaluated yet." in page.text

    @pytest.mark.row(69)
    def test_a_degraded_run_counts_and_is_marked(self, tmp_path):
        write_study(tmp_path, **SMALL)
        late = [{"code": "RND-404", "where": f"round {n}, UCL"} for n in range(5)]
        write_cell(
            tmp_path,
            ("sgcg", "HK", 0),
            ("HK", "UCL"),
            STRUCTURES,
            4,
            status="degraded",
            problems=late,
        )
        page = page_of(tmp_path)
        assert "Complete, with degraded runs." in page.text
        assert (
            "round 2, UCL: RND-404 A site did not answer before the round's deadline. And 2 more."
            in page.text
        )
        assert not [cell for cell in page.all("td") if cell.get("class") == "missing"]

    @pytest.mark.parametrize(
        ("torches", "sentence"),
        [
            (("2.13.0+cpu", "2.13.0+cpu"), "here EPYC, AVX2, torch 2.13.0+cpu, 1 thread."),
            (
                ("2.13.0+cpu", "2.14.0+cpu"),
                "These runs ended on different ones, so their hashes cannot be compared: "
                "EPYC, AVX2, torch 2.13.0+cpu, 1 thread (3); "
                "EPYC, AVX2, torch 2.14.0+cpu, 1 thread (1).",
            ),
            (("2.13.0+cpu", None), "not recorded (1); EPYC, AVX2, torch 2.13.0+cpu, 1 thread (3)."),
            ((None, None), "these runs do not record theirs."),
        ],
    )
    def test_hashes_of_different_machines_are_not_to_be_compared(self, tmp_path, torches, sentence):
        write_study(tmp_path, **SMALL)
        for number, path in enumerate(sorted(tmp_path.glob("*/*/*/outcome.json"))):
            version = torches[number == 3]
            machine = {"cpu": "EPYC", "capability": "AVX2", "torch": version, "threads": 1}
            path.write_text(
                json.dumps(json.loads(path.read_text()) | ({"machine": machine} if version else {}))
            )
        assert sentence in page_of(tmp_path).text

    def test_pictures_and_ledgers_that_stay_at_the_sites_are_not_missed(self, tmp_path):
        write_study(tmp_path, **SMALL, pictures=False)
        for path in tmp_path.glob("*/*/*/sites/*/ledger.jsonl"):
            path.unlink()
        page = page_of(tmp_path)
        assert "No overlay: pictures of patients stay at their hospital" in page.text
        assert "these are the bytes that reached the coordinator" in page.text
        assert "12.8 MB" in page.text

    @pytest.mark.row(68)
    def test_names_of_cases_are_shown_only_with_a_list_that_is_given(self, tmp_path):
        write_study(tmp_path, **SMALL)
        assert "Cases are named by alias" in page_of(tmp_path).text
        with (tmp_path / "tables" / "cases.csv").open(newline="") as file:
            alias = next(csv.DictReader(file))["Case"]
        home = tmp_path / "sgcg/HK/0/sites/HK"
        (home / "aliases.csv").write_text(f"alias,case\n{alias},<b>Case07\n")
        assert "Case07" not in page_of(tmp_path).text  # a report is made to be shown
        own = tmp_path / "own.csv"
        (home / "aliases.csv").rename(own)
        page = Page(make_report(tmp_path, aliases=(own,)).read_text())
        assert "<b>Case07" in page.text
        assert str(own) in page.text
        assert "Case07" not in (tmp_path / "tables" / "cases.csv").read_text()
        own.write_text("a,b\n1,2\n")
        with pytest.raises(FedsgcgError) as refused:
            make_report(tmp_path, aliases=(own,))
        assert refused.value.code == "MON-910"

    def test_damaged_pictures_are_named_and_the_rest_is_shown(self, tmp_path):
        write_study(tmp_path, **SMALL)
        (tmp_path / "sgcg/HK/0/sites/HK/pictures.arrow").write_bytes(b"ARROW1 but no more")
        page = page_of(tmp_path)
        assert "SRV-402, sgcg/HK/0/sites/HK/pictures.arrow" in page.text
        assert "UCL ranked by the mean Dice over methods" in page.text

    def test_a_folder_with_nothing_is_refused(self, tmp_path):
        with pytest.raises(FedsgcgError) as refused:
            make_report(tmp_path)
        assert refused.value.code == "SRV-402"

    def test_a_study_that_has_not_begun_gives_a_page(self, tmp_path):
        write_study(
            tmp_path, **SMALL, skip={(m, h, 0) for m in ("sgcg", "source") for h in ("HK", "UCL")}
        )
        assert "Not complete. 0 of 4 runs ended." in page_of(tmp_path).text


class TestOtherShapes:
    @pytest.mark.row(68)
    def test_text_of_sites_cannot_become_markup(self, tmp_path):
        nasty = "<script>alert('x')<img src=x onerror=y> $\\frac{1}$"
        write_study(
            tmp_path,
            sites=(nasty, "B & C"),
            seeds=(0,),
            cases=3,
            structures={"<i>gland": ["<i>gland"]},
        )
        page = page_of(tmp_path)
        assert Counter(tag for tag, _ in page.tags)["script"] == 1
        assert "i" not in {tag for tag, _ in page.tags}
        assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
        assert nasty in " ".join(page.words)

    def test_structures_of_a_nested_data_set_have_a_table_each(self, tmp_path):
        write_study(tmp_path, **SMALL, structures=NESTED)
        page = page_of(tmp_path)
        assert page.text.index("cord: mean ±") < page.text.index("grey_matter: mean ±")
        assert "cord = white_matter + grey_matter" in page.text

    def test_one_method_is_not_compared(self, tmp_path):
        write_study(tmp_path, **SMALL, methods=("source",))
        page = page_of(tmp_path)
        assert "Differences between methods" not in page.text
        assert "best" not in [word.strip() for word in page.words]
        assert "Scatter" not in page.text

    def test_a_single_run_folder_gives_a_page(self, tmp_path):
        write_study(tmp_path, **SMALL)
        page = page_of(tmp_path / "sgcg" / "HK" / "0")
        assert "The run ended as planned." in page.text
        assert "At HK, a hospital that took no part in training, sgcg reaches" in page.text

    def test_a_study_without_a_held_out_hospital_does_not_claim_one(self, tmp_path):
        write_study(
            tmp_path, **SMALL, methods=("source",), skip={("source", "HK", 0), ("source", "UCL", 0)}
        )
        record = yaml.safe_load((tmp_path / "study.yaml").read_text()) | {"heldout": [""]}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(record))
        cell = tmp_path / "source" / "all-sites" / "0"
        cell.mkdir(parents=True)
        rows = [row | {"heldout": ""} for row in result_rows(("source", "HK", 0), STRUCTURES, 4)]
        pq.write_table(pa.Table.from_pylist(rows), cell / "results.parquet")
        collect(tmp_path)
        page = page_of(tmp_path)
        assert "No hospital was held out." in page.text
        assert "no hospital held out" in page.text
        assert not re.search(r"took no part in training, \w+ reaches", page.text)

    def test_observers_are_shown_apart(self, tmp_path):
        write_study(tmp_path, **SMALL, methods=("source",))
        path = tmp_path / "results.parquet"
        rows = pq.read_table(path).to_pylist()
        rows += [row | {"site": "watcher", "dice": 0.123} for row in rows if row["heldout"] == "HK"]
        pq.write_table(pa.Table.from_pylist(rows), path)
        page = page_of(tmp_path)
        assert "source watcher prostate 0.123 0.123 to 0.123 4" in page.text
        assert page.text.count("watcher") == 1
