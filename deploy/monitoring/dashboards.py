"""The dashboards and alert rules as tables, and the files of `deploy/monitoring/grafana` from them.

    python -m fedsgcg.deploy.monitoring.dashboards

writes the files; a test compares them. The dashboards are built with Grafana's own Python library
(`grafana-foundation-sdk`), which only this module needs and only when it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import yaml

FOLDER: Final = Path(__file__).resolve().parent / "grafana"
FOLDER_UID: Final = "fedsgcg"
FOLDER_TITLE: Final = "fedsgcg"
SOURCE_UID: Final = "fedsgcg-prometheus"
SOURCE_NAME: Final = "fedsgcg Prometheus"
RULE_GROUP: Final = "fedsgcg"
PROMETHEUS: Final = "http://localhost:9090"
OLDEST: Final = (10, 0)
"""Oldest version of Grafana for which the files are made: its alert rules in folders by uid."""

CELL: Final = "study, method, heldout, seed"
CHOSEN: Final = 'study=~"$study",method=~"$method",heldout=~"$heldout",seed=~"$seed"'
NAME: Final = "{{method}} · {{heldout}} · {{seed}}"
AT_SITE: Final = "{{site}} · {{method}} · {{heldout}} · {{seed}}"
HALF: Final = 12
WHOLE: Final = 24
QUARTER: Final = 6


@dataclass(frozen=True)
class Panel:
    """One panel: a title, a query and how it is drawn.

    Attributes:
        title: Title.
        expr: PromQL; `$cell` is replaced by the selectors of the dashboard's variables.
        legend: Name of a series.
        unit: Grafana's unit.
        kind: Curve over time, or the current values; a matrix has the labels `site` and `other`.
        width: Of the 24 columns.
        help: Description.
    """

    title: str
    expr: str
    legend: str
    unit: str = "short"
    kind: Literal["timeseries", "stat", "bargauge", "matrix"] = "timeseries"
    width: int = HALF
    help: str = ""

    @property
    def query(self) -> str:
        """The PromQL with the dashboard's variables."""
        return self.expr.replace("$cell", CHOSEN)


@dataclass(frozen=True)
class Dashboard:
    """One dashboard.

    Attributes:
        uid: Stable identifier, also the name of its file.
        title: Title.
        panels: Panels, in reading order.
        cells: Whether it has the variables of a federation besides `study`.
    """

    uid: str
    title: str
    panels: tuple[Panel, ...]
    cells: bool = True


@dataclass(frozen=True)
class Alert:
    """One alert rule; it fires while its query returns a series.

    Attributes:
        uid: Stable identifier.
        title: Title.
        expr: PromQL with the labels that the text uses.
        text: What happened; `{{ $labels.site }}` inserts a label.
        action: What to do.
        wait: How long it must hold.
    """

    uid: str
    title: str
    expr: str
    text: str
    action: str
    wait: str = "0s"


FEDERATION: Final = Dashboard(
    "fedsgcg-federation",
    "Federation",
    (
        Panel("State", "fedsgcg_state{$cell} == 1", "{{state}} · " + NAME, kind="stat"),
        Panel(
            "Rounds done",
            "fedsgcg_rounds_done{$cell} / fedsgcg_rounds_planned{$cell}",
            NAME,
            "percentunit",
            "bargauge",
        ),
        Panel("Time left", "fedsgcg_remaining_seconds{$cell}", NAME, "s", "stat", QUARTER),
        Panel(
            "Since the last event",
            "time() - fedsgcg_last_event_timestamp_seconds{$cell}",
            NAME,
            "s",
            "stat",
            QUARTER,
        ),
        Panel(
            "Replies admitted and needed",
            'label_replace(fedsgcg_sites_admitted{$cell}, "what", "admitted", "", "") '
            'or label_replace(fedsgcg_sites_needed{$cell}, "what", "needed", "", "")',
            "{{what}} · " + NAME,
        ),
        Panel("Mean training loss", "fedsgcg_mean_loss{$cell}", NAME),
        Panel(
            "Dice on the source hospitals' validation cases",
            "fedsgcg_validation_dice{$cell}",
            NAME,
            help="Each value is that of the model with which the round started.",
        ),
        Panel(
            "Dice at hospitals that do not train",
            "fedsgcg_test_dice{$cell}",
            "{{site}} ({{role}}) · " + NAME,
            help="Never used to choose a model or a setting.",
        ),
        Panel("Duration of the last round", "fedsgcg_round_duration_seconds{$cell}", NAME, "s"),
        Panel(
            "Void rounds and resumes",
            'label_replace(fedsgcg_void_rounds_total{$cell}, "what", "void rounds", "", "") '
            'or label_replace(fedsgcg_resumes_total{$cell}, "what", "resumes", "", "")',
            "{{what}} · " + NAME,
        ),
    ),
)

