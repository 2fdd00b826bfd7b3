"""Sections of the report on swept settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsgcg.server.report.differences import CaseValues, compare_on_average
from fedsgcg.server.report.figures.plots import (
    GREY,
    LEVEL_DASHES,
    Dot,
    Point,
    Series,
    dot_panel,
    is_logarithmic,
    sweep_panel,
)
from fedsgcg.server.report.format import DECIMALS, show, show_interval
from fedsgcg.server.report.labels import MOST_COLOURS, Label, Swept, numeric, value_order
from fedsgcg.server.report.sections.claims import Claims, claims_section
from fedsgcg.server.report.sections.elements import Panel, TitledDrawing
from fedsgcg.server.report.tables import counted

METRICS = ("dice", "asd")
HELD_OUT = "held-out hospitals"
VALIDATION = "the hospitals’ own validation cases"
Family = tuple[str, str, Swept]  # training method, federation, the other swept settings


@dataclass(frozen=True)
class Sweep:
    """One swept setting.

    Attributes:
        name: Name of the setting.
        lines: Labels by value in order, for every family of labels that differ only in this
            setting.
        usual: Label without the sweep and its value, by family, if the settings contain it.
    """

    name: str
    lines: dict[Family, dict[str, str]]
    usual: dict[Family, tuple[str, str]]

    @property
    def numbers(self) -> bool:
        """Whether every value is a number."""
        return not any(math.isnan(numeric(value)) for line in self.all_lines() for value in line)

    def all_lines(self) -> list[dict[str, str]]:
        """Labels by value of every family, including the usual one."""
        return [self.line(family) for family in self.lines]

    def line(self, family: Family) -> dict[str, str]:
        """Labels of a family by value, including the usual one, in the order of the values."""
        found = dict(self.lines[family])
        if family in self.usual:
            found.setdefault(self.usual[family][1], self.usual[family][0])
        return {value: found[value] for value in sorted(found, key=value_order)}

    def is_usual(self, family: Family, value: str) -> bool:
        """Whether a value is that of the runs without the sweep."""
        return family in self.usual and self.usual[family][1] == value


@dataclass(frozen=True)
class Baseline:
    """A label without the setting, drawn as a grey line.

    Attributes:
        title: The label.
        dash: Dash pattern of its line, in pixels as in SVG.
    """

    title: str
    dash: str


@dataclass(frozen=True)
class LineKey:
    """Entry of the key to the lines.

    Attributes:
        title: Name of the line.
        colour: Index of the palette.
    """

    title: str
    colour: int


@dataclass(frozen=True)
class SweepCell:
    """Result with one value in one metric, as shown.

    Attributes:
        value: Mean over cases; distances in the unit of the sweep.
        interval: 95 % interval of the mean over cases, a dash if unknown.
        note: What the mean leaves out, "" for nothing.
    """

    value: str
    interval: str
    note: str


@dataclass(frozen=True)
class SweepRow:
    """Results with one value of the setting.

    Attributes:
        line: Name of the line.
        value: Value of the setting.
        usual: Whether it is the value of the runs without the sweep.
        cells: One cell per structure and metric.
    """

    line: str
    value: str
    usual: bool
    cells: tuple[SweepCell, ...]


@dataclass(frozen=True)
class SweepResults:
    """Results of one swept setting.

    Attributes:
        name: Name of the setting.
        logarithmic: Whether the axis of the setting is logarithmic.
        usual: Whether the values include that of the runs without the sweep.
        baselines: Labels without the setting, if they are lines of the figure.
        key: Lines of the figure.
        left_out: Number of lines that are only in the table.
        panels: The figures.
        rows: All values.
        claims: Differences to the usual value, or to the first.
        unit: Unit of the distances.
        note: Which distances leave out evaluations, "" for none.
    """

    name: str
    logarithmic: bool
    usual: bool
    baselines: tuple[Baseline, ...]
    key: tuple[LineKey, ...]
    left_out: int
    panels: tuple[Panel, ...]
    rows: tuple[SweepRow, ...]
    claims: Claims
    unit: str
    note: str

    @property
    def drawings(self) -> list[TitledDrawing]:
        """Every drawing with its titles."""
        return [((self.name, panel.title), panel.drawing) for panel in self.panels]


def sweeps_of(
    labels: Mapping[str, Label], settings: Mapping[str, Mapping[str, Any]]
) -> list[Sweep]:
    """Find the swept settings: those with two or more values while all else is equal.

    Args:
        labels: Labels of the study.
        settings: Resolved settings by label, for the value of the label without the sweep.
    """
    names = dict.fromkeys(name for label in labels.values() for name, _ in label.setting)
    sweeps = []
    for name in names:
        lines: dict[Family, dict[str, str]] = {}
        for label in labels.values():
            if name in dict(label.setting):
                lines.setdefault(_family(label, name), {})[dict(label.setting)[name]] = label.name
        usual: dict[Family, tuple[str, str]] = {}
        for label in labels.values():
            if label.plain and _family(label, name) in lines:
                value = _looked_up(settings.get(label.name, {}), name)
                usual |= {_family(label, name): (label.name, value)} if value else {}
        kept = {
            family: line
            for family, line in lines.items()
            if len({*line, usual.get(family, ("", ""))[1]} - {""}) > 1
        }
        if kept:
            sweeps.append(Sweep(name, kept, usual))
    return sweeps


def _family(label: Label, name: str) -> Family:
    return label.trains, label.federation, tuple(part for part in label.setting if part[0] != name)


def _looked_up(tree: Mapping[str, Any], name: str) -> str:
    """Value of a setting by its dotted name, or its last part if unique; "" if unknown."""
    parts = name.split(".")
    found: Any = tree
    for part in parts:
        found = found.get(part) if isinstance(found, Mapping) else None
    if found is None and len(parts) == 1:
        inner = [
            group[name] for group in tree.values() if isinstance(group, Mapping) and name in group
        ]
        found = inner[0] if len(inner) == 1 else None
    if found is None or isinstance(found, (Mapping, list)):
        return ""
    return f"{found:g}" if isinstance(found, float) else str(found)


def sweep_sections(
    sweeps: Sequence[Sweep],
    labels: Mapping[str, Label],
    values: CaseValues,
    structures: Sequence[str],
    colours: Mapping[str, int],
    place: str = HELD_OUT,
) -> list[SweepResults]:
    """One section per swept setting: figures, values, and differences to the usual or first value.

    Args:
        sweeps: The swept settings.
        labels: Labels of the study.
        values: Values of every case.
        structures: Names of the structures.
        colours: Index of the palette by label.
        place: Name of the evaluated cases.
    """
    return [
        _sweep_section(sweep, _baselines(sweep, labels), values, structures, colours, place)
        for sweep in sweeps
    ]


def _baselines(sweep: Sweep, labels: Mapping[str, Label]) -> list[str]:
    """Labels without the setting, from the federations of the sweep."""
    federations = {federation for _, federation, _ in sweep.lines}
    usual = {label for label, _ in sweep.usual.values()}
    plain = [label for label in labels.values() if label.plain and label.federation in federations]
    return [label.name for label in plain if label.name not in usual][: len(LEVEL_DASHES)]


def _sweep_section(
    sweep: Sweep,
    baselines: Sequence[str],
    values: CaseValues,
    structures: Sequence[str],
    colours: Mapping[str, int],
    place: str,
) -> SweepResults:
    families = list(sweep.lines)
    pairs = []
    for family in families:
        line = sweep.line(family)
        reference = sweep.usual[family][0] if family in sweep.usual else next(iter(line.values()))
        pairs += [(label, reference) for label in line.values() if label != reference]
    claims = claims_section(compare_on_average(values, pairs, structures, METRICS), structures)
    drawn = {family: place for place, family in enumerate(families[:MOST_COLOURS])}
    if len({family[0] for family in drawn}) == len(drawn):
        # With one line per method, every line has the colour of its method.
        drawn = {
            family: colours.get(next(iter(sweep.lines[family].values())), 0) for family in drawn
        }
    panels = tuple(
        panel
        for name in structures
        for panel in _sweep_panels(sweep, drawn, baselines, values, name, place)
    )
    shown = list(
        dict.fromkeys(
            [*(label for line in sweep.all_lines() for label in line.values()), *baselines]
        )
    )
    return SweepResults(
        name=sweep.name,
        logarithmic=sweep.numbers and is_logarithmic(_numbers(sweep)),
        usual=bool(sweep.usual),
        baselines=tuple(
            Baseline(label, " ".join(f"{part:g}" for part in dash))
            for label, dash in zip(baselines, LEVEL_DASHES, strict=False)
            if sweep.numbers
        ),
        key=tuple(LineKey(_family_title(family), index) for family, index in drawn.items()),
        left_out=len(families) - len(drawn),
        panels=panels,
        rows=tuple(
            row for family in families for row in _sweep_rows(sweep, family, values, structures)
        ),
        claims=claims,
        unit=values.unit,
        note=distance_note(values, shown, structures),
    )


def _numbers(sweep: Sweep) -> list[float]:
    return sorted({numeric(value) for line in sweep.all_lines() for value in line})


def _sweep_panels(
    sweep: Sweep,
    drawn: Mapping[Family, int],
    baselines: Sequence[str],
    values: CaseValues,
    structure: str,
    place: str,
) -> list[Panel]:
    titles = ["Dice", f"ASD, {values.unit}"]
    series = [
        Series(_family_title(family), index, tuple(_points(sweep, family, values, structure)))
        for family, index in drawn.items()
    ]
    ends = "; ".join(f"{line.title} {_means_text(line)}" for line in series)
    levels = {
        label: tuple(values.interval(label, structure, metric) for metric in METRICS)
        for label in baselines
    }
    ends += "".join(f"; {label} {show(level[0].mean, 3)}" for label, level in levels.items())
    alt = f"{structure}: mean Dice over {place} by {sweep.name}. {ends}."
    if sweep.numbers:
        drawing = sweep_panel(series, sweep.name, titles, alt, list(levels.values()))
        return [Panel(structure, drawing)]
    panels = []
    for number, title in enumerate(titles):
        dots = [
            Dot(label, level[number], GREY)
            for label, level in levels.items()
            if math.isfinite(level[number].mean)
        ]
        dots += [
            Dot(
                _dot_title(line, point, series),
                point.intervals[number],
                line.colour,
                point is line.points[0] and bool(order or dots),
                point.usual,
            )
            for order, line in enumerate(series)
            for point in line.points
            if math.isfinite(point.intervals[number].mean)
        ]
        if dots:
            panels.append(Panel(f"{structure}, {title}", dot_panel(dots, title, alt)))
    return panels


def _means_text(line: Series) -> str:
    return ", ".join(f"{point.value}: {show(point.intervals[0].mean, 3)}" for point in line.points)


def _dot_title(line: Series, point: Point, series: Sequence[Series]) -> str:
    return point.value if len(series) == 1 else f"{line.title}: {point.value}"


def _points(sweep: Sweep, family: Family, values: CaseValues, structure: str) -> list[Point]:
    return [
        Point(
            value,
            numeric(value),
            tuple(values.interval(label, structure, metric) for metric in METRICS),
            sweep.is_usual(family, value),
        )
        for value, label in sweep.line(family).items()
    ]


def _family_title(family: Family) -> str:
    trains, federation, rest = family
    words = [
        trains,
        *([] if federation == "by_site" else [federation]),
        *(f"{name}={value}" for name, value in rest),
    ]
    return " ".join(words)


def _sweep_rows(
    sweep: Sweep, family: Family, values: CaseValues, structures: Sequence[str]
) -> list[SweepRow]:
    rows = []
    for value, label in sweep.line(family).items():
        cells = []
        for structure in structures:
            for metric in METRICS:
                interval, places = values.interval(label, structure, metric), DECIMALS[metric]
                note = counted(*values.left_out(label, structure, metric))
                shown = show(interval.mean, places), show_interval(interval, places)
                cells.append(SweepCell(*shown, note))
        usual = sweep.is_usual(family, value)
        rows.append(SweepRow(_family_title(family), value, usual, tuple(cells)))
    return rows


def distance_note(values: CaseValues, labels: Sequence[str], structures: Sequence[str]) -> str:
    """State which mean distances of a figure leave out evaluations, "" if none does."""
    parts = []
    for label in labels:
        for structure in structures:
            if mark := counted(*values.left_out(label, structure, "asd")):
                parts.append(f"{label}{f', {structure}' if len(structures) > 1 else ''}: {mark}")
    text = (
        "If one mask is empty there is no distance; the ASD is then the mean over the other "
        "evaluations"
    )
    return f"{text} ({'; '.join(parts)})." if parts else ""
