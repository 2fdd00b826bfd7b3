"""Paired differences between labels: size, uncertainty and verdict.

Two labels are compared on the same cases with the same seeds. The cases evaluated with one pair of
trained models share these models, so cases alone cannot show that one method is better than
another. The units that can vary are:

    over several hospitals   the mean difference of each hospital, and of each seed if the same
                             models were evaluated at all hospitals (no hospital was held out)
    at one hospital          the mean difference of each case, and of each seed if there are several

The interval is Student's over these units. The test flips the signs of whole trainings (held-out
hospital and seed). A difference holds if there is more than one seed, the interval excludes zero,
and the test, corrected for the number of comparisons in its table, is significant. There is no
verdict if both models miss the structure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedsgcg.server.report.intervals import (
    NAN,
    Component,
    Interval,
    combined_interval,
    component_of,
    mean_interval,
)
from fedsgcg.server.report.significance import ALPHA, SignFlips, holm, sign_flips
from fedsgcg.server.report.tables import (
    AVERAGE,
    COMPARED,
    COMPATIBLE,
    METRICS,
    Row,
    as_rows,
    bounds_of,
    distance_unit,
    heldout_rows,
    undefined,
    value_of,
)

Place = tuple[str, str]  # (heldout, site)
Seeds = dict[int, float]
Floats = npt.NDArray[np.float64]
Values = dict[Place, dict[str, Seeds]]  # place -> case -> seed -> value
Parts = dict[Place, dict[str, Seeds]]
"""Differences by place, case and seed; only those that both labels have."""

DICE_FLOOR = 0.2
"""Mean Dice below which a model misses the structure; two such models are not compared."""


@dataclass(frozen=True)
class Difference:
    """Label minus reference at one hospital (or the average), paired by case and seed.

    Attributes:
        method: The label.
        reference: The label that is subtracted.
        site: Hospital, or `AVERAGE`.
        structure: Structure.
        metric: One of `COMPARED`.
        unit: "" for Dice, else pixel or mm.
        interval: Mean difference with its interval over hospitals, seeds or cases (see above).
        cases: Number of cases for which both labels have a value.
        seeds: Mean difference by seed.
        groups: Number of hospitals with a pair.
        test: Sign-flip test over the trainings.
        corrected: Its p value corrected for the comparisons of the table; NaN before
            `corrected_for_number`.
        family: Number of comparisons in the table.
        hospitals: Number of hospitals; `groups` of them have a pair.
        by_hospital: Mean difference by hospital.
        levels: Mean Dice of label and reference, NaN if unknown.
        scored: Number of cases for which both labels have a Dice; a distance may be undefined.
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
    test: SignFlips
    corrected: float = NAN
    family: int = 1
    hospitals: int = 1
    by_hospital: Mapping[str, float] = field(default_factory=dict)
    levels: tuple[float, float] = (NAN, NAN)
    scored: int = 0

    @property
    def p(self) -> float:
        """The corrected p value, or the uncorrected one before `corrected_for_number`."""
        return self.test.p if math.isnan(self.corrected) else self.corrected

    @property
    def holds(self) -> bool:
        """Whether interval and corrected test both show a difference, and a verdict is possible."""
        return not self._no_verdict() and self.interval.excludes_zero and self.p <= ALPHA

    @property
    def better(self) -> bool:
        """Whether the label is better than the reference."""
        return (self.interval.mean > 0) == (self.metric == "dice")

    @property
    def detectable(self) -> float:
        """Smallest true mean difference that such a study shows with a probability of 0.8.

        A lower bound, from the spread between the units and the 95 % interval alone: the sign-flip
        test may need more. Infinite if the test cannot show any, NaN without an interval.
        """
        if len(self.seeds) < 2 or self.test.smallest_p * self.family > ALPHA:
            return math.inf
        return self.interval.detectable

    @property
    def sentence(self) -> str:
        """The verdict as text."""
        if not self.cases:
            return "no case in common"
        if reason := self._no_verdict():
            return f"no verdict: {reason}"
        if self.holds:
            rank = "better" if self.better else "worse"
            return f"{self.method} is {rank}: the difference holds"
        return f"no difference shown: {self._doubt()}"

    def _no_verdict(self) -> str:
        """Why there is no verdict, "" if there is one."""
        if max(self.levels) < DICE_FLOOR:
            return f"both mean Dice are below {DICE_FLOOR:g}, so neither model finds the structure"
        if len(self.seeds) < 2:
            return "with one seed a difference may be chance of training"
        return "one case in common gives no interval" if math.isnan(self.interval.low) else ""

    def _doubt(self) -> str:
        over = f"over {self.groups} hospitals " if self.groups > 1 else ""
        if not self.interval.excludes_zero:
            test = "" if self.p > ALPHA else ", although the test alone is significant"
            return f"the interval {over}includes zero{test}"
        if self.test.smallest_p * self.family > ALPHA:
            least = min(1.0, self.test.smallest_p * self.family)
            among = f" among {self.family} comparisons" if self.family > 1 else ""
            few = f"{self.test.units} trainings are too few for a test{among}"
            return f"{few} (p cannot be below {least:.2g})"
        return f"the interval {over}excludes zero, but the corrected test does not confirm it"


