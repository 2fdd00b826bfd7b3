"""The main table as CSV and LaTeX: the numbers of the report, in files that other programs read."""

import csv
import math
from pathlib import Path

import pytest

from fedsgcg.server.report.export import latex_table, summary_table, write_tables
from fedsgcg.server.report.tables import METRICS, summary_rows

DICE = {"East": (0.8, 0.9), "West_2": (0.5, 0.7)}


def rows(method: str = "source") -> list[dict[str, object]]:
    """Two cases at each of two hospitals; one distance is undefined."""
    return [
        {
            "method": method,
            "heldout": site,
            "seed": 0,
            "site": site,
            "case": f"case{number}",
            "structure": "prostate",
            "unit": "pixel",
            "dice": dice,
            "asd": math.nan if (site, number) == ("East", 0) else 1.0 + number,
            "assd": 1.0,
            "hd95": 2.0,
            "hd95_max": 3.0,
            "empty_prediction": False,
            "empty_truth": False,
        }
        for site, values in DICE.items()
        for number, dice in enumerate(values)
    ]


def test_the_table_has_a_row_per_hospital_and_one_for_the_average_hospital() -> None:
    table = summary_table(rows())
    found = {row["site"]: row for row in table.to_pylist()}
    assert list(found) == ["East", "West_2", "average"]
    assert found["East"]["dice_mean"] == pytest.approx(0.85)
    assert found["West_2"]["dice_mean"] == pytest.approx(0.60)
    assert found["average"]["dice_mean"] == pytest.approx(0.725)
    assert (found["East"]["asd_mean"], found["East"]["asd_excluded"]) == (2.0, 1)
    assert found["East"]["asd_sd"] is None, "of a single value"
    assert table.schema.field("asd_mean").metadata[b"unit"] == b"pixel"
    assert all(field.metadata[b"meaning"] for field in table.schema)


def test_csv_holds_the_same_numbers(tmp_path: Path) -> None:
    write_tables(tmp_path, rows())
    with (tmp_path / "tables" / "summary.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    table = summary_table(rows()).to_pylist()
    assert len(read) == len(table) == 3
    for written, row in zip(read, table, strict=True):
        for metric in METRICS:
            expected = row[f"{metric}_mean"]
            assert float(written[f"{metric}_mean"]) == pytest.approx(expected, rel=1e-12)
    assert read[0]["asd_sd"] == ""


def test_latex_escapes_names_and_marks_what_is_missing() -> None:
    several = rows("source") + [
        row for row in rows("ram prototypes.weight=0.5 & 50%") if row["site"] == "East"
    ]
    text = latex_table(summary_rows(several))
    assert r"Metric & Method & East & West\_2 & average \\" in text
    assert r"Dice & source & $0.850 \pm 0.071$ & $0.600 \pm 0.141$ & $0.725 \pm 0.177$ \\" in text
    assert r" & ram prototypes.weight=0.5 \& 50\% & $0.850 \pm 0.071$ & -- & -- \\" in text
    assert text.count(r"\midrule") == len(METRICS)


def test_nothing_is_written_without_results(tmp_path: Path) -> None:
    write_tables(tmp_path, [])
    assert not (tmp_path / "tables").exists()
