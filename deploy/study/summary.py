"""Summary of a study on the console: cases left out, results, problems, and path of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import Problem
from fedsgcg.common.run_folder import paths

if TYPE_CHECKING:
    from fedsgcg.deploy.study.cell import Cell

DISTANCES = ("asd", "assd", "hd95")
WIDE_CONSOLE = 100
"""Console columns from which a table has lines."""

MOST_PROBLEMS = 8
STATUS = {0: "completed", 1: "failed", 3: "degraded"}


def print_summary(folder: Path, cells: Sequence[Cell], code: int, console: Screen) -> None:
    """Print cases left out, results, problems, status and the path of the report."""
    _print_left_out(cells, console)
    _print_results(folder, console)
    _print_problems(cells, console)
    style = {0: "green", 3: "yellow", 1: "red"}[code]
    console.print(Text.assemble((STATUS[code], style), f"; report: {folder / 'report.html'}"))


def _print_left_out(cells: Sequence[Cell], console: Screen) -> None:
    """Print which sites left cases out, by code; the files are listed in the site's own folder."""
    from fedsgcg.server.report.sections.cases import case_lines

    lines = [line for line in case_lines([cell.outcome() for cell in cells]) if "left out" in line]
    for line in lines:
        console.print(line, style="yellow")
    if lines:
        console.print(
            "The files and what to do are listed in sites/<site>/problems.txt in a cell's folder.",
            style="yellow",
        )


def _print_problems(cells: Sequence[Cell], console: Screen) -> None:
    """Print the problems of degraded cells, and how to run these cells again."""
    degraded = [cell for cell in cells if cell.outcome().get("status") == "degraded"]
    for cell in degraded[:MOST_PROBLEMS]:
        console.print(f"{cell.name} is degraded:", style="yellow")
        for problem in cell.outcome().get("problems", [])[:MOST_PROBLEMS]:
            console.print(f"  {Problem(**problem)}")
    if degraded:
        console.print(
            "A degraded cell counts as done. To run it again, remove its folder and call again.",
            style="yellow",
        )


def _print_results(folder: Path, console: Screen) -> None:
    import pyarrow.parquet as pq

    from fedsgcg.server.report.tables import AVERAGE, study_summary

    path = folder / paths.RESULTS
    if not path.exists():
        console.print("No result yet.", style="yellow")
        return
    results = pq.read_table(path)
    rounds = folder / "rounds.parquet"
    rows = study_summary(results, pq.read_table(rounds).to_pylist() if rounds.exists() else [])
    if not rows:
        console.print("No hospital had a case to evaluate the model on.", style="yellow")
        return
    unit = rows[0]["unit"]
    title = "Results at the held-out hospitals"
    if any(not row["heldout"] for row in rows):
        title = "No hospital held out: results on the training hospitals' own validation cases"
    heads = {"method": "method", "site": "hospital", "structure": "structure"}
    chosen = _chosen(results.to_pylist())
    if chosen:
        heads["chosen"] = "chosen"
        rows = [row | {"chosen": chosen.get((row["method"], row["heldout"]), "")} for row in rows]
    if len({row["structure"] for row in rows}) == 1:
        del heads["structure"]
    table = Table(title=f"{title} (mean over cases; distances in {unit})", **_style_for(console))
    for head in heads.values():  # a long label may wrap
        table.add_column(head)
    for head in ("Dice ± sd", "95 % interval", *(name.upper() for name in DISTANCES), "cases"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        dice = f"{row['dice_mean']:.3f}"
        if row["cases"] > 1:
            dice += f" ± {row['dice_sd']:.3f}"
        interval = f"{row['dice_low']:.3f} to {row['dice_high']:.3f}"
        if math.isnan(row["dice_low"]):
            interval = "–"
        cells = [
            *(str(row[name]) for name in heads),
            dice,
            interval,
            *(_distance(row, name) for name in DISTANCES),
            str(row["cases"]),
        ]
        end = row["site"] == AVERAGE
        table.add_row(*cells, style="bold" if end else "", end_section=end)
    console.print(table)
    if any(row[f"{name}_excluded"] for row in rows for name in DISTANCES):
        console.print(
            "(n of N): a mean over n of N predictions; "
            "a distance is undefined if one mask is empty."
        )


def _chosen(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Return the chosen settings by label and held-out site; several seeds may differ."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if text := row.get("chosen"):
            short = ", ".join(_short(part) for part in text.split())
            found.setdefault((row["method"], row["heldout"]), {})[short] = None
    return {key: " or ".join(values) for key, values in found.items()}


def _short(setting: str) -> str:
    name, _, value = setting.partition("=")
    return f"{name.rpartition('.')[2]}={value}"


def _style_for(console: Screen) -> dict[str, Any]:
    """Return options of a table: without lines on a narrow console."""
    if console.width >= WIDE_CONSOLE:
        return {}
    return {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}


def _distance(row: Mapping[str, Any], name: str) -> str:
    """Return a mean distance, with the number of evaluations if it is undefined for some."""
    mean, missing = row[f"{name}_mean"], row[f"{name}_excluded"]
    value = "–" if math.isnan(mean) else f"{mean:.2f}"
    if not missing:
        return value
    return f"{value} ({row['evaluations'] - missing} of {row['evaluations']})"
