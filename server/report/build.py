"""Builds the report: one self-contained page from the files of a study in any state."""

from __future__ import annotations

import base64
import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedsgcg.common.files.disk import Disk, refusals
from fedsgcg.common.run_folder import paths
from fedsgcg.server.report.case_names import CaseNames, linked_cases, read_case_names
from fedsgcg.server.report.differences import DICE_FLOOR, CaseValues, Difference
from fedsgcg.server.report.export import write_tables
from fedsgcg.server.report.figures.drawing import MARKERS, PALETTE
from fedsgcg.server.report.figures.overlays import Images
from fedsgcg.server.report.format import DECIMALS, show, slug
from fedsgcg.server.report.gallery import gallery, page_drawings, write_gallery
from fedsgcg.server.report.labels import (
    FEDERATION_TITLES,
    Group,
    figure_groups,
    label_colours,
    main_labels,
    main_pairs,
)
from fedsgcg.server.report.page_tables import write_page_tables
from fedsgcg.server.report.protocol import chosen_within_folds, protocol_box
from fedsgcg.server.report.reader import Reader
from fedsgcg.server.report.sections.adapted import adapted_table
from fedsgcg.server.report.sections.claims import (
    HospitalTable,
    claims_section,
    hospital_tables,
    main_claims,
)
from fedsgcg.server.report.sections.distances import distances_section
from fedsgcg.server.report.sections.elements import PanelGroup, panel_blocks, untitled
from fedsgcg.server.report.sections.features import similarity_section, tsne_section
from fedsgcg.server.report.sections.federation import FederationCost, federation_section
from fedsgcg.server.report.sections.methods import method_table
from fedsgcg.server.report.sections.overlays import overlay_blocks
from fedsgcg.server.report.sections.page import (
    Comparisons,
    Figures,
    Overview,
    Page,
    Results,
    TrainingKey,
)
from fedsgcg.server.report.sections.panels import (
    case_figures,
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
from fedsgcg.server.report.sections.privacy import attacks_of, privacy_section
from fedsgcg.server.report.sections.published import published_for
from fedsgcg.server.report.sections.results import (
    CaseRow,
    case_means,
    departure_rows,
    dice_rows,
    hash_note,
    result_tables,
    run_rows,
)
from fedsgcg.server.report.sections.sweeps import (
    HELD_OUT,
    VALIDATION,
    SweepResults,
    sweep_sections,
    sweeps_of,
)
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

SCRIPT = files("fedsgcg.server.report").joinpath("templates", "explore.js").read_text("utf-8")
"""Sorts and filters on the page; its digest is the only script that the page's policy allows."""

CONSTANTS = {
    "script": Markup(SCRIPT),  # noqa: S704 - our own file
    "script_digest": base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    "palette": PALETTE,
    "markers": MARKERS,
    "federation_titles": FEDERATION_TITLES,
    "decimals": DECIMALS,
}
"""What the templates use besides the page's own content."""

OnProgress = Callable[[str], None]
NO_NAMES = CaseNames({}, ())


def ignore_progress(step: str) -> None:
    """Ignore progress; the default listener."""


def make_report(
    study: Path, on_progress: OnProgress = ignore_progress, aliases: Sequence[Path] = ()
) -> Path:
    """Write `report.html`, `figures/` and `tables/` into a study folder from the files present.

    Images of patients are drawn only from sites whose folder is on this machine.

    Args:
        study: Study folder, or the folder of a single run.
        on_progress: Called with the name of each slow step.
        aliases: Files with the names of cases (`aliases.csv` of a hospital).

    Returns:
        Path of the page.

    Raises:
        FedsgcgError: SRV-402 when the folder contains neither a study nor a run, SRV-401 when the
            report cannot be written, MON-910 for a file of aliases that cannot be read.
    """
    found, reader = read_study(study)
    names = read_case_names(aliases)
    with gc_disabled():
        page = contents(found, reader, on_progress, names)
        disk = Disk()
        with refusals(study / "figures"):
            disk.make_folder(study / "figures")
        on_progress("files of the figures")
        write_gallery(study / "figures", gallery(page_drawings(page)), disk)
        write_tables(study, found.results, found.rounds)
        html = render(page)
        write_page_tables(study, html, disk)
    disk.write(study / paths.REPORT, html.encode())
    return study / paths.REPORT


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


def render(page: Page) -> str:
    """Return the page; the same files give the same bytes.

    The page contains no font or external address, and one script of its own; its content security
    policy forbids anything else.
    """
    content = {part.name: getattr(page, part.name) for part in fields(page)}
    return template_environment().get_template("page.html.j2").render(content)


def template_environment() -> Environment:
    """Return the environment of the templates; it escapes every value."""
    environment = Environment(
        loader=PackageLoader("fedsgcg.server.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "slug": slug}
    environment.globals |= CONSTANTS
    return environment


def contents(
    study: StudyFiles,
    reader: Reader,
    on_progress: OnProgress = ignore_progress,
    names: CaseNames = NO_NAMES,
) -> Page:
    """Return everything that the page shows."""
    on_progress("tables and claims")
    rows = heldout_rows(study.results)
    cases = case_means(rows)
    comparisons = _comparisons(study, rows, reader)
    figures = _figures(study, cases, reader, on_progress, names.names)
    results = _results(
        study, rows, linked_cases(cases, figures.overlays, names.names), reader, names.files
    )
    # Collected last, because reading the sites' files may have found damaged ones.
    problems = list(dict.fromkeys([*study.problems, *reader.problems]))
    return Page(_overview(study), results, comparisons, figures, problems)


def _overview(study: StudyFiles) -> Overview:
    shared, differing = settings_text(study.settings)
    versions = study.tree.get("versions")
    folder = study.folder.resolve().name
    return Overview(
        title=str(_data(study).get("name") or folder),
        folder=folder,
        status=study.status,
        status_title=STATUS_TITLES[study.status],
        status_sentence=status_sentence(study),
        troubled=troubled(study.cells),
        protocol=protocol_box(study),
        shared_settings=shared,
        differing_settings=differing,
        setting_methods=list(study.settings),
        command=str(study.tree.get("command") or ""),
        dates=[
            (name, str(study.tree[name])) for name in ("created", "updated") if study.tree.get(name)
        ],
        versions=(
            {str(name): str(version) for name, version in versions.items()}
            if isinstance(versions, dict)
            else {}
        ),
        runs=run_rows(study),
        hash_note=hash_note(study),
        alone=any(cell.trained_on for cell in study.cells),
    )


def _results(
    study: StudyFiles,
    rows: list[Row],
    cases: list[CaseRow],
    reader: Reader,
    names_from: Sequence[str],
) -> Results:
    summary = study_summary(study.results, study.rounds)
    unit = study_unit(study.results, study.rounds)
    structures = _structures(study)
    departures, parts = departure_rows(study, reader)
    others = [
        *summary_rows([{**row, "heldout": ""} for row in other_rows(study.results)]),
        *stated_summaries(study.rounds, unit, "observer"),
    ]
    return Results(
        structures=structures,
        unit=unit,
        methods=method_table(study, summary, structures, unit),
        tables=result_tables(summary, study, structures) if summary else [],
        notes=result_notes(summary, rows, _hospitals(study)),
        others=dice_rows(others),
        cases=cases[:CASE_ROWS],
        cases_in_all=len(cases),
        names_from=names_from,
        departures=departures,
        departure_parts=parts,
        adapted=adapted_table(study.rounds, list(study.labels), study.results, study.adapted),
    )


def _comparisons(study: StudyFiles, rows: list[Row], reader: Reader) -> Comparisons:
    structures, labels = _structures(study), study.labels
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
    papers = paper_tables(layouts, labels, colours)
    hospitals: list[HospitalTable] = []
    if len(values.places) > 1:
        hospitals = hospital_tables(values, main_pairs(labels), structures)
    sweeps: list[SweepResults] = []
    federation: FederationCost | None = None
    if rows:
        swept = sweeps_of(labels, study.settings)
        sweeps = sweep_sections(swept, labels, values, structures, colours, place)
        federation = federation_section(values, labels, structures, colours, study.rounds, place)
    return Comparisons(
        headline=headline(
            study_summary(study.results, study.rounds),
            claims,
            structures[0] if structures else "",
            _hospitals(study),
        ),
        has_heldout=has_heldout,
        place=place,
        nested=chosen_within_folds(study),
        dice_floor=f"{DICE_FLOOR:g}",
        papers=papers,
        paper_notes=paper_notes(published, papers) if rows else [],
        paper_seeds=seeds_note(values, main_labels(labels)),
        ablation=ablation_tables(layouts, labels, colours),
        differences=claims_section(claims, structures) if claims else None,
        hospital_tables=hospitals,
        sweeps=sweeps,
        federation=federation,
        privacy=privacy_section(
            values,
            labels,
            structures,
            study.rounds,
            study.settings,
            attacks_of(study.cells, reader),
        ),
    )


def _figures(
    study: StudyFiles,
    cases: list[CaseRow],
    reader: Reader,
    on_progress: OnProgress,
    names: Mapping[str, str],
) -> Figures:
    labels = study.labels
    groups = figure_groups(labels)
    colours = label_colours(labels)
    structures = _structures(study)
    images = Images()

    def case_panels(group: Group) -> tuple[PanelGroup, ...]:
        found = [(name, case_figures(cases, name, group.labels, colours)) for name in structures]
        return tuple(
            PanelGroup(name if len(structures) > 1 else "", tuple(panels))
            for name, panels in found
            if panels
        )

    def own_rounds(group: Group) -> list[Row]:
        return [row for row in study.rounds if row["method"] in group.labels]

    on_progress("curves")
    training = [training_figures(own_rounds(group), group.labels, colours) for group in groups]
    curves = [panel for panels in training for panel in panels]
    shift = panel_blocks(
        (group, untitled(shift_figures(own_rounds(group), group.labels))) for group in groups
    )
    by_case = panel_blocks((group, case_panels(group)) for group in groups)
    on_progress("features of single pixels")
    tsne = tsne_section(study, reader)
    similarity = similarity_section(study, reader)
    on_progress("overlays")
    overlays = overlay_blocks(study, reader, groups, images, names)
    return Figures(
        labels=list(labels),
        colours=colours,
        most_shown=max((len(group.labels) for group in groups), default=0),
        cases=list(by_case),
        training=list(panel_blocks(zip(groups, map(untitled, training), strict=True))),
        training_key=TrainingKey(
            total_loss=any(panel.total_loss for panel in curves),
            heldout=any(panel.heldout for panel in curves),
        ),
        shift=list(islice(shift, 1)),
        shift_classes=shift_classes(study.rounds),
        distances=distances_section(study.rounds, cases, list(labels)),
        tsne=tsne,
        similarity=similarity,
        overlays=overlays,
        slices=images.markup,
    )


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
