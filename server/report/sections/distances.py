"""Which hospital is far from the others, known from the shared statistics before it is held out.

The distance of a hospital is measured in the runs in which it trained; its Dice in the run that
held it out. So the distance is known before one image of a held-out hospital is seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from fedsgcg.server.report.format import show
from fedsgcg.server.report.sections.results import CaseRow
from fedsgcg.server.report.tables import Row

METRIC = "site_distance"
BACKGROUND = "background"


@dataclass(frozen=True)
class DistanceRow:
    """One hospital with one method.

    Attributes:
        method: Label of the method.
        site: The hospital.
        distance: Mean distance from the other training hospitals, as shown.
        dice: Mean Dice where it was held out, as shown.
    """

    method: str
    site: str
    distance: str
    dice: str


@dataclass(frozen=True)
class Distances:
    """Distances of hospitals and what they say about the Dice.

    Attributes:
        rows: One row per method and hospital, farthest first.
        notes: Rank correlation of each method.
    """

    rows: tuple[DistanceRow, ...]
    notes: tuple[str, ...]


def distances_section(
    rounds: Iterable[Row], cases: Sequence[CaseRow], methods: Sequence[str]
) -> Distances:
    """Return the distances at the end of the training; without rows if none is recorded.

    Args:
        rounds: Rows of `rounds.parquet`.
        cases: Held-out cases with each method.
        methods: Labels in order.
    """
    distances, dice = _final_distances(rounds), _mean_dice(cases)
    rows: list[DistanceRow] = []
    notes: list[str] = []
    for method in methods:
        found = {site: value for (name, site), value in distances.items() if name == method}
        for site in sorted(found, key=lambda site: (-found[site], site)):
            score = dice.get((method, site), math.nan)
            rows.append(DistanceRow(method, site, show(found[site], 3), show(score, 3)))
        both = [site for site in sorted(found) if (method, site) in dice]
        if len(both) > 2:
            pairs = [(found[site], dice[method, site]) for site in both]
            notes.append(_note(method, spearman(pairs), len(both)))
    return Distances(tuple(rows), tuple(notes))


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's rank correlation; NaN if all values of a side are equal.

    Args:
        pairs: At least two pairs; equal values share their mean rank.
    """
    first, second = (rankdata(column) for column in np.asarray(pairs, np.float64).T)
    first, second = first - first.mean(), second - second.mean()
    size = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / size if size else math.nan


def _note(method: str, correlation: float, number: int) -> str:
    rho = show(correlation, 2)
    text = f"{method}: Spearman’s rank correlation of distance and Dice {rho}, n = {number}"
    if number < 5:
        return f"{text}; no verdict, because no order of so few hospitals is significant at 5 %."
    return f"{text}; a description, not a test."


def _final_distances(rounds: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Mean over classes, folds and seeds, of the last round of each run."""
    last: dict[tuple[str, str, int, str, str], tuple[int, float]] = {}
    for row in rounds:
        if row["metric"] == METRIC and row["cls"] != BACKGROUND and row["value"] is not None:
            key = (row["method"], row["heldout"], int(row["seed"]), row["site"], row["cls"])
            entry = (int(row["round"]), float(row["value"]))
            last[key] = max(last.get(key, entry), entry)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (method, _, _, site, _), (_, value) in sorted(last.items()):
        found[method, site].append(value)
    return _means(found)


def _mean_dice(cases: Iterable[CaseRow]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for case in cases:
        if math.isfinite(case.dice):
            found[case.method, case.site].append(case.dice)
    return _means(found)


def _means(found: Mapping[tuple[str, str], Sequence[float]]) -> dict[tuple[str, str], float]:
    return {key: math.fsum(values) / len(values) for key, values in found.items()}
