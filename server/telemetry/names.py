"""Every metric with its unit, its labels and its meaning: the only list of names.

Names follow OpenMetrics: the unit as suffix, none for plain numbers such as Dice, and `_total` for
counters. Dashboards, alerts and the
reference page are made and checked from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

CELL: Final = ("study", "method", "heldout", "seed")
"""Labels that identify a federation, as in the result tables; `study` is the folder's name."""

STATES: Final = ("waiting", "running", "completed", "degraded", "failed")
"""Values of the label `state`."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: Name in Prometheus, for counters without `_total`.
        help: Meaning.
        labels: Names of its labels.
        kind: Gauge or counter.
    """

    name: str
    help: str
    labels: tuple[str, ...] = CELL
    kind: Literal["gauge", "counter"] = "gauge"

    @property
    def exposed(self) -> str:
        """The name that queries use."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


SITE: Final = (*CELL, "site")
CLASS: Final = (*CELL, "class")

METRICS: Final = (
    Metric("fedsgcg_round", "Round in progress, or the last one."),
    Metric("fedsgcg_rounds_done", "Completed rounds."),
    Metric("fedsgcg_rounds_planned", "Rounds of the plan."),
    Metric("fedsgcg_state", "1 for the state of the federation, 0 else.", (*CELL, "state")),
    Metric("fedsgcg_round_duration_seconds", "Duration of the last completed round."),
    Metric("fedsgcg_remaining_seconds", "Estimated time to the end, from the last rounds."),
    Metric("fedsgcg_last_event_timestamp_seconds", "Time of the last event, since 1970."),
    Metric("fedsgcg_resumes", "Starts of the federation after its first.", CELL, "counter"),
    Metric("fedsgcg_void_rounds", "Rounds in which too few replies counted.", CELL, "counter"),
    Metric("fedsgcg_sites_enrolled", "Sites that joined, of all roles."),
    Metric("fedsgcg_sites_needed", "Training sites that must answer in a round: the quorum."),
    Metric("fedsgcg_sites_admitted", "Replies admitted in the last round with replies."),
    Metric("fedsgcg_site_waiting_seconds", "Seconds since an unanswered request; 0 else.", SITE),
    Metric(
        "fedsgcg_site_late", "1 if the site takes more than twice its usual time, 0 else.", SITE
    ),
    Metric("fedsgcg_site_answer_seconds", "Time from a round's start to the last reply.", SITE),
    Metric("fedsgcg_site_train_seconds", "Training time at the site in the last round.", SITE),
    Metric("fedsgcg_site_examples", "Training slices of the site.", SITE),
    Metric(
        "fedsgcg_verdicts",
        "Replies by verdict: `accepted`, or the error code of a rejection.",
        (*SITE, "code"),
        "counter",
    ),
    Metric(
        "fedsgcg_findings",
        "Valid replies that a screen found far from the others, by code.",
        (*SITE, "code"),
        "counter",
    ),
    Metric("fedsgcg_site_paused", "1 while the site is paused after rejections, 0 else.", SITE),
    Metric(
        "fedsgcg_site_bytes",
        "Bytes of messages; direction `up` = from the site, `down` = to it.",
        (*SITE, "direction"),
        "counter",
    ),
    Metric(
        "fedsgcg_loss",
        "Mean over the steps of a site's last round; part `total` or a term of the loss.",
        (*SITE, "part"),
    ),
    Metric("fedsgcg_mean_loss", "Mean training loss of the last round over the sites."),
    Metric("fedsgcg_learning_rate", "Learning rate of the last step.", SITE),
    Metric(
        "fedsgcg_site_validation_dice",
        "Dice of the model that the site received, on its validation cases.",
        SITE,
    ),
    Metric("fedsgcg_validation_dice", "Dice on the source sites' validation cases."),
    Metric(
        "fedsgcg_dice",
        "Mean Dice of a finished federation by hospital and structure.",
        (*SITE, "structure"),
    ),
    Metric(
        "fedsgcg_test_dice",
        "Mean Dice at a site that did not train; role `heldout` or `observer`.",
        (*SITE, "role"),
    ),
    Metric("fedsgcg_prototype_pixels", "Pixels behind a class's global prototype.", CLASS),
    Metric(
        "fedsgcg_between_site_trace",
        "Trace of the between-site part of a class's covariance: the domain shift.",
        CLASS,
    ),
    Metric("fedsgcg_within_site_trace", "Trace of the within-site part of the covariance.", CLASS),
    Metric(
        "fedsgcg_prototype_distance",
        "Distance from a class's global mean to the nearest mean of another class.",
        CLASS,
    ),
    Metric(
        "fedsgcg_prototype_condition",
        "Condition number of a class's covariance: largest eigenvalue / smallest above rounding.",
        CLASS,
    ),
    Metric(
        "fedsgcg_site_distance",
        "Mean Fréchet distance of a site's class from the same class at the other sites.",
        (*SITE, "class"),
    ),
    Metric(
        "fedsgcg_pair_distance",
        "Fréchet distance of a class at two sites; each pair in both orders.",
        (*SITE, "other", "class"),
    ),
    Metric("fedsgcg_cells", "Federations of a study by state.", ("study", "state")),
    Metric("fedsgcg_disk_free_bytes", "Free space of the file system of the study.", ("study",)),
    Metric(
        "fedsgcg_unreadable_lines",
        "Lines of event logs that could not be read.",
        ("study",),
        "counter",
    ),
)

BY_NAME: Final = {metric.name: metric for metric in METRICS}
