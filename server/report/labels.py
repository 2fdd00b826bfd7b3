"""Labels of what a study compares, such as "sgcg", "sgcg pooled" or "ram_sgcg weight=0.5".

A label is a training method in a federation, possibly with swept settings. The files of a study
have columns for these parts; older files have only the label, which is then parsed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsgcg.common.settings.training import METHOD_NAMES

Row = Mapping[str, Any]
Swept = tuple[tuple[str, str], ...]  # swept settings as (name, value)

TRAINS = METHOD_NAMES
"""Training methods in the order of the ablation: neither part, one, the other, both."""
BEST_SINGLE = "best_single"
"""Rows of the best hospital's own model, which are copies of rows of `local`."""
FEDERATIONS = ("by_site", "pooled", "local", BEST_SINGLE)
FEDERATION_TITLES = {
    "by_site": "federated: every hospital trains on its own images",
    "pooled": "pooled: the images of all training hospitals are in one place",
    "local": "local: one hospital trains alone (mean over the hospitals)",
    BEST_SINGLE: "best_single: of these the model that does best at the other training hospitals",
}
MOST_COLOURS = 6  # labels that can be distinguished in one figure


@dataclass(frozen=True)
class Label:
    """One thing that is compared.

    Attributes:
        name: The label itself.
        trains: Training method.
        federation: by_site, pooled or local.
        setting: Swept settings as (name, value), in order.
    """

    name: str
    trains: str
    federation: str
    setting: Swept = ()

    @property
    def plain(self) -> bool:
        """Whether no setting is swept."""
        return not self.setting


def read_label(row: Row) -> Label:
    """Parse a label from the columns of its row, or from its name if a column is absent.

    Args:
        row: Has `method`; may have `trains`, `federation` and `setting`.
    """
    name = str(row["method"])
    words = name.split()
    federations = [word for word in words if word in FEDERATIONS] or ["by_site"]
    federation = str(row.get("federation") or federations[0])
    stated = row.get("setting")
    parts = str(stated).split() if stated is not None else words
    setting = tuple(
        (left, right)
        for left, sign, right in (part.partition("=") for part in parts)
        if sign and left
    )
    return Label(name, str(row.get("trains") or (words[0] if words else name)), federation, setting)


def labels_of(rows: Iterable[Row]) -> dict[str, Label]:
    """Return the labels of the rows by name, in the order of the report.

    A label is parsed from its first row.
    """
    found: dict[str, Label] = {}
    for row in rows:
        if str(row["method"]) not in found:
            found[str(row["method"])] = read_label(row)
    return {name: found[name] for name in sorted(found, key=label_order)}


def label_order(name: str) -> tuple[Any, ...]:
    """Sort key of a label: method (in the order of the ablation), federation, settings."""
    label = read_label({"method": name})
    method = TRAINS.index(label.trains) if label.trains in TRAINS else len(TRAINS)
    place = (
        FEDERATIONS.index(label.federation) if label.federation in FEDERATIONS else len(FEDERATIONS)
    )
    return method, label.trains, place, _natural(name), name


def value_order(text: str) -> tuple[float, str]:
    """Sort key of a setting's value: numbers in ascending order, then text."""
    number = numeric(text)
    return (math.inf, text) if math.isnan(number) else (number, "")


def numeric(text: str) -> float:
    """Return a setting's value as a number; NaN for text."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _natural(text: str) -> tuple[tuple[float, str], ...]:
    return tuple(value_order(part) for part in re.split(r"[ =]", text))


@dataclass(frozen=True)
class Group:
    """Labels that one figure shows together.

    Attributes:
        title: What they have in common, "" if there is only one group.
        labels: The labels, in order, at most `MOST_COLOURS`.
        left_out: Number of labels of the group that no figure shows.
    """

    title: str
    labels: tuple[str, ...]
    left_out: int = 0


def main_labels(labels: Mapping[str, Label]) -> list[Label]:
    """Labels without a swept setting, or all labels if every one has one."""
    return [label for label in labels.values() if label.plain] or list(labels.values())


def _by_federation(labels: Mapping[str, Label]) -> dict[str, list[str]]:
    """Return the names of the main labels of each federation, in order."""
    found: dict[str, list[str]] = {}
    for label in main_labels(labels):
        found.setdefault(label.federation, []).append(label.name)
    order = sorted(found, key=lambda name: FEDERATIONS.index(name) if name in FEDERATIONS else 9)
    return {name: found[name] for name in order}


def figure_groups(labels: Mapping[str, Label]) -> list[Group]:
    """Group the main labels by federation; a group shares a figure."""
    found = _by_federation(labels)
    return [
        Group(
            FEDERATION_TITLES.get(federation, federation) if len(found) > 1 else "",
            tuple(names[:MOST_COLOURS]),
            max(0, len(names) - MOST_COLOURS),
        )
        for federation, names in found.items()
    ]


def label_colours(labels: Mapping[str, Label]) -> dict[str, int]:
    """Colour index of every label.

    Labels have the colour of their training method, or their own if labels of one method have the
    same federation.
    """
    methods = list(dict.fromkeys(label.trains for label in labels.values()))
    colours = {name: methods.index(label.trains) for name, label in labels.items()}
    for names in _by_federation(labels).values():
        if len({colours[name] for name in names}) < len(names):
            colours |= {name: place for place, name in enumerate(names)}
    return colours


def main_pairs(labels: Mapping[str, Label]) -> list[tuple[str, str]]:
    """Return (label, reference) of the study's main comparisons, within one federation.

    Each part is compared with the same training without it: RAM with source, SgCG with source, both
    together with each one and with source. Other methods are compared with source, or with the
    first label if there is no source. A variant of a method is compared with the method, its first
    label, and with source.
    """
    pairs: list[tuple[str, str]] = []
    for names in _by_federation(labels).values():
        first = {labels[name].trains: name for name in reversed(names)}
        for name in names:
            trains = labels[name].trains
            parts = _references(trains, list(first))
            if name != first[trains]:
                parts = [trains, *(["source"] if "source" in first and trains != "source" else [])]
            pairs += [(name, first[part]) for part in parts]
    return pairs


def _references(trains: str, present: Sequence[str]) -> list[str]:
    wanted = {"ram": ["source"], "sgcg": ["source"], "ram_sgcg": ["ram", "sgcg", "source"]}.get(
        trains, ["source"]
    )
    usable = [part for part in wanted if part in present and part != trains]
    return usable or [part for part in present[-1:] if part != trains]
