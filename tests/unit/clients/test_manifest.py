"""The table of cases as people and spreadsheets write it."""

import pytest

from fedsgcg.clients.data.case_files import discover_sites, open_site
from fedsgcg.clients.data.manifest import Row, read_manifest
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.prepare import own

PLAIN = "site,image,mask,patient_id\nA,x/a.png,x/b.png,P1\nB,c.png,,\n"
ROWS = [Row(2, "A", "x/a.png", "x/b.png", "P1", ""), Row(3, "B", "c.png", "", "", "")]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("x/a.png", "x/b.png", "c.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode(),
        PLAIN.replace(",", ";").encode(),
        PLAIN.replace(",", "\t").encode("utf-16"),
        PLAIN.replace("\n", "\r\n").encode("utf-8-sig"),
        PLAIN.replace("site,image,mask,patient_id", "Site, IMAGE ,Mask,Patient ID").encode(),
        PLAIN.replace("/", "\\").encode(),
        (PLAIN + ",,,\n\n,,,\n").encode(),
        PLAIN.replace("\n", ",,\n").encode(),
        PLAIN.replace("site,", "hospital,").replace(",mask", ",Segmentation").encode(),
    ],
    ids=[
        "plain",
        "semicolons",
        "tabs",
        "windows",
        "titles",
        "backslashes",
        "empty rows",
        "empty columns",
        "synonyms",
    ],
)
def test_one_table_in_every_writing_says_the_same_to_study_and_prepare(content, root, make_data):
    (root / "manifest.csv").write_bytes(content)
    assert read_manifest(root / "manifest.csv") == ROWS
    assert discover_sites(root) == ("A", "B")
    (case,) = open_site(root, "A", make_data()).cases
    assert (case.image, case.mask, case.patient) == (root / "x/a.png", root / "x/b.png", "P1")
    found, _ = own.find("manifest", root, link=False)
    assert [(work.site, work.patient) for work in found.work] == [("A", "P1"), ("B", "")]


def test_excels_own_hint_at_the_separator_is_no_row(root):
    (root / "m.csv").write_text('"sep=;"\n' + PLAIN.replace(",", ";"))
    assert [(row.line, row.site) for row in read_manifest(root / "m.csv")] == [(3, "A"), (4, "B")]


def test_a_file_whose_name_has_a_backslash_is_still_found(root):
    (root / "x\\a.png").write_bytes(b"")
    (root / "m.csv").write_text("site,image,mask\nA,x\\a.png,\nA,x\\b.png,\n")
    assert [row.image for row in read_manifest(root / "m.csv")] == ["x\\a.png", "x/b.png"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"site,image,mask\nA,M\xfcller.png,\n", "byte 0xFC in line 2 is not UTF-8"),
        (b"site,image,mask,image\nA,a,b,c\n", "two columns called image"),
        (b'site,image,mask\nA,"a.png,b\n', "line 2"),
        (b"", "none for site, image, mask"),
        (b"\n\n", "none for site, image, mask"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(content, words, tmp_path):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(FedsgcgError) as caught:
        read_manifest(tmp_path / "m.csv")
    (problem,) = caught.value.problems
    assert problem.code == "DAT-101"
    assert words in problem.found
    assert problem.action


def test_a_comma_without_quotes_is_noticed(tmp_path):
    (tmp_path / "manifest.csv").write_text("site,image,mask\nSt. Mary, London,a.png,b.png\n")
    with pytest.raises(FedsgcgError, match="more cells than titles"):
        discover_sites(tmp_path)
