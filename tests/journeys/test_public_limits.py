"""The real server under strangers: long bodies and idle connections, while a hospital joins."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fedsgcg.deploy.coordinator.front import MESSAGES, OBJECTS, Limits
from tests.support.federation import Federation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A served federation whose hospitals have not joined."""
    found = Federation(tmp_path_factory.mktemp("federation"), hospitals)
    found.provision(["East", "North"], "method=source", "federation.rounds=1")
    found.serve()
    yield found
    found.close()


def connect(federation: Federation, source: str) -> ssl.SSLSocket:
    """A TLS connection of somebody who has only the authority's certificate."""
    trust = ssl.create_default_context(cafile=federation.site("East") / "ca.crt")
    link = socket.create_connection(("127.0.0.1", federation.port), 60, (source, 0))
    return trust.wrap_socket(link, server_hostname="127.0.0.1")


def resident(federation: Federation) -> int:
    """Resident size of the server's processes in bytes."""
    pid = federation.processes["serve"].pid
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.parametrize("path", [OBJECTS, MESSAGES, "/v1/fleet/activate-node", "/health"])
@pytest.mark.attack("anonymous-bodies")
def test_row_40_a_body_of_400_mb_of_a_stranger_is_refused_unread(
    federation: Federation, path: str
) -> None:
    """Row 40: eight of them took 1.1 GB of the server."""
    before = resident(federation)
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connect(federation, "127.0.0.1")) for _ in range(8)]
        for link in links:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {400 * 2**20}\r\n\r\n"
            link.sendall(head.encode())
            with contextlib.suppress(OSError):
                link.sendall(b"x" * 2**20)
        answers = [link.recv(100) for link in links]
    assert all(answer.startswith(b"HTTP/1.1 413") for answer in answers)
    assert resident(federation) - before < 30 * 2**20


@pytest.mark.attack("idle-connections")
def test_row_i10_idle_connections_leave_room_for_a_hospital_and_are_closed(
    federation: Federation,
) -> None:
    """I10: 990 idle TLS connections kept every hospital out, and stayed."""
    with contextlib.ExitStack() as stack:
        links = []
        for _ in range(Limits().address + 20):
            with contextlib.suppress(OSError):
                links.append(stack.enter_context(connect(federation, "127.0.0.1")))
        assert len(links) <= Limits().address
        transport = httpx.HTTPTransport(
            local_address="127.0.0.2", verify=str(federation.site("East") / "ca.crt")
        )
        with httpx.Client(transport=transport, timeout=60) as client:
            assert client.get(f"https://127.0.0.1:{federation.port}/health").status_code < 500
        for link in links:  # each waits for the server's deadline, which is the same for all
            with contextlib.suppress(OSError):
                assert link.recv(1) == b""
    federation.join("East")
    federation.wait(lambda: federation.online("East"), 120, "the hospital does not get in")
