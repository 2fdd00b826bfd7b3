"""The replies of a round, and the rows and scores computed from them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fedsgcg.common.errors import Problem
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import TRAIN, Reply, Request
from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.server.admission import PASSES, Expectation, Verdict
from fedsgcg.server.records.results import mean_dice
from fedsgcg.server.sites.exchange import Answer

Row = dict[str, Any]

SITE_METRICS: Final = (
    *("loss", "validation_dice", "validation_cases", "micro_batches"),
    *("validation_dice_trained", "validation_dice_without"),
    *("examples", "steps", "seconds", "learning_rate", "gradient_cosine", "epsilon"),
)
"""Metrics of a site that are kept, besides the parts of its loss; all others are dropped."""

ALL_SITES: Final = ""
"""Name of what belongs to several sites together."""
SUMMED: Final = "all"
"""Site of the rows of a secure sum."""
SUMMED_METRICS: Final = (
    *("loss", "validation_dice", "validation_cases", "examples", "shortened_updates"),
)

REJECTIONS: Final = ("PAY-", "STA-")
"""Beginnings of the codes of payloads that were rejected."""

LOSS_PART: Final = re.compile(r"loss_[a-z0-9_]{1,40}")
MOST_PARTS: Final = 16
"""Most parts of a loss that are kept per site."""


@dataclass(frozen=True)
class Collected:
    """One site's answer to a contributing message, with the verdict on it.

    Attributes:
        answer: The answer.
        verdict: Whether it was admitted.
    """

    answer: Answer
    verdict: Verdict

    @property
    def reply(self) -> Reply:
        """The decoded reply of an admitted payload."""
        if self.answer.reply is None:
            raise ValueError(f"{self.answer.site}: no readable reply")
        return self.answer.reply

    @property
    def delivered(self) -> bool:
        """Whether the site sent a payload, admitted or not; its own error is none.

        A site that took part in a secure sum of too few sites was there.
        """
        return self.verdict.accepted or self.verdict.code.startswith((*REJECTIONS, "PRV-953"))

    def problem(self, number: int) -> Problem:
        """The problem of a rejected or missing reply of a round."""
        where = f"round {number}, {self.answer.site}"
        return Problem(self.verdict.code, where=where, found=self.verdict.detail)


@dataclass(frozen=True)
class Gathered:
    """The answers of the training sites to one request.

    Attributes:
        sites: One entry for every site that was asked, in the order of the names.
        parts: What is merged: the same entries, or with secure sums one entry of the name
            `ALL_SITES`, none if the sum was not opened.
    """

    sites: list[Collected] = field(default_factory=list)
    parts: list[Collected] = field(default_factory=list)


@dataclass(frozen=True)
class SiteEvaluation:
    """One site's evaluation of a model.

    Attributes:
        site: The site.
        reply: Its reply.
        cases: Per-case rows, with the site's name; empty if the site sends only a summary.
        summary: Its summary: structure, metric, mean, sd and count; empty with per-case rows.
    """

    site: str
    reply: Reply
    cases: list[Row]
    summary: list[Row] = field(default_factory=list)

    @property
    def dice(self) -> float:
        """Mean Dice over cases and structures; NaN without a case."""
        return mean_dice(self.cases) if self.cases else self._stated("dice")

    def _stated(self, metric: str) -> float:
        """Mean over the structures of a metric's stated mean; NaN if it is not stated."""
        means = [row["mean"] for row in self.summary if row["metric"] == metric]
        return math.fsum(means) / len(means) if means else math.nan

    @property
    def asd(self) -> float:
        """Mean ASD over cases and structures where it is defined; NaN without one."""
        if not self.cases:
            return self._stated("asd")
        known = [
            row["asd"] for row in self.cases if row["asd"] is not None and math.isfinite(row["asd"])
        ]
        return math.fsum(known) / len(known) if known else math.nan

    @property
    def without_distance(self) -> int:
        """Rows without an ASD because one mask is empty; `asd` is the mean over the others."""
        return sum(row["asd"] is None or not math.isfinite(row["asd"]) for row in self.cases)

    @property
    def validation(self) -> tuple[float, float]:
        """Source-validation Dice and number of cases.

        The value that a site also sends in training is preferred, so that all rounds are compared
        by the same metric.
        """
        stated = validation_of(self.reply)
        if stated[1] > 0:
            return stated
        return self.dice, float(len({row["case"] for row in self.cases}))


