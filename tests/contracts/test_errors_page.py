"""Every error code has a section in docs/reference/errors.md with its meaning and what to do."""

import re
from pathlib import Path

import pytest

from fedsgcg.common.errors import CODES

DOCS = Path(__file__).resolve().parents[2] / "docs"
SECTIONS = dict(
    re.findall(
        r"^## (\S+)\n(.*?)(?=^## |\Z)",
        (DOCS / "reference" / "errors.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)


def test_every_code_has_one_section_in_the_catalogues_order() -> None:
    headings = re.findall(
        r"^## (\S+)", (DOCS / "reference" / "errors.md").read_text(), re.MULTILINE
    )
    assert headings == list(CODES)


@pytest.mark.parametrize("code", list(CODES))
def test_a_section_repeats_the_sentence_and_says_what_to_do(code: str) -> None:
    text = " ".join(SECTIONS[code].split())
    assert text.startswith(f"**{CODES[code]}**")
    meaning, _, action = text.removeprefix(f"**{CODES[code]}**").partition(" Do: ")
    assert len(meaning.split()) >= 3
    assert len(action.split()) >= 1


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+\.md)[^)]*\)", path.read_text()):
            assert (path.parent / link).is_file(), f"{path}: {link}"
