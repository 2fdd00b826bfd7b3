"""What a coordinator received, kept as it arrived so that attacks can be run on it.

`privacy.record=true` wraps the grid of a simulation. A reply becomes one NumPy file in the cell's
folder `received`, named after its order, kind, round and site; the models that requests contained
are stored once each, by their hash. A real coordinator could keep the same. Of a masked reply (in
a secure sum) only the model that it answers is kept; the step to the next one is what all sent.

    received/plan.json                        the plan of the cell
    received/model-<hash>.npz                 a model that was sent
    received/00007-train-2-North.npz          a reply
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.disk import Disk, refusals
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import decode_reply, decode_request
from fedsgcg.common.wire.payload import Weights

FOLDER: Final = "received"
PLAN: Final = "plan.json"
REPLY: Final = re.compile(r"(\d+)-([a-z.]+)-(\d+)-(.+)\.npz")


@dataclass(frozen=True)
class Received:
    """One reply.

    Attributes:
        site: Its sender.
        kind: Type of the message that it answers.
        round: Round of the message.
        sent: The model that the request contained.
        weights: The site's model, None if it sent none.
        statistics: Class statistics, None if it sent none.
    """

    site: str
    kind: str
    round: int
    sent: Weights
    weights: Weights | None
    statistics: ClassStatistics | None


class RecordingGrid(Grid):
    """A grid that keeps what passes through it.

    Args:
        grid: The grid that does the work.
        folder: The cell's folder.
        plan: The plan of the cell.
        disk: Disk access; a refused write is SRV-401, and the run resumes.
    """

    def __init__(self, grid: Grid, folder: Path, plan: Plan, disk: Disk) -> None:
        self._grid = grid
        self._folder = folder / FOLDER
        self._disk = disk
        with refusals(self._folder):
            disk.make_folder(self._folder)
        disk.write(self._folder / PLAN, json.dumps(plan.to_tree()).encode())
        self._asked: dict[str, tuple[str, str]] = {}
        self._count = len(list(self._folder.glob("*.npz")))

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all sites."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes of all sites."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass messages on and keep the models in them."""
        messages = list(messages)
        kept = [(str(each.metadata.message_type), self._model(each.content)) for each in messages]
        identifiers = list(self._grid.push_messages(messages))
        self._asked |= dict(zip(identifiers, kept, strict=False))
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived, and keep them."""
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            kind, model = self._asked.pop(reply.metadata.reply_to_message_id, ("", ""))
            if model and not reply.has_error():
                self._keep(reply.content, kind, model)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and wait for all replies; they are not kept."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def _model(self, content: RecordDict) -> str:
        try:
            weights = decode_request(content).weights
        except FedsgcgError:
            return ""  # not a request: it has no model
        if weights is None:
            return ""
        digest = weights.digest()[:32]
        path = self._folder / f"model-{digest}.npz"
        if not path.exists():
            self._disk.write(path, _packed(_arrays(weights)))
        return digest

    def _keep(self, content: RecordDict, kind: str, model: str) -> None:
        try:
            reply = decode_reply(content)
        except FedsgcgError:
            return
        masked = reply.masked is not None
        if reply.error or (reply.weights is None and reply.statistics is None and not masked):
            return
        parts: dict[str, Any] = {"model": np.array(model)}
        if reply.weights is not None:
            parts |= _arrays(reply.weights)
        if (found := reply.statistics) is not None:
            parts |= {"count": found.count, "mean": found.mean, "scatter": found.scatter}
        name = f"{self._count:05d}-{kind}-{reply.identity.round}-{reply.site}.npz"
        self._count += 1
        self._disk.write(self._folder / name, _packed(parts))


def read_received(cell: Path) -> list[Received]:
    """Return the replies that were kept in a cell's folder, in their order."""
    folder, found = cell / FOLDER, []
    for path in sorted(folder.glob("*.npz")):
        named = REPLY.fullmatch(path.name)
        if named is None:
            continue
        with np.load(path, allow_pickle=False) as parts:
            with np.load(folder / f"model-{parts['model']}.npz", allow_pickle=False) as sent:
                model = _weights(sent)
            statistics = None
            if "count" in parts:
                statistics = ClassStatistics(parts["count"], parts["mean"], parts["scatter"])
            weights = _weights(parts) if "values" in parts else None
        found.append(Received(named[4], named[2], int(named[3]), model, weights, statistics))
    return found


def _packed(parts: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **parts)
    return file.getvalue()


def _arrays(weights: Weights) -> dict[str, npt.NDArray[Any]]:
    return {"values": np.asarray(weights.values), "layout": np.array(weights.encode_layout())}


def _weights(parts: Any) -> Weights:
    return Weights.decode(str(parts["layout"]), np.array(parts["values"]))
