"""Lets a hospital connect again soon after its connection, or this server, ended without notice.

Flower counts a hospital as connected until a minute after its last heartbeat, and refuses its key
until then; the status survives a restart of the server in its database. After `kill -9` of either
end every hospital would therefore be refused for up to a minute, with one text for all causes.

Here a connection counts as ended when nothing came from it for `QUIET_S`, or since this server has
started. Otherwise two nodes have the same key, and the second is refused with the reason.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from fastapi import Request
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError

from fedsgcg.deploy.environment import KEY_IN_USE, KEY_UNKNOWN

QUIET_S: Final = 30.0
"""A SuperNode of Flower 1.42 sends a heartbeat every 17 to 23 seconds, whatever else it does."""

ONLINE: Final = "online"


class Reconnections:
    """Ends the silent connection of a hospital that connects again.

    It replaces Flower's dependency `get_linkstate`, which every request to the Fleet API has after
    its signature was verified (`app.dependency_overrides`).

    Args:
        state_of: The dependency that it replaces.
        clock: Seconds that never go back.
    """

    def __init__(
        self, state_of: Callable[[Request], Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._state_of = state_of
        self._clock = clock
        self._heard: dict[int, float] = {}
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Any:
        """Return Flower's state, ready for the request.

        Raises:
            FlowerError: A key that is not registered, or whose connection is alive.
        """
        state = self._state_of(request)
        asked = getattr(request.state, "protobuf_request", None)
        with self._lock:
            if isinstance(asked, ActivateNodeRequest):
                self._release(asked.public_key, state)
            elif node := getattr(getattr(asked, "node", None), "node_id", 0):
                self._heard[node] = self._clock()
        return state

    def _release(self, key: bytes, state: Any) -> None:
        """End the connection of a key if it is silent."""
        node = state.get_node_id_by_public_key(key)
        if node is None:
            raise _refusal(KEY_UNKNOWN)
        now_s = self._clock()
        silent_s = now_s - self._heard.get(node, now_s - QUIET_S)
        if silent_s < QUIET_S and state.get_node_info(node_ids=[node], statuses=[ONLINE]):
            raise _refusal(f"{KEY_IN_USE} {silent_s:.0f} s ago")
        state.deactivate_node(node)
        self._heard[node] = now_s


def _refusal(reason: str) -> FlowerError:
    return FlowerError(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, reason, public_details=reason)
