"""`site.yaml`: written with explanations, read back unchanged, refused with all mistakes."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from fedsgcg.clients.guard.site_file import SiteFile, read_site_file, split_address, write_site_file
from fedsgcg.common.errors import FedsgcgError

SITE = SiteFile(
    site="North",
    project="prostate 2026",
    server="federation.example.org:8443",
    ca="ca.crt",
    key="site.key",
    data_root="/data/prostate",
    home="home",
    cache="cache",
    approved="approved.json",
)


def test_a_written_file_is_read_back_with_its_paths_absolute(tmp_path: Path) -> None:
    write_site_file(tmp_path / "site.yaml", SITE)
    found = read_site_file(tmp_path)
    assert found == replace(
        SITE,
        **{
            name: str(tmp_path / getattr(SITE, name))
            for name in ("ca", "key", "home", "cache", "approved")
        },
    )
    assert found.data_root == "/data/prostate"


def test_every_setting_is_explained_in_the_file(tmp_path: Path) -> None:
    write_site_file(tmp_path / "site.yaml", SITE)
    lines = (tmp_path / "site.yaml").read_text().splitlines()
    for field in fields(SiteFile):
        (place,) = [
            number for number, line in enumerate(lines) if line.startswith(f"{field.name}:")
        ]
        assert lines[place - 1].startswith("# ")


def test_all_faults_are_told_at_once_and_an_unfilled_folder_is_one(tmp_path: Path) -> None:
    text = "site: North\nproject: p\nserver: nowhere\nca: ca.crt\nkey: k\n"
    text += "data_root: ''\nhome: h\ncache: c\napproved: a\n"
    (tmp_path / "site.yaml").write_text(text + "patient_floor: 0\nroles: [boss]\ndevise: cpu\n")
    with pytest.raises(FedsgcgError) as caught:
        read_site_file(tmp_path)
    assert {problem.code for problem in caught.value.problems} == {"DEP-601"}
    text = str(caught.value)
    for word in (
        "server",
        "patient_floor",
        "roles",
        "did you mean 'device'",
        "data_root",
        "fill it in",
    ):
        assert word in text


@pytest.mark.parametrize("content", [None, "", "- a\n", "a: [", "\xff\xfe"])
def test_a_file_that_is_no_settings_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "site.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(FedsgcgError, match="DEP-601"):
        read_site_file(tmp_path / "site.yaml")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("method.learning_rate", True),
        ("data.image_size", True),
        ("heldout", True),
        ("data.root", False),
        ("site.device", False),
        ("output", False),
        ("unheard.of", False),
    ],
)
def test_what_is_the_sites_own_is_never_the_coordinators(name: str, allowed: bool) -> None:
    assert SITE.may_set(name) is allowed
    assert not replace(SITE, coordinator_may_set=()).may_set(name)


@pytest.mark.parametrize("name", ["data.root", "site.*", "output"])
def test_a_site_cannot_give_away_what_is_its_own(name: str) -> None:
    with pytest.raises(FedsgcgError, match="coordinator_may_set"):
        replace(SITE, coordinator_may_set=(name,))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host:8443", ("host", 8443)),
        ("[::1]:8443", ("::1", 8443)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("host", None),
        ("host:0", None),
        ("host:70000", None),
        ("https://host:1", None),
        (":1", None),
    ],
)
def test_addresses(text: str, address: tuple[str, int] | None) -> None:
    assert split_address(text) == address
