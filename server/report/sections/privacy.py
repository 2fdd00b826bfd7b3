"""Section of the report on privacy: accuracy against epsilon and against the success of attacks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedsgcg.server.report.differences import CaseValues
from fedsgcg.server.report.figures.trade_off import Mark, Trade, trade_off_panel
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
AUC: Final = "AUC of membership from updates"
TITLES: Final = {AUC: "the success of an attack"}


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
        panels: Dice over epsilon, and over the AUC of membership from updates.
        rows: All labels.
        heads: Names of the attacks.
        relation: Neighbouring relation, delta and what has no noise, by label.
        seeded: Whether the noise came from the seed.
        plain: Whether a grey line shows a run without noise.
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
    names = sorted(labels, key=lambda name: -epsilons.get(name, math.inf))  # without noise first
    dice = {name: values.interval(name, structure, "dice") for name in names}
    plain = [
        dice[name].mean for name in names if name not in epsilons and math.isfinite(dice[name].mean)
    ]
    level = Mark(plain[0], "without noise") if plain else None
    spent = {name: Interval(value, math.nan, math.nan) for name, value in epsilons.items()}
    success = {name: auc_of(attacks.get(name, ())) for name in names}
    place = f"Dice of {structure}"
    panels = [
        *_panel(spent, dice, "epsilon of a site", place, level, None),
        *_panel(success, dice, AUC, place, level, Mark(0.5, "guessing")),
    ]
    rows = tuple(
        PrivacyRow(
            name,
            f"{epsilons[name]:.3g}" if name in epsilons else "–",
            _with_interval(dice[name]),
            tuple(_shown(attacks.get(name, ()), kind) for kind in MEMBERSHIP),
            tuple(_sentences(attacks.get(name, ()))),
        )
        for name in names
    )
    noisy = {name: settings[name]["privacy"]["dp"] for name in epsilons if name in settings}
    relation = tuple(
        f"{name}: delta {dp['delta']:g}, noise in {' and '.join(dp['channels'])}"
        for name, dp in noisy.items()
    )
    seeded = any(dp["noise"] == "seeded" for dp in noisy.values())
    drawn = bool(panels) and level is not None
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
    """Return the AUC of membership from updates: mean, lowest and highest end over the cells."""
    return _auc([tree["membership_update"] for tree in attacks if tree.get("membership_update")])


def _auc(found: Sequence[Mapping[str, Any]]) -> Interval:
    if not found:
        return Interval(math.nan, math.nan, math.nan)
    mean = math.fsum(each["auc"] for each in found) / len(found)
    low = min(each["auc_interval"][0] for each in found)
    return Interval(mean, low, max(each["auc_interval"][1] for each in found))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return names without what all have: `sgcg privacy=floors` and `… =dp` are `floors`, `dp`."""
    parts = {name: name.split() for name in names}
    common = set.intersection(*(set(found) for found in parts.values())) if names else set()
    found = {}
    for name, words in parts.items():
        own = [word.partition("=")[2] or word for word in words if word not in common]
        found[name] = " ".join(own) or name
    return found


def _panel(
    costs: Mapping[str, Interval],
    dice: Mapping[str, Interval],
    name: str,
    place: str,
    level: Mark | None,
    limit: Mark | None,
) -> list[Panel]:
    """Draw the Dice of labels over a cost; nothing with fewer than two labels that have both."""
    names = list(dice)
    known = [
        label
        for label in names
        if label in costs and math.isfinite(costs[label].mean) and math.isfinite(dice[label].mean)
    ]
    if len(known) < 2:
        return []
    shown = short_names(names)
    trades = [Trade(shown[label], names.index(label), costs[label], dice[label]) for label in known]
    means = "; ".join(
        f"{trade.title} {trade.cost.mean:.3g}: {show(trade.gain.mean, 3)}" for trade in trades
    )
    drawing = trade_off_panel(
        trades, name, place, f"Mean {place} by {name}: {means}.", level, limit
    )
    return [Panel(f"Dice over {TITLES.get(name, 'epsilon')}", drawing)]


def _with_interval(interval: Interval) -> str:
    if not math.isfinite(interval.mean):
        return "–"
    return f"{show(interval.mean, 3)} ({show_interval(interval, 3)})"


def _shown(attacks: Sequence[Mapping[str, Any]], kind: str) -> str:
    found = [tree[kind] for tree in attacks if tree.get(kind)]
    if not found:
        return "–"
    auc = _auc(found)
    rate = math.fsum(each["tpr"] for each in found) / len(found)
    return f"AUC {show(auc.mean, 2)} ({show_interval(auc, 2)}), TPR {rate:.0%}"


def _sentences(attacks: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    differences = [tree["difference"] for tree in attacks if tree.get("difference")]
    if differences:
        error = math.fsum(each["error"] for each in differences) / len(differences)
        found.append(f"difference of two releases: relative error {error:.2g}")
    spans = [
        min(tree["span"], key=lambda each: int(each["pixels"]))
        for tree in attacks
        if tree.get("span")
    ]
    if spans:
        pixels, rank = spans[0]["pixels"], max(each["rank"] for each in spans)
        outside, chance = (
            math.fsum(each[name] for each in spans) / len(spans) for name in ("outside", "chance")
        )
        found.append(
            f"span of {pixels} pixels (below the floor): rank {rank}, their features outside it "
            f"{outside:.2g} (other patients {chance:.2g})"
        )
    return found
