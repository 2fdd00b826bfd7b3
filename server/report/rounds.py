"""Curves by round from `rounds.parquet`, and the data sent by each site from its ledger."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsgcg.server.report.reader import Reader
from fedsgcg.server.report.study_files import Cell
from fedsgcg.server.report.tables import Row

Floats = npt.NDArray[np.float64]
RECEIVED = ("validation_dice",)
"""Metrics measured on the model that a site received, which is the result of the previous round."""


@dataclass(frozen=True)
class Curve:
    """A metric by round: mean over seeds, and the lowest and highest seed.

    Attributes:
        rounds: (T,) round numbers.
        mean: (T,) mean over seeds.
        low: (T,) lowest seed.
        high: (T,) highest seed.
        seeds: Number of seeds.
    """

    rounds: Floats
    mean: Floats
    low: Floats
    high: Floats
    seeds: int


def curves(rows: Iterable[Row], metric: str) -> dict[tuple[str, str, str], Curve]:
    """Return (heldout, method, class) -> curve of a metric; class is "" for metrics without one.

    Sites have the same weight within a round and seed; a row for all sites (`site` empty) is used
    where no site has a row.
    """
    found: dict[tuple[str, str, str], dict[int, dict[int, dict[bool, list[float]]]]] = {}
    shift = 1 if metric in RECEIVED else 0
    for row in rows:
        value = row["value"]
        if row["metric"] != metric or value is None or not math.isfinite(value):
            continue
        rounds = found.setdefault((row["heldout"], row["method"], row["cls"] or ""), {})
        seeds = rounds.setdefault(int(row["round"]) - shift, {})
        seeds.setdefault(int(row["seed"]), defaultdict(list))[bool(row["site"])].append(
            float(value)
        )
    return {key: _curve(rounds) for key, rounds in sorted(found.items())}


def _curve(rounds: Mapping[int, Mapping[int, Mapping[bool, list[float]]]]) -> Curve:
    numbers = sorted(rounds)
    by_round = [
        [_mean(sides.get(True) or sides[False]) for sides in rounds[r].values()] for r in numbers
    ]
    return Curve(
        rounds=np.array(numbers, dtype=np.float64),
        mean=np.array([_mean(values) for values in by_round]),
        low=np.array([min(values) for values in by_round]),
        high=np.array([max(values) for values in by_round]),
        seeds=max(len(values) for values in by_round),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def cut_steps(rows: Iterable[Row]) -> str:
    """Describe the hospitals that split their batches because of memory; "" if none did.

    Args:
        rows: Rows of `rounds.parquet`; `micro_batches` is the number of parts of a batch.
    """
    parts: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        if row["metric"] == "micro_batches" and (row["value"] or 0) > 1:
            parts[str(row["site"])].add(int(row["value"]))
    if not parts:
        return ""
    found = [
        f"{site} into {' or '.join(map(str, sorted(numbers)))} parts"
        for site, numbers in sorted(parts.items())
    ]
    return (
        f"batches that did not fit into memory were split: {', '.join(found)}. The effective batch "
        "size is the same; BatchNorm and the Dice term are computed on the parts"
    )


def steps_by_federation(rows: Iterable[Row], federations: Mapping[str, str]) -> dict[str, str]:
    """Return how many consecutive training steps a hospital, or the pooled data, took per round.

    Args:
        rows: Rows of `rounds.parquet`.
        federations: Federation of each label to count.

    Returns:
        "21 to 36" by federation, the fewest and the most; {} if all federations took the same.
    """
    taken: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["metric"] == "steps" and row["value"] is not None and row["method"] in federations:
            taken[federations[row["method"]]].append(float(row["value"]))
    ends = {name: (min(steps), max(steps)) for name, steps in taken.items()}
    if len(set(ends.values())) < 2:
        return {}
    return {
        name: f"{low:.0f} to {high:.0f}" if high > low else f"{low:.0f}"
        for name, (low, high) in ends.items()
    }


@dataclass
class Departures:
    """The data sent by one hospital with one method, over all its cells.

    Attributes:
        method: Method.
        site: Hospital.
        messages: Number of messages.
        rounds: Training rounds that it answered, over all cells.
        parts: Bytes by part of the message, over all messages.
        total: Bytes of all messages.
        withheld: Classes withheld by the privacy floors at least once.
        source: `ledger` (the hospital's own record) or `coordinator` (the bytes received).
    """

    method: str
    site: str
    messages: int = 0
    rounds: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    total: int = 0
    withheld: set[str] = field(default_factory=set)
    source: str = "ledger"

    def per_round(self, part: str) -> float:
        """Bytes of a part per training round; NaN if the hospital trained in none."""
        return self.parts.get(part, 0) / self.rounds if self.rounds else float("nan")


def departures(cells: Sequence[Cell], rounds: Iterable[Row], reader: Reader) -> list[Departures]:
    """Sum the data sent by each hospital.

    The numbers come from the hospitals' ledgers if these are on this machine, else from the bytes
    that the coordinator received.
    """
    found: dict[tuple[str, str], Departures] = {}
    for cell in cells:
        for path in sorted(cell.folder.glob("sites/*/ledger.jsonl")):
            site = path.parent.name
            entry = found.setdefault((cell.method, site), Departures(cell.method, site))
            _add_ledger(entry, reader.lines(path))
    if not found:
        _add_arrivals(found, rounds)
    order = {cell.method: place for place, cell in reversed(list(enumerate(cells)))}
    return sorted(found.values(), key=lambda entry: (order.get(entry.method, 0), entry.site))


def _add_ledger(entry: Departures, lines: Iterable[Mapping[str, Any]]) -> None:
    trained = set()
    for line in lines:
        parts = line.get("parts")
        if not isinstance(parts, dict):
            continue
        entry.messages += 1
        entry.withheld |= {str(name) for name in line.get("withheld", [])}
        if parts.get("weights"):
            trained.add(line.get("round"))
        for name, size in parts.items():
            entry.parts[str(name)] = entry.parts.get(str(name), 0) + int(size)
            entry.total += int(size)
    entry.rounds += len(trained)


def _add_arrivals(found: dict[tuple[str, str], Departures], rounds: Iterable[Row]) -> None:
    for row in rounds:
        if row["metric"] != "bytes_up" or not row["site"] or row["value"] is None:
            continue
        key = str(row["method"]), str(row["site"])
        entry = found.setdefault(key, Departures(*key, source="coordinator"))
        entry.messages += 1
        entry.rounds += row["phase"] == "train"
        entry.total += int(row["value"])
