"""One table of all methods: results with intervals, what each costs, and what leaves a hospital."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, Final

from fedsgcg.server.report.format import DASH, DECIMALS, TITLES, show, show_interval
from fedsgcg.server.report.intervals import NAN, Interval
from fedsgcg.server.report.labels import FEDERATIONS, Label
from fedsgcg.server.report.rounds import curves
from fedsgcg.server.report.study_files import StudyFiles
from fedsgcg.server.report.tables import AVERAGE, Row, methods_of

SHOWN: Final = ("dice", "asd")
FEWEST_METHODS: Final = 2
WITHOUT_FEDERATION: Final = {
    "pooled": "every training image: all are in one place",
    "local": "nothing: each hospital trains alone",
    "best_single": "the model of one hospital",
}
CONTROL_VARIATES: Final = "mean gradients of the rounds, by the site's consent"


@dataclass(frozen=True)
class MethodRow:
    """One label; texts as shown.

    Attributes:
        label: The label.
        results: (value, 95 % interval) of each column of results.
        worst: (lowest Dice of a held-out hospital, its name), Dice averaged over structures; a dash
            unless all held-out hospitals have a result.
        in_domain: Dice of the source hospitals' validation cases at the end of training.
        step: Time of a step relative to the reference.
        bytes: Bytes that a hospital sends in a round.
        leaves: What leaves a hospital.
    """

    label: str
    results: tuple[tuple[str, str], ...]
    worst: tuple[str, str]
    in_domain: str
    step: str
    bytes: str
    leaves: str


@dataclass(frozen=True)
class MethodTable:
    """The table.

    Attributes:
        columns: Titles of the columns of results.
        reference: Label whose step is 1.
        hospitals: Number of held-out hospitals; the results are means over them.
        has_heldout: Whether hospitals were held out.
        rows: The rows, in the order of the report.
    """

    columns: tuple[str, ...]
    reference: str
    hospitals: int
    has_heldout: bool
    rows: tuple[MethodRow, ...]


def method_table(
    study: StudyFiles, summary: Sequence[Mapping[str, Any]], structures: Sequence[str], unit: str
) -> MethodTable | None:
    """Return the table; None for a study of one method, or one whose record lacks what leaves.

    Args:
        study: The study.
        summary: Rows of `study_summary`.
        structures: Structures in order.
        unit: Unit of the distances.
    """
    leaves = study.tree.get("leaves")
    labels = [label for label in study.labels.values() if label.trains]
    methods = {label.trains for label in labels}
    if not isinstance(leaves, Mapping) or len(methods) < FEWEST_METHODS or not summary:
        return None
    averaged = {row["method"]: row for row in summary if row["site"] == AVERAGE}
    chosen = {
        (row["method"], row["structure"]): row
        for row in summary
        if row["site"] == AVERAGE or row["method"] not in averaged
    }
    seconds = step_seconds(study.rounds)
    named = methods_of([{"method": name} for name in seconds])
    reference = next(iter(named), "")
    sent = bytes_sent(study.rounds)
    hospitals = max((int(row["hospitals"]) for row in chosen.values()), default=1)
    lowest = worst_hospitals(summary, hospitals)
    validated = in_domain(study.rounds)
    rows = []
    for label in labels:
        found = [chosen.get((label.name, structure)) for structure in structures]
        results = tuple(_shown(row, metric) for row in found for metric in SHOWN)
        step = DASH
        if label.name in seconds:
            step = show(seconds[label.name] / seconds[reference], 2)
        federated = label.federation == FEDERATIONS[0]
        size = f"{sent[label.name] / 1e6:.2f} MB" if federated and label.name in sent else DASH
        value, name = lowest.get(label.name, (NAN, ""))
        rows.append(
            MethodRow(
                label.name,
                results,
                (show(value, DECIMALS["dice"]), name),
                show(validated.get(label.name, NAN), DECIMALS["dice"]),
                step,
                size,
                _leaving(study, label, leaves),
            )
        )
    has_heldout = any(cell.heldout for cell in study.cells)
    return MethodTable(_columns(structures, unit), reference, hospitals, has_heldout, tuple(rows))


def worst_hospitals(
    summary: Iterable[Mapping[str, Any]], hospitals: int
) -> dict[str, tuple[float, str]]:
    """Return (lowest mean Dice, hospital) of each label, Dice averaged over structures.

    The mean over hospitals hides one at which a model is useless. Labels without a result at all
    hospitals, and studies of one hospital, are left out.

    Args:
        summary: Rows of `study_summary`.
        hospitals: Number of hospitals of the study's averages.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in summary:
        if row["site"] != AVERAGE and math.isfinite(row["dice_mean"]):
            found[row["method"]][row["site"]].append(float(row["dice_mean"]))
    return {
        method: min((mean(values), site) for site, values in sites.items())
        for method, sites in found.items()
        if len(sites) == hospitals > 1
    }


def in_domain(rows: Iterable[Row]) -> dict[str, float]:
    """Return each label's Dice of the source hospitals' validation cases at the end of training.

    The value of the last measured round, averaged over folds and classes. Next to the Dice of
    held-out hospitals it shows whether a method pays for one with the other.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for (_, method, _), curve in curves(rows, "validation_dice").items():
        found[method].append(float(curve.mean[-1]))
    return {method: mean(values) for method, values in found.items()}


def step_seconds(rows: Iterable[Row]) -> dict[str, float]:
    """Return the median time of a step of each label in seconds, loading included.

    The first round, which fills caches, counts only if there is no other.
    """
    parts: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["metric"] in ("seconds", "steps") and row["value"] and row["site"]:
            key = tuple(row[name] for name in ("method", "round", "heldout", "seed", "site"))
            key += (row.get("trained_on"),)
            parts[key][row["metric"]] = float(row["value"])
    by_label: dict[str, dict[bool, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (method, number, *_), found in parts.items():
        if len(found) == 2:
            by_label[method][number == 1].append(found["seconds"] / found["steps"])
    return {name: median(found.get(False) or found[True]) for name, found in by_label.items()}


def bytes_sent(rows: Iterable[Row]) -> dict[str, float]:
    """Return the bytes that a hospital sends in a round, the median over hospitals and rounds."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["metric"] == "bytes_up" and row["value"]:
            found[row["method"]].append(float(row["value"]))
    return {name: median(values) for name, values in found.items()}


def _columns(structures: Sequence[str], unit: str) -> tuple[str, ...]:
    titles = {"dice": TITLES["dice"], "asd": f"{TITLES['asd']}, {unit}"}
    several = len(structures) > 1
    return tuple(
        f"{structure}: {titles[metric]}" if several else titles[metric]
        for structure in structures
        for metric in SHOWN
    )


def _shown(row: Mapping[str, Any] | None, metric: str) -> tuple[str, str]:
    if row is None:
        return DASH, ""
    ends = Interval(row[f"{metric}_mean"], row[f"{metric}_low"], row[f"{metric}_high"])
    interval = show_interval(ends, DECIMALS[metric])
    return show(ends.mean, DECIMALS[metric]), "" if interval == DASH else interval


def _leaving(study: StudyFiles, label: Label, leaves: Mapping[str, Any]) -> str:
    if label.federation in WITHOUT_FEDERATION:
        return WITHOUT_FEDERATION[label.federation]
    text = str(leaves.get(label.trains, DASH)).rstrip(".").replace("`", "")
    federation = study.settings.get(label.name, {}).get("federation")
    rule = federation.get("aggregator") if isinstance(federation, Mapping) else ""
    return f"{text}; {CONTROL_VARIATES}" if rule == "scaffold" else text
