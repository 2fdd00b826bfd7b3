"""The metrics of a federation: from events and rows to what Prometheus reads."""

import json
import math
import os
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.run_folder.tables import ROWS_SCHEMA
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.telemetry.exporter import MOST_REQUESTS, Exporter, Targets
from fedsgcg.server.telemetry.follow import Follower, RunFollower
from fedsgcg.server.telemetry.names import BY_NAME, METRICS
from fedsgcg.server.telemetry.state import MOST_SERIES, RunMetrics

CELL = {"method": "sgcg", "heldout": "HK", "seed": 0, "rounds": 3}
LABELS = ("study", "sgcg", "HK", "0")


def event(time: float, name: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": name, **CELL, "round": number, **fields}


def reply(time: float, number: int, site: str, code: str = "") -> dict[str, Any]:
    return event(time, "round.reply", number, site=site, accepted=not code, code=code)


EVENTS = [
    event(100, "run.started"),
    event(101, "sites.enrolled", sites=["A", "B", "HK"], training=["A", "B"], needed=2),
    event(102, "round.started", 1),
    reply(104, 1, "A"),
    reply(106, 1, "B"),
    event(107, "round.done", 1, loss=0.9, validation_dice=None, validation_round=0),
    event(107, "round.started", 2),
    reply(109, 2, "A", "PAY-112"),
    reply(112, 2, "B"),
    event(112, "round.screened", 2, site="B", code="RND-423", rejected=False),
    event(113, "round.done", 2, loss=0.5, validation_dice=0.75, validation_round=1),
    event(113, "round.started", 3),
    reply(115, 3, "A"),
]


def samples(metrics: RunMetrics, now: float) -> dict[tuple[str, tuple[str, ...]], float]:
    found = list(metrics.samples(now))
    assert len({(name, labels) for name, labels, _ in found}) == len(found)
    for name, labels, _ in found:
        assert len(labels) == len(BY_NAME[name].labels), name
    return {(name, labels[4:]): value for name, labels, value in found if labels[:4] == LABELS}


def test_events_become_the_metrics_that_one_computes_by_hand() -> None:
    metrics = RunMetrics("study")
    for one in EVENTS:
        metrics.take(one)
    found = samples(metrics, now=135.0)
    assert found["fedsgcg_round", ()] == 3
    assert found["fedsgcg_rounds_done", ()] == 2
    assert found["fedsgcg_rounds_planned", ()] == 3
    assert found["fedsgcg_state", ("running",)] == 1
    assert found["fedsgcg_state", ("completed",)] == 0
    assert found["fedsgcg_round_duration_seconds", ()] == 6
    assert found["fedsgcg_remaining_seconds", ()] == 6  # as the second one, one round left
    assert found["fedsgcg_sites_enrolled", ()] == 3
    assert found["fedsgcg_sites_needed", ()] == 2
    assert found["fedsgcg_sites_admitted", ()] == 1
    assert found["fedsgcg_site_waiting_seconds", ("B",)] == 22
    assert found["fedsgcg_site_waiting_seconds", ("A",)] == 0
    assert found["fedsgcg_site_late", ("B",)] == 1  # usually 4.5 s
    assert found["fedsgcg_site_late", ("A",)] == 0
    assert found["fedsgcg_site_answer_seconds", ("B",)] == 5
    assert found["fedsgcg_verdicts", ("A", "accepted")] == 2
    assert found["fedsgcg_verdicts", ("A", "PAY-112")] == 1
    assert found["fedsgcg_findings", ("B", "RND-423")] == 1
    assert found["fedsgcg_mean_loss", ()] == 0.5
    assert found["fedsgcg_validation_dice", ()] == 0.75
    assert ("fedsgcg_site_late", ("HK",)) not in found  # a held-out hospital is not asked to train


def test_rows_become_the_metrics_of_sites_and_classes() -> None:
    metrics = RunMetrics("study")
    metrics.take(EVENTS[0])
    for number in (1, 2):
        metrics.take_rows(
            [
                row(number, "train", "A", "", "loss", 0.5 / number),
                row(number, "train", "A", "", "loss_contrast", 1.5),
                row(number, "train", "A", "", "seconds", 3.0),
                row(number, "train", "A", "", "bytes_up", 1000.0),
                row(number, "merge", "", "cord", "between_site_trace", 0.25 * number),
                row(number, "merge", "A", "cord", "site_distance", 0.5 * number),
                row(number, "merge", "A", "cord", "pair_distance", 0.25 * number) | {"other": "B"},
                row(number, "heldout", "HK", "", "loss", 9.0),
            ]
        )
    metrics.take_results(
        [
            {"site": "HK", "structure": "cord", "dice": 0.5},
            {"site": "HK", "structure": "cord", "dice": 1.0},
        ]
    )
    found = samples(metrics, now=200.0)
    assert found["fedsgcg_loss", ("A", "total")] == 0.25
    assert found["fedsgcg_loss", ("A", "contrast")] == 1.5
    assert found["fedsgcg_site_train_seconds", ("A",)] == 3
    assert found["fedsgcg_site_bytes", ("A", "up")] == 2000
    assert found["fedsgcg_between_site_trace", ("cord",)] == 0.5
    assert found["fedsgcg_site_distance", ("A", "cord")] == 1.0
    for pair in (("A", "B"), ("B", "A")):
        assert found["fedsgcg_pair_distance", (*pair, "cord")] == 0.5
    assert found["fedsgcg_dice", ("HK", "cord")] == 0.75
    assert ("fedsgcg_loss", ("HK", "total")) not in found


def row(number: int, phase: str, site: str, cls: str, metric: str, value: float) -> dict[str, Any]:
    return {
        "round": number,
        "phase": phase,
        "site": site,
        "cls": cls,
        "metric": metric,
        "value": value,
    }


def log(folder: Path, *events: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in events)


@given(cuts=st.lists(st.integers(0, 2500), max_size=6))
def test_law_a_follower_sees_the_same_however_the_log_grows(
    cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    text = "".join(json.dumps(one) + "\n" for one in EVENTS).encode()
    follower = RunFollower(folder, "study")
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True):
        with (folder / "events.jsonl").open("ab") as file:
            file.write(text[start:end])
        follower.poll()
    whole = RunMetrics("study")
    for one in EVENTS:
        whole.take(one)
    assert list(follower.metrics.samples(150.0)) == list(whole.samples(150.0))
    assert follower.unreadable == 0


def test_lines_that_are_no_events_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    log(tmp_path, EVENTS[0])
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"event": "run.started"}\n{"time": "x"}\n')
        file.write(b'{"time": 1, "event": "e", "round": 1e999}\n' + b"[" * 100_000 + b"\n\n")
    log(tmp_path, event(103, "round.started", 1))
    follower = RunFollower(tmp_path, "study")
    follower.poll()
    assert follower.unreadable == 7
    assert samples(follower.metrics, 104.0)["fedsgcg_round", ()] == 1


