"""What the person who approves code is shown, and why an approval was refused."""

import io
import sys
from pathlib import Path

import pytest

from fedsgcg.clients.guard.approval import Bundle, approve, is_approved, keep
from fedsgcg.clients.guard.site_file import write_site_file
from fedsgcg.clients.guard.software import Software
from fedsgcg.deploy.cli import site as site_cli
from fedsgcg.deploy.site.abilities import (
    DYNAMIC,
    ENVIRONMENT,
    FILES,
    NETWORK,
    PROGRAMS,
    UNREADABLE,
    abilities,
    new_abilities,
)
from fedsgcg.deploy.site.approve import installed
from tests.unit.clients.test_policy import policy_for


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "250")
    write_site_file(tmp_path / "site.yaml", policy_for(tmp_path, tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "ability"),
    [
        ("import socket", NETWORK),
        ("from urllib.request import urlopen", NETWORK),
        ("from torch import distributed", NETWORK),
        ("def f():\n    import subprocess as s", PROGRAMS),
        ("import os\nos.system('ls')", PROGRAMS),
        ("eval('1')", DYNAMIC),
        ("import pickle", DYNAMIC),
        ("import os\nos.environ['A']", ENVIRONMENT),
        ("open('x')", FILES),
        ("path.read_bytes()", FILES),
        ("def (", UNREADABLE),
    ],
)
def test_a_reviewer_is_led_to_the_places_that_matter(source, ability):
    assert list(abilities({"a.py": source.encode(), "a.yaml": b"socket"})) == [ability]


def test_only_new_abilities_are_shown_after_the_first_approval():
    before = {"a.py": b"import socket", "b.py": b""}
    now = {"a.py": b"import socket\nimport ssl", "b.py": b"import pickle"}
    assert new_abilities(before, now) == {NETWORK: {"a.py": ["ssl"]}, DYNAMIC: {"b.py": ["pickle"]}}
    assert new_abilities(now, now) == {}


def test_the_code_of_a_site_opens_no_connection_and_starts_no_program():
    """What a hospital reads at its first approval: the app itself talks to no one."""
    found = abilities(installed().code)
    assert not [name for name in found.get(NETWORK, {}) if name.startswith("clients/")]
    assert UNREADABLE not in found


@pytest.mark.attack("blind-approval")
def test_the_first_approval_shows_what_the_code_can_read_and_send(kit, capsys):
    site_cli.main(["approve", str(kit)])
    said = capsys.readouterr().out
    for text in (
        "nothing was approved before, so all are new",
        "It is the code that is installed here.",
        "clients/guard/egress.py",
        "read or write files: ",
        f"reads {kit}",
        "sends weights, statistics",
        "more lines; --diff shows all",
        "packages, ",
    ):
        assert text in said


@pytest.mark.attack("blind-approval")
def test_a_later_approval_shows_the_changed_lines_without_an_option(kit, capsys):
    path = kit / "approved.json"
    approve(Bundle({"clients/app.py": b"one\n"}), path, "test")
    keep(Bundle({"clients/app.py": b"one\nimport socket\n"}), path)
    assert site_cli.main(["approve", str(kit)]) == 1
    said = capsys.readouterr().out
    assert "+import socket" in said
    assert "open a network connection: clients/app.py (socket)" in said


@pytest.mark.parametrize(
    ("answer", "approved", "reason"),
    [
        ("y\n", True, "Approved: "),
        ("yes\n", True, "Approved: "),
        ("n\n", False, "the answer was 'n', not y"),
        ("\n", False, "the answer was 'empty', not y"),
        ("", False, "the input ended without an answer"),
    ],
)
@pytest.mark.attack("blind-approval")
def test_a_refusal_has_a_reason(kit, capsys, monkeypatch, answer, approved, reason):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert site_cli.main(["approve", str(kit)]) == (0 if approved else 1)
    assert reason in capsys.readouterr().out
    assert is_approved(installed(), kit / "approved.json") == approved


def test_changed_software_is_shown_and_approved_with_the_same_code(kit, capsys):
    path = kit / "approved.json"
    now = Software.installed()
    old = Software(now.python, now.program, now.at_start, {**now.distributions, "gone": "1 x"})
    approve(installed(), path, "test", old)
    assert site_cli.main(["approve", str(kit)]) == 1
    said = capsys.readouterr().out
    assert "removed  gone  1 x" in said
    assert "no file differs" in said
    assert site_cli.main(["approve", str(kit), "--yes"]) == 0
    assert site_cli.main(["approve", str(kit)]) == 0
    assert "Nothing is waiting for approval" in capsys.readouterr().out
