"""Section of the report on privacy: accuracy against epsilon and against the success of attacks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedsgcg.server.report.differences import CaseValues
from fedsgcg.server.report.figures.plots import Point, Series, sweep_panel
from fedsgcg.server.report.format import show, show_interval
from fedsgcg.server.report.intervals import Interval
from fedsgcg.server.report.labels import Label
from fedsgcg.server.report.reader import Reader
from fedsgcg.server.report.sections.elements import Panel, TitledDrawing
from fedsgcg.server.report.study_files import Cell
from fedsgcg.server.report.tables import Row

ATTACKS: Final = "attacks.json"
MEMBERSHIP: Final = {
    "membership_model": "final model",
    "membership_update": "sites’ updates",
    "membership_statistics": "class statistics",
}
"""Entry of `attacks.json` -> what the attacker sees."""
EPSILON: Final = "epsilon"


@dataclass(frozen=True)
class PrivacyRow:
    """One label.

    Attributes:
        label: Its name.
        epsilon: Largest epsilon that a site spent in a cell, as shown; a dash without noise.
        dice: Mean Dice with interval, as shown.
        attacks: Of each attack of `MEMBERSHIP`, AUC with interval and TPR at 1 % FPR, as shown.
        others: The other attacks as sentences.
    """

    label: str
    epsilon: str
    dice: str
    attacks: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class PrivacyResults:
    """Results of a study with differential privacy or with attacks.

    Attributes:
        panels: Dice over epsilon, and over the AUC of the strongest attack.
        rows: All labels.
        heads: Names of the attacks.
        relation: Neighbouring relation, delta and what has no noise, by label.
        seeded: Whether the noise came from the seed.
        plain: Whether a grey line shows the runs without noise.
    """

    panels: tuple[Panel, ...]
    rows: tuple[PrivacyRow, ...]
    heads: tuple[str, ...]
    relation: tuple[str, ...]
    seeded: bool
    plain: bool

    @property
    def drawings(self) -> list[TitledDrawing]:
        """Every drawing with its title."""
        return [((panel.title,), panel.drawing) for panel in self.panels]


def privacy_section(
    values: CaseValues,
    labels: Mapping[str, Label],
    structures: Sequence[str],
    rounds: Sequence[Row],
    settings: Mapping[str, Any],
    attacks: Mapping[str, Sequence[Mapping[str, Any]]],
) -> PrivacyResults | None:
    """Compare accuracy, epsilon and the success of attacks; None without noise and attacks.

    Args:
        values: Values of the cases.
        labels: Labels of the study.
        structures: Structures in order; the first is drawn.
        rounds: Rows of `rounds.parquet`.
        settings: Resolved settings by label.
        attacks: Content of the `attacks.json` of each label's cells.
    """
    epsilons = epsilons_of(rounds)
    if not structures or not (epsilons or attacks):
        return None
    structure = structures[0]
    dice = {name: values.interval(name, structure, "dice") for name in labels}
    plain = [name for name in labels if name not in epsilons]
    over_epsilon = [(epsilons[name], name) for name in labels if name in epsilons]
    success = {name: auc_of(attacks.get(name, ())) for name in labels}
    over_success = [(success[name].mean, name) for name in labels if name in success]
    panels = [
        *_panel(over_epsilon, dice, "epsilon of a site", structure, plain),
        *_panel(over_success, dice, "AUC of membership from updates", structure, ()),
    ]
    rows = tuple(
        PrivacyRow(
            name,
            f"{epsilons[name]:.3g}" if name in epsilons else "–",
            _with_interval(dice[name]),
            tuple(_shown(attacks.get(name, ()), kind) for kind in MEMBERSHIP),
            tuple(_sentences(attacks.get(name, ()))),
        )
        for name in labels
    )
    noisy = {name: settings[name]["privacy"]["dp"] for name in epsilons if name in settings}
    relation = tuple(
        f"{name}: delta {dp['delta']:g}, noise in {' and '.join(dp['channels'])}"
        for name, dp in noisy.items()
    )
    seeded = any(dp["noise"] == "seeded" for dp in noisy.values())
    drawn = bool(panels) and bool(plain) and bool(over_epsilon)
    return PrivacyResults(tuple(panels), rows, tuple(MEMBERSHIP.values()), relation, seeded, drawn)


def attacks_of(cells: Sequence[Cell], reader: Reader) -> dict[str, list[dict[str, Any]]]:
    """Return the content of each label's `attacks.json` files."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        if (cell.folder / ATTACKS).is_file() and (tree := reader.tree(cell.folder / ATTACKS)):
            found[cell.method].append(dict(tree))
    return dict(found)


def epsilons_of(rounds: Sequence[Row]) -> dict[str, float]:
    """Return the largest epsilon of a site, by label."""
    found: dict[str, float] = {}
    for row in rounds:
        if row["metric"] == EPSILON:
            name = str(row["method"])
            found[name] = max(found.get(name, 0.0), float(row["value"]))
    return found


def auc_of(attacks: Sequence[Mapping[str, Any]]) -> Interval:
    """Return the mean AUC of membership from updates over the cells; NaN without any."""
    found = [tree["membership_update"]["auc"] for tree in attacks if tree.get("membership_update")]
    mean = math.fsum(found) / len(found) if found else math.nan
    return Interval(mean, math.nan, math.nan)


def _panel(
    places: Sequence[tuple[float, str]],
    dice: Mapping[str, Interval],
    name: str,
    structure: str,
    plain: Sequence[str],
) -> list[Panel]:
    """Draw the Dice of labels over a number; nothing with fewer than two numbers."""
    known = sorted(
        (number, label)
        for number, label in places
        if math.isfinite(number) and math.isfinite(dice[label].mean)
    )
    if len({number for number, _ in known}) < 2:
        return []
    points = tuple(Point(label, number, (dice[label],)) for number, label in known)
    means = "; ".join(
        f"{label} {number:.3g}: {show(dice[label].mean, 3)}" for number, label in known
    )
    alt = f"Mean Dice of {structure} over {name}: {means}."
    levels = [(dice[label],) for label in plain if math.isfinite(dice[label].mean)]
    drawing = sweep_panel([Series("", 1, points)], name, ["Dice"], alt, levels)
    return [Panel(f"Dice over {name}", drawing)]


def _with_interval(interval: Interval) -> str:
    if not math.isfinite(interval.mean):
        return "–"
    return f"{show(interval.mean, 3)} ({show_interval(interval, 3)})"


def _shown(attacks: Sequence[Mapping[str, Any]], kind: str) -> str:
    found = [tree[kind] for tree in attacks if tree.get(kind)]
    if not found:
        return "–"
    mean = math.fsum(each["auc"] for each in found) / len(found)
    low = min(each["auc_interval"][0] for each in found)
    high = max(each["auc_interval"][1] for each in found)
    rate = math.fsum(each["tpr"] for each in found) / len(found)
    return f"AUC {mean:.2f} ({low:.2f}–{high:.2f}), TPR {rate:.0%}"


def _sentences(attacks: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    differences = [tree["difference"] for tree in attacks if tree.get("difference")]
    if differences:
        error = math.fsum(each["error"] for each in differences) / len(differences)
        found.append(f"difference of two releases: relative error {error:.2g}")
    gradients = [tree["gradient"] for tree in attacks if tree.get("gradient")]
    if gradients:
        both = [
            math.fsum(each[name] for each in gradients) / len(gradients)
            for name in ("correlation", "chance")
        ]
        found.append(
            f"slice from a gradient: correlation {both[0]:.2f} (other slices {both[1]:.2f})"
        )
    return found
