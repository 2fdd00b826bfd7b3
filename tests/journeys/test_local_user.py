"""Another user of the machine: no token on any command line, no API without one."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from fedsgcg.deploy.coordinator.executor import ACQUIRE, PROGRAM
from fedsgcg.deploy.site.supervisor import read_facts
from tests.support.federation import Federation, descendants

pytestmark = pytest.mark.slow

TOKEN = re.compile(r"[0-9a-f]{32,}|[A-Za-z0-9_-]{40,}")
"""Every secret of a kit and of Flower looks like one of these."""


@pytest.fixture
def federation(hospitals: Path, tmp_path: Path) -> Iterator[Federation]:
    found = Federation(tmp_path, hospitals)
    yield found
    found.close()


def command_lines(federation: Federation) -> dict[int, list[str]]:
    """Process id -> arguments of every process that the federation has started."""
    found = {}
    for process in federation.processes.values():
        for pid in {process.pid, *descendants(process.pid)}:
            path = Path(f"/proc/{pid}/cmdline")
            if path.exists():
                found[pid] = path.read_text().split("\0")
    return found


def refused(address: str, ca: Path | None, interceptor: object) -> bool:
    """Whether a client of another user gets neither a task nor the input of one."""
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=ca is None,
        root_certificates=ca.read_bytes() if ca else None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), interceptor],
    )
    kinds = [TaskType.SERVER_APP, TaskType.CLIENT_APP]
    requests = (
        lambda: client.AcquireTask(AcquireTaskRequest(supported_task_types=kinds)),
        lambda: client.PullTaskInput(PullTaskInputRequest()),
    )
    for request in requests:
        try:
            request()
        except (httpx.HTTPError, FlowerError):
            continue
        return False
    return True


@pytest.mark.attack("token-in-ps", "local-runtime-api")
def test_a_local_user_finds_no_token_and_reaches_no_runtime_api(federation: Federation) -> None:
    """Attack: the run's token in `ps`, then the Runtime API with it."""
    federation.provision(["East", "North"], "method=source", "federation.rounds=1")
    federation.serve()
    federation.join("East")
    federation.wait(lambda: federation.online("East"), 90, "East is not online")
    federation.run()  # it waits for North, which never joins
    apps: list[int] = []

    def app_runs() -> bool:
        lines = command_lines(federation)
        apps[:] = [pid for pid, line in lines.items() if any(PROGRAM in part for part in line)]
        return bool(apps)

    federation.wait(app_runs, 90, "no run process")
    lines = command_lines(federation)
    assert any("--token-file" in line for line in lines.values())
    assert len(lines) >= 8
    for line in lines.values():
        assert "--token" not in line
        for argument in line:
            names = argument.split("/")  # temporary folders have long names too
            assert not [name for name in names if TOKEN.fullmatch(name)], line
    for pid in apps:
        variables = Path(f"/proc/{pid}/environ")
        assert variables.stat().st_mode & 0o077 == 0, "the environment is its owner's only"

    control = federation.kit.project().control_address
    facts = read_facts(federation.site("East") / "home" / "join.json")
    for address, ca in (
        (control, federation.kit.folder / "ca.crt"),
        (f"127.0.0.1:{facts['port']}", None),
    ):
        assert refused(address, ca, RuntimeTokenHttpInterceptor("0" * 64))
        assert refused(
            address,
            ca,
            SuperExecAuthHttpInterceptor(master_secret=b"0" * 64, protected_methods=[ACQUIRE]),
        )
