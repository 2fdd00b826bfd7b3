"""A federation inside one process: the same ServerApp and ClientApp, without a transport.

Flower's only simulation backend is Ray, whose fixed cost is many seconds per run. A study runs
dozens of small federations, so its cells use this `Grid` instead (docs/explanation/flower.md,
"Simulation without Ray"). Messages are encoded and decoded by `common.wire.messages` as on a real
link; only Flower's own transport is left out.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Iterable, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsgcg.common.seeding import stream_seed

CLOSING_S = 2.0


class InProcessGrid(Grid):
    """Passes messages to one ClientApp, one node after the other, in a separate thread.

    Because of the thread the coordinator's deadlines hold: a site that hangs blocks the sites
    queued behind it, but not the round loop, which gives up at its deadline.

    Args:
        client_app: The app that every node runs.
        sites: Names of the sites, one node each.
        run_id: Run id for the contexts.
    """

    def __init__(self, client_app: ClientApp, sites: Sequence[str], run_id: int) -> None:
        self._run = Run.create_empty(run_id)
        self._client_app = client_app
        # Node ids of a real federation are random. Deriving them from the name gives an order that
        # no code can rely on.
        self._contexts = {
            stream_seed(run_id, "node", site): _context(run_id, site) for site in sites
        }
        self._waiting: queue.Queue[Message | None] = queue.Queue()
        self._replies: dict[str, Message] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="hospitals", daemon=True)
        self._thread.start()

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (Flower's deprecated alternative to the `Message` constructor)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all sites."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes of all sites."""
        return [NodeInfo(node_id=node_id) for node_id in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for their nodes and return their ids."""
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self._contexts:
                raise ValueError(f"unknown node {message.metadata.dst_node_id}")
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())  # as Flower's own grids do
            ids.append(message.metadata.message_id)
            self._waiting.put(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived, each only once."""
        with self._lock:
            return [
                self._replies.pop(identifier)
                for identifier in list(message_ids)
                if identifier in self._replies
            ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and wait for all replies, or until `timeout` seconds have passed."""
        missing = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while missing and (deadline is None or time.monotonic() < deadline):
            for reply in self.pull_messages(missing):
                missing.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.01)
        return replies

    def close(self) -> None:
        """Discard queued messages and end the thread; a running site gets a moment to finish."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)
        self._thread.join(CLOSING_S)

    def _work(self) -> None:
        while (message := self._waiting.get()) is not None:
            reply = self._serve(message)
            with self._lock:
                self._replies[message.metadata.message_id] = reply

    def _serve(self, message: Message) -> Message:
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        # Any exception of a site's code becomes an error reply, as on a real node.
        except Exception:
            traceback.print_exc()
            error = Error(
                ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the ClientApp raised an exception"
            )
            return Message(error, reply_to=message)


def run_in_process(
    server_app: ServerApp, client_app: ClientApp, sites: Sequence[str], run_id: int = 1
) -> None:
    """Run one federation in this process until it ends; raises what the ServerApp raises."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    grid = InProcessGrid(client_app, sites, run_id)
    context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config={})
    try:
        server_app(grid, context)
    finally:
        grid.close()


def _context(run_id: int, site: str) -> Context:
    node_id = stream_seed(run_id, "node", site)
    return Context(
        run_id=run_id,
        node_id=node_id,
        node_config={"site": site},
        state=RecordDict(),
        run_config={},
    )