def corrected_for_number(differences: Sequence[Difference]) -> list[Difference]:
    """Correct the tests of one table for their number (Holm)."""
    tests = holm([entry.test.p for entry in differences])
    family = sum(not math.isnan(p) for p in tests)
    return [
        replace(entry, corrected=p, family=family)
        for entry, p in zip(differences, tests, strict=True)
    ]


class CaseValues:
    """The values of every case by label and structure, for comparing many pairs of labels.

    Args:
        results: Rows of `results.parquet`.
        unit: Unit of distances; by default that of the results.
    """

    def __init__(self, results: pa.Table | Iterable[Row], unit: str = "") -> None:
        rows = heldout_rows(as_rows(results))
        self.unit = unit or distance_unit(rows)
        self.structures = sorted({str(row["structure"]) for row in rows})
        self.places = sorted({(str(row["heldout"]), str(row["site"])) for row in rows})
        self._values: dict[tuple[str, str, str], Values] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(dict))
        )
        self._left_out: dict[tuple[str, str, str], dict[Place, list[int]]] = defaultdict(dict)
        for row in rows:
            place = str(row["heldout"]), str(row["site"])
            self._count(row, place)
            for metric in (*METRICS, *COMPATIBLE.values()):
                value = value_of(row, metric, self.unit)
                if math.isfinite(value):
                    found = self._values[str(row["method"]), str(row["structure"]), metric]
                    found[place][str(row["case"])][int(row["seed"])] = value

    def _count(self, row: Row, place: Place) -> None:
        for metric in METRICS:
            counts = self._left_out[str(row["method"]), str(row["structure"]), metric].setdefault(
                place, [0, 0]
            )
            counts[0] += undefined(row, metric)
            counts[1] += int(row.get("evaluations", 1))

    def left_out(
        self, method: str, structure: str, metric: str, place: Place | None = None
    ) -> tuple[int, int]:
        """Number of evaluations without a value and of all evaluations, at one or all places."""
        found = self._left_out.get((method, structure, metric), {})
        counts = [found.get(place, [0, 0])] if place else list(found.values())
        return sum(part[0] for part in counts), sum(part[1] for part in counts)

    def of(self, method: str, structure: str, metric: str) -> Values:
        """Values of a label, {} without any."""
        return self._values.get((method, structure, metric), {})

    def cases(self, method: str, structure: str, metric: str) -> dict[Place, list[float]]:
        """Every case's value, averaged over seeds, by place."""
        return {
            place: [float(np.mean(list(seeds.values()))) for _, seeds in sorted(cases.items())]
            for place, cases in self.of(method, structure, metric).items()
        }

    def interval(
        self, method: str, structure: str, metric: str, place: Place | None = None
    ) -> Interval:
        """Mean with interval at one place, or on average over all places (each counts the same)."""
        cases = self.cases(method, structure, metric)
        values = [cases.get(place, [])] if place else [cases[key] for key in sorted(cases)]
        return mean_interval(values, bounds=bounds_of(metric))

    def by_seed(
        self, method: str, structure: str, metric: str, place: Place | None = None
    ) -> dict[int, float]:
        """Mean of every seed at one place, or over all places of the label.

        Cases have the same weight within a place, and places have the same weight. Seeds without a
        value at one of the places are left out.
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
        return {
            seed: float(np.mean(means))
            for seed, means in sorted(found.items())
            if len(means) == len(places)
        }

    def difference(
        self, pair: tuple[str, str], structure: str, metric: str, place: Place | None = None
    ) -> Difference:
        """Compare a pair (label, reference) at one place, or over all places."""
        places = [place] if place else self.places
        first, second = (self.of(name, structure, metric) for name in pair)
        parts = _paired_places(first, second, places)
        means = [
            np.array([np.mean(list(seeds.values())) for seeds in part.values()])
            for part in parts.values()
        ]
        return Difference(
            *pair,
            site=place[1] if place else AVERAGE,
            structure=structure,
            metric=metric,
            unit="" if metric.startswith("dice") else self.unit,
            interval=_interval(parts, means),
            cases=sum(part.size for part in means),
            seeds=_by_seed(parts.values()),
            groups=len(parts),
            test=sign_flips(_trainings(parts)),
            hospitals=len(places),
            by_hospital={
                site: float(part.mean()) for (_, site), part in zip(parts, means, strict=True)
            },
            levels=self._levels(pair, structure, places),
            scored=self._scored(pair, structure, places),
        )

    def _scored(self, pair: tuple[str, str], structure: str, places: Sequence[Place]) -> int:
        """Number of cases for which both labels have a Dice."""
        first, second = (self.of(name, structure, "dice") for name in pair)
        return sum(len(part) for part in _paired_places(first, second, places).values())

    def _levels(
        self, pair: tuple[str, str], structure: str, places: Sequence[Place]
    ) -> tuple[float, float]:
        """Mean Dice of both labels over the places; NaN without a value."""
        found = [self.cases(name, structure, "dice") for name in pair]
        means = [[float(np.mean(part[key])) for key in places if part.get(key)] for part in found]
        first, second = (float(np.mean(part)) if part else NAN for part in means)
        return first, second


def paired_differences(
    results: pa.Table | Iterable[Row], method: str, reference: str
) -> list[Difference]:
    """Compare two labels by structure, metric and hospital, and on average.

    A pair is a (hospital, case, seed) with a value for both labels; pairs are averaged over seeds,
    then over cases. The p values are corrected for the number of comparisons returned.
    """
    return compare_everywhere(CaseValues(results), (method, reference))


def compare_everywhere(values: CaseValues, pair: tuple[str, str]) -> list[Difference]:
    """Compare a pair by structure, metric and place, and on average, as one family."""
    places: list[Place | None] = [*values.places, *([None] if len(values.places) > 1 else [])]
    return corrected_for_number(
        [
            values.difference(pair, structure, metric, place)
            for structure in values.structures
            for metric in COMPARED
            for place in places
        ]
    )


def compare_on_average(
    values: CaseValues,
    pairs: Sequence[tuple[str, str]],
    structures: Sequence[str],
    metrics: Sequence[str] = ("dice", "asd"),
) -> list[Difference]:
    """Compare pairs over all hospitals, as one family, for the tables of claims."""
    place = values.places[0] if len(values.places) == 1 else None
    found = [
        values.difference(pair, structure, metric, place)
        for structure in structures
        for metric in metrics
        for pair in pairs
    ]
    return corrected_for_number(found)


def _interval(parts: Parts, means: Sequence[Floats]) -> Interval:
    """Interval of the mean difference over the units that can vary (see the module docstring)."""
    if not parts:
        return Interval(NAN, NAN, NAN)
    mean = float(np.mean([part.mean() for part in means]))
    seeds = list(_by_seed(parts.values()).values())
    shared = len({heldout for heldout, _ in parts}) == 1  # the same models at all hospitals
    units = [part.mean() for part in means] if len(parts) > 1 else means[0]
    if len(units) < 2:
        return Interval(mean, NAN, NAN)
    components: list[Component] = [component_of(units)]
    components += [component_of(seeds)] if shared and len(seeds) > 1 else []
    return combined_interval(mean, components)


def _trainings(parts: Parts) -> list[float]:
    """Contribution of each training (held-out hospital, seed) to the mean difference."""
    folds: dict[str, list[dict[int, float]]] = defaultdict(list)
    for (heldout, _), part in parts.items():
        folds[heldout].append(_by_seed([part]))
    found = []
    for places in folds.values():
        for seed in sorted({seed for place in places for seed in place}):
            shares = [place[seed] / len(place) for place in places if seed in place]
            found.append(math.fsum(shares) / len(parts))
    return found


def _paired_places(first: Values, second: Values, places: Iterable[Place]) -> Parts:
    """Differences at the places where both labels have a case."""
    pairs = {place: _paired(first.get(place, {}), second.get(place, {})) for place in places}
    return {place: part for place, part in pairs.items() if part}


def _paired(first: Mapping[str, Seeds], second: Mapping[str, Seeds]) -> dict[str, Seeds]:
    """Differences of the cases and seeds that both labels have, in the order of the cases."""
    pairs: dict[str, Seeds] = {}
    for case in sorted(first.keys() & second.keys()):
        shared = sorted(first[case].keys() & second[case].keys())
        if shared:
            pairs[case] = {seed: first[case][seed] - second[case][seed] for seed in shared}
    return pairs


def _by_seed(parts: Iterable[Mapping[str, Seeds]]) -> dict[int, float]:
    """Mean difference by seed: over the cases of a hospital, then over hospitals."""
    means: dict[int, list[float]] = defaultdict(list)
    for part in parts:
        seeds: dict[int, list[Any]] = defaultdict(list)
        for case in part.values():
            for seed, value in case.items():
                seeds[seed].append(value)
        for seed, found in seeds.items():
            means[seed].append(float(np.mean(found)))
    return {seed: float(np.mean(found)) for seed, found in sorted(means.items())}
