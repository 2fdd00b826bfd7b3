"""The report's tables as plain data for the page."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsgcg.server.report.format import (
    DASH,
    DECIMALS,
    TITLES,
    Summary,
    show,
    show_bytes,
    show_interval,
    show_seconds,
)
from fedsgcg.server.report.intervals import Interval
from fedsgcg.server.report.reader import Reader
from fedsgcg.server.report.rounds import departures
from fedsgcg.server.report.sections.cases import count_of
from fedsgcg.server.report.sections.elements import AVERAGE_COLUMN, Column
from fedsgcg.server.report.study_files import Cell, StudyFiles
from fedsgcg.server.report.tables import (
    AVERAGE,
    METRICS,
    Row,
    best_methods,
    counted,
    distance_unit,
    value_of,
)

DENSE_ABOVE = 5  # columns above which mean and standard deviation are on two lines
MEANING = {
    "dice": "overlap, higher is better",
    "asd": "mean distance, prediction to truth, lower is better",
    "assd": "mean distance, both ways, lower is better",
    "hd95": "95th percentile of the pooled distances of both surfaces (as medpy), lower is better",
    "hd95_max": "larger of the two directed 95th percentiles (as MONAI), lower is better",
}


@dataclass(frozen=True)
class ResultCell:
    """Result of one method at one hospital, or on average, in one metric.

    Attributes:
        value: Mean over cases, as shown; distances in the unit of the table.
        sd: Standard deviation over cases, or over hospitals in the average, "" if unknown.
        interval: 95 % interval of the mean over cases, a dash if unknown.
        notes: What the mean leaves out.
        best: Whether it is the best mean of its column.
    """

    value: str
    sd: str
    interval: str
    notes: tuple[str, ...]
    best: bool


@dataclass(frozen=True)
class ResultRow:
    """Results of one method in one metric.

    Attributes:
        method: Label of the method.
        cells: One cell per column, None where the result is missing.
    """

    method: str
    cells: tuple[ResultCell | None, ...]


@dataclass(frozen=True)
class MetricRows:
    """Rows of one metric in a table of results.

    Attributes:
        title: Name of the metric, with the unit of distances.
        meaning: One line on the metric.
        rows: One row per method.
    """

    title: str
    meaning: str
    rows: tuple[ResultRow, ...]


@dataclass(frozen=True)
class ResultTable:
    """All results of one structure.

    Attributes:
        structure: Name of the structure.
        dense: Whether mean and standard deviation are on two lines.
        columns: Held-out hospitals, and their average if there are several.
        metrics: Rows by metric.
    """

    structure: str
    dense: bool
    columns: tuple[Column, ...]
    metrics: tuple[MetricRows, ...]


@dataclass(frozen=True)
class OtherRow:
    """Dice outside the held-out hospitals: observers, and validation cases.

    Attributes:
        method: Label of the method.
        site: The evaluated hospital.
        structure: Name of the structure.
        dice: Mean Dice over cases, with its 95 % interval.
        cases: Number of cases.
    """

    method: str
    site: str
    structure: str
    dice: Interval
    cases: int


@dataclass(frozen=True)
class CaseRow:
    """One case with one method, averaged over the seeds with a value; NaN without any.

    Attributes:
        structure: Name of the structure.
        site: The evaluated hospital.
        method: Label of the method.
        case: Alias of the case.
        seeds: Number of seeds.
        dice: Dice, 0 to 1.
        asd: Average surface distance, prediction to truth, in the unit of the results.
        assd: Average symmetric surface distance, in the unit of the results.
        hd95: 95th percentile of the surface distances, in the unit of the results.
        remark: Which masks are empty, "" for none.
        anchor: Place of its picture on the page, "" without one.
        name: Name of the case at its hospital, "" if it is not known on this machine.
    """

    structure: str
    site: str
    method: str
    case: str
    seeds: int
    dice: float
    asd: float
    assd: float
    hd95: float
    remark: str
    anchor: str = ""
    name: str = ""


@dataclass(frozen=True)
class DepartureRow:
    """The data that one hospital sent with one method, over all runs; sizes as shown.

    Attributes:
        method: Label of the method.
        site: The hospital.
        messages: Number of messages.
        rounds: Number of training rounds that it answered.
        parts: Bytes by part of the message, in the order of the columns; a dash for none.
        per_round: Bytes per training round, a dash without any.
        total: Bytes of all messages.
        withheld: Classes withheld by the privacy floors, "none" without any.
        source: `ledger` (the hospital's own record) or `coordinator` (the bytes received).
    """

    method: str
    site: str
    messages: int
    rounds: int
    parts: tuple[str, ...]
    per_round: str
    total: str
    withheld: str
    source: str


@dataclass(frozen=True)
class RunRow:
    """One run of the study.

    Attributes:
        cell: The run.
        time: Wall-clock time as shown.
        round: Selected round, a dash if unknown.
        digest: SHA-256 of the selected model, a dash if unknown.
    """

    cell: Cell
    time: str
    round: str
    digest: str


def result_tables(
    summary: Sequence[Summary], study: StudyFiles, structures: Sequence[str]
) -> list[ResultTable]:
    """One table per structure: metric x method in rows, held-out hospitals in columns."""
    methods = list(dict.fromkeys(cell.method for cell in study.cells))
    sites = sorted(
        {cell.heldout for cell in study.cells if cell.heldout}
        | {row["site"] for row in summary} - {AVERAGE}
    )
    seeds = len({cell.seed for cell in study.cells})
    tables = []
    for structure in structures:
        found = {
            (row["method"], row["site"]): row for row in summary if row["structure"] == structure
        }
        columns = [*sites, AVERAGE] if len(sites) > 1 else sites
        unit = next((row["unit"] for row in found.values()), "pixel")
        tables.append(
            ResultTable(
                structure=structure,
                dense=len(columns) > DENSE_ABOVE,
                columns=tuple(
                    _column(site, [row for key, row in found.items() if key[1] == site])
                    for site in columns
                ),
                metrics=tuple(
                    MetricRows(
                        title=TITLES[metric] + ("" if metric == "dice" else f", {unit}"),
                        meaning=MEANING[metric],
                        rows=_metric_rows(metric, methods, columns, found, (seeds, len(sites))),
                    )
                    for metric in METRICS
                    if metric != "hd95_max"
                    or any(math.isfinite(row["hd95_max_mean"]) for row in found.values())
                ),
            )
        )
    return tables


def _column(site: str, rows: Sequence[Summary]) -> Column:
    if site == AVERAGE:
        return AVERAGE_COLUMN
    cases = sorted({row["cases"] for row in rows})
    return Column(site, count_of(cases[-1], "case") if cases else "no result", site)


def _metric_rows(
    metric: str,
    methods: Sequence[str],
    columns: Sequence[str],
    found: Mapping[tuple[str, str], Summary],
    wanted: tuple[int, int],
) -> tuple[ResultRow, ...]:
    best: dict[str, set[str]] = {}
    for site in columns:
        rows = [found[method, site] for method in methods if (method, site) in found]
        comparable = site != AVERAGE or all(row["hospitals"] == wanted[1] for row in rows)
        best[site] = best_methods(rows, metric) if comparable else set()
    return tuple(
        ResultRow(
            method,
            tuple(
                _result_cell(found.get((method, site)), metric, method in best[site], wanted)
                for site in columns
            ),
        )
        for method in methods
    )


def _result_cell(
    row: Summary | None, metric: str, best: bool, wanted: tuple[int, int]
) -> ResultCell | None:
    if row is None:
        return None
    places, seeds, hospitals = DECIMALS[metric], *wanted
    mean, sd, low, high = (float(row[f"{metric}_{name}"]) for name in ("mean", "sd", "low", "high"))
    excluded = row[f"{metric}_excluded"]
    notes = [counted(excluded, row["evaluations"])] if excluded else []
    if row.get(f"{metric}_few"):
        notes.append("a few cases without a value")
    if row["site"] == AVERAGE and row["hospitals"] < hospitals:
        notes.append(f"{row['hospitals']} of {hospitals} hospitals")
    if len(row["seeds"]) < seeds:
        notes.append(f"{len(row['seeds'])} of {seeds} seeds")
    return ResultCell(
        value=show(mean, places),
        sd=f"± {show(sd, places)}" if math.isfinite(sd) else "",
        interval=show_interval(Interval(mean, low, high), places),
        notes=tuple(notes),
        best=best,
    )


def dice_rows(summary: Sequence[Summary]) -> list[OtherRow]:
    """Mean Dice of each row of a summary (`summary_rows`)."""
    return [
        OtherRow(
            method=row["method"],
            site=row["site"],
            structure=row["structure"],
            dice=Interval(row["dice_mean"], row["dice_low"], row["dice_high"]),
            cases=row["cases"],
        )
        for row in summary
    ]


def case_means(rows: Sequence[Row]) -> list[CaseRow]:
    """Every case with each method, averaged over the seeds with a value, lowest Dice first."""
    unit = distance_unit(rows)
    grouped: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["structure"], row["site"], row["method"], row["case"]].append(row)
    cases = []
    for (structure, site, method, case), part in grouped.items():
        cases.append(
            CaseRow(
                structure=structure,
                site=site,
                method=method,
                case=case,
                seeds=len(part),
                dice=_mean_of_known(part, "dice", unit),
                asd=_mean_of_known(part, "asd", unit),
                assd=_mean_of_known(part, "assd", unit),
                hd95=_mean_of_known(part, "hd95", unit),
                remark=_remark(part),
            )
        )
    return sorted(cases, key=lambda row: (row.structure, row.site, row.dice, row.case, row.method))


def _mean_of_known(rows: Sequence[Row], metric: str, unit: str) -> float:
    values = [value for row in rows if math.isfinite(value := value_of(row, metric, unit))]
    return float(np.mean(values)) if values else math.nan


def _remark(rows: Sequence[Row]) -> str:
    counts = {"both masks empty": 0, "prediction empty": 0, "truth empty": 0}
    for row in rows:
        empty = bool(row.get("empty_prediction")), bool(row.get("empty_truth"))
        name = {
            (True, True): "both masks empty",
            (True, False): "prediction empty",
            (False, True): "truth empty",
        }
        if empty in name:
            counts[name[empty]] += 1
    return ", ".join(f"{name} ({count} of {len(rows)})" for name, count in counts.items() if count)


def departure_rows(study: StudyFiles, reader: Reader) -> tuple[list[DepartureRow], list[str]]:
    """Return the rows on the data sent by each hospital, and the names of the parts by size."""
    found = departures(study.cells, study.rounds, reader)
    totals: dict[str, int] = defaultdict(int)
    for entry in found:
        for name, size in entry.parts.items():
            totals[name] += size
    parts = sorted(totals, key=lambda name: -totals[name])
    rows = [
        DepartureRow(
            method=entry.method,
            site=entry.site,
            messages=entry.messages,
            rounds=entry.rounds,
            parts=tuple(
                show_bytes(entry.parts[name]) if entry.parts.get(name) else DASH for name in parts
            ),
            per_round=show_bytes(entry.total / entry.rounds) if entry.rounds else DASH,
            total=show_bytes(entry.total),
            withheld=", ".join(sorted(entry.withheld)) or "none",
            source=entry.source,
        )
        for entry in found
    ]
    return rows, parts


def hash_note(study: StudyFiles) -> str:
    """State which model hashes can be compared: those of one machine type."""
    machines = Counter(
        _machine_of(cell.outcome) for cell in study.cells if cell.outcome.get("digest")
    )
    rule = (
        "Equal settings and seeds give equal hashes on one type of processor, build of torch and "
        "number of threads"
    )
    if not machines or set(machines) == {""}:
        return f"{rule}; these runs do not record theirs."
    if len(machines) == 1:
        return f"{rule}, here {next(iter(machines))}."
    found = "; ".join(
        f"{name or 'not recorded'} ({number})" for name, number in sorted(machines.items())
    )
    return (
        f"{rule}. These runs ended on different ones, so their hashes cannot be compared: {found}."
    )


def _machine_of(outcome: Mapping[str, Any]) -> str:
    machine = outcome.get("machine")
    if not isinstance(machine, dict):
        return ""
    threads = machine.get("threads")
    parts = [str(machine.get(name, "?")) for name in ("cpu", "capability")]
    return ", ".join(
        [
            *parts,
            f"torch {machine.get('torch', '?')}",
            f"{threads} thread{'' if threads == 1 else 's'}",
        ]
    )


def run_rows(study: StudyFiles) -> list[RunRow]:
    """One row per run for the appendix: status, time, selected round, hash of the model."""
    rows = []
    for cell in study.cells:
        protocol = cell.model.get("protocol")
        chosen = protocol.get("selected_round", DASH) if isinstance(protocol, dict) else DASH
        digest = str(cell.outcome.get("digest") or cell.model.get("digest") or DASH)
        rows.append(RunRow(cell, show_seconds(cell.seconds), str(chosen), digest))
    return rows
