"""The report: one self-contained page from the files of a study, whatever state the study is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from server.disk import Disk
from server.report_figures import MARKERS, PALETTE
from server.report_files import Reader, StudyFiles, read_study
from server.report_page import PAGE
from server.report_panels import case_figures, overlay_blocks, shift_classes, shift_figures, training_figures
from server.report_sections import Section, case_means, cell_rows, departure_rows, difference_tables, result_tables
from server.report_tables import (
    Difference,
    Row,
    distance_unit,
    heldout_rows,
    methods_of,
    other_rows,
    paired_differences,
    summary_rows,
)
from server.report_text import (
    STATUS_WORDS,
    headline,
    protocol_box,
    result_notes,
    settings_text,
    show,
    status_sentence,
    troubled,
)

CASE_ROWS = 3000  # of the table of all cases; more would make the page heavy, and results.parquet has them all


def make_report(study: Path) -> Path:
    """Write `report.html` into a study folder from the files that are there.

    Pictures of patients are drawn only from sites whose folder lies on this machine.

    Args:
        study: Study folder, or the folder of a single run.

    Returns:
        The page.

    Raises:
        FedsgcgError: SRV-402 when the folder holds neither a study nor a run, SRV-401 when it cannot be written.
    """
    files, reader = read_study(study)
    page = render(files, reader)
    Disk().write(study / "report.html", page.encode())
    return study / "report.html"


def render(study: StudyFiles, reader: Reader) -> str:
    """Return the page; the same files give the same bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = show
    rows = heldout_rows(study.results)
    cases = case_means(rows)
    tables, figures = _tables(study, rows, cases, reader), _figures(study, cases, reader)
    # Last, because reading the sites' files may have found damaged ones.
    problems = list(dict.fromkeys([*study.problems, *reader.problems]))
    return environment.from_string(PAGE).render(**_words(study), **tables, **figures, problems=problems)


def _words(study: StudyFiles) -> dict[str, Any]:
    """Title, status, protocol, settings: all that is not a result."""
    shared, differing = settings_text(study.settings)
    return {
        "title": _data(study).get("name") or study.folder.resolve().name,
        "status": study.status,
        "status_word": STATUS_WORDS[study.status],
        "status_sentence": status_sentence(study),
        "troubled": troubled(study.cells),
        "protocol": protocol_box(study),
        "shared_settings": shared,
        "differing_settings": differing,
        "setting_methods": list(study.settings),
        "command": study.tree.get("command", ""),
        "dates": [(name, study.tree[name]) for name in ("created", "updated") if study.tree.get(name)],
        "versions": study.tree.get("versions") if isinstance(study.tree.get("versions"), dict) else {},
        "folder": study.folder.resolve().name,
        "cells": cell_rows(study),
        "palette": PALETTE,
        "markers": MARKERS,
    }


def _tables(study: StudyFiles, rows: list[Row], cases: list[Section], reader: Reader) -> dict[str, Any]:
    """Results, differences, what left each hospital."""
    summary, differences = summary_rows(rows), compared(rows)
    structures = _structures(study)
    hospitals = len({cell.heldout for cell in study.cells if cell.heldout})
    left, parts = departure_rows(study, reader)
    return {
        "headline": headline(summary, differences, structures[0] if structures else "", hospitals),
        "results": result_tables(summary, study, structures) if summary else [],
        "notes": result_notes(summary, rows, hospitals),
        "unit": distance_unit(rows),
        "differences": difference_tables(differences),
        "others": summary_rows([{**row, "heldout": ""} for row in other_rows(study.results)]),
        "case_table": cases[:CASE_ROWS],
        "cases_in_all": len(cases),
        "departures": left,
        "departure_parts": parts,
    }


def _figures(study: StudyFiles, cases: list[Section], reader: Reader) -> dict[str, Any]:
    methods = methods_of([{"method": cell.method} for cell in study.cells])
    training = training_figures(study.rounds, methods)
    return {
        "methods": methods,
        "case_panels": [(name, case_figures(cases, name, methods)) for name in _structures(study)] if cases else [],
        "training": training,
        "training_keys": {name: any(panel["marks"][name] for panel in training) for name in ("whole", "heldout")},
        "shift": shift_figures(study.rounds, methods),
        "shift_classes": shift_classes(study.rounds),
        "overlays": overlay_blocks(study, reader, methods),
    }


def compared(rows: list[Row]) -> list[Difference]:
    """Compare every method with the first one (`source`, where it takes part) on the same cases."""
    reference, *others = methods_of(rows) or [""]
    return [difference for method in others for difference in paired_differences(rows, method, reference)]


def _structures(study: StudyFiles) -> list[str]:
    """Structures with results, in the order of the settings."""
    declared = _data(study).get("structures", {})
    found = sorted({str(row["structure"]) for row in study.results})
    return [*(name for name in declared if name in found), *(name for name in found if name not in declared)]


def _data(study: StudyFiles) -> dict[str, Any]:
    """Settings of the data, the same for every method."""
    data = next((tree.get("data") for tree in study.settings.values()), None)
    return data if isinstance(data, dict) else {}
