"""Hospitals that send no per-case results: the coordinator's tables and the report."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.wire.messages import ENROL, EVALUATE, SUMMARY
from fedsgcg.common.wire.payload import encode_cases
from fedsgcg.server.records.results import read_summary
from fedsgcg.server.report.build import make_report
from fedsgcg.server.report.export import summary_table
from fedsgcg.server.report.sections.cases import case_lines
from fedsgcg.server.report.tables import AVERAGE, study_summary, summary_rows
from tests.support.plans import small_plan
from tests.support.report_study import write_study
from tests.support.scripted_run import run, status_of

SMALL = {"sites": ("HK", "UCL"), "seeds": (0,), "cases": 6, "pictures": False}
STATED = {"structure": "gland", "metric": "dice", "mean": 0.75, "sd": 0.1, "count": 4}


def summaries_of(grid, site, kind, request, reply):
    """Every hospital states means instead of rows."""
    if kind != EVALUATE:
        return reply
    distance = STATED | {"metric": "asd", "mean": 2.5, "sd": None, "count": None}
    return replace(reply, cases=encode_cases([]), details={SUMMARY: [STATED, distance]})


def test_a_run_without_per_case_results_is_complete(tmp_path: Path) -> None:
    outcome, _ = run(small_plan(tmp_path, federation__heldout_every=1), script=summaries_of)
    assert (outcome.status, outcome.problems) == ("completed", ())
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 0
    rows = pq.read_table(tmp_path / "rounds.parquet").to_pylist()
    stated = {
        (row["phase"], row["site"], row["metric"]): (row["round"], row["value"])
        for row in rows
        if row["cls"] == "gland" and row["metric"].startswith(("dice_", "asd_"))
    }
    assert stated == {
        ("heldout", "D", "dice_mean"): (3, 0.75),
        ("heldout", "D", "dice_sd"): (3, 0.1),
        ("heldout", "D", "dice_count"): (3, 4.0),
        ("heldout", "D", "asd_mean"): (3, 2.5),
    }
    curve = [row["value"] for row in rows if row["metric"] == "heldout_dice"]
    assert curve == [0.75] * 3


def test_a_hospital_that_refuses_a_constant_model_does_not_fail_the_run(tmp_path: Path) -> None:
    def script(grid, site, kind, request, reply):
        refused = kind == EVALUATE and site == "D"
        return replace(reply, cases=b"", metrics={}, error="POL-724") if refused else reply

    outcome, _ = run(small_plan(tmp_path), script=script)
    assert outcome.status == "degraded"
    assert [problem.code for problem in outcome.problems] == ["POL-724"]
    assert outcome.digest


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": 1.5},
        {"mean": -0.1},
        {"mean": math.nan},
        {"mean": "0.5"},
        {"mean": True},
        {"sd": 2.0},
        {"sd": math.inf},
        {"count": 0},
        {"count": 2.5},
        {"count": 10**9},
        {"count": True},
        {"structure": "<b>"},
        {"metric": "loss"},
    ],
)
def test_an_impossible_summary_is_rejected(tmp_path: Path, wrong: dict[str, object]) -> None:
    plan = small_plan(tmp_path)
    assert len(read_summary([STATED], "A", plan)) == 1
    assert read_summary(None, "A", plan) == []
    for stated in ([STATED | wrong], [STATED, STATED], [1], 7, "text", {"a": 1}):
        with pytest.raises(FedsgcgError, match="PAY-106"):
            read_summary(stated, "A", plan)


def test_suppressed_counts_reach_the_report_as_such(tmp_path: Path) -> None:
    """Row 14: fewer than the floor is stated, distinct from zero."""

    def script(grid, site, kind, request, reply):
        if kind != ENROL or site != "A":
            return reply
        counts = reply.details["cases"] | {"validation": None, "test": 0}
        problems = [{"code": "DAT-110", "suppressed": True}, *2 * [{"code": "DAT-103"}]]
        return replace(reply, details=reply.details | {"cases": counts, "problems": problems})

    run(small_plan(tmp_path), script=script)
    census = status_of(tmp_path)["sites"]["A"]
    assert census["suppressed"] == ["validation", "DAT-110"]
    assert census["left_out"] == {"DAT-103": 2}
    (line,) = case_lines([{"sites": {"A": census}}])
    assert "fewer than the hospital's floor: validation and DAT-110" in line


def without_rows(folder: Path) -> None:
    """Turn a study's per-case results into what the hospitals would have stated."""
    for path in folder.glob("*/*/*/results.parquet"):
        rows = pq.read_table(path)
        rounds = pq.read_table(path.with_name("rounds.parquet"))
        values = defaultdict(list)
        for row in rows.to_pylist():
            for metric in ("dice", "asd", "assd", "hd95", "asd_mm", "assd_mm", "hd95_mm"):
                if row[metric] is not None and math.isfinite(row[metric]):
                    values[row["site"], row["structure"], metric].append(row[metric])
        head = {name: rows.to_pylist()[0][name] for name in rows.schema.names[:3]}
        stated = [
            head
            | {"round": 20, "phase": "heldout", "site": site, "cls": structure}
            | {"metric": f"{metric}_{name}", "value": float(value)}
            for (site, structure, metric), found in values.items()
            for name, value in (
                ("mean", np.mean(found)),
                ("sd", np.std(found, ddof=1)),
                ("count", len(found)),
            )
        ]
        added = pa.Table.from_pylist([*rounds.to_pylist(), *stated], schema=rounds.schema)
        pq.write_table(added, path.with_name("rounds.parquet"))
        pq.write_table(rows.slice(0, 0), path)
    for name in ("results.parquet", "rounds.parquet"):
        tables = [pq.read_table(path) for path in sorted(folder.glob(f"*/*/*/{name}"))]
        pq.write_table(pa.concat_tables(tables), folder / name)


