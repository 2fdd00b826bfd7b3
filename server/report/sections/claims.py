"""Claims of the report: paired differences as table rows and as one sentence each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedsgcg.server.report.differences import (
    CaseValues,
    Difference,
    compare_everywhere,
    compare_on_average,
)
from fedsgcg.server.report.figures.overlays import interval_bar
from fedsgcg.server.report.format import DASH, DECIMALS, TITLES, show, show_ends, show_p
from fedsgcg.server.report.labels import FEDERATIONS, Label, Swept, main_labels, main_pairs
from fedsgcg.server.report.sections.cases import count_of
from fedsgcg.server.report.tables import AVERAGE

CLAIMED = ("dice", "asd")
MOST_PAIRS = 30  # most folded tables by hospital; all pairs are in results.parquet
NAMED_HOSPITALS = 8  # most hospitals that a sentence lists by name


@dataclass(frozen=True)
class ClaimRow:
    """One row of a table of claims; numbers as shown.

    Attributes:
        title: What is compared, or the hospital.
        mean: Mean paired difference, in the unit of its metric.
        interval: 95 % interval of the mean.
        bar: The interval as a picture, empty if it is unknown.
        cases: Number of compared cases, "47 of 48" if some have no distance.
        p: Corrected p value.
        directions: How an average varies between hospitals, "" for one hospital.
        seeds: Difference of each seed, a dash without any.
        sentence: The verdict.
        detectable: Smallest difference that such a study would show, `none` if it can show none.
        holds: Whether the difference holds.
    """

    title: str
    mean: str
    interval: str
    bar: Markup
    cases: str
    p: str
    directions: str
    seeds: str
    sentence: str
    detectable: str
    holds: bool


@dataclass(frozen=True)
class ClaimGroup:
    """Rows of one metric and structure.

    Attributes:
        title: Name of the metric with its unit, and of the structure if there are several.
        rows: The rows.
    """

    title: str
    rows: tuple[ClaimRow, ...]


@dataclass(frozen=True)
class ClaimSentence:
    """A claim as one sentence.

    Attributes:
        text: The sentence.
        holds: Whether the difference holds.
    """

    text: str
    holds: bool


@dataclass(frozen=True)
class Claims:
    """A family of claims.

    Attributes:
        sentences: One sentence per claim on Dice.
        groups: All claims as rows.
        family: Number of comparisons that the p values are corrected for.
    """

    sentences: tuple[ClaimSentence, ...]
    groups: tuple[ClaimGroup, ...]
    family: int


@dataclass(frozen=True)
class HospitalTable:
    """Claims on one pair of labels at every hospital.

    Attributes:
        method: The first label.
        reference: The label that is subtracted.
        groups: One row per hospital, and for the average.
        family: Number of comparisons that the p values are corrected for.
    """

    method: str
    reference: str
    groups: tuple[ClaimGroup, ...]
    family: int


def main_claims(
    values: CaseValues, labels: Mapping[str, Label], structures: Sequence[str]
) -> list[Difference]:
    """The study's main comparisons, over all hospitals, as one family."""
    return compare_on_average(values, main_pairs(labels), structures, CLAIMED)


def federation_pairs(labels: Mapping[str, Label]) -> list[tuple[str, str]]:
    """Return (label, reference) pairs of the same training in two federations.

    The pairs are in the order of `FEDERATIONS`.
    """
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
) -> tuple[ClaimGroup, ...]:
    """Rows of a table of claims, grouped by metric and structure.

    Args:
        differences: Corrected differences, as one family.
        several: Whether there is more than one structure.
        title: Name of a row; by default "label − reference".
    """
    spans: dict[tuple[str, str], float] = defaultdict(float)
    for entry in differences:
        ends = [abs(end) for end in (entry.interval.low, entry.interval.high) if math.isfinite(end)]
        spans[entry.structure, entry.metric] = max([spans[entry.structure, entry.metric], *ends])
    groups: dict[str, list[ClaimRow]] = {}
    for entry in differences:
        head = metric_name(entry) + (f", {entry.structure}" if several else "")
        name = title(entry) if title else f"{entry.method} − {entry.reference}"
        row = claim_row(entry, name, spans[entry.structure, entry.metric])
        groups.setdefault(head, []).append(row)
    return tuple(ClaimGroup(head, tuple(rows)) for head, rows in groups.items())


