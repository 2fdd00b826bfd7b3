"""Means with their intervals from rows of `results.parquet`.

A case's value is averaged over seeds, then cases are averaged within a hospital, and hospitals have
the same weight in the average. A surface distance is undefined if one mask is empty; it is then
left out of the mean and counted. If hospitals trained alone, their models are averaged per case
first (docs/explanation/protocol.md, "Scoring").

Legend: M metrics, n cases of one hospital.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.common.wire.payload import DISTANCES
from fedsgcg.server.report.intervals import (
    NAN,
    Bounds,
    Component,
    Interval,
    combined_interval,
    mean_interval,
)
from fedsgcg.server.report.labels import label_order

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]

METRICS = ("dice", *DISTANCES)
COMPARED = ("dice", "asd", "assd", "hd95")
"""Metrics whose differences are tested; `hd95_max` would test the same question as `hd95` again."""
AVERAGE = "average"
COMPATIBLE = {"dice": "dice_smooth1", "asd": "asd_compat"}
"""Columns with a metric as published code computes it, for the papers' tables only.

Files of older versions do not have them.
"""
MILLIMETRES = tuple(f"{name}_mm" for name in METRICS[1:])
STATED = frozenset(
    f"{metric}_{name}" for metric in (*METRICS, *MILLIMETRES) for name in ("mean", "sd", "count")
)
"""Metrics of a hospital's own summary of an evaluation in `rounds.parquet`."""


def bounds_of(metric: str) -> Bounds:
    """Smallest and largest value that a metric can have."""
    return (0.0, 1.0) if metric.startswith("dice") else (0.0, math.inf)


def as_rows(results: pa.Table | Iterable[Row]) -> list[Row]:
    """Return plain rows of a results table or of rows."""
    return list(results.to_pylist() if isinstance(results, pa.Table) else results)


def methods_of(rows: Iterable[Row]) -> list[str]:
    """Labels in a fixed order, the baseline `source` first (`label_order`)."""
    return sorted({str(row["method"]) for row in rows}, key=label_order)


def heldout_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of held-out hospitals, or all rows if no run held a hospital out.

    There is one row per label, seed, case and structure.
    """
    rows = list(rows)
    return merge_models([row for row in rows if _is_heldout(row)] or rows)


def merge_models(rows: list[Row]) -> list[Row]:
    """Average the models of hospitals that trained alone (`trained_on`) per case.

    A merged row, one per label and seed, contains the number of evaluations and how many of them
    are undefined for each metric.
    """
    if not any(row.get("trained_on") for row in rows):
        return rows
    grouped: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[
            tuple(row[name] for name in ("method", "heldout", "seed", "site", "case", "structure"))
        ].append(row)
    return [_merged(part) if part[0].get("trained_on") else part[0] for part in grouped.values()]


def _merged(rows: Sequence[Row]) -> Row:
    values = {
        name: [number(row, name) for row in rows]
        for name in (*METRICS, *MILLIMETRES, *COMPATIBLE.values())
    }
    known = {
        name: [value for value in column if math.isfinite(value)] for name, column in values.items()
    }
    return {
        **rows[0],
        **{name: float(np.mean(column)) if column else None for name, column in known.items()},
        "empty_prediction": any(row.get("empty_prediction") for row in rows),
        "empty_truth": any(row.get("empty_truth") for row in rows),
        "trained_on": "",
        "evaluations": len(rows),
        "undefined": {name: len(rows) - len(known[name]) for name in METRICS},
    }


def other_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows that are not in `heldout_rows`: observers, and validation cases of runs without fold.

    Where a hospital trained alone, the others only judge its model for `best_single`.
    """
    rows = list(rows)
    if not any(map(_is_heldout, rows)):
        return []
    return [row for row in rows if not _is_heldout(row) and not row.get("trained_on")]


def _is_heldout(row: Row) -> bool:
    return bool(row["heldout"]) and row["site"] == row["heldout"]


def distance_unit(rows: Iterable[Row]) -> str:
    """Return `mm` if every measured distance is known in mm, else the unit of the rows."""
    rows = list(rows)
    measured = [
        row for row in rows if any(math.isfinite(number(row, name)) for name in METRICS[1:])
    ]
    in_mm = measured and all(
        any(math.isfinite(number(row, f"{name}_mm")) for name in METRICS[1:]) for row in measured
    )
    if in_mm:
        return "mm"
    return str(rows[0].get("unit") or "pixel") if rows else "pixel"


def counted(left_out: int, evaluations: int) -> str:
    """Return "mean over 3 of 4", or "" if nothing was left out."""
    return f"mean over {evaluations - left_out} of {evaluations}" if left_out else ""


def number(row: Row, name: str) -> float:
    """Return a row's value as a float; NaN for null or absent."""
    value = row.get(name)
    return NAN if value is None else float(value)


def value_of(row: Row, metric: str, unit: str) -> float:
    """Return a metric of a row, a distance in `unit`."""
    return number(row, f"{metric}_mm" if unit == "mm" and metric in METRICS[1:] else metric)


