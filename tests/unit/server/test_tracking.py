"""Curves in TensorBoard and MLflow, written and read back with the real libraries."""

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.run_folder.tables import RESULTS_SCHEMA, ROWS_SCHEMA
from fedsgcg.common.settings.build import build
from fedsgcg.common.settings.run import RunSettings
from fedsgcg.server.telemetry import tracking as trackers
from fedsgcg.server.telemetry.points import Point, Run, hyper_parameters
from fedsgcg.server.telemetry.tracking import Tracker, Tracking, runs_of

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
pytest.importorskip("mlflow", reason="the extra mlflow is not installed")

from fedsgcg.server.telemetry.mlflow import MLflow  # noqa: E402
from fedsgcg.server.telemetry.tensorboard import TensorBoard  # noqa: E402

SITES = ('Hôpital "A": 1/2', "B")
TREE = {"method": {"name": "sgcg", "learning_rate": 0.01}, "data": {"root": "/secret", "size": 8}}
Points = dict[tuple[str, int], float]


class RunFolder:
    """A run folder that grows as that of a real run."""

    def __init__(self, study: Path, name: str = "sgcg/West/0", start: float = 1000.0) -> None:
        self.study = study
        self.folder = study / name
        self.time = start
        (self.folder / "journal" / "rounds").mkdir(parents=True)

    def event(self, event: str, number: int = 0, **facts: Any) -> None:
        self.time += 1.0
        line = {"time": self.time, "event": event, "round": number, "rounds": 2, **facts}
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def round(self, number: int) -> None:
        rows = [
            {"phase": "train", "site": site, "cls": "", "metric": "loss", "value": 1 / number}
            for site in SITES
        ]
        rows.append(
            {"phase": "merge", "site": "", "cls": "a.b", "metric": "site_distance", "value": 2.0}
        )
        table = pa.Table.from_pylist([{"round": number, **row} for row in rows], ROWS_SCHEMA)
        path = self.folder / "journal" / "rounds" / f"{number:05d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        self.event(
            "round.done", number, loss=0.5, validation_dice=0.75, validation_round=number - 1
        )

    def finish(self, status: str = "completed") -> None:
        rows = [{"site": "West", "structure": "gland", "dice": dice} for dice in (0.5, 1.0)]
        names = [name for name in RESULTS_SCHEMA.names if name not in rows[0]]
        table = pa.Table.from_pylist(
            [{**dict.fromkeys(names), **row} for row in rows], RESULTS_SCHEMA
        )
        pq.write_table(table, self.folder / "results.parquet")
        self.event("run.finished", 2, status=status)


