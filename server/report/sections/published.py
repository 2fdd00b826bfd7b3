"""Numbers that others printed for the same public data, shown in grey next to the study's own.

They were not reproduced here. Their protocol differs (docs/explanation/protocol.md, "Comparing with
published tables"), and the report says how. The numbers are in `published.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class PublishedRow:
    """One printed row.

    Attributes:
        method: Name of the method.
        values: (domain, structure) values as printed.
        average: The average as printed.
    """

    method: str
    values: tuple[tuple[float, ...], ...]
    average: float

    @property
    def recomputed(self) -> float:
        """The average over domains and structures that follows from the row."""
        found = [value for domain in self.values for value in domain]
        return sum(found) / len(found)

    @property
    def printed_otherwise(self) -> bool:
        """Whether the printed average differs from the row's own in two digits."""
        return abs(self.recomputed - self.average) > 0.005 + 1e-9


@dataclass(frozen=True)
class Published:
    """The printed tables of one data set.

    Attributes:
        structures: Structures of an entry, in order.
        unit: Unit of the printed distances.
        domains: Title of each domain, followed by the site names that it may have, in lower-case
            letters and digits.
        rows: Rows by metric (`dice` in per cent, `asd`).
        protocol: How the printed protocol differs from ours, one sentence each.
        counted: How the printed code computes a metric, for metrics that it computes differently.
    """

    structures: tuple[str, ...]
    unit: str
    domains: tuple[tuple[str, ...], ...]
    rows: Mapping[str, tuple[PublishedRow, ...]]
    protocol: tuple[str, ...]
    counted: Mapping[str, str]

    def domain_of(self, site: str) -> int | None:
        """Return the index of a site's domain, None for a site of another domain."""
        plain = re.sub(r"[^a-z0-9]", "", site.lower())
        found = [place for place, names in enumerate(self.domains) if plain in names[1:]]
        return found[0] if len(found) == 1 else None


ABLATION = {"RAM": "ram", "SgCG": "ram_sgcg"}
"""Rows repeated in the papers' Tables 5 and 6 -> the training method that they correspond to."""


def published_for(data: str, structures: Sequence[str]) -> Published | None:
    """Return the printed tables for a data set's name and structures, None without any."""
    for name, table in published_tables().items():
        if data == name or data.startswith(f"{name}_"):
            return table if sorted(table.structures) == sorted(structures) else None
    return None


@cache
def published_tables() -> dict[str, Published]:
    """Return the tables of `published.yaml` by data set."""
    text = (files("fedsgcg.server.report.sections") / "published.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    common = tree["common_protocol"]
    return {name: _table(entry, common) for name, entry in tree["data_sets"].items()}


def _table(entry: Mapping[str, Any], common: Sequence[str]) -> Published:
    return Published(
        structures=tuple(entry["structures"]),
        unit=entry["unit"],
        domains=tuple(tuple(names) for names in entry["domains"]),
        rows={metric: _rows(text) for metric, text in entry["rows"].items()},
        protocol=(*common, *entry["protocol"]),
        counted=entry["counted"],
    )


def _rows(text: str) -> tuple[PublishedRow, ...]:
    rows = []
    for line in text.strip().splitlines():
        name, *entries, average = line.split()
        values = tuple(tuple(float(part) for part in entry.split("/")) for entry in entries)
        rows.append(PublishedRow(name, values, float(average)))
    return tuple(rows)
