"""Claims of the report: paired differences as table rows and as one sentence each, in plain words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.report.differences import CaseValues, Difference, compare_everywhere, compare_on_average
from server.report.figures.overlays import interval_bar
from server.report.format import DECIMALS, TITLES, show, show_ends, show_p
from server.report.labels import FEDERATIONS, Label, Swept, main_labels, main_pairs
from server.report.sections.cases import count_of
from server.report.tables import AVERAGE

Section = dict[str, Any]
CLAIMED = ("dice", "asd")
MOST_PAIRS = 30  # of the folded tables hospital by hospital; all of them are in results.parquet
NAMED_HOSPITALS = 8  # of a sentence; with more it says how many


def main_claims(
    values: CaseValues, labels: Mapping[str, Label], structures: Sequence[str]
) -> list[Difference]:
    """The comparisons that the study is about, over all hospitals, as one family."""
    return compare_on_average(values, main_pairs(labels), structures, CLAIMED)


def federation_pairs(labels: Mapping[str, Label]) -> list[tuple[str, str]]:
    """Return (label, reference) pairs of the same training in two federations: by_site first, then pooled."""
    alike: dict[tuple[str, Swept], dict[str, str]] = {}
    for label in main_labels(labels):
        alike.setdefault((label.trains, label.setting), {})[label.federation] = label.name
    pairs = []
    for own in alike.values():
        present = [name for name in FEDERATIONS if name in own]
        pairs += [(own[a], own[b]) for place, a in enumerate(present) for b in present[place + 1 :]]
    return pairs


def claim_groups(
    differences: Sequence[Difference],
    several: bool,
    title: Callable[[Difference], str] | None = None,
) -> list[tuple[str, list[Section]]]:
    """Rows of a table of claims, grouped by metric and structure.

    Args:
        differences: Corrected differences, as one family.
        several: Whether there is more than one structure to name.
        title: Name of a row; "label − reference" if not given.
    """
    spans: dict[tuple[str, str], float] = defaultdict(float)
    for entry in differences:
        ends = [abs(end) for end in (entry.interval.low, entry.interval.high) if math.isfinite(end)]
        spans[entry.structure, entry.metric] = max([spans[entry.structure, entry.metric], *ends])
    groups: dict[str, list[Section]] = {}
    for entry in differences:
        head = metric_name(entry) + (f", {entry.structure}" if several else "")
        name = title(entry) if title else f"{entry.method} − {entry.reference}"
        row = claim_row(entry, spans[entry.structure, entry.metric]) | {"title": name}
        groups.setdefault(head, []).append(row)
    return list(groups.items())


def claim_row(entry: Difference, span: float) -> Section:
    """One row of a table of claims; `span` is the reach of the bar around zero."""
    places = DECIMALS[entry.metric]
    return {
        "mean": show(entry.interval.mean, places, sign=True),
        "interval": show_ends(entry.interval, places),
        "bar": interval_bar(entry.interval, span),
        "cases": f"{entry.cases} of {entry.judged}" if entry.cases < entry.judged else entry.cases,
        "p": show_p(entry.p),
        "directions": "; ".join(directions(entry)),
        "seeds": ", ".join(show(value, places, sign=True) for value in entry.seeds.values()) or "–",
        "sentence": entry.sentence[:1].upper() + entry.sentence[1:]
        if entry.method
        else entry.sentence,
        "holds": entry.holds,
    }


def metric_name(entry: Difference) -> str:
    """Name of a metric with the unit of distances."""
    return TITLES[entry.metric] + (f", {entry.unit}" if entry.unit else "")


def claim_sentence(entry: Difference, several: bool) -> str:
    """One sentence: what is compared, by how much, how sure, and whether it holds.

    Args:
        entry: A corrected difference.
        several: Whether the structure must be named.
    """
    places = DECIMALS[entry.metric]
    where = (f" of {entry.structure}" if several else "") + (
        f" at {entry.site}" if entry.site != AVERAGE else ""
    )
    start = f"{entry.method} against {entry.reference}, {TITLES[entry.metric]}{where}"
    if not entry.cases:
        return f"{start}: no case in common."
    unit = f" {entry.unit}" if entry.unit else ""
    size = f"{show(entry.interval.mean, places, sign=True)}{unit}"
    facts = [f"95 % interval {show_ends(entry.interval, places)}"]
    some = (
        f" at {entry.groups} of {entry.hospitals} hospitals"
        if entry.groups < entry.hospitals
        else ""
    )
    facts += [cases_of(entry) + some, count_of(len(entry.seeds), "seed")]
    facts += [f"corrected p\u00a0{show_p(entry.p)}"]
    verdict = entry.sentence.partition(": ")
    words = (
        "the difference holds"
        if entry.holds
        else verdict[0] + (f", because {verdict[2]}" if verdict[2] else "")
    )
    return f"{start}: {size} ({'; '.join([*facts, *directions(entry)])}); {words}."


def cases_of(entry: Difference) -> str:
    """Say how many cases are compared: "47 of 48 cases" where some have no distance."""
    return (
        f"{entry.cases} of {count_of(entry.judged, 'case')}"
        if entry.cases < entry.judged
        else count_of(entry.cases, "case")
    )


def hospital_tables(
    values: CaseValues, pairs: Sequence[tuple[str, str]], structures: Sequence[str]
) -> list[dict[str, Any]]:
    """One table a pair: every hospital, structure and metric, corrected as one family."""
    several, tables = len(structures) > 1, []
    for pair in pairs[:MOST_PAIRS]:
        found = compare_everywhere(values, pair)
        found.sort(
            key=lambda entry: (
                structures.index(entry.structure) if entry.structure in structures else 0
            )
        )
        groups = claim_groups(
            found, several, lambda entry: "Average" if entry.site == AVERAGE else entry.site
        )
        tables.append(
            {"method": pair[0], "reference": pair[1], "groups": groups, "family": _family(found)}
        )
    return tables


def _family(differences: Sequence[Difference]) -> int:
    return max((entry.family for entry in differences), default=0)


def claims_section(differences: Sequence[Difference], structures: Sequence[str]) -> Section:
    """What the page needs to show a family of claims: sentences on Dice, and the table of all."""
    several = len(structures) > 1
    return {
        "sentences": [
            {"text": claim_sentence(entry, several), "holds": entry.holds}
            for entry in differences
            if entry.metric == "dice"
        ],
        "groups": claim_groups(differences, several),
        "family": _family(differences),
    }


def directions(entry: Difference) -> list[str]:
    """Where an average points: "higher at 1 of 4 hospitals: A +0.297, B −0.006"; nothing at a single hospital."""
    sign, word = (1, "higher") if entry.metric == "dice" else (-1, "lower")
    found = sorted(entry.by_hospital.items(), key=lambda item: -sign * item[1])
    if entry.site != AVERAGE or len(found) < 2:
        return []
    text = f"{word} at {sum(sign * value > 0 for _, value in found)} of {len(found)} hospitals"
    if len(found) <= NAMED_HOSPITALS:
        text += f": {', '.join(f'{site} {show(value, DECIMALS[entry.metric], sign=True)}' for site, value in found)}"
    return [text]