def tensorboard_points(study: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loaded = EventAccumulator(str(study / "tensorboard/sgcg/West/0"))
    loaded.Reload()
    found = [
        ((tag, one.step), one.value)
        for tag in loaded.Tags()["scalars"]
        for one in loaded.Scalars(tag)
    ]
    assert len(dict(found)) == len(found)  # no point twice
    assert len(loaded.Tags()["tensors"]) == 1  # the settings, once
    return dict(found)


def mlflow_runs(study: Path) -> tuple[Any, list[Any], Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{study}/mlflow.db")
    experiment = client.get_experiment_by_name("fedsgcg")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId")]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    return client, children, parent


def mlflow_points(study: Path) -> Points:
    client, (child,), _ = mlflow_runs(study)
    found = [
        ((name, one.step), one.value)
        for name in child.data.metrics
        for one in client.get_metric_history(child.info.run_id, name)
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def maker(name: str, study: Path) -> Callable[[], Tracker]:
    if name == "tensorboard":
        return lambda: TensorBoard(study / "tensorboard")
    return lambda: MLflow(f"sqlite:///{study}/mlflow.db", study.name, (study / "mlflow").as_uri())


def track(name: str, run: RunFolder, tree: Any = TREE) -> list[Problem]:
    """Write what is new, as one call of the command does; return its warnings."""
    problems: list[Problem] = []
    runs = runs_of(run.study, [("sgcg · West · seed 0", run.folder, tree)])
    tracking = Tracking(name, maker(name, run.study), runs, problems.append, closing_s=240)
    tracking.start()
    tracking.stop()
    return problems


READ = {"tensorboard": tensorboard_points, "mlflow": mlflow_points}
NAMES = {
    "tensorboard": ('train/loss/Hôpital "A": 1%2F2', "merge/site_distance/a.b"),
    "mlflow": ("train/loss/Hôpital :22:A:22::3A: 1:2F:2", "merge/site_distance/a.b"),
}


@pytest.fixture(scope="module")
def connections() -> Iterator[list[Any]]:
    """Addresses that Python connected to; nothing may leave the machine."""
    found: list[Any] = []
    watching = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo"):
            found.append(arguments)

    sys.addaudithook(audit)
    yield found
    watching = False


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_resumed_study_appends_and_repeats_nothing_and_stays_here(
    name: str,
    tmp_path: Path,
    connections: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "POLL_S", 0.01)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "studÿ")
    run.event("run.started")
    run.round(1)
    assert track(name, run) == []
    loss, distance = NAMES[name]
    first = READ[name](run.study)
    assert first[loss, 1] == 1.0
    assert first[distance, 1] == 2.0
    assert (loss, 2) not in first
    run.event("run.started", 1)
    run.round(2)
    run.finish()
    assert track(name, run) == []
    second = READ[name](run.study)
    assert first.items() <= second.items()
    assert second[loss, 2] == 0.5
    assert second["mean/validation_dice", 0] == second["mean/validation_dice", 1] == 0.75
    assert second["final/dice/gland/West", 2] == 0.75
    assert track(name, run) == []
    assert READ[name](run.study) == second
    assert connections == []
    assert [path.name for path in tmp_path.iterdir()] == ["studÿ"]
    if name == "mlflow":
        _, (child,), parent = mlflow_runs(run.study)
        assert child.data.params == {
            "method.name": "sgcg",
            "method.learning_rate": "0.01",
            "data.size": "8",
        }
        assert (parent.info.run_name, parent.info.status) == ("studÿ", "FINISHED")
        assert (child.info.run_name, child.info.status) == ("sgcg · West · seed 0", "FINISHED")
        # A run that is started afresh in the same folder is another run.
        (run.folder / "events.jsonl").unlink()
        run.event("run.started")
        run.finish("failed")
        assert track(name, run) == []
        _, children, parent = mlflow_runs(run.study)
        assert sorted(child.info.status for child in children) == ["FAILED", "FINISHED"]
        assert parent.info.status == "FAILED"


def test_curves_of_an_earlier_run_in_the_folder_are_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.event("run.started")
    run.round(1)
    run.round(2)
    assert track("tensorboard", run) == []
    (run.folder / "events.jsonl").unlink()
    run.event("run.started")
    run.round(1)
    assert track("tensorboard", run) == []
    found = tensorboard_points(tmp_path)
    assert {step for (tag, step) in found if tag.startswith("train/")} == {1}


def test_names_of_curves_are_different_for_different_hospitals_and_valid(tmp_path: Path) -> None:
    from mlflow.utils.validation import _validate_metric_name

    names = ["A", "A'", 'A"', "A/B", "A B", "A:B", ".", "..", "...", " ", "é", "x" * 300]
    names += ["x" * 301, "A ", " A", "A%2FB", "北京", "a\nb", ":22:"]
    for key in (MLflow.key, TensorBoard.key):
        keys = [key(None, ("train", "loss", name)) for name in names]  # type: ignore[arg-type]
        assert len(set(keys)) == len(names)
        assert key is TensorBoard.key or [_validate_metric_name(one) for one in keys]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_tracker_that_cannot_write_is_a_warning(name: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.event("run.started")
    run.round(1)
    (tmp_path / "tensorboard").write_text("a file in the place of the folder")
    (tmp_path / "mlflow.db").write_text("this is not a database" * 100)
    problems = track(name, run)
    assert [(problem.code, problem.where) for problem in problems] == [("MON-912", name)]


class Hanging:
    """A tracker that answers nothing until it is released."""

    name = "hanging"

    def __init__(self) -> None:
        self.release = threading.Event()
        self.entered = threading.Event()

    def open(self, run: Run) -> None:
        self.entered.set()
        self.release.wait()

    def key(self, tag: tuple[str, ...]) -> str:
        return "/".join(tag)

    def steps(self, run: Run) -> set[tuple[str, int]]:
        return set()

    def write(self, run: Run, points: Sequence[Point]) -> None:
        raise AssertionError

    def end(self, run: Run, status: str) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def test_a_tracker_that_hangs_holds_up_nothing_and_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "POLL_S", 0.01)
    run = RunFolder(tmp_path)
    run.event("run.started")
    hanging, problems = Hanging(), []
    runs = runs_of(run.study, [("cell", run.folder, TREE)])
    tracking = Tracking("hanging", lambda: hanging, runs, problems.append, closing_s=0.05)
    tracking.start()
    assert hanging.entered.wait(30)
    run.round(1)  # the run goes on
    tracking.stop()
    assert [problem.code for problem in problems] == ["MON-913"]
    hanging.release.set()


def test_points_that_wait_for_a_tracker_are_bounded_and_what_is_dropped_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Hanging):
        def open(self, run: Run) -> None:
            raise OSError("no space")

    run = RunFolder(tmp_path)
    run.event("run.started")
    (tracked,) = runs_of(run.study, [("cell", run.folder, TREE)])
    monkeypatch.setattr(trackers, "MOST_WAITING", 4)
    tracked._waiting = type(tracked._waiting)(maxlen=4)
    for number in (1, 2):
        run.round(number)
        with pytest.raises(OSError, match="no space"):
            tracked.update(Refusing())
    assert len(tracked._waiting) == 4
    assert tracked.dropped == 2 * 5 - 4


def test_a_failed_write_is_repeated_without_a_point_twice(tmp_path: Path) -> None:
    class Failing(TensorBoard):
        fails = True

        def write(self, run: Run, points: Sequence[Point]) -> None:
            if self.fails:
                super().write(run, points[:2])
                raise OSError("no space")
            super().write(run, points)

    run = RunFolder(tmp_path)
    run.event("run.started", chosen="method.learning_rate=0.5")
    run.round(1)
    (tracked,) = runs_of(run.study, [("cell", run.folder, TREE)])
    tracker = Failing(tmp_path / "tensorboard")
    with pytest.raises(OSError, match="no space"):
        tracked.update(tracker)
    tracker.fails = False
    tracked.update(tracker)
    tracker.close()
    assert len(tensorboard_points(tmp_path)) == 5
    assert tracked._run is not None
    assert tracked._run.settings["method.learning_rate"] == "0.5"  # as the source hospitals chose


def test_an_address_of_mlflow_that_is_away_is_a_warning(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = RunFolder(tmp_path)
    run.event("run.started")
    problems: list[Problem] = []
    runs = runs_of(run.study, [("cell", run.folder, TREE)])
    make = lambda: MLflow(f"http://127.0.0.1:{port}", "study", "file:///nowhere")  # noqa: E731
    tracking = Tracking("mlflow", make, runs, problems.append, closing_s=240)
    tracking.start()
    tracking.stop()
    assert [problem.code for problem in problems] == ["MON-912"]


def test_places_of_this_machine_are_no_hyper_parameters() -> None:
    tree = TREE | {"site": {"cache": "/home"}, "output": "/home/x", "seed": 3, "observers": []}
    assert dict(hyper_parameters(tree)) == {
        "method.name": "sgcg",
        "method.learning_rate": 0.01,
        "data.size": 8,
        "seed": 3,
        "observers": "[]",
    }


@pytest.mark.parametrize(
    "wrong",
    [{"tracking": ["wandb"]}, {"tracking": ["mlflow"] * 2}, {"mlflow_uri": "./mlruns"}],
)
def test_a_tracker_that_is_not_known_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FedsgcgError) as caught:
        build(RunSettings, wrong)
    assert caught.value.code == "CFG-001"
