"""A real Prometheus scrapes a real study; the real grafana-client pushes the dashboards."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsgcg.deploy.monitoring.dashboards import ALERTS, DASHBOARDS, FEDERATION, Alert
from fedsgcg.deploy.site.commands import free_port
from fedsgcg.server.telemetry.exporter import Exporter, Targets
from tests.support import small
from tests.support.monitoring import (
    GrafanaStandIn,
    Prometheus,
    environment,
    grafana_stand_in,
    prometheus,
    with_grafana_client,
)


def chosen(query: str) -> str:
    """A query as Grafana sends it when all values of its variables are chosen."""
    for name in ("study", "method", "heldout", "seed"):
        query = query.replace(f"${name}", ".*")
    return query


@pytest.mark.slow
def test_every_panel_has_data_from_a_real_study(hospitals: Path, tmp_path: Path) -> None:
    """Row 67, and the newcomer's walk up to the Grafana server."""
    port = free_port()
    arguments = small.overrides(
        hospitals,
        tmp_path / "study",
        "method=source,sgcg",
        "heldout=North",
        "federation.rounds=8",
        f"telemetry.port={port}",
        "ray.cpus=1",
    )
    with prometheus(tmp_path, f"127.0.0.1:{port}") as server:
        study = subprocess.Popen(
            small.command("study", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            server.wait_for("fedsgcg_rounds_done", 200)  # scraped while it runs
            text, _ = study.communicate(timeout=250)
        finally:
            study.kill()
            study.wait()
        assert study.returncode == 0, text.decode()
        assert f"metrics: http://127.0.0.1:{port}/metrics" in text.decode()
    # Later, the same from the run folder.
    (tmp_path / "again").mkdir()
    with (
        Exporter(tmp_path / "study", Targets(port=0)) as exporter,
        prometheus(tmp_path / "again", exporter.url.split("/")[2]) as server,
    ):
        server.wait_for('fedsgcg_state{state="completed"} == 1')
        assert len(server.query("fedsgcg_round")) == 2
        for dashboard in DASHBOARDS:
            for panel in dashboard.panels:
                assert server.query(chosen(panel.query)), f"{dashboard.title}: {panel.title}"
        quiet = {alert.title for alert in ALERTS if server.query(alert.expr)}
        assert quiet == set()  # nothing fires on a study without a fault


CELL = {"method": "sgcg", "heldout": "HK", "seed": 0, "rounds": 9}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A run with every fault that an alert is for, scraped by Prometheus."""
    folder = tmp_path_factory.mktemp("faults")
    now = time.time()

    def write(seed: int, *events: tuple[float, str, dict[str, Any]]) -> None:
        path = folder / "runs" / str(seed)
        path.mkdir(parents=True, exist_ok=True)
        with (path / "events.jsonl").open("a") as file:
            for age, name, fields in events:
                line = {"time": now - age, "event": name, **CELL, "seed": seed, "round": 1}
                line |= fields
                file.write(json.dumps(line) + "\n")

    sites = {"sites": ["A", "B"], "training": ["A", "B"], "needed": 2}
    start = [(9000.0, "run.started", {}), (9000.0, "sites.enrolled", sites)]
    write(1, *start, (8000.0, "round.started", {}))  # B is late, and nothing moves
    write(1, (7990.0, "round.reply", {"site": "A", "accepted": True, "code": ""}))
    write(2, *start, (1.0, "run.finished", {"status": "failed"}))
    (folder / "prometheus").mkdir()
    write(3, *start)
    with (
        Exporter(folder / "runs", Targets(port=0)) as exporter,
        prometheus(folder / "prometheus", exporter.url.split("/")[2]) as server,
    ):
        server.wait_for("fedsgcg_state")
        # A counter's series that appears while Prometheus watches.
        for code in ("PAY-112", "TRN-301"):
            reply = {"site": "B", "accepted": False, "code": code}
            write(3, (1.0, "round.reply", reply))
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.uid)
def test_every_alert_fires_in_its_fault(faults: Prometheus, alert: Alert) -> None:
    if alert.uid == "fedsgcg-disk":  # the disk of this machine is not to be filled
        free = faults.query("fedsgcg_disk_free_bytes")[0]["value"][1]
        assert faults.query(alert.expr.replace("5e9", str(float(free) + 1e10)))
        return
    faults.wait_for(alert.expr)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_grafana_client(tmp_path_factory.mktemp("grafana") / "venv")


def dashboards(python: str, url: str, token: Path, *arguments: str) -> Any:
    action, *rest = arguments
    command = [python, "-m", "fedsgcg.deploy.cli.coordinator", "dashboards", action]
    return subprocess.run(
        [*command, "--url", url, "--token-file", str(token), *rest],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )


@pytest.mark.slow
def test_dashboards_are_pushed_listed_annotated_and_removed(python: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(GrafanaStandIn.TOKEN + "\n")
    run = tmp_path / "run"
    run.mkdir()
    events = [
        {"time": 1.0, "event": "run.started", **CELL, "round": 0},
        {"time": 2.0, "event": "round.reply", **CELL, "round": 1, "site": "A", "accepted": True},
        {
            **{"time": 2.0, "event": "round.reply", **CELL, "round": 1, "site": "B"},
            **{"accepted": False, "code": "PAY-112"},
        },
        {"time": 3.0, "event": "round.done", **CELL, "round": 1},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    with grafana_stand_in() as (url, state):
        assert dashboards(python, url, token, "list").returncode == 1
        for _ in range(2):  # a second push changes nothing
            done = dashboards(python, url, token, "push", "--prometheus", "http://prom:9090")
            assert done.returncode == 0, done.stdout + done.stderr
            assert set(state.dashboards) == {dashboard.uid for dashboard in DASHBOARDS}
            assert set(state.rules) == {alert.uid for alert in ALERTS}
            assert [source["url"] for source in state.sources.values()] == ["http://prom:9090"]
            assert set(state.folders) == {"fedsgcg"}
        done = dashboards(python, url, token, "list")
        assert done.returncode == 0
        assert "missing" not in done.stdout
        for _ in range(2):  # each event is marked once
            done = dashboards(python, url, token, "annotate", str(run))
            assert done.returncode == 0, done.stdout + done.stderr
            texts = [mark["text"] for mark in state.annotations]
            assert len(texts) == 3
            assert "B rejected: PAY-112 (sgcg · HK · 0)" in texts
        assert {mark["dashboardUID"] for mark in state.annotations} == {FEDERATION.uid}
        state.dashboards["somebody"] = {"folderUid": "fedsgcg"}
        done = dashboards(python, url, token, "remove")
        assert done.returncode == 0, done.stdout + done.stderr
        assert set(state.dashboards) == {"somebody"}
        assert not state.rules
        assert not state.sources
        assert set(state.folders) == {"fedsgcg"}  # it is not empty
        del state.dashboards["somebody"]
        assert dashboards(python, url, token, "remove").returncode == 0
        assert not state.folders


@pytest.mark.slow
def test_what_grafana_refuses_is_a_sentence(python: str, tmp_path: Path) -> None:
    right, wrong, empty = (tmp_path / name for name in ("right", "wrong", "empty"))
    right.write_text(GrafanaStandIn.TOKEN)
    wrong.write_text("glsa_wrong")
    empty.write_text("\n")

    def refused(code: str, url: str, token: Path, **state: object) -> None:
        for name, value in {"version": "12.1.0", "role": "Admin", "broken": False, **state}.items():
            setattr(server, name, value)
        done = dashboards(python, url, token, "push")
        assert done.returncode == 2, done.stdout + done.stderr
        assert code in done.stderr
        assert "Traceback" not in done.stderr
        assert GrafanaStandIn.TOKEN not in done.stdout + done.stderr

    with grafana_stand_in() as (url, server):
        refused("MON-904", url, wrong)
        refused("MON-905", url, right, role="Viewer")
        refused("MON-905", url, right, role="Editor")  # may not make the data source
        refused("MON-906", url, right, version="9.5.2")
        refused("MON-907", url, right, version="something else")
        refused("MON-907", url, right, broken=True)
        refused("MON-908", url, empty)
        refused("MON-908", url, tmp_path / "absent")
        refused("MON-903", f"http://127.0.0.1:{free_port()}", right)
        refused("MON-903", url.replace("http", "https"), right)
        refused("CFG-001", "grafana", right)


def test_without_the_extra_the_command_names_it(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("glsa_x")
    done = dashboards(sys.executable, "http://127.0.0.1:9", token, "push")
    if "MON-901" not in done.stderr:
        pytest.skip("grafana-client is installed in this environment")
    assert done.returncode == 2
    assert "fedsgcg[monitoring]" in done.stderr


@pytest.mark.slow
def test_the_metrics_command_serves_a_folder_and_writes_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    event = {"time": 1.0, "event": "run.started", **CELL, "round": 0}
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps(event) + "\n")
    file = tmp_path / "fedsgcg.prom"
    command = small.command("metrics", str(tmp_path), "--textfile", str(file), "--once")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "fedsgcg_rounds_planned" in file.read_text()
    for bad in (["--once"], ["--port", "99999"]):
        command = small.command("metrics", str(tmp_path), *bad)
        done = subprocess.run(
            small.command("metrics", str(tmp_path), *bad),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
