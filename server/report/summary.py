"""Headline, status, notes and settings of the report, as plain text; the page escapes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from fedsgcg.server.report.differences import Difference
from fedsgcg.server.report.format import DASH, Summary, show, show_ends, show_interval, show_p
from fedsgcg.server.report.intervals import Interval
from fedsgcg.server.report.labels import BEST_SINGLE
from fedsgcg.server.report.sections.cases import count_of, join_words, left_out_sentence
from fedsgcg.server.report.sections.claims import directions
from fedsgcg.server.report.study_files import DONE, Cell, StudyFiles
from fedsgcg.server.report.tables import AVERAGE, Row, methods_of

FEW_CASES = 8  # with fewer cases, an interval of skewed values is somewhat too narrow
STATUS_TITLES = {
    "completed": "Complete",
    "degraded": "Complete, with degraded runs",
    "incomplete": "Not complete",
    "failed": "Failed",
}


def focus_method(methods: Sequence[str]) -> str:
    """The label that the study is about: RAM with SgCG if present, else SgCG, else the last one.

    The best single hospital is only a reference.
    """
    methods = [name for name in methods if BEST_SINGLE not in name.split()] or list(methods)
    for trains in ("ram_sgcg", "sgcg"):
        if found := [name for name in methods if name.split()[0] == trains]:
            return found[0]
    return methods[-1] if methods else ""


def headline(
    summary: Sequence[Summary],
    differences: Sequence[Difference],
    structure: str,
    hospitals: int = 0,
) -> str:
    """State the main result in one or two sentences: Dice of the main structure when held out.

    Args:
        summary: Rows of `summary_rows`.
        differences: The study's main comparisons, most important first.
        structure: The main structure.
        hospitals: Number of planned held-out hospitals; an average over fewer is marked.
    """
    rows = [row for row in summary if row["structure"] == structure]
    methods = methods_of(rows)
    if not rows:
        return "No held-out hospital has been evaluated yet."
    focus = focus_method(methods)
    site = rows[0]["site"]
    if any(row["site"] == AVERAGE and row["method"] == focus for row in rows):
        site = AVERAGE
    chosen = {row["method"]: row for row in rows if row["site"] == site}
    if focus not in chosen:
        focus = next(iter(chosen))
    if len(chosen) > 1 and not any(entry["heldout"] not in ("", AVERAGE) for entry in rows):
        return _best_of(list(chosen.values()), structure)
    row = chosen[focus]
    among = row["hospitals"]
    if among < hospitals:
        among = f"{among} of {hospitals}"
    place = f"On average over {among} hospitals" if site == AVERAGE else f"At {site}, a hospital"
    place += " that took no part in training"
    if not any(row["heldout"] not in ("", AVERAGE) for row in rows):
        place = "No hospital was held out. On the hospitals' own validation cases"
    spread = show_interval(Interval(row["dice_mean"], row["dice_low"], row["dice_high"]), 3)
    text = f"{place}, {focus} reaches a mean Dice of {show(row['dice_mean'], 3)}"
    text += f" (95 % interval {spread})" if spread != DASH else ""
    text += f" for {structure}."
    pairs = [
        d
        for d in differences
        if d.structure == structure and d.metric == "dice" and d.method == focus
    ]
    pair = next((d for d in pairs if d.site == site and d.cases), None)
    return f"{text} {_compared(pair)}" if pair is not None else text


def _best_of(rows: Sequence[Summary], structure: str) -> str:
    """State the two best labels of a study without held-out hospital."""
    first, second, *_ = sorted(rows, key=lambda row: -float(row["dice_mean"]))
    text = "No hospital was held out. On the hospitals' own validation cases, "
    text += f"{first['method']} has the highest mean Dice of the {len(rows)} compared: "
    text += show(first["dice_mean"], 3)
    interval = show_interval(Interval(first["dice_mean"], first["dice_low"], first["dice_high"]), 3)
    text += f" (95 % interval {interval})" if interval != DASH else ""
    text += f" for {structure}; next is {second['method']} with {show(second['dice_mean'], 3)}."
    return (
        f"{text} A setting chosen by this result is chosen with patients of all these hospitals, "
        "including any that is held out later."
    )


def _compared(pair: Difference) -> str:
    size = show(pair.interval.mean, 3, sign=True)
    start = f"That is {size} against {pair.reference} on the same cases"
    interval = show_ends(pair.interval, 3)
    if interval == DASH:
        return f"{start}; one case allows no interval."
    facts = "; ".join(
        [f"95 % interval {interval}", f"corrected p\u00a0{show_p(pair.p)}", *directions(pair)]
    )
    if pair.holds:
        return f"{start} ({facts}): the difference holds."
    return f"{start} ({facts}): {pair.sentence}."


def status_sentence(study: StudyFiles) -> str:
    """State how many runs ended, how they ended, and whether cases were left out."""
    left_out = left_out_sentence([cell.outcome for cell in study.cells])
    return " ".join(filter(None, (_how_runs_ended(study), left_out)))


def _how_runs_ended(study: StudyFiles) -> str:
    done = sum(cell.status in DONE for cell in study.cells)
    text = f"{done} of {count_of(len(study.cells), 'run')} ended"
    if study.status == "completed":
        if done == 1:
            return "The run ended as planned."
        return f"All {len(study.cells)} runs ended as planned."
    if study.status == "degraded":
        return (
            f"{text}, but some of them without every hospital in every round. Their results are "
            "shown and marked."
        )
    if study.status == "failed":
        return f"{text}. There is no reliable result."
    return (
        f"{text}. Tables and figures show the results so far; gaps are marked. The same command "
        "runs only what is missing."
    )


def troubled(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells that did not complete, for the banner."""
    return [cell for cell in cells if cell.status != "completed"]


