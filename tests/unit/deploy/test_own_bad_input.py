"""Own data as they come: mixed formats, torn archives, many files, folders that are read-only."""

import gzip
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedsgcg.clients.data.case_files import CaseFile, open_site, splits
from fedsgcg.common.images.read import Volume
from fedsgcg.common.settings.data import DataSettings
from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.cli.sheet import MOST, Sheet
from fedsgcg.deploy.prepare.command import find
from fedsgcg.deploy.site.check_files import examine_cases
from fedsgcg.deploy.site.findings import Finding, shortened
from tests.support.prepared import manifest, prepare
from tests.unit.deploy.test_data_check import TINY, check
from tests.unit.deploy.test_prepare_layouts import nnunet, prepared, scan, sites


def volumes(folder: Path, names: dict[str, list[str]]) -> Path:
    """Hospitals with one case for each suffix."""
    for site, suffixes in names.items():
        for number, suffix in enumerate(suffixes):
            seed = 10 * sum(site.encode()) + number
            for kind, values in (("image", None), ("mask", (1,))):
                path = folder / site / f"c{number}_{kind}"
                scan(path.with_suffix(".nii.gz"), seed, values)
                if suffix == ".hdr":
                    image = nibabel.load(path.with_suffix(".nii.gz"))
                    pair = nibabel.Nifti1Pair(np.asarray(image.dataobj), image.affine)
                    nibabel.save(pair, path.with_suffix(".img"))
                    path.with_suffix(".nii.gz").unlink()
    return folder


def test_a_hospital_with_several_formats_is_a_warning_that_counts_them(tmp_path, capsys):
    raw = volumes(
        tmp_path / "raw", {"A": [".nii.gz", ".nii.gz", ".hdr"], "B": [".nii.gz", ".nii.gz"]}
    )
    settings = tmp_path / "data.yaml"
    settings.write_text(
        f"name: own\nroot: {raw}\nclasses: {{background: [0], a: [1]}}\nstructures: {{a: [a]}}\n"
    )
    code, found, _ = check(settings, capsys)
    assert code == 3
    (one,) = found["DAT-168"]
    assert one["what"] == "A"
    assert "NIfTI 2" in one["found"]


def test_archives_that_are_half_unpacked_name_what_is_missing_and_the_rest_is_used(
    tmp_path, capsys
):
    source = nnunet(tmp_path / "A", cases=3)
    cut = source / "labelsTr" / "p0.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-40])
    (source / "imagesTr" / "p1_0000.nii.gz").write_bytes(b"")
    (source / "labelsTr.zip").write_bytes(b"PK")
    code, _, printed = prepared(source, tmp_path / "out", capsys)
    assert code == 3
    assert "labelsTr.zip" in printed
    assert "npack" in printed
    assert "A/labelsTr/p0.nii.gz" in printed
    assert "A/imagesTr/p1_0000.nii.gz" in printed
    assert sites(tmp_path / "out") == {"A": 1}


def test_labels_without_their_images_are_an_archive_that_is_half_unpacked(tmp_path, capsys):
    scan(tmp_path / "B" / "labelsTr" / "p0.nii.gz", 1, (1,))
    code, _, printed = prepared(tmp_path / "B", tmp_path / "out", capsys)
    assert (code, "DAT-183" in printed) == (2, True)
    assert "labelsTr and no image in imagesTr" in printed


def many(folder: Path, cases: int) -> Path:
    rng = np.random.default_rng(0)
    for number in range(cases):
        site = folder / "AB"[number % 2]
        site.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (96, 96), np.uint8)
        Image.fromarray(pixels).save(site / f"{number}_image.bmp")
        Image.fromarray((pixels > 250).astype(np.uint8)).save(site / f"{number}_mask.bmp")
    return folder


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    return many(tmp_path_factory.mktemp("many") / "raw", 1000)


def test_the_memory_of_a_check_does_not_grow_with_the_pixels(thousand, make_data):
    """The pixels of 130 further images and masks would need 6 MB."""
    root = thousand
    data = make_data(classes={"background": [0], "a": [1]}, structures={"a": ["a"]})
    small, large = (_peak(root, data, count) for count in (20, 150))
    assert large - small < 3e6


def _peak(root: Path, data: DataSettings, count: int) -> int:
    """Return the most memory that a check of some cases needs."""
    site = open_site(root, "A", data)
    some = replace(site, cases=site.cases[:count])
    parts = splits(some.cases, 0.2, heldout=False)
    done: list[int] = []
    tracemalloc.start()
    _, seen = examine_cases(
        some, parts, data, masks=True, progress=lambda number, _: done.append(number)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(seen), done[-1]) == (count, count)
    return peak


def test_the_sheet_draws_a_bounded_number_of_cases_evenly_chosen(make_data):
    data = make_data(classes={"background": [0], "a": [1]}, structures={"a": ["a"]})
    sheet = Sheet(data)
    pixels = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    image = Volume(pixels, np.eye(4), (1.0, 1.0, 1.0), True, True)
    for number in range(450):
        case = CaseFile("A", f"c{number}", Path("i"), Path("m"), "", None)
        sheet.add(case, image, np.zeros((1, 8, 8), np.uint8), count=450)
    page = sheet.page([], [], "own").decode()
    assert page.count("<figure") == MOST
    assert f"A, {MOST} of 450 cases" in page
    assert ">c0 <" in page
    assert any(f">c{number} <" in page for number in range(440, 450))