HOSPITALS: Final = Dashboard(
    "fedsgcg-hospitals",
    "Hospitals",
    (
        Panel(
            "Late hospitals",
            "sum by (site) (fedsgcg_site_late{$cell})",
            "{{site}}",
            kind="stat",
            help="Takes more than twice its usual time in this round.",
        ),
        Panel(
            "Paused hospitals",
            "sum by (site) (fedsgcg_site_paused{$cell})",
            "{{site}}",
            kind="stat",
        ),
        Panel("Waiting for a reply", "fedsgcg_site_waiting_seconds{$cell}", AT_SITE, "s"),
        Panel("Time to the reply", "fedsgcg_site_answer_seconds{$cell}", AT_SITE, "s"),
        Panel("Training time at the hospital", "fedsgcg_site_train_seconds{$cell}", AT_SITE, "s"),
        Panel("Loss", 'fedsgcg_loss{$cell,part="total"}', AT_SITE),
        Panel("Terms of the loss", 'fedsgcg_loss{$cell,part!="total"}', "{{part}} · " + AT_SITE),
        Panel("Learning rate", "fedsgcg_learning_rate{$cell}", AT_SITE),
        Panel("Dice on validation cases", "fedsgcg_site_validation_dice{$cell}", AT_SITE),
        Panel(
            "Dice of the finished model",
            "fedsgcg_dice{$cell}",
            "{{structure}} · " + AT_SITE,
            kind="bargauge",
        ),
        Panel(
            "Training slices",
            "max by (site) (fedsgcg_site_examples{$cell})",
            "{{site}}",
            kind="bargauge",
        ),
        Panel(
            "Replies by verdict",
            "sum by (site, code) (fedsgcg_verdicts_total{$cell})",
            "{{site}} · {{code}}",
            help="accepted, or the error code of a rejection (docs/reference/errors.md).",
        ),
        Panel(
            "Findings of the screens",
            "sum by (site, code) (fedsgcg_findings_total{$cell}) "
            "or sum by (site, code) (fedsgcg_verdicts_total{$cell}) * 0",
            "{{site}} · {{code}}",
        ),
    ),
)

PROTOTYPES: Final = Dashboard(
    "fedsgcg-prototypes",
    "Prototypes and shift",
    (
        Panel(
            "Shift between hospitals, share of the variance",
            "fedsgcg_between_site_trace{$cell} "
            "/ (fedsgcg_between_site_trace{$cell} + fedsgcg_within_site_trace{$cell})",
            "{{class}} · " + NAME,
            "percentunit",
            width=WHOLE,
            help="Between-site part of the trace of a class's pooled covariance.",
        ),
        Panel(
            "Trace between hospitals", "fedsgcg_between_site_trace{$cell}", "{{class}} · " + NAME
        ),
        Panel("Trace within hospitals", "fedsgcg_within_site_trace{$cell}", "{{class}} · " + NAME),
        Panel(
            "Distance to the nearest other class",
            "fedsgcg_prototype_distance{$cell}",
            "{{class}} · " + NAME,
        ),
        Panel(
            "Condition number of the covariance",
            "fedsgcg_prototype_condition{$cell}",
            "{{class}} · " + NAME,
        ),
        Panel("Pixels of a class", "fedsgcg_prototype_pixels{$cell}", "{{class}} · " + NAME),
        Panel(
            "Distance of a hospital from the others",
            "fedsgcg_site_distance{$cell}",
            "{{site}} · {{class}} · " + NAME,
            help="Mean Fréchet distance of a hospital's class from the same class at the others.",
        ),
        Panel(
            "Distances between hospitals",
            'avg by (site, other) (fedsgcg_pair_distance{$cell,class!="background"})',
            "{{site}} · {{other}}",
            kind="matrix",
            help="Fréchet distance, mean over structures and the chosen federations. Choose one "
            "method: each method has its own features. Empty where only sums over hospitals are "
            "exchanged.",
        ),
    ),
)

PRIVACY: Final = Dashboard(
    "fedsgcg-privacy",
    "Privacy",
    (
        Panel(
            "Bytes that left the hospitals",
            'sum by (site) (fedsgcg_site_bytes_total{$cell,direction="up"})',
            "{{site}}",
            "bytes",
        ),
        Panel(
            "Bytes that the hospitals received",
            'sum by (site) (fedsgcg_site_bytes_total{$cell,direction="down"})',
            "{{site}}",
            "bytes",
        ),
        Panel(
            "Refusals by the hospitals' own policy",
            'sum by (site, code) (fedsgcg_verdicts_total{$cell,code=~"POL-.*|ROL-.*"}) '
            "or sum by (site) (fedsgcg_verdicts_total{$cell}) * 0",
            "{{site}} · {{code}}",
            width=WHOLE,
        ),
    ),
)

