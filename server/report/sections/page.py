"""The content of the whole page. The templates see the attributes of `Page` as variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedsgcg.common.errors import Problem
from fedsgcg.server.report.sections.adapted import AdaptedTable
from fedsgcg.server.report.sections.claims import Claims, HospitalTable
from fedsgcg.server.report.sections.distances import Distances
from fedsgcg.server.report.sections.elements import PanelBlock
from fedsgcg.server.report.sections.features import Similarity, Tsne
from fedsgcg.server.report.sections.federation import FederationCost
from fedsgcg.server.report.sections.methods import MethodTable
from fedsgcg.server.report.sections.overlays import OverlayBlock
from fedsgcg.server.report.sections.papers import PaperTable
from fedsgcg.server.report.sections.privacy import PrivacyResults
from fedsgcg.server.report.sections.results import (
    CaseRow,
    DepartureRow,
    OtherRow,
    ResultTable,
    RunRow,
)
from fedsgcg.server.report.sections.sweeps import SweepResults
from fedsgcg.server.report.study_files import Cell


@dataclass(frozen=True)
class Overview:
    """Title, status, protocol and settings: everything that is not a result.

    Attributes:
        title: Name of the data set, or of the folder.
        folder: Name of the study folder.
        status: completed, degraded, incomplete or failed.
        status_title: The status as a heading.
        status_sentence: How many runs ended, and how.
        troubled: Runs that did not complete.
        protocol: (topic, lines) of the protocol.
        shared_settings: Settings that all methods share, as YAML.
        differing_settings: (setting, value of each method) of the others.
        setting_methods: Methods with settings, in the order of these values.
        command: Command that started the study, "" if unknown.
        dates: (name, time) of the creation and the last change, if known.
        versions: Version by package.
        runs: Every run.
        hash_note: Which hashes of models can be compared.
        alone: Whether hospitals trained alone in some runs.
    """

    title: str
    folder: str
    status: str
    status_title: str
    status_sentence: str
    troubled: Sequence[Cell]
    protocol: Sequence[tuple[str, Sequence[str]]]
    shared_settings: str
    differing_settings: Sequence[tuple[str, Sequence[str]]]
    setting_methods: Sequence[str]
    command: str
    dates: Sequence[tuple[str, str]]
    versions: Mapping[str, str]
    runs: Sequence[RunRow]
    hash_note: str
    alone: bool


@dataclass(frozen=True)
class Results:
    """Results in all metrics, cases, and the data sent by each hospital.

    Attributes:
        structures: Structures that have results, in order.
        unit: Unit of the distances.
        methods: All methods with results, costs and what leaves a hospital, None for one method.
        tables: One table per structure, none without a result.
        notes: Notes on these tables.
        others: Results that are not of held-out hospitals.
        cases: Cases with each method, lowest Dice first; the table of the page may be cut.
        cases_in_all: Number of rows of the uncut table.
        names_from: Files from which the names of cases were read.
        departures: The data sent by each hospital.
        departure_parts: Parts of the messages, largest first.
        adapted: Results after an adaptation to the hospitals' images, None without any.
    """

    structures: Sequence[str]
    unit: str
    methods: MethodTable | None
    tables: Sequence[ResultTable]
    notes: Sequence[str]
    others: Sequence[OtherRow]
    cases: Sequence[CaseRow]
    cases_in_all: int
    names_from: Sequence[str]
    departures: Sequence[DepartureRow]
    departure_parts: Sequence[str]
    adapted: AdaptedTable | None = None


@dataclass(frozen=True)
class Comparisons:
    """The papers' tables, ablation, claims, sweeps and the cost of federation.

    Attributes:
        headline: The main result in one or two sentences.
        has_heldout: Whether hospitals were held out.
        place: Name of the evaluated cases.
        nested: Whether settings were chosen within each fold.
        dice_floor: Mean Dice below which there is no verdict, as shown.
        papers: Tables in the layout of the papers.
        paper_notes: How the protocol of printed rows differs; empty without printed rows.
        paper_seeds: What an entry of these tables is.
        ablation: Tables of the effect of RAM and SgCG.
        differences: The study's main comparisons, None without any.
        hospital_tables: The same comparisons at every hospital.
        sweeps: The swept settings.
        federation: The cost of federation, None with one federation.
        privacy: Accuracy against epsilon and attacks, None without noise and attacks.
    """

    headline: str
    has_heldout: bool
    place: str
    nested: bool
    dice_floor: str
    papers: Sequence[PaperTable]
    paper_notes: Sequence[str]
    paper_seeds: str
    ablation: Sequence[PaperTable]
    differences: Claims | None
    hospital_tables: Sequence[HospitalTable]
    sweeps: Sequence[SweepResults]
    federation: FederationCost | None
    privacy: PrivacyResults | None


@dataclass(frozen=True)
class TrainingKey:
    """Which kinds of lines the figures of the training have.

    Attributes:
        total_loss: Whether the total loss differs from the supervised loss.
        heldout: Whether the held-out hospital was evaluated during training.
    """

    total_loss: bool
    heldout: bool


@dataclass(frozen=True)
class Figures:
    """Figures with their keys.

    Attributes:
        labels: Labels of the study, in order.
        colours: Index of the palette by label.
        most_shown: Most labels in one figure.
        cases: Dice of every case.
        training: Curves by round.
        training_key: Kinds of lines of these curves.
        shift: Scatter between and within hospitals, of one group of labels.
        shift_classes: Classes of this figure, in the order of their colours.
        distances: How far each hospital is from the others.
        tsne: t-SNE of pixel features, None without features on this machine.
        similarity: Similarity of the classes.
        overlays: Contours on images, by hospital.
        slices: Images that the overlays refer to, as SVG.
    """

    labels: Sequence[str]
    colours: Mapping[str, int]
    most_shown: int
    cases: Sequence[PanelBlock]
    training: Sequence[PanelBlock]
    training_key: TrainingKey
    shift: Sequence[PanelBlock]
    shift_classes: Sequence[str]
    distances: Distances
    tsne: Tsne | None
    similarity: Similarity
    overlays: Sequence[OverlayBlock]
    slices: Markup


@dataclass(frozen=True)
class Page:
    """Everything that the page shows.

    Attributes:
        overview: Title, status, protocol and settings.
        results: Results in all metrics.
        comparisons: What is compared.
        figures: Figures.
        problems: Files that could not be read.
    """

    overview: Overview
    results: Results
    comparisons: Comparisons
    figures: Figures
    problems: Sequence[Problem]