def summary_rows(results: pa.Table | Iterable[Row]) -> list[dict[str, Any]]:
    """Summarise held-out results by method, structure and hospital, and over all hospitals.

    Returns:
        One dictionary per method, hospital and structure, and one for the average, with the keys
        method, heldout, site (both `AVERAGE` in the average), structure, unit (of the distances),
        cases, seeds (sorted list), hospitals, evaluations (cases times seeds) and both_empty
        (evaluations). For each m of `METRICS`: m_mean, m_sd, m_low and m_high (95 % interval) and
        m_excluded (evaluations without a value). The sd is over cases in a hospital's row and over
        hospitals in the average; NaN for a single one.
    """
    rows = heldout_rows(as_rows(results))
    unit = distance_unit(rows)
    cells: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        cells[row["method"], row["structure"]][row["heldout"], row["site"]].append(row)
    order = {name: position for position, name in enumerate(methods_of(rows))}
    summary = []
    for (method, structure), hospitals in sorted(
        cells.items(), key=lambda item: (item[0][1], order[item[0][0]])
    ):
        parts = {key: _case_values(part, unit) for key, part in sorted(hospitals.items())}
        for (heldout, site), values in parts.items():
            head = {
                "method": method,
                "heldout": heldout,
                "site": site,
                "structure": structure,
                "unit": unit,
            }
            summary.append(
                head | _facts(hospitals[heldout, site]) | {"hospitals": 1} | _spread([values])
            )
        if len(parts) > 1:
            head = {
                "method": method,
                "heldout": AVERAGE,
                "site": AVERAGE,
                "structure": structure,
                "unit": unit,
            }
            joined = [row for part in hospitals.values() for row in part]
            summary.append(
                head | _facts(joined) | {"hospitals": len(parts)} | _spread(list(parts.values()))
            )
    return summary


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cases": len({(row["heldout"], row["site"], row["case"]) for row in rows}),
        "seeds": sorted({int(row["seed"]) for row in rows}),
        "evaluations": sum(int(row.get("evaluations", 1)) for row in rows),
        "both_empty": sum(
            bool(row.get("empty_prediction") and row.get("empty_truth")) for row in rows
        ),
    }
    for metric in METRICS:
        facts[f"{metric}_excluded"] = sum(undefined(row, metric) for row in rows)
    return facts


def undefined(row: Row, metric: str) -> int:
    """Evaluations of a row in which a metric has no value."""
    merged = row.get("undefined")
    if merged and metric in merged:
        return int(merged[metric])
    return int(not math.isfinite(number(row, metric)))


def _case_values(rows: Sequence[Row], unit: str) -> Floats:
    """Return (n, M): every case's metrics, averaged over the seeds with a value."""
    cases: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        cases[row["case"]].append([value_of(row, metric, unit) for metric in METRICS])
    return np.stack([_nanmean(np.array(cases[name])) for name in sorted(cases)])