def most_pixels(plan: Plan, slices: int, number: int) -> float | None:
    """Return the most pixels in a site's statistics; None for a client that mixes domains.

    One pass reads every slice once, or again to complete a batch. With `memory=online` the
    statistics are the sum of the batches of all rounds so far, of up to two views each.
    """
    if plan.federation.ownership == "pooled":
        return None
    passes = PASSES * (slices + plan.method.batch_size)
    if plan.prototypes.memory == "online":
        steps = plan.method.steps_per_round * plan.method.batch_size
        passes = 2 * number * max(steps, plan.method.local_epochs * passes)
    return float(passes * plan.data.image_size**2)


def most_projections(plan: Plan, slices: int) -> float:
    """Return the most projections in a site's statistics: one pass, two images of each pair."""
    return float(2 * PASSES * (slices + plan.method.batch_size))


def expectation_for(
    plan: Plan, message_type: str, site: str, request: Request, slices: int, cases: int
) -> Expectation:
    """Return what the answer to a contributing message must match.

    Args:
        plan: The plan; decides whether class statistics are part of training, and their shape.
        message_type: Type of the request.
        site: Site that was asked.
        request: The request: its identity, the model that was sent, and the options.
        slices: Training slices that the site declared at enrolment.
        cases: Validation cases that it declared.
    """
    training = message_type == TRAIN
    number = request.identity.round
    with_training = plan.described_in_training(number) or plan.prototypes.memory == "online"
    described = with_training if training else bool(request.options.get("classes"))
    shape = plan.described_shape
    labelled = plan.role(site) != "unlabelled"
    describes = plan.method.statistics and (labelled or plan.method.describes_projections)
    if plan.privacy.secure_sums.enabled:
        # What is inside cannot be seen; the sum is checked when it is opened.
        return Expectation(request.identity, site)
    return Expectation(
        identity=request.identity,
        site=site,
        reference=request.weights if training else None,
        statistics_shape=shape if described and describes else None,
        unit_norm=plan.unit_features and not request.options.get("raw"),
        max_examples=slices,
        max_cases=cases,
        max_pixels=most_projections(plan, slices)
        if described and plan.method.describes_projections
        else most_pixels(plan, slices, number),
        measured=request.weights if request.options.get("moments") else None,
        labelled=labelled,
        control_variates=training and plan.federation.aggregator == "scaffold",
    )


def admitted(parts: Sequence[Collected]) -> list[Collected]:
    """Return the admitted answers."""
    return [part for part in parts if part.verdict.accepted]


def statistics_of(parts: Sequence[Collected]) -> list[tuple[str, ClassStatistics]]:
    """Return (site, class statistics) of the admitted answers that contain them."""
    replies = [part.reply for part in admitted(parts)]
    return [(reply.site, reply.statistics) for reply in replies if reply.statistics is not None]


def moments_of(parts: Sequence[Collected]) -> list[tuple[str, NormMoments]]:
    """Return (site, moments of the BatchNorm layers) of the admitted answers that contain them."""
    replies = [part.reply for part in admitted(parts)]
    return [(reply.site, reply.moments) for reply in replies if reply.moments is not None]


def validation_of(reply: Reply) -> tuple[float, float]:
    """Return source-validation Dice and number of cases stated by a site; (NaN, 0) if absent."""
    dice = reply.metrics.get("validation_dice", math.nan)
    return dice, 0.0 if math.isnan(dice) else reply.metrics.get("validation_cases", 1.0)


def mean_loss(parts: Sequence[Collected]) -> float:
    """Return the mean training loss of the admitted sites, weighted by their examples.

    The result is NaN if a site reports no loss, or without an admitted site.
    """
    replies = [part.reply for part in admitted(parts)]
    total = math.fsum(reply.metrics["examples"] for reply in replies)
    weighted = math.fsum(
        reply.metrics["examples"] * reply.metrics.get("loss", math.nan) for reply in replies
    )
    return weighted / total if total else math.nan


