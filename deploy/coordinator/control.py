"""Client of Flower's Control API, authenticated with the kit's token: nodes, start, stop.

`flwr run` cannot be used: it supports only credentials of an identity provider.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedsgcg.common.errors import fail
from fedsgcg.deploy.certificates import public_key_bytes
from fedsgcg.deploy.coordinator.project import Kit

GONE: Final = "unregistered"
FINISHED: Final = "finished"
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A site's node as registered at the server.

    Attributes:
        site: Name under which its key was registered.
        node: Flower's node id.
        status: `registered` (never connected), `online`, `offline` or `unregistered`.
        key: Its public key (PEM).
        since: When it was last activated, ISO 8601; "" when never.
    """

    site: str
    node: int
    status: str
    key: bytes
    since: str


@dataclass(frozen=True)
class RunState:
    """State of a run at the server.

    Attributes:
        run_id: Flower's run id.
        status: `pending`, `starting`, `running` or `finished`.
        ending: `completed`, `failed` or `stopped` when it has finished.
        details: Flower's explanation.
    """

    run_id: int
    status: str
    ending: str
    details: str

    @property
    def over(self) -> bool:
        """Whether the run has finished."""
        return self.status == FINISHED


class Bearer:
    """Adds the coordinator's token to each request.

    Args:
        token: The token.
    """

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send the request with the token."""
        context.request.headers["Authorization"] = f"Bearer {self._token}"
        return call_next(context)


class Control:
    """The coordinator's commands to its server.

    Every call raises DEP-610 when the server does not answer, DEP-611 when it rejects the token
    and DEP-612 when it refuses the command.

    Args:
        address: `host:port` of the Control API.
        token: The token.
        ca: Certificate of the authority (PEM); None for a server without TLS.
    """

    def __init__(self, address: str, token: str, ca: bytes | None) -> None:
        self.address = address
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=ca is None,
            root_certificates=ca,
            interceptors=[version, Bearer(token)],
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def nodes(self) -> list[Node]:
        """Return every node that was ever registered, by site and time."""
        found = self._call(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        order = sorted(found, key=lambda node: (node.name, node.registered_at))
        return [
            Node(
                site=node.name,
                node=node.node_id,
                status=node.status,
                key=node.public_key,
                since=node.last_activated_at or "",
            )
            for node in order
        ]

    def register(self, site: str, line: str) -> None:
        """Register a site with its public key (an OpenSSH line)."""
        request = RegisterNodeRequest(public_key=public_key_bytes(line), name=site)
        self._call(lambda: self._client.RegisterNode(request))

    def unregister(self, node: int) -> None:
        """Unregister a node: the server rejects it from now on."""
        self._call(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node)))

    def start(self, bundle: bytes, run_config: Mapping[str, Any]) -> int:
        """Submit the app with its run config and return Flower's run id."""
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config))
        )
        reply = self._call(lambda: self._client.StartRun(request))
        if not reply.HasField("run_id"):
            raise fail(
                "DEP-612",
                where=self.address,
                found="the server started no run",
                action="see state/server.log",
            )
        return int(reply.run_id)

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        self._call(lambda: self._client.StopRun(StopRunRequest(run_id=run_id)))

    def run(self, run_id: int) -> RunState | None:
        """Return the state of a run; None when the server has no such run."""
        found = self._call(lambda: self._client.ListRuns(ListRunsRequest(run_id=run_id))).run_dict
        if run_id not in found:
            return None
        status = found[run_id].status
        return RunState(run_id, status.status, status.sub_status, status.details)

    def _call(self, request: Callable[[], T]) -> T:
        try:
            return request()
        except httpx.RequestError as error:
            action = "start it: fedsgcg serve KIT"
            raise fail(
                "DEP-610", where=self.address, found=_one_line(error), action=action
            ) from error
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                action = "use the kit with which the server was started"
                raise fail(
                    "DEP-611",
                    where=self.address,
                    found="a token of another kit",
                    action=action,
                ) from error
            reply = FlowerError.from_json(error.response.text)
            found = reply.message if reply else f"HTTP {error.response.status_code}"
            raise fail("DEP-612", where=self.address, found=found) from error


@contextmanager
def control_of(kit: Kit) -> Iterator[Control]:
    """Connect to the server of a kit, with or without TLS depending on how it was started."""
    ca = None if (kit.state / "insecure").exists() else (kit.folder / "ca.crt").read_bytes()
    control = Control(kit.project().control_address, kit.token.read_text().strip(), ca)
    try:
        yield control
    finally:
        control.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