def test_many_findings_with_the_same_problem_are_counted():
    findings = [Finding("files", f"c{n}", "warn", "empty", "", "DAT-110") for n in range(500)]
    findings += [Finding("files", f"d{n}", "ok") for n in range(500)]
    findings += [Finding("files", "e", "fail", "damaged", "", "DAT-103")]
    kept = shortened(findings, 3)
    assert [one.name for one in kept] == ["c0", "c1", "c2", "...", "e"]
    assert kept[3].found == "497 more with this problem"
    assert (kept[3].verdict, kept[3].code) == ("warn", "DAT-110")
    assert shortened(findings[:4], 4) == findings[:4]


def test_two_thousand_files_are_prepared_by_links_with_their_number(thousand, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("manifest", thousand, "-o", out, "--link") == 0
    assert len(manifest(out)) == 1000
    assert "1000 converted" in capsys.readouterr().out


def test_a_sheet_that_cannot_be_written_is_said_before_anything_is_read(tmp_path, capsys):
    """`/proc` refuses new files for every user, as a folder that is read-only does."""
    out = tmp_path / "out"
    assert prepare("manifest", many(tmp_path / "raw", 4), "-o", out) == 0
    capsys.readouterr()
    (out / "A" / "0_image.bmp").write_bytes(b"cut")
    assert main(["data", "check", str(out), *TINY, "-o", "/proc/check.html"]) == 2
    printed = "".join(capsys.readouterr())
    assert "DAT-173" in printed
    assert "-o FILE" in printed
    assert "DAT-103" not in printed


@pytest.mark.parametrize("target", ["/proc/out", "/sys/out"])
def test_an_output_that_is_read_only_is_refused_with_another_way(target, tmp_path, capsys):
    code = prepare("manifest", many(tmp_path / "raw", 2), "-o", target)
    printed = "".join(capsys.readouterr())
    assert code == 2
    assert "DAT-126" in printed
    assert "another folder with -o" in printed


def test_a_source_that_is_read_only_is_left_as_it_is(tmp_path):
    raw = many(tmp_path / "raw", 4)
    before = {path: path.stat().st_mtime_ns for path in [raw, *raw.rglob("*")]}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert prepare("manifest", raw, "-o", tmp_path / "out") == 0
        assert {path: path.stat().st_mtime_ns for path in [raw, *raw.rglob("*")]} == before
        assert os.access(tmp_path / "out" / "A" / "0_image.bmp", os.W_OK)
    finally:
        for path in before:
            path.chmod(0o755)


def test_a_file_on_a_network_folder_that_fails_is_no_damaged_file(tmp_path, capsys):
    """The memory of a process cannot be read at 0: the error of a disk or network that fails."""
    raw = many(tmp_path / "raw", 4)
    (raw / "A" / "0_image.bmp").unlink()
    (raw / "A" / "0_image.bmp").symlink_to("/proc/self/mem")
    assert prepare("manifest", raw, "-o", tmp_path / "out") == 3
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "DAT-103" in printed
    assert "Input/output error" in printed
    assert "The disk or the network folder failed. Call again when the file can be read" in printed
    assert len(manifest(tmp_path / "out")) == 3


def test_a_link_back_is_named_and_the_rest_is_used(tmp_path, capsys):
    raw = many(tmp_path / "raw", 4)
    (raw / "C").symlink_to(raw)
    assert prepare("manifest", raw, "-o", tmp_path / "out") == 3
    printed = "".join(capsys.readouterr())
    assert "DAT-123" in printed
    assert "a folder that leads back into itself" in printed
    assert len(manifest(tmp_path / "out")) == 4


def test_an_interrupted_call_is_completed_with_the_settings_of_all_cases(tmp_path, capsys):
    """The masks of cases that are kept are not read again, and yet count."""
    raw, out = many(tmp_path / "raw", 6), tmp_path / "out"
    whole = (raw / "B" / "5_mask.bmp").read_bytes()
    (raw / "B" / "5_mask.bmp").write_bytes(b"still being copied")
    assert prepare("manifest", raw, "-o", out) == 3
    first = (out / "data.yaml").read_text()
    (out / "data.yaml").unlink()  # as if the first call had not got so far
    (raw / "B" / "5_mask.bmp").write_bytes(whole)
    capsys.readouterr()
    assert prepare("manifest", raw, "-o", out) == 0
    printed = capsys.readouterr().out
    assert "1 converted, 5 unchanged" in printed
    assert "label values, and the masks that have them: 0 in 6, 1 in 6" in printed
    assert (out / "data.yaml").read_text() == first


def test_progress_is_shown_while_a_folder_is_searched_and_read(tmp_path):
    steps: list[str] = []
    raw = many(tmp_path / "raw", 4)
    find("manifest", raw, 0.2, step=steps.append)
    assert steps == ["0 image files so far", "0 image files so far", "4 image files so far"]


def test_gzip_is_read_to_its_end(tmp_path, capsys):
    """A header that is complete does not make a file that is cut off a usable one."""
    path = tmp_path / "raw" / "A" / "c_image.nii.gz"
    scan(path, 1)
    scan(tmp_path / "raw" / "A" / "c_mask.nii.gz", 1, (1,))
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole)[: path.stat().st_size // 2])
    assert prepare("manifest", tmp_path / "raw", "-o", tmp_path / "out") == 2
    assert "DAT-103" in "".join(capsys.readouterr())
