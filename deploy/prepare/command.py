"""`fedsgcg data list` and `fedsgcg data prepare NAME SOURCE -o FOLDER`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from fedsgcg.common.console import Screen
from fedsgcg.common.datasets import CATALOGUE, OWN_DATA
from fedsgcg.common.errors import Problem, fail
from fedsgcg.common.names import number_of

if TYPE_CHECKING:
    from fedsgcg.deploy.prepare.conversion import Outcome

NAMES: Final = (*CATALOGUE, "manifest")
SETTINGS: Final = "data.yaml"
"""Settings of prepared own data, written once; the user edits them."""

SHOWN: Final = 12
"""Problems shown on the console; the folder's report lists all of them."""

PREPARE = """\
Convert a downloaded data set, or your own images, into the folder that data.root names. Own
images are a table, one folder a hospital, folders of nnU-Net or of the decathlon, or BIDS.
Nothing is downloaded; without SOURCE the command says what to download and from where. The
same command again converts only what changed. Files that cannot be used are listed and skipped.
"""


def add_parser(commands: Any) -> Any:
    """Add `data` with `list` and `prepare` to the subparsers of `fedsgcg`; return its actions."""
    data = commands.add_parser(
        "data", help="list the data sets, or convert one into the canonical folder"
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser(
        "list", help="data sets that ship with settings: hospitals, cases, terms"
    )
    listing.set_defaults(run=run_list)
    raw = argparse.RawDescriptionHelpFormatter
    prepare = actions.add_parser(
        "prepare", help="convert a data set", description=PREPARE, formatter_class=raw
    )
    prepare.add_argument(
        "name",
        metavar="NAME",
        help=" | ".join(NAMES) + " (own data); without NAME, SOURCE is own data",
    )
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        nargs="?",
        help="downloaded folder, or a CSV file of your own data",
    )
    prepare.add_argument(
        "-o", "--output", metavar="FOLDER", type=Path, help="new folder for the canonical form"
    )
    prepare.add_argument(
        "--link",
        action="store_true",
        help="link to files that need no change instead of copying them",
    )
    prepare.add_argument(
        "--channel",
        metavar="NAME",
        default="",
        help="channel of a folder of nnU-Net, by name or number (default: the first one)",
    )
    prepare.add_argument(
        "--validation",
        metavar="SHARE",
        type=float,
        default=0.2,
        help="share of a published training part kept for source validation (default: 0.2)",
    )
    prepare.set_defaults(run=run_prepare)
    return actions


def run_list(options: argparse.Namespace, console: Screen) -> int:
    """Show the data sets."""
    del options
    table = Table(title="Data sets with settings (data=NAME); nothing is downloaded")
    for title in ("name", "what", "hospitals (published cases)", "terms"):
        table.add_column(title, no_wrap=title == "name", ratio=None if title == "name" else 1)
    for data_set in CATALOGUE.values():
        hospitals = ", ".join(
            f"{hospital.name} {hospital.train}" + (f"/{hospital.test}" if hospital.test else "")
            for hospital in data_set.hospitals
        )
        table.add_row(data_set.name, data_set.title, hospitals, data_set.terms, end_section=True)
    console.print(table)
    console.print("fedsgcg data prepare NAME      says what to download and from where")
    console.print(OWN_DATA, style="dim")
    return 0


def run_prepare(options: argparse.Namespace, console: Screen) -> int:
    """Convert one data set.

    Returns:
        0 when the data set is complete, 3 when a file is missing, surplus or cannot be used.
    """
    from fedsgcg.common.images.read import VOLUME_SUFFIXES
    from fedsgcg.deploy.prepare import fundus, own, prostate
    from fedsgcg.deploy.prepare.conversion import absent, convert, write_file

    name, source = _name_and_source(options.name, options.source)
    folder: Path | None = options.output
    if source is None:
        raise absent(name, source, "no SOURCE was given")
    if not source.exists():
        raise absent(name, source, "no such folder")
    if folder is None:
        raise fail(
            "DAT-121",
            found="no folder",
            expected="-o FOLDER",
            action="Name a new folder.",
            where="-o",
        )
    if not 0 <= options.validation < 1:
        raise fail(
            "CFG-001",
            where="--validation",
            found=f"{options.validation:g}",
            expected="a fraction in [0, 1)",
        )
    labels = None
    with console.status(f"searching {source}"):
        if name in ("fundus", "prostate"):
            finder = {"fundus": fundus.find, "prostate": prostate.find}[name]
            found = finder(source, options.validation, link=options.link)
        else:
            found, labels = own.find(name, source, link=options.link, channel=options.channel)
    outcome = convert(name, source, folder, found, console)
    advice = labels.advice() if labels and name == "manifest" else ""
    settings = folder / SETTINGS
    if labels and name == "manifest" and not outcome.kept and not settings.exists():
        pictures = any(work.suffixes[0] not in VOLUME_SUFFIXES for work in found.work)
        if text := own.settings_text(folder, labels, pictures=pictures):
            write_file(settings, text.encode())
    if labels and labels.seen and name == "manifest":
        console.print(f"layout: {found.layout}")
        console.print(f"label values, and the masks that have them: {labels.counts()}")
        if not outcome.kept and (absent_names := labels.absent()):
            problem = Problem(
                "DAT-181",
                f"{', '.join(absent_names)} in no mask",
                "every named label in a mask",
                "Correct dataset.json or the label table, or remove the class from data.yaml.",
                str(source),
            )
            outcome = replace(outcome, problems=(*outcome.problems, problem))
    _print(name, folder, outcome, advice, console)
    return 3 if outcome.problems else 0


