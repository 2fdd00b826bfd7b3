"""The coordinator's commands without a server: progress of a run, cells of a project."""

import io
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.cli.build import build_fab_from_disk
from packaging.requirements import Requirement
from rich.console import Console

from fedsgcg.clients.guard.approval import FOLDERS, NOT_BUNDLED, bundle_of_folder, read_bundle
from fedsgcg.clients.guard.policy import refusals
from fedsgcg.clients.guard.site_file import read_site_file
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.cli import coordinator as cli
from fedsgcg.deploy.coordinator.bundle import ROOT, app_description, build_bundle
from fedsgcg.deploy.coordinator.control import Node
from fedsgcg.deploy.coordinator.project import SubmittedRun
from fedsgcg.deploy.coordinator.provision import provision
from fedsgcg.deploy.coordinator.runs import plan_deployment
from fedsgcg.deploy.coordinator.serve import presence
from fedsgcg.deploy.coordinator.status import read_progress, status_kit
from fedsgcg.server.records.progress import RunProgress
from fedsgcg.server.sites.departures import declare


def events(*steps: tuple[float, str, dict[str, Any]]) -> RunProgress:
    found = RunProgress()
    for when, name, facts in steps:
        found.take({"time": when, "event": name, "rounds": 4, "round": 0, **facts})
    return found


ENROLLED = (0.0, "sites.enrolled", {"sites": ["A", "B"]})


def replied(
    when: float, site: str, number: int, code: str = ""
) -> tuple[float, str, dict[str, Any]]:
    return when, "round.reply", {"site": site, "round": number, "accepted": not code, "code": code}


def test_a_site_is_late_when_it_takes_twice_its_usual_time() -> None:
    now = events(
        ENROLLED,
        (10.0, "round.started", {"round": 1}),
        replied(15.0, "A", 1),
        replied(30.0, "B", 1),
        (30.0, "round.done", {"round": 1}),
        (30.0, "round.started", {"round": 2}),
    )
    assert now.late(39.0) == []
    assert now.late(41.0) == ["A"]  # 5 s is usual for A, 20 s for B
    assert now.late(71.0) == ["A", "B"]
    assert now.left() == "about 60 s left"  # 3 rounds of 20 s


def test_in_the_first_round_the_others_are_the_measure() -> None:
    now = events(ENROLLED, (10.0, "round.started", {"round": 1}), replied(14.0, "A", 1))
    assert now.late(17.0) == []
    assert now.late(19.0) == ["B"]
    assert now.left() == ""


def test_a_rejected_answer_shows_its_code_and_is_no_measure() -> None:
    now = events(ENROLLED, (10.0, "round.started", {"round": 1}), replied(14.0, "A", 1, "TRN-301"))
    assert (now.sites["A"].code, now.sites["A"].answers, now.sites["A"].asked) == (
        "TRN-301",
        [],
        False,
    )
    assert now.sites["B"].asked


def test_a_resumed_run_counts_the_rounds_that_were_done_before() -> None:
    now = events(
        ENROLLED,
        (10.0, "run.finished", {"status": "failed", "round": 2}),
        (20.0, "run.started", {"round": 2}),
    )
    assert (now.ended, now.done) == ("", 2)


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path: Path) -> None:
    line = json.dumps({"time": 1.0, "event": "round.started", "round": 3, "rounds": 9})
    (tmp_path / "events.jsonl").write_text(line + "\n" + line[:20])
    assert read_progress(tmp_path).round == 3
    assert read_progress(tmp_path / "nowhere").round == 0


def test_presence_says_who_was_never_there() -> None:
    nodes = [
        Node("A", 1, "online", b"", ""),
        Node("B", 2, "registered", b"", ""),
        Node("C", 3, "unregistered", b"", ""),
    ]
    assert presence(nodes, ("A", "B", "C", "D")) == {
        "A": "online",
        "B": "never connected",
        "C": "not registered",
        "D": "not registered",
    }


@pytest.fixture
def project(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "demo",
        "server": "127.0.0.1:8443",
        "sites": ["East", "North", "West"],
        "plan": ["method=source", "federation.rounds=5", "heldout=West"],
        "quorum": 1,
    }


def kit_of(folder: Path, project: dict[str, Any]) -> Any:
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    return provision(folder / "project.yaml", folder / "kits").kit


def test_a_project_means_one_cell_and_a_command_line_may_mean_more(
    tmp_path: Path, project: dict[str, Any]
) -> None:
    kit = kit_of(tmp_path, project)
    (cell,) = plan_deployment(kit, ()).cells
    plan = Plan.from_tree(cell.tree)
    assert (plan.heldout, plan.federation.rounds, plan.federation.quorum, plan.data.root) == (
        "West",
        5,
        1,
        "",
    )
    assert plan.data.sites == ["East", "North", "West"]
    assert cell.folder.is_relative_to(kit.runs)
    grid = plan_deployment(kit, ("heldout=all", "method=source,sgcg", "federation.rounds=2")).cells
    assert len(grid) == 6
    assert {cell.heldout for cell in grid} == {"East", "North", "West"}
    assert len({cell.folder for cell in grid}) == 6
    assert {Plan.from_tree(cell.tree).federation.rounds for cell in grid} == {2}


@pytest.mark.parametrize(
    "override", ["heldout=Nowhere", "federation.quorum=3", "federation.roundz=1", "data.root=/etc"]
)
def test_a_study_that_cannot_be_is_refused_before_any_hospital_is_asked(
    tmp_path: Path, project: dict[str, Any], override: str
) -> None:
    kit = kit_of(tmp_path, project)
    with pytest.raises(FedsgcgError, match=r"CFG-00[12]"):
        plan_deployment(kit, (override,))


