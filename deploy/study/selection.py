"""Nested selection: in every fold, the source sites choose the value of a setting.

For `select=prototypes.weight` the source sites of a fold are held out in turn (an inner
leave-one-site-out): for each value the other sources train, and the held-out source evaluates. The
value with the highest Dice, averaged over cases and structures within a site and then over sites,
trains the fold's own cell on all its sources. The fold's held-out site is not a member of any inner
federation, so it cannot influence the choice (docs/explanation/protocol.md, "Choosing the model and
the settings").

    selection/<fold>/<label and value>/<inner fold>/<seed>    run folder of an inner cell
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fedsgcg.common.errors import fail
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.budget import budgeted
from fedsgcg.deploy.study.cell import Cell

FOLDER = "selection"
ROLES = ("observers", "unlabelled")
FEWEST_SOURCES = 2

TUNED = ("prototypes.weight", "prototypes.temperature")
NESTED = (
    "{names} {were} chosen inside every fold: each source hospital was held out in turn, and the "
    "value with the highest mean Dice at these hospitals was taken. The fold's own held-out "
    "hospital had no influence on the choice."
)
NOT_NESTED = (
    "The defaults of {names} were chosen with validation patients of hospitals that a fold may "
    "hold out, not inside the folds, so the results of contrastive methods may be optimistic; "
    "select={select} chooses them in each fold."
)
COMPARED = (
    "{names} {were} compared, not chosen: the best of several values at the held-out hospitals is "
    "an optimistic result."
)


@dataclass(frozen=True)
class Candidate:
    """A value, or combination of values, that a fold may choose.

    Attributes:
        settings: `name=value`, separated by spaces.
        tree: Settings of the fold's own cell with these values.
        inner: The inner federations that evaluate it, one per source site.
    """

    settings: str
    tree: dict[str, Any]
    inner: tuple[Cell, ...]


@dataclass(frozen=True)
class Choice:
    """The choice of a fold.

    Attributes:
        settings: The chosen settings, as `name=value`.
        scores: Mean Dice over the inner folds, by candidate.
    """

    settings: str
    scores: dict[str, float]


def inner_cells(
    tree: Mapping[str, Any], study: Path, label: str, heldout: str, settings: str
) -> tuple[Cell, ...]:
    """Return the inner federations that evaluate one candidate of one fold.

    Args:
        tree: Settings of the fold's own cell with the candidate's values.
        study: Folder of the study.
        label: Label of the fold's cell in tables.
        heldout: The fold's held-out site, "" for none.
        settings: The candidate, as `name=value`.

    Raises:
        FedsgcgError: CFG-003 when the fold has fewer than two source sites.
    """
    sources = [
        site
        for site in tree["data"]["sites"]
        if site not in (heldout, *tree["observers"], *tree["unlabelled"])
    ]
    if len(sources) < FEWEST_SOURCES:
        found = f"{len(sources)} source hospitals with {heldout or 'none'} held out"
        action = (
            "remove hospitals from observers, use federation=by_site or pooled, or leave out select"
        )
        raise fail(
            "CFG-003",
            where="select",
            found=found,
            expected="two or more in every fold",
            action=action,
        )
    seed = int(tree["seed"])
    values = (text.partition("=") for text in settings.split())
    parts = [label, *(f"{name.rpartition('.')[2]}={value}" for name, _, value in values)]
    inner_label = " ".join(parts)
    folder = study / FOLDER / (heldout or paths.ALL_SITES) / paths.label_folder(inner_label)
    cells = []
    for site in sources:
        data = {**tree["data"], "sites": sorted([*sources, *tree["unlabelled"]])}
        own = {
            **tree,
            "data": data,
            "heldout": site,
            "observers": [],
            "output": str(folder / site / str(seed)),
        }
        own |= {
            "run": f"{tree['run']}/{FOLDER}/{folder.name}/{site}",
            "label": inner_label,
            "chosen": "",
        }
        own["site"] = {**tree["site"], "feature_samples": 0}
        hospitals = {"sites": data["sites"], **{name: own[name] for name in ROLES}}
        own = budgeted(own, hospitals)
        plan = Plan.from_tree(own)
        if heldout in plan.data.sites or heldout in plan.members():
            raise AssertionError("a held-out site must not take part in choosing a setting")
        name = f"{inner_label} · {heldout or 'none'} held out, inner"
        cells.append(Cell(name, site, seed, own))
    return tuple(cells)


def choose(candidates: Sequence[Candidate]) -> Choice:
    """Return the candidate with the highest score, the first one in case of a tie.

    Raises:
        FedsgcgError: RND-403 when no source site has a case for the evaluation.
    """
    tables = [{cell.heldout: _dice(cell) for cell in candidate.inner} for candidate in candidates]
    judged = [site for site in tables[0] if not any(math.isnan(table[site]) for table in tables)]
    if not judged:
        folders = candidates[0].inner[0].folder.parents[1]
        found = "no source hospital has a case on which to choose a setting"
        raise fail(
            "RND-403", where=str(folders), found=found, expected="test cases at a source hospital"
        )
    scores = [float(np.mean([table[site] for site in judged])) for table in tables]
    best = candidates[int(np.argmax(scores))]
    named = {candidate.settings: score for candidate, score in zip(candidates, scores, strict=True)}
    return Choice(best.settings, named)


def _dice(cell: Cell) -> float:
    """Return the mean Dice of an inner cell at its held-out site; NaN without a case.

    The mean is over cases and structures.
    """
    rows = pq.read_table(cell.folder / paths.RESULTS, columns=["site", "dice"]).to_pylist()
    values = [row["dice"] for row in rows if row["site"] == cell.heldout]
    return float(np.mean(values)) if values else math.nan


def chosen_cell(cell: Cell, candidates: Sequence[Candidate], choice: Choice) -> Cell:
    """Return a fold's own cell with the chosen settings."""
    tree = next(candidate.tree for candidate in candidates if candidate.settings == choice.settings)
    return replace(cell, tree={**tree, "chosen": choice.settings})


def describe_selection(names: Sequence[str], swept: Sequence[str], *, contrasts: bool) -> str:
    """Return how settings were chosen, for the study's record and report; "" if none were.

    Args:
        names: Settings that are chosen inside the folds.
        swept: Settings whose values are compared.
        contrasts: Whether a method of the study has a contrastive loss.
    """
    parts = []
    if names:
        parts.append(NESTED.format(names=" and ".join(names), were=_were(names)))
    if swept:
        parts.append(COMPARED.format(names=" and ".join(swept), were=_were(swept)))
    defaults = [name for name in TUNED if name not in names and name not in swept]
    if contrasts and defaults:
        parts.append(NOT_NESTED.format(names=" and ".join(defaults), select=",".join(defaults)))
    return " ".join(parts)


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"
