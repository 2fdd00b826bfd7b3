"""Paired differences between labels: how large, how sure, and in words whether they hold.

Two labels judged the same cases with the same seeds. A case is first averaged over the seeds that both have; then it
is one pair. The interval draws cases anew within each hospital, and hospitals count the same; the test ranks the cases
of all hospitals together. A difference holds when its interval excludes zero and the test, corrected for the number of
comparisons in its table, agrees.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from server.hypothesis_tests import ALPHA, SignedRank, holm, signed_rank
from server.intervals import NAN, Interval, bootstrap_interval
from server.report_tables import AVERAGE, COMPATIBLE, METRICS, Row, as_rows, distance_unit, heldout_rows, value_of

Place = tuple[str, str]  # (heldout, site)
Seeds = dict[int, float]
Values = dict[Place, dict[str, Seeds]]  # place -> case -> seed -> value


@dataclass(frozen=True)
class Difference:
    """Label minus reference at one hospital (or the average), paired by case and seed.

    Attributes:
        method: The label.
        reference: What is subtracted.
        site: Hospital, or `AVERAGE`.
        structure: Structure.
        metric: One of `METRICS`.
        unit: "" for Dice, else pixel or mm.
        interval: Mean difference over cases with its interval.
        cases: Cases that both have a value for.
        seeds: Mean difference of each seed, by seed.
        groups: Hospitals in it.
        test: Signed-rank test over the cases.
        corrected: Its p value corrected for the comparisons of the table; NaN before `corrected_for_number`.
        family: Comparisons in that table.
        hospitals: Hospitals that were looked at; `groups` of them have a pair.
    """

    method: str
    reference: str
    site: str
    structure: str
    metric: str
    unit: str
    interval: Interval
    cases: int
    seeds: dict[int, float]
    groups: int
    test: SignedRank
    corrected: float = NAN
    family: int = 1
    hospitals: int = 1

    @property
    def p(self) -> float:
        """The corrected p value, or the plain one before correction."""
        return self.test.p if math.isnan(self.corrected) else self.corrected

    @property
    def holds(self) -> bool:
        """Whether interval and corrected test both say that there is a difference."""
        return self.interval.excludes_zero and self.p <= ALPHA

    @property
    def better(self) -> bool:
        """Whether the label is on the good side of the reference."""
        return (self.interval.mean > 0) == (self.metric == "dice")

    @property
    def sentence(self) -> str:
        """What interval and test allow to say, in plain words."""
        if not self.cases:
            return "no case in common"
        if math.isnan(self.interval.low):
            return "one case in common: no interval, no difference shown"
        if self.holds:
            return f"{self.method} is {'better' if self.better else 'worse'}: the difference holds"
        return f"no difference shown: {self._doubt()}"

    def _doubt(self) -> str:
        if not self.interval.excludes_zero:
            test = "" if self.p > ALPHA else ", although the test alone would say so"
            return f"the interval includes zero{test}"
        if self.test.smallest_p * self.family > ALPHA:
            return f"{self.cases} cases are too few for a test among {self.family} comparisons"
        return "the interval excludes zero, but the corrected test does not confirm it"


def corrected_for_number(differences: Sequence[Difference]) -> list[Difference]:
    """Correct the tests of one table for their number (Holm)."""
    tests = holm([entry.test.p for entry in differences])
    family = sum(not math.isnan(p) for p in tests)
    return [replace(entry, corrected=p, family=family) for entry, p in zip(differences, tests, strict=True)]


class CaseValues:
    """Every case's values by label and structure, so that many pairs of labels can be compared.

    Args:
        results: Rows of `results.parquet`.
        unit: Unit of distances; the results' own choice if not given.
    """

    def __init__(self, results: pa.Table | Iterable[Row], unit: str = "") -> None:
        rows = heldout_rows(as_rows(results))
        self.unit = unit or distance_unit(rows)
        self.structures = sorted({str(row["structure"]) for row in rows})
        self.places = sorted({(str(row["heldout"]), str(row["site"])) for row in rows})
        self._values: dict[tuple[str, str, str], Values] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
        for row in rows:
            place = str(row["heldout"]), str(row["site"])
            for metric in (*METRICS, *COMPATIBLE.values()):
                value = value_of(row, metric, self.unit)
                if math.isfinite(value):
                    found = self._values[str(row["method"]), str(row["structure"]), metric]
                    found[place][str(row["case"])][int(row["seed"])] = value

    def of(self, method: str, structure: str, metric: str) -> Values:
        """Values of a label, {} without any."""
        return self._values.get((method, structure, metric), {})

    def cases(self, method: str, structure: str, metric: str) -> dict[Place, list[float]]:
        """Every case's value, averaged over seeds, by place."""
        return {
            place: [float(np.mean(list(seeds.values()))) for _, seeds in sorted(cases.items())]
            for place, cases in self.of(method, structure, metric).items()
        }

    def interval(self, method: str, structure: str, metric: str, place: Place | None = None) -> Interval:
        """Mean with interval at one place, or on average over all places (each counts the same)."""
        cases = self.cases(method, structure, metric)
        return bootstrap_interval([cases.get(place, [])] if place else [cases[key] for key in sorted(cases)])

    def by_seed(self, method: str, structure: str, metric: str, place: Place | None = None) -> dict[int, float]:
        """Mean of every seed at one place, or over all places that the label has (seeds without one of them left out).

        Cases count the same within a place, places count the same.
        """
        values = self.of(method, structure, metric)
        places = [place] if place else list(values)
        found: dict[int, list[float]] = defaultdict(list)
        for key in places:
            seeds: dict[int, list[float]] = defaultdict(list)
            for case in values.get(key, {}).values():
                for seed, value in case.items():
                    seeds[seed].append(value)
            for seed, part in seeds.items():
                found[seed].append(float(np.mean(part)))
        return {seed: float(np.mean(means)) for seed, means in sorted(found.items()) if len(means) == len(places)}

    def difference(self, pair: tuple[str, str], structure: str, metric: str, place: Place | None = None) -> Difference:
        """Compare a pair (label, reference) at one place, or over all places."""
        ours, theirs = (self.of(name, structure, metric) for name in pair)
        places = [place] if place else self.places
        parts = [_paired(ours.get(key, {}), theirs.get(key, {})) for key in places]
        values = [np.array([np.mean(list(seeds.values())) for seeds in part.values()]) for part in parts]
        return Difference(
            *pair,
            site=place[1] if place else AVERAGE,
            structure=structure,
            metric=metric,
            unit="" if metric == "dice" else self.unit,
            interval=bootstrap_interval(values),
            cases=sum(part.size for part in values),
            seeds=_by_seed(parts),
            groups=sum(bool(part.size) for part in values),
            test=signed_rank(np.concatenate(values) if values else np.zeros(0)),
            hospitals=len(places),
        )


