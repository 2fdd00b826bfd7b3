"""What happened round by round: curves from `rounds.parquet`, and what left each hospital from the sites' ledgers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from server.report.reader import Reader
from server.report.study_files import Cell
from server.report.tables import Row

Floats = npt.NDArray[np.float64]
RECEIVED = (
    "validation_dice",
)  # measured on the model a site received, which is the outcome of the round before


@dataclass(frozen=True)
class Curve:
    """A figure of every round: mean over seeds, and the lowest and highest seed.

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
    """Return (heldout, method, class) -> curve of a metric; class is "" for figures that have none.

    Sites count the same within a round and seed; a row for all sites (`site` empty) is used where no site has one.
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
    """Say which hospitals took their training steps in parts because the memory did not hold them whole; "" for none.

    Args:
        rows: Rows of `rounds.parquet`; `micro_batches` is the number of parts of a step.
    """
    parts: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        if row["metric"] == "micro_batches" and (row["value"] or 0) > 1:
            parts[str(row["site"])].add(int(row["value"]))
    if not parts:
        return ""
    told = [
        f"{site} in {' or '.join(map(str, sorted(numbers)))}"
        for site, numbers in sorted(parts.items())
    ]
    return (
        f"parts of a training step that the memory did not hold whole: {', '.join(told)}. The effective batch is the "
        "same; BatchNorm and the Dice term see the parts"
    )


def steps_by_federation(rows: Iterable[Row], federations: Mapping[str, str]) -> dict[str, str]:
    """Return how many training steps a hospital, or the pooled place, took one after the other in a round.

    Args:
        rows: Rows of `rounds.parquet`.
        federations: Federation of each label to count.

    Returns:
        "21 to 36" by federation, the fewest and the most; nothing where every federation took the same.
    """
    taken: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["metric"] == "steps" and row["value"] is not None and row["method"] in federations:
            taken[federations[row["method"]]].append(float(row["value"]))
    ends = {name: (min(steps), max(steps)) for name, steps in taken.items()}
    if len(set(ends.values())) < 2:
        return {}
    return {
        name: f"{low:.0f}" + (f" to {high:.0f}" if high > low else "")
        for name, (low, high) in ends.items()
    }


@dataclass
class Departures:
    """What left one hospital with one method, over all cells in which it took part.

    Attributes:
        method: Method.
        site: Hospital.
        messages: Number of messages.
        rounds: Rounds of training it answered, over all cells.
        parts: Bytes by part of the message, over all messages.
        total: Bytes of all messages.
        withheld: Classes that the floors kept back at least once.
        source: `ledger` (the hospital's own book) or `coordinator` (what arrived).
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
        """Bytes of a part in a round of training; NaN when the hospital trained in none."""
        return self.parts.get(part, 0) / self.rounds if self.rounds else float("nan")


def departures(cells: Sequence[Cell], rounds: Iterable[Row], reader: Reader) -> list[Departures]:
    """Sum up what left each hospital: from its ledger where that is on this machine, else from what arrived."""
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