def test_the_report_shows_means_where_no_case_is_known(tmp_path: Path) -> None:
    """The same study with and without per-case results: same means and sds, other intervals."""
    study = write_study(tmp_path / "study", **SMALL)
    full = summary_rows(pq.read_table(study / "results.parquet"))
    without_rows(study)
    rounds = pq.read_table(study / "rounds.parquet").to_pylist()
    stated = study_summary([], rounds)
    assert [(row["method"], row["site"]) for row in stated] == [
        (row["method"], row["site"]) for row in full
    ]
    for mine, theirs in zip(stated, full, strict=True):
        assert mine["unit"] == theirs["unit"]
        for name in ("cases", "hospitals", "seeds", "dice_mean", "dice_sd", "asd_mean"):
            assert mine[name] == pytest.approx(theirs[name]), name
        assert mine["dice_low"] < mine["dice_mean"] < mine["dice_high"]
        assert mine["dice_low"] >= theirs["dice_low"] - 0.05
    page = make_report(study).read_text()
    best = next(row for row in full if row["site"] == AVERAGE)
    assert f"{best['dice_mean']:.3f}" in page
    assert "as stated by HK and UCL" in page
    assert "No result yet" not in page
    table = summary_table([], rounds).to_pylist()
    assert len(table) == len(full)
    assert json.dumps(table, allow_nan=False)


def test_hospitals_with_and_without_rows_are_averaged_together(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", **SMALL)
    results = pq.read_table(study / "results.parquet").to_pylist()
    full = summary_rows(results)
    without_rows(study)
    rounds = pq.read_table(study / "rounds.parquet").to_pylist()
    mixed = study_summary(
        [row for row in results if row["site"] == "HK"],
        [row for row in rounds if row["site"] != "HK" or not row["cls"]],
    )
    for mine, theirs in zip(mixed, full, strict=True):
        assert mine["dice_mean"] == pytest.approx(theirs["dice_mean"])
        assert mine["hospitals"] == theirs["hospitals"]
