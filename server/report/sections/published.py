"""Numbers that others printed for the same public data, to stand beside ours in grey. Facts only (methods.md 1.11).

They were not reproduced here, and their protocol differs (methods.md 2.7); the table says how, in words. A row holds
one entry a domain, structures joined by a slash, then the average as printed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
        """Whether the printed average is not the row's own to two digits."""
        return abs(self.recomputed - self.average) > 0.005 + 1e-9


@dataclass(frozen=True)
class Published:
    """The printed tables of one data set.

    Attributes:
        structures: Structures of an entry, in order.
        unit: Unit of the printed distances.
        domains: Names that a site of each domain may have, in letters and digits; the first is the name in words.
        rows: Rows by metric (`dice` in per cent, `asd`).
        protocol: How the printed protocol differs from ours, one sentence each.
        counted: Metrics that the printed code counts otherwise than we do, and how, by metric.
    """

    structures: tuple[str, ...]
    unit: str
    domains: tuple[tuple[str, ...], ...]
    rows: Mapping[str, tuple[PublishedRow, ...]]
    protocol: tuple[str, ...]
    counted: Mapping[str, str]

    def domain_of(self, site: str) -> int | None:
        """Return the place of a site's domain, None for a site that is none of them."""
        plain = re.sub(r"[^a-z0-9]", "", site.lower())
        found = [place for place, names in enumerate(self.domains) if plain in names[1:]]
        return found[0] if len(found) == 1 else None


ABLATION = {"RAM": "ram", "SgCG": "ram_sgcg"}
"""Rows that the papers' Tables 5 and 6 repeat, by the training method that they correspond to."""


def published_for(data: str, structures: Sequence[str]) -> Published | None:
    """Return the printed tables for a data set, None where there are none for its name and structures."""
    found = next(
        (table for name, table in PUBLISHED.items() if data == name or data.startswith(f"{name}_")),
        None,
    )
    return found if found is not None and sorted(found.structures) == sorted(structures) else None


def _rows(text: str) -> tuple[PublishedRow, ...]:
    rows = []
    for line in text.strip().splitlines():
        name, *entries, average = line.split()
        values = tuple(tuple(float(part) for part in entry.split("/")) for entry in entries)
        rows.append(PublishedRow(name, values, float(average)))
    return tuple(rows)


_COMMON = (
    "Their figures are means of three runs, printed without a spread; each of ours says how many seeds it has.",
    "The code that theirs builds on evaluates the unseen hospital in every epoch and keeps the best model of it; which "
    "model theirs is, is not said. Here the held-out hospital never chooses a model.",
    "That code tests with the batch's own normalisation statistics unless told otherwise; here normalisation is in "
    "evaluation mode.",
)
_FUNDUS = (
    "Their test set is the test part of the unseen site, training uses the train parts of the others (256 × 256 "
    "pixels, 400 epochs); the protocol box above says what was done here.",
    "Their Dice adds 1 above and below; an empty prediction counts as a distance of 100 pixels. Here Dice is plain, "
    "and an undefined distance is left out and counted.",
)
_PROSTATE = (
    "Training there: 384 × 384 pixels, 200 epochs; the protocol box above says what was done here.",
    "That code blanks slices without a true prostate, may skip the last slices of a volume, and turns an empty "
    "prediction into a whole volume; here every slice is predicted, truth is not used, and empty stays empty.",
)

