"""Results after an adaptation to the held-out hospital's own images, as a table of its own."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedsgcg.common.settings.adaptation import WAYS
from fedsgcg.server.report.format import DECIMALS, show
from fedsgcg.server.report.tables import Row

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
    """

    method: str
    title: str
    values: tuple[str, ...]
    gains: tuple[str, ...]


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


def adapted_table(rounds: Sequence[Row], methods: Sequence[str]) -> AdaptedTable | None:
    """Return the table, None if nothing was adapted.

    A value is the mean over seeds of a hospital's mean Dice over cases and structures. Only runs
    with both results enter a comparison.

    Args:
        rounds: Rows of `rounds.parquet`.
        methods: Labels in the order of the report.
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
    rows = []
    for method in methods:
        means = {way: _means(found, method, way, sites) for way in ways}
        rows += [
            _row(method, way, means[way], means[WITHOUT])
            for way in ways
            if not all(math.isnan(value) for value in means[way])
        ]
    columns = (*sites, *(["average"] if len(sites) > 1 else []))
    return AdaptedTable(columns, tuple(rows), any(way in ways for way in WAYS[:2]))


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


def _row(method: str, way: str, means: Sequence[float], without: Sequence[float]) -> AdaptedRow:
    values = tuple(show(value, DECIMALS["dice"]) for value in means)
    gains = tuple(
        ""
        if way == WITHOUT or math.isnan(value - before)
        else show(value - before, DECIMALS["dice"], sign=True)
        for value, before in zip(means, without, strict=True)
    )
    return AdaptedRow(method, TITLES[way], values, gains)
