"""How a study ended, on the console: cases left out, results, problems, and where the report is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from common.console import Screen
from common.errors import Problem

if TYPE_CHECKING:
    from deploy.study.cell import Cell

DISTANCES = ("asd", "assd", "hd95")
WIDE_CONSOLE = 100  # columns from which a table has lines
MOST_PROBLEMS = 8
STATUS = {0: "completed", 1: "failed", 3: "degraded"}


def tell_end(folder: Path, cells: Sequence[Cell], code: int, console: Screen) -> None:
    """Say how a study ended: who left cases out, the results, what went less than well, where the report is."""
    _print_left_out(cells, console)
    _print_results(folder, console)
    _print_problems(cells, console)
    style = {0: "green", 3: "yellow", 1: "red"}[code]
    console.print(Text.assemble((STATUS[code], style), f"; report: {folder / 'report.html'}"))


def _print_left_out(cells: Sequence[Cell], console: Screen) -> None:
    """Say which hospitals left cases out, by code; which files these are stands in the hospital's own folder."""
    from server.report.sections.cases import case_lines

    lines = [line for line in case_lines([cell.outcome() for cell in cells]) if "left out" in line]
    for line in lines:
        console.print(line, style="yellow")
    if lines:
        console.print(
            "Which files, and what to do: sites/<site>/problems.txt in a cell's folder.",
            style="yellow",
        )


def _print_problems(cells: Sequence[Cell], console: Screen) -> None:
    """Say what went less than well in cells that count, and how to run them again."""
    degraded = [cell for cell in cells if cell.outcome().get("status") == "degraded"]
    for cell in degraded[:MOST_PROBLEMS]:
        console.print(f"{cell.name} is degraded:", style="yellow")
        for problem in cell.outcome().get("problems", [])[:MOST_PROBLEMS]:
            console.print(f"  {Problem(**problem)}")
    if degraded:
        console.print(
            "A degraded cell counts. To run it again, remove its folder and call again.",
            style="yellow",
        )


def _print_results(folder: Path, console: Screen) -> None:
    import pyarrow.parquet as pq

    from server.report.tables import AVERAGE, summary_rows

    path = folder / "results.parquet"
    if not path.exists():
        console.print("No result yet.", style="yellow")
        return
    results = pq.read_table(path)
    rows = summary_rows(results)
    if not rows:
        console.print("No hospital had a case to judge the model by.", style="yellow")
        return
    unit = rows[0]["unit"]
    judged = "Judged at hospitals that took no part"
    if any(not row["heldout"] for row in rows):
        judged = "Nobody was held out: the training hospitals' own validation cases"
    heads = {"method": "method", "site": "hospital", "structure": "structure"}
    chosen = _chosen(results.to_pylist())
    if chosen:
        heads["chosen"] = "chosen"
        rows = [row | {"chosen": chosen.get((row["method"], row["heldout"]), "")} for row in rows]
    if len({row["structure"] for row in rows}) == 1:
        del heads["structure"]
    table = Table(title=f"{judged} (mean over cases; distances in {unit})", **_style_for(console))
    for title in heads.values():  # a long label wraps between words, and no number is cut
        table.add_column(title)
    for title in ("Dice ± sd", "95 % interval", *(name.upper() for name in DISTANCES), "cases"):
        table.add_column(title, justify="right", no_wrap=True)  # a number is not broken
    for row in rows:
        spread = (
            f"{row['dice_mean']:.3f} ± {row['dice_sd']:.3f}"
            if row["cases"] > 1
            else f"{row['dice_mean']:.3f}"
        )
        interval = (
            "–"
            if math.isnan(row["dice_low"])
            else f"{row['dice_low']:.3f} to {row['dice_high']:.3f}"
        )
        cells = [
            *(str(row[name]) for name in heads),
            spread,
            interval,
            *(_distance(row, name) for name in DISTANCES),
        ]
        end = row["site"] == AVERAGE
        table.add_row(*cells, str(row["cases"]), style="bold" if end else "", end_section=end)
    console.print(table)
    if any(row[f"{name}_excluded"] for row in rows for name in DISTANCES):
        console.print(
            "(n of N): a mean over n of N predictions; a distance is undefined where one mask is empty."
        )


def _chosen(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Return what each fold's source hospitals chose, by label and held-out hospital; several seeds may differ."""
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
    """Return a table's lines and gaps: without lines where the console is narrow."""
    narrow = console.width < WIDE_CONSOLE
    return {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False} if narrow else {}


def _distance(row: Mapping[str, Any], name: str) -> str:
    """Show a mean distance, and over how many evaluations it is where some have none."""
    mean, missing = row[f"{name}_mean"], row[f"{name}_excluded"]
    value = "–" if math.isnan(mean) else f"{mean:.2f}"
    return f"{value} ({row['evaluations'] - missing} of {row['evaluations']})" if missing else value
