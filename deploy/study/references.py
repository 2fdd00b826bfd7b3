"""References of a study: supervised training without a federation, in rows of their own.

    local        every hospital alone: the mean over the models of single hospitals
    pooled       the images of all training hospitals in one place
    best_single  of the models of single hospitals the one that does best at the others

The last one needs no further training. The other training hospitals evaluate every hospital's own
model as observers, and the model with the highest Dice there is the fold's best. The held-out
hospital takes no part in the choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.settings.run import REFERENCES
from fedsgcg.common.settings.training import TRAITS
from fedsgcg.deploy.study.grid import Variant

LOCAL, POOLED, BEST = REFERENCES
METHOD: Final = "source"
FEWEST_SOURCES: Final = 2

Row = Mapping[str, Any]


@dataclass(frozen=True)
class BestHospital:
    """The best model of a single hospital in one fold.

    Attributes:
        method: Label of the models.
        heldout: The held-out hospital.
        seed: The seed.
        hospital: The hospital that trained the model.
        scores: Mean Dice of every hospital's model at the other training hospitals.
    """

    method: str
    heldout: str
    seed: int
    hospital: str
    scores: dict[str, float]


def reference_variants(references: Sequence[str]) -> list[Variant]:
    """Return the variants that references train."""
    wanted = [(LOCAL in references or BEST in references, LOCAL), (POOLED in references, POOLED)]
    return [
        Variant(f"{METHOD} {ownership}", METHOD, ownership, (), TRAITS[METHOD])
        for asked, ownership in wanted
        if asked
    ]


def check_references(references: Sequence[str], sources: Mapping[str, Sequence[str]]) -> None:
    """Refuse references that a study cannot have.

    Args:
        references: The references.
        sources: Training hospitals of each held-out one; "" is none.

    Raises:
        FedsgcgError: CFG-040 for a choice of the best hospital without others that can judge it.
    """
    problems = []
    for heldout, names in sources.items() if BEST in references else ():
        if not heldout:
            found = "best_single without a held-out hospital"
            action = "set heldout=all, or leave best_single out of references"
            expected = "a held-out hospital, at which the best model is evaluated"
            problems.append(Problem("CFG-040", found, expected, action, "references"))
        elif len(names) < FEWEST_SOURCES:
            found = f"best_single with {len(names)} training hospital and {heldout} held out"
            expected = "two or more in every fold: the others judge each hospital's model"
            action = "leave best_single out of references, or take more hospitals"
            problems.append(Problem("CFG-040", found, expected, action, "references"))
    if problems:
        raise FedsgcgError(*problems)


def best_hospitals(rows: Sequence[Row]) -> list[BestHospital]:
    """Return the best single hospital of every fold whose models are all evaluated.

    A model's score is its Dice averaged over the cases and structures of a hospital, then over the
    training hospitals other than its own. Of equal scores the first name counts.

    Args:
        rows: Rows of `results.parquet`, those of hospitals that trained alone among them.
    """
    folds: dict[tuple[str, str, int], dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        if row["trained_on"] and row["heldout"]:
            key = row["method"], row["heldout"], int(row["seed"])
            by_site = folds.setdefault(key, {}).setdefault(row["trained_on"], defaultdict(list))
            by_site[row["site"]].append(float(row["dice"]))
    found = []
    for (method, heldout, seed), models in sorted(folds.items()):
        scores = dict(_scores(models, heldout))
        if scores:
            best = max(scores, key=lambda name: scores[name])
            found.append(BestHospital(method, heldout, seed, best, scores))
    return found


def _scores(
    models: Mapping[str, Mapping[str, Sequence[float]]], heldout: str
) -> Iterator[tuple[str, float]]:
    """Yield (hospital, score of its model); nothing unless every model was judged."""
    sources = sorted({site for own in models.values() for site in own} - {heldout})
    complete = len(sources) >= FEWEST_SOURCES and set(sources) == set(models)
    for name in sources if complete else ():
        means = [float(np.mean(models[name][site])) for site in sources if site in models[name]]
        yield name, float(np.mean(means))


def best_rows(rows: Sequence[Row], chosen: Sequence[BestHospital]) -> list[dict[str, Any]]:
    """Return the rows of the best hospitals' models at the held-out hospital, as own rows."""
    best = {(one.method, one.heldout, one.seed): one for one in chosen}
    found = []
    for row in rows:
        one = best.get((row["method"], row["heldout"], int(row["seed"])))
        if one and row["trained_on"] == one.hospital and row["site"] == one.heldout:
            label = one.method.replace(f" {LOCAL}", f" {BEST}", 1)
            own = {"method": label, "federation": BEST, "trained_on": ""}
            found.append({**row, **own, "chosen": f"trained_on={one.hospital}"})
    return found