def _nanmean(values: Floats) -> Floats:
    """Mean of the finite values over the first axis; NaN without any."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    return np.asarray(
        np.where(count > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1), NAN)
    )


def _spread(groups: Sequence[Floats]) -> dict[str, float]:
    """Mean, sd and interval of each metric; the sd is over cases, or over several hospitals."""
    spread: dict[str, float] = {}
    for column, metric in enumerate(METRICS):
        values = [group[:, column][np.isfinite(group[:, column])] for group in groups]
        interval = mean_interval(values, bounds=bounds_of(metric))
        single = values[0]
        if len(values) > 1:
            single = np.array([group.mean() for group in values if group.size])
        spread |= {
            f"{metric}_mean": interval.mean,
            f"{metric}_sd": float(np.std(single, ddof=1)) if single.size > 1 else NAN,
            f"{metric}_low": interval.low,
            f"{metric}_high": interval.high,
        }
    return spread


def stated_summaries(rounds: Iterable[Row], unit: str, phase: str) -> list[dict[str, Any]]:
    """Summaries of hospitals that send no per-case results, in the form of `summary_rows`.

    Args:
        rounds: Rows of `rounds.parquet`; means, standard deviations and counts of an evaluation
            are those with a structure as class.
        unit: Unit of the distances.
        phase: `heldout`, `observer` or `validation`.

    Returns:
        Means and standard deviations are averaged over seeds. The interval is Student's, because
        the skewness of the cases is not known. `m_few` is set for a metric that fewer cases than
        the hospital's floor lack.
    """
    found: dict[tuple[str, ...], dict[int, dict[str, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rounds:
        if row["phase"] == phase and row["cls"] and row["metric"] in STATED:
            key = (row["method"], row["heldout"], row["site"], row["cls"])
            found[key][int(row["seed"])][row["metric"]] = float(row["value"])
    return [_stated(key, by_seed, unit) for key, by_seed in sorted(found.items())]


def _stated(
    key: tuple[str, ...], by_seed: Mapping[int, Mapping[str, float]], unit: str
) -> dict[str, Any]:
    method, heldout, site, structure = key
    cases = int(max(values.get("dice_count", 0) for values in by_seed.values()))
    summary: dict[str, Any] = {
        **{"method": method, "heldout": heldout, "site": site, "structure": structure},
        **{"unit": unit, "cases": cases, "seeds": sorted(by_seed), "hospitals": 1},
        **{"evaluations": cases * len(by_seed), "both_empty": 0, "stated": True},
    }
    for metric in METRICS:
        name = f"{metric}_mm" if unit == "mm" and metric in METRICS[1:] else metric
        stated = [values for values in by_seed.values() if f"{name}_mean" in values]
        counts = [values[f"{name}_count"] for values in stated if f"{name}_count" in values]
        mean = _mean_of([values[f"{name}_mean"] for values in stated])
        sd = _mean_of([values[f"{name}_sd"] for values in stated if f"{name}_sd" in values])
        ends = Interval(mean, NAN, NAN)
        if math.isfinite(sd) and counts and min(counts) > 1:
            part = Component(sd**2 / min(counts), min(counts) - 1)
            ends = combined_interval(mean, [part], bounds=bounds_of(metric))
        summary |= {
            f"{metric}_mean": mean,
            f"{metric}_sd": sd,
            f"{metric}_low": ends.low,
            f"{metric}_high": ends.high,
            f"{metric}_excluded": int(sum(cases - count for count in counts)),
            f"{metric}_few": len(counts) < len(stated),
        }
    return summary


def study_summary(results: pa.Table | Iterable[Row], rounds: Iterable[Row]) -> list[dict[str, Any]]:
    """Summarise a study like `summary_rows`, with hospitals that send no per-case results.

    Args:
        results: Rows of `results.parquet`.
        rounds: Rows of `rounds.parquet`, which have the summaries that hospitals stated.
    """
    rows, rounds = as_rows(results), list(rounds)
    held_out = any(row["heldout"] for row in (*rows, *rounds))
    phase = "heldout" if held_out else "validation"
    return with_stated(
        summary_rows(rows), stated_summaries(rounds, study_unit(rows, rounds), phase)
    )


def study_unit(rows: Iterable[Row], rounds: Iterable[Row]) -> str:
    """Return the unit of a study's distances, like `distance_unit`."""
    rows = heldout_rows(rows)
    stated = {row["metric"] for row in rounds if row["metric"] in STATED}
    in_mm = not stated or any(f"{name}_mean" in stated for name in MILLIMETRES)
    return distance_unit(rows) if rows or not stated or not in_mm else "mm"


def with_stated(
    summary: Sequence[dict[str, Any]], stated: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Join the summaries of hospitals with and without per-case results, and average them again.

    The interval of the average follows from each hospital's standard deviation and number of cases.
    """
    if not stated:
        return list(summary)
    hospitals = [row for row in summary if row["site"] != AVERAGE] + list(stated)
    order = {name: position for position, name in enumerate(methods_of(hospitals))}
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(hospitals, key=lambda row: (row["heldout"], row["site"])):
        grouped[row["structure"], row["method"]].append(row)
    joined = []
    for (structure, method), rows in sorted(
        grouped.items(), key=lambda item: (item[0][0], order[item[0][1]])
    ):
        joined += rows
        if len(rows) > 1:
            joined.append(_average(method, structure, rows))
    return joined


def _average(method: str, structure: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average hospitals with equal weight, as `summary_rows` does from single cases."""
    head = {
        **{"method": method, "heldout": AVERAGE, "site": AVERAGE, "structure": structure},
        **{"unit": rows[0]["unit"], "hospitals": len(rows)},
        "seeds": sorted({seed for row in rows for seed in row["seeds"]}),
    }
    summed = ("cases", "evaluations", "both_empty", *(f"{name}_excluded" for name in METRICS))
    head |= {name: sum(row[name] for row in rows) for name in summed}
    for metric in METRICS:
        known = [row for row in rows if math.isfinite(row[f"{metric}_mean"])]
        means = np.array([row[f"{metric}_mean"] for row in known])
        parts = [
            Component(row[f"{metric}_sd"] ** 2 / row["cases"] / len(known) ** 2, row["cases"] - 1)
            for row in known
            if row["cases"] > 1 and math.isfinite(row[f"{metric}_sd"])
        ]
        mean = float(means.mean()) if known else NAN
        complete = parts if len(parts) == len(known) else []
        ends = combined_interval(mean, complete, bounds=bounds_of(metric))
        head |= {
            f"{metric}_mean": mean,
            f"{metric}_sd": float(means.std(ddof=1)) if len(known) > 1 else NAN,
            f"{metric}_low": ends.low,
            f"{metric}_high": ends.high,
        }
    return head


def _mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else NAN


def best_methods(rows: Sequence[Mapping[str, Any]], metric: str) -> set[str]:
    """Methods with the best mean in the summary rows of one column; none if all are equal."""
    means = {row["method"]: float(row[f"{metric}_mean"]) for row in rows}
    known = {name: value for name, value in means.items() if math.isfinite(value)}
    if len(set(known.values())) < 2:
        return set()
    target = max(known.values()) if metric == "dice" else min(known.values())
    return {name for name, value in known.items() if value == target}