QUEUE: Final = Dashboard(
    "fedsgcg-study",
    "Study queue",
    (
        Panel("Federations by state", 'fedsgcg_cells{study=~"$study"}', "{{state}} · {{study}}"),
        Panel(
            "Done",
            'sum by (study) (fedsgcg_cells{study=~"$study",state=~"completed|degraded"}) '
            '/ sum by (study) (fedsgcg_cells{study=~"$study"})',
            "{{study}}",
            "percentunit",
            "bargauge",
        ),
        Panel(
            "Dice by method at the held-out hospitals",
            'avg by (study, method) (fedsgcg_test_dice{study=~"$study",role="heldout"})',
            "{{method}} · {{study}}",
            kind="bargauge",
        ),
        Panel("Free disk space", 'fedsgcg_disk_free_bytes{study=~"$study"}', "{{study}}", "bytes"),
        Panel(
            "Memory of the process that serves the metrics",
            "process_resident_memory_bytes",
            "{{instance}}",
            "bytes",
        ),
        Panel(
            "Unreadable lines of event logs",
            'fedsgcg_unreadable_lines_total{study=~"$study"}',
            "{{study}}",
        ),
    ),
    cells=False,
)

DASHBOARDS: Final = (FEDERATION, HOSPITALS, PROTOTYPES, PRIVACY, QUEUE)

REJECTED: Final = 'fedsgcg_verdicts_total{code!="accepted"}'
DIVERGED: Final = 'fedsgcg_verdicts_total{code="TRN-301"}'


def _grew(series: str) -> str:
    """Return PromQL for a counter that grew or appeared in ten minutes.

    `increase` alone does not see the first sample of a new series.
    """
    return f"increase({series}[10m]) > 0 or ({series} > 0 unless {series} offset 10m)"


ALERTS: Final = (
    Alert(
        "fedsgcg-site-late",
        "A hospital is late",
        "fedsgcg_site_late == 1",
        "{{ $labels.site }} takes more than twice its usual time in {{ $labels.study }}.",
        "fedsgcg status KIT; ask the hospital to look at fedsgcg-site status.",
    ),
    Alert(
        "fedsgcg-quorum",
        "The quorum is at risk",
        f"fedsgcg_sites_needed - on ({CELL}) sum by ({CELL}) (1 - fedsgcg_site_late) > 0",
        "So many hospitals are late that a round of {{ $labels.study }} misses its quorum.",
        "Wake the late hospitals before the round's deadline; the run can be resumed after it.",
    ),
    Alert(
        "fedsgcg-rejected",
        "A reply was rejected",
        _grew(REJECTED),
        "A reply of {{ $labels.site }} was rejected: {{ $labels.code }}.",
        "Look the code up in docs/reference/errors.md; problems are in outcome.json.",
    ),
    Alert(
        "fedsgcg-diverged",
        "A loss is not finite",
        _grew(DIVERGED),
        "Training diverged at {{ $labels.site }} (TRN-301).",
        "Lower method.learning_rate; nothing of the round left the hospital.",
    ),
    Alert(
        "fedsgcg-failed",
        "A federation failed",
        'fedsgcg_state{state="failed"} == 1',
        "{{ $labels.method }}, held out {{ $labels.heldout }}, seed {{ $labels.seed }} failed.",
        "The same command resumes after the last completed round.",
    ),
    Alert(
        "fedsgcg-stalled",
        "A federation does not move",
        "time() - fedsgcg_last_event_timestamp_seconds > 7200 "
        f'and on ({CELL}) fedsgcg_state{{state="running"}} == 1',
        "No event of {{ $labels.study }} for two hours.",
        "Look at the coordinator's process and log.",
    ),
    Alert(
        "fedsgcg-disk",
        "The disk is nearly full",
        "fedsgcg_disk_free_bytes < 5e9",
        "Less than 5 GB are free for {{ $labels.study }}.",
        "fedsgcg clean RUN removes checkpoints and pictures of finished federations.",
    ),
)


