"""Builds the report: one self-contained page from the files of a study in any state."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedsgcg.common.files.disk import Disk, refusals
from fedsgcg.server.report.differences import DICE_FLOOR, CaseValues, Difference
from fedsgcg.server.report.export import write_tables
from fedsgcg.server.report.figures.drawing import MARKERS, PALETTE
from fedsgcg.server.report.figures.overlays import Images
from fedsgcg.server.report.format import show
from fedsgcg.server.report.gallery import gallery, write_gallery
from fedsgcg.server.report.labels import (
    FEDERATION_TITLES,
    Group,
    Label,
    figure_groups,
    label_colours,
    main_labels,
    main_pairs,
)
from fedsgcg.server.report.protocol import chosen_within_folds, protocol_box
from fedsgcg.server.report.reader import Reader
from fedsgcg.server.report.sections.claims import claims_section, hospital_tables, main_claims
from fedsgcg.server.report.sections.features import similarity_section, tsne_section
from fedsgcg.server.report.sections.federation import federation_section
from fedsgcg.server.report.sections.panels import (
    case_figures,
    overlay_blocks,
    shift_classes,
    shift_figures,
    training_figures,
)
from fedsgcg.server.report.sections.papers import (
    ablation_tables,
    layouts_of,
    paper_notes,
    paper_tables,
    seeds_note,
)
from fedsgcg.server.report.sections.published import published_for
from fedsgcg.server.report.sections.results import (
    Section,
    case_means,
    cell_rows,
    departure_rows,
    hash_note,
    result_tables,
)
from fedsgcg.server.report.sections.sweeps import HELD_OUT, VALIDATION, sweep_sections, sweeps_of
from fedsgcg.server.report.study_files import StudyFiles, read_study
from fedsgcg.server.report.summary import (
    STATUS_TITLES,
    headline,
    result_notes,
    settings_text,
    status_sentence,
    troubled,
)
from fedsgcg.server.report.tables import (
    STATED,
    Row,
    heldout_rows,
    other_rows,
    stated_summaries,
    study_summary,
    study_unit,
    summary_rows,
)

CASE_ROWS = 3000
"""Most rows in the table of all cases, to limit the page size; results.parquet has all of them."""

OnProgress = Callable[[str], None]


def ignore_progress(step: str) -> None:
    """Ignore progress; the default listener."""


def make_report(study: Path, on_progress: OnProgress = ignore_progress) -> Path:
    """Write `report.html`, `figures/` and `tables/` into a study folder from the files present.

    Images of patients are drawn only from sites whose folder is on this machine.

    Args:
        study: Study folder, or the folder of a single run.
        on_progress: Called with the name of each slow step.

    Returns:
        Path of the page.

    Raises:
        FedsgcgError: SRV-402 when the folder contains neither a study nor a run, SRV-401 when the
            report cannot be written.
    """
    files, reader = read_study(study)
    with gc_disabled():
        content = contents(files, reader, on_progress)
        disk = Disk()
        with refusals(study / "figures"):
            disk.make_folder(study / "figures")
        on_progress("files of the figures")
        write_gallery(study / "figures", gallery(content), disk)
        write_tables(study, files.results, files.rounds)
    disk.write(study / "report.html", render(content).encode())
    return study / "report.html"


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable Python's cycle collector.

    Figures consist of reference cycles that live until the end, and every collection visits them
    all.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def render(content: Mapping[str, Any]) -> str:
    """Return the page; the same files give the same bytes.

    The environment escapes every value. The page contains no script, font or external address, and
    its content security policy forbids them.
    """
    environment = Environment(
        loader=PackageLoader("fedsgcg.server.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    return environment.get_template("page.html.j2").render(**content)


def contents(
    study: StudyFiles, reader: Reader, on_progress: OnProgress = ignore_progress
) -> dict[str, Any]:
    """Return everything that the page shows, by its name in the template."""
    on_progress("tables and claims")
    rows = heldout_rows(study.results)
    cases = case_means(rows)
    labels = study.labels
    tables = _tables(study, rows, cases, reader)
    figures = _comparisons(study, rows, labels) | _figures(
        study, cases, reader, labels, on_progress
    )
    # Collected last, because reading the sites' files may have found damaged ones.
    problems = list(dict.fromkeys([*study.problems, *reader.problems]))
    return {**_overview(study), **tables, **figures, "problems": problems}


def _overview(study: StudyFiles) -> dict[str, Any]:
    """Title, status, protocol and settings: everything that is not a result."""
    shared, differing = settings_text(study.settings)
    versions = study.tree.get("versions")
    return {
        "title": _data(study).get("name") or study.folder.resolve().name,
        "status": study.status,
        "status_title": STATUS_TITLES[study.status],
        "status_sentence": status_sentence(study),
        "troubled": troubled(study.cells),
        "protocol": protocol_box(study),
        "shared_settings": shared,
        "differing_settings": differing,
        "setting_methods": list(study.settings),
        "command": study.tree.get("command", ""),
        "dates": [
            (name, study.tree[name]) for name in ("created", "updated") if study.tree.get(name)
        ],
        "versions": versions if isinstance(versions, dict) else {},
        "folder": study.folder.resolve().name,
        "cells": cell_rows(study),
        "hash_note": hash_note(study),
        "alone": any(cell.trained_on for cell in study.cells),
        "palette": PALETTE,
        "markers": MARKERS,
        "federation_titles": FEDERATION_TITLES,
    }


def _tables(
    study: StudyFiles, rows: list[Row], cases: list[Section], reader: Reader
) -> dict[str, Any]:
    """Results in all metrics, cases, and the data sent by each hospital."""
    summary = study_summary(study.results, study.rounds)
    unit = study_unit(study.results, study.rounds)
    structures = _structures(study)
    left, parts = departure_rows(study, reader)
    return {
        "results": result_tables(summary, study, structures) if summary else [],
        "notes": result_notes(summary, rows, _hospitals(study)),
        "unit": unit,
        "structures": structures,
        "others": [
            *summary_rows([{**row, "heldout": ""} for row in other_rows(study.results)]),
            *stated_summaries(study.rounds, unit, "observer"),
        ],
        "case_table": cases[:CASE_ROWS],
        "cases_in_all": len(cases),
        "departures": left,
        "departure_parts": parts,
    }


def _comparisons(study: StudyFiles, rows: list[Row], labels: Mapping[str, Label]) -> dict[str, Any]:
    """The papers' tables, ablation, claims, sweeps and the cost of federation."""
    structures = _structures(study)
    colours = label_colours(labels)
    values = CaseValues(rows)
    claims: list[Difference] = main_claims(values, labels, structures) if rows else []
    sites = sorted(
        {cell.heldout for cell in study.cells if cell.heldout} | {site for _, site in values.places}
    )
    published = published_for(str(_data(study).get("name", "")), structures)
    printed = CaseValues(rows, "pixel") if published else values
    layouts = layouts_of(printed, structures, sites, published) if rows else []
    has_heldout = any(cell.heldout for cell in study.cells)
    place = HELD_OUT if has_heldout else VALIDATION
    sweeps = sweeps_of(labels, study.settings)
    papers = paper_tables(layouts, labels, colours)
    hospitals: list[Section] = []
    if len(values.places) > 1:
        hospitals = hospital_tables(values, main_pairs(labels), structures)
    sweep_parts: list[Section] = []
    federation: Section | None = None
    if rows:
        sweep_parts = sweep_sections(sweeps, labels, values, structures, colours, place)
        federation = federation_section(values, labels, structures, colours, study.rounds, place)
    return {
        "has_heldout": has_heldout,
        "place": place,
        "nested": chosen_within_folds(study),
        "dice_floor": f"{DICE_FLOOR:g}",
        "headline": headline(
            study_summary(study.results, study.rounds),
            claims,
            structures[0] if structures else "",
            _hospitals(study),
        ),
        "papers": papers,
        "paper_notes": paper_notes(published, papers) if rows else [],
        "paper_seeds": seeds_note(values, main_labels(labels)),
        "ablation": ablation_tables(layouts, labels, colours),
        "differences": claims_section(claims, structures) if claims else None,
        "hospital_tables": hospitals,
        "sweeps": sweep_parts,
        "federation": federation,
    }


