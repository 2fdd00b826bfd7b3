"""Generated parts of the documentation are up to date, and every command in it works.

A fenced block of commands is marked `<!-- run -->` or `<!-- needs: THING -->`; one that the reader
saves as a file is marked `<!-- run: FILE -->`. Blocks to run are executed page by page, in the
order of `WALKS`, in an empty folder. All commands, including those of the README, must parse with
the real parser, and their settings must make a valid plan; those with own files or own classes are
executed instead.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from fedsgcg.clients.methods import METHODS
from fedsgcg.clients.methods.cards import parts_of
from fedsgcg.common.settings.choices import is_file, is_import_path
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.grid import split_axes, split_select

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NEEDS = (
    *("minutes", "data", "cluster", "flower", "federation"),
    *("docker", "kubernetes", "root", "grafana", "tensorboard", "mlflow"),
)
UNMARKED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/results.md")
"""Pages whose blocks show how a result was made; their commands must parse all the same."""

WALKS = {
    "first study": (
        "getting-started/first-study.md",
        "how-to/read-a-run.md",
        "reference/python.md",
        "how-to/predict.md",
    ),
    "own pictures": ("getting-started/own-pictures.md",),
    "own volumes": ("getting-started/own-volumes.md",),
    "recipes": ("how-to/published-data.md", "how-to/own-method.md", "how-to/try-a-federation.md"),
}
BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\s*)?^( *)```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: where, its mark, its language and its text."""

    page: str
    mark: str
    language: str
    text: str


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


def blocks() -> Iterator[Block]:
    for path in [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))]:
        page = path.relative_to(ROOT).as_posix()
        for mark, _, language, text in BLOCK.findall(path.read_text(encoding="utf-8")):
            yield Block(page, mark.strip(), language, text)


def commands(text: str) -> Iterator[list[str]]:
    """The programs' calls in a block of shell commands, variables of the block put in."""
    variables: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = re.fullmatch(r'\s*(\w+)="([^"]*)"', line)
        if found:
            variables[found[1]] = found[2]
        expanded = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
        if call := re.match(r"\s*(?:exec )?(?:\S*/)?(fedsgcg(?:-site)? .*)", expanded):
            yield shlex.split(call[1], comments=True)


ALL = tuple(blocks())
SHELL = [block for block in ALL if block.language == "bash" or block.text.startswith("#!")]
CALLS = {" ".join(call): (block, call) for block in SHELL for call in commands(block.text)}


def test_generated_parts_are_up_to_date() -> None:
    for path, text, wanted in GENERATOR.pages():
        if path.name == "command-line.md" and sys.version_info >= (3, 13):
            continue  # its argparse writes `-o, --output DIR` where the page has `-o DIR, --output`
        assert text == wanted, f"{path}: run python docs/generate.py"


def test_every_method_has_a_card_that_states_what_a_reader_needs() -> None:
    page = (DOCS / "reference" / "method-cards.md").read_text()
    for name, cls in METHODS.items():
        card = parts_of(cls)
        assert f"## {name}\n\n{card['Idea']}" in page
        assert "not stated" not in card.values(), f"{name}: its docstring lacks {card}"


def test_every_block_of_commands_is_run_or_says_what_it_needs() -> None:
    for block in ALL:
        if block.page in UNMARKED or block.language not in ("bash", "python"):
            continue
        kind, _, need = block.mark.partition(": ")
        known = kind.startswith("run") or (kind == "needs" and need in NEEDS)
        assert known, f"{block.page}: mark {block.mark!r} of\n{block.text}"


def test_every_page_with_something_to_run_is_in_a_walk() -> None:
    walked = {f"docs/{page}" for pages in WALKS.values() for page in pages}
    assert {block.page for block in ALL if block.mark.startswith("run")} == walked


