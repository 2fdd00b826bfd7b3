"""The results on the console: no number is cut at any width, and means show their case counts."""

import io
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsgcg.common.console import Screen
from fedsgcg.deploy.study.summary import _print_results


def rows(known: int):
    """Four cases of one hospital; `known` of them have distances (ASD 1.5, ASSD 2.5, HD95 3.25)."""
    for number in range(4):
        there = number < known
        values = (
            {"asd": 1.5, "assd": 2.5, "hd95": 3.25}
            if there
            else dict.fromkeys(("asd", "assd", "hd95"), math.nan)
        )
        yield {
            "method": "source",
            "heldout": "North [old]",
            "site": "North [old]",
            "case": f"c{number}",
            "structure": "gland",
            "seed": 0,
            "dice": 0.8125 if there else 0.0,
            **values,
            "unit": "pixel",
            "empty_prediction": not there,
            "empty_truth": False,
        }


@pytest.mark.parametrize("width", [20, 40, 60, 80, 99, 110, 200])
@pytest.mark.parametrize(("known", "mark"), [(4, ""), (1, "(1 of 4)"), (0, "(0 of 4)")])
def test_all_numbers_are_there_at_any_width_and_say_over_how_many_cases_they_are(
    tmp_path, width, known, mark
):
    pq.write_table(pa.Table.from_pylist(list(rows(known))), tmp_path / "results.parquet")
    sink = io.StringIO()
    _print_results(tmp_path, Screen(sink, width))
    shown = sink.getvalue()
    words = shown.replace("│", " ").split()
    dice = {4: "0.812", 1: "0.203", 0: "0.000"}[known]
    distances = ["1.50", "2.50", "3.25"] if known else ["–"]
    assert {dice, *distances, "ASD", "ASSD", "HD95", "North", "[old]", "source"} <= set(words)
    assert words.count("of") - 2 * shown.count("(n of N)") == (3 if mark else 0)
    assert ("undefined if one mask is empty" in shown) == bool(mark)
