"""Figures of the report, one panel a hospital or fold, each with the words that describe it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from server.report_cases import count_of
from server.report_figures import Line, case_panel, curve_panel, log_span_of, shift_panel, span_of
from server.report_files import DONE, Cell, Picture, Reader, StudyFiles
from server.report_overlays import choose_cases, crop_box, overlay
from server.report_rounds import Curve, curves
from server.report_tables import Row
from server.report_text import focus_method, show

Section = dict[str, Any]
Curves = Mapping[tuple[str, str, str], Curve]


def case_figures(cases: Sequence[Section], structure: str, methods: Sequence[str]) -> list[Section]:
    """One strip plot a hospital: Dice of every case with every method."""
    chosen = [case for case in cases if case["structure"] == structure]
    values = [case["dice"] for case in chosen if math.isfinite(case["dice"])]
    low = max(0.0, math.floor((min(values, default=0.0) - 0.02) * 20) / 20)
    panels = []
    for site in sorted({case["site"] for case in chosen}):
        strips: dict[str, dict[str, float]] = {method: {} for method in methods}
        for case in chosen:
            if case["site"] == site:
                strips[case["method"]][case["case"]] = case["dice"]
        middles = [f"{name} median {show(float(np.nanmedian(list(s.values()))), 3)}" for name, s in strips.items() if s]
        alt = f"Dice of {structure} for every case at {site}: {', '.join(middles)}."
        drawing = case_panel(strips, (low, 1.003), alt, "Dice of a case, mean over seeds")
        panels.append({"title": site, "detail": count_of(max(map(len, strips.values())), "case"), "drawing": drawing})
    return panels


def training_figures(rows: Sequence[Row], methods: Sequence[str]) -> list[Section]:
    """One panel a fold: supervised loss above source-validation Dice, by round."""
    supervised = curves(rows, "loss_supervised") or curves(rows, "loss")
    total, validation = curves(rows, "loss"), curves(rows, "validation_dice")
    heldout = curves([row for row in rows if row["site"] == row["heldout"]], "heldout_dice")
    folds = sorted({key[0] for found in (supervised, validation) for key in found})
    upper = {fold: _lines(supervised, fold, methods) + _companions(total, supervised, fold, methods) for fold in folds}
    lower = {
        fold: _lines(validation, fold, methods) + _lines(heldout, fold, methods, dash=":", strong=False)
        for fold in folds
    }
    spans = (
        span_of([line for lines in upper.values() for line in lines], floor=0.0),
        span_of([line for lines in lower.values() for line in lines], floor=0.0, ceiling=1.0),
    )
    panels = []
    for fold in folds:
        title = f"{fold} held out" if fold else "no hospital held out"
        ends = [
            f"{method} ends at loss {_end(supervised, fold, method)}, validation Dice {_end(validation, fold, method)}"
            for method in methods
            if (fold, method, "") in supervised
        ]
        alt = f"Supervised loss and source-validation Dice by round, {title}: {'; '.join(ends)}."
        drawing = curve_panel(upper[fold], lower[fold], ("supervised loss", "validation Dice"), spans, alt)
        marks = {
            "whole": any(line.dash == "--" for line in upper[fold]),
            "heldout": any(line.dash == ":" for line in lower[fold]),
        }
        panels.append({"title": title, "detail": "", "drawing": drawing, "marks": marks})
    return panels


def _end(found: Curves, fold: str, method: str) -> str:
    curve = found.get((fold, method, ""))
    return show(float(curve.mean[-1]), 3) if curve else "–"


def _lines(found: Curves, fold: str, methods: Sequence[str], *, dash: str = "-", strong: bool = True) -> list[Line]:
    return [
        Line(found[fold, method, ""], index, dash, strong)
        for index, method in enumerate(methods)
        if (fold, method, "") in found
    ]


def _companions(total: Curves, supervised: Curves, fold: str, methods: Sequence[str]) -> list[Line]:
    """The whole loss, where it holds more than the supervised part."""
    lines = _lines(total, fold, methods, dash="--", strong=False)
    kept = []
    for line in lines:
        part = supervised.get((fold, methods[line.colour], ""))
        same = part is not None and part.mean.shape == line.curve.mean.shape and np.allclose(part.mean, line.curve.mean)
        kept += [] if same else [line]
    return kept


def shift_figures(rows: Sequence[Row], methods: Sequence[str]) -> list[Section]:
    """One panel a fold and method with statistics: trace of the scatter between and within hospitals, per class."""
    between, within = curves(rows, "between_site_trace"), curves(rows, "within_site_trace")
    classes = shift_classes(rows)
    panels: list[Section] = []
    for fold, method in sorted({key[:2] for key in between}, key=lambda key: (key[0], methods.index(key[1]))):
        lines, shares = [], []
        for index, name in enumerate(classes):
            key = fold, method, name
            lines += [Line(between[key], index)] if key in between else []
            lines += [Line(within[key], index, "--", strong=False)] if key in within else []
            if key in between and key in within:
                shares.append({"name": name, "index": index, "share": _share(between[key], within[key])})
        title = f"{fold or 'no hospital'} held out"
        panels.append({"title": title, "method": method, "lines": lines, "shares": shares})
    span = log_span_of([line for panel in panels for line in panel["lines"]])
    for panel in panels:
        ends = "; ".join(f"{entry['name']} {entry['share']}" for entry in panel["shares"])
        alt = f"Scatter between and within hospitals by round, {panel['title']}, {panel['method']}. "
        alt += f"Share between hospitals in the last round: {ends or 'unknown'}."
        panel["drawing"] = shift_panel(panel.pop("lines"), span, alt)
        panel["detail"] = panel["method"] if len({entry["method"] for entry in panels}) > 1 else ""
    return panels


def _share(between: Curve, within: Curve) -> str:
    """Share of the scatter that lies between hospitals, in the last round."""
    parts = float(between.mean[-1]), float(within.mean[-1])
    return f"{100 * parts[0] / sum(parts):.1f} %" if sum(parts) > 0 else "–"


def shift_classes(rows: Sequence[Row]) -> list[str]:
    """Names of the classes in the shift figures, in the order of their colours."""
    return list(dict.fromkeys(row["cls"] for row in rows if row["metric"] == "between_site_trace" and row["cls"]))


def overlay_blocks(study: StudyFiles, reader: Reader, methods: Sequence[str]) -> list[Section]:
    """One block a hospital: worst, median and best case of the main method, the same slice with every method."""
    focus, blocks = focus_method(methods), []
    for fold in sorted({cell.heldout for cell in study.cells}):
        ready = [cell for cell in study.cells if cell.heldout == fold and cell.status in DONE]
        for site in sorted({path.parent.name for cell in ready for path in cell.folder.glob("sites/*/pictures.arrow")}):
            cells = sorted(
                (c for c in ready if _picture_path(c, site).is_file()), key=lambda c: (c.method != focus, c.seed)
            )
            shown = [cell for cell in cells if cell.seed == cells[0].seed]
            pictures = {cell.method: reader.pictures(_picture_path(cell, site)) for cell in shown}
            block = _overlay_block(pictures, methods, cells[0].method)
            if block:
                blocks.append({"site": site, "seed": cells[0].seed, "chosen_by": cells[0].method, "cases": block})
    return blocks


def _picture_path(cell: Cell, site: str) -> Path:
    return cell.folder / "sites" / site / "pictures.arrow"


def _overlay_block(pictures: Mapping[str, Sequence[Picture]], methods: Sequence[str], chosen_by: str) -> list[Section]:
    cases = []
    for rank, case in choose_cases(pictures[chosen_by]):
        versions = {name: next((p for p in found if p.case == case), None) for name, found in pictures.items()}
        present = [picture for picture in versions.values() if picture is not None]
        box = crop_box(present)
        images = []
        for method in methods:
            picture = versions.get(method)
            label = f"{rank} case {case}, {method}: contours of truth (solid) and prediction (dashed)"
            drawing = overlay(picture, box, label) if picture is not None else Markup("")
            dice = show(picture.dice, 3) if picture is not None else ""
            images.append({"method": method, "drawing": drawing, "dice": dice, "index": methods.index(method)})
        cases.append({"rank": rank, "case": case, "z": present[0].z, "images": images})
    return cases
