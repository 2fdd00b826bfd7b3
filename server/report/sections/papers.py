"""Tables in the layout of the papers' Tables 1 to 6.

Methods are in rows, held-out hospitals and their average in columns. Dice is in per cent, and
structures are joined by a slash. Several seeds are shown as mean ± standard deviation over the
seeds. A number is bold only if it is the best of its column and every paired difference to the
other rows of the table holds (`server.report.differences`). Rows printed by others are shown in
grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedsgcg.server.report.differences import CaseValues, Place, Values, corrected_for_number
from fedsgcg.server.report.format import DASH, TITLES, show
from fedsgcg.server.report.intervals import Interval
from fedsgcg.server.report.labels import FEDERATION_TITLES, FEDERATIONS, TRAINS, Label, main_labels
from fedsgcg.server.report.sections.cases import count_of
from fedsgcg.server.report.sections.elements import AVERAGE_COLUMN, Column
from fedsgcg.server.report.sections.published import ABLATION, Published, PublishedRow
from fedsgcg.server.report.tables import AVERAGE, COMPATIBLE, METRICS, counted

PAPER_METRICS = ("dice", "asd")
JOINED_AT_MOST = 3  # most structures in one entry
ARMS = {
    "source": (False, False),
    "ram": (True, False),
    "sgcg": (False, True),
    "ram_sgcg": (True, True),
}
"""Parts (RAM, SgCG) of each training method of the ablation."""


@dataclass(frozen=True)
class PaperNumber:
    """One number of an entry.

    Attributes:
        text: The number as shown.
        bold: Whether it is the best of its column and every difference to the others holds.
    """

    text: str
    bold: bool = False


@dataclass(frozen=True)
class PaperCell:
    """One entry; Dice in per cent, distances in the unit of the table.

    Attributes:
        numbers: One number per structure.
        sd: Standard deviation over seeds, "" for one seed.
        interval: 95 % interval over cases in the average, else "".
        notes: What the numbers leave out, or how a printed average was computed.
    """

    numbers: tuple[PaperNumber, ...]
    sd: str = ""
    interval: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperRow:
    """One row.

    Attributes:
        label: Label, or the printed name of a method.
        colour: Index of the palette, None for a printed row.
        parts: Whether the training uses RAM and SgCG, None if it is not an arm of the ablation.
        published: Whether the row was printed by others.
        counted: Whether the metric is computed as in the published code.
        cells: One entry per column, None where the result is missing.
    """

    label: str
    colour: int | None
    parts: tuple[bool, bool] | None
    published: bool
    counted: bool
    cells: tuple[PaperCell | None, ...]


@dataclass(frozen=True)
class PaperGroup:
    """Rows below one heading.

    Attributes:
        title: The heading, "" for none.
        rows: The rows.
    """

    title: str
    rows: tuple[PaperRow, ...]


@dataclass(frozen=True)
class PaperTable:
    """A table in the layout of the papers.

    Attributes:
        title: Metric with its unit, or what the table of an ablation is about.
        structures: Structures of an entry, joined by slashes.
        has_heldout: Whether hospitals were held out.
        columns: Hospitals, and their average if there are several.
        groups: The rows.
        dense: Whether there are too many columns for one line per entry.
    """

    title: str
    structures: str
    has_heldout: bool
    columns: tuple[Column, ...]
    groups: tuple[PaperGroup, ...]
    dense: bool


class Layout:
    """Columns and entries of the papers' tables.

    Args:
        values: Values of every case.
        structures: Structures of one entry, in order.
        sites: Held-out hospitals, in the order of the columns.
        published: Tables printed by others for the same data, if any.
    """

    def __init__(
        self,
        values: CaseValues,
        structures: Sequence[str],
        sites: Sequence[str],
        published: Published | None,
    ) -> None:
        self.values = values
        self.structures = list(structures)
        self.published = published
        self.has_heldout = any(heldout for heldout, _ in values.places)
        if published:
            domains = {site: published.domain_of(site) for site in sites}
            sites = sorted(
                sites, key=lambda site: (domains[site] is None, domains[site] or 0, site)
            )
        places = {site: (heldout, site) for heldout, site in values.places}
        self.columns: list[tuple[str, Place | None]] = [
            (site, places.get(site, (site, site))) for site in sites
        ]
        self.hospitals = len(sites)
        if len(sites) > 1:
            self.columns.append((AVERAGE, None))

    def heads(self) -> tuple[Column, ...]:
        """Titles of the columns, with the papers' domain if it is known."""
        heads = []
        for site, place in self.columns:
            if place is None:
                heads.append(AVERAGE_COLUMN)
                continue
            domain = self.published.domain_of(site) if self.published else None
            detail = "" if domain is None else f"domain {domain + 1}"
            heads.append(Column(site, detail, site))
        return tuple(heads)

    def rows(
        self, labels: Sequence[Label], metric: str, colours: Mapping[str, int]
    ) -> list[PaperRow]:
        """One row per label; the best entry of a column is marked if all its differences hold."""
        best = {site: self._winners(labels, metric, place) for site, place in self.columns}
        return [
            PaperRow(
                label=label.name,
                colour=colours.get(label.name, 0),
                parts=ARMS.get(label.trains),
                published=False,
                counted=False,
                cells=tuple(
                    self._cell(label.name, metric, place, best[site])
                    for site, place in self.columns
                ),
            )
            for label in labels
        ]

    def counted_row(self, row: PaperRow, metric: str) -> list[PaperRow]:
        """The row of a label with the metric as the published code computes it.

        Empty if this changes no shown number, if the published code computes the metric in the same
        way, or if the results do not have the column for every case.
        """
        column = COMPATIBLE.get(metric, "")
        if (
            self.published is None
            or metric not in self.published.counted
            or not self._complete(row.label, column)
        ):
            return []
        empty = [""] * len(self.structures)
        cells = tuple(self._cell(row.label, column, place, empty) for _, place in self.columns)
        if [_texts(cell) for cell in cells] == [_texts(cell) for cell in row.cells]:
            return []
        return [replace(row, counted=True, cells=cells)]

    def _complete(self, name: str, column: str) -> bool:
        """Whether a column is known for every case, seed and structure of a label."""
        return all(
            _keys(self.values.of(name, structure, column))
            == _keys(self.values.of(name, structure, "dice"))
            for structure in self.structures
        )

    def _cell(
        self, name: str, metric: str, place: Place | None, best: Sequence[str]
    ) -> PaperCell | None:
        numbers: list[PaperNumber] = []
        spreads: list[str] = []
        ends: list[str] = []
        notes: list[str] = []
        for structure, winner in zip(self.structures, best, strict=True):
            cases = self.values.cases(name, structure, metric)
            interval = self.values.interval(name, structure, metric, place)
            seeds = list(self.values.by_seed(name, structure, metric, place).values())
            numbers.append(PaperNumber(_shown(interval.mean, metric), winner == name))
            spreads.append(_shown(float(np.std(seeds, ddof=1)), metric) if len(seeds) > 1 else "")
            ends.append(_ends(interval, metric))
            mark = ""
            if metric in METRICS:
                mark = counted(*self.values.left_out(name, structure, metric, place))
            if mark:
                notes.append(f"{structure}: {mark}" if len(self.structures) > 1 else mark)
            if place is None and 0 < len(cases) < self.hospitals:
                notes.append(f"{len(cases)} of {self.hospitals} hospitals")
        if place is None and self.published and len(self.structures) > 1:
            notes.append(f"together {_shown(self._together(name, metric), metric)}")
        if all(number.text == DASH for number in numbers):
            return None
        return PaperCell(
            numbers=tuple(numbers),
            sd="± " + " / ".join(spreads) if all(spreads) else "",
            interval=" / ".join(ends) if place is None and all(ends) else "",
            notes=tuple(dict.fromkeys(notes)),
        )

    def _together(self, name: str, metric: str) -> float:
        """Average over hospitals and structures, as printed in the papers."""
        means = [
            self.values.interval(name, structure, metric).mean for structure in self.structures
        ]
        return float(np.mean(means))

    def _winners(self, labels: Sequence[Label], metric: str, place: Place | None) -> list[str]:
        """Best label of a column for each structure, "" if one of its differences does not hold."""
        return [
            self._winner([label.name for label in labels], structure, metric, place)
            for structure in self.structures
        ]

    def _winner(
        self, names: Sequence[str], structure: str, metric: str, place: Place | None
    ) -> str:
        cases = {name: self.values.cases(name, structure, metric) for name in names}
        if place is None:
            full = {
                name: [np.mean(part) for part in found.values()] for name, found in cases.items()
            }
            means = {
                name: float(np.mean(part))
                for name, part in full.items()
                if len(part) == self.hospitals
            }
        else:
            means = {
                name: float(np.mean(found[place]))
                for name, found in cases.items()
                if found.get(place)
            }
        if len(means) < 2:
            return ""
        first = (max if metric == "dice" else min)(means, key=lambda name: means[name])
        pairs = [(first, name) for name in means if name != first]
        leads = corrected_for_number(
            [self.values.difference(pair, structure, metric, place) for pair in pairs]
        )
        return first if all(lead.holds and lead.better for lead in leads) else ""

    def published_rows(self, metric: str, only: Mapping[str, str] | None = None) -> list[PaperRow]:
        """Rows printed by others for the hospitals of the columns.

        Args:
            metric: Metric of the rows.
            only: Printed name -> training method of the rows to keep; None keeps all.
        """
        rows = self.published.rows[metric] if self.published else ()
        return [
            PaperRow(
                label=row.method,
                colour=None,
                parts=ARMS.get((only or {}).get(row.method, "")),
                published=True,
                counted=False,
                cells=tuple(self._published_cell(row, site, place) for site, place in self.columns),
            )
            for row in rows
            if only is None or row.method in only
        ]

    def _published_cell(self, row: PublishedRow, site: str, place: Place | None) -> PaperCell:
        assert self.published is not None
        if place is None:
            domains = len(self.published.domains)
            notes = [f"the row gives {show(row.recomputed, 2)}"] if row.printed_otherwise else []
            notes += [f"over {domains} domains"] if self.hospitals != domains else []
            return PaperCell((PaperNumber(show(row.average, 2)),), notes=tuple(notes))
        domain = self.published.domain_of(site)
        if domain is None:
            return PaperCell((PaperNumber(DASH),))
        order = [self.published.structures.index(structure) for structure in self.structures]
        return PaperCell(tuple(PaperNumber(show(row.values[domain][place], 2)) for place in order))