@pytest.mark.parametrize(("block", "call"), CALLS.values(), ids=[text[:60] for text in CALLS])
def test_every_command_parses_and_its_settings_make_a_plan(block: Block, call: list[str]) -> None:
    if len(call) == 1 or call[1].startswith("-"):
        return
    page = block.page
    options = GENERATOR.parser_of(call[0]).parse_args(call[1:])
    overrides = [
        *(getattr(options, "overrides", None) or []),
        *(getattr(options, "settings", None) or []),
    ]
    if "..." in overrides:
        return
    values = [value for text in overrides for value in text.partition("=")[2].split(",")]
    own = any(is_file(value) or is_import_path(value) for value in values)
    if own or getattr(options, "config_dir", ""):
        assert block.mark == "run", f"{page}: own files and classes exist only on a followed page"
        return
    rest, selected = split_select(overrides)
    axes, rest = split_axes(rest)
    assert set(selected or []) <= set(axes), f"{page}: select={selected} varies nothing"
    last = max((len(values) for values in axes.values()), default=1)
    for number in range(last):  # every value once, not every combination
        varied = [f"{name}={values[min(number, len(values) - 1)]}" for name, values in axes.items()]
        Plan.from_tree(join([*rest, *(text for text in varied if text != "heldout=all")]))


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="zensical is part of the extra dev")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"""<(?:script|link|img|iframe)[^>]*["']https?://""", text), page


def test_commands_in_a_sentence_exist_with_their_options() -> None:
    helps = {words: parser for name in PROGRAMS for words, parser in GENERATOR.subparsers(name)}
    for path in sorted(DOCS.rglob("*.md")):
        for text in re.findall(
            r"(?<!`)`(fedsgcg(?:-site)? [a-z][^`\n]*)`", path.read_text(encoding="utf-8")
        ):
            words = text.split()
            known = [name for name in helps if words[: len(name.split())] == name.split()]
            assert known, f"{path}: {text}"
            for option in re.findall(r"(?<= )--[a-z-]+", text):
                assert option in helps[max(known, key=len)].format_help(), f"{path}: {text}"


def environment(folder: Path) -> dict[str, str]:
    """Programs of this tree, whatever is installed."""
    programs = folder / "programs"
    programs.mkdir()
    for name, target in PROGRAMS.items():
        module, _, function = target.partition(":")
        code = f"from {module} import {function}; {function}()"
        script = f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FEDSGCG_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }


@pytest.mark.slow
@pytest.mark.parametrize("pages", WALKS.values(), ids=WALKS.keys())
def test_pages_can_be_followed(pages: tuple[str, ...], tmp_path: Path) -> None:
    place, variables = tmp_path / "work", environment(tmp_path)
    place.mkdir()
    for page in pages:
        for block in ALL:
            if block.page != f"docs/{page}":
                continue
            if block.language == "yaml" and "name:" in block.text:
                (place / "project.yaml").write_text(block.text)
            if block.mark.startswith("run: "):
                (place / block.mark.removeprefix("run: ")).write_text(block.text)
            if block.mark.startswith("run"):
                how = [sys.executable, "-c"] if block.language == "python" else ["bash", "-e", "-c"]
                done = subprocess.run(
                    [*how, block.text],
                    cwd=place,
                    env=variables,
                    capture_output=True,
                    text=True,
                    timeout=280,
                )
                assert done.returncode == 0, f"{page}:\n{block.text}\n{done.stdout}\n{done.stderr}"
    for outcome in place.glob("*/*/*/*/outcome.json"):
        check_run_folder(outcome.parent)


def check_run_folder(cell: Path) -> None:
    """Every file and every figure that a run leaves behind is named in the reference."""
    import pyarrow.parquet as pq

    page = (DOCS / "reference" / "run-folder.md").read_text(encoding="utf-8")
    study = cell.parents[2]
    found = [
        path.name for place in (study, cell, *cell.glob("sites/*")) for path in place.iterdir()
    ]
    variants = {
        path.name
        for path in study.iterdir()
        if (path / "journal").is_dir() or list(path.glob("*/*/journal"))
    }
    missing = {
        name
        for name in found
        if name not in variants and not re.search(rf"`{re.escape(name)}/?", page)
    }
    assert not missing - {"sites"}
    columns = (DOCS / "reference" / "result-columns.md").read_text(encoding="utf-8")
    metrics = set(pq.read_table(cell / "rounds.parquet")["metric"].to_pylist())
    own = {"loss_smooth"}  # a term of the own method of how-to/own-method.md
    assert not {metric for metric in metrics - own if f"`{metric}`" not in columns}


def test_pages_name_no_notes_that_are_not_in_the_repository() -> None:
    for path in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(methods|stack|performance|layout|style)\.md\b", text), path
