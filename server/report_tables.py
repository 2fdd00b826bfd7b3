"""Numbers of the report: means, bootstrap intervals and paired differences, from rows of `results.parquet`.

Protocol (methods.md 2.7): a case's value is first averaged over seeds, then cases are averaged within a hospital, then
hospitals count the same in the average. A surface distance is undefined when one mask is empty; such a prediction is
left out of the mean and counted. Intervals come from drawing cases anew, with replacement, within each hospital: they
say how much the choice of cases matters, not how much training at random matters (that is what the seeds show).

Legend: M metrics, R resamples, n cases of one hospital.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]

METRICS = ("dice", "asd", "assd", "hd95")
AVERAGE = "average"
RESAMPLES = 2000
LEVEL = 0.95
NAN = float("nan")
_BLOCK = 4_000_000  # random indices drawn at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; NaN where it cannot be known.

    Attributes:
        mean: Mean of the group means.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether both ends lie on the same side of zero; False when an end is unknown."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """Method minus reference at one hospital (or the average), paired by case and seed.

    Attributes:
        method: The method.
        reference: What is subtracted.
        site: Hospital, or `AVERAGE`.
        structure: Structure.
        metric: One of `METRICS`.
        unit: "" for Dice, else pixel or mm.
        interval: Mean difference over cases with its interval.
        cases: Cases that both methods have a value for.
        seeds: Mean difference of each seed, by seed.
        groups: Hospitals in it.
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

    @property
    def sentence(self) -> str:
        """What the interval allows to say, in plain words."""
        if not self.cases:
            return "no case in common"
        if math.isnan(self.interval.low):
            return "one case in common: no interval"
        if not self.interval.excludes_zero:
            return "no difference shown: interval includes zero"
        better = (self.interval.mean > 0) == (self.metric == "dice")
        return f"{self.method} is {'better' if better else 'worse'}: interval excludes zero"


