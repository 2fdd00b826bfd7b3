"""Section of the report on the cost of federation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsgcg.server.report.differences import CaseValues, compare_on_average
from fedsgcg.server.report.figures.plots import Dot, dot_panel
from fedsgcg.server.report.format import DECIMALS, TITLES, show
from fedsgcg.server.report.labels import FEDERATIONS, Label
from fedsgcg.server.report.rounds import steps_by_federation
from fedsgcg.server.report.sections.claims import Claims, claims_section, federation_pairs
from fedsgcg.server.report.sections.elements import Panel, TitledDrawing
from fedsgcg.server.report.sections.sweeps import HELD_OUT, METRICS, distance_note
from fedsgcg.server.report.tables import Row


@dataclass(frozen=True)
class FederationCost:
    """The same training in several federations.

    Attributes:
        panels: One figure per structure and metric.
        claims: Differences between the federations.
        present: The federations, in the order of the report.
        steps: Training steps per round by federation, fewest to most; empty if all took the same.
        note: Which distances leave out evaluations, "" for none.
    """

    panels: tuple[Panel, ...]
    claims: Claims
    present: tuple[str, ...]
    steps: Mapping[str, str]
    note: str

    @property
    def drawings(self) -> list[TitledDrawing]:
        """Every drawing with its title."""
        return [((panel.title,), panel.drawing) for panel in self.panels]


def federation_section(
    values: CaseValues,
    labels: Mapping[str, Label],
    structures: Sequence[str],
    colours: Mapping[str, int],
    rounds: Sequence[Row] = (),
    place: str = HELD_OUT,
) -> FederationCost | None:
    """Compare every training local, pooled and by site; None with fewer than two federations.

    Args:
        values: Values of the cases.
        labels: Labels of the study.
        structures: Structures in order.
        colours: Index of the palette by label.
        rounds: Rows of `rounds.parquet`, for the number of steps of each federation.
        place: Name of the evaluated cases.
    """
    pairs = federation_pairs(labels)
    if not pairs:
        return None
    rows = [labels[name] for name in dict.fromkeys(name for pair in pairs for name in pair)]
    panels = []
    for structure in structures:
        for metric in METRICS:
            title = TITLES[metric] if metric == "dice" else f"{TITLES[metric]}, {values.unit}"
            dots = _federation_dots(rows, values, structure, metric, colours)
            means = "; ".join(
                f"{dot.title} {show(dot.interval.mean, DECIMALS[metric])}" for dot in dots
            )
            alt = f"Mean {title} of {structure} over {place}: {means}."
            head = f"{structure}, {title}" if len(structures) > 1 else title
            if dots:
                panels.append(Panel(head, dot_panel(dots, title, alt)))
    claims = claims_section(compare_on_average(values, pairs, structures, METRICS), structures)
    present = (name for name in FEDERATIONS if any(label.federation == name for label in rows))
    budget = steps_by_federation(rounds, {label.name: label.federation for label in rows})
    note = distance_note(values, [label.name for label in rows], structures)
    return FederationCost(tuple(panels), claims, tuple(present), budget, note)


def _federation_dots(
    rows: Sequence[Label],
    values: CaseValues,
    structure: str,
    metric: str,
    colours: Mapping[str, int],
) -> list[Dot]:
    dots: list[Dot] = []
    before = None
    for label in rows:
        interval = values.interval(label.name, structure, metric)
        if math.isfinite(interval.mean):
            training = label.trains, label.setting
            title = f"{label.trains}, {label.federation}" if label.plain else label.name
            dots.append(
                Dot(title, interval, colours.get(label.name, 0), bool(dots) and training != before)
            )
            before = training
    return dots