def test_a_log_that_is_replaced_starts_afresh(tmp_path: Path) -> None:
    log(tmp_path, *EVENTS)
    follower = RunFollower(tmp_path, "study")
    follower.poll()
    (tmp_path / "events.jsonl").unlink()
    follower.poll()
    log(tmp_path, event(500, "run.started"), event(501, "round.started", 1))
    follower.poll()
    found = samples(follower.metrics, 502.0)
    assert found["fedsgcg_rounds_done", ()] == 0
    assert ("fedsgcg_verdicts", ("A", "accepted")) not in found


def test_rows_are_read_once_from_the_journal_or_after_the_run_from_its_table(
    tmp_path: Path,
) -> None:
    def table(number: int) -> pa.Table:
        return pa.Table.from_pylist(
            [row(number, "train", "A", "", "bytes_up", 10.0**number)], schema=ROWS_SCHEMA
        )

    rounds = tmp_path / "journal" / "rounds"
    rounds.mkdir(parents=True)
    with (
        pa.OSFile(str(rounds / "00001.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, ROWS_SCHEMA) as writer,
    ):
        writer.write_table(table(1))
    follower = RunFollower(tmp_path, "study")
    log(tmp_path, event(1, "run.started"), event(2, "round.done", 1), event(3, "round.done", 2))
    follower.poll()
    pq.write_table(pa.concat_tables([table(1), table(2), table(3)]), tmp_path / "rounds.parquet")
    log(tmp_path, event(4, "round.done", 3), event(5, "run.finished", 3, status="completed"))
    follower.poll()
    follower.poll()
    found = samples(follower.metrics, 6.0)
    assert found["fedsgcg_site_bytes", ("A", "up")] == 10 + 100 + 1000
    assert found["fedsgcg_state", ("completed",)] == 1


def test_a_study_counts_its_cells_by_state_also_those_that_have_not_started(
    tmp_path: Path,
) -> None:
    (tmp_path / "study.yaml").write_text("cells: [a/A/0, a/B/0, b/A/0]\n")
    log(tmp_path / "a/A/0", event(1, "run.started"), event(2, "run.finished", status="degraded"))
    log(tmp_path / "a/B/0", event(1, "run.started"))
    found = {
        labels: value
        for name, labels, value in Follower(tmp_path).poll(3.0)
        if name == "fedsgcg_cells"
    }
    name = tmp_path.name
    assert found[name, "waiting"] == 1
    assert found[name, "running"] == 1
    assert found[name, "degraded"] == 1
    assert found[name, "completed"] == found[name, "failed"] == 0


def test_folders_that_did_not_change_are_listed_once_and_new_runs_are_found(tmp_path: Path) -> None:
    listed: list[str] = []
    watching = True

    def hook(name: str, details: tuple[Any, ...]) -> None:
        if watching and name in ("os.listdir", "os.scandir"):
            listed.append(str(details[0]))

    sys.addaudithook(hook)  # cannot be removed again, only silenced
    try:
        for name in ("a/B/0", "a/B/1", "c/B/0"):
            log(tmp_path / name, event(1, "run.started"))
        (tmp_path / "a" / "B" / "2").mkdir()
        for folder in tmp_path.glob("**/"):
            os.utime(folder, (1000, 1000))
        follower = Follower(tmp_path)
        now = 2000.0
        follower.poll(now)
        assert listed
        listed.clear()
        follower.poll(now)
        assert [path for path in listed if path.startswith(str(tmp_path))] == []
        log(tmp_path / "a" / "B" / "2", event(1, "run.started"))  # in a folder that was known
        log(tmp_path / "d" / "B" / "0", event(1, "run.started"))  # in new folders
        states = {s[1][1]: s[2] for s in follower.poll(now) if s[0] == "fedsgcg_cells"}
        assert states["running"] == 5
        # A folder that has just changed may change again at the same time of its file system.
        (tmp_path / "e").mkdir()
        changed = (tmp_path / "e").stat()
        follower.poll(changed.st_mtime)
        log(tmp_path / "e" / "0", event(1, "run.started"))
        os.utime(tmp_path / "e", ns=(changed.st_mtime_ns, changed.st_mtime_ns))
        states = {s[1][1]: s[2] for s in follower.poll(now) if s[0] == "fedsgcg_cells"}
        assert states["running"] == 6
    finally:
        watching = False


def test_text_of_a_damaged_log_cannot_fill_the_memory() -> None:
    metrics = RunMetrics("study")
    metrics.take(EVENTS[0])
    for number in range(MOST_SERIES + 1000):
        metrics.take(reply(1.0, 1, "A", f"X-{number}"))
    assert sum(name == "fedsgcg_verdicts" for name, _, _ in metrics.samples(2.0)) <= MOST_SERIES


def scraped(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_with_quotes_newlines_and_unicode_survive_the_exposition(tmp_path: Path) -> None:
    name = 'St. "Mary"\nÄrzte\\ 病院'
    log(
        tmp_path / "run",
        event(1, "run.started"),
        event(2, "sites.enrolled", sites=[name], training=[name], needed=1),
        event(3, "round.started", 1),
        reply(4, 1, name),
    )
    with Exporter(tmp_path, Targets(port=0)) as exporter:
        found = scraped(exporter.url)
    sites = {dict(labels).get("site") for _, labels in found} - {None}
    assert sites == {name}


def test_every_metric_is_described_and_every_sample_has_its_labels(tmp_path: Path) -> None:
    log(tmp_path / "run", *EVENTS)
    with (
        Exporter(tmp_path, Targets(port=0)) as exporter,
        urllib.request.urlopen(exporter.url, timeout=10) as answer,
    ):
        text = answer.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for metric in METRICS:
        assert families[metric.name].documentation == metric.help
        assert families[metric.name].type == metric.kind
        for sample in families[metric.name].samples:
            assert sorted(sample.labels) == sorted(metric.labels)


def test_scrapers_that_hang_keep_nobody_waiting(tmp_path: Path) -> None:
    """Row 67: neither the federation nor, for long, another scraper notices them."""
    log(tmp_path / "run", *EVENTS)
    with Exporter(tmp_path, Targets(port=0)) as exporter:
        port = int(exporter.url.rpartition(":")[2].partition("/")[0])
        hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MOST_REQUESTS)]
        log(tmp_path / "run", event(116, "round.done", 3, loss=0.25))
        exporter.poll()  # what feeds the metrics does not wait for them
        assert threading.active_count() < MOST_REQUESTS + 20
        for connection in hanging:
            connection.close()
        end = time.monotonic() + 30
        while True:
            try:
                found = scraped(exporter.url)
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.1)
    values = {value for (name, _), value in found.items() if name == "fedsgcg_mean_loss"}
    assert values == {0.25}