def paired_differences(results: pa.Table | Iterable[Row], method: str, reference: str) -> list[Difference]:
    """Compare two labels on the same cases and seeds, per structure, metric and hospital, and on average.

    A pair is (hospital, case, seed) with a defined value for both; pairs are averaged over seeds, then cases. The p
    values are corrected for the number of comparisons returned.
    """
    return compare_everywhere(CaseValues(results), (method, reference))


def compare_everywhere(values: CaseValues, pair: tuple[str, str]) -> list[Difference]:
    """Compare a pair at every place and on average, in every structure and metric, as one family."""
    places: list[Place | None] = [*values.places, *([None] if len(values.places) > 1 else [])]
    return corrected_for_number(
        [
            values.difference(pair, structure, metric, place)
            for structure in values.structures
            for metric in METRICS
            for place in places
        ]
    )


def compare_on_average(
    values: CaseValues,
    pairs: Sequence[tuple[str, str]],
    structures: Sequence[str],
    metrics: Sequence[str] = ("dice", "asd"),
) -> list[Difference]:
    """Compare pairs over all hospitals, as one family: what the tables of claims show."""
    place = values.places[0] if len(values.places) == 1 else None
    found = [
        values.difference(pair, structure, metric, place)
        for structure in structures
        for metric in metrics
        for pair in pairs
    ]
    return corrected_for_number(found)


def _paired(ours: Mapping[str, Seeds], theirs: Mapping[str, Seeds]) -> dict[str, Seeds]:
    """Differences of the cases and seeds that both have, cases in order."""
    pairs: dict[str, Seeds] = {}
    for case in sorted(ours.keys() & theirs.keys()):
        shared = sorted(ours[case].keys() & theirs[case].keys())
        if shared:
            pairs[case] = {seed: ours[case][seed] - theirs[case][seed] for seed in shared}
    return pairs


def _by_seed(parts: Iterable[Mapping[str, Seeds]]) -> dict[int, float]:
    """Mean difference of each seed: over cases within a hospital, then over hospitals."""
    means: dict[int, list[float]] = defaultdict(list)
    for part in parts:
        seeds: dict[int, list[Any]] = defaultdict(list)
        for case in part.values():
            for seed, value in case.items():
                seeds[seed].append(value)
        for seed, found in seeds.items():
            means[seed].append(float(np.mean(found)))
    return {seed: float(np.mean(found)) for seed, found in sorted(means.items())}