PUBLISHED: dict[str, Published] = {
    "fundus": Published(
        structures=("cup", "disc"),
        unit="pixel",
        domains=(
            ("Drishti-GS", "domain1", "drishti", "drishtigs", "gdrishti"),
            ("RIM-ONE r3", "domain2", "rim", "rimone", "rimoner3"),
            ("REFUGE train", "domain3", "refugetrain", "refuge1"),
            ("REFUGE validation", "domain4", "refugeval", "refugevalidation", "refuge2"),
        ),
        rows={
            "dice": _rows("""
                Source 81.44/95.52 77.20/87.96 85.11/94.56 72.30/90.97 85.63
                JiGen 82.45/95.03 77.05/87.25 87.01/94.94 80.88/91.34 86.99
                BigAug 77.68/93.32 75.56/87.54 83.33/92.68 81.63/92.20 85.49
                SAML 83.72/95.03 77.68/87.57 84.20/94.49 82.08/92.78 87.19
                FedDG 81.72/95.62 77.87/88.71 83.96/94.83 81.90/93.37 87.25
                DoFE 84.17/94.96 81.03/89.29 86.54/91.67 87.28/93.04 88.50
                RAM 85.48/95.75 78.82/89.43 87.44/94.67 85.84/94.10 88.94
                SgCG 86.65/95.92 80.40/90.39 87.48/95.07 86.27/94.18 89.55"""),
            "asd": _rows("""
                JiGen 18.57/9.43 17.29/19.53 9.15/6.99 15.84/12.14 13.62
                BigAug 22.61/12.53 17.95/17.64 11.48/10.33 11.57/9.36 14.18
                SAML 17.08/9.01 16.72/18.63 10.87/7.87 16.28/8.64 13.14
                FedDG 18.57/7.69 15.87/16.93 11.09/7.28 10.23/7.51 11.90
                DoFE 16.07/7.78 13.44/17.06 10.12/10.75 8.14/7.29 11.26
                RAM 16.05/7.12 14.01/13.86 9.02/7.11 8.29/7.06 10.32
                SgCG 14.62/7.31 12.96/12.21 8.46/6.57 7.54/6.64 9.54"""),
        },
        protocol=(*_COMMON, *_FUNDUS),
        counted={
            "dice": "Dice (2 I + 1) / (P + G + 1) of I pixels in both, P predicted and G true",
            "asd": "a distance of 100 pixels where one mask is empty",
        },
    ),
    "prostate": Published(
        structures=("prostate",),
        unit="voxel",
        domains=(
            ("RUNMC", "domain1", "runmc", "isbi"),
            ("BMC", "domain2", "bmc", "isbi15"),
            ("I2CVB", "domain3", "i2cvb"),
            ("UCL", "domain4", "ucl"),
            ("BIDMC", "domain5", "bidmc"),
            ("HK", "domain6", "hk"),
        ),
        rows={
            "dice": _rows("""
                Source 85.30 87.56 82.33 87.37 80.49 81.40 84.04
                JiGen 85.45 89.26 85.92 87.45 86.18 83.08 86.22
                BigAug 85.73 89.12 84.49 88.02 81.95 87.63 86.19
                SAML 85.88 88.72 85.03 88.44 86.72 87.56 87.05
                FedDG 86.12 89.24 85.30 88.95 85.93 86.65 87.03
                DoFE 88.89 87.88 85.08 89.06 86.15 87.03 87.34
                RAM 87.56 89.35 86.88 87.34 86.98 88.02 87.68
                SgCG 87.96 90.42 87.23 89.17 86.78 88.32 88.34"""),
            "asd": _rows("""
                Source 1.22 1.95 4.68 1.51 3.95 4.23 2.92
                JiGen 1.11 1.81 2.61 1.66 1.71 2.43 1.89
                BigAug 1.13 1.78 4.01 1.25 1.92 1.89 2.00
                SAML 1.08 1.56 2.49 1.42 2.01 1.87 1.73
                FedDG 1.32 1.68 2.32 1.37 2.18 1.95 1.80
                DoFE 0.92 1.44 2.88 1.46 1.92 1.63 1.71
                RAM 1.09 0.83 2.32 1.32 1.64 1.21 1.40
                SgCG 0.92 0.74 2.17 1.02 1.67 0.93 1.24"""),
        },
        protocol=(*_COMMON, *_PROSTATE),
        counted={
            "asd": "a distance of 100 voxels where one mask is empty (that code makes a whole volume of it)"
        },
    ),
}
