"""Dashboards and alerts: the files are those of the tables, and the tables use existing metrics."""

import json
import re

import pytest
import yaml

from fedsgcg.deploy.monitoring.dashboards import (
    ALERTS,
    DASHBOARDS,
    FOLDER,
    SOURCE_UID,
    files,
    rule_json,
    stored_dashboards,
)
from fedsgcg.server.telemetry.names import BY_NAME, METRICS

QUERIES = {
    **{f"{d.title}: {p.title}": p.query for d in DASHBOARDS for p in d.panels},
    **{alert.title: alert.expr for alert in ALERTS},
}
EXPOSED = {metric.exposed: metric for metric in METRICS}


def test_the_files_are_what_the_tables_give() -> None:
    made = dict(files())
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: make them again"
    assert {path for path in FOLDER.rglob("*") if path.is_file()} == made.keys()


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_query_uses_metrics_and_labels_that_exist(query: str) -> None:
    names = set(re.findall(r"\b(?:fedsgcg|process)_\w+", query))
    assert names
    for name in names - {"process_resident_memory_bytes"}:
        assert name in EXPOSED, name
        for selector in re.findall(rf"{name}\{{([^}}]*)\}}", query):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= set(EXPOSED[name].labels), (name, labels)


def test_every_metric_is_on_a_dashboard() -> None:
    """A metric that nobody sees is one too many; those of counters of resumes included."""
    shown = " ".join(panel.query for dashboard in DASHBOARDS for panel in dashboard.panels)
    hidden = {"fedsgcg_round", "fedsgcg_sites_enrolled"}  # variables, and a number on its own
    missing = {name for name, metric in EXPOSED.items() if metric.exposed not in shown}
    assert missing <= hidden


def test_texts_of_alerts_use_labels_that_their_query_has() -> None:
    for alert in ALERTS:
        name = re.search(r"fedsgcg_\w+", alert.expr)
        assert name is not None
        labels = set(re.findall(r"\$labels\.(\w+)", alert.text + alert.action))
        assert labels <= set(EXPOSED[name[0]].labels), alert.uid


def test_identifiers_are_unique_and_panels_fill_the_grid_without_overlap() -> None:
    uids = [tree["uid"] for tree in stored_dashboards()] + [rule_json(a)["uid"] for a in ALERTS]
    assert len(set(uids)) == len(uids)
    for tree in stored_dashboards():
        taken: set[tuple[int, int]] = set()
        for panel in tree["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert place["x"] + place["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells
            assert panel["datasource"]["uid"] == SOURCE_UID


def test_the_provisioned_alerts_are_those_that_are_pushed() -> None:
    path = FOLDER / "provisioning" / "alerting" / "fedsgcg.yaml"
    (group,) = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    for rule, alert in zip(group["rules"], ALERTS, strict=True):
        pushed = rule_json(alert)
        assert rule == {name: pushed[name] for name in rule}
        assert json.dumps(rule["data"]).count(SOURCE_UID) == 1


def test_the_table_of_names_follows_openmetrics() -> None:
    for metric in BY_NAME.values():
        assert re.fullmatch(r"fedsgcg_[a-z_]+", metric.name)
        assert not metric.name.endswith("_total")
        assert metric.help.endswith(".")
