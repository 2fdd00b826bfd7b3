"""Computes the metrics of one federation from its events, its round rows and its results."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from fedsgcg.server.records.progress import RunProgress
from fedsgcg.server.telemetry.names import STATES

Labels = tuple[str, ...]
Sample = tuple[str, Labels, float]
"""Name in `names.BY_NAME`, values of the labels, value."""

ACCEPTED: Final = "accepted"
MOST_SERIES: Final = 10_000
"""Most series of one federation; text in a damaged log cannot fill the memory."""

MOST_PAIRS: Final = MOST_SERIES // 2
"""Series from which no further pair of sites is added: pairs grow with the square of the sites."""

LOSS: Final = "loss"
SITE_ROWS: Final = {
    "seconds": "fedsgcg_site_train_seconds",
    "examples": "fedsgcg_site_examples",
    "learning_rate": "fedsgcg_learning_rate",
    "validation_dice": "fedsgcg_site_validation_dice",
}
"""Metric of a site's row of the training phase -> name."""

CLASS_ROWS: Final = {
    "prototype_count": "fedsgcg_prototype_pixels",
    "between_site_trace": "fedsgcg_between_site_trace",
    "within_site_trace": "fedsgcg_within_site_trace",
    "prototype_distance": "fedsgcg_prototype_distance",
    "prototype_condition": "fedsgcg_prototype_condition",
}
"""Metric of a class's row of the merge phase -> name."""

SITE_DISTANCE: Final = "site_distance"
PAIR_DISTANCE: Final = "pair_distance"
BYTES: Final = {"bytes_up": "up", "bytes_down": "down"}


