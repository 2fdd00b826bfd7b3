"""Features: t-SNE of sampled pixels before and after SgCG, and the similarity of the classes.

Sampled pixels are stored in a site's own folder, and only on request; class prototypes are stored
by the coordinator.

Legend: N pixels, A feature channels, K classes, tau temperature.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsgcg.common.feature_samples import FILE, FeatureSamples
from fedsgcg.common.run_folder import paths
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.report.figures.plots import matrix_panel, scatter_panel
from fedsgcg.server.report.labels import Label, figure_groups
from fedsgcg.server.report.reader import Reader
from fedsgcg.server.report.sections.elements import Panel, TitledDrawing
from fedsgcg.server.report.study_files import DONE, Cell, StudyFiles

Floats = npt.NDArray[np.float64]
Kind = Literal["cosine", "share"]

SHOWN_PIXELS = 500  # pixels of one t-SNE; two of them take a few seconds
NEIGHBOURS = 10
FEWEST = 12  # fewest pixels for a meaningful t-SNE
MOST_CELLS = 24  # most cells whose prototypes are averaged for one label
MOST_MATRICES = 6
PAIRS = (("ram", "ram_sgcg"), ("source", "sgcg"), ("source", "ram_sgcg"))
"""Training without and with SgCG, most informative first."""
USUAL_TEMPERATURE = 0.5


@dataclass(frozen=True, eq=False)
class Pixels:
    """Sampled pixels of all sites of one cell.

    Attributes:
        features: (N, A).
        classes: (N,) class indices.
        sites: (N,) index into `names`.
        names: The sites.
    """

    features: Floats
    classes: npt.NDArray[np.int64]
    sites: npt.NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True)
class TsneRow:
    """t-SNE of the pixels of one run.

    Attributes:
        method: Label of the run.
        panels: The plane by class and by hospital; empty with too few pixels.
        text: How the features cluster in feature space.
    """

    method: str
    panels: tuple[Panel, ...]
    text: str


@dataclass(frozen=True)
class Tsne:
    """t-SNE of one fold and seed, without and with SgCG.

    Attributes:
        rows: One row per run.
        heldout: Held-out hospital, "" for none.
        seed: Seed.
        classes: Names of the classes, in the order of their colours.
        sites: Names of the hospitals, in the order of their colours.
    """

    rows: tuple[TsneRow, ...]
    heldout: str
    seed: int
    classes: tuple[str, ...]
    sites: tuple[str, ...]

    @property
    def drawings(self) -> list[TitledDrawing]:
        """Every drawing with its title."""
        return [((panel.title,), panel.drawing) for row in self.rows for panel in row.panels]


@dataclass(frozen=True)
class SimilarityPanel(Panel):
    """Similarity of the classes of one label.

    Attributes:
        kind: `cosine` of the class means, or `share` (SgCG's class probabilities).
        tau: Temperature of the probabilities, as shown.
    """

    kind: Kind = "cosine"
    tau: str = ""


@dataclass(frozen=True)
class Similarity:
    """Similarity of the classes of every main label.

    Attributes:
        panels: One panel per label and kind; empty without class statistics.
    """

    panels: tuple[SimilarityPanel, ...]

    @property
    def kinds(self) -> list[Kind]:
        """Kinds that have panels, in the order of the page."""
        return list(dict.fromkeys(panel.kind for panel in self.panels))

    @property
    def drawings(self) -> list[TitledDrawing]:
        """Every drawing with its titles."""
        return [((panel.kind, panel.title), panel.drawing) for panel in self.panels]


def tsne_section(study: StudyFiles, reader: Reader) -> Tsne | None:
    """Two rows of panels (before, after) by class and by hospital; None without data."""
    chosen = _choose_cells(study)
    found = [(cell, pixels) for cell in chosen if (pixels := read_pixels(cell, reader)) is not None]
    if not found:
        return None
    names = class_names(study)
    classes = sorted({int(label) for _, pixels in found for label in pixels.classes})
    heldout, sites = found[0][0].heldout, found[0][1].names
    return Tsne(
        rows=tuple(_tsne_row(cell, thinned(pixels), names) for cell, pixels in found),
        heldout=heldout,
        seed=found[0][0].seed,
        classes=tuple(names.get(label, f"class {label}") for label in classes),
        sites=tuple(f"{name} (held out)" if name == heldout else name for name in sites),
    )


def _choose_cells(study: StudyFiles) -> list[Cell]:
    """Cells of one fold and seed with features.

    One without and one with SgCG if both exist, else the first.
    """
    with_file = [cell for cell in study.cells if cell.status in DONE and _files(cell)]
    labels = study.labels
    for before, after in PAIRS:
        for cell in with_file:
            same = [other for other in with_file if other.key[1:] == cell.key[1:]]
            partner = [
                other for other in same if _fits(labels[other.method], labels[cell.method], after)
            ]
            if labels[cell.method].trains == before and labels[cell.method].plain and partner:
                return [cell, partner[0]]
    return with_file[:1]


def _fits(label: Label, other: Label, trains: str) -> bool:
    return label.trains == trains and label.plain and label.federation == other.federation


def _files(cell: Cell) -> list[Path]:
    return sorted(cell.folder.glob(f"sites/*/{FILE}"))


def read_pixels(cell: Cell, reader: Reader) -> Pixels | None:
    """Join the samples of a cell's sites; None without a pixel.

    Sites with a different number of channels are ignored.
    """
    found: dict[str, FeatureSamples] = {}
    for path in _files(cell):
        samples = reader.features(path)
        if samples is not None and len(samples.features):
            found[path.parent.name] = samples
    widths = {samples.features.shape[1] for samples in found.values()}
    kept = {
        name: samples for name, samples in found.items() if samples.features.shape[1] == min(widths)
    }
    if not kept:
        return None
    return Pixels(
        np.concatenate([samples.features for samples in kept.values()]).astype(np.float64),
        np.concatenate([samples.classes for samples in kept.values()]),
        np.concatenate(
            [np.full(len(samples.classes), place) for place, samples in enumerate(kept.values())]
        ),
        tuple(kept),
    )


def thinned(pixels: Pixels, most: int = SHOWN_PIXELS) -> Pixels:
    """Keep about `most` pixels, equally many per pair of site and class if available."""
    groups = [
        np.flatnonzero((pixels.sites == site) & (pixels.classes == label))
        for site in np.unique(pixels.sites)
        for label in np.unique(pixels.classes)
    ]
    rng = np.random.default_rng(0)
    share = max(1, most // max(1, sum(bool(group.size) for group in groups)))
    kept = np.sort(
        np.concatenate(
            [rng.choice(group, min(share, group.size), replace=False) for group in groups]
        )
    )
    return Pixels(pixels.features[kept], pixels.classes[kept], pixels.sites[kept], pixels.names)


def _tsne_row(cell: Cell, pixels: Pixels, names: Mapping[int, str]) -> TsneRow:
    same_class, same_site, chance = neighbour_shares(pixels)
    text = (
        f"Of the {NEIGHBOURS} nearest neighbours of a pixel, {_percent(same_class)} are of its "
        f"class, and {_percent(same_site)} of those are of its hospital ({_percent(chance)} if "
        "hospitals were mixed evenly)."
    )
    if len(pixels.features) < FEWEST:
        return TsneRow(cell.method, (), "Too few pixels to draw.")
    plane = tsne(pixels.features)
    labels, kinds = np.unique(pixels.classes, return_inverse=True)
    titles = [names.get(int(label), f"class {label}") for label in labels]
    panels = []
    for title, kind, words in (
        ("by class", kinds, titles),
        ("by hospital", pixels.sites, pixels.names),
    ):
        alt = f"t-SNE of sampled pixel features of {cell.method}, {title}. {text}"
        panels.append(Panel(f"{cell.method}, {title}", scatter_panel(plane, kind, alt, words)))
    return TsneRow(cell.method, tuple(panels), text)


def tsne(features: Floats) -> Floats:
    """Embed (N, A) features in a plane (N, 2) by t-SNE (van der Maaten and Hinton 2008).

    The result is reproducible.
    """
    from sklearn.manifold import TSNE  # imported here because the import takes a second

    perplexity = min(30.0, (len(features) - 1) / 4)
    model = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=400, n_jobs=1)
    return np.asarray(model.fit_transform(features), dtype=np.float64)


def neighbour_shares(pixels: Pixels, neighbours: int = NEIGHBOURS) -> tuple[float, float, float]:
    """How features cluster, measured in feature space and not in the plane.

    Returns:
        Share of a pixel's nearest neighbours of the same class; share of these from the same
        hospital; and the expected value of the latter if a class did not depend on the hospital.
    """
    count = len(pixels.features)
    near = min(neighbours, count - 1)
    if near < 1:
        return math.nan, math.nan, math.nan
    squares = (pixels.features**2).sum(axis=1)
    distance = squares[:, None] + squares[None, :] - 2 * pixels.features @ pixels.features.T
    np.fill_diagonal(distance, np.inf)
    chosen = np.argpartition(distance, near - 1, axis=1)[:, :near]
    kin = pixels.classes[chosen] == pixels.classes[:, None]
    home = kin & (pixels.sites[chosen] == pixels.sites[:, None])
    same = (pixels.classes[:, None] == pixels.classes[None, :]) & ~np.eye(count, dtype=bool)
    both = same & (pixels.sites[:, None] == pixels.sites[None, :])
    expected = np.divide(
        both.sum(axis=1), same.sum(axis=1), out=np.full(count, np.nan), where=same.sum(axis=1) > 0
    )
    weight = kin.sum(axis=1)
    chance = float(np.nansum(expected * weight) / weight.sum()) if weight.sum() else math.nan
    return float(kin.mean()), float(home.sum() / kin.sum()) if kin.any() else math.nan, chance


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else "–"


def similarity_section(study: StudyFiles, reader: Reader) -> Similarity:
    """Class similarity for every main label: cosine of means, and SgCG's probabilities."""
    names = class_names(study)
    panels = []
    labels = [name for group in figure_groups(study.labels) for name in group.labels]
    for label in labels[:MOST_MATRICES]:
        cells = [cell for cell in study.cells if cell.method == label and cell.status in DONE][
            :MOST_CELLS
        ]
        found = list(_statistics(cells, reader))
        widest = max((part.num_classes for _, part in found), default=0)
        parts = [(sampled, part) for sampled, part in found if part.num_classes == widest]
        if not parts:
            continue
        tau = temperature(study.settings.get(label, {}))
        titles = [names.get(place, f"class {place}") for place in range(widest)]
        detail = f"mean of {len(parts)} run{'s' if len(parts) > 1 else ''}"
        if any(sampled for sampled, _ in parts):
            detail += ", from sampled pixels"
        matrices: dict[Kind, Floats] = {
            "cosine": mean_of([cosines(p) for _, p in parts]),
            "share": mean_of([logit_shares(p, tau) for _, p in parts]),
        }
        for kind, matrix in matrices.items():
            caption = "Cosine between class means"
            if kind == "share":
                caption = "SgCG's class probabilities of the class means"
            alt = f"{caption}, {label}, {detail}. {_pairs_text(matrix, titles)}"
            drawing = matrix_panel(matrix, titles, alt)
            panels.append(SimilarityPanel(label, drawing, detail, kind=kind, tau=f"{tau:g}"))
    return Similarity(tuple(panels))


def _statistics(cells: Sequence[Cell], reader: Reader) -> Iterator[tuple[bool, ClassStatistics]]:
    """(Whether from sampled pixels, class statistics) of each cell that has either."""
    for cell in cells:
        stored = reader.prototypes(cell.folder / paths.PROTOTYPES)
        if stored is not None:
            yield False, stored
            continue
        pixels = read_pixels(cell, reader)
        if pixels is not None and (pixels.classes >= 0).all():
            yield (
                True,
                ClassStatistics.from_features(
                    pixels.features, pixels.classes, int(pixels.classes.max()) + 1
                ),
            )


def cosines(statistics: ClassStatistics) -> Floats:
    """(K, K) cosine between class means; NaN for a class without pixels or with a zero mean."""
    norm = np.linalg.norm(statistics.mean, axis=1)
    known = (statistics.count > 0) & (norm > 0)
    unit = np.divide(
        statistics.mean,
        norm[:, None],
        out=np.full_like(statistics.mean, np.nan),
        where=known[:, None],
    )
    return np.asarray(unit @ unit.T)


def logit_shares(statistics: ClassStatistics, tau: float) -> Floats:
    """Return (K, K): SgCG's class probabilities of the class means.

    Row k is the softmax over j of the logit z_j = q.mu_j / tau + q.Sigma_j q / (2 tau^2) at q =
    mu_k (docs/explanation/sgcg.md, "The closed form"): the probability that the contrastive loss
    assigns the mean pixel of class k to class j. NaN for an absent class.
    """
    known = statistics.count > 0
    mean = statistics.mean
    spread = np.einsum("ka,jab,kb->kj", mean, statistics.covariance, mean)
    logits = mean @ mean.T / tau + spread / (2 * tau**2)
    logits = np.where(known[None, :], logits, -np.inf)
    if not known.any():
        return np.full_like(logits, np.nan)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return np.asarray(np.where(known[:, None] & known[None, :], shares, np.nan))


def mean_of(matrices: Sequence[Floats]) -> Floats:
    """Element-wise mean of the finite values."""
    stack = np.stack(matrices)
    known = np.isfinite(stack)
    total = np.where(known, stack, 0.0).sum(axis=0)
    count = known.sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))


def temperature(tree: Mapping[str, Any]) -> float:
    """Temperature from a label's settings, or the usual one if they do not contain it."""
    part = tree.get("prototypes")
    found = part.get("temperature") if isinstance(part, Mapping) else None
    return float(found) if isinstance(found, (int, float)) and found > 0 else USUAL_TEMPERATURE


def class_names(study: StudyFiles) -> dict[int, str]:
    """Name of every class index, in the order of the settings."""
    data = next((tree.get("data") for tree in study.settings.values()), None)
    classes = data.get("classes") if isinstance(data, Mapping) else None
    if not isinstance(classes, Mapping):
        return {}
    return {place: str(name) for place, name in enumerate(classes)}


def _pairs_text(matrix: Floats, names: Sequence[str]) -> str:
    pairs: dict[str, float] = defaultdict(float)
    for row, column in combinations(range(len(names)), 2):
        pairs[f"{names[row]} and {names[column]}"] = float(matrix[row, column])
    return (
        "; ".join(f"{name} {value:.2f}" for name, value in pairs.items() if math.isfinite(value))
        + "."
    )
