"""Nested selection: a setting is chosen anew for every held-out hospital, by hospitals that are sources there.

For `select=prototypes.weight` the source hospitals of a fold are left out in turn (an inner leave-one-hospital-out):
for each value the others train, and the one left out judges. The value with the highest Dice, averaged over cases and
structures within a hospital and then over hospitals, trains the fold's own cell on all its sources. The fold's held-out
hospital is no member of an inner federation at all, so it can choose nothing (methods.md 2.7).

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

from common.errors import fail
from common.settings.plan import Plan
from deploy.study.cell import Cell
from deploy.study.grid import folder_name

FOLDER = "selection"
FEWEST_SOURCES = 2

TUNED = ("prototypes.weight", "prototypes.temperature")
NESTED = (
    "{names} {were} chosen inside every fold: each source hospital was left out in turn, and the value with the "
    "highest mean Dice at the hospitals left out was taken. The fold's held-out hospital chose no setting."
)
NOT_NESTED = (
    "The defaults of {names} were once chosen with validation patients of hospitals that a fold may hold out, not "
    "inside the folds, so the figures of contrastive methods may be optimistic; select={select} chooses in each fold."
)
COMPARED = "{names} {were} compared, not chosen: the best of several values at the held-out hospitals is optimistic."


@dataclass(frozen=True)
class Candidate:
    """One value, or combination of values, that a fold may choose.

    Attributes:
        settings: As `name=value`, blanks between.
        tree: The fold's own cell with these settings.
        inner: The federations that judge it, one a source hospital.
    """

    settings: str
    tree: dict[str, Any]
    inner: tuple[Cell, ...]


@dataclass(frozen=True)
class Choice:
    """What a fold chose.

    Attributes:
        settings: The chosen settings, as `name=value`.
        scores: Mean Dice over the inner folds, by candidate.
    """

    settings: str
    scores: dict[str, float]


def inner_cells(
    tree: Mapping[str, Any], study: Path, label: str, heldout: str, settings: str
) -> tuple[Cell, ...]:
    """Return the federations that judge one candidate of one fold.

    Args:
        tree: Settings of the fold's own cell with the candidate's values.
        study: Folder of the study.
        label: What tables call the fold's cell.
        heldout: The fold's held-out hospital, "" for none.
        settings: The candidate, as `name=value`.

    Raises:
        FedsgcgError: CFG-003 when fewer than two hospitals are sources.
    """
    sources = [
        site for site in tree["data"]["sites"] if site != heldout and site not in tree["observers"]
    ]
    if len(sources) < FEWEST_SOURCES:
        found = f"{len(sources)} source hospitals with {heldout or 'nobody'} held out"
        action = (
            "take hospitals out of observers, use federation=by_site or pooled, or leave select out"
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
    words = " ".join([label, *(f"{name.rpartition('.')[2]}={value}" for name, _, value in values)])
    folder = study / FOLDER / (heldout or "all-sites") / folder_name(words)
    cells = []
    for site in sources:
        data = {**tree["data"], "sites": sources}
        own = {
            **tree,
            "data": data,
            "heldout": site,
            "observers": [],
            "output": str(folder / site / str(seed)),
        }
        own |= {"run": f"{tree['run']}/{FOLDER}/{folder.name}/{site}", "label": words, "chosen": ""}
        own["site"] = {**tree["site"], "feature_samples": 0}
        plan = Plan.from_tree(own)
        if heldout in plan.data.sites or heldout in plan.members():
            raise AssertionError(
                "a held-out hospital must not be asked for anything that chooses a setting"
            )
        name = f"{words} · {heldout or 'nobody'} held out, inner"
        cells.append(Cell(name, site, seed, own))
    return tuple(cells)


def choose(candidates: Sequence[Candidate]) -> Choice:
    """Return the candidate with the highest score; of equal ones the first that was named.

    Raises:
        FedsgcgError: RND-403 when no source hospital had a case to judge by.
    """
    tables = [{cell.heldout: _dice(cell) for cell in candidate.inner} for candidate in candidates]
    judged = [site for site in tables[0] if not any(math.isnan(table[site]) for table in tables)]
    if not judged:
        folders = candidates[0].inner[0].folder.parents[1]
        found = "no source hospital has a case to choose a setting by"
        raise fail(
            "RND-403", where=str(folders), found=found, expected="test cases at a source hospital"
        )
    scores = [float(np.mean([table[site] for site in judged])) for table in tables]
    best = candidates[int(np.argmax(scores))]
    named = {candidate.settings: score for candidate, score in zip(candidates, scores, strict=True)}
    return Choice(best.settings, named)


def _dice(cell: Cell) -> float:
    """Mean Dice of an inner cell at the hospital it left out, over cases and structures; NaN without a case."""
    rows = pq.read_table(cell.folder / "results.parquet", columns=["site", "dice"]).to_pylist()
    values = [row["dice"] for row in rows if row["site"] == cell.heldout]
    return float(np.mean(values)) if values else math.nan


def chosen_cell(cell: Cell, candidates: Sequence[Candidate], choice: Choice) -> Cell:
    """Return a fold's own cell with the settings that it chose."""
    tree = next(candidate.tree for candidate in candidates if candidate.settings == choice.settings)
    return replace(cell, tree={**tree, "chosen": choice.settings})


def describe_selection(names: Sequence[str], swept: Sequence[str], *, contrasts: bool) -> str:
    """Return how settings were chosen, for the study's record and beside its figures; "" where nothing was.

    Args:
        names: Settings that are chosen inside the folds.
        swept: Settings whose values are compared.
        contrasts: Whether a method of the study learns from the prototypes.
    """
    tuned = [name for name in TUNED if name not in names] if contrasts else []
    open_ones = [name for name in tuned if name not in swept]
    parts = (
        NESTED.format(names=" and ".join(names), were=_were(names)) if names else "",
        COMPARED.format(names=" and ".join(swept), were=_were(swept)) if swept else "",
        NOT_NESTED.format(names=" and ".join(open_ones), select=",".join(open_ones))
        if open_ones
        else "",
    )
    return " ".join(filter(None, parts))


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"
