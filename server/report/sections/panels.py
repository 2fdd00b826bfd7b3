"""Figures of the report, one panel per hospital or fold, each with its description."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedsgcg.server.report.figures.drawing import (
    Line,
    case_panel,
    curve_panel,
    log_span_of,
    shift_panel,
    span_of,
)
from fedsgcg.server.report.format import show
from fedsgcg.server.report.rounds import Curve, curves
from fedsgcg.server.report.sections.cases import count_of
from fedsgcg.server.report.sections.elements import ClassShare, Panel
from fedsgcg.server.report.sections.results import CaseRow
from fedsgcg.server.report.tables import Row

Curves = Mapping[tuple[str, str, str], Curve]
TOTAL: Final = 5.0
"""Total loss relative to the supervised loss from which their axis is logarithmic."""


@dataclass(frozen=True)
class TrainingPanel(Panel):
    """Curves of one fold.

    Attributes:
        total_loss: Whether it has a curve of the total loss next to the supervised one.
        heldout: Whether it has a curve of the held-out hospital.
    """

    total_loss: bool = False
    heldout: bool = False


def case_figures(
    cases: Sequence[CaseRow],
    structure: str,
    methods: Sequence[str],
    colours: Mapping[str, int] | None = None,
) -> list[Panel]:
    """One strip plot per hospital: Dice of every case with every method."""
    chosen = [case for case in cases if case.structure == structure and case.method in methods]
    values = [case.dice for case in chosen if math.isfinite(case.dice)]
    low = max(0.0, math.floor((min(values, default=0.0) - 0.02) * 20) / 20)
    panels = []
    for site in sorted({case.site for case in chosen}):
        strips: dict[str, dict[str, float]] = {method: {} for method in methods}
        for case in chosen:
            if case.site == site:
                strips[case.method][case.case] = case.dice
        middles = [f"{name} median {show(_median(s), 3)}" for name, s in strips.items() if s]
        alt = f"Dice of {structure} for every case at {site}: {', '.join(middles)}."
        drawing = case_panel(strips, (low, 1.003), alt, "Dice of a case, mean over seeds", colours)
        detail = count_of(max(map(len, strips.values())), "case")
        panels.append(Panel(site, drawing, detail, hospital=site))
    return panels


def _median(strip: Mapping[str, float]) -> float:
    known = [value for value in strip.values() if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


def training_figures(
    rows: Sequence[Row], methods: Sequence[str], colours: Mapping[str, int] | None = None
) -> list[TrainingPanel]:
    """One panel per fold: supervised loss, source-validation Dice, and held-out ASD by round.

    The ASD is shown only if the held-out hospital was evaluated during training.
    """
    all_colours = dict(colours or {name: place for place, name in enumerate(methods)})
    found = {name: curves(rows, name) for name in ("loss_supervised", "loss", "validation_dice")}
    heldout_only = [row for row in rows if row["site"] == row["heldout"]]
    heldout, distance = (
        _followed(curves(heldout_only, name)) for name in ("heldout_dice", "heldout_asd")
    )
    supervised = found["loss_supervised"] or found["loss"]
    validation = found["validation_dice"]
    chosen = {name: all_colours[name] for name in methods}
    folds = sorted(
        {key[0] for part in (supervised, validation) for key in part if key[1] in chosen}
    )
    upper = {
        f: _lines(supervised, f, chosen) + _companions(found["loss"], supervised, f, chosen)
        for f in folds
    }
    lower = {
        fold: _lines(validation, fold, chosen)
        + _lines(heldout, fold, chosen, dash=":", strong=False)
        for fold in folds
    }
    third = {fold: _lines(distance, fold, chosen, dash=":", strong=False) for fold in folds}
    parts = [upper, lower, *([third] if any(third.values()) else [])]
    labels = [
        "supervised loss",
        "Dice" if any(_lines(heldout, f, chosen) for f in folds) else "validation Dice",
    ]
    labels += ["held-out ASD"] if len(parts) > 2 else []
    ceilings = (None, 1.0, None)
    spans = [
        span_of([line for lines in part.values() for line in lines], floor=0.0, ceiling=ceiling)
        for part, ceiling in zip(parts, ceilings, strict=False)
    ]
    log = _outgrown([line for lines in upper.values() for line in lines])
    if log:
        spans[0] = log_span_of([line for lines in upper.values() for line in lines])
    panels = []
    for fold in folds:
        title = f"{fold} held out" if fold else "no hospital held out"
        ends = [
            f"{method} ends at loss {_end(supervised, fold, method)}, "
            f"validation Dice {_end(validation, fold, method)}"
            for method in methods
            if (fold, method, "") in supervised
        ]
        alt = f"Supervised loss and source-validation Dice by round, {title}: {'; '.join(ends)}."
        drawing = curve_panel([part[fold] for part in parts], labels, spans, alt, log=log)
        panels.append(
            TrainingPanel(
                title,
                drawing,
                _left_out_note(heldout_only, fold, methods) if any(third.values()) else "",
                total_loss=any(line.dash == "--" for line in upper[fold]),
                heldout=any(line.dash == ":" for line in (*lower[fold], *third[fold])),
                hospital=fold,
            )
        )
    return panels


def _outgrown(lines: Sequence[Line]) -> bool:
    """Whether total losses, e.g. 20 times the supervised loss, flatten the supervised losses."""
    largest = [
        max((float(np.nanmax(line.curve.high)) for line in lines if line.strong == own), default=0)
        for own in (True, False)
    ]
    return largest[1] > TOTAL * largest[0] > 0


def _left_out_note(rows: Sequence[Row], fold: str, methods: Sequence[str]) -> str:
    """State how many evaluations the curve of a distance leaves out, "" if none."""
    counts = [
        int(row["value"])
        for row in rows
        if row["metric"] == "heldout_asd_left_out"
        and row["heldout"] == fold
        and row["method"] in methods
    ]
    if not counts:
        return ""
    return f"ASD without up to {count_of(max(counts), 'evaluation')} with an empty mask"


def _followed(found: Curves) -> Curves:
    """Curves with more than the final point, which is in the tables."""
    return {key: curve for key, curve in found.items() if len(curve.rounds) > 1}


def _end(found: Curves, fold: str, method: str) -> str:
    curve = found.get((fold, method, ""))
    return show(float(curve.mean[-1]), 3) if curve else "–"


def _lines(
    found: Curves, fold: str, colours: Mapping[str, int], *, dash: str = "-", strong: bool = True
) -> list[Line]:
    return [
        Line(found[fold, method, ""], index, dash, strong)
        for method, index in colours.items()
        if (fold, method, "") in found
    ]


def _companions(
    total: Curves, supervised: Curves, fold: str, colours: Mapping[str, int]
) -> list[Line]:
    """Curves of the total loss that differ from the supervised loss."""
    kept: list[Line] = []
    for method, index in colours.items():
        for line in _lines(total, fold, {method: index}, dash="--", strong=False):
            part = supervised.get((fold, method, ""))
            comparable = part is not None and part.mean.shape == line.curve.mean.shape
            if part is None or not comparable or not np.allclose(part.mean, line.curve.mean):
                kept.append(line)
    return kept


def shift_figures(rows: Sequence[Row], methods: Sequence[str]) -> list[Panel]:
    """One panel per fold and method: scatter between and within hospitals, by class."""
    between = curves(rows, "between_site_trace")
    within = curves(rows, "within_site_trace")
    # The selected model with one normalisation for all hospitals. Older studies do not record it;
    # for them the last round is used.
    end = (
        between | curves(rows, "between_site_trace_evaluation"),
        within | curves(rows, "within_site_trace_evaluation"),
    )
    classes = shift_classes(rows)
    found: list[tuple[str, str, list[Line], list[ClassShare]]] = []  # fold first
    wanted = {key[:2] for key in between if key[1] in methods}
    for fold, method in sorted(wanted, key=lambda key: (key[0], methods.index(key[1]))):
        lines: list[Line] = []
        shares: list[ClassShare] = []
        for index, name in enumerate(classes):
            key = fold, method, name
            lines += [Line(between[key], index)] if key in between else []
            lines += [Line(within[key], index, "--", strong=False)] if key in within else []
            if key in between and key in within:
                shares.append(ClassShare(name, _share(end[0][key], end[1][key])))
        found.append((fold, method, lines, shares))
    span = log_span_of([line for _, _, lines, _ in found for line in lines])
    several = len({method for _, method, _, _ in found}) > 1
    panels = []
    for fold, method, lines, shares in found:
        title = f"{fold or 'no hospital'} held out"
        ends = "; ".join(f"{entry.name} {entry.share}" for entry in shares)
        alt = f"Scatter between and within hospitals by round, {title}, {method}. "
        alt += f"Share between hospitals at the end: {ends or 'unknown'}."
        drawing = shift_panel(lines, span, alt)
        panels.append(Panel(title, drawing, method if several else "", tuple(shares), fold))
    return panels


def _share(between: Curve, within: Curve) -> str:
    """Share of the scatter between hospitals at the end of two curves."""
    parts = float(between.mean[-1]), float(within.mean[-1])
    return f"{100 * parts[0] / sum(parts):.1f} %" if sum(parts) > 0 else "–"


def shift_classes(rows: Sequence[Row]) -> list[str]:
    """Names of the classes in the shift figures, in the order of their colours."""
    return list(
        dict.fromkeys(
            row["cls"] for row in rows if row["metric"] == "between_site_trace" and row["cls"]
        )
    )
