"""Real processes on loopback with TLS and node keys: the model is bit-identical to a simulation."""

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.coordinator.runs import run_kit, stop_kit
from tests.support import apart, small
from tests.support.federation import Federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def federation(hospitals: Path, tmp_path: Path) -> Iterator[Federation]:
    """A federation without any kit yet; whatever it starts is ended by process id."""
    found = Federation(tmp_path, hospitals)
    yield found
    found.close()


def simulated(hospitals: Path, folder: Path, *settings: str) -> str:
    """Model hash of the same study, simulated in one process."""
    done = small.run(
        "simulate", *small.overrides(hospitals, folder, "runtime=inprocess", *settings)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return small.digest(folder)


@pytest.mark.row(32)
def test_two_hospitals_stopped_and_resumed_train_the_model_that_a_simulation_trains(
    federation: Federation, hospitals: Path, tmp_path: Path
) -> None:
    settings = ("method=sgcg", "federation.rounds=4")
    federation.provision(["East", "North"], *settings)
    federation.serve()
    federation.join("East", "North")
    federation.run()
    federation.wait(lambda: federation.seen("round.started", round=1), 150, "no round has started")
    # In this process, like the stop below: starting a command takes longer than some of these
    # rounds.
    with pytest.raises(FedsgcgError, match="DEP-614"):
        run_kit(federation.kit.folder, ["federation.rounds=2"], Screen(io.StringIO()))
    federation.wait(lambda: federation.seen("round.done", round=1), 240, "round 1 was not finished")
    assert stop_kit(federation.kit.folder, Screen(io.StringIO())) == 0
    assert federation.finish("run", 60) == 1
    federation.start("run", "fedsgcg.deploy.cli.coordinator", "resume", federation.kit.folder)
    assert federation.finish("run", 240) == 0, federation.logs()
    outcome = federation.outcome()
    assert (outcome["status"], outcome["rounds_done"], outcome["problems"]) == ("completed", 4, [])
    assert outcome["digest"] == simulated(
        hospitals, tmp_path / "simulated", "data.sites=[East,North]", *settings
    )
    said = federation.log("run")
    assert "completed" in said
    assert "report.html" in said
    standing = federation.command("status", federation.kit.folder)
    assert "completed after 4 of 4 rounds" in standing
    assert standing.count("online") == 2


def test_a_hospital_leaves_for_good_in_the_middle_of_a_study(federation: Federation) -> None:
    """The commands of the how-to page: leave, revoke, resume without; then restart the server.

    The server removes the data of ended runs when it starts.
    """
    federation.provision(
        ["East", "North", "South"],
        "method=sgcg",
        "federation.rounds=3",
        "prototypes.memory=cumulative",
    )
    federation.serve()
    federation.join("East", "North", "South")
    federation.run()
    federation.wait(lambda: federation.seen("round.done", round=1), 300, "round 1 was not finished")
    assert stop_kit(federation.kit.folder, Screen(io.StringIO())) == 0
    assert federation.finish("run", 60) == 1
    left = federation.try_command(
        "leave", federation.site("South"), "--for-good", module="fedsgcg.deploy.cli.site"
    )
    assert "--without South" in left.stdout
    federation.command(
        "provision",
        federation.folder / "project.yaml",
        "-o",
        federation.folder / "kits",
        "--revoke",
        "South",
    )
    federation.processes.pop("serve").terminate()
    federation.wait(
        lambda: "server stopped" in federation.log("serve"), 60, "the server does not end"
    )
    federation.serve()
    assert "of ended runs removed" in federation.log("serve")
    federation.wait(
        lambda: federation.online("East", "North"), 120, "the hospitals do not come back"
    )
    federation.start(
        "run",
        "fedsgcg.deploy.cli.coordinator",
        "resume",
        federation.kit.folder,
        "--without",
        "South",
    )
    assert federation.finish("run", 240) == 3, federation.logs()
    outcome = federation.outcome()
    assert (outcome["status"], outcome["rounds_done"]) == ("degraded", 3)
    assert [(problem["code"], problem["where"]) for problem in outcome["problems"]] == [
        ("RND-407", "South")
    ]
    assert set(outcome["sites"]) == {"East", "North"}
    standing = federation.command("status", federation.kit.folder)
    assert "left for good" in standing
    assert "degraded after 3 of 3 rounds" in standing
    again = federation.try_command("resume", federation.kit.folder, "--without", "North")
    assert (again.returncode, "a finished model" in " ".join(again.stderr.split())) == (2, True)


@pytest.mark.row(22, 23, 28, 55)
def test_faults_change_nothing_of_the_model(
    federation: Federation, hospitals: Path, tmp_path: Path
) -> None:
    """After kill -9, a pause, a broken link and a killed server, resuming gives the same model."""
    settings = ("method=sgcg", "heldout=West", "federation.rounds=3")
    sites = ("East", "North", "South", "West")
    federation.provision(sites, *settings)
    with federation.separate_networks(*sites) as links:
        link = links["South"]
        federation.serve()
        federation.join(*sites)
        federation.run()
        federation.wait(
            lambda: federation.seen("round.started", round=1), 150, "no round has started"
        )
        networks = {apart.network(federation.processes[site].pid) for site in sites}
        if federation.relays:
            assert len(networks - {apart.network(os.getpid())}) == len(sites)
        federation.pause("North")
        federation.kill("East")
        federation.join("East")
        link.cut()
        time.sleep(12)  # longer than a few pulls of Flower's, shorter than its patience
        link.mend()
        federation.go_on("North")
        federation.wait(
            lambda: federation.seen("round.started", round=2), 400, "round 1 was not finished"
        )
        federation.kill("serve")
        federation.serve()
        assert federation.finish("run", 60) == 1
        assert "fedsgcg resume" in federation.log("run")
        federation.start("run", "fedsgcg.deploy.cli.coordinator", "resume", federation.kit.folder)
        assert federation.finish("run", 300) == 0, federation.logs()
    outcome = federation.outcome()
    assert (outcome["status"], outcome["rounds_done"], outcome["problems"]) == ("completed", 3, [])
    rounds = [event["round"] for event in federation.events() if event["event"] == "round.done"]
    assert rounds == [1, 2, 3]
    assert outcome["digest"] == simulated(hospitals, tmp_path / "simulated", *settings)
    assert all(
        link.passed > 100_000 for link in links.values()
    )  # the only way out, and it was used
    assert leaked(federation, hospitals) == []


def leaked(federation: Federation, hospitals: Path) -> list[str]:
    """Search the coordinator's files for hospitals' private data: file names, cases, folders."""
    secrets = {path.name.partition("_")[0].encode() for path in hospitals.glob("*/*.nii.gz")}
    secrets |= {
        str(hospitals).encode(),
        *(str(federation.site(site)).encode() for site in ("East", "North")),
    }
    assert len(secrets) > 20
    return [
        f"{word!r} in {path}"
        for path in federation.kit.folder.rglob("*")
        if path.is_file()
        for word in secrets
        if word in path.read_bytes()
    ]