def test_a_run_folder_that_moves_is_followed_again_when_it_comes_back(tmp_path: Path) -> None:
    runs, away = tmp_path / "runs", tmp_path / "away"
    log(runs / "one", *EVENTS)
    exporter = Exporter(runs, Targets(textfile=tmp_path / "fedsgcg.prom"))
    exporter.poll()
    runs.rename(away)
    exporter.poll()  # nothing is there, and nothing fails
    log(away / "one", event(116, "round.done", 3, loss=0.25))
    away.rename(runs)
    exporter.poll()
    exporter.stop()
    (line,) = (
        line
        for line in (tmp_path / "fedsgcg.prom").read_text().splitlines()
        if line.startswith("fedsgcg_mean_loss{")
    )
    assert line.endswith(" 0.25")


def test_a_port_in_use_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with Exporter(tmp_path, Targets(port=0)) as exporter:
        port = int(exporter.url.rpartition(":")[2].partition("/")[0])
        with pytest.raises(FedsgcgError, match="MON-902") as caught:
            Exporter(tmp_path, Targets(port=port))
    assert f"127.0.0.1:{port}" in str(caught.value)


def test_a_text_file_is_written_and_refusals_are_kept_as_problems(tmp_path: Path) -> None:
    log(tmp_path / "run", *EVENTS)
    file = tmp_path / "node" / "fedsgcg.prom"
    exporter = Exporter(tmp_path / "run", Targets(textfile=file, pushgateway="127.0.0.1:9"))
    exporter.poll()
    assert "fedsgcg_mean_loss" in file.read_text()
    assert set(exporter.problems) == {"pushgateway"}
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("a file in the way")
    exporter.poll()
    assert set(exporter.problems) == {"pushgateway", "textfile"}
    exporter.stop()


def test_distance_and_condition_of_prototypes_by_hand() -> None:
    count = np.array([4.0, 2.0, 0.0, 3.0])
    mean = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.1], [0.0, 2.0]])
    covariance = np.array([np.diag([4.0, 1.0]), np.diag([9.0, 0.0]), np.eye(2), np.zeros((2, 2))])
    prototypes = ClassStatistics(count, mean, covariance * count[:, None, None])
    distance, condition = prototypes.nearest_distance(), prototypes.condition_number()
    np.testing.assert_allclose(distance, [2.0, math.sqrt(13), np.nan, 2.0])
    np.testing.assert_allclose(condition, [4.0, 1.0, np.nan, np.nan])
    alone = ClassStatistics(count * [1, 0, 0, 0], mean, covariance * 0)
    assert np.isnan(alone.nearest_distance()).all()
