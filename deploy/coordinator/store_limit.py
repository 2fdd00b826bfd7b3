"""Bounds what each hospital may have stored at the SuperLink.

Flower keeps a reply's objects in its database until the run has read them, without a limit on their
number or size, and it registers the objects of any tree that comes with a reply. A reply that
comes after its round is read by nobody, so that it stays until the run ends.

Here every object that a hospital pushes is charged to it. When it would hold more than the limits,
its own oldest replies are dropped: the reply of the current request is the newest one, so a
hospital that is often late loses nothing that is still wanted. A single reply beyond the limits is
refused. Other hospitals' replies are never dropped for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import HTTPException, Request
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.dependencies.linkstate import get_linkstate

TOO_LARGE: Final = 413


@dataclass(frozen=True)
class StoreLimits:
    """What one hospital may have stored.

    Attributes:
        size: Bytes of objects.
        objects: Number of objects, each with a row of the database.
    """

    size: int = 2**30
    objects: int = 8192


@dataclass
class _Held:
    """One reply: its objects, and the bytes of those that were pushed."""

    objects: frozenset[str]
    pushed: dict[str, int] = field(default_factory=dict)


class StoreBound:
    """Charges objects to the hospitals that push them.

    It replaces Flower's dependency `get_linkstate`, which every request to the Fleet API has after
    its signature was verified (`app.dependency_overrides`).

    Args:
        limits: What one hospital may have stored.
    """

    def __init__(self, limits: StoreLimits) -> None:
        self._limits = limits
        self._held: dict[int, OrderedDict[str, _Held]] = {}
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Any:
        """Return Flower's state, after charging what the request would store.

        Raises:
            HTTPException: 413 for a request beyond the limits.
        """
        state = get_linkstate(request)
        asked = getattr(request.state, "protobuf_request", None)
        with self._lock:
            if isinstance(asked, PushMessagesRequest):
                self._announce(asked, state.object_store)
            elif isinstance(asked, PushObjectRequest):
                self._push(asked, state.object_store)
        return state

    def _announce(self, asked: PushMessagesRequest, store: Any) -> None:
        """Make room for the objects of a reply."""
        if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
            raise _refusal("one reply with its objects")
        tree = asked.message_object_trees[0]
        # Another tree for a known reply would add objects without end.
        if tree.object_id != asked.messages_list[0].metadata.message_id:
            raise _refusal("the objects of the reply itself")
        objects = frozenset(node.object_id for node in iterate_object_tree(tree))
        held = self._held.setdefault(asked.node.node_id, OrderedDict())
        for root in [root for root in held if root not in store]:
            del held[root]  # the run has read it
        known = held.get(tree.object_id)
        if known is not None and known.objects != objects:
            raise _refusal("the same objects as before")
        if len(objects) > self._limits.objects:
            raise _refusal(f"at most {self._limits.objects} objects")
        if known is None:
            held[tree.object_id] = _Held(objects)
        self._drop(held, tree.object_id, store)

    def _push(self, asked: PushObjectRequest, store: Any) -> None:
        """Make room for an object that was announced."""
        held = self._held.get(asked.node.node_id, OrderedDict())
        roots = [root for root, reply in held.items() if asked.object_id in reply.objects]
        if not roots:
            raise _refusal("an object of a reply that was announced")
        newest = held[roots[-1]]
        size = len(asked.object_content)
        others = sum(newest.pushed.values()) - newest.pushed.get(asked.object_id, 0)
        if others + size > self._limits.size:
            raise _refusal(f"at most {self._limits.size} bytes for a reply")
        newest.pushed[asked.object_id] = max(size, newest.pushed.get(asked.object_id, 0))
        self._drop(held, roots[-1], store)

    def _drop(self, held: OrderedDict[str, _Held], wanted: str, store: Any) -> None:
        """Drop a hospital's oldest replies until the limits hold; `wanted` is kept."""
        for root in [root for root in held if root != wanted]:
            size = sum(sum(reply.pushed.values()) for reply in held.values())
            objects = sum(len(reply.objects) for reply in held.values())
            if size <= self._limits.size and objects <= self._limits.objects:
                break
            store.delete(root)
            del held[root]


def _refusal(expected: str) -> HTTPException:
    return HTTPException(TOO_LARGE, f"{expected} can be stored here")
