"""The report's protocol box, as plain text; the page escapes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedsgcg.server.report.format import TITLES, show, show_seconds
from fedsgcg.server.report.rounds import cut_steps
from fedsgcg.server.report.sections.cases import case_lines, count_of, join_words
from fedsgcg.server.report.study_files import StudyFiles
from fedsgcg.server.report.tables import methods_of

NAMED = {
    "observers": "only evaluated, never trained",
    "unlabelled": "trained without masks, with the contrastive term alone",
}
"""Field of a model's protocol with names of hospitals -> what the report says of them."""


BUDGETS = {
    "rounds": "every run has the same number of rounds and of passes per round",
    "steps": (
        "every run takes the same number of steps one after the other, those of the hospital with "
        "most of them"
    ),
    "slices": "the hospitals of every run together train on the same number of slices",
}
"""Kind of a budget -> what it keeps equal."""
AMOUNTS = ("steps", "slices")


def protocol_box(study: StudyFiles) -> list[tuple[str, list[str]]]:
    """Return the protocol as (topic, lines)."""
    protocols = _protocols(study)
    tree = next(iter(study.settings.values()), {})
    split_batches = cut_steps(study.rounds)
    topics = [
        ("Who was held out", _folds(study)),
        ("Cases", case_lines([cell.outcome for cell in study.cells])),
        ("Images", _all_of(protocols, "images")),
        ("Splits", _all_of(protocols, "splits")),
        ("Choice of the model", _selection(protocols)),
        ("Choice of settings", _settings_choice(study)),
        ("References", _references(study)),
        ("Training", _training(study)),
        ("Budget", _budget(study)),
        ("Memory", [split_batches] if split_batches else []),
        ("Evaluation", _all_of(protocols, "evaluated")),
        ("Decision", _all_of(protocols, "decision")),
        ("Post-processing", _post_processing(protocols)),
        ("Structures", _structures(tree)),
        ("Metrics", _metrics(protocols)),
        ("Unit of distance", _all_of(protocols, "distance_unit")),
        ("Machine", _machine(study)),
    ]
    return [(topic, lines) for topic, lines in topics if lines]


def _protocols(study: StudyFiles) -> list[Mapping[str, Any]]:
    found = [cell.model.get("protocol") for cell in study.cells]
    return [entry for entry in found if isinstance(entry, dict)]