def _figures(
    study: StudyFiles,
    cases: list[Section],
    reader: Reader,
    labels: Mapping[str, Label],
    on_progress: OnProgress,
) -> dict[str, Any]:
    groups = figure_groups(labels)
    colours = label_colours(labels)
    structures = _structures(study)
    images = Images()

    def case_parts(group: Group) -> list[Section]:
        found = [(name, case_figures(cases, name, group.labels, colours)) for name in structures]
        return [
            {"title": name if len(structures) > 1 else "", "panels": panels}
            for name, panels in found
            if panels
        ]

    def own_rounds(group: Group) -> list[Row]:
        return [row for row in study.rounds if row["method"] in group.labels]

    def shift_parts(group: Group) -> list[Section]:
        return _part(shift_figures(own_rounds(group), group.labels))

    on_progress("curves")
    training = _blocks(
        groups, lambda group: _part(training_figures(own_rounds(group), group.labels, colours))
    )
    marks = [
        panel["marks"] for block in training for part in block["parts"] for panel in part["panels"]
    ]
    shift = (block for group in groups for block in _blocks([group], shift_parts))
    case_panels = _blocks(groups, case_parts) if cases else []
    on_progress("features of single pixels")
    tsne = tsne_section(study, reader)
    similarity = similarity_section(study, reader)
    on_progress("overlays")
    return {
        "methods": list(labels),
        "colours": colours,
        "most_shown": max((len(group.labels) for group in groups), default=0),
        "case_panels": case_panels,
        "training": training,
        "training_keys": {name: any(mark[name] for mark in marks) for name in ("whole", "heldout")},
        "shift": list(islice(shift, 1)),
        "shift_classes": shift_classes(study.rounds),
        "tsne": tsne,
        "similarity": similarity,
        "overlays": overlay_blocks(study, reader, groups, images),
        "slices": images.markup,
    }


def _blocks(groups: Sequence[Group], draw: Callable[[Group], list[Section]]) -> list[Section]:
    """One block of panels per group of labels, without groups that have nothing to draw."""
    blocks = []
    for group in groups:
        parts = draw(group)
        if parts:
            head = {
                "title": group.title,
                "labels": group.labels,
                "left_out": group.left_out,
                "more": Markup(""),
            }
            blocks.append(head | {"parts": parts})
    return blocks


def _part(panels: list[Section]) -> list[Section]:
    return [{"title": "", "panels": panels}] if panels else []


def _hospitals(study: StudyFiles) -> int:
    return len({cell.heldout for cell in study.cells if cell.heldout})


def _structures(study: StudyFiles) -> list[str]:
    """Structures that have results, in the order of the settings."""
    declared = _data(study).get("structures", {})
    stated = {str(row["cls"]) for row in study.rounds if row["metric"] in STATED}
    found = sorted({str(row["structure"]) for row in study.results} | (stated - {""}))
    return [
        *(name for name in declared if name in found),
        *(name for name in found if name not in declared),
    ]


def _data(study: StudyFiles) -> dict[str, Any]:
    """The data settings, which are the same for every method."""
    data = next((tree.get("data") for tree in study.settings.values()), None)
    return data if isinstance(data, dict) else {}
