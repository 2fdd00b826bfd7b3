"""Results after an adaptation to the held-out hospital's own images, as a table of its own."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedsgcg.common.settings.adaptation import TRANSDUCTIVE, WAYS
from fedsgcg.server.report.format import DECIMALS, show, show_interval
from fedsgcg.server.report.intervals import Interval, mean_interval
from fedsgcg.server.report.tables import Row, bounds_of

Cases = dict[tuple[str, str, str], dict[str, dict[tuple[int, str], float]]]
"""(method, adaptation, hospital) -> case -> (seed, structure) -> Dice."""

WITHOUT: Final = "without"
TITLES: Final = {
    WITHOUT: "none: the model as trained",
    "batchnorm": "BatchNorm moments",
    "prototypes": "prototypes",
    "amplitude": "amplitudes of each image",
}


@dataclass(frozen=True)
class AdaptedRow:
    """Dice of one method after one adaptation.

    Attributes:
        method: Label of the method.
        title: What was adapted.
        values: Mean Dice at each hospital and, with several, on average; as shown.
        gains: Difference to the model as trained, as shown; "" in its own row.
        intervals: 95 % interval of each mean over the hospital's cases, as shown.
        gain_intervals: Likewise of each difference, paired by case; "" in its own row.
    """

    method: str
    title: str
    values: tuple[str, ...]
    gains: tuple[str, ...]
    intervals: tuple[str, ...]
    gain_intervals: tuple[str, ...]


@dataclass(frozen=True)
class AdaptedTable:
    """Dice with and without adaptation.

    Attributes:
        columns: Held-out hospitals, and "average" if there are several.
        rows: For each method the model as trained, then its adaptations.
        transductive: Whether an adaptation used all images of a hospital at once.
    """

    columns: tuple[str, ...]
    rows: tuple[AdaptedRow, ...]
    transductive: bool


def adapted_table(
    rounds: Sequence[Row],
    methods: Sequence[str],
    results: Sequence[Row] = (),
    adapted_cases: Sequence[Row] = (),
) -> AdaptedTable | None:
    """Return the table, None if nothing was adapted.

    A value is the mean over seeds of a hospital's mean Dice over cases and structures. Only runs
    with both results enter a comparison. Intervals are those of `intervals.mean_interval` over
    cases, the unit of every table of results; hospitals that send no single cases have none.

    Args:
        rounds: Rows of `rounds.parquet`.
        methods: Labels in the order of the report.
        results: Rows of `results.parquet`.
        adapted_cases: Rows of every run's `adapted.parquet`.
    """
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    plain: dict[tuple[str, str, int, int], float] = {}
    adapted = []
    for row in rounds:
        if not row["heldout"] or row["site"] != row["heldout"]:
            continue
        if row["metric"] == "heldout_dice":
            plain[row["method"], row["site"], row["seed"], row["round"]] = row["value"]
        elif row["metric"].startswith("adapted_dice_"):
            adapted.append(row)
    for row in adapted:
        key = row["method"], row["site"], row["seed"], row["round"]
        if key in plain:
            way = row["metric"].removeprefix("adapted_dice_")
            found[row["method"], way, row["site"]][row["seed"]] = row["value"]
            found[row["method"], WITHOUT, row["site"]][row["seed"]] = plain[key]
    if not found:
        return None
    sites = sorted({site for _, _, site in found})
    ways = [way for way in (WITHOUT, *WAYS) if any(way == key[1] for key in found)]
    cases = _cases(results, adapted_cases)
    rows = []
    for method in methods:
        means = {way: _means(found, method, way, sites) for way in ways}
        rows += [
            _row(method, way, means[way], means[WITHOUT], _intervals(cases, method, way, sites))
            for way in ways
            if not all(math.isnan(value) for value in means[way])
        ]
    columns = (*sites, *(["average"] if len(sites) > 1 else []))
    return AdaptedTable(columns, tuple(rows), any(way in ways for way in TRANSDUCTIVE))


def _means(
    found: dict[tuple[str, str, str], dict[int, float]],
    method: str,
    way: str,
    sites: Sequence[str],
) -> list[float]:
    """Return the mean over seeds at each hospital, and over hospitals; NaN where unknown."""
    values = [list(found.get((method, way, site), {}).values()) for site in sites]
    means = [math.fsum(some) / len(some) if some else math.nan for some in values]
    return [*means, math.fsum(means) / len(means)] if len(sites) > 1 else means


def _cases(results: Sequence[Row], adapted_cases: Sequence[Row]) -> Cases:
    """Return Dice by run, structure and case, of the held-out hospitals."""
    found: Cases = defaultdict(lambda: defaultdict(dict))
    ways = [(WITHOUT, row) for row in results] + [(str(row["adapt"]), row) for row in adapted_cases]
    for way, row in ways:
        if row["heldout"] and row["site"] == row["heldout"]:
            evaluation = int(row["seed"]), str(row["structure"])
            found[str(row["method"]), way, str(row["site"])][str(row["case"])][evaluation] = float(
                row["dice"]
            )
    return found


def _intervals(
    cases: Cases, method: str, way: str, sites: Sequence[str]
) -> list[tuple[Interval, Interval]]:
    """Return the intervals of mean and difference at each hospital, and over several hospitals."""
    levels, gains = [], []
    for site in sites:
        own, plain = cases.get((method, way, site), {}), cases.get((method, WITHOUT, site), {})
        levels.append([float(np.mean(list(found.values()))) for found in own.values()])
        pairs = [
            [value - plain[case][key] for key, value in found.items() if key in plain[case]]
            for case, found in own.items()
            if case in plain
        ]
        gains.append([float(np.mean(pair)) for pair in pairs if pair])
    groups: list[tuple[list[list[float]], list[list[float]]]]
    groups = [([level], [gain]) for level, gain in zip(levels, gains, strict=True)]
    groups += [(levels, gains)] if len(sites) > 1 else []
    unknown = Interval(math.nan, math.nan, math.nan)
    return [
        (
            mean_interval(level, bounds=bounds_of("dice")) if all(level) else unknown,
            mean_interval(gain, bounds=(-1.0, 1.0)) if all(gain) else unknown,
        )
        for level, gain in groups
    ]


def _row(
    method: str,
    way: str,
    means: Sequence[float],
    without: Sequence[float],
    intervals: Sequence[tuple[Interval, Interval]],
) -> AdaptedRow:
    digits = DECIMALS["dice"]
    values = tuple(show(value, digits) for value in means)
    differs = [
        way != WITHOUT and not math.isnan(value - before)
        for value, before in zip(means, without, strict=True)
    ]
    gains = tuple(
        show(value - before, digits, sign=True) if differ else ""
        for value, before, differ in zip(means, without, differs, strict=True)
    )
    levels = tuple(show_interval(level, digits) for level, _ in intervals)
    ends = tuple(
        show_interval(gain, digits, sign=True) if differ else ""
        for (_, gain), differ in zip(intervals, differs, strict=True)
    )
    return AdaptedRow(method, TITLES[way], values, gains, levels, ends)