def files() -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of every generated file.

    Raises:
        ImportError: Without `grafana-foundation-sdk`.
    """
    for dashboard in DASHBOARDS:
        text = json.dumps(dashboard_json(dashboard), indent=1, sort_keys=True, ensure_ascii=False)
        yield FOLDER / "dashboards" / f"{dashboard.uid}.json", text + "\n"
    provisioning = FOLDER / "provisioning"
    yield (
        provisioning / "datasources" / "fedsgcg.yaml",
        _yaml({"apiVersion": 1, "datasources": [data_source(PROMETHEUS)]}),
    )
    provider = {
        "name": FOLDER_TITLE,
        "folder": FOLDER_TITLE,
        "folderUid": FOLDER_UID,
        "type": "file",
        "options": {"path": "/var/lib/grafana/dashboards/fedsgcg"},
    }
    yield (
        provisioning / "dashboards" / "fedsgcg.yaml",
        _yaml({"apiVersion": 1, "providers": [provider]}),
    )
    group = {"orgId": 1, "folder": FOLDER_TITLE, "name": RULE_GROUP, "interval": "1m"}
    rules = [{k: v for k, v in rule_json(alert).items() if k not in IN_GROUP} for alert in ALERTS]
    yield (
        provisioning / "alerting" / "fedsgcg.yaml",
        _yaml({"apiVersion": 1, "groups": [{**group, "rules": rules}]}),
    )


IN_GROUP: Final = ("folderUID", "ruleGroup", "orgID")
"""Keys of a rule that its group states in a provisioning file."""


def data_source(url: str) -> dict[str, Any]:
    """Return the Prometheus data source of the dashboards for a server's address."""
    return {
        "name": SOURCE_NAME,
        "uid": SOURCE_UID,
        "type": "prometheus",
        "access": "proxy",
        "url": url,
        "jsonData": {"timeInterval": "15s"},
    }


def rule_json(alert: Alert) -> dict[str, Any]:
    """Return an alert rule as Grafana's provisioning interface takes it."""
    query = {
        "refId": "A",
        "relativeTimeRange": {"from": 600, "to": 0},
        "datasourceUid": SOURCE_UID,
        # One series for each label set with the value 1, whatever the value of the query is.
        "model": {"refId": "A", "expr": f"({alert.expr}) * 0 + 1", "instant": True},
    }
    above = {"evaluator": {"type": "gt", "params": [0]}}
    condition = {
        "refId": "B",
        "relativeTimeRange": {"from": 600, "to": 0},
        "datasourceUid": "__expr__",
        "model": {"refId": "B", "type": "threshold", "expression": "A", "conditions": [above]},
    }
    return {
        "uid": alert.uid,
        "title": alert.title,
        "folderUID": FOLDER_UID,
        "ruleGroup": RULE_GROUP,
        "orgID": 1,
        "condition": "B",
        "data": [query, condition],
        "noDataState": "OK",
        "execErrState": "Error",
        "for": alert.wait,
        "labels": {"product": "fedsgcg"},
        "annotations": {"summary": alert.text, "description": alert.action},
    }


def stored_dashboards() -> list[dict[str, Any]]:
    """Return the dashboards of the installed files."""
    paths = [FOLDER / "dashboards" / f"{dashboard.uid}.json" for dashboard in DASHBOARDS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """Build a dashboard; raises ImportError without `grafana-foundation-sdk`."""
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

    source = DataSourceRef(type_val="prometheus", uid=SOURCE_UID)
    made = (
        build.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .tags(["fedsgcg"])
        .refresh("10s")
        .time("now-6h", "now")
        .timezone("browser")
        .readonly()
    )
    names = ("study", "method", "heldout", "seed") if dashboard.cells else ("study",)
    for place, name in enumerate(names):
        given = ",".join(f'{other}=~"${other}"' for other in names[:place])
        metric = "fedsgcg_round" if dashboard.cells else "fedsgcg_cells"
        made = made.with_variable(
            build.QueryVariable(name)
            .datasource(source)
            .query(f"label_values({metric}{{{given}}}, {name})")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    for panel in dashboard.panels:
        made = made.with_panel(_built(panel, source))
    tree: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(made.build()))
    for number, panel_tree in enumerate(tree["panels"], start=1):
        panel_tree["id"] = number  # stable, so that a link to a panel stays valid
    return tree


def _built(panel: Panel, source: Any) -> Any:
    from grafana_foundation_sdk.builders import (
        bargauge,
        common,
        prometheus,
        stat,
        table,
        timeseries,
    )
    from grafana_foundation_sdk.models.common import LegendDisplayMode, VisibilityMode
    from grafana_foundation_sdk.models.dashboard import DataTransformerConfig
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    query = prometheus.Dataquery().expr(panel.query).legend_format(panel.legend).ref_id("A")
    if panel.kind == "timeseries":
        made: Any = (
            timeseries.Panel()
            .legend(
                common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST)
            )
            .show_points(VisibilityMode.AUTO)
        )
    elif panel.kind == "matrix":
        matrix = {"rowField": "site", "columnField": "other", "valueField": "Value"}
        made = table.Panel().with_transformation(
            DataTransformerConfig(id_val="groupingToMatrix", options=matrix)
        )
        query = query.instant().format(PromQueryFormat.TABLE)
    else:
        made = (stat if panel.kind == "stat" else bargauge).Panel()
        query = query.instant()
    return (
        made.title(panel.title)
        .description(panel.help)
        .datasource(source)
        .unit(panel.unit)
        .span(panel.width)
        .height(8)
        .with_target(query)
    )


def _yaml(tree: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=110)
    return text


def main() -> None:
    """Write the generated files."""
    for path, text in files():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