def _name_and_source(name: str, source: Path | None) -> tuple[str, Path | None]:
    """Return the data set and its folder; a folder alone is own data."""
    if name in NAMES:
        return name, source
    if source is None and (Path(name).exists() or os.sep in name):
        return "manifest", Path(name)
    raise fail(
        "CFG-001",
        where="NAME",
        found=repr(name),
        expected=" | ".join(NAMES),
        action="Name a data set, or a folder of your own data that exists.",
    )


def _print(name: str, folder: Path, outcome: Outcome, advice: str, console: Screen) -> None:
    from fedsgcg.deploy.prepare.conversion import REPORT

    console.print(_counts(name, outcome))
    for note in [*outcome.notes[:SHOWN], advice]:
        if note:
            console.print(f"note: {note}")
    if len(outcome.notes) > SHOWN:
        console.print(f"... and {len(outcome.notes) - SHOWN} more notes")
    _print_problems(outcome.problems, console)
    data_set = CATALOGUE.get(name)
    if data_set:
        console.print(f"terms: {data_set.terms}")
    done = f"{outcome.written} converted"
    if outcome.kept:
        done += f", {outcome.kept} unchanged since the last call"
    if outcome.problems:
        done += f"; {number_of(len(outcome.problems), 'problem')}"
    state = ("incomplete", "yellow") if outcome.problems else ("complete", "green")
    console.print(Text.assemble(state, f": {done}; report: {folder / REPORT}"))
    settings = folder / SETTINGS
    if not data_set and settings.is_file():
        console.print(f"next: name the classes in {settings}, then")
        console.print(f"      fedsgcg data check {shlex.quote(str(folder))}")
        console.print(f"      fedsgcg study data={shlex.quote(str(settings))} heldout=all ...")
        return
    choice = name if data_set else "NAME"
    console.print(f"next: fedsgcg study data={choice} data.root={folder.resolve()} ...")


def _print_problems(problems: Sequence[Problem], console: Screen) -> None:
    for problem in problems[:SHOWN]:
        console.print(str(problem), style="yellow")
    if len(problems) > SHOWN:
        console.print(f"... and {len(problems) - SHOWN} more", style="yellow")


def _counts(name: str, outcome: Outcome) -> Table:
    """Return a table of each hospital's converted cases and the published numbers."""
    data_set = CATALOGUE.get(name)
    published = {hospital.name: hospital for hospital in data_set.hospitals} if data_set else {}
    caption = f"published counts: {data_set.counted}" if data_set else None
    table = Table(
        title=f"{name}: cases",
        caption=caption,
        caption_justify="left",
        min_width=64 if data_set else None,
    )
    titles = ("hospital", "known as", "cases", "published") if data_set else ("hospital", "cases")
    for title in titles:
        table.add_column(title, justify="left" if title in ("hospital", "known as") else "right")
    for site in [*published, *sorted({site for site, _ in outcome.counts} - published.keys())]:
        hospital = published.get(site)
        parts = ("train", "test") if hospital and hospital.test else ("",)
        got = "/".join(str(outcome.counts.get((site, part), 0)) for part in parts)
        if hospital is None:
            row = (site, "", got, "none") if data_set else (site, got)
            table.add_row(*row)
            continue
        wanted = "/".join(str(count) for count in (hospital.train, hospital.test)[: len(parts)])
        table.add_row(site, hospital.source, got, wanted, style="" if got == wanted else "yellow")
    return table
