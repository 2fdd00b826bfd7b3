"""`fedsgcg data list` and `fedsgcg data prepare NAME SOURCE -o FOLDER`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from fedsgcg.common.console import Screen, silent, steps_of
from fedsgcg.common.datasets import CATALOGUE
from fedsgcg.common.errors import Problem, fail
from fedsgcg.common.names import number_of

if TYPE_CHECKING:
    from fedsgcg.deploy.prepare.conversion import Found, Outcome
    from fedsgcg.deploy.prepare.labels import Labels

NAMES: Final = (*CATALOGUE, "manifest")
SETTINGS: Final = "data.yaml"
"""Settings of prepared own data, written once; the user edits them."""

SHOWN: Final = 12
"""Problems shown on the console; the folder's report lists all of them."""

PREPARE = """\
Convert a downloaded data set, or your own images, into the folder that data.root names. Own
images are a table, one folder a hospital, DICOM series with segmentations, folders of nnU-Net or
of the decathlon, BIDS, or images and masks whose names belong together.
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
    listing.add_argument(
        "name", metavar="NAME", nargs="?", choices=list(CATALOGUE), help=" | ".join(CATALOGUE)
    )
    listing.add_argument(
        "source",
        metavar="FOLDER",
        type=Path,
        nargs="?",
        help="downloaded or prepared folder, whose cases are counted; nothing is written",
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
        "--hospitals",
        metavar="TABLE",
        default="",
        help="own data: a CSV file with the columns case and site (optionally patient_id, split), "
        "or a pattern for the names of the cases such as '{site}_*'; without it folders say it",
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
    """Show the data sets, or one with its terms, size and source; count the cases of a folder."""
    from fedsgcg.deploy.prepare import published

    return published.run(options.name, options.source, console)


def run_prepare(options: argparse.Namespace, console: Screen) -> int:
    """Convert one data set.

    Returns:
        0 when the data set is complete, 3 when a file is missing, surplus or cannot be used.
    """
    from fedsgcg.common.images.read import VOLUME_SUFFIXES
    from fedsgcg.deploy.prepare.conversion import absent, convert, write_file
    from fedsgcg.deploy.prepare.labels import settings_text

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
    hospitals = options.hospitals
    with steps_of(console, f"searching {source}") as step:
        found, labels = find(
            name,
            source,
            options.validation,
            link=options.link,
            hospitals=hospitals,
            channel=options.channel,
            step=step,
        )
    outcome = convert(name, source, folder, found, console)
    if labels:
        labels.settle()
    settings = folder / SETTINGS
    if labels and name == "manifest" and not settings.exists():
        pictures = any(work.suffixes[0] not in ("", *VOLUME_SUFFIXES) for work in found.work)
        if text := settings_text(folder, labels, pictures=pictures):
            write_file(settings, text.encode())
        else:
            note = (
                f"no {SETTINGS}: a study needs masks with the background, 0, and a structure; "
                f"these have {labels.counts() or 'no values'}"
            )
            outcome = replace(outcome, notes=(note, *outcome.notes))
    if labels and labels.seen and name == "manifest":
        console.print(f"layout: {found.layout}")
        console.print(f"label values, and the masks that have them: {labels.counts()}")
        if absent_names := labels.absent():
            problem = Problem(
                "DAT-181",
                f"{', '.join(absent_names)} in no mask",
                "every named label in a mask",
                "Correct dataset.json or the label table, or remove the class from data.yaml.",
                str(source),
            )
            outcome = replace(outcome, problems=(*outcome.problems, problem))
    _print(name, folder, outcome, console, named=bool(labels and labels.are_named()))
    return 3 if outcome.problems else 0


def find(
    name: str,
    source: Path,
    validation: float,
    *,
    link: bool = False,
    hospitals: str = "",
    channel: str = "",
    step: Callable[[str], None] = silent,
) -> tuple[Found, Labels | None]:
    """List the cases of a data set's folder, as `own.find`; label values only of own data."""
    from fedsgcg.deploy.prepare import fundus, own, prostate

    if name in ("fundus", "prostate"):
        finder = {"fundus": fundus.find, "prostate": prostate.find}[name]
        return finder(source, validation, link=link), None
    return own.find(name, source, link=link, hospitals=hospitals, channel=channel, step=step)


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


def _print(name: str, folder: Path, outcome: Outcome, console: Screen, *, named: bool) -> None:
    from fedsgcg.deploy.prepare.conversion import REPORT

    console.print(_counts(name, outcome))
    for note in outcome.notes[:SHOWN]:
        console.print(f"note: {note}")
    if len(outcome.notes) > SHOWN:
        console.print(f"... and {number_of(len(outcome.notes) - SHOWN, 'more note')}")
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
        console.print(f"next: {'check' if named else 'name'} the classes in {settings}, then")
        console.print(f"      fedsgcg data check {shlex.quote(str(folder))}")
        if len({site for site, _ in outcome.counts}) > 1:  # of one, none can be held out
            console.print(f"      fedsgcg study data={shlex.quote(str(settings))} heldout=all")
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
    from fedsgcg.deploy.prepare.published import hospitals_table

    if data_set := CATALOGUE.get(name):
        return hospitals_table(data_set, outcome.counts)
    table = Table(title="cases")
    table.add_column("hospital")
    table.add_column("cases", justify="right")
    for (site, _), count in sorted(outcome.counts.items()):
        table.add_row(site, str(count))
    return table
