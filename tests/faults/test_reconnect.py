"""A hospital connects again after either end was killed; a second node with its key does not."""

from base64 import b64decode
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.superlink.dependencies.linkstate import get_linkstate

from fedsgcg.deploy.coordinator.reconnect import QUIET_S, Reconnections
from fedsgcg.deploy.environment import KEY_IN_USE, KEY_UNKNOWN
from tests.faults.test_public_port import KEY, signature
from tests.faults.test_store_limit import Link, link

__all__ = ["link"]


class Server:
    """The SuperLink with a clock; its hospital is connected as far as its database knows."""

    def __init__(self, link: Link) -> None:
        self.link, self.now = link, 0.0
        self.restart()

    def restart(self) -> None:
        """Start the server's process anew; the database stays."""
        state = Reconnections(get_linkstate, lambda: self.now)
        self.link.client.app.dependency_overrides[get_linkstate] = state

    def ask(self, name: str, asked: Any) -> int:
        return self.link.post(name, asked)[0]

    def connect(self, key: ec.EllipticCurvePrivateKey = KEY) -> str:
        """Connect a node; returns the reason of a refusal."""
        public = b64decode(signature(key)["flwr-public-key"])
        asked = ActivateNodeRequest(public_key=public, heartbeat_interval=30)
        status, data = self.link.post("activate-node", asked, key)
        assert status in (200, 412)
        return "" if status == 200 else data.decode()

    def poll(self) -> int:
        return self.ask("pull-messages", PullMessagesRequest(node=Node(node_id=self.link.node)))

    def heartbeat(self) -> int:
        node = Node(node_id=self.link.node)
        return self.ask(
            "send-node-heartbeat", SendNodeHeartbeatRequest(node=node, heartbeat_interval=30)
        )


@pytest.fixture
def server(link: Link) -> Server:
    return Server(link)


@pytest.mark.row(23)
def test_after_a_restart_of_the_server_a_hospital_connects_at_once(server: Server) -> None:
    """Row 23: its database counted the hospital as connected, and refused it for a minute."""
    assert server.connect() == ""
    server.restart()
    assert server.connect() == ""


@pytest.mark.row(28, 56)
def test_a_silent_connection_is_released_and_a_living_one_is_kept(server: Server) -> None:
    for ask in (server.poll, server.heartbeat):
        server.now += 1000
        assert ask() == 200
        server.now += QUIET_S - 1
        assert f"{KEY_IN_USE} {QUIET_S - 1:.0f} s ago" in server.connect()
        server.now += 1
        assert server.connect() == ""
        assert f"{KEY_IN_USE} 0 s ago" in server.connect()


def test_a_hospital_that_left_may_return_at_once(server: Server) -> None:
    assert server.poll() == 200
    assert server.ask("deactivate-node", DeactivateNodeRequest(node_id=server.link.node)) == 200
    assert server.connect() == ""


@pytest.mark.row(56)
def test_an_unknown_key_is_refused_with_the_reason(server: Server) -> None:
    assert KEY_UNKNOWN in server.connect(ec.generate_private_key(ec.SECP384R1()))