def claim_row(entry: Difference, title: str, span: float) -> ClaimRow:
    """One row of a table of claims; the interval bar extends from -span to +span."""
    places = DECIMALS[entry.metric]
    sentence = entry.sentence
    if entry.method:
        sentence = sentence[:1].upper() + sentence[1:]
    some = entry.cases < entry.scored
    seeds = ", ".join(show(value, places, sign=True) for value in entry.seeds.values())
    return ClaimRow(
        title=title,
        mean=show(entry.interval.mean, places, sign=True),
        interval=show_ends(entry.interval, places),
        bar=interval_bar(entry.interval, span),
        cases=f"{entry.cases} of {entry.scored}" if some else str(entry.cases),
        p=show_p(entry.p),
        directions="; ".join(directions(entry)),
        seeds=seeds or DASH,
        sentence=sentence,
        detectable="none" if math.isinf(entry.detectable) else show(entry.detectable, places),
        holds=entry.holds,
    )


def metric_name(entry: Difference) -> str:
    """Name of a metric with the unit of distances."""
    return TITLES[entry.metric] + (f", {entry.unit}" if entry.unit else "")


def claim_sentence(entry: Difference, several: bool) -> str:
    """One sentence: the comparison, its size, its uncertainty, and whether it holds.

    Args:
        entry: A corrected difference.
        several: Whether there is more than one structure.
    """
    places = DECIMALS[entry.metric]
    where = f" of {entry.structure}" if several else ""
    where += f" at {entry.site}" if entry.site != AVERAGE else ""
    start = f"{entry.method} against {entry.reference}, {TITLES[entry.metric]}{where}"
    if not entry.cases:
        return f"{start}: no case in common."
    unit = f" {entry.unit}" if entry.unit else ""
    size = f"{show(entry.interval.mean, places, sign=True)}{unit}"
    facts = [f"95 % interval {show_ends(entry.interval, places)}"]
    cases = cases_of(entry)
    if entry.groups < entry.hospitals:
        cases += f" at {entry.groups} of {entry.hospitals} hospitals"
    facts += [cases, count_of(len(entry.seeds), "seed")]
    facts += [f"corrected p\u00a0{show_p(entry.p)}"]
    verdict, _, reason = entry.sentence.partition(": ")
    if entry.holds:
        verdict = "the difference holds"
    elif reason:
        verdict += f", because {reason}"
        if not entry.holds and math.isfinite(entry.detectable):
            least = show(entry.detectable, places)
            verdict += f"; a true difference below {least}{unit} would often be missed"
    return f"{start}: {size} ({'; '.join([*facts, *directions(entry)])}); {verdict}."


def cases_of(entry: Difference) -> str:
    """Return the number of compared cases, "47 of 48 cases" if some have no distance."""
    if entry.cases < entry.scored:
        return f"{entry.cases} of {count_of(entry.scored, 'case')}"
    return count_of(entry.cases, "case")


def hospital_tables(
    values: CaseValues, pairs: Sequence[tuple[str, str]], structures: Sequence[str]
) -> list[HospitalTable]:
    """One table per pair: every hospital, structure and metric, corrected as one family."""
    several = len(structures) > 1
    tables = []
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
        tables.append(HospitalTable(*pair, groups, _family(found)))
    return tables


def _family(differences: Sequence[Difference]) -> int:
    return max((entry.family for entry in differences), default=0)


def claims_section(differences: Sequence[Difference], structures: Sequence[str]) -> Claims:
    """Data of the page for a family of claims: sentences on Dice, and the table of all claims."""
    several = len(structures) > 1
    return Claims(
        sentences=tuple(
            ClaimSentence(claim_sentence(entry, several), entry.holds)
            for entry in differences
            if entry.metric == "dice"
        ),
        groups=claim_groups(differences, several),
        family=_family(differences),
    )


def directions(entry: Difference) -> list[str]:
    """How an average varies: "higher at 1 of 4 hospitals: A +0.297, B −0.006".

    Empty for a single hospital.
    """
    sign, word = (1, "higher") if entry.metric == "dice" else (-1, "lower")
    found = sorted(entry.by_hospital.items(), key=lambda item: -sign * item[1])
    if entry.site != AVERAGE or len(found) < 2:
        return []
    text = f"{word} at {sum(sign * value > 0 for _, value in found)} of {len(found)} hospitals"
    if len(found) <= NAMED_HOSPITALS:
        places = DECIMALS[entry.metric]
        sizes = [f"{site} {show(value, places, sign=True)}" for site, value in found]
        text += f": {', '.join(sizes)}"
    return [text]
