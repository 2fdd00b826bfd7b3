"""The report's tables as plain data for the page."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsgcg.server.report.format import (
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
from fedsgcg.server.report.study_files import StudyFiles
from fedsgcg.server.report.tables import (
    AVERAGE,
    METRICS,
    Row,
    best_methods,
    counted,
    distance_unit,
    value_of,
)

Section = dict[str, Any]
DENSE_ABOVE = 5  # columns above which mean and standard deviation are on two lines
MEANING = {
    "dice": "overlap, higher is better",
    "asd": "mean distance, prediction to truth, lower is better",
    "assd": "mean distance, both ways, lower is better",
    "hd95": "95th percentile of the pooled distances of both surfaces (as medpy), lower is better",
    "hd95_max": "larger of the two directed 95th percentiles (as MONAI), lower is better",
}


def result_tables(
    summary: Sequence[Summary], study: StudyFiles, structures: Sequence[str]
) -> list[Section]:
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
            {
                "structure": structure,
                "dense": len(columns) > DENSE_ABOVE,
                "columns": [
                    _column(site, [row for key, row in found.items() if key[1] == site])
                    for site in columns
                ],
                "metrics": [
                    {
                        "title": TITLES[metric] + ("" if metric == "dice" else f", {unit}"),
                        "meaning": MEANING[metric],
                        "rows": _metric_rows(metric, methods, columns, found, (seeds, len(sites))),
                    }
                    for metric in METRICS
                    if metric != "hd95_max"
                    or any(math.isfinite(row["hd95_max_mean"]) for row in found.values())
                ],
            }
        )
    return tables


def _column(site: str, rows: Sequence[Summary]) -> Section:
    if site == AVERAGE:
        return {"title": "Average", "detail": "hospitals have equal weight"}
    cases = sorted({row["cases"] for row in rows})
    return {"title": site, "detail": count_of(cases[-1], "case") if cases else "no result"}


def _metric_rows(
    metric: str,
    methods: Sequence[str],
    columns: Sequence[str],
    found: Mapping[tuple[str, str], Summary],
    wanted: tuple[int, int],
) -> list[Section]:
    best: dict[str, set[str]] = {}
    for site in columns:
        rows = [found[method, site] for method in methods if (method, site) in found]
        comparable = site != AVERAGE or all(row["hospitals"] == wanted[1] for row in rows)
        best[site] = best_methods(rows, metric) if comparable else set()
    return [
        {
            "method": method,
            "index": index,
            "cells": [
                _result_cell(found.get((method, site)), metric, method in best[site], wanted)
                for site in columns
            ],
        }
        for index, method in enumerate(methods)
    ]


def _result_cell(row: Summary | None, metric: str, best: bool, wanted: tuple[int, int]) -> Section:
    if row is None:
        return {"missing": True}
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
    return {
        "value": show(mean, places),
        "sd": f"± {show(sd, places)}" if math.isfinite(sd) else "",
        "interval": show_interval(Interval(mean, low, high), places),
        "notes": notes,
        "best": best,
    }


def case_means(rows: Sequence[Row]) -> list[Section]:
    """Every case with each method, averaged over the seeds with a value, lowest Dice first."""
    unit = distance_unit(rows)
    grouped: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["structure"], row["site"], row["method"], row["case"]].append(row)
    cases = []
    for (structure, site, method, case), part in grouped.items():
        entry: Section = {
            "structure": structure,
            "site": site,
            "method": method,
            "case": case,
            "seeds": len(part),
        }
        for metric in METRICS:
            values = [value for row in part if math.isfinite(value := value_of(row, metric, unit))]
            entry[metric] = float(np.mean(values)) if values else math.nan
            entry[f"{metric}_text"] = show(entry[metric], DECIMALS[metric])
        entry["remark"] = _remark(part)
        cases.append(entry)
    return sorted(
        cases, key=lambda e: (e["structure"], e["site"], e["dice"], e["case"], e["method"])
    )


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


def departure_rows(study: StudyFiles, reader: Reader) -> tuple[list[Section], list[str]]:
    """Return the rows on the data sent by each hospital, and the names of the parts by size."""
    found = departures(study.cells, study.rounds, reader)
    totals: dict[str, int] = defaultdict(int)
    for entry in found:
        for name, size in entry.parts.items():
            totals[name] += size
    parts = sorted(totals, key=lambda name: -totals[name])
    rows = [
        {
            "method": entry.method,
            "site": entry.site,
            "messages": entry.messages,
            "rounds": entry.rounds,
            "parts": [
                show_bytes(entry.parts[name]) if entry.parts.get(name) else "–" for name in parts
            ],
            "per_round": show_bytes(entry.total / entry.rounds) if entry.rounds else "–",
            "total": show_bytes(entry.total),
            "withheld": ", ".join(sorted(entry.withheld)) or "none",
            "source": entry.source,
        }
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


def cell_rows(study: StudyFiles) -> list[Section]:
    """One row per run for the appendix: status, time, selected round, hash of the model."""
    rows = []
    for cell in study.cells:
        protocol = cell.model.get("protocol")
        chosen = protocol.get("selected_round", "–") if isinstance(protocol, dict) else "–"
        digest = str(cell.outcome.get("digest") or cell.model.get("digest") or "–")
        rows.append(
            {"cell": cell, "time": show_seconds(cell.seconds), "round": chosen, "digest": digest}
        )
    return rows