def result_notes(summary: Sequence[Summary], rows: Sequence[Row], hospitals: int) -> list[str]:
    """Notes on the result table, only those that apply."""
    single = [row for row in summary if row["site"] != AVERAGE]
    notes = []
    few = sorted({row["site"] for row in single if row["cases"] < FEW_CASES})
    if few:
        notes.append(
            f"Few cases at {join_words(few)} (under {FEW_CASES}): if some of them fail and others "
            "do not, the interval is somewhat too narrow."
        )
    if stated := sorted({row["site"] for row in single if row.get("stated")}):
        notes.append(
            f"Mean, standard deviation and number of cases as stated by {join_words(stated)}, "
            "without results of single cases: comparisons case by case leave them out."
        )
    seeds = {seed for row in single for seed in row["seeds"]}
    if len(seeds) == 1:
        notes.append("One seed: the variation between repeated trainings is unknown.")
    short = sorted({row["site"] for row in single if len(row["seeds"]) < len(seeds)})
    if short:
        notes.append(
            f"Some seeds are missing at {join_words(short)}; the table gives the number of seeds "
            "of each result."
        )
    if any(row["site"] == AVERAGE and row["hospitals"] < hospitals for row in summary):
        notes.append(
            f"An average over fewer than {hospitals} hospitals is marked, and no average is marked "
            "as best."
        )
    undefined = sum(int(row["asd_excluded"]) for row in single)
    if undefined:
        notes.append(
            f"In {count_of(undefined, 'evaluation')} one mask is empty. The surface distance is "
            "then undefined and left out of its mean; the tables mark this as “mean over 3 of 4”."
        )
    both = sum(bool(row.get("empty_prediction") and row.get("empty_truth")) for row in rows)
    if both:
        notes.append(
            f"In {count_of(both, 'evaluation')} truth and prediction are both empty: counted as "
            "Dice 1, distance 0."
        )
    return notes


def settings_text(
    settings: Mapping[str, Mapping[str, Any]],
) -> tuple[str, list[tuple[str, list[str]]]]:
    """Return the shared settings as YAML, and (setting, value of each method) of the others."""
    flat = {method: dict(_flatten(tree)) for method, tree in settings.items()}
    names = list(dict.fromkeys(name for tree in flat.values() for name in tree))
    shared: dict[str, Any] = {}
    differing = []
    for name in names:
        values = [tree.get(name, DASH) for tree in flat.values()]
        if all(value == values[0] for value in values):
            shared[name] = values[0]
        else:
            differing.append((name, [str(value) for value in values]))
    return yaml.safe_dump(shared, sort_keys=False, allow_unicode=True) if shared else "", differing


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
