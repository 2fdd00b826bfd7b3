"""`fedsgcg data list [NAME [FOLDER]]`: the published data sets, and if a folder is complete."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich.table import Table

from fedsgcg.common.console import Screen
from fedsgcg.common.datasets import CATALOGUE, OWN_DATA, DataSet, Hospital, fetch_advice
from fedsgcg.common.errors import Problem
from fedsgcg.common.names import number_of
from fedsgcg.deploy.prepare.command import SHOWN, find
from fedsgcg.deploy.prepare.conversion import RECORD, absent, miscounts

Counts = Mapping[tuple[str, str], int]
"""(hospital, published part) -> cases."""

PARTS: Final = ("train", "test")


def run(name: str | None, source: Path | None, console: Screen) -> int:
    """Show all data sets, or one; returns 3 if a folder does not have the published cases."""
    if name is None:
        _print_all(console)
        return 0
    data_set = CATALOGUE[name]
    if source is None:
        console.print(hospitals_table(data_set, None))
        for title, text in (("licence", data_set.terms), ("size", data_set.size)):
            console.print(f"{title}: {text}")
        console.print("from: " + ", ".join(data_set.links))
        console.print("layouts that are read:")
        for layout in data_set.layouts:
            console.print(f"  {layout}")
        console.print(fetch_advice(name))
        console.print(f"fedsgcg data list {name} FOLDER      counts the cases of a folder")
        return 0
    with console.status(f"searching {source}"):
        counts, problems = counted(name, source)
    problems = [*problems, *miscounts(name, counts)]
    console.print(hospitals_table(data_set, counts))
    for problem in problems[:SHOWN]:
        console.print(str(problem), style="yellow")
    if len(problems) > SHOWN:
        console.print(f"... and {len(problems) - SHOWN} more", style="yellow")
    total = number_of(sum(counts.values()), "case")
    if problems:
        console.print(f"{total}; {number_of(len(problems), 'problem')}", style="yellow")
        return 3
    console.print(f"{total}, as published", style="green")
    return 0


def counted(name: str, source: Path) -> tuple[Counts, list[Problem]]:
    """Return the cases of a downloaded or prepared folder, by names only, and the problems.

    Raises:
        FedsgcgError: DAT-120 if the folder does not exist or has no case of the data set.
    """
    if not source.is_dir():
        raise absent(name, source, "no such folder")
    if (source / RECORD).is_file() and (source / "manifest.csv").is_file():
        with (source / "manifest.csv").open(newline="") as file:
            rows = [(row["site"], row.get("published_split", "")) for row in csv.DictReader(file)]
        return Counter(rows), []
    found, _ = find(name, source, 0.0)
    return Counter((work.site, work.published) for work in found.work), found.problems


def hospitals_table(data_set: DataSet, counts: Counts | None) -> Table:
    """Return a table of the hospitals with the published cases and those of a folder, if any."""
    table = Table(
        title=f"{data_set.name}: {data_set.title}",
        caption=f"published counts: {data_set.counted}",
        caption_justify="left",
        min_width=64,
    )
    titles = ("hospital", "known as", *(() if counts is None else ("cases",)), "published")
    for title in titles:
        table.add_column(title, justify="left" if title in ("hospital", "known as") else "right")
    for hospital in data_set.hospitals:
        wanted = _published(hospital)
        if counts is None:
            table.add_row(hospital.name, hospital.source, wanted)
            continue
        parts = PARTS if hospital.test else ("",)
        got = "/".join(str(counts.get((hospital.name, part), 0)) for part in parts)
        style = "" if got == wanted else "yellow"
        table.add_row(hospital.name, hospital.source, got, wanted, style=style)
    known = {hospital.name for hospital in data_set.hospitals}
    for site in sorted({site for site, _ in counts or {}} - known):
        number = sum(n for (name, _), n in (counts or {}).items() if name == site)
        table.add_row(site, "", str(number), "none")
    return table


def _published(hospital: Hospital) -> str:
    return f"{hospital.train}/{hospital.test}" if hospital.test else str(hospital.train)


def _print_all(console: Screen) -> None:
    table = Table(title="Data sets with settings (data=NAME); nothing is downloaded")
    for title in ("name", "what", "hospitals (published cases)", "licence", "size", "from"):
        table.add_column(title, no_wrap=title == "name", ratio=None if title == "name" else 1)
    for data_set in CATALOGUE.values():
        hospitals = ", ".join(f"{one.name} {_published(one)}" for one in data_set.hospitals)
        table.add_row(
            data_set.name,
            data_set.title,
            hospitals,
            data_set.terms,
            data_set.size,
            "\n".join(data_set.links),
            end_section=True,
        )
    console.print(table)
    console.print("fedsgcg data list NAME         what to download, and the layouts that are read")
    console.print("fedsgcg data list NAME FOLDER  counts the cases of a folder")
    console.print(OWN_DATA, style="dim")