def paper_tables(
    layouts: Iterable[Layout], labels: Mapping[str, Label], colours: Mapping[str, int]
) -> list[PaperTable]:
    """Tables 1 to 4: one per metric and layout, labels grouped by federation, printed rows last."""
    tables = []
    for layout in layouts:
        for metric in PAPER_METRICS:
            rows = layout.rows(main_labels(labels), metric, colours)
            federations = [label.federation for label in main_labels(labels)]
            groups = [
                PaperGroup(
                    FEDERATION_TITLES.get(name, name) if len(set(federations)) > 1 else "",
                    tuple(
                        line
                        for row, own in zip(rows, federations, strict=True)
                        if own == name
                        for line in (row, *layout.counted_row(row, metric))
                    ),
                )
                for name in sorted(set(federations), key=lambda name: _place(FEDERATIONS, name))
            ]
            printed = layout.published_rows(metric)
            if printed:
                title = "printed by others, under another protocol"
                groups.append(PaperGroup(title, tuple(printed)))
            title = metric_title(metric, layout.values.unit)
            tables.append(_table(layout, title, groups))
    return tables


def ablation_tables(
    layouts: Iterable[Layout], labels: Mapping[str, Label], colours: Mapping[str, int]
) -> list[PaperTable]:
    """Tables 5 and 6: the effect of RAM and SgCG.

    There is one table per layout and federation with at least three of the four arms. Variants of
    a method are no arms.
    """
    plain = [label for label in labels.values() if label.plain and label.name.split()[0] in ARMS]
    tables = []
    for layout in layouts:
        for federation in FEDERATIONS:
            arms = [label for label in plain if label.federation == federation]
            arms.sort(key=lambda label: _place(TRAINS, label.trains))
            if len(arms) < 3:
                continue
            printed = federation == "pooled" or not any(
                label.federation == "pooled" for label in plain
            )
            groups = []
            for metric in PAPER_METRICS:
                rows = layout.rows(arms, metric, colours)
                rows += layout.published_rows(metric, ABLATION) if printed else []
                groups.append(PaperGroup(metric_title(metric, layout.values.unit), tuple(rows)))
            title = " / ".join(layout.structures)
            if len({label.federation for label in plain}) > 1:
                title = FEDERATION_TITLES[federation]
            tables.append(_table(layout, title, groups))
    return tables