def bootstrap_interval(
    values_by_group: Sequence[npt.ArrayLike], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean of group means, drawing within each group.

    Args:
        values_by_group: One array (n,) a hospital; values that are not finite are left out, empty groups too.
        resamples: Number of resamples R.
        level: Share of resampled means inside the interval.
        seed: Seed of the draw; groups of equal sizes are drawn alike, so that methods are compared on the same draws.

    Returns:
        Mean and interval; all NaN without a value, ends NaN when no group has two values.
    """
    groups = [
        array[np.isfinite(array)] for array in (np.asarray(g, dtype=np.float64).reshape(-1) for g in values_by_group)
    ]
    groups = [group for group in groups if group.size]
    if not groups:
        return Interval(NAN, NAN, NAN)
    mean = float(np.mean([group.mean() for group in groups]))
    if max(group.size for group in groups) < 2:
        return Interval(mean, NAN, NAN)
    rng = np.random.default_rng(seed)
    draws = np.mean([_resampled_means(group, resamples, rng) for group in groups], axis=0)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _resampled_means(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return the means (R,) of `resamples` draws with replacement, in blocks that bound the memory."""
    # Offsets from the first value keep the mean of a constant sample exact.
    offset, rows = values[0], max(1, _BLOCK // values.size)
    shifted = values - offset
    parts = [
        shifted[rng.integers(0, values.size, (min(rows, resamples - start), values.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.asarray(np.concatenate(parts) + offset)


def as_rows(results: pa.Table | Iterable[Row]) -> list[Row]:
    """Return plain rows of a results table or of rows."""
    return list(results.to_pylist() if isinstance(results, pa.Table) else results)


def methods_of(rows: Iterable[Row]) -> list[str]:
    """Methods in a fixed order: `source` (the baseline) first, then by name."""
    return sorted({str(row["method"]) for row in rows}, key=lambda name: (name != "source", name))


def heldout_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of held-out hospitals; all rows where no run held a hospital out."""
    rows = list(rows)
    return [row for row in rows if _judges(row)] or rows


def other_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows beside those of `heldout_rows`: observers, and the validation cases of runs that held nobody out."""
    rows = list(rows)
    return [row for row in rows if not _judges(row)] if any(map(_judges, rows)) else []


def _judges(row: Row) -> bool:
    return bool(row["heldout"]) and row["site"] == row["heldout"]


def distance_unit(rows: Iterable[Row]) -> str:
    """Return `mm` when every measured distance is also known in mm, else the unit of the rows (one unit a study)."""
    rows = list(rows)
    measured = [row for row in rows if any(math.isfinite(number(row, name)) for name in METRICS[1:])]
    in_mm = measured and all(any(math.isfinite(number(row, f"{name}_mm")) for name in METRICS[1:]) for row in measured)
    return "mm" if in_mm else str(rows[0].get("unit") or "pixel") if rows else "pixel"


def number(row: Row, name: str) -> float:
    """Return a row's value as a float; NaN for null or absent."""
    value = row.get(name)
    return NAN if value is None else float(value)


def value_of(row: Row, metric: str, unit: str) -> float:
    """Return a metric of a row, a distance in `unit`."""
    return number(row, f"{metric}_mm" if unit == "mm" and metric != "dice" else metric)


def summary_rows(results: pa.Table | Iterable[Row]) -> list[dict[str, Any]]:
    """Summarise held-out results: one dictionary a method, hospital and structure, and one for the average hospital.

    Keys: method, heldout, site (both `AVERAGE` in the average row), structure, unit (of the distances), cases, seeds
    (sorted list), hospitals (in the row), evaluations (cases times seeds), both_empty (evaluations); and for each m of
    `METRICS`: m_mean, m_sd, m_low, m_high (bootstrap 95 %), m_excluded (evaluations without a value).
    The sd is over cases in a hospital's row and over hospitals in the average row; NaN for a single one.
    """
    rows = heldout_rows(as_rows(results))
    unit = distance_unit(rows)
    cells: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["method"], row["structure"]][row["heldout"], row["site"]].append(row)
    order = {name: position for position, name in enumerate(methods_of(rows))}
    summary = []
    for (method, structure), hospitals in sorted(cells.items(), key=lambda item: (item[0][1], order[item[0][0]])):
        parts = {key: _case_values(part, unit) for key, part in sorted(hospitals.items())}
        for (heldout, site), values in parts.items():
            head = {"method": method, "heldout": heldout, "site": site, "structure": structure, "unit": unit}
            summary.append(head | _facts(hospitals[heldout, site]) | {"hospitals": 1} | _spread([values]))
        if len(parts) > 1:
            head = {"method": method, "heldout": AVERAGE, "site": AVERAGE, "structure": structure, "unit": unit}
            joined = [row for part in hospitals.values() for row in part]
            summary.append(head | _facts(joined) | {"hospitals": len(parts)} | _spread(list(parts.values())))
    return summary


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cases": len({(row["heldout"], row["site"], row["case"]) for row in rows}),
        "seeds": sorted({int(row["seed"]) for row in rows}),
        "evaluations": len(rows),
        "both_empty": sum(bool(row.get("empty_prediction") and row.get("empty_truth")) for row in rows),
    }
    for metric in METRICS:
        facts[f"{metric}_excluded"] = sum(not math.isfinite(number(row, metric)) for row in rows)
    return facts


def _case_values(rows: Sequence[Row], unit: str) -> Floats:
    """Return (n, M): every case's metrics, averaged over the seeds in which they are defined."""
    cases: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        cases[row["case"]].append([value_of(row, metric, unit) for metric in METRICS])
    return np.stack([_nanmean(np.array(cases[name])) for name in sorted(cases)])


def _nanmean(values: Floats) -> Floats:
    """Mean over the first axis of the finite values; NaN where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    return np.asarray(np.where(count > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1), NAN))


def _spread(groups: Sequence[Floats]) -> dict[str, float]:
    """Mean, sd and interval of each metric, for one hospital (sd over cases) or several (sd over hospitals)."""
    spread: dict[str, float] = {}
    for column, metric in enumerate(METRICS):
        values = [group[:, column][np.isfinite(group[:, column])] for group in groups]
        interval = bootstrap_interval(values)
        single = values[0] if len(values) == 1 else np.array([group.mean() for group in values if group.size])
        spread |= {
            f"{metric}_mean": interval.mean,
            f"{metric}_sd": float(np.std(single, ddof=1)) if single.size > 1 else NAN,
            f"{metric}_low": interval.low,
            f"{metric}_high": interval.high,
        }
    return spread


def paired_differences(results: pa.Table | Iterable[Row], method: str, reference: str) -> list[Difference]:
    """Compare two methods on the same cases and seeds, per structure, metric and hospital, and on average.

    A pair is (hospital, case, seed) with a defined value for both methods; pairs are averaged over seeds, then cases.
    """
    rows = heldout_rows(as_rows(results))
    unit = distance_unit(rows)
    differences = []
    for structure in sorted({row["structure"] for row in rows}):
        chosen = [row for row in rows if row["structure"] == structure]
        sites = sorted({(row["heldout"], row["site"]) for row in chosen})
        for metric in METRICS:
            pairs = _pairs(chosen, metric, unit, method, reference)
            parts = [{key: value for key, value in pairs.items() if key[:2] == site} for site in sites]
            named = [(site[1], [part]) for site, part in zip(sites, parts, strict=True)]
            if len(sites) > 1:
                named.append((AVERAGE, parts))
            for name, groups in named:
                differences.append(_difference((method, reference, name, structure, metric, unit), groups))
    return differences


Pairs = dict[tuple[str, str, str, int], float]


def _pairs(rows: Sequence[Row], metric: str, unit: str, method: str, reference: str) -> Pairs:
    """Return (heldout, site, case, seed) -> value of `method` minus value of `reference`."""
    sides: dict[str, Pairs] = {method: {}, reference: {}}
    for row in rows:
        value = value_of(row, metric, unit)
        if row["method"] in sides and math.isfinite(value):
            sides[row["method"]][row["heldout"], row["site"], row["case"], int(row["seed"])] = value
    ours, theirs = sides[method], sides[reference]
    return {key: ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())}


def _difference(names: tuple[str, str, str, str, str, str], groups: Sequence[Pairs]) -> Difference:
    values, by_seed = [], defaultdict(list)
    for group in groups:
        cases = _means({key: (key[2], value) for key, value in group.items()})
        values.append(np.array(list(cases.values())))
        for seed, value in _means({key: (key[3], value) for key, value in group.items()}).items():
            by_seed[seed].append(value)
    method, reference, site, structure, metric, unit = names
    return Difference(
        method=method,
        reference=reference,
        site=site,
        structure=structure,
        metric=metric,
        unit="" if metric == "dice" else unit,
        interval=bootstrap_interval(values),
        cases=sum(part.size for part in values),
        seeds={seed: float(np.mean(part)) for seed, part in sorted(by_seed.items())},
        groups=sum(bool(part.size) for part in values),
    )


def _means(items: Mapping[Any, tuple[Any, float]]) -> dict[Any, float]:
    """Mean of the values that share a key."""
    collected: dict[Any, list[float]] = defaultdict(list)
    for key, value in items.values():
        collected[key].append(value)
    return {key: float(np.mean(part)) for key, part in collected.items()}


def best_methods(rows: Sequence[Mapping[str, Any]], metric: str) -> set[str]:
    """Methods with the best mean among the summary rows of one column; none where all are the same."""
    means = {row["method"]: float(row[f"{metric}_mean"]) for row in rows}
    known = {name: value for name, value in means.items() if math.isfinite(value)}
    if len(set(known.values())) < 2:
        return set()
    target = max(known.values()) if metric == "dice" else min(known.values())
    return {name for name, value in known.items() if value == target}
