"""A local Ray is closed to other users of the machine and to the network."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

DRIVER = r"""
import os, subprocess, sys
from pathlib import Path
from fedsgcg.deploy.environment import prepare_environment
from fedsgcg.deploy.study.preflight import inspect_machine
from fedsgcg.deploy.study.runtimes import close_ray, ray_arguments
from tests.support.federation import descendants

prepare_environment()
close_ray("local")
import ray
context = ray.init(**ray_arguments(inspect_machine(1), "local"))
pids = {os.getpid(), *descendants(os.getpid())}
inodes = set()
for pid in pids:
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            inodes.add(os.readlink(link)[8:-1])
        except OSError:
            pass
local = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            print("listens", fields[1].split(":")[0] in local, fields[1])
token = os.environ["RAY_AUTH_TOKEN"]
paths = [Path(f"/proc/{pid}/cmdline") for pid in pids]
print("on a command line", any(token in path.read_text() for path in paths if path.exists()))
address = context.address_info["gcs_address"]
stranger = {name: text for name, text in os.environ.items() if not name.startswith("RAY_AUTH")}
code = f"import ray; ray.init(address={address!r}, log_to_driver=False); print('CONNECTED')"
done = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True)
print("stranger", "CONNECTED" in done.stdout, "InvalidAuthToken" in done.stderr)

@ray.remote
def work() -> int:
    return 42

print("own work", ray.get(work.remote()))
ray.shutdown()
"""


@pytest.mark.attack("open-ray")
def test_a_local_ray_listens_on_loopback_and_wants_its_token() -> None:
    """Attack: code run as the study's user through Ray's open ports."""
    pytest.importorskip("ray")
    variables = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], env=variables, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    listening = [line.split() for line in done.stdout.splitlines() if line.startswith("listens")]
    assert listening, done.stdout
    assert {line[1] for line in listening} == {"True"}, done.stdout
    assert "on a command line False" in done.stdout
    assert "stranger False True" in done.stdout
    assert "own work 42" in done.stdout


def test_a_cluster_keeps_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsgcg.deploy.study.runtimes import close_ray

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    close_ray("auto")
    assert "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    close_ray("local")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in os.environ


IMPORTED_BEFORE = r"""
import warnings
import ray
from fedsgcg.deploy.environment import prepare_environment
from fedsgcg.deploy.study.preflight import inspect_machine
from fedsgcg.deploy.study.runtimes import close_ray, ray_arguments

prepare_environment()
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    close_ray("local")
print("warned", any("RAY_AUTH_MODE" in str(warning.message) for warning in found))
ray.init(**ray_arguments(inspect_machine(1), "local"))
print("own work", ray.get(ray.remote(lambda: 42).remote()))
ray.shutdown()
"""


def test_a_process_that_has_imported_ray_can_run_a_study_and_is_warned() -> None:
    """As in a notebook: Ray reads its mode when it is imported, and could not join its own head."""
    pytest.importorskip("ray")
    variables = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_BEFORE],
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warned True" in done.stdout
    assert "own work 42" in done.stdout