def metric_title(metric: str, unit: str) -> str:
    """Name of a metric with its unit as in the papers' tables."""
    return "Dice, %" if metric == "dice" else f"{TITLES[metric]}, {unit}"


def _table(layout: Layout, title: str, groups: Sequence[PaperGroup]) -> PaperTable:
    return PaperTable(
        title=title,
        structures=" / ".join(layout.structures),
        has_heldout=layout.has_heldout,
        columns=layout.heads(),
        groups=tuple(groups),
        dense=len(layout.columns) > 5,
    )


def layouts_of(
    values: CaseValues, structures: Sequence[str], sites: Sequence[str], published: Published | None
) -> list[Layout]:
    """One layout for all structures, in the printed order if there is one; one each if many."""
    ordered = list(published.structures) if published else list(structures)
    joined = [ordered] if len(ordered) <= JOINED_AT_MOST else [[name] for name in ordered]
    return [Layout(values, part, sites, published) for part in joined if part]


def paper_notes(published: Published | None, tables: Iterable[PaperTable] = ()) -> list[str]:
    """How the printed protocol differs, one sentence each; empty without printed rows.

    Args:
        published: Tables printed by others.
        tables: The papers' tables; rows computed as in the papers are explained.
    """
    if published is None:
        return []
    notes = [
        "The grey rows are copied from the SgCG paper (withdrawn from ICLR 2025) as printed. They "
        "were not reproduced here and must not be compared digit by digit:",
        *published.protocol,
    ]
    rows = (row for table in tables for group in table.groups for row in group.rows)
    if any(row.counted for row in rows):
        notes.append(
            f"A row “computed as in the papers” uses {'; '.join(published.counted.values())}; it "
            "is shown if that changes a number."
        )
    return [
        *notes,
        f"Distances in this table are in {published.unit}s, as printed, even if millimetres are "
        "known.",
        "If a printed average does not follow from its row, the average of the row is given as "
        "well.",
    ]


def seeds_note(values: CaseValues, labels: Iterable[Label]) -> str:
    """Describe the entries of the papers' tables: mean and spread over seeds."""
    numbers = {
        len(values.by_seed(label.name, structure, "dice"))
        for label in labels
        for structure in values.structures
    }
    seeds = max(numbers, default=0)
    if seeds > 1:
        return f"mean ± standard deviation over {count_of(seeds, 'seed')}"
    return "mean of one seed"


def _keys(values: Values) -> set[tuple[Place, str, int]]:
    return {
        (place, case, seed)
        for place, cases in values.items()
        for case, seeds in cases.items()
        for seed in seeds
    }


def _texts(cell: PaperCell | None) -> list[str]:
    """The numbers of an entry as shown; none where the result is missing."""
    return [number.text for number in cell.numbers] if cell else []


def _shown(value: float, metric: str) -> str:
    return show(100 * value if metric.startswith("dice") else value, 2)


def _ends(interval: Interval, metric: str) -> str:
    if not math.isfinite(interval.low):
        return ""
    places, factor = (1, 100) if metric.startswith("dice") else (2, 1)
    return f"{show(factor * interval.low, places)} to {show(factor * interval.high, places)}"


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
