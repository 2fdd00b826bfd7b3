"""The page in a real browser: its script runs under its own policy, and it prints on few pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib

import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.server.report.build import make_report
from fedsgcg.server.report.pdf import BROWSERS, print_pdf
from tests.support.report_study import write_study

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")
needs_browser = pytest.mark.skipif(not BROWSER, reason="no browser built on Chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"), seeds=(0,), cases=6)
    return make_report(folder)


def pages_of(pdf):
    """Number of pages: their objects may be in compressed streams."""
    parts = [pdf]
    for data in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            parts.append(zlib.decompressobj().decompress(data))
        except zlib.error:
            continue
    return sum(len(re.findall(rb"/Type\s*/Page\b", part)) for part in parts)


@needs_browser
def test_the_script_runs_and_a_link_opens_the_part_of_its_case(page, tmp_path):
    anchors = re.findall(r'class="further".*?id="(case-\d+-\d+)"', page.read_text(), re.DOTALL)
    options = ["--headless", "--disable-gpu", "--no-sandbox", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", f"{page.as_uri()}#{anchors[1]}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = done.stdout
    assert dom.count('class="sort"') > 20
    for site in ("BIDMC", "HK", "RUNMC", "UCL"):
        assert f'<option value="{site}">' in dom
    opened = re.findall(r'<details class="further"( open="")?>(.*?)</details>', dom, re.DOTALL)
    assert [bool(flag) for flag, _ in opened] == [anchors[1] in text for _, text in opened]
    assert sum(bool(flag) for flag, _ in opened) == 1


@needs_browser
def test_a_study_prints_on_at_most_ten_pages(page, tmp_path):
    pdf = print_pdf(page, tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert 2 <= pages_of(pdf) <= 10


@pytest.mark.parametrize("browser", ["/bin/false", "/nowhere/chromium"])
def test_a_browser_that_does_not_print_is_an_error(page, tmp_path, monkeypatch, browser):
    monkeypatch.setenv("BROWSER_PATH", browser)
    with pytest.raises(FedsgcgError) as refused:
        print_pdf(page, tmp_path / "report.pdf")
    assert refused.value.code == "MON-911"
    assert not (tmp_path / "report.pdf").exists()