def test_what_was_started_is_remembered(tmp_path: Path, project: dict[str, Any]) -> None:
    kit = kit_of(tmp_path, project)
    with pytest.raises(FedsgcgError, match="DEP-613"):
        kit.last_run()
    kit.state.mkdir()
    started = SubmittedRun(7, "runs/x", ("method=sgcg",), "ab12", 1.5)
    kit.record_run(started)
    assert kit.last_run() == started
    (kit.state / "run.json").write_text("{}")
    with pytest.raises(FedsgcgError, match="SRV-402"):
        kit.last_run()


def test_the_bundle_is_the_code_that_is_installed_and_always_the_same() -> None:
    bundle = build_bundle()
    assert bundle == build_bundle()
    assert bundle.digest == bundle_of_folder(ROOT).digest


def test_the_bundle_describes_the_app_as_the_repository_does() -> None:
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())
    described = app_description()
    app, own = described["tool"]["flwr"]["app"], repository["tool"]["flwr"]["app"]
    assert app == {key: value for key, value in own.items() if key != "fab-exclude"}
    for part in ("name", "license"):
        assert described["project"][part] == repository["project"][part]
    (flower,) = described["project"]["dependencies"]
    extra = Requirement(flower.replace("flwr", "flwr[simulation]"))
    assert extra in map(Requirement, repository["project"]["dependencies"])
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"flwr=={app['flwr-version-target']}" in pinned


def test_flower_builds_the_bundle_that_hospitals_approve_from_a_checkout(tmp_path: Path) -> None:
    """`flwr build` reads pyproject's patterns, `fedsgcg provision` the installed code."""
    for name in (*FOLDERS, "fedsgcg"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    bundle = read_bundle(build_fab_from_disk(tmp_path))
    assert bundle.digest == build_bundle().digest
    assert {"server/app.py", "clients/app.py", "configs/run.yaml"} <= bundle.code.keys()
    assert not [name for name in bundle.code if name.startswith(NOT_BUNDLED)]


def test_the_app_runs_without_what_the_bundle_leaves_out() -> None:
    code = f"""
import sys
import fedsgcg.server.app, fedsgcg.clients.app
left_out = {NOT_BUNDLED!r}
paths = [name.removeprefix("fedsgcg.").replace(".", "/") for name in sys.modules]
print([path for path in paths if path.startswith(left_out)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_hospital_as_shipped_refuses_nothing_of_what_a_study_sets(
    tmp_path: Path, project: dict[str, Any]
) -> None:
    kit = kit_of(tmp_path, {**project, "data_root": "/data"})
    site = read_site_file(tmp_path / "kits/sites/East")
    settings = (
        "method=source,sgcg",
        "prototypes.weight=0.1,0.5",
        "network.base_width=8",
        "privacy.min_patients=1",
    )
    for cell in plan_deployment(kit, settings).cells:
        assert list(refusals(Plan.from_tree(cell.tree), site)) == []


# A site that leaves for good


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--without", "Nrth"), "did you mean 'North'?"),
        (("--without", "West"), "held out"),
        (("--without", "East", "--without", "North"), "the quorum of 1 training site"),
        (("federation.quorum=2", "--without", "East"), "the quorum of 2 training sites"),
        (("heldout=all", "--without", "North"), "North, which is held out"),
    ],
)
def test_a_departure_that_cannot_be_is_refused_before_anything_is_written_or_asked(
    tmp_path: Path,
    project: dict[str, Any],
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kit = kit_of(tmp_path, project)
    assert cli.main(["run", str(kit.folder), *arguments]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "[CFG-001]" in said
    assert words in said
    assert list(kit.runs.glob("*")) == []


def test_nobody_leaves_a_study_that_is_done(
    tmp_path: Path, project: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kit = kit_of(tmp_path, project)
    (cell,) = plan_deployment(kit, ()).cells
    cell.folder.mkdir(parents=True)
    (cell.folder / "outcome.json").write_text('{"status": "completed"}')
    (cell.folder / "results.parquet").touch()
    kit.state.mkdir()
    kit.record_run(SubmittedRun(7, str(cell.folder), (), "ab12", 1.5))
    assert cli.main(["resume", str(kit.folder), "--without", "North"]) == 2
    assert "nothing can be removed from a finished model" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (cell.folder / "departed.json").exists()


def test_status_says_that_a_site_has_left(tmp_path: Path, project: dict[str, Any]) -> None:
    kit = kit_of(tmp_path, project)
    (cell,) = plan_deployment(kit, ()).cells
    declare(Plan.from_tree(cell.tree), ["North"], Disk())
    kit.state.mkdir()
    kit.record_run(SubmittedRun(7, str(cell.folder), (), "ab12", 1.5))
    console = Console(record=True, width=120, file=io.StringIO())
    status_kit(kit.folder, console)
    lines = {line.split()[0]: line for line in console.export_text().splitlines() if line.strip()}
    assert "left for good on 20" in lines["North"]
    assert "left" not in lines["East"] + lines["West"]


def test_a_setting_is_not_chosen_at_real_hospitals(tmp_path: Path, project: dict[str, Any]) -> None:
    kit = kit_of(tmp_path, project)
    with pytest.raises(FedsgcgError, match="fedsgcg study") as caught:
        plan_deployment(
            kit, ["method=sgcg", "prototypes.weight=0.1,0.5", "select=prototypes.weight"]
        )
    assert caught.value.problems[0].where == "select"
