"""The report's main table for other programs: `tables/summary.csv` and `tables/summary.tex`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv

from fedsgcg.common.files.disk import Disk, refusals
from fedsgcg.server.report.format import DECIMALS, TITLES, Summary
from fedsgcg.server.report.tables import AVERAGE, METRICS, Row, study_summary

FOLDER: Final = "tables"

_HEAD: Final = {
    "method": (pa.string(), "what is compared: the method, and what the study varies of it"),
    "heldout": (pa.string(), f"hospital that took no part in training, or `{AVERAGE}`"),
    "site": (pa.string(), f"hospital whose cases these are, or `{AVERAGE}`"),
    "structure": (pa.string(), "structure"),
    "unit": (pa.string(), "unit of the distances"),
    "cases": (pa.int64(), "cases"),
    "hospitals": (pa.int64(), "hospitals in this row"),
    "evaluations": (pa.int64(), "cases times seeds"),
    "both_empty": (pa.int64(), "evaluations in which neither prediction nor truth has a pixel"),
    "seeds": (pa.string(), "seeds, separated by blanks"),
}
_PARTS: Final = {
    "mean": "mean over cases; in the average row over hospitals",
    "sd": "standard deviation over cases; in the average row over hospitals",
    "low": "lower end of the 95 % interval of the mean",
    "high": "upper end of the 95 % interval of the mean",
}

_LATEX: Final = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "·": r"$\cdot$",
    "×": r"$\times$",
}


def summary_table(results: pa.Table | Iterable[Row], rounds: Sequence[Row] = ()) -> pa.Table:
    """Return the main table of the report.

    It has one row per method, hospital and structure, and one for the average hospital.

    Args:
        results: Rows of `results.parquet`.
        rounds: Rows of `rounds.parquet`, for hospitals that send no per-case results.

    Returns:
        For each metric m of `dice`, `asd`, `assd`, `hd95`, `hd95_max`: m_mean, m_sd, m_low, m_high,
        and m_excluded, the evaluations without a value. Missing values are null. Field metadata
        gives `meaning` and `unit`.
    """
    rows = study_summary(results, rounds)
    unit = next((str(row["unit"]) for row in rows), "pixel")
    fields = [_field(name, kind, meaning) for name, (kind, meaning) in _HEAD.items()]
    for metric in METRICS:
        of = "1" if metric == "dice" else unit
        fields += [
            _field(f"{metric}_{part}", pa.float64(), f"{TITLES[metric]}: {meaning}", of)
            for part, meaning in _PARTS.items()
        ]
        left_out = f"{TITLES[metric]}: evaluations without a value"
        fields.append(_field(f"{metric}_excluded", pa.int64(), left_out))
    schema = pa.schema(fields)
    return pa.Table.from_pylist([_plain(row, schema.names) for row in rows], schema=schema)


def latex_table(rows: Sequence[Summary]) -> str:
    """Return a LaTeX table (package `booktabs`) of means and standard deviations."""
    return "\n".join(
        line
        for structure in dict.fromkeys(str(row["structure"]) for row in rows)
        for line in _tabular(structure, [row for row in rows if row["structure"] == structure])
    )


def write_tables(study: Path, results: Iterable[Row], rounds: Sequence[Row] = ()) -> None:
    """Write the main table below a study's folder as CSV and LaTeX; nothing without results.

    Raises:
        FedsgcgError: SRV-401 when the folder cannot be written.
    """
    results = list(results)
    rows = study_summary(results, rounds)
    if not rows:
        return
    disk, folder = Disk(), study / FOLDER
    with refusals(folder):
        disk.make_folder(folder)
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(summary_table(results, rounds), sink)
    disk.write(folder / "summary.csv", sink.getvalue().to_pybytes())
    disk.write(folder / "summary.tex", latex_table(rows).encode())


def _field(name: str, kind: pa.DataType, meaning: str, unit: str = "") -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning, **({"unit": unit} if unit else {})})


def _plain(row: Summary, names: Sequence[str]) -> dict[str, Any]:
    plain = {name: row[name] for name in names}
    plain["seeds"] = " ".join(map(str, row["seeds"]))
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in plain.items()
    }


def _tabular(structure: str, rows: Sequence[Summary]) -> list[str]:
    sites = list(dict.fromkeys(str(row["site"]) for row in rows))
    columns = [*(site for site in sites if site != AVERAGE), *(s for s in sites if s == AVERAGE)]
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    found = {(row["method"], row["site"]): row for row in rows}
    lines = [
        f"% {structure}: mean ± standard deviation over cases; the average is over hospitals",
        rf"\begin{{tabular}}{{ll{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["Metric", "Method", *map(escaped, columns)]) + r" \\",
    ]
    for metric in METRICS:
        if not any(math.isfinite(row[f"{metric}_mean"]) for row in rows):
            continue
        unit = "" if metric == "dice" else f" ({rows[0]['unit']})"
        lines.append(r"\midrule")
        for number, method in enumerate(methods):
            title = "" if number else f"{TITLES[metric]}{unit}"
            cells = [_cell(found.get((method, site)), metric) for site in columns]
            lines.append(" & ".join([title, escaped(method), *cells]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}", ""]


def _cell(row: Summary | None, metric: str) -> str:
    if row is None or not math.isfinite(row[f"{metric}_mean"]):
        return "--"
    places, spread = DECIMALS[metric], float(row[f"{metric}_sd"])
    mean = f"{row[f'{metric}_mean']:.{places}f}"
    return rf"${mean} \pm {spread:.{places}f}$" if math.isfinite(spread) else f"${mean}$"


def escaped(text: str) -> str:
    """Return a text as LaTeX prints it verbatim."""
    return re.sub(r".", lambda found: _LATEX.get(found[0], found[0]), text)
