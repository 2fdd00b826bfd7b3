"""Scores of predictions with a known truth: the metrics of evaluation, as CSV and as a table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fedsgcg.clients.data.store import Case
from fedsgcg.clients.evaluation import CaseResult, case_rows, structure_masks
from fedsgcg.clients.predict.files import Job, write
from fedsgcg.clients.predict.predictor import Prediction
from fedsgcg.common.settings.plan import DataSettings
from fedsgcg.common.wire.payload import CASES_SCHEMA

COLUMNS = ("site", *CASES_SCHEMA.names, "trained_on")


class Scores:
    """Collects one row per case and structure.

    Attributes:
        data: Structures and unit of distances.
        rows: `COLUMNS` -> value. `case` is the case's own name, because the table stays at the
            hospital; `trained_on` is the hospital at which the model was trained on this image, ""
            for a new one.
    """

    def __init__(self, data: DataSettings) -> None:
        self.data = data
        self.rows: list[dict[str, Any]] = []

    def trained_on(self) -> list[str]:
        """Return the names of the scored cases that the model was trained on."""
        return list(
            dict.fromkeys(f"{row['site']} {row['case']}" for row in self.rows if row["trained_on"])
        )

    def cases(self) -> int:
        """Return the number of scored cases."""
        return len({(row["site"], row["case"]) for row in self.rows})

    def add(
        self, job: Job, prediction: Prediction, truth: NDArray[np.uint8], trained_on: str = ""
    ) -> str:
        """Score one case against its true class indices (Z, Y, X); return its Dice as text."""
        volume = prediction.volume
        case = Case(
            index=0,
            name=job.case,
            alias=job.case,
            patient="",
            split="test",
            num_slices=truth.shape[0],
            native_shape=(truth.shape[0], truth.shape[1], truth.shape[2]),
            spacing=volume.millimetres,
            is_picture=volume.is_picture,
            has_foreground=bool(truth.any()),
        )
        found = case_rows(
            CaseResult(case, prediction.masks, structure_masks(truth, self.data), truth), self.data
        )
        self.rows += [{"site": job.site, **row, "trained_on": trained_on} for row in found]
        if len(found) == 1:
            return f"Dice {found[0]['dice']:.3f}"
        return "Dice " + ", ".join(f"{row['structure']} {row['dice']:.3f}" for row in found)

    def of_case(self, job: Job) -> list[dict[str, Any]]:
        """Return the rows of a case."""
        return [row for row in self.rows if (row["site"], row["case"]) == (job.site, job.case)]

    def again(self, rows: Sequence[Mapping[str, Any]], trained_on: str) -> str:
        """Add the rows of an earlier, interrupted run; return a line for the console."""
        self.rows += [dict(row) for row in rows]
        parts = ["done earlier, unchanged"]
        if rows:
            parts.append("Dice " + ", ".join(f"{row['dice']:.3f}" for row in rows))
        if trained_on:
            parts.append(f"TRAINED ON (at {trained_on})")
        return "  ".join(parts)

    def write(self, path: Path) -> None:
        """Write all rows as CSV; undefined metrics are empty. Raises MOD-808."""
        sink = io.StringIO()
        writer = csv.DictWriter(sink, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({name: _text(row[name]) for name in COLUMNS})
        write(path, sink.getvalue().encode())

    def table(self) -> Table:
        """Return the mean over cases of each hospital and structure."""
        real = self.data.spacing_unit == "mm" and any(
            row["asd_mm"] is not None for row in self.rows
        )
        unit, ending = ("mm", "_mm") if real else ("pixel", "")
        table = Table(title=f"Scores: mean over cases (distances in {unit})")
        for title in ("hospital", "structure", "cases", "Dice ± sd", "ASD", "ASSD", "HD95"):
            is_text = title in ("hospital", "structure")
            table.add_column(title, justify="left" if is_text else "right")
        for site in sorted({row["site"] for row in self.rows}):
            for structure in self.data.structures:
                mine = [
                    row for row in self.rows if (row["site"], row["structure"]) == (site, structure)
                ]
                dice = [row["dice"] for row in mine]
                distances = [
                    _mean([row[f"{name}{ending}"] for row in mine])
                    for name in ("asd", "assd", "hd95")
                ]
                mean = f"{np.mean(dice):.3f}"
                if len(dice) > 1:
                    mean += f" ± {np.std(dice, ddof=1):.3f}"
                table.add_row(site, structure, str(len(mine)), mean, *distances)
        return table


def _mean(values: Sequence[float | None]) -> str:
    """Return the mean of the defined values, with their number if some are undefined."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    mean = f"{np.mean(known):.2f}" if known else "–"
    return mean if len(known) == len(values) else f"{mean} ({len(known)} of {len(values)})"


def _text(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return value