def _all_of(protocols: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    """The distinct values of `name` over the cells, in order."""
    return list(
        dict.fromkeys(str(entry[name]) for entry in protocols if entry.get(name) not in (None, ""))
    )


def _post_processing(protocols: Iterable[Mapping[str, Any]]) -> list[str]:
    """Post-processing of each structure's mask; structures with the same steps share a line."""
    steps: dict[str, dict[str, None]] = {}
    for entry in protocols:
        stated = entry.get("post_processing")
        for name, text in stated.items() if isinstance(stated, Mapping) else ():
            steps.setdefault(str(text), {})[str(name)] = None
    return [f"{join_words(list(names))}: {text}" for text, names in steps.items()]


def _folds(study: StudyFiles) -> list[str]:
    together = [cell.model.get("protocol") for cell in study.cells if not cell.trained_on]
    entries = [entry for entry in together if isinstance(entry, dict)]
    # A pooled run lists one trained site, so entries with more sites come last and take precedence.
    entries.sort(key=lambda entry: len(entry.get("trained", [])))
    trained = {
        str(entry.get("heldout", "")): join_words(entry.get("trained", [])) or "no hospital"
        for entry in entries
    }
    alone: dict[str, set[str]] = {}
    for cell in study.cells:
        if cell.trained_on and cell.model:
            alone.setdefault(cell.heldout, set()).add(cell.trained_on)
    for heldout, names in alone.items():
        each = ", each alone" if len(names) > 1 else " alone"
        trained.setdefault(heldout, join_words(sorted(names)) + each)
    lines = []
    for heldout in sorted({cell.heldout for cell in study.cells}):
        who = f"{heldout} held out" if heldout else "no hospital held out"
        outcome = f"{trained[heldout]} trained" if heldout in trained else "not completed"
        lines.append(f"{who}: {outcome}")
    for key, text in NAMED.items():
        names = {str(name) for entry in entries for name in entry.get(key) or []}
        if names:
            lines.append(f"{text}: {join_words(sorted(names))}")
    return lines + _upper_bounds(study)


def _upper_bounds(study: StudyFiles) -> list[str]:
    """Mark the methods that used the labels of hospitals that count as unlabelled."""
    found: dict[str, set[str]] = {}
    for cell in study.cells:
        entry = cell.model.get("protocol") if cell.model else None
        if isinstance(entry, dict) and (names := entry.get("upper_bound")):
            found.setdefault(cell.method, set()).update(map(str, names))
    return [
        f"{method} is an upper bound: it was trained with the masks of "
        f"{join_words(sorted(names))}, which the other methods do without"
        for method, names in sorted(found.items())
    ]


def _selection(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    rounds = sorted(
        {
            int(entry["selected_round"])
            for entry in protocols
            if isinstance(entry.get("selected_round"), int)
        }
    )
    lines = [
        f"{text}; the held-out hospital is never used to choose a model"
        for text in _all_of(protocols, "selection")
    ]
    span = f"round{'' if len(rounds) == 1 else 's'} {join_words(rounds)}"
    if len(rounds) > 3:
        span = f"rounds {rounds[0]} to {rounds[-1]}"
    return [*lines, f"evaluated: the model of {span}"] if rounds and lines else lines


def _selection_of(study: StudyFiles) -> Mapping[str, Any]:
    """How settings were chosen, from `study.yaml`: a text (`words`) and each fold's choice."""
    found = study.tree.get("selection")
    return found if isinstance(found, Mapping) else {}


def chosen_within_folds(study: StudyFiles) -> bool:
    """Whether each fold chose its settings by its own source hospitals (`select` of a study)."""
    return bool(_selection_of(study).get("chosen"))


def _settings_choice(study: StudyFiles) -> list[str]:
    """Whose patients influenced the settings of runs with a held-out hospital, and each choice."""
    if not any(cell.heldout for cell in study.cells):
        return []
    selection = _selection_of(study)
    lines = [str(selection["words"])] if selection.get("words") else []
    for entry in selection.get("chosen") or []:
        scores = ", ".join(
            f"{name} {show(float(score), 3)}" for name, score in entry["scores"].items()
        )
        fold = f"{entry['heldout'] or 'no hospital'} held out, seed {entry['seed']}"
        lines.append(
            f"{entry['method']}, {fold}: {entry['settings']} (mean Dice at the left-out source "
            f"hospitals: {scores})"
        )
    if not selection:  # an older study, which does not record the selection
        lines.append(
            "the same in every fold; a setting chosen with validation cases of these hospitals "
            "(such as the default weight and temperature of SgCG) was chosen with patients of "
            "hospitals that are held out here"
        )
    return lines


def _references(study: StudyFiles) -> list[str]:
    """Whose own model is the best of single hospitals in each fold, and who chose it."""
    lines = []
    for entry in study.tree.get("best_single") or []:
        scores = ", ".join(
            f"{name} {show(float(dice), 3)}" for name, dice in entry["scores"].items()
        )
        fold = f"{entry['heldout']} held out, seed {entry['seed']}"
        lines.append(
            f"{entry['method']}, {fold}: the model of {entry['hospital']} is the best of single "
            f"hospitals, judged by the other training hospitals (mean Dice there: {scores})"
        )
    return lines


def _budget(study: StudyFiles) -> list[str]:
    """What all cells have in common, and the steps and slices that each label takes."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in study.cells:
        stated = cell.outcome.get("budget")
        if isinstance(stated, Mapping) and stated.get("kind") in BUDGETS:
            found.setdefault(cell.method, []).append(stated)
    kinds = dict.fromkeys(str(entry["kind"]) for entries in found.values() for entry in entries)
    lines = [BUDGETS[kind] for kind in kinds]
    planned: dict[str, list[str]] = {}
    for method, entries in found.items():
        if all(entry["kind"] != "rounds" for entry in entries):
            parts = [_span([int(entry[name]) for entry in entries], name) for name in AMOUNTS]
            planned.setdefault(", ".join(parts), []).append(method)
    return [*lines, *(f"{join_words(names)}: {text}" for text, names in planned.items())]


def _span(numbers: Sequence[int], what: str) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,} {what}" if low == high else f"{low:,} to {high:,} {what}"


def _mixing(study: StudyFiles) -> list[str]:
    """How amplitude mixing without shared amplitudes differs from the published method."""
    alone = [
        label
        for label, tree in study.settings.items()
        if str(_part(tree, "method").get("name", "")).startswith("ram")
        and _part(_part(tree, "method"), "ram").get("sharing") == "local"
        and _part(tree, "federation").get("ownership", "by_site") != "pooled"
    ]
    if not alone:
        return []
    return [
        f"{join_words(alone)}: an image is mixed only with images of the same hospital "
        "(method.ram.sharing=local); the published method mixes across domains"
    ]


def _training(study: StudyFiles) -> list[str]:
    def either(section: str, *names: str, text_of: Callable[..., str] = str) -> str:
        """The distinct values of settings over the methods, e.g. "6 or 24"."""
        parts = [_part(tree, section) for tree in study.settings.values()]
        return " or ".join(
            dict.fromkeys(text_of(*(part.get(name) for name in names)) for part in parts if part)
        )

    def amount(steps: int | None, epochs: int | None) -> str:
        if steps:
            return count_of(steps, "step")
        return count_of(1 if epochs is None else epochs, "local epoch")

    def weighting_of(name: str, most: float | None) -> str:
        # Studies of before have no bound.
        return name if most is None or most >= 1 else f"{name}, a share of {most:g} at most"

    seeds = sorted({cell.seed for cell in study.cells})
    lines = [f"methods {join_words(methods_of([{'method': cell.method} for cell in study.cells]))}"]
    lines.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {join_words(seeds)}")
    if rounds := either("federation", "rounds"):
        weighting = either("federation", "weighting", "most_share", text_of=weighting_of)
        lines.append(f"{rounds} rounds, hospitals weighted by {weighting}")
    if name := either("network", "name"):
        width, norm = either("network", "base_width"), either("network", "norm")
        lines.append(f"{name}, base width {width}, {norm} normalisation")
    if length := either("method", "steps_per_round", "local_epochs", text_of=amount):
        batch, rate = either("method", "batch_size"), either("method", "learning_rate")
        lines.append(f"{length} per round, batch size {batch}, learning rate {rate}")
    return lines + _mixing(study)


def _structures(tree: Mapping[str, Any]) -> list[str]:
    parts = _part(_part(tree, "data"), "structures")
    named = {
        str(name): [str(part) for part in classes]
        for name, classes in parts.items()
        if isinstance(classes, list)
    }
    return [
        name if classes == [name] else f"{name} = {' + '.join(classes)}"
        for name, classes in named.items()
    ]


def _metrics(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    found: Mapping[str, Any] = next(
        (entry["metrics"] for entry in protocols if isinstance(entry.get("metrics"), dict)), {}
    )
    return [
        f"{TITLES[name]}: {text}" if name in TITLES else str(text) for name, text in found.items()
    ]


def _machine(study: StudyFiles) -> list[str]:
    tree = study.tree
    lines = [str(tree[name]) for name in ("machine",) if tree.get(name)]
    how = ", ".join(f"{name} {tree[name]}" for name in ("runtime", "device") if tree.get(name))
    seconds = sum(cell.seconds for cell in study.cells if math.isfinite(cell.seconds))
    lines += [how] if how else []
    return lines + ([f"{show_seconds(seconds)} of run time over all runs"] if seconds else [])


def _part(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = tree.get(name)
    return part if isinstance(part, dict) else {}