def site_rows(
    number: int, trained: Sequence[Collected], *described: Sequence[Collected]
) -> list[Row]:
    """Return the sites' rows of a round: metrics of the admitted sites, bytes of all sites.

    Args:
        number: Number of the round.
        trained: Answers to the training message.
        described: Answers to the statistics messages of the same round; their bytes are added.
    """
    rows = []
    for part in trained:
        site = part.answer.site
        answers = [
            part.answer,
            *(
                other.answer
                for others in described
                for other in others
                if other.answer.site == site
            ),
        ]
        figures = dict(part.reply.metrics) if part.verdict.accepted else {}
        parts = sorted(name for name in figures if LOSS_PART.fullmatch(name))[:MOST_PARTS]
        kept = {
            name: figures[name]
            for name in (*parts, *SITE_METRICS)
            if math.isfinite(figures.get(name, math.nan))
        }
        kept["bytes_up"] = float(sum(answer.bytes_up for answer in answers))
        kept["bytes_down"] = float(sum(answer.bytes_down for answer in answers))
        rows += [row(number, "train", site, name, value) for name, value in kept.items()]
    return rows


def summed_rows(number: int, parts: Sequence[Collected]) -> list[Row]:
    """Return the rows of what a secure sum says about training; none without one."""
    return [
        row(number, "train", SUMMED, name, part.reply.metrics[name])
        for part in parts
        if part.answer.site == ALL_SITES
        for name in SUMMED_METRICS
        if name in part.reply.metrics
    ]


def epsilon_rows(number: int, parts: Sequence[Collected]) -> list[Row]:
    """Return the rows on what the sites had spent of their privacy budgets when they answered."""
    spent = {part.reply.site: part.reply.metrics.get("epsilon") for part in admitted(parts)}
    return [
        row(number, "train", site, "epsilon", value)
        for site, value in spent.items()
        if value is not None
    ]


def validation_rows(number: int, evaluations: Sequence[SiteEvaluation]) -> list[Row]:
    """Return the rows of a source validation; the model is that of the round before `number`."""
    return [
        row(number, "train", part.site, name, value)
        for part in evaluations
        for name, value in zip(
            ("validation_dice", "validation_cases"), part.validation, strict=True
        )
        if math.isfinite(value)
    ]


def evaluation_rows(
    plan: Plan, number: int, evaluations: Sequence[SiteEvaluation], known: Sequence[Row] = ()
) -> list[Row]:
    """Return the rows of an evaluation of round `number`'s model, without those already in `known`.

    The held-out site has phase `heldout` and the metrics `heldout_dice` and `heldout_asd`; an
    observer has phase `observer`, with `observer_dice` and `observer_asd`. `…_asd_left_out` counts
    the evaluations without a distance, if there are any.
    """
    present = {(entry["round"], entry["site"], entry["metric"]) for entry in known}
    rows = []
    for part in evaluations:
        phase = "heldout" if part.site == plan.heldout else "observer"
        figures = {f"{phase}_dice": part.dice, f"{phase}_asd": part.asd}
        if part.without_distance:
            figures[f"{phase}_asd_left_out"] = float(part.without_distance)
        for metric, value in figures.items():
            if math.isfinite(value) and (number, part.site, metric) not in present:
                rows.append(row(number, phase, part.site, metric, value))
    return rows


def adapted_rows(number: int, way: str, evaluations: Sequence[SiteEvaluation]) -> list[Row]:
    """Return the rows of evaluations after an adaptation to the hospitals' images.

    The phase is `adapted` and the metrics are `adapted_dice_<way>` and `adapted_asd_<way>`.
    """
    return [
        row(number, "adapted", part.site, f"adapted_{metric}_{way}", value)
        for part in evaluations
        for metric, value in (("dice", part.dice), ("asd", part.asd))
        if math.isfinite(value)
    ]


def stated_rows(plan: Plan, number: int, evaluations: Sequence[SiteEvaluation]) -> list[Row]:
    """Return the summaries of sites that send no per-case results, for the rounds table.

    The phase is `heldout`, `observer` or `validation`, the class is the structure, and the metrics
    are `<metric>_mean`, `<metric>_sd` and `<metric>_count`; what a site does not state has no row.
    """
    phases = {"heldout": "heldout", "train": "validation"}

    def phase(site: str) -> str:
        return "observer" if site in plan.unlabelled else phases.get(plan.role(site), "observer")

    return [
        row(number, phase(part.site), part.site, f"{entry['metric']}_{name}", value)
        | {"cls": entry["structure"]}
        for part in evaluations
        for entry in part.summary
        for name in ("mean", "sd", "count")
        if math.isfinite(value := entry[name])
    ]


def row(number: int, phase: str, site: str, metric: str, value: float) -> Row:
    """Return one row of the rounds table."""
    return {
        "round": number,
        "phase": phase,
        "site": site,
        "cls": "",
        "metric": metric,
        "value": float(value),
    }