class RunMetrics:
    """The metrics of one federation.

    Args:
        study: Name of the study, a label.
    """

    def __init__(self, study: str) -> None:
        self._study = study
        self._cell: Labels = (study, "", "", "")
        self._progress = RunProgress()
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._counters: dict[tuple[str, Labels], float] = defaultdict(float)
        self._admitted: set[str] = set()
        self._last = 0.0
        self._starts = 0

    @property
    def state(self) -> str:
        """One of `STATES`."""
        if self._progress.ended:
            return self._progress.ended if self._progress.ended in STATES else "failed"
        return "running" if self._starts else "waiting"

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event of `events.jsonl`."""
        name = str(event.get("event"))
        self._cell = (
            self._study,
            str(event.get("method", "")),
            str(event.get("heldout", "")),
            str(event.get("seed", "")),
        )
        self._progress.take(dict(event))
        self._last = max(self._last, _number(event.get("time"), 0.0))
        site = str(event.get("site", ""))
        if name == "run.started":
            self._starts += 1
        elif name == "round.started":
            self._admitted.clear()
        elif name == "round.reply":
            self._reply(event, site)
        elif name == "round.screened":
            self._count("fedsgcg_findings", (site, str(event.get("code", ""))))
            if event.get("rejected"):
                self._admitted.discard(site)
        elif name == "round.void":
            self._count("fedsgcg_void_rounds", ())
        elif name in ("heldout.done", "observer.done"):
            self._set("fedsgcg_test_dice", (site, name.partition(".")[0]), event.get("dice"))
        if name == "round.done":
            self._set("fedsgcg_mean_loss", (), event.get(LOSS))
        if name in ("round.done", "validation.done"):
            self._set("fedsgcg_validation_dice", (), event.get("validation_dice"))

    def take_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take the rows of one round (`common.run_folder.tables.ROWS_SCHEMA`)."""
        for row in rows:
            metric, site, value = str(row["metric"]), str(row["site"]), row["value"]
            if row["phase"] == "train" and metric in SITE_ROWS:
                self._set(SITE_ROWS[metric], (site,), value)
            elif row["phase"] == "train" and metric in BYTES:
                self._count("fedsgcg_site_bytes", (site, BYTES[metric]), value)
            elif row["phase"] == "train" and metric.partition("_")[0] == LOSS:
                part = metric.partition("_")[2] or "total"
                self._set("fedsgcg_loss", (site, part), value)
            elif row["phase"] == "merge" and metric == SITE_DISTANCE:
                self._set("fedsgcg_site_distance", (site, str(row["cls"])), value)
            elif row["phase"] == "merge" and metric == PAIR_DISTANCE:
                other = str(row.get("other") or "")
                for pair in ((site, other), (other, site)):  # so that a matrix is complete
                    self._set("fedsgcg_pair_distance", (*pair, str(row["cls"])), value, MOST_PAIRS)
            elif row["phase"] == "merge" and metric in CLASS_ROWS:
                self._set(CLASS_ROWS[metric], (str(row["cls"]),), value)

    def take_results(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take the results of a finished federation, rows with site, structure and dice."""
        found: dict[Labels, list[float]] = defaultdict(list)
        for row in rows:
            found[str(row["site"]), str(row["structure"])].append(float(row["dice"]))
        for labels, values in found.items():
            self._set("fedsgcg_dice", labels, math.fsum(values) / len(values))

    def samples(self, now: float) -> Iterator[Sample]:
        """Yield all samples.

        Args:
            now: Seconds since 1970, for the waiting times.
        """
        if not self._starts:
            return
        progress, cell = self._progress, self._cell
        yield "fedsgcg_round", cell, progress.round
        yield "fedsgcg_rounds_done", cell, progress.done
        yield "fedsgcg_rounds_planned", cell, progress.rounds
        for state in STATES:
            yield "fedsgcg_state", (*cell, state), float(state == self.state)
        yield "fedsgcg_last_event_timestamp_seconds", cell, self._last
        yield "fedsgcg_resumes", cell, max(0, self._starts - 1)
        yield "fedsgcg_sites_enrolled", cell, len(progress.sites)
        yield "fedsgcg_sites_needed", cell, progress.needed
        yield "fedsgcg_sites_admitted", cell, len(self._admitted)
        if progress.seconds:
            yield "fedsgcg_round_duration_seconds", cell, progress.seconds[-1]
        left = progress.seconds_left()
        yield "fedsgcg_remaining_seconds", cell, 0.0 if left is None else left
        yield from self._site_samples(now)
        for (name, labels), value in (*self._gauges.items(), *self._counters.items()):
            yield name, (*cell, *labels), value

    def _site_samples(self, now: float) -> Iterator[Sample]:
        progress = self._progress
        late = progress.late(now)
        for site in progress.training:
            found = progress.sites.get(site)
            if found is None:
                continue
            labels = (*self._cell, site)
            waiting = found.asked and progress.started and not progress.ended
            yield (
                "fedsgcg_site_waiting_seconds",
                labels,
                max(0.0, now - progress.started) if waiting else 0.0,
            )
            yield "fedsgcg_site_late", labels, float(site in late)
            paused = found.paused_until >= progress.round > 0 and not progress.ended
            yield "fedsgcg_site_paused", labels, float(paused)
            if found.answers:
                yield "fedsgcg_site_answer_seconds", labels, found.answers[-1]

    def _reply(self, event: Mapping[str, Any], site: str) -> None:
        accepted = bool(event.get("accepted"))
        code = ACCEPTED if accepted else str(event.get("code", ""))
        self._count("fedsgcg_verdicts", (site, code))
        if accepted:
            self._admitted.add(site)
        else:
            self._admitted.discard(site)

    def _set(self, name: str, labels: Labels, value: object, most: int = MOST_SERIES) -> None:
        key = (name, labels)
        if isinstance(value, (int, float)) and (key in self._gauges or self._has_room(most)):
            self._gauges[key] = float(value)

    def _count(self, name: str, labels: Labels, value: object = 1.0) -> None:
        key = (name, labels)
        known = key in self._counters or self._has_room()
        if known and isinstance(value, (int, float)) and value >= 0 and math.isfinite(value):
            self._counters[key] += float(value)

    def _has_room(self, most: int = MOST_SERIES) -> bool:
        return len(self._gauges) + len(self._counters) < most


def _number(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) else otherwise


def states_of(runs: Sequence[RunMetrics], expected: int) -> dict[str, int]:
    """Return the number of federations in each state; those not started yet are `waiting`.

    Args:
        runs: The federations that have events.
        expected: Number of federations of the study.
    """
    found = dict.fromkeys(STATES, 0)
    for run in runs:
        found[run.state] += 1
    found["waiting"] += max(0, expected - len(runs))
    return found
